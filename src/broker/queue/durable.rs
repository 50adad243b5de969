//! A queue and the store: what goes into a round, what leaves memory, what is read back.

use std::sync::Arc;

use parking_lot::MutexGuard;

use super::{
    Queue,
    attempts::Attempts,
    chunk::{CHUNK_BYTES, Chunk},
    record,
    state::QueueState,
};
use crate::{
    broker::{message::OwnedMessage, port::Effects},
    clock,
    store::{QueueId, Round, RoundBuilder, RoundSource},
};

/// Positions read from the store in one go.
const READ_RECORDS: u64 = 16 << 10;
/// Bytes in memory for which the sweep asks a queue to page out.
const MIN_EVICTION_BYTES: usize = 16 << 10;
/// How long a read that failed is left alone.
const RETRY_MS: u64 = 1_000;

impl Queue {
    /// Locks the state; the first use of a recovered queue reads its consumed positions.
    #[inline]
    pub(super) fn open(&self) -> MutexGuard<'_, QueueState> {
        let mut state = self.state.lock();
        if state.lanes.iter().any(|lane| lane.unopened.is_some()) {
            self.open_recovered(&mut state);
        }
        state
    }

    #[cold]
    fn open_recovered(&self, state: &mut QueueState) {
        let environment = &self.environment;
        for lane in state.lanes.iter_mut() {
            let Some(record) = lane.unopened else { continue };
            let consumed = environment.store.read_consumed(lane.id).unwrap_or_else(|error| {
                tracing::error!(queue = %self.options.name, vhost = %self.options.vhost, %error, "consumed positions cannot be read; messages may be delivered again");
                Vec::new()
            });
            lane.opened(environment.budget.clone(), record, &consumed);
        }
        if std::mem::take(&mut state.attempts_unread) {
            state.attempts = Attempts::recover(self.id, &environment.store).unwrap_or_else(|error| {
                tracing::error!(queue = %self.options.name, vhost = %self.options.vhost, %error, "counts of failed deliveries cannot be read; they start anew");
                Attempts::default()
            });
            state.hold_waiting();
            self.schedule(state);
        }
    }

    /// Puts the queue on the store's list; answers the round that takes its present changes.
    pub(super) fn mark_dirty(self: &Arc<Self>, state: &mut QueueState) -> Round {
        *state.dirty.get_or_insert_with(|| self.environment.store.mark_dirty(self.clone()))
    }

    /// Has consumption of stored messages written, in a round nobody waits for.
    pub(super) fn note_changes(self: &Arc<Self>, state: &mut QueueState) {
        if state.has_news() {
            self.mark_dirty(state);
        }
        let ahead = state.lanes.iter().find_map(|lane| lane.log.read_ahead().map(|seq| (lane.level, seq)));
        if let Some((level, seq)) = ahead {
            self.request_load(state, level, seq);
        }
    }

    /// Makes the present consumption part of a round and answers it; 0 when nothing of it is stored. For transactions.
    pub fn settle_round(self: &Arc<Self>) -> Round {
        if let Some(stream) = &self.stream {
            return stream.settle_round();
        }
        let mut state = self.open();
        if state.dirty.is_some() || state.has_news() {
            return self.mark_dirty(&mut state);
        }
        0
    }

    /// Lets go of memory that others need, as far as the store has what is in it, and asks for a round for the rest. Called
    /// by the sweep while the budget is exceeded.
    pub fn offer_eviction(self: &Arc<Self>) {
        if let Some(stream) = &self.stream {
            return stream.offer_eviction();
        }
        let mut state = self.state.lock();
        if state.deleted {
            return;
        }
        let idle = state.is_idle();
        state.lanes.iter_mut().for_each(|lane| lane.evict(idle));
        let resident: usize = state.lanes.iter().map(|lane| lane.log.resident_bytes()).sum();
        if resident > if idle { 0 } else { MIN_EVICTION_BYTES } && self.environment.budget.is_over() {
            self.mark_dirty(&mut state);
        }
    }

    /// Has the store's reader thread bring the chunk at `seq` of a level, and deliveries continue.
    pub(super) fn request_load(self: &Arc<Self>, state: &mut QueueState, level: u8, seq: u64) {
        let lane = state.lanes.at_level(level);
        if std::mem::replace(&mut lane.loading, true) {
            return;
        }
        let (id, until) = (lane.id, lane.log.resident_after(seq).min(seq + READ_RECORDS));
        let queue = self.clone();
        self.environment.store.spawn_read(Box::new(move || {
            let chunk = queue.read_chunk(id, seq, until);
            let mut effects = Effects::default();
            let store = queue.environment.store.clone();
            let _one_round = store.atomic();
            {
                let mut state = queue.open();
                if state.deleted {
                    return;
                }
                let lane = state.lanes.at_level(level);
                lane.loading = false;
                let now = clock::now_unix_ms();
                let Some(chunk) = chunk else {
                    // It may pass: deliveries go on from there when the timer tries again.
                    state.wake_at_unix_ms = state.wake_at_unix_ms.min(now + RETRY_MS);
                    return queue.schedule(&mut state);
                };
                lane.log.install(chunk);
                queue.deliver_locked(&mut state, now, &mut effects);
                queue.drop_expired(&mut state, now, &mut effects);
                queue.note_changes(&mut state);
                state.find_next_deadline(now);
                queue.schedule(&mut state);
            }
            queue.environment.carry_out(&mut effects);
        }));
    }

    /// Reads the chunk at `seq` of a level while the queue stays locked; `false` when it cannot be read.
    pub(super) fn load_now(&self, state: &mut QueueState, level: u8, seq: u64) -> bool {
        let lane = state.lanes.at_level(level);
        let until = lane.log.resident_after(seq).min(seq + READ_RECORDS);
        match self.read_chunk(lane.id, seq, until) {
            Some(chunk) => {
                lane.log.install(chunk);
                lane.log.is_resident(seq)
            }
            None => false,
        }
    }

    fn read_chunk(&self, id: QueueId, seq: u64, until: u64) -> Option<Chunk> {
        let mut chunk = Chunk::new(seq, CHUNK_BYTES, self.environment.budget.clone());
        let read = self.environment.store.read_split_records(id, seq, until, CHUNK_BYTES, &mut |at, bytes, body| {
            chunk.append_record(at, bytes, body)
        });
        match read {
            Ok(end) => {
                chunk.cover(if end > seq { end } else { until });
                Some(chunk)
            }
            Err(error) => {
                tracing::error!(queue = %self.options.name, vhost = %self.options.vhost, position = seq, %error, "messages cannot be read");
                None
            }
        }
    }

    /// Reads a message that is held, from memory or from the store. Nothing is locked by the caller.
    pub fn read_held(&self, position: u64) -> Option<OwnedMessage> {
        let (id, seq) = {
            let mut state = self.open();
            let (lane, seq) = state.lanes.find(position)?;
            if let Some(message) = lane.log.message(seq) {
                return Some((&message).into());
            }
            (lane.id, seq)
        };
        let mut found = None;
        let read = self.environment.store.read_split_records(id, seq, seq + 1, 1, &mut |_, bytes, body| {
            found = match body {
                Some(_) => record::decode(&record::without_body(bytes), body).as_ref().map(OwnedMessage::from),
                None => record::decode(bytes, None).as_ref().map(OwnedMessage::from),
            };
        });
        if let Err(error) = read {
            tracing::error!(queue = %self.options.name, vhost = %self.options.vhost, position = seq, %error, "a message cannot be read");
        }
        found
    }
}

