//! What clients send: handshakes, methods and messages, tame or wild.

use amq_protocol::{
    protocol::{AMQPClass, basic, channel, confirm, connection, exchange, queue, tx},
    types::{AMQPValue, FieldTable},
};
use leveret::wire::method;

use super::{Choices, FRAME_MAX};

pub(super) const NAMES: [&str; 18] = [
    "q1",
    "q2",
    "q3",
    "",
    "x.direct",
    "x.topic",
    "x.fanout",
    "x.headers",
    "amq.direct",
    "amq.topic",
    "amq.headers",
    "amq.fanout",
    "amq.rabbitmq.reply-to",
    "amq.nope",
    "a.b.c",
    "*.b.#",
    "#",
    "with\r\nline",
];

pub(super) const TAME_QUEUES: [&str; 3] = ["q1", "q2", "q3"];
pub(super) const TAME_EXCHANGES: [(&str, &str); 4] =
    [("x.direct", "direct"), ("x.topic", "topic"), ("x.fanout", "fanout"), ("x.headers", "headers")];

pub(super) fn push_frame(out: &mut Vec<u8>, kind: u8, channel: u16, payload: &[u8]) {
    out.push(kind);
    out.extend_from_slice(&channel.to_be_bytes());
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    out.extend_from_slice(payload);
    out.push(0xCE);
}

pub(super) fn push_method(out: &mut Vec<u8>, channel: u16, class: &AMQPClass) {
    push_frame(out, 1, channel, &method::payload(class));
}

pub(super) fn value(choices: &mut Choices<'_>, depth: usize) -> AMQPValue {
    match choices.below(if depth == 0 { 14 } else { 17 }) {
        0 => AMQPValue::LongString("text".into()),
        1 => AMQPValue::Boolean(choices.flag()),
        2 => AMQPValue::ShortShortInt(choices.byte() as i8),
        3 => AMQPValue::ShortShortUInt(choices.byte()),
        4 => AMQPValue::ShortInt(choices.number() as i16),
        5 => AMQPValue::ShortUInt(choices.number() as u16),
        6 => AMQPValue::LongInt(choices.number() as i32),
        7 => AMQPValue::LongUInt(choices.number() as u32),
        8 => AMQPValue::LongLongInt(choices.number() as i64),
        9 => AMQPValue::Double(f64::from_bits(choices.number())),
        10 => AMQPValue::Timestamp(choices.number()),
        11 => AMQPValue::Void,
        12 => AMQPValue::ByteArray(choices.bytes(20).to_vec().into()),
        13 => AMQPValue::LongString(choices.bytes(60).to_vec().into()),
        14 | 15 => AMQPValue::FieldTable(table(choices, depth - 1)),
        _ => AMQPValue::FieldArray((0..choices.below(4)).map(|_| value(choices, depth - 1)).collect::<Vec<_>>().into()),
    }
}

pub(super) fn table(choices: &mut Choices<'_>, depth: usize) -> FieldTable {
    const KEYS: [&str; 16] = [
        "x-match",
        "x-priority",
        "x-max-length",
        "x-message-ttl",
        "x-expires",
        "x-dead-letter-exchange",
        "x-dead-letter-routing-key",
        "x-queue-type",
        "x-overflow",
        "x-max-priority",
        "alternate-exchange",
        "x-name-prefix",
        "CC",
        "BCC",
        "a",
        "b",
    ];
    let mut table = FieldTable::default();
    for _ in 0..choices.below(5) {
        let key = choices.pick(&KEYS);
        let value = match key {
            "x-match" => {
                AMQPValue::LongString(choices.pick(&["any", "all", "any-with-x", "all-with-x", "none"]).into())
            }
            "alternate-exchange" => AMQPValue::LongString(choices.pick(&NAMES).into()),
            _ => value(choices, depth),
        };
        table.insert(key.into(), value);
    }
    table
}

