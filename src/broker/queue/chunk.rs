//! A stretch of a queue's log in memory: records end to end in one buffer, with an offset a position.

use std::{cell::RefCell, mem, sync::Arc};

use bytes::Bytes;
use smallvec::SmallVec;

use super::record;
use crate::broker::{
    extension,
    memory::MemoryBudget,
    message::{Body, Message},
};

/// Bytes of records a chunk takes before the next one is begun.
pub const CHUNK_BYTES: usize = 128 << 10;
/// Positions a chunk covers at most.
const CHUNK_RECORDS: usize = 16 << 10;
/// Bytes of buffer an empty queue may keep.
const IDLE_BYTES: usize = 2 << 10;
/// A buffer that is larger is as large as a chunk gets.
const SMALL_BYTES: usize = 16 << 10;
/// Buffers a thread keeps for the next chunk.
const POOLED_BUFFERS: usize = 4;

/// Messages read from a log in one go.
pub const RUN_MESSAGES: usize = 64;

/// Messages side by side in a log.
pub type PlainRun<'a> = SmallVec<[Message<'a>; RUN_MESSAGES]>;

/// The offset of a position without a record.
const ABSENT: u32 = u32::MAX;

#[derive(Default)]
struct Buffers {
    data: Vec<u8>,
    offsets: Vec<u32>,
}

thread_local! {
    static POOL: RefCell<Vec<Buffers>> = const { RefCell::new(Vec::new()) };
}

/// Records of the positions `[first, end)`. Immutable but for appends at the end and the count of live records.
pub struct Chunk {
    first: u64,
    buffers: Buffers,
    shared: Vec<(u32, Bytes)>,
    shared_bytes: usize,
    accounted_bytes: usize,
    budget: Arc<MemoryBudget>,
    /// Records present and not consumed.
    pub live: u32,
    /// Live records that are not durable: they have to be paged out before the chunk can be let go.
    pub transient: u32,
    /// The transient records before it are in the store's pages, or on their way. None is written twice: a reader finds a record
    /// in the last run that begins at or before it, so runs must not overlap.
    paged_to: u64,
    /// What `paged_to` was, while a round is under way that pages records out.
    paging_from: Option<u64>,
    /// Some positions have no record.
    has_absent: bool,
    /// No ready message in it expires before that (Unix milliseconds).
    pub earliest_expiry_unix_ms: u64,
}

impl Chunk {
    /// An empty chunk that begins at `first` and expects about `expected_bytes` of records.
    pub fn new(first: u64, expected_bytes: usize, budget: Arc<MemoryBudget>) -> Self {
        let mut buffers = Buffers::default();
        if expected_bytes > 4 << 10 {
            buffers = POOL.with(|pool| pool.borrow_mut().pop()).unwrap_or_default();
            let wanted = if expected_bytes > SMALL_BYTES { CHUNK_BYTES + SMALL_BYTES } else { expected_bytes };
            buffers.data.reserve_exact(wanted);
        }
        let mut chunk = Chunk {
            first,
            buffers,
            shared: Vec::new(),
            shared_bytes: 0,
            accounted_bytes: 0,
            budget,
            live: 0,
            transient: 0,
            paged_to: first,
            paging_from: None,
            has_absent: false,
            earliest_expiry_unix_ms: u64::MAX,
        };
        chunk.account();
        chunk
    }

    /// Makes a buffer that would have to grow for `bytes` more as large as it may get, once it is not small: every growth copies
    /// what is there.
    #[inline]
    fn make_room(&mut self, bytes: usize) {
        let data = &mut self.buffers.data;
        let needed = data.len() + bytes;
        if needed > data.capacity() && needed > SMALL_BYTES {
            data.reserve_exact((CHUNK_BYTES + SMALL_BYTES).max(needed) - data.len());
        }
    }

    /// Tells the budget what the chunk's buffers have grown to. Shared bodies are accounted for one by one.
    #[inline]
    fn account(&mut self) {
        let now = self.buffers.data.capacity() + self.buffers.offsets.capacity() * 4;
        if now != self.accounted_bytes {
            self.budget.grow(now);
            self.budget.shrink(mem::replace(&mut self.accounted_bytes, now));
        }
    }

