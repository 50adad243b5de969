//! Giving disk space back.
//!
//! A deletion is a range tombstone in a memtable. RocksDB drops what it covers when a compaction happens to bring the
//! two together, which it starts when enough is *written*: a queue that is drained and then left alone would keep its
//! files. So a thread of the store's own compacts the key ranges that were deleted, some time after they were.
//!
//! # Why this is cheap
//! Most of the log is in blob files, so the compaction moves keys alone, and a blob file with no live run left is dropped
//! without being read. Only when more than half of all blob bytes are garbage (blob files that long and short-lived
//! queues share) are live ones copied, so that a byte is copied about once in its life. RocksDB's own rule, to copy
//! whatever is in the oldest files at every compaction, costs a backlog of a hundred queues six times its size.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rocksdb::{BottommostLevelCompaction, ColumnFamily, CompactOptions, DB};

use super::bodies::EndedBodies;
use super::rocks::Rocks;
use super::round::DeletedNotes;
use super::{QueueId, QueueSeq, key};

/// From the first deletion to the compaction: as many as possible are to share it.
const MIN_DELAY: Duration = Duration::from_secs(10);

/// And no shorter than so many times what the last compaction took.
const DELAY_FACTOR: u32 = 20;

/// More ranges than this are compacted as one.
const MAX_RANGES: usize = 16;

/// Notes that were deleted one by one are not worth a compaction before they are this many.
const MIN_DELETED_NOTES: u64 = 50_000;

/// The same of references to bodies, which are small.
const MIN_DELETED_REFERENCES: u64 = 50_000;

/// Less garbage than this is not worth copying anything.
const MIN_GARBAGE_BYTES: u64 = 64 * 1024 * 1024;
/// The same of bodies, which are large.
const MIN_GARBAGE_BODY_BYTES: u64 = 4 * 1024 * 1024;

/// Of the blob files that are in use: all bytes, and those of runs that were deleted.
pub(super) const LIVE_BLOB_BYTES: &CStr = c"rocksdb.live-blob-file-size";
const GARBAGE_BLOB_BYTES: &CStr = c"rocksdb.live-blob-file-garbage-size";

/// Per queue, the first position that was deleted, and the one after the last.
pub(super) type Deleted = BTreeMap<QueueId, (QueueSeq, QueueSeq)>;

/// Per owner (as it stands before the keys of its notes), the whole key of the first note that was deleted, and the end.
pub(super) type SweptNotes = BTreeMap<[u8; key::OWNER_BYTES], (Vec<u8>, Vec<u8>)>;

/// What was deleted since the last compaction.
#[derive(Default)]
pub(super) struct Sweeper {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Default)]
struct State {
    deleted: Deleted,
    notes: SweptNotes,
    /// Notes deleted one by one; a range counts as enough.
    deleted_notes: u64,
    /// The lowest and the highest id of bodies that are gone.
    bodies: Option<(u64, u64)>,
    /// References to bodies that are gone.
    deleted_references: u64,
    stop: bool,
}

/// What one go of the sweeping thread gives back.
struct Sweep {
    records: Deleted,
    notes: SweptNotes,
    bodies: Option<(u64, u64)>,
    references: bool,
}

impl State {
    fn is_worth_a_sweep(&self) -> bool {
        !self.deleted.is_empty()
            || self.bodies.is_some()
            || self.deleted_notes >= MIN_DELETED_NOTES
            || self.deleted_references >= MIN_DELETED_REFERENCES
    }
}

impl Sweeper {
    /// Remembers records whose deletion is committed.
    pub fn note(&self, deleted: impl Iterator<Item = (QueueId, QueueSeq, QueueSeq)>) {
        let mut deleted = deleted.peekable();
        if deleted.peek().is_none() {
            return;
        }
        let mut state = self.state.lock();
        for (queue, from, until) in deleted {
            let range = state.deleted.entry(queue).or_insert((from, until));
            *range = (range.0.min(from), range.1.max(until));
        }
        drop(state);
        self.wake.notify_one();
    }