/// What a reasonable client does: things it has declared, in the way it has declared them.
fn tame_class(choices: &mut Choices<'_>) -> AMQPClass {
    use basic::AMQPMethod as B;
    use queue::AMQPMethod as Q;
    let (queue, routing_key) = (choices.pick(&TAME_QUEUES), choices.pick(&["", "a.b.c", "q1", "*.b.#"]).into());
    let (exchange, kind) = choices.pick(&TAME_EXCHANGES);
    let mut arguments = FieldTable::default();
    match choices.below(40) {
        0..3 => AMQPClass::Queue(Q::Declare(queue::Declare {
            queue: queue.into(),
            durable: queue != "q3",
            nowait: choices.one_in(4),
            ..queue::Declare::default()
        })),
        3 => AMQPClass::Queue(Q::Declare(queue::Declare {
            exclusive: choices.flag(),
            auto_delete: choices.flag(),
            ..queue::Declare::default()
        })),
        4..7 => AMQPClass::Exchange(exchange::AMQPMethod::Declare(exchange::Declare {
            exchange: exchange.into(),
            kind: kind.into(),
            durable: true,
            ..exchange::Declare::default()
        })),
        7..11 => {
            if kind == "headers" {
                arguments = table(choices, 1);
                arguments.insert(
                    "x-match".into(),
                    AMQPValue::LongString(choices.pick(&["any", "all", "any-with-x"]).into()),
                );
            }
            AMQPClass::Queue(Q::Bind(queue::Bind {
                queue: queue.into(),
                exchange: exchange.into(),
                routing_key,
                nowait: choices.flag(),
                arguments,
            }))
        }
        11 => AMQPClass::Queue(Q::Unbind(queue::Unbind {
            queue: queue.into(),
            exchange: exchange.into(),
            routing_key,
            arguments,
        })),
        12 => AMQPClass::Queue(Q::Purge(queue::Purge { queue: queue.into(), nowait: choices.flag() })),
        13 if choices.one_in(3) => {
            AMQPClass::Queue(Q::Delete(queue::Delete { queue: queue.into(), ..queue::Delete::default() }))
        }
        14 if choices.one_in(3) => AMQPClass::Exchange(exchange::AMQPMethod::Delete(exchange::Delete {
            exchange: exchange.into(),
            ..exchange::Delete::default()
        })),
        15 => {
            let destination = choices.pick(&TAME_EXCHANGES).0.into();
            AMQPClass::Exchange(exchange::AMQPMethod::Bind(exchange::Bind {
                destination,
                source: exchange.into(),
                routing_key,
                nowait: false,
                arguments,
            }))
        }
        16..22 => {
            if choices.one_in(4) {
                arguments.insert("x-priority".into(), AMQPValue::LongInt(i32::from(choices.byte() as i8)));
            }
            let (no_ack, nowait) = (choices.one_in(3), choices.one_in(4));
            AMQPClass::Basic(B::Consume(basic::Consume {
                queue: queue.into(),
                no_ack,
                nowait,
                arguments,
                ..basic::Consume::default()
            }))
        }
        22..25 => AMQPClass::Basic(B::Qos(basic::Qos {
            prefetch_count: u16::from(choices.byte() % 12),
            global: choices.flag(),
        })),
        25..33 => AMQPClass::Basic(B::Get(basic::Get { queue: queue.into(), no_ack: choices.flag() })),
        33 | 34 => AMQPClass::Basic(B::Recover(basic::Recover { requeue: true })),
        35 => AMQPClass::Basic(B::Cancel(basic::Cancel { consumer_tag: "replies".into(), nowait: choices.flag() })),
        36 => AMQPClass::Basic(B::Consume(basic::Consume {
            queue: "amq.rabbitmq.reply-to".into(),
            consumer_tag: "replies".into(),
            no_ack: true,
            ..basic::Consume::default()
        })),
        37 => AMQPClass::Confirm(confirm::AMQPMethod::Select(confirm::Select { nowait: choices.flag() })),
        38 => AMQPClass::Tx(match choices.below(6) {
            0 => tx::AMQPMethod::Select(tx::Select {}),
            1..5 => tx::AMQPMethod::Commit(tx::Commit {}),
            _ => tx::AMQPMethod::Rollback(tx::Rollback {}),
        }),
        _ => AMQPClass::Queue(Q::Declare(queue::Declare {
            queue: queue.into(),
            passive: true,
            ..queue::Declare::default()
        })),
    }
}

