//! What a connection leaves behind that ends in the middle of something: nothing.

use amq_protocol::protocol::{AMQPClass, BasicProperties, basic};

use crate::support::{
    Peer, TestBroker, eventually, frames,
    peer::{auto_delete, durable, exclusive, transient},
};

/// Polls until nothing of `q` is unacked and nobody consumes; answers its ready messages.
async fn settled(broker: &TestBroker) -> u64 {
    eventually("the connection is cleaned up", async || {
        let counts = broker.counts("q");
        (counts.unacked == 0 && counts.consumers == 0).then_some(counts.ready)
    })
    .await
}

async fn with_queue(broker: &TestBroker, messages: u64) -> Peer {
    let mut peer = broker.peer().await;
    peer.declare(1, durable("q")).await;
    for number in 0..messages {
        peer.publish_persistent(1, "q", number.to_string()).await;
    }
    peer.nothing_more(1).await;
    peer
}

async fn bodies(peer: &mut Peer) -> Vec<String> {
    let mut bodies = Vec::new();
    while let Some(message) = peer.get(1, "q", true).await {
        bodies.push(message.text().to_owned());
    }
    bodies
}

#[tokio::test]
async fn a_connection_lost_at_any_byte_of_a_publish_publishes_nothing() {
    let broker = TestBroker::start().await;
    let mut peer = with_queue(&broker, 0).await;
    let publish = frames::content(1, "", "q", false, &BasicProperties::default(), b"half", 2);
    for cut in 1..publish.len() {
        let mut lost = broker.peer().await;
        lost.write(&publish[..cut]).await;
    }
    let registry_empty = async || (peer.depth(1, "q").await == (0, 0)).then_some(());
    eventually("no message", registry_empty).await;
    settled(&broker).await;
    broker.stop().await;
}

#[tokio::test]
async fn a_connection_lost_with_a_large_body_half_sent_publishes_nothing() {
    let broker = TestBroker::start().await;
    let _owner = with_queue(&broker, 0).await;
    let body = vec![7; 5 << 20];
    let publish = frames::content(1, "", "q", false, &BasicProperties::default(), &body, 100_000);
    let mut lost = broker.peer().await;
    lost.write(&publish[..4 << 20]).await;
    drop(lost);
    let mut peer = broker.peer().await;
    peer.publish(1, "q", "whole").await;
    assert_eq!(bodies(&mut peer).await, ["whole"]);
    broker.stop().await;
}

#[tokio::test]
async fn a_connection_lost_with_unacked_deliveries_gives_them_back_in_order() {
    let broker = TestBroker::start().await;
    let mut peer = with_queue(&broker, 100).await;
    let mut lost = broker.peer().await;
    lost.qos(1, 40, false).await;
    lost.consume(1, "q", false).await;
    for _ in 0..40 {
        lost.delivery(1).await;
    }
    lost.ack(1, 7, false).await;
    lost.delivery(1).await;
    drop(lost);
    assert_eq!(settled(&broker).await, 99);
    let expected: Vec<String> = (0..100).filter(|&number| number != 6).map(|number: u32| number.to_string()).collect();
    assert_eq!(bodies(&mut peer).await, expected);
    broker.stop().await;
}

#[tokio::test]
async fn a_connection_lost_with_many_channels_and_consumers_frees_them_all() {
    let broker = TestBroker::start().await;
    let mut peer = with_queue(&broker, 50).await;
    let mut lost = broker.peer().await;
    for number in 2..30 {
        lost.open_channel(number).await;
    }
    for number in 2..30 {
        lost.send(
            number,
            AMQPClass::Basic(basic::AMQPMethod::Consume(basic::Consume {
                queue: "q".into(),
                nowait: true,
                ..Default::default()
            })),
        )
        .await;
    }
    eventually("all are delivered", async || (broker.counts("q").unacked == 50).then_some(())).await;
    drop(lost);
    assert_eq!(settled(&broker).await, 50);
    assert_eq!(peer.depth(1, "q").await, (50, 0));
    broker.stop().await;
}

#[tokio::test]
async fn a_lost_connection_wakes_other_consumers_with_its_messages() {
    let broker = TestBroker::start().await;
    let mut peer = with_queue(&broker, 10).await;
    let mut lost = broker.peer().await;
    lost.consume(1, "q", false).await;
    for _ in 0..10 {
        lost.delivery(1).await;
    }
    peer.consume(1, "q", false).await;
    drop(lost);
    for number in 0..10 {
        let delivery = peer.delivery(1).await;
        assert_eq!((delivery.text(), delivery.redelivered), (number.to_string().as_str(), true));
    }
    broker.stop().await;
}

