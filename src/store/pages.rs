//! Records that were moved out of memory and need not survive a restart.
//!
//! # Why a database of its own
//! They must not go through the WAL, and RocksDB refuses writes without the WAL in a database that recycles WAL files,
//! which is what makes a sync cheap. Apart from that it makes clearing them at start a matter of removing a directory.
//!
//! It is opened with the first record that is paged out; a broker that pages nothing out never has it. Its memtables
//! and blocks count against the same limits as those of the durable database.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock, RwLockReadGuard};
use rocksdb::{ColumnFamily, ColumnFamilyDescriptor, DB, DEFAULT_COLUMN_FAMILY_NAME, Options, WriteOptions};

use super::read::last_run_before;
use super::{QueueId, RoundBuilder};

/// Its place in the data directory.
const DIRECTORY: &str = "pages";
/// Where the pages of earlier starts wait for their removal.
const REMOVED: &str = "pages.removed";

pub(super) struct Pages {
    directory: PathBuf,
    base: Options,
    family: Options,
    db: RwLock<Option<DB>>,
    /// Queues that have or had pages since the store was opened.
    queues: RwLock<HashSet<QueueId>>,
    /// How long nothing is paged out after that has failed.
    pause: Duration,
    /// After a failure: when to try again.
    paused_until: Mutex<Option<Instant>>,
}

/// The database, kept open for a read.
pub(super) struct OpenPages<'a> {
    db: RwLockReadGuard<'a, Option<DB>>,
}

impl Pages {
    /// Throws away what an earlier start left in `data_directory`, which nobody else may have open.
    pub fn new(data_directory: &Path, base: Options, family: Options, pause: Duration) -> Pages {
        let directory = data_directory.join(DIRECTORY);
        clear(&directory, &data_directory.join(REMOVED));
        Pages {
            directory,
            base,
            family,
            db: RwLock::default(),
            queues: RwLock::default(),
            pause,
            paused_until: Mutex::default(),
        }
    }

    /// Whether records can be paged out, as far as is known.
    pub fn is_working(&self) -> bool {
        self.paused_until.lock().is_none_or(|until| until <= Instant::now())
    }

    /// Writes the pages of a round. Answers their bytes.
    ///
    /// # Errors
    /// What RocksDB says; no record counts as paged out then. It is left alone for a while.
    pub fn write(&self, round: &mut RoundBuilder) -> Result<usize, rocksdb::Error> {
        let written = self.try_write(round);
        *self.paused_until.lock() = written.as_ref().err().map(|_| Instant::now() + self.pause);
        written
    }

    fn try_write(&self, round: &mut RoundBuilder) -> Result<usize, rocksdb::Error> {
        let last_run = |queue, until| {
            let pages = self.of(queue)?;
            let (db, family) = pages.family()?;
            last_run_before(db, family, queue, until)
        };
        let batch = round.pages_batch(&|queue| self.queues.read().contains(&queue), &last_run);
        if batch.is_empty() {
            return Ok(0);
        }
        if self.db.read().is_none() {
            let families = [ColumnFamilyDescriptor::new(DEFAULT_COLUMN_FAMILY_NAME, self.family.clone())];
            *self.db.write() = Some(DB::open_cf_descriptors(&self.base, &self.directory, families)?);
        }
        let bytes = batch.size_in_bytes();
        if let Some(db) = &*self.db.read() {
            self.queues.write().extend(round.paging_queues());
            let mut options = WriteOptions::default();
            options.disable_wal(true);
            db.write_opt(batch, &options)?;
            let mut queues = self.queues.write();
            for queue in round.deleted_queues() {
                queues.remove(&queue);
            }
        }
        Ok(bytes)
    }

    /// The database, if it may hold something of the queue.
    pub fn of(&self, queue: QueueId) -> Option<OpenPages<'_>> {
        self.queues.read().contains(&queue).then(|| self.open())
    }

    /// The database, which has no family as long as nothing was ever paged out.
    pub fn open(&self) -> OpenPages<'_> {
        OpenPages { db: self.db.read() }
    }

    pub fn cancel_background_work(&self) {
        if let Some(db) = &*self.db.read() {
            db.cancel_all_background_work(false);
        }
    }

    pub fn close(&self) {
        if let Some(db) = self.db.write().take() {
            db.cancel_all_background_work(true);
            drop(db);
            let _ = std::fs::remove_dir_all(&self.directory); // or at the next start
        }
    }
}

impl OpenPages<'_> {
    pub fn family(&self) -> Option<(&DB, &ColumnFamily)> {
        let db = self.db.as_ref()?;
        Some((db, db.cf_handle(DEFAULT_COLUMN_FAMILY_NAME)?))
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
