//! Everything that is asked for on channels: a worker per connection, a lane per channel.

use std::time::Instant;

use super::super::connection::{Connection, PROGRESS_LIMIT, notice};
use super::super::crew;
use super::super::error::PerfError;
use super::super::posix::monotonic_ns;
use super::super::wire::{self, Arguments, Frame, MethodId, method};
use super::Sampler;
use super::operation::{Operation, Request};
use super::options::{Plan, What};
use super::report::Observed;
use super::tally::{Budget, Tally};

/// # Errors
/// Why the first worker that failed did; the others are stopped, and clean up what they made.
pub(super) fn run(plan: &Plan, sample: Sampler<'_>) -> Result<(Observed, Tally), PerfError> {
    let prefix = format!("perf-churn-{}", std::process::id());
    let mut workers =
        (0..plan.connection_count).map(|index| Worker::open(plan, index, &prefix)).collect::<Result<Vec<_>, _>>()?;
    let broker_before = sample()?;
    let start_ns = monotonic_ns();
    let budget = Budget::of(plan, start_ns);
    let churned = crew::work_all(workers.iter_mut(), || budget.stop(), |worker| worker.churn(&budget));
    let broker_after = sample();
    let begin = Instant::now();
    let cleaned = crew::work_all(workers.iter_mut(), || {}, Worker::clean_up);
    let cleaning = plan.keeps.then(|| begin.elapsed());
    let mut sum = Tally::new();
    workers.iter().for_each(|worker| sum.add(&worker.tally));
    let left = workers.into_iter().map(|worker| worker.connection.finish(None)).collect::<Vec<_>>();
    if let Err(error) = churned.and(cleaned) {
        eprintln!("queues and exchanges whose names begin with {prefix} may be left over");
        return Err(error);
    }
    left.into_iter().collect::<Result<(), _>>()?;
    Ok((Observed { start_ns, broker: broker_before.zip(broker_after?), cleaning }, sum))
}

/// A channel with one request outstanding, or none.
#[derive(Debug)]
struct Lane {
    channel: u16,
    /// What its things are called, before their number.
    name: String,
    /// How many were made, and how many of them are gone.
    made: u64,
    undone: u64,
    /// What it waits for, and since when.
    outstanding: Option<(Request, u64)>,
}

/// One connection and its lanes.
#[derive(Debug)]
struct Worker {
    connection: Connection,
    operation: Operation,
    keeps: bool,
    lanes: Vec<Lane>,
    first_channel: u16,
    tally: Tally,
    out: Vec<u8>,
}

/// Which requests a lane sends.
#[derive(Debug, Clone, Copy)]
enum Turn<'a> {
    /// Makes, and undoes unless things are to stay, as long as the budget lasts.
    Churn(&'a Budget),
    /// Undoes what is there.
    CleanUp,
}

impl Worker {
    /// Connects, opens the lanes' channels, and declares what they need.
    fn open(plan: &Plan, index: usize, prefix: &str) -> Result<Self, PerfError> {
        let operation = Operation { what: plan.what, durable: plan.durable };
        // Channel 1 is open; where channels are what is opened, the lanes have others.
        let first_channel = if plan.what == What::Channels { 2 } else { 1 };
        let lane = |number: u16| Lane {
            channel: first_channel + number,
            name: format!("{prefix}-{index}-{number}"),
            made: 0,
            undone: 0,
            outstanding: None,
        };
        let mut worker = Self {
            connection: Connection::open(&plan.uri)?,
            operation,
            keeps: plan.keeps,
            lanes: (0..plan.channel_count).map(lane).collect(),
            first_channel,
            tally: Tally::new(),
            out: Vec::new(),
        };
        if plan.what != What::Channels {
            worker.ask_on_each(method::CHANNEL_OPEN_OK, 1, |out, lane| {
                wire::append_method(out, lane.channel, method::CHANNEL_OPEN, &Arguments::new().short_string(""));
            })?;
        }
        if operation.needs_queue() {
            worker.ask_on_each(method::QUEUE_DECLARE_OK, 0, |out, lane| {
                operation.append_own_queue(out, lane.channel, &lane.name);
            })?;
        }
        Ok(worker)
    }

