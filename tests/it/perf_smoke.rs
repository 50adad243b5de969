//! Start-up time and memory of the real program, with margins that only a real step back exceeds. The measured figures
//! are printed: `cargo test --release --test it perf_smoke -- --nocapture --test-threads 1`.

use std::time::Duration;

use amq_protocol::protocol::{AMQPClass, basic};

use crate::support::{Login, peer::transient, program::Program};

/// Waits until the resident memory has stopped falling; answers it in KiB.
async fn resident_kib(program: &Program) -> u64 {
    let mut lowest = program.resident_kib();
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        lowest = lowest.min(program.resident_kib());
    }
    lowest
}

#[tokio::test]
async fn an_empty_broker_accepts_connections_at_once() {
    let mut fastest = Duration::MAX;
    for _ in 0..5 {
        let data = tempfile::tempdir().unwrap();
        fastest = fastest.min(Program::start(data.path(), None).started_in);
    }
    println!("start to accepting: {fastest:.1?}");
    assert!(fastest < Duration::from_millis(300), "{fastest:?}");
}

#[tokio::test]
async fn an_idle_broker_is_small() {
    let data = tempfile::tempdir().unwrap();
    let program = Program::start(data.path(), None);
    Login::default().open(program.address).await.close().await;
    let idle = resident_kib(&program).await;
    println!("idle: {:.1} MB", idle as f64 / 1024.0);
    assert!(idle < 40 << 10, "{idle} KiB");
}

#[tokio::test]
async fn a_thousand_idle_connections_cost_little() {
    let data = tempfile::tempdir().unwrap();
    let program = Program::start(data.path(), None);
    let mut first = Login::default().open(program.address).await;
    first.open_channel(1).await;
    first.declare(1, transient("q")).await;
    let before = resident_kib(&program).await;
    let mut peers = Vec::new();
    for _ in 0..1000 {
        let mut peer = Login::default().open(program.address).await;
        peer.open_channel(1).await;
        peer.consume(1, "q", false).await;
        peers.push(peer);
    }
    let after = resident_kib(&program).await;
    println!("1,000 idle connections: {:.1} MB more", after.saturating_sub(before) as f64 / 1024.0);
    assert!(after < before + (20 << 10), "{before} KiB to {after} KiB");
    // They are alive: each gets its share.
    for _ in 0..1000 {
        first.publish(1, "q", "x").await;
    }
    for peer in &mut peers {
        assert_eq!(peer.delivery(1).await.text(), "x");
        peer.send(1, AMQPClass::Basic(basic::AMQPMethod::Ack(basic::Ack { delivery_tag: 1, multiple: false }))).await;
    }
    assert_eq!(program.terminate().await.0, Some(0));
}
