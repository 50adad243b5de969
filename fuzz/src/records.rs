//! What the store holds, damaged.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use amq_protocol::protocol::{AMQPClass, basic};
use leveret::{
    broker::Broker,
    session::ConnectionContext,
    store::{QueueId, QueueStateRecord, Recovered, RoundBuilder, RoundSource},
};

use super::{
    Choices, Lab,
    connections::Wire,
    traffic::{push_handshake, push_method, push_publish},
};

/// A source that puts whatever it was given into the next round.
struct Scribbler {
    queue: QueueId,
    records: Vec<(u64, Vec<u8>)>,
    pages: Vec<(u64, Vec<u8>)>,
    consumed: Vec<(u64, u64)>,
}

impl RoundSource for Scribbler {
    fn drain(&self, round: &mut RoundBuilder) {
        self.records.iter().for_each(|(seq, record)| round.append(self.queue, *seq, record));
        self.pages.iter().for_each(|(seq, record)| round.page_out(self.queue, *seq, record));
        if !self.consumed.is_empty() {
            round.put_consumed(self.queue, 0, &self.consumed);
        }
    }

    fn round_ended(&self, _: bool) {}
}

fn record(choices: &mut Choices<'_>) -> Vec<u8> {
    let body = choices.bytes(30);
    let mut bytes = ((3u32) << 8 | u32::from(choices.byte() & 1)).to_le_bytes().to_vec();
    bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&[1, 2, 3, 4, 0]);
    bytes.extend_from_slice(&[0, 2, b'q', b'1', 0x10, 0, 2]);
    bytes.extend_from_slice(body);
    match choices.below(6) {
        0 => choices.bytes(40).to_vec(),
        1 => {
            let at = choices.below(bytes.len());
            bytes[at] ^= 1 << choices.below(8);
            bytes
        }
        2 => {
            bytes.truncate(choices.below(bytes.len() + 1));
            bytes
        }
        _ => bytes,
    }
}

fn field(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
    out.extend_from_slice(bytes);
}

/// A queue's definition, as `broker::definitions` writes it.
fn queue_definition(id: QueueId) -> (Vec<u8>, Vec<u8>) {
    let (mut key, mut value) = (vec![b'q'], vec![1, 1]);
    field(&mut key, b"/");
    field(&mut key, b"q1");
    field(&mut value, &id.0.to_be_bytes());
    field(&mut value, &[0; 4]);
    (key, value)
}

/// A broker over a store with damaged records, odd counts and definitions that cannot be read: it comes up, and its
/// clients are served what is left.
pub fn records(lab: &Lab, data: &[u8]) {
    let mut choices = Choices::new(data);
    let id = lab.store.allocate_queue_id();
    let mut seq = 0;
    let mut scribbler = Scribbler { queue: id, records: Vec::new(), pages: Vec::new(), consumed: Vec::new() };
    for _ in 0..choices.below(20) {
        seq += 1 + choices.below(3) as u64;
        let bytes = record(&mut choices);
        if choices.one_in(5) { scribbler.pages.push((seq, bytes)) } else { scribbler.records.push((seq, bytes)) }
    }
    let mut at = 0;
    for _ in 0..choices.below(4) {
        let from = at + 1 + choices.below(6) as u64;
        at = from + 1 + choices.below(6) as u64;
        scribbler.consumed.push((from, at));
    }
    let round = lab.store.mark_dirty(Arc::new(scribbler));
    futures_lite::future::block_on(lab.store.durable(round)).expect("written");
    let state = QueueStateRecord {
        head: choices.below(8) as u64,
        delivered: choices.below(30) as u64,
        tail: if choices.one_in(8) { choices.number() >> choices.below(64) } else { seq + 1 },
        message_count: choices.below(40) as u64,
        message_bytes: choices.number() >> choices.below(64),
    };
    // A position is counted from 0 at birth; a queue does not get near the end of the numbers.
    let state = QueueStateRecord { tail: state.tail.min(1 << 20), ..state };
    let mut definitions = vec![queue_definition(id)];
    for _ in 0..choices.below(4) {
        let (mut key, mut value) = queue_definition(QueueId(choices.number()));
        let kind = choices.pick(b"vxqb?");
        key[0] = kind;
        for bytes in [&mut key, &mut value] {
            if choices.flag() {
                let at = choices.below(bytes.len());
                bytes[at] ^= 1 << choices.below(8);
            }
            if choices.one_in(3) {
                bytes.truncate(choices.below(bytes.len() + 1));
            }
            if choices.one_in(3) {
                bytes.extend_from_slice(choices.bytes(30));
            }
        }
        definitions.push((key, value));
    }
    let states = vec![(id, state)];
    let recovered = Recovered { definitions, states, next_queue_id: id.0 + 1, ..Recovered::default() };
    let broker = Broker::new(
        lab.store.clone(),
        recovered,
        leveret::broker::BrokerLimits { memory_budget_bytes: 1 << 20, disk_free_limit_bytes: 0 },
    );
    futures_lite::future::block_on(lab.store.durable(broker.ensure_vhost("/"))).expect("a vhost is made");
    let context = ConnectionContext { broker: broker.clone(), ..lab.context.clone() };
    let mut wire = Wire::new(context.session(1, IpAddr::V4(Ipv4Addr::LOCALHOST)), lab, false);
    let mut out = Vec::new();
    push_handshake(&mut out, &mut choices);
    for _ in 0..3 {
        push_method(
            &mut out,
            1,
            &AMQPClass::Basic(basic::AMQPMethod::Get(basic::Get { queue: "q1".into(), no_ack: choices.flag() })),
        );
    }
    let consume = basic::Consume { queue: "q1".into(), consumer_tag: "c".into(), ..basic::Consume::default() };
    push_method(&mut out, 1, &AMQPClass::Basic(basic::AMQPMethod::Consume(consume)));
    if wire.receive(&out) {
        wire.read();
        push_publish(&mut out, 1, &mut choices, false);
        push_method(
            &mut out,
            1,
            &AMQPClass::Basic(basic::AMQPMethod::Ack(basic::Ack { delivery_tag: 0, multiple: true })),
        );
        let _ = wire.receive(&out);
        wire.read();
    }
    drop(wire);
    // Its definitions were never written; what it wrote itself goes with the queue.
    for vhost in broker.vhosts() {
        let mut effects = leveret::broker::Effects::default();
        for queue in vhost.queues() {
            vhost.delete_queue(&queue, &mut effects, |_| Ok(())).expect("nobody objects");
        }
        broker.carry_out(&mut effects);
    }
}
