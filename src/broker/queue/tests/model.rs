//! The queue against a model: a plain [`VecDeque`] of what is ready, and what each consumer holds.

mod stored;

use std::{collections::VecDeque, time::Instant};

use bytes::Bytes;
use proptest::{collection::vec, prelude::*};

use super::*;

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

fn ample() -> Arc<MemoryBudget> {
    Arc::new(MemoryBudget::new(1 << 40))
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
    /// What comes after it up to the end of the list is in rounds that fail; then the disk is back.
    Fail {
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
        1 => vec(quiet_step(), 0..10).prop_map(|then| Step::Fail { then }),
    ]
}

// The subject

struct Subject {
    directory: tempfile::TempDir,
    linger: Duration,
    durable: bool,
    failing: Arc<Failing>,
    store: Arc<Store>,
    budget: Arc<MemoryBudget>,
    queue: Arc<Queue>,
    /// Gets every message as well, in the same round, and is purged now and then. So large bodies are shared.
    twin: Arc<Queue>,
    events: EventLog,
    getter: Arc<FakePort>,
    // The model
    ready: VecDeque<Msg>,
    consumers: Vec<ModelConsumer>,
    got: Vec<(Given, Msg)>,
    next_id: u64,
    next_slot: u32,
}

impl Subject {
    fn new(budget_bytes: usize, linger: Duration, durable: bool) -> Subject {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let failing = Arc::new(Failing::default());
        let (store, _) = open(directory.path(), linger, &failing);
        let budget = Arc::new(MemoryBudget::new(budget_bytes));
        let queue = plain_queue(durable, store.allocate_queue_id(), &store, &budget, None);
        let twin = plain_queue(durable, store.allocate_queue_id(), &store, &ample(), None);
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
            twin,
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
            Step::Sweep => {
                self.queue.offer_eviction();
                self.twin.purge();
            }
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
            Step::Fail { then } => {
                self.failing.0.store(true, Ordering::SeqCst);
                let steps = then.into_iter().filter(|step| !matches!(step, Step::Flush));
                steps.for_each(|step| self.run(step));
                self.failing.0.store(false, Ordering::SeqCst);
                // A round that has failed just now may be told of later.
                let deadline = Instant::now() + Duration::from_secs(20);
                while !self.is_flushed() {
                    assert!(Instant::now() < deadline, "the store goes on failing");
                    std::thread::sleep(Duration::from_millis(1));
                }
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
        let one_round = self.store.atomic();
        self.twin.publish(&outgoing, effects);
        let round = self.queue.publish(&outgoing, effects);
        drop(one_round);
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
        let mut settled: Vec<SettledRun> = Vec::new();
        for Given { seq, body_bytes, persistent, .. } in done.iter().map(|(given, _)| *given) {
            let one = SettledRun::from(Settled { seq, body_bytes, persistent });
            match settled.last_mut() {
                Some(last) if last.joins(&one) => last.count += 1,
                _ => settled.push(one),
            }
        }
        if requeue {
            for (_, message) in done {
                let at = self.ready.partition_point(|ready| ready.id < message.id);
                self.ready.insert(at, Msg { handed_out: true, ..message });
            }
        }
        if requeue {
            self.queue.settle(consumer, &settled, Settlement::Failed, effects);
        } else if settled.len().is_multiple_of(2) {
            self.queue.settle(consumer, &settled, Settlement::Acked, effects);
        } else {
            self.queue.acknowledge(consumer, &settled, effects);
        }
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
        loop {
            let is_loading = self.queue.state.lock().lanes.iter().any(|lane| lane.loading);
            self.take_events();
            let able = self.consumers.iter().filter(|consumer| consumer.is_able()).count();
            // What was read in the background is handed out by the dozen thousand, with the queue unlocked in between.
            if !is_loading && (self.ready.is_empty() || able == 0) {
                break;
            }
            let waiting = self.ready.len();
            assert!(Instant::now() < deadline, "{waiting} messages wait, and {able} consumers could take them");
            std::thread::sleep(Duration::from_micros(50));
        }
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
        assert_ne!(self.is_flushed(), self.failing.0.load(Ordering::SeqCst));
    }

    fn is_flushed(&mut self) -> bool {
        let round_of_twin = self.twin.mark_dirty(&mut self.twin.open());
        let round = self.queue.mark_dirty(&mut self.queue.open()).max(round_of_twin);
        futures_lite::future::block_on(self.store.durable(round)).is_ok()
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
        self.failing = Arc::new(Failing::default());
        self.budget = Arc::new(MemoryBudget::new(self.budget.limit_bytes()));
        let (store, recovered) = open(self.directory.path(), self.linger, &self.failing);
        self.store = store;
        let again = |id: QueueId, budget: &Arc<MemoryBudget>| {
            let record = recovered.states.iter().find(|(queue, _)| *queue == id).map(|(_, record)| *record);
            plain_queue(self.durable, id, &self.store, budget, record)
        };
        self.queue = again(self.queue.id, &self.budget);
        self.twin = again(self.twin.id, &ample());
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
        self.twin.purge();
        self.run(Step::Flush);
        assert_eq!(self.store.body_counts(), (0, 0));
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
