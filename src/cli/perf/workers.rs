//! The workers of a run: all connections opened, then threads started: one for each worker, or where there are
//! hundreds of them, some that many share ([`super::crowd`]).

use std::io;
use std::num::NonZero;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};

use super::consumer::{Consumer, ConsumerOutcome};
use super::crowd;
use super::error::PerfError;
use super::latencies::LatencyPool;
use super::meter::{Control, Meter, Total};
use super::options::Plan;
use super::publisher::{Publisher, PublisherOutcome};

/// Workers keep nothing large on their stacks.
const WORKER_STACK_BYTES: usize = 256 << 10;
/// With more workers than this, they share threads.
const CROWD: usize = 200;
/// Threads for all publishers of a crowd, and as many for its consumers.
const MAX_SHARED_THREADS: usize = 8;
/// Connections being opened at the same time.
const OPENERS: usize = 32;

/// One thread and the workers on it, seen from outside.
pub(super) struct Team<T> {
    pub(super) meters: Vec<Arc<Meter>>,
    pub(super) thread: JoinHandle<Vec<T>>,
}

/// All worker threads of a run.
pub(super) struct Workers {
    pub(super) publishers: Vec<Team<PublisherOutcome>>,
    pub(super) consumers: Vec<Team<ConsumerOutcome>>,
    pub(super) control: Arc<Control>,
}

pub(super) type Outcomes<T> = Vec<Result<T, PerfError>>;

/// Everybody connected, and no thread started.
pub(super) struct Opened {
    publishers: Vec<Publisher>,
    consumers: Vec<Consumer>,
    control: Arc<Control>,
    latencies: Pools,
    sharing: Sharing,
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
        Ok(Self { publishers, consumers, control, latencies, sharing: Sharing::of(plan) })
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

impl Workers {
    /// Starts a thread each. If the system refuses one, those that run are stopped.
    pub(super) fn start(opened: Opened) -> Result<(Self, Pools), PerfError> {
        let mut workers = Self { publishers: Vec::new(), consumers: Vec::new(), control: opened.control };
        let started = workers.start_all(opened.publishers, opened.consumers, opened.sharing);
        if let Err(source) = started {
            workers.control.abort();
            workers.join();
            return Err(PerfError::Local { what: "cannot start a thread", source });
        }
        Ok((workers, opened.latencies))
    }

    fn start_all(&mut self, publishers: Vec<Publisher>, consumers: Vec<Consumer>, sharing: Sharing) -> io::Result<()> {
        for team in teams(consumers, sharing.consumers_per_thread) {
            let (meters, control) = (team.iter().map(Consumer::meter).collect(), self.control.clone());
            self.consumers.push(start_team(meters, "consumer", move || match alone(team) {
                Ok(consumer) => vec![abort_on_error(&control, consumer.run(), |outcome| outcome.error.is_some())],
                Err(team) => crowd::run_consumers(team, &control),
            })?);
        }
        for team in teams(publishers, sharing.publishers_per_thread) {
            let (meters, control) = (team.iter().map(Publisher::meter).collect(), self.control.clone());
            self.publishers.push(start_team(meters, "publisher", move || match alone(team) {
                Ok(publisher) => vec![abort_on_error(&control, publisher.run(), |outcome| outcome.error.is_some())],
                Err(team) => crowd::run_publishers(team, &control),
            })?);
        }
        Ok(())
    }

    pub(super) fn published(&self) -> Total {
        Total::of(self.publishers.iter().flat_map(Team::meters))
    }

    pub(super) fn delivered(&self) -> Total {
        Total::of(self.consumers.iter().flat_map(Team::meters))
    }

    pub(super) fn publishing_is_over(&self) -> bool {
        self.publishers.iter().all(|team| team.is_done() || team.thread.is_finished())
    }

    /// Whether publishers wait for nothing any more: every confirm is in, or given up.
    pub(super) fn publishers_are_settled(&self) -> bool {
        self.publishers.iter().all(|team| team.thread.is_finished())
    }

    pub(super) fn consuming_is_over(&self) -> bool {
        self.consumers.iter().all(Team::is_done)
    }

    /// Whether a thread died without saying so.
    pub(super) fn has_lost_a_worker(&self) -> bool {
        self.publishers.iter().any(Team::is_lost) || self.consumers.iter().any(Team::is_lost)
    }

