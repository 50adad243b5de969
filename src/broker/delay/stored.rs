//! Waiting messages in the store: keys, what goes into a round, what is read back.
//!
//! # Notes
//! - `l`: version, number of messages, next serial, and an id before which nothing waits (due time and serial), each but
//!   the version as 8 bytes, little-endian. Written with every change, so that a start needs no other note.
//! - `l`, due time, serial (8 bytes each, big-endian): a message, as the log of a queue keeps it.
//!
//! # Why they are deleted one by one
//! What was taken since the last round is one range, but a range deletion a round measures no better than the single ones
//! (a million messages in a minute take 11 % of a core either way), and all that reads has to look at it.

use super::{Clearing, DelayId, Delays, Loading, Record, State, window::Phase};
use crate::{
    clock,
    store::{RoundBuilder, RoundSource, StoreError},
};

const STATE_KEY: &[u8] = b"l";
/// Behind the state, before every message.
const FIRST_KEY: &[u8] = b"l\0";
/// Behind every message.
const END_KEY: &[u8] = b"m";
const KEY_BYTES: usize = 17;

const STATE_VERSION: u8 = 1;
const STATE_BYTES: usize = 33;

/// The part of the window that is read in one go. Half of it is free then, and in memory a message takes more.
const LOADED_PART: usize = 4;
/// How long a read that failed is left alone.
const RETRY_MS: u64 = 1_000;
/// Bytes read in one go for a listing, or for counting.
const LIST_BYTES: usize = 128 << 10;
/// Room that lists of ids keep from round to round.
const KEPT_IDS: usize = 4 << 10;

fn key(id: DelayId) -> [u8; KEY_BYTES] {
    let mut key = [b'l'; KEY_BYTES];
    key[1..9].copy_from_slice(&id.due_unix_ms.to_be_bytes());
    key[9..].copy_from_slice(&id.serial.to_be_bytes());
    key
}

fn parse_key(key: &[u8]) -> Option<DelayId> {
    let (_, id) = key.split_first()?;
    let (due, serial) = id.split_first_chunk::<8>()?;
    let serial = serial.first_chunk::<8>()?;
    Some(DelayId { due_unix_ms: u64::from_be_bytes(*due), serial: u64::from_be_bytes(*serial) })
}

fn encode_state(count: u64, next_serial: u64, first: DelayId) -> [u8; STATE_BYTES] {
    let mut state = [STATE_VERSION; STATE_BYTES];
    for (place, number) in state[1..].chunks_exact_mut(8).zip([count, next_serial, first.due_unix_ms, first.serial]) {
        place.copy_from_slice(&number.to_le_bytes());
    }
    state
}

fn decode_state(state: &[u8]) -> Option<(u64, u64, DelayId)> {
    let state: &[u8; STATE_BYTES] = state.try_into().ok()?;
    let (&STATE_VERSION, rest) = state.split_first()? else { return None };
    let (numbers, _) = rest.as_chunks::<8>();
    let [count, next_serial, due_unix_ms, serial] = <[[u8; 8]; 4]>::try_from(numbers).ok()?.map(u64::from_le_bytes);
    Some((count, next_serial, DelayId { due_unix_ms, serial }))
}

/// What a read of the store brought.
struct Loaded {
    records: Vec<(DelayId, Record)>,
    /// Nothing else is stored before it.
    end: DelayId,
}

impl Delays {
    /// Reads what there is at the first use after a start.
    pub(super) fn read_state(&self, state: &mut State) {
        let mut found = None;
        let mut each = |_: &[u8], value: &[u8]| found = decode_state(value);
        let read = self.store.read_notes(self.owner, STATE_KEY, FIRST_KEY, 1, &mut each);
        let (count, next_serial, first) = match (read, found) {
            (Ok(_), Some(found)) => found,
            (Ok(_), None) => self.count_stored(),
            (Err(error), _) => {
                tracing::error!(owner = self.owner.0, %error, "the number of delayed messages cannot be read");
                (0, unused_serial(), DelayId::START)
            }
        };
        state.count = count;
        state.next_serial = next_serial;
        state.window.begin_at(first);
    }

    /// Does without the state: the first start of an owner, or it is damaged.
    fn count_stored(&self) -> (u64, u64, DelayId) {
        let (mut count, mut first, mut next_serial) = (0, DelayId::END, 0);
        self.read_stored(DelayId::START, usize::MAX, &mut |id, _| {
            count += 1;
            first = first.min(id);
            next_serial = next_serial.max(id.serial.saturating_add(1));
        });
        (count, next_serial, first)
    }

    /// Calls `each` with stored messages from `from` on: `limit` of them, or a few more. Stops where it cannot read.
    pub(super) fn read_stored(&self, from: DelayId, limit: usize, each: &mut dyn FnMut(DelayId, Record)) {
        let mut from = key(from).to_vec();
        let mut count = 0;
        loop {
            let mut note = |key: &[u8], value: &[u8]| {
                if let Some(id) = parse_key(key) {
                    count += 1;
                    each(id, Record::stored(value));
                }
            };
            match self.store.read_notes(self.owner, &from, END_KEY, LIST_BYTES, &mut note) {
                Ok(Some(next)) if count < limit => from = next,
                Ok(_) => return,
                Err(error) => {
                    tracing::error!(owner = self.owner.0, %error, "delayed messages cannot be read");
                    return;
                }
            }
        }
    }

