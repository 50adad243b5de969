//! What one round will write, gathered from its sources before a single `WriteBatch` is made of it.

use std::collections::HashSet;
use std::ops::Range;

use bytes::Bytes;
use rocksdb::{ColumnFamily, DB, WriteBatch};

use super::bodies::{EndedBodies, Ledger, RoundBodies};
use super::notes::encode_note;
use super::read::last_run_before;
use super::rocks::Rocks;
use super::run::{Body, FinishedRun, RunWriter};
use super::{Durability, QueueId, QueueSeq, QueueStateRecord, SEGMENT_RECORDS, StoreError, key, recovery};

/// Buffer that is kept from round to round.
const KEPT_BYTES: usize = 1024 * 1024;

/// What RocksDB adds to a key and a value in a batch, generously.
const BATCH_ENTRY_BYTES: usize = 48;

/// Collects the changes of one round. Within a queue, the order of the calls is the order of their effects.
#[derive(Debug, Default)]
pub struct RoundBuilder {
    log: Pile,
    /// Goes to [`Pages`](super::pages::Pages), before `log` is written.
    pages: Pile,
    bodies: RoundBodies,
    records: u64,
    /// Who puts a note with this round.
    note_owners: HashSet<QueueId>,
    /// Queues whose state is written, with their tails.
    tails: Vec<(QueueId, QueueSeq)>,
    last_note_owner: Option<QueueId>,
    /// What holds for those that ask for nothing else.
    default_durability: Durability,
    needs_sync: bool,
    source: Source,
    takes_pages: bool,
}

/// The source that is being drained.
#[derive(Debug, Default)]
struct Source {
    durability: Option<Durability>,
    /// Bytes in the round before it.
    bytes_before: usize,
}

/// Runs that were finished, and what else is to be done, in order.
#[derive(Debug, Default)]
struct Pile {
    runs: RunWriter,
    changes: Vec<Change>,
    /// The keys and values of notes, end to end.
    notes: Vec<u8>,
    /// Bytes of keys and values beside the runs.
    other_bytes: usize,
}

#[derive(Debug)]
enum Change {
    Run(FinishedRun),
    State {
        queue: QueueId,
        head: QueueSeq,
        value: Vec<u8>,
    },
    Consumed {
        queue: QueueId,
        segment: u64,
        value: Option<Vec<u8>>,
    },
    DeleteConsumed {
        queue: QueueId,
        from: u64,
        until: u64,
    },
    DeleteRecords {
        queue: QueueId,
        from: QueueSeq,
        until: QueueSeq,
    },
    DeleteQueue {
        queue: QueueId,
    },
    /// The ranges are in `notes`, and the keys whole.
    PutNote {
        key: Range<usize>,
        value: Range<usize>,
    },
    DeleteNote {
        key: Range<usize>,
    },
    DeleteNotes {
        from: Range<usize>,
        until: Range<usize>,
    },
    PutMeta {
        key: Vec<u8>,
        value: Vec<u8>,
    },
    DeleteMeta {
        key: Vec<u8>,
    },
}

/// A change of the definitions, or of the store's own records. Applied after everything the sources contributed.
#[derive(Debug)]
pub(super) enum Operation {
    PutMeta { key: Vec<u8>, value: Vec<u8> },
    DeleteMeta { key: Vec<u8> },
    DeleteQueue { queue: QueueId },
}

impl RoundBuilder {
    /// An empty round. Only the commit thread and tests have use for it.
    pub fn new() -> RoundBuilder {
        RoundBuilder::with_default(Durability::Fsync)
    }

    /// An empty round of a store with this durability.
    pub(super) fn with_default(default_durability: Durability) -> RoundBuilder {
        RoundBuilder { default_durability, takes_pages: true, ..RoundBuilder::default() }
    }

    /// Says what the confirms of the source at hand wait for, where that is not the store's own durability. A round is
    /// synced if anything in it asks for that.
    pub fn set_durability(&mut self, durability: Durability) {
        self.source.durability = Some(durability);
    }

    /// Whether [`RoundBuilder::page_out`] is of use now: not while the disk is short of space, or does not take pages.
    pub fn takes_pages(&self) -> bool {
        self.takes_pages
    }

    pub(super) fn permit_pages(&mut self, permitted: bool) {
        self.takes_pages = permitted;
    }

    pub(super) fn begin_source(&mut self) {
        self.source = Source { durability: None, bytes_before: self.log.gathered() };
    }

    pub(super) fn end_source(&mut self) {
        if self.log.gathered() > self.source.bytes_before {
            self.needs_sync |= self.source.durability.unwrap_or(self.default_durability) == Durability::Fsync;
        }
    }