/// A method of any class, mostly one that makes sense.
pub(super) fn class(choices: &mut Choices<'_>, tame: bool) -> AMQPClass {
    if tame {
        return tame_class(choices);
    }
    use basic::AMQPMethod as B;
    use queue::AMQPMethod as Q;
    let name = |choices: &mut Choices<'_>| choices.pick(&NAMES).into();
    match choices.below(34) {
        0..3 => AMQPClass::Channel(channel::AMQPMethod::Open(channel::Open {})),
        3 => AMQPClass::Channel(channel::AMQPMethod::Close(channel::Close {
            reply_code: 200,
            reply_text: "bye".into(),
            class_id: 0,
            method_id: 0,
        })),
        4 => AMQPClass::Channel(channel::AMQPMethod::CloseOk(channel::CloseOk {})),
        5 => AMQPClass::Channel(channel::AMQPMethod::Flow(channel::Flow { active: choices.flag() })),
        6..10 => AMQPClass::Queue(Q::Declare(queue::Declare {
            queue: name(choices),
            passive: choices.one_in(6),
            durable: choices.flag(),
            exclusive: choices.one_in(5),
            auto_delete: choices.one_in(5),
            nowait: choices.one_in(4),
            arguments: if choices.one_in(4) { table(choices, 2) } else { FieldTable::default() },
        })),
        10..12 => AMQPClass::Queue(Q::Bind(queue::Bind {
            queue: name(choices),
            exchange: name(choices),
            routing_key: name(choices),
            nowait: choices.one_in(4),
            arguments: if choices.one_in(3) { table(choices, 2) } else { FieldTable::default() },
        })),
        12 => AMQPClass::Queue(Q::Unbind(queue::Unbind {
            queue: name(choices),
            exchange: name(choices),
            routing_key: name(choices),
            arguments: FieldTable::default(),
        })),
        13 => AMQPClass::Queue(Q::Purge(queue::Purge { queue: name(choices), nowait: choices.flag() })),
        14 => AMQPClass::Queue(Q::Delete(queue::Delete {
            queue: name(choices),
            if_unused: choices.one_in(3),
            if_empty: choices.one_in(3),
            nowait: choices.flag(),
        })),
        15..17 => AMQPClass::Exchange(exchange::AMQPMethod::Declare(exchange::Declare {
            exchange: name(choices),
            kind: choices.pick(&["direct", "topic", "fanout", "headers", "x-none", ""]).into(),
            passive: choices.one_in(6),
            durable: choices.flag(),
            auto_delete: choices.one_in(4),
            internal: choices.one_in(6),
            nowait: choices.one_in(4),
            arguments: if choices.one_in(3) { table(choices, 2) } else { FieldTable::default() },
        })),
        17 => AMQPClass::Exchange(exchange::AMQPMethod::Delete(exchange::Delete {
            exchange: name(choices),
            if_unused: choices.flag(),
            nowait: choices.flag(),
        })),
        18 => AMQPClass::Exchange(exchange::AMQPMethod::Bind(exchange::Bind {
            destination: name(choices),
            source: name(choices),
            routing_key: name(choices),
            nowait: choices.flag(),
            arguments: FieldTable::default(),
        })),
        19 => AMQPClass::Exchange(exchange::AMQPMethod::Unbind(exchange::Unbind {
            destination: name(choices),
            source: name(choices),
            routing_key: name(choices),
            nowait: choices.flag(),
            arguments: FieldTable::default(),
        })),
        20..23 => AMQPClass::Basic(B::Consume(basic::Consume {
            queue: name(choices),
            consumer_tag: choices.pick(&["", "c1", "c2", "c3"]).into(),
            no_local: choices.flag(),
            no_ack: choices.flag(),
            exclusive: choices.one_in(8),
            nowait: choices.one_in(4),
            arguments: if choices.one_in(4) { table(choices, 1) } else { FieldTable::default() },
        })),
        23 => AMQPClass::Basic(B::Cancel(basic::Cancel {
            consumer_tag: choices.pick(&["c1", "c2", "c3", "c4"]).into(),
            nowait: choices.flag(),
        })),
        24 => AMQPClass::Basic(B::Qos(basic::Qos {
            prefetch_count: u16::from(choices.byte() % 8),
            global: choices.flag(),
        })),
        25..28 => AMQPClass::Basic(B::Get(basic::Get { queue: name(choices), no_ack: choices.flag() })),
        28 => AMQPClass::Basic(B::Recover(basic::Recover { requeue: !choices.one_in(8) })),
        29 => AMQPClass::Basic(B::RecoverAsync(basic::RecoverAsync { requeue: !choices.one_in(8) })),
        30 => AMQPClass::Confirm(confirm::AMQPMethod::Select(confirm::Select { nowait: choices.flag() })),
        31 => AMQPClass::Tx(match choices.below(4) {
            0 | 1 => tx::AMQPMethod::Select(tx::Select {}),
            2 => tx::AMQPMethod::Commit(tx::Commit {}),
            _ => tx::AMQPMethod::Rollback(tx::Rollback {}),
        }),
        32 => AMQPClass::Connection(match choices.below(3) {
            0 => connection::AMQPMethod::UpdateSecret(connection::UpdateSecret {
                new_secret: "s".into(),
                reason: "r".into(),
            }),
            1 => connection::AMQPMethod::Blocked(connection::Blocked { reason: "?".into() }),
            _ => connection::AMQPMethod::Close(connection::Close {
                reply_code: 200,
                reply_text: "bye".into(),
                class_id: 0,
                method_id: 0,
            }),
        }),
        _ => AMQPClass::Channel(channel::AMQPMethod::FlowOk(channel::FlowOk { active: true })),
    }
}

