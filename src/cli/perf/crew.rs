//! The workers of a run: all connections opened, then a thread started for each.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

use super::consumer::{Consumer, ConsumerOutcome};
use super::error::PerfError;
use super::latencies::LatencyPool;
use super::meter::{Control, Meter, Total};
use super::options::Plan;
use super::publisher::{Publisher, PublisherOutcome};

/// Workers keep nothing large on their stacks.
const WORKER_STACK_BYTES: usize = 256 << 10;
/// Connections being opened at the same time.
const OPENERS: usize = 32;

/// One worker thread, seen from outside.
pub(super) struct Worker<T> {
    pub(super) meter: Arc<Meter>,
    pub(super) thread: JoinHandle<T>,
}

/// All worker threads of a run.
pub(super) struct Crew {
    pub(super) publishers: Vec<Worker<PublisherOutcome>>,
    pub(super) consumers: Vec<Worker<ConsumerOutcome>>,
    pub(super) control: Arc<Control>,
}

pub(super) type Outcomes<T> = Vec<Result<T, PerfError>>;

/// Everybody connected, and no thread started.
pub(super) struct Opened {
    publishers: Vec<Publisher>,
    consumers: Vec<Consumer>,
    control: Arc<Control>,
    pub(super) latencies: Pools,
}

/// Where the workers' latencies go.
pub(super) struct Pools {
    pub(super) delivery: LatencyPool,
    /// Of confirms, or of commits.
    pub(super) confirm: LatencyPool,
}

impl Opened {
    /// Connects everybody, consumers first, so that no thread starts before all can.
    ///
    /// # Errors
    /// The first failure; the connections that were opened are dropped.
    pub(super) fn connect(plan: &Plan) -> Result<Self, PerfError> {
        let control = Arc::new(Control::default());
        let latencies =
            Pools { delivery: LatencyPool::new(plan.consumer_count), confirm: LatencyPool::new(plan.publisher_count) };
        let consumers = open_all(plan.consumer_count, |index| {
            Consumer::open(plan, index, &control, latencies.delivery.recorder(index))
        })?;
        let publishers = open_all(plan.publisher_count, |index| {
            Publisher::open(plan, index, &control, latencies.confirm.recorder(index))
        })?;
        Ok(Self { publishers, consumers, control, latencies })
    }
}

/// Opens `count` things, several at a time: a broker that takes its time for each login must not be waited for
/// a thousand times in a row.
fn open_all<T: Send>(count: usize, open: impl Fn(usize) -> Result<T, PerfError> + Sync) -> Result<Vec<T>, PerfError> {
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let open_some = || {
        let mut opened = Vec::new();
        while !failed.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                break;
            }
            match open(index) {
                Ok(one) => opened.push((index, one)),
                Err(error) => {
                    failed.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
        Ok(opened)
    };
    let parts = thread::scope(|scope| {
        // This thread is one of them, and enough if the system refuses more.
        let helpers: Vec<_> = (1..count.min(OPENERS))
            .map_while(|_| thread::Builder::new().stack_size(WORKER_STACK_BYTES).spawn_scoped(scope, open_some).ok())
            .collect();
        let own = open_some();
        let others = helpers.into_iter().map(|helper| helper.join().map_err(|_| PerfError::WorkerPanicked).flatten());
        std::iter::once(own).chain(others).collect::<Result<Vec<_>, _>>()
    })?;
    let mut opened: Vec<_> = parts.into_iter().flatten().collect();
    opened.sort_by_key(|(index, _)| *index);
    Ok(opened.into_iter().map(|(_, one)| one).collect())
}

impl Crew {
    /// Starts a thread each. If the system refuses one, those that run are stopped.
    pub(super) fn start(opened: Opened) -> Result<(Self, Pools), PerfError> {
        let mut crew = Self { publishers: Vec::new(), consumers: Vec::new(), control: opened.control };
        let started = crew.start_all(opened.publishers, opened.consumers);
        if let Err(source) = started {
            crew.control.abort();
            crew.join();
            return Err(PerfError::Local { what: "cannot start a thread", source });
        }
        Ok((crew, opened.latencies))
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

    pub(super) fn published(&self) -> Total {
        Total::of(self.publishers.iter().map(|worker| &*worker.meter))
    }

    pub(super) fn delivered(&self) -> Total {
        Total::of(self.consumers.iter().map(|worker| &*worker.meter))
    }

    pub(super) fn publishing_is_over(&self) -> bool {
        self.publishers.iter().all(|worker| worker.meter.is_done() || worker.thread.is_finished())
    }

    /// Whether a thread died without saying so.
    pub(super) fn has_lost_a_worker(&self) -> bool {
        let lost = |finished: bool, meter: &Meter| finished && !meter.is_done();
        self.publishers.iter().any(|worker| lost(worker.thread.is_finished(), &worker.meter))
            || self.consumers.iter().any(|worker| lost(worker.thread.is_finished(), &worker.meter))
    }

    /// Waits for every thread; each one ends within a few seconds of the control's word.
    pub(super) fn join(self) -> (Outcomes<PublisherOutcome>, Outcomes<ConsumerOutcome>) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_opened_at_the_same_time_is_in_order() {
        let opened = open_all(1_000, |index| Ok(index * 2)).expect("none fails");
        assert!(opened.iter().enumerate().all(|(index, double)| *double == index * 2) && opened.len() == 1_000);
        assert!(open_all(0, |_| Ok(())).expect("nothing to do").is_empty());
    }

    #[test]
    fn the_first_failure_ends_the_opening() {
        let tried = AtomicUsize::new(0);
        let failed = open_all(100_000, |index| {
            tried.fetch_add(1, Ordering::Relaxed);
            if index == 40 { Err(PerfError::WorkerPanicked) } else { Ok(()) }
        });
        assert!(failed.is_err() && tried.into_inner() < 100_000);
    }
}
