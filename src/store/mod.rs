//! Durable bytes by (queue, position), and notes by (owner, key): rounds, definitions, read-back and recovery. Knows
//! nothing of AMQP.
//!
//! # Ownership
//! One [`Store`] a data directory. Its commit thread is the only writer. Queues are [`RoundSource`]s: they are
//! marked dirty under their own lock and drained by the commit thread, which then writes one `WriteBatch`, syncs
//! the WAL once and advances the [`Watermark`].
//!
//! # Invariants
//! - S1: what a source holds when [`Store::mark_dirty`] answers round `r` is in round `r` or an earlier one.
//! - S2: the watermark passes `r` only after the round `r` was synced (or, where nothing in it asks for that, handed to the
//!   operating system), or is recorded as failed.
//! - S3: everything that happens under one [`AtomicSection`] is in one round.
//! - S4: after a failed write or sync every round fails until the database was opened anew and has taken all that was kept
//!   meanwhile; what a failed `fsync` left behind is unknown. A round that has failed stays so for whoever asks.
//! - S5: an id that anything was ever written under is not given out again.
//! - S6: a body that is stored apart is there as long as a record that ends with it is not consumed, and no longer than a
//!   few rounds after that.
//!
//! # Locks
//! The gate of [`AtomicSection`] comes before the locks of sources; the store's own locks are leaves. A source may
//! call [`Store::mark_dirty`] and [`Store::when_durable`] while it is locked, and from [`RoundSource::drain`].
//!
//! # Units
//! Sizes in bytes, positions in records from the queue's birth.
//!
//! # Elsewhere
//! Keys and families: `key`. Encodings: `run` (records), `recovery` (states, consumed sets), `notes`. RocksDB and its
//! options: `rocks`. Paged-out records: `pages`. Bodies that records have in common: `bodies`. Reading back: `read`, `notes`.
//! Giving disk space back: `sweep`. The commit thread: `commit`; what a round holds: `round`; who waits: `watermark`;
//! failures: `resume`; free space: `space`. Copies of a store in use: `checkpoint`. Damaged files: `damage`, `mirror`. One
//! broker a directory: `lock`.

mod bodies;
mod checkpoint;
mod commit;
mod damage;
mod error;
mod key;
mod lock;
mod mirror;
mod notes;
mod pages;
mod read;
mod recovery;
mod resume;
mod rocks;
mod round;
mod run;
mod space;
mod stall;
mod sweep;
#[cfg(test)]
mod tests;
mod watermark;

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;

pub use checkpoint::Checkpoint;
pub use commit::AtomicSection;
pub use damage::{DamageReport, Finding, Loss, QueueLoss, check, repair};
pub use error::StoreError;
pub use round::RoundBuilder;

use checkpoint::Checkpoints;
use commit::Committer;
use lock::DirectoryLock;
use rocks::Rocks;
use round::Operation;
use watermark::run_guarded;

/// The identity of a queue on disk, or of something else that owns notes; never used twice in one data directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueueId(pub u64);

/// The position of a record in its queue's log, counted from 0 at the queue's birth.
pub type QueueSeq = u64;

/// Records per segment. A run on disk never crosses a segment border, so that consumed segments can be deleted
/// by key range without touching a live record.
pub const SEGMENT_RECORDS: u64 = 4096;

/// The number of a round. 0 is before every round: it is always durable.
pub type Round = u64;

/// What a durable queue must know at start without reading a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueStateRecord {
    /// Every position before it is consumed.
    pub head: QueueSeq,
    /// Every position at or after it was never handed to a consumer.
    pub delivered: QueueSeq,
    /// The position the next record gets.
    pub tail: QueueSeq,
    /// Durable records that are not consumed, and the sum of their body bytes.
    pub message_count: u64,
    pub message_bytes: u64,
}

/// Something whose changes the commit thread collects.
pub trait RoundSource: Send + Sync {
    /// Moves all changes since the last call into `round`. Called by the commit thread, at most once per round.
    fn drain(&self, round: &mut RoundBuilder);

    /// Tells how the round ended that the last [`RoundSource::drain`] contributed to. Called by the commit thread before
    /// the watermark moves. A round that fails does not end before the store is back at work and has written it after all;
    /// what it holds is never lost but with the store.
    fn round_ended(&self, committed: bool);

