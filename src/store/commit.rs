//! The commit thread: cut a round, drain its sources, write it, sync it, move the watermark, tell who waits.
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
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::{Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard};

use super::rocks::Rocks;
use super::round::Operation;
use super::watermark::{Watermark, run_guarded};
use super::{Round, RoundBuilder, RoundSource, StoreError, StoreOptions, StoreStats};

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
    rocks: Arc<Rocks>,
    options: StoreOptions,
    gate: RwLock<()>,
    dirty: Mutex<Dirty>,
    /// The commit thread sleeps on it, and nobody else.
    wake: Condvar,
    pub watermark: Watermark,
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
struct Cut {
    round: Round,
    sources: Vec<Arc<dyn RoundSource>>,
    operations: Vec<Operation>,
}

impl Committer {
    pub fn new(rocks: Arc<Rocks>, options: StoreOptions) -> Committer {
        Committer {
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
        let mut builder = RoundBuilder::new();
        while self.wait_for_work() {
            let (mut cut, drained) = self.cut_and_drain(&mut builder);
            let outcome = drained.and_then(|()| self.write(&mut cut, &mut builder));
            self.finish(&cut, outcome);
            builder.clear();
        }
    }

    /// Sleeps until there is a round to commit. False: the thread is to end, and the store takes no more work.
    fn wait_for_work(&self) -> bool {
        let mut dirty = self.dirty.lock();
        while dirty.is_clean() && dirty.stop == Stop::No {
            self.wake.wait(&mut dirty);
        }
        if !dirty.awaited && !self.options.linger.is_zero() {
            let deadline = Instant::now() + self.options.linger;
            while !dirty.awaited && dirty.stop == Stop::No {
                if self.wake.wait_until(&mut dirty, deadline).timed_out() {
                    break;
                }
            }
        }
        if dirty.stop == Stop::AtOnce || (dirty.stop == Stop::WhenClean && dirty.is_clean()) {
            self.end(dirty);
            return false;
        }
        true
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

    /// Ends the open round and collects what it holds, with no atomic section open.
    fn cut_and_drain(&self, builder: &mut RoundBuilder) -> (Cut, Result<(), String>) {
        let _closed = self.gate.write();
        let cut = self.dirty.lock().cut();
        let drained = catch_unwind(AssertUnwindSafe(|| {
            for source in &cut.sources {
                source.drain(builder);
            }
        }));
        (cut, drained.map_err(|_| "a queue panicked while its changes were collected".to_owned()))
    }

    /// Writes and syncs what was drained. In a store that has failed before, fails without touching the disk.
    fn write(&self, cut: &mut Cut, builder: &mut RoundBuilder) -> Result<(), String> {
        if let Some(reason) = self.watermark.failure() {
            return Err(reason);
        }
        for operation in cut.operations.drain(..) {
            builder.apply(operation, &|owner| self.rocks.may_have_notes(owner));
        }
        let bytes = self.rocks.write(builder, || match &self.options.hook {
            Some(hook) => hook.before_sync(cut.round),
            None => Ok(()),
        })?;
        self.records.fetch_add(builder.record_count(), Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Tells the sources how it ended, then everyone else.
    fn finish(&self, cut: &Cut, outcome: Result<(), String>) {
        let committed = outcome.is_ok();
        if let Err(reason) = outcome {
            self.failed_rounds.fetch_add(1, Ordering::Relaxed);
            if self.watermark.fail(cut.round, &reason) {
                let path = self.rocks.path().display();
                tracing::error!(
                    round = cut.round,
                    reason,
                    "the store in '{path}' has failed and takes no more durable work until the broker is restarted"
                );
            }
        }
        self.rounds.fetch_add(1, Ordering::Relaxed);
        for source in &cut.sources {
            run_guarded("the end of a round in a queue", || source.round_ended(committed));
        }
        self.watermark.advance(cut.round);
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
