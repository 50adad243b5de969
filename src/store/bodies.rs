//! Bodies that several records have in common: stored once, until the last of the records is consumed.
//!
//! A body gets a place of its own when at least two records of one round end with it, the same bytes in memory. What
//! the log holds of such a record is a [`Reference`] and what stands before the body; readers see whole records. A body
//! that one record has alone stays in that record.
//!
//! # Encoding
//! - body: its bytes as they are. Every reference has a checksum over them and their id.
//! - reference, by queue and position: version, CRC-32C over the key and the rest, then the body's id. It is there as
//!   long as its record is not consumed.
//! - count, by body id: version, CRC-32C over the key and the rest, then how many references there are.
//! - what is left to do, by queue: version, CRC-32C over the key and the rest, then the position before which all references
//!   are to go.
//!
//! # Letting go
//! The commit thread does it, in the batch that consumes: it looks up the references among the positions which a new head,
//! a consumed set or a deletion covers, deletes them and counts down. A reference that is gone was counted, so saying twice
//! that a position is consumed does no harm. What a queue without references costs is a look-up in a hash map.
//!
//! Very many references at once (a long queue is purged) go over several rounds. What is left to do is stored with each of
//! them, so that the next start goes on with it.
//!
//! # Memory
//! One number a queue that has references, and the bodies that a reader still holds; nothing a body.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use rocksdb::{ColumnFamily, DB, DBRawIterator, ReadOptions, WriteBatch};

use super::read::read_error;
use super::recovery::{begin, is_damage, open, seal};
use super::rocks::Rocks;
use super::sweep::LIVE_BLOB_BYTES;
use super::{QueueId, QueueSeq, StoreError, key};

/// Of everything in `body_references`: a number.
const NUMBER_VERSION: u8 = 1;

/// References that one round lets go of, not counting those of consumed sets, of which each has no more than a segment.
const MAX_RELEASED: usize = 4096;

/// What a record in the log has instead of its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reference {
    pub id: u64,
    pub body_bytes: u64,
    pub crc: u32,
}

impl Reference {
    const BYTES: usize = 20;

    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.id.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.body_bytes.to_le_bytes());
        bytes[16..].copy_from_slice(&self.crc.to_le_bytes());
        bytes
    }

    /// The reference, and what stands before the body.
    pub fn decode(record: &[u8]) -> Option<(Reference, &[u8])> {
        let (id, rest) = record.split_first_chunk()?;
        let (body_bytes, rest) = rest.split_first_chunk()?;
        let (crc, head) = rest.split_first_chunk()?;
        let reference = Reference {
            id: u64::from_le_bytes(*id),
            body_bytes: u64::from_le_bytes(*body_bytes),
            crc: u32::from_le_bytes(*crc),
        };
        Some((reference, head))
    }

    fn of(id: u64, body: &[u8]) -> Reference {
        Reference { id, body_bytes: body.len() as u64, crc: checksum(id, body) }
    }

    fn matches(&self, body: &[u8]) -> bool {
        self.body_bytes == body.len() as u64 && self.crc == checksum(self.id, body)
    }
}

fn encode_number(key: &[u8], number: u64) -> Vec<u8> {
    let mut value = begin(NUMBER_VERSION);
    value.extend_from_slice(&number.to_be_bytes());
    seal(value, key)
}

fn decode_number(key: &[u8], value: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(open(value, NUMBER_VERSION, key)?.try_into().ok()?))
}

fn checksum(id: u64, body: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&id.to_le_bytes()), body)
}

/// The bodies of one round's records.
#[derive(Debug, Default)]
pub(super) struct RoundBodies {
    bodies: Vec<(Bytes, u32)>,
    /// Where bodies were placed. A round that is written once more, after a failure, places them there again.
    ids: RefCell<HashMap<usize, u64>>,
    /// By where they are in memory, which does not change while they are held here.
    index: HashMap<(usize, usize), usize>,
}

