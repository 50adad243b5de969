//! What a restart keeps, what it does not, and that the counts are right either way.

use amq_protocol::{
    protocol::{AMQPClass, basic, exchange, queue},
    types::AMQPValue,
};
use lapin::{options::*, types::FieldTable};

use crate::support::{
    Peer, TestBroker, declare_durable, depth, get,
    peer::{auto_delete, durable, exclusive, transient},
    persistent, publish_confirmed, table, text,
};

/// A broker with a durable queue `q` and the bodies `0..count` in it, confirmed.
async fn filled(count: u64) -> (TestBroker, Peer) {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare(1, durable("q")).await;
    peer.select_confirms(1).await;
    for number in 0..count {
        peer.publish_persistent(1, "q", number.to_string()).await;
    }
    if count > 0 {
        peer.confirms(1, 1..=count).await;
    }
    (broker, peer)
}

/// Everything in `q`, taken out, with the redelivered flag.
async fn drain(broker: &TestBroker) -> Vec<(String, bool)> {
    let mut peer = broker.peer().await;
    let mut messages = Vec::new();
    while let Some(message) = peer.get(1, "q", true).await {
        messages.push((message.text().to_owned(), message.redelivered));
    }
    assert_eq!(peer.depth(1, "q").await, (0, 0));
    messages
}

fn texts(messages: &[(String, bool)]) -> Vec<&str> {
    messages.iter().map(|(body, _)| body.as_str()).collect()
}

#[tokio::test]
async fn confirmed_messages_survive_a_restart_in_order() {
    let (mut broker, _) = filled(100).await;
    broker.restart().await;
    assert_eq!(broker.counts("q").ready, 100);
    let expected: Vec<String> = (0..100).map(|number| number.to_string()).collect();
    assert_eq!(texts(&drain(&broker).await), expected);
    broker.stop().await;
}

#[tokio::test]
async fn properties_survive_a_restart() {
    let mut broker = TestBroker::start().await;
    let properties = persistent()
        .with_content_type("text/plain".into())
        .with_headers(table([
            ("n", AMQPValue::LongLongInt(-7)),
            ("t", AMQPValue::FieldTable(table([("deep", text("er"))]))),
        ]))
        .with_priority(3)
        .with_correlation_id("c".into())
        .with_reply_to("r".into())
        .with_message_id("m".into())
        .with_timestamp(1_700_000_000)
        .with_type("t".into())
        .with_app_id("a".into())
        .with_user_id("guest".into())
        .with_expiration("60000".into());
    let mut peer = broker.peer().await;
    peer.declare(1, durable("q")).await;
    peer.bind(1, "q", "amq.topic", "a.#", Default::default()).await;
    peer.publish_to(1, "amq.topic", "a.b", &properties, "body").await;
    peer.nothing_more(1).await;
    broker.restart().await;
    let mut peer = broker.peer().await;
    let message = peer.get(1, "q", true).await.unwrap();
    assert_eq!((message.exchange.as_str(), message.key.as_str(), message.text()), ("amq.topic", "a.b", "body"));
    assert_eq!(message.properties, properties);
    broker.stop().await;
}

#[tokio::test]
async fn definitions_survive_a_restart() {
    let mut broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    for (name, kind) in [("d", "direct"), ("f", "fanout"), ("t", "topic"), ("h", "headers")] {
        let declare =
            exchange::Declare { exchange: name.into(), kind: kind.into(), durable: true, ..Default::default() };
        peer.call(1, AMQPClass::Exchange(exchange::AMQPMethod::Declare(declare))).await;
    }
    peer.declare(1, durable("q")).await;
    peer.bind(1, "q", "d", "key", Default::default()).await;
    peer.bind(1, "q", "f", "", Default::default()).await;
    peer.bind(1, "q", "t", "*.x.#", Default::default()).await;
    peer.bind(1, "q", "h", "", table([("x-match", text("any")), ("a", AMQPValue::LongInt(1))])).await;
    let bind = exchange::Bind {
        destination: "f".into(),
        source: "d".into(),
        routing_key: "through".into(),
        ..Default::default()
    };
    peer.call(1, AMQPClass::Exchange(exchange::AMQPMethod::Bind(bind))).await;
    broker.restart().await;
    let mut peer = broker.peer().await;
    let plain = Default::default();
    peer.publish_to(1, "d", "key", &plain, "d").await;
    peer.publish_to(1, "f", "any", &plain, "f").await;
    peer.publish_to(1, "t", "a.x.b.c", &plain, "t").await;
    peer.publish_to(
        1,
        "h",
        "",
        &lapin::BasicProperties::default().with_headers(table([("a", AMQPValue::LongLongInt(1))])),
        "h",
    )
    .await;
    peer.publish_to(1, "d", "through", &plain, "e2e").await;
    peer.publish_to(1, "d", "other", &plain, "no").await;
    assert_eq!(texts(&drain(&broker).await), ["d", "f", "t", "h", "e2e"]);
    // The declarations are still the same, so another is equivalent, and a different one is not.
    let declare =
        exchange::Declare { exchange: "d".into(), kind: "direct".into(), durable: true, ..Default::default() };
    peer.call(1, AMQPClass::Exchange(exchange::AMQPMethod::Declare(declare))).await;
    peer.send(1, AMQPClass::Queue(queue::AMQPMethod::Declare(transient("q")))).await;
    let text = "PRECONDITION_FAILED - inequivalent arg 'durable' for queue 'q' in vhost '/': received 'false' but current is 'true'";
    peer.expect_channel_error(1, 406, text).await;
    broker.stop().await;
}

