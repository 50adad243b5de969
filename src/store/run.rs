//! Runs: the records of one queue that one round wrote, as one value.
//!
//! A run is a version byte and then, for every record: its position relative to the run's first one (varint), its
//! length (varint), a CRC-32C over queue, position and record (4 bytes, little-endian), and the record. The first
//! position and the queue are in the key. A short record so costs 6 or 7 bytes more than itself, and a damaged one
//! is found without losing its neighbours.
//!
//! A run that was given records whose bodies stand apart (see [`bodies`](super::bodies)) is of the second version: there
//! the length counts twice, plus one for a *reference*, which stands for a record without its body and says which body that
//! is. The checksum of a reference is inverted, so that neither passes for the other.
//!
//! # Invariants
//! - R1: positions ascend within a run, and all are of one segment.
//! - R2: a run is at most [`MAX_RUN_BYTES`] long, unless it is a single record.

use std::ops::Range;

use super::bodies::Reference;
use super::{QueueId, QueueSeq, key};

/// Whole records only.
const RUN_VERSION: u8 = 1;
/// Records and references.
const MIXED_RUN_VERSION: u8 = 2;

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
    /// Which of the split records it has. Unless there are none, `bytes` are only half of it: see
    /// [`RunWriter::encoded`].
    splits: Range<usize>,
}

/// Encodes runs one behind the other into one buffer.
#[derive(Debug, Default)]
pub(super) struct RunWriter {
    buffer: Vec<u8>,
    splits: Vec<Split>,
    open: Option<OpenRun>,
}

/// A record whose body is not in the buffer.
#[derive(Debug)]
struct Split {
    seq: QueueSeq,
    /// Where in the buffer the rest of it is, bare.
    head: Range<usize>,
    body: usize,
}

/// What becomes of the body of a split record.
pub(super) enum Body<'a> {
    /// It is written with the record.
    Inline(&'a [u8]),
    /// It has a place of its own.
    Apart(Reference),
}

#[derive(Clone, Copy, Debug)]
struct OpenRun {
    queue: QueueId,
    first: QueueSeq,
    last: QueueSeq,
    /// Where the run begins in the buffer, and among the split records.
    start: usize,
    first_split: usize,
    /// Bytes of bodies that are not in the buffer.
    beside: usize,
    /// The checksum of the queue id, which every record's checksum goes on from.
    seed: u32,
}

impl RunWriter {
    /// Adds a record, in a new run if the open one cannot take it; the open one is then answered, finished.
    ///
    /// Hot path: once per durable message, under the queue's lock.
    pub fn append(&mut self, queue: QueueId, seq: QueueSeq, record: &[u8]) -> Option<FinishedRun> {
        let (finished, open) = self.open_for(queue, seq, record.len());
        open.last = seq;
        let (relative, crc) = (seq - open.first, checksum(open.seed, seq, record));
        make_room(&mut self.buffer, MAX_HEADER_BYTES + record.len());
        put_record(&mut self.buffer, relative, record.len() as u64, crc);
        self.buffer.extend_from_slice(record);
        finished
    }

    /// As [`RunWriter::append`], of a record that is `head` and behind it a body of `body_bytes`, which the caller keeps as
    /// number `body`.
    pub fn append_split(
        &mut self,
        queue: QueueId,
        seq: QueueSeq,
        head: &[u8],
        body: usize,
        body_bytes: usize,
    ) -> Option<FinishedRun> {
        let (finished, open) = self.open_for(queue, seq, head.len() + body_bytes);
        open.last = seq;
        open.beside += body_bytes;
        let start = self.buffer.len();
        self.buffer.extend_from_slice(head);
        self.splits.push(Split { seq, head: start..self.buffer.len(), body });
        finished
    }

