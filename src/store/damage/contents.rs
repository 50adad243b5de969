//! What a database holds after damage: writing again what was found elsewhere, making its parts agree, counting what is lost.

use std::collections::{BTreeMap, BTreeSet};

use rocksdb::{BottommostLevelCompaction, ColumnFamily, CompactOptions, DB, IteratorMode, WriteBatch};

use super::super::recovery::{self, rebuild_state};
use super::super::rocks::Rocks;
use super::super::run::RunReader;
use super::super::{Durability, QueueId, QueueSeq, QueueStateRecord, StoreError, key};
use super::batch::is_whole_value;
use super::repair::BlobFiles;
use super::report::{DamageReport, QueueLoss};
use super::{blob, read_optional, table};

/// Type of an entry that is a value, and of one whose value is in a blob file.
const VALUE: u8 = 1;
const BLOB_INDEX: u8 = 0x11;

/// More ranges of missing positions are not told apart.
const MAX_RANGES: usize = 10_000;

/// What was taken out of the database, and may be found elsewhere.
#[derive(Debug, Default)]
pub struct Restored {
    /// Contents of tables by the names of their families.
    pub tables: Vec<(String, Vec<u8>)>,
    /// Where keys may be missing.
    pub ranges: Vec<KeyRange>,
    pub blob_files: BlobFiles,
    pub logs_were_healed: bool,
}

/// Keys behind one and up to another.
#[derive(Debug)]
pub struct KeyRange {
    pub family: String,
    pub after: Vec<u8>,
    pub until: Vec<u8>,
}

impl Restored {
    fn has_lost_of(&self, family: &str) -> bool {
        self.ranges.iter().any(|range| range.family == family)
    }
}

/// Writes what was found of damaged tables and is not in the database.
pub fn restore(rocks: &Rocks, restored: &Restored) -> Result<(), StoreError> {
    for (family, data) in &restored.tables {
        let mut large = BTreeSet::new();
        for (key, _, kind, value) in table::salvage(data) {
            match kind {
                VALUE => restore_entry(rocks, family, &key, &value)?,
                BLOB_INDEX => drop(large.insert(key)),
                _ => {}
            }
        }
        if family == key::NOTES {
            restore_large(rocks, restored, family, &|key| large.contains(key))?;
        }
    }
    let within = |family: &str, key: &[u8]| {
        restored
            .ranges
            .iter()
            .any(|range| range.family == family && key > range.after.as_slice() && key <= range.until.as_slice())
    };
    // A note that is not there was deleted, most likely; only next to a damaged block it is likelier to be lost.
    if restored.has_lost_of(key::LOG) {
        restore_large(rocks, restored, key::LOG, &|key| within(key::LOG, key))?;
    }
    if restored.has_lost_of(key::BODIES) {
        restore_large(rocks, restored, key::BODIES, &|key| within(key::BODIES, key))?;
    }
    let blocks_only = !restored.tables.iter().any(|(family, _)| family == key::NOTES);
    if restored.has_lost_of(key::NOTES) && blocks_only {
        restore_large(rocks, restored, key::NOTES, &|key| within(key::NOTES, key))?;
    }
    Ok(())
}

/// Writes the values of blob files whose keys are wanted and not there.
fn restore_large(
    rocks: &Rocks,
    restored: &Restored,
    family: &str,
    wanted: &dyn Fn(&[u8]) -> bool,
) -> Result<(), StoreError> {
    for (path, known) in restored.blob_files.get(family).into_iter().flatten() {
        let data = read_optional(path).map_err(|error| rocks.open_error(error))?;
        let Some(data) = data else { continue };
        let mut outcome = Ok(());
        blob::scan(&data, known, &mut |record| {
            if outcome.is_ok()
                && wanted(record.key)
                && let Some(value) = record.value()
            {
                outcome = restore_entry(rocks, family, record.key, &value);
            }
        });
        outcome?;
    }
    Ok(())
}

