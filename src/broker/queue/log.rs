//! The log of a queue: appended records, a delivery cursor, and what of it is consumed.
//!
//! # Invariants
//! - L1: `head <= next <= tail`. Everything before `head` is consumed, nothing from `next` on was handed out; some of it may
//!   be consumed all the same, because it expired there.
//! - L2: a position of `[head, next)` is in `consumed`, in `returned`, or unacked.
//! - L3: chunks are in order and do not overlap; positions between them are only in the store.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;

use super::{
    chunk::{Chunk, PlainRun},
    ranges::RangeSet,
    record,
};
use crate::{
    broker::{memory::MemoryBudget, message::Message},
    store::EachSplitRecord,
};

/// What stands at the cursor.
pub enum Peek<'a> {
    /// Nothing is ready.
    Empty,
    /// The next ready record is not in memory.
    Absent(u64),
    Ready {
        seq: u64,
        /// It was handed out before.
        redelivered: bool,
        message: Message<'a>,
    },
}

/// See the module.
pub struct QueueLog {
    chunks: VecDeque<Chunk>,
    head: u64,
    next: u64,
    tail: u64,
    consumed: RangeSet,
    returned: RangeSet,
    /// Some unconsumed positions may be in the store only.
    has_gaps: bool,
    /// Positions from `next` on may be consumed.
    consumed_ahead: bool,
    /// A round is under way that pages records out.
    is_paging: bool,
    /// Messages that expire were seen.
    expiring: bool,
    budget: Arc<MemoryBudget>,
}

impl QueueLog {
    /// An empty log.
    pub fn new(budget: Arc<MemoryBudget>) -> Self {
        Self::recovered(budget, 0, 0, 0, &[])
    }

    /// A log as the store has it: nothing is in memory, and what was handed out and not consumed is ready again.
    pub fn recovered(
        budget: Arc<MemoryBudget>,
        head: u64,
        delivered: u64,
        tail: u64,
        consumed_ranges: &[(u64, u64)],
    ) -> Self {
        let next = delivered.clamp(head, tail.max(head));
        let mut log = QueueLog {
            chunks: VecDeque::new(),
            head,
            next,
            tail: tail.max(head),
            consumed: RangeSet::default(),
            returned: RangeSet::default(),
            has_gaps: tail > head,
            consumed_ahead: false,
            is_paging: false,
            expiring: false,
            budget,
        };
        let mut at = head;
        for &(start, end) in consumed_ranges {
            let (start, end) = (start.clamp(head, log.tail), end.clamp(head, log.tail));
            // A position consumed beyond the recorded cursor: the cursor had passed it.
            log.next = log.next.max(end);
            log.consumed.insert_range(start, end);
            if at < start {
                log.returned.insert_range(at, start);
            }
            at = at.max(end);
        }
        log.returned.insert_range(at, log.next);
        log.advance_head();
        log
    }

    pub fn head(&self) -> u64 {
        self.head
    }

    /// The position the next record gets.
    #[inline]
    pub fn tail(&self) -> u64 {
        self.tail
    }

    /// The first position never handed out.
    pub fn next(&self) -> u64 {
        self.next
    }

    pub fn consumed(&self) -> &RangeSet {
        &self.consumed
    }

    /// Bytes in memory.
    pub fn resident_bytes(&self) -> usize {
        self.chunks.iter().map(Chunk::resident_bytes).sum()
    }

    /// Appends a message; `expected_bytes` is what the caller is about to append in one go.
    #[inline]
    pub fn append(&mut self, message: &Message<'_>, now_unix_ms: u64, expected_bytes: impl FnOnce() -> usize) -> u64 {
        let seq = self.tail;
        self.expiring |= !message.extension.is_empty();
        match self.chunks.back_mut() {
            Some(chunk) if chunk.end() == seq && !chunk.is_full() => chunk.append(message, now_unix_ms),
            _ => {
                let mut chunk = Chunk::new(seq, expected_bytes(), self.budget.clone());
                chunk.append(message, now_unix_ms);
                self.chunks.push_back(chunk);
            }
        }
        self.tail += 1;
        seq
    }

