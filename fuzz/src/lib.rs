//! What is fuzzed, driven by bytes: `fuzz_targets/` lets libFuzzer choose them, `tests/fuzz.rs` a plain random number
//! generator (it includes this file), so that ten minutes of it need no nightly compiler.
//!
//! Every function here panics when the broker does something it must not.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use amq_protocol::{
    protocol::{AMQPClass, basic, channel, confirm, connection, exchange, parse_class, queue, tx},
    types::{AMQPValue, FieldTable, parsing::parse_field_table},
};
use leveret::{
    auth::{Authenticator, PasswordHash, Permission, User},
    broker::{Broker, ConnectionId},
    model::properties::{Properties, plain_delivery_mode, raw_entries},
    session::{ConnectionContext, Phase, Session, SessionLimits, Step, WriteBuffer, WriteCursor},
    store::{QueueId, QueueStateRecord, Recovered, RoundBuilder, RoundSource, Store, StoreOptions},
    wire::{
        hot::{GetView, HeaderView, PublishView, SettleView, split_names},
        limits::{check_method_table, check_table},
        method,
    },
};

const FRAME_MAX: u32 = 8192;
const MAX_MESSAGE_BYTES: u64 = 70_000;
/// What a connection may hold for a client that does not read, beside one message and its frames.
const MAX_WAITING_BYTES: usize = (1 << 20) + 2 * MAX_MESSAGE_BYTES as usize;

/// Bytes as a source of choices; when they are used up, every choice is the first.
pub struct Choices<'a>(&'a [u8]);

impl<'a> Choices<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Choices(bytes)
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn byte(&mut self) -> u8 {
        let Some((&byte, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        byte
    }

    fn number(&mut self) -> u64 {
        (0..8).fold(0, |number, _| number << 8 | u64::from(self.byte()))
    }

    /// Below `end`, which is at most 65,536.
    fn below(&mut self, end: usize) -> usize {
        let wide = usize::from(self.byte()) | if end > 256 { usize::from(self.byte()) << 8 } else { 0 };
        wide % end.max(1)
    }

    fn flag(&mut self) -> bool {
        self.byte() & 1 != 0
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == n - 1
    }

    fn bytes(&mut self, max: usize) -> &'a [u8] {
        let len = self.below(max + 1).min(self.0.len());
        let (bytes, rest) = self.0.split_at(len);
        self.0 = rest;
        bytes
    }

    fn pick<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }
}

// The broker under test

/// A broker without sockets over a store in a temporary directory. One for all inputs.
pub struct Lab {
    pub broker: Arc<Broker>,
    store: Arc<Store>,
    context: ConnectionContext,
    next_id: AtomicU64,
    directory: PathBuf,
    /// How often the broker sent each method, by class and method number: what the inputs have reached.
    pub said: Mutex<BTreeMap<(u16, u16), u64>>,
}

