//! Power cuts under load, again and again: the loops of the crash tests, but on a disk that forgets what was not synced
//! (`power_cut/shim.c` is preloaded into the broker and keeps what a cut would leave, by POSIX's rules or by those of a
//! journalling file system). In half of the cuts some of what was not synced survives as well, in any pieces.
//!
//! `POWER_CUTS` sets how many cuts the first loop has (8), the others have fewer; `CRASH_SEED` repeats the choices of a run (not
//! its timing).

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
#[path = "power_cut/each_sync.rs"]
mod each_sync;
#[path = "crash/facts.rs"]
mod facts;
#[path = "crash/load.rs"]
mod load;
#[path = "power_cut/power.rs"]
mod power;
#[path = "crash_features/retries.rs"]
mod retries;
#[path = "power_cut/rules.rs"]
mod rules;
#[path = "crash_features/transactions.rs"]
mod transactions;
#[path = "crash/world.rs"]
mod world;

use broker::Broker;
use client::{Client, PATIENCE, Rng, publish_frames};
use disk::{Disk, Lasting};
use power::{ForgetfulDisk, cut_without_luck};
use world::{DataDir, crash_loop, look, number, seed};

fn cuts() -> usize {
    number("POWER_CUTS").unwrap_or(8) as usize
}

/// How many cuts each of the loops for single features has.
fn rounds_wanted() -> usize {
    (cuts() / 8).max(1)
}

/// A disk for power cuts; where there can be none, a kill of the process has to do.
fn new_disk() -> Box<dyn Disk> {
    match ForgetfulDisk::new() {
        Ok(disk) => Box::new(disk),
        Err(why) => {
            println!("SKIPPED: no power cuts here, the process is killed only: {why}");
            Box::new(Lasting)
        }
    }
}

#[test]
fn nothing_that_was_promised_is_lost_when_the_power_fails_under_load() {
    crash_loop(cuts(), seed(), 4, new_disk());
}

#[test]
fn a_broker_whose_power_fails_while_it_recovers_recovers_the_next_time() {
    crash_loop((cuts() / 4).max(2), seed() + 1, 1, new_disk());
}

/// The control: on the same disk a broker that is told not to sync does lose what it confirmed, and starts all the same.
#[test]
fn a_broker_that_does_not_sync_loses_what_it_confirmed() {
    if let Err(why) = ForgetfulDisk::new() {
        println!("SKIPPED: {why}");
        return;
    }
    let directory = DataDir::new();
    let (mut disk, mut rng) = (new_disk(), Rng(1));
    let environment = disk.before_start(&directory.path(), &mut rng);
    let arguments = ["--durability", "os"];
    let broker = Broker::start_in(&directory.path(), &arguments, &environment).expect("starts");
    let mut client = Client::connect(broker.address).expect("connects");
    client.declare_queue("lost", true, false).expect("declared");
    client.confirm_select().expect("confirms");
    let properties = facts::properties(1, 10, true);
    publish_frames(client.buffer(), 1, "", "lost", false, &properties, &facts::body(1, 10));
    client.flush().expect("writes");
    assert!(client.receive(PATIENCE).expect("an answer").is_some(), "no confirm");
    assert_eq!(broker.kill(), Vec::<String>::new());
    cut_without_luck(&directory.path()).expect("the shadow becomes the data directory");

    let environment = disk.before_start(&directory.path(), &mut rng);
    let broker = Broker::start_in(&directory.path(), &[], &environment).expect("starts");
    let mut client = Client::connect(broker.address).expect("connects");
    assert_eq!(look(client.declare_queue("lost", true, true)).expect("an answer"), None);
    assert_eq!(broker.kill(), Vec::<String>::new());
}
