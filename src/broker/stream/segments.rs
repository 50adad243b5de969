//! The segments of a stream: what retention counts and drops. A segment is an entry of a list, kept as a note, so that
//! opening a stream needs no look at its records.
//!
//! # Invariants
//! - G1: segments are in order and without gaps; the first begins at the stream's head, the last one is open and never dropped.
//! - G2: times do not fall within a stream, even if the clock does.

use std::collections::VecDeque;

use crate::{
    broker::rules::StreamRules,
    store::{QueueId, RoundBuilder},
};

/// RabbitMQ's default for `x-stream-max-segment-size-bytes`.
pub(super) const DEFAULT_SEGMENT_BYTES: u64 = 500_000_000;
/// Segments a stream has before they grow with it, whatever size was asked for: the list is in memory.
const MAX_SEGMENTS: u64 = 8192;

/// What stands before a segment's first offset in the key of its note.
pub(super) const NOTE_KIND: u8 = b's';
const NOTE_BYTES: usize = 32;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Segment {
    first: u64,
    first_unix_ms: u64,
    last_unix_ms: u64,
    /// Bytes of its records.
    bytes: u64,
    /// Of these, bytes of bodies.
    body_bytes: u64,
    unwritten: bool,
}

/// See the module.
pub(super) struct Segments {
    /// Never empty.
    list: VecDeque<Segment>,
    bytes: u64,
    body_bytes: u64,
    /// First offsets of dropped segments whose notes are still in the store.
    dropped: Vec<u64>,
}

impl Segments {
    /// One open segment that begins at `first`.
    pub fn new(first: u64) -> Self {
        let list = VecDeque::from([Segment { first, ..Segment::default() }]);
        Segments { list, bytes: 0, body_bytes: 0, dropped: Vec::new() }
    }

    /// The segments of a recovered stream, from their notes in the order of their keys. What no note tells of is taken for
    /// as old as what follows it.
    pub fn recovered(head: u64, tail: u64, notes: Vec<(Vec<u8>, Vec<u8>)>, now_unix_ms: u64) -> Self {
        let mut list: VecDeque<Segment> = notes.iter().filter_map(|(key, value)| decode(key, value)).collect();
        list.retain(|segment| segment.first >= head && segment.first <= tail);
        if list.front().is_none_or(|first| first.first > head) {
            let unix_ms = list.front().map_or(if tail > head { now_unix_ms } else { 0 }, |next| next.first_unix_ms);
            list.push_front(Segment {
                first: head,
                first_unix_ms: unix_ms,
                last_unix_ms: unix_ms,
                unwritten: true,
                ..Segment::default()
            });
        }
        let bytes = list.iter().map(|segment| segment.bytes).sum();
        let body_bytes = list.iter().map(|segment| segment.body_bytes).sum();
        Segments { list, bytes, body_bytes, dropped: Vec::new() }
    }

    /// The first retained offset.
    #[inline]
    pub fn head(&self) -> u64 {
        self.list.front().map_or(0, |segment| segment.first)
    }

    /// Body bytes of everything retained.
    pub fn body_bytes(&self) -> u64 {
        self.body_bytes
    }

    /// How many there are.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// The latest time of any record; 0 before the first one.
    #[inline]
    pub fn last_unix_ms(&self) -> u64 {
        self.list.back().map_or(0, |segment| segment.last_unix_ms)
    }

    /// The time of the first retained record, if there is any.
    pub fn first_unix_ms(&self) -> Option<u64> {
        self.list.front().map(|segment| segment.first_unix_ms).filter(|&unix_ms| unix_ms > 0)
    }

    /// Counts a run of records that ends the stream.
    #[inline]
    pub fn appended(&mut self, bytes: u64, body_bytes: u64, now_unix_ms: u64) {
        let Some(open) = self.list.back_mut() else { return };
        if open.bytes == 0 {
            open.first_unix_ms = now_unix_ms;
        }
        open.last_unix_ms = now_unix_ms;
        open.bytes += bytes;
        open.body_bytes += body_bytes;
        open.unwritten = true;
        self.bytes += bytes;
        self.body_bytes += body_bytes;
    }

    /// Begins a new segment at `tail` if the open one is complete; answers whether it did.
    #[inline]
    pub fn roll(&mut self, tail: u64, rules: &StreamRules) -> bool {
        let limit = rules.segment_bytes.unwrap_or(DEFAULT_SEGMENT_BYTES).max(self.bytes / MAX_SEGMENTS);
        let Some(open) = self.list.back() else { return false };
        if open.bytes < limit.max(1) {
            return false;
        }
        let last_unix_ms = open.last_unix_ms;
        self.list.push_back(Segment { first: tail, first_unix_ms: last_unix_ms, last_unix_ms, ..Segment::default() });
        true
    }

    /// Drops whole segments from the start that are too old or too many, never the open one. Answers the bytes dropped.
    pub fn retain(&mut self, rules: &StreamRules, now_unix_ms: u64) -> u64 {
        let too_old = rules.max_age_ms.map(|age| now_unix_ms.saturating_sub(age));
        let max_bytes = rules.max_bytes.unwrap_or(u64::MAX);
        let mut dropped_bytes = 0;
        while self.list.len() > 1 {
            let Some(first) = self.list.front() else { break };
            let is_old = too_old.is_some_and(|limit| first.last_unix_ms < limit);
            if !is_old && self.bytes <= max_bytes {
                break;
            }
            self.bytes -= first.bytes;
            self.body_bytes -= first.body_bytes;
            dropped_bytes += first.bytes;
            self.dropped.push(first.first);
            self.list.pop_front();
        }
        dropped_bytes
    }

