//! One queue: its ready and unacked messages, its consumers, and the rules that move one to the other.
//!
//! # Ownership
//! A [`Queue`] holds its state behind a mutex; nobody keeps the guard over an `.await`. Operations append to
//! [`Effects`] what has to happen once the queue is unlocked; the caller carries it out.
//!
//! # Invariants
//! - Q1: a message is ready, unacked, or gone; never two of these.
//! - Q2: ready messages of a priority leave in the order of their positions, and a returned one has its old position;
//!   but in quorum-type queues, returned ones leave before all others, in the order of their return.
//! - Q3: a publish answers the round that will hold it; delivery need not wait for that round.
//! - Q4: no other queue is touched while this one is locked.
//!
//! # Elsewhere
//! How messages enter: `arriving`; how they leave other than by an ack: `leaving`. Delivery tags and `multiple`:
//! `session`. Matching: `broker::exchange`. File formats: `store`.

mod acking;
mod arriving;
mod attempts;
pub(super) mod checkouts;
pub(super) mod chunk;
mod consumers;
mod durable;
mod grouped;
pub(super) mod groups;
mod handout;
mod lane;
mod lanes;
mod leaving;
mod log;
mod ranges;
pub(super) mod record;
mod state;
#[cfg(test)]
mod tests;

use std::sync::{
    Arc, Weak,
    atomic::{AtomicBool, Ordering},
};

use amq_protocol::types::FieldTable;
use parking_lot::Mutex;

pub use consumers::{Consumer, ConsumerId};
#[doc(hidden)]
pub use ranges::RangeSet;
pub use record::SHARED_BODY_BYTES;
pub use state::Counts;

use self::{
    acking::Postbox,
    arriving::QueueDedup,
    lane::Lane,
    state::{Next, QueueState, Turn},
};
use super::{
    BrokerError,
    arguments::QueueType,
    delay::{Delays, Origin, delays_of},
    environment::Environment,
    message::Message,
    port::{Address, Effects, Offer, Port},
    rules::{QueueRules, QueueTraits},
    stream::{ReaderOptions, Stream},
    timers::Timed,
};
use crate::{
    clock,
    model::{Name, ResourceName},
    store::{QueueId, QueueStateRecord, Round},
};

/// How often streams look for what has become too old.
const STREAM_TICK_MS: u64 = 5_000;

/// The connection an exclusive queue belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConnectionId(pub u64);

/// What a declaration fixes.
#[derive(Clone, Debug)]
pub struct QueueOptions {
    pub name: Name,
    pub vhost: Name,
    pub durable: bool,
    pub auto_delete: bool,
    pub exclusive_to: Option<ConnectionId>,
    pub arguments: FieldTable,
}

/// A delivery that its consumer has settled.
#[derive(Clone, Copy, Debug)]
pub struct Settled {
    pub seq: u64,
    pub body_bytes: u32,
    pub persistent: bool,
}

/// Deliveries with positions in a row and otherwise alike, which their consumer has settled.
#[derive(Clone, Copy, Debug)]
pub struct SettledRun {
    /// The position of the first.
    pub seq: u64,
    pub count: u32,
    /// Of each.
    pub body_bytes: u32,
    pub persistent: bool,
}

impl SettledRun {
    /// Whether `next` continues it.
    #[inline]
    pub fn joins(&self, next: &SettledRun) -> bool {
        self.seq + u64::from(self.count) == next.seq
            && self.body_bytes == next.body_bytes
            && self.persistent == next.persistent
            && self.count.checked_add(next.count).is_some()
    }

    /// One by one.
    pub fn each(self) -> impl Iterator<Item = Settled> {
        let SettledRun { seq, count, body_bytes, persistent } = self;
        (0..u64::from(count)).map(move |at| Settled { seq: seq + at, body_bytes, persistent })
    }
}

impl From<Settled> for SettledRun {
    fn from(settled: Settled) -> Self {
        let Settled { seq, body_bytes, persistent } = settled;
        SettledRun { seq, count: 1, body_bytes, persistent }
    }
}

