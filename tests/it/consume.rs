//! Consumers: who gets what, in which order, and what stops and starts them.

use std::collections::HashMap;

use amq_protocol::{
    protocol::{AMQPClass, basic, queue},
    types::AMQPValue,
};
use futures_lite::StreamExt;
use lapin::{options::*, types::FieldTable};

use crate::support::{
    Login, Peer, TestBroker, declare_durable, eventually,
    peer::{auto_delete, transient},
    publish_confirmed, table, text, within,
};

async fn with_messages(broker: &TestBroker, count: u64) -> Peer {
    let mut peer = broker.peer().await;
    peer.declare(1, transient("q")).await;
    for number in 0..count {
        peer.publish(1, "q", number.to_string()).await;
    }
    peer.nothing_more(1).await;
    peer
}

fn consume(tag: &str) -> basic::Consume {
    basic::Consume { queue: "q".into(), consumer_tag: tag.into(), ..Default::default() }
}

async fn delete(peer: &mut Peer, queue: &str) {
    let delete = queue::Delete { queue: queue.into(), ..Default::default() };
    let answer = peer.call(1, AMQPClass::Queue(queue::AMQPMethod::Delete(delete))).await;
    assert!(matches!(answer, AMQPClass::Queue(queue::AMQPMethod::DeleteOk(_))), "{answer:?}");
}

#[tokio::test]
async fn the_stock_client_consumes_and_acks() {
    let broker = TestBroker::start().await;
    let client = broker.publisher().await;
    declare_durable(&client, "q").await;
    for number in 0..50u8 {
        publish_confirmed(&client, "q", &[number]).await;
    }
    client.basic_qos(10, Default::default()).await.unwrap();
    let mut consumer =
        client.basic_consume("q".into(), "c".into(), Default::default(), FieldTable::default()).await.unwrap();
    for number in 0..50u8 {
        let delivery = within("delivery", consumer.next()).await.unwrap().unwrap();
        assert_eq!(delivery.data, [number]);
        delivery.ack(BasicAckOptions::default()).await.unwrap();
    }
    eventually("all acked", async || (broker.counts("q").unacked == 0).then_some(())).await;
    client.close().await;
    broker.stop().await;
}

#[tokio::test]
async fn prefetch_limits_each_consumer_that_starts_later() {
    let broker = TestBroker::start().await;
    let mut peer = with_messages(&broker, 20).await;
    peer.qos(1, 3, false).await;
    peer.consume_as(1, consume("a")).await;
    for _ in 0..3 {
        peer.delivery(1).await;
    }
    peer.nothing_more(1).await;
    peer.qos(1, 5, false).await; // the running consumer keeps its 3
    peer.nothing_more(1).await;
    peer.consume_as(1, consume("b")).await;
    for _ in 0..5 {
        assert_eq!(peer.delivery(1).await.consumer, "b");
    }
    peer.nothing_more(1).await;
    peer.ack(1, 1, false).await;
    assert_eq!(peer.delivery(1).await.consumer, "a");
    peer.nothing_more(1).await;
    assert_eq!(broker.counts("q").unacked, 8);
    broker.stop().await;
}

#[tokio::test]
async fn a_global_prefetch_limits_all_consumers_of_the_channel_together() {
    let broker = TestBroker::start().await;
    let mut peer = with_messages(&broker, 20).await;
    peer.qos(1, 4, true).await;
    peer.consume_as(1, consume("a")).await;
    for _ in 0..4 {
        peer.delivery(1).await;
    }
    peer.consume_as(1, consume("b")).await;
    peer.nothing_more(1).await;
    peer.ack(1, 2, true).await;
    for _ in 0..2 {
        peer.delivery(1).await;
    }
    peer.nothing_more(1).await;
    // A higher limit takes effect at once, and a limit per consumer lifts it.
    peer.send(1, AMQPClass::Basic(basic::AMQPMethod::Qos(basic::Qos { prefetch_count: 6, global: true }))).await;
    peer.nothing_more_but_deliveries(1).await;
    assert_eq!(broker.counts("q").unacked, 6);
    peer.send(1, AMQPClass::Basic(basic::AMQPMethod::Qos(basic::Qos { prefetch_count: 0, global: false }))).await;
    eventually("no limit", async || (broker.counts("q").unacked == 18).then_some(())).await;
    broker.stop().await;
}

