//! RocksDB's log format, which write-ahead logs and MANIFESTs are written in.
//!
//! Blocks of 32 KiB, in them fragments: masked CRC-32C (4 bytes) over what follows, length (2), type (1), for recyclable
//! logs the low half of the log's number (4), payload. A record is one FULL fragment, or FIRST, any MIDDLE, LAST. What
//! a block has left when no header fits is zeros.
//!
//! # Damage
//! A reader of RocksDB's ends at the first fragment that is not intact, or leaves out the rest of the block. [`walk`] finds
//! the next intact fragment instead and answers what lies between as a damaged one, so that the record it belongs to can
//! be put together, holes and all. A log that simply ends (nothing intact behind) has a tail, not damage.

use std::ops::Range;

use super::bytes::{fixed32, masked_crc};

pub const BLOCK_BYTES: usize = 32 * 1024;
const HEADER_BYTES: usize = 7;
const RECYCLABLE_HEADER_BYTES: usize = 11;

const FULL: u8 = 1;
const FIRST: u8 = 2;
const MIDDLE: u8 = 3;
const LAST: u8 = 4;
/// What recyclable types have in addition.
const RECYCLABLE: u8 = 4;

/// A record of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Where its first fragment's header lies.
    pub at: usize,
    pub pieces: Vec<Range<usize>>,
    /// Its beginning is missing.
    pub headless: bool,
    /// Some of it is not what was written.
    pub damaged: bool,
}

impl Record {
    pub fn bytes(&self, data: &[u8]) -> Vec<u8> {
        self.pieces.iter().flat_map(|piece| &data[piece.clone()]).copied().collect()
    }

    /// The first twelve bytes, without putting the rest together.
    pub fn head(&self, data: &[u8]) -> Option<[u8; 12]> {
        let mut bytes = self.pieces.iter().flat_map(|piece| &data[piece.clone()]);
        let mut head = [0; 12];
        for byte in &mut head {
            *byte = *bytes.next()?;
        }
        Some(head)
    }
}

/// What a log holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Walk {
    pub records: Vec<Record>,
    /// Where the last intact fragment ends.
    pub end: usize,
    /// What may be a last record of which something is missing, from its first fragment on.
    pub torn: Option<Record>,
    /// It is torn because the file ends, and for no other reason.
    pub is_cut: bool,
}

impl Walk {
    pub fn is_damaged(&self) -> bool {
        self.records.iter().any(|record| record.damaged)
    }

