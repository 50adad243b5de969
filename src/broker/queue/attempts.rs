//! How often messages came back, and when those that have to wait may be tried again. Kept for quorum-type queues and for
//! queues that retry with backoff; survives restarts.
//!
//! The store keeps them as notes, one for the entries of a segment of positions: `offset:u16 returned:u16 failed:u16
//! body_len:u32 due:u48` for each entry, little-endian.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap},
};

use super::lane::Tally;
use crate::store::{QueueId, RoundBuilder, SEGMENT_RECORDS, Store, StoreError};

const NOTE_KIND: u8 = b'a';
const ENTRY_BYTES: usize = 16;

/// What is known of one message's failed deliveries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attempt {
    /// Returns for whatever cause: `x-acquired-count`.
    pub returned: u16,
    /// Returns that count as failures: `x-delivery-count`.
    pub failed: u16,
    /// When it may be delivered again, in Unix milliseconds; 0 is now.
    pub due_unix_ms: u64,
    /// Of the body; kept for counting without reading.
    pub body_bytes: u32,
}

/// See the module. Positions are queue-wide.
#[derive(Default)]
pub struct Attempts {
    entries: BTreeMap<u64, Attempt>,
    dirty: BTreeSet<u64>,
    /// Messages that wait, by due time.
    waiting: BinaryHeap<Reverse<(u64, u64)>>,
    /// Of those in `waiting`, the ones that still do.
    pub waiting_tally: Tally,
}

impl Attempts {
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether the store may have something of it.
    pub fn is_in_use(&self) -> bool {
        !self.entries.is_empty() || self.is_dirty()
    }

    #[inline]
    pub fn get(&self, position: u64) -> Option<Attempt> {
        self.entries.get(&position).copied()
    }

    /// The failed deliveries a message has behind it.
    pub fn failures(&self, position: u64) -> u32 {
        self.get(position).map_or(0, |attempt| u32::from(attempt.failed))
    }

    /// Counts a return.
    pub fn count(&mut self, position: u64, failed: bool) {
        self.dirty.insert(position / SEGMENT_RECORDS);
        let attempt = self.entries.entry(position).or_default();
        attempt.returned = attempt.returned.saturating_add(1);
        attempt.failed = attempt.failed.saturating_add(u16::from(failed));
    }

    /// Notes what a message that comes from another queue has behind it.
    pub fn seed(&mut self, position: u64, failed: u32) {
        self.dirty.insert(position / SEGMENT_RECORDS);
        let failed = u16::try_from(failed).unwrap_or(u16::MAX);
        let attempt = self.entries.entry(position).or_default();
        (attempt.returned, attempt.failed) = (failed, failed);
    }

    /// Forgets a message that is gone.
    #[inline]
    pub fn forget(&mut self, position: u64) {
        if !self.entries.is_empty()
            && let Some(attempt) = self.entries.remove(&position)
        {
            self.dirty.insert(position / SEGMENT_RECORDS);
            if attempt.due_unix_ms > 0 {
                self.waiting_tally.sub(1, attempt.body_bytes.into());
            }
        }
    }

    /// Has a returned message wait.
    pub fn delay(&mut self, position: u64, due_unix_ms: u64, body_bytes: u32) {
        let attempt = self.entries.entry(position).or_default();
        (attempt.due_unix_ms, attempt.body_bytes) = (due_unix_ms, body_bytes);
        self.dirty.insert(position / SEGMENT_RECORDS);
        self.wait(position, due_unix_ms, body_bytes);
    }

    fn wait(&mut self, position: u64, due_unix_ms: u64, body_bytes: u32) {
        self.waiting.push(Reverse((due_unix_ms, position)));
        self.waiting_tally.add(1, body_bytes.into());
    }

    /// When the next waiting message is due; `u64::MAX` if none waits.
    pub fn next_due_unix_ms(&self) -> u64 {
        self.waiting.peek().map_or(u64::MAX, |Reverse((due, _))| *due)
    }

