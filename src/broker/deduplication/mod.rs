//! LavinMQ's message deduplication: a cache of header values; a message whose value is in it is a duplicate.
//!
//! # Ownership
//! A queue holds a [`DedupCache`] in its state and drains it with itself. An exchange holds an [`ExchangeDedup`], which is a
//! round source of its own.
//!
//! # Invariants
//! - C1: of one value there is at most one entry; entries go in the order they came, whatever their expiry.
//! - C2: a durable owner's notes hold every entry that a persistent message left, as of the last round. Notes of entries
//!   that are gone may stay a while: they are older than all others, or expired.
//! - C3: a transient owner writes nothing, nor does a transient message: its value is forgotten at a restart, as it is
//!   itself.
//!
//! # Differences from LavinMQ
//! There the cache is gone after a restart, and a publish that the queue then refuses is remembered all the same (here the
//! caller withdraws it). Values that are nested tables or arrays are compared by their bytes.
//!
//! # On disk
//! Note `b'd' serial:u64` (big-endian) holds `digest:16 expires:u64` (little-endian, Unix milliseconds).

mod digest;
mod exchange;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;

use ahash::AHashMap;

use self::digest::{DIGEST_BYTES, Digest};
use super::rules::Deduplication;
use crate::{
    model::{Name, properties::raw_entry},
    store::{QueueId, RoundBuilder, Store, StoreError},
};

pub use self::exchange::ExchangeDedup;

/// The header by which a message says for how many milliseconds its value is remembered.
pub const CACHE_TTL: &str = "x-cache-ttl";

/// Entries at most, whatever the cache size says: some 80 MB.
pub const MAX_ENTRIES: usize = 1 << 20;

const NOTE_KIND: u8 = b'd';
const NEVER: u64 = u64::MAX;
/// Evicted entries whose notes are deleted in one go: a range deletion is dear for the store.
const MIN_ERASED: u64 = 4096;
/// Bytes of notes read at once.
const READ_BYTES: usize = 1 << 20;
/// Expired entries that an insertion clears away.
const MAX_PURGED: usize = 4;

/// What the cache says of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The value was not known; now it is, unless [`DedupCache::withdraw`] takes it back.
    New(Admission),
    /// The value is known: the message is confirmed and dropped. The confirm waits for the round of the message before it.
    Duplicate,
    /// The message has no such header; it passes.
    NoKey,
}

/// The entry that an admitted message left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admission {
    digest: Digest,
    serial: u64,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    serial: u64,
    expires_unix_ms: u64,
}

/// The values seen lately.
#[derive(Debug)]
pub struct DedupCache {
    header: Name,
    capacity: usize,
    ttl_ms: Option<u64>,
    durable: bool,
    entries: AHashMap<Digest, Entry>,
    /// Entries by age. One whose serial is not the one in `entries` is gone.
    order: VecDeque<(u64, Digest)>,
    next_serial: u64,
    /// Entries for the next round.
    unwritten: Vec<(u64, Digest)>,
    /// Withdrawn entries whose notes are to be deleted with the next round.
    withdrawn: Vec<u64>,
    /// Notes have serials within `notes_from..notes_until`.
    notes_from: u64,
    notes_until: u64,
    duplicates: u64,
}

impl DedupCache {
    /// An empty cache. `durable` is the owner's durability.
    pub fn new(rules: &Deduplication, durable: bool) -> Self {
        let mut cache = DedupCache {
            header: rules.header.clone(),
            capacity: 0,
            ttl_ms: None,
            durable,
            entries: AHashMap::new(),
            order: VecDeque::new(),
            next_serial: 0,
            unwritten: Vec::new(),
            withdrawn: Vec::new(),
            notes_from: 0,
            notes_until: 0,
            duplicates: 0,
        };
        cache.set_limits(rules.cache_size, rules.cache_ttl_ms);
        cache
    }

