//! Reading back: the records of a queue, from its log and its pages in one order, and its consumed ranges.

use rocksdb::{ColumnFamily, DB, DBRawIterator, ReadOptions};

use super::bodies::{Reference, Unreadable};
use super::pages::OpenPages;
use super::recovery::{decode_consumed, is_damage};
use super::rocks::Rocks;
use super::run::{Entry, RunDamage, RunReader};
use super::{EachSplitRecord, QueueId, QueueSeq, StoreError, key};

/// Reads that may go on for this long ask the kernel ahead of time.
pub(super) const READAHEAD_BYTES: usize = 256 * 1024;

impl Rocks {
    /// See [`Store::read_records`](super::Store::read_records).
    pub fn read_records(
        &self,
        queue: QueueId,
        from: QueueSeq,
        until: QueueSeq,
        max_bytes: usize,
        each: &mut dyn FnMut(QueueSeq, &[u8]),
    ) -> Result<QueueSeq, StoreError> {
        let mut whole = Vec::new();
        self.read_split_records(queue, from, until, max_bytes, &mut |seq, record, body| match body {
            None => each(seq, record),
            Some(body) => {
                whole.clear();
                whole.extend_from_slice(record);
                whole.extend_from_slice(body);
                each(seq, &whole);
            }
        })
    }

    /// See [`Store::read_split_records`](super::Store::read_split_records).
    pub fn read_split_records(
        &self,
        queue: QueueId,
        from: QueueSeq,
        until: QueueSeq,
        max_bytes: usize,
        each: &mut EachSplitRecord<'_>,
    ) -> Result<QueueSeq, StoreError> {
        self.read_stored(queue, from, until, max_bytes, &mut |db, seq, stored| {
            let (reference, head) = match stored {
                Stored::Reference(reference, head) => (reference, head),
                Stored::Whole(record) => {
                    each(seq, record, None);
                    return Ok(record.len());
                }
            };
            match self.read_body(db, queue, seq, &reference) {
                Ok(Some(body)) => {
                    each(seq, head, Some(&body));
                    Ok(head.len() + body.len())
                }
                Ok(None) => Ok(0),
                Err(Unreadable::For(error)) => Err(error),
                Err(Unreadable::Damaged(reason)) => {
                    self.report_damaged_record(queue, seq, &reason);
                    Ok(0)
                }
            }
        })
    }

    /// Calls `each` with what the log and the pages have of `from..until`, in order; it answers how many bytes that was.
    pub fn read_stored(
        &self,
        queue: QueueId,
        from: QueueSeq,
        until: QueueSeq,
        max_bytes: usize,
        each: &mut dyn FnMut(&DB, QueueSeq, Stored<'_>) -> Result<usize, StoreError>,
    ) -> Result<QueueSeq, StoreError> {
        if from >= until {
            return Ok(until);
        }
        let readahead_bytes = if max_bytes >= READAHEAD_BYTES { READAHEAD_BYTES } else { 0 };
        self.with(|db| {
            let open_pages = self.pages().of(queue);
            let family = db.cf_handle(key::LOG).ok_or(StoreError::Closed)?;
            let wanted = Stretch { db, family, queue, from, until, readahead_bytes };
            let mut log = Cursor::open(self, from, wanted)?;
            let mut pages = Vec::new();
            for (db, family) in open_pages.iter().flat_map(OpenPages::families) {
                pages.push(Cursor::open(self, from, Stretch { db, family, ..wanted })?);
            }
            let mut bytes = 0usize;
            loop {
                let page = pages.iter().enumerate().filter_map(|(index, page)| Some((page.seq()?, index))).min();
                let cursor = match (log.seq(), page) {
                    (log_seq, Some((page_seq, index))) if log_seq.is_none_or(|seq| page_seq < seq) => &mut pages[index],
                    (Some(_), _) => &mut log,
                    (None, _) => return Ok(until),
                };
                let Some((seq, stored)) = cursor.stored() else { return Ok(until) };
                match stored {
                    Some(stored) => bytes = bytes.saturating_add(each(db, seq, stored)?),
                    None => self.report_damaged_record(queue, seq, "reference to a body cannot be read"),
                }
                if bytes >= max_bytes {
                    return Ok(seq + 1);
                }
                cursor.advance()?;
                // A record that is in several places is the same record.
                for page in &mut pages {
                    while page.seq().is_some_and(|page_seq| page_seq <= seq) {
                        page.advance()?;
                    }
                }
            }
        })
    }

    fn report_damaged_record(&self, queue: QueueId, seq: QueueSeq, reason: &str) {
        self.count_damage();
        tracing::error!(queue = queue.0, position = seq, reason, "a stored record is damaged and was skipped");
    }

    /// See [`Store::read_consumed`](super::Store::read_consumed).
    pub fn read_consumed(&self, queue: QueueId) -> Result<Vec<(QueueSeq, QueueSeq)>, StoreError> {
        self.with(|db| {
            let family = db.cf_handle(key::CONSUMED).ok_or(StoreError::Closed)?;
            let stretch = Stretch { db, family, queue, from: 0, until: u64::MAX, readahead_bytes: 0 };
            let mut sets = stretch.iterate();
            let mut ranges = Vec::new();
            let mut next_segment = 0;
            sets.seek_to_first();
            loop {
                while let Some((key, value)) = sets.item() {
                    let parsed = key::parse_numbered(key);
                    let decoded = parsed.and_then(|(_, segment)| {
                        next_segment = segment.saturating_add(1);
                        decode_consumed(queue, segment, value, &mut ranges)
                    });
                    if decoded.is_none() {
                        self.damaged_consumed(queue, parsed.map(|(_, segment)| segment), "checksum mismatch");
                    }
                    sets.next();
                }
                match sets.status() {
                    Ok(()) => return Ok(merge(ranges)),
                    Err(error) if is_damage(&error) => {
                        self.damaged_consumed(queue, Some(next_segment), error.as_ref());
                        let Some((segment, readable)) = stretch.first_readable(next_segment) else {
                            return Ok(merge(ranges));
                        };
                        (next_segment, sets) = (segment, readable);
                    }
                    Err(error) => return Err(read_error("consumed ranges", &error)),
                }
            }
        })
    }

    fn damaged_consumed(&self, queue: QueueId, segment: Option<u64>, reason: &str) {
        self.count_damage();
        tracing::error!(
            queue = queue.0,
            segment,
            reason,
            "a consumed set is damaged and was skipped; messages of its segment are delivered again"
        );
    }
}

/// Where the last run begins that begins before `until`, in the segment of the position before that; nothing if there
/// is none, or if it cannot be read.
pub(super) fn last_run_before(db: &DB, family: &ColumnFamily, queue: QueueId, until: QueueSeq) -> Option<QueueSeq> {
    let from = key::segment_start(until.checked_sub(1)?);
    let mut runs = Stretch { db, family, queue, from, until, readahead_bytes: 0 }.iterate();
    runs.seek_to_last();
    let (_, first) = key::parse_numbered(runs.key()?)?;
    Some(first)
}

/// A stretch of one queue's keys in one family.
#[derive(Clone, Copy)]
struct Stretch<'a> {
    db: &'a DB,
    family: &'a ColumnFamily,
    queue: QueueId,
    /// The lowest number; nothing before it is looked at, not even tombstones.
    from: u64,
    until: u64,
    readahead_bytes: usize,
}

