//! The stream over a real store with real rounds and read-back on their own threads, and fake ports.

mod measure;
mod reading;
mod recovery;
mod retention;

use std::{
    path::Path,
    sync::atomic::{AtomicBool, AtomicU8, Ordering},
    time::{Duration, Instant},
};

use amq_protocol::types::{AMQPValue, FieldTable};
use bytes::Bytes;

use super::*;
use crate::{
    broker::{
        message::{Body, encode_names},
        port::{Address, Delivery, Offer},
        queue::record,
        test_port::TestPort,
    },
    model::properties::{Properties, raw_entries},
    store::{CommitHook, Durability, Recovered, StoreOptions},
};

/// A delivery as a client sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Seen {
    offset: u64,
    id: u64,
    bytes: usize,
}

/// A connection with one consumer.
#[derive(Default)]
struct Client {
    seen: Mutex<Vec<Seen>>,
    full: AtomicBool,
}

impl Client {
    fn offsets(&self) -> Vec<u64> {
        self.seen.lock().iter().map(|seen| seen.offset).collect()
    }

    fn count(&self) -> usize {
        self.seen.lock().len()
    }

    /// Waits for so many deliveries, and a little longer for too many.
    fn wait_for(&self, count: usize) -> Vec<u64> {
        eventually(|| self.count() >= count, || format!("{count} deliveries, not {}", self.count()));
        std::thread::sleep(Duration::from_millis(20));
        self.offsets()
    }
}

fn header_of(properties: &[u8]) -> u64 {
    let headers = Properties::parse(properties).expect("properties").raw_headers().expect("a header table");
    let entry = raw_entries(headers).find(|entry| entry.key == b"x-stream-offset").expect("the offset");
    u64::from_be_bytes(entry.bytes[entry.bytes.len() - 8..].try_into().expect("a long"))
}

impl TestPort for Client {
    fn deliver(&self, delivery: &Delivery<'_>) -> Offer {
        if self.full.load(Ordering::SeqCst) {
            return Offer::Blocked;
        }
        assert!(!delivery.redelivered);
        assert_eq!(header_of(delivery.message.properties), delivery.seq);
        let body = delivery.message.body.as_slice();
        let id = u64::from_le_bytes(*body.first_chunk().expect("every body begins with its id"));
        self.seen.lock().push(Seen { offset: delivery.seq, id, bytes: body.len() });
        Offer::Taken
    }
}

/// Polls until `is_so`; gives up after a long time.
#[track_caller]
fn eventually(is_so: impl Fn() -> bool, what: impl Fn() -> String) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is_so() {
        assert!(Instant::now() < deadline, "waited in vain for {}", what());
        std::thread::sleep(Duration::from_millis(2));
    }
}

const RUNNING: u8 = 0;
const HELD: u8 = 1;
const FAILING: u8 = 2;

/// Lets rounds through, holds them, or fails them.
#[derive(Default)]
struct Gate(AtomicU8);

impl CommitHook for Gate {
    fn before_sync(&self, _: Round) -> Result<(), String> {
        while self.0.load(Ordering::SeqCst) == HELD {
            std::thread::sleep(Duration::from_millis(1));
        }
        if self.0.load(Ordering::SeqCst) == FAILING { Err("the test pulled the plug".into()) } else { Ok(()) }
    }
}

/// A stream and its store.
struct World {
    directory: tempfile::TempDir,
    gate: Arc<Gate>,
    store: Arc<Store>,
    budget: Arc<MemoryBudget>,
    stream: Arc<Stream>,
    rules: StreamRules,
    next_id: u64,
    /// The last round published to.
    round: Round,
}

fn resource() -> ResourceName {
    ResourceName::queue("s", &"/".into())
}

fn open_store(path: &Path, gate: &Arc<Gate>) -> (Arc<Store>, Recovered) {
    let hook: Arc<dyn CommitHook> = gate.clone();
    let options =
        StoreOptions { path: path.to_owned(), durability: Durability::Os, hook: Some(hook), ..StoreOptions::default() };
    Store::open(options).expect("a store")
}

