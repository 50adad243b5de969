//! The database: its column families, how RocksDB is set up for a log that is eaten from the front, and closing.
//!
//! # Why these options
//! - *The WAL is preallocated and recycled*: a sync on blocks that were written before is a bare `fdatasync`, with
//!   no journal commit for a changed file size. Recycling demands point-in-time recovery, which is what a log wants
//!   anyway: after a kill, everything up to the first torn record is there.
//! - *Values from [`MIN_BLOB_BYTES`] go to blob files*: compaction then moves keys only, and a blob file whose runs
//!   are all deleted is dropped without being read. The LSM tree of a log of 10 GB is a few megabytes.
//! - *Nothing is flushed at close, but at open*: the WAL is bounded, so replaying it takes little time; and when its
//!   records are in table files, a torn end of it is never met again.

use std::fmt::Display;
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamilyDescriptor, DB, DBCompressionType, DBRecoveryMode, InfoLogger, LogLevel,
    Options, WriteBufferManager, WriteOptions,
};

use super::bodies::Bodies;
use super::mirror::Mirror;
use super::notes::NoteOwners;
use super::pages::Pages;
use super::recovery::is_damage;
use super::round::RoundBuilder;
use super::stall;
use super::sweep::Sweeper;
use super::{Durability, QueueId, QueueSeq, StoreError, StoreOptions, key};

/// Runs of at least this size are kept apart from their keys.
const MIN_BLOB_BYTES: u64 = 1024;

/// Notes of at least this size are kept apart from their keys.
const MIN_NOTE_BLOB_BYTES: u64 = 16 * 1024;

/// Blob files are closed at this size (or when the memtable that is flushed ends).
const BLOB_FILE_BYTES: u64 = 64 * 1024 * 1024;

/// WAL files kept for reuse. One is open, and a flush frees them one or two at a time.
pub(super) const RECYCLED_WALS: usize = 4;

/// Memtables of a family that is written much: one that fills and one that is flushed. When both are full the commit thread
/// waits, and with it publishers, which is better than memory that grows or RocksDB's guess at a rate.
const MEMTABLES: i32 = 2;

/// Table and blob files that are kept open.
const OPEN_FILES: i32 = 128;

/// Unreadable stretches that are remembered one by one.
const MAX_UNREADABLE: usize = 100_000;

/// What the `rocksdb` crate has no functions for.
const UNBOUND_OPTIONS: &str = "avoid_flush_during_shutdown=true";

/// The database of a store, until it is closed.
pub(super) struct Rocks {
    opener: Opener,
    db: RwLock<Option<DB>>,
    pages: Pages,
    note_owners: NoteOwners,
    bodies: Bodies,
    sweeper: Sweeper,
    mirror: Mirror,
    damaged: AtomicU64,
    /// Positions that reads have skipped because they cannot be read, up to [`MAX_UNREADABLE`].
    unreadable: Mutex<Vec<(QueueId, QueueSeq, QueueSeq)>>,
    /// As `unreadable`, owners and keys of notes.
    unreadable_notes: Mutex<Vec<(QueueId, Vec<u8>)>>,
    /// The last sequence number that is known to be synced.
    synced: AtomicU64,
    /// Something was written that was not synced since.
    unsynced: AtomicBool,
    closed: AtomicBool,
}

/// How the database is opened.
struct Opener {
    path: PathBuf,
    base: Options,
    known: Vec<(&'static str, Options)>,
    /// For families of a later version's.
    unknown: Options,
}

impl Opener {
    fn families(&self) -> Result<Vec<ColumnFamilyDescriptor>, rocksdb::Error> {
        let is_new = !self.path.join("CURRENT").exists();
        let existing = if is_new { vec![] } else { DB::list_cf(&self.base, &self.path)? };
        let known = self.known.iter().map(|(name, options)| ColumnFamilyDescriptor::new(*name, options.clone()));
        // A later version's families are opened as well, so that it is the format record that gets to refuse them.
        let unknown = existing.iter().filter(|name| !self.known.iter().any(|(known, _)| known == name));
        let unknown = unknown.map(|name| ColumnFamilyDescriptor::new(name, self.unknown.clone()));
        Ok(known.chain(unknown).collect())
    }

