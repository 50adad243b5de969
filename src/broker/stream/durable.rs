//! A stream and the store: opening, what goes into a round, and what is read back.

use parking_lot::MutexGuard;

use super::{
    Stream,
    filter::Filter,
    offsets::{self, Offsets},
    readers::LoadId,
    segments::{self, Segments},
    state::State,
};
use crate::{
    broker::{
        port::Effects,
        queue::{
            ConsumerId,
            chunk::{CHUNK_BYTES, Chunk},
            record,
        },
    },
    clock,
    store::{Round, RoundBuilder, RoundSource, SEGMENT_RECORDS, StoreError},
};

/// What a turn on a thread of the store's or of a connection may cost, in messages looked at: the stream is locked meanwhile.
pub(super) const DELIVERY_COST: usize = 2048;
/// As above, for the commit thread, which has other things to do.
const COMMIT_COST: usize = 256;
/// Bytes of dropped records in a segment of the store's that are worth a delete of their own.
const DELETE_BYTES: u64 = 16 << 20;
/// Offsets read from the store in one go.
const READ_OFFSETS: u64 = 16 << 10;
/// Bytes read in one go. The last record may exceed it, and a chunk should not have to grow for that.
const READ_BYTES: usize = CHUNK_BYTES - (4 << 10);
/// Bytes read in one go where most of it is not wanted: for a reader with a filter, or one that looks for a time.
const SCAN_BYTES: usize = 1 << 20;
/// Bytes of notes read in one go.
const NOTES_BYTES: usize = 1 << 20;

impl Stream {
    /// Locks the state; the first use of a recovered stream reads its notes.
    pub(super) fn open(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock();
        if let Some(record) = state.unopened {
            let mut notes = Vec::new();
            self.read_notes(&segments::key(record.head), segments::NOTE_KIND, &mut |key, note| {
                notes.push((key.to_vec(), note.to_vec()));
            });
            let segments = Segments::recovered(record.head, record.tail, notes, clock::now_unix_ms());
            let mut offsets = Offsets::default();
            self.read_notes(&[offsets::NOTE_KIND], offsets::NOTE_KIND, &mut |key, note| offsets.recover(key, note));
            state.opened(record, segments, offsets, self.budget.clone());
        }
        state
    }

    /// Reads the notes of a kind from a key on.
    fn read_notes(&self, from: &[u8], kind: u8, each: &mut dyn FnMut(&[u8], &[u8])) {
        let mut next = Some(from.to_vec());
        while let Some(from) = next {
            next = self.store.read_notes(self.id, &from, &[kind + 1], NOTES_BYTES, each).unwrap_or_else(|error| {
                tracing::error!(queue = %self.resource.name, vhost = %self.resource.vhost, %error, "notes of a stream cannot be read; segments may be kept for longer and consumers may begin elsewhere");
                None
            });
        }
    }

    /// Puts the stream on the store's list; answers the round that takes its present changes.
    pub(super) fn mark_dirty(&self, state: &mut State) -> Round {
        if let Some(round) = state.dirty {
            return round;
        }
        let Some(this) = self.this.upgrade() else { return 0 };
        *state.dirty.insert(self.store.mark_dirty(this))
    }

    /// Hands out messages for a bounded while; what is left goes on elsewhere, and what has to be read is asked for.
    pub(super) fn deliver_locked(&self, state: &mut State, cost: usize, effects: &mut Effects) {
        state.deliver(cost, effects);
        for index in std::mem::take(&mut state.absent) {
            self.request_load(state, index);
        }
        if state.readers.has_turn() && !state.is_continuing {
            state.is_continuing = true;
            self.spawn(|stream| {
                let mut effects = Effects::default();
                {
                    let mut state = stream.state.lock();
                    state.is_continuing = false;
                    stream.deliver_locked(&mut state, DELIVERY_COST, &mut effects);
                    state.trim();
                }
                effects.deliver_and_wake();
            });
        }
    }

    /// Runs `job` on the store's reader thread.
    fn spawn(&self, job: impl FnOnce(&Stream) + Send + 'static) {
        if let Some(this) = self.this.upgrade() {
            self.store.spawn_read(Box::new(move || job(&this)));
        }
    }

    fn request_load(&self, state: &mut State, index: u32) {
        let Some((id, from)) = state.begin_load(index) else { return };
        let until = state.tail.resident_from().min(state.committed_to).min(from + READ_OFFSETS);
        let filter = state.readers.at_mut(index).and_then(|reader| reader.filter.clone());
        self.spawn(move |stream| stream.load(id, from, until, filter.as_deref()));
    }

    fn load(&self, id: LoadId, from: u64, until: u64, filter: Option<&Filter>) {
        let is_awaited = self.state.lock().is_awaited(id);
        let chunk = is_awaited.then(|| self.read_chunk(from, until, filter)).flatten();
        let mut effects = Effects::default();
        {
            let mut state = self.state.lock();
            state.end_load(id, chunk);
            self.deliver_locked(&mut state, DELIVERY_COST, &mut effects);
        }
        effects.deliver_and_wake();
    }

