//! What a confirm waits for, queue by queue: the argument `x-durability` and the policy key `durability`.

use std::sync::Arc;

use amq_protocol::{
    protocol::{AMQPClass, queue},
    types::{AMQPValue, FieldTable},
};
use leveret::{
    broker::policy::{Policy, PolicyKind},
    config::Durability,
};
use serde_json::json;

use crate::support::{
    Peer, TestBroker,
    broker::Gate,
    headed,
    peer::{Declare, durable},
    table, text,
};

/// Whether the rounds that carry a confirmed message to `queue` are synced, all of them.
async fn is_synced(peer: &mut Peer, gate: &Gate, queue: &str) -> bool {
    peer.nothing_more(1).await;
    gate.take_written();
    peer.publish_persistent(1, queue, "x").await;
    assert!(peer.confirm(1).await.1);
    let written = gate.take_written();
    assert!(written.iter().all(|synced| *synced == written[0]), "{written:?}");
    written[0]
}

async fn declare(peer: &mut Peer, name: &str, arguments: FieldTable) {
    peer.declare(1, Declare { arguments, ..durable(name) }).await;
}

async fn confirming(broker: &TestBroker) -> Peer {
    let mut peer = broker.peer().await;
    peer.select_confirms(1).await;
    peer
}

async fn gated(durability: Durability) -> (TestBroker, Arc<Gate>, Peer) {
    let (broker, gate) = TestBroker::gated_with(|config| config.store.durability = durability).await;
    let peer = confirming(&broker).await;
    (broker, gate, peer)
}

#[tokio::test]
async fn a_queue_says_what_its_confirms_wait_for_whatever_the_broker_is_set_to() {
    for (default, synced) in [(Durability::Fsync, true), (Durability::Os, false)] {
        let (mut broker, gate, mut peer) = gated(default).await;
        for (queue_type, name) in [("classic", "c"), ("quorum", "q"), ("stream", "s")] {
            let of = |durability: &str| format!("{name}.{durability}");
            for durability in ["fsync", "os"] {
                let arguments = [("x-queue-type", text(queue_type)), ("x-durability", text(durability))];
                declare(&mut peer, &of(durability), table(arguments)).await;
            }
            declare(&mut peer, &of("default"), table([("x-queue-type", text(queue_type))])).await;
            assert!(is_synced(&mut peer, &gate, &of("fsync")).await, "{queue_type}");
            assert!(!is_synced(&mut peer, &gate, &of("os")).await, "{queue_type}");
            assert_eq!(is_synced(&mut peer, &gate, &of("default")).await, synced, "{queue_type}");
        }
        // Neither loses anything with the broker.
        broker.restart().await;
        let mut peer = confirming(&broker).await;
        assert_eq!(peer.get(1, "c.os", true).await.unwrap().text(), "x");
        assert!(!is_synced(&mut peer, &gate, "c.os").await, "it is what it was after a restart");
        broker.stop().await;
    }
}

#[tokio::test]
async fn a_message_to_queues_of_both_kinds_is_synced() {
    let (broker, gate, mut peer) = gated(Durability::Fsync).await;
    for durability in ["fsync", "os"] {
        declare(&mut peer, durability, table([("x-durability", text(durability))])).await;
        peer.bind(1, durability, "amq.fanout", "", FieldTable::default()).await;
    }
    peer.nothing_more(1).await;
    gate.take_written();
    peer.publish_to(1, "amq.fanout", "", &headed([]), "x").await;
    assert!(peer.confirm(1).await.1);
    assert_eq!(gate.take_written(), [true]);
    broker.stop().await;
}

#[tokio::test]
async fn a_policy_changes_it_while_the_queue_lives() {
    let (broker, gate, mut peer) = gated(Durability::Fsync).await;
    declare(&mut peer, "q", FieldTable::default()).await;
    declare(&mut peer, "delayed", table([("x-delayed", AMQPValue::Boolean(true))])).await;
    assert!(is_synced(&mut peer, &gate, "q").await);
    let policy = json!({"pattern": "", "definition": {"durability": "os"}});
    let policy = Policy::from_json(PolicyKind::User, "p", &policy).unwrap();
    let server = broker.server().broker();
    server.durable(server.set_policy("/", policy).unwrap()).await.unwrap();
    assert!(!is_synced(&mut peer, &gate, "q").await);
    gate.take_written();
    peer.publish_to(1, "", "delayed", &headed([("x-delay", AMQPValue::LongInt(60_000))]), "later").await;
    assert!(peer.confirm(1).await.1);
    assert_eq!(gate.take_written(), [false], "a message that waits is as durable as the queue's others");
    server.durable(server.clear_policy("/", PolicyKind::User, "p").unwrap()).await.unwrap();
    assert!(is_synced(&mut peer, &gate, "q").await);
    broker.stop().await;
}

#[tokio::test]
async fn other_values_are_refused_and_redeclarations_repeat_it() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    let declare = |value: &str| {
        let arguments = table([("x-durability", text(value))]);
        AMQPClass::Queue(queue::AMQPMethod::Declare(Declare { arguments, ..durable("q") }))
    };
    peer.send(1, declare("never")).await;
    let text = "PRECONDITION_FAILED - invalid arg 'x-durability' for queue 'q' in vhost '/': invalid_durability";
    peer.expect_channel_error(1, 406, text).await;
    peer.open_channel(1).await;
    peer.call(1, declare("os")).await;
    peer.call(1, declare("os")).await;
    peer.send(1, declare("fsync")).await;
    let text = "PRECONDITION_FAILED - inequivalent arg 'x-durability' for queue 'q' in vhost '/': received 'fsync' but \
                current is 'os'";
    peer.expect_channel_error(1, 406, text).await;
    broker.stop().await;
}