impl RoundBodies {
    /// The number of a body that a record ends with, and whether it is the first that does.
    pub fn take(&mut self, body: &Bytes) -> (usize, bool) {
        let at = *self.index.entry((body.as_ptr() as usize, body.len())).or_insert(self.bodies.len());
        let is_new = at == self.bodies.len();
        if is_new {
            self.bodies.push((body.clone(), 0));
        }
        self.bodies[at].1 += 1;
        (at, is_new)
    }

    pub fn bytes(&self, body: usize) -> &Bytes {
        &self.bodies[body].0
    }

    pub fn is_shared(&self, body: usize) -> bool {
        self.bodies[body].1 > 1
    }

    pub fn clear(&mut self) {
        *self = RoundBodies::default();
    }
}

/// What is known of bodies beside the database.
#[derive(Default)]
pub(super) struct Bodies {
    /// Only the commit thread has use for it, once the store is open.
    state: Mutex<State>,
    loaded: Arc<Loaded>,
}

#[derive(Default)]
struct State {
    next_id: u64,
    /// No reference of the queue is before the position. Queues without references are not in it.
    holders: HashMap<QueueId, QueueSeq>,
    /// References before the position are to be let go of, as soon as it is their turn.
    pending: BTreeMap<QueueId, QueueSeq>,
}

impl Bodies {
    /// Whether an empty round would have references to let go of.
    pub fn has_pending(&self) -> bool {
        !self.state.lock().pending.is_empty()
    }
}

/// The families, and where damage is counted.
#[derive(Clone, Copy)]
struct Families<'a> {
    rocks: &'a Rocks,
    db: &'a DB,
    bodies: &'a ColumnFamily,
    references: &'a ColumnFamily,
}

impl<'a> Families<'a> {
    fn of(rocks: &'a Rocks, db: &'a DB) -> Result<Families<'a>, StoreError> {
        let bodies = db.cf_handle(key::BODIES).ok_or(StoreError::Closed)?;
        let references = db.cf_handle(key::BODY_REFERENCES).ok_or(StoreError::Closed)?;
        Ok(Families { rocks, db, bodies, references })
    }

    /// References of a queue from `from` on.
    fn references_from(&self, queue: QueueId, from: QueueSeq, until: Option<QueueSeq>) -> DBRawIterator<'a> {
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(key::body_reference(queue, from));
        match until {
            Some(until) => options.set_iterate_upper_bound(key::body_reference(queue, until)),
            None => options.set_iterate_upper_bound(key::after_body_references(queue)),
        }
        let mut iterator = self.db.raw_iterator_cf_opt(self.references, options);
        iterator.seek_to_first();
        iterator
    }

    fn count(&self, id: u64) -> Option<u64> {
        let key = key::body_count(id);
        let value = self.db.get_pinned_cf(self.references, key).ok()??;
        decode_number(&key, &value)
    }

    /// An id beyond those of all bodies and counts that are there.
    fn first_free_id(&self) -> u64 {
        let mut bodies = self.db.raw_iterator_cf(self.bodies);
        bodies.seek_to_last();
        let mut counts = self.db.raw_iterator_cf(self.references);
        counts.seek_for_prev(key::body_count(u64::MAX));
        let body = bodies.key().and_then(key::parse_body);
        let counted = counts.key().and_then(key::parse_body_count);
        for status in [bodies.status(), counts.status()] {
            if let Err(error) = status {
                self.report(None, None, None, error.as_ref());
            }
        }
        body.max(counted).map_or(1, |last| last.saturating_add(1))
    }

    fn report(&self, queue: Option<QueueId>, position: Option<QueueSeq>, body: Option<u64>, reason: &str) {
        self.rocks.count_damage();
        let queue = queue.map(|queue| queue.0);
        tracing::error!(
            queue,
            position,
            body,
            reason,
            "what counts the references to large bodies is damaged; a body may keep its disk space for good"
        );
    }
}

/// The bodies in the round that is about to be written.
pub(super) struct Ledger<'a> {
    families: Families<'a>,
    state: MutexGuard<'a, State>,
    round: &'a RoundBodies,
    /// Of the bodies of the round, those that were given a place.
    placed: HashMap<usize, Reference>,
    /// References that the round adds, and the number of their body.
    fresh: BTreeMap<(QueueId, QueueSeq), usize>,
    /// References that it takes away, and from which bodies how many.
    gone: HashSet<(QueueId, QueueSeq)>,
    taken: BTreeMap<u64, u64>,
    budget: usize,
}