    /// The first position.
    #[inline]
    pub fn first(&self) -> u64 {
        self.first
    }

    /// The position after the last.
    #[inline]
    pub fn end(&self) -> u64 {
        self.first + self.buffers.offsets.len() as u64
    }

    /// Bytes in memory, with bodies that other queues hold as well.
    pub fn resident_bytes(&self) -> usize {
        self.accounted_bytes + self.shared_bytes
    }

    /// Where the records begin that have to be paged out before the chunk can be let go; `None` if there are none.
    pub fn unpaged_from(&self) -> Option<u64> {
        (self.transient > 0 && self.paged_to < self.end()).then_some(self.paged_to)
    }

    /// Notes that a round has taken the records from [`Chunk::unpaged_from`] on.
    pub fn begin_paging(&mut self) {
        self.paging_from = self.paging_from.or(Some(self.paged_to));
        self.paged_to = self.end();
    }

    /// Notes whether the pages were written that a round had taken, if it had.
    pub fn end_paging(&mut self, written: bool) {
        if let (Some(from), false) = (self.paging_from.take(), written) {
            self.paged_to = from;
        }
    }

    /// Notes that the transient records were read from the pages.
    pub fn note_paged(&mut self) {
        self.paged_to = self.end();
    }

    /// Whether the store has every transient record.
    pub fn is_paged(&self) -> bool {
        self.unpaged_from().is_none() && (self.transient == 0 || self.paging_from.is_none())
    }

    /// Whether the next record belongs into a new chunk.
    #[inline]
    pub fn is_full(&self) -> bool {
        self.buffers.data.len() + self.shared_bytes >= CHUNK_BYTES || self.buffers.offsets.len() >= CHUNK_RECORDS
    }

    /// Appends at [`Chunk::end`].
    #[inline]
    pub fn append(&mut self, message: &Message<'_>, now_unix_ms: u64) {
        let at = self.buffers.data.len() as u32;
        if let Body::Shared(body) = message.body {
            self.keep_shared(body.clone());
        }
        if !message.extension.is_empty() {
            self.note_expiry(message.extension);
        }
        self.make_room(record::encoded_len(message));
        record::encode(&mut self.buffers.data, message, now_unix_ms);
        self.buffers.offsets.push(at);
        self.live += 1;
        if !message.persistent {
            self.transient += 1;
        }
        self.account();
    }

