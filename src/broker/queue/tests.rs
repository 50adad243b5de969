//! The queue against a model: a plain [`VecDeque`] of what is ready, and what each consumer holds. Real store, real
//! rounds and read-back on their own threads, fake ports; and its parts on their own.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use proptest::{collection::vec, prelude::*};

use super::{
    chunk::{CHUNK_BYTES, Chunk},
    consumers::ConsumerRing,
    log::{Peek, QueueLog},
    *,
};
use crate::{
    broker::{
        memory::MemoryBudget,
        message::{Body, Message, encode_names},
        port::{Delivery, DeliveryWriter},
    },
    store::{CommitHook, Store, StoreOptions},
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

impl DeliveryWriter for &FakePort {
    fn deliver(&mut self, delivery: &Delivery<'_>) -> Offer {
        let slot = delivery.to.slot;
        if self.full.load(Ordering::SeqCst) {
            self.events.lock().push(Event::Refused { slot });
            return Offer::Blocked;
        }
        self.events.lock().push(Event::Delivered { slot, given: given(delivery) });
        Offer::Taken
    }

    fn answer_get(&mut self, delivery: &Delivery<'_>, remaining: u64) -> Offer {
        self.events.lock().push(Event::Got { given: given(delivery), remaining });
        Offer::Taken
    }
}

impl Port for FakePort {
    fn with_writer(&self, write: &mut dyn FnMut(&mut dyn DeliveryWriter)) -> bool {
        write(&mut &*self);
        true
    }

    fn wake(&self) {}

    fn consumer_cancelled(&self, _: Address) {}

    fn consumer_timed_out(&self, _: Address) {}

    fn get_timed_out(&self, _: Address) {}
}

// Messages

fn body_of(id: u64, len: usize) -> Vec<u8> {
    let mut body = id.to_le_bytes().to_vec();
    body.extend((8..len).map(|at| (id as usize + at) as u8));
    body
}

#[derive(Clone, Debug)]
struct Msg {
    /// Also its place: ids rise with positions.
    id: u64,
    bytes: usize,
    persistent: bool,
    handed_out: bool,
}

struct ModelConsumer {
    id: ConsumerId,
    slot: u32,
    port: Arc<FakePort>,
    no_ack: bool,
    prefetch: u16,
    priority: i64,
    /// It was refused, and is not asked again until it says so.
    stopped: bool,
    held: Vec<(Given, Msg)>,
}

impl ModelConsumer {
    fn is_able(&self) -> bool {
        let has_credit = self.no_ack || self.prefetch == 0 || self.held.len() < usize::from(self.prefetch);
        has_credit && !self.stopped && !self.port.full.load(Ordering::SeqCst)
    }
}

// Steps

#[derive(Clone, Debug)]
enum Step {
    Publish {
        count: usize,
        bytes: usize,
        persistent: u8,
    },
    Consume {
        prefetch: u16,
        no_ack: bool,
        priority: i64,
    },
    Cancel {
        which: usize,
    },
    /// Cancels and returns what it holds, as a channel that closes does.
    Close {
        which: usize,
    },
    Settle {
        which: usize,
        from: usize,
        count: usize,
        requeue: bool,
    },
    Get {
        no_ack: bool,
    },
    SettleGot {
        from: usize,
        count: usize,
        requeue: bool,
    },
    Fill {
        which: usize,
    },
    Unblock {
        which: usize,
    },
    Purge,
    Sweep,
    Flush,
    Restart,
    /// What comes after it up to the end of the list is in rounds that fail; then the broker is gone.
    Crash {
        then: Vec<Step>,
    },
}

fn quiet_step() -> impl Strategy<Value = Step> {
    let size = prop_oneof![4 => 8usize..200, 2 => 200usize..5_000, 1 => 16_000usize..60_000];
    let which = 0usize..8;
    prop_oneof![
        9 => (1usize..40, size, 0u8..4).prop_map(|(count, bytes, persistent)| Step::Publish { count, bytes, persistent }),
        3 => (prop_oneof![1 => Just(0u16), 4 => 1u16..30], prop::bool::weighted(0.15), -1i64..2)
            .prop_map(|(prefetch, no_ack, priority)| Step::Consume { prefetch, no_ack, priority }),
        1 => which.clone().prop_map(|which| Step::Cancel { which }),
        1 => which.clone().prop_map(|which| Step::Close { which }),
        9 => (which.clone(), prop_oneof![3 => Just(0usize), 1 => 0usize..30], 1usize..40, prop::bool::weighted(0.3))
            .prop_map(|(which, from, count, requeue)| Step::Settle { which, from, count, requeue }),
        3 => any::<bool>().prop_map(|no_ack| Step::Get { no_ack }),
        2 => (0usize..4, 1usize..8, any::<bool>()).prop_map(|(from, count, requeue)| Step::SettleGot { from, count, requeue }),
        1 => which.clone().prop_map(|which| Step::Fill { which }),
        2 => which.prop_map(|which| Step::Unblock { which }),
        1 => Just(Step::Purge),
        2 => Just(Step::Sweep),
        3 => Just(Step::Flush),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        30 => quiet_step(),
        1 => Just(Step::Restart),
        1 => vec(quiet_step(), 0..10).prop_map(|then| Step::Crash { then }),
    ]
}

// The subject

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

struct Subject {
    directory: tempfile::TempDir,
    linger: Duration,
    durable: bool,
    failing: Arc<Failing>,
    store: Arc<Store>,
    budget: Arc<MemoryBudget>,
    queue: Arc<Queue>,
    events: EventLog,
    getter: Arc<FakePort>,
    // The model
    ready: VecDeque<Msg>,
    consumers: Vec<ModelConsumer>,
    got: Vec<(Given, Msg)>,
    next_id: u64,
    next_slot: u32,
}

fn plain_queue(
    durable: bool,
    id: QueueId,
    store: &Arc<Store>,
    budget: &Arc<MemoryBudget>,
    record: Option<QueueStateRecord>,
) -> Arc<Queue> {
    let environment = Environment::new(store.clone(), budget.clone(), Default::default(), Weak::new());
    let records: Vec<(u8, QueueStateRecord)> = record.into_iter().map(|record| (0, record)).collect();
    Queue::recovered(options(durable), QueueTraits::default(), QueueRules::default(), id, environment, &records)
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
        sync: false,
        linger,
        hook: Some(hook),
        write_buffer_bytes: 1 << 20,
        ..StoreOptions::default()
    };
    Store::open(options).expect("the store opens")
}

