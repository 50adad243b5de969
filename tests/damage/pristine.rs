//! A data directory of a real broker that was killed twice: durable queues with messages of all sizes, acknowledged out of
//! order, with priorities, delayed, in common to several queues; in tables, blob files and the write-ahead log.

use std::{path::Path, time::Duration};

use amq_protocol::{
    protocol::BasicProperties,
    types::{AMQPValue, FieldTable},
};

use super::{
    broker::Broker,
    client::{Client, Incoming, PATIENCE, Rng, publish_frames},
    contents::Contents,
};

/// Name, messages a phase, and their sizes.
const QUEUES: [(&str, u64, std::ops::Range<u64>); 5] = [
    ("small", 400, 50..300),
    ("mixed", 200, 10..8_000),
    ("single", 120, 20..200),
    ("large", 5, 270_000..500_000),
    ("holes", 300, 50..400),
];
const PHASES: u64 = 3;
/// Messages that are published before a confirm is awaited, so that runs stay short.
const BATCH: usize = 40;
const ACKED_OF_HOLES: u64 = 3;
const LATER: u64 = 60;
/// Queues of a fanout, with large messages in common.
const COPIES: [&str; 2] = ["copy.1", "copy.2"];
const COPIED: u64 = 10;

fn table<const N: usize>(entries: [(&str, AMQPValue); N]) -> FieldTable {
    let mut table = FieldTable::default();
    for (key, value) in entries {
        table.insert(key.into(), value);
    }
    table
}

fn persistent() -> BasicProperties {
    BasicProperties::default().with_delivery_mode(2)
}

fn body(rng: &mut Rng, len: u64) -> Vec<u8> {
    // Half of it can be compressed.
    (0..len).map(|at| if at % 64 < 32 { rng.next() as u8 } else { b' ' }).collect()
}

/// Publishes and waits until all is confirmed.
struct Publisher {
    client: Client,
    published: u64,
    confirmed: u64,
}

impl Publisher {
    fn connect(broker: &Broker) -> Publisher {
        let mut client = Client::connect(broker.address).unwrap();
        client.confirm_select().unwrap();
        Publisher { client, published: 0, confirmed: 0 }
    }

    fn publish(&mut self, exchange: &str, key: &str, properties: &BasicProperties, body: &[u8]) {
        publish_frames(self.client.buffer(), 1, exchange, key, false, properties, body);
        self.published += 1;
    }

    fn settle(&mut self) {
        use amq_protocol::protocol::{AMQPClass, basic};
        self.client.flush().unwrap();
        while self.confirmed < self.published {
            match self.client.receive(PATIENCE).unwrap() {
                Some(Incoming::Method(1, AMQPClass::Basic(basic::AMQPMethod::Ack(ack)))) => {
                    self.confirmed = ack.delivery_tag;
                }
                other => panic!("instead of a confirm: {other:?}"),
            }
        }
    }
}

/// Fills a directory that does not exist.
pub fn fill(path: &Path) {
    let mut rng = Rng(7);
    for phase in 0..PHASES {
        let broker = Broker::start(path, &[]).unwrap();
        let mut publisher = Publisher::connect(&broker);
        if phase == 0 {
            declare(&mut publisher.client);
        }
        for (queue, count, sizes) in QUEUES {
            let batch = if queue == "single" { 1 } else { BATCH };
            for message in 0..count {
                let len = rng.range(sizes.clone());
                publisher.publish("", queue, &persistent(), &body(&mut rng, len));
                if message as usize % batch == batch - 1 {
                    publisher.settle();
                }
            }
            publisher.settle();
        }
        for _ in 0..COPIED {
            let len = rng.range(20_000..60_000);
            publisher.publish("everyone", "", &persistent(), &body(&mut rng, len));
        }
        publisher.settle();
        for level in 0..90u8 {
            let properties = persistent().with_priority(level % 4);
            publisher.publish("", "levels", &properties, &body(&mut rng, 200));
        }
        publisher.settle();
        for at in 0..LATER {
            let headers = table([("x-delay", AMQPValue::LongInt(3_600_000 + at as i32))]);
            let len = if at % 10 == 9 { 30_000 } else { 200 };
            publisher.publish("", "later", &persistent().with_headers(headers), &body(&mut rng, len));
            if at % 20 == 19 {
                publisher.settle();
            }
        }
        publisher.settle();
        acknowledge_some(&mut publisher.client);
        // The mirror is looked after once a second; and acknowledgements are written soon, but nobody is told.
        std::thread::sleep(Duration::from_millis(2_500));
        let complaints = broker.kill();
        assert!(complaints.is_empty(), "{complaints:?}");
    }
}

fn declare(client: &mut Client) {
    for (queue, ..) in QUEUES {
        client.declare_queue(queue, true, false).unwrap();
    }
    client.declare_queue_with("levels", table([("x-max-priority", AMQPValue::LongInt(3))])).unwrap();
    client.declare_queue_with("later", table([("x-delayed", AMQPValue::Boolean(true))])).unwrap();
    client.declare_exchange("everyone", "fanout", false).unwrap();
    for queue in COPIES {
        client.declare_queue(queue, true, false).unwrap();
        client.bind(queue, "everyone", "").unwrap();
    }
    client.declare_exchange("news", "topic", false).unwrap();
    for (number, (queue, ..)) in QUEUES.iter().enumerate() {
        for key in 0..40 {
            client.bind(queue, "news", &format!("{number}.{key}.#")).unwrap();
        }
    }
    for extra in 0..60 {
        client.declare_queue(&format!("empty-{extra}"), true, false).unwrap();
    }
}

/// Of every six messages of a queue, the third to fifth; of another, the first ones.
fn acknowledge_some(client: &mut Client) {
    for at in 0..200 {
        let delivery = client.get("holes").unwrap().unwrap();
        if (2..2 + ACKED_OF_HOLES).contains(&(at % 6)) {
            client.queue_ack(delivery.tag, false);
        }
    }
    for _ in 0..30 {
        let delivery = client.get("small").unwrap().unwrap();
        client.queue_ack(delivery.tag, false);
    }
    client.qos(0).unwrap(); // what was sent before is handled when this is answered
}

/// Whether the store has what was published and not acknowledged.
pub fn verify(contents: &Contents) {
    let messages: u64 = contents.states.values().map(|state| state.message_count).sum();
    assert_eq!(messages, contents.ready.len() as u64);
    let published: u64 =
        QUEUES.iter().map(|(_, count, _)| PHASES * count).sum::<u64>() + PHASES * (90 + COPIES.len() as u64 * COPIED);
    let of_holes: u64 = (0..200).filter(|at| (2..2 + ACKED_OF_HOLES).contains(&(at % 6))).count() as u64;
    // Unacknowledged messages of an earlier phase come first in the next one.
    assert_eq!(messages, published - PHASES * (of_holes + 30));
    assert!(contents.notes.len() as u64 >= PHASES * LATER, "{} notes", contents.notes.len());
    assert!(contents.definitions.len() > 200, "{} definitions", contents.definitions.len());
}
