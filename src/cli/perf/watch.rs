//! The supervisor of a run: looks at the workers' meters, ends the warm-up, shows progress, and decides when it is over.

use std::thread;
use std::time::{Duration, Instant};

use super::connection::PROGRESS_LIMIT;
use super::error::PerfError;
use super::meter::Total;
use super::options::Plan;
use super::posix::{self, monotonic_ns};
use super::process::ProcessWatch;
use super::progress::ProgressLine;
use super::report::DrainEnd;
use super::workers::{Pools, Workers};

const TICK: Duration = Duration::from_millis(20);
/// With thousands of meters to look at, five times as long.
const SLOW_TICK: Duration = Duration::from_millis(100);
const MANY_WORKERS: usize = 200;
/// Where it cannot be known how much must arrive, this much silence is the end of it.
const QUIET_LIMIT: Duration = Duration::from_secs(2);

/// What was counted before measuring began: nothing, or the warm-up.
pub(super) struct Baseline {
    pub(super) published: Total,
    pub(super) delivered: Total,
    /// 0 where there was no warm-up: the first message begins the measured time.
    pub(super) at_ns: u64,
    pub(super) own_cpu: Duration,
    pub(super) broker: Option<ProcessWatch>,
}

impl Baseline {
    /// To be taken before the first thread starts.
    ///
    /// # Errors
    /// The broker's process cannot be read.
    pub(super) fn at_start(plan: &Plan) -> Result<Self, PerfError> {
        Ok(Self {
            published: Total::default(),
            delivered: Total::default(),
            at_ns: 0,
            own_cpu: posix::own_cpu(),
            broker: plan.broker_pid.map(ProcessWatch::begin).transpose()?,
        })
    }
}

/// What the supervisor saw.
pub(super) struct Watched {
    pub(super) drain: DrainEnd,
    pub(super) delivered_while_publishing: Option<Total>,
    pub(super) baseline: Baseline,
}

/// The supervisor: looks at the workers' meters many times a second.
pub(super) struct Watch<'a> {
    plan: &'a Plan,
    workers: &'a Workers,
    pools: &'a mut Pools,
    baseline: Baseline,
    /// `None` when it is over, or there is none.
    warmup: Option<Duration>,
    ready_before: u64,
    start: Instant,
    tick: Duration,
    progress: ProgressLine,
    /// When the number delivered last changed, and to what.
    last_change: (Instant, u64),
}

impl<'a> Watch<'a> {
    pub(super) fn new(
        plan: &'a Plan,
        workers: &'a Workers,
        pools: &'a mut Pools,
        baseline: Baseline,
        ready_before: u64,
    ) -> Self {
        let start = Instant::now();
        Self {
            plan,
            workers,
            pools,
            baseline,
            warmup: (!plan.warmup.is_zero()).then_some(plan.warmup),
            ready_before,
            start,
            tick: if plan.worker_count() > MANY_WORKERS { SLOW_TICK } else { TICK },
            progress: ProgressLine::new(plan),
            last_change: (start, 0),
        }
    }

    pub(super) fn until_the_end(mut self) -> Watched {
        let (drain, delivered_while_publishing) = self.watch();
        Watched { drain, delivered_while_publishing, baseline: self.baseline }
    }

    fn watch(&mut self) -> (DrainEnd, Option<Total>) {
        if self.plan.publisher_count == 0 {
            return (self.while_consuming(), None);
        }
        while !self.workers.publishing_is_over() {
            if self.tick() {
                return (DrainEnd::Aborted, None);
            }
        }
        let delivered = self.workers.delivered();
        (self.drain(), Some(delivered))
    }

    /// Waits a moment; says whether the run is to end at once.
    fn tick(&mut self) -> bool {
        thread::sleep(self.tick);
        if posix::was_interrupted() || self.workers.has_lost_a_worker() {
            self.workers.control.abort();
        }
        let (published, delivered) = (self.workers.published(), self.workers.delivered());
        if delivered.messages != self.last_change.1 {
            self.last_change = (Instant::now(), delivered.messages);
        }
        if let Some(broker) = &mut self.baseline.broker {
            broker.look();
        }
        if self.warmup.is_some_and(|warmup| self.start.elapsed() >= warmup) {
            self.end_warmup(published, delivered);
        }
        self.progress.show(&published, &delivered, self.pools);
        self.workers.control.is_aborted()
    }

    /// From here on, everything is measured anew.
    fn end_warmup(&mut self, published: Total, delivered: Total) {
        self.warmup = None;
        self.pools.delivery.forget();
        self.pools.confirm.forget();
        // If the broker's process is gone, its old account tells so at the end.
        let begun = self.plan.broker_pid.and_then(|pid| ProcessWatch::begin(pid).ok());
        self.baseline = Baseline {
            published,
            delivered,
            at_ns: monotonic_ns(),
            own_cpu: posix::own_cpu(),
            broker: begun.or(self.baseline.broker.take()),
        };
        self.progress.say("the warm-up is over");
    }

    /// Without publishers: until the time is over, or every consumer has its fill, or there is nothing more.
    fn while_consuming(&mut self) -> DrainEnd {
        let drains = self.plan.is_open_ended && self.ready_before > 0;
        let duration = self.plan.limit.duration.filter(|_| !drains);
        while !self.workers.consuming_is_over() {
            if self.tick() {
                return DrainEnd::Aborted;
            }
            if drains && self.last_change.1 >= self.ready_before {
                return DrainEnd::Complete;
            }
            match duration {
                Some(duration) if self.start.elapsed() >= duration => break,
                None if self.last_change.0.elapsed() >= PROGRESS_LIMIT => return DrainEnd::NoProgress,
                _ => {}
            }
        }
        DrainEnd::NotNeeded
    }

    /// After publishing: until confirms and deliveries are in.
    fn drain(&mut self) -> DrainEnd {
        let start = Instant::now();
        self.last_change.0 = start;
        loop {
            let settled = self.workers.publishers_are_settled();
            if self.plan.consumer_count == 0 && settled {
                return DrainEnd::NotNeeded;
            }
            let quiet = self.last_change.0.elapsed();
            if settled && self.has_everything(quiet) {
                return DrainEnd::Complete;
            }
            if settled && quiet >= PROGRESS_LIMIT {
                return DrainEnd::NoProgress;
            }
            if settled && start.elapsed() >= self.plan.drain_limit {
                return DrainEnd::TimeLimit;
            }
            if self.tick() {
                return DrainEnd::Aborted;
            }
        }
    }

    fn has_everything(&self, quiet: Duration) -> bool {
        let Some(deliveries) = self.plan.deliveries_per_message() else { return quiet >= QUIET_LIMIT };
        let published = self.workers.published();
        let taken = published.messages.saturating_sub(published.refused);
        self.workers.delivered().messages >= taken.saturating_mul(deliveries).saturating_add(self.ready_before)
    }
}
