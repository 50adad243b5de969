//! The commit thread: cut a round, drain its sources, write it, sync it, move the watermark, tell who waits. What it does
//! when a round cannot be written: `resume`.
//!
//! # Locks
//! `gate` (read: an [`AtomicSection`]; write: cut and drain) comes before every lock of a source. `dirty` is a leaf: it
//! is held for a few instructions, and nothing is called under it.
//!
//! # Why no timer
//! While one round is synced, the next one gathers, so rounds grow with the load by themselves. The linger is only for
//! rounds that nobody waits for: what is consumed within it is never written.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard};

use super::resume::{Failing, Failure};
use super::rocks::Rocks;
use super::round::Operation;
use super::space::Space;
use super::watermark::{Watermark, run_guarded};
use super::{DiskCondition, Round, RoundBuilder, RoundSource, StoreError, StoreOptions, StoreStats};

/// A round of this size is worth a look at the free space before it is written.
const LARGE_ROUND_BYTES: usize = 1024 * 1024;

/// How long after the first change of a round somebody may be expected to wait for it.
const AWAITED_SOON: Duration = Duration::from_micros(15);

/// Whatever a thread does while it holds one is in one round: the commit thread cuts no round meanwhile.
///
/// Enter it before any queue is locked, and keep it short: the commit thread waits for it. A thread that holds one may
/// enter it again, whatever it has locked; the round then lasts until the outermost ends.
#[must_use = "the section ends when this is dropped"]
pub struct AtomicSection<'a> {
    _open: RwLockReadGuard<'a, ()>,
}

thread_local! {
    /// How many sections this thread holds.
    static SECTIONS: Cell<u32> = const { Cell::new(0) };
}

impl Drop for AtomicSection<'_> {
    fn drop(&mut self) {
        SECTIONS.set(SECTIONS.get() - 1);
    }
}

/// What the commit thread shares with everyone who has work for it.
pub(super) struct Committer {
    pub(super) rocks: Arc<Rocks>,
    pub(super) options: StoreOptions,
    gate: RwLock<()>,
    dirty: Mutex<Dirty>,
    /// The commit thread sleeps on it, and nobody else.
    wake: Condvar,
    /// Somebody has begun to wait for a round since it was last looked at. No more than a hint.
    hurried: AtomicBool,
    pub watermark: Watermark,
    pub space: Space,
    rounds: AtomicU64,
    records: AtomicU64,
    bytes: AtomicU64,
    failed_rounds: AtomicU64,
}

/// What the open round has gathered.
struct Dirty {
    open: Round,
    sources: Vec<Arc<dyn RoundSource>>,
    operations: Vec<Operation>,
    /// Commit the round even if it is empty.
    wanted: bool,
    /// Somebody waits for the round, so do not linger.
    awaited: bool,
    stop: Stop,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// Running.
    No,
    /// Commit what is dirty, then end.
    WhenClean,
    /// End as if killed.
    AtOnce,
    /// The thread has ended or is about to, and takes no more work.
    Ended,
}

/// A round that takes no more changes.
pub(super) struct Cut {
    pub round: Round,
    pub sources: Vec<Arc<dyn RoundSource>>,
    operations: Vec<Operation>,
}

/// What the commit thread has been woken for.
enum Work {
    /// There is a round to commit. While the store is failing: the open round is waited for.
    Round,
    /// It is time to try to get out of a failure; for the last time, because the store is to close.
    Resume { last: bool },
    /// The thread is to end, and the store takes no more work.
    End,
}

impl Committer {
    pub fn new(rocks: Arc<Rocks>, options: StoreOptions) -> Committer {
        Committer {
            space: Space::new(options.write_buffer_bytes),
            rocks,
            options,
            gate: RwLock::new(()),
            dirty: Mutex::new(Dirty {
                open: 1,
                sources: Vec::new(),
                operations: Vec::new(),
                wanted: false,
                awaited: false,
                stop: Stop::No,
            }),
            wake: Condvar::new(),
            hurried: AtomicBool::new(false),
            watermark: Watermark::new(),
            rounds: AtomicU64::new(0),
            records: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            failed_rounds: AtomicU64::new(0),
        }
    }

