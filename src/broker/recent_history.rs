//! The memory of an `x-recent-history` exchange: its last messages, which every new binding gets, oldest first.
//!
//! RabbitMQ keeps them in its metadata store under the exchange (`rabbit_db_rh_exchange`): they outlive a restart if the
//! exchange does, persistent or not, and go with it. A message is kept as it was routed, so it expires after a replay as if
//! it had just been published.
//!
//! # Limits
//! As many messages as `x-recent-history-length` says, and bytes: a sixteenth of the memory budget for one exchange, at least
//! 1 MiB; the newest message always stays. What is held counts against the budget, but is not paged out.
//!
//! # On disk
//! Note `b'h' slot:u64` (big-endian), slot being the serial modulo the length, so that a message takes the place of the one
//! it drives out. Value, little-endian: `serial:u64 flags:u8 extension_len:u16 properties_len:u32 names properties extension
//! body`.

use std::{collections::VecDeque, sync::Arc};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;

use super::{
    extension::{Extension, MAX_BYTES},
    memory::MemoryBudget,
    message::{Body, Message},
};
use crate::{
    model::properties::{Properties, raw_entry},
    store::{AtomicSection, QueueId, Round, RoundBuilder, RoundSource, Store, StoreError},
};

/// The header with which a message is not kept: a boolean that is true.
pub const NO_STORE: &str = "x-recent-history-no-store";

const MIN_BYTES: usize = 1 << 20;
const BUDGET_PART: usize = 16;
const NOTE_KIND: u8 = b'h';
/// Bytes of notes read at once.
const READ_BYTES: usize = 4 << 20;
const SERIAL_BYTES: usize = 8;
const HEAD_BYTES: usize = SERIAL_BYTES + 7;
const PERSISTENT: u8 = 1;
/// What a kept message takes beside its bytes.
const OVERHEAD_BYTES: usize = 96;

/// A message that is kept; cheap to clone.
#[derive(Clone, Debug)]
pub struct KeptMessage {
    serial: u64,
    /// As on disk, without a shared body.
    bytes: Bytes,
    shared: Option<Bytes>,
}

impl KeptMessage {
    fn new(serial: u64, message: &Message<'_>) -> Self {
        let hidden = Extension { expires_unix_ms: None, ..Extension::parse(message.extension) }.encode();
        let extension = if hidden.len() <= MAX_BYTES { &hidden[..] } else { &[] };
        let (inline, shared) = match message.body {
            Body::Inline(body) => (body, None),
            Body::Shared(body) => (&[][..], Some(body.clone())),
        };
        let parts = [message.names, message.properties, extension, inline];
        let mut bytes = BytesMut::with_capacity(HEAD_BYTES + parts.iter().map(|part| part.len()).sum::<usize>());
        bytes.extend_from_slice(&serial.to_le_bytes());
        bytes.extend_from_slice(&[u8::from(message.persistent) * PERSISTENT]);
        bytes.extend_from_slice(&(extension.len() as u16).to_le_bytes());
        bytes.extend_from_slice(&(message.properties.len() as u32).to_le_bytes());
        parts.iter().for_each(|part| bytes.extend_from_slice(part));
        KeptMessage { serial, bytes: bytes.freeze(), shared }
    }

    /// A message from its note; `None` if that is damaged.
    fn read(value: &[u8]) -> Option<Self> {
        let serial = u64::from_le_bytes(*value.first_chunk()?);
        let kept = KeptMessage { serial, bytes: Bytes::copy_from_slice(value), shared: None };
        kept.message().is_some().then_some(kept)
    }

    /// The message. It is always there; `None` would be bytes that are none.
    pub fn message(&self) -> Option<Message<'_>> {
        let (head, rest) = self.bytes.split_first_chunk::<HEAD_BYTES>()?;
        let [flags, e0, e1, p0, p1, p2, p3] = *head.last_chunk::<7>()?;
        let exchange_len = 1 + *rest.first()? as usize;
        let names_len = exchange_len + 1 + *rest.get(exchange_len)? as usize;
        let (names, rest) = rest.split_at_checked(names_len)?;
        let (properties, rest) = rest.split_at_checked(u32::from_le_bytes([p0, p1, p2, p3]) as usize)?;
        let (extension, inline) = rest.split_at_checked(u16::from_le_bytes([e0, e1]) as usize)?;
        let body = self.shared.as_ref().map_or(Body::Inline(inline), Body::Shared);
        Some(Message { names, properties, body, persistent: flags & PERSISTENT != 0, extension })
    }

    fn byte_count(&self) -> usize {
        OVERHEAD_BYTES + self.bytes.len() + self.shared.as_ref().map_or(0, Bytes::len)
    }
}