    /// Whether the round is to be synced.
    pub(super) fn needs_sync(&self) -> bool {
        self.needs_sync
    }

    /// Has the round synced whatever is in it.
    pub(super) fn require_sync(&mut self) {
        self.needs_sync = true;
    }

    /// Adds a durable record. The positions of one queue ascend, within a round and from round to round; gaps are
    /// fine. Calls for the same queue should stand next to each other: a change of queue ends the run on disk.
    ///
    /// Hot path: once per durable message. Copies `record` once.
    pub fn append(&mut self, queue: QueueId, seq: QueueSeq, record: &[u8]) {
        self.records += 1;
        self.log.append(queue, seq, record);
    }

    /// As [`RoundBuilder::append`], of a record that is `head` and behind it `body`. If other records of this round, of this
    /// queue or others, end with the same bytes in memory, they are stored once for all.
    ///
    /// The body is held until the round has ended, and not copied before.
    pub fn append_with_body(&mut self, queue: QueueId, seq: QueueSeq, head: &[u8], body: &Bytes) {
        self.records += 1;
        let (number, is_new) = self.bodies.take(body);
        self.log.other_bytes += if is_new { body.len() } else { 3 * BATCH_ENTRY_BYTES };
        if let Some(run) = self.log.runs.append_split(queue, seq, head, number, body.len()) {
            self.log.changes.push(Change::Run(run));
        }
    }

    /// Replaces the queue's state.
    pub fn put_state(&mut self, queue: QueueId, state: &QueueStateRecord) {
        self.tails.push((queue, state.tail));
        let value = recovery::encode_state(queue, state);
        self.log.other_bytes += value.len() + BATCH_ENTRY_BYTES;
        self.log.changes.push(Change::State { queue, head: state.head, value });
    }

    /// Replaces the consumed set of a segment: half-open ranges, ascending and merged, all within the segment.
    /// No ranges at all removes the set.
    pub fn put_consumed(&mut self, queue: QueueId, segment: u64, ranges: &[(QueueSeq, QueueSeq)]) {
        let value = (!ranges.is_empty()).then(|| recovery::encode_consumed(queue, segment, ranges));
        self.log.other_bytes += value.as_ref().map_or(0, Vec::len) + BATCH_ENTRY_BYTES;
        self.log.changes.push(Change::Consumed { queue, segment, value });
    }

    /// Deletes whole segments: records, consumed sets and pages. Meant for many segments at once, not for each
    /// message: every call leaves range tombstones behind until compaction has passed.
    pub fn delete_segments(&mut self, queue: QueueId, from_segment: u64, until_segment: u64) {
        if from_segment >= until_segment {
            return;
        }
        let first = |segment: u64| segment.saturating_mul(SEGMENT_RECORDS);
        self.delete_records(queue, first(from_segment), first(until_segment));
        self.log.other_bytes += BATCH_ENTRY_BYTES;
        self.log.changes.push(Change::DeleteConsumed { queue, from: from_segment, until: until_segment });
    }

    /// Deletes the records of `from..until`, which are all consumed, as far as that goes without rewriting: a run that
    /// began before `from`, and the last one if it does not end with its segment, stay. So a queue with large records,
    /// which cannot wait for the end of a segment, calls this with the segment's start every few megabytes.
    ///
    /// As dear as [`RoundBuilder::delete_segments`], and a look at the index besides.
    pub fn delete_records(&mut self, queue: QueueId, from: QueueSeq, until: QueueSeq) {
        if from >= until {
            return;
        }
        for pile in [&mut self.log, &mut self.pages] {
            pile.finish_run();
            pile.other_bytes += BATCH_ENTRY_BYTES;
            pile.changes.push(Change::DeleteRecords { queue, from, until });
        }
    }

    /// Moves a record that need not survive a restart out of memory. It can be read when the round has ended.
    ///
    /// The positions of one queue ascend within a round, and a record is paged out only once: a reader finds a record in the
    /// last run that begins at or before it, which must not be one that was written before and ends before it.
    pub fn page_out(&mut self, queue: QueueId, seq: QueueSeq, record: &[u8]) {
        self.pages.append(queue, seq, record);
    }

    /// Replaces the note `key` of `owner`.
    ///
    /// Hot path: once per note. Copies key and value once.
    pub fn put_note(&mut self, owner: QueueId, key: &[u8], value: &[u8]) {
        if self.last_note_owner != Some(owner) {
            self.last_note_owner = Some(owner);
            self.note_owners.insert(owner);
        }
        let pile = &mut self.log;
        let key = pile.keep_key(&key::queue(owner), key);
        let start = pile.notes.len();
        encode_note(&mut pile.notes, key.clone(), value);
        pile.push_note(Change::PutNote { key, value: start..pile.notes.len() });
    }