impl Lab {
    pub fn new() -> Lab {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!("leveret-fuzz-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let directory = std::env::temp_dir().join(name);
        let _ = std::fs::remove_dir_all(&directory);
        let options = StoreOptions { path: directory.clone(), sync: false, ..StoreOptions::default() };
        let (store, recovered) = Store::open(options).expect("a fresh store opens");
        // A small budget, so that inputs with large messages page out.
        let broker = Broker::new(
            store.clone(),
            recovered,
            leveret::broker::BrokerLimits { memory_budget_bytes: 2 << 20, disk_free_limit_bytes: 0 },
        );
        futures_lite::future::block_on(store.durable(broker.ensure_vhost("/"))).expect("a vhost is made");
        let guest = User::new("guest", PasswordHash::new("guest")).with_permission("/", Permission::full());
        let limits = SessionLimits {
            cluster_name: "fuzz".into(),
            channel_max: 64,
            frame_max: FRAME_MAX,
            initial_frame_max: FRAME_MAX,
            heartbeat_secs: 60,
            max_message_bytes: MAX_MESSAGE_BYTES,
            permit_global_qos: true,
        };
        let auth = Arc::new(Authenticator::new([guest], []));
        let context = ConnectionContext { broker: broker.clone(), auth, limits: Arc::new(limits) };
        Lab { broker, store, context, next_id: AtomicU64::new(1), directory, said: Mutex::default() }
    }

    fn session(&self) -> Session {
        self.context.session(self.next_id.fetch_add(1, Ordering::Relaxed), IpAddr::V4(Ipv4Addr::LOCALHOST))
    }

    /// Deletes everything clients have made.
    pub fn tidy(&self) {
        let vhost = self.broker.vhost("/").expect("there from the start");
        let mut effects = leveret::broker::Effects::default();
        for queue in vhost.queues() {
            vhost.delete_queue(&queue, &mut effects, |_| Ok(())).expect("nobody objects");
        }
        for name in NAMES {
            let _ = vhost.delete_exchange(name, false, ConnectionId(0)); // the predeclared ones stay
        }
        self.broker.carry_out(&mut effects);
    }

    pub fn queue_count(&self) -> usize {
        self.broker.vhost("/").expect("there from the start").queues().len()
    }
}

impl Default for Lab {
    fn default() -> Self {
        Lab::new()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.store.shutdown();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

// Frames

const NAMES: [&str; 18] = [
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

const TAME_QUEUES: [&str; 3] = ["q1", "q2", "q3"];
const TAME_EXCHANGES: [(&str, &str); 4] =
    [("x.direct", "direct"), ("x.topic", "topic"), ("x.fanout", "fanout"), ("x.headers", "headers")];

fn push_frame(out: &mut Vec<u8>, kind: u8, channel: u16, payload: &[u8]) {
    out.push(kind);
    out.extend_from_slice(&channel.to_be_bytes());
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    out.extend_from_slice(payload);
    out.push(0xCE);
}

fn push_method(out: &mut Vec<u8>, channel: u16, class: &AMQPClass) {
    push_frame(out, 1, channel, &method::payload(class));
}

fn value(choices: &mut Choices<'_>, depth: usize) -> AMQPValue {
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

fn table(choices: &mut Choices<'_>, depth: usize) -> FieldTable {
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
fn class(choices: &mut Choices<'_>, tame: bool) -> AMQPClass {
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
fn push_known_settlement(out: &mut Vec<u8>, choices: &mut Choices<'_>, tags: &mut Vec<(u16, u64)>) {
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

fn properties_of(choices: &mut Choices<'_>, tame: bool) -> Vec<u8> {
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
fn push_publish(out: &mut Vec<u8>, channel: u16, choices: &mut Choices<'_>, tame: bool) {
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
fn push_something(out: &mut Vec<u8>, choices: &mut Choices<'_>, tame: bool) {
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

fn push_handshake(out: &mut Vec<u8>, choices: &mut Choices<'_>) {
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
fn push_odd_handshake(out: &mut Vec<u8>, choices: &mut Choices<'_>) {
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

/// One connection, from its side of the socket.
struct Wire<'a> {
    session: Session,
    carry: Vec<u8>,
    unread: Vec<u8>,
    lab: &'a Lab,
    /// What is inside the frames has to be right, too.
    strict: bool,
    /// Channels the broker has closed.
    closed: Vec<u16>,
    /// Deliveries that were read.
    tags: Vec<(u16, u64)>,
}

impl<'a> Wire<'a> {
    fn new(lab: &'a Lab) -> Wire<'a> {
        Wire {
            session: lab.session(),
            carry: Vec::new(),
            unread: Vec::new(),
            lab,
            strict: true,
            closed: Vec::new(),
            tags: Vec::new(),
        }
    }

    /// Hands bytes over as `net` does; false when the connection has ended.
    fn receive(&mut self, bytes: &[u8]) -> bool {
        self.carry.extend_from_slice(bytes);
        let mut turns = 0;
        loop {
            turns += 1;
            assert!(turns < 10_000 + bytes.len(), "a batch does not end");
            let (used, step) = self.session.feed(&self.carry);
            assert!(used <= self.carry.len());
            self.carry.drain(..used);
            let waiting = self.session.outbox().waiting_bytes();
            assert!(waiting <= MAX_WAITING_BYTES, "{waiting} bytes wait for a client that does not read");
            match step {
                Step::More => return true,
                Step::Await(round) => futures_lite::future::block_on(self.session.wait(round)),
                Step::Drain => self.read(),
                Step::Flush => {
                    self.read();
                    return false;
                }
                Step::Drop { .. } => return false,
            }
        }
    }

    /// Reads everything the broker has written; it must be frames that another implementation understands.
    fn read(&mut self) {
        let outbox = self.session.outbox().clone();
        let mut batch = WriteBuffer::default();
        for _ in 0..10_000 {
            if !outbox.take(&mut batch) {
                return;
            }
            let mut cursor = WriteCursor::default();
            while let Some(written) = cursor.slices(&batch, |slices| {
                slices.iter().for_each(|slice| self.unread.extend_from_slice(slice));
                slices.iter().map(|slice| slice.len()).sum()
            }) {
                cursor.advance(&batch, written);
            }
            outbox.recycle(&mut batch);
            outbox.refill();
            let strict = self.strict;
            let mut said = self.lab.said.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            each_frame(&self.unread, &mut |kind, channel, payload| match kind {
                1 if strict => {
                    let (rest, class) = parse_class(payload).expect("the broker writes methods that others can read");
                    assert!(rest.is_empty());
                    *said.entry((class.get_amqp_class_id(), class.get_amqp_method_id())).or_default() += 1;
                    match class {
                        AMQPClass::Channel(channel::AMQPMethod::Close(_)) => {
                            self.closed.push(channel);
                            self.tags.retain(|(of, _)| *of != channel);
                        }
                        AMQPClass::Basic(basic::AMQPMethod::Deliver(deliver)) => {
                            self.tags.push((channel, deliver.delivery_tag))
                        }
                        AMQPClass::Basic(basic::AMQPMethod::GetOk(got)) => self.tags.push((channel, got.delivery_tag)),
                        _ => {}
                    }
                }
                2 if strict => {
                    let _ = Properties::parse(&payload[12..]).expect("the broker writes properties that can be read");
                }
                _ => {}
            });
            drop(said);
            self.unread.clear();
            self.unread.shrink_to(64 << 10);
        }
        panic!("the broker does not stop talking");
    }
}

impl Drop for Wire<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.session.release();
            self.session.outbox().close();
            self.lab.broker.sweep();
        }
    }
}

/// Connections that send frames: valid ones, wrong ones, in any order and in any pieces.
pub fn frames(lab: &Lab, data: &[u8]) {
    let mut choices = Choices::new(data);
    let mut wires: Vec<Wire<'_>> = (0..1 + choices.below(3)).map(|_| Wire::new(lab)).collect();
    let mut out = Vec::new();
    for wire in &mut wires {
        out.clear();
        match choices.one_in(12) {
            true => (0..choices.below(6)).for_each(|_| push_odd_handshake(&mut out, &mut choices)),
            false => push_handshake(&mut out, &mut choices),
        }
        if !wire.receive(&out) {
            return;
        }
    }
    let (tame, mut steps) = (choices.flag(), 0);
    if tame {
        lab.tidy();
        out.clear();
        match choices.below(4) {
            0 => push_method(&mut out, 1, &AMQPClass::Tx(tx::AMQPMethod::Select(tx::Select {}))),
            1 => push_method(
                &mut out,
                1,
                &AMQPClass::Confirm(confirm::AMQPMethod::Select(confirm::Select { nowait: true })),
            ),
            _ => {}
        }
        for queue in TAME_QUEUES {
            let declare = queue::Declare { queue: queue.into(), durable: queue != "q3", ..queue::Declare::default() };
            push_method(&mut out, 1, &AMQPClass::Queue(queue::AMQPMethod::Declare(declare)));
        }
        for (exchange, kind) in TAME_EXCHANGES {
            let declare = exchange::Declare {
                exchange: exchange.into(),
                kind: kind.into(),
                durable: true,
                ..exchange::Declare::default()
            };
            push_method(&mut out, 1, &AMQPClass::Exchange(exchange::AMQPMethod::Declare(declare)));
            let bind = queue::Bind {
                queue: "q1".into(),
                exchange: exchange.into(),
                routing_key: "a.b.c".into(),
                ..queue::Bind::default()
            };
            push_method(&mut out, 1, &AMQPClass::Queue(queue::AMQPMethod::Bind(bind)));
        }
        if !wires[0].receive(&out) {
            return;
        }
    }
    while !choices.is_empty() && !wires.is_empty() && steps < 200 {
        steps += 1;
        let at = choices.below(wires.len());
        out.clear();
        for channel in std::mem::take(&mut wires[at].closed) {
            if tame || choices.flag() {
                push_method(&mut out, channel, &AMQPClass::Channel(channel::AMQPMethod::CloseOk(channel::CloseOk {})));
                push_method(&mut out, channel, &AMQPClass::Channel(channel::AMQPMethod::Open(channel::Open {})));
            }
        }
        for _ in 0..1 + choices.below(6) {
            push_something(&mut out, &mut choices, tame);
            if tame && choices.flag() && !wires[at].tags.is_empty() {
                push_known_settlement(&mut out, &mut choices, &mut wires[at].tags);
            }
        }
        let mut alive = true;
        let mut rest = out.as_slice();
        while alive && !rest.is_empty() {
            let cut = if choices.flag() { rest.len() } else { 1 + choices.below(65_536) % rest.len() };
            let (now, later) = rest.split_at(cut);
            alive = wires[at].receive(now);
            rest = later;
        }
        // Not everyone reads at once.
        if choices.flag() {
            wires[at].read();
        }
        if alive && choices.one_in(30) {
            let reason = leveret::session::CloseReason::new(320, "enough");
            wires[at].session.close(&reason);
        }
        if !alive || wires[at].session.phase() == Phase::Closed {
            wires.swap_remove(at);
        }
    }
    wires.iter_mut().for_each(Wire::read);
    drop(wires);
    if choices.one_in(4) || lab.queue_count() > 20 {
        lab.tidy();
    }
}

/// Walks over frames, whose envelopes must be right.
fn each_frame(mut bytes: &[u8], each: &mut dyn FnMut(u8, u16, &[u8])) {
    while !bytes.is_empty() {
        let head = bytes.first_chunk::<7>().expect("the broker writes whole frames");
        let size = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
        assert!(matches!(head[0], 1 | 2 | 3 | 8), "a frame of type {}", head[0]);
        assert!(size + 8 <= FRAME_MAX as usize, "a frame larger than agreed");
        assert_eq!(bytes.get(7 + size), Some(&0xCE), "a frame without its end");
        each(head[0], u16::from_be_bytes([head[1], head[2]]), &bytes[7..7 + size]);
        bytes = &bytes[8 + size..];
    }
}

// Tables and methods

/// A raw table whose lengths, tags and nesting need not be right.
fn push_raw_table(out: &mut Vec<u8>, choices: &mut Choices<'_>, depth: usize, keyed: bool) {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    let entries = if depth == 0 { choices.below(3) } else { 1 + choices.below(2) };
    for _ in 0..entries {
        if keyed {
            let key = choices.bytes(6);
            out.push(key.len() as u8);
            out.extend_from_slice(key);
        }
        match choices.below(8) {
            0..3 if depth > 0 => {
                out.push(b'F');
                push_raw_table(out, choices, depth - 1, true);
            }
            3 if depth > 0 => {
                out.push(b'A');
                push_raw_table(out, choices, depth - 1, false);
            }
            4 => {
                out.push(choices.byte());
                out.extend_from_slice(choices.bytes(12));
            }
            _ => {
                let text = choices.bytes(8);
                out.push(b'S');
                out.extend_from_slice(&(text.len() as u32).to_be_bytes());
                out.extend_from_slice(text);
            }
        }
    }
    let mut len = (out.len() - start - 4) as u32;
    if choices.one_in(40) {
        len = len.wrapping_add(choices.number() as u32 >> choices.below(32));
    }
    out[start..start + 4].copy_from_slice(&len.to_be_bytes());
}

fn judge_table(bytes: &[u8]) {
    if let Ok(rest) = check_table(bytes) {
        // What passes the bounds is safe to hand on, whatever comes of it.
        if let Ok((left, _)) = parse_field_table(bytes) {
            assert_eq!(left.len(), rest.len(), "two readers disagree on the length of a table");
        }
    }
    let _ = raw_entries(bytes).count();
}

fn judge_method(payload: &[u8]) {
    let _ = check_method_table(payload);
    if let Ok(class) = method::parse(payload) {
        let written = method::payload(&class);
        assert_eq!(
            method::parse(&written).as_ref().map(method::payload),
            Ok(written),
            "a method changes when it is written"
        );
    }
    let _ = (SettleView::read(payload), GetView::read(payload), HeaderView::read(payload));
    if let Ok(publish) = PublishView::read(payload) {
        let (exchange, key) = split_names(publish.names);
        assert_eq!(publish.names.len(), exchange.len() + key.len() + 2);
    }
}

/// Field tables and method payloads: as they come, and built to be nearly right.
pub fn tables(data: &[u8]) {
    judge_table(data);
    judge_method(data);
    let mut choices = Choices::new(data);
    let mut bytes = Vec::new();
    let depth = choices.below(48);
    push_raw_table(&mut bytes, &mut choices, depth, true);
    judge_table(&bytes);
    for prefix in [
        &[0, 10, 0, 11][..],
        &[0, 50, 0, 10, 0, 0, 1, b'q', 0],
        &[0, 60, 0, 20, 0, 0, 0, 0, 0],
        &[0, 40, 0, 10, 0, 0, 1, b'x', 1, b'y', 0],
    ] {
        judge_method(&[prefix, &bytes].concat());
        judge_method(&[prefix, &bytes, &[0, 0, 0]].concat());
    }
    let mut payload = method::payload(&class(&mut choices, false));
    judge_method(&payload);
    if !payload.is_empty() {
        let at = choices.below(payload.len());
        payload[at] ^= 1 << choices.below(8);
        judge_method(&payload);
        payload.truncate(choices.below(payload.len() + 1));
        judge_method(&payload);
    }
}

// Properties

fn judge_properties(raw: &[u8]) {
    use amq_protocol::protocol::basic::parse_properties;
    let plain = plain_delivery_mode(raw);
    let _ = Properties::needs_attention(raw);
    let Ok(view) = Properties::parse(raw) else {
        assert!(plain.is_none());
        return;
    };
    assert!(plain.is_none_or(|persistent| persistent == view.is_persistent()));
    for changed in [
        view.with_reply_to(&[b'r'; 300]),
        view.with_expiration(b"1"),
        view.without_header(b"CC"),
        view.without_header(b""),
    ] {
        let changed = Properties::parse(&changed).expect("changed properties stay readable");
        assert_eq!(
            (changed.is_persistent(), changed.priority(), changed.user_id()),
            (view.is_persistent(), view.priority(), view.user_id())
        );
    }
    if view.raw_headers().is_none_or(|table| check_table(table).is_ok_and(<[u8]>::is_empty)) {
        let _ = view.headers();
        if let Ok((rest, read)) = parse_properties(raw) {
            assert!(rest.is_empty(), "two readers disagree on the length of properties");
            assert_eq!(read.delivery_mode().map(|mode| mode == 2).unwrap_or(false), view.is_persistent());
            assert_eq!(*read.priority(), view.priority());
            assert_eq!(read.expiration().as_ref().map(|text| text.as_str().as_bytes()), view.expiration());
            assert_eq!(read.user_id().as_ref().map(|text| text.as_str().as_bytes()), view.user_id());
        }
    }
}

/// Content properties, as they come and built to be nearly right.
pub fn properties(data: &[u8]) {
    judge_properties(data);
    let mut choices = Choices::new(data);
    let mut raw = properties_of(&mut choices, false);
    judge_properties(&raw);
    if !raw.is_empty() {
        let at = choices.below(raw.len());
        raw[at] ^= 1 << choices.below(8);
        judge_properties(&raw);
        raw.truncate(choices.below(raw.len() + 1));
        judge_properties(&raw);
    }
}

// Stored records

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
    let mut wire = Wire {
        session: context.session(1, IpAddr::V4(Ipv4Addr::LOCALHOST)),
        carry: Vec::new(),
        unread: Vec::new(),
        lab,
        strict: false,
        closed: Vec::new(),
        tags: Vec::new(),
    };
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

// Data directories

const FILLED: [&str; 3] = ["fill.1", "fill.2", "fill.3"];

fn client_of(broker: &Arc<Broker>) -> (ConnectionContext, IpAddr) {
    let guest = User::new("guest", PasswordHash::new("guest")).with_permission("/", Permission::full());
    let limits = SessionLimits {
        cluster_name: "fuzz".into(),
        channel_max: 64,
        frame_max: FRAME_MAX,
        initial_frame_max: FRAME_MAX,
        heartbeat_secs: 60,
        max_message_bytes: MAX_MESSAGE_BYTES,
        permit_global_qos: true,
    };
    let auth = Arc::new(Authenticator::new([guest], []));
    (ConnectionContext { broker: broker.clone(), auth, limits: Arc::new(limits) }, IpAddr::V4(Ipv4Addr::LOCALHOST))
}

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
            Step::Await(round) => futures_lite::future::block_on(session.wait(round)),
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
    let (context, peer) = client_of(broker);
    let mut session = context.session(1, peer);
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
    let (context, peer) = client_of(broker);
    let mut session = context.session(1, peer);
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