    /// [`Chunk::append`] of those at the front of `messages` that find room and are all there is to keep of them, with neither
    /// a body beside the chunk nor an extension. Answers how many.
    ///
    /// Hot path: what repeats is copied from the record before.
    #[inline]
    pub fn append_run(&mut self, messages: &[Message<'_>], now_unix_ms: u64) -> usize {
        let (mut count, mut transient) = (0, 0);
        let mut last: Option<(&Message<'_>, usize)> = None;
        for message in messages {
            let is_plain = message.extension.is_empty() && matches!(message.body, Body::Inline(_));
            if !is_plain || self.is_full() {
                break;
            }
            self.make_room(record::encoded_len(message));
            let at = self.buffers.data.len();
            match last {
                Some((before, like)) if before.is_like(message) => {
                    record::encode_like(&mut self.buffers.data, like, message);
                }
                _ => record::encode(&mut self.buffers.data, message, now_unix_ms),
            }
            last = Some((message, at));
            self.buffers.offsets.push(at as u32);
            count += 1;
            transient += u32::from(!message.persistent);
        }
        self.live += count as u32;
        self.transient += transient;
        self.account();
        count
    }

    /// Appends a record read back from the store at `seq`, which is not before [`Chunk::end`]: whole, or without the
    /// `body` it ends with. Positions skipped are absent. Damaged records are skipped as well.
    pub fn append_record(&mut self, seq: u64, bytes: &[u8], body: Option<&Bytes>) {
        let split = match body {
            Some(body) => Some((record::without_body(bytes), body.clone())),
            None => record::share_body(bytes),
        };
        let decoded = match &split {
            Some((kept, body)) => record::decode(kept, Some(body)),
            None => record::decode(bytes, None),
        };
        let Some(message) = decoded else { return };
        self.note_expiry(message.extension);
        self.cover(seq);
        let at = self.buffers.data.len() as u32;
        match split {
            Some((kept, body)) => {
                self.buffers.data.extend_from_slice(&kept);
                self.keep_shared(body);
            }
            None => self.buffers.data.extend_from_slice(bytes),
        }
        self.buffers.offsets.push(at);
        self.live += 1;
        self.transient += u32::from(record::head(bytes).is_some_and(|head| !head.persistent));
        self.account();
    }

    /// Keeps the body of the record that is about to be appended.
    fn keep_shared(&mut self, body: Bytes) {
        self.budget.hold_body(&body);
        self.shared_bytes += body.len();
        self.shared.push((self.buffers.offsets.len() as u32, body));
    }

    fn note_expiry(&mut self, extension: &[u8]) {
        let expires = extension::expires_unix_ms(extension).unwrap_or(u64::MAX);
        self.earliest_expiry_unix_ms = self.earliest_expiry_unix_ms.min(expires);
    }

    /// Takes the message at `seq` into account, which has become ready again.
    pub fn note_expiry_of(&mut self, seq: u64) {
        let expires = self.message(seq).and_then(|message| extension::expires_unix_ms(message.extension));
        self.earliest_expiry_unix_ms = self.earliest_expiry_unix_ms.min(expires.unwrap_or(u64::MAX));
    }

    /// Adds the positions to `found` whose messages are ready and have expired, until it holds `limit`, and finds out
    /// when to look again.
    pub fn expired(&mut self, now_unix_ms: u64, limit: usize, found: &mut Vec<u64>, is_ready: impl Fn(u64) -> bool) {
        let mut earliest = u64::MAX;
        for seq in self.first..self.end() {
            let expires = self.message(seq).and_then(|message| extension::expires_unix_ms(message.extension));
            let Some(expires) = expires.filter(|_| is_ready(seq)) else { continue };
            if expires > now_unix_ms {
                earliest = earliest.min(expires);
            } else if found.len() < limit {
                found.push(seq);
            } else {
                earliest = expires; // there is more: look again soon
                break;
            }
        }
        self.earliest_expiry_unix_ms = earliest;
    }

    /// Extends the chunk to `end` with absent positions.
    pub fn cover(&mut self, end: u64) {
        let len = end.saturating_sub(self.first) as usize;
        if len > self.buffers.offsets.len() {
            self.has_absent = true;
            self.buffers.offsets.resize(len, ABSENT);
            self.account();
        }
    }

    /// The index of a position and where its record begins; `None` where there is none.
    #[inline]
    fn start(&self, seq: u64) -> Option<(usize, u32)> {
        let index = usize::try_from(seq.checked_sub(self.first)?).ok()?;
        let start = *self.buffers.offsets.get(index)?;
        (start != ABSENT).then_some((index, start))
    }

    /// Whether there is a record at `seq`.
    #[inline]
    pub fn contains(&self, seq: u64) -> bool {
        self.start(seq).is_some()
    }

    #[inline]
    fn bounds(&self, seq: u64) -> Option<(usize, usize)> {
        let (index, start) = self.start(seq)?;
        let rest = &self.buffers.offsets[index + 1..];
        let end = match rest.first() {
            Some(&end) if end != ABSENT => end as usize,
            Some(_) => rest.iter().find(|&&end| end != ABSENT).map_or(self.buffers.data.len(), |&end| end as usize),
            None => self.buffers.data.len(),
        };
        Some((start as usize, end))
    }

    /// The record at `seq`; `None` where there is none.
    #[inline]
    pub fn record(&self, seq: u64) -> Option<(&[u8], Option<&Bytes>)> {
        let (start, end) = self.bounds(seq)?;
        let bytes = self.buffers.data.get(start..end)?;
        if self.shared.is_empty() {
            return Some((bytes, None));
        }
        let index = (seq - self.first) as u32;
        let shared = self.shared.binary_search_by_key(&index, |(at, _)| *at).ok().map(|at| &self.shared[at].1);
        Some((bytes, shared))
    }

    /// Adds the messages from `from` on to `run`, at most `limit`, up to the first position without one or with more to it than
    /// the message. For chunks whose bodies are all inside.
    ///
    /// Hot path: what repeats is compared, not read again.
    #[inline]
    pub fn plain_run<'a>(&'a self, from: u64, limit: usize, run: &mut PlainRun<'a>) {
        let Buffers { data, offsets } = &self.buffers;
        let first = from.saturating_sub(self.first) as usize;
        if first >= offsets.len() || !self.shared.is_empty() {
            return;
        }
        let last = offsets.len().min(first.saturating_add(limit));
        let mut before: &[u8] = &[];
        for index in first..last {
            let end = offsets.get(index + 1).map_or(data.len(), |&end| end as usize);
            let Some(record) = data.get(offsets[index] as usize..end) else { return };
            let alike = run.last().and_then(|message| record::decode_like(record, before, message));
            match alike.or_else(|| record::decode(record, None)) {
                Some(message) if message.extension.is_empty() => run.push(message),
                _ => return,
            }
            before = record;
        }
    }

    /// The message at `seq`.
    #[inline]
    pub fn message(&self, seq: u64) -> Option<Message<'_>> {
        let (bytes, shared) = self.record(seq)?;
        record::decode(bytes, shared)
    }

