//! `basic.ack`, `basic.nack`, `basic.reject` and `basic.recover`.

use amq_protocol::protocol::{AMQPClass, basic};

use crate::support::{Peer, TestBroker, peer::transient};

/// A queue `q` with the bodies `0..count`, all delivered to channel 1 and not settled.
async fn delivered(broker: &TestBroker, count: u64) -> Peer {
    let mut peer = broker.peer().await;
    peer.declare(1, transient("q")).await;
    for number in 0..count {
        peer.publish(1, "q", number.to_string()).await;
    }
    peer.consume(1, "q", false).await;
    for number in 0..count {
        let delivery = peer.delivery(1).await;
        assert_eq!(
            (delivery.tag, delivery.redelivered, delivery.text()),
            (number + 1, false, number.to_string().as_str())
        );
    }
    peer
}

#[tokio::test]
async fn an_ack_settles_one_delivery() {
    let broker = TestBroker::start().await;
    let mut peer = delivered(&broker, 3).await;
    peer.ack(1, 2, false).await;
    peer.nothing_more(1).await;
    assert_eq!(broker.counts("q").unacked, 2);
    broker.stop().await;
}

#[tokio::test]
async fn an_ack_with_multiple_settles_everything_up_to_its_tag() {
    let broker = TestBroker::start().await;
    let mut peer = delivered(&broker, 5).await;
    peer.ack(1, 2, false).await;
    peer.ack(1, 4, true).await;
    peer.nothing_more(1).await;
    assert_eq!(broker.counts("q").unacked, 1);
    broker.stop().await;
}

#[tokio::test]
async fn an_ack_with_multiple_and_tag_zero_settles_everything() {
    let broker = TestBroker::start().await;
    let mut peer = delivered(&broker, 5).await;
    peer.ack(1, 0, true).await;
    peer.ack(1, 0, true).await; // nothing outstanding is no error
    peer.nothing_more(1).await;
    assert_eq!(broker.counts("q").unacked, 0);
    broker.stop().await;
}

#[tokio::test]
async fn an_unknown_tag_closes_the_channel() {
    let broker = TestBroker::start().await;
    let mut peer = delivered(&broker, 1).await;
    peer.ack(1, 7, false).await;
    peer.expect_channel_error(1, 406, "PRECONDITION_FAILED - unknown delivery tag 7").await;
    peer.open_channel(1).await;
    peer.nack(1, 9, true, true).await;
    peer.expect_channel_error(1, 406, "PRECONDITION_FAILED - unknown delivery tag 9").await;
    peer.open_channel(1).await;
    peer.reject(1, 0, true).await;
    peer.expect_channel_error(1, 406, "PRECONDITION_FAILED - unknown delivery tag 0").await;
    broker.stop().await;
}

#[tokio::test]
async fn a_tag_settles_once() {
    let broker = TestBroker::start().await;
    let mut peer = delivered(&broker, 3).await;
    peer.ack(1, 1, false).await;
    peer.ack(1, 1, false).await;
    peer.expect_channel_error(1, 406, "PRECONDITION_FAILED - unknown delivery tag 1").await;
    broker.stop().await;
}

#[tokio::test]
async fn a_multiple_ack_needs_its_own_tag_outstanding() {
    let broker = TestBroker::start().await;
    let mut peer = delivered(&broker, 3).await;
    peer.ack(1, 2, false).await;
    peer.ack(1, 2, true).await;
    peer.expect_channel_error(1, 406, "PRECONDITION_FAILED - unknown delivery tag 2").await;
    let counts = broker.counts("q");
    assert_eq!((counts.ready, counts.unacked), (2, 0), "the other two are back");
    broker.stop().await;
}

#[tokio::test]
async fn a_delivery_without_acks_has_no_tag_to_settle() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare(1, transient("q")).await;
    peer.consume(1, "q", true).await;
    peer.publish(1, "q", "x").await;
    let tag = peer.delivery(1).await.tag;
    peer.ack(1, tag, false).await;
    peer.expect_channel_error(1, 406, "PRECONDITION_FAILED - unknown delivery tag 1").await;
    broker.stop().await;
}