impl<'a> Stretch<'a> {
    fn iterate(&self) -> DBRawIterator<'a> {
        let mut options = ReadOptions::default();
        options.set_iterate_lower_bound(key::numbered(self.queue, self.from));
        options.set_iterate_upper_bound(key::numbered(self.queue, self.until));
        options.set_readahead_size(self.readahead_bytes);
        self.db.raw_iterator_cf_opt(self.family, options)
    }

    /// See [`first_placed`].
    fn first_readable(&self, damaged: u64) -> Option<(u64, DBRawIterator<'a>)> {
        let place = |number: u128| {
            let mut iterator = self.iterate();
            iterator.seek(key::numbered(self.queue, u64::try_from(number).unwrap_or(u64::MAX)));
            iterator.status().is_ok().then_some(iterator)
        };
        let (number, iterator) = first_placed(damaged.into(), self.until.into(), place)?;
        Some((u64::try_from(number).ok()?, iterator))
    }
}

/// Finds the first number after `damaged` and before `until` at which an iterator can be placed without meeting the
/// damage that lies at or behind `damaged`, and answers both; `None` if there is none.
///
/// Placing it fails while the damage is the next thing from there. So the numbers that fail are one stretch, and
/// doubling steps and then halving them finds its end. Each attempt takes an iterator of its own: RocksDB's table
/// iterator remembers a block that could not be read for the one it stood on before.
pub(super) fn first_placed<T>(
    damaged: u128,
    until: u128,
    mut place: impl FnMut(u128) -> Option<T>,
) -> Option<(u128, T)> {
    let (mut bad, mut step, mut good) = (damaged, 1u128, None);
    while good.is_none() {
        let probe = bad.saturating_add(step);
        if probe >= until {
            break;
        }
        good = place(probe).map(|placed| (probe, placed));
        if good.is_none() {
            bad = probe;
            step = step.saturating_mul(2);
        }
    }
    let mut end = good.as_ref().map_or(until, |(number, _)| *number);
    while end.saturating_sub(bad) > 1 {
        let middle = bad + (end - bad) / 2;
        match place(middle) {
            Some(placed) => (end, good) = (middle, Some((middle, placed))),
            None => bad = middle,
        }
    }
    good
}

/// A record as the log or the pages have it.
pub(super) enum Stored<'a> {
    Whole(&'a [u8]),
    /// With what stands before the body.
    Reference(Reference, &'a [u8]),
}

/// A position in the runs of one queue in one family, on a record that is wanted, or at the end.
struct Cursor<'a> {
    rocks: &'a Rocks,
    stretch: Stretch<'a>,
    runs: DBRawIterator<'a>,
    /// Records before it are not wanted, or were passed already.
    next: QueueSeq,
    /// In the run that `runs` stands on.
    reader: Option<RunReader>,
    current: Option<Entry>,
}