#[tokio::test]
async fn prefetch_does_not_limit_consumers_without_acks_or_gets() {
    let broker = TestBroker::start().await;
    let mut peer = with_messages(&broker, 20).await;
    peer.qos(1, 1, true).await;
    for _ in 0..5 {
        peer.get(1, "q", false).await.unwrap();
    }
    peer.consume(1, "q", true).await;
    for _ in 0..15 {
        peer.delivery(1).await;
    }
    broker.stop().await;
}

#[tokio::test]
async fn competing_consumers_take_turns() {
    let broker = TestBroker::start().await;
    let mut peer = with_messages(&broker, 0).await;
    for number in 2..=5 {
        peer.open_channel(number).await;
        peer.consume_as(number, consume("c")).await;
    }
    for number in 0..40 {
        peer.publish(1, "q", number.to_string()).await;
    }
    let mut by_channel: HashMap<u16, u32> = HashMap::new();
    for number in 0..40 {
        let frame = peer.frame().await;
        assert_eq!(frame.kind, 1);
        *by_channel.entry(frame.channel).or_default() += 1;
        let (_, body) = (peer.frame().await, peer.frame().await);
        assert_eq!(body.payload, number.to_string().as_bytes());
    }
    assert_eq!(by_channel, (2..=5).map(|channel| (channel, 10)).collect());
    broker.stop().await;
}

#[tokio::test]
async fn the_highest_priority_is_served_first_and_lower_ones_while_it_is_full() {
    let broker = TestBroker::start().await;
    let mut peer = with_messages(&broker, 0).await;
    peer.qos(1, 2, false).await;
    for (tag, priority) in [("low", -5), ("high", 10), ("middle", 0)] {
        let arguments = table([("x-priority", AMQPValue::LongInt(priority))]);
        peer.consume_as(1, basic::Consume { arguments, ..consume(tag) }).await;
    }
    for number in 0..6 {
        peer.publish(1, "q", number.to_string()).await;
    }
    let mut order = Vec::new();
    for _ in 0..6 {
        order.push(peer.delivery(1).await.consumer);
    }
    assert_eq!(order, ["high", "high", "middle", "middle", "low", "low"]);
    peer.publish(1, "q", "6").await;
    peer.nothing_more(1).await;
    peer.ack(1, 6, false).await; // low is the only one with room
    assert_eq!(peer.delivery(1).await.consumer, "low");
    broker.stop().await;
}

#[tokio::test]
async fn a_priority_that_is_no_integer_is_refused() {
    let broker = TestBroker::start().await;
    let mut peer = with_messages(&broker, 0).await;
    let arguments = table([("x-priority", text("high"))]);
    peer.send(1, AMQPClass::Basic(basic::AMQPMethod::Consume(basic::Consume { arguments, ..consume("c") }))).await;
    let text =
        "PRECONDITION_FAILED - invalid arg 'x-priority' for queue 'q' in vhost '/': \"expected integer, got longstr\"";
    peer.expect_channel_error(1, 406, text).await;
    broker.stop().await;
}

#[tokio::test]
async fn an_exclusive_consumer_is_alone() {
    let broker = TestBroker::start().await;
    let mut peer = with_messages(&broker, 1).await;
    peer.open_channel(2).await;
    peer.consume_as(2, basic::Consume { exclusive: true, ..consume("only") }).await;
    let taken = peer.delivery(2).await;
    peer.send(1, AMQPClass::Basic(basic::AMQPMethod::Consume(consume("other")))).await;
    peer.expect_channel_error(1, 403, "ACCESS_REFUSED - queue 'q' in vhost '/' in exclusive use").await;
    peer.open_channel(1).await;
    assert_eq!(peer.get(1, "q", true).await, None, "a get beside it is allowed");
    peer.ack(2, taken.tag, false).await;
    peer.cancel(2, "only").await;
    peer.consume_as(1, consume("other")).await;
    peer.send(2, AMQPClass::Basic(basic::AMQPMethod::Consume(basic::Consume { exclusive: true, ..consume("late") })))
        .await;
    peer.expect_channel_error(2, 403, "ACCESS_REFUSED - queue 'q' in vhost '/' in exclusive use").await;
    broker.stop().await;
}

