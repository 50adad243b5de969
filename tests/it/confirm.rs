//! Publisher confirms: what they wait for, what they do not wait for, and what a failed disk makes of them.

use amq_protocol::protocol::{AMQPClass, BasicProperties, basic, confirm};
use lapin::{Confirmation, options::BasicPublishOptions};

use crate::support::{
    LIMIT, Peer, TestBroker, declare_durable, eventually,
    peer::{durable, transient},
    persistent, publish_confirmed, within,
};

async fn confirming(broker: &TestBroker) -> Peer {
    let mut peer = broker.peer().await;
    peer.select_confirms(1).await;
    peer.declare(1, durable("safe")).await;
    peer.declare(1, transient("fast")).await;
    peer
}

#[tokio::test]
async fn a_persistent_message_is_confirmed_only_after_the_sync() {
    let (broker, gate) = TestBroker::gated().await;
    let mut peer = confirming(&broker).await;
    gate.close();
    peer.publish_persistent(1, "safe", "1").await;
    eventually("a sync is held back", async || gate.is_holding().then_some(())).await;
    peer.nothing_more(1).await;
    // Transient, and nowhere to go: neither needs the disk.
    peer.publish(1, "safe", "2").await;
    assert_eq!(peer.confirm(1).await, (2, true));
    peer.publish_persistent(1, "fast", "3").await;
    assert_eq!(peer.confirm(1).await, (3, true));
    peer.publish_mandatory(1, "", "nowhere", &persistent(), "4").await;
    assert_eq!(peer.returned(1).await.0, 312);
    assert_eq!(peer.confirm(1).await, (4, true));
    peer.publish_persistent(1, "safe", "5").await;
    peer.nothing_more(1).await;
    tokio::time::sleep(std::time::Duration::from_millis(100)).await; // long enough for 100 syncs
    peer.nothing_more(1).await;
    gate.open();
    assert_eq!(peer.confirms(1, [1, 5]).await, [true, true]);
    broker.stop().await;
}

#[tokio::test]
async fn a_message_held_by_the_sync_is_delivered_meanwhile() {
    let (broker, gate) = TestBroker::gated().await;
    let mut peer = confirming(&broker).await;
    peer.open_channel(2).await;
    peer.consume(2, "safe", false).await;
    gate.close();
    peer.publish_persistent(1, "safe", "early").await;
    assert_eq!(peer.delivery(2).await.text(), "early");
    peer.nothing_more(1).await;
    gate.open();
    assert_eq!(peer.confirm(1).await, (1, true));
    broker.stop().await;
}

#[tokio::test]
async fn a_message_to_several_queues_is_confirmed_once_when_the_slowest_has_it() {
    let (broker, gate) = TestBroker::gated().await;
    let mut peer = confirming(&broker).await;
    for queue in ["safe", "fast"] {
        peer.bind(1, queue, "amq.fanout", "", Default::default()).await;
    }
    gate.close();
    peer.publish_to(1, "amq.fanout", "", &persistent(), "x").await;
    eventually("a sync is held back", async || gate.is_holding().then_some(())).await;
    peer.nothing_more(1).await;
    gate.open();
    assert_eq!(peer.confirm(1).await, (1, true));
    peer.nothing_more(1).await;
    broker.stop().await;
}

#[tokio::test]
async fn a_failed_sync_is_nacked_and_durable_work_is_refused_from_then_on() {
    let (broker, gate) = TestBroker::gated().await;
    let mut peer = confirming(&broker).await;
    peer.publish_persistent(1, "safe", "1").await;
    assert_eq!(peer.confirm(1).await, (1, true));
    gate.fail();
    peer.publish_persistent(1, "safe", "2").await;
    assert_eq!(peer.confirm(1).await, (2, false));
    // After a failed sync nobody knows what the disk has, so nothing is written before the store was opened anew.
    peer.publish_persistent(1, "safe", "3").await;
    assert_eq!(peer.confirm(1).await, (3, false));
    // What needs no disk goes on, but not on a connection that does.
    let mut peer = confirming(&broker).await;
    peer.publish(1, "safe", "1").await;
    assert_eq!(peer.confirm(1).await, (1, true));
    peer.publish_persistent(1, "fast", "2").await;
    assert_eq!(peer.confirm(1).await, (2, true));
    assert_eq!(peer.get(1, "fast", true).await.unwrap().text(), "2");
    let _ = broker.server().broker().store_failure().expect("the failure has a reason");
    drop(peer);
    let _ = broker; // a stop reports the failed round, as it should
}

#[tokio::test]
async fn a_failed_sync_nacks_the_whole_window_and_nothing_is_answered_twice() {
    let (broker, gate) = TestBroker::gated().await;
    let mut peer = confirming(&broker).await;
    gate.close();
    for number in 0..50 {
        peer.publish_persistent(1, "safe", number.to_string()).await;
    }
    eventually("a sync is held back", async || gate.is_holding().then_some(())).await;
    gate.fail();
    assert_eq!(peer.confirms(1, 1..=50).await, vec![false; 50]);
    peer.nothing_more(1).await;
}

