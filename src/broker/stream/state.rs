//! What a stream's mutex guards. Pure: no I/O, no lock but the ports' while delivering.

use std::sync::Arc;

use super::{
    offset_header::OffsetHeader,
    offsets::Offsets,
    options::{ReaderOptions, Start},
    readers::{LoadId, Reader, Readers, Tracking},
    segments::Segments,
    tail::Tail,
};
use crate::{
    broker::{
        memory::{MemoryBudget, Unwritten},
        message::{Body, Message},
        port::{Delivery, Effects, Offer},
        queue::{Consumer, ConsumerId, Counts, SettledRun, chunk::Chunk, record},
        rules::StreamRules,
    },
    store::{QueueStateRecord, Round, SEGMENT_RECORDS},
};

/// What one turn of a reader may cost, in messages looked at.
const TURN_COST: usize = 256;
/// A reader joins a read that begins up to so many offsets before its own.
const JOIN_OFFSETS: u64 = 512;

/// A read from the store that is under way.
struct Load {
    id: LoadId,
    from: u64,
    /// Others may have its result: no filter was applied.
    is_shared: bool,
}

/// What a new reader still needs.
pub(super) enum Begin {
    Now,
    /// Its offset has to be looked for: the first record from the time on, within these offsets.
    Seek {
        unix_ms: u64,
        from: u64,
        until: u64,
    },
}

/// How a turn ended.
enum Served {
    Done,
    /// What the reader needs has to be read.
    Absent,
}

/// See the module.
pub(super) struct State {
    pub tail: Tail,
    pub segments: Segments,
    pub readers: Readers,
    pub offsets: Offsets,
    pub rules: StreamRules,
    header: OffsetHeader,
    /// Offsets before it were offered to a round.
    pub written_to: u64,
    /// Offsets before it are in a committed round, and may be delivered.
    pub committed_to: u64,
    /// Where the last committed chunk begins, and the one that is being committed.
    pub last_chunk: u64,
    pub next_chunk: u64,
    /// The store's segments before it are deleted.
    pub deleted_segments: u64,
    /// Bytes dropped that are still in the store.
    pub dropped_bytes: u64,
    /// The round that will take the present changes, once the stream is on the store's list.
    pub dirty: Option<Round>,
    /// Of messages, until a round takes them.
    pub unwritten: Unwritten,
    /// The store has something of this stream.
    pub in_store: bool,
    /// The notes of a recovered stream were not read yet.
    pub unopened: Option<QueueStateRecord>,
    /// Deliveries go on, on the store's reader thread.
    pub is_continuing: bool,
    /// Readers for whom something has to be read.
    pub absent: Vec<u32>,
    loads: Vec<Load>,
    next_load: LoadId,
    /// Reused for records that have to be made whole.
    pub scratch: Vec<u8>,
    pub deleted: bool,
}

impl State {
    /// An empty stream.
    pub fn new(rules: StreamRules, budget: Arc<MemoryBudget>) -> Self {
        State {
            tail: Tail::new(0, budget.clone()),
            segments: Segments::new(0),
            readers: Readers::default(),
            offsets: Offsets::default(),
            rules,
            header: OffsetHeader::default(),
            written_to: 0,
            committed_to: 0,
            last_chunk: 0,
            next_chunk: 0,
            deleted_segments: 0,
            dropped_bytes: 0,
            dirty: None,
            unwritten: Unwritten::new(budget),
            in_store: false,
            unopened: None,
            is_continuing: false,
            absent: Vec::new(),
            loads: Vec::new(),
            next_load: 0,
            scratch: Vec::new(),
            deleted: false,
        }
    }

    /// Takes over what the store knows.
    pub fn opened(
        &mut self,
        record: QueueStateRecord,
        segments: Segments,
        offsets: Offsets,
        budget: Arc<MemoryBudget>,
    ) {
        self.tail = Tail::new(record.tail.max(record.head), budget);
        self.written_to = self.tail.end();
        self.committed_to = self.tail.end();
        // A rebuilt record does not know of chunks.
        self.last_chunk = record.delivered.min(self.tail.end().saturating_sub(1));
        self.next_chunk = self.last_chunk;
        self.deleted_segments = segments.head() / SEGMENT_RECORDS;
        self.segments = segments;
        self.offsets = offsets;
        self.unopened = None;
    }

    /// What a round stores: `delivered` is where the last chunk begins.
    pub fn record(&self) -> QueueStateRecord {
        let (head, tail) = (self.segments.head(), self.tail.end());
        QueueStateRecord {
            head,
            delivered: self.next_chunk.clamp(head, tail),
            tail,
            message_count: tail - head,
            message_bytes: self.segments.body_bytes(),
        }
    }

    pub fn counts(&self) -> Counts {
        let (ready, ready_bytes) = match &self.unopened {
            Some(record) => (record.message_count, record.message_bytes),
            None => (self.tail.end() - self.segments.head(), self.segments.body_bytes()),
        };
        Counts { ready, ready_bytes, consumers: self.readers.len() as u64, ..Counts::default() }
    }