    /// Where the first record from `unix_ms` on has to be: offsets from the first to before the second, which may be
    /// past the tail.
    pub fn find(&self, unix_ms: u64) -> (u64, u64) {
        let index = self.list.partition_point(|segment| segment.last_unix_ms < unix_ms);
        match self.list.get(index) {
            Some(segment) => (segment.first, self.list.get(index + 1).map_or(u64::MAX, |next| next.first)),
            None => (self.list.back().map_or(0, |open| open.first), u64::MAX),
        }
    }

    /// Moves what the store does not know into the round.
    pub fn drain(&mut self, owner: QueueId, round: &mut RoundBuilder) {
        for first in self.dropped.drain(..) {
            round.delete_note(owner, &key(first));
        }
        // Only the last ones change.
        for segment in self.list.iter_mut().rev().take_while(|segment| segment.unwritten) {
            segment.unwritten = false;
            round.put_note(owner, &key(segment.first), &encode(segment));
        }
        self.dropped.shrink_to(64);
    }
}

/// The key of the note of the segment that begins at `first`.
pub(super) fn key(first: u64) -> [u8; 9] {
    let mut key = [NOTE_KIND; 9];
    key[1..].copy_from_slice(&first.to_be_bytes());
    key
}

fn encode(segment: &Segment) -> [u8; NOTE_BYTES] {
    let mut note = [0; NOTE_BYTES];
    let numbers = [segment.first_unix_ms, segment.last_unix_ms, segment.bytes, segment.body_bytes];
    for (place, number) in note.chunks_exact_mut(8).zip(numbers) {
        place.copy_from_slice(&number.to_le_bytes());
    }
    note
}

fn decode(key: &[u8], note: &[u8]) -> Option<Segment> {
    let (&NOTE_KIND, first) = key.split_first()? else { return None };
    let number = |at: usize| Some(u64::from_le_bytes(*note.get(at..)?.first_chunk()?));
    Some(Segment {
        first: u64::from_be_bytes(first.try_into().ok()?),
        first_unix_ms: number(0)?,
        last_unix_ms: number(8)?,
        bytes: number(16)?,
        body_bytes: number(24)?,
        unwritten: false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(segment_bytes: u64, times: &[u64]) -> (Segments, StreamRules) {
        let rules = StreamRules { segment_bytes: Some(segment_bytes), ..StreamRules::default() };
        let mut segments = Segments::new(0);
        for (tail, &unix_ms) in times.iter().enumerate() {
            segments.roll(tail as u64, &rules);
            segments.appended(100, 40, unix_ms);
        }
        (segments, rules)
    }

    #[test]
    fn retention_drops_whole_segments_and_never_the_open_one() {
        let (mut segments, rules) = filled(200, &[1, 2, 3, 4, 5, 6, 7]);
        assert_eq!((segments.len(), segments.body_bytes()), (4, 280));
        assert_eq!(segments.retain(&StreamRules { max_bytes: Some(300), ..rules }, 0), 400);
        assert_eq!((segments.head(), segments.len(), segments.body_bytes()), (4, 2, 120));
        assert_eq!(segments.retain(&StreamRules { max_bytes: Some(0), ..rules }, 0), 200);
        assert_eq!((segments.head(), segments.len()), (6, 1));
        assert_eq!(segments.retain(&StreamRules { max_age_ms: Some(1), ..rules }, 1_000), 0);
    }

    #[test]
    fn a_segment_is_too_old_when_its_last_record_is() {
        let (mut segments, rules) = filled(200, &[10, 20, 30, 40, 50]);
        let rules = StreamRules { max_age_ms: Some(100), ..rules };
        assert_eq!(segments.retain(&rules, 120), 0);
        assert_eq!(segments.retain(&rules, 121), 200);
        assert_eq!((segments.head(), segments.first_unix_ms()), (2, Some(30)));
    }

    #[test]
    fn times_are_found_by_segment() {
        let (segments, _) = filled(200, &[10, 20, 30, 40, 50]);
        assert_eq!(segments.find(0), (0, 2));
        assert_eq!(segments.find(20), (0, 2));
        assert_eq!(segments.find(21), (2, 4));
        assert_eq!(segments.find(50), (4, u64::MAX));
        assert_eq!(segments.find(51), (4, u64::MAX));
    }

    #[test]
    fn notes_bring_the_list_back_and_a_missing_one_is_made_up_for() {
        let (segments, _) = filled(200, &[10, 20, 30, 40, 50]);
        let mut notes: Vec<(Vec<u8>, Vec<u8>)> =
            segments.list.iter().map(|segment| (key(segment.first).to_vec(), encode(segment).to_vec())).collect();
        let read = Segments::recovered(0, 5, notes.clone(), 99);
        let written = |segments: &Segments| -> Vec<_> {
            segments.list.iter().map(|segment| Segment { unwritten: false, ..*segment }).collect()
        };
        assert_eq!(written(&read), written(&segments));
        assert_eq!((read.bytes, read.body_bytes), (500, 200));
        notes.remove(0);
        let read = Segments::recovered(0, 5, notes, 99);
        assert_eq!((read.head(), read.len(), read.first_unix_ms()), (0, 3, Some(30)));
        let none = Segments::recovered(7, 9, vec![(b"s".to_vec(), b"short".to_vec())], 99);
        assert_eq!((none.head(), none.len(), none.last_unix_ms()), (7, 1, 99));
    }

    #[test]
    fn tiny_segments_grow_with_the_stream() {
        let (mut segments, rules) =
            (Segments::new(0), StreamRules { segment_bytes: Some(1), ..StreamRules::default() });
        for tail in 0..50_000 {
            segments.roll(tail, &rules);
            segments.appended(100, 0, tail);
        }
        assert!(segments.len() < 3 * MAX_SEGMENTS as usize, "{}", segments.len());
    }
}