    /// Remembers notes whose deletion is committed.
    pub fn note_notes<'a>(&self, deleted: impl Iterator<Item = DeletedNotes<'a>>) {
        let mut deleted = deleted.peekable();
        if deleted.peek().is_none() {
            return;
        }
        let mut state = self.state.lock();
        for notes in deleted {
            let (from, until, count) = match notes {
                DeletedNotes::One(key) => (key, key, 1),
                DeletedNotes::Range(from, until) => (from, until, MIN_DELETED_NOTES),
            };
            state.deleted_notes += count;
            let Some(owner) = from.first_chunk() else { continue };
            let range = state.notes.entry(*owner).or_insert_with(|| (from.to_vec(), until.to_vec()));
            if from < range.0.as_slice() {
                from.clone_into(&mut range.0);
            }
            if until > range.1.as_slice() {
                until.clone_into(&mut range.1);
            }
        }
        let worth = state.is_worth_a_sweep();
        drop(state);
        if worth {
            self.wake.notify_one();
        }
    }

    /// Remembers bodies and references whose end is committed.
    pub fn note_bodies(&self, ended: &EndedBodies) {
        if ended.references == 0 {
            return; // nor has a body ended, then
        }
        let mut state = self.state.lock();
        state.deleted_references += ended.references;
        if let (Some(&low), Some(&high)) = (ended.ids.iter().min(), ended.ids.iter().max()) {
            let (lowest, highest) = state.bodies.unwrap_or((low, high));
            state.bodies = Some((lowest.min(low), highest.max(high)));
        }
        let worth = state.is_worth_a_sweep();
        drop(state);
        if worth {
            self.wake.notify_one();
        }
    }

    /// Has all bodies looked at: an earlier start may have ended before it could give back what was deleted.
    pub fn note_start_with_bodies(&self) {
        self.state.lock().bodies = Some((0, u64::MAX));
    }

    /// Lets [`Rocks::sweep_deleted`] end.
    pub fn stop(&self) {
        self.state.lock().stop = true;
        self.wake.notify_one();
    }

    /// Waits for deletions, and a while longer. `None` when the store closes.
    fn take(&self, delay: Duration) -> Option<Sweep> {
        let mut state = self.state.lock();
        self.wake.wait_while(&mut state, |state| !state.is_worth_a_sweep() && !state.stop);
        self.wake.wait_while_for(&mut state, |state| !state.stop, delay);
        state.deleted_notes = 0;
        let references = state.deleted_references >= MIN_DELETED_REFERENCES;
        if references {
            state.deleted_references = 0;
        }
        (!state.stop).then(|| Sweep {
            records: std::mem::take(&mut state.deleted),
            notes: std::mem::take(&mut state.notes),
            bodies: state.bodies.take(),
            references,
        })
    }
}

impl Rocks {
    /// The sweeping thread.
    pub fn sweep_deleted(&self) {
        let mut delay = MIN_DELAY;
        while let Some(sweep) = self.sweeper().take(delay) {
            let start = Instant::now();
            self.sweep(&sweep.records);
            self.sweep_notes(&sweep.notes);
            if let Some((lowest, highest)) = sweep.bodies {
                self.sweep_bodies(lowest, highest);
            }
            if sweep.references {
                self.sweep_references();
            }
            delay = MIN_DELAY.max(start.elapsed() * DELAY_FACTOR);
        }
    }

    /// Gives back what only deleted records hold. Takes as long as it takes; ends early when the database closes.
    pub fn sweep(&self, deleted: &Deleted) {
        if deleted.is_empty() {
            return;
        }
        let ranges: Vec<_> = deleted
            .iter()
            .map(|(queue, (from, until))| (key::numbered(*queue, *from), key::numbered(*queue, *until)))
            .collect();
        self.pages().open().families().for_each(|(db, family)| sweep_family(db, family, &ranges, MIN_GARBAGE_BYTES));
        let swept = self.with(|db| {
            if let Some(family) = db.cf_handle(key::LOG) {
                sweep_family(db, family, &ranges, MIN_GARBAGE_BYTES);
            }
            Ok(())
        });
        drop(swept); // closed meanwhile
    }