    /// Tells that what the last [`RoundSource::drain`] paged out is not in the pages. Called before
    /// [`RoundSource::round_ended`].
    fn paging_failed(&self) {}
}

/// Someone who wants to hear that the watermark has reached a round.
pub trait WatermarkListener: Send + Sync {
    /// Called by the commit thread (or at once by the registering thread) with the new watermark.
    ///
    /// `few` says that hardly anybody else waits to be told, so that a system call does no harm.
    fn on_watermark(&self, watermark: Round, few: bool);
}

/// What a confirm waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Durability {
    /// The disk has it.
    #[default]
    Fsync,
    /// The operating system has it: a crash of the broker loses nothing, a power failure may.
    Os,
}

/// How the disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskCondition {
    /// Rounds fail at present.
    pub is_failing: bool,
    /// On the volume of the data directory, for what the process may use; `None` when the system does not say.
    pub free_bytes: Option<u64>,
    /// With less free than this, the next rounds may not fit.
    pub needed_bytes: u64,
}

/// Someone who wants to hear how the disk is.
pub trait DiskListener: Send + Sync {
    /// Called by the commit thread after every round, and before it writes a large one; before anybody hears of a round
    /// that failed.
    fn on_disk(&self, condition: DiskCondition);
}

/// Sees every round just before and just after it is written and synced. For tests: it may take its time, which holds
/// the round back, and an error fails the round.
pub trait CommitHook: Send + Sync {
    /// Called by the commit thread, which holds no lock meanwhile.
    fn before_sync(&self, round: Round) -> Result<(), String>;

    /// As above; `synced` says whether the round was synced, or only written.
    fn after_write(&self, round: Round, synced: bool) -> Result<(), String> {
        let _ = (round, synced);
        Ok(())
    }
}

/// How a store is opened. The default has no path, and sizes for an idle broker of less than 40 MB.
#[derive(Clone)]
pub struct StoreOptions {
    /// The data directory. Created if it does not exist.
    pub path: PathBuf,
    /// What reading may keep in memory.
    pub block_cache_bytes: usize,
    /// What was written and is not yet in a table file, in memory. Bounds the WAL too, at twice this.
    pub write_buffer_bytes: usize,
    /// What holds for sources that ask for nothing else, and for definitions.
    pub durability: Durability,
    /// The time from a failure to the first attempt to get back to work. It doubles with each of them.
    pub retry: Duration,
    /// How long a round that nobody waits for may gather.
    pub linger: Duration,
    pub hook: Option<Arc<dyn CommitHook>>,
}

impl Default for StoreOptions {
    fn default() -> StoreOptions {
        StoreOptions {
            path: PathBuf::new(),
            block_cache_bytes: 8 * 1024 * 1024,
            write_buffer_bytes: 16 * 1024 * 1024,
            durability: Durability::Fsync,
            retry: Duration::from_secs(1),
            linger: Duration::from_millis(3),
            hook: None,
        }
    }
}

/// What was found at open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// In the order of their keys.
    pub definitions: Vec<(Vec<u8>, Vec<u8>)>,
    /// Definitions beside them that cannot be read.
    pub damaged_definitions: u64,
    /// In the order of the ids.
    pub states: Vec<(QueueId, QueueStateRecord)>,
    /// The first id that [`Store::allocate_queue_id`] will answer.
    pub next_queue_id: u64,
    /// What this start found damaged and healed.
    pub healed: Vec<DamageReport>,
}

/// Counters since the store was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreStats {
    pub rounds: u64,
    /// Of `rounds`, those that failed.
    pub failed_rounds: u64,
    pub records_written: u64,
    /// Before RocksDB compresses or compacts anything.
    pub bytes_written: u64,
    /// Damaged records, runs, states, consumed sets and notes that reads came across.
    pub damaged_records: u64,
}

/// A data directory, open. See the [module](self).
///
/// Dropping the last handle shuts the store down.
pub struct Store {
    committer: Arc<Committer>,
    rocks: Arc<Rocks>,
    queue_ids: Mutex<QueueIds>,
    threads: Mutex<Threads>,
    checkpoints: Checkpoints,
    /// Given up when the store is closed.
    lock: Mutex<Option<DirectoryLock>>,
    /// For the thread that verifies them.
    unverified: Mutex<damage::Unverified>,
}