impl Rocks {
    /// Begins to account for the bodies of a round, with what earlier ones left to be done.
    ///
    /// # Errors
    /// [`StoreError::Closed`].
    pub fn ledger<'a>(
        &'a self,
        db: &'a DB,
        round: &'a RoundBodies,
        batch: &mut WriteBatch,
    ) -> Result<Ledger<'a>, StoreError> {
        let mut ledger = Ledger {
            families: Families::of(self, db)?,
            state: self.bodies().state.lock(),
            round,
            placed: HashMap::new(),
            fresh: BTreeMap::new(),
            gone: HashSet::new(),
            taken: BTreeMap::new(),
            budget: MAX_RELEASED,
        };
        while let Some((queue, until)) = ledger.state.pending.pop_first() {
            batch.delete_cf(ledger.families.references, key::body_release(queue));
            ledger.release(queue, 0, until, batch);
            if ledger.budget == 0 {
                break;
            }
        }
        Ok(ledger)
    }

    /// Takes in what the database has when it is opened, or opened anew after a failed write, of which nobody knows what the
    /// disk has; `next_id` is what it says itself of the first free id.
    ///
    /// # Cost
    /// One look-up a queue that has references, however many it has.
    ///
    /// # Errors
    /// [`StoreError::Closed`].
    pub fn open_bodies(&self, next_id: u64) -> Result<(), StoreError> {
        self.with(|db| {
            let families = Families::of(self, db)?;
            let mut state = self.bodies().state.lock();
            state.next_id = state.next_id.max(next_id).max(families.first_free_id());
            state.holders.clear();
            state.pending.clear();
            let mut references = families.db.raw_iterator_cf(families.references);
            references.seek(key::body_reference(QueueId(0), 0));
            while let Some((queue, first)) = references.key().and_then(key::parse_body_reference) {
                state.holders.insert(queue, first);
                references.seek(key::after_body_references(queue));
            }
            references.seek(key::body_release(QueueId(0)));
            while let Some((key, value)) = references.item() {
                match (key::parse_body_release(key), decode_number(key, value)) {
                    (Some(queue), Some(until)) => drop(state.pending.insert(queue, until)),
                    (queue, _) => families.report(queue, None, None, "checksum mismatch"),
                }
                references.next();
            }
            if let Err(error) = references.status() {
                families.report(None, None, None, error.as_ref());
            }
            if db.property_int_value_cf(families.bodies, LIVE_BLOB_BYTES).is_ok_and(|bytes| bytes.unwrap_or(0) > 0) {
                self.sweeper().note_start_with_bodies();
            }
            Ok(())
        })
    }

    /// The body that a record refers to; `None` if the record is consumed.
    ///
    /// # Errors
    /// [`Unreadable`], in one way or the other.
    pub fn read_body(
        &self,
        db: &DB,
        queue: QueueId,
        seq: QueueSeq,
        reference: &Reference,
    ) -> Result<Option<Bytes>, Unreadable> {
        let families = Families::of(self, db).map_err(Unreadable::For)?;
        if let Some(body) = self.bodies().loaded.find(reference) {
            return Ok(Some(body));
        }
        let failed = |error: rocksdb::Error| match is_damage(&error) {
            true => Unreadable::Damaged(error.into_string()),
            false => Unreadable::For(read_error("a large body", &error)),
        };
        match db.get_pinned_cf(families.bodies, key::body(reference.id)).map_err(failed)? {
            Some(body) if reference.matches(&body) => Ok(Some(self.bodies().loaded.keep(reference, body.to_vec()))),
            Some(_) => Err(Unreadable::Damaged("checksum mismatch of its body".to_owned())),
            // The reference goes with the same batch as the body, or before it.
            None if db
                .get_pinned_cf(families.references, key::body_reference(queue, seq))
                .map_err(failed)?
                .is_none() =>
            {
                Ok(None)
            }
            None => Err(Unreadable::Damaged("its body is missing".to_owned())),
        }
    }

    /// Whether the record at a position, which refers to a body, still has a right to it.
    pub fn is_reference_held(&self, db: &DB, queue: QueueId, seq: QueueSeq) -> bool {
        let held = Families::of(self, db)
            .map(|families| db.get_pinned_cf(families.references, key::body_reference(queue, seq)));
        !matches!(held, Ok(Ok(None)))
    }
}

