//! Notes: small records of an owner in the order of their keys, which the owner chooses. For what is not a message in
//! a queue's log: attempts of deliveries, known ids, messages that are not due yet.
//!
//! An owner is a [`QueueId`], whether it is a queue or something else with state of its own. A note is written with the
//! round that carries it, in the same batch as the records and states of that round.
//!
//! # Encoding
//! Key: owner id, then the note's key. Value: version, CRC-32C over the whole key and the value, then the value.
//!
//! # Deletion
//! Notes are mostly deleted one by one, and in the end all at once with their owner. The latter is a range tombstone,
//! which an owner that never had a note must not pay for: most queues never have one. So the owners that wrote notes
//! since the start are remembered, and an older one is looked up when it ends.

use std::collections::HashSet;
use std::ops::Range;

use parking_lot::Mutex;
use rocksdb::{ColumnFamily, DB, DBRawIterator, ReadOptions};

use super::read::{READAHEAD_BYTES, first_placed, read_error};
use super::recovery::is_damage;
use super::rocks::Rocks;
use super::{QueueId, RoundBuilder, StoreError, key};

const NOTE_VERSION: u8 = 1;
const HEAD_BYTES: usize = 5;

/// A look-up that passes more deleted notes than this gives up, and the owner counts as having some.
const MAX_SKIPPED: u64 = 64;

/// How many bytes of a key count as a number when the end of a damaged stretch is looked for.
const NUMBER_BYTES: usize = 16;

/// Appends the value of a note as it is stored; its whole key is at `key` in `out`.
pub(super) fn encode_note(out: &mut Vec<u8>, key: Range<usize>, value: &[u8]) {
    let crc = crc32c::crc32c_append(crc32c::crc32c(&out[key]), value);
    out.push(NOTE_VERSION);
    out.extend_from_slice(&crc.to_le_bytes());
    out.extend_from_slice(value);
}

/// What [`encode_note`] was given, if it is intact.
fn decode_note<'a>(key: &[u8], stored: &'a [u8]) -> Option<&'a [u8]> {
    let (head, value) = stored.split_first_chunk::<HEAD_BYTES>()?;
    let [version, crc @ ..] = *head;
    let intact = crc32c::crc32c_append(crc32c::crc32c(key), value) == u32::from_le_bytes(crc);
    (version == NOTE_VERSION && intact).then_some(value)
}

/// Whether a stored note is what was written under this whole key.
pub(super) fn is_intact(key: &[u8], stored: &[u8]) -> bool {
    decode_note(key, stored).is_some()
}

/// Which owners may have notes. Only the commit thread asks and tells.
#[derive(Default)]
pub(super) struct NoteOwners {
    state: Mutex<OwnersState>,
}

#[derive(Default)]
struct OwnersState {
    /// Owners that wrote notes since the store was opened.
    noted: HashSet<QueueId>,
    /// Ids below it may have notes from before that.
    older: u64,
}

impl NoteOwners {
    /// What the store had when it was opened: the first id that was not in use, and whether there was any note.
    pub fn opened(&self, next_queue_id: u64, any: bool) {
        self.state.lock().older = if any { next_queue_id } else { 0 };
    }

    /// Takes in the owners that `round` writes notes of, and forgets those that end with it.
    pub fn wrote(&self, round: &RoundBuilder) {
        let mut state = self.state.lock();
        state.noted.extend(round.note_owners());
        if !state.noted.is_empty() {
            for queue in round.deleted_queues() {
                state.noted.remove(&queue);
            }
        }
    }

    /// `None`: only the database knows.
    fn knows(&self, owner: QueueId) -> Option<bool> {
        let state = self.state.lock();
        match state.noted.contains(&owner) {
            true => Some(true),
            false if owner.0 >= state.older => Some(false),
            false => None,
        }
    }
}

impl Rocks {
    /// Whether there may be a note of `owner` in the database.
    ///
    /// # Cost
    /// One look-up in a hash map; for an owner from before the start that wrote none since, one in the database.
    pub fn may_have_notes(&self, owner: QueueId) -> bool {
        self.note_owners().knows(owner).unwrap_or_else(|| {
            let any = self.with(|db| Ok(any_note(db, notes_family(db)?, &key::queue(owner), &key::after_queue(owner))));
            any.unwrap_or(true)
        })
    }

    /// Whether there may be a note of anyone.
    pub fn has_any_notes(&self) -> Result<bool, StoreError> {
        self.with(|db| Ok(any_note(db, notes_family(db)?, &[], &[0xff; 8])))
    }

    /// See [`Store::note_owners`](super::Store::note_owners).
    pub fn read_note_owners(&self) -> Result<Vec<QueueId>, StoreError> {
        self.with(|db| {
            let mut notes = db.raw_iterator_cf(notes_family(db)?);
            let mut owners = Vec::new();
            notes.seek_to_first();
            while let Some(owner) = notes.key().and_then(|key| key::parse_queue(key.get(..key::OWNER_BYTES)?)) {
                owners.push(owner);
                notes.seek(key::after_queue(owner));
            }
            notes.status().map_err(|error| read_error("notes", &error))?;
            Ok(owners)
        })
    }

