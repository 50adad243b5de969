//! The waiting messages that are in memory, in order.

use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;

use crate::broker::{
    memory::MemoryBudget,
    message::{Body, Message},
    queue::record,
};

/// What an entry costs beside its record, about.
const ENTRY_BYTES: usize = 96;

/// When a message is due, and its place among those due at the same time. Names it among its owner's messages for as
/// long as the owner lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DelayId {
    pub due_unix_ms: u64,
    pub serial: u64,
}

impl DelayId {
    /// Before every message.
    pub const START: DelayId = DelayId { due_unix_ms: 0, serial: 0 };
    /// The latest due time: there is still something behind it.
    pub const LAST_DUE: u64 = u64::MAX - 1;
    /// Behind every message.
    pub(super) const END: DelayId = DelayId { due_unix_ms: u64::MAX, serial: u64::MAX };

    pub(super) fn successor(self) -> DelayId {
        match self.serial.checked_add(1) {
            Some(serial) => DelayId { serial, ..self },
            None => DelayId { due_unix_ms: self.due_unix_ms.saturating_add(1), serial: 0 },
        }
    }
}

/// A message as it is kept while it waits. Cheap to clone if it has a large body.
#[derive(Clone, Debug)]
pub struct Record {
    bytes: Box<[u8]>,
    body: Option<Bytes>,
}

impl Record {
    pub(super) fn of(message: &Message<'_>, now_unix_ms: u64) -> Record {
        let mut bytes = Vec::with_capacity(record::encoded_len(message));
        record::encode(&mut bytes, message, now_unix_ms);
        let body = match message.body {
            Body::Shared(body) => Some(body.clone()),
            Body::Inline(_) => None,
        };
        Record { bytes: bytes.into(), body }
    }

    /// A record from the store.
    pub(super) fn stored(whole: &[u8]) -> Record {
        match record::share_body(whole) {
            Some((bytes, body)) => Record { bytes: bytes.into(), body: Some(body) },
            None => Record { bytes: whole.into(), body: None },
        }
    }

    /// The record as the store keeps it; `scratch` is used if it has to be put together.
    pub(super) fn whole<'a>(&'a self, scratch: &'a mut Vec<u8>) -> &'a [u8] {
        match &self.body {
            Some(body) => {
                record::whole(&self.bytes, body, scratch);
                scratch
            }
            None => &self.bytes,
        }
    }

    /// The message; nothing if the record is damaged.
    pub fn message(&self) -> Option<Message<'_>> {
        record::decode(&self.bytes, self.body.as_ref())
    }

    /// When it was pushed.
    pub fn published_unix_ms(&self) -> Option<u64> {
        Some(record::head(&self.bytes)?.published_unix_ms)
    }

    fn cost(&self) -> usize {
        ENTRY_BYTES + self.bytes.len() + self.body.as_ref().map_or(0, Bytes::len)
    }
}

/// How far a message has got on its way into the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Unwritten,
    /// In a round that has not ended.
    Writing,
    Stored,
}

pub(super) struct Entry {
    pub record: Record,
    pub phase: Phase,
}

/// All messages that wait before `end`, and those behind it that the store cannot be asked for yet.
pub(super) struct Window {
    entries: BTreeMap<DelayId, Entry>,
    end: DelayId,
    /// Of the entries before `end`.
    bytes: usize,
    /// Of those behind it.
    outer_bytes: usize,
    budget: Arc<MemoryBudget>,
}

impl Window {
    /// An empty window over an empty store.
    pub fn new(budget: Arc<MemoryBudget>) -> Window {
        Window { entries: BTreeMap::new(), end: DelayId::END, bytes: 0, outer_bytes: 0, budget }
    }

    /// A window over a store with nothing before `end`. It holds nothing so far.
    pub fn begin_at(&mut self, end: DelayId) {
        self.end = end;
    }