    /// The next message that is due, and its body's length.
    pub fn take_due(&mut self, now_unix_ms: u64) -> Option<(u64, u32)> {
        while let Some(&Reverse((due, position))) = self.waiting.peek() {
            if due > now_unix_ms {
                return None;
            }
            self.waiting.pop();
            let Some(attempt) = self.entries.get_mut(&position).filter(|attempt| attempt.due_unix_ms == due) else {
                continue; // purged meanwhile
            };
            attempt.due_unix_ms = 0;
            let body_bytes = attempt.body_bytes;
            self.dirty.insert(position / SEGMENT_RECORDS);
            self.waiting_tally.sub(1, body_bytes.into());
            return Some((position, body_bytes));
        }
        None
    }

    /// The waiting messages and their bodies' lengths, in no order.
    pub fn waiting(&self) -> impl Iterator<Item = (u64, u32)> + '_ {
        self.entries
            .iter()
            .filter(|(_, attempt)| attempt.due_unix_ms > 0)
            .map(|(position, attempt)| (*position, attempt.body_bytes))
    }

    /// Whether the store lacks something.
    pub fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Moves what has changed into a round.
    pub fn drain(&mut self, owner: QueueId, round: &mut RoundBuilder) {
        for segment in std::mem::take(&mut self.dirty) {
            let first = segment * SEGMENT_RECORDS;
            let mut value = Vec::new();
            for (position, attempt) in self.entries.range(first..first + SEGMENT_RECORDS) {
                value.extend_from_slice(&((position - first) as u16).to_le_bytes());
                value.extend_from_slice(&attempt.returned.to_le_bytes());
                value.extend_from_slice(&attempt.failed.to_le_bytes());
                value.extend_from_slice(&attempt.body_bytes.to_le_bytes());
                value.extend_from_slice(&attempt.due_unix_ms.to_le_bytes()[..6]);
            }
            match value.is_empty() {
                true => round.delete_note(owner, &note_key(segment)),
                false => round.put_note(owner, &note_key(segment), &value),
            }
        }
    }

    /// Forgets changes that need not be stored.
    pub fn discard_changes(&mut self) {
        self.dirty.clear();
    }

    /// Reads what the store has.
    ///
    /// # Errors
    /// Those of [`Store::read_notes`].
    pub fn recover(owner: QueueId, store: &Store) -> Result<Self, StoreError> {
        let mut attempts = Attempts::default();
        let (mut from, until) = (vec![NOTE_KIND], [NOTE_KIND + 1]);
        loop {
            let next = store.read_notes(owner, &from, &until, 1 << 20, &mut |key, value| {
                let Some(segment) = key.get(1..).and_then(|key| key.try_into().ok()).map(u64::from_be_bytes) else {
                    return;
                };
                attempts.read_segment(segment, value);
            })?;
            match next {
                Some(next) => from = next,
                None => return Ok(attempts),
            }
        }
    }

    fn read_segment(&mut self, segment: u64, value: &[u8]) {
        for entry in value.chunks_exact(ENTRY_BYTES) {
            let short = |at: usize| u16::from_le_bytes([entry[at], entry[at + 1]]);
            let position = segment.saturating_mul(SEGMENT_RECORDS) + u64::from(short(0));
            let [a, b, c, d, e, f] = [entry[10], entry[11], entry[12], entry[13], entry[14], entry[15]];
            let attempt = Attempt {
                returned: short(2),
                failed: short(4),
                body_bytes: u32::from_le_bytes([entry[6], entry[7], entry[8], entry[9]]),
                due_unix_ms: u64::from_le_bytes([a, b, c, d, e, f, 0, 0]),
            };
            if attempt.due_unix_ms > 0 {
                self.wait(position, attempt.due_unix_ms, attempt.body_bytes);
            }
            self.entries.insert(position, attempt);
        }
    }
}

fn note_key(segment: u64) -> [u8; 9] {
    let mut key = [NOTE_KIND; 9];
    key[1..].copy_from_slice(&segment.to_be_bytes());
    key
}
