//! How deliveries are settled, and the postbox: a consumer that acknowledges while a publisher holds the queue does not wait
//! for it, but leaves what it has to say there.
//!
//! # Invariants
//! - A1: the postbox is open only while somebody holds the state who empties it before letting go, so that nobody who holds
//!   the state ever misses an acknowledgement made before.

use std::sync::Arc;

use parking_lot::MutexGuard;
use smallvec::SmallVec;

use super::{ConsumerId, Queue, SettledRun, Settlement, lane::ConsumedRun, state::QueueState};
use crate::{broker::port::Effects, clock, store::Round};

/// Runs that are left in the postbox at a time. Who has more waits: they are work, wherever it is done.
const POSTED_RUNS: usize = 8;
/// How often a publisher looks into the postbox before it closes it.
const POSTBOX_TURNS: u32 = 8;
/// A publisher of fewer messages holds the state too briefly for somebody to come by.
const ATTENDED_MESSAGES: usize = 8;

type Runs = SmallVec<[ConsumedRun; POSTED_RUNS]>;

/// See the module.
#[derive(Default)]
pub(super) struct Postbox {
    pub is_open: bool,
    pub runs: Vec<(Option<ConsumerId>, ConsumedRun)>,
}

/// The state of a queue, held by somebody who attends to its postbox.
pub(super) struct Attended<'a> {
    queue: &'a Arc<Queue>,
    pub state: MutexGuard<'a, QueueState>,
}

impl Attended<'_> {
    /// Applies what was left in the postbox, hands out what that freed, and lets go.
    pub fn finish(mut self, effects: &mut Effects) {
        for turn in 1..=POSTBOX_TURNS {
            let posted: SmallVec<[_; POSTED_RUNS]> = {
                let mut postbox = self.queue.postbox.lock();
                postbox.is_open = !postbox.runs.is_empty() && turn < POSTBOX_TURNS;
                postbox.runs.drain(..).collect()
            };
            if posted.is_empty() {
                return;
            }
            for (consumer, run) in posted {
                self.state.ack_run(consumer, &run);
            }
            self.queue.after_acks(&mut self.state, effects);
        }
    }
}

impl Drop for Attended<'_> {
    fn drop(&mut self) {
        // After a panic there may be something left.
        let mut postbox = self.queue.postbox.lock();
        postbox.is_open = false;
        for (consumer, run) in postbox.runs.drain(..) {
            self.state.ack_run(consumer, &run);
        }
    }
}

impl Queue {
    /// Applies settlements of deliveries that `consumer` (`None` for `basic.get`) had, then hands out what that freed. Answers
    /// the round that takes what changed in the store, 0 if nothing did.
    pub fn settle(
        self: &Arc<Self>,
        consumer: Option<ConsumerId>,
        runs: &[SettledRun],
        how: Settlement,
        effects: &mut Effects,
    ) -> Round {
        if let Some(stream) = &self.stream {
            return stream.settle(consumer, runs, effects);
        }
        let mut state = self.open();
        if state.deleted {
            return 0;
        }
        let late = match how {
            Settlement::Acked => state.ack(consumer, runs),
            _ => self.settle_undone(&mut state, consumer, runs, how, effects),
        };
        if state.unacked.messages == 0 && state.checkouts.is_some() && state.rules.expires_ms.is_some() {
            state.last_used_unix_ms = clock::now_unix_ms();
            state.renew_lease();
        }
        if let Some(id) = consumer {
            state.consumers.settled(id, runs.iter().map(|run| run.count).sum(), late);
        }
        self.after_acks(&mut state, effects);
        if how != Settlement::Acked {
            self.enforce_limits(&mut state, effects);
            self.schedule(&mut state);
        }
        state.dirty.unwrap_or(0)
    }

    /// [`Queue::settle`] of acknowledged deliveries, where nobody asks for the round.
    ///
    /// Hot path: what can be done without the state is; a publisher that holds it now does the rest.
    pub fn acknowledge(self: &Arc<Self>, consumer: Option<ConsumerId>, runs: &[SettledRun], effects: &mut Effects) {
        let consumed = if self.acks_in_runs { consumed_runs(runs) } else { None };
        let Some(consumed) = consumed else {
            self.settle(consumer, runs, Settlement::Acked, effects);
            return;
        };
        let Some(mut state) = self.open_or_post(consumer, &consumed) else { return };
        for run in &consumed {
            state.ack_run(consumer, run);
        }
        self.after_acks(&mut state, effects);
    }

