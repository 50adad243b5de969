//! One queue: its ready and unacked messages, its consumers, and the rules that move one to the other.
//!
//! # Ownership
//! A [`Queue`] holds its state behind a mutex; nobody keeps the guard over an `.await`. Operations append to
//! [`Effects`] what has to happen once the queue is unlocked; the caller carries it out.
//!
//! # Invariants
//! - Q1: a message is ready, unacked, or gone; never two of these.
//! - Q2: ready messages leave in the order of their positions; a returned one has its old position.
//! - Q3: a publish answers the round that will hold it; delivery need not wait for that round.
//! - Q4: no other queue is touched while this one is locked.
//!
//! # Elsewhere
//! Delivery tags and `multiple`: `session`. Matching: `broker::exchange`. File formats: `store`.

mod chunk;
mod consumers;
mod durable;
mod log;
mod ranges;
pub(in crate::broker) mod record;
mod state;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use amq_protocol::types::FieldTable;
use parking_lot::Mutex;

pub use consumers::{Consumer, ConsumerId};
pub use record::SHARED_BODY_BYTES;
pub use state::Counts;

use self::state::QueueState;
use super::{
    BrokerError,
    memory::MemoryBudget,
    message::Message,
    port::{Address, Effects, Offer, Port},
};
use crate::{
    clock,
    model::Name,
    store::{QueueId, QueueStateRecord, Round, Store},
};

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

/// How a run of deliveries was settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// Acked, or rejected without requeue.
    Done,
    /// Back to its place in the queue, to be redelivered.
    Requeue,
}

/// What a deleted queue leaves to be done.
pub struct DeletedQueue {
    /// To be told.
    pub consumers: Vec<Consumer>,
    /// Messages that were ready.
    pub ready: u64,
    /// The store may hold something of it. Most queues never get there, and a deletion in the store is not free.
    pub in_store: bool,
}

/// See the module.
pub struct Queue {
    pub options: QueueOptions,
    pub id: QueueId,
    store: Arc<Store>,
    budget: Arc<MemoryBudget>,
    state: Mutex<QueueState>,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("name", &self.options.name).field("id", &self.id).finish_non_exhaustive()
    }
}

impl Queue {
    /// A new, empty queue.
    pub fn new(options: QueueOptions, id: QueueId, store: Arc<Store>, budget: Arc<MemoryBudget>) -> Arc<Self> {
        let state = QueueState::new(log::QueueLog::new(budget.clone()));
        Arc::new(Queue { options, id, store, budget, state: Mutex::new(state) })
    }

    /// A durable queue as the store has it. Its consumed set is read when the queue is first used.
    pub fn recovered(
        options: QueueOptions,
        id: QueueId,
        store: Arc<Store>,
        budget: Arc<MemoryBudget>,
        record: QueueStateRecord,
    ) -> Arc<Self> {
        let state = QueueState::recovered(budget.clone(), record);
        Arc::new(Queue { options, id, store, budget, state: Mutex::new(state) })
    }