    /// Deletes the note `key` of `owner`, if there is one.
    pub fn delete_note(&mut self, owner: QueueId, key: &[u8]) {
        let key = self.log.keep_key(&key::queue(owner), key);
        self.log.push_note(Change::DeleteNote { key });
    }

    /// Deletes the notes of `from..until`. Meant for many at once: every call leaves a range tombstone behind until
    /// compaction has passed.
    pub fn delete_notes(&mut self, owner: QueueId, from: &[u8], until: &[u8]) {
        if from < until {
            let from = self.log.keep_key(&key::queue(owner), from);
            let until = self.log.keep_key(&key::queue(owner), until);
            self.log.push_note(Change::DeleteNotes { from, until });
        }
    }

    /// Durable records so far.
    pub fn record_count(&self) -> u64 {
        self.records
    }

    /// Bytes so far, of records and everything else.
    pub fn byte_count(&self) -> usize {
        self.log.byte_count() + self.pages.byte_count()
    }

    /// `may_have_notes` says of an owner whether earlier rounds wrote notes of it that are still there.
    pub(super) fn apply(&mut self, operation: Operation, may_have_notes: &dyn Fn(QueueId) -> bool) {
        self.needs_sync |= self.default_durability == Durability::Fsync;
        match operation {
            Operation::PutMeta { key, value } => {
                self.log.other_bytes += 2 * (key.len() + value.len() + BATCH_ENTRY_BYTES);
                self.log.changes.push(Change::PutMeta { key, value });
            }
            Operation::DeleteMeta { key } => {
                self.log.other_bytes += 2 * (key.len() + BATCH_ENTRY_BYTES);
                self.log.changes.push(Change::DeleteMeta { key });
            }
            Operation::DeleteQueue { queue } => {
                for pile in [&mut self.log, &mut self.pages] {
                    pile.finish_run();
                    pile.other_bytes += 3 * BATCH_ENTRY_BYTES;
                    pile.changes.push(Change::DeleteQueue { queue });
                }
                if self.note_owners.contains(&queue) || may_have_notes(queue) {
                    let from = self.log.keep_key(&key::queue(queue), &[]);
                    let until = self.log.keep_key(&key::after_queue(queue), &[]);
                    self.log.push_note(Change::DeleteNotes { from, until });
                }
            }
        }
    }

    /// Empties the round for the next one, which gets its memory. Public for benchmarks.
    #[doc(hidden)]
    pub fn clear(&mut self) {
        self.log.clear();
        self.pages.clear();
        self.bodies.clear();
        self.records = 0;
        self.tails.clear();
        self.note_owners.clear();
        self.last_note_owner = None;
        self.needs_sync = false;
    }

    /// The durable part of the round, in one batch, and what ends with it.
    ///
    /// # Errors
    /// [`StoreError::Closed`].
    pub(super) fn log_batch(&mut self, rocks: &Rocks, db: &DB) -> Result<(WriteBatch, EndedBodies), StoreError> {
        self.log.finish_run();
        let families = Families::of(db)?;
        let mut batch = WriteBatch::with_capacity_bytes(self.log.byte_count());
        let mut ledger = rocks.ledger(db, &self.bodies, &mut batch)?;
        let last_run = |queue, until| last_run_before(db, families.log, queue, until);
        let mut scratch = Vec::new();
        for change in &self.log.changes {
            note_consumption(change, &mut ledger, &mut batch);
            match change {
                Change::Run(run) => {
                    let body = &mut |seq, number| match ledger.place(run.queue, seq, number) {
                        Some(reference) => Body::Apart(reference),
                        None => Body::Inline(self.bodies.bytes(number)),
                    };
                    let bytes = self.log.runs.encoded(run, &mut scratch, body);
                    batch.put_cf(families.log, key::numbered(run.queue, run.first), bytes);
                }
                change => self.log.put(&families, &last_run, change, &mut batch),
            }
        }
        if let Some(next) = ledger.next_id() {
            batch.put_cf(families.meta, key::NEXT_BODY_ID_KEY, next.to_be_bytes());
        }
        let ended = ledger.finish(&mut batch);
        Ok((batch, ended))
    }