    /// [`QueueLog::append`] of a run.
    #[inline]
    pub fn append_run(&mut self, messages: &[Message<'_>], now_unix_ms: u64) {
        let mut rest = messages;
        while let Some((first, after)) = rest.split_first() {
            // A new chunk is begun, and what is not plain appended, message by message.
            self.append(first, now_unix_ms, || rest.iter().map(record::encoded_len).sum());
            rest = after;
            if let Some(chunk) = self.chunks.back_mut() {
                let count = chunk.append_run(rest, now_unix_ms);
                self.tail += count as u64;
                rest = &rest[count..];
            }
        }
    }

    /// Whether what is appended next will stand at the cursor.
    #[inline]
    pub fn is_drained(&self) -> bool {
        self.next == self.tail && self.returned.is_empty()
    }

    #[inline]
    fn chunk_index(&self, seq: u64) -> Option<usize> {
        let front = self.chunks.front()?;
        if seq < front.end() {
            return (front.first() <= seq).then_some(0);
        }
        let index = self.chunks.partition_point(|chunk| chunk.end() <= seq);
        self.chunks.get(index).filter(|chunk| chunk.first() <= seq).map(|_| index)
    }

    /// What would be handed out next. Positions whose record is gone (a transient one lost with a restart, a damaged one) are
    /// consumed in passing; `lost` counts them.
    #[inline]
    pub fn peek(&mut self, lost: &mut u64) -> Peek<'_> {
        loop {
            let (seq, redelivered) = match self.returned.first() {
                Some(seq) => (seq, true),
                None if self.next < self.tail => {
                    if self.consumed_ahead
                        && let Some((_, end)) = self.consumed.range_of(self.next)
                    {
                        self.next = end;
                        self.advance_head();
                        continue;
                    }
                    (self.next, false)
                }
                None => return Peek::Empty,
            };
            let Some(index) = self.chunk_index(seq) else { return Peek::Absent(seq) };
            // A position without a record counts as gone: looking for it in the store would never end. What has one can be
            // read: it was made here, or was read before it came in.
            if self.chunks[index].contains(seq) {
                return match self.chunks[index].message(seq) {
                    Some(message) => Peek::Ready { seq, redelivered, message },
                    None => Peek::Absent(seq),
                };
            }
            self.take(seq, redelivered);
            self.consume(seq);
            *lost += 1;
        }
    }