#[tokio::test]
async fn a_consumer_tag_is_unique_on_its_channel() {
    let broker = TestBroker::start().await;
    let mut peer = with_messages(&broker, 0).await;
    peer.open_channel(2).await;
    peer.consume_as(1, consume("c")).await;
    peer.consume_as(2, consume("c")).await; // another channel, another scope
    peer.cancel(1, "c").await;
    peer.consume_as(1, consume("c")).await;
    peer.send(1, AMQPClass::Basic(basic::AMQPMethod::Consume(consume("c")))).await;
    peer.expect_connection_error(530, "NOT_ALLOWED - attempt to reuse consumer tag 'c'").await;
    broker.stop().await;
}

#[tokio::test]
async fn an_empty_tag_is_replaced_by_a_generated_one() {
    let broker = TestBroker::start().await;
    let mut peer = with_messages(&broker, 1).await;
    let tag = peer.consume_as(1, consume("")).await;
    assert!(tag.starts_with("amq.ctag-") && tag.len() == "amq.ctag-".len() + 22, "{tag}");
    assert_eq!(peer.delivery(1).await.consumer, tag);
    broker.stop().await;
}

#[tokio::test]
async fn an_empty_queue_name_is_the_last_declared_queue() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.send(1, AMQPClass::Basic(basic::AMQPMethod::Consume(basic::Consume::default()))).await;
    peer.expect_channel_error(1, 404, "NOT_FOUND - no previously declared queue").await;
    peer.open_channel(1).await;
    let (name, ..) = peer.declare(1, transient("")).await;
    assert!(name.starts_with("amq.gen-") && name.len() == "amq.gen-".len() + 22, "{name}");
    peer.consume_as(1, basic::Consume { consumer_tag: "c".into(), ..Default::default() }).await;
    peer.publish(1, &name, "x").await;
    assert_eq!(peer.delivery(1).await.key, name);
    broker.stop().await;
}

#[tokio::test]
async fn consuming_from_a_missing_queue_is_refused() {
    let broker = TestBroker::start().await;
    let client = broker.client().await;
    let refused = client.basic_consume("missing".into(), "c".into(), Default::default(), FieldTable::default()).await;
    assert_eq!(crate::support::code(refused), 404);
    broker.stop().await;
}

#[tokio::test]
async fn no_delivery_follows_cancel_ok() {
    let broker = TestBroker::start().await;
    let mut peer = with_messages(&broker, 0).await;
    peer.consume_as(1, consume("c")).await;
    peer.cancel(1, "c").await;
    peer.cancel(1, "c").await; // unknown by now, and no error
    peer.publish(1, "q", "x").await;
    peer.nothing_more(1).await;
    assert_eq!(broker.counts("q").ready, 1);
    broker.stop().await;
}

#[tokio::test]
async fn a_deleted_queue_cancels_its_consumers() {
    let broker = TestBroker::start().await;
    let mut peer = with_messages(&broker, 2).await;
    let mut consumer = broker.peer().await;
    consumer.qos(1, 1, false).await;
    consumer.consume_as(1, consume("c")).await;
    let delivery = consumer.delivery(1).await;
    delete(&mut peer, "q").await;
    match consumer.method(1).await {
        AMQPClass::Basic(basic::AMQPMethod::Cancel(cancel)) => {
            assert_eq!((cancel.consumer_tag.as_str(), cancel.nowait), ("c", true))
        }
        other => panic!("{other:?}"),
    }
    // What it holds of the deleted queue may still be acked, and the tag is free again.
    consumer.ack(1, delivery.tag, false).await;
    consumer.nothing_more(1).await;
    peer.declare(1, transient("q")).await;
    consumer.consume_as(1, consume("c")).await;
    broker.stop().await;
}

#[tokio::test]
async fn a_client_without_the_capability_is_not_told_of_a_cancellation() {
    let broker = TestBroker::start().await;
    let mut peer = with_messages(&broker, 0).await;
    let mut consumer = Login { capabilities: &[], ..Default::default() }.open(broker.address()).await;
    consumer.open_channel(1).await;
    consumer.consume_as(1, consume("c")).await;
    delete(&mut peer, "q").await;
    consumer.nothing_more(1).await;
    broker.stop().await;
}

#[tokio::test]
async fn the_last_cancel_deletes_an_auto_delete_queue() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare(1, auto_delete("q")).await;
    assert!(broker.has_queue("q"), "not before the first consumer");
    peer.consume_as(1, consume("a")).await;
    peer.consume_as(1, consume("b")).await;
    peer.cancel(1, "a").await;
    assert!(broker.has_queue("q"));
    peer.cancel(1, "b").await;
    assert!(!broker.has_queue("q"));
    broker.stop().await;
}