impl Subject {
    fn new(budget_bytes: usize, linger: Duration, durable: bool) -> Subject {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let failing = Arc::new(Failing::default());
        let (store, _) = open(directory.path(), linger, &failing);
        let budget = Arc::new(MemoryBudget::new(budget_bytes));
        let queue = plain_queue(durable, store.allocate_queue_id(), &store, &budget, None);
        let events = EventLog::default();
        let getter = FakePort::new(&events);
        Subject {
            directory,
            linger,
            durable,
            failing,
            store,
            budget,
            queue,
            events,
            getter,
            ready: VecDeque::new(),
            consumers: Vec::new(),
            got: Vec::new(),
            next_id: 0,
            next_slot: 0,
        }
    }

    fn run(&mut self, step: Step) {
        let mut effects = Effects::default();
        match step {
            Step::Publish { count, bytes, persistent } => self.publish(count, bytes, persistent, &mut effects),
            Step::Consume { prefetch, no_ack, priority } if self.consumers.len() < 6 => {
                self.consume(prefetch, no_ack, priority, &mut effects)
            }
            Step::Consume { .. } => {}
            Step::Cancel { which } => drop(self.cancel(which, &mut effects)),
            Step::Close { which } => self.close(which, &mut effects),
            Step::Settle { which, from, count, requeue } => self.settle(which, from, count, requeue, &mut effects),
            Step::Get { no_ack } => self.get(no_ack, &mut effects),
            Step::SettleGot { from, count, requeue } => {
                let from = from.min(self.got.len());
                let done: Vec<_> = self.got.drain(from..(from + count).min(self.got.len())).collect();
                self.apply(None, done, requeue, &mut effects);
            }
            Step::Fill { which } => {
                if let Some(consumer) = self.consumers.get(which) {
                    consumer.port.full.store(true, Ordering::SeqCst);
                }
            }
            Step::Unblock { which } => {
                if let Some(consumer) = self.consumers.get_mut(which) {
                    consumer.port.full.store(false, Ordering::SeqCst);
                    consumer.stopped = false;
                    let id = consumer.id;
                    self.queue.unblock(id, &mut effects);
                }
            }
            Step::Purge => {
                let purged = self.queue.purge();
                self.take_events();
                assert_eq!(purged, self.ready.len() as u64, "purged");
                self.ready.clear();
            }
            Step::Sweep => self.queue.offer_eviction(),
            Step::Flush => self.flush(),
            Step::Restart => {
                self.flush();
                self.store.shutdown().expect("a clean end");
                self.reopen(self.what_survives());
            }
            Step::Crash { then } => {
                self.flush();
                let survivors = self.what_survives();
                self.failing.0.store(true, Ordering::SeqCst);
                then.into_iter().filter(|step| !matches!(step, Step::Flush)).for_each(|step| self.run(step));
                let _ = self.store.shutdown();
                self.reopen(survivors);
            }
        }
        effects.deliver_and_wake();
        self.settle_down();
    }

    fn publish(&mut self, count: usize, bytes: usize, persistent: u8, effects: &mut Effects) {
        let names = encode_names(b"", b"q");
        let messages: Vec<Msg> = (0..count)
            .map(|at| {
                let id = self.next_id + at as u64;
                let persistent = match persistent {
                    0 => false,
                    1 => !id.is_multiple_of(3),
                    _ => true,
                };
                Msg { id, bytes: bytes + id as usize % 7, persistent, handed_out: false }
            })
            .collect();
        let bodies: Vec<Bytes> = messages.iter().map(|message| body_of(message.id, message.bytes).into()).collect();
        let outgoing: Vec<Message<'_>> = messages
            .iter()
            .zip(&bodies)
            .map(|(message, body)| Message {
                names: &names,
                properties: &[0x10, 0, 2],
                body: if body.len() < SHARED_BODY_BYTES { Body::Inline(body) } else { Body::Shared(body) },
                persistent: message.persistent,
                extension: &[],
            })
            .collect();
        self.ready.extend(messages);
        self.next_id += count as u64;
        let round = self.queue.publish(&outgoing, effects);
        assert!(self.durable || round == 0, "a round for a queue that is not durable");
    }

    fn consume(&mut self, prefetch: u16, no_ack: bool, priority: i64, effects: &mut Effects) {
        let (slot, port) = (self.next_slot, FakePort::new(&self.events));
        self.next_slot += 1;
        let consumer = Consumer::new(port.clone(), Address { channel: 1, slot }, no_ack, false, priority, prefetch);
        let id = self.queue.consume(consumer).expect("nothing is exclusive");
        self.consumers.push(ModelConsumer {
            id,
            slot,
            port,
            no_ack,
            prefetch,
            priority,
            stopped: false,
            held: Vec::new(),
        });
        self.queue.unblock(id, effects);
    }