    /// Adds the messages at the cursor to `run`, at most `limit`, that are in memory side by side and were never handed out, as
    /// far as that is plain to see.
    #[inline]
    pub fn fresh_run<'a>(&'a self, limit: usize, run: &mut PlainRun<'a>) {
        if self.returned.is_empty()
            && !self.consumed_ahead
            && let Some(index) = self.chunk_index(self.next)
        {
            self.chunks[index].plain_run(self.next, limit, run);
        }
    }

    /// Moves the cursor past `count` messages that [`QueueLog::fresh_run`] has just answered.
    #[inline]
    pub fn take_run(&mut self, count: usize) {
        self.next += count as u64;
        debug_assert!(self.next <= self.tail);
    }

    /// The returned message at `seq`, whatever is ready before it; `Empty` if it is not among the returned ones.
    pub fn peek_returned(&mut self, seq: u64) -> Peek<'_> {
        if !self.returned.contains(seq) {
            return Peek::Empty;
        }
        let Some(index) = self.chunk_index(seq) else { return Peek::Absent(seq) };
        match self.chunks[index].message(seq) {
            Some(message) => Peek::Ready { seq, redelivered: true, message },
            None => Peek::Empty,
        }
    }

    /// Whether `seq` was given back and is ready again.
    pub fn is_returned(&self, seq: u64) -> bool {
        self.returned.contains(seq)
    }

    /// The message at `seq`, if it is in memory.
    pub fn message(&self, seq: u64) -> Option<Message<'_>> {
        self.chunks[self.chunk_index(seq)?].message(seq)
    }

    /// Moves the cursor past `seq`, which [`QueueLog::peek`] has just answered.
    #[inline]
    pub fn take(&mut self, seq: u64, redelivered: bool) {
        if redelivered {
            self.returned.remove(seq);
        } else {
            debug_assert_eq!(seq, self.next);
            self.next = seq + 1;
        }
    }

    /// Makes a handed-out position ready again, in its old place.
    #[inline]
    pub fn give_back(&mut self, seq: u64) {
        debug_assert!(seq >= self.head && seq < self.next && !self.consumed.contains(seq));
        self.returned.insert(seq);
        if self.expiring
            && let Some(index) = self.chunk_index(seq)
        {
            self.chunks[index].note_expiry_of(seq);
        }
    }

    /// Takes the ready position `seq` out of the ready ones, as [`QueueLog::take`] does for the one that is next. It has to
    /// be consumed (or given back) as if it had been handed out.
    ///
    /// A position beyond the cursor can only be consumed, which is why that is done at once; `true` tells so.
    pub fn take_out(&mut self, seq: u64) -> bool {
        if self.returned.remove(seq) {
            return false;
        }
        if seq == self.next {
            self.next = seq + 1;
            return false;
        }
        self.consumed_ahead = true;
        self.consume(seq);
        true
    }

    /// The earliest expiry instant of the messages in memory, in Unix milliseconds; `u64::MAX` if none expires.
    pub fn next_expiry_unix_ms(&self) -> u64 {
        if !self.expiring {
            return u64::MAX;
        }
        self.chunks.iter().map(|chunk| chunk.earliest_expiry_unix_ms).min().unwrap_or(u64::MAX)
    }

    /// The ready positions in memory whose messages have expired, oldest first and at most `limit`.
    pub fn expired(&mut self, now_unix_ms: u64, limit: usize) -> Vec<u64> {
        let mut found = Vec::new();
        if !self.expiring {
            return found;
        }
        let QueueLog { chunks, returned, consumed, next, .. } = self;
        for chunk in chunks.iter_mut().filter(|chunk| chunk.earliest_expiry_unix_ms <= now_unix_ms) {
            if found.len() >= limit {
                break;
            }
            chunk.expired(now_unix_ms, limit, &mut found, |seq| {
                if seq < *next { returned.contains(seq) } else { !consumed.contains(seq) }
            });
        }
        found
    }

    /// Ends a handed-out position.
    #[inline]
    pub fn consume(&mut self, seq: u64) {
        self.consume_range(seq, seq + 1);
    }

    /// Ends the handed-out positions of `[start, end)`.
    #[inline]
    pub fn consume_range(&mut self, start: u64, end: u64) {
        let mut at = start;
        while at < end {
            at = match self.chunk_index(at) {
                Some(index) => self.forget_in(index, at, end),
                None => self.resident_after(at).max(at + 1),
            };
        }
        if start == self.head {
            self.head = end;
            self.advance_head();
        } else if end - start == 1 {
            self.consumed.insert(start);
        } else {
            self.consumed.insert_range(start, end);
        }
    }

    /// Forgets the records of the chunk `index` in `[from, until)`, and with the last one the chunk. Answers the position after
    /// them.
    #[inline]
    fn forget_in(&mut self, index: usize, from: u64, until: u64) -> u64 {
        let last = index + 1 == self.chunks.len();
        let chunk = &mut self.chunks[index];
        let (end, until) = (chunk.end(), until.min(chunk.end()));
        let was_there = chunk.forget_range(from, until);
        // A chunk of absent positions only stays until the cursor has passed it.
        if chunk.live == 0 && (was_there || until == end) {
            let kept = last && end == self.tail && chunk.restart(self.tail);
            if !kept {
                self.chunks.remove(index);
            }
        }
        until
    }

    #[inline]
    fn advance_head(&mut self) {
        if !self.consumed.is_empty()
            && let Some(end) = self.consumed.take_range_at(self.head)
        {
            self.head = end;
            self.next = self.next.max(end);
        }
        // Absent positions leave a chunk behind when the last of them was consumed before the others.
        while self.chunks.front().is_some_and(|chunk| chunk.first() < chunk.end() && chunk.end() <= self.head) {
            self.chunks.pop_front();
        }
    }

    /// Whether a record is ready (or believed to be, before it was looked at).
    #[inline]
    pub fn has_ready(&self) -> bool {
        self.next < self.tail || !self.returned.is_empty()
    }

    /// Consumes everything ready. Answers the ranges, for the store.
    pub fn purge(&mut self) -> Vec<(u64, u64)> {
        let mut gone: Vec<(u64, u64)> = self.returned.within(0, u64::MAX).collect();
        self.returned.clear();
        let mut at = self.next;
        for (start, end) in self.consumed.within(self.next, self.tail) {
            if at < start {
                gone.push((at, start));
            }
            at = end;
        }
        if at < self.tail {
            gone.push((at, self.tail));
        }
        self.next = self.tail;
        self.consumed_ahead = false;
        for &(start, end) in &gone {
            for chunk in &mut self.chunks {
                for seq in start.max(chunk.first())..end.min(chunk.end()) {
                    chunk.forget(seq);
                }
            }
            self.consumed.insert_range(start, end);
        }
        self.chunks.retain(|chunk| chunk.live > 0);
        self.advance_head();
        gone
    }

    /// The record at `seq`, if it is in memory, with whether it is durable.
    pub fn record(&self, seq: u64) -> Option<(&[u8], Option<&Bytes>)> {
        self.chunks[self.chunk_index(seq)?].record(seq)
    }

    /// Calls `each` for every durable, unconsumed record in memory of `[from, tail)`, in order, with the body that is kept
    /// beside it.
    pub fn for_each_durable(&self, from: u64, each: &mut EachSplitRecord<'_>) {
        let start = self.chunks.partition_point(|chunk| chunk.end() <= from);
        for chunk in self.chunks.range(start..) {
            self.each_live(chunk, from, true, each);
        }
    }

    fn each_live(&self, chunk: &Chunk, from: u64, persistent: bool, each: &mut EachSplitRecord<'_>) {
        let mut at = from.max(chunk.first()).max(self.head);
        while at < chunk.end() {
            if !self.consumed.is_empty()
                && let Some((_, end)) = self.consumed.range_of(at)
            {
                at = end;
                continue;
            }
            if let Some((bytes, shared)) = chunk.record(at)
                && record::head(bytes).is_some_and(|head| head.persistent == persistent)
            {
                each(at, bytes, shared);
            }
            at += 1;
        }
    }

    /// The chunks that may leave memory, the last one first: neither the last of all, nor the two the cursor needs
    /// first, unless nobody needs them (`idle`). Those before the cursor hold only what is unacked, which is read back if it
    /// is returned.
    fn evictable(&self, committed_to: u64, idle: bool) -> impl Iterator<Item = usize> + use<> {
        let cursor = self.returned.first().unwrap_or(self.next);
        let first = self.chunks.partition_point(|chunk| chunk.end() <= cursor);
        let committed = self.chunks.partition_point(|chunk| chunk.end() <= committed_to);
        let (near, until) = match (idle, self.returned.is_empty()) {
            (true, _) => (first, committed),
            (false, true) => (first + 2, committed.min(self.chunks.len().saturating_sub(1))),
            (false, false) => (first + 1, committed.min(self.chunks.len().saturating_sub(1))),
        };
        (near..until).rev().chain((0..first.min(until)).rev())
    }

    /// Hands the transient records of evictable chunks to `each`, so that [`QueueLog::evict`] may drop the chunks.
    pub fn page_out(
        &mut self,
        committed_to: u64,
        idle: bool,
        limit_bytes: usize,
        scratch: &mut Vec<u8>,
        each: &mut dyn FnMut(u64, &[u8]),
    ) {
        let mut bytes = 0;
        for index in self.evictable(committed_to, idle) {
            let chunk = &self.chunks[index];
            if let Some(from) = chunk.unpaged_from() {
                self.each_live(chunk, from, false, &mut |seq, bytes, shared| match shared {
                    Some(body) => {
                        record::whole(bytes, body, scratch);
                        each(seq, scratch);
                    }
                    None => each(seq, bytes),
                });
                bytes += chunk.resident_bytes();
                self.chunks[index].begin_paging();
                self.is_paging = true;
                if bytes >= limit_bytes {
                    return;
                }
            }
        }
    }

    /// Takes in whether the records were written that were handed to [`QueueLog::page_out`]; if not, they must stay.
    pub fn end_paging(&mut self, written: bool) {
        if std::mem::take(&mut self.is_paging) {
            self.chunks.iter_mut().for_each(|chunk| chunk.end_paging(written));
        }
    }

    /// Drops evictable chunks, from the tail on, until the budget holds. Answers whether any was dropped. With `idle`, as
    /// nobody takes messages of this log now, also those that are needed first.
    pub fn evict(&mut self, committed_to: u64, idle: bool) -> bool {
        let mut dropped = false;
        for index in self.evictable(committed_to, idle) {
            if !self.budget.is_over() {
                break;
            }
            if self.chunks[index].is_paged() {
                self.chunks.remove(index);
                self.has_gaps = true;
                dropped = true;
            }
        }
        dropped
    }

    /// The first resident position after `seq`, which is absent: where a read from the store has to stop.
    pub fn resident_after(&self, seq: u64) -> u64 {
        let index = self.chunks.partition_point(|chunk| chunk.end() <= seq);
        self.chunks.get(index).map_or(self.tail, |chunk| chunk.first().max(seq))
    }

    /// The position to read ahead from: the end of the chunk the cursor is in, when what follows is not in memory.
    #[inline]
    pub fn read_ahead(&self) -> Option<u64> {
        if !self.has_gaps || !self.returned.is_empty() || self.next >= self.tail {
            return None;
        }
        let end = self.chunks[self.chunk_index(self.next)?].end();
        (end < self.tail && !self.is_resident(end)).then_some(end)
    }

    /// Whether `seq` is in a chunk.
    pub fn is_resident(&self, seq: u64) -> bool {
        self.chunk_index(seq).is_some()
    }

    /// Puts a chunk read from the store into its place; dropped when it would overlap.
    pub fn install(&mut self, mut chunk: Chunk) {
        let index = self.chunks.partition_point(|resident| resident.end() <= chunk.first());
        if self.chunks.get(index).is_some_and(|resident| resident.first() < chunk.end()) || chunk.end() > self.tail {
            return;
        }
        for (start, end) in [(chunk.first(), self.head.min(chunk.end()))]
            .into_iter()
            .chain(self.consumed.within(chunk.first().max(self.head), chunk.end()).collect::<Vec<_>>())
        {
            for seq in start..end {
                chunk.forget(seq);
            }
        }
        if chunk.end() <= self.head {
            return; // all of it was consumed while it was read
        }
        chunk.note_paged();
        self.expiring |= chunk.earliest_expiry_unix_ms != u64::MAX;
        self.chunks.insert(index, chunk);
    }

    /// Publishing time of the oldest ready record in memory at the cursor, in Unix milliseconds.
    pub fn oldest_ready_unix_ms(&self) -> Option<u64> {
        let seq = self.returned.first().or((self.next < self.tail).then_some(self.next))?;
        record::head(self.record(seq)?.0).map(|head| head.published_unix_ms)
    }
}
