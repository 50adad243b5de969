//! A connection's outbox: deliveries written into it, and taken off its list of unacknowledged ones.

use std::sync::Arc;

use leveret::{
    broker::{Address, Body, Delivery, DeliveryWriter, Message, Offer, Port, encode_names},
    session::{Outbox, WriteBuffer},
};

use super::{
    BATCH, Fixture, MESSAGES, Work,
    wire::{CHANNEL, FRAME_MAX},
};

/// An outbox with one consumer, and what its queue has for it.
struct Deliver {
    outbox: Arc<Outbox>,
    port: Arc<dyn Port>,
    to: Address,
    names: Vec<Vec<u8>>,
    body: Vec<u8>,
    messages: u64,
    written: WriteBuffer,
}

impl Deliver {
    fn new(fixture: &Fixture, messages: u64, body_bytes: usize, no_ack: bool, keys: usize) -> Self {
        let outbox = Outbox::new(fixture.broker().clone());
        outbox.negotiated(FRAME_MAX, true);
        outbox.open_channel(CHANNEL);
        let tag = "consumer-1".into();
        let slot =
            outbox.add_consumer(CHANNEL, &tag, Some(fixture.queue("delivered")), no_ack).expect("an open channel");
        outbox.start_consumer(CHANNEL, slot, None, &tag, true);
        Deliver {
            port: outbox.port().expect("it is there"),
            to: Address { channel: CHANNEL, slot },
            outbox,
            names: (0..keys).map(|key| encode_names(b"orders", format!("created.{key}").as_bytes())).collect(),
            body: vec![7; body_bytes],
            messages,
            written: WriteBuffer::default(),
        }
    }

    /// What the connection's writer does, but for the writing.
    fn flush(&mut self) {
        if self.outbox.take(&mut self.written) {
            self.outbox.recycle(&mut self.written);
        }
    }

    fn deliver(&self) {
        let mut write = |writer: &mut dyn DeliveryWriter| {
            for (seq, names) in (0..self.messages).zip(self.names.iter().cycle()) {
                let body = Body::Inline(&self.body);
                let message = Message { names, properties: &[0x10, 0, 1], body, persistent: false, extension: &[] };
                let offer = writer.deliver(&Delivery { to: self.to, seq, redelivered: false, message });
                assert_eq!(offer, Offer::Taken);
            }
        };
        self.port.with_writer(&mut write);
    }
}

impl Work for Deliver {
    fn prepare(&mut self) {
        self.flush();
        let mut batch = Default::default();
        self.outbox.settler(CHANNEL).settle(0, true, &mut batch).expect("all of them are known");
    }

    fn run(&mut self) {
        self.deliver();
    }
}

/// `basic.deliver`, content header and body; with `keys` routing keys in turn, no delivery is like the one before.
pub fn deliver(fixture: &Fixture, messages: u64, body_bytes: usize, no_ack: bool, keys: usize) -> Box<dyn Work> {
    Box::new(Deliver::new(fixture, messages, body_bytes, no_ack, keys))
}

/// How deliveries are acknowledged.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Oldest,
    Newest,
    /// Oldest first, and 100 with each.
    Multiple,
}

struct Settle {
    deliveries: Deliver,
    order: Order,
    /// The tags of the deliveries at hand.
    tags: std::ops::Range<u64>,
}

impl Work for Settle {
    fn prepare(&mut self) {
        self.deliveries.flush();
        self.deliveries.deliver();
        self.tags = self.tags.end..self.tags.end + MESSAGES;
    }

    fn run(&mut self) {
        let mut batch = Default::default();
        let mut settler = self.deliveries.outbox.settler(CHANNEL);
        let mut settle = |tag, multiple| settler.settle(tag, multiple, &mut batch).expect("an outstanding delivery");
        let tags = self.tags.clone();
        match self.order {
            Order::Oldest => tags.for_each(|tag| settle(tag, false)),
            Order::Newest => tags.rev().for_each(|tag| settle(tag, false)),
            Order::Multiple => tags.step_by(BATCH as usize).for_each(|tag| settle(tag + BATCH - 1, true)),
        }
        assert_eq!(batch.deliveries.iter().map(|run| u64::from(run.count)).sum::<u64>(), MESSAGES);
    }
}

/// Acknowledgements of what was delivered, up to the point at which their queue is told.
pub fn settle(fixture: &Fixture, order: Order) -> Box<dyn Work> {
    Box::new(Settle { deliveries: Deliver::new(fixture, MESSAGES, 16, false, 1), order, tags: 1..1 })
}