/// How a run of deliveries was settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settlement {
    Acked,
    /// `basic.reject` without requeue, a failed delivery: dead-lettered, or dropped.
    Rejected,
    /// `basic.nack` without requeue: the same, but no failed delivery.
    Discarded,
    /// Back to the queue, without that counting as a failed delivery: `basic.nack`, `basic.recover`.
    Returned,
    /// Back to the queue after a failed delivery: `basic.reject`, or the channel's end.
    Failed,
}

/// What became of a message offered to a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// In the queue; durable with the round (0: there is nothing to wait for).
    Accepted(Round),
    /// The queue is full and says so; the publish is to be nacked.
    Rejected,
}

/// What a deleted queue leaves to be done.
pub struct DeletedQueue {
    /// To be told.
    pub consumers: Vec<Consumer>,
    /// Messages that were ready.
    pub ready: u64,
    /// The logs and other owners of which the store may hold something. Most queues never get there, and a deletion in
    /// the store is not free.
    pub in_store: Vec<QueueId>,
}

/// See the module.
pub struct Queue {
    pub options: QueueOptions,
    /// Fixed by the declaration.
    pub traits: QueueTraits,
    /// Of its log; a queue with priorities has one more for each.
    pub id: QueueId,
    environment: Arc<Environment>,
    /// A publish may be refused: see [`Queue::offer`].
    may_reject: AtomicBool,
    /// Messages are looked into when they arrive: some wait, or are dropped as duplicates.
    is_particular: bool,
    /// Positions are all there is to an acknowledgement.
    acks_in_runs: bool,
    /// What waits, with `x-delayed`. Locked within the state.
    delays: Option<Arc<Delays>>,
    /// Everything of a stream; `state` is of no use then.
    stream: Option<Arc<Stream>>,
    state: Mutex<QueueState>,
    /// Acknowledgements for whoever holds the state now. Locked within the state, or alone.
    postbox: Mutex<Postbox>,
    this: Weak<Queue>,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("name", &self.options.name).field("id", &self.id).finish_non_exhaustive()
    }
}

impl Queue {
    /// A new, empty queue. Its logs have the ids from `id` on, one for each priority.
    pub fn new(
        options: QueueOptions,
        traits: QueueTraits,
        rules: QueueRules,
        id: QueueId,
        environment: Arc<Environment>,
    ) -> Arc<Self> {
        Self::build(options, traits, rules, id, environment, Origin::New, &[])
    }

    /// A durable queue as the store has it, `records` being those of its logs by level. Their consumed sets and counts of
    /// failed deliveries are read when the queue is first used.
    pub fn recovered(
        options: QueueOptions,
        traits: QueueTraits,
        rules: QueueRules,
        id: QueueId,
        environment: Arc<Environment>,
        records: &[(u8, QueueStateRecord)],
    ) -> Arc<Self> {
        Self::build(options, traits, rules, id, environment, Origin::Recovered, records)
    }

    fn build(
        options: QueueOptions,
        traits: QueueTraits,
        rules: QueueRules,
        id: QueueId,
        environment: Arc<Environment>,
        origin: Origin,
        records: &[(u8, QueueStateRecord)],
    ) -> Arc<Self> {
        let now = clock::now_unix_ms();
        let budget = environment.budget.clone();
        let stream = (traits.queue_type == QueueType::Stream).then(|| {
            let resource = ResourceName::queue(&options.name, &options.vhost);
            let record = records.first().map(|(_, record)| *record);
            Stream::new(resource, id, environment.store.clone(), budget.clone(), rules.stream, record)
        });
        let mut state = QueueState::new(id, budget.clone(), options.durable, traits.clone(), rules, now);
        for &(level, record) in records.iter().filter(|_| stream.is_none()) {
            let lane_id = QueueId(id.0 + u64::from(level));
            state.lanes.insert(Lane::recovered(level, lane_id, budget.clone(), record));
        }
        // Whatever the rules are now: they may ask for the counts later, and what is consumed until then must leave them.
        state.attempts_unread = !records.is_empty();
        state.dedup = QueueDedup::of(&traits, id, options.durable, origin, &environment);
        let is_particular = traits.delayed || state.dedup.is_some();
        let may_reject = AtomicBool::new(state.may_reject());
        let queue = Arc::new_cyclic(|this| Queue {
            is_particular,
            acks_in_runs: traits.queue_type == QueueType::Classic
                && traits.max_priority == 0
                && traits.message_group.is_none(),
            delays: traits.delayed.then(|| delays_of(id, this.clone(), &environment, origin)),
            options,
            traits,
            id,
            environment,
            may_reject,
            stream,
            state: Mutex::new(state),
            postbox: Mutex::default(),
            this: this.clone(),
        });
        queue.begin();
        queue
    }