    /// Appends a run of messages; a new segment begins where the last one is complete.
    pub fn append(&mut self, messages: &[Message<'_>], now_unix_ms: u64) {
        // Time stands still rather than going back: readers look for offsets by time.
        let now = now_unix_ms.max(self.segments.last_unix_ms());
        let expected_bytes = messages.iter().map(record::encoded_len).sum();
        let (mut bytes, mut body_bytes) = (0, 0);
        let mut room = self.segments.room(&self.rules);
        for message in messages {
            if bytes >= room {
                self.segments.appended(std::mem::take(&mut bytes), std::mem::take(&mut body_bytes), now);
                self.segments.roll(self.tail.end());
                self.retain(now);
                room = self.segments.room(&self.rules);
            }
            // Whatever its delivery mode says, it stays; and nothing of what the broker notes means anything here.
            let message = Message { persistent: true, extension: &[], ..*message };
            self.tail.append(&message, now, expected_bytes);
            let beside = if let Body::Shared(body) = message.body { body.len() } else { 0 };
            bytes += (record::encoded_len(&message) + beside) as u64;
            body_bytes += message.body.len() as u64;
        }
        self.segments.appended(bytes, body_bytes, now);
    }

    /// Drops what retention says; answers whether that was anything.
    pub fn retain(&mut self, now_unix_ms: u64) -> bool {
        let before = self.segments.head();
        self.dropped_bytes += self.segments.retain(&self.rules, now_unix_ms);
        self.segments.head() > before
    }

    /// Adds a reader, which takes part once it is let loose.
    pub fn add_reader(&mut self, consumer: Consumer, options: ReaderOptions, now_unix_ms: u64) -> (ConsumerId, Begin) {
        let (head, tail) = (self.segments.head(), self.tail.end());
        let stored = options.tracked_as.as_ref().and_then(|tag| self.offsets.get(tag));
        let start = stored.map(Start::Offset).or(options.start).unwrap_or(Start::Next);
        let mut begin = Begin::Now;
        let next = match start {
            Start::First => head,
            Start::Last => self.last_chunk.clamp(head, tail),
            Start::Next => tail,
            Start::Offset(offset) => offset.max(head),
            // There will be nothing before it, so that is the next message.
            Start::Time(unix_ms) if unix_ms > now_unix_ms => tail,
            Start::Time(unix_ms) => {
                let (from, until) = self.segments.find(unix_ms);
                begin = Begin::Seek { unix_ms, from, until: until.min(self.committed_to) };
                from
            }
        };
        let tracking = options.tracked_as.map(|tag| Tracking { tag, tracker: Default::default(), stored });
        if let (Some(tracking), None, None) = (&tracking, stored, options.start) {
            // So that what is published before its first acknowledgement is not missed the next time.
            self.offsets.put(&tracking.tag, next, now_unix_ms);
        }
        let mut reader = Reader::new(consumer, next, options.filter, tracking);
        reader.is_seeking = matches!(begin, Begin::Seek { .. });
        (self.readers.add(reader), begin)
    }

    /// Gives back the credit of settled deliveries and moves a tracked consumer's offset; answers whether that is to be
    /// stored.
    pub fn settle(&mut self, id: ConsumerId, runs: &[SettledRun], now_unix_ms: u64) -> bool {
        let Some(reader) = self.readers.get_mut(id) else { return false };
        reader.unacked = reader.unacked.saturating_sub(runs.iter().map(|run| run.count).sum());
        reader.is_stalled = false;
        let mut moved = false;
        if let Some(tracking) = &mut reader.tracking {
            let deliveries = runs.iter().flat_map(|run| run.each());
            deliveries.for_each(|settled| tracking.tracker.settled(settled.seq));
            let next = tracking.tracker.resume_at(reader.next);
            moved = tracking.stored != Some(next);
            if moved {
                tracking.stored = Some(next);
                self.offsets.put(&tracking.tag, next, now_unix_ms);
            }
        }
        self.readers.queue_up(id.index, self.committed_to);
        moved
    }

    /// Lets a reader take part (again).
    pub fn release(&mut self, id: ConsumerId) {
        if let Some(reader) = self.readers.get_mut(id) {
            reader.is_blocked = false;
            reader.is_stalled = false;
            self.readers.queue_up(id.index, self.committed_to);
        }
    }

    /// Hands out messages to the readers that have a turn, until `cost` messages were looked at. [`State::absent`] are
    /// readers for whom something has to be read.
    ///
    /// Hot path: under the stream's lock; takes a reader's outbox once a turn.
    pub fn deliver(&mut self, mut cost: usize, effects: &mut Effects) {
        while cost > 0
            && let Some(index) = self.readers.take_turn()
        {
            match self.serve(index, &mut cost, effects) {
                Served::Done => self.readers.queue_up(index, self.committed_to),
                Served::Absent => self.absent.push(index),
            }
        }
    }

    fn serve(&mut self, index: u32, cost: &mut usize, effects: &mut Effects) -> Served {
        let committed_to = self.committed_to;
        let Some(reader) = self.readers.at_mut(index) else { return Served::Done };
        reader.next = reader.next.max(self.segments.head());
        let first = reader.next;
        if first >= committed_to {
            return Served::Done;
        }
        let cold = reader.chunk.clone().filter(|chunk| chunk.first() <= first && first < chunk.end());
        let chunk = match (self.tail.chunk_at(first), &cold) {
            (Some(chunk), _) => chunk,
            (None, Some(chunk)) => chunk,
            (None, None) => {
                reader.chunk = None;
                return Served::Absent;
            }
        };
        let end = chunk.end().min(committed_to);
        let (to, header) = (reader.consumer.address, &mut self.header);
        let mut credit = reader.credit();
        let filter = reader.filter.as_deref();
        let message_cost = filter.map_or(1, |filter| filter.cost());
        let limit = TURN_COST.min(*cost);
        let (mut at, mut used, mut last) = (first, 0, Offer::Taken);
        let (unacked, tracking) = (&mut reader.unacked, &mut reader.tracking);
        let wake = reader.consumer.port.with_writer(&mut |writer| {
            while at < end && used < limit && credit > 0 {
                used += message_cost;
                let wanted = chunk.message(at).filter(|message| filter.is_none_or(|f| f.matches(message.properties)));
                if let Some(message) = wanted {
                    let message = Message { properties: header.write(message.properties, at), ..message };
                    last = writer.deliver(&Delivery { to, seq: at, redelivered: false, message });
                    if last != Offer::Taken {
                        return;
                    }
                    *unacked += 1;
                    credit -= 1;
                    if let Some(tracking) = tracking {
                        tracking.tracker.delivered(at);
                    }
                }
                at += 1;
            }
        });
        *cost = cost.saturating_sub(used.max(1));
        if wake {
            effects.wakes.push(reader.consumer.port.clone());
        }
        reader.next = at;
        if at >= chunk.end() || cold.is_none() {
            reader.chunk = None;
        }
        // Nobody is told when a consumer that is gone can take something again: its cancellation is on the way.
        reader.is_blocked = last != Offer::Taken;
        Served::Done
    }

    /// Drops what nobody needs in memory.
    pub fn trim(&mut self) {
        let resident = self.tail.resident_from();
        let lagging = |reader: &&Reader| (resident..self.committed_to).contains(&reader.next);
        let wanted_from = self.readers.iter().filter(lagging).map(|reader| reader.next).min();
        self.tail.trim(self.committed_to, wanted_from);
        self.header.rest();
    }

    /// Drops everything that can be read again from the store, but what readers are about to take.
    pub fn evict(&mut self) {
        self.tail.trim(self.committed_to, None);
        for reader in self.readers.iter_mut() {
            if reader.is_blocked || reader.credit() == 0 {
                reader.chunk = None;
            }
        }
    }

    /// Bytes of messages in memory.
    pub fn resident_bytes(&self) -> usize {
        let chunks = self.readers.iter().filter_map(|reader| reader.chunk.as_ref());
        let cold: usize = chunks.map(|chunk| chunk.resident_bytes() / Arc::strong_count(chunk)).sum();
        self.tail.resident_bytes() + cold
    }

    /// Notes that a reader waits for a read: one that is under way, or a new one, which is answered with where it begins.
    pub fn begin_load(&mut self, index: u32) -> Option<(LoadId, u64)> {
        let reader = self.readers.at_mut(index)?;
        let from = reader.next;
        let is_shared = reader.filter.is_none();
        let joins = |load: &&Load| is_shared && load.is_shared && load.from <= from && from - load.from < JOIN_OFFSETS;
        if let Some(load) = self.loads.iter().find(joins) {
            reader.waiting_for = Some(load.id);
            return None;
        }
        self.next_load += 1;
        reader.waiting_for = Some(self.next_load);
        self.loads.push(Load { id: self.next_load, from, is_shared });
        Some((self.next_load, from))
    }

    /// Whether any reader still waits for the read.
    pub fn is_awaited(&self, id: LoadId) -> bool {
        self.readers.iter().any(|reader| reader.waiting_for == Some(id))
    }

    /// Gives a chunk to the readers that wait for it; without one, the read has failed and they wait a while.
    pub fn end_load(&mut self, id: LoadId, chunk: Option<Chunk>) {
        self.loads.retain(|load| load.id != id);
        let chunk = chunk.map(Arc::new);
        for reader in self.readers.iter_mut().filter(|reader| reader.waiting_for == Some(id)) {
            reader.waiting_for = None;
            reader.is_stalled = chunk.is_none();
            reader.chunk = chunk.clone();
        }
        self.readers.queue_up_all(self.committed_to);
    }
}
