//! A stream (`x-queue-type=stream`): the log of a queue without consumption. Readers go through it, each from an offset of its
//! own; messages go by retention, whole segments at a time.
//!
//! # Ownership
//! A [`Stream`] holds its state behind a mutex; nobody keeps the guard over an `.await`. Reads from the store, and deliveries
//! that take longer, run on the store's reader thread.
//!
//! # Invariants
//! - L1: `head <= tail`; offsets of `[head, tail)` are retained, and no offset is given out twice.
//! - L2: readers see committed messages only, so nothing delivered is gone after a crash.
//! - L3: a reader holds one chunk at most that is not in the tail; a chunk read for several readers is shared.
//! - L4: nothing is read from the store while the stream is locked, but its notes when it is first used.
//!
//! # Elsewhere
//! The tail in memory: `tail`. Retention: `segments`. Kept offsets: `offsets`. Whose turn it is: `readers`. What a consumer
//! may ask for: `options`, `filter`, `geo`. Rounds and reading back: `durable`.

mod durable;
mod filter;
mod geo;
mod offset_header;
mod offsets;
mod options;
mod readers;
mod segments;
mod state;
mod tail;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Weak};

use parking_lot::Mutex;

pub use self::options::ReaderOptions;

use self::{
    durable::DELIVERY_COST,
    state::{Begin, State},
};
use super::{
    BrokerError,
    memory::MemoryBudget,
    message::Message,
    port::Effects,
    queue::{Consumer, ConsumerId, Counts, DeletedQueue, SettledRun, record::stored_len},
    rules::StreamRules,
};
use crate::{
    clock,
    model::ResourceName,
    store::{QueueId, QueueStateRecord, Round, Store},
};

/// See the module.
pub struct Stream {
    resource: ResourceName,
    id: QueueId,
    store: Arc<Store>,
    budget: Arc<MemoryBudget>,
    state: Mutex<State>,
    this: Weak<Stream>,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").field("name", &self.resource.name).field("id", &self.id).finish_non_exhaustive()
    }
}

impl Stream {
    /// A stream: a new, empty one, or with a record what the store has of it; its notes are read when it is first used.
    pub fn new(
        resource: ResourceName,
        id: QueueId,
        store: Arc<Store>,
        budget: Arc<MemoryBudget>,
        rules: StreamRules,
        record: Option<QueueStateRecord>,
    ) -> Arc<Self> {
        let mut state = State::new(rules, budget.clone());
        state.in_store = record.is_some();
        state.unopened = record;
        Arc::new_cyclic(|this| Stream { resource, id, store, budget, state: Mutex::new(state), this: this.clone() })
    }