struct QueueIds {
    next: u64,
    /// Ids below it are reserved in a round that is committed before anything under such an id can be.
    reserved: u64,
}

/// Sees records in order: position, record, and the body it ends with if that is apart.
pub type EachSplitRecord<'a> = dyn FnMut(QueueSeq, &[u8], Option<&Bytes>) + 'a;

type ReadJob = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Threads {
    commit: Option<JoinHandle<()>>,
    /// Reads for queues that must not wait for the disk.
    read: Option<(mpsc::Sender<ReadJob>, JoinHandle<()>)>,
    sweep: Option<JoinHandle<()>>,
    mirror: Option<JoinHandle<()>>,
}

impl Store {
    /// Opens a data directory, creating what is missing, and starts the store's threads.
    ///
    /// # Errors
    /// [`StoreError::InUse`], [`StoreError::UnknownFormat`], [`StoreError::Damaged`], or [`StoreError::Open`] with what
    /// RocksDB says.
    pub fn open(options: StoreOptions) -> Result<(Arc<Store>, Recovered), StoreError> {
        let path = &options.path;
        let failed = |error: std::io::Error| StoreError::Open { path: path.clone(), reason: error.to_string() };
        std::fs::create_dir_all(path).map_err(failed)?;
        let lock = Mutex::new(Some(DirectoryLock::take(path)?));
        let (healed, unverified) = damage::before_open(path)?;
        let rocks = Arc::new(Rocks::open(&options)?);
        checkpoint::remove_leftovers(&options.path);
        damage::after_open(&options.path, &rocks)?;
        let recovered = Recovered { healed, ..recovery::recover(&rocks, options.durability)? };
        rocks.begin_mirror();
        let next = recovered.next_queue_id;
        let committer = Arc::new(Committer::new(Arc::clone(&rocks), options));
        let queue_ids = Mutex::new(QueueIds { next, reserved: next + recovery::ID_BLOCK });
        let store = Arc::new(Store {
            committer,
            rocks,
            queue_ids,
            threads: Mutex::default(),
            checkpoints: Checkpoints::default(),
            lock,
            unverified: Mutex::new(unverified),
        });
        store.start().map_err(|error| store.rocks.open_error(error))?;
        Ok((store, recovered))
    }

    fn start(&self) -> std::io::Result<()> {
        let mut threads = self.threads.lock();
        let committer = Arc::clone(&self.committer);
        threads.commit = Some(spawn("store-commit", move || committer.run())?);
        let (jobs, accepted) = mpsc::channel::<ReadJob>();
        let read = || accepted.into_iter().for_each(|job| run_guarded("a read of a queue", job));
        threads.read = Some((jobs, spawn("store-reader", read)?));
        let rocks = Arc::clone(&self.rocks);
        threads.sweep = Some(spawn("store-sweep", move || rocks.sweep_deleted())?);
        let (rocks, unverified) = (Arc::clone(&self.rocks), std::mem::take(&mut *self.unverified.lock()));
        threads.mirror = Some(spawn("store-mirror", move || rocks.keep_mirror(&unverified))?);
        if self.rocks.bodies().has_pending() {
            self.open_round();
        }
        Ok(())
    }

    /// An id that no queue of this data directory has had (S5).
    pub fn allocate_queue_id(&self) -> QueueId {
        self.allocate_queue_ids(1)
    }

    /// The first of `count` consecutive ids, none of which was ever used (S5).
    pub fn allocate_queue_ids(&self, count: u64) -> QueueId {
        let mut ids = self.queue_ids.lock();
        let id = ids.next;
        ids.next += count;
        if ids.next >= ids.reserved {
            ids.reserved = ids.next + recovery::ID_BLOCK;
            let value = ids.reserved.to_be_bytes().to_vec();
            self.committer.operate(Operation::PutMeta { key: key::RESERVED_IDS_KEY.to_vec(), value });
        }
        QueueId(id)
    }

    /// Has `source` drained into the open round, and answers that round (S1).
    ///
    /// The caller holds the source's own lock, and does not call again before the source was drained.
    pub fn mark_dirty(&self, source: Arc<dyn RoundSource>) -> Round {
        self.committer.mark_dirty(source)
    }

