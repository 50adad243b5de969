//! Hundreds of publishers, or of consumers, on one thread: each is served when it has something to do.
//!
//! A thread each would cost two task switches per message where every connection has little to do. What is lost:
//! while one connection takes nothing, the others of its thread wait, up to the time that a write blocks.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::{Duration, Instant};

use super::connection::{Connection, POLL_INTERVAL, PROGRESS_LIMIT};
use super::consumer::{Consumer, ConsumerOutcome};
use super::error::PerfError;
use super::meter::Control;
use super::posix::{InputPoll, monotonic_ns};
use super::publisher::{Publisher, PublisherOutcome, Wait};

/// Partial ack batches are sent so often.
const FLUSH_INTERVAL: Duration = Duration::from_secs(1);
/// Publishers served before the broker's answers are read.
const TURNS_AT_ONCE: usize = 64;

/// One of a crowd, and how it ended, once it has.
struct Member<T> {
    worker: T,
    end: Option<Result<(), PerfError>>,
}

/// The members of a crowd.
struct Crowd<'a, T> {
    members: Vec<Member<T>>,
    control: &'a Control,
    /// Members that have not ended.
    active: usize,
}

/// The members' sockets.
struct Sockets(InputPoll);

impl Sockets {
    fn of<'a>(connections: impl Iterator<Item = &'a Connection>) -> Result<Self, PerfError> {
        let failed = |source| PerfError::Local { what: "cannot wait for many sockets", source };
        let poll = InputPoll::new().map_err(failed)?;
        for (index, connection) in connections.enumerate() {
            poll.add(connection.socket(), index).map_err(failed)?;
        }
        Ok(Self(poll))
    }

    /// Those with input, after at most `timeout`.
    fn ready(&mut self, timeout: Duration, during: &'static str) -> Result<Vec<usize>, PerfError> {
        self.0.wait(timeout).map(Iterator::collect).map_err(|source| PerfError::Io { during, source })
    }

    /// No more input of this connection is wanted.
    fn ignore(&self, connection: &Connection) {
        // A socket that cannot be taken out is reported again, and nobody serves it.
        let _ = self.0.remove(connection.socket());
    }
}

impl<'a, T> Crowd<'a, T> {
    fn new(workers: Vec<T>, control: &'a Control) -> Self {
        let active = workers.len();
        let members = workers.into_iter().map(|worker| Member { worker, end: None }).collect();
        Self { members, control, active }
    }

    /// Carries out `work` for a member that has not ended; an error ends it, and the run.
    fn serve<R>(&mut self, index: usize, work: impl FnOnce(&mut T) -> Result<R, PerfError>) -> Option<R> {
        let member = self.members.get_mut(index).filter(|member| member.end.is_none())?;
        match work(&mut member.worker) {
            Ok(result) => Some(result),
            Err(error) => {
                self.control.abort();
                self.retire(index, Err(error));
                None
            }
        }
    }

    fn retire(&mut self, index: usize, end: Result<(), PerfError>) {
        if let Some(member) = self.members.get_mut(index)
            && member.end.is_none()
        {
            member.end = Some(end);
            self.active -= 1;
        }
    }

    /// Lets everybody take leave. If the crowd itself failed, that is the end of the first one still active.
    ///
    /// The first one to whom the broker gives no answer aborts the run, and then nobody waits for an answer.
    fn take_leave<O>(
        self,
        failure: Option<PerfError>,
        leave: impl Fn(T, Result<(), PerfError>) -> O,
        has_failed: impl Fn(&O) -> bool,
    ) -> Vec<O> {
        let mut failure = failure;
        let mut outcomes = Vec::with_capacity(self.members.len());
        for member in self.members {
            let outcome = leave(member.worker, member.end.unwrap_or_else(|| failure.take().map_or(Ok(()), Err)));
            if has_failed(&outcome) {
                self.control.abort();
            }
            outcomes.push(outcome);
        }
        outcomes
    }
}