    /// Appends messages, all of them durable whatever their delivery mode. Answers the round after which they are delivered;
    /// 0 when the stream is gone.
    ///
    /// Hot path: one lock for the whole run, no allocation a message.
    pub fn publish(&self, messages: &[Message<'_>]) -> Round {
        let mut state = self.open();
        if state.deleted || messages.is_empty() {
            return 0; // routed, then gone: counts as accepted
        }
        state.append(messages, clock::now_unix_ms());
        state.unwritten.add(messages.iter().map(stored_len).sum());
        self.mark_dirty(&mut state)
    }

    /// Adds a reader. It gets nothing before [`Stream::unblock`].
    ///
    /// # Errors
    /// 404 when the stream is gone.
    pub fn consume(&self, consumer: Consumer, options: ReaderOptions) -> Result<ConsumerId, BrokerError> {
        let mut state = self.open();
        if state.deleted {
            let (queue, vhost) = (self.resource.name.clone(), self.resource.vhost.clone());
            return Err(BrokerError::QueueNotFound { queue, vhost });
        }
        let keeps_offset = options.tracked_as.is_some() && options.start.is_none();
        let (id, begin) = state.add_reader(consumer, options, clock::now_unix_ms());
        if keeps_offset {
            self.mark_dirty(&mut state);
        }
        if let Begin::Seek { unix_ms, from, until } = begin {
            self.seek(id, unix_ms, from, until);
        }
        Ok(id)
    }

    /// Gives back the credit of deliveries, however they were settled, and goes on delivering. Settling with `None` (what a
    /// closing channel leaves behind) changes nothing. Answers the round that takes what changed in the store, 0 if nothing did.
    pub fn settle(&self, consumer: Option<ConsumerId>, runs: &[SettledRun], effects: &mut Effects) -> Round {
        let Some(consumer) = consumer else { return 0 };
        let mut state = self.open();
        if state.deleted {
            return 0;
        }
        if state.settle(consumer, runs, clock::now_unix_ms()) {
            self.mark_dirty(&mut state);
        }
        self.deliver_locked(&mut state, DELIVERY_COST, effects);
        state.dirty.unwrap_or(0)
    }

    /// The round that makes what was settled durable; 0 when there is nothing to wait for. For transactions.
    pub fn settle_round(&self) -> Round {
        self.state.lock().dirty.unwrap_or(0)
    }

    /// Takes a reader out.
    pub fn cancel(&self, id: ConsumerId) {
        self.open().readers.remove(id);
    }

    /// Lets a reader take part, at its start or after an [`Offer::Blocked`](super::port::Offer::Blocked).
    pub fn unblock(&self, id: ConsumerId, effects: &mut Effects) {
        let mut state = self.open();
        state.release(id);
        self.deliver_locked(&mut state, DELIVERY_COST, effects);
    }

    /// Messages retained and readers. Nothing of a stream is unacked: it stays whatever happens to a delivery.
    pub fn counts(&self) -> Counts {
        self.state.lock().counts()
    }

    /// When the oldest retained message was published, if that is known without reading from the store.
    pub fn oldest_unix_ms(&self) -> Option<u64> {
        self.state.lock().segments.first_unix_ms()
    }

    /// Bytes of messages in memory.
    pub fn resident_bytes(&self) -> usize {
        self.state.lock().resident_bytes()
    }

    /// Changes the retention, which takes effect at once.
    pub fn apply_rules(&self, rules: StreamRules) {
        let mut state = self.open();
        state.rules = rules;
        if state.retain(clock::now_unix_ms()) {
            self.mark_dirty(&mut state);
        }
    }

    /// Drops what has become too old, and tries reads again that have failed. Called every few seconds.
    pub fn tick(&self, now_unix_ms: u64, effects: &mut Effects) {
        let state = self.state.lock();
        if state.deleted || (state.unopened.is_some() && state.rules.max_age_ms.is_none()) {
            return;
        }
        drop(state);
        let mut state = self.open();
        if state.rules.max_age_ms.is_some() && state.retain(now_unix_ms) {
            self.mark_dirty(&mut state);
        }
        state.readers.iter_mut().for_each(|reader| reader.is_stalled = false);
        let committed_to = state.committed_to;
        state.readers.queue_up_all(committed_to);
        self.deliver_locked(&mut state, DELIVERY_COST, effects);
    }

    /// Gives back memory that others need.
    pub fn offer_eviction(&self) {
        self.state.lock().evict();
    }

    /// Ends the stream if `check` agrees, and answers what is left to be done. `None` when it was gone already.
    ///
    /// # Errors
    /// What `check` says; the stream is then unchanged.
    pub fn delete(
        &self,
        check: impl FnOnce(&Counts) -> Result<(), BrokerError>,
    ) -> Result<Option<DeletedQueue>, BrokerError> {
        let mut state = self.state.lock();
        if state.deleted {
            return Ok(None);
        }
        let counts = state.counts();
        check(&counts)?;
        let consumers = state.readers.take_all();
        let in_store = (state.in_store || state.dirty.is_some()).then_some(self.id);
        *state = State::new(StreamRules::default(), self.budget.clone());
        state.deleted = true;
        Ok(Some(DeletedQueue { consumers, ready: counts.ready, in_store: in_store.into_iter().collect() }))
    }

    /// Whether the stream is gone.
    pub fn is_deleted(&self) -> bool {
        self.state.lock().deleted
    }
}