fn settlement(choices: &mut Choices<'_>) -> AMQPClass {
    use basic::AMQPMethod as B;
    let delivery_tag = match choices.below(12) {
        0 => 0,
        1 => choices.number(),
        tag => tag as u64,
    };
    AMQPClass::Basic(match choices.below(3) {
        0 => B::Ack(basic::Ack { delivery_tag, multiple: choices.flag() }),
        1 => B::Nack(basic::Nack { delivery_tag, multiple: choices.flag(), requeue: choices.flag() }),
        _ => B::Reject(basic::Reject { delivery_tag, requeue: choices.flag() }),
    })
}

/// Settles deliveries that may well be open.
pub(super) fn push_known_settlement(out: &mut Vec<u8>, choices: &mut Choices<'_>, tags: &mut Vec<(u16, u64)>) {
    use basic::AMQPMethod as B;
    let (channel, delivery_tag) = tags.swap_remove(choices.below(tags.len().min(60_000)));
    let multiple = choices.one_in(4);
    if multiple {
        tags.retain(|&(of, tag)| of != channel || tag > delivery_tag);
    }
    let method = match choices.below(4) {
        0 | 1 => B::Ack(basic::Ack { delivery_tag, multiple }),
        2 => B::Nack(basic::Nack { delivery_tag, multiple, requeue: choices.flag() }),
        _ => B::Reject(basic::Reject { delivery_tag, requeue: choices.flag() }),
    };
    push_method(out, channel, &AMQPClass::Basic(method));
}

