//! A load run from set-up to report: opens the workers, watches them, stops them, adds them up.
//!
//! # Stopping
//! Publishers stop by themselves at their limit. Consumers go on until everything published has arrived, or
//! nothing has for [`PROGRESS_LIMIT`], or the drain's time is over. A worker that fails ends the run for all.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::connection::PROGRESS_LIMIT;
use super::consumer::{Consumer, ConsumerOutcome};
use super::error::PerfError;
use super::meter::{Control, Meter, Total};
use super::options::Plan;
use super::posix;
use super::process::ProcessSample;
use super::progress::ProgressLine;
use super::publisher::{Publisher, PublisherOutcome};
use super::report::{DrainEnd, Observed, Report};
use super::topology::Topology;

const TICK: Duration = Duration::from_millis(20);
/// Where it cannot be known how much must arrive, this much silence is the end of it.
const QUIET_LIMIT: Duration = Duration::from_secs(2);
/// Workers keep nothing large on their stacks.
const WORKER_STACK_BYTES: usize = 256 << 10;

/// Runs the plan. The report is there even if workers failed; why the first did is the second part.
///
/// # Errors
/// What kept the run from starting.
pub(super) fn execute(plan: &Plan) -> Result<(Report, Option<PerfError>), PerfError> {
    if let Some(pid) = plan.broker_pid {
        ProcessSample::take(pid)?; // before any queue is declared: the process must exist
    }
    let topology = Topology::set_up(plan)?;
    let ready_before = topology.ready_before;
    let run = Crew::open(plan).and_then(|(publishers, consumers, control)| {
        Account::open(plan)?.run(plan, ready_before, publishers, consumers, &control)
    });
    let torn_down = topology.tear_down(plan);
    let (report, error) = run?;
    Ok((report, error.or(torn_down.err())))
}

/// One worker thread, seen from outside.
struct Worker<T> {
    meter: Arc<Meter>,
    thread: JoinHandle<T>,
}

/// All worker threads of a run.
struct Crew {
    publishers: Vec<Worker<PublisherOutcome>>,
    consumers: Vec<Worker<ConsumerOutcome>>,
    control: Arc<Control>,
}

type Outcomes<T> = Vec<Result<T, PerfError>>;
type Opened = (Vec<Publisher>, Vec<Consumer>, Arc<Control>);

impl Crew {
    /// Connects everybody, consumers first, so that no thread starts before all can.
    fn open(plan: &Plan) -> Result<Opened, PerfError> {
        let control = Arc::new(Control::default());
        let consumers =
            (0..plan.consumer_count).map(|index| Consumer::open(plan, index, &control)).collect::<Result<_, _>>()?;
        let publishers =
            (0..plan.publisher_count).map(|index| Publisher::open(plan, index, &control)).collect::<Result<_, _>>()?;
        Ok((publishers, consumers, control))
    }

    /// Starts a thread each. If the system refuses one, those that run are stopped.
    fn start(publishers: Vec<Publisher>, consumers: Vec<Consumer>, control: &Arc<Control>) -> Result<Self, PerfError> {
        let mut crew = Self { publishers: Vec::new(), consumers: Vec::new(), control: control.clone() };
        let started = crew.start_all(publishers, consumers);
        if let Err(source) = started {
            control.abort();
            crew.join();
            return Err(PerfError::Local { what: "cannot start a thread", source });
        }
        Ok(crew)
    }

    fn start_all(&mut self, publishers: Vec<Publisher>, consumers: Vec<Consumer>) -> io::Result<()> {
        for consumer in consumers {
            let (meter, control) = (consumer.meter(), self.control.clone());
            self.consumers.push(start_worker(meter, "consumer", move || {
                let outcome = consumer.run();
                abort_on_error(&control, outcome.error.as_ref());
                outcome
            })?);
        }
        for publisher in publishers {
            let (meter, control) = (publisher.meter(), self.control.clone());
            self.publishers.push(start_worker(meter, "publisher", move || {
                let outcome = publisher.run();
                abort_on_error(&control, outcome.error.as_ref());
                outcome
            })?);
        }
        Ok(())
    }

    fn published(&self) -> Total {
        Total::of(self.publishers.iter().map(|worker| &*worker.meter))
    }

    fn delivered(&self) -> Total {
        Total::of(self.consumers.iter().map(|worker| &*worker.meter))
    }

    fn publishing_is_over(&self) -> bool {
        self.publishers.iter().all(|worker| worker.meter.is_done() || worker.thread.is_finished())
    }

    /// Whether a thread died without saying so.
    fn has_lost_a_worker(&self) -> bool {
        let lost = |finished: bool, meter: &Meter| finished && !meter.is_done();
        self.publishers.iter().any(|worker| lost(worker.thread.is_finished(), &worker.meter))
            || self.consumers.iter().any(|worker| lost(worker.thread.is_finished(), &worker.meter))
    }

