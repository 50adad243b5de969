//! Disks that fill and disks that fail: publishers are stopped and told, nothing that failed is confirmed, everything else
//! goes on, and when the disk is back so is the broker, with everything it ever confirmed.
//!
//! The disk that fills is a tmpfs, which only root may mount; elsewhere those tests say so and pass. The disk that fails is
//! a library that is preloaded into the broker, below RocksDB.

mod volume;
mod workers;

use std::{path::Path, time::Duration};

use amq_protocol::protocol::{AMQPClass, queue};

use self::{
    volume::{Fault, Volume},
    workers::{Facts, Publisher, depth, work_off},
};
use crate::support::{
    Login, eventually,
    peer::{durable, transient},
    program::Program,
};

const MIB: u64 = 1 << 20;

/// A broker with small write buffers, so that a small volume has room for them.
fn start(data: &Path, disk_free_limit: &str, fault: Option<&Fault>) -> Program {
    Program::start_with(data, None, |command| {
        command.args(["--store-write-buffer", "2MiB", "--memory-budget", "12MiB"]);
        command.args(["--disk-free-limit", disk_free_limit]);
        if let Some(fault) = fault {
            fault.preload(command);
        }
    })
}

async fn declared(program: &Program) {
    let mut peer = Login::default().open(program.address).await;
    peer.open_channel(1).await;
    peer.declare(1, durable("q")).await;
    peer.close().await;
}

/// Kills the broker, starts it again, and compares what is there with what its clients were told.
async fn assert_nothing_is_missing_after_a_kill(program: Program, data: &Path, facts: &Facts) {
    drop(program);
    let program = start(data, "0", None);
    let ready = depth(&program, "q").await;
    let found = work_off(&program, usize::MAX).await;
    assert_eq!(found.len() as u64, ready, "the counts are right");
    facts.check(&found);
    assert_eq!(depth(&program, "q").await, 0);
    assert_eq!(program.terminate().await.0, Some(0));
}

#[tokio::test]
async fn a_disk_that_fills_stops_publishers_before_a_write_fails() {
    let Some(volume) = Volume::mount(64 * MIB) else { return };
    let ballast = volume.fill(44 * MIB);
    let program = start(&volume.data(), "20MB", None);
    declared(&program).await;
    let mut facts = Facts::default();
    let mut publisher = Publisher::connect(&program).await;
    publisher.publish_until_blocked().await;
    assert_eq!(publisher.blocked_for.as_deref(), Some("low on disk"));
    assert!(publisher.confirmed.len() > 300 && publisher.refused.is_empty(), "no write has failed: {publisher:?}");
    assert!(volume.free_bytes() > 4 * MIB, "{} bytes are free", volume.free_bytes());
    assert!(!program.log().contains("has failed"), "{}", program.log());

    // A newcomer is stopped as well, after what it had sent at once.
    let mut newcomer = Publisher::connect(&program).await;
    newcomer.first = 1_000_000;
    newcomer.publish(1).await;
    newcomer.wait_until_blocked().await;
    // Deliveries and acknowledgements go on.
    facts.acknowledged.extend(work_off(&program, 200).await);
    assert!(publisher.blocked_for.is_some() && newcomer.blocked_for.is_some());
    drop(ballast);
    publisher.wait_until_unblocked().await;
    newcomer.wait_until_unblocked().await;
    publisher.publish(10).await;
    publisher.settle().await;
    newcomer.settle().await;
    assert!(publisher.refused.is_empty() && newcomer.refused.is_empty());
    facts.take_in(&publisher);
    facts.take_in(&newcomer);
    assert_nothing_is_missing_after_a_kill(program, &volume.data(), &facts).await;
}

#[tokio::test]
async fn after_a_write_that_found_no_space_the_broker_goes_on_when_there_is_some() {
    let Some(volume) = Volume::mount(64 * MIB) else { return };
    let program = start(&volume.data(), "0", None); // no alarm: let it run into the wall
    declared(&program).await;
    let mut facts = Facts::default();
    let mut publisher = Publisher::connect(&program).await;
    publisher.publish(200).await;
    publisher.settle().await;
    for leave in [5 * MIB, 0] {
        let ballast = volume.fill(leave);
        publisher.publish_until_blocked().await;
        assert_eq!(publisher.blocked_for.as_deref(), Some("disk failure"), "{}", program.log());
        assert!(program.log().contains("has failed"));

        facts.acknowledged.extend(work_off(&program, 50).await);
        assert_transient_work_goes_on(&program).await;
        drop(ballast);
        publisher.wait_until_unblocked().await;
        publisher.publish(100).await;
        publisher.settle().await;
        let last = publisher.last();
        assert!(publisher.confirmed.contains(&last), "publishing goes on");
        assert!(!publisher.refused.is_empty());
    }
    facts.take_in(&publisher);
    assert_nothing_is_missing_after_a_kill(program, &volume.data(), &facts).await;
}

