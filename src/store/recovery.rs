//! Opening: the format check, the definitions, the states, and the encodings of the small records.
//!
//! Start-up reads `meta` and `state`, never a message or a note, so its time depends on the number of queues alone. Only a queue
//! whose state record is damaged has its log read, to count what there is.
//!
//! # Encodings
//! - state: version, CRC-32C over queue id and the rest, then head, `delivered - head`, `tail - head`, count, bytes (varints).
//! - definition: version, CRC-32C over the definition's key and the rest, then the definition as the broker encoded it.
//! - consumed: version, CRC-32C over queue id, segment and the rest, then for each range the distance from the end
//!   of the one before (the first from the segment's start) and the length (varints).

use std::collections::{BTreeMap, HashSet};

use rocksdb::{ColumnFamily, DB, ErrorKind, IteratorMode, WriteBatch, WriteOptions};

use super::read::{Stored, first_placed};
use super::rocks::Rocks;
use super::round::Families;
use super::run::{put_varint, take_varint};
use super::{Durability, QueueId, QueueSeq, QueueStateRecord, Recovered, SEGMENT_RECORDS, StoreError, damage, key};

/// The layout this module reads and writes.
///
/// 2 added the family `notes`, 3 the families `meta_copy`, `bodies` and `body_references` with the second version of runs. A
/// directory of an earlier format is taken over as it is.
pub(super) const FORMAT: u64 = 3;

/// The oldest layout that can be taken over.
const OLDEST_FORMAT: u64 = 1;

/// Queue ids are reserved on disk in blocks of this size.
pub(super) const ID_BLOCK: u64 = 4096;

const STATE_VERSION: u8 = 1;
const CONSUMED_VERSION: u8 = 1;
const DEFINITION_VERSION: u8 = 1;

/// Reads everything that the broker must know at start, and reserves the first block of queue ids.
///
/// # Errors
/// [`StoreError::UnknownFormat`], or [`StoreError::Open`] if RocksDB cannot read the definitions or the states.
pub(super) fn recover(rocks: &Rocks, durability: Durability) -> Result<Recovered, StoreError> {
    let found = read_number(rocks, key::FORMAT_KEY)?;
    if let Some(found) = found.filter(|found| !(OLDEST_FORMAT..=FORMAT).contains(found)) {
        return Err(StoreError::UnknownFormat { path: rocks.path().to_owned(), found, known: FORMAT });
    }
    let (definitions, damaged_definitions) = read_definitions(rocks)?;
    let states = read_states(rocks)?;
    let beyond_states = states.iter().map(|(queue, _)| queue.0 + 1).max().unwrap_or(1);
    let next_queue_id = read_number(rocks, key::RESERVED_IDS_KEY)?.unwrap_or(1).max(beyond_states);
    rocks.open_bodies(read_number(rocks, key::NEXT_BODY_ID_KEY)?.unwrap_or(1))?;
    rocks.note_owners().opened(next_queue_id, rocks.has_any_notes()?);
    reserve(rocks, found, next_queue_id + ID_BLOCK, durability)?;
    Ok(Recovered { definitions, damaged_definitions, states, next_queue_id, healed: Vec::new() })
}

/// Synced where anything is: what stands at the beginning of the WAL must not be in doubt when a later sync fails.
fn reserve(rocks: &Rocks, found: Option<u64>, until: u64, durability: Durability) -> Result<(), StoreError> {
    rocks.with(|db| {
        let families = Families::of(db)?;
        let mut batch = WriteBatch::default();
        if found != Some(FORMAT) {
            for entry in db.iterator_cf(families.meta, IteratorMode::Start) {
                let (key, value) = entry.map_err(|error| rocks.open_error(error))?;
                batch.put_cf(families.meta_copy, key, value);
            }
        }
        for family in [families.meta, families.meta_copy] {
            if found != Some(FORMAT) {
                batch.put_cf(family, key::FORMAT_KEY, FORMAT.to_be_bytes());
            }
            batch.put_cf(family, key::RESERVED_IDS_KEY, until.to_be_bytes());
        }
        let mut options = WriteOptions::default();
        options.set_sync(durability == Durability::Fsync);
        db.write_opt(batch, &options).map_err(|error| rocks.open_error(error))
    })
}