pub(super) fn properties_of(choices: &mut Choices<'_>, tame: bool) -> Vec<u8> {
    use amq_protocol::{
        frame::WriteContext,
        protocol::{BasicProperties, basic::gen_properties},
    };
    match choices.below(8) {
        0 | 1 => vec![0x10, 0, 2],
        2 => vec![0, 0],
        3 if !tame => choices.bytes(40).to_vec(),
        _ => {
            let mut properties = BasicProperties::default().with_delivery_mode(choices.byte() % 4);
            if if tame { choices.one_in(8) } else { choices.flag() } {
                properties = properties.with_headers(table(choices, 3));
            }
            if choices.one_in(4) {
                properties = properties.with_expiration(
                    choices
                        .pick(
                            &["1000", "0", "007", "-1", "", "99999999999999999999", "7ms"][..if tame { 3 } else { 7 }],
                        )
                        .into(),
                );
            }
            if choices.one_in(4) {
                properties = properties.with_reply_to(
                    choices.pick(&["q1", "", "amq.rabbitmq.reply-to"][..if tame { 2 } else { 3 }]).into(),
                );
            }
            if choices.one_in(4) {
                properties =
                    properties.with_user_id(choices.pick(&["guest", "root", ""][..if tame { 1 } else { 3 }]).into());
            }
            if choices.one_in(4) {
                properties = properties
                    .with_priority(choices.byte())
                    .with_timestamp(choices.number())
                    .with_message_id("m".into());
            }
            gen_properties(&properties)(WriteContext::from(Vec::new()))
                .map(|written| written.into_inner().0)
                .unwrap_or_default()
        }
    }
}

/// A publish, its content whole, wrong, in pieces or with something between.
pub(super) fn push_publish(out: &mut Vec<u8>, channel: u16, choices: &mut Choices<'_>, tame: bool) {
    let exchange = if tame && choices.flag() {
        choices.pick(&TAME_EXCHANGES).0
    } else if tame {
        ""
    } else {
        choices.pick(&NAMES)
    };
    let (exchange, routing_key) =
        (exchange.into(), if tame { choices.pick(&["q1", "q2", "q3", "a.b.c"]) } else { choices.pick(&NAMES) }.into());
    let publish =
        basic::Publish { exchange, routing_key, mandatory: choices.one_in(6), immediate: !tame && choices.one_in(40) };
    push_method(out, channel, &AMQPClass::Basic(basic::AMQPMethod::Publish(publish)));
    let len = match choices.below(10) {
        0 => 0,
        1..7 => choices.below(200),
        7 | 8 => choices.below(9_000),
        _ => choices.below(65_536),
    };
    let wrong = !tame && choices.one_in(24);
    let mut header = vec![0, 60, 0, 0];
    if wrong && choices.flag() {
        header[choices.below(4)] ^= 1 << choices.below(8);
    }
    let announced = if wrong && choices.flag() { choices.number() >> choices.below(64) } else { len as u64 };
    header.extend_from_slice(&announced.to_be_bytes());
    header.extend_from_slice(&properties_of(choices, tame));
    if !tame && choices.one_in(40) {
        push_method(out, channel, &settlement(choices));
    }
    push_frame(out, 2, channel, &header);
    let body: Vec<u8> = (0..len).map(|at| at as u8).collect();
    let piece = if choices.flag() { FRAME_MAX as usize - 8 } else { 1 + choices.below(FRAME_MAX as usize - 8) };
    for (at, part) in body.chunks(piece.max(len / 40 + 1).min(FRAME_MAX as usize)).enumerate() {
        if !tame && at < 3 && choices.one_in(30) {
            push_method(out, channel ^ 1, &class(choices, false));
        }
        push_frame(out, 3, channel, part);
    }
}