    /// The run that takes a record of `bytes`, and the one before it if that is finished.
    #[inline(always)]
    fn open_for(&mut self, queue: QueueId, seq: QueueSeq, bytes: usize) -> (Option<FinishedRun>, &mut OpenRun) {
        let finished = match &self.open {
            Some(open) if open.takes(queue, seq, self.buffer.len() + bytes) => None,
            _ => self.finish(),
        };
        let (start, first_split) = (self.buffer.len(), self.splits.len());
        let open = self.open.get_or_insert_with(|| OpenRun {
            queue,
            first: seq,
            last: seq,
            start,
            first_split,
            beside: 0,
            seed: crc32c::crc32c(&queue.0.to_le_bytes()),
        });
        if open.start == start {
            self.buffer.push(RUN_VERSION);
        }
        (finished, open)
    }

    /// Ends the open run, if there is one.
    pub fn finish(&mut self) -> Option<FinishedRun> {
        let open = self.open.take()?;
        let (bytes, splits) = (open.start..self.buffer.len(), open.first_split..self.splits.len());
        Some(FinishedRun { queue: open.queue, first: open.first, bytes, splits })
    }

    /// The encoded run. One with split records is put together in `assembled`; `body` says of each where its body goes.
    pub fn encoded<'a, 'b>(
        &'a self,
        run: &FinishedRun,
        assembled: &'a mut Vec<u8>,
        body: &mut dyn FnMut(QueueSeq, usize) -> Body<'b>,
    ) -> &'a [u8] {
        if run.splits.is_empty() {
            return &self.buffer[run.bytes.clone()];
        }
        self.assemble(run, assembled, body);
        assembled
    }

    fn assemble<'b>(&self, run: &FinishedRun, out: &mut Vec<u8>, body: &mut dyn FnMut(QueueSeq, usize) -> Body<'b>) {
        let seed = crc32c::crc32c(&run.queue.0.to_le_bytes());
        out.clear();
        out.push(MIXED_RUN_VERSION);
        let mut at = run.bytes.start + 1;
        for split in &self.splits[run.splits.clone()] {
            self.put_plain(at..split.head.start, out);
            let head = &self.buffer[split.head.clone()];
            let relative = split.seq - run.first;
            match body(split.seq, split.body) {
                Body::Inline(body) => {
                    let crc = crc32c::crc32c_append(checksum(seed, split.seq, head), body);
                    out.reserve(MAX_HEADER_BYTES + head.len() + body.len());
                    put_record(out, relative, ((head.len() + body.len()) as u64) << 1, crc);
                    out.extend_from_slice(head);
                    out.extend_from_slice(body);
                }
                Body::Apart(reference) => {
                    let reference = reference.encode();
                    let crc = crc32c::crc32c_append(checksum(seed, split.seq, &reference), head);
                    put_record(out, relative, ((reference.len() + head.len()) as u64) << 1 | 1, !crc);
                    out.extend_from_slice(&reference);
                    out.extend_from_slice(head);
                }
            }
            at = split.head.end;
        }
        self.put_plain(at..run.bytes.end, out);
    }

    /// Writes whole records of the first version as ones of the second.
    fn put_plain(&self, records: Range<usize>, out: &mut Vec<u8>) {
        let mut rest = &self.buffer[records];
        while let Some((relative, length, crc)) = take_record(&mut rest) {
            let (record, behind) = rest.split_at(length.min(rest.len() as u64) as usize);
            put_record(out, relative, length << 1, crc);
            out.extend_from_slice(record);
            rest = behind;
        }
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
        self.splits.clear();
        self.splits.shrink_to(keep_bytes / size_of::<Split>());
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
            && end + self.beside + MAX_HEADER_BYTES <= self.start + MAX_RUN_BYTES
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

/// A record in an encoded run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub seq: QueueSeq,
    pub bytes: Range<usize>,
    /// The bytes are a [`Reference`] and what stands before the body.
    pub is_reference: bool,
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
    mixed: bool,
}

impl RunReader {
    pub fn new(queue: QueueId, first: QueueSeq) -> RunReader {
        let seed = crc32c::crc32c(&queue.0.to_le_bytes());
        RunReader { first, lowest: first, seed, offset: 0, mixed: false }
    }