    /// Schedules what a queue may have to do before anybody uses it.
    fn begin(self: &Arc<Self>) {
        if self.stream.is_some() {
            return self.schedule_tick(clock::now_unix_ms());
        }
        let mut state = self.state.lock();
        if let Some(delays) = &self.delays {
            delays.set_durability(state.rules.durability);
        }
        let stored = state.lanes.iter().any(|lane| lane.unopened.is_some());
        if stored && (state.rules.message_ttl_ms.is_some() || state.counts_attempts()) {
            state.wake_at_unix_ms = 0;
        }
        state.renew_lease();
        self.schedule(&mut state);
    }

    /// The queue as error texts name it.
    pub fn resource(&self) -> ResourceName {
        ResourceName::queue(&self.options.name, &self.options.vhost)
    }

    /// Hands out what consumers can take.
    pub fn deliver(self: &Arc<Self>, effects: &mut Effects) {
        let mut state = self.open();
        let now = clock::now_unix_ms();
        self.deliver_locked(&mut state, now, effects);
        if state.has_limits_or_deadlines() {
            self.expire_head(&mut state, now, effects);
            self.enforce_limits(&mut state, effects);
            self.schedule(&mut state);
        }
    }

    fn deliver_locked(self: &Arc<Self>, state: &mut QueueState, now_unix_ms: u64, effects: &mut Effects) {
        self.deliver_arrived(state, &[], now_unix_ms, effects);
    }