/// The last messages of one exchange.
///
/// # Locks
/// Its lock is taken within the atomic section, before or after those of queues but never with one of them.
pub struct RecentHistory {
    owner: QueueId,
    store: Arc<Store>,
    budget: Arc<MemoryBudget>,
    length: u64,
    max_bytes: usize,
    durable: bool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By serial.
    messages: VecDeque<KeptMessage>,
    byte_count: usize,
    next_serial: u64,
    /// Serials from here on are not in a round yet.
    written_to: u64,
    /// Written messages that went because of their bytes: no later one need take their slots.
    dropped: Vec<u64>,
    dirty: Option<Round>,
    closed: bool,
}

impl RecentHistory {
    /// The memory of a new exchange that keeps `length` messages. `owner` is an id of its own, which a transient exchange does
    /// not use.
    pub fn new(store: Arc<Store>, owner: QueueId, length: u64, durable: bool, budget: Arc<MemoryBudget>) -> Arc<Self> {
        Arc::new(Self::empty(store, owner, length, durable, budget))
    }

    fn empty(store: Arc<Store>, owner: QueueId, length: u64, durable: bool, budget: Arc<MemoryBudget>) -> Self {
        let max_bytes = (budget.limit_bytes() / BUDGET_PART).max(MIN_BYTES);
        RecentHistory { owner, store, budget, length: length.max(1), max_bytes, durable, state: Mutex::default() }
    }

    /// The memory of a durable exchange after a restart.
    ///
    /// # Errors
    /// [`StoreError`] if its notes cannot be read.
    pub fn recover(
        store: Arc<Store>,
        owner: QueueId,
        length: u64,
        budget: Arc<MemoryBudget>,
    ) -> Result<Arc<Self>, StoreError> {
        let history = Self::empty(store, owner, length, true, budget);
        let mut found = Vec::new();
        let mut from = Some(vec![NOTE_KIND]);
        while let Some(key) = from {
            from = history.store.read_notes(owner, &key, &[NOTE_KIND + 1], READ_BYTES, &mut |_, value| {
                found.extend(KeptMessage::read(value));
            })?;
        }
        found.sort_by_key(|message| message.serial);
        {
            let mut state = history.state.lock();
            let last = found.last().map(|message| message.serial);
            state.written_to = last.map_or(0, |serial| serial + 1);
            for message in found {
                history.keep(&mut state, message);
            }
        }
        Ok(Arc::new(history))
    }

    /// Keeps messages that are being routed, but for those that say [`NO_STORE`]. The section is the one in which the queues
    /// get them.
    ///
    /// # Returns
    /// The round that makes them durable; 0 if none does.
    pub fn record(self: &Arc<Self>, _section: &AtomicSection<'_>, messages: &[Message<'_>]) -> Round {
        let mut state = self.state.lock();
        let before = state.next_serial;
        // Of a long run, only the last ones can stay.
        let storable = messages.iter().filter(|message| !is_excluded(message));
        let surplus = storable.clone().count().saturating_sub(usize::try_from(self.length).unwrap_or(usize::MAX));
        for message in storable.skip(surplus) {
            let kept = KeptMessage::new(state.next_serial, message);
            self.keep(&mut state, kept);
        }
        if state.next_serial == before || !self.durable || state.closed {
            return 0;
        }
        *state.dirty.get_or_insert_with(|| self.store.mark_dirty(self.clone()))
    }

    /// What a new binding gets, oldest first. (What goes through a bound exchange, RabbitMQ routes newest first.)
    pub fn replay(&self) -> Vec<KeptMessage> {
        self.state.lock().messages.iter().cloned().collect()
    }

    /// The id its notes are stored under.
    pub fn owner(&self) -> QueueId {
        self.owner
    }

    /// Writes nothing any more. To be called before the owner's notes are deleted with the exchange.
    pub fn close(&self) {
        self.state.lock().closed = true;
    }

    fn keep(&self, state: &mut State, message: KeptMessage) {
        let newest = message.serial;
        state.next_serial = newest + 1;
        state.byte_count += message.byte_count();
        self.budget.grow(message.byte_count());
        state.messages.push_back(message);
        loop {
            let too_many = state.messages.len() as u64 > self.length;
            let too_large = state.byte_count > self.max_bytes && state.messages.len() > 1;
            if !too_many && !too_large {
                return;
            }
            let Some(oldest) = state.messages.pop_front() else { return };
            state.byte_count -= oldest.byte_count();
            self.budget.shrink(oldest.byte_count());
            let takes_slot = oldest.serial.saturating_add(self.length) <= newest;
            if self.durable && !takes_slot && oldest.serial < state.written_to {
                state.dropped.push(oldest.serial);
            }
        }
    }

    fn note_key(&self, serial: u64) -> [u8; 9] {
        let mut key = [NOTE_KIND; 9];
        key[1..].copy_from_slice(&(serial % self.length).to_be_bytes());
        key
    }
}