/// Writes an entry unless the database has a later one. A value says by itself which is later, where that matters.
fn restore_entry(rocks: &Rocks, family: &str, key: &[u8], value: &[u8]) -> Result<(), StoreError> {
    if !is_whole_value(family, key, value) && family != key::LOG {
        return Ok(());
    }
    rocks.with(|db| {
        let handle = db.cf_handle(family).ok_or(StoreError::Closed)?;
        let there = db.get_cf(handle, key).unwrap_or(None);
        let is_wanted = match (family, &there) {
            (key::LOG, None) => is_unconsumed(db, key, value)?,
            (key::BODIES, None) => is_referred_to(db, key)?,
            (key::STATE, Some(there)) => is_later_state(key, value, there),
            (key::CONSUMED, Some(there)) => covered(key, value) > covered(key, there),
            (_, None) => true,
            (_, Some(_)) => false,
        };
        match is_wanted {
            true => db.put_cf(handle, key, value).map_err(|error| rocks.open_error(error)),
            false => Ok(()),
        }
    })
}

/// Whether a run has records at or behind its queue's head. What is before it was deleted.
fn is_unconsumed(db: &DB, key: &[u8], value: &[u8]) -> Result<bool, StoreError> {
    let Some((queue, first)) = key::parse_numbered(key) else { return Ok(false) };
    let states = db.cf_handle(key::STATE).ok_or(StoreError::Closed)?;
    let state = db.get_cf(states, key::queue(queue)).unwrap_or(None);
    let Some(state) = state.and_then(|state| recovery::decode_state(queue, &state)) else { return Ok(true) };
    let mut reader = RunReader::new(queue, first);
    let last = std::iter::from_fn(|| reader.next(value)).flatten().last();
    Ok(last.is_some_and(|entry| entry.seq >= state.head))
}

/// Whether a body has references. What has none was deleted.
fn is_referred_to(db: &DB, key: &[u8]) -> Result<bool, StoreError> {
    let references = db.cf_handle(key::BODY_REFERENCES).ok_or(StoreError::Closed)?;
    let count = key::parse_body(key).map(|id| db.get_cf(references, key::body_count(id)).unwrap_or(None));
    Ok(count.flatten().is_some())
}

fn is_later_state(key: &[u8], value: &[u8], there: &[u8]) -> bool {
    let Some(queue) = key::parse_queue(key) else { return false };
    let place = |value| recovery::decode_state(queue, value).map(|state| (state.tail, state.head, state.delivered));
    place(value) > place(there)
}

/// How many positions a consumed set has.
fn covered(key: &[u8], value: &[u8]) -> u64 {
    let Some((queue, segment)) = key::parse_numbered(key) else { return 0 };
    let mut ranges = Vec::new();
    recovery::decode_consumed(queue, segment, value, &mut ranges);
    ranges.iter().map(|(from, until)| until - from).sum()
}

/// Makes definitions, states and logs agree after something may have been lost of any of them.
pub fn mend(rocks: &Rocks, restored: &Restored, report: &mut DamageReport) -> Result<(), StoreError> {
    let (lost, copy_lost) = (restored.has_lost_of(key::META), restored.has_lost_of(key::META_COPY));
    report.definitions = agree_on_definitions(rocks, lost, copy_lost)?;
    if restored.logs_were_healed || !restored.ranges.is_empty() || !restored.tables.is_empty() {
        mend_states(rocks)?;
    }
    Ok(())
}

/// As [`mend`], at a start that has healed the write-ahead log.
pub fn mend_after_healing(rocks: &Rocks) -> Result<(), StoreError> {
    agree_on_definitions(rocks, false, false)?;
    mend_states(rocks)
}