#[tokio::test]
async fn a_connection_lost_in_a_transaction_rolls_it_back() {
    let broker = TestBroker::start().await;
    let mut peer = with_queue(&broker, 3).await;
    let mut lost = broker.peer().await;
    lost.select_tx(1).await;
    lost.publish_persistent(1, "q", "never").await;
    lost.get(1, "q", false).await.unwrap();
    lost.ack(1, 1, false).await;
    lost.get(1, "q", false).await.unwrap();
    drop(lost);
    assert_eq!(settled(&broker).await, 3);
    assert_eq!(bodies(&mut peer).await, ["0", "1", "2"]);
    broker.stop().await;
}

#[tokio::test]
async fn a_channel_closed_in_a_transaction_rolls_it_back() {
    let broker = TestBroker::start().await;
    let mut peer = with_queue(&broker, 3).await;
    peer.open_channel(2).await;
    peer.select_tx(2).await;
    peer.publish_persistent(2, "q", "never").await;
    peer.get(2, "q", false).await.unwrap();
    peer.get(2, "q", false).await.unwrap();
    peer.ack(2, 0, true).await;
    peer.close_channel(2).await;
    assert_eq!(settled(&broker).await, 3);
    assert_eq!(bodies(&mut peer).await, ["0", "1", "2"]);
    broker.stop().await;
}

#[tokio::test]
async fn an_exclusive_queue_is_gone_before_close_ok() {
    let broker = TestBroker::start().await;
    for _ in 0..20 {
        let mut owner = broker.peer().await;
        owner.declare(1, exclusive("mine")).await;
        owner.publish(1, "mine", "x").await;
        owner.consume(1, "mine", false).await;
        owner.delivery(1).await;
        owner.close().await;
        assert!(!broker.has_queue("mine"));
    }
    broker.stop().await;
}

#[tokio::test]
async fn an_exclusive_queue_goes_with_a_lost_connection() {
    let broker = TestBroker::start().await;
    let mut owner = broker.peer().await;
    owner.declare(1, exclusive("mine")).await;
    drop(owner);
    eventually("the queue is gone", async || (!broker.has_queue("mine")).then_some(())).await;
    broker.stop().await;
}

#[tokio::test]
async fn an_exclusive_queue_outlives_its_channel() {
    let broker = TestBroker::start().await;
    let mut owner = broker.peer().await;
    owner.declare(1, exclusive("mine")).await;
    owner.close_channel(1).await;
    owner.open_channel(1).await;
    assert_eq!(owner.depth(1, "mine").await, (0, 0));
    broker.stop().await;
}

#[tokio::test]
async fn an_auto_delete_queue_goes_with_the_last_connection_that_consumed() {
    let broker = TestBroker::start().await;
    let mut owner = broker.peer().await;
    owner.declare(1, auto_delete("brief")).await;
    owner.publish(1, "brief", "x").await;
    owner.nothing_more(1).await;
    let (mut first, mut second) = (broker.peer().await, broker.peer().await);
    first.consume(1, "brief", false).await;
    second.consume(1, "brief", false).await;
    first.delivery(1).await;
    drop(first);
    assert_eq!(second.delivery(1).await.text(), "x");
    assert!(broker.has_queue("brief"));
    drop(second);
    eventually("the queue is gone", async || (!broker.has_queue("brief")).then_some(())).await;
    broker.stop().await;
}

#[tokio::test]
async fn a_connection_lost_before_login_leaves_no_trace() {
    let broker = TestBroker::start().await;
    for stage in 0..4 {
        let mut bare = broker.bare().await;
        let bytes: &[u8] = [&b""[..], b"AMQ", b"AMQP\x00\x00\x09\x01", b"AMQP\x00\x00\x09\x01\x01\x00\x00"][stage];
        bare.write(bytes).await;
    }
    // A stop that finds a connection left would wait for it.
    let begun = std::time::Instant::now();
    broker.stop().await;
    assert!(begun.elapsed() < std::time::Duration::from_secs(2), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn messages_published_before_a_failing_method_count() {
    let broker = TestBroker::start().await;
    let mut peer = with_queue(&broker, 0).await;
    let mut batch = frames::content(1, "", "q", false, &BasicProperties::default(), b"good", 100);
    batch.extend(frames::content(1, "missing", "q", false, &BasicProperties::default(), b"bad", 100));
    batch.extend(frames::content(1, "", "q", false, &BasicProperties::default(), b"late", 100));
    peer.write(&batch).await;
    peer.expect_channel_error(1, 404, "NOT_FOUND - no exchange 'missing' in vhost '/'").await;
    peer.open_channel(1).await;
    assert_eq!(bodies(&mut peer).await, ["good"], "what follows the error is lost");
    broker.stop().await;
}

#[tokio::test]
async fn a_killed_client_with_full_buffers_is_cleaned_up() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare(1, transient("q")).await;
    let mut lost = broker.peer().await;
    lost.consume(1, "q", false).await;
    for _ in 0..200 {
        peer.publish(1, "q", vec![1; 100_000]).await;
    }
    peer.nothing_more(1).await;
    drop(lost); // with megabytes unread, so the broker gets a reset
    assert_eq!(settled(&broker).await, 200);
    broker.stop().await;
}