#[tokio::test]
async fn a_big_backlog_flows_to_a_consumer_without_a_limit() {
    let broker = TestBroker::start().await;
    let mut peer = with_messages(&broker, 30_000).await;
    peer.consume(1, "q", false).await;
    for number in 0..30_000u64 {
        let delivery = peer.delivery(1).await;
        assert_eq!((delivery.tag, delivery.text()), (number + 1, number.to_string().as_str()));
    }
    peer.ack(1, 0, true).await;
    peer.nothing_more(1).await;
    assert_eq!(broker.counts("q").unacked, 0);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_consumer_that_does_not_read_is_stopped_and_goes_on_when_it_reads() {
    let broker = TestBroker::start().await;
    let mut peer = with_messages(&broker, 0).await;
    let mut slow = broker.peer().await;
    slow.consume_as(1, consume("slow")).await;
    let body = vec![9; 100_000];
    for _ in 0..500 {
        peer.publish(1, "q", &body).await; // 50 MB: no socket buffer takes that
    }
    peer.nothing_more(1).await;
    let counts = broker.counts("q");
    assert!(counts.ready > 100, "{counts:?}: the broker buffers for a client that does not read");
    // Others are served meanwhile.
    assert!(peer.get(1, "q", true).await.is_some());
    for number in 0..499 {
        let delivery = slow.delivery(1).await;
        assert_eq!(delivery.tag, number + 1);
        assert!(delivery.body == body);
    }
    slow.ack(1, 0, true).await;
    slow.nothing_more(1).await;
    assert_eq!((broker.counts("q").ready, broker.counts("q").unacked), (0, 0));
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_consumer_does_not_hold_up_another() {
    let broker = TestBroker::start().await;
    let mut peer = with_messages(&broker, 0).await;
    let mut slow = broker.peer().await;
    slow.consume_as(1, consume("slow")).await;
    let mut fast = broker.peer().await;
    fast.consume_as(1, basic::Consume { no_ack: true, ..consume("fast") }).await;
    let publishing = tokio::spawn(async move {
        for _ in 0..600 {
            peer.publish(1, "q", vec![9; 100_000]).await;
        }
        peer
    });
    // The slow one fills its buffers (some megabytes); everything else reaches the fast one.
    for _ in 0..300 {
        fast.delivery(1).await;
    }
    publishing.await.unwrap();
    broker.stop().await;
}

#[tokio::test]
async fn consume_ok_precedes_the_first_delivery() {
    let broker = TestBroker::start().await;
    let mut peer = with_messages(&broker, 1).await;
    for number in 0..50 {
        let tag = peer.consume_as(1, consume(&format!("c{number}"))).await; // fails on anything but consume-ok
        peer.delivery(1).await;
        peer.cancel(1, &tag).await;
        peer.nack(1, 0, true, true).await;
    }
    broker.stop().await;
}

#[tokio::test]
async fn delivery_tags_count_all_deliveries_of_the_channel() {
    let broker = TestBroker::start().await;
    let mut peer = with_messages(&broker, 3).await;
    assert_eq!(peer.get(1, "q", true).await.unwrap().tag, 1);
    assert_eq!(peer.get(1, "q", false).await.unwrap().tag, 2);
    peer.consume(1, "q", true).await;
    assert_eq!(peer.delivery(1).await.tag, 3);
    broker.stop().await;
}

#[tokio::test]
async fn a_prefetch_size_is_not_implemented() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    let qos = crate::support::frames::frame(1, 1, &[0, 60, 0, 10, 0, 0, 0, 9, 0, 1, 0]);
    peer.write(&qos).await;
    peer.expect_connection_error(540, "NOT_IMPLEMENTED - prefetch_size!=0 (9)").await;
    broker.stop().await;
}

#[tokio::test]
async fn a_get_from_an_empty_queue_is_empty_and_says_how_many_are_left() {
    let broker = TestBroker::start().await;
    let mut peer = with_messages(&broker, 3).await;
    for left in [2, 1, 0] {
        assert_eq!(peer.get(1, "q", true).await.unwrap().remaining, left);
    }
    assert_eq!(peer.get(1, "q", true).await, None);
    broker.stop().await;
}