    /// Locks the state, unless its holder takes the acknowledgements.
    fn open_or_post(&self, consumer: Option<ConsumerId>, runs: &Runs) -> Option<MutexGuard<'_, QueueState>> {
        if self.state.is_locked() {
            let mut postbox = self.postbox.lock();
            if postbox.is_open {
                postbox.runs.extend(runs.iter().map(|&run| (consumer, run)));
                return None;
            }
        }
        Some(self.open())
    }

    /// Locks the state for a publisher of so many messages; it attends to the postbox if that is worth it.
    #[inline]
    pub(super) fn attend(self: &Arc<Self>, messages: usize) -> Result<Attended<'_>, MutexGuard<'_, QueueState>> {
        let state = self.open();
        if !self.acks_in_runs || messages < ATTENDED_MESSAGES {
            return Err(state);
        }
        self.postbox.lock().is_open = true;
        Ok(Attended { queue: self, state })
    }

    /// Hands out what settlements have freed.
    fn after_acks(self: &Arc<Self>, state: &mut QueueState, effects: &mut Effects) {
        if state.can_deliver() {
            let now = clock::now_unix_ms();
            self.deliver_locked(state, now, effects);
        } else {
            self.note_changes(state);
        }
        self.schedule(state);
    }
}

impl QueueState {
    /// Ends messages that were handed out: the plain case of [`Settlement::Acked`]. Answers how many came too late.
    #[inline]
    fn ack(&mut self, consumer: Option<ConsumerId>, runs: &[SettledRun]) -> u32 {
        let is_plain = self.checkouts.is_none() && self.groups.is_none() && self.attempts.is_empty();
        if let (true, Some(lane)) = (is_plain, self.lanes.only()) {
            let mut rest = runs;
            while let Some((run, after)) = join(rest) {
                lane.consume_run(&run);
                self.unacked.sub(run.end - run.first, run.body_bytes);
                rest = after;
            }
            return 0;
        }
        let mut late = 0;
        for delivery in runs.iter().flat_map(|run| run.each()) {
            if self.check_in(consumer, &delivery) {
                self.finish(&delivery);
            } else {
                late += 1;
            }
        }
        late
    }

    /// Ends messages of a queue that [takes acknowledgements in runs](Queue::acks_in_runs).
    #[inline]
    fn ack_run(&mut self, consumer: Option<ConsumerId>, run: &ConsumedRun) {
        if self.deleted {
            return;
        }
        if !self.attempts.is_empty() {
            (run.first..run.end).for_each(|position| self.attempts.forget(position));
        }
        if let Some(lane) = self.lanes.only() {
            lane.consume_run(run);
        }
        let count = run.end - run.first;
        self.unacked.sub(count, run.body_bytes);
        if let Some(id) = consumer {
            self.consumers.settled(id, count as u32, 0);
        }
    }
}

/// The runs joined to as few as there can be, if these are few.
fn consumed_runs(runs: &[SettledRun]) -> Option<Runs> {
    let (mut joined, mut rest) = (Runs::new(), runs);
    while let Some((run, after)) = join(rest) {
        if joined.len() == POSTED_RUNS {
            return None;
        }
        joined.push(run);
        rest = after;
    }
    Some(joined)
}

/// The runs at the front that follow each other in the log and are all durable or not, as one, and those behind them.
#[inline]
fn join(runs: &[SettledRun]) -> Option<(ConsumedRun, &[SettledRun])> {
    let bytes_of = |run: &SettledRun| u64::from(run.count) * u64::from(run.body_bytes);
    let (first, mut rest) = runs.split_first()?;
    let (mut end, mut body_bytes) = (first.seq + u64::from(first.count), bytes_of(first));
    while let Some((next, after)) = rest.split_first()
        && next.seq == end
        && next.persistent == first.persistent
    {
        end += u64::from(next.count);
        body_bytes += bytes_of(next);
        rest = after;
    }
    Some((ConsumedRun { first: first.seq, end, body_bytes, durable: first.persistent }, rest))
}