    pub fn atomic(&self) -> AtomicSection<'_> {
        let held = SECTIONS.replace(SECTIONS.get() + 1);
        // Whoever comes first queues up behind a waiting commit thread, so that it gets its turn. Whoever comes again must
        // not: the commit thread waits for the section that this thread already has.
        let open = if held == 0 { self.gate.read() } else { self.gate.read_recursive() };
        AtomicSection { _open: open }
    }

    /// Whether the commit thread waits for atomic sections to end.
    #[cfg(test)]
    pub fn waits_for_sections(&self) -> bool {
        self.gate.try_read().is_none()
    }

    pub fn mark_dirty(&self, source: Arc<dyn RoundSource>) -> Round {
        self.contribute(|dirty| dirty.sources.push(source))
    }

    pub fn operate(&self, operation: Operation) -> Round {
        self.contribute(|dirty| dirty.operations.push(operation))
    }

    pub fn open_round(&self) -> Round {
        self.contribute(|dirty| dirty.wanted = true)
    }

    /// Changes the open round and answers its number, under the lock that the cut takes: that is S1.
    fn contribute(&self, change: impl FnOnce(&mut Dirty)) -> Round {
        let mut dirty = self.dirty.lock();
        if dirty.stop == Stop::Ended {
            return dirty.open; // this round has failed, see `end`
        }
        let was_clean = dirty.is_clean();
        change(&mut dirty);
        let round = dirty.open;
        drop(dirty);
        if was_clean {
            self.wake.notify_one();
        }
        round
    }

    /// Has the round committed without lingering, if it is not under way already.
    pub fn hurry(&self, round: Round) {
        let mut dirty = self.dirty.lock();
        if round < dirty.open || dirty.awaited || dirty.stop == Stop::Ended {
            return;
        }
        dirty.awaited = true;
        dirty.wanted = true;
        drop(dirty);
        self.hurried.store(true, Ordering::Relaxed);
        self.wake.notify_one();
    }

    /// Asks the thread to end, after everything that is dirty is committed or at once.
    pub fn stop(&self, commit: bool) {
        let mut dirty = self.dirty.lock();
        if dirty.stop == Stop::No {
            dirty.stop = if commit { Stop::WhenClean } else { Stop::AtOnce };
        }
        drop(dirty);
        self.wake.notify_one();
    }

    pub fn stats(&self) -> StoreStats {
        StoreStats {
            rounds: self.rounds.load(Ordering::Relaxed),
            failed_rounds: self.failed_rounds.load(Ordering::Relaxed),
            records_written: self.records.load(Ordering::Relaxed),
            bytes_written: self.bytes.load(Ordering::Relaxed),
            damaged_records: self.rocks.damaged(),
        }
    }

    /// The commit thread.
    pub fn run(&self) {
        let mut builder = RoundBuilder::with_default(self.options.durability);
        let mut failing: Option<Failing> = None;
        loop {
            failing = match (self.wait_for_work(failing.as_ref()), failing) {
                (Work::Round, None) => self.commit_round(&mut builder).err().map(|failure| self.begin_failing(failure)),
                (Work::Round, failing) => {
                    self.fail_open_round();
                    failing
                }
                (Work::Resume { last }, Some(failing)) => match self.resume(failing, &mut builder) {
                    Some(_) if last => return self.end(self.dirty.lock()),
                    failing => failing,
                },
                (Work::Resume { .. }, None) => None,
                (Work::End, _) => return,
            }
        }
    }

    /// Sleeps until there is something to do.
    fn wait_for_work(&self, failing: Option<&Failing>) -> Work {
        if let Some(failing) = failing {
            return self.wait_while_failing(failing);
        }
        let mut dirty = self.dirty.lock();
        while dirty.is_clean() && dirty.stop == Stop::No {
            self.wake.wait(&mut dirty);
        }
        if !dirty.awaited && !self.options.linger.is_zero() {
            // Whoever has just made the first change of a round most likely says in a moment that it waits for it. To fall
            // asleep for that would cost more than to look.
            self.hurried.store(false, Ordering::Relaxed);
            MutexGuard::unlocked(&mut dirty, || {
                let until = Instant::now() + AWAITED_SOON;
                while !self.hurried.load(Ordering::Relaxed) && Instant::now() < until {
                    std::hint::spin_loop();
                }
            });
            let deadline = Instant::now() + self.options.linger;
            while !dirty.awaited && dirty.stop == Stop::No {
                if self.wake.wait_until(&mut dirty, deadline).timed_out() {
                    break;
                }
            }
        }
        if dirty.stop == Stop::AtOnce || (dirty.stop == Stop::WhenClean && dirty.is_clean()) {
            self.end(dirty);
            return Work::End;
        }
        Work::Round
    }

    fn wait_while_failing(&self, failing: &Failing) -> Work {
        let mut dirty = self.dirty.lock();
        loop {
            match dirty.stop {
                Stop::No => {}
                Stop::WhenClean if failing.may_resume() => return Work::Resume { last: true },
                _ => {
                    self.end(dirty);
                    return Work::End;
                }
            }
            if dirty.wanted || dirty.awaited {
                return Work::Round;
            }
            match failing.retry_at() {
                Some(at) if self.wake.wait_until(&mut dirty, at).timed_out() => return Work::Resume { last: false },
                Some(_) => {}
                None => self.wake.wait(&mut dirty),
            }
        }
    }

    /// The open round will never be committed: it fails, and so does everything that is put into it from now on.
    fn end(&self, mut dirty: MutexGuard<'_, Dirty>) {
        let round = dirty.open;
        dirty.stop = Stop::Ended;
        let abandoned = (std::mem::take(&mut dirty.sources), std::mem::take(&mut dirty.operations));
        self.watermark.fail(round, &StoreError::Closed.to_string());
        drop(dirty);
        drop(abandoned); // destructors and listeners are foreign code: not under the leaf lock
        self.watermark.advance(round);
    }

    /// The open round fails, with what it has gathered staying for a later one.
    fn fail_open_round(&self) {
        let mut dirty = self.dirty.lock();
        let round = dirty.open;
        dirty.open += 1;
        dirty.wanted = false;
        dirty.awaited = false;
        drop(dirty);
        self.count_failed_round();
        self.watermark.advance(round);
    }

    pub(super) fn count_failed_round(&self) {
        self.rounds.fetch_add(1, Ordering::Relaxed);
        self.failed_rounds.fetch_add(1, Ordering::Relaxed);
    }

    fn commit_round(&self, builder: &mut RoundBuilder) -> Result<(), Failure> {
        let cut = self.write_round(builder)?;
        self.finish(&cut, builder);
        Ok(())
    }

    /// Ends the open round, collects what it holds with no atomic section open, and writes it.
    pub(super) fn write_round(&self, builder: &mut RoundBuilder) -> Result<Cut, Failure> {
        builder.permit_pages(self.takes_pages());
        let (mut cut, drained) = self.cut_and_drain(builder);
        if !drained {
            let reason = "a queue panicked while its changes were collected".to_owned();
            return Err(Failure { cut, reason, is_final: true });
        }
        for operation in cut.operations.drain(..) {
            builder.apply(operation, &|owner| self.rocks.may_have_notes(owner));
        }
        self.write_pages(&cut, builder);
        match self.write_log(cut.round, builder) {
            Ok(()) => Ok(cut),
            Err(reason) => Err(Failure { cut, reason, is_final: false }),
        }
    }

    /// Whether memory may be traded for space on the disk.
    fn takes_pages(&self) -> bool {
        self.rocks.pages().is_working() && !self.space.is_low()
    }

    /// False if a source has panicked.
    fn cut_and_drain(&self, builder: &mut RoundBuilder) -> (Cut, bool) {
        let _closed = self.gate.write();
        let cut = self.dirty.lock().cut();
        let drained = catch_unwind(AssertUnwindSafe(|| {
            for source in &cut.sources {
                builder.begin_source();
                source.drain(builder);
                builder.end_source();
            }
        }));
        (cut, drained.is_ok())
    }

    /// Moves out of memory what need not survive. A failure is no failure of the round: everything stays in memory.
    fn write_pages(&self, cut: &Cut, builder: &mut RoundBuilder) {
        match self.rocks.write_pages(builder) {
            Ok(bytes) => {
                self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
            }
            Err(error) => {
                tracing::error!(%error, "messages cannot be paged out; they stay in memory for now");
                for source in &cut.sources {
                    run_guarded("a queue whose messages stay in memory", || source.paging_failed());
                }
            }
        }
    }

    /// Writes and syncs the durable part of a round.
    pub(super) fn write_log(&self, round: Round, builder: &mut RoundBuilder) -> Result<(), String> {
        self.space.note_round(builder.byte_count());
        if builder.byte_count() >= LARGE_ROUND_BYTES {
            self.tell_of_disk(); // before, not after, the space is gone
        }
        let synced = builder.needs_sync();
        if let Some(hook) = &self.options.hook {
            hook.before_sync(round)?;
        }
        let bytes = self.rocks.write_log(builder, synced)?;
        if let Some(hook) = &self.options.hook {
            hook.after_write(round, synced)?;
        }
        self.records.fetch_add(builder.record_count(), Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Tells the sources of a round that it is on disk, then everyone else.
    pub(super) fn finish(&self, cut: &Cut, builder: &mut RoundBuilder) {
        builder.clear();
        if self.rocks.bodies().has_pending() {
            self.open_round(); // there are references to let go of
        }
        self.rounds.fetch_add(1, Ordering::Relaxed);
        cut.tell(true);
        self.watermark.advance(cut.round);
        self.tell_of_disk();
    }

    /// How the disk is.
    pub fn disk_condition(&self) -> DiskCondition {
        let (free_bytes, needed_bytes) = (self.rocks.free_bytes(), self.space.needed());
        self.space.note_low(free_bytes.is_some_and(|free| free < needed_bytes));
        DiskCondition { is_failing: self.watermark.is_failing(), free_bytes, needed_bytes }
    }

    /// Tells whoever listens how the disk is.
    pub(super) fn tell_of_disk(&self) {
        let condition = self.disk_condition();
        if let Some(listener) = self.space.listener() {
            run_guarded("a listener of the disk", || listener.on_disk(condition));
        }
    }
}

impl Cut {
    /// Tells the sources how the round has ended.
    pub fn tell(&self, committed: bool) {
        for source in &self.sources {
            run_guarded("the end of a round in a queue", || source.round_ended(committed));
        }
    }
}

impl Dirty {
    fn is_clean(&self) -> bool {
        self.sources.is_empty() && self.operations.is_empty() && !self.wanted
    }

    fn cut(&mut self) -> Cut {
        let round = self.open;
        self.open += 1;
        self.wanted = false;
        self.awaited = false;
        let sources = std::mem::take(&mut self.sources);
        let operations = std::mem::take(&mut self.operations);
        Cut { round, sources, operations }
    }
}