    /// Takes a consumer out of queue and model; what it holds becomes the channel's.
    fn cancel(&mut self, which: usize, effects: &mut Effects) -> Option<usize> {
        let consumer = self.consumers.get(which)?;
        self.queue.cancel(consumer.id, effects);
        let ModelConsumer { held, .. } = self.consumers.remove(which);
        let first = self.got.len();
        self.got.extend(held);
        Some(first)
    }

    fn close(&mut self, which: usize, effects: &mut Effects) {
        if let Some(first) = self.cancel(which, effects) {
            let back = self.got.split_off(first);
            self.apply(None, back, true, effects);
        }
    }

    fn settle(&mut self, which: usize, from: usize, count: usize, requeue: bool, effects: &mut Effects) {
        if self.consumers.is_empty() {
            return;
        }
        let at = which % self.consumers.len();
        let consumer = &mut self.consumers[at];
        let from = from.min(consumer.held.len());
        let done: Vec<_> = consumer.held.drain(from..(from + count).min(consumer.held.len())).collect();
        let id = consumer.id;
        self.apply(Some(id), done, requeue, effects);
    }

    fn apply(&mut self, consumer: Option<ConsumerId>, done: Vec<(Given, Msg)>, requeue: bool, effects: &mut Effects) {
        if done.is_empty() {
            return;
        }
        let settled: Vec<Settled> = done
            .iter()
            .map(|(given, _)| Settled { seq: given.seq, body_bytes: given.body_bytes, persistent: given.persistent })
            .collect();
        if requeue {
            for (_, message) in done {
                let at = self.ready.partition_point(|ready| ready.id < message.id);
                self.ready.insert(at, Msg { handed_out: true, ..message });
            }
        }
        let how = if requeue { Settlement::Failed } else { Settlement::Acked };
        self.queue.settle(consumer, &settled, how, effects);
    }

    fn get(&mut self, no_ack: bool, effects: &mut Effects) {
        let port: Arc<dyn Port> = self.getter.clone();
        let answered = self.queue.get(&port, Address { channel: 1, slot: u32::MAX }, no_ack, effects);
        let events = std::mem::take(&mut *self.events.lock());
        let mut was_got = false;
        for event in events {
            match event {
                Event::Got { given, remaining } => {
                    was_got = true;
                    let message = self.pop(given, no_ack);
                    assert_eq!(remaining, self.ready.len() as u64, "remaining");
                    if !no_ack {
                        self.got.push((given, message));
                    }
                }
                other => self.take_event(other),
            }
        }
        assert_eq!(answered, was_got);
        assert!(answered || self.ready.is_empty(), "basic.get found nothing in a queue of {}", self.ready.len());
    }

    /// The model's next message, which must be the one that was handed out.
    fn pop(&mut self, given: Given, no_ack: bool) -> Msg {
        let message = self.ready.pop_front().expect("a message is handed out that is not ready");
        let expected = (message.id, message.bytes as u32, message.handed_out);
        assert_eq!((given.id, given.body_bytes, given.redelivered), expected, "id, size, redelivered");
        // Settled as it is sent, a delivery need not say what the queue would have made of it.
        assert!(no_ack || given.persistent == (message.persistent && self.durable), "persistent: {given:?}");
        Msg { handed_out: true, ..message }
    }

    fn take_event(&mut self, event: Event) {
        let slot = match event {
            Event::Delivered { slot, .. } | Event::Refused { slot } => slot,
            Event::Got { .. } => panic!("an answer without a get"),
        };
        let at = self.consumers.iter().position(|consumer| consumer.slot == slot).expect("a consumer that is there");
        let Event::Delivered { given, .. } = event else {
            self.consumers[at].stopped = true;
            return;
        };
        assert!(self.consumers[at].is_able(), "a delivery beyond prefetch, or to a consumer that was stopped");
        let priority = self.consumers[at].priority;
        assert!(
            self.consumers.iter().all(|other| other.priority <= priority || !other.is_able()),
            "a consumer of higher priority was passed over"
        );
        let no_ack = self.consumers[at].no_ack;
        let message = self.pop(given, no_ack);
        if !no_ack {
            self.consumers[at].held.push((given, message));
        }
    }

    fn take_events(&mut self) {
        let events = std::mem::take(&mut *self.events.lock());
        events.into_iter().for_each(|event| self.take_event(event));
    }

    /// Waits for reads that are under way, then compares everything that can be seen.
    fn settle_down(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.queue.state.lock().lanes.iter().any(|lane| lane.loading) {
            assert!(Instant::now() < deadline, "a read from the store does not end");
            std::thread::sleep(Duration::from_micros(50));
        }
        self.take_events();
        let able = self.consumers.iter().filter(|consumer| consumer.is_able()).count();
        assert!(
            self.ready.is_empty() || able == 0,
            "{} messages wait, and {able} consumers could take them",
            self.ready.len()
        );
        let held = || self.consumers.iter().flat_map(|consumer| &consumer.held).chain(&self.got);
        let expected = Counts {
            waiting: 0,
            delayed: 0,
            ready: self.ready.len() as u64,
            ready_bytes: self.ready.iter().map(|message| message.bytes as u64).sum(),
            unacked: held().count() as u64,
            unacked_bytes: held().map(|(_, message)| message.bytes as u64).sum(),
            consumers: self.consumers.len() as u64,
        };
        assert_eq!(self.queue.counts(), expected);
        if self.durable {
            let durable =
                self.ready.iter().chain(held().map(|(_, message)| message)).filter(|message| message.persistent);
            let record = self.queue.open().lanes.at_level(0).record();
            assert_eq!(
                (record.message_count, record.message_bytes),
                durable.fold((0, 0), |(count, bytes), message| (count + 1, bytes + message.bytes as u64))
            );
        }
    }