    /// As [`Rocks::sweep`], for notes.
    pub fn sweep_notes(&self, deleted: &SweptNotes) {
        if deleted.is_empty() {
            return;
        }
        let ranges: Vec<_> = deleted.values().map(|(from, until)| (from.as_slice(), until.as_slice())).collect();
        let swept = self.with(|db| {
            if let Some(family) = db.cf_handle(key::NOTES) {
                sweep_family(db, family, &ranges, MIN_GARBAGE_BYTES);
            }
            Ok(())
        });
        drop(swept); // closed meanwhile
    }

    /// As [`Rocks::sweep`], for bodies of these ids (both included).
    pub fn sweep_bodies(&self, lowest: u64, highest: u64) {
        let swept = self.with(|db| {
            if let Some(family) = db.cf_handle(key::BODIES) {
                let mut options = CompactOptions::default();
                options.set_exclusive_manual_compaction(false);
                // A body and its deletion, in a file each, are otherwise moved to the last level as they are, and stay.
                options.set_bottommost_level_compaction(BottommostLevelCompaction::Force);
                let ids = [(key::body(lowest), key::body(highest))];
                sweep_ranges(db, family, &ids, MIN_GARBAGE_BODY_BYTES, &options);
            }
            Ok(())
        });
        drop(swept); // closed meanwhile
    }

    /// Cleans up behind references to bodies that are gone. All of them are looked at: they are small.
    pub fn sweep_references(&self) {
        let swept = self.with(|db| {
            if let Some(family) = db.cf_handle(key::BODY_REFERENCES) {
                sweep_family(db, family, &[(&[][..], &[0xff][..])], u64::MAX);
            }
            Ok(())
        });
        drop(swept); // closed meanwhile
    }
}

/// The ranges come in order, their ends included.
fn sweep_family<K: AsRef<[u8]>>(db: &DB, family: &ColumnFamily, ranges: &[(K, K)], min_garbage_bytes: u64) {
    let mut options = CompactOptions::default();
    options.set_exclusive_manual_compaction(false);
    sweep_ranges(db, family, ranges, min_garbage_bytes, &options);
}

fn sweep_ranges<K: AsRef<[u8]>>(
    db: &DB,
    family: &ColumnFamily,
    ranges: &[(K, K)],
    min_garbage_bytes: u64,
    options: &CompactOptions,
) {
    if ranges.len() <= MAX_RANGES {
        for (from, until) in ranges {
            db.compact_range_cf_opt(family, Some(from), Some(until), options);
        }
    } else if let ([(from, _), ..], [.., (_, until)]) = (ranges, ranges) {
        db.compact_range_cf_opt(family, Some(from), Some(until), options);
    }
    let number = |name: &CStr| db.property_int_value_cf(family, name).ok().flatten().unwrap_or(0);
    let (live, garbage) = (number(LIVE_BLOB_BYTES), number(GARBAGE_BLOB_BYTES));
    if garbage > min_garbage_bytes && garbage > live / 2 {
        copy_live_blobs(db, family);
    }
}

/// Copies the live runs out of the older half of the blob files, which can then be dropped.
fn copy_live_blobs(db: &DB, family: &ColumnFamily) {
    const COPY: [(&str, &str); 2] =
        [("enable_blob_garbage_collection", "true"), ("blob_garbage_collection_age_cutoff", "0.5")];
    if let Err(error) = db.set_options_cf(family, &COPY) {
        tracing::warn!(%error, "blob files cannot be compacted");
        return;
    }
    let mut options = CompactOptions::default();
    options.set_bottommost_level_compaction(BottommostLevelCompaction::Force);
    db.compact_range_cf_opt(family, None::<&[u8]>, None::<&[u8]>, &options);
    if let Err(error) = db.set_options_cf(family, &[("enable_blob_garbage_collection", "false")]) {
        tracing::warn!(%error, "blob files are copied more often than they need to be");
    }
}