#[tokio::test]
async fn a_delivery_can_be_settled_on_its_channel_only() {
    let broker = TestBroker::start().await;
    let mut peer = delivered(&broker, 1).await;
    peer.open_channel(2).await;
    peer.ack(2, 1, false).await;
    peer.expect_channel_error(2, 406, "PRECONDITION_FAILED - unknown delivery tag 1").await;
    peer.ack(1, 1, false).await;
    peer.nothing_more(1).await;
    broker.stop().await;
}

#[tokio::test]
async fn a_rejected_message_is_gone_without_requeue() {
    let broker = TestBroker::start().await;
    let mut peer = delivered(&broker, 2).await;
    peer.reject(1, 1, false).await;
    peer.nack(1, 2, false, false).await;
    peer.nothing_more(1).await;
    let counts = broker.counts("q");
    assert_eq!((counts.ready, counts.unacked), (0, 0));
    broker.stop().await;
}

#[tokio::test]
async fn a_rejected_message_comes_back_redelivered_with_requeue() {
    let broker = TestBroker::start().await;
    let mut peer = delivered(&broker, 1).await;
    peer.reject(1, 1, true).await;
    let again = peer.delivery(1).await;
    assert_eq!((again.tag, again.redelivered, again.text()), (2, true, "0"));
    broker.stop().await;
}

#[tokio::test]
async fn nacked_messages_return_to_their_places_ahead_of_later_ones() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare(1, transient("q")).await;
    for number in 0..6 {
        peer.publish(1, "q", number.to_string()).await;
    }
    for _ in 0..4 {
        peer.get(1, "q", false).await.unwrap();
    }
    peer.nack(1, 3, false, true).await;
    peer.nack(1, 2, true, true).await; // 0 and 1
    let mut order = Vec::new();
    while let Some(message) = peer.get(1, "q", true).await {
        order.push((message.text().to_owned(), message.redelivered));
    }
    let expected = [("0", true), ("1", true), ("2", true), ("4", false), ("5", false)];
    assert_eq!(order, expected.map(|(body, redelivered)| (body.to_owned(), redelivered)));
    broker.stop().await;
}

#[tokio::test]
async fn a_nack_with_multiple_and_tag_zero_requeues_everything() {
    let broker = TestBroker::start().await;
    let mut peer = delivered(&broker, 4).await;
    peer.cancel(1, "q").await;
    peer.nack(1, 0, true, true).await;
    peer.nothing_more(1).await;
    let counts = broker.counts("q");
    assert_eq!((counts.ready, counts.unacked), (4, 0));
    broker.stop().await;
}

#[tokio::test]
async fn recover_requeues_everything_and_voids_the_tags() {
    let broker = TestBroker::start().await;
    let mut peer = delivered(&broker, 3).await;
    peer.cancel(1, "q").await;
    let answer = peer.call(1, AMQPClass::Basic(basic::AMQPMethod::Recover(basic::Recover { requeue: true }))).await;
    assert!(matches!(answer, AMQPClass::Basic(basic::AMQPMethod::RecoverOk(_))), "{answer:?}");
    for number in 0..3 {
        let again = peer.get(1, "q", false).await.unwrap();
        assert_eq!((again.tag, again.redelivered, again.text()), (number + 4, true, number.to_string().as_str()));
    }
    peer.ack(1, 2, false).await;
    peer.expect_channel_error(1, 406, "PRECONDITION_FAILED - unknown delivery tag 2").await;
    broker.stop().await;
}

#[tokio::test]
async fn recover_async_requeues_without_an_answer() {
    let broker = TestBroker::start().await;
    let mut peer = delivered(&broker, 1).await;
    peer.send(1, AMQPClass::Basic(basic::AMQPMethod::RecoverAsync(basic::RecoverAsync { requeue: true }))).await;
    let again = peer.delivery(1).await;
    assert!(again.redelivered && again.tag == 2);
    broker.stop().await;
}

