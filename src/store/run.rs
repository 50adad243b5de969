//! Runs: the records of one queue that one round wrote, as one value.
//!
//! A run is a version byte and then, for every record: its position relative to the run's first one (varint), its
//! length (varint), a CRC-32C over queue, position and record (4 bytes, little-endian), and the record. The first
//! position and the queue are in the key. A short record so costs 6 or 7 bytes more than itself, and a damaged one
//! is found without losing its neighbours.
//!
//! # Invariants
//! - R1: positions ascend within a run, and all are of one segment.
//! - R2: a run is at most [`MAX_RUN_BYTES`] long, unless it is a single record.

use std::ops::Range;

use super::{QueueId, QueueSeq, key};

/// The only version of the encoding so far.
const RUN_VERSION: u8 = 1;

/// What a run is cut at. Large enough for few keys, small enough that a read of a few records reads little more.
pub(super) const MAX_RUN_BYTES: usize = 256 * 1024;

/// Steps by which a large buffer grows.
const GROWTH_BYTES: usize = 1024 * 1024;

/// Most that [`RunWriter::append`] puts before a record.
const MAX_HEADER_BYTES: usize = 2 * MAX_VARINT_BYTES + 4;

/// Ten groups of seven bits hold a `u64`.
const MAX_VARINT_BYTES: usize = 10;

/// Where a finished run lies in its writer's buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FinishedRun {
    pub queue: QueueId,
    pub first: QueueSeq,
    pub bytes: Range<usize>,
}

/// Encodes runs one behind the other into one buffer.
#[derive(Debug, Default)]
pub(super) struct RunWriter {
    buffer: Vec<u8>,
    open: Option<OpenRun>,
}

#[derive(Clone, Copy, Debug)]
struct OpenRun {
    queue: QueueId,
    first: QueueSeq,
    last: QueueSeq,
    /// Where the run begins in the buffer.
    start: usize,
    /// The checksum of the queue id, which every record's checksum goes on from.
    seed: u32,
}

impl RunWriter {
    /// Adds a record, in a new run if the open one cannot take it; the open one is then answered, finished.
    ///
    /// Hot path: once per durable message, under the queue's lock.
    pub fn append(&mut self, queue: QueueId, seq: QueueSeq, record: &[u8]) -> Option<FinishedRun> {
        let finished = match &self.open {
            Some(open) if open.takes(queue, seq, self.buffer.len() + record.len()) => None,
            _ => self.finish(),
        };
        let start = self.buffer.len();
        let open = self.open.get_or_insert_with(|| OpenRun {
            queue,
            first: seq,
            last: seq,
            start,
            seed: crc32c::crc32c(&queue.0.to_le_bytes()),
        });
        if open.start == start {
            self.buffer.push(RUN_VERSION);
        }
        open.last = seq;
        make_room(&mut self.buffer, MAX_HEADER_BYTES + record.len());
        put_varint(&mut self.buffer, seq - open.first);
        put_varint(&mut self.buffer, record.len() as u64);
        self.buffer.extend_from_slice(&checksum(open.seed, seq, record).to_le_bytes());
        self.buffer.extend_from_slice(record);
        finished
    }

    /// Ends the open run, if there is one.
    pub fn finish(&mut self) -> Option<FinishedRun> {
        let open = self.open.take()?;
        Some(FinishedRun { queue: open.queue, first: open.first, bytes: open.start..self.buffer.len() })
    }

    /// The buffer that [`FinishedRun::bytes`] points into.
    pub fn bytes(&self, run: &FinishedRun) -> &[u8] {
        &self.buffer[run.bytes.clone()]
    }

    /// Bytes of all runs so far.
    pub fn len(&self) -> usize {
        self.buffer.len()
    }

    /// Forgets all runs, and gives back memory beyond `keep_bytes`.
    pub fn clear(&mut self, keep_bytes: usize) {
        self.open = None;
        self.buffer.clear();
        self.buffer.shrink_to(keep_bytes);
    }
}

/// Large buffers grow by steps: doubling would have as much again reserved for nothing.
#[inline]
fn make_room(buffer: &mut Vec<u8>, bytes: usize) {
    if buffer.capacity() - buffer.len() < bytes {
        match buffer.capacity() {
            0..GROWTH_BYTES => buffer.reserve(bytes),
            _ => buffer.reserve_exact(bytes.max(GROWTH_BYTES)),
        }
    }
}

impl OpenRun {
    fn takes(&self, queue: QueueId, seq: QueueSeq, end: usize) -> bool {
        self.queue == queue
            && seq > self.last
            && key::segment_start(seq) == key::segment_start(self.first)
            && end + MAX_HEADER_BYTES <= self.start + MAX_RUN_BYTES
    }
}

