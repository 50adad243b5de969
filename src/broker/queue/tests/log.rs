//! The log against a model, and what it makes of chunks.

use std::collections::BTreeMap;

use bytes::Bytes;
use proptest::{collection::vec, prelude::*};

use super::*;
use crate::broker::queue::{
    chunk::Chunk,
    log::{Peek, QueueLog},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Ready { handed_out: bool },
    Out,
    Consumed,
}

#[derive(Clone, Debug)]
enum LogStep {
    Append { count: u64, bytes: usize, persistent: bool },
    Take { count: usize },
    Consume { at: usize },
    GiveBack { at: usize },
    Purge,
    Evict,
}

fn log_step() -> impl Strategy<Value = LogStep> {
    prop_oneof![
        4 => (1u64..40, prop_oneof![8usize..100, Just(20_000usize)], prop::bool::weighted(0.7))
            .prop_map(|(count, bytes, persistent)| LogStep::Append { count, bytes, persistent }),
        4 => (1usize..40).prop_map(|count| LogStep::Take { count }),
        6 => (0usize..200).prop_map(|at| LogStep::Consume { at }),
        3 => (0usize..200).prop_map(|at| LogStep::GiveBack { at }),
        1 => Just(LogStep::Purge),
        3 => Just(LogStep::Evict),
    ]
}

/// A log, what it should know, and a store of what left its memory.
struct LogSubject {
    log: QueueLog,
    budget: Arc<MemoryBudget>,
    names: Vec<u8>,
    /// Place, body length, persistent.
    model: BTreeMap<u64, (Place, usize, bool)>,
    stored: BTreeMap<u64, Vec<u8>>,
}

impl LogSubject {
    fn new() -> LogSubject {
        let budget = Arc::new(MemoryBudget::new(0));
        LogSubject {
            log: QueueLog::new(budget.clone()),
            budget,
            names: encode_names(b"x", b"key"),
            model: BTreeMap::new(),
            stored: BTreeMap::new(),
        }
    }

    fn nth(&self, at: usize, place: impl Fn(Place) -> bool) -> Option<u64> {
        let all: Vec<u64> = self.model.iter().filter(|(_, (at, ..))| place(*at)).map(|(seq, _)| *seq).collect();
        (!all.is_empty()).then(|| all[at % all.len()])
    }

    fn set(&mut self, seq: u64, place: Place) {
        self.model.get_mut(&seq).expect("known").0 = place;
    }

    fn run(&mut self, step: LogStep) {
        match step {
            LogStep::Append { count, bytes, persistent } => {
                for _ in 0..count {
                    let body = body_of(self.log.tail(), bytes);
                    let shared = Bytes::from(body.clone());
                    let body = if bytes < SHARED_BODY_BYTES { Body::Inline(&body) } else { Body::Shared(&shared) };
                    let seq = self.log.append(
                        &Message { names: &self.names, properties: &[0, 0], body, persistent, extension: &[] },
                        0,
                        || 0,
                    );
                    self.model.insert(seq, (Place::Ready { handed_out: false }, bytes, persistent));
                }
            }
            LogStep::Take { count } => (0..count).for_each(|_| self.take()),
            LogStep::Consume { at } => {
                if let Some(seq) = self.nth(at, |place| place == Place::Out) {
                    self.log.consume(seq);
                    self.set(seq, Place::Consumed);
                }
            }
            LogStep::GiveBack { at } => {
                if let Some(seq) = self.nth(at, |place| place == Place::Out) {
                    self.log.give_back(seq);
                    self.set(seq, Place::Ready { handed_out: true });
                }
            }
            LogStep::Purge => {
                let purged: u64 = self.log.purge().into_iter().map(|(start, end)| end - start).sum();
                let ready: Vec<u64> = self
                    .model
                    .iter()
                    .filter(|(_, (place, ..))| matches!(place, Place::Ready { .. }))
                    .map(|(seq, _)| *seq)
                    .collect();
                assert_eq!(purged, ready.len() as u64);
                ready.into_iter().for_each(|seq| self.set(seq, Place::Consumed));
            }
            LogStep::Evict => {
                let stored = &mut self.stored;
                self.log.for_each_durable(0, &mut |seq, record, body| {
                    let mut whole = record.to_vec();
                    body.into_iter().for_each(|body| record::whole(record, body, &mut whole));
                    stored.insert(seq, whole);
                });
                let committed_to = self.log.tail();
                self.log.page_out(committed_to, false, usize::MAX, &mut Vec::new(), &mut |seq, record| {
                    assert!(stored.insert(seq, record.to_vec()).is_none(), "{seq} is paged out twice");
                });
                self.log.end_paging(true);
                self.log.evict(committed_to, false);
            }
        }
        self.check();
    }