    /// The part of the round that goes to the pages, in one batch. `paged` says of a queue whether anything of it may
    /// be there already: deleting what is not there would cost a tombstone.
    pub(super) fn pages_batch(&mut self, paged: &dyn Fn(QueueId) -> bool, last_run: LastRun<'_>) -> WriteBatch {
        self.pages.finish_run();
        let mut batch = WriteBatch::with_capacity_bytes(self.pages.byte_count());
        let (mut fresh, mut scratch) = (Vec::new(), Vec::new());
        for change in &self.pages.changes {
            match change {
                Change::Run(run) => {
                    let whole = &mut |_, _| Body::Inline(&[]); // nothing is paged out without its body
                    let bytes = self.pages.runs.encoded(run, &mut scratch, whole);
                    batch.put(key::numbered(run.queue, run.first), bytes);
                    fresh.push(run.queue);
                }
                Change::DeleteRecords { queue, from, until } if paged(*queue) || fresh.contains(queue) => {
                    if let Some((from, until)) = whole_runs(last_run, *queue, *from, *until) {
                        batch.delete_range(from, until);
                    }
                }
                Change::DeleteQueue { queue } if paged(*queue) || fresh.contains(queue) => {
                    batch.delete_range(key::queue(*queue), key::after_queue(*queue));
                }
                _ => {}
            }
        }
        batch
    }

    /// The queues that page something out in this round.
    pub(super) fn paging_queues(&self) -> impl Iterator<Item = QueueId> {
        self.pages.changes.iter().filter_map(|change| match change {
            Change::Run(run) => Some(run.queue),
            _ => None,
        })
    }

    /// Positions that are deleted with this round; of a deleted queue, all.
    pub(super) fn deleted_records(&self) -> impl Iterator<Item = (QueueId, QueueSeq, QueueSeq)> {
        self.log.changes.iter().filter_map(|change| match change {
            Change::DeleteRecords { queue, from, until } => Some((*queue, *from, *until)),
            Change::DeleteQueue { queue } => Some((*queue, 0, QueueSeq::MAX)),
            _ => None,
        })
    }

    /// The notes that are deleted with this round.
    pub(super) fn deleted_notes(&self) -> impl Iterator<Item = DeletedNotes<'_>> {
        let notes = &self.log.notes;
        self.log.changes.iter().filter_map(|change| match change {
            Change::DeleteNote { key } => Some(DeletedNotes::One(&notes[key.clone()])),
            Change::DeleteNotes { from, until } => {
                Some(DeletedNotes::Range(&notes[from.clone()], &notes[until.clone()]))
            }
            _ => None,
        })
    }

    /// The queues whose state this round writes, with their tails.
    pub(super) fn tails(&self) -> &[(QueueId, QueueSeq)] {
        &self.tails
    }

    /// Who puts notes with this round.
    pub(super) fn note_owners(&self) -> impl Iterator<Item = QueueId> {
        self.note_owners.iter().copied()
    }

    /// The queues that end with this round.
    pub(super) fn deleted_queues(&self) -> impl Iterator<Item = QueueId> {
        self.pages.changes.iter().filter_map(|change| match change {
            Change::DeleteQueue { queue } => Some(*queue),
            _ => None,
        })
    }
}

impl Pile {
    fn append(&mut self, queue: QueueId, seq: QueueSeq, record: &[u8]) {
        if let Some(run) = self.runs.append(queue, seq, record) {
            self.changes.push(Change::Run(run));
        }
    }

    fn finish_run(&mut self) {
        if let Some(run) = self.runs.finish() {
            self.changes.push(Change::Run(run));
        }
    }

    /// Keeps the whole key of a note.
    fn keep_key(&mut self, owner: &[u8; key::OWNER_BYTES], key: &[u8]) -> Range<usize> {
        let start = self.notes.len();
        self.notes.extend_from_slice(owner);
        self.notes.extend_from_slice(key);
        start..self.notes.len()
    }

    fn push_note(&mut self, change: Change) {
        self.other_bytes += BATCH_ENTRY_BYTES;
        self.changes.push(change);
    }

    /// Grows with whatever is added.
    fn gathered(&self) -> usize {
        self.byte_count() + self.changes.len()
    }

    fn byte_count(&self) -> usize {
        self.runs.len() + self.notes.len() + self.other_bytes
    }

    fn clear(&mut self) {
        self.runs.clear(KEPT_BYTES);
        self.changes.clear();
        self.changes.shrink_to(KEPT_BYTES / size_of::<Change>());
        self.notes.clear();
        self.notes.shrink_to(KEPT_BYTES);
        self.other_bytes = 0;
    }