    /// Brings everything up to now into a round that is committed.
    fn flush(&mut self) {
        let round = self.queue.mark_dirty(&mut self.queue.open());
        let outcome = futures_lite::future::block_on(self.store.durable(round));
        assert_eq!(outcome.is_err(), self.failing.0.load(Ordering::SeqCst));
    }

    fn what_survives(&self) -> VecDeque<Msg> {
        let held =
            self.consumers.iter().flat_map(|consumer| &consumer.held).chain(&self.got).map(|(_, message)| message);
        let mut all: Vec<Msg> =
            self.ready.iter().chain(held).filter(|message| message.persistent && self.durable).cloned().collect();
        all.sort_unstable_by_key(|message| message.id);
        all.into()
    }

    fn reopen(&mut self, survivors: VecDeque<Msg>) {
        self.take_events();
        let id = self.queue.id;
        self.failing = Arc::new(Failing::default());
        self.budget = Arc::new(MemoryBudget::new(self.budget.limit_bytes()));
        let (store, recovered) = open(self.directory.path(), self.linger, &self.failing);
        self.store = store;
        let record = recovered.states.iter().find(|(queue, _)| *queue == id).map(|(_, record)| *record);
        let (store, budget) = (self.store.clone(), self.budget.clone());
        self.queue = match record {
            Some(record) => plain_queue(self.durable, id, &store, &budget, Some(record)),
            None => plain_queue(self.durable, id, &store, &budget, None),
        };
        assert_eq!(self.store.stats().damaged_records, 0);
        self.consumers.clear();
        self.got.clear();
        self.events.lock().clear();
        self.ready = survivors;
    }