    /// The cache of a durable owner as its notes have it.
    ///
    /// # Errors
    /// [`StoreError`] if the notes cannot be read.
    pub fn recover(rules: &Deduplication, owner: QueueId, store: &Store, now_unix_ms: u64) -> Result<Self, StoreError> {
        let mut cache = DedupCache::new(rules, true);
        let mut first = None;
        let mut from = Some(vec![NOTE_KIND]);
        while let Some(key) = from {
            from = store.read_notes(owner, &key, &[NOTE_KIND + 1], READ_BYTES, &mut |key, value| {
                let Some((serial, digest, expires_unix_ms)) = decode_note(key, value) else { return };
                first.get_or_insert(serial);
                cache.next_serial = serial + 1;
                if expires_unix_ms > now_unix_ms {
                    cache.remember(digest, Entry { serial, expires_unix_ms });
                }
            })?;
        }
        cache.notes_from = first.unwrap_or_default();
        cache.notes_until = cache.next_serial;
        Ok(cache)
    }

    /// Changes cache size and ttl. What is too much goes at once, oldest first; entries keep the expiry they have.
    pub fn set_limits(&mut self, cache_size: u64, cache_ttl_ms: Option<u64>) {
        self.capacity = usize::try_from(cache_size).unwrap_or(MAX_ENTRIES).min(MAX_ENTRIES);
        self.ttl_ms = cache_ttl_ms;
        self.make_room(self.capacity);
        self.order.shrink_to_fit();
        self.entries.shrink_to_fit();
    }

    /// Looks up the value of a message with this header table, and remembers it if it is new. `persistent` is the message's.
    ///
    /// A value that is absent, void or false is none, as in LavinMQ. Integers are compared whatever their width, and with
    /// floats.
    pub fn check_and_insert(&mut self, now_unix_ms: u64, headers: Option<&[u8]>, persistent: bool) -> Verdict {
        let value = headers.and_then(|table| raw_entry(table, self.header.as_bytes()));
        let Some(digest) = value.and_then(|entry| digest::of(&entry)) else { return Verdict::NoKey };
        if self.entries.get(&digest).is_some_and(|entry| entry.expires_unix_ms > now_unix_ms) {
            self.duplicates += 1;
            return Verdict::Duplicate;
        }
        let ttl_ms = headers.and_then(message_ttl_ms).or(self.ttl_ms);
        let expires_unix_ms = ttl_ms.map_or(NEVER, |ttl| now_unix_ms.saturating_add(ttl));
        let entry = Entry { serial: self.next_serial, expires_unix_ms };
        let admission = Admission { digest, serial: entry.serial };
        if self.capacity == 0 || expires_unix_ms <= now_unix_ms {
            return Verdict::New(admission); // which nothing is remembered of
        }
        self.next_serial += 1;
        self.purge(now_unix_ms);
        self.remember(digest, entry);
        if self.durable && persistent {
            self.note(entry.serial, digest);
        }
        Verdict::New(admission)
    }

    /// Forgets what an admitted message left, because the message was refused after all.
    pub fn withdraw(&mut self, admission: Admission) {
        if !self.is_live(admission.serial, &admission.digest) {
            return;
        }
        self.entries.remove(&admission.digest);
        if admission.serial < self.notes_until {
            self.withdrawn.push(admission.serial);
        }
    }

    /// Duplicates since the cache was made.
    pub fn duplicates(&self) -> u64 {
        self.duplicates
    }

    /// Whether the owner is durable.
    pub fn is_durable(&self) -> bool {
        self.durable
    }

    /// Values remembered, expired ones among them until they are cleared away.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether [`DedupCache::drain_into`] has something to write.
    pub fn has_news(&self) -> bool {
        !self.unwritten.is_empty() || !self.withdrawn.is_empty()
    }

    /// Moves the changes since the last call into the round that the messages are in. A transient owner's has none.
    pub fn drain_into(&mut self, owner: QueueId, round: &mut RoundBuilder) {
        for (serial, digest) in std::mem::take(&mut self.unwritten) {
            if let Some(entry) = self.entries.get(&digest).filter(|entry| entry.serial == serial) {
                round.put_note(owner, &note_key(serial), &encode_value(&digest, entry.expires_unix_ms));
                self.notes_until = serial + 1;
            }
        }
        for serial in std::mem::take(&mut self.withdrawn) {
            round.delete_note(owner, &note_key(serial));
        }
        self.erase(owner, round);
    }