impl World {
    fn new(rules: StreamRules) -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let gate = Arc::<Gate>::default();
        let (store, _) = open_store(directory.path(), &gate);
        let budget = Arc::new(MemoryBudget::new(64 << 20));
        let id = store.allocate_queue_id();
        let stream = Stream::new(resource(), id, store.clone(), budget.clone(), rules, None);
        World { directory, gate, store, budget, stream, rules, next_id: 0, round: 0 }
    }

    /// Publishes messages of `bytes` each in one run, without waiting.
    fn publish_raw(&mut self, count: u64, bytes: usize, properties: &[u8]) {
        let names = encode_names(b"", b"s");
        let bodies: Vec<Bytes> = (self.next_id..self.next_id + count)
            .map(|id| {
                let mut body = id.to_le_bytes().to_vec();
                body.resize(bytes.max(8), b'.');
                body.into()
            })
            .collect();
        let messages: Vec<Message<'_>> = bodies
            .iter()
            .map(|body| {
                let shared = body.len() >= record::SHARED_BODY_BYTES;
                let body = if shared { Body::Shared(body) } else { Body::Inline(body) };
                Message { names: &names, properties, body, persistent: false, extension: &[] }
            })
            .collect();
        self.next_id += count;
        self.round = self.stream.publish(&messages);
    }

    /// Publishes and waits until that is committed.
    fn publish(&mut self, count: u64, bytes: usize) {
        self.publish_raw(count, bytes, &[0, 0]);
        self.commit();
    }

    fn commit(&self) {
        futures_lite::future::block_on(self.store.durable(self.round)).expect("a committed round");
    }

    /// Starts a reader with these arguments.
    fn read<const N: usize>(
        &self,
        tag: &str,
        prefetch: u16,
        arguments: [(&str, AMQPValue); N],
    ) -> (ConsumerId, Arc<Client>) {
        let client = Arc::<Client>::default();
        let id = self.read_with(&client, tag, prefetch, arguments);
        (id, client)
    }

    fn read_with<const N: usize>(
        &self,
        client: &Arc<Client>,
        tag: &str,
        prefetch: u16,
        arguments: [(&str, AMQPValue); N],
    ) -> ConsumerId {
        let mut table = FieldTable::default();
        for (key, value) in arguments {
            table.insert(key.into(), value);
        }
        let options = ReaderOptions::parse(&resource(), &table, &tag.into(), clock::now_unix_ms()).expect("arguments");
        let to = Address { channel: 1, slot: 0 };
        let consumer = Consumer::new(client.clone(), to, false, false, 0, prefetch);
        let id = self.stream.consume(consumer, options).expect("a reader");
        self.stream.unblock(id, &mut Effects::default());
        id
    }

    fn settle(&self, id: ConsumerId, offsets: &[u64]) {
        let settled: Vec<SettledRun> =
            offsets.iter().map(|&seq| SettledRun { seq, count: 1, body_bytes: 8, persistent: true }).collect();
        self.stream.settle(Some(id), &settled, &mut Effects::default());
    }

    /// Waits until everything the stream has to write is written.
    fn flush(&self) {
        let round = self.store.open_round();
        futures_lite::future::block_on(self.store.durable(round)).expect("a committed round");
    }

    /// Closes the store as a stop does and opens it again.
    fn restart(mut self) -> World {
        let id = self.stream.id;
        drop(self.stream);
        self.store.shutdown().expect("a clean end");
        drop(self.store);
        let (store, recovered) = open_store(self.directory.path(), &self.gate);
        self.store = store;
        let record = recovered.states.iter().find(|(queue, _)| *queue == id).map(|(_, record)| *record);
        let (store, budget) = (self.store.clone(), self.budget.clone());
        self.stream = Stream::new(resource(), id, store, budget, self.rules, record);
        self
    }
}

fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

fn offset(value: AMQPValue) -> [(&'static str, AMQPValue); 1] {
    [("x-stream-offset", value)]
}

fn from_first() -> [(&'static str, AMQPValue); 1] {
    offset(text("first"))
}