    fn open(&self) -> Result<DB, rocksdb::Error> {
        DB::open_cf_descriptors(&self.base, &self.path, self.families()?)
    }

    /// For reading what is there, when it cannot be opened for more.
    fn open_read_only(&self) -> Result<DB, rocksdb::Error> {
        DB::open_cf_descriptors_read_only(&self.base, &self.path, self.families()?, false)
    }
}

impl Rocks {
    /// Opens the database, creating it or its column families where they do not exist, and throws away what was paged out.
    ///
    /// # Errors
    /// [`StoreError::InUse`] or [`StoreError::Open`].
    pub fn open(options: &StoreOptions) -> Result<Rocks, StoreError> {
        Rocks::open_for(options, &[])
    }

    /// Opens the database of a directory whose tables may have blocks taken out, which compaction would take for damage.
    ///
    /// # Errors
    /// As [`Rocks::open`].
    pub fn open_to_repair(path: &Path) -> Result<Rocks, StoreError> {
        let options = StoreOptions { path: path.to_owned(), ..StoreOptions::default() };
        Rocks::open_for(&options, &["compaction_verify_record_count=false"])
    }

    fn open_for(options: &StoreOptions, extra: &[&str]) -> Result<Rocks, StoreError> {
        let path = options.path.clone();
        let failed = |error: rocksdb::Error| open_error(&path, error);
        if !path.join("CURRENT").exists() {
            create_directory(&path)
                .map_err(|error| StoreError::Open { path: path.clone(), reason: error.to_string() })?;
        }
        let cache = Cache::new_lru_cache(options.block_cache_bytes);
        let buffers = WriteBufferManager::new_write_buffer_manager(options.write_buffer_bytes, false);
        let mut base = database_options(&buffers, extra).map_err(failed)?;
        log_options(&mut base, options);
        let (known, unknown) = (known_families(options, &cache), small_family(options, &cache));
        let opener = Opener { path: path.clone(), base, known, unknown };
        let db = opener.open().map_err(failed)?;
        let pages_base = database_options(&buffers, &[]).map_err(failed)?;
        let pages = Pages::new(&path, pages_base, log_family(options, &cache), options.retry);
        Ok(Rocks {
            mirror: Mirror::new(&path),
            opener,
            db: RwLock::new(Some(db)),
            pages,
            note_owners: NoteOwners::default(),
            bodies: Bodies::default(),
            sweeper: Sweeper::default(),
            damaged: AtomicU64::new(0),
            unreadable: Mutex::default(),
            unreadable_notes: Mutex::default(),
            synced: AtomicU64::new(0),
            // What is reserved at open is synced in a store that syncs.
            unsynced: AtomicBool::new(options.durability == Durability::Os),
            closed: AtomicBool::new(false),
        })
    }

    /// Closes the database after a failure and opens it anew, which reads the write-ahead log as the disk has it and
    /// writes what it holds to table files. Reads wait meanwhile.
    ///
    /// # Errors
    /// What RocksDB says. What was written before can still be read, if there is any way to.
    pub fn reopen(&self) -> Result<(), String> {
        if let Some(db) = &*self.db.read() {
            db.cancel_all_background_work(false); // or a compaction would be waited for
        }
        let mut guard = self.db.write();
        if let Some(db) = guard.take() {
            db.cancel_all_background_work(true);
        }
        match self.opener.open() {
            Ok(db) => {
                *guard = Some(db);
                self.unsynced.store(false, Ordering::Relaxed);
                Ok(())
            }
            Err(error) => {
                *guard = self.opener.open_read_only().ok();
                Err(format!("opening it anew: {error}"))
            }
        }
    }

    /// Runs `work` on the open database; it stays open for so long.
    ///
    /// # Errors
    /// [`StoreError::Closed`], [`StoreError::Read`] if the database could not be opened again after a failure, and what
    /// `work` answers.
    pub fn with<T>(&self, work: impl FnOnce(&DB) -> Result<T, StoreError>) -> Result<T, StoreError> {
        work(self.db.read().as_ref().ok_or_else(|| self.not_open())?)
    }

