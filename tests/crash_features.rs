//! `kill -9` under load, again and again, for what moves messages between queues or keeps them back: dead letters, retries,
//! transactions, deduplication, delays. The plain promises are `crash.rs`'s; here it is "exactly one of these places".
//!
//! `CRASH_FEATURE_ROUNDS` sets how many kills each loop has (3), `CRASH_SEED` repeats the choices of a run (not its timing).

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

#[path = "crash_features/arena.rs"]
mod arena;
#[path = "crash/broker.rs"]
mod broker;
#[path = "crash/client.rs"]
mod client;
#[path = "crash_features/dead_letters.rs"]
mod dead_letters;
#[path = "crash_features/delays.rs"]
mod delays;
#[path = "crash/disk.rs"]
mod disk;
#[path = "crash_features/duplicates.rs"]
mod duplicates;
#[path = "crash/facts.rs"]
#[allow(dead_code, reason = "two test programs share it, and each uses a part")]
mod facts;
#[path = "crash_features/retries.rs"]
mod retries;
#[path = "crash_features/transactions.rs"]
mod transactions;

fn new_disk() -> Box<dyn disk::Disk> {
    Box::new(disk::Lasting)
}

fn rounds_wanted() -> usize {
    arena::number("CRASH_FEATURE_ROUNDS").unwrap_or(3) as usize
}