    /// Whether the store has this message.
    pub(super) fn is_stored(&self, id: DelayId) -> bool {
        let mut found = false;
        let mut each = |_: &[u8], _: &[u8]| found = true;
        let read = self.store.read_notes(self.owner, &key(id), &key(id.successor()), 1, &mut each);
        read.is_ok() && found
    }

    /// Has the store's reader thread bring the messages after the window, if it is time.
    pub(super) fn load_if_wanted(&self, state: &mut State, now_unix_ms: u64) {
        if self.load_at(state).is_none_or(|at| at > now_unix_ms) {
            return;
        }
        let Some(this) = self.this.upgrade() else { return };
        state.loads += 1;
        let (number, from) = (state.loads, state.window.end());
        state.loading = Some(Loading { number, from, now_unix_ms, gone: state.gone(from) });
        let load_bytes = self.window_bytes(state) / LOADED_PART;
        self.store.spawn_read(Box::new(move || {
            let loaded = this.read_window(from, now_unix_ms, load_bytes);
            this.install(number, loaded);
        }));
    }

    /// Reads what is due within the time the window looks ahead, as far as it fits, and where the next message is.
    fn read_window(&self, from: DelayId, now_unix_ms: u64, max_bytes: usize) -> Result<Loaded, StoreError> {
        let until = now_unix_ms.saturating_add(self.limits.lookahead_ms).saturating_add(1);
        let until = DelayId { due_unix_ms: until, serial: 0 }.max(from);
        let mut records = Vec::new();
        let mut each = |key: &[u8], value: &[u8]| {
            records.extend(parse_key(key).map(|id| (id, Record::stored(value))));
        };
        let (first, last) = (key(from), key(until));
        if let Some(next) = self.store.read_notes(self.owner, &first, &last, max_bytes, &mut each)? {
            // The bytes of the last key, and more.
            let end = parse_key(&next).map_or(until, DelayId::successor);
            return Ok(Loaded { records, end });
        }
        let mut end = DelayId::END;
        let mut each = |key: &[u8], _: &[u8]| end = parse_key(key).unwrap_or(until);
        self.store.read_notes(self.owner, &last, END_KEY, 1, &mut each)?;
        Ok(Loaded { records, end })
    }

    fn install(&self, number: u64, loaded: Result<Loaded, StoreError>) {
        let mut state = self.state.lock();
        let Some(loading) = state.loading.take_if(|loading| loading.number == number) else { return };
        let now = loading.now_unix_ms;
        match loaded {
            Ok(loaded) if state.window.end() == loading.from => {
                for (id, record) in loaded.records {
                    if !loading.gone.contains(&id) {
                        state.window.insert_stored(id, record);
                    }
                }
                state.window.extend(loaded.end);
                if loaded.end == DelayId::END {
                    state.count = state.window.len() as u64; // damaged ones were counted up to now
                }
            }
            Ok(_) => {} // the window became smaller meanwhile
            Err(error) => {
                tracing::error!(owner = self.owner.0, %error, "delayed messages cannot be read");
                state.retry_unix_ms = now.saturating_add(RETRY_MS);
            }
        }
        state.window.drop_outer();
        self.trim(&mut state, now);
        self.load_if_wanted(&mut state, now);
        let next = self.next_due_of(&state);
        drop(state);
        self.tell_if_earlier(None, next);
    }
}

/// A serial above all that counting up from 0 can have reached.
fn unused_serial() -> u64 {
    clock::now_unix_ms() << 20
}

impl RoundSource for Delays {
    fn drain(&self, round: &mut RoundBuilder) {
        let mut state = self.state.lock();
        let state = &mut *state;
        state.dirty = None;
        state.unwritten.taken();
        if state.closed {
            return;
        }
        if let Some(durability) = state.durability {
            round.set_durability(durability);
        }
        if state.clearing == Clearing::Pending {
            round.delete_notes(self.owner, FIRST_KEY, END_KEY);
            state.clearing = Clearing::Writing;
        }
        let mut scratch = Vec::new();
        for id in state.puts.drain(..) {
            if let Some(entry) = state.window.get_mut(id) {
                round.put_note(self.owner, &key(id), entry.record.whole(&mut scratch));
                entry.phase = Phase::Writing;
                state.writing.push(id);
            }
        }
        for id in &state.deletes {
            round.delete_note(self.owner, &key(*id));
        }
        state.deleting.append(&mut state.deletes);
        let first = state.window.lower_bound();
        round.put_note(self.owner, STATE_KEY, &encode_state(state.count, state.next_serial, first));
    }

    fn round_ended(&self, committed: bool) {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        if !committed || state.closed {
            return;
        }
        let keep = state.loading.is_some();
        for id in state.writing.drain(..) {
            state.window.stored(id, keep);
        }
        state.deleting.clear();
        for ids in [&mut state.puts, &mut state.deletes, &mut state.writing, &mut state.deleting] {
            ids.shrink_to(KEPT_IDS);
        }
        if state.clearing != Clearing::Writing {
            return;
        }
        state.clearing = Clearing::No;
        let next = self.next_due_of(state);
        drop(guard);
        self.tell_if_earlier(None, next);
    }
}
