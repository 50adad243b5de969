//! Leveret as its clients see it: through real sockets, one module per area.
//!
//! One test target, so that RocksDB is linked once. Every test has a broker of its own (`support::TestBroker`, or
//! `support::program` for the real binary), and waits for conditions instead of sleeping. The stock client is lapin; what
//! a client library would hide goes through `support::Peer`, which speaks frames.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, and the helpers are part of the tests")]

mod support;

mod channel;
mod compatibility;
mod confirm;
mod connection;
mod consume;
mod control;
mod deduplication;
mod delayed;
mod disk;
mod durability;
mod events;
mod exchange;
mod exchange_types;
mod frames;
mod leaks;
mod limits;
mod load_generator;
mod paging;
mod perf_commands;
mod perf_smoke;
mod policies;
mod queue;
mod queue_durability;
mod recent_history;
mod reply_to;
mod routing;
mod settle;
mod shared_bodies;
mod streams;
mod tx;