#[tokio::test]
async fn after_a_failed_sync_the_broker_goes_on_when_syncs_succeed_again() {
    let data = tempfile::tempdir().unwrap();
    let Some(fault) = Fault::build() else { return };
    let program = start(data.path(), "1MB", Some(&fault));
    declared(&program).await;
    let mut facts = Facts::default();
    let mut publisher = Publisher::connect(&program).await;
    publisher.publish(300).await;
    publisher.settle().await;
    assert_eq!(publisher.confirmed.len(), 300);
    for _ in 0..2 {
        let confirmed = publisher.confirmed.len();
        fault.begin();
        publisher.publish_until_blocked().await;
        assert_eq!(publisher.blocked_for.as_deref(), Some("disk failure"));
        assert_eq!(publisher.confirmed.len(), confirmed, "nothing is confirmed without a sync");
        assert!(!publisher.refused.is_empty());

        assert_transient_work_goes_on(&program).await;
        facts.acknowledged.extend(work_off(&program, 100).await);
        assert_durable_work_is_refused(&program).await;
        // The broker notices that nothing has changed, and tries again without an end.
        eventually("an attempt in vain", async || program.log().contains("still failing").then_some(())).await;
        fault.end();
        publisher.wait_until_unblocked().await;
        publisher.publish(50).await;
        publisher.settle().await;
        assert!(publisher.confirmed.len() >= confirmed + 50);
    }
    assert!(program.log().contains("was opened anew and is back at work"), "{}", program.log());
    facts.take_in(&publisher);
    assert_nothing_is_missing_after_a_kill(program, data.path(), &facts).await;
}

#[tokio::test]
async fn a_kill_while_syncs_fail_loses_nothing_that_was_confirmed() {
    let data = tempfile::tempdir().unwrap();
    let Some(fault) = Fault::build() else { return };
    let program = start(data.path(), "1MB", Some(&fault));
    declared(&program).await;
    let mut publisher = Publisher::connect(&program).await;
    publisher.publish(300).await;
    publisher.settle().await;
    fault.begin();
    publisher.publish_until_blocked().await;
    tokio::time::sleep(Duration::from_millis(1200)).await; // an attempt, or none yet
    let mut facts = Facts::default();
    facts.take_in(&publisher);
    fault.end();
    assert_nothing_is_missing_after_a_kill(program, data.path(), &facts).await;
}

#[tokio::test]
async fn a_publisher_without_confirms_is_stopped_and_what_it_had_sent_is_kept() {
    let data = tempfile::tempdir().unwrap();
    let Some(fault) = Fault::build() else { return };
    let program = start(data.path(), "1MB", Some(&fault));
    declared(&program).await;
    let mut publisher = Publisher::connect(&program).await;
    publisher.publish(1).await;
    publisher.settle().await;
    fault.begin();
    publisher.publish_until_blocked().await;
    let mut plain = Login::default().open(program.address).await;
    plain.open_channel(1).await;
    plain.publish_persistent(1, "q", "kept").await;
    let AMQPClass::Connection(amq_protocol::protocol::connection::AMQPMethod::Blocked(blocked)) = plain.method(0).await
    else {
        panic!("not blocked")
    };
    assert_eq!(blocked.reason.as_str(), "disk failure");
    fault.end();
    publisher.wait_until_unblocked().await;
    publisher.publish(1).await;
    publisher.settle().await;
    drop(program);
    let program = start(data.path(), "0", None);
    let mut peer = Login::default().open(program.address).await;
    peer.open_channel(1).await;
    let mut kept = 0;
    while let Some(message) = peer.get(1, "q", true).await {
        kept += usize::from(message.body == b"kept");
    }
    assert_eq!(kept, 1);
}

/// Who needs no disk is served as ever.
async fn assert_transient_work_goes_on(program: &Program) {
    let mut peer = Login::default().open(program.address).await;
    peer.open_channel(1).await;
    peer.declare(1, transient("memory")).await;
    peer.select_confirms(1).await;
    for seq in 1..=10 {
        peer.publish_persistent(1, "memory", "x").await;
        assert_eq!(peer.confirm(1).await, (seq, true));
        assert_eq!(peer.get(1, "memory", true).await.unwrap().text(), "x");
    }
    peer.close().await;
}

/// A durable declaration is not answered as if it were on disk.
async fn assert_durable_work_is_refused(program: &Program) {
    let mut peer = Login::default().open(program.address).await;
    peer.open_channel(1).await;
    peer.send(1, AMQPClass::Queue(queue::AMQPMethod::Declare(durable("another")))).await;
    let answer = peer.method_of_any_channel().await;
    assert!(matches!(answer, AMQPClass::Connection(_) | AMQPClass::Channel(_)), "{answer:?}");
}