    /// Deletes the notes of entries that are gone, when there are many.
    fn erase(&mut self, owner: QueueId, round: &mut RoundBuilder) {
        self.drop_stale();
        let live_from = self.order.front().map_or(self.next_serial, |oldest| oldest.0);
        let until = live_from.min(self.notes_until);
        if until.saturating_sub(self.notes_from) >= MIN_ERASED.max(self.capacity as u64 / 2) {
            round.delete_notes(owner, &note_key(self.notes_from), &note_key(until));
            self.notes_from = until;
        }
    }

    fn is_live(&self, serial: u64, digest: &Digest) -> bool {
        self.entries.get(digest).is_some_and(|entry| entry.serial == serial)
    }

    fn remember(&mut self, digest: Digest, entry: Entry) {
        // An expired entry of the same value leaves its place in the order behind.
        self.entries.remove(&digest);
        self.make_room(self.capacity.saturating_sub(1));
        if self.capacity == 0 {
            return;
        }
        self.entries.insert(digest, entry);
        self.order.push_back((entry.serial, digest));
        if self.order.len() > 2 * self.entries.len() + 64 {
            let entries = &self.entries;
            self.order.retain(|(serial, digest)| entries.get(digest).is_some_and(|entry| entry.serial == *serial));
        }
    }

    fn note(&mut self, serial: u64, digest: Digest) {
        if self.unwritten.len() > 2 * self.capacity + 64 {
            let entries = &self.entries;
            self.unwritten.retain(|(serial, digest)| entries.get(digest).is_some_and(|entry| entry.serial == *serial));
        }
        self.unwritten.push((serial, digest));
    }

    /// Evicts the oldest entries until there are at most `len`.
    fn make_room(&mut self, len: usize) {
        while self.entries.len() > len {
            let Some((serial, digest)) = self.order.pop_front() else { return };
            if self.is_live(serial, &digest) {
                self.entries.remove(&digest);
            }
        }
    }

    /// Clears away some of the oldest entries if they have expired.
    fn purge(&mut self, now_unix_ms: u64) {
        for _ in 0..MAX_PURGED {
            self.drop_stale();
            let Some((_, digest)) = self.order.front() else { return };
            match self.entries.get(digest) {
                Some(entry) if entry.expires_unix_ms <= now_unix_ms => {
                    self.entries.remove(digest);
                }
                _ => return,
            }
        }
    }

    /// Has the order begin with an entry that is there.
    fn drop_stale(&mut self) {
        while let Some((serial, digest)) = self.order.front()
            && !self.is_live(*serial, digest)
        {
            self.order.pop_front();
        }
    }
}

/// A message's own ttl: an integer that is not negative.
fn message_ttl_ms(table: &[u8]) -> Option<u64> {
    u64::try_from(raw_entry(table, CACHE_TTL.as_bytes())?.integer()?).ok()
}

fn note_key(serial: u64) -> [u8; 9] {
    let mut key = [NOTE_KIND; 9];
    key[1..].copy_from_slice(&serial.to_be_bytes());
    key
}

fn encode_value(digest: &Digest, expires_unix_ms: u64) -> [u8; DIGEST_BYTES + 8] {
    let mut value = [0; DIGEST_BYTES + 8];
    value[..DIGEST_BYTES].copy_from_slice(digest);
    value[DIGEST_BYTES..].copy_from_slice(&expires_unix_ms.to_le_bytes());
    value
}

/// Serial, digest and expiry; `None` for a note that this module did not write.
fn decode_note(key: &[u8], value: &[u8]) -> Option<(u64, Digest, u64)> {
    let serial = u64::from_be_bytes(key.strip_prefix(&[NOTE_KIND])?.try_into().ok()?);
    let (digest, expires) = value.split_first_chunk::<DIGEST_BYTES>()?;
    Some((serial, *digest, u64::from_le_bytes(expires.try_into().ok()?)))
}