/// Runs consumers until they are stopped or have their fill.
pub(super) fn run_consumers(consumers: Vec<Consumer>, control: &Control) -> Vec<ConsumerOutcome> {
    let sockets = Sockets::of(consumers.iter().map(Consumer::connection));
    let mut crowd = Crowd::new(consumers, control);
    let failure = sockets.and_then(|sockets| consume(&mut crowd, sockets)).err();
    crowd.take_leave(failure, Consumer::end, |outcome| outcome.error.is_some())
}

fn consume(crowd: &mut Crowd<'_, Consumer>, mut sockets: Sockets) -> Result<(), PerfError> {
    // What came along with the answer to basic.consume is read already.
    for index in 0..crowd.members.len() {
        attend(crowd, &sockets, index, Consumer::take_block);
    }
    let mut last_flush = Instant::now();
    while crowd.active > 0 && !crowd.control.consumers_stopped() {
        for index in sockets.ready(POLL_INTERVAL, "consuming")? {
            attend(crowd, &sockets, index, Consumer::take_in);
        }
        if last_flush.elapsed() >= FLUSH_INTERVAL {
            flush(crowd);
            last_flush = Instant::now();
        }
    }
    flush(crowd);
    Ok(())
}

/// Lets a consumer take in what is there, and no more if that was its fill.
fn attend(
    crowd: &mut Crowd<'_, Consumer>,
    sockets: &Sockets,
    index: usize,
    take: impl FnOnce(&mut Consumer) -> Result<(), PerfError>,
) {
    let has_its_fill = crowd.serve(index, |consumer| {
        take(consumer)?;
        match consumer.has_its_fill() {
            true => consumer.send_last_acks().map(|()| true),
            false => Ok(false),
        }
    });
    if has_its_fill != Some(false) {
        sockets.ignore(crowd.members[index].worker.connection());
        crowd.retire(index, Ok(()));
    }
}

fn flush(crowd: &mut Crowd<'_, Consumer>) {
    for index in 0..crowd.members.len() {
        crowd.serve(index, Consumer::send_last_acks);
    }
}

/// Runs paced publishers until their limits, and waits for their confirms.
pub(super) fn run_publishers(publishers: Vec<Publisher>, control: &Control) -> Vec<PublisherOutcome> {
    let sockets = Sockets::of(publishers.iter().map(Publisher::connection));
    let mut crowd = Crowd::new(publishers, control);
    let failure = sockets
        .and_then(|mut sockets| publish(&mut crowd, &mut sockets).and_then(|()| settle(&mut crowd, &mut sockets)))
        .err();
    crowd.take_leave(failure, Publisher::end, |outcome| outcome.error.is_some())
}

/// When each publisher has its next turn.
#[derive(Debug, Default)]
struct Turns(BinaryHeap<Reverse<(u64, usize)>>);

impl Turns {
    fn add(&mut self, at_ns: u64, index: usize) {
        self.0.push(Reverse((at_ns, index)));
    }

    /// The next one whose time has come.
    fn due(&mut self, now_ns: u64) -> Option<usize> {
        let Reverse((at_ns, _)) = self.0.peek()?;
        if *at_ns > now_ns {
            return None;
        }
        self.0.pop().map(|Reverse((_, index))| index)
    }

    /// How long nobody has a turn; at most [`POLL_INTERVAL`].
    fn pause(&self, now_ns: u64) -> Duration {
        match self.0.peek() {
            Some(Reverse((at_ns, _))) => Duration::from_nanos(at_ns.saturating_sub(now_ns)).min(POLL_INTERVAL),
            None => POLL_INTERVAL,
        }
    }
}