/// Gives both copies of the definitions what either has. A copy that has lost something follows the other one, also in what
/// is deleted. Answers the keys of definitions that are intact in neither.
fn agree_on_definitions(rocks: &Rocks, lost: bool, copy_lost: bool) -> Result<Vec<Vec<u8>>, StoreError> {
    rocks.with(|db| {
        let handle = |name| db.cf_handle(name).ok_or(StoreError::Closed);
        let (own, copy) = (handle(key::META)?, handle(key::META_COPY)?);
        let (own_entries, copy_entries) = (entries_of(rocks, db, own), entries_of(rocks, db, copy));
        if copy_entries.is_empty() && !copy_lost {
            return Ok(Vec::new()); // a directory of an earlier version
        }
        let mut batch = WriteBatch::default();
        let mut neither = Vec::new();
        let keys: BTreeSet<_> = own_entries.keys().chain(copy_entries.keys()).collect();
        for name in keys {
            let intact = |entries: &BTreeMap<Vec<u8>, Vec<u8>>| {
                entries.get(name).filter(|value| is_whole_value(key::META, name, value)).cloned()
            };
            let (here, there) = (intact(&own_entries), intact(&copy_entries));
            let is_deleted = (lost && !copy_lost && !copy_entries.contains_key(name))
                || (copy_lost && !lost && !own_entries.contains_key(name));
            if is_deleted && name.first() == Some(&key::DEFINITION_PREFIX) {
                batch.delete_cf(own, name);
                batch.delete_cf(copy, name);
                continue;
            }
            let value = match (here.clone(), there.clone()) {
                (Some(here), Some(there)) if name == key::RESERVED_IDS_KEY => here.max(there),
                (Some(_), Some(there)) if lost && !copy_lost => there,
                (Some(here), _) => here,
                (None, Some(there)) => there,
                (None, None) => {
                    neither.push(name.clone());
                    continue;
                }
            };
            if here.as_ref() != Some(&value) {
                batch.put_cf(own, name, &value);
            }
            if there.as_ref() != Some(&value) {
                batch.put_cf(copy, name, &value);
            }
        }
        db.write(batch).map_err(|error| rocks.open_error(error))?;
        Ok(neither)
    })
}

/// What can be read of a family; reading ends where it cannot go on.
fn entries_of(rocks: &Rocks, db: &DB, family: &ColumnFamily) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut entries = BTreeMap::new();
    for entry in db.iterator_cf(family, IteratorMode::Start) {
        match entry {
            Ok((key, value)) => drop(entries.insert(key.into_vec(), value.into_vec())),
            Err(error) => {
                rocks.count_damage();
                tracing::error!(%error, "definitions cannot be read to the end");
                break;
            }
        }
    }
    entries
}

/// Gives every log a state that has room for all its records: positions must not be given out twice.
fn mend_states(rocks: &Rocks) -> Result<(), StoreError> {
    let states: BTreeMap<_, _> = recovery::read_states(rocks)?.into_iter().collect();
    for queue in log_owners(rocks)? {
        let state = match states.get(&queue) {
            None => rebuild_state(rocks, queue)?,
            Some(state) => match with_records_behind(rocks, queue, *state)? {
                Some(state) => state,
                None => continue,
            },
        };
        tracing::error!(
            queue = queue.0,
            tail = state.tail,
            "the state of a queue was behind its records; it follows them"
        );
        rocks.with(|db| {
            let family = db.cf_handle(key::STATE).ok_or(StoreError::Closed)?;
            let value = recovery::encode_state(queue, &state);
            db.put_cf(family, key::queue(queue), value).map_err(|error| rocks.open_error(error))
        })?;
    }
    Ok(())
}

/// The state with the records at and behind its tail, if there are any.
fn with_records_behind(
    rocks: &Rocks,
    queue: QueueId,
    mut state: QueueStateRecord,
) -> Result<Option<QueueStateRecord>, StoreError> {
    let (mut count, mut bytes, mut tail) = (0, 0, state.tail);
    rocks.read_records(queue, state.tail, QueueSeq::MAX, usize::MAX, &mut |seq, record| {
        (count, bytes, tail) = (count + 1, bytes + record.len() as u64, seq + 1);
    })?;
    if count == 0 {
        return Ok(None);
    }
    state.tail = tail;
    state.message_count += count;
    state.message_bytes += bytes;
    Ok(Some(state))
}

/// The queues that have records.
pub fn log_owners(rocks: &Rocks) -> Result<Vec<QueueId>, StoreError> {
    rocks.with(|db| {
        let family = db.cf_handle(key::LOG).ok_or(StoreError::Closed)?;
        let mut owners = Vec::new();
        let mut runs = db.raw_iterator_cf(family);
        runs.seek_to_first();
        loop {
            while let Some((queue, _)) = runs.key().and_then(key::parse_numbered) {
                owners.push(queue);
                runs.seek(key::after_queue(queue));
            }
            let Err(error) = runs.status() else { return Ok(owners) };
            // Something in the next queue's first run is damaged: go on behind it.
            let next = QueueId(owners.last().map_or(0, |last: &QueueId| last.0) + 1);
            tracing::error!(%error, "a run cannot be read");
            owners.push(next);
            runs = db.raw_iterator_cf(family);
            runs.seek(key::after_queue(next));
            if owners.len() > usize::from(u16::MAX) * 64 {
                return Ok(owners);
            }
        }
    })
}