impl<'a> Cursor<'a> {
    /// Opens a cursor on the first record from `from` on.
    ///
    /// The run that holds `from` may begin before it, but not before its segment; so that is the lower bound.
    fn open(rocks: &'a Rocks, from: QueueSeq, wanted: Stretch<'a>) -> Result<Cursor<'a>, StoreError> {
        let stretch = Stretch { from: key::segment_start(from), ..wanted };
        let runs = stretch.iterate();
        let mut cursor = Cursor { rocks, stretch, runs, next: from, reader: None, current: None };
        cursor.runs.seek_for_prev(key::numbered(stretch.queue, from));
        if !cursor.runs.valid() {
            let before = cursor.runs.status();
            cursor.runs = stretch.iterate();
            cursor.runs.seek(key::numbered(stretch.queue, from));
            if let (Err(error), Ok(())) = (before, cursor.runs.status()) {
                cursor.report_unreadable(from, from + 1, &error); // the run that begins before `from`
            }
        }
        cursor.advance()?;
        Ok(cursor)
    }

    fn seq(&self) -> Option<QueueSeq> {
        self.current.as_ref().map(|entry| entry.seq)
    }

    /// The record; nothing in its place if it is a broken reference.
    fn stored(&self) -> Option<(QueueSeq, Option<Stored<'_>>)> {
        let entry = self.current.as_ref()?;
        let bytes = self.runs.value()?.get(entry.bytes.clone())?;
        let stored = match entry.is_reference {
            false => Some(Stored::Whole(bytes)),
            true => Reference::decode(bytes).map(|(reference, head)| Stored::Reference(reference, head)),
        };
        Some((entry.seq, stored))
    }

    /// Goes to the next record, over everything that is damaged.
    fn advance(&mut self) -> Result<(), StoreError> {
        self.current = None;
        loop {
            let Some((key, run)) = self.runs.item() else {
                match self.runs.status() {
                    Ok(()) => return Ok(()),
                    Err(error) => self.skip_unreadable(&error)?,
                }
                continue;
            };
            let Some((_, first)) = key::parse_numbered(key) else {
                self.runs.next(); // no key of ours: bounds and all, this does not happen
                continue;
            };
            let reader = self.reader.get_or_insert_with(|| RunReader::new(self.stretch.queue, first));
            match reader.next(run) {
                None => {
                    self.reader = None;
                    self.runs.next();
                }
                Some(Ok(entry)) if entry.seq < self.next => {}
                Some(Ok(entry)) if entry.seq >= self.stretch.until => {
                    self.reader = None;
                    self.runs.next();
                }
                Some(Ok(entry)) => {
                    self.next = entry.seq + 1;
                    self.current = Some(entry);
                    return Ok(());
                }
                Some(Err(damage)) => self.report(damage),
            }
        }
    }

    fn report(&self, damage: RunDamage) {
        if (self.next..self.stretch.until).contains(&damage.seq) || damage.to_the_end {
            self.rocks.count_damage();
            tracing::error!(
                queue = self.stretch.queue.0,
                position = damage.seq,
                to_the_end_of_the_run = damage.to_the_end,
                reason = damage.reason,
                "a stored record is damaged and was skipped"
            );
        }
    }

    /// The run after the last one cannot be read at all: goes on behind it.
    fn skip_unreadable(&mut self, error: &rocksdb::Error) -> Result<(), StoreError> {
        if !is_damage(error) {
            return Err(read_error("stored records", error));
        }
        let from = self.next;
        self.reader = None;
        match self.stretch.first_readable(from) {
            Some((readable, runs)) => (self.next, self.runs) = (readable, runs),
            None => {
                self.next = self.stretch.until;
                self.runs = self.stretch.iterate(); // on nothing, and without an error
            }
        }
        self.report_unreadable(from, self.next, error);
        Ok(())
    }

    fn report_unreadable(&self, from: QueueSeq, until: QueueSeq, error: &rocksdb::Error) {
        self.rocks.count_damage();
        self.rocks.note_unreadable(self.stretch.queue, from, until);
        tracing::error!(
            queue = self.stretch.queue.0,
            position = from,
            until,
            reason = error.as_ref(),
            "stored records cannot be read and were skipped"
        );
    }
}

pub(super) fn read_error(what: &'static str, error: &rocksdb::Error) -> StoreError {
    StoreError::Read { what, reason: error.to_string() }
}

/// Joins ranges that touch; they come in order.
fn merge(ranges: Vec<(QueueSeq, QueueSeq)>) -> Vec<(QueueSeq, QueueSeq)> {
    let mut merged: Vec<(QueueSeq, QueueSeq)> = Vec::with_capacity(ranges.len());
    for (from, until) in ranges {
        match merged.last_mut() {
            Some(last) if from <= last.1 => last.1 = last.1.max(until),
            _ => merged.push((from, until)),
        }
    }
    merged
}