#[tokio::test]
async fn a_window_of_confirms_is_complete_and_in_order() {
    let broker = TestBroker::start().await;
    let mut peer = confirming(&broker).await;
    for number in 0..2000 {
        peer.publish_persistent(1, if number % 3 == 0 { "safe" } else { "fast" }, "x").await;
    }
    assert_eq!(peer.confirms(1, 1..=2000).await, vec![true; 2000]);
    peer.nothing_more(1).await;
    broker.stop().await;
}

#[tokio::test]
async fn confirms_count_from_the_first_publish_after_select() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare(1, transient("q")).await;
    peer.publish(1, "q", "before").await;
    peer.select_confirms(1).await;
    peer.publish(1, "q", "after").await;
    assert_eq!(peer.confirm(1).await, (1, true));
    peer.select_confirms(1).await; // idempotent, and the count goes on
    peer.publish(1, "q", "later").await;
    assert_eq!(peer.confirm(1).await, (2, true));
    broker.stop().await;
}

#[tokio::test]
async fn select_without_an_answer_works() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.send(1, AMQPClass::Confirm(confirm::AMQPMethod::Select(confirm::Select { nowait: true }))).await;
    peer.publish(1, "nowhere", "x").await;
    assert_eq!(peer.confirm(1).await, (1, true));
    broker.stop().await;
}

#[tokio::test]
async fn a_return_precedes_the_confirm_of_its_message() {
    let broker = TestBroker::start().await;
    let mut peer = confirming(&broker).await;
    let properties = BasicProperties::default().with_message_id("m".into());
    peer.publish_mandatory(1, "amq.direct", "nowhere", &properties, "body").await;
    let (code, text, message) = peer.returned(1).await;
    assert_eq!(
        (code, text.as_str(), message.exchange.as_str(), message.key.as_str()),
        (312, "NO_ROUTE", "amq.direct", "nowhere")
    );
    assert_eq!((message.text(), &message.properties), ("body", &properties));
    assert_eq!(peer.confirm(1).await, (1, true));
    broker.stop().await;
}

#[tokio::test]
async fn confirms_of_two_channels_are_counted_apart() {
    let broker = TestBroker::start().await;
    let mut peer = confirming(&broker).await;
    peer.open_channel(2).await;
    peer.select_confirms(2).await;
    peer.publish_persistent(1, "safe", "x").await;
    assert_eq!(peer.confirm(1).await, (1, true));
    peer.publish_persistent(2, "safe", "x").await;
    assert_eq!(peer.confirm(2).await, (1, true));
    peer.publish_persistent(2, "safe", "x").await;
    assert_eq!(peer.confirm(2).await, (2, true));
    broker.stop().await;
}

#[tokio::test]
async fn a_publish_to_a_queue_that_is_deleted_meanwhile_is_acked() {
    let (broker, gate) = TestBroker::gated().await;
    let mut peer = confirming(&broker).await;
    let mut other = broker.peer().await;
    gate.close();
    peer.publish_persistent(1, "safe", "x").await;
    eventually("a sync is held back", async || gate.is_holding().then_some(())).await;
    let delete = amq_protocol::protocol::queue::Delete { queue: "safe".into(), nowait: true, ..Default::default() };
    other.send(1, AMQPClass::Queue(amq_protocol::protocol::queue::AMQPMethod::Delete(delete))).await;
    eventually("the queue is gone", async || (!broker.has_queue("safe")).then_some(())).await;
    gate.open();
    assert_eq!(peer.confirm(1).await, (1, true));
    broker.stop().await;
}

#[tokio::test]
async fn the_stock_client_sees_confirms_and_returns() {
    let broker = TestBroker::start().await;
    let client = broker.publisher().await;
    declare_durable(&client, "q").await;
    for number in 0..100 {
        publish_confirmed(&client, "q", format!("{number}").as_bytes()).await;
    }
    let mandatory = BasicPublishOptions { mandatory: true, immediate: false };
    let sent = client.basic_publish("".into(), "nowhere".into(), mandatory, b"lost", persistent()).await.unwrap();
    let Confirmation::Ack(Some(returned)) = within("confirm", sent).await.unwrap() else { panic!("not returned") };
    assert_eq!((returned.reply_code, returned.delivery.data.as_slice()), (312, b"lost".as_slice()));
    client.close().await;
    broker.stop().await;
}

#[tokio::test]
async fn consumed_before_its_round_a_message_is_confirmed_all_the_same() {
    let broker = TestBroker::start().await;
    let mut peer = confirming(&broker).await;
    peer.open_channel(2).await;
    peer.consume(2, "safe", true).await;
    for _ in 0..200 {
        peer.publish_persistent(1, "safe", "x").await;
    }
    // Deliveries and confirms share the socket, so they are told apart by hand.
    let (mut delivered, mut confirmed) = (0, 0);
    while delivered < 200 || confirmed < 200 {
        let frame = tokio::time::timeout(LIMIT, peer.frame()).await.expect("stalled");
        let ack = (frame.kind == 1 && frame.channel == 1)
            .then(|| amq_protocol::protocol::parse_class(frame.payload.as_slice()).unwrap().1);
        match ack {
            Some(AMQPClass::Basic(basic::AMQPMethod::Ack(ack))) => confirmed = ack.delivery_tag,
            Some(other) => panic!("{other:?}"),
            None if frame.kind == 1 => delivered += 1,
            None => {}
        }
    }
    broker.stop().await;
}