#[tokio::test]
async fn queue_arguments_survive_a_restart() {
    let mut broker = TestBroker::start().await;
    let client = broker.client().await;
    let arguments = table([("x-max-length", AMQPValue::LongInt(10)), ("x-own", text("kept"))]);
    let options = QueueDeclareOptions { durable: true, ..Default::default() };
    client.queue_declare("q".into(), options, arguments.clone()).await.unwrap();
    drop(client);
    broker.restart().await;
    let client = broker.client().await;
    client.queue_declare("q".into(), options, arguments).await.unwrap();
    let refused = client.queue_declare("q".into(), options, FieldTable::default()).await;
    assert_eq!(crate::support::code(refused), 406);
    broker.stop().await;
}

#[tokio::test]
async fn unacked_messages_come_back_redelivered() {
    let (mut broker, mut peer) = filled(5).await;
    for _ in 0..3 {
        peer.get(1, "q", false).await.unwrap();
    }
    broker.restart().await;
    assert_eq!(broker.counts("q").ready, 5);
    let messages = drain(&broker).await;
    assert_eq!(texts(&messages), ["0", "1", "2", "3", "4"]);
    assert!(messages[..3].iter().all(|(_, redelivered)| *redelivered), "{messages:?}");
    broker.stop().await;
}

#[tokio::test]
async fn acked_messages_do_not_come_back() {
    let (mut broker, mut peer) = filled(10).await;
    for _ in 0..6 {
        peer.get(1, "q", false).await.unwrap();
    }
    peer.ack(1, 4, true).await;
    peer.nothing_more(1).await;
    broker.restart().await;
    assert_eq!(texts(&drain(&broker).await), ["4", "5", "6", "7", "8", "9"]);
    broker.restart().await;
    assert_eq!(broker.counts("q").ready, 0);
    broker.stop().await;
}

#[tokio::test]
async fn acks_out_of_order_survive_a_restart() {
    let (mut broker, mut peer) = filled(1000).await;
    peer.consume(1, "q", false).await;
    for _ in 0..1000 {
        peer.delivery(1).await;
    }
    for tag in (1..=1000).rev().filter(|tag| tag % 3 != 0) {
        peer.ack(1, tag, false).await;
    }
    peer.nothing_more(1).await;
    let expected: Vec<String> = (0..1000).filter(|number| number % 3 == 2).map(|number| number.to_string()).collect();
    for _ in 0..2 {
        broker.restart().await;
        assert_eq!(broker.counts("q").ready, 333);
    }
    let messages = drain(&broker).await;
    assert_eq!(texts(&messages), expected);
    assert!(messages.iter().all(|(_, redelivered)| *redelivered));
    broker.restart().await;
    assert_eq!((broker.counts("q").ready, broker.counts("q").ready_bytes), (0, 0));
    broker.stop().await;
}

#[tokio::test]
async fn one_old_unacked_message_survives_many_later_ones() {
    let (mut broker, mut peer) = filled(1).await;
    peer.get(1, "q", false).await.unwrap();
    let mut other = broker.peer().await;
    for _ in 0..30 {
        for number in 0..200 {
            other.publish_persistent(1, "q", number.to_string()).await;
        }
        for _ in 0..200 {
            other.get(1, "q", true).await.unwrap();
        }
    }
    broker.restart().await;
    assert_eq!(drain(&broker).await, [("0".to_owned(), true)]);
    broker.stop().await;
}

#[tokio::test]
async fn transient_messages_of_a_durable_queue_are_gone_and_not_counted() {
    let (mut broker, mut peer) = filled(3).await;
    for number in 3..6 {
        peer.publish(1, "q", "transient").await;
        peer.publish_persistent(1, "q", number.to_string()).await;
    }
    peer.confirms(1, 4..=9).await;
    assert_eq!(broker.counts("q").ready, 9);
    broker.restart().await;
    assert_eq!((broker.counts("q").ready, broker.counts("q").ready_bytes), (6, 6));
    assert_eq!(texts(&drain(&broker).await), ["0", "1", "2", "3", "4", "5"]);
    broker.stop().await;
}