    fn not_open(&self) -> StoreError {
        match self.closed.load(Ordering::Relaxed) {
            true => StoreError::Closed,
            false => StoreError::Read { what: "the store", reason: "it could not be opened again yet".to_owned() },
        }
    }

    /// Writes the part of a round that leaves memory and need not survive. Answers its bytes.
    ///
    /// # Errors
    /// What RocksDB says. Nothing of it may be taken for paged out.
    pub fn write_pages(&self, round: &mut RoundBuilder) -> Result<usize, rocksdb::Error> {
        self.pages.write(round)
    }

    /// Writes everything else of a round in one batch. Answers the bytes of the batch.
    ///
    /// # Errors
    /// The text of the failure. What is on disk of the batch is then unknown.
    pub fn write_log(&self, round: &mut RoundBuilder, sync: bool) -> Result<usize, String> {
        let guard = self.db.read();
        let db = guard.as_ref().ok_or_else(|| self.not_open().to_string())?;
        let (batch, ended_bodies) = round.log_batch(self, db).map_err(|error| error.to_string())?;
        let bytes = batch.size_in_bytes();
        if !batch.is_empty() {
            let mut options = WriteOptions::default();
            options.set_sync(sync);
            stall::write(db, &batch, &mut options).map_err(|error| self.write_failure(&error))?;
            self.unsynced.store(!sync, Ordering::Relaxed);
            self.mirror.wrote(round.tails());
            if sync {
                self.synced.store(db.latest_sequence_number(), Ordering::Relaxed);
            }
        }
        self.note_owners.wrote(round);
        self.sweeper.note(round.deleted_records());
        self.sweeper.note_notes(round.deleted_notes());
        self.sweeper.note_bodies(&ended_bodies);
        Ok(bytes)
    }

    /// Free bytes on the volume, for what the process may use; `None` when the system does not say.
    pub fn free_bytes(&self) -> Option<u64> {
        let volume = rustix::fs::statvfs(&self.opener.path).ok()?;
        Some(volume.f_bavail.saturating_mul(volume.f_frsize))
    }

    pub fn pages(&self) -> &Pages {
        &self.pages
    }

    pub fn note_owners(&self) -> &NoteOwners {
        &self.note_owners
    }

    pub fn bodies(&self) -> &Bodies {
        &self.bodies
    }

    pub fn sweeper(&self) -> &Sweeper {
        &self.sweeper
    }

    /// Ends the sweeping thread, in the middle of a compaction if need be. Nothing can be written afterwards.
    pub fn stop_sweeping(&self) {
        self.sweeper.stop();
        if let Some(db) = &*self.db.read() {
            db.cancel_all_background_work(false);
        }
        self.pages.cancel_background_work();
    }

    /// Waits for running reads and closes the database, with everything that was written synced.
    ///
    /// # Errors
    /// What the last sync said. The database is closed all the same.
    pub fn close(&self) -> Result<(), rocksdb::Error> {
        self.closed.store(true, Ordering::Relaxed);
        let Some(db) = self.db.write().take() else { return Ok(()) };
        let synced = if self.unsynced.load(Ordering::Relaxed) { db.flush_wal(true) } else { Ok(()) };
        self.pages.close();
        db.cancel_all_background_work(true);
        synced
    }

    /// What a failed write means to whoever reads the log.
    fn write_failure(&self, error: &rocksdb::Error) -> String {
        let path = self.path().display();
        let way_out = match is_damage(error) {
            true => format!("; stop the broker and run 'leveret check --repair --data-dir {path}'"),
            false => String::new(),
        };
        format!("writing and syncing the log: {error}{way_out}")
    }

    pub fn mirror(&self) -> &Mirror {
        &self.mirror
    }

    /// The last sequence number that is known to be synced; 0 if none was since the database was opened.
    pub fn synced(&self) -> u64 {
        self.synced.load(Ordering::Relaxed)
    }

    /// Syncs what was written without.
    ///
    /// # Errors
    /// [`StoreError::Open`] with what RocksDB says.
    pub fn sync(&self) -> Result<(), StoreError> {
        self.with(|db| db.flush_wal(true).map_err(|error| self.open_error(error)))
    }