/// A piece of a run that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RunDamage {
    /// The position it claims, or the first it could be about.
    pub seq: QueueSeq,
    /// Nothing behind it in the run can be read either.
    pub to_the_end: bool,
    pub reason: &'static str,
}

/// A position in an encoded run. It does not hold the bytes, so that it can live beside their owner; every call
/// must be given the same ones.
#[derive(Clone, Copy, Debug)]
pub(super) struct RunReader {
    first: QueueSeq,
    /// The next record must not be before it.
    lowest: QueueSeq,
    seed: u32,
    offset: usize,
}

impl RunReader {
    pub fn new(queue: QueueId, first: QueueSeq) -> RunReader {
        RunReader { first, lowest: first, seed: crc32c::crc32c(&queue.0.to_le_bytes()), offset: 0 }
    }

    /// The next record's position and place in `run`, the next damage, or nothing at the end.
    pub fn next(&mut self, run: &[u8]) -> Option<Result<(QueueSeq, Range<usize>), RunDamage>> {
        if self.offset == 0 {
            match run.first() {
                Some(&RUN_VERSION) => self.offset = 1,
                Some(_) => return Some(Err(self.broken_off(run, "unknown version of the run encoding"))),
                None => return Some(Err(self.broken_off(&[0], "empty run"))),
            }
        }
        let mut rest = run.get(self.offset..).filter(|rest| !rest.is_empty())?;
        let Some((seq, length, crc)) = self.take_header(&mut rest) else {
            return Some(Err(self.broken_off(run, "record header cannot be read")));
        };
        let start = run.len() - rest.len();
        let record = start..start + length;
        self.offset = record.end;
        let end = key::segment_start(self.first) + super::SEGMENT_RECORDS;
        if seq < self.lowest || seq >= end || checksum(self.seed, seq, &run[record.clone()]) != crc {
            let seq = if (self.lowest..end).contains(&seq) { seq } else { self.lowest };
            return Some(Err(RunDamage { seq, to_the_end: false, reason: "checksum mismatch" }));
        }
        self.lowest = seq + 1;
        Some(Ok((seq, record)))
    }

    fn take_header(&self, rest: &mut &[u8]) -> Option<(QueueSeq, usize, u32)> {
        let seq = self.first.checked_add(take_varint(rest)?)?;
        let length = usize::try_from(take_varint(rest)?).ok()?;
        let (crc, record) = rest.split_first_chunk::<4>()?;
        *rest = record;
        (length <= record.len()).then_some((seq, length, u32::from_le_bytes(*crc)))
    }

    fn broken_off(&mut self, run: &[u8], reason: &'static str) -> RunDamage {
        self.offset = run.len();
        RunDamage { seq: self.lowest, to_the_end: true, reason }
    }
}

fn checksum(seed: u32, seq: QueueSeq, record: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c_append(seed, &seq.to_le_bytes()), record)
}

/// Appends `value`, seven bits a byte, the lowest first.
pub(super) fn put_varint(buffer: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        buffer.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    buffer.push(value as u8);
}