    pub fn end(&self) -> DelayId {
        self.end
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Bytes before the end.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn resident_bytes(&self) -> usize {
        self.bytes + self.outer_bytes
    }

    pub fn is_memory_scarce(&self) -> bool {
        self.budget.is_over()
    }

    /// The due time of the first message before the end.
    pub fn first_due(&self) -> Option<u64> {
        self.first_inner().map(|id| id.due_unix_ms)
    }

    /// Nothing waits before it, in memory or in the store.
    pub fn lower_bound(&self) -> DelayId {
        self.first_inner().unwrap_or(self.end)
    }

    fn first_inner(&self) -> Option<DelayId> {
        self.entries.first_key_value().map(|(id, _)| *id).filter(|id| *id < self.end)
    }

    pub fn get_mut(&mut self, id: DelayId) -> Option<&mut Entry> {
        self.entries.get_mut(&id)
    }

    /// Those in memory from `from` on.
    pub fn entries_from(&self, from: DelayId) -> impl Iterator<Item = (DelayId, &Record)> {
        self.entries.range(from..).map(|(id, entry)| (*id, &entry.record))
    }

    pub fn insert(&mut self, id: DelayId, record: Record, phase: Phase) {
        let cost = record.cost();
        self.entries.insert(id, Entry { record, phase });
        self.budget.grow(cost);
        *self.side(id) += cost;
    }

    /// Adds what was read from the store, unless it is there.
    pub fn insert_stored(&mut self, id: DelayId, record: Record) {
        if !self.entries.contains_key(&id) {
            self.insert(id, record, Phase::Stored);
        }
    }

    pub fn remove(&mut self, id: DelayId) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        let cost = entry.record.cost();
        self.budget.shrink(cost);
        *self.side(id) -= cost;
        Some(entry)
    }

    fn side(&mut self, id: DelayId) -> &mut usize {
        if id < self.end { &mut self.bytes } else { &mut self.outer_bytes }
    }

    /// Takes the first message out if it is due.
    pub fn pop_due(&mut self, now_unix_ms: u64) -> Option<(DelayId, Entry)> {
        let id = self.first_inner().filter(|id| id.due_unix_ms <= now_unix_ms)?;
        Some((id, self.remove(id)?))
    }

    /// Draws the end in until the window holds at most `max_bytes` and nothing due after `until_unix_ms`. What is left
    /// out is in the store, or stays until it is. A large message stays if less than half of `max_bytes` would be left:
    /// it would be loaded again at once.
    pub fn trim(&mut self, max_bytes: usize, until_unix_ms: u64) {
        while let Some((&id, entry)) = self.entries.range(..self.end).next_back() {
            let cost = entry.record.cost();
            let too_much = self.bytes > max_bytes && self.bytes - cost >= max_bytes / 2;
            let too_late = id.due_unix_ms > until_unix_ms;
            if !too_much && !too_late {
                return;
            }
            let stored = entry.phase == Phase::Stored;
            self.end = id;
            self.bytes -= cost;
            self.outer_bytes += cost;
            if stored {
                self.remove(id);
            }
        }
    }

    /// Moves the end out, after everything that is stored before it was inserted.
    pub fn extend(&mut self, end: DelayId) {
        if end <= self.end {
            return;
        }
        let moved: usize = self.entries.range(self.end..end).map(|(_, entry)| entry.record.cost()).sum();
        self.outer_bytes -= moved;
        self.bytes += moved;
        self.end = end;
    }

    /// The round with the put of this message is durable. Behind the end it is let go, unless it is to be kept.
    pub fn stored(&mut self, id: DelayId, keep: bool) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        entry.phase = Phase::Stored;
        if id >= self.end && !keep {
            self.remove(id);
        }
    }

    /// Lets go of what was kept behind the end though it is stored.
    pub fn drop_outer(&mut self) {
        let outer = self.entries.range(self.end..).filter(|(_, entry)| entry.phase == Phase::Stored);
        for id in outer.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.remove(id);
        }
    }

    /// Empties it, over a store that is empty as well, and answers what it held.
    pub fn clear(&mut self) -> Vec<(DelayId, Phase)> {
        self.budget.shrink(self.resident_bytes());
        (self.bytes, self.outer_bytes) = (0, 0);
        self.end = DelayId::END;
        std::mem::take(&mut self.entries).into_iter().map(|(id, entry)| (id, entry.phase)).collect()
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.budget.shrink(self.resident_bytes());
    }
}
