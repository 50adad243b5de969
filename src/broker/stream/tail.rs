//! The end of a stream's log, in memory: what no round has taken yet, and a little of what is committed, so that readers at
//! the end need no disk.
//!
//! # Invariants
//! - T1: chunks are in order, without gaps, and the last one ends at `tail`.
//! - T2: what is not committed is in memory.

use std::{collections::VecDeque, sync::Arc};

use crate::broker::{memory::MemoryBudget, message::Message, queue::chunk::Chunk, queue::record};

/// Committed chunks that stay in memory while no reader lags behind.
const QUIET_CHUNKS: usize = 2;
/// Bytes that stay in memory for readers that lag behind a little.
const LAGGING_BYTES: usize = 1 << 20;

/// See the module.
pub(super) struct Tail {
    chunks: VecDeque<Chunk>,
    tail: u64,
    budget: Arc<MemoryBudget>,
}

impl Tail {
    /// Nothing in memory; the next record gets `tail`.
    pub fn new(tail: u64, budget: Arc<MemoryBudget>) -> Self {
        Tail { chunks: VecDeque::new(), tail, budget }
    }

    /// The offset the next record gets.
    #[inline]
    pub fn end(&self) -> u64 {
        self.tail
    }

    /// Everything from here on is in memory.
    #[inline]
    pub fn resident_from(&self) -> u64 {
        self.chunks.front().map_or(self.tail, Chunk::first)
    }

    /// Bytes in memory.
    pub fn resident_bytes(&self) -> usize {
        self.chunks.iter().map(Chunk::resident_bytes).sum()
    }

    /// Appends a message; `expected_bytes` is what the caller is about to append in one go.
    #[inline]
    pub fn append(&mut self, message: &Message<'_>, now_unix_ms: u64, expected_bytes: usize) {
        match self.chunks.back_mut() {
            Some(chunk) if !chunk.is_full() => chunk.append(message, now_unix_ms),
            _ => {
                let mut chunk = Chunk::new(self.tail, expected_bytes, self.budget.clone());
                chunk.append(message, now_unix_ms);
                self.chunks.push_back(chunk);
            }
        }
        self.tail += 1;
    }

    /// The chunk that holds `offset`, if that is in memory.
    #[inline]
    pub fn chunk_at(&self, offset: u64) -> Option<&Chunk> {
        let index = self.chunks.partition_point(|chunk| chunk.end() <= offset);
        self.chunks.get(index).filter(|chunk| chunk.first() <= offset)
    }

    /// Calls `each` for every record from `from` on, whole, in order.
    pub fn for_each(&self, from: u64, scratch: &mut Vec<u8>, each: &mut dyn FnMut(u64, &[u8])) {
        let start = self.chunks.partition_point(|chunk| chunk.end() <= from);
        for chunk in self.chunks.range(start..) {
            for offset in from.max(chunk.first())..chunk.end() {
                match chunk.record(offset) {
                    Some((bytes, Some(body))) => {
                        record::whole(bytes, body, scratch);
                        each(offset, scratch);
                    }
                    Some((bytes, None)) => each(offset, bytes),
                    None => {}
                }
            }
        }
    }

    /// Drops committed chunks from the front: all but [`QUIET_CHUNKS`], or all but [`LAGGING_BYTES`] when a reader still
    /// needs `wanted_from`; every committed one when memory is short.
    pub fn trim(&mut self, committed_to: u64, wanted_from: Option<u64>) {
        let is_short = self.budget.is_over();
        let mut bytes = self.resident_bytes();
        while let Some(front) = self.chunks.front() {
            let is_wanted = wanted_from.is_some_and(|wanted| wanted < front.end()) && bytes <= LAGGING_BYTES;
            let stays = self.chunks.len() <= QUIET_CHUNKS || is_wanted;
            if front.end() > committed_to || (stays && !is_short) {
                return;
            }
            bytes -= front.resident_bytes();
            self.chunks.pop_front();
        }
    }
}