fn read_number(rocks: &Rocks, name: &[u8]) -> Result<Option<u64>, StoreError> {
    rocks.with(|db| {
        let families = Families::of(db)?;
        let number = |family| match db.get_pinned_cf(family, name) {
            Ok(None) => Ok(None),
            Ok(Some(value)) => match <[u8; 8]>::try_from(&*value) {
                Ok(bytes) => Ok(Some(u64::from_be_bytes(bytes))),
                Err(_) => Err(rocks.open_error("its own records in 'meta' are damaged")),
            },
            Err(error) => Err(rocks.open_error(error)),
        };
        number(families.meta).or_else(|error| number(families.meta_copy)?.map_or(Err(error), |found| Ok(Some(found))))
    })
}

/// Keys and values.
type Definitions = Vec<(Vec<u8>, Vec<u8>)>;

/// The definitions, and how many there are beside them that are damaged. The copy is read only if there are any.
fn read_definitions(rocks: &Rocks) -> Result<(Definitions, u64), StoreError> {
    rocks.with(|db| {
        let families = Families::of(db)?;
        let own = read_copy(rocks, db, families.meta)?;
        if own.damaged.is_empty() && own.is_complete {
            return Ok((own.intact.into_iter().collect(), 0));
        }
        let mut copy = read_copy(rocks, db, families.meta_copy)?;
        let mut definitions = own.intact;
        let of_own = own.damaged.iter().filter_map(|key| Some((key.clone(), copy.intact.remove(key)?)));
        definitions.extend(of_own.collect::<Vec<_>>());
        if !own.is_complete {
            definitions.extend(copy.intact); // what the first has behind the place where it cannot be read
        }
        let mut lost: Vec<_> = own.damaged.into_iter().chain(copy.damaged).collect();
        lost.sort_unstable();
        lost.dedup();
        lost.retain(|key| !definitions.contains_key(key));
        for key in &lost {
            tracing::error!(key = %key.escape_ascii(), "a definition is damaged in both copies and was skipped");
        }
        let unknown = u64::from(!own.is_complete && !copy.is_complete);
        Ok((definitions.into_iter().collect(), lost.len() as u64 + unknown))
    })
}

struct DefinitionsRead {
    intact: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Keys whose values are not what was written.
    damaged: Vec<Vec<u8>>,
    /// Nothing was in the way of reading all of them.
    is_complete: bool,
}

fn read_copy(rocks: &Rocks, db: &DB, family: &ColumnFamily) -> Result<DefinitionsRead, StoreError> {
    let mut read = DefinitionsRead { intact: BTreeMap::new(), damaged: Vec::new(), is_complete: true };
    let from = [key::DEFINITION_PREFIX];
    for entry in db.iterator_cf(family, IteratorMode::From(&from, rocksdb::Direction::Forward)) {
        let (key, value) = match entry {
            Ok(entry) => entry,
            Err(error) if is_damage(&error) => {
                rocks.count_damage();
                tracing::error!(%error, "definitions cannot be read to the end");
                read.is_complete = false;
                break;
            }
            Err(error) => return Err(rocks.open_error(error)),
        };
        let Some((&key::DEFINITION_PREFIX, key)) = key.split_first() else { continue };
        match open(&value, DEFINITION_VERSION, key) {
            Some(value) => drop(read.intact.insert(key.to_vec(), value.to_vec())),
            None => {
                rocks.count_damage();
                read.damaged.push(key.to_vec());
            }
        }
    }
    Ok(read)
}

