//! Transactions: nothing before commit, everything with it, nothing after rollback.

use amq_protocol::protocol::{AMQPClass, basic, tx};
use lapin::options::*;

use crate::support::{Peer, TestBroker, declare_durable, depth, eventually, get, peer::durable, persistent};

async fn transactional(broker: &TestBroker, messages: u32) -> Peer {
    let mut peer = broker.peer().await;
    peer.declare(1, durable("q")).await;
    for number in 0..messages {
        peer.publish_persistent(1, "q", number.to_string()).await;
    }
    peer.select_tx(1).await;
    peer
}

#[tokio::test]
async fn publishes_appear_with_the_commit() {
    let broker = TestBroker::start().await;
    let mut peer = transactional(&broker, 0).await;
    for number in 0..10 {
        peer.publish_persistent(1, "q", number.to_string()).await;
    }
    peer.nothing_more(1).await;
    assert_eq!(broker.counts("q").ready, 0);
    peer.commit(1).await;
    assert_eq!(broker.counts("q").ready, 10);
    for number in 0..10 {
        assert_eq!(peer.get(1, "q", true).await.unwrap().text(), number.to_string());
    }
    broker.stop().await;
}

#[tokio::test]
async fn publishes_disappear_with_the_rollback() {
    let broker = TestBroker::start().await;
    let mut peer = transactional(&broker, 0).await;
    peer.publish_persistent(1, "q", "never").await;
    peer.rollback(1).await;
    peer.commit(1).await;
    assert_eq!(broker.counts("q").ready, 0);
    broker.stop().await;
}

#[tokio::test]
async fn acks_count_with_the_commit() {
    let broker = TestBroker::start().await;
    let mut peer = transactional(&broker, 4).await;
    for _ in 0..4 {
        peer.get(1, "q", false).await.unwrap();
    }
    peer.ack(1, 2, true).await;
    peer.reject(1, 3, false).await;
    peer.nack(1, 4, false, true).await;
    peer.nothing_more(1).await;
    assert_eq!((broker.counts("q").ready, broker.counts("q").unacked), (0, 4));
    peer.commit(1).await;
    assert_eq!((broker.counts("q").ready, broker.counts("q").unacked), (1, 0));
    assert_eq!(peer.get(1, "q", true).await.unwrap().text(), "3");
    broker.stop().await;
}

#[tokio::test]
async fn a_rollback_leaves_deliveries_unacked_and_not_requeued() {
    let broker = TestBroker::start().await;
    let mut peer = transactional(&broker, 3).await;
    for _ in 0..3 {
        peer.get(1, "q", false).await.unwrap();
    }
    peer.ack(1, 1, false).await;
    peer.reject(1, 3, true).await;
    peer.rollback(1).await;
    assert_eq!((broker.counts("q").ready, broker.counts("q").unacked), (0, 3));
    peer.ack(1, 3, true).await;
    peer.commit(1).await;
    assert_eq!((broker.counts("q").ready, broker.counts("q").unacked), (0, 0));
    broker.stop().await;
}

#[tokio::test]
async fn a_tag_acked_in_a_transaction_is_taken() {
    let broker = TestBroker::start().await;
    let mut peer = transactional(&broker, 1).await;
    peer.get(1, "q", false).await.unwrap();
    peer.ack(1, 1, false).await;
    peer.ack(1, 1, false).await;
    peer.expect_channel_error(1, 406, "PRECONDITION_FAILED - unknown delivery tag 1").await;
    eventually("rolled back", async || (broker.counts("q").ready == 1).then_some(())).await;
    broker.stop().await;
}

#[tokio::test]
async fn returns_come_before_commit_ok() {
    let broker = TestBroker::start().await;
    let mut peer = transactional(&broker, 0).await;
    peer.publish_mandatory(1, "", "nowhere", &persistent(), "back").await;
    peer.nothing_more(1).await;
    peer.send(1, AMQPClass::Tx(tx::AMQPMethod::Commit(tx::Commit {}))).await;
    let (code, _, message) = peer.returned(1).await;
    assert_eq!((code, message.text()), (312, "back"));
    assert!(matches!(peer.method(1).await, AMQPClass::Tx(tx::AMQPMethod::CommitOk(_))));
    broker.stop().await;
}

#[tokio::test]
async fn publish_errors_come_at_once_and_end_the_transaction() {
    let broker = TestBroker::start().await;
    let mut peer = transactional(&broker, 0).await;
    peer.publish_persistent(1, "q", "dropped").await;
    peer.publish_to(1, "missing", "", &persistent(), "x").await;
    peer.expect_channel_error(1, 404, "NOT_FOUND - no exchange 'missing' in vhost '/'").await;
    peer.open_channel(1).await;
    assert_eq!(peer.depth(1, "q").await, (0, 0));
    broker.stop().await;
}