    /// Writes a definition with the open round. Within a round, definitions and deletions take effect in the order of
    /// the calls, and after what the sources contribute.
    pub fn put_definition(&self, key: Vec<u8>, value: Vec<u8>) -> Round {
        let value = recovery::encode_definition(&key, &value);
        self.committer.operate(Operation::PutMeta { key: key::definition(&key), value })
    }

    /// Deletes a definition with the open round.
    pub fn delete_definition(&self, key: Vec<u8>) -> Round {
        self.committer.operate(Operation::DeleteMeta { key: key::definition(&key) })
    }

    /// Deletes all that is stored of a queue, notes included, with the open round, including what its source adds to that round. The
    /// source adds nothing to later rounds: that would stay for good.
    pub fn delete_queue(&self, queue: QueueId) -> Round {
        self.committer.operate(Operation::DeleteQueue { queue })
    }

    /// The round that is open now; it will be committed, even if it stays empty.
    pub fn open_round(&self) -> Round {
        self.committer.open_round()
    }

    /// Every round up to it is on disk, or has failed (S2).
    pub fn watermark(&self) -> Round {
        self.committer.watermark.reached()
    }

    /// Whether the round is lost. Of use once the watermark has reached it.
    pub fn is_failed(&self, round: Round) -> bool {
        self.committer.watermark.is_failed(round)
    }

    /// Whether no round is committed at present.
    #[inline]
    pub fn is_failing(&self) -> bool {
        self.committer.watermark.is_failing()
    }

    /// Why no round is committed at present, if that is so: the text of the failure that began it.
    pub fn has_failed(&self) -> Option<String> {
        self.committer.watermark.failure()
    }

    /// The round to wait for instead of `round`, for whoever comes to want what is in it: if it has failed, what it held is
    /// on disk with any later one that does not.
    pub fn renewed(&self, round: Round) -> Round {
        match self.is_failed(round) {
            true => self.open_round(),
            false => round,
        }
    }

    /// Has `listener` called once when the watermark reaches `round`, and the round committed without lingering.
    ///
    /// # Returns
    /// False if the watermark is there already; the listener is then not called.
    pub fn when_durable(&self, round: Round, listener: &Arc<dyn WatermarkListener>) -> bool {
        if self.watermark() >= round || !self.committer.watermark.register(round, listener) {
            return false;
        }
        self.committer.hurry(round);
        true
    }

    /// Waits until the watermark reaches `round`, and has the round committed without lingering.
    ///
    /// # Errors
    /// [`StoreError::RoundFailed`] if the round is not on disk.
    pub async fn durable(&self, round: Round) -> Result<(), StoreError> {
        if self.watermark() < round {
            self.committer.hurry(round);
        }
        self.committer.watermark.wait(round).await
    }

