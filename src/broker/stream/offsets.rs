//! Offsets that a stream keeps for its named consumers, and how a consumer's acknowledgements move its own.

use std::collections::VecDeque;

use ahash::AHashMap;

use crate::{
    model::Name,
    store::{QueueId, RoundBuilder},
};

/// What stands before a consumer tag in the key of its note.
pub(super) const NOTE_KIND: u8 = b'o';
/// Consumers a stream remembers; the one that was heard of longest ago is forgotten for one more.
const MAX_CONSUMERS: usize = 4096;

#[derive(Clone, Copy, Debug)]
struct Entry {
    next: u64,
    stored_unix_ms: u64,
    unwritten: bool,
}

/// Where named consumers go on. See the module.
#[derive(Default)]
pub(super) struct Offsets {
    entries: AHashMap<Name, Entry>,
    unwritten: Vec<Name>,
    forgotten: Vec<Name>,
}

impl Offsets {
    /// Takes over a note; one that cannot be read is left out.
    pub fn recover(&mut self, key: &[u8], note: &[u8]) {
        let Some((&NOTE_KIND, tag)) = key.split_first() else { return };
        let (Ok(tag), Some((next, rest))) = (std::str::from_utf8(tag), note.split_first_chunk()) else { return };
        let Some(stored) = rest.first_chunk() else { return };
        let entry =
            Entry { next: u64::from_le_bytes(*next), stored_unix_ms: u64::from_le_bytes(*stored), unwritten: false };
        self.entries.insert(tag.into(), entry);
    }

    /// The offset at which the consumer goes on, if it was here before.
    pub fn get(&self, tag: &str) -> Option<u64> {
        self.entries.get(tag).map(|entry| entry.next)
    }

    /// Remembers the offset at which the consumer goes on.
    pub fn put(&mut self, tag: &Name, next: u64, now_unix_ms: u64) {
        let fresh = Entry { next, stored_unix_ms: now_unix_ms, unwritten: true };
        if let Some(entry) = self.entries.get_mut(tag) {
            if !std::mem::replace(entry, fresh).unwritten {
                self.unwritten.push(tag.clone());
            }
            return;
        }
        if self.entries.len() >= MAX_CONSUMERS {
            self.forget_oldest();
        }
        self.entries.insert(tag.clone(), fresh);
        self.unwritten.push(tag.clone());
    }

    fn forget_oldest(&mut self) {
        let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.stored_unix_ms).map(|(tag, _)| tag.clone());
        if let Some(tag) = oldest {
            self.entries.remove(&tag);
            self.forgotten.push(tag);
        }
    }

    /// Moves what the store does not know into the round.
    pub fn drain(&mut self, owner: QueueId, round: &mut RoundBuilder) {
        for tag in self.forgotten.drain(..) {
            if !self.entries.contains_key(&tag) {
                round.delete_note(owner, &key(&tag));
            }
        }
        for tag in self.unwritten.drain(..) {
            let Some(entry) = self.entries.get_mut(&tag) else { continue };
            if std::mem::take(&mut entry.unwritten) {
                let note = [entry.next.to_le_bytes(), entry.stored_unix_ms.to_le_bytes()].concat();
                round.put_note(owner, &key(&tag), &note);
            }
        }
    }
}

fn key(tag: &str) -> Vec<u8> {
    [&[NOTE_KIND], tag.as_bytes()].concat()
}

/// The deliveries of one tracked consumer that wait for their settlement.
#[derive(Debug, Default)]
pub(super) struct Tracker {
    /// In order, with whether they are settled.
    outstanding: VecDeque<(u64, bool)>,
}

impl Tracker {
    /// Notes a delivery; offsets rise.
    pub fn delivered(&mut self, offset: u64) {
        self.outstanding.push_back((offset, false));
    }

    /// Notes a settlement.
    pub fn settled(&mut self, offset: u64) {
        if let Ok(at) = self.outstanding.binary_search_by_key(&offset, |(offset, _)| *offset) {
            self.outstanding[at].1 = true;
        }
        while self.outstanding.front().is_some_and(|(_, settled)| *settled) {
            self.outstanding.pop_front();
        }
    }

    /// Where the consumer goes on if it ends now: at its first unsettled delivery, or at `next` when there is none.
    pub fn resume_at(&self, next: u64) -> u64 {
        self.outstanding.front().map_or(next, |(offset, _)| *offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_in_the_settlements_holds_the_offset_back() {
        let mut tracker = Tracker::default();
        for offset in [3, 4, 7, 9] {
            tracker.delivered(offset);
        }
        assert_eq!(tracker.resume_at(10), 3);
        tracker.settled(4);
        tracker.settled(9);
        assert_eq!(tracker.resume_at(10), 3);
        tracker.settled(3);
        assert_eq!(tracker.resume_at(10), 7);
        tracker.settled(7);
        tracker.settled(8); // never delivered
        assert_eq!(tracker.resume_at(12), 12);
    }

    #[test]
    fn the_consumer_heard_of_longest_ago_is_forgotten() {
        let mut offsets = Offsets::default();
        let tag = |number: usize| Name::from(format!("c{number}"));
        for number in 0..MAX_CONSUMERS {
            offsets.put(&tag(number), number as u64, number as u64);
        }
        offsets.put(&tag(0), 5, 1 << 40);
        offsets.put(&"one more".into(), 6, 1 << 41);
        assert_eq!((offsets.get("c0"), offsets.get("c1"), offsets.get("c2")), (Some(5), None, Some(2)));
        assert_eq!(offsets.get("one more"), Some(6));
    }

    #[test]
    fn damaged_notes_are_left_out() {
        let mut offsets = Offsets::default();
        offsets.recover(b"oa", &[1; 16]);
        offsets.recover(b"ob", &[1; 15]);
        offsets.recover(b"o\xff", &[1; 16]);
        offsets.recover(b"xa", &[2; 16]);
        assert_eq!(offsets.entries.len(), 1);
    }
}
