//! Large messages in many queues: one body on disk and in memory, until the last queue lets go.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use amq_protocol::{
    protocol::{AMQPClass, queue},
    types::{AMQPValue, FieldTable},
};

use crate::support::{
    Peer, TestBroker, eventually, login::Login, peer::durable, persistent, program::Program, table, text,
};

const MIB: u64 = 1 << 20;

/// Bytes that do not compress, and are those of one message only.
fn body(number: u64, bytes: usize) -> Vec<u8> {
    let mut state = (number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..bytes / 8).flat_map(|_| next()).collect()
}

fn name(queue: usize) -> String {
    format!("q{queue}")
}

/// Durable queues that all get what is published to `amq.fanout`.
async fn declare(peer: &mut Peer, queues: usize) {
    for queue in (0..queues).map(name) {
        peer.declare(1, durable(&queue)).await;
        peer.bind(1, &queue, "amq.fanout", "", FieldTable::default()).await;
    }
}

/// Bytes of the files with this extension.
fn file_bytes(directory: &Path, extension: &str) -> u64 {
    let files = std::fs::read_dir(directory).unwrap().flatten();
    let found = files.filter(|file| file.path().extension().is_some_and(|found| found == extension));
    found.filter_map(|file| Some(file.metadata().ok()?.len())).sum()
}

/// Bytes that the process has written, to files and sockets.
fn written(program: &Program) -> u64 {
    let io = std::fs::read_to_string(format!("/proc/{}/io", program.child.id())).unwrap();
    io.lines().find_map(|line| line.strip_prefix("wchar: ")).unwrap().parse().unwrap()
}

async fn connect(program: &Program) -> Peer {
    let mut peer = Login::default().open(program.address).await;
    peer.open_channel(1).await;
    peer
}

async fn purge(peer: &mut Peer, queue: &str) {
    let purge = queue::Purge { queue: queue.into(), nowait: false };
    let answer = peer.call(1, AMQPClass::Queue(queue::AMQPMethod::Purge(purge))).await;
    let expected = queue::PurgeOk { message_count: 4 };
    assert_eq!(answer, AMQPClass::Queue(queue::AMQPMethod::PurgeOk(expected)));
}

async fn delete(peer: &mut Peer, queue: &str) {
    let delete = queue::Delete { queue: queue.into(), ..Default::default() };
    peer.call(1, AMQPClass::Queue(queue::AMQPMethod::Delete(delete))).await;
}