#[tokio::test]
async fn recover_without_requeue_is_not_implemented() {
    let broker = TestBroker::start().await;
    let mut peer = delivered(&broker, 1).await;
    peer.send(1, AMQPClass::Basic(basic::AMQPMethod::Recover(basic::Recover { requeue: false }))).await;
    peer.expect_connection_error(540, "NOT_IMPLEMENTED - requeue=false").await;
    broker.stop().await;
}

#[tokio::test]
async fn a_closed_channel_requeues_its_deliveries_in_order() {
    let broker = TestBroker::start().await;
    let mut peer = delivered(&broker, 5).await;
    peer.ack(1, 3, false).await;
    peer.publish(1, "q", "late").await;
    peer.delivery(1).await;
    peer.close_channel(1).await;
    peer.open_channel(1).await;
    let mut bodies = Vec::new();
    while let Some(message) = peer.get(1, "q", true).await {
        assert!(message.redelivered);
        bodies.push(message.text().to_owned());
    }
    assert_eq!(bodies, ["0", "1", "3", "4", "late"]);
    broker.stop().await;
}

#[tokio::test]
async fn deliveries_of_a_cancelled_consumer_can_still_be_settled() {
    let broker = TestBroker::start().await;
    let mut peer = delivered(&broker, 3).await;
    peer.cancel(1, "q").await;
    assert_eq!(broker.counts("q").unacked, 3);
    peer.ack(1, 1, false).await;
    peer.nack(1, 3, true, true).await;
    let back = peer.get(1, "q", false).await.unwrap();
    assert_eq!((back.text(), back.redelivered, back.remaining), ("1", true, 1));
    broker.stop().await;
}

#[tokio::test]
async fn acks_and_nacks_of_gets_and_consumers_mix() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare(1, transient("a")).await;
    peer.declare(1, transient("b")).await;
    for number in 0..4 {
        peer.publish(1, "a", format!("a{number}")).await;
        peer.publish(1, "b", format!("b{number}")).await;
    }
    peer.consume(1, "a", false).await;
    for _ in 0..4 {
        peer.delivery(1).await;
    }
    assert_eq!(peer.get(1, "b", false).await.unwrap().tag, 5);
    assert_eq!(peer.get(1, "b", true).await.unwrap().tag, 6);
    assert_eq!(peer.get(1, "b", false).await.unwrap().tag, 7);
    peer.ack(1, 5, true).await;
    peer.nothing_more(1).await;
    let (a, b) = (broker.counts("a"), broker.counts("b"));
    assert_eq!((a.ready, a.unacked, b.ready, b.unacked), (0, 0, 1, 1));
    peer.reject(1, 7, true).await;
    peer.nothing_more(1).await;
    assert_eq!((broker.counts("b").ready, broker.counts("b").unacked), (2, 0));
    broker.stop().await;
}

#[tokio::test]
async fn bytes_are_counted_with_messages() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare(1, transient("q")).await;
    for size in [0, 10, 100, 70_000] {
        peer.publish(1, "q", vec![b'x'; size]).await;
    }
    peer.nothing_more(1).await;
    assert_eq!(broker.counts("q").ready_bytes, 70_110);
    for _ in 0..4 {
        peer.get(1, "q", false).await.unwrap();
    }
    let counts = broker.counts("q");
    assert_eq!((counts.ready_bytes, counts.unacked_bytes), (0, 70_110));
    peer.nack(1, 2, true, true).await;
    peer.ack(1, 0, true).await;
    peer.nothing_more(1).await;
    let counts = broker.counts("q");
    assert_eq!((counts.ready, counts.ready_bytes, counts.unacked, counts.unacked_bytes), (2, 10, 0, 0));
    broker.stop().await;
}