    /// Reads all that is left.
    fn drain(&mut self) {
        (0..self.consumers.len()).rev().for_each(|which| self.run(Step::Close { which }));
        self.run(Step::Consume { prefetch: 0, no_ack: false, priority: 0 });
        assert!(self.ready.is_empty());
        self.run(Step::Settle { which: 0, from: 0, count: usize::MAX / 2, requeue: false });
        self.run(Step::SettleGot { from: 0, count: usize::MAX / 2, requeue: false });
        self.run(Step::Flush);
        assert_eq!(self.queue.counts(), Counts { consumers: 1, ..Counts::default() });
        assert!(self.queue.resident_bytes() <= 4 << 10, "an empty queue holds {} bytes", self.queue.resident_bytes());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_queue_does_what_a_plain_list_would(
        budget_bytes in prop_oneof![Just(0usize), Just(300 << 10), Just(1 << 30)],
        lingers: bool,
        durable in prop::bool::weighted(0.85),
        steps in vec(step(), 1..120),
    ) {
        // Rounds in the background all the time, or only when one is asked for.
        let linger = if lingers { Duration::from_secs(3600) } else { Duration::ZERO };
        let mut subject = Subject::new(budget_bytes, linger, durable);
        for step in steps {
            subject.run(step);
        }
        subject.drain();
        subject.run(Step::Restart);
        assert_eq!(subject.queue.counts(), Counts::default());
    }
}

#[test]
fn a_long_backlog_is_mostly_on_disk_and_comes_back_in_order() {
    for persistent in [2, 1, 0] {
        let mut subject = Subject::new(256 << 10, Duration::ZERO, true);
        for _ in 0..60 {
            subject.run(Step::Publish { count: 40, bytes: 3_000, persistent });
            subject.run(Step::Flush);
        }
        let resident = subject.queue.resident_bytes();
        assert!(resident <= 8 * CHUNK_BYTES, "{resident} bytes of 7 MB are in memory");
        assert_eq!(subject.budget.used_bytes(), resident);
        // Half of it through a small prefetch, so that it is read bit by bit.
        subject.run(Step::Consume { prefetch: 7, no_ack: false, priority: 0 });
        for _ in 0..200 {
            subject.run(Step::Settle { which: 0, from: 0, count: 6, requeue: false });
        }
        assert!(subject.queue.resident_bytes() <= 10 * CHUNK_BYTES);
        subject.drain();
        assert!(subject.budget.used_bytes() <= 4 << 10);
    }
}

#[test]
fn acks_in_any_order_over_many_segments_survive_restarts_and_free_the_disk() {
    const SEGMENT: usize = crate::store::SEGMENT_RECORDS as usize;
    let ack = |subject: &mut Subject, from, count| subject.run(Step::Settle { which: 0, from, count, requeue: false });
    let consume = |subject: &mut Subject| subject.run(Step::Consume { prefetch: 0, no_ack: false, priority: 0 });
    let stored = |subject: &Subject| {
        let mut count = 0;
        subject
            .store
            .read_records(subject.queue.id, 0, u64::MAX, usize::MAX, &mut |_, _| count += 1)
            .expect("readable");
        count
    };
    let mut subject = Subject::new(300 << 10, Duration::ZERO, true);
    for _ in 0..20 {
        subject.run(Step::Publish { count: 1_000, bytes: 20, persistent: 2 });
    }
    consume(&mut subject);
    // The second segment as a whole, holes in the first, the end, and a stretch over a border.
    ack(&mut subject, SEGMENT, SEGMENT);
    (0..200).for_each(|at| ack(&mut subject, 3 * at, 1 + at % 3));
    let end = subject.consumers[0].held.len();
    ack(&mut subject, end - 500, 500);
    ack(&mut subject, SEGMENT + 3_000, 2_000);
    subject.run(Step::Restart);
    assert!(stored(&subject) <= 20_000 - SEGMENT, "a segment without a message left keeps its records");
    consume(&mut subject);
    // All but the very first one: it must not hold the disk space of the others.
    ack(&mut subject, 1, 10_000);
    subject.run(Step::Restart);
    consume(&mut subject);
    ack(&mut subject, 1, 20_000);
    subject.run(Step::Crash { then: vec![Step::Settle { which: 0, from: 0, count: 1, requeue: false }] });
    assert_eq!(subject.ready.len(), 1);
    assert!(stored(&subject) <= 2 * SEGMENT, "one message holds {} records on disk", stored(&subject));
    subject.drain();
    subject.run(Step::Restart);
    assert!(stored(&subject) < SEGMENT);
    assert_eq!(subject.queue.counts(), Counts::default());
}

#[test]
fn a_deleted_queue_takes_nothing_hands_out_nothing_and_frees_its_memory() {
    let mut subject = Subject::new(1 << 30, Duration::ZERO, true);
    subject.run(Step::Publish { count: 30, bytes: 1_000, persistent: 2 });
    subject.run(Step::Consume { prefetch: 5, no_ack: false, priority: 0 });
    let DeletedQueue { consumers, ready, .. } = subject
        .queue
        .delete(|counts| {
            assert_eq!((counts.ready, counts.unacked, counts.consumers), (25, 5, 1));
            Ok(())
        })
        .expect("nobody objects")
        .expect("it was there");
    assert_eq!((consumers.len(), ready), (1, 25));
    assert_eq!((subject.queue.counts(), subject.budget.used_bytes()), (Counts::default(), 0));
    let mut effects = Effects::default();
    let held = std::mem::take(&mut subject.consumers[0].held);
    let settled: Vec<Settled> = held
        .iter()
        .map(|(given, _)| Settled { seq: given.seq, body_bytes: given.body_bytes, persistent: true })
        .collect();
    subject.queue.settle(Some(subject.consumers[0].id), &settled, Settlement::Failed, &mut effects);
    let names = encode_names(b"", b"q");
    let message =
        Message { names: &names, properties: &[0, 0], body: Body::Inline(b"late"), persistent: true, extension: &[] };
    assert_eq!(subject.queue.publish(&[message], &mut effects), 0);
    assert!(!subject.queue.get(
        &(subject.getter.clone() as Arc<dyn Port>),
        Address { channel: 1, slot: 0 },
        true,
        &mut effects
    ));
    assert_eq!((subject.queue.purge(), subject.queue.counts()), (0, Counts::default()));
    let late = Consumer::new(subject.getter.clone(), Address { channel: 1, slot: 0 }, true, false, 0, 0);
    assert!(matches!(subject.queue.consume(late), Err(BrokerError::QueueNotFound { .. })));
    assert!(subject.queue.delete(|_| Ok(())).expect("nobody objects").is_none());
}

// The log

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Ready { handed_out: bool },
    Out,
    Consumed,
}

#[derive(Clone, Debug)]
enum LogStep {
    Append { count: u64, bytes: usize, persistent: bool },
    Take { count: usize },
    Consume { at: usize },
    GiveBack { at: usize },
    Purge,
    Evict,
}

fn log_step() -> impl Strategy<Value = LogStep> {
    prop_oneof![
        4 => (1u64..40, prop_oneof![8usize..100, Just(20_000usize)], prop::bool::weighted(0.7))
            .prop_map(|(count, bytes, persistent)| LogStep::Append { count, bytes, persistent }),
        4 => (1usize..40).prop_map(|count| LogStep::Take { count }),
        6 => (0usize..200).prop_map(|at| LogStep::Consume { at }),
        3 => (0usize..200).prop_map(|at| LogStep::GiveBack { at }),
        1 => Just(LogStep::Purge),
        3 => Just(LogStep::Evict),
    ]
}

/// A log, what it should know, and a store of what left its memory.
struct LogSubject {
    log: QueueLog,
    budget: Arc<MemoryBudget>,
    names: Vec<u8>,
    /// Place, body length, persistent.
    model: BTreeMap<u64, (Place, usize, bool)>,
    stored: BTreeMap<u64, Vec<u8>>,
}

impl LogSubject {
    fn new() -> LogSubject {
        let budget = Arc::new(MemoryBudget::new(0));
        LogSubject {
            log: QueueLog::new(budget.clone()),
            budget,
            names: encode_names(b"x", b"key"),
            model: BTreeMap::new(),
            stored: BTreeMap::new(),
        }
    }

    fn nth(&self, at: usize, place: impl Fn(Place) -> bool) -> Option<u64> {
        let all: Vec<u64> = self.model.iter().filter(|(_, (at, ..))| place(*at)).map(|(seq, _)| *seq).collect();
        (!all.is_empty()).then(|| all[at % all.len()])
    }

    fn set(&mut self, seq: u64, place: Place) {
        self.model.get_mut(&seq).expect("known").0 = place;
    }