    /// Remembers positions that a read had to skip.
    pub fn note_unreadable(&self, queue: QueueId, from: QueueSeq, until: QueueSeq) {
        let mut unreadable = self.unreadable.lock();
        if unreadable.len() < MAX_UNREADABLE {
            unreadable.push((queue, from, until));
        }
    }

    /// Remembers a note that a read had to skip, or behind which it had to.
    pub fn note_unreadable_note(&self, owner: QueueId, key: &[u8]) {
        let mut unreadable = self.unreadable_notes.lock();
        if unreadable.len() < MAX_UNREADABLE {
            unreadable.push((owner, key.to_vec()));
        }
    }

    /// What [`Rocks::note_unreadable_note`] has gathered.
    pub fn take_unreadable_notes(&self) -> Vec<(QueueId, Vec<u8>)> {
        std::mem::take(&mut *self.unreadable_notes.lock())
    }

    /// What [`Rocks::note_unreadable`] has gathered.
    pub fn take_unreadable(&self) -> Vec<(QueueId, QueueSeq, QueueSeq)> {
        std::mem::take(&mut *self.unreadable.lock())
    }

    pub fn path(&self) -> &Path {
        &self.opener.path
    }

    /// [`StoreError::Open`] for this database.
    pub fn open_error(&self, reason: impl Display) -> StoreError {
        StoreError::Open { path: self.opener.path.clone(), reason: reason.to_string() }
    }

    pub fn count_damage(&self) {
        self.damaged.fetch_add(1, Ordering::Relaxed);
    }