    /// Notes that the records of `[from, until)`, which lies within the chunk, are consumed. Answers whether there was one.
    #[inline]
    pub fn forget_range(&mut self, from: u64, until: u64) -> bool {
        let count = (until - from) as u32;
        let is_uniform = self.transient == 0 || self.transient == self.live;
        if self.has_absent || !self.shared.is_empty() || !is_uniform || count > self.live {
            let mut was_there = false;
            (from..until).for_each(|seq| was_there |= self.forget(seq));
            return was_there;
        }
        self.live -= count;
        self.transient = self.transient.saturating_sub(count);
        true
    }

    /// Notes that the record at `seq` is consumed; a large body is let go at once. Answers whether there was one.
    #[inline]
    pub fn forget(&mut self, seq: u64) -> bool {
        let Some((_, start)) = self.start(seq) else { return false };
        self.live = self.live.saturating_sub(1);
        if record::head(&self.buffers.data[start as usize..]).is_some_and(|head| !head.persistent) {
            self.transient = self.transient.saturating_sub(1);
        }
        if !self.shared.is_empty() {
            let index = (seq - self.first) as u32;
            if let Ok(at) = self.shared.binary_search_by_key(&index, |(at, _)| *at) {
                let body = mem::take(&mut self.shared[at].1);
                self.shared_bytes -= body.len();
                self.budget.release_body(&body);
                if self.shared.iter().all(|(_, body)| body.is_empty()) {
                    // Every record left in `shared` is consumed, so none of them is decoded again.
                    self.shared.clear();
                }
            }
        }
        true
    }

    /// Makes a chunk without live records start over at `first`, if its buffers are small enough to be kept by a queue
    /// that may stay idle. Answers whether it did.
    #[inline]
    pub fn restart(&mut self, first: u64) -> bool {
        if self.buffers.data.capacity() > IDLE_BYTES || !self.shared.is_empty() {
            return false;
        }
        self.first = first;
        self.buffers.data.clear();
        self.buffers.offsets.clear();
        (self.live, self.transient, self.has_absent) = (0, 0, false);
        (self.paged_to, self.paging_from) = (first, None);
        self.earliest_expiry_unix_ms = u64::MAX;
        true
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        self.budget.shrink(self.accounted_bytes);
        // Those that were let go are empty.
        for (_, body) in self.shared.iter().filter(|(_, body)| !body.is_empty()) {
            self.budget.release_body(body);
        }
        if self.buffers.data.capacity() < 16 << 10 || self.buffers.data.capacity() > 2 * CHUNK_BYTES {
            return;
        }
        let mut buffers = mem::take(&mut self.buffers);
        buffers.data.clear();
        buffers.offsets.clear();
        // A thread that is ending has no pool any more; the buffers are then simply freed.
        let _ = POOL.try_with(|pool| {
            let mut pool = pool.borrow_mut();
            if pool.len() < POOLED_BUFFERS {
                pool.push(buffers);
            }
        });
    }
}