    /// Waits for every thread; each one ends within a few seconds of the control's word.
    pub(super) fn join(self) -> (Outcomes<PublisherOutcome>, Outcomes<ConsumerOutcome>) {
        (
            self.publishers.into_iter().flat_map(Team::join).collect(),
            self.consumers.into_iter().flat_map(Team::join).collect(),
        )
    }
}

impl<T> Team<T> {
    pub(super) fn meters(&self) -> impl Iterator<Item = &Meter> {
        self.meters.iter().map(|meter| &**meter)
    }

    fn is_done(&self) -> bool {
        self.meters().all(Meter::is_done)
    }

    fn is_lost(&self) -> bool {
        self.thread.is_finished() && !self.is_done()
    }

    fn join(self) -> Outcomes<T> {
        match self.thread.join() {
            Ok(outcomes) => outcomes.into_iter().map(Ok).collect(),
            Err(_) => vec![Err(PerfError::WorkerPanicked)],
        }
    }
}

/// How many workers have a thread together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sharing {
    publishers_per_thread: usize,
    consumers_per_thread: usize,
}

impl Sharing {
    /// A thread each, as long as there are few: it is the fastest way, and the one that disturbs others least. Those
    /// that are always busy or wait in other ways (unpaced and committing publishers, working and polling
    /// consumers) keep it however many they are.
    fn of(plan: &Plan) -> Self {
        let threads = thread::available_parallelism().map_or(1, NonZero::get).min(MAX_SHARED_THREADS);
        let is_crowd = plan.worker_count() > CROWD;
        let publishers_share = is_crowd && plan.rate_per_second.is_some() && plan.tx.is_none();
        let consumers_share = is_crowd && plan.consuming.polling_interval.is_none() && plan.consuming.work.is_zero();
        let per_thread = |shares: bool, workers: usize| if shares { workers.div_ceil(threads).max(1) } else { 1 };
        Self {
            publishers_per_thread: per_thread(publishers_share, plan.publisher_count),
            consumers_per_thread: per_thread(consumers_share, plan.consumer_count),
        }
    }
}

/// The workers in teams of `size`; the last one may be smaller.
fn teams<T>(mut workers: Vec<T>, size: usize) -> Vec<Vec<T>> {
    let mut teams = Vec::new();
    while !workers.is_empty() {
        let rest = workers.split_off(size.min(workers.len()));
        teams.push(std::mem::replace(&mut workers, rest));
    }
    teams
}

/// The only one of a team, or the team.
fn alone<T>(mut team: Vec<T>) -> Result<T, Vec<T>> {
    match team.pop() {
        Some(one) if team.is_empty() => Ok(one),
        last => {
            team.extend(last);
            Err(team)
        }
    }
}

fn start_team<T: Send + 'static>(
    meters: Vec<Arc<Meter>>,
    name: &str,
    work: impl FnOnce() -> Vec<T> + Send + 'static,
) -> io::Result<Team<T>> {
    let thread = thread::Builder::new().name(name.to_owned()).stack_size(WORKER_STACK_BYTES).spawn(work)?;
    Ok(Team { meters, thread })
}

fn abort_on_error<T>(control: &Control, outcome: T, failed: impl FnOnce(&T) -> bool) -> T {
    if failed(&outcome) {
        control.abort();
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::super::options::test_plan;
    use super::*;

    #[test]
    fn what_is_opened_at_the_same_time_is_in_order() {
        let opened = open_all(1_000, |index| Ok(index * 2)).expect("none fails");
        assert!(opened.iter().enumerate().all(|(index, double)| *double == index * 2) && opened.len() == 1_000);
        assert!(open_all(0, |_| Ok(())).expect("nothing to do").is_empty());
    }

    #[test]
    fn only_a_crowd_shares_threads_and_only_where_it_can() {
        let shared = |options: &str| {
            let sharing = Sharing::of(&test_plan(options));
            (sharing.publishers_per_thread > 1, sharing.consumers_per_thread > 1)
        };
        assert_eq!(shared("-x 100 -y 100 --rate 1"), (false, false));
        assert_eq!(shared("-x 1000 -y 1000 --rate 1"), (true, true));
        assert_eq!(shared("-x 1000 -y 1000"), (false, true));
        assert_eq!(shared("-x 1000 -y 1000 --rate 1 --tx 10 --get"), (false, false));
    }

    #[test]
    fn teams_hold_everybody_once() {
        assert_eq!(teams((0..7).collect(), 3), [vec![0, 1, 2], vec![3, 4, 5], vec![6]]);
        assert!(teams(Vec::<u8>::new(), 3).is_empty());
        assert_eq!((alone(vec![1]), alone(vec![1, 2])), (Ok(1), Err(vec![1, 2])));
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