/// What the commit of a round has ended.
pub(super) struct EndedBodies {
    pub ids: Vec<u64>,
    pub references: u64,
}

/// Why a body is not there.
pub(super) enum Unreadable {
    Damaged(String),
    /// It may pass.
    For(StoreError),
}

impl Ledger<'_> {
    /// What becomes of a body that a record of the round ends with.
    pub fn place(&mut self, queue: QueueId, seq: QueueSeq, body: usize) -> Option<Reference> {
        if !self.round.is_shared(body) {
            return None;
        }
        let (round, state) = (self.round, &mut self.state);
        let reference = *self.placed.entry(body).or_insert_with(|| {
            let id = *round.ids.borrow_mut().entry(body).or_insert_with(|| {
                state.next_id += 1;
                state.next_id - 1
            });
            Reference::of(id, round.bytes(body))
        });
        self.fresh.insert((queue, seq), body);
        state.holders.entry(queue).or_insert(seq);
        Some(reference)
    }

    /// Everything of a queue in `from..until` is consumed.
    pub fn release(&mut self, queue: QueueId, from: QueueSeq, until: QueueSeq, batch: &mut WriteBatch) {
        let Some(&first) = self.state.holders.get(&queue) else { return };
        let from = from.max(first);
        if from >= until {
            return;
        }
        self.forget_fresh(queue, from, until);
        let is_front = from == first;
        // From the front, the search goes on to where the next one will begin.
        let mut references = self.families.references_from(queue, from, (!is_front).then_some(until));
        let mut next = None;
        while let Some((_, seq)) = references.key().and_then(key::parse_body_reference) {
            if seq >= until || self.budget == 0 {
                next = Some(seq);
                break;
            }
            self.take(queue, seq, references.value(), batch);
            self.budget -= 1;
            references.next();
        }
        if let Err(error) = references.status() {
            self.families.report(Some(queue), Some(from), None, error.as_ref());
        }
        if !is_front {
            return; // what is left is found when the head gets there
        }
        if next.is_some_and(|next| next < until) {
            let pending = self.state.pending.entry(queue).or_default();
            *pending = until.max(*pending);
            let key = key::body_release(queue);
            batch.put_cf(self.families.references, key, encode_number(&key, *pending));
        }
        let fresh = self.fresh.range((queue, from)..).next().filter(|((other, _), _)| *other == queue);
        match next.into_iter().chain(fresh.map(|((_, seq), _)| *seq)).min() {
            Some(next) => self.state.holders.insert(queue, next),
            None => self.state.holders.remove(&queue),
        };
    }

    /// These of a queue's positions are consumed; the ranges ascend.
    pub fn release_ranges(&mut self, queue: QueueId, ranges: &[(QueueSeq, QueueSeq)], batch: &mut WriteBatch) {
        let (Some(&first), [(from, _), ..], [.., (_, until)]) = (self.state.holders.get(&queue), ranges, ranges) else {
            return;
        };
        let (from, until) = (first.max(*from), *until);
        if from >= until {
            return;
        }
        let mut references = self.families.references_from(queue, from, Some(until));
        let mut ranges = ranges.iter().peekable();
        while let Some((_, seq)) = references.key().and_then(key::parse_body_reference) {
            while ranges.next_if(|(_, end)| *end <= seq).is_some() {}
            match ranges.peek() {
                Some((start, _)) if *start <= seq => {
                    self.take(queue, seq, references.value(), batch);
                    references.next();
                }
                Some((start, _)) => references.seek(key::body_reference(queue, *start)),
                None => break,
            }
        }
        if let Err(error) = references.status() {
            self.families.report(Some(queue), Some(from), None, error.as_ref());
        }
    }

    /// Whether a queue has references at all.
    pub fn holds(&self, queue: QueueId) -> bool {
        self.state.holders.contains_key(&queue)
    }

    fn take(&mut self, queue: QueueId, seq: QueueSeq, value: Option<&[u8]>, batch: &mut WriteBatch) {
        if !self.gone.insert((queue, seq)) {
            return;
        }
        let key = key::body_reference(queue, seq);
        batch.delete_cf(self.families.references, key);
        match value.and_then(|value| decode_number(&key, value)) {
            Some(id) => *self.taken.entry(id).or_default() += 1,
            None => self.families.report(Some(queue), Some(seq), None, "checksum mismatch"),
        }
    }

    fn forget_fresh(&mut self, queue: QueueId, from: QueueSeq, until: QueueSeq) {
        let gone: Vec<_> = self.fresh.range((queue, from)..(queue, until)).map(|(key, _)| *key).collect();
        for key in gone {
            self.fresh.remove(&key);
        }
    }

    /// Writes what the round amounts to, and answers what ends with it.
    pub fn finish(self, batch: &mut WriteBatch) -> EndedBodies {
        let Families { bodies, references, .. } = self.families;
        let mut counts: BTreeMap<usize, u64> = BTreeMap::new();
        for (&(queue, seq), &body) in &self.fresh {
            let Some(reference) = self.placed.get(&body) else { continue };
            let key = key::body_reference(queue, seq);
            batch.put_cf(references, key, encode_number(&key, reference.id));
            *counts.entry(body).or_default() += 1;
        }
        let put_count = |id: u64, count: u64, batch: &mut WriteBatch| {
            let key = key::body_count(id);
            batch.put_cf(references, key, encode_number(&key, count));
        };
        for (body, count) in counts {
            let Some(reference) = self.placed.get(&body) else { continue };
            batch.put_cf(bodies, key::body(reference.id), self.round.bytes(body));
            put_count(reference.id, count, batch);
        }
        let mut ended = EndedBodies { ids: Vec::new(), references: self.gone.len() as u64 };
        for (id, taken) in self.taken {
            match self.families.count(id) {
                Some(count) if count > taken => put_count(id, count - taken, batch),
                Some(_) => {
                    batch.delete_cf(bodies, key::body(id));
                    batch.delete_cf(references, key::body_count(id));
                    ended.ids.push(id);
                }
                None => self.families.report(None, None, Some(id), "its count cannot be read"),
            }
        }
        ended
    }

    /// The first id that no body has, if that has changed.
    pub fn next_id(&self) -> Option<u64> {
        (!self.placed.is_empty()).then_some(self.state.next_id)
    }
}