    /// Hands out what consumers can take, `arrived` being what stands at the cursor, as far as that is known.
    fn deliver_arrived(
        self: &Arc<Self>,
        state: &mut QueueState,
        mut arrived: &[Message<'_>],
        now_unix_ms: u64,
        effects: &mut Effects,
    ) {
        loop {
            match state.deliver_ready(std::mem::take(&mut arrived), now_unix_ms, effects) {
                Turn::Idle => break,
                Turn::Again => {
                    self.bury_expired_parked(state, effects);
                    effects.again.push(self.clone());
                    break;
                }
                Turn::Absent { level, seq } => {
                    self.request_load(state, level, seq);
                    break;
                }
                Turn::Expired { level, seq } => self.expire(state, level, seq, effects),
            }
        }
        self.note_changes(state);
    }

    /// Hands out the next message to a `basic.get`; `false` when none is ready.
    pub fn get(self: &Arc<Self>, port: &Arc<dyn Port>, to: Address, no_ack: bool, effects: &mut Effects) -> bool {
        let mut state = self.open();
        let now = clock::now_unix_ms();
        state.last_used_unix_ms = now;
        let answered = loop {
            match state.next_for_get() {
                Next::Nothing => break false,
                Next::Absent { level, seq } => {
                    // A client waits for this answer and the read is one bounded chunk.
                    if !self.load_now(&mut state, level, seq) {
                        break false;
                    }
                }
                Next::Ready { level, seq, expires_unix_ms: Some(expires) } if expires <= now => {
                    self.expire(&mut state, level, seq, effects);
                }
                Next::Ready { level, seq, .. } => {
                    if state.answer_get((level, seq), port, to, no_ack) == Offer::Taken {
                        effects.wakes.push(port.clone());
                    }
                    break true;
                }
            }
        };
        self.note_changes(&mut state);
        self.schedule(&mut state);
        answered
    }

    /// Adds a consumer and starts delivering to it.
    ///
    /// # Errors
    /// 403 when an exclusive consumer is there, or one is asked for beside others or where a single one is active anyway;
    /// 404 when the queue is gone.
    pub fn consume(self: &Arc<Self>, mut consumer: Consumer) -> Result<ConsumerId, BrokerError> {
        let mut state = self.open();
        if state.deleted {
            return Err(self.not_found());
        }
        // Quorum queues ignore the flag.
        consumer.exclusive &= self.traits.queue_type == QueueType::Classic;
        let ring = &mut state.consumers;
        let refused = consumer.exclusive && (!ring.is_empty() || self.traits.single_active_consumer);
        if ring.has_exclusive() || refused {
            return Err(BrokerError::QueueInExclusiveUse {
                queue: self.options.name.clone(),
                vhost: self.options.vhost.clone(),
            });
        }
        state.had_consumer = true;
        Ok(state.consumers.add(consumer))
    }

    /// [`Queue::consume`] for a stream, with what its consumers may ask for. Nothing but a stream can be read like that.
    ///
    /// # Errors
    /// 404 when the stream is gone.
    pub fn read(&self, consumer: Consumer, options: ReaderOptions) -> Result<ConsumerId, BrokerError> {
        self.stream.as_ref().ok_or_else(|| self.not_found())?.consume(consumer, options)
    }

    /// Takes a consumer out; its unacked deliveries stay with its channel. The last one of an auto-delete queue takes
    /// the queue with it.
    pub fn cancel(self: &Arc<Self>, id: ConsumerId, effects: &mut Effects) {
        if let Some(stream) = &self.stream {
            return stream.cancel(id);
        }
        let mut state = self.open();
        if state.consumers.remove(id).is_none() {
            return;
        }
        if state.consumers.is_empty() {
            state.last_used_unix_ms = clock::now_unix_ms();
            state.renew_lease();
            self.schedule(&mut state);
        }
        if state.consumers.is_empty() && self.options.auto_delete {
            effects.unused.push(self.clone());
        } else if state.can_deliver() {
            self.deliver_locked(&mut state, clock::now_unix_ms(), effects);
        }
    }

    /// Lets a consumer take part again that an [`Offer::Blocked`] had stopped.
    pub fn unblock(self: &Arc<Self>, id: ConsumerId, effects: &mut Effects) {
        if let Some(stream) = &self.stream {
            return stream.unblock(id, effects);
        }
        let mut state = self.open();
        state.consumers.unblock(id);
        if state.can_deliver() {
            self.deliver_locked(&mut state, clock::now_unix_ms(), effects);
            self.schedule(&mut state);
        }
    }

    /// Removes every ready message; answers how many there were. What waits until it is due is not ready.
    pub fn purge(self: &Arc<Self>) -> u64 {
        let mut state = self.open();
        let purged = state.purge();
        self.note_changes(&mut state);
        purged
    }

    /// Takes over what arguments and policies ask for now.
    pub fn apply_rules(self: &Arc<Self>, rules: QueueRules, effects: &mut Effects) {
        let mut state = self.open();
        if state.deleted || state.rules == rules {
            return;
        }
        if let Some(stream) = &self.stream {
            stream.apply_rules(rules.stream);
            state.rules = rules;
            return;
        }
        state.rules = rules;
        if let Some(delays) = &self.delays {
            delays.set_durability(state.rules.durability);
        }
        self.may_reject.store(state.may_reject(), Ordering::Relaxed);
        state.renew_lease();
        self.enforce_limits(&mut state, effects);
        self.note_changes(&mut state);
        self.schedule(&mut state);
    }

    /// The rules in force.
    pub fn rules(&self) -> QueueRules {
        self.state.lock().rules.clone()
    }

    /// Notes that the queue was declared again: its lease (`x-expires`) starts anew. Not for quorum-type queues.
    pub fn note_use(&self) {
        if self.traits.queue_type == QueueType::Classic {
            self.state.lock().last_used_unix_ms = clock::now_unix_ms();
        }
    }

    /// Depth and use.
    pub fn counts(&self) -> Counts {
        if let Some(stream) = &self.stream {
            return stream.counts();
        }
        let counts = self.state.lock().counts();
        Counts { delayed: self.delays.as_ref().map_or(0, |delays| delays.len()), ..counts }
    }

    /// When the oldest ready message was published, if that is known without reading from the store.
    pub fn oldest_ready_unix_ms(&self) -> Option<u64> {
        if let Some(stream) = &self.stream {
            return stream.oldest_unix_ms();
        }
        let state = self.state.lock();
        state.lanes.iter().filter_map(|lane| lane.log.oldest_ready_unix_ms()).min()
    }

    /// Bytes of messages in memory.
    pub fn resident_bytes(&self) -> usize {
        if let Some(stream) = &self.stream {
            return stream.resident_bytes();
        }
        let delayed = self.delays.as_ref().map_or(0, |delays| delays.resident_bytes());
        self.state.lock().lanes.iter().map(|lane| lane.log.resident_bytes()).sum::<usize>() + delayed
    }

    /// Ends the queue if `check` agrees: drops its messages and answers what is left to be done. `None` when it was gone
    /// already.
    ///
    /// # Errors
    /// What `check` says; the queue is then unchanged.
    pub fn delete(
        &self,
        check: impl FnOnce(&Counts) -> Result<(), BrokerError>,
    ) -> Result<Option<DeletedQueue>, BrokerError> {
        if let Some(stream) = &self.stream {
            return stream.delete(check);
        }
        let mut state = self.state.lock();
        if state.deleted {
            return Ok(None);
        }
        check(&state.counts())?;
        let may_have_attempts = state.counts_attempts() || state.attempts_unread || state.attempts.is_in_use();
        let mut deleted = state.delete();
        if let Some(delays) = &self.delays {
            delays.close();
        }
        let has_attempts = may_have_attempts && !deleted.in_store.is_empty();
        let stored = self.options.durable && (self.is_particular || has_attempts);
        let has_notes = self.delays.is_some() || stored;
        if has_notes && !deleted.in_store.contains(&self.id) {
            deleted.in_store.push(self.id);
        }
        Ok(Some(deleted))
    }

    /// Whether the last consumer has left a queue that goes with it.
    pub fn is_abandoned(&self) -> bool {
        let state = self.state.lock();
        self.options.auto_delete && state.had_consumer && state.consumers.is_empty() && !state.deleted
    }

    /// Whether nobody has used the queue for as long as `x-expires` says.
    pub fn is_expired(&self, now_unix_ms: u64) -> bool {
        let state = self.state.lock();
        !state.deleted && state.lease_ends_unix_ms().is_some_and(|end| end <= now_unix_ms)
    }

    /// Whether the queue is gone.
    pub fn is_deleted(&self) -> bool {
        if let Some(stream) = &self.stream {
            return stream.is_deleted();
        }
        self.state.lock().deleted
    }

    fn not_found(&self) -> BrokerError {
        BrokerError::QueueNotFound { queue: self.options.name.clone(), vhost: self.options.vhost.clone() }
    }

    /// Has a stream looked at again after a while.
    fn schedule_tick(&self, now_unix_ms: u64) {
        let timed: Weak<dyn Timed> = self.this.clone();
        self.environment.timers.schedule(now_unix_ms + STREAM_TICK_MS, timed);
    }

    /// Has the queue looked at when something will be due.
    fn schedule(&self, state: &mut QueueState) {
        let at = state.wake_at_unix_ms;
        if at < state.scheduled_at_unix_ms && !state.deleted {
            state.scheduled_at_unix_ms = at;
            let timed: Weak<dyn Timed> = self.this.clone();
            self.environment.timers.schedule(at, timed);
        }
    }
}

impl Timed for Queue {
    fn on_time(self: Arc<Self>, now_unix_ms: u64, effects: &mut Effects) {
        if let Some(stream) = &self.stream {
            if !stream.is_deleted() {
                stream.tick(now_unix_ms, effects);
                self.schedule_tick(now_unix_ms);
            }
            return;
        }
        let mut state = self.open();
        if state.deleted || now_unix_ms < state.scheduled_at_unix_ms {
            return; // an entry that an earlier one has made idle
        }
        state.scheduled_at_unix_ms = u64::MAX;
        if state.lease_ends_unix_ms().is_some_and(|end| end <= now_unix_ms) {
            effects.expired.push(self.clone());
            return;
        }
        self.return_overdue(&mut state, now_unix_ms, effects);
        self.end_waiting(&mut state, now_unix_ms);
        self.drop_expired(&mut state, now_unix_ms, effects);
        if state.can_deliver() {
            self.deliver_locked(&mut state, now_unix_ms, effects);
        }
        self.note_changes(&mut state);
        state.find_next_deadline(now_unix_ms);
        self.schedule(&mut state);
    }
}