pub(super) fn read_states(rocks: &Rocks) -> Result<Vec<(QueueId, QueueStateRecord)>, StoreError> {
    let (mut states, mut damaged) = (Vec::new(), Vec::new());
    let mut skipped = false;
    rocks.with(|db| {
        let family = Families::of(db)?.state;
        let mut records = db.raw_iterator_cf(family);
        records.seek_to_first();
        let mut last = 0;
        loop {
            while let Some((key, value)) = records.item() {
                match key::parse_queue(key) {
                    Some(queue) => {
                        last = queue.0;
                        match decode_state(queue, value) {
                            Some(state) => states.push((queue, state)),
                            None => damaged.push(queue),
                        }
                    }
                    None => {
                        tracing::error!(?key, "a record in 'state' belongs to no queue; it is ignored");
                        rocks.count_damage();
                    }
                }
                records.next();
            }
            match records.status() {
                Ok(()) => return Ok(()),
                Err(error) if is_damage(&error) => {
                    rocks.count_damage();
                    tracing::error!(%error, behind = last, "states of queues cannot be read and were skipped");
                    let place = |queue: u128| {
                        let mut iterator = db.raw_iterator_cf(family);
                        iterator.seek(key::queue(QueueId(u64::try_from(queue).unwrap_or(u64::MAX))));
                        iterator.status().is_ok().then_some(iterator)
                    };
                    skipped = true;
                    let Some((_, readable)) = first_placed(last.into(), u64::MAX.into(), place) else { return Ok(()) };
                    records = readable;
                }
                Err(error) => return Err(rocks.open_error(error)),
            }
        }
    })?;
    if skipped {
        // A queue without a state would give out its positions again.
        let known: HashSet<_> = states.iter().map(|(queue, _)| *queue).chain(damaged.iter().copied()).collect();
        damaged.extend(damage::log_owners(rocks)?.into_iter().filter(|queue| !known.contains(queue)));
    }
    for queue in damaged {
        rocks.count_damage();
        let state = rebuild_state(rocks, queue)?;
        tracing::error!(
            queue = queue.0,
            messages = state.message_count,
            "the state record of a queue is damaged; it was rebuilt from the queue's log"
        );
        states.push((queue, state));
    }
    states.sort_unstable_by_key(|(queue, _)| *queue);
    Ok(states)
}

/// What a log without a state record amounts to. Errs towards delivering again: what was consumed of the first
/// segment comes back, and everything counts as delivered before. Sizes are those of the records.
pub(super) fn rebuild_state(rocks: &Rocks, queue: QueueId) -> Result<QueueStateRecord, StoreError> {
    let consumed = rocks.read_consumed(queue)?;
    let mut state = QueueStateRecord::default();
    let mut first = None;
    rocks.read_stored(queue, 0, QueueSeq::MAX, usize::MAX, &mut |db, seq, stored| {
        state.tail = seq + 1;
        let bytes = match stored {
            Stored::Whole(record) => record.len() as u64,
            // Without its reference it was consumed, and its body may be gone.
            Stored::Reference(..) if !rocks.is_reference_held(db, queue, seq) => return Ok(0),
            Stored::Reference(reference, head) => head.len() as u64 + reference.body_bytes,
        };
        let after = consumed.partition_point(|(from, _)| *from <= seq);
        if after > 0 && seq < consumed[after - 1].1 {
            return Ok(0);
        }
        first.get_or_insert(seq);
        state.message_count += 1;
        state.message_bytes += bytes;
        Ok(0)
    })?;
    if let Some((_, until)) = consumed.last() {
        state.tail = state.tail.max(*until);
    }
    state.head = first.unwrap_or(state.tail);
    state.delivered = state.tail;
    Ok(state)
}

/// Whether a read failed because of what is (or is not) on the disk, and will fail again.
pub(super) fn is_damage(error: &rocksdb::Error) -> bool {
    match error.kind() {
        ErrorKind::Corruption => true,
        ErrorKind::IOError => {
            let text = error.as_ref();
            text.contains("Input/output error") || text.contains("No such file")
        }
        _ => false,
    }
}

/// A definition as it is stored.
pub(super) fn encode_definition(key: &[u8], value: &[u8]) -> Vec<u8> {
    let mut sealed = begin(DEFINITION_VERSION);
    sealed.extend_from_slice(value);
    seal(sealed, key)
}