#[tokio::test]
async fn commit_answers_after_the_sync() {
    let (broker, gate) = TestBroker::gated().await;
    let mut peer = transactional(&broker, 0).await;
    peer.open_channel(2).await;
    gate.close();
    peer.publish_persistent(1, "q", "x").await;
    peer.send(1, AMQPClass::Tx(tx::AMQPMethod::Commit(tx::Commit {}))).await;
    eventually("the sync is held back", async || gate.is_holding().then_some(())).await;
    assert_eq!(peer.frame_or_end_within(std::time::Duration::from_millis(100)).await, None);
    gate.open();
    assert!(matches!(peer.method(1).await, AMQPClass::Tx(tx::AMQPMethod::CommitOk(_))));
    broker.stop().await;
}

#[tokio::test]
async fn a_commit_is_whole_after_a_restart() {
    let mut broker = TestBroker::start().await;
    let mut peer = transactional(&broker, 2).await;
    peer.declare(1, durable("other")).await;
    peer.get(1, "q", false).await.unwrap();
    peer.ack(1, 1, false).await;
    peer.publish_persistent(1, "q", "in q").await;
    peer.publish_persistent(1, "other", "in other").await;
    peer.commit(1).await;
    peer.publish_persistent(1, "q", "uncommitted").await;
    peer.nothing_more(1).await;
    broker.restart().await;
    assert_eq!((broker.counts("q").ready, broker.counts("other").ready), (2, 1));
    let mut peer = broker.peer().await;
    for body in ["1", "in q"] {
        assert_eq!(peer.get(1, "q", true).await.unwrap().text(), body);
    }
    broker.stop().await;
}

#[tokio::test]
async fn a_failed_sync_fails_the_commit() {
    let (broker, gate) = TestBroker::gated().await;
    let mut peer = transactional(&broker, 0).await;
    gate.fail();
    peer.publish_persistent(1, "q", "x").await;
    peer.send(1, AMQPClass::Tx(tx::AMQPMethod::Commit(tx::Commit {}))).await;
    let answer = peer.method_of_any_channel().await;
    assert!(!matches!(answer, AMQPClass::Tx(tx::AMQPMethod::CommitOk(_))), "{answer:?}");
}

#[tokio::test]
async fn transactions_and_confirms_exclude_each_other() {
    let broker = TestBroker::start().await;
    let mut peer = transactional(&broker, 0).await;
    peer.select_tx(1).await; // twice is fine
    let select = amq_protocol::protocol::confirm::Select { nowait: false };
    peer.send(1, AMQPClass::Confirm(amq_protocol::protocol::confirm::AMQPMethod::Select(select))).await;
    peer.expect_channel_error(1, 406, "PRECONDITION_FAILED - cannot switch from tx to confirm mode").await;
    peer.open_channel(1).await;
    peer.select_confirms(1).await;
    peer.send(1, AMQPClass::Tx(tx::AMQPMethod::Select(tx::Select {}))).await;
    peer.expect_channel_error(1, 406, "PRECONDITION_FAILED - cannot switch from confirm to tx mode").await;
    peer.open_channel(1).await;
    for method in [tx::AMQPMethod::Commit(tx::Commit {}), tx::AMQPMethod::Rollback(tx::Rollback {})] {
        peer.send(1, AMQPClass::Tx(method)).await;
        peer.expect_channel_error(1, 406, "PRECONDITION_FAILED - channel is not transactional").await;
        peer.open_channel(1).await;
    }
    broker.stop().await;
}

#[tokio::test]
async fn credit_comes_back_with_the_commit() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare(1, durable("q")).await;
    for number in 0..6 {
        peer.publish(1, "q", number.to_string()).await;
    }
    peer.select_tx(1).await;
    peer.qos(1, 2, false).await;
    peer.consume_as(1, basic::Consume { queue: "q".into(), ..Default::default() }).await;
    let mut deliveries = vec![peer.delivery(1).await, peer.delivery(1).await];
    for round in 0..3 {
        peer.ack(1, deliveries.last().unwrap().tag, true).await;
        peer.nothing_more(1).await;
        peer.open_channel(2).await;
        peer.close_channel(2).await;
        assert_eq!(broker.counts("q").ready, 4 - 2 * round, "no credit before the commit");
        peer.send(1, AMQPClass::Tx(tx::AMQPMethod::Commit(tx::Commit {}))).await;
        deliveries = peer.deliveries_around_commit_ok(1, if round == 2 { 0 } else { 2 }).await;
    }
    assert_eq!(broker.counts("q").unacked, 0);
    broker.stop().await;
}

#[tokio::test]
async fn the_stock_client_moves_messages_in_a_transaction() {
    let broker = TestBroker::start().await;
    let client = broker.client().await;
    declare_durable(&client, "from").await;
    declare_durable(&client, "to").await;
    client.tx_select().await.unwrap();
    for number in 0..5u8 {
        client.basic_publish("".into(), "from".into(), Default::default(), &[number], persistent()).await.unwrap();
    }
    client.tx_commit().await.unwrap();
    for _ in 0..5 {
        let message = get(&client, "from").await;
        client
            .basic_publish("".into(), "to".into(), Default::default(), &message.delivery.data, persistent())
            .await
            .unwrap();
        message.delivery.ack(BasicAckOptions::default()).await.unwrap();
        client.tx_commit().await.unwrap();
    }
    assert_eq!((depth(&client, "from").await, depth(&client, "to").await), ((0, 0), (5, 0)));
    broker.stop().await;
}