    /// Asks on every lane but the first `skipped`, and waits for all answers.
    fn ask_on_each(
        &mut self,
        reply: MethodId,
        skipped: usize,
        append: impl Fn(&mut Vec<u8>, &Lane),
    ) -> Result<(), PerfError> {
        self.lanes.iter().skip(skipped).for_each(|lane| append(&mut self.out, lane));
        self.flush()?;
        let mut missing = self.lanes.len().saturating_sub(skipped);
        let mut last_progress = Instant::now();
        while missing > 0 {
            self.read(&mut last_progress)?;
            while let Some(frame) = self.connection.reader.next_frame()? {
                if let Frame::Method { id, arguments, .. } = frame {
                    if id == reply {
                        missing = missing.saturating_sub(1);
                    } else {
                        notice(id, arguments)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn churn(&mut self, budget: &Budget) -> Result<(), PerfError> {
        self.run(Turn::Churn(budget))
    }

    /// Takes away what is left: things that were kept, things that were not undone, the lanes' own queues.
    fn clean_up(&mut self) -> Result<(), PerfError> {
        self.run(Turn::CleanUp)?;
        if !self.operation.needs_queue() {
            return Ok(());
        }
        self.ask_on_each(method::QUEUE_DELETE_OK, 0, |out, lane| {
            let arguments = Arguments::new().short(0).short_string(&lane.name).octet(0);
            wire::append_method(out, lane.channel, method::QUEUE_DELETE, &arguments);
        })
    }

    /// Keeps one request outstanding on every lane, until each has nothing more to ask.
    fn run(&mut self, turn: Turn<'_>) -> Result<(), PerfError> {
        let now = monotonic_ns();
        let mut active = 0;
        for index in 0..self.lanes.len() {
            active += usize::from(self.ask(index, turn, now));
        }
        let mut last_progress = Instant::now();
        while active > 0 {
            self.flush()?;
            self.read(&mut last_progress)?;
            let now = monotonic_ns();
            while let Some((channel, id)) = self.next_reply()? {
                let Some(index) = channel.checked_sub(self.first_channel).map(usize::from) else { continue };
                if self.on_reply(index, id, turn, now) {
                    active -= usize::from(!self.ask(index, turn, now));
                }
            }
        }
        Ok(())
    }

    /// Sends the lane's next request; says whether there was one.
    fn ask(&mut self, index: usize, turn: Turn<'_>, now_ns: u64) -> bool {
        let Some(lane) = self.lanes.get_mut(index) else { return false };
        let has_some = lane.made > lane.undone;
        let (request, number) = match turn {
            Turn::CleanUp if has_some => (Request::Undo, lane.undone),
            Turn::CleanUp => return false,
            Turn::Churn(_) if has_some && !self.keeps => (Request::Undo, lane.undone),
            Turn::Churn(budget) if budget.take() => (Request::Make, lane.made),
            Turn::Churn(_) => return false,
        };
        self.operation.append(&mut self.out, lane.channel, request, &lane.name, number);
        lane.outstanding = Some((request, now_ns));
        true
    }

    /// The next method that may be somebody's answer.
    fn next_reply(&mut self) -> Result<Option<(u16, MethodId)>, PerfError> {
        while let Some(frame) = self.connection.reader.next_frame()? {
            if let Frame::Method { channel, id, arguments } = frame {
                notice(id, arguments)?;
                return Ok(Some((channel, id)));
            }
        }
        Ok(None)
    }

    /// Counts an answer; says whether the lane waited for it.
    fn on_reply(&mut self, index: usize, id: MethodId, turn: Turn<'_>, now_ns: u64) -> bool {
        let Some(lane) = self.lanes.get_mut(index) else { return false };
        let Some((request, since_ns)) = lane.outstanding else { return false };
        if self.operation.methods(request).is_none_or(|(_, reply)| reply != id) {
            return false;
        }
        lane.outstanding = None;
        match request {
            Request::Make => lane.made += 1,
            Request::Undo => lane.undone += 1,
        }
        if matches!(turn, Turn::Churn(_)) {
            self.tally.record(request, now_ns.saturating_sub(since_ns));
            if request == Request::Undo || self.keeps {
                self.tally.complete(now_ns);
            }
        }
        true
    }

    fn flush(&mut self) -> Result<(), PerfError> {
        self.connection.send_all(&self.out, "asking the broker")?;
        self.out.clear();
        Ok(())
    }

    /// Reads once; fails if the broker has said nothing for too long.
    fn read(&mut self, last_progress: &mut Instant) -> Result<(), PerfError> {
        let during = "waiting for an answer";
        if self.connection.read(during)? {
            *last_progress = Instant::now();
        } else if last_progress.elapsed() > PROGRESS_LIMIT {
            return Err(PerfError::Stalled { during, seconds: PROGRESS_LIMIT.as_secs() });
        }
        Ok(())
    }
}