pub(super) fn encode_state(queue: QueueId, state: &QueueStateRecord) -> Vec<u8> {
    let mut value = begin(STATE_VERSION);
    put_varint(&mut value, state.head);
    put_varint(&mut value, state.delivered.saturating_sub(state.head));
    put_varint(&mut value, state.tail.saturating_sub(state.head));
    put_varint(&mut value, state.message_count);
    put_varint(&mut value, state.message_bytes);
    seal(value, &key::queue(queue))
}

pub(super) fn decode_state(queue: QueueId, value: &[u8]) -> Option<QueueStateRecord> {
    let mut rest = open(value, STATE_VERSION, &key::queue(queue))?;
    let head = take_varint(&mut rest)?;
    let state = QueueStateRecord {
        head,
        delivered: head.checked_add(take_varint(&mut rest)?)?,
        tail: head.checked_add(take_varint(&mut rest)?)?,
        message_count: take_varint(&mut rest)?,
        message_bytes: take_varint(&mut rest)?,
    };
    rest.is_empty().then_some(state)
}

pub(super) fn encode_consumed(queue: QueueId, segment: u64, ranges: &[(QueueSeq, QueueSeq)]) -> Vec<u8> {
    let mut value = begin(CONSUMED_VERSION);
    let mut end = segment.saturating_mul(SEGMENT_RECORDS);
    for &(from, until) in ranges {
        put_varint(&mut value, from.saturating_sub(end));
        put_varint(&mut value, until.saturating_sub(from));
        end = until;
    }
    seal(value, &key::numbered(queue, segment))
}

/// Appends a segment's ranges to `ranges`; `None` (and nothing appended) if the value is damaged.
pub(super) fn decode_consumed(
    queue: QueueId,
    segment: u64,
    value: &[u8],
    ranges: &mut Vec<(QueueSeq, QueueSeq)>,
) -> Option<()> {
    let mut rest = open(value, CONSUMED_VERSION, &key::numbered(queue, segment))?;
    let mut decoded = Vec::new();
    let mut end = segment.checked_mul(SEGMENT_RECORDS)?;
    while !rest.is_empty() {
        let from = end.checked_add(take_varint(&mut rest)?)?;
        end = from.checked_add(take_varint(&mut rest)?)?;
        decoded.push((from, end));
    }
    ranges.extend(decoded);
    Some(())
}

/// Whether a value of `meta`, `state` or `consumed` is what was written under this key.
pub(super) fn is_intact(family: &str, key: &[u8], value: &[u8]) -> bool {
    match (family, key.split_first()) {
        (key::META | key::META_COPY, Some((&key::DEFINITION_PREFIX, key))) => {
            open(value, DEFINITION_VERSION, key).is_some()
        }
        (key::STATE, _) => key::parse_queue(key).is_some_and(|queue| decode_state(queue, value).is_some()),
        (key::CONSUMED, _) => key::parse_numbered(key)
            .is_some_and(|(queue, segment)| decode_consumed(queue, segment, value, &mut Vec::new()).is_some()),
        _ => false,
    }
}

/// A version byte and room for the checksum.
pub(super) fn begin(version: u8) -> Vec<u8> {
    let mut value = Vec::with_capacity(32);
    value.extend_from_slice(&[version, 0, 0, 0, 0]);
    value
}

/// Fills in the checksum over `key` and what follows.
pub(super) fn seal(mut value: Vec<u8>, key: &[u8]) -> Vec<u8> {
    let crc = crc32c::crc32c_append(crc32c::crc32c(key), &value[5..]);
    value[1..5].copy_from_slice(&crc.to_le_bytes());
    value
}

/// What [`seal`] protects, if it is intact.
pub(super) fn open<'a>(value: &'a [u8], version: u8, key: &[u8]) -> Option<&'a [u8]> {
    let (&found, rest) = value.split_first()?;
    let (crc, rest) = rest.split_first_chunk::<4>()?;
    let intact = crc32c::crc32c_append(crc32c::crc32c(key), rest) == u32::from_le_bytes(*crc);
    (found == version && intact).then_some(rest)
}