    /// Reads what a reader wants of `[from, until)`, about [`READ_BYTES`] of it at most.
    fn read_chunk(&self, from: u64, until: u64, filter: Option<&Filter>) -> Option<Chunk> {
        let expected_bytes = if filter.is_some() { 0 } else { CHUNK_BYTES };
        let mut chunk = Chunk::new(from, expected_bytes, self.budget.clone());
        let (mut at, mut kept, mut scanned) = (from, 0, 0);
        while at < until && kept < READ_BYTES / 2 && scanned < SCAN_BYTES {
            let read = self.store.read_records(self.id, at, until, READ_BYTES, &mut |offset, bytes| {
                scanned += bytes.len();
                let is_wanted = filter.is_none_or(|filter| {
                    record::decode(bytes, None).is_some_and(|message| filter.matches(message.properties))
                });
                if is_wanted {
                    kept += bytes.len();
                    chunk.append_record(offset, bytes, None);
                }
            });
            match read {
                Ok(end) => at = end.max(at + 1),
                Err(error) => {
                    tracing::error!(queue = %self.resource.name, vhost = %self.resource.vhost, offset = at, %error, "messages of a stream cannot be read");
                    return None;
                }
            }
        }
        chunk.cover(at);
        Some(chunk)
    }

    /// Looks for the offset at which a reader begins that asked for a time.
    pub(super) fn seek(&self, id: ConsumerId, unix_ms: u64, from: u64, until: u64) {
        self.spawn(move |stream| {
            let next = stream.find_time(unix_ms, from, until);
            let mut effects = Effects::default();
            {
                let mut state = stream.state.lock();
                if let Some(reader) = state.readers.get_mut(id) {
                    reader.next = next;
                    reader.is_seeking = false;
                }
                let committed_to = state.committed_to;
                state.readers.queue_up(id.index, committed_to);
                stream.deliver_locked(&mut state, DELIVERY_COST, &mut effects);
            }
            effects.deliver_and_wake();
        });
    }

    /// The first offset of `[from, until)` whose record was published at `unix_ms` or later; `until` if there is none.
    ///
    /// # Cost
    /// Looks at one record at the start of a segment of the store's each step, some ten in a stream of millions, and then
    /// reads one segment: to look at single records within it would be to read its runs again and again.
    fn find_time(&self, unix_ms: u64, mut from: u64, until: u64) -> u64 {
        let mut end = until.max(from);
        while from < end {
            let middle = from + (end - from) / 2;
            let before = middle - middle % SEGMENT_RECORDS;
            let probe = if before > from { before } else { before + SEGMENT_RECORDS };
            if probe >= end {
                return self.scan_for_time(unix_ms, from, end);
            }
            let mut found = None;
            let read = self.store.read_records(self.id, probe, end, 1, &mut |offset, bytes| {
                found = record::head(bytes).map(|head| (offset, head.published_unix_ms));
            });
            match (read, found) {
                (Err(error), _) => {
                    self.warn_of_time(probe, &error);
                    return from;
                }
                (Ok(_), Some((offset, published))) if published < unix_ms => from = offset + 1,
                (Ok(_), _) => end = probe,
            }
        }
        from
    }

    /// [`Stream::find_time`] by reading everything from `from` on.
    fn scan_for_time(&self, unix_ms: u64, from: u64, end: u64) -> u64 {
        let (mut at, mut found) = (from, None);
        while at < end && found.is_none() {
            let read = self.store.read_records(self.id, at, end, SCAN_BYTES, &mut |offset, bytes| {
                if found.is_none() && record::head(bytes).is_some_and(|head| head.published_unix_ms >= unix_ms) {
                    found = Some(offset);
                }
            });
            match read {
                Ok(next) => at = next.max(at + 1),
                Err(error) => {
                    self.warn_of_time(at, &error);
                    return at;
                }
            }
        }
        found.unwrap_or(end)
    }

    fn warn_of_time(&self, offset: u64, error: &StoreError) {
        tracing::error!(queue = %self.resource.name, vhost = %self.resource.vhost, offset, %error, "a time cannot be looked for in a stream; its reader begins earlier");
    }
}

impl RoundSource for Stream {
    fn drain(&self, round: &mut RoundBuilder) {
        let mut guard = self.open();
        let state = &mut *guard;
        state.dirty = None;
        state.unwritten.taken();
        if state.deleted {
            return;
        }
        if let Some(durability) = state.rules.durability {
            round.set_durability(durability);
        }
        state.in_store = true;
        let id = self.id;
        if state.written_to < state.tail.end() {
            state.tail.for_each(state.written_to, &mut state.scratch, &mut |offset, record| {
                round.append(id, offset, record);
            });
            state.next_chunk = state.written_to;
            state.written_to = state.tail.end();
        }
        state.segments.drain(id, round);
        state.offsets.drain(id, round);
        let head = state.segments.head();
        let whole = head / SEGMENT_RECORDS;
        if whole > state.deleted_segments {
            round.delete_segments(id, state.deleted_segments, whole);
            state.deleted_segments = whole;
        }
        if state.dropped_bytes >= DELETE_BYTES {
            // Large messages: a segment of the store's may take gigabytes to fill, so what is dropped of it goes before.
            round.delete_records(id, whole * SEGMENT_RECORDS, head);
            state.dropped_bytes = 0;
        }
        round.put_state(id, &state.record());
        // A large record made whole leaves a large buffer behind.
        state.scratch.shrink_to(64 << 10);
    }

    fn round_ended(&self, committed: bool) {
        let mut effects = Effects::default();
        {
            let mut state = self.state.lock();
            if !committed || state.unopened.is_some() || state.deleted {
                return;
            }
            // Appends since the drain are not in this round: `written_to` is where the drain stopped.
            state.committed_to = state.written_to;
            state.last_chunk = state.next_chunk;
            let committed_to = state.committed_to;
            state.readers.queue_up_all(committed_to);
            self.deliver_locked(&mut state, COMMIT_COST, &mut effects);
            state.trim();
        }
        effects.deliver_and_wake();
    }
}