    pub fn damaged(&self) -> u64 {
        self.damaged.load(Ordering::Relaxed)
    }
}

/// Creates the directory of a new database, if it is not there, and syncs the directories above it. RocksDB syncs what is in
/// its directory, and never that there is one: without this a power failure can take the directory with all that is in it.
fn create_directory(path: &Path) -> std::io::Result<()> {
    match std::fs::create_dir(path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    for above in path.canonicalize()?.ancestors().skip(1) {
        // One that may not be read is not the broker's own, and was there before.
        let Ok(directory) = File::open(above) else { break };
        match directory.sync_all() {
            // Some file systems cannot sync a directory, or have nothing to sync.
            Err(error) if !matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::ReadOnlyFilesystem) => {
                return Err(error);
            }
            _ => {}
        }
    }
    Ok(())
}

/// RocksDB has no error code of its own for a lock that somebody else holds.
fn open_error(path: &Path, error: rocksdb::Error) -> StoreError {
    let reason = error.into_string();
    let locked = reason.contains("lock hold by current process")
        || (reason.contains("While lock file") && reason.contains("temporarily unavailable"));
    if locked {
        StoreError::InUse { path: path.to_owned() }
    } else {
        StoreError::Open { path: path.to_owned(), reason }
    }
}

fn known_families(options: &StoreOptions, cache: &Cache) -> Vec<(&'static str, Options)> {
    let small = || small_family(options, cache);
    vec![
        ("default", small()),
        (key::META, small()),
        (key::META_COPY, small()),
        (key::LOG, log_family(options, cache)),
        (key::STATE, small()),
        (key::CONSUMED, small()),
        (key::NOTES, notes_family(options, cache)),
        (key::BODIES, log_family(options, cache)),
        (key::BODY_REFERENCES, small()),
    ]
}

/// What both databases are opened with.
fn database_options(buffers: &WriteBufferManager, extra: &[&str]) -> Result<Options, rocksdb::Error> {
    let unbound = [&[UNBOUND_OPTIONS], extra].concat().join(";");
    let mut base = Options::default().get_options_from_string(unbound)?;
    base.create_if_missing(true);
    base.create_missing_column_families(true);
    base.set_info_logger(InfoLogger::new_callback_logger(LogLevel::Warn, |level, text| match level {
        LogLevel::Error | LogLevel::Fatal => tracing::error!(target: "leveret::store::rocksdb", "{}", text.trim()),
        LogLevel::Warn => tracing::warn!(target: "leveret::store::rocksdb", "{}", text.trim()),
        _ => {}
    }));
    base.set_log_level(LogLevel::Warn);
    base.set_write_buffer_manager(buffers);
    // One thread writes, so nothing in the write path needs to be concurrent.
    base.set_allow_concurrent_memtable_write(false);
    base.set_enable_write_thread_adaptive_yield(false);
    base.set_max_background_jobs(2);
    base.set_max_open_files(OPEN_FILES);
    base.set_max_file_opening_threads(2);
    base.set_skip_stats_update_on_db_open(true);
    base.set_stats_dump_period_sec(0);
    base.set_stats_persist_period_sec(0);
    base.set_bytes_per_sync(1024 * 1024);
    base.set_compaction_readahead_size(256 * 1024);
    base.set_manifest_preallocation_size(64 * 1024);
    base.set_max_manifest_file_size(16 * 1024 * 1024);
    Ok(base)
}

/// The WAL of the durable database.
fn log_options(base: &mut Options, options: &StoreOptions) {
    base.set_recycle_log_file_num(RECYCLED_WALS);
    base.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
    base.set_max_total_wal_size(2 * options.write_buffer_bytes as u64);
}

/// Where a family's options begin. Many range deletions in one memtable make its flush, and with it writes, wait for
/// tens of seconds (RocksDB sizes each of them against every file), so a memtable with too many is flushed early.
fn family_base() -> Options {
    const MANY_RANGE_DELETIONS: &str = "memtable_max_range_deletions=500";
    Options::default().get_options_from_string(MANY_RANGE_DELETIONS).unwrap_or_else(|error| {
        tracing::warn!(%error, "range deletions are not bounded");
        Options::default()
    })
}

fn log_family(options: &StoreOptions, cache: &Cache) -> Options {
    let mut family = family_base();
    family.set_write_buffer_size(options.write_buffer_bytes / 2);
    family.set_max_write_buffer_number(MEMTABLES);
    family.set_compression_type(DBCompressionType::Lz4);
    family.set_level_compaction_dynamic_level_bytes(true);
    family.set_target_file_size_base(32 * 1024 * 1024);
    family.set_max_bytes_for_level_base(128 * 1024 * 1024);
    family.set_enable_blob_files(true);
    family.set_min_blob_size(MIN_BLOB_BYTES);
    family.set_blob_file_size(BLOB_FILE_BYTES);
    family.set_blob_compression_type(DBCompressionType::Lz4);
    family.set_block_based_table_factory(&table_options(cache, 16 * 1024));
    family
}

/// For families whose records are few or small, and overwritten or deleted soon.
fn small_family(options: &StoreOptions, cache: &Cache) -> Options {
    let mut family = family_base();
    family.set_write_buffer_size(options.write_buffer_bytes / 4);
    family.set_compression_type(DBCompressionType::Lz4);
    family.set_target_file_size_base(8 * 1024 * 1024);
    family.set_max_bytes_for_level_base(32 * 1024 * 1024);
    family.set_block_based_table_factory(&table_options(cache, 4 * 1024));
    family
}

/// For notes. Some are few and overwritten, others come and go by the million within a minute: the latter are gone
/// before they reach the last level, and are swept up when they are not. Large values are kept apart from their keys, as in
/// the log, but not those of the common size: their blob files would be held by the last note in them.
fn notes_family(options: &StoreOptions, cache: &Cache) -> Options {
    let mut family = small_family(options, cache);
    family.set_max_write_buffer_number(MEMTABLES);
    family.set_level_compaction_dynamic_level_bytes(true);
    family.set_enable_blob_files(true);
    family.set_min_blob_size(MIN_NOTE_BLOB_BYTES);
    family.set_blob_file_size(BLOB_FILE_BYTES);
    family.set_blob_compression_type(DBCompressionType::Lz4);
    family
}

/// Index and filter blocks count against the one block cache, so that it bounds what reading costs in memory.
fn table_options(cache: &Cache, block_bytes: usize) -> BlockBasedOptions {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(cache);
    table.set_block_size(block_bytes);
    table.set_cache_index_and_filter_blocks(true);
    table.set_pin_l0_filter_and_index_blocks_in_cache(true);
    table
}