#[tokio::test]
async fn transient_queues_and_exchanges_are_gone() {
    let mut broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare(1, transient("q")).await;
    peer.declare(1, durable("kept")).await;
    peer.declare_exchange(1, "x", "direct", Default::default()).await;
    peer.bind(1, "kept", "x", "", Default::default()).await;
    peer.publish_persistent(1, "q", "x").await;
    peer.nothing_more(1).await;
    broker.restart().await;
    assert!(!broker.has_queue("q") && broker.has_queue("kept"));
    let mut peer = broker.peer().await;
    let passive = exchange::Declare { exchange: "x".into(), passive: true, ..Default::default() };
    peer.send(1, AMQPClass::Exchange(exchange::AMQPMethod::Declare(passive))).await;
    peer.expect_channel_error(1, 404, "NOT_FOUND - no exchange 'x' in vhost '/'").await;
    broker.stop().await;
}

#[tokio::test]
async fn exclusive_queues_are_gone_even_when_durable() {
    let mut broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare(1, queue::Declare { durable: true, ..exclusive("mine") }).await;
    peer.publish_persistent(1, "mine", "x").await;
    peer.nothing_more(1).await;
    broker.restart().await;
    assert!(!broker.has_queue("mine"));
    broker.stop().await;
}

#[tokio::test]
async fn a_durable_auto_delete_queue_survives_until_its_last_consumer_goes() {
    let mut broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare(1, queue::Declare { durable: true, ..auto_delete("brief") }).await;
    peer.publish_persistent(1, "brief", "x").await;
    peer.nothing_more(1).await;
    broker.restart().await;
    let mut peer = broker.peer().await;
    peer.consume(1, "brief", false).await;
    assert_eq!(peer.delivery(1).await.text(), "x");
    peer.cancel(1, "brief").await;
    assert!(!broker.has_queue("brief"));
    broker.restart().await;
    assert!(!broker.has_queue("brief"));
    broker.stop().await;
}

#[tokio::test]
async fn a_purge_survives_a_restart() {
    let (mut broker, mut peer) = filled(50).await;
    peer.get(1, "q", false).await.unwrap();
    let purge = queue::Purge { queue: "q".into(), nowait: false };
    let AMQPClass::Queue(queue::AMQPMethod::PurgeOk(ok)) =
        peer.call(1, AMQPClass::Queue(queue::AMQPMethod::Purge(purge))).await
    else {
        panic!("no purge-ok")
    };
    assert_eq!(ok.message_count, 49);
    peer.publish_persistent(1, "q", "after").await;
    peer.confirm(1).await;
    broker.restart().await;
    assert_eq!(broker.counts("q").ready, 2, "the unacked one was not purged");
    assert_eq!(texts(&drain(&broker).await), ["0", "after"]);
    broker.stop().await;
}

#[tokio::test]
async fn a_deletion_survives_a_restart_and_the_name_starts_afresh() {
    let (mut broker, mut peer) = filled(20).await;
    let delete = queue::Delete { queue: "q".into(), ..Default::default() };
    let AMQPClass::Queue(queue::AMQPMethod::DeleteOk(ok)) =
        peer.call(1, AMQPClass::Queue(queue::AMQPMethod::Delete(delete))).await
    else {
        panic!("no delete-ok")
    };
    assert_eq!(ok.message_count, 20);
    broker.restart().await;
    assert!(!broker.has_queue("q"));
    let mut peer = broker.peer().await;
    assert_eq!(peer.declare(1, durable("q")).await.1, 0);
    peer.publish_persistent(1, "q", "new").await;
    peer.nothing_more(1).await;
    broker.restart().await;
    assert_eq!(texts(&drain(&broker).await), ["new"]);
    broker.stop().await;
}

#[tokio::test]
async fn an_unbind_and_an_exchange_deletion_survive_a_restart() {
    let mut broker = TestBroker::start().await;
    let client = broker.client().await;
    declare_durable(&client, "q").await;
    let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
    for exchange in ["one", "two"] {
        client
            .exchange_declare(exchange.into(), lapin::ExchangeKind::Fanout, options, FieldTable::default())
            .await
            .unwrap();
        client
            .queue_bind("q".into(), exchange.into(), "".into(), Default::default(), FieldTable::default())
            .await
            .unwrap();
    }
    client.queue_unbind("q".into(), "one".into(), "".into(), FieldTable::default()).await.unwrap();
    client.exchange_delete("two".into(), Default::default()).await.unwrap();
    drop(client);
    broker.restart().await;
    let mut peer = broker.peer().await;
    peer.publish_mandatory(1, "one", "", &persistent(), "x").await;
    assert_eq!(peer.returned(1).await.0, 312);
    peer.publish_to(1, "two", "", &persistent(), "x").await;
    peer.expect_channel_error(1, 404, "NOT_FOUND - no exchange 'two' in vhost '/'").await;
    broker.stop().await;
}