/// Takes what [`put_varint`] wrote off the front of `rest`; nothing if it breaks off or does not fit a `u64`.
pub(super) fn take_varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for (index, &byte) in rest.iter().take(MAX_VARINT_BYTES).enumerate() {
        let bits = u64::from(byte & 0x7f);
        let shift = 7 * index as u32;
        if bits << shift >> shift != bits {
            return None;
        }
        value |= bits << shift;
        if byte < 0x80 {
            *rest = &rest[index + 1..];
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::super::SEGMENT_RECORDS;
    use super::*;

    const QUEUE: QueueId = QueueId(7);

    type Records = Vec<(QueueSeq, Vec<u8>)>;

    fn encode(records: &[(QueueSeq, Vec<u8>)]) -> Vec<(QueueSeq, Vec<u8>)> {
        let mut writer = RunWriter::default();
        let mut finished: Vec<_> = records.iter().filter_map(|(seq, r)| writer.append(QUEUE, *seq, r)).collect();
        finished.extend(writer.finish());
        finished.iter().map(|run| (run.first, writer.bytes(run).to_vec())).collect()
    }

    fn decode(first: QueueSeq, run: &[u8]) -> (Records, Vec<RunDamage>) {
        let (mut records, mut damage) = (Vec::new(), Vec::new());
        let mut reader = RunReader::new(QUEUE, first);
        while let Some(next) = reader.next(run) {
            match next {
                Ok((seq, range)) => records.push((seq, run[range].to_vec())),
                Err(found) => damage.push(found),
            }
        }
        (records, damage)
    }

    fn records() -> impl Strategy<Value = Records> {
        let start = prop_oneof![Just(0), 0..3 * SEGMENT_RECORDS, Just(u64::MAX / 2)];
        let record = vec(any::<u8>(), 0..200);
        (start, vec((prop_oneof![4 => Just(1u64), 1 => 1..3000u64], record), 1..60)).prop_map(|(start, steps)| {
            let mut seq = start;
            steps
                .into_iter()
                .map(|(step, record)| {
                    seq += step;
                    (seq, record)
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn runs_read_back_as_written_and_stay_within_a_segment(records in records()) {
            let mut read = Records::new();
            for (first, run) in encode(&records) {
                let (part, damage) = decode(first, &run);
                prop_assert_eq!(damage, vec![]);
                prop_assert!(part.iter().all(|(seq, _)| key::segment_start(*seq) == key::segment_start(first)));
                read.extend(part);
            }
            prop_assert_eq!(read, records);
        }

        #[test]
        fn a_flipped_bit_in_a_record_costs_that_record_and_no_other(records in records(), at: prop::sample::Index, bit in 0..8u8) {
            let (first, run) = encode(&records).remove(0);
            let (whole, _) = decode(first, &run);
            let mut reader = RunReader::new(QUEUE, first);
            let bodies: Vec<_> = std::iter::from_fn(|| reader.next(&run)).flatten().filter(|(_, r)| !r.is_empty()).collect();
            prop_assume!(!bodies.is_empty());
            let (seq, range) = bodies[at.index(bodies.len())].clone();
            let mut broken = run.clone();
            broken[range.start + at.index(range.len())] ^= 1 << bit;

            let (read, damage) = decode(first, &broken);

            prop_assert_eq!(damage, vec![RunDamage { seq, to_the_end: false, reason: "checksum mismatch" }]);
            prop_assert_eq!(read, whole.into_iter().filter(|(other, _)| *other != seq).collect::<Vec<_>>());
        }

        #[test]
        fn whatever_the_bytes_nothing_wrong_is_read(records in records(), at: prop::sample::Index, byte: u8, cut: prop::sample::Index) {
            let (first, mut run) = encode(&records).remove(0);
            let (whole, _) = decode(first, &run);
            let index = at.index(run.len());
            run[index] = byte;
            run.truncate(cut.index(run.len() + 1));
            let (read, _) = decode(first, &run);
            prop_assert!(read.iter().all(|record| whole.contains(record)));
        }

        #[test]
        fn random_bytes_are_no_run(run in vec(any::<u8>(), 0..300), first: u32) {
            let (read, _) = decode(u64::from(first), &run);
            prop_assert_eq!(read, vec![]);
        }

        #[test]
        fn varints_read_back(value: u64, tail in vec(any::<u8>(), 0..3)) {
            let mut bytes = Vec::new();
            put_varint(&mut bytes, value);
            bytes.extend_from_slice(&tail);
            let mut rest = bytes.as_slice();
            prop_assert_eq!(take_varint(&mut rest), Some(value));
            prop_assert_eq!(rest, &tail[..]);
        }
    }

    #[test]
    fn a_short_record_costs_at_most_seven_bytes_more_than_itself() {
        let records: Records = (0..SEGMENT_RECORDS).map(|seq| (seq, vec![1; 16])).collect();
        let runs = encode(&records);
        assert_eq!(runs.len(), 1);
        assert!(runs[0].1.len() <= records.len() * (16 + 7), "{} bytes", runs[0].1.len());
    }

    #[test]
    fn a_run_is_cut_at_its_limit_and_a_huge_record_stands_alone() {
        let records: Records = (0..40).map(|seq| (seq, vec![2; 20_000])).chain([(40, vec![3; 1 << 20])]).collect();
        let runs = encode(&records);
        assert!(runs[..runs.len() - 1].iter().all(|(_, run)| run.len() <= MAX_RUN_BYTES));
        assert_eq!(runs.last().map(|(first, _)| *first), Some(40));
        assert_eq!(runs.iter().map(|(first, run)| decode(*first, run).0.len()).sum::<usize>(), records.len());
    }

    #[test]
    fn a_record_is_not_accepted_under_another_queue_or_position() {
        let (first, run) = encode(&[(5, b"body".to_vec())]).remove(0);
        assert_eq!(decode(first + 1, &run).0, vec![]);
        let mut other = RunReader::new(QueueId(8), first);
        assert!(matches!(other.next(&run), Some(Err(RunDamage { seq: 5, to_the_end: false, .. }))));
        assert!(other.next(&run).is_none());
    }

    #[test]
    fn an_endless_or_too_large_varint_is_refused() {
        assert_eq!(take_varint(&mut [0x80u8; 11].as_slice()), None);
        assert_eq!(take_varint(&mut [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02].as_slice()), None);
        assert_eq!(take_varint(&mut [].as_slice()), None);
    }
}