fn publish(crowd: &mut Crowd<'_, Publisher>, sockets: &mut Sockets) -> Result<(), PerfError> {
    let mut turns = Turns::default();
    // Every publisher has one entry among the turns, or waits for input here, until it has published everything.
    let mut awaits_input = vec![false; crowd.members.len()];
    let mut publishing = crowd.members.len();
    for (index, member) in crowd.members.iter_mut().enumerate() {
        member.worker.begin();
        turns.add(0, index);
    }
    let mut last_look = Instant::now();
    while publishing > 0 {
        let mut served = 0;
        while served < TURNS_AT_ONCE
            && let Some(index) = turns.due(monotonic_ns())
        {
            served += 1;
            match crowd.serve(index, Publisher::step) {
                Some(Wait::Until(at_ns)) => turns.add(at_ns, index),
                Some(Wait::Input) => awaits_input[index] = true,
                Some(Wait::End) | None => publishing -= 1,
            }
        }
        for index in sockets.ready(turns.pause(monotonic_ns()), "publishing")? {
            let heard = crowd.serve(index, Publisher::take_in).is_some();
            if std::mem::take(&mut awaits_input[index]) {
                turns.add(0, index);
            } else if !heard {
                sockets.ignore(crowd.members[index].worker.connection());
            }
        }
        // Those that wait in vain find out by themselves, and the others that the run was aborted.
        if last_look.elapsed() >= POLL_INTERVAL {
            last_look = Instant::now();
            let waiting = awaits_input.iter_mut().enumerate();
            waiting.filter_map(|(index, waits)| std::mem::take(waits).then_some(index)).for_each(|i| turns.add(0, i));
            if crowd.control.is_aborted() {
                turns.0 = turns.0.drain().map(|Reverse((_, index))| Reverse((0, index))).collect();
            }
        }
    }
    Ok(())
}

/// Waits for the outstanding confirms and returns of all, as long as any keep coming.
fn settle(crowd: &mut Crowd<'_, Publisher>, sockets: &mut Sockets) -> Result<(), PerfError> {
    let mut last_progress = Instant::now();
    let is_settled = |crowd: &Crowd<'_, Publisher>| {
        crowd.members.iter().all(|member| member.end.is_some() || member.worker.is_settled())
    };
    while !crowd.control.is_aborted() && last_progress.elapsed() < PROGRESS_LIMIT && !is_settled(crowd) {
        for index in sockets.ready(POLL_INTERVAL, "waiting for confirms")? {
            if crowd.serve(index, Publisher::take_in).is_some() {
                last_progress = Instant::now();
            } else {
                sockets.ignore(crowd.members[index].worker.connection());
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_come_in_the_order_of_their_times() {
        let mut turns = Turns::default();
        [(30, 0), (10, 1), (20, 2)].into_iter().for_each(|(at_ns, index)| turns.add(at_ns, index));
        assert_eq!(turns.due(5), None);
        assert_eq!(turns.pause(5), Duration::from_nanos(5));
        assert_eq!([25, 25, 25].map(|now| turns.due(now)), [Some(1), Some(2), None]);
        assert_eq!(turns.pause(40), Duration::ZERO);
        assert_eq!(turns.due(40), Some(0));
        assert_eq!(turns.pause(40), POLL_INTERVAL);
    }

    #[test]
    fn a_member_that_fails_aborts_the_run_and_is_served_no_more() {
        let control = Control::default();
        let mut crowd = Crowd::new(vec![1, 2], &control);
        assert_eq!(crowd.serve(0, |worker| Ok(*worker)), Some(1));
        assert!(crowd.serve(0, |_| Err::<(), _>(PerfError::WorkerPanicked)).is_none());
        assert!(crowd.serve(0, |_| Ok(())).is_none());
        assert_eq!((crowd.active, control.is_aborted()), (1, true));
        let ends = crowd.take_leave(None, |worker, end| (worker, end.is_err()), |(_, failed)| *failed);
        assert_eq!(ends, [(1, true), (2, false)]);
    }

    #[test]
    fn the_failure_of_a_crowd_is_told_once() {
        let control = Control::default();
        let crowd = Crowd::new(vec![1, 2], &control);
        let failure = Some(PerfError::WorkerPanicked);
        assert_eq!(crowd.take_leave(failure, |_, end| end.is_err(), |failed| *failed), [true, false]);
        assert!(control.is_aborted());
    }
}