    /// Appends messages and hands out what consumers can take. Answers the round that makes all of them durable; 0 when
    /// there is nothing to wait for (transient messages, or all of them consumed already).
    ///
    /// Hot path: one lock for the whole run, no allocation a message.
    pub fn publish(self: &Arc<Self>, messages: &[Message<'_>], effects: &mut Effects) -> Round {
        let mut state = self.open();
        if state.deleted {
            return 0; // routed, then gone: counts as accepted
        }
        let mut messages = messages;
        if !state.log.has_ready() && !state.consumers.is_empty() {
            let taken = state.pass_through(messages, effects);
            messages = &messages[taken..];
            if messages.is_empty() {
                return 0;
            }
        }
        let now = clock::now_unix_ms();
        let expected_bytes = messages.iter().map(record::encoded_len).sum();
        for message in messages {
            state.append(message, now, expected_bytes, self.options.durable);
        }
        if state.can_deliver() {
            self.deliver_locked(&mut state, effects);
            effects.congested |= state.is_congested();
        }
        if state.unwritten_durable > 0 {
            return self.mark_dirty(&mut state);
        }
        if self.budget.is_over() {
            self.mark_dirty(&mut state);
        }
        0
    }

    /// Hands out what consumers can take.
    pub fn deliver(self: &Arc<Self>, effects: &mut Effects) {
        let mut state = self.open();
        self.deliver_locked(&mut state, effects);
    }

    fn deliver_locked(self: &Arc<Self>, state: &mut QueueState, effects: &mut Effects) {
        match state.deliver_ready(effects) {
            state::Turn::Idle => {}
            state::Turn::Again => effects.again.push(self.clone()),
            state::Turn::Absent(seq) => self.request_load(state, seq),
        }
        self.note_consumption(state);
    }

    /// Hands out the next message to a `basic.get`; `false` when none is ready.
    pub fn get(self: &Arc<Self>, port: &Arc<dyn Port>, to: Address, no_ack: bool, effects: &mut Effects) -> bool {
        let mut state = self.open();
        let answered = loop {
            match state.peek() {
                log::Peek::Empty => break false,
                log::Peek::Absent(seq) => {
                    // A client waits for this answer and the read is one bounded chunk.
                    if !self.load_now(&mut state, seq) {
                        break false;
                    }
                }
                log::Peek::Ready { .. } => break true,
            }
        };
        if answered && state.hand_to_get(port, to, no_ack) == Offer::Taken {
            effects.wakes.push(port.clone());
        }
        self.note_consumption(&mut state);
        answered
    }

    /// Applies settlements of deliveries that `consumer` (`None` for `basic.get`) had, then hands out what that freed.
    pub fn settle(
        self: &Arc<Self>,
        consumer: Option<ConsumerId>,
        deliveries: &[Settled],
        how: Settlement,
        effects: &mut Effects,
    ) {
        let mut state = self.open();
        if state.deleted {
            return;
        }
        state.settle(consumer, deliveries, how);
        if state.can_deliver() {
            self.deliver_locked(&mut state, effects);
        } else {
            self.note_consumption(&mut state);
        }
    }

    /// Adds a consumer and starts delivering to it.
    ///
    /// # Errors
    /// 403 when an exclusive consumer is there, or one is asked for beside others; 404 when the queue is gone.
    pub fn consume(self: &Arc<Self>, consumer: Consumer) -> Result<ConsumerId, BrokerError> {
        let mut state = self.open();
        if state.deleted {
            return Err(self.not_found());
        }
        let ring = &mut state.consumers;
        if ring.has_exclusive() || (consumer.exclusive && !ring.is_empty()) {
            return Err(BrokerError::QueueInExclusiveUse {
                queue: self.options.name.clone(),
                vhost: self.options.vhost.clone(),
            });
        }
        state.had_consumer = true;
        Ok(state.consumers.add(consumer))
    }

    /// Takes a consumer out; its unacked deliveries stay with its channel. The last one of an auto-delete queue takes
    /// the queue with it.
    pub fn cancel(self: &Arc<Self>, id: ConsumerId, effects: &mut Effects) {
        let mut state = self.open();
        if state.consumers.remove(id).is_none() {
            return;
        }
        if state.consumers.is_empty() && self.options.auto_delete {
            effects.unused.push(self.clone());
        } else if state.can_deliver() {
            self.deliver_locked(&mut state, effects);
        }
    }

    /// Lets a consumer take part again that an [`Offer::Blocked`] had stopped.
    pub fn unblock(self: &Arc<Self>, id: ConsumerId, effects: &mut Effects) {
        let mut state = self.open();
        state.consumers.unblock(id);
        if state.can_deliver() {
            self.deliver_locked(&mut state, effects);
        }
    }

    /// Removes every ready message; answers how many there were.
    pub fn purge(self: &Arc<Self>) -> u64 {
        let mut state = self.open();
        let purged = state.purge();
        self.note_consumption(&mut state);
        purged
    }

    /// Depth and use.
    pub fn counts(&self) -> Counts {
        self.state.lock().counts()
    }

    /// When the oldest ready message was published, if that is known without reading from the store.
    pub fn oldest_ready_unix_ms(&self) -> Option<u64> {
        self.state.lock().log.oldest_ready_unix_ms()
    }

    /// Bytes of messages in memory.
    pub fn resident_bytes(&self) -> usize {
        self.state.lock().log.resident_bytes()
    }

    /// Ends the queue if `check` agrees: drops its messages and answers what is left to be done. `None` when it was gone already.
    ///
    /// # Errors
    /// What `check` says; the queue is then unchanged.
    pub fn delete(
        &self,
        check: impl FnOnce(&Counts) -> Result<(), BrokerError>,
    ) -> Result<Option<DeletedQueue>, BrokerError> {
        let mut state = self.state.lock();
        if state.deleted {
            return Ok(None);
        }
        check(&state.counts())?;
        Ok(Some(state.delete(&self.budget)))
    }

    /// Whether the last consumer has left a queue that goes with it.
    pub fn is_abandoned(&self) -> bool {
        let state = self.state.lock();
        self.options.auto_delete && state.had_consumer && state.consumers.is_empty() && !state.deleted
    }

    /// Whether the queue is gone.
    pub fn is_deleted(&self) -> bool {
        self.state.lock().deleted
    }

    fn not_found(&self) -> BrokerError {
        BrokerError::QueueNotFound { queue: self.options.name.clone(), vhost: self.options.vhost.clone() }
    }
}