    fn run(&mut self, step: LogStep) {
        match step {
            LogStep::Append { count, bytes, persistent } => {
                for _ in 0..count {
                    let body = body_of(self.log.tail(), bytes);
                    let shared = Bytes::from(body.clone());
                    let body = if bytes < SHARED_BODY_BYTES { Body::Inline(&body) } else { Body::Shared(&shared) };
                    let seq = self.log.append(
                        &Message { names: &self.names, properties: &[0, 0], body, persistent, extension: &[] },
                        0,
                        0,
                    );
                    self.model.insert(seq, (Place::Ready { handed_out: false }, bytes, persistent));
                }
            }
            LogStep::Take { count } => (0..count).for_each(|_| self.take()),
            LogStep::Consume { at } => {
                if let Some(seq) = self.nth(at, |place| place == Place::Out) {
                    self.log.consume(seq);
                    self.set(seq, Place::Consumed);
                }
            }
            LogStep::GiveBack { at } => {
                if let Some(seq) = self.nth(at, |place| place == Place::Out) {
                    self.log.give_back(seq);
                    self.set(seq, Place::Ready { handed_out: true });
                }
            }
            LogStep::Purge => {
                let purged: u64 = self.log.purge().into_iter().map(|(start, end)| end - start).sum();
                let ready: Vec<u64> = self
                    .model
                    .iter()
                    .filter(|(_, (place, ..))| matches!(place, Place::Ready { .. }))
                    .map(|(seq, _)| *seq)
                    .collect();
                assert_eq!(purged, ready.len() as u64);
                ready.into_iter().for_each(|seq| self.set(seq, Place::Consumed));
            }
            LogStep::Evict => {
                let stored = &mut self.stored;
                self.log
                    .for_each_durable(0, &mut Vec::new(), &mut |seq, record| drop(stored.insert(seq, record.to_vec())));
                let committed_to = self.log.tail();
                self.log.page_out(committed_to, usize::MAX, &mut Vec::new(), &mut |seq, record| {
                    drop(stored.insert(seq, record.to_vec()))
                });
                self.log.evict(committed_to);
            }
        }
        self.check();
    }

    /// Takes the next one, from the store if it has to be.
    fn take(&mut self) {
        let expected = self
            .model
            .iter()
            .find_map(|(&seq, &(place, ..))| (place == Place::Ready { handed_out: true }).then_some((seq, true)))
            .or_else(|| {
                self.model.iter().find_map(|(&seq, &(place, ..))| {
                    (place == Place::Ready { handed_out: false }).then_some((seq, false))
                })
            });
        let mut lost = 0;
        loop {
            match self.log.peek(&mut lost) {
                Peek::Empty => return assert_eq!(expected, None),
                Peek::Absent(at) => {
                    assert!(!self.log.is_resident(at));
                    let until = self.log.resident_after(at).min(at + 50);
                    let mut chunk = Chunk::new(at, CHUNK_BYTES, self.budget.clone());
                    self.stored.range(at..until).for_each(|(seq, record)| chunk.append_record(*seq, record));
                    chunk.cover(until);
                    self.log.install(chunk);
                    assert!(self.log.is_resident(at));
                }
                Peek::Ready { seq, redelivered, message } => {
                    assert_eq!(Some((seq, redelivered)), expected);
                    let (_, bytes, persistent) = self.model[&seq];
                    assert_eq!(
                        (message.body.as_slice(), message.persistent, message.names),
                        (&body_of(seq, bytes)[..], persistent, &self.names[..])
                    );
                    self.log.take(seq, redelivered);
                    break;
                }
            }
        }
        assert_eq!(lost, 0, "records that were stored count as lost");
        self.set(expected.expect("checked above").0, Place::Out);
    }

