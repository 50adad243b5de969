//! A queue and the store: what goes into a round, what leaves memory, what is read back.

use std::sync::Arc;

use parking_lot::MutexGuard;

use super::{
    Queue,
    chunk::{CHUNK_BYTES, Chunk},
    state::QueueState,
};
use crate::{
    broker::port::Effects,
    store::{Round, RoundBuilder, RoundSource, SEGMENT_RECORDS},
};

/// Body bytes consumed within a segment that are worth a delete of their own.
const DELETE_BYTES: u64 = 16 << 20;
/// Positions read from the store in one go.
const READ_RECORDS: u64 = 16 << 10;
/// Bytes in memory for which the sweep asks a queue to page out.
const MIN_EVICTION_BYTES: usize = 16 << 10;
/// Bytes of transient records paged out in one round.
const PAGE_OUT_BYTES: usize = 32 << 20;

impl Queue {
    /// Locks the state; the first use of a recovered queue reads its consumed positions.
    pub(super) fn open(&self) -> MutexGuard<'_, QueueState> {
        let mut state = self.state.lock();
        if let Some(record) = state.unopened {
            let consumed = self.store.read_consumed(self.id).unwrap_or_else(|error| {
                tracing::error!(queue = %self.options.name, vhost = %self.options.vhost, %error, "consumed positions cannot be read; messages may be delivered again");
                Vec::new()
            });
            state.opened(self.budget.clone(), record, &consumed);
        }
        state
    }

    /// Puts the queue on the store's list; answers the round that takes its present changes.
    pub(super) fn mark_dirty(self: &Arc<Self>, state: &mut QueueState) -> Round {
        *state.dirty.get_or_insert_with(|| self.store.mark_dirty(self.clone()))
    }

    /// Has consumption of stored messages written, in a round nobody waits for.
    pub(super) fn note_consumption(self: &Arc<Self>, state: &mut QueueState) {
        if state.has_news() {
            self.mark_dirty(state);
        }
        if let Some(seq) = state.log.read_ahead() {
            self.request_load(state, seq);
        }
    }

    /// Makes the present consumption part of a round and answers it; 0 when nothing of it is stored. For transactions.
    pub fn settle_round(self: &Arc<Self>) -> Round {
        let mut state = self.open();
        if state.dirty.is_some() || (state.consumption_unwritten && state.in_store && !state.deleted) {
            return self.mark_dirty(&mut state);
        }
        0
    }

    /// Asks for a round when the queue holds memory others need. Called by the sweep.
    pub fn offer_eviction(self: &Arc<Self>) {
        let mut state = self.state.lock();
        if state.log.resident_bytes() > MIN_EVICTION_BYTES && !state.deleted {
            self.mark_dirty(&mut state);
        }
    }

    /// Has the store's reader thread bring the chunk at `seq`, and deliveries continue.
    pub(super) fn request_load(self: &Arc<Self>, state: &mut QueueState, seq: u64) {
        if std::mem::replace(&mut state.loading, true) {
            return;
        }
        let until = state.log.resident_after(seq).min(seq + READ_RECORDS);
        let queue = self.clone();
        self.store.spawn_read(Box::new(move || {
            let chunk = queue.read_chunk(seq, until);
            let mut effects = Effects::default();
            {
                let mut state = queue.open();
                state.loading = false;
                let Some(chunk) = chunk else { return };
                if state.deleted {
                    return;
                }
                state.log.install(chunk);
                queue.deliver_locked(&mut state, &mut effects);
            }
            effects.deliver_and_wake();
        }));
    }

    /// Reads the chunk at `seq` while the queue stays locked; `false` when it cannot be read.
    pub(super) fn load_now(&self, state: &mut QueueState, seq: u64) -> bool {
        let until = state.log.resident_after(seq).min(seq + READ_RECORDS);
        match self.read_chunk(seq, until) {
            Some(chunk) => {
                state.log.install(chunk);
                state.log.is_resident(seq)
            }
            None => false,
        }
    }

    fn read_chunk(&self, seq: u64, until: u64) -> Option<Chunk> {
        let mut chunk = Chunk::new(seq, CHUNK_BYTES, self.budget.clone());
        let read = self
            .store
            .read_records(self.id, seq, until, CHUNK_BYTES, &mut |at, record| chunk.append_record(at, record));
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

    fn drain_consumption(&self, state: &mut QueueState, round: &mut RoundBuilder) {
        let head = state.log.head();
        let head_segment = head / SEGMENT_RECORDS;
        let dirty = std::mem::take(&mut state.dirty_segments);
        for segment in dirty.within(head_segment, u64::MAX).flat_map(|(start, end)| start..end) {
            let (start, end) = (segment * SEGMENT_RECORDS, (segment + 1) * SEGMENT_RECORDS);
            let ranges: Vec<(u64, u64)> = state.log.consumed().within(start.max(head), end).collect();
            if ranges == [(start, end)] {
                round.delete_segments(self.id, segment, segment + 1);
            }
            if !ranges.is_empty() {
                round.put_consumed(self.id, segment, &ranges);
            }
        }
        if let Some((from, until)) = state.segments_to_delete() {
            round.delete_segments(self.id, from, until);
            state.deleted_segments = until;
        }
        if state.consumed_bytes >= DELETE_BYTES {
            // Large messages: the head's segment may take gigabytes to fill, so what is consumed of it goes before.
            round.delete_records(self.id, head_segment * SEGMENT_RECORDS, head);
            state.consumed_bytes = 0;
        }
        state.consumption_unwritten = false;
    }
}

impl RoundSource for Queue {
    fn drain(&self, round: &mut RoundBuilder) {
        let mut guard = self.open();
        let state = &mut *guard;
        state.dirty = None;
        if state.deleted {
            return;
        }
        if self.options.durable && state.unwritten_durable > 0 {
            state.in_store = true;
            let id = self.id;
            state.log.for_each_durable(state.written_to, &mut state.scratch, &mut |seq, record| {
                round.append(id, seq, record)
            });
            state.unwritten_durable = 0;
        }
        state.written_to = state.log.tail();
        if state.in_store {
            self.drain_consumption(state, round);
            if self.options.durable {
                round.put_state(self.id, &state.record());
                state.delivered_written = state.log.next();
            }
        }
        if self.budget.is_over() {
            let id = self.id;
            let in_store = &mut state.in_store;
            state.log.page_out(state.committed_to, PAGE_OUT_BYTES, &mut state.scratch, &mut |seq, record| {
                *in_store = true;
                round.page_out(id, seq, record);
            });
        }
        // A large record made whole leaves a large buffer behind.
        state.scratch.shrink_to(64 << 10);
    }

    fn round_ended(&self, committed: bool) {
        let mut state = self.state.lock();
        if !committed || state.unopened.is_some() || state.deleted {
            return;
        }
        // Appends since the drain are not in this round: `written_to` is where the drain stopped.
        state.committed_to = state.written_to;
        if self.budget.is_over() {
            let committed_to = state.committed_to;
            state.log.evict(committed_to);
        }
    }
}
