//! The queue over a real store, with real rounds and read-back on their own threads, and fake ports; and its parts on their
//! own.

mod acking;
mod attempts;
mod chunk;
mod consumers;
mod log;
mod model;

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use super::{chunk::CHUNK_BYTES, *};
use crate::{
    broker::{
        memory::MemoryBudget,
        message::{Body, Message, encode_names},
        port::Delivery,
        test_port::TestPort,
    },
    store::{CommitHook, Durability, Store, StoreOptions},
};

// Ports

/// What a port saw, in the order in which the queue did it.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Event {
    Delivered { slot: u32, given: Given },
    Got { given: Given, remaining: u64 },
    Refused { slot: u32 },
}

/// A message as it was handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Given {
    seq: u64,
    id: u64,
    body_bytes: u32,
    persistent: bool,
    redelivered: bool,
}

type EventLog = Arc<Mutex<Vec<Event>>>;

/// A connection with one consumer, that may be full.
struct FakePort {
    events: EventLog,
    full: AtomicBool,
}

impl FakePort {
    fn new(events: &EventLog) -> Arc<FakePort> {
        Arc::new(FakePort { events: events.clone(), full: AtomicBool::new(false) })
    }
}

fn given(delivery: &Delivery<'_>) -> Given {
    let body = delivery.message.body.as_slice();
    let id = u64::from_le_bytes(*body.first_chunk().expect("every body begins with its id"));
    assert_eq!(body, body_of(id, body.len()), "body of message {id}");
    Given {
        seq: delivery.seq,
        id,
        body_bytes: body.len() as u32,
        persistent: delivery.message.persistent,
        redelivered: delivery.redelivered,
    }
}

impl TestPort for FakePort {
    fn deliver(&self, delivery: &Delivery<'_>) -> Offer {
        let slot = delivery.to.slot;
        if self.full.load(Ordering::SeqCst) {
            self.events.lock().push(Event::Refused { slot });
            return Offer::Blocked;
        }
        self.events.lock().push(Event::Delivered { slot, given: given(delivery) });
        Offer::Taken
    }

    fn answer_get(&self, delivery: &Delivery<'_>, remaining: u64) -> Offer {
        self.events.lock().push(Event::Got { given: given(delivery), remaining });
        Offer::Taken
    }
}

// Messages

fn body_of(id: u64, len: usize) -> Vec<u8> {
    let mut body = id.to_le_bytes().to_vec();
    body.extend((8..len).map(|at| (id as usize + at) as u8));
    body
}

// The store

#[derive(Default)]
struct Failing(AtomicBool);

impl CommitHook for Failing {
    fn before_sync(&self, _: Round) -> Result<(), String> {
        match self.0.load(Ordering::SeqCst) {
            true => Err("the test pulled the plug".to_owned()),
            false => Ok(()),
        }
    }
}

fn plain_queue(
    durable: bool,
    id: QueueId,
    store: &Arc<Store>,
    budget: &Arc<MemoryBudget>,
    record: Option<QueueStateRecord>,
) -> Arc<Queue> {
    queue_with(QueueRules::default(), durable, id, store, budget, record)
}

fn queue_with(
    rules: QueueRules,
    durable: bool,
    id: QueueId,
    store: &Arc<Store>,
    budget: &Arc<MemoryBudget>,
    record: Option<QueueStateRecord>,
) -> Arc<Queue> {
    let environment = Environment::new(store.clone(), budget.clone(), Default::default(), Weak::new());
    let records: Vec<(u8, QueueStateRecord)> = record.into_iter().map(|record| (0, record)).collect();
    Queue::recovered(options(durable), QueueTraits::default(), rules, id, environment, &records)
}

fn options(durable: bool) -> QueueOptions {
    let arguments = FieldTable::default();
    QueueOptions { name: "q".into(), vhost: "/".into(), durable, auto_delete: false, exclusive_to: None, arguments }
}

fn open(
    directory: &std::path::Path,
    linger: Duration,
    failing: &Arc<Failing>,
) -> (Arc<Store>, crate::store::Recovered) {
    let hook: Arc<dyn CommitHook> = failing.clone();
    let options = StoreOptions {
        path: directory.to_owned(),
        durability: Durability::Os,
        retry: Duration::from_millis(1),
        linger,
        hook: Some(hook),
        write_buffer_bytes: 1 << 20,
        ..StoreOptions::default()
    };
    Store::open(options).expect("the store opens")
}