impl RoundSource for RecentHistory {
    fn drain(&self, round: &mut RoundBuilder) {
        let mut state = self.state.lock();
        let state = &mut *state;
        state.dirty = None;
        if state.closed {
            return;
        }
        for serial in state.dropped.drain(..) {
            round.delete_note(self.owner, &self.note_key(serial));
        }
        let first = state.messages.partition_point(|message| message.serial < state.written_to);
        for message in state.messages.range(first..) {
            let key = self.note_key(message.serial);
            match &message.shared {
                None => round.put_note(self.owner, &key, &message.bytes),
                Some(body) => round.put_note(self.owner, &key, &[&message.bytes[..], body].concat()),
            }
        }
        state.written_to = state.next_serial;
    }

    fn round_ended(&self, _committed: bool) {} // a failed round is written after all, or none is
}

impl Drop for RecentHistory {
    fn drop(&mut self) {
        self.budget.shrink(self.state.get_mut().byte_count);
    }
}

fn is_excluded(message: &Message<'_>) -> bool {
    if !Properties::needs_attention(message.properties) {
        return false;
    }
    let headers = Properties::parse(message.properties).ok().and_then(|view| view.raw_headers());
    let header = headers.and_then(|table| raw_entry(table, NO_STORE.as_bytes()));
    header.is_some_and(|entry| entry.tag == b't' && entry.value() != [0])
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::{
        broker::{
            extension::{EPOCH_UNIX_MS, encode_keys},
            message::encode_names,
        },
        store::StoreOptions,
    };

    const OWNER: QueueId = QueueId(5);

    fn open(path: &Path) -> Arc<Store> {
        Store::open(StoreOptions { path: path.into(), ..StoreOptions::default() }).unwrap().0
    }

    fn budget(limit_bytes: usize) -> Arc<MemoryBudget> {
        Arc::new(MemoryBudget::new(limit_bytes))
    }

    /// Publishes a message with this body and properties; answers the round.
    fn publish(history: &Arc<RecentHistory>, properties: &[u8], body: Body<'_>) -> Round {
        let names = encode_names(b"x", b"k");
        let message = Message { names: &names, properties, body, persistent: false, extension: &[] };
        history.record(&history.store.atomic(), &[message])
    }

    fn publish_texts(history: &Arc<RecentHistory>, texts: &[&str]) -> Round {
        texts.iter().map(|text| publish(history, &[0, 0], Body::Inline(text.as_bytes()))).max().unwrap_or(0)
    }

    fn bodies(history: &RecentHistory) -> Vec<String> {
        let text = |kept: &KeptMessage| String::from_utf8_lossy(kept.message().unwrap().body.as_slice()).into_owned();
        history.replay().iter().map(text).collect()
    }

    #[tokio::test]
    async fn the_last_messages_are_kept_and_survive_with_a_durable_exchange() {
        let dir = tempfile::tempdir().unwrap();
        {
            let store = open(dir.path());
            let history = RecentHistory::new(store.clone(), OWNER, 3, true, budget(0));
            let transient = RecentHistory::new(store.clone(), QueueId(6), 3, false, budget(0));
            assert_eq!(publish_texts(&transient, &["a", "b", "c", "d"]), 0);
            assert_eq!(bodies(&transient), ["b", "c", "d"]);
            for texts in [["1", "2"], ["3", "4"], ["5", "6"]] {
                store.durable(publish_texts(&history, &texts)).await.unwrap();
            }
            assert_eq!(bodies(&history), ["4", "5", "6"]);
            publish_texts(&history, &["7"]);
            store.shutdown().unwrap();
        }
        let store = open(dir.path());
        let history = RecentHistory::recover(store.clone(), OWNER, 3, budget(0)).unwrap();
        assert_eq!(bodies(&history), ["5", "6", "7"]);
        store.durable(publish_texts(&history, &["8"])).await.unwrap();
        let again = RecentHistory::recover(store.clone(), OWNER, 3, budget(0)).unwrap();
        assert_eq!(bodies(&again), ["6", "7", "8"]);
        assert!(bodies(&RecentHistory::recover(store.clone(), QueueId(6), 3, budget(0)).unwrap()).is_empty());
        history.close();
        assert_eq!(publish_texts(&history, &["9"]), 0);
        store.durable(store.delete_queue(OWNER)).await.unwrap();
        assert!(bodies(&RecentHistory::recover(store, OWNER, 3, budget(0)).unwrap()).is_empty());
    }

    #[tokio::test]
    async fn messages_keep_everything_but_their_expiry() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let history = RecentHistory::new(store.clone(), OWNER, 20, true, budget(0));
        let hidden_keys = encode_keys([&b"h"[..]]);
        let extension = Extension {
            expires_unix_ms: Some(EPOCH_UNIX_MS + 5),
            died: true,
            hidden_keys: &hidden_keys,
            ..Extension::default()
        };
        let (names, encoded, large) = (encode_names(b"ex", b"key"), extension.encode(), Bytes::from(vec![7; 40_000]));
        let properties = b"\x11\0\x02\x0212";
        let inline =
            Message { names: &names, properties, body: Body::Inline(b"body"), persistent: true, extension: &encoded };
        let shared = Message { body: Body::Shared(&large), persistent: false, extension: &[], ..inline };
        let round = history.record(&store.atomic(), &[inline, shared]);
        store.durable(round).await.unwrap();
        let recovered = RecentHistory::recover(store, OWNER, 20, budget(0)).unwrap();
        let expected = Extension { expires_unix_ms: None, ..extension };
        for history in [history, recovered] {
            let kept = history.replay();
            let messages: Vec<_> = kept.iter().map(|kept| kept.message().unwrap()).collect();
            for (message, original) in messages.iter().zip([inline, shared]) {
                assert_eq!((message.names, message.properties), (original.names, original.properties));
                assert_eq!(message.body.as_slice(), original.body.as_slice());
                assert_eq!(message.persistent, original.persistent);
            }
            assert_eq!(Extension::parse(messages[0].extension), expected);
            assert_eq!(messages[0].routing_keys()[..], [&b"key"[..], b"h"]);
            assert!(messages[1].extension.is_empty());
        }
    }

    #[test]
    fn a_message_may_ask_not_to_be_kept() {
        let dir = tempfile::tempdir().unwrap();
        let history = RecentHistory::new(open(dir.path()), OWNER, 20, false, budget(0));
        let header = |value: &[u8]| {
            let entry = [&[25][..], NO_STORE.as_bytes(), value].concat();
            [&b"\x20\0\0\0\0"[..], &[entry.len() as u8], &entry].concat()
        };
        publish(&history, &header(b"t\x01"), Body::Inline(b"true"));
        publish(&history, &header(b"t\0"), Body::Inline(b"false"));
        publish(&history, &header(b"S\0\0\0\x04true"), Body::Inline(b"text"));
        publish(&history, b"\x20\0\0\0\0\0", Body::Inline(b"none"));
        assert_eq!(bodies(&history), ["false", "text", "none"]);
    }

    #[test]
    fn a_long_run_leaves_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let history = RecentHistory::new(store.clone(), OWNER, 2, true, budget(0));
        let names = encode_names(b"x", b"k");
        let texts = ["1", "2", "3", "4", "5"];
        let message = |text: &'static str| Message {
            names: &names,
            properties: &[0, 0],
            body: Body::Inline(text.as_bytes()),
            persistent: true,
            extension: &[],
        };
        history.record(&store.atomic(), &texts.map(message));
        assert_eq!(bodies(&history), ["4", "5"]);
    }

    #[tokio::test]
    async fn bytes_are_bounded_in_memory_and_on_disk() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let budget = budget(16 * MIN_BYTES);
        let history = RecentHistory::new(store.clone(), OWNER, u64::MAX, true, budget.clone());
        let body = Bytes::from(vec![1; 100_000]);
        for _ in 0..50 {
            store.durable(publish(&history, &[0, 0], Body::Shared(&body))).await.unwrap();
        }
        assert_eq!(history.replay().len(), 10);
        assert!((10 * body.len()..=MIN_BYTES).contains(&budget.used_bytes()));
        let mut notes = 0;
        let all = store.read_notes(OWNER, &[NOTE_KIND], &[NOTE_KIND + 1], usize::MAX, &mut |_, _| notes += 1);
        assert_eq!((all.unwrap(), notes), (None, 10));
        let huge = Bytes::from(vec![1; 2 * MIN_BYTES]);
        publish(&history, &[0, 0], Body::Shared(&huge));
        assert_eq!(history.replay().len(), 1);
        store.shutdown().unwrap(); // which lets go of the source
        drop(history);
        assert_eq!(budget.used_bytes(), 0);
    }
}
