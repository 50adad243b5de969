//! The one number that couples the store with everyone else: every round up to it is on disk, or has failed.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::watch;

use super::{Round, StoreError, WatermarkListener};

/// The end of a failure that lasts.
const LASTING: Round = Round::MAX;

/// So many listeners may each take the time of a system call.
const FEW: usize = 2;

/// The watermark, and who waits for it.
///
/// # Invariants
/// - W1: a failure begins before `reached` gets to its first round, and ends before `reached` gets to the round after its
///   last one; so whoever sees the watermark at a round sees how that round ended, for good.
/// - W2: `reached` moves before the waiters are looked through, and a waiter looks at `reached` under their lock; so
///   nobody registers too late to be called.
pub(super) struct Watermark {
    reached: AtomicU64,
    /// No round from it on has failed: the end of the last failure.
    good_from: AtomicU64,
    /// In order. They are few: each of them is an event that is logged.
    failures: Mutex<Vec<Failure>>,
    waiters: Mutex<Vec<(Round, Arc<dyn WatermarkListener>)>>,
    published: watch::Sender<Round>,
}

/// The rounds of `from..until` have failed.
struct Failure {
    from: Round,
    until: Round,
    reason: String,
}

impl Watermark {
    pub fn new() -> Watermark {
        Watermark {
            reached: AtomicU64::new(0),
            good_from: AtomicU64::new(0),
            failures: Mutex::default(),
            waiters: Mutex::default(),
            published: watch::Sender::new(0),
        }
    }

    pub fn reached(&self) -> Round {
        self.reached.load(Ordering::Acquire)
    }

    #[inline]
    pub fn is_failed(&self, round: Round) -> bool {
        round < self.good_from.load(Ordering::Acquire) && self.reason(round).is_some()
    }

    /// Why a round has failed, if it has.
    fn reason(&self, round: Round) -> Option<String> {
        let failures = self.failures.lock();
        let failure = failures.iter().rev().find(|failure| failure.from <= round)?;
        (round < failure.until).then(|| failure.reason.clone())
    }

    /// Whether rounds fail at present.
    #[inline]
    pub fn is_failing(&self) -> bool {
        self.good_from.load(Ordering::Acquire) == LASTING
    }

    /// Why rounds fail at present, if they do.
    pub fn failure(&self) -> Option<String> {
        if !self.is_failing() {
            return None;
        }
        self.failures.lock().last().map(|failure| failure.reason.clone())
    }

    /// Lets `round` and all later ones fail. False if they do already.
    pub fn fail(&self, round: Round, reason: &str) -> bool {
        let mut failures = self.failures.lock();
        if failures.last().is_some_and(|failure| failure.until == LASTING) {
            return false;
        }
        failures.push(Failure { from: round, until: LASTING, reason: reason.to_owned() });
        self.good_from.store(LASTING, Ordering::Release);
        true
    }

    /// Ends the failure: `round` and later ones are good.
    pub fn recover(&self, round: Round) {
        let mut failures = self.failures.lock();
        if let Some(failure) = failures.last_mut() {
            failure.until = round;
        }
        self.good_from.store(round, Ordering::Release);
    }

    /// Moves the watermark and calls everyone who waited for no more than that.
    pub fn advance(&self, round: Round) {
        self.reached.store(round, Ordering::Release);
        self.published.send_replace(round);
        let due: Vec<_> = self.waiters.lock().extract_if(.., |(awaited, _)| *awaited <= round).collect();
        let few = due.len() <= FEW;
        for (_, listener) in due {
            run_guarded("a listener of the watermark", || listener.on_watermark(round, few));
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
        match self.is_failed(round).then(|| self.reason(round)).flatten() {
            Some(reason) => Err(StoreError::RoundFailed { round, reason }),
            None => Ok(()),
        }
    }
}

/// Calls somebody else's code on a thread that must not end with it.
pub(super) fn run_guarded(who: &str, call: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(call)).is_err() {
        tracing::error!("{who} panicked on a thread of the store");
    }
}