    /// The next record's position and place in `run`, the next damage, or nothing at the end.
    pub fn next(&mut self, run: &[u8]) -> Option<Result<Entry, RunDamage>> {
        if self.offset == 0 {
            match run.first() {
                Some(&RUN_VERSION) => self.offset = 1,
                Some(&MIXED_RUN_VERSION) => (self.offset, self.mixed) = (1, true),
                Some(_) => return Some(Err(self.broken_off(run, "unknown version of the run encoding"))),
                None => return Some(Err(self.broken_off(&[0], "empty run"))),
            }
        }
        let mut rest = run.get(self.offset..).filter(|rest| !rest.is_empty())?;
        let Some((seq, length, crc, is_reference)) = self.take_header(&mut rest) else {
            return Some(Err(self.broken_off(run, "record header cannot be read")));
        };
        let start = run.len() - rest.len();
        let bytes = start..start + length;
        self.offset = bytes.end;
        let end = key::segment_start(self.first) + super::SEGMENT_RECORDS;
        let expected = if is_reference { !crc } else { crc };
        if seq < self.lowest || seq >= end || checksum(self.seed, seq, &run[bytes.clone()]) != expected {
            let seq = if (self.lowest..end).contains(&seq) { seq } else { self.lowest };
            return Some(Err(RunDamage { seq, to_the_end: false, reason: "checksum mismatch" }));
        }
        self.lowest = seq + 1;
        Some(Ok(Entry { seq, bytes, is_reference }))
    }

    fn take_header(&self, rest: &mut &[u8]) -> Option<(QueueSeq, usize, u32, bool)> {
        let (relative, mut length, crc) = take_record(rest)?;
        let mut is_reference = false;
        if self.mixed {
            is_reference = length & 1 != 0;
            length >>= 1;
        }
        let length = usize::try_from(length).ok().filter(|length| *length <= rest.len())?;
        Some((self.first.checked_add(relative)?, length, crc, is_reference))
    }

    fn broken_off(&mut self, run: &[u8], reason: &'static str) -> RunDamage {
        self.offset = run.len();
        RunDamage { seq: self.lowest, to_the_end: true, reason }
    }
}

fn checksum(seed: u32, seq: QueueSeq, record: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c_append(seed, &seq.to_le_bytes()), record)
}

/// Appends what stands before a record: its relative position, its length as the version has it, its checksum.
#[inline(always)]
fn put_record(buffer: &mut Vec<u8>, relative: u64, length: u64, crc: u32) {
    put_varint(buffer, relative);
    put_varint(buffer, length);
    buffer.extend_from_slice(&crc.to_le_bytes());
}

/// The inverse of [`put_record`].
fn take_record(rest: &mut &[u8]) -> Option<(u64, u64, u32)> {
    let (relative, length) = (take_varint(rest)?, take_varint(rest)?);
    let (crc, record) = rest.split_first_chunk::<4>()?;
    *rest = record;
    Some((relative, length, u32::from_le_bytes(*crc)))
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
        let bytes = |run: &FinishedRun| writer.encoded(run, &mut Vec::new(), &mut |_, _| unreachable!()).to_vec();
        finished.iter().map(|run| (run.first, bytes(run))).collect()
    }

    fn decode(first: QueueSeq, run: &[u8]) -> (Records, Vec<RunDamage>) {
        let (mut records, mut damage) = (Vec::new(), Vec::new());
        let mut reader = RunReader::new(QUEUE, first);
        while let Some(next) = reader.next(run) {
            match next {
                Ok(entry) => records.push((entry.seq, run[entry.bytes].to_vec())),
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
            let bodies: Vec<_> = std::iter::from_fn(|| reader.next(&run)).flatten().filter(|entry| !entry.bytes.is_empty()).collect();
            prop_assume!(!bodies.is_empty());
            let Entry { seq, bytes: range, .. } = bodies[at.index(bodies.len())].clone();
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