/// Waits until all disk space of bodies is given back.
async fn expect_no_bodies(directory: &Path) {
    let begun = Instant::now();
    while file_bytes(directory, "blob") > 0 {
        assert!(begun.elapsed() < Duration::from_secs(60), "bodies still have their disk space");
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
}

#[tokio::test]
async fn a_large_message_in_a_hundred_queues_is_stored_once_until_the_last_lets_go() {
    let data = tempfile::tempdir().unwrap();
    let program = Program::start(data.path(), None);
    let mut peer = connect(&program).await;
    peer.select_confirms(1).await;
    declare(&mut peer, 100).await;
    peer.publish_to(1, "amq.fanout", "", &persistent(), "small").await;
    peer.confirm(1).await;
    let (idle_kib, before) = (program.resident_kib(), written(&program));

    let large = body(1, MIB as usize);
    peer.publish_to(1, "amq.fanout", "", &persistent(), &large).await;
    assert_eq!(peer.confirm(1).await, (2, true));

    let grown_kib = program.resident_kib().saturating_sub(idle_kib);
    let grown_bytes = written(&program) - before;
    println!("{grown_kib} KiB of memory, {grown_bytes} bytes written");
    assert!(grown_bytes < 3 * MIB && grown_bytes > MIB, "{grown_bytes} bytes written");
    assert!(grown_kib < 10 << 10, "{grown_kib} KiB more");
    drop(program); // killed

    let program = Program::start(data.path(), None);
    let mut peer = connect(&program).await;
    let stored = file_bytes(data.path(), "blob");
    assert!((MIB..3 * MIB).contains(&stored), "{stored} bytes of bodies");
    for queue in 0..50 {
        assert_eq!(peer.get(1, &name(queue), true).await.unwrap().body, b"small");
        assert!(peer.get(1, &name(queue), true).await.unwrap().body == large);
    }
    peer.close().await;
    assert_eq!(program.terminate().await.0, Some(0));

    let program = Program::start(data.path(), None);
    let mut peer = connect(&program).await;
    for queue in 50..100 {
        assert_eq!(peer.get(1, &name(queue), true).await.unwrap().body, b"small");
        assert!(file_bytes(data.path(), "blob") >= MIB);
        assert!(peer.get(1, &name(queue), true).await.unwrap().body == large);
    }
    peer.close().await;
    assert_eq!(program.terminate().await.0, Some(0));

    // What the last one has not given back before its end, the next one does.
    let _program = Program::start(data.path(), None);
    expect_no_bodies(data.path()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_in_many_queues_counts_once_for_memory_and_disk() {
    const QUEUES: usize = 20;
    const MESSAGES: u64 = 64;
    const BYTES: usize = 256 << 10;
    // All of it once, but not twice.
    let mut broker = TestBroker::with(|config| config.memory.message_bytes = 20 << 20).await;
    let mut peer = broker.peer().await;
    peer.select_confirms(1).await;
    declare(&mut peer, QUEUES).await;
    for number in 0..MESSAGES {
        peer.publish_to(1, "amq.fanout", "", &persistent(), body(number, BYTES)).await;
    }
    peer.confirms(1, 1..=MESSAGES).await;
    let used = broker.server().broker().memory().used_bytes() as u64;
    assert!((16 * MIB..20 * MIB).contains(&used), "{used} bytes in memory: something was counted twice, or paged out");
    let stored = broker.data_bytes();
    assert!(stored < 64 * MIB, "{stored} bytes on disk, of {} MiB in queues", QUEUES as u64 * 16);

    // After the restart everything is read back, with less memory than all of it takes once.
    broker.restart_with(|config| config.memory.message_bytes = 4 << 20).await;
    let mut readers = tokio::task::JoinSet::new();
    for queue in 0..QUEUES {
        let mut peer = broker.peer().await;
        readers.spawn(async move {
            peer.qos(1, 4, false).await;
            peer.consume(1, &name(queue), false).await;
            for number in 0..MESSAGES {
                let delivery = peer.delivery(1).await;
                assert!(delivery.body == body(number, BYTES), "queue {queue}: expected {number}");
                peer.ack(1, delivery.tag, false).await;
            }
            peer.nothing_more(1).await;
        });
    }
    readers.join_all().await;
    for queue in 0..QUEUES {
        assert_eq!(broker.counts(&name(queue)).ready, 0);
    }
    broker.stop().await;
}

#[tokio::test]
async fn whatever_takes_a_large_message_out_of_a_queue_lets_go_of_its_body() {
    let data = tempfile::tempdir().unwrap();
    let program = Program::start(data.path(), None);
    let mut peer = connect(&program).await;
    peer.select_confirms(1).await;
    // To die in: dead letters go on to two more queues, where they are one body again.
    peer.declare_exchange(1, "dead", "fanout", FieldTable::default()).await;
    for queue in ["dead1", "dead2"] {
        peer.declare(1, durable(queue)).await;
        peer.bind(1, queue, "dead", "", FieldTable::default()).await;
    }
    let arguments = table([("x-message-ttl", AMQPValue::LongInt(500)), ("x-dead-letter-exchange", text("dead"))]);
    declare(&mut peer, 3).await;
    let mut dying = durable("dying");
    dying.arguments = arguments;
    peer.declare(1, dying).await;
    peer.bind(1, "dying", "amq.fanout", "", FieldTable::default()).await;
    for number in 0..4 {
        peer.publish_to(1, "amq.fanout", "", &persistent(), body(number, MIB as usize)).await;
    }
    peer.confirms(1, 1..=4).await;
    eventually("all have died", async || (peer.depth(1, "dead2").await == (4, 0)).then_some(())).await;
    peer.close().await;
    assert_eq!(program.terminate().await.0, Some(0));

    let program = Program::start(data.path(), None);
    let mut peer = connect(&program).await;
    let stored = file_bytes(data.path(), "blob");
    assert!((8 * MIB..9 * MIB).contains(&stored), "{stored} bytes: four bodies of the living, four of the dead");
    purge(&mut peer, "q0").await;
    delete(&mut peer, "q1").await;
    assert!(peer.get(1, "q2", true).await.unwrap().body == body(0, MIB as usize));
    delete(&mut peer, "q2").await;
    for number in 0..4 {
        assert!(peer.get(1, "dead1", true).await.unwrap().body == body(number, MIB as usize));
    }
    purge(&mut peer, "dead2").await;
    expect_no_bodies(data.path()).await;
}