    /// Takes the next one, from the store if it has to be.
    fn take(&mut self) {
        let expected = self
            .model
            .iter()
            .find_map(|(&seq, &(place, ..))| (place == Place::Ready { handed_out: true }).then_some((seq, true)))
            .or_else(|| {
                self.model.iter().find_map(|(&seq, &(place, ..))| {
                    (place == Place::Ready { handed_out: false }).then_some((seq, false))
                })
            });
        let mut lost = 0;
        loop {
            match self.log.peek(&mut lost) {
                Peek::Empty => return assert_eq!(expected, None),
                Peek::Absent(at) => {
                    assert!(!self.log.is_resident(at));
                    let until = self.log.resident_after(at).min(at + 50);
                    let mut chunk = Chunk::new(at, CHUNK_BYTES, self.budget.clone());
                    self.stored.range(at..until).for_each(|(seq, record)| chunk.append_record(*seq, record, None));
                    chunk.cover(until);
                    self.log.install(chunk);
                    assert!(self.log.is_resident(at));
                }
                Peek::Ready { seq, redelivered, message } => {
                    assert_eq!(Some((seq, redelivered)), expected);
                    let (_, bytes, persistent) = self.model[&seq];
                    assert_eq!(
                        (message.body.as_slice(), message.persistent, message.names),
                        (&body_of(seq, bytes)[..], persistent, &self.names[..])
                    );
                    self.log.take(seq, redelivered);
                    break;
                }
            }
        }
        assert_eq!(lost, 0, "records that were stored count as lost");
        self.set(expected.expect("checked above").0, Place::Out);
    }

