//! Records that were moved out of memory and need not survive a restart.
//!
//! # Why a database of its own
//! They must not go through the WAL, and RocksDB refuses writes without the WAL in a database that recycles WAL files,
//! which is what makes a sync cheap. Apart from that it makes clearing them at start a matter of removing a directory.
//!
//! It is opened with the first record that is paged out; a broker that pages nothing out never has it. Its memtables
//! and blocks count against the same limits as those of the durable database.
//!
//! # When it fails
//! What could not be paged out stays in memory, and it is tried again after a while. A database that RocksDB has given up
//! on takes no more writes for as long as it is open, and to close it would lose what it has in memory. So it is kept for
//! reading, and another one takes its place.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use rocksdb::{ColumnFamily, ColumnFamilyDescriptor, DB, DEFAULT_COLUMN_FAMILY_NAME, Options, WriteOptions};

use super::read::last_run_before;
use super::{QueueId, RoundBuilder, stall};

/// Its place in the data directory.
const DIRECTORY: &str = "pages";
/// Where the pages of earlier starts wait for their removal.
const REMOVED: &str = "pages.removed";

/// Writes in a row that may fail before another database takes the place of the one that refuses them.
const MAX_FAILURES: u32 = 2;
/// Databases that may be open: each may hold write buffers for good.
const MAX_DATABASES: usize = 8;

pub(super) struct Pages {
    directory: PathBuf,
    base: Options,
    family: Options,
    /// The last one takes the writes.
    dbs: RwLock<Vec<DB>>,
    /// Queues that have or had pages since the store was opened.
    queues: RwLock<HashSet<QueueId>>,
    /// How long nothing is paged out after that has failed.
    pause: Duration,
    trouble: Mutex<Trouble>,
}

/// What has failed lately.
#[derive(Default)]
struct Trouble {
    /// Writes in a row.
    failures: u32,
    until: Option<Instant>,
}

/// The databases, kept open for a read.
pub(super) struct OpenPages<'a> {
    dbs: RwLockReadGuard<'a, Vec<DB>>,
}

impl Pages {
    /// Throws away what an earlier start left in `data_directory`, which nobody else may have open.
    pub fn new(data_directory: &Path, base: Options, family: Options, pause: Duration) -> Pages {
        let directory = data_directory.join(DIRECTORY);
        clear(&directory, &data_directory.join(REMOVED));
        let (dbs, queues, trouble) = Default::default();
        Pages { directory, base, family, dbs, queues, pause, trouble }
    }

    /// Whether records can be paged out, as far as is known.
    pub fn is_working(&self) -> bool {
        self.trouble.lock().until.is_none_or(|until| until <= Instant::now())
    }

    /// Writes the pages of a round. Answers their bytes.
    ///
    /// # Errors
    /// What RocksDB says; no record counts as paged out then. It is left alone for a while.
    pub fn write(&self, round: &mut RoundBuilder) -> Result<usize, rocksdb::Error> {
        let written = self.try_write(round);
        match written {
            Ok(0) => {}
            Ok(_) => *self.trouble.lock() = Trouble::default(),
            Err(_) => {
                let mut trouble = self.trouble.lock();
                trouble.failures += 1;
                trouble.until = Some(Instant::now() + self.pause);
            }
        }
        written
    }

    fn try_write(&self, round: &mut RoundBuilder) -> Result<usize, rocksdb::Error> {
        let last_run = |queue, until| {
            let pages = self.of(queue)?;
            let (db, family) = pages.families().last()?;
            last_run_before(db, family, queue, until)
        };
        let batch = round.pages_batch(&|queue| self.queues.read().contains(&queue), &last_run);
        if batch.is_empty() {
            return Ok(0);
        }
        self.provide()?;
        let bytes = batch.size_in_bytes();
        if let Some(db) = self.dbs.read().last() {
            self.queues.write().extend(round.paging_queues());
            let mut options = WriteOptions::default();
            options.disable_wal(true);
            stall::write(db, &batch, &mut options)?;
            let mut queues = self.queues.write();
            for queue in round.deleted_queues() {
                queues.remove(&queue);
            }
        }
        Ok(bytes)
    }

    /// Opens a database if there is none, or none that still takes writes.
    fn provide(&self) -> Result<(), rocksdb::Error> {
        let (count, failures) = (self.dbs.read().len(), self.trouble.lock().failures);
        let directory = match count {
            0 => self.directory.clone(),
            ..MAX_DATABASES if failures >= MAX_FAILURES => self.directory.join(count.to_string()),
            _ => return Ok(()),
        };
        // RocksDB makes the last directory only; what is wrong with the others it says itself.
        let _ = std::fs::create_dir_all(&directory);
        let families = [ColumnFamilyDescriptor::new(DEFAULT_COLUMN_FAMILY_NAME, self.family.clone())];
        let db = DB::open_cf_descriptors(&self.base, &directory, families)?;
        self.dbs.write().push(db);
        Ok(())
    }

    /// The databases, if they may hold something of the queue.
    pub fn of(&self, queue: QueueId) -> Option<OpenPages<'_>> {
        self.queues.read().contains(&queue).then(|| self.open())
    }

    /// The databases, of which there are none as long as nothing was ever paged out.
    pub fn open(&self) -> OpenPages<'_> {
        OpenPages { dbs: self.dbs.read() }
    }

    pub fn cancel_background_work(&self) {
        self.dbs.read().iter().for_each(|db| db.cancel_all_background_work(false));
    }

    pub fn close(&self) {
        let dbs = std::mem::take(&mut *self.dbs.write());
        if dbs.is_empty() {
            return;
        }
        dbs.iter().for_each(|db| db.cancel_all_background_work(true));
        drop(dbs);
        let _ = std::fs::remove_dir_all(&self.directory); // or at the next start
    }
}

impl OpenPages<'_> {
    /// The oldest first.
    pub fn families(&self) -> impl DoubleEndedIterator<Item = (&DB, &ColumnFamily)> {
        self.dbs.iter().filter_map(|db| Some((db, db.cf_handle(DEFAULT_COLUMN_FAMILY_NAME)?)))
    }
}

/// Gets old pages out of the way at once, and removes them on a thread of their own: there may be many gigabytes.
fn clear(directory: &Path, removed: &Path) {
    let moved = std::fs::rename(directory, removed).is_ok();
    if !moved && directory.exists() {
        let _ = std::fs::remove_dir_all(directory); // an earlier removal was cut short
    }
    if removed.exists() {
        let removed = removed.to_owned();
        let remove = move || std::fs::remove_dir_all(removed).map_err(|error| tracing::warn!(%error, "old pages stay"));
        let _ = std::thread::Builder::new().name("store-sweep".to_owned()).spawn(remove);
    }
}