#[tokio::test]
async fn large_bodies_survive_a_restart() {
    let mut broker = TestBroker::start().await;
    let sizes = [0, 1, 4095, 16_383, 16_384, 65_536, 131_072, 1 << 20, 5 << 20];
    let body = |size: usize| -> Vec<u8> { (0..size).map(|at| (at * 31 + size) as u8).collect() };
    let mut peer = broker.peer().await;
    peer.declare(1, durable("q")).await;
    peer.declare(1, durable("copy")).await;
    peer.select_confirms(1).await;
    for queue in ["q", "copy"] {
        peer.bind(1, queue, "amq.fanout", "", Default::default()).await;
    }
    for size in sizes {
        peer.publish_to(1, "amq.fanout", "", &persistent(), body(size)).await;
    }
    peer.confirms(1, 1..=sizes.len() as u64).await;
    broker.restart().await;
    let mut peer = broker.peer().await;
    for queue in ["q", "copy"] {
        for size in sizes {
            let message = peer.get(1, queue, true).await.unwrap();
            assert!(message.body == body(size), "{queue} {size}");
        }
    }
    broker.stop().await;
}

#[tokio::test]
async fn twenty_thousand_messages_survive_restarts_while_they_are_consumed() {
    let (mut broker, _) = filled(20_000).await;
    let mut expected = 0;
    while expected < 20_000 {
        broker.restart().await;
        assert_eq!(broker.counts("q").ready, 20_000 - expected);
        let mut peer = broker.peer().await;
        peer.qos(1, 3000, false).await;
        peer.consume(1, "q", false).await;
        for _ in 0..5000 {
            let delivery = peer.delivery(1).await;
            assert_eq!(delivery.text(), expected.to_string());
            expected += 1;
            if delivery.tag % 500 == 0 {
                peer.ack(1, delivery.tag, true).await;
            }
        }
        peer.nothing_more_but_deliveries(1).await;
    }
    broker.restart().await;
    assert_eq!(broker.counts("q").ready, 0);
    broker.stop().await;
}

#[tokio::test]
async fn a_restart_before_anything_was_confirmed_loses_nothing_either() {
    let mut broker = TestBroker::start().await;
    let client = broker.publisher().await;
    declare_durable(&client, "q").await;
    publish_confirmed(&client, "q", b"1").await;
    client.basic_publish("".into(), "q".into(), Default::default(), b"2", persistent()).await.unwrap();
    assert_eq!(depth(&client, "q").await, (2, 0));
    drop(client);
    broker.restart().await;
    let client = broker.client().await;
    for body in [b"1", b"2"] {
        assert_eq!(get(&client, "q").await.delivery.data, body);
    }
    broker.stop().await;
}

#[tokio::test]
async fn messages_published_after_a_restart_come_after_those_before_it() {
    let (mut broker, _) = filled(3).await;
    for round in 0..3 {
        broker.restart().await;
        let mut peer = broker.peer().await;
        peer.publish_persistent(1, "q", format!("after {round}")).await;
        peer.nothing_more(1).await;
    }
    assert_eq!(texts(&drain(&broker).await), ["0", "1", "2", "after 0", "after 1", "after 2"]);
    broker.stop().await;
}

#[tokio::test]
async fn a_requeued_message_survives_in_its_old_place() {
    let (mut broker, mut peer) = filled(4).await;
    for _ in 0..3 {
        peer.get(1, "q", false).await.unwrap();
    }
    peer.ack(1, 1, false).await;
    peer.nack(1, 3, true, true).await;
    peer.nothing_more(1).await;
    broker.restart().await;
    assert_eq!(texts(&drain(&broker).await), ["1", "2", "3"]);
    broker.stop().await;
}

#[tokio::test]
async fn a_consumer_that_takes_without_acks_leaves_nothing_for_a_restart() {
    let (mut broker, mut peer) = filled(100).await;
    peer.consume_as(
        1,
        basic::Consume { queue: "q".into(), consumer_tag: "c".into(), no_ack: true, ..Default::default() },
    )
    .await;
    for _ in 0..100 {
        peer.delivery(1).await;
    }
    broker.restart().await;
    assert_eq!(broker.counts("q").ready, 0);
    broker.stop().await;
}
