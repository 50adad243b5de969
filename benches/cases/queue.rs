//! A queue with a consumer that only notes what it gets.

use std::sync::Arc;

use leveret::broker::{
    Address, Body, Consumer, ConsumerId, Delivery, DeliveryWriter, Effects, Message, Offer, Port, Queue, Settled,
    SettledRun, Settlement, encode_names,
};
use parking_lot::Mutex;

use super::{BATCH, Fixture, MESSAGES, Work};

const TO: Address = Address { channel: 1, slot: 0 };
/// As many messages as the session puts into one run at most.
const RUN_MESSAGES: usize = BATCH as usize;

/// What a connection's outbox is to a queue, without the frames.
#[derive(Default)]
struct Client(Mutex<Deliveries>);

#[derive(Default)]
struct Deliveries {
    settled: Vec<SettledRun>,
    /// Offers are refused.
    full: bool,
}

impl DeliveryWriter for Deliveries {
    fn deliver(&mut self, delivery: &Delivery<'_>) -> Offer {
        if self.full {
            return Offer::Blocked;
        }
        let body_bytes = delivery.message.body.len() as u32;
        self.settled.push(Settled { seq: delivery.seq, body_bytes, persistent: delivery.message.persistent }.into());
        Offer::Taken
    }

    fn answer_get(&mut self, _: &Delivery<'_>, _: u64) -> Offer {
        Offer::Gone
    }
}

impl Port for Client {
    fn with_writer(&self, write: &mut dyn FnMut(&mut dyn DeliveryWriter)) -> bool {
        write(&mut *self.0.lock());
        false
    }

    fn wake(&self) {}

    fn consumer_cancelled(&self, _: Address) {}

    fn consumer_timed_out(&self, _: Address) {}

    fn get_timed_out(&self, _: Address) {}
}

/// A publisher's messages, ready to be handed to a queue.
struct Publisher {
    queue: Arc<Queue>,
    names: Vec<u8>,
    body: Vec<u8>,
    effects: Effects,
}

impl Publisher {
    fn new(queue: Arc<Queue>, body_bytes: usize) -> Self {
        let names = encode_names(b"orders", b"orders.created");
        Publisher { queue, names, body: vec![7; body_bytes], effects: Effects::default() }
    }

    fn publish(&mut self, messages: u64) {
        let message = Message {
            names: &self.names,
            properties: &[0x10, 0, 1],
            body: Body::Inline(&self.body),
            persistent: false,
            extension: &[],
        };
        let run = [message; RUN_MESSAGES];
        for _ in 0..messages / RUN_MESSAGES as u64 {
            self.queue.publish(&run, &mut self.effects);
        }
    }
}

struct Append {
    publisher: Publisher,
    messages: u64,
}

impl Work for Append {
    fn prepare(&mut self) {
        self.publisher.queue.purge();
    }

    fn run(&mut self) {
        self.publisher.publish(self.messages);
    }
}

/// Messages for which there is no consumer.
pub fn append(fixture: &Fixture, messages: u64, body_bytes: usize) -> Box<dyn Work> {
    Box::new(Append { publisher: Publisher::new(fixture.queue("append"), body_bytes), messages })
}

struct Consumed {
    publisher: Publisher,
    client: Arc<Client>,
    consumer: ConsumerId,
}

impl Consumed {
    fn new(fixture: &Fixture, no_ack: bool) -> Self {
        let (queue, client) = (fixture.queue("consumed"), Arc::new(Client::default()));
        let consumer = queue.consume(Consumer::new(client.clone(), TO, no_ack, false, 0, 0)).expect("a fresh queue");
        Consumed { publisher: Publisher::new(queue, 16), client, consumer }
    }
}

struct Backlog(Consumed);

impl Work for Backlog {
    fn prepare(&mut self) {
        self.0.client.0.lock().settled.clear();
        self.0.client.0.lock().full = true;
        self.0.publisher.publish(MESSAGES);
        self.0.client.0.lock().full = false;
    }

    fn run(&mut self) {
        self.0.publisher.queue.unblock(self.0.consumer, &mut self.0.publisher.effects);
    }
}

/// Messages that are ready when the consumer can take them.
pub fn backlog(fixture: &Fixture) -> Box<dyn Work> {
    Box::new(Backlog(Consumed::new(fixture, true)))
}

struct PassThrough(Consumed);

impl Work for PassThrough {
    fn prepare(&mut self) {
        self.0.client.0.lock().settled.clear();
    }

    fn run(&mut self) {
        self.0.publisher.publish(MESSAGES);
    }
}

/// Messages that are taken as they come.
pub fn pass_through(fixture: &Fixture) -> Box<dyn Work> {
    Box::new(PassThrough(Consumed::new(fixture, true)))
}

struct Acknowledged {
    consumed: Consumed,
    batch: usize,
    shuffled: bool,
}

impl Work for Acknowledged {
    fn run(&mut self) {
        let Consumed { publisher, client, consumer } = &mut self.consumed;
        publisher.publish(MESSAGES);
        let mut settled = std::mem::take(&mut client.0.lock().settled);
        assert_eq!(settled.len() as u64, MESSAGES);
        if self.shuffled {
            for at in 0..settled.len() {
                settled.swap(at, at * 7_919 % MESSAGES as usize);
            }
        }
        for acked in settled.chunks(self.batch) {
            publisher.queue.settle(Some(*consumer), acked, Settlement::Acked, &mut publisher.effects);
        }
        settled.clear();
        client.0.lock().settled = settled;
    }
}

/// The whole life of a message in a queue; `batch` acknowledgements come at once.
pub fn acknowledged(fixture: &Fixture, batch: u64, shuffled: bool) -> Box<dyn Work> {
    Box::new(Acknowledged { consumed: Consumed::new(fixture, false), batch: batch as usize, shuffled })
}
