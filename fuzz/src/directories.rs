//! Data directories: filled and emptied as clients do it.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use amq_protocol::protocol::{AMQPClass, basic, channel, connection, exchange, parse_class, queue};
use leveret::{
    broker::Broker,
    session::{Session, Step, WriteBuffer, WriteCursor},
};

use super::{
    Choices, FRAME_MAX,
    connections::each_frame,
    lab::context_of,
    traffic::{push_frame, push_handshake, push_method},
};

const FILLED: [&str; 3] = ["fill.1", "fill.2", "fill.3"];

/// Drives a session to the end of `bytes`; answers the deliveries it wrote.
fn converse(session: &mut Session, bytes: &[u8]) -> Vec<u64> {
    let mut carry = bytes.to_vec();
    let (mut written, mut batch) = (Vec::new(), WriteBuffer::default());
    loop {
        let (used, step) = session.feed(&carry);
        carry.drain(..used);
        let outbox = session.outbox().clone();
        while outbox.take(&mut batch) {
            let mut cursor = WriteCursor::default();
            while let Some(some) = cursor.slices(&batch, |slices| {
                slices.iter().for_each(|slice| written.extend_from_slice(slice));
                slices.iter().map(|slice| slice.len()).sum()
            }) {
                cursor.advance(&batch, some);
            }
            outbox.recycle(&mut batch);
            outbox.refill();
        }
        match step {
            Step::More => break,
            Step::Await => futures_lite::future::block_on(session.wait()),
            Step::Drain => {}
            Step::Flush | Step::Drop { .. } => panic!("a well-behaved client is thrown out"),
        }
    }
    let mut tags = Vec::new();
    each_frame(&written, &mut |kind, _, payload| {
        let method = if kind == 1 { parse_class(payload).ok().map(|(_, class)| class) } else { None };
        match method {
            Some(AMQPClass::Basic(basic::AMQPMethod::GetOk(got))) => tags.push(got.delivery_tag),
            Some(AMQPClass::Channel(channel::AMQPMethod::Close(close))) => panic!("{}", close.reply_text),
            Some(AMQPClass::Connection(connection::AMQPMethod::Close(close))) => panic!("{}", close.reply_text),
            _ => {}
        }
    });
    tags
}

fn push_get(out: &mut Vec<u8>, queue: &str) {
    push_method(out, 1, &AMQPClass::Basic(basic::AMQPMethod::Get(basic::Get { queue: queue.into(), no_ack: false })));
}

/// Declares queues, exchanges and bindings, publishes, and takes some messages out of the middle.
pub fn fill(broker: &Arc<Broker>) {
    let context = context_of(broker);
    let mut session = context.session(1, IpAddr::V4(Ipv4Addr::LOCALHOST));
    let mut out = Vec::new();
    push_handshake(&mut out, &mut Choices::new(&[]));
    for (at, name) in FILLED.iter().enumerate() {
        let declare = queue::Declare { queue: (*name).into(), durable: true, ..queue::Declare::default() };
        push_method(&mut out, 1, &AMQPClass::Queue(queue::AMQPMethod::Declare(declare)));
        let (exchange, kind) = (format!("fill.x{at}"), ["direct", "topic", "headers"][at]);
        let declare = exchange::Declare {
            exchange: exchange.as_str().into(),
            kind: kind.into(),
            durable: true,
            ..exchange::Declare::default()
        };
        push_method(&mut out, 1, &AMQPClass::Exchange(exchange::AMQPMethod::Declare(declare)));
        let bind = queue::Bind {
            queue: (*name).into(),
            exchange: exchange.as_str().into(),
            routing_key: "a.#".into(),
            ..queue::Bind::default()
        };
        push_method(&mut out, 1, &AMQPClass::Queue(queue::AMQPMethod::Bind(bind)));
    }
    converse(&mut session, &out);
    for round in 0..6 {
        out.clear();
        for (at, name) in FILLED.iter().enumerate() {
            for count in 0..10 + at * 10 {
                let publish = basic::Publish {
                    exchange: "".into(),
                    routing_key: (*name).into(),
                    mandatory: false,
                    immediate: false,
                };
                push_method(&mut out, 1, &AMQPClass::Basic(basic::AMQPMethod::Publish(publish)));
                let len = if count == 5 { 30_000 } else { 10 + count * 7 + round };
                let mut header = vec![0, 60, 0, 0];
                header.extend_from_slice(&(len as u64).to_be_bytes());
                header.extend_from_slice(&[0x10, 0, 2]);
                push_frame(&mut out, 2, 1, &header);
                vec![round as u8; len].chunks(FRAME_MAX as usize - 8).for_each(|part| push_frame(&mut out, 3, 1, part));
            }
            (0..4).for_each(|_| push_get(&mut out, name));
        }
        let tags = converse(&mut session, &out);
        out.clear();
        for tag in tags.iter().skip(round).step_by(2) {
            push_method(
                &mut out,
                1,
                &AMQPClass::Basic(basic::AMQPMethod::Ack(basic::Ack { delivery_tag: *tag, multiple: false })),
            );
        }
        converse(&mut session, &out);
        std::thread::sleep(std::time::Duration::from_millis(10)); // a round or two pass
    }
    session.release();
}

/// Takes every message out of every queue; answers how many there were.
pub fn empty(broker: &Arc<Broker>) -> usize {
    let context = context_of(broker);
    let mut session = context.session(1, IpAddr::V4(Ipv4Addr::LOCALHOST));
    let mut out = Vec::new();
    push_handshake(&mut out, &mut Choices::new(&[]));
    converse(&mut session, &out);
    let mut seen = 0;
    for queue in broker.vhosts().iter().filter(|vhost| &*vhost.name == "/").flat_map(|vhost| vhost.queues()) {
        let name = queue.options.name.clone();
        if name.len() > 255 {
            continue;
        }
        loop {
            out.clear();
            (0..20).for_each(|_| push_get(&mut out, &name));
            let tags = converse(&mut session, &out);
            if tags.is_empty() {
                break;
            }
            seen += tags.len();
            out.clear();
            push_method(
                &mut out,
                1,
                &AMQPClass::Basic(basic::AMQPMethod::Ack(basic::Ack { delivery_tag: 0, multiple: true })),
            );
            converse(&mut session, &out);
        }
        let counts = queue.counts();
        assert_eq!(
            (counts.ready, counts.ready_bytes, counts.unacked, counts.unacked_bytes),
            (0, 0, 0, 0),
            "counts of an empty queue"
        );
    }
    session.release();
    seen
}
