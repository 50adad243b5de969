//! The one number that couples the store with everyone else: every round up to it is on disk, or has failed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::watch;

use super::{Round, StoreError, WatermarkListener};

/// No round has failed.
const NONE: Round = Round::MAX;

/// The watermark, and who waits for it.
///
/// # Invariants
/// - W1: `failed_from` is set before `reached` gets there, so whoever sees the watermark sees the failure.
/// - W2: `reached` moves before the waiters are looked through, and a waiter looks at `reached` under their lock; so
///   nobody registers too late to be called.
pub(super) struct Watermark {
    reached: AtomicU64,
    /// This round and all later ones fail: after a failed sync nobody knows what the disk has.
    failed_from: AtomicU64,
    failure: Mutex<String>,
    waiters: Mutex<Vec<(Round, Arc<dyn WatermarkListener>)>>,
    published: watch::Sender<Round>,
}

impl Watermark {
    pub fn new() -> Watermark {
        Watermark {
            reached: AtomicU64::new(0),
            failed_from: AtomicU64::new(NONE),
            failure: Mutex::default(),
            waiters: Mutex::default(),
            published: watch::Sender::new(0),
        }
    }

    pub fn reached(&self) -> Round {
        self.reached.load(Ordering::Acquire)
    }

    pub fn is_failed(&self, round: Round) -> bool {
        round >= self.failed_from.load(Ordering::Acquire)
    }

    /// Why rounds fail, if they do.
    pub fn failure(&self) -> Option<String> {
        self.is_failed(NONE - 1).then(|| self.failure.lock().clone())
    }

    /// Lets `round` and all later ones fail. False if an earlier failure has done that before.
    pub fn fail(&self, round: Round, reason: &str) -> bool {
        let mut failure = self.failure.lock();
        if self.is_failed(NONE - 1) {
            return false;
        }
        reason.clone_into(&mut failure);
        self.failed_from.store(round, Ordering::Release);
        true
    }

    /// Moves the watermark and calls everyone who waited for no more than that.
    pub fn advance(&self, round: Round) {
        self.reached.store(round, Ordering::Release);
        self.published.send_replace(round);
        let due: Vec<_> = self.waiters.lock().extract_if(.., |(awaited, _)| *awaited <= round).collect();
        for (_, listener) in due {
            run_guarded("a listener of the watermark", || listener.on_watermark(round));
        }
    }

    /// Registers `listener` to be called once, unless the watermark is there already.
    pub fn register(&self, round: Round, listener: &Arc<dyn WatermarkListener>) -> bool {
        let mut waiters = self.waiters.lock();
        let waits = self.reached() < round;
        if waits {
            waiters.push((round, Arc::clone(listener)));
        }
        waits
    }

    /// Waits until the watermark is there.
    pub async fn wait(&self, round: Round) -> Result<(), StoreError> {
        if self.reached() < round {
            let mut published = self.published.subscribe();
            published.wait_for(|reached| *reached >= round).await.map_err(|_| StoreError::Closed)?;
        }
        match self.is_failed(round) {
            true => Err(StoreError::RoundFailed { round, reason: self.failure.lock().clone() }),
            false => Ok(()),
        }
    }
}

/// Calls somebody else's code on a thread that must not end with it.
pub(super) fn run_guarded(who: &str, call: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(call)).is_err() {
        tracing::error!("{who} panicked on a thread of the store");
    }
}