    /// See [`Store::read_notes`](super::Store::read_notes).
    pub fn read_notes(
        &self,
        owner: QueueId,
        from: &[u8],
        until: &[u8],
        max_bytes: usize,
        each: &mut dyn FnMut(&[u8], &[u8]),
    ) -> Result<Option<Vec<u8>>, StoreError> {
        if from >= until {
            return Ok(None);
        }
        let readahead_bytes = if max_bytes >= READAHEAD_BYTES { READAHEAD_BYTES } else { 0 };
        self.with(|db| {
            let (from, until) = (key::note(owner, from), key::note(owner, until));
            let stretch = Notes { db, family: notes_family(db)?, owner, from: &from, until: &until, readahead_bytes };
            self.read_stretch(&stretch, max_bytes, each)
        })
    }

    fn read_stretch(
        &self,
        stretch: &Notes<'_>,
        max_bytes: usize,
        each: &mut dyn FnMut(&[u8], &[u8]),
    ) -> Result<Option<Vec<u8>>, StoreError> {
        let mut notes = stretch.iterate();
        notes.seek_to_first();
        let mut last: Option<Vec<u8>> = None;
        let mut bytes = 0usize;
        loop {
            while let Some((key, stored)) = notes.item() {
                let note_key = key.get(key::OWNER_BYTES..).unwrap_or_default();
                match decode_note(key, stored) {
                    Some(value) => each(note_key, value),
                    None => self.report_damaged_note(stretch.owner, note_key, "checksum mismatch"),
                }
                bytes += note_key.len() + stored.len().saturating_sub(HEAD_BYTES);
                if bytes >= max_bytes {
                    return Ok(Some(successor(note_key)));
                }
                let last = last.get_or_insert_default();
                last.clear();
                last.extend_from_slice(note_key);
                notes.next();
            }
            match notes.status() {
                Ok(()) => return Ok(None),
                Err(error) if is_damage(&error) => {
                    let damaged = last.clone().unwrap_or_else(|| stretch.from[key::OWNER_BYTES..].to_vec());
                    self.report_damaged_note(stretch.owner, &damaged, error.as_ref());
                    let Some(readable) = stretch.first_readable(&damaged) else { return Ok(None) };
                    notes = readable;
                }
                Err(error) => return Err(read_error("notes", &error)),
            }
        }
    }

    fn report_damaged_note(&self, owner: QueueId, key: &[u8], reason: &str) {
        self.count_damage();
        self.note_unreadable_note(owner, key);
        tracing::error!(
            owner = owner.0,
            key = %key.escape_ascii(),
            reason,
            "notes at or behind this key are damaged and were skipped"
        );
    }
}

/// The first key after `key`.
fn successor(key: &[u8]) -> Vec<u8> {
    let mut next = Vec::with_capacity(key.len() + 1);
    next.extend_from_slice(key);
    next.push(0);
    next
}

fn notes_family(db: &DB) -> Result<&ColumnFamily, StoreError> {
    db.cf_handle(key::NOTES).ok_or(StoreError::Closed)
}

/// Whether there is a note in `from..until`; also if that cannot be told, or only at some cost.
fn any_note(db: &DB, family: &ColumnFamily, from: &[u8], until: &[u8]) -> bool {
    let mut options = ReadOptions::default();
    options.set_iterate_lower_bound(from);
    options.set_iterate_upper_bound(until);
    options.set_max_skippable_internal_keys(MAX_SKIPPED);
    let mut notes = db.raw_iterator_cf_opt(family, options);
    notes.seek_to_first();
    notes.valid() || notes.status().is_err()
}

/// A stretch of one owner's notes; the keys are whole.
struct Notes<'a> {
    db: &'a DB,
    family: &'a ColumnFamily,
    owner: QueueId,
    /// Nothing before it is looked at, not even tombstones.
    from: &'a [u8],
    until: &'a [u8],
    readahead_bytes: usize,
}

impl<'a> Notes<'a> {
    fn iterate(&self) -> DBRawIterator<'a> {
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(self.from);
        options.set_iterate_upper_bound(self.until);
        options.set_readahead_size(self.readahead_bytes);
        self.db.raw_iterator_cf_opt(self.family, options)
    }

    /// An iterator that is placed behind the damage that lies at or behind the note `damaged`; nothing if there is
    /// nothing behind it. What differs from `damaged` beyond its first [`NUMBER_BYTES`] only is given up.
    fn first_readable(&self, damaged: &[u8]) -> Option<DBRawIterator<'a>> {
        let until = number(&self.until[key::OWNER_BYTES..]).saturating_add(1);
        let place = |number: u128| {
            let mut iterator = self.iterate();
            iterator.seek(key::note(self.owner, &number.to_be_bytes()));
            iterator.status().is_ok().then_some(iterator)
        };
        first_placed(number(damaged), until, place).map(|(_, iterator)| iterator)
    }
}

/// The first bytes of a key as a number.
fn number(key: &[u8]) -> u128 {
    let mut bytes = [0; NUMBER_BYTES];
    let len = key.len().min(NUMBER_BYTES);
    bytes[..len].copy_from_slice(&key[..len]);
    u128::from_be_bytes(bytes)
}