/// Bodies that were read and are still in use, so that queues which read the same one have one copy of it.
#[derive(Default)]
struct Loaded {
    bodies: Mutex<HashMap<u64, Weak<LoadedBody>>>,
}

struct LoadedBody {
    reference: Reference,
    bytes: Vec<u8>,
    all: Weak<Loaded>,
}

/// What a [`Bytes`] holds of it.
struct Handle(Arc<LoadedBody>);

impl AsRef<[u8]> for Handle {
    fn as_ref(&self) -> &[u8] {
        &self.0.bytes
    }
}

impl Loaded {
    fn find(&self, reference: &Reference) -> Option<Bytes> {
        let body = self.bodies.lock().get(&reference.id)?.upgrade()?;
        (body.reference == *reference).then(|| Bytes::from_owner(Handle(body)))
    }

    /// The bytes must match the reference.
    fn keep(self: &Arc<Self>, reference: &Reference, bytes: Vec<u8>) -> Bytes {
        let body = Arc::new(LoadedBody { reference: *reference, bytes, all: Arc::downgrade(self) });
        self.bodies.lock().insert(reference.id, Arc::downgrade(&body));
        Bytes::from_owner(Handle(body))
    }
}

impl Drop for LoadedBody {
    fn drop(&mut self) {
        let Some(all) = self.all.upgrade() else { return };
        let mut bodies = all.bodies.lock();
        // Another reader may have put its own copy there.
        if bodies.get(&self.reference.id).is_some_and(|body| body.strong_count() == 0) {
            bodies.remove(&self.reference.id);
        }
    }
}
