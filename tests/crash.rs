//! `kill -9` under load, again and again. After each kill the broker must come up, and every queue must hold what its
//! clients were promised: nothing confirmed is lost, nothing comes back whose ack was synced, orders and counts are
//! right, transactions are whole, definitions are what was last agreed on.
//!
//! `CRASH_ROUNDS` sets how many kills (8), `CRASH_SEED` repeats the choices of a run (not its timing).

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

#[path = "crash/broker.rs"]
mod broker;
#[path = "crash/client.rs"]
mod client;
#[path = "crash/disk.rs"]
mod disk;
#[path = "crash/facts.rs"]
mod facts;
#[path = "crash/load.rs"]
mod load;
#[path = "crash/world.rs"]
mod world;

use std::{
    path::Path,
    time::{Duration, Instant},
};

use broker::Broker;
use client::{Client, Incoming, PATIENCE, publish_frames};
use disk::Lasting;
use world::{DataDir, crash_loop, look, number, seed};

#[test]
fn nothing_that_was_promised_is_lost_when_the_broker_is_killed_under_load() {
    crash_loop(number("CRASH_ROUNDS").unwrap_or(8) as usize, seed(), 4, Box::new(Lasting));
}

#[test]
fn a_broker_killed_while_it_recovers_recovers_the_next_time() {
    crash_loop((number("CRASH_ROUNDS").unwrap_or(8) as usize / 4).max(2), seed() + 1, 1, Box::new(Lasting));
}

#[test]
fn transient_queues_and_their_messages_end_with_the_broker_and_stale_pages_go() {
    let directory = DataDir::new();
    let broker = Broker::start(&directory.path(), &["--memory-budget", "12MiB"]).expect("starts");
    let mut client = Client::connect(broker.address).expect("connects");
    client.declare_queue("kept", true, false).expect("declared");
    client.declare_queue("gone", false, false).expect("declared");
    client.confirm_select().expect("confirms");
    // Enough transient messages that they are paged out.
    for count in 0..400u64 {
        for queue in ["kept", "gone"] {
            publish_frames(
                client.buffer(),
                1,
                "",
                queue,
                false,
                &facts::properties(count, 50_000, false),
                &facts::body(count, 50_000),
            );
        }
        client.flush().expect("writes");
    }
    publish_frames(client.buffer(), 1, "", "kept", false, &facts::properties(500, 10, true), &facts::body(500, 10));
    client.flush().expect("writes");
    let mut confirmed = 0;
    while confirmed < 801 {
        let Some(Incoming::Method(
            _,
            amq_protocol::protocol::AMQPClass::Basic(amq_protocol::protocol::basic::AMQPMethod::Ack(ack)),
        )) = client.receive(PATIENCE).expect("confirms")
        else {
            panic!("no confirm")
        };
        confirmed = ack.delivery_tag;
    }
    assert_eq!(client.declare_queue("kept", true, true).expect("there"), 401);
    assert!(directory.path().join("pages").exists(), "nothing was paged out");
    assert_eq!(broker.kill(), Vec::<String>::new());

    let broker = Broker::start(&directory.path(), &[]).expect("starts");
    let mut client = Client::connect(broker.address).expect("connects");
    assert_eq!(client.declare_queue("kept", true, true).expect("there"), 1);
    let delivery = client.get("kept").expect("answers").expect("the persistent one");
    assert_eq!((facts::read(&delivery).expect("intact").0, delivery.remaining), (500, Some(0)));
    assert!(client.get("kept").expect("answers").is_none());
    assert_eq!(look(client.declare_queue("gone", false, true)).expect("an answer"), None);
    assert!(eventually(|| disk_bytes(&directory.path().join("pages.removed")) == 0), "stale pages stay");
    assert_eq!(broker.kill(), Vec::<String>::new());
}

fn eventually(mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        if condition() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

fn disk_bytes(directory: &Path) -> u64 {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.metadata().map_or(0, |metadata| metadata.len())).sum()
}