    /// While the section is held, no round ends (S3). A thread may hold several.
    pub fn atomic(&self) -> AtomicSection<'_> {
        self.committer.atomic()
    }

    /// Calls `each` with the stored records of `from..until`, in order, from log and pages alike. Stops after the
    /// record with which `max_bytes` are reached.
    ///
    /// What is damaged is skipped, counted ([`StoreStats::damaged_records`]) and logged with queue and position.
    ///
    /// # Returns
    /// The end of what was covered: `until`, or the position after the last record.
    ///
    /// # Errors
    /// [`StoreError::Closed`], or [`StoreError::Read`] for a failure that may pass.
    pub fn read_records(
        &self,
        queue: QueueId,
        from: QueueSeq,
        until: QueueSeq,
        max_bytes: usize,
        each: &mut dyn FnMut(QueueSeq, &[u8]),
    ) -> Result<QueueSeq, StoreError> {
        self.rocks.read_records(queue, from, until, max_bytes, each)
    }

    /// As [`Store::read_records`]. A record whose body is stored apart (see [`RoundBuilder::append_with_body`]) is not put
    /// together: `each` gets what stands before the body, and the body. Readers that hold the same body at the same time
    /// share its memory.
    ///
    /// # Errors
    /// As [`Store::read_records`].
    pub fn read_split_records(
        &self,
        queue: QueueId,
        from: QueueSeq,
        until: QueueSeq,
        max_bytes: usize,
        each: &mut EachSplitRecord<'_>,
    ) -> Result<QueueSeq, StoreError> {
        self.rocks.read_split_records(queue, from, until, max_bytes, each)
    }

    /// The consumed positions of a queue: half-open ranges, ascending, none touching the next.
    ///
    /// # Errors
    /// As [`Store::read_records`].
    pub fn read_consumed(&self, queue: QueueId) -> Result<Vec<(QueueSeq, QueueSeq)>, StoreError> {
        self.rocks.read_consumed(queue)
    }

    /// Calls `each` with the stored notes of `from..until`, keys and values, in key order. Stops after the note with
    /// which `max_bytes` (of keys and values) are reached.
    ///
    /// What is damaged is skipped, counted ([`StoreStats::damaged_records`]) and logged with owner and key.
    ///
    /// # Returns
    /// The key to go on from, or nothing at the end.
    ///
    /// # Cost
    /// Deleted notes from `from` on cost time until they are swept up, so a reader of a queue-like stretch should
    /// begin where its first note is, not before.
    ///
    /// # Errors
    /// As [`Store::read_records`].
    pub fn read_notes(
        &self,
        owner: QueueId,
        from: &[u8],
        until: &[u8],
        max_bytes: usize,
        each: &mut dyn FnMut(&[u8], &[u8]),
    ) -> Result<Option<Vec<u8>>, StoreError> {
        self.rocks.read_notes(owner, from, until, max_bytes, each)
    }

    /// The owners that have notes, in the order of their ids. A start finds those among them that nothing knows any more:
    /// what was not durable, and had no end. [`Store::delete_queue`] is for them.
    ///
    /// # Cost
    /// One look-up an owner, however many notes it has.
    ///
    /// # Errors
    /// As [`Store::read_records`].
    pub fn note_owners(&self) -> Result<Vec<QueueId>, StoreError> {
        self.rocks.read_note_owners()
    }

    /// Runs `job` on the store's reader thread, after the jobs before it. After [`Store::shutdown`] it is dropped.
    pub fn spawn_read(&self, job: Box<dyn FnOnce() + Send>) {
        if let Some((jobs, _)) = &self.threads.lock().read {
            // Fails only if the thread is gone, and then so is the store.
            let _ = jobs.send(job);
        }
    }

    /// How the disk is now.
    pub fn disk_condition(&self) -> DiskCondition {
        self.committer.disk_condition()
    }

    /// Has `listener` told how the disk is from now on; it replaces the one before.
    pub fn watch_disk(&self, listener: Weak<dyn DiskListener>) {
        self.committer.space.listen(listener);
    }

    /// The data directory.
    pub fn path(&self) -> &Path {
        self.rocks.path()
    }

    pub fn stats(&self) -> StoreStats {
        self.committer.stats()
    }

    /// Commits what is dirty, runs the reads that were asked for, and closes the data directory. Later calls do
    /// nothing; later rounds fail.
    ///
    /// # Errors
    /// [`StoreError::RoundFailed`] if the store had failed before, or fails at this last sync.
    pub fn shutdown(&self) -> Result<(), StoreError> {
        self.stop(true)
    }

    /// As a kill would leave it: nothing more is written, and what waits for a round sees it fail.
    #[cfg(test)]
    pub(crate) fn abandon(&self) {
        let _ = self.stop(false);
    }

    fn stop(&self, commit: bool) -> Result<(), StoreError> {
        let Threads { commit: commit_thread, read, sweep, mirror } = std::mem::take(&mut *self.threads.lock());
        self.checkpoints.stop();
        self.committer.stop(commit);
        commit_thread.into_iter().for_each(join);
        if let Some((jobs, thread)) = read {
            drop(jobs);
            join(thread);
        }
        self.rocks.stop_sweeping();
        sweep.into_iter().for_each(join);
        self.rocks.mirror().stop();
        if let Some(thread) = mirror {
            join(thread);
            self.rocks.renew_mirror(&mut false);
        }
        let round = self.watermark();
        let failed = |reason| StoreError::RoundFailed { round, reason };
        let closed = self.rocks.close().map_err(|error| failed(error.into_string()));
        self.lock.lock().take();
        closed?;
        match self.has_failed() {
            Some(reason) if reason != StoreError::Closed.to_string() => Err(failed(reason)),
            _ => Ok(()),
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Err(error) = self.stop(true) {
            tracing::error!(%error, "the store did not close cleanly");
        }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(work)
}

/// Waits for a thread of the store, unless it is the caller itself (which let go of the last handle).
fn join(thread: JoinHandle<()>) {
    if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
        tracing::error!("a thread of the store panicked");
    }
}