    /// Waits for every thread; each one ends within a few seconds of the control's word.
    fn join(self) -> (Outcomes<PublisherOutcome>, Outcomes<ConsumerOutcome>) {
        (
            self.publishers.into_iter().map(Worker::join).collect(),
            self.consumers.into_iter().map(Worker::join).collect(),
        )
    }
}

impl<T> Worker<T> {
    fn join(self) -> Result<T, PerfError> {
        self.thread.join().map_err(|_| PerfError::WorkerPanicked)
    }
}

fn start_worker<T: Send + 'static>(
    meter: Arc<Meter>,
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<Worker<T>> {
    let thread = thread::Builder::new().name(name.to_owned()).stack_size(WORKER_STACK_BYTES).spawn(work)?;
    Ok(Worker { meter, thread })
}

fn abort_on_error(control: &Control, error: Option<&PerfError>) {
    if error.is_some() {
        control.abort();
    }
}

/// What is measured around the run: both processes' accounts before it.
struct Account {
    broker_before: Option<ProcessSample>,
    own_cpu_before: Duration,
}

impl Account {
    fn open(plan: &Plan) -> Result<Self, PerfError> {
        Ok(Self {
            broker_before: plan.broker_pid.map(ProcessSample::take).transpose()?,
            own_cpu_before: posix::own_cpu(),
        })
    }

    fn run(
        self,
        plan: &Plan,
        ready_before: u64,
        publishers: Vec<Publisher>,
        consumers: Vec<Consumer>,
        control: &Arc<Control>,
    ) -> Result<(Report, Option<PerfError>), PerfError> {
        let crew = Crew::start(publishers, consumers, control)?;
        let watched = Watch::new(plan, &crew, ready_before).until_the_end();
        control.stop_consumers();
        let meters: (Vec<_>, Vec<_>) = (
            crew.publishers.iter().map(|worker| worker.meter.clone()).collect(),
            crew.consumers.iter().map(|worker| worker.meter.clone()).collect(),
        );
        let (publishers, consumers) = crew.join();
        let broker_after = plan.broker_pid.map(ProcessSample::take).transpose();
        let observed = Observed {
            published: Total::of(meters.0.iter().map(|meter| &**meter)),
            delivered: Total::of(meters.1.iter().map(|meter| &**meter)),
            delivered_while_publishing: watched.delivered_while_publishing,
            ready_before,
            drain: watched.drain,
            own_cpu: posix::own_cpu().saturating_sub(self.own_cpu_before),
            broker: self.broker_before.zip(*broker_after.as_ref().unwrap_or(&None)),
        };
        Ok(Report::new(plan, &observed, publishers, consumers, broker_after.err()))
    }
}

/// What the supervisor saw.
struct Watched {
    drain: DrainEnd,
    delivered_while_publishing: Option<Total>,
}

/// The supervisor: looks at the workers' meters every [`TICK`].
struct Watch<'a> {
    plan: &'a Plan,
    crew: &'a Crew,
    ready_before: u64,
    start: Instant,
    progress: ProgressLine,
    /// When the number delivered last changed, and to what.
    last_change: (Instant, u64),
}

impl<'a> Watch<'a> {
    fn new(plan: &'a Plan, crew: &'a Crew, ready_before: u64) -> Self {
        let start = Instant::now();
        Self { plan, crew, ready_before, start, progress: ProgressLine::new(plan), last_change: (start, 0) }
    }

    fn until_the_end(mut self) -> Watched {
        if self.plan.publisher_count == 0 {
            return Watched { drain: self.while_consuming(), delivered_while_publishing: None };
        }
        while !self.crew.publishing_is_over() {
            if self.tick() {
                return Watched { drain: DrainEnd::Aborted, delivered_while_publishing: None };
            }
        }
        let delivered = self.crew.delivered();
        Watched { drain: self.drain(), delivered_while_publishing: Some(delivered) }
    }

    /// Waits a moment; says whether the run is to end at once.
    fn tick(&mut self) -> bool {
        thread::sleep(TICK);
        if posix::was_interrupted() || self.crew.has_lost_a_worker() {
            self.crew.control.abort();
        }
        let delivered = self.crew.delivered();
        if delivered.messages != self.last_change.1 {
            self.last_change = (Instant::now(), delivered.messages);
        }
        self.progress.show(&self.crew.published(), &delivered);
        self.crew.control.is_aborted()
    }

    /// Without publishers: until the time is over, or every consumer has its fill.
    fn while_consuming(&mut self) -> DrainEnd {
        while !self.crew.consumers.iter().all(|worker| worker.meter.is_done()) {
            if self.tick() {
                return DrainEnd::Aborted;
            }
            match self.plan.limit.duration {
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
            let settled = self.crew.publishers.iter().all(|worker| worker.thread.is_finished());
            if self.plan.consumer_count == 0 && settled {
                return DrainEnd::NotNeeded;
            }
            let quiet = self.last_change.0.elapsed();
            let arrived = if self.plan.is_one_to_one() {
                self.crew.delivered().messages >= self.crew.published().messages + self.ready_before
            } else {
                quiet >= QUIET_LIMIT
            };
            if settled && arrived {
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
}
