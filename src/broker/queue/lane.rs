//! A lane: one log of a queue with its counts, and what the store knows of it. A queue has one lane for each priority in
//! use; most have one.

use std::sync::Arc;

use super::{log::QueueLog, ranges::RangeSet, record};
use crate::{
    broker::{memory::MemoryBudget, message::Message},
    store::{QueueId, QueueStateRecord, RoundBuilder, SEGMENT_RECORDS},
};

/// Consumed segments at the head that are worth a range delete.
const DELETE_SEGMENTS: u64 = 8;
/// Body bytes consumed that are worth a delete of their own. A fraction of what a memtable holds: a run that is deleted before
/// its memtable is flushed is never written a second time.
const DELETE_BYTES: u64 = 1 << 20;
/// Bytes of transient records paged out in one round, which has them in memory two more times.
const PAGE_OUT_BYTES: usize = 4 << 20;

/// Messages and their body bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub messages: u64,
    pub bytes: u64,
}

impl Tally {
    #[inline]
    pub fn add(&mut self, messages: u64, bytes: u64) {
        self.messages += messages;
        self.bytes += bytes;
    }

    #[inline]
    pub fn sub(&mut self, messages: u64, bytes: u64) {
        self.messages = self.messages.saturating_sub(messages);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

/// See the module. Positions are those of the lane's log.
pub struct Lane {
    pub level: u8,
    /// The log in the store.
    pub id: QueueId,
    pub log: QueueLog,
    pub ready: Tally,
    /// Durable messages not consumed: what the store must count after a restart.
    durable: Tally,
    /// Of those, the ones handed out or held back.
    held: Tally,
    /// Durable, unconsumed messages that no round has taken yet.
    pub unwritten: u64,
    /// Positions before it were offered to a round.
    pub written_to: u64,
    /// Positions before it are in a committed round.
    pub committed_to: u64,
    /// Something is consumed that the store does not know of.
    pub consumption_unwritten: bool,
    /// The delivery cursor as the store has it.
    delivered_written: u64,
    /// Segments whose consumed set has to be written.
    dirty_segments: RangeSet,
    /// Body bytes of stored messages consumed since their records were last deleted.
    consumed_bytes: u64,
    /// Segments before it are deleted in the store.
    deleted_segments: u64,
    /// The store has records of this lane.
    pub in_store: bool,
    /// A read from the store is under way.
    pub loading: bool,
    /// The recovered consumed set was not read yet.
    pub unopened: Option<QueueStateRecord>,
}

impl Lane {
    /// An empty lane.
    pub fn new(level: u8, id: QueueId, log: QueueLog) -> Self {
        let tail = log.tail();
        Lane {
            level,
            id,
            deleted_segments: log.head() / SEGMENT_RECORDS,
            log,
            ready: Tally::default(),
            durable: Tally::default(),
            held: Tally::default(),
            unwritten: 0,
            written_to: tail,
            committed_to: tail,
            consumption_unwritten: false,
            delivered_written: 0,
            dirty_segments: RangeSet::default(),
            consumed_bytes: 0,
            in_store: false,
            loading: false,
            unopened: None,
        }
    }

    /// A lane as the store has it; everything that was not consumed is ready.
    pub fn recovered(level: u8, id: QueueId, budget: Arc<MemoryBudget>, record: QueueStateRecord) -> Self {
        let mut lane = Lane::new(level, id, QueueLog::new(budget));
        lane.ready = Tally { messages: record.message_count, bytes: record.message_bytes };
        lane.durable = lane.ready;
        lane.in_store = true;
        lane.unopened = Some(record);
        lane
    }

    /// Takes over what the store knows of the consumed positions.
    pub fn opened(&mut self, budget: Arc<MemoryBudget>, record: QueueStateRecord, consumed: &[(u64, u64)]) {
        self.log = QueueLog::recovered(budget, record.head, record.delivered, record.tail, consumed);
        self.written_to = self.log.tail();
        self.committed_to = self.log.tail();
        self.delivered_written = self.log.next();
        self.deleted_segments = self.log.head() / SEGMENT_RECORDS;
        self.unopened = None;
    }

    /// Counts a message that was appended.
    #[inline]
    pub fn appended(&mut self, body_bytes: u64, durable: bool) {
        self.ready.add(1, body_bytes);
        if durable {
            self.durable.add(1, body_bytes);
            self.unwritten += 1;
        }
    }

    /// Counts messages that were appended.
    #[inline]
    pub fn appended_all(&mut self, messages: &[Message<'_>]) {
        let (mut all, mut durable) = (Tally::default(), Tally::default());
        for message in messages {
            let body_bytes = message.body.len() as u64;
            all.add(1, body_bytes);
            if message.persistent {
                durable.add(1, body_bytes);
            }
        }
        self.ready.add(all.messages, all.bytes);
        self.durable.add(durable.messages, durable.bytes);
        self.unwritten += durable.messages;
    }

    /// Counts messages that went from ready to handed out (or consumed at once, with `no_ack`). Their positions have left the
    /// log's ready ones.
    pub fn account(&mut self, handed: &HandedOut, no_ack: bool) {
        self.ready.sub(handed.messages as u64, handed.bytes);
        if no_ack {
            self.durable.sub(handed.durable, handed.durable_bytes);
            self.unwritten = self.unwritten.saturating_sub(handed.durable - handed.written);
            if handed.written > 0 {
                self.consumed_bytes += handed.durable_bytes;
                self.consumption_unwritten = true;
                self.dirty_segments
                    .insert_range(handed.first_written / SEGMENT_RECORDS, handed.last_written / SEGMENT_RECORDS + 1);
            }
        } else {
            // A restart must know that these were handed out: they come back as redelivered.
            self.consumption_unwritten |= handed.durable > 0;
            self.held.add(handed.durable, handed.durable_bytes);
        }
        self.consumption_unwritten |= handed.lost > 0;
    }

    /// Makes a handed-out message ready again, in its old place.
    #[inline]
    pub fn give_back(&mut self, seq: u64, body_bytes: u64, durable: bool) {
        if durable {
            self.held.sub(1, body_bytes);
        }
        self.log.give_back(seq);
        self.ready.add(1, body_bytes);
    }

    /// Takes a ready message out of the ready ones, so that it is held; `true` when it had to be consumed at once.
    pub fn take_out(&mut self, seq: u64, body_bytes: u64, durable: bool) -> bool {
        self.ready.sub(1, body_bytes);
        if durable {
            self.held.add(1, body_bytes);
        }
        let consumed = self.log.take_out(seq);
        if consumed {
            self.consumed(seq, body_bytes, durable);
        }
        self.consumption_unwritten |= durable;
        consumed
    }

    /// Ends a handed-out message.
    #[inline]
    pub fn consume(&mut self, seq: u64, body_bytes: u64, durable: bool) {
        self.log.consume(seq);
        self.consumed(seq, body_bytes, durable);
    }

    /// Ends handed-out messages whose positions follow each other, all of them durable or none.
    #[inline]
    pub fn consume_run(&mut self, run: &ConsumedRun) {
        let ConsumedRun { first, end, body_bytes, durable } = *run;
        self.log.consume_range(first, end);
        if !durable {
            return;
        }
        self.held.sub(end - first, body_bytes);
        self.durable.sub(end - first, body_bytes);
        self.unwritten = self.unwritten.saturating_sub(end.saturating_sub(first.max(self.written_to)));
        if first < self.written_to {
            let last = end.min(self.written_to) - 1;
            // Of a run that is written in part, all counts: it only says when records are worth a deletion.
            self.consumed_bytes += body_bytes;
            self.consumption_unwritten = true;
            self.dirty_segments.insert_range(first / SEGMENT_RECORDS, last / SEGMENT_RECORDS + 1);
        }
    }

    #[inline]
    fn consumed(&mut self, seq: u64, body_bytes: u64, durable: bool) {
        if !durable {
            return;
        }
        self.held.sub(1, body_bytes);
        self.durable.sub(1, body_bytes);
        if seq < self.written_to {
            self.consumed_bytes += body_bytes;
            self.consumption_unwritten = true;
            self.dirty_segments.insert(seq / SEGMENT_RECORDS);
        } else {
            self.unwritten = self.unwritten.saturating_sub(1);
        }
    }

    /// Consumes everything ready; answers how much that was.
    pub fn purge(&mut self) -> u64 {
        let purged = self.ready.messages;
        for (start, end) in self.log.purge() {
            self.dirty_segments.insert_range(start / SEGMENT_RECORDS, (end - 1) / SEGMENT_RECORDS + 1);
        }
        self.nothing_ready();
        // What no round has taken yet is in memory, so it can be counted.
        let mut unwritten = 0;
        self.log.for_each_durable(self.written_to, &mut |_, _, _| unwritten += 1);
        self.unwritten = unwritten;
        self.consumption_unwritten = true;
        purged
    }

    /// Sets the counts to what an empty ready set means, whatever damaged records had left in them.
    #[inline]
    pub fn nothing_ready(&mut self) {
        self.ready = Tally::default();
        self.durable = self.held;
    }

    /// Depth and cursor, as a round stores them.
    pub fn record(&self) -> QueueStateRecord {
        QueueStateRecord {
            head: self.log.head(),
            delivered: self.log.next(),
            tail: self.log.tail(),
            message_count: self.durable.messages,
            message_bytes: self.durable.bytes,
        }
    }

    /// Whether the store should hear what was handed out or consumed: what is unacked comes back redelivered after a
    /// restart, and what is consumed gives its disk space back.
    #[inline]
    pub fn has_news(&self) -> bool {
        let handed_out = self.held.messages > 0 && self.log.next() > self.delivered_written;
        self.in_store && (self.consumption_unwritten || handed_out || self.segments_to_delete().is_some())
    }

    /// Consumed segments before the head, once they are worth a range delete.
    #[inline]
    fn segments_to_delete(&self) -> Option<(u64, u64)> {
        let (from, until) = (self.deleted_segments, self.log.head() / SEGMENT_RECORDS);
        let worth_it = until - from >= DELETE_SEGMENTS || (until > from && self.log.head() == self.log.tail());
        worth_it.then_some((from, until))
    }

    /// Moves what has changed into a round. `durable` says whether the queue survives a restart.
    pub fn drain(&mut self, round: &mut RoundBuilder, durable: bool, scratch: &mut Vec<u8>) {
        if self.unopened.is_some() {
            return;
        }
        if durable && self.unwritten > 0 {
            self.in_store = true;
            let id = self.id;
            self.log.for_each_durable(self.written_to, &mut |seq, record, body| match body {
                None => round.append(id, seq, record),
                Some(body) => {
                    record::before_body(record, scratch);
                    round.append_with_body(id, seq, scratch, body);
                }
            });
            self.unwritten = 0;
        }
        self.written_to = self.log.tail();
        if self.in_store {
            self.drain_consumption(round);
            if durable {
                round.put_state(self.id, &self.record());
                self.delivered_written = self.log.next();
            }
        }
    }

    fn drain_consumption(&mut self, round: &mut RoundBuilder) {
        let head = self.log.head();
        let head_segment = head / SEGMENT_RECORDS;
        let dirty = std::mem::take(&mut self.dirty_segments);
        for segment in dirty.within(head_segment, u64::MAX).flat_map(|(start, end)| start..end) {
            let (start, end) = (segment * SEGMENT_RECORDS, (segment + 1) * SEGMENT_RECORDS);
            let ranges: Vec<(u64, u64)> = self.log.consumed().within(start.max(head), end).collect();
            if ranges == [(start, end)] {
                round.delete_segments(self.id, segment, segment + 1);
            }
            if !ranges.is_empty() {
                round.put_consumed(self.id, segment, &ranges);
            }
        }
        if let Some((from, until)) = self.segments_to_delete() {
            round.delete_segments(self.id, from, until);
            self.deleted_segments = until;
        }
        if self.consumed_bytes >= DELETE_BYTES {
            // Large messages: the head's segment may take gigabytes to fill, so what is consumed of it goes before.
            round.delete_records(self.id, head_segment * SEGMENT_RECORDS, head);
            self.consumed_bytes = 0;
        }
        self.consumption_unwritten = false;
    }

    /// Lets go of chunks that the store has, while the budget is exceeded. `idle` tells that nobody takes messages now.
    pub fn evict(&mut self, idle: bool) {
        if self.unopened.is_none() {
            self.log.evict(self.committed_to, idle);
        }
    }

    /// Moves transient records that may leave memory into a round.
    pub fn page_out(&mut self, round: &mut RoundBuilder, idle: bool, scratch: &mut Vec<u8>) {
        let (id, in_store) = (self.id, &mut self.in_store);
        self.log.page_out(self.committed_to, idle, PAGE_OUT_BYTES, scratch, &mut |seq, record| {
            *in_store = true;
            round.page_out(id, seq, record);
        });
    }
}

/// Handed-out messages that follow each other in a lane and end together.
#[derive(Clone, Copy, Debug)]
pub struct ConsumedRun {
    pub first: u64,
    pub end: u64,
    pub body_bytes: u64,
    pub durable: bool,
}

/// What one turn has handed out of a lane.
#[derive(Default)]
pub struct HandedOut {
    pub messages: usize,
    pub bytes: u64,
    durable: u64,
    durable_bytes: u64,
    /// Of the durable ones, those a round has taken.
    written: u64,
    first_written: u64,
    last_written: u64,
    pub lost: u64,
}

impl HandedOut {
    /// [`HandedOut::add`] of messages side by side, `first` being the position of the first.
    #[inline]
    pub fn add_run(&mut self, first: u64, messages: &[Message<'_>], no_ack: bool, written_to: u64) {
        for (seq, message) in (first..).zip(messages) {
            self.add(seq, message.body.len() as u64, message.persistent, no_ack, written_to);
        }
    }

    #[inline]
    pub fn add(&mut self, seq: u64, body_bytes: u64, durable: bool, no_ack: bool, written_to: u64) {
        self.messages += 1;
        self.bytes += body_bytes;
        if durable {
            self.durable += 1;
            self.durable_bytes += body_bytes;
            if no_ack && seq < written_to {
                if self.written == 0 {
                    self.first_written = seq;
                }
                self.first_written = self.first_written.min(seq);
                self.last_written = self.last_written.max(seq);
                self.written += 1;
            }
        }
    }
}