    /// How many records there are up to the last intact one. What stands behind it may be damaged, or may never have been
    /// written as a whole.
    pub fn proven(&self) -> usize {
        self.records.iter().rposition(|record| !record.damaged).map_or(0, |last| last + 1)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Full,
    First,
    Middle,
    Last,
}

enum Parsed {
    Intact(Kind, Range<usize>),
    /// No fragment of this log begins here: zeros, an earlier log's, or the end of the file.
    Nothing,
    Bad,
}

/// Reads a log. `number` is that of a write-ahead log; a MANIFEST has none, and fragments of recyclable logs count as bad
/// there.
pub fn walk(data: &[u8], number: Option<u64>) -> Walk {
    let mut walk = Walk::default();
    let mut open: Option<Record> = None;
    let mut at = 0;
    loop {
        at = skip_trailer(data, at);
        match parse(data, at, number) {
            Parsed::Intact(kind, payload) => {
                let end = payload.end;
                take(&mut walk, &mut open, at, kind, payload, false);
                at = end;
                walk.end = end;
            }
            _ => {
                let Some(next) = next_intact(data, at, number) else {
                    walk.is_cut = is_cut(data, at);
                    walk.torn = torn_tail(data, at, number, open);
                    return walk;
                };
                let payload = damaged_payload(data, at, next, number);
                let continues = matches!(parse(data, next, number), Parsed::Intact(Kind::Middle | Kind::Last, _));
                let kind = match (open.is_some(), continues) {
                    (false, false) => Kind::Full,
                    (false, true) => Kind::First,
                    (true, true) => Kind::Middle,
                    (true, false) => Kind::Last,
                };
                take(&mut walk, &mut open, at, kind, payload, true);
                at = next;
            }
        }
    }
}

/// Adds a fragment to the record it belongs to.
fn take(walk: &mut Walk, open: &mut Option<Record>, at: usize, kind: Kind, payload: Range<usize>, damaged: bool) {
    let begins = matches!(kind, Kind::Full | Kind::First);
    if begins && let Some(cut) = open.take() {
        walk.records.push(Record { damaged: true, ..cut }); // its end is missing
    }
    // Without a beginning, the beginning is missing.
    let record = open.get_or_insert_with(|| Record { at, pieces: Vec::new(), headless: !begins, damaged: !begins });
    record.pieces.push(payload);
    record.damaged |= damaged;
    if matches!(kind, Kind::Full | Kind::Last) {
        walk.records.extend(open.take());
    }
}

/// Over the end of a block that no header fits into.
fn skip_trailer(data: &[u8], at: usize) -> usize {
    let left = BLOCK_BYTES - at % BLOCK_BYTES;
    let empty = |end: usize| data.get(at..end).is_some_and(|rest| rest.iter().all(|byte| *byte == 0));
    match left < HEADER_BYTES || (left < RECYCLABLE_HEADER_BYTES && empty(at + left)) {
        true => at + left,
        false => at,
    }
}

/// Kind, header bytes and payload bytes of the header at `at`, if it is one of this log by its looks.
fn header(data: &[u8], at: usize, number: Option<u64>) -> Option<(Kind, usize, usize)> {
    let found = *data.get(at + 6)?;
    let (kind, header_bytes) = match found {
        FULL..=LAST => (found, HEADER_BYTES),
        5..=8 => (found - RECYCLABLE, RECYCLABLE_HEADER_BYTES),
        _ => return None,
    };
    if header_bytes == RECYCLABLE_HEADER_BYTES && fixed32(data, at + 7)? != number? as u32 {
        return None;
    }
    let length = usize::from(u16::from_le_bytes([data[at + 4], data[at + 5]]));
    let left = (BLOCK_BYTES - at % BLOCK_BYTES).min(data.len() - at);
    let kind = match kind {
        FULL => Kind::Full,
        FIRST => Kind::First,
        MIDDLE => Kind::Middle,
        _ => Kind::Last,
    };
    (header_bytes + length <= left).then_some((kind, header_bytes, length))
}

fn parse(data: &[u8], at: usize, number: Option<u64>) -> Parsed {
    let Some(rest) = data.get(at..).filter(|rest| rest.len() >= HEADER_BYTES) else { return Parsed::Nothing };
    let Some((kind, header_bytes, length)) = header(data, at, number) else {
        let zeros = rest[..HEADER_BYTES].iter().all(|byte| *byte == 0);
        return if zeros { Parsed::Nothing } else { Parsed::Bad };
    };
    let end = at + header_bytes + length;
    match fixed32(data, at) == Some(masked_crc(&data[at + 6..end])) {
        true => Parsed::Intact(kind, at + header_bytes..end),
        false => Parsed::Bad,
    }
}

fn is_intact(data: &[u8], at: usize, number: Option<u64>) -> bool {
    matches!(parse(data, at, number), Parsed::Intact(..))
}

/// Where the next intact fragment begins after `from`, where none does. Every block begins with one, so that only blocks
/// with damage are searched byte by byte.
fn next_intact(data: &[u8], from: usize, number: Option<u64>) -> Option<usize> {
    let block_end = |at: usize| (at / BLOCK_BYTES + 1) * BLOCK_BYTES;
    let within = |from: usize| (from..block_end(from).min(data.len())).find(|at| is_intact(data, *at, number));
    if let Some(at) = within(from + 1) {
        return Some(at);
    }
    let first_block = block_end(from);
    let whole = (first_block..data.len()).step_by(BLOCK_BYTES).find(|at| is_intact(data, *at, number))?;
    (first_block..whole).step_by(BLOCK_BYTES).find_map(|at| within(at + 1)).or(Some(whole))
}

/// What the fragment at `at` holds that is not intact, when the next intact one is at `next`.
fn damaged_payload(data: &[u8], at: usize, next: usize, number: Option<u64>) -> Range<usize> {
    if let Some((_, header_bytes, length)) = header(data, at, number) {
        let end = at + header_bytes + length;
        if skip_trailer(data, end) == next {
            return at + header_bytes..end;
        }
    }
    let header_bytes = if number.is_some() { RECYCLABLE_HEADER_BYTES } else { HEADER_BYTES };
    (at + header_bytes).min(next)..next
}

/// Whether the file ends before the fragment at `at` does.
fn is_cut(data: &[u8], at: usize) -> bool {
    let Some(rest) = data.get(at..).filter(|rest| rest.len() >= HEADER_BYTES) else { return true };
    let length = HEADER_BYTES + usize::from(u16::from_le_bytes([rest[4], rest[5]]));
    (FULL..=LAST).contains(&rest[6]) && length > rest.len() && at % BLOCK_BYTES + length <= BLOCK_BYTES
}

/// What stands at the end of the log and is not whole.
fn torn_tail(data: &[u8], at: usize, number: Option<u64>, open: Option<Record>) -> Option<Record> {
    let header_bytes = if number.is_some() { RECYCLABLE_HEADER_BYTES } else { HEADER_BYTES };
    let start = (at + header_bytes).min(data.len());
    let block_end = ((at / BLOCK_BYTES + 1) * BLOCK_BYTES).min(data.len()).max(start);
    let rest = match header(data, at, number) {
        Some((_, header_bytes, length)) => at + header_bytes..at + header_bytes + length,
        None => start..block_end,
    };
    let bad = matches!(parse(data, at, number), Parsed::Bad);
    let mut torn = match open {
        Some(record) => Record { damaged: true, ..record },
        None if bad => Record { at, pieces: Vec::new(), headless: false, damaged: true },
        None => return None,
    };
    if bad {
        torn.pieces.push(rest);
    }
    Some(torn)
}

/// Appends records to a log that is `out.len()` long, in the format without a number.
pub fn append(out: &mut Vec<u8>, record: &[u8]) {
    let mut rest = record;
    let mut first = true;
    loop {
        let left = BLOCK_BYTES - out.len() % BLOCK_BYTES;
        if left < HEADER_BYTES {
            out.resize(out.len() + left, 0);
            continue;
        }
        let (payload, after) = rest.split_at(rest.len().min(left - HEADER_BYTES));
        let kind = match (first, after.is_empty()) {
            (true, true) => FULL,
            (true, false) => FIRST,
            (false, false) => MIDDLE,
            (false, true) => LAST,
        };
        let start = out.len();
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&(payload.len() as u16).to_le_bytes());
        out.push(kind);
        out.extend_from_slice(payload);
        let crc = masked_crc(&out[start + 6..]);
        out[start..start + 4].copy_from_slice(&crc.to_le_bytes());
        (rest, first) = (after, false);
        if rest.is_empty() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    fn records() -> impl Strategy<Value = Vec<Vec<u8>>> {
        vec((any::<u8>(), prop_oneof![4 => 12..200usize, 1 => 0..100_000usize]), 1..40)
            .prop_map(|sizes| sizes.into_iter().map(|(seed, size)| noise(seed, size)).collect())
    }

    fn noise(seed: u8, size: usize) -> Vec<u8> {
        (0..size).map(|index| (index as u32).wrapping_mul(0x9e37_79b1 ^ u32::from(seed)).to_be_bytes()[0]).collect()
    }

    fn log(records: &[Vec<u8>]) -> Vec<u8> {
        let mut data = Vec::new();
        records.iter().for_each(|record| append(&mut data, record));
        data
    }

    fn intact(data: &[u8], walk: &Walk) -> Vec<Vec<u8>> {
        walk.records.iter().filter(|record| !record.damaged).map(|record| record.bytes(data)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn logs_read_back_as_written(records in records()) {
            let data = log(&records);
            let walk = walk(&data, None);
            prop_assert_eq!(intact(&data, &walk), records);
            prop_assert!(!walk.is_damaged() && walk.torn.is_none() && walk.end == data.len());
        }

        #[test]
        fn a_flipped_bit_costs_one_record_which_is_there_but_for_it(records in records(), at: prop::sample::Index, bit in 0..8u8) {
            let mut data = log(&records);
            let at = at.index(data.len());
            data[at] ^= 1 << bit;
            let walk = walk(&data, None);
            let found = intact(&data, &walk);
            prop_assert!(found.len() + 1 >= records.len());
            prop_assert!(found.iter().all(|record| records.contains(record)));
            let last_is_torn = walk.torn.is_some();
            prop_assert!(last_is_torn || walk.records.len() == records.len());
        }

        #[test]
        fn a_log_that_ends_early_has_a_tail_and_no_damage(records in records(), at: prop::sample::Index) {
            let mut data = log(&records);
            data.truncate(at.index(data.len()));
            let walk = walk(&data, None);
            prop_assert!(!walk.is_damaged());
            prop_assert_eq!(&intact(&data, &walk)[..], &records[..walk.records.len()]);
        }
    }
}