    fn put(&self, families: &Families<'_>, last_run: LastRun<'_>, change: &Change, batch: &mut WriteBatch) {
        match change {
            Change::Run(_) => {} // the caller's, who knows where bodies go
            Change::State { queue, value, .. } => batch.put_cf(families.state, key::queue(*queue), value),
            Change::Consumed { queue, segment, value: Some(value) } => {
                batch.put_cf(families.consumed, key::numbered(*queue, *segment), value);
            }
            Change::Consumed { queue, segment, value: None } => {
                batch.delete_cf(families.consumed, key::numbered(*queue, *segment));
            }
            Change::DeleteRecords { queue, from, until } => {
                if let Some((from, until)) = whole_runs(last_run, *queue, *from, *until) {
                    batch.delete_range_cf(families.log, from, until);
                }
            }
            Change::DeleteConsumed { queue, from, until } => {
                let (from, until) = (key::numbered(*queue, *from), key::numbered(*queue, *until));
                batch.delete_range_cf(families.consumed, from, until);
            }
            Change::DeleteQueue { queue } => {
                batch.delete_cf(families.state, key::queue(*queue));
                batch.delete_range_cf(families.log, key::queue(*queue), key::after_queue(*queue));
                batch.delete_range_cf(families.consumed, key::queue(*queue), key::after_queue(*queue));
            }
            Change::PutNote { key, value } => {
                batch.put_cf(families.notes, &self.notes[key.clone()], &self.notes[value.clone()]);
            }
            Change::DeleteNote { key } => batch.delete_cf(families.notes, &self.notes[key.clone()]),
            Change::DeleteNotes { from, until } => {
                batch.delete_range_cf(families.notes, &self.notes[from.clone()], &self.notes[until.clone()]);
            }
            Change::PutMeta { key, value } => {
                batch.put_cf(families.meta, key, value);
                batch.put_cf(families.meta_copy, key, value);
            }
            Change::DeleteMeta { key } => {
                batch.delete_cf(families.meta, key);
                batch.delete_cf(families.meta_copy, key);
            }
        }
    }
}

/// Lets go of the bodies of what a change consumes or deletes.
fn note_consumption(change: &Change, ledger: &mut Ledger<'_>, batch: &mut WriteBatch) {
    match change {
        Change::State { queue, head, .. } => ledger.release(*queue, 0, *head, batch),
        Change::DeleteRecords { queue, from, until } => ledger.release(*queue, *from, *until, batch),
        Change::DeleteQueue { queue } => ledger.release(*queue, 0, QueueSeq::MAX, batch),
        Change::Consumed { queue, segment, value: Some(value) } if ledger.holds(*queue) => {
            let mut ranges = Vec::new();
            if recovery::decode_consumed(*queue, *segment, value, &mut ranges).is_some() {
                ledger.release_ranges(*queue, &ranges, batch);
            }
        }
        _ => {}
    }
}

/// What one change deletes of the notes, in whole keys.
pub(super) enum DeletedNotes<'a> {
    One(&'a [u8]),
    Range(&'a [u8], &'a [u8]),
}

/// Where the last run of a queue begins that begins before a position and in the same segment as the one before that.
pub(super) type LastRun<'a> = &'a dyn Fn(QueueId, QueueSeq) -> Option<QueueSeq>;

/// The keys of the runs that are known to lie within `from..until`.
fn whole_runs(last_run: LastRun<'_>, queue: QueueId, from: QueueSeq, until: QueueSeq) -> Option<([u8; 16], [u8; 16])> {
    let end = match until % SEGMENT_RECORDS {
        0 => until, // where every run ends
        // Without a run in the last segment, there is nothing to keep there.
        _ => last_run(queue, until).unwrap_or(key::segment_start(until)),
    };
    (from < end).then(|| (key::numbered(queue, from), key::numbered(queue, end)))
}

/// The handles of the column families of an open database.
pub(super) struct Families<'a> {
    pub meta: &'a ColumnFamily,
    pub meta_copy: &'a ColumnFamily,
    pub log: &'a ColumnFamily,
    pub state: &'a ColumnFamily,
    pub consumed: &'a ColumnFamily,
    pub notes: &'a ColumnFamily,
}

impl<'a> Families<'a> {
    /// # Errors
    /// [`StoreError::Closed`] if a family is missing, which no opened database is in.
    pub fn of(db: &'a DB) -> Result<Families<'a>, StoreError> {
        let family = |name| db.cf_handle(name).ok_or(StoreError::Closed);
        Ok(Families {
            meta: family(key::META)?,
            meta_copy: family(key::META_COPY)?,
            log: family(key::LOG)?,
            state: family(key::STATE)?,
            consumed: family(key::CONSUMED)?,
            notes: family(key::NOTES)?,
        })
    }
}
