//! The hot functions with fixed input, for what measures them: `hot` by the clock, `instructions` by counting.
//!
//! Messages have 16 bytes where nothing else is said. A [`Case`] that leaves something behind, such as deliveries in an
//! outbox, has it cleared away by [`Work::prepare`], which is not measured; so every run finds the same.

mod broker;
mod outbox;
mod queue;
mod ranges;
mod round;
mod routing;
mod session;
pub mod topology;
mod wire;

pub use self::broker::Fixture;

/// The program's allocator, set up as there.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

#[expect(non_upper_case_globals, reason = "the symbol the allocator looks for")]
#[unsafe(export_name = "malloc_conf")]
pub static malloc_conf: &[u8] =
    b"narenas:2,dirty_decay_ms:300,muzzy_decay_ms:0,oversize_threshold:2097152,background_thread:true,tcache_max:4096\0";

/// Messages of one run where nothing speaks against it.
const MESSAGES: u64 = 1_000;
/// Messages in one read, or one call.
const BATCH: u64 = 100;
/// Of 1 KiB, so many that they neither fill an outbox to its high-water mark nor make a round's buffer grow twice.
const LARGE_MESSAGES: u64 = 200;

/// What is measured.
pub trait Work {
    /// Puts everything into the state in which a run begins.
    fn prepare(&mut self) {}

    /// Handles the messages of one run.
    fn run(&mut self);
}

impl<F: FnMut()> Work for F {
    fn run(&mut self) {
        self();
    }
}

/// A hot function, named `group: what`.
pub struct Case {
    pub name: &'static str,
    /// Messages, acknowledgements or records of one run.
    pub messages: u64,
    pub build: fn(&Fixture) -> Box<dyn Work>,
}

const fn case(name: &'static str, messages: u64, build: fn(&Fixture) -> Box<dyn Work>) -> Case {
    Case { name, messages, build }
}

/// All cases, in the order in which a message meets them.
pub const CASES: &[Case] = &[
    case("decode: publish", MESSAGES, |_| wire::publishes(MESSAGES, 16)),
    case("decode: publish of 1 KiB", LARGE_MESSAGES, |_| wire::publishes(LARGE_MESSAGES, 1024)),
    case("decode: content header with seven properties", MESSAGES, |_| wire::headers()),
    case("decode: ack", MESSAGES, |_| wire::acks()),
    case("route: cached", MESSAGES, |fixture| routing::cached(fixture, 1)),
    case("route: cached, keys in turn", MESSAGES, |fixture| routing::cached(fixture, 100)),
    case("route: direct, 10,000 bindings", MESSAGES, |_| routing::direct()),
    case("route: topic, 10,000 literal bindings", MESSAGES, |_| routing::topic_literal()),
    case("route: topic, 10,000 mixed bindings", MESSAGES, |_| routing::topic_mixed()),
    case("route: topic, 10,000 mixed bindings, no match", MESSAGES, |_| routing::topic_mixed_unmatched()),
    case("route: headers, 100 bindings", BATCH, |_| routing::headers()),
    case("queue: append", MESSAGES, |fixture| queue::append(fixture, MESSAGES, 16)),
    case("queue: append 1 KiB", LARGE_MESSAGES, |fixture| queue::append(fixture, LARGE_MESSAGES, 1024)),
    case("queue: deliver a backlog, auto-ack", MESSAGES, |fixture| queue::backlog(fixture)),
    case("queue: pass on to an idle consumer, auto-ack", MESSAGES, |fixture| queue::pass_through(fixture)),
    case("queue: append, deliver, ack each", MESSAGES, |fixture| queue::acknowledged(fixture, 1, false)),
    case("queue: append, deliver, ack 100", MESSAGES, |fixture| queue::acknowledged(fixture, BATCH, false)),
    case("queue: append, deliver, ack 100 out of order", MESSAGES, |fixture| queue::acknowledged(fixture, BATCH, true)),
    case("outbox: deliver, auto-ack", MESSAGES, |fixture| outbox::deliver(fixture, MESSAGES, 16, true, 1)),
    case("outbox: deliver 1 KiB, auto-ack", LARGE_MESSAGES, |fixture| {
        outbox::deliver(fixture, LARGE_MESSAGES, 1024, true, 1)
    }),
    case("outbox: deliver, to be acked", MESSAGES, |fixture| outbox::deliver(fixture, MESSAGES, 16, false, 1)),
    case("outbox: deliver, keys in turn", MESSAGES, |fixture| outbox::deliver(fixture, MESSAGES, 16, true, 100)),
    case("outbox: ack each", MESSAGES, |fixture| outbox::settle(fixture, outbox::Order::Oldest)),
    case("outbox: ack each, newest first", MESSAGES, |fixture| outbox::settle(fixture, outbox::Order::Newest)),
    case("outbox: ack 100", MESSAGES, |fixture| outbox::settle(fixture, outbox::Order::Multiple)),
    case("ranges: in order", MESSAGES, |_| ranges::insert(ranges::Order::Ascending)),
    case("ranges: in reverse", MESSAGES, |_| ranges::insert(ranges::Order::Descending)),
    case("ranges: at random", MESSAGES, |_| ranges::insert(ranges::Order::Random)),
    case("round: record of 16 B", MESSAGES, |_| round::build(MESSAGES, 16)),
    case("round: record of 1 KiB", LARGE_MESSAGES, |_| round::build(LARGE_MESSAGES, 1024)),
    case("session: publish to a backlog", MESSAGES, |fixture| session::publish(fixture, BATCH, 16, false)),
    case("session: publish to a backlog, transient, confirmed", MESSAGES, |fixture| {
        session::publish(fixture, BATCH, 16, true)
    }),
    case("session: publish and deliver, auto-ack", MESSAGES, |fixture| {
        session::through(fixture, session::Ack::Auto, BATCH, 16)
    }),
    case("session: publish and deliver 1 KiB, auto-ack", LARGE_MESSAGES, |fixture| {
        session::through(fixture, session::Ack::Auto, LARGE_MESSAGES / 2, 1024)
    }),
    case("session: publish and deliver, ack each", MESSAGES, |fixture| {
        session::through(fixture, session::Ack::Each, BATCH, 16)
    }),
    case("session: publish and deliver, ack 100", MESSAGES, |fixture| {
        session::through(fixture, session::Ack::Batch, BATCH, 16)
    }),
    case("session: publish and deliver, a message a read, ack each", BATCH, |fixture| {
        session::through(fixture, session::Ack::Each, 1, 16)
    }),
];