    fn check(&self) {
        let is_open = |(_, (place, ..)): &(&u64, &(Place, usize, bool))| *place != Place::Consumed;
        let head = self.model.iter().find(is_open).map_or(self.log.tail(), |(seq, _)| *seq);
        assert_eq!(self.log.head(), head);
        assert!(self.log.head() <= self.log.next() && self.log.next() <= self.log.tail());
        for (&seq, &(place, ..)) in &self.model {
            assert_eq!(seq < self.log.head() || self.log.consumed().contains(seq), place == Place::Consumed);
        }
        assert_eq!(self.log.has_ready(), self.model.values().any(|(place, ..)| matches!(place, Place::Ready { .. })));
        let mut durable = Vec::new();
        self.log.for_each_durable(0, &mut |seq, _, _| durable.push(seq));
        let resident = |seq: &u64| self.log.is_resident(*seq);
        let expected: Vec<u64> =
            self.model.iter().filter(|of| is_open(of) && of.1.2).map(|(seq, _)| *seq).filter(resident).collect();
        assert_eq!(durable, expected);
        assert_eq!(self.budget.used_bytes(), self.log.resident_bytes());
        if head == self.log.tail() {
            assert!(self.log.resident_bytes() <= 4 << 10, "{} bytes in an empty log", self.log.resident_bytes());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_log_keeps_positions_places_and_memory(steps in vec(log_step(), 1..100)) {
        let mut subject = LogSubject::new();
        for step in steps {
            subject.run(step);
        }
        subject.run(LogStep::Take { count: subject.model.len() });
        while let Some(seq) = subject.nth(7, |place| place == Place::Out) {
            subject.log.consume(seq);
            subject.set(seq, Place::Consumed);
        }
        subject.check();
    }

    #[test]
    fn a_recovered_log_hands_out_again_what_was_not_consumed(head in 0u64..50, delivered in 0u64..60, len in 0u64..60, consumed in vec((0u64..15, 1u64..6), 0..8)) {
        let tail = head + len;
        let mut ranges = Vec::new();
        let mut at = head;
        for (gap, length) in consumed {
            let (start, end) = (at + gap + 1, at + gap + 1 + length);
            if end <= tail {
                ranges.push((start, end));
            }
            at = end;
        }
        let budget = Arc::new(MemoryBudget::new(0));
        let mut log = QueueLog::recovered(budget.clone(), head, delivered, tail, &ranges);
        let is_consumed = |seq: u64| seq < head || ranges.iter().any(|&(start, end)| (start..end).contains(&seq));
        let cursor = ranges.iter().map(|range| range.1).fold(delivered.clamp(head, tail), u64::max);
        let mut chunk = Chunk::new(head, 0, budget);
        for seq in head..tail {
            let mut record = Vec::new();
            record::encode(&mut record, &Message { names: &[0, 0], properties: &[0, 0], body: Body::Inline(b"x"), persistent: true, extension: &[] }, 0);
            chunk.append_record(seq, &record, None);
        }
        log.install(chunk);
        let mut handed_out = Vec::new();
        let mut lost = 0;
        while let Peek::Ready { seq, redelivered, .. } = log.peek(&mut lost) {
            handed_out.push((seq, redelivered));
            log.take(seq, redelivered);
        }
        let expected: Vec<(u64, bool)> = (head..tail).filter(|&seq| !is_consumed(seq)).map(|seq| (seq, seq < cursor)).collect();
        prop_assert_eq!(handed_out, expected);
        prop_assert_eq!(lost, 0);
    }
}

#[test]
fn positions_without_a_record_are_passed_over_and_counted() {
    let budget = Arc::new(MemoryBudget::new(0));
    let mut log = QueueLog::recovered(budget.clone(), 10, 10, 20, &[]);
    let mut chunk = Chunk::new(10, 0, budget.clone());
    let mut record = Vec::new();
    record::encode(
        &mut record,
        &Message { names: &[0, 0], properties: &[0, 0], body: Body::Inline(b"x"), persistent: true, extension: &[] },
        0,
    );
    chunk.append_record(12, &record, None);
    chunk.append_record(17, &record, None);
    chunk.append_record(18, b"not a record", None);
    chunk.cover(20);
    log.install(chunk);
    let mut lost = 0;
    for expected in [12, 17] {
        let Peek::Ready { seq, redelivered: false, .. } = log.peek(&mut lost) else {
            panic!("position {expected} is there")
        };
        assert_eq!(seq, expected);
        log.take(seq, false);
        log.consume(seq);
    }
    // The chunk went with its last record; what is behind it is looked up, and found to be nothing.
    let Peek::Absent(18) = log.peek(&mut lost) else { panic!("nothing is known of position 18") };
    let mut chunk = Chunk::new(18, 0, budget);
    chunk.cover(20);
    log.install(chunk);
    assert!(matches!(log.peek(&mut lost), Peek::Empty));
    assert_eq!((lost, log.head(), log.next()), (8, 20, 20));
    assert!(log.resident_bytes() <= 4 << 10);
}

#[test]
fn chunks_that_come_late_or_hold_nothing_do_not_stay() {
    let record = || {
        let message =
            Message { names: &[0, 0], properties: &[0, 0], body: Body::Inline(b"x"), persistent: true, extension: &[] };
        let mut bytes = Vec::new();
        record::encode(&mut bytes, &message, 0);
        bytes
    };
    // Read ahead, and consumed by somebody else's reading meanwhile.
    let budget = Arc::new(MemoryBudget::new(0));
    let mut log = QueueLog::recovered(budget.clone(), 0, 0, 10, &[]);
    let read = || {
        let mut chunk = Chunk::new(0, CHUNK_BYTES, budget.clone());
        (0..5).for_each(|seq| chunk.append_record(seq, &record(), None));
        chunk
    };
    let late = read();
    log.install(read());
    for seq in 0..5 {
        log.take(seq, false);
        log.consume(seq);
    }
    log.install(late);
    assert_eq!((log.head(), log.resident_bytes()), (5, 0));
    // The end of the chunk was consumed before a restart, and the beginning is gone.
    let mut log = QueueLog::recovered(budget.clone(), 0, 10, 20, &[(8, 10)]);
    let mut chunk = Chunk::new(0, CHUNK_BYTES, budget.clone());
    chunk.cover(10);
    log.install(chunk);
    let mut lost = 0;
    assert!(matches!(log.peek(&mut lost), Peek::Absent(10)));
    assert_eq!((lost, log.head(), log.resident_bytes()), (8, 10, 0));
}
