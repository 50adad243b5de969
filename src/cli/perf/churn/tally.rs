//! What workers count, and who may still begin an operation.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::super::meter::Latencies;
use super::super::posix::{self, monotonic_ns};
use super::operation::Request;
use super::options::Plan;

/// One worker's operations, or the sum of several.
#[derive(Debug)]
pub(super) struct Tally {
    /// Complete ones: made and, unless that is left out, undone.
    pub(super) operations: u64,
    pub(super) make: Latencies,
    pub(super) undo: Latencies,
    /// When the last operation was complete; 0 before the first.
    pub(super) last_ns: u64,
}

impl Tally {
    pub(super) fn new() -> Self {
        Self { operations: 0, make: Latencies::new(), undo: Latencies::new(), last_ns: 0 }
    }

    pub(super) fn record(&mut self, request: Request, latency_ns: u64) {
        match request {
            Request::Make => self.make.record(latency_ns, 1),
            Request::Undo => self.undo.record(latency_ns, 1),
        }
    }

    pub(super) fn complete(&mut self, now_ns: u64) {
        self.operations += 1;
        self.last_ns = now_ns;
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.operations += other.operations;
        self.make.add(&other.make);
        self.undo.add(&other.undo);
        self.last_ns = self.last_ns.max(other.last_ns);
    }
}

/// What all workers draw from before they begin an operation.
#[derive(Debug)]
pub(super) struct Budget {
    left: AtomicU64,
    deadline_ns: u64,
    stopped: AtomicBool,
}

impl Budget {
    /// Of a churn that begins at `start_ns`.
    pub(super) fn of(plan: &Plan, start_ns: u64) -> Self {
        let nanos = plan.duration.map(|duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX));
        Self {
            left: AtomicU64::new(plan.count.unwrap_or(u64::MAX)),
            deadline_ns: nanos.map_or(u64::MAX, |nanos| start_ns.saturating_add(nanos)),
            stopped: AtomicBool::new(false),
        }
    }

    /// Whether one more operation may begin; if so, it counts.
    pub(super) fn take(&self) -> bool {
        if self.stopped.load(Ordering::Relaxed) || posix::was_interrupted() || monotonic_ns() >= self.deadline_ns {
            return false;
        }
        let less = |left: u64| left.checked_sub(1);
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }

    /// A worker failed: no more operations for the others.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::super::uri::Uri;
    use super::super::options::What;
    use super::*;

    fn plan(count: Option<u64>, duration: Option<Duration>) -> Plan {
        Plan {
            uri: Uri::parse("amqp://h").expect("valid"),
            what: What::Queues,
            connection_count: 1,
            channel_count: 1,
            duration,
            count,
            durable: false,
            keeps: false,
            broker_pid: None,
            json: false,
        }
    }

    #[test]
    fn a_budget_ends_with_its_count_its_time_or_somebodys_failure() {
        let counted = Budget::of(&plan(Some(2), None), monotonic_ns());
        assert_eq!([(); 3].map(|()| counted.take()), [true, true, false]);
        assert!(!Budget::of(&plan(None, Some(Duration::from_secs(1))), 0).take());
        let stopped = Budget::of(&plan(None, None), monotonic_ns());
        assert!(stopped.take());
        stopped.stop();
        assert!(!stopped.take());
    }

    #[test]
    fn tallies_add_up_and_end_with_the_last_operation_of_all() {
        let (mut sum, mut one) = (Tally::new(), Tally::new());
        one.record(Request::Make, 1_000);
        one.record(Request::Undo, 2_000);
        one.complete(50);
        sum.complete(70);
        sum.add(&one);
        assert_eq!((sum.operations, sum.last_ns, sum.make.count(), sum.undo.count()), (2, 70, 1, 1));
    }
}
