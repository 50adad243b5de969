//! Whole connections without sockets: what comes in is fed to a session, what goes out is taken from its outbox.

use std::{net::Ipv4Addr, sync::Arc};

use amq_protocol::protocol::{AMQPClass, basic, channel, confirm, connection};
use leveret::{
    auth::{Authenticator, PasswordHash, Permission, User},
    broker::Queue,
    session::{ConnectionContext, Session, SessionLimits, WriteBuffer},
    wire::{encode, method},
};

use super::{
    BATCH, Fixture, LARGE_MESSAGES, MESSAGES, Work,
    wire::{self, CHANNEL, FRAME_MAX},
};

/// A connection with an open channel.
struct Client {
    session: Session,
    written: WriteBuffer,
}

impl Client {
    fn new(fixture: &Fixture, id: u64) -> Self {
        let guest = User::new("guest", PasswordHash::new("guest")).with_permission("/", Permission::full());
        let limits = SessionLimits {
            cluster_name: "bench".into(),
            channel_max: 2047,
            frame_max: FRAME_MAX,
            initial_frame_max: 8192,
            heartbeat_secs: 0,
            max_message_bytes: 128 << 20,
            permit_global_qos: true,
        };
        let context = ConnectionContext {
            broker: fixture.broker().clone(),
            auth: Arc::new(Authenticator::new([guest], [])),
            limits: Arc::new(limits),
        };
        let session = context.session(id, Ipv4Addr::LOCALHOST.into());
        let mut client = Client { session, written: WriteBuffer::default() };
        let start_ok = connection::StartOk {
            client_properties: Default::default(),
            mechanism: "PLAIN".into(),
            response: "\0guest\0guest".into(),
            locale: "en_US".into(),
        };
        let tune_ok = connection::TuneOk { channel_max: 2047, frame_max: FRAME_MAX, heartbeat: 0 };
        client.call(0, AMQPClass::Connection(connection::AMQPMethod::StartOk(start_ok)));
        client.call(0, AMQPClass::Connection(connection::AMQPMethod::TuneOk(tune_ok)));
        client.call(
            0,
            AMQPClass::Connection(connection::AMQPMethod::Open(connection::Open { virtual_host: "/".into() })),
        );
        client.call(CHANNEL, AMQPClass::Channel(channel::AMQPMethod::Open(channel::Open {})));
        client
    }

    fn call(&mut self, channel: u16, class: AMQPClass) {
        let mut frame = Vec::new();
        method::write(&mut frame, channel, &class);
        self.feed(&frame);
    }

    fn consume(&mut self, queue: &Queue, no_ack: bool) {
        let consume = basic::Consume {
            queue: (*queue.options.name).into(),
            consumer_tag: "consumer-1".into(),
            no_local: false,
            no_ack,
            exclusive: false,
            nowait: true,
            arguments: Default::default(),
        };
        self.call(CHANNEL, AMQPClass::Basic(basic::AMQPMethod::Consume(consume)));
    }

    fn feed(&mut self, input: &[u8]) {
        let (used, step) = self.session.feed(input);
        assert_eq!(used, input.len(), "{step:?}");
    }

    /// What the connection's writer does, but for the writing. Answers how many bytes there were.
    fn flush(&mut self) -> usize {
        if !self.session.outbox().take(&mut self.written) {
            return 0;
        }
        let bytes = self.written.len();
        self.session.outbox().recycle(&mut self.written);
        bytes
    }
}

/// The frames of `messages` publishes to a queue.
fn publishes(queue: &Queue, messages: u64, body_bytes: usize) -> Vec<u8> {
    let mut frames = Vec::new();
    for _ in 0..messages {
        wire::publish(&mut frames, "", &queue.options.name, &[0x10, 0, 1], &vec![7; body_bytes]);
    }
    frames
}

struct Publish {
    publisher: Client,
    queue: Arc<Queue>,
    read: Vec<u8>,
    reads: u64,
}

impl Work for Publish {
    fn prepare(&mut self) {
        assert_eq!(self.queue.purge() % MESSAGES, 0);
        self.publisher.flush();
    }

    fn run(&mut self) {
        for _ in 0..self.reads {
            self.publisher.feed(&self.read);
        }
    }
}

/// Publishes, so many in a read, to a queue without a consumer.
pub fn publish(fixture: &Fixture, batch: u64, body_bytes: usize, confirmed: bool) -> Box<dyn Work> {
    let (mut publisher, queue) = (Client::new(fixture, 1), fixture.queue("published"));
    if confirmed {
        publisher.call(CHANNEL, AMQPClass::Confirm(confirm::AMQPMethod::Select(confirm::Select { nowait: false })));
    }
    let read = publishes(&queue, batch, body_bytes);
    Box::new(Publish { publisher, queue, read, reads: MESSAGES / batch })
}

/// How the consumer acknowledges.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Ack {
    Auto,
    /// With a method each, all of a read's in one read.
    Each,
    /// With one method for a read's.
    Batch,
}

struct Through {
    publisher: Client,
    consumer: Client,
    ack: Ack,
    read: Vec<u8>,
    batch: u64,
    reads: u64,
    /// A read of acknowledgements for each read of publishes.
    acks: Vec<Vec<u8>>,
    last_tag: u64,
}

impl Work for Through {
    fn prepare(&mut self) {
        self.consumer.flush();
        self.publisher.flush();
        self.acks.clear();
        for _ in 0..self.reads {
            let tags = self.last_tag + 1..=self.last_tag + self.batch;
            self.last_tag = *tags.end();
            let mut acks = Vec::new();
            match self.ack {
                Ack::Auto => {}
                Ack::Each => tags.for_each(|tag| encode::basic_ack(&mut acks, CHANNEL, tag, false)),
                Ack::Batch => encode::basic_ack(&mut acks, CHANNEL, self.last_tag, true),
            }
            self.acks.push(acks);
        }
    }

    fn run(&mut self) {
        for acks in &self.acks {
            self.publisher.feed(&self.read);
            self.consumer.feed(acks);
        }
        let written = self.consumer.session.outbox().waiting_bytes();
        assert!(written > self.read.len() * self.reads as usize, "{written} bytes were delivered");
    }
}

/// Publishes on one connection, so many in a read, that are delivered on another one and acknowledged there.
pub fn through(fixture: &Fixture, ack: Ack, batch: u64, body_bytes: usize) -> Box<dyn Work> {
    let (publisher, mut consumer) = (Client::new(fixture, 1), Client::new(fixture, 2));
    let queue = fixture.queue("through");
    consumer.consume(&queue, ack == Ack::Auto);
    let read = publishes(&queue, batch, body_bytes);
    let messages = match (batch, body_bytes) {
        (1, _) => BATCH,
        (_, 16) => MESSAGES,
        _ => LARGE_MESSAGES,
    };
    let reads = messages / batch;
    Box::new(Through { publisher, consumer, ack, read, batch, reads, acks: Vec::new(), last_tag: 0 })
}