/// `tame` frames are in themselves right, though not always in their place.
pub(super) fn push_something(out: &mut Vec<u8>, choices: &mut Choices<'_>, tame: bool) {
    let start = out.len();
    let channel = match choices.below(16) {
        0 | 1 if tame => 2,
        0 => 0,
        1 => u16::from_be_bytes([choices.byte(), choices.byte()]),
        2..5 => 2,
        _ => 1,
    };
    match choices.below(16) {
        0..6 => push_method(out, channel, &class(choices, tame)),
        6..11 => push_publish(out, channel, choices, tame),
        11..13 if tame => {}
        11..13 => (0..1 + choices.below(4)).for_each(|_| push_method(out, channel, &settlement(choices))),
        13 if tame => push_frame(out, 8, 0, &[]),
        13 => push_frame(out, 8, channel & 1, &[]),
        _ if tame => push_publish(out, channel, choices, tame),
        14 => {
            // A known method with arguments of its own making.
            let (class, method) = choices.pick(&[
                (10, 11),
                (10, 31),
                (10, 40),
                (20, 10),
                (40, 10),
                (50, 10),
                (50, 20),
                (60, 20),
                (60, 40),
                (60, 80),
                (60, 120),
                (85, 10),
                (90, 10),
                (30, 10),
            ]);
            let mut payload = vec![0, class, 0, method];
            payload.extend_from_slice(choices.bytes(60));
            push_frame(out, 1, channel, &payload);
        }
        _ => {
            let kind = choices.byte() % 10;
            let payload = choices.bytes(40);
            push_frame(out, kind, channel, payload);
        }
    }
    if !tame && choices.one_in(24) && out.len() > start {
        // Damage: some bytes change, or the end is missing.
        for _ in 0..1 + choices.below(3) {
            let at = start + choices.below(65_536) % (out.len() - start);
            out[at] ^= 1 << choices.below(8);
        }
        if choices.flag() {
            out.truncate(start + choices.below(65_536) % (out.len() - start));
        }
    }
}

pub(super) fn push_handshake(out: &mut Vec<u8>, choices: &mut Choices<'_>) {
    let mut client_properties = FieldTable::default();
    if choices.flag() {
        let mut capabilities = FieldTable::default();
        capabilities.insert("consumer_cancel_notify".into(), AMQPValue::Boolean(true));
        capabilities.insert("authentication_failure_close".into(), AMQPValue::Boolean(true));
        client_properties.insert("capabilities".into(), AMQPValue::FieldTable(capabilities));
    }
    let start_ok = connection::StartOk {
        client_properties,
        mechanism: "PLAIN".into(),
        response: "\0guest\0guest".into(),
        locale: "en_US".into(),
    };
    push_method(out, 0, &AMQPClass::Connection(connection::AMQPMethod::StartOk(start_ok)));
    push_method(
        out,
        0,
        &AMQPClass::Connection(connection::AMQPMethod::TuneOk(connection::TuneOk {
            channel_max: 64,
            frame_max: FRAME_MAX,
            heartbeat: 0,
        })),
    );
    push_method(
        out,
        0,
        &AMQPClass::Connection(connection::AMQPMethod::Open(connection::Open { virtual_host: "/".into() })),
    );
    for channel in 1..3 {
        push_method(out, channel, &AMQPClass::Channel(channel::AMQPMethod::Open(channel::Open {})));
    }
}

/// Parts of a handshake, with anything in them.
pub(super) fn push_odd_handshake(out: &mut Vec<u8>, choices: &mut Choices<'_>) {
    let method = match choices.below(4) {
        0 => connection::AMQPMethod::StartOk(connection::StartOk {
            client_properties: table(choices, 3),
            mechanism: choices.pick(&["PLAIN", "AMQPLAIN", "EXTERNAL", ""]).into(),
            response: if choices.flag() { "\0guest\0guest".into() } else { choices.bytes(40).to_vec().into() },
            locale: "en_US".into(),
        }),
        1 => connection::AMQPMethod::TuneOk(connection::TuneOk {
            channel_max: choices.number() as u16,
            frame_max: choices.number() as u32,
            heartbeat: choices.byte().into(),
        }),
        2 => connection::AMQPMethod::Open(connection::Open { virtual_host: choices.pick(&["/", "nope", ""]).into() }),
        _ => return push_something(out, choices, false),
    };
    push_method(out, 0, &AMQPClass::Connection(method));
}