impl QueueState {
    /// Takes messages that wait for their next attempt out of the ready ones, where a restart has put them.
    fn hold_waiting(&mut self) {
        let waiting: Vec<(u64, u32)> = self.attempts.waiting().collect();
        for (position, body_bytes) in waiting {
            let Some((lane, seq)) = self.lanes.find(position) else { continue };
            if lane.log.is_returned(seq) {
                lane.take_out(seq, body_bytes.into(), true);
            } else {
                self.attempts.forget(position);
            }
        }
        self.wake_at_unix_ms = self.wake_at_unix_ms.min(self.attempts.next_due_unix_ms());
    }

    /// Whether the record at a position is one that survives a restart. Asked of messages that wait, whose record is
    /// either in memory or, being stored, not.
    pub(super) fn is_stored(&mut self, position: u64) -> bool {
        let Some((lane, seq)) = self.lanes.find(position) else { return false };
        lane.log.message(seq).is_none_or(|message| message.persistent)
    }
}

impl RoundSource for Queue {
    fn drain(&self, round: &mut RoundBuilder) {
        let mut guard = self.open();
        let state = &mut *guard;
        state.dirty = None;
        state.unwritten.taken();
        if state.deleted {
            return;
        }
        if let Some(durability) = state.rules.durability {
            round.set_durability(durability);
        }
        for lane in state.lanes.iter_mut() {
            lane.drain(round, self.options.durable, &mut state.scratch);
        }
        if let Some(dedup) = &mut state.dedup {
            dedup.cache.drain_into(self.id, round);
        }
        match self.options.durable {
            true => state.attempts.drain(self.id, round),
            false => state.attempts.discard_changes(),
        }
        if self.environment.budget.is_over() && round.takes_pages() {
            let idle = state.is_idle();
            for lane in state.lanes.iter_mut() {
                lane.page_out(round, idle, &mut state.scratch);
            }
        }
        // A large record that was paged out leaves a large buffer behind.
        state.scratch.shrink_to(64 << 10);
    }

    fn paging_failed(&self) {
        for lane in self.state.lock().lanes.iter_mut() {
            lane.log.end_paging(false);
        }
    }

    fn round_ended(&self, committed: bool) {
        let mut state = self.state.lock();
        if !committed || state.deleted {
            return;
        }
        let idle = state.is_idle();
        for lane in state.lanes.iter_mut().filter(|lane| lane.unopened.is_none()) {
            // Appends since the drain are not in this round: `written_to` is where the drain stopped.
            lane.committed_to = lane.written_to;
            lane.log.end_paging(true);
            if self.environment.budget.is_over() {
                lane.evict(false);
                if idle {
                    lane.evict(true);
                }
            }
        }
    }
}