/// Reads everything and counts what is missing, into `report`.
///
/// `noted_tails` are the tails of queues before the write-ahead log lost its end.
pub fn survey(
    rocks: &Rocks,
    noted_tails: &BTreeMap<QueueId, QueueSeq>,
    report: &mut DamageReport,
) -> Result<(), StoreError> {
    let recovered = recovery::recover(rocks, Durability::Fsync)?;
    report.intact_definitions = recovered.definitions;
    let mut states: BTreeMap<_, _> = recovered.states.into_iter().collect();
    for queue in noted_tails.keys() {
        states.entry(*queue).or_default();
    }
    for (queue, state) in states {
        report.logs += 1;
        let noted_tail = noted_tails.get(&queue).copied().unwrap_or(0).max(state.tail);
        let consumed = rocks.read_consumed(queue)?;
        let mut gaps = Gaps { at: state.head, consumed: &consumed, missing: Vec::new() };
        let mut found = 0;
        rocks.read_records(queue, state.head, state.tail, usize::MAX, &mut |seq, _| {
            report.records += 1;
            found += u64::from(gaps.pass(seq));
        })?;
        gaps.end(noted_tail);
        let expected = state.message_count + (noted_tail - state.tail);
        if found < expected {
            report.queues.push(QueueLoss { queue, expected, found, missing: gaps.missing });
        }
    }
    for owner in rocks.read_note_owners()? {
        rocks.read_notes(owner, &[], &[0xff; 32], usize::MAX, &mut |_, _| report.notes += 1)?;
    }
    report.unreadable_notes = rocks.take_unreadable_notes();
    Ok(())
}

/// Collects the positions that are neither consumed nor there.
struct Gaps<'a> {
    at: QueueSeq,
    consumed: &'a [(QueueSeq, QueueSeq)],
    missing: Vec<(QueueSeq, QueueSeq)>,
}

impl Gaps<'_> {
    /// Takes the next position that has a record. False if that is consumed.
    fn pass(&mut self, seq: QueueSeq) -> bool {
        self.end(seq);
        self.at = seq + 1;
        let after = self.consumed.partition_point(|(from, _)| *from <= seq);
        !(after > 0 && seq < self.consumed[after - 1].1)
    }

    /// Everything up to `end` that was not passed is missing, unless it is consumed.
    fn end(&mut self, end: QueueSeq) {
        let mut from = self.at;
        let first = self.consumed.partition_point(|(_, until)| *until <= from);
        for &(start, until) in self.consumed[first..].iter().take_while(|(start, _)| *start < end) {
            self.add(from, start);
            from = from.max(until);
        }
        self.add(from, end);
        self.at = self.at.max(end);
    }

    fn add(&mut self, from: QueueSeq, until: QueueSeq) {
        if from >= until {
            return;
        }
        let full = self.missing.len() >= MAX_RANGES;
        match self.missing.last_mut() {
            Some(last) if last.1 == from || full => last.1 = until,
            _ => self.missing.push((from, until)),
        }
    }
}

/// Takes out the keys of what could not be read, and writes the tables anew that have blocks taken out, so that nothing of
/// the damage is met again.
pub fn settle(rocks: &Rocks, restored: &Restored) -> Result<(), StoreError> {
    let unreadable = rocks.take_unreadable();
    rocks.with(|db| {
        let failed = |error| rocks.open_error(error);
        let log = db.cf_handle(key::LOG).ok_or(StoreError::Closed)?;
        for (queue, from, until) in unreadable {
            db.delete_range_cf(log, key::numbered(queue, from), key::numbered(queue, until)).map_err(failed)?;
        }
        let mut options = CompactOptions::default();
        options.set_bottommost_level_compaction(BottommostLevelCompaction::Force);
        for range in &restored.ranges {
            if let Some(family) = db.cf_handle(&range.family) {
                db.compact_range_cf_opt(family, Some(&range.after), Some(&range.until), &options);
            }
        }
        let large = [key::LOG, key::NOTES, key::BODIES];
        let small = [key::META, key::META_COPY, key::STATE, key::CONSUMED, key::BODY_REFERENCES];
        for name in small.into_iter().chain(large) {
            if let Some(family) = db.cf_handle(name) {
                db.flush_cf(family).map_err(failed)?;
            }
        }
        Ok(())
    })
}