    fn check(&self) {
        let is_open = |(_, (place, ..)): &(&u64, &(Place, usize, bool))| *place != Place::Consumed;
        let head = self.model.iter().find(is_open).map_or(self.log.tail(), |(seq, _)| *seq);
        assert_eq!(self.log.head(), head);
        assert!(self.log.head() <= self.log.next() && self.log.next() <= self.log.tail());
        for (&seq, &(place, ..)) in &self.model {
            assert_eq!(seq < self.log.head() || self.log.consumed().contains(seq), place == Place::Consumed);
        }
        assert_eq!(self.log.has_ready(), self.model.values().any(|(place, ..)| matches!(place, Place::Ready { .. })));
        let mut durable = Vec::new();
        self.log.for_each_durable(0, &mut Vec::new(), &mut |seq, _| durable.push(seq));
        let resident = |seq: &u64| self.log.is_resident(*seq);
        let expected: Vec<u64> =
            self.model.iter().filter(|of| is_open(of) && of.1.2).map(|(seq, _)| *seq).filter(resident).collect();
        assert_eq!(durable, expected);
        assert_eq!(self.budget.used_bytes(), self.log.resident_bytes());
        if head == self.log.tail() {
            assert!(self.log.resident_bytes() <= 4 << 10, "{} bytes in an empty log", self.log.resident_bytes());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_log_keeps_positions_places_and_memory(steps in vec(log_step(), 1..100)) {
        let mut subject = LogSubject::new();
        for step in steps {
            subject.run(step);
        }
        subject.run(LogStep::Take { count: subject.model.len() });
        while let Some(seq) = subject.nth(7, |place| place == Place::Out) {
            subject.log.consume(seq);
            subject.set(seq, Place::Consumed);
        }
        subject.check();
    }

    #[test]
    fn a_recovered_log_hands_out_again_what_was_not_consumed(head in 0u64..50, delivered in 0u64..60, len in 0u64..60, consumed in vec((0u64..15, 1u64..6), 0..8)) {
        let tail = head + len;
        let mut ranges = Vec::new();
        let mut at = head;
        for (gap, length) in consumed {
            let (start, end) = (at + gap + 1, at + gap + 1 + length);
            if end <= tail {
                ranges.push((start, end));
            }
            at = end;
        }
        let budget = Arc::new(MemoryBudget::new(0));
        let mut log = QueueLog::recovered(budget.clone(), head, delivered, tail, &ranges);
        let is_consumed = |seq: u64| seq < head || ranges.iter().any(|&(start, end)| (start..end).contains(&seq));
        let cursor = ranges.iter().map(|range| range.1).fold(delivered.clamp(head, tail), u64::max);
        let mut chunk = Chunk::new(head, 0, budget);
        for seq in head..tail {
            let mut record = Vec::new();
            record::encode(&mut record, &Message { names: &[0, 0], properties: &[0, 0], body: Body::Inline(b"x"), persistent: true, extension: &[] }, 0);
            chunk.append_record(seq, &record);
        }
        log.install(chunk);
        let mut handed_out = Vec::new();
        let mut lost = 0;
        while let Peek::Ready { seq, redelivered, .. } = log.peek(&mut lost) {
            handed_out.push((seq, redelivered));
            log.take(seq, redelivered);
        }
        let expected: Vec<(u64, bool)> = (head..tail).filter(|&seq| !is_consumed(seq)).map(|seq| (seq, seq < cursor)).collect();
        prop_assert_eq!(handed_out, expected);
        prop_assert_eq!(lost, 0);
    }
}

#[test]
fn positions_without_a_record_are_passed_over_and_counted() {
    let budget = Arc::new(MemoryBudget::new(0));
    let mut log = QueueLog::recovered(budget.clone(), 10, 10, 20, &[]);
    let mut chunk = Chunk::new(10, 0, budget.clone());
    let mut record = Vec::new();
    record::encode(
        &mut record,
        &Message { names: &[0, 0], properties: &[0, 0], body: Body::Inline(b"x"), persistent: true, extension: &[] },
        0,
    );
    chunk.append_record(12, &record);
    chunk.append_record(17, &record);
    chunk.append_record(18, b"not a record");
    chunk.cover(20);
    log.install(chunk);
    let mut lost = 0;
    for expected in [12, 17] {
        let Peek::Ready { seq, redelivered: false, .. } = log.peek(&mut lost) else {
            panic!("position {expected} is there")
        };
        assert_eq!(seq, expected);
        log.take(seq, false);
        log.consume(seq);
    }
    // The chunk went with its last record; what is behind it is looked up, and found to be nothing.
    let Peek::Absent(18) = log.peek(&mut lost) else { panic!("nothing is known of position 18") };
    let mut chunk = Chunk::new(18, 0, budget);
    chunk.cover(20);
    log.install(chunk);
    assert!(matches!(log.peek(&mut lost), Peek::Empty));
    assert_eq!((lost, log.head(), log.next()), (8, 20, 20));
    assert!(log.resident_bytes() <= 4 << 10);
}

#[test]
fn chunks_that_come_late_or_hold_nothing_do_not_stay() {
    let record = || {
        let message =
            Message { names: &[0, 0], properties: &[0, 0], body: Body::Inline(b"x"), persistent: true, extension: &[] };
        let mut bytes = Vec::new();
        record::encode(&mut bytes, &message, 0);
        bytes
    };
    // Read ahead, and consumed by somebody else's reading meanwhile.
    let budget = Arc::new(MemoryBudget::new(0));
    let mut log = QueueLog::recovered(budget.clone(), 0, 0, 10, &[]);
    let read = || {
        let mut chunk = Chunk::new(0, CHUNK_BYTES, budget.clone());
        (0..5).for_each(|seq| chunk.append_record(seq, &record()));
        chunk
    };
    let late = read();
    log.install(read());
    for seq in 0..5 {
        log.take(seq, false);
        log.consume(seq);
    }
    log.install(late);
    assert_eq!((log.head(), log.resident_bytes()), (5, 0));
    // The end of the chunk was consumed before a restart, and the beginning is gone.
    let mut log = QueueLog::recovered(budget.clone(), 0, 10, 20, &[(8, 10)]);
    let mut chunk = Chunk::new(0, CHUNK_BYTES, budget.clone());
    chunk.cover(10);
    log.install(chunk);
    let mut lost = 0;
    assert!(matches!(log.peek(&mut lost), Peek::Absent(10)));
    assert_eq!((lost, log.head(), log.resident_bytes()), (8, 10, 0));
}

// Chunks

#[test]
fn a_chunk_knows_which_of_its_positions_are_absent() {
    let budget = Arc::new(MemoryBudget::new(0));
    let record = |body: &[u8], persistent| {
        let mut bytes = Vec::new();
        record::encode(
            &mut bytes,
            &Message { names: &[0, 0], properties: &[0, 0], body: Body::Inline(body), persistent, extension: &[] },
            0,
        );
        bytes
    };
    let mut chunk = Chunk::new(100, 0, budget.clone());
    assert_eq!((chunk.first(), chunk.end()), (100, 100));
    chunk.append_record(103, &record(b"three", true));
    chunk.append_record(104, &record(b"four", false));
    chunk.append_record(109, &record(&[7; 20_000], true));
    chunk.append_record(110, &record(b"cut", true)[..9]);
    chunk.cover(115);
    chunk.cover(112);
    assert_eq!((chunk.first(), chunk.end(), chunk.live, chunk.transient), (100, 115, 3, 1));
    for seq in (90..120).filter(|seq| ![103, 104, 109].contains(seq)) {
        assert!(chunk.record(seq).is_none() && chunk.message(seq).is_none() && !chunk.forget(seq), "position {seq}");
    }
    for (seq, body) in [(103, &b"three"[..]), (104, b"four"), (109, &[7; 20_000])] {
        assert_eq!(chunk.message(seq).expect("there").body.as_slice(), body);
    }
    assert_eq!(budget.used_bytes(), chunk.resident_bytes());
    assert!(matches!(chunk.message(109).expect("there").body, Body::Shared(_)), "a large body is shared");
    let before = chunk.resident_bytes();
    assert!(chunk.forget(109) && chunk.forget(104));
    assert_eq!((chunk.live, chunk.transient), (1, 0));
    assert!(chunk.resident_bytes() + 20_000 <= before, "a consumed large body is let go");
    drop(chunk);
    assert_eq!(budget.used_bytes(), 0);
}

// Consumers

fn ring_consumer(no_ack: bool, priority: i64, prefetch: u16) -> Consumer {
    Consumer::new(
        FakePort::new(&EventLog::default()),
        Address { channel: 1, slot: 0 },
        no_ack,
        false,
        priority,
        prefetch,
    )
}

/// Hands out one delivery; answers the address slot of who got it.
fn turn(ring: &mut ConsumerRing) -> Option<u32> {
    let (consumer, _) = ring.current()?;
    let slot = consumer.address.slot;
    consumer.delivered();
    ring.end_turn();
    Some(slot)
}

fn add(ring: &mut ConsumerRing, slot: u32, priority: i64, prefetch: u16) -> ConsumerId {
    let mut consumer = ring_consumer(false, priority, prefetch);
    consumer.address.slot = slot;
    ring.add(consumer)
}

#[test]
fn equals_take_turns_and_nobody_gets_two_before_the_others_got_one() {
    let mut ring = ConsumerRing::default();
    let ids: Vec<ConsumerId> = (0..5).map(|slot| add(&mut ring, slot, 0, 0)).collect();
    let turns: Vec<u32> = (0..12).filter_map(|_| turn(&mut ring)).collect();
    assert_eq!(turns, [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]);
    // Who leaves is not waited for, who comes is last, and the others keep their places.
    ring.remove(ids[3]);
    add(&mut ring, 9, 0, 0);
    assert_eq!((0..6).filter_map(|_| turn(&mut ring)).collect::<Vec<_>>(), [2, 4, 0, 1, 9, 2]);
}

#[test]
fn the_higher_priority_gets_all_until_its_credit_is_used() {
    let mut ring = ConsumerRing::default();
    add(&mut ring, 0, -5, 0);
    let high = add(&mut ring, 1, 10, 3);
    add(&mut ring, 2, 0, 1);
    assert_eq!((0..6).filter_map(|_| turn(&mut ring)).collect::<Vec<_>>(), [1, 1, 1, 2, 0, 0]);
    ring.settled(high, 2, 0);
    assert_eq!((0..3).filter_map(|_| turn(&mut ring)).collect::<Vec<_>>(), [1, 1, 0]);
}

#[test]
fn a_blocked_consumer_is_passed_over_until_it_is_unblocked() {
    let mut ring = ConsumerRing::default();
    let first = add(&mut ring, 0, 0, 0);
    add(&mut ring, 1, 0, 0);
    ring.block_current();
    assert_eq!((0..2).filter_map(|_| turn(&mut ring)).collect::<Vec<_>>(), [1, 1]);
    ring.settled(first, 1, 0); // credit is not what it lacks
    assert_eq!(turn(&mut ring), Some(1));
    ring.unblock(first);
    ring.unblock(first);
    assert_eq!((0..3).filter_map(|_| turn(&mut ring)).collect::<Vec<_>>(), [1, 0, 1]);
}

#[test]
fn an_id_of_a_consumer_that_is_gone_names_nobody_else() {
    let mut ring = ConsumerRing::default();
    let gone = add(&mut ring, 0, 0, 1);
    assert!(ring.remove(gone).is_some() && ring.remove(gone).is_none());
    let other = add(&mut ring, 1, 0, 1);
    assert_ne!(gone, other);
    assert_eq!(turn(&mut ring), Some(1));
    ring.settled(gone, 1, 0);
    ring.unblock(gone);
    assert!(ring.current().is_none(), "somebody else's credit was given back");
    ring.settled(other, 1, 0);
    assert_eq!(turn(&mut ring), Some(1));
    assert_eq!((ring.len(), ring.take_all().len(), ring.len()), (1, 1, 0));
    assert!(ring.remove(other).is_none());
}

#[test]
fn without_acks_there_is_no_limit_and_with_them_prefetch_is_one() {
    let mut ring = ConsumerRing::default();
    ring.add(ring_consumer(true, 0, 1));
    assert_eq!((0..5).filter_map(|_| turn(&mut ring)).count(), 5);
    let mut ring = ConsumerRing::default();
    let id = ring.add(ring_consumer(false, 0, 2));
    assert_eq!((0..5).filter_map(|_| turn(&mut ring)).count(), 2);
    ring.settled(id, 9, 0);
    assert_eq!((0..5).filter_map(|_| turn(&mut ring)).count(), 2);
}
