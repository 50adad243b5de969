//! Delayed messages of queues and exchanges: restarts, transactions, dead letters, looking into them. What a delayed exchange
//! does for a client otherwise: `interop/test_delayed_exchange.py`.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use amq_protocol::types::AMQPValue;
use lapin::{Confirmation, options::*, types::FieldTable};
use leveret::broker::{DelayedIn, delay::DelayId};

use crate::support::{
    TestBroker, bind, declare_exchange, declare_with, drain, eventually, get, headed, persistent, publish_with, table,
    take, text,
};

const FAR: i32 = 600_000;

fn delayed_queue() -> FieldTable {
    table([("x-delayed", AMQPValue::Boolean(true))])
}

fn fanout() -> FieldTable {
    table([("x-delayed-type", text("fanout"))])
}

fn delay(ms: i32) -> lapin::BasicProperties {
    headed([("x-delay", AMQPValue::LongInt(ms))])
}

fn now_unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
}

fn count(broker: &TestBroker, place: &DelayedIn) -> u64 {
    broker.server().broker().vhost("/").unwrap().delayed_count(place).unwrap()
}

fn queue(name: &str) -> DelayedIn {
    DelayedIn::Queue(name.into())
}

fn exchange(name: &str) -> DelayedIn {
    DelayedIn::Exchange(name.into())
}

/// A durable delayed queue `q`, and a delayed exchange `x` with the queue `plain` behind it.
async fn declare_both(channel: &lapin::Channel) {
    declare_with(channel, "q", delayed_queue()).await;
    declare_with(channel, "plain", FieldTable::default()).await;
    declare_exchange(channel, "x", "x-delayed-message", fanout()).await;
    bind(channel, "plain", "x", "").await;
}

#[tokio::test]
async fn a_message_waits_in_its_queue_and_comes_with_its_delay_negated() {
    let broker = TestBroker::start().await;
    let client = broker.publisher().await;
    declare_with(&client, "q", delayed_queue()).await;
    let started = Instant::now();
    for (ms, body) in [(400, "b"), (200, "a")] {
        let answer = publish_with(&client, ("", "q"), delay(ms), body).await;
        assert!(matches!(answer, Confirmation::Ack(None)), "{answer:?}");
    }
    publish_with(&client, ("", "q"), persistent(), "at once").await;
    assert_eq!(take(&client, "q").await.data, b"at once");
    let first = take(&client, "q").await;
    assert!(started.elapsed() >= Duration::from_millis(200));
    assert_eq!(first.data, b"a");
    let headers = first.properties.headers().clone().unwrap();
    assert_eq!(headers.inner().get("x-delay"), Some(&AMQPValue::LongLongInt(-200)));
    assert_eq!(take(&client, "q").await.data, b"b");
    assert!(started.elapsed() >= Duration::from_millis(400));
    // As it came, it does not wait again.
    publish_with(&client, ("", "q"), first.delivery.properties, "again").await;
    assert_eq!(drain(&client, "q").await, ["again"]);
    broker.stop().await;
}

#[tokio::test]
async fn a_point_in_time_is_waited_for_in_queues_and_exchanges() {
    let broker = TestBroker::start().await;
    let client = broker.publisher().await;
    declare_both(&client).await;
    let at = now_unix_ms() + 300;
    let header = ("x-deliver-at", AMQPValue::LongLongInt(at as i64));
    for target in [("", "q"), ("x", "")] {
        publish_with(&client, target, headed([header.clone()]), "m").await;
        publish_with(&client, target, headed([("x-deliver-at", AMQPValue::LongLongInt(5))]), "past").await;
    }
    for queue in ["q", "plain"] {
        assert_eq!(take(&client, queue).await.data, b"past");
        let message = take(&client, queue).await;
        assert!(now_unix_ms() >= at);
        let headers = message.properties.headers().clone().unwrap();
        assert_eq!(headers.inner().get("x-deliver-at"), Some(&header.1));
    }
    broker.stop().await;
}

#[tokio::test]
async fn what_waits_is_counted_apart_and_a_purge_leaves_it() {
    let broker = TestBroker::start().await;
    let client = broker.publisher().await;
    let mut arguments = delayed_queue();
    arguments.insert("x-max-length".into(), AMQPValue::LongInt(1));
    declare_with(&client, "q", arguments).await;
    for _ in 0..3 {
        publish_with(&client, ("", "q"), delay(FAR), "later").await;
    }
    publish_with(&client, ("", "q"), persistent(), "now").await;
    let counts = broker.counts("q");
    assert_eq!((counts.ready, counts.delayed), (1, 3));
    assert_eq!(client.queue_purge("q".into(), Default::default()).await.unwrap(), 1);
    let counts = broker.counts("q");
    assert_eq!((counts.ready, counts.delayed), (0, 3));
    broker.stop().await;
}

#[tokio::test]
async fn what_waits_survives_a_restart() {
    let mut broker = TestBroker::start().await;
    let client = broker.publisher().await;
    declare_both(&client).await;
    let started = Instant::now();
    for target in [("", "q"), ("x", "")] {
        publish_with(&client, target, delay(FAR), "later").await;
        publish_with(&client, target, delay(1_000), "soon").await;
    }
    broker.restart().await;
    assert_eq!((broker.counts("q").delayed, count(&broker, &exchange("x"))), (2, 2));
    let client = broker.client().await;
    for name in ["q", "plain"] {
        assert_eq!(take(&client, name).await.data, b"soon");
        assert!(started.elapsed() >= Duration::from_secs(1));
    }
    assert_eq!((broker.counts("q").delayed, count(&broker, &exchange("x"))), (1, 1));
    // What has come is not there again.
    broker.restart().await;
    let client = broker.client().await;
    assert_eq!((broker.counts("q").delayed, count(&broker, &exchange("x"))), (1, 1));
    for queue in ["q", "plain"] {
        assert_eq!(drain(&client, queue).await, [""; 0]);
    }
    broker.stop().await;
}

#[tokio::test]
async fn a_delay_that_ended_while_the_broker_was_down_ends_at_its_start() {
    let mut broker = TestBroker::start().await;
    let client = broker.publisher().await;
    declare_both(&client).await;
    for target in [("", "q"), ("x", "")] {
        publish_with(&client, target, delay(300), "m").await;
    }
    broker.shut_down().await;
    tokio::time::sleep(Duration::from_millis(400)).await;
    broker.restart().await;
    let client = broker.client().await;
    for queue in ["q", "plain"] {
        assert_eq!(take(&client, queue).await.data, b"m");
    }
    broker.stop().await;
}

#[tokio::test]
async fn a_confirm_waits_until_the_delayed_message_is_on_disk() {
    let (broker, gate) = TestBroker::gated().await;
    let client = broker.publisher().await;
    declare_both(&client).await;
    for (exchange, key) in [("", "q"), ("x", "")] {
        gate.close();
        let options = BasicPublishOptions::default();
        let sent = client.basic_publish(exchange.into(), key.into(), options, b"m", delay(FAR)).await.unwrap();
        let mut sent = std::pin::pin!(sent);
        eventually("a sync", async || gate.is_holding().then_some(())).await;
        assert!(tokio::time::timeout(Duration::from_millis(100), &mut sent).await.is_err());
        gate.open();
        let answer = crate::support::within("confirm", sent).await.unwrap();
        assert!(matches!(answer, Confirmation::Ack(None)), "{answer:?}");
    }
    broker.stop().await;
}

#[tokio::test]
async fn a_delay_begins_with_the_commit_of_its_transaction() {
    let broker = TestBroker::start().await;
    let client = broker.client().await;
    declare_both(&client).await;
    client.tx_select().await.unwrap();
    let publish = async |(exchange, key): (&str, &str), body: &str| {
        let options = BasicPublishOptions::default();
        client.basic_publish(exchange.into(), key.into(), options, body.as_bytes(), delay(300)).await.unwrap();
    };
    for target in [("", "q"), ("x", "")] {
        publish(target, "undone").await;
    }
    client.tx_rollback().await.unwrap();
    for target in [("", "q"), ("x", "")] {
        publish(target, "m").await;
    }
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!((broker.counts("q").delayed, count(&broker, &exchange("x"))), (0, 0));
    let started = Instant::now();
    client.tx_commit().await.unwrap();
    for queue in ["q", "plain"] {
        assert_eq!(take(&client, queue).await.data, b"m");
        assert!(started.elapsed() >= Duration::from_millis(300));
        assert_eq!(drain(&client, queue).await, [""; 0]);
    }
    broker.stop().await;
}

#[tokio::test]
async fn dead_letters_wait_as_their_header_says() {
    let broker = TestBroker::start().await;
    let client = broker.publisher().await;
    declare_both(&client).await;
    declare_with(&client, "dying", table([("x-dead-letter-exchange", text("x"))])).await;
    let started = Instant::now();
    publish_with(&client, ("", "dying"), delay(300), "m").await;
    get(&client, "dying").await.reject(BasicRejectOptions { requeue: false }).await.unwrap();
    eventually("the dead letter waits", async || (count(&broker, &exchange("x")) == 1).then_some(())).await;
    let message = take(&client, "plain").await;
    assert!(started.elapsed() >= Duration::from_millis(300));
    assert!(message.properties.headers().as_ref().unwrap().contains_key("x-death"));
    broker.stop().await;
}

#[tokio::test]
async fn time_to_live_begins_when_the_delay_ends() {
    let broker = TestBroker::start().await;
    let client = broker.publisher().await;
    let mut arguments = delayed_queue();
    arguments.insert("x-message-ttl".into(), AMQPValue::LongInt(300));
    declare_with(&client, "q", arguments).await;
    let mut peer = broker.peer().await;
    peer.consume(1, "q", true).await;
    publish_with(&client, ("", "q"), delay(800), "m").await;
    assert_eq!(peer.delivery(1).await.text(), "m");
    publish_with(&client, ("", "q"), delay(800).with_expiration("300".into()), "n").await;
    assert_eq!(peer.delivery(1).await.text(), "n");
    broker.stop().await;
}

#[tokio::test]
async fn what_waits_can_be_listed_and_cancelled() {
    let mut broker = TestBroker::start().await;
    let client = broker.publisher().await;
    declare_both(&client).await;
    for (target, place) in [(("", "q"), queue("q")), (("x", ""), exchange("x"))] {
        for (ms, body) in [(FAR, "c"), (FAR - 2_000, "a"), (FAR - 1_000, "b")] {
            publish_with(&client, target, delay(ms), body).await;
        }
        let inside = broker.server().broker();
        let list = |from, limit| {
            let found = inside.delayed("/", &place, from, limit).unwrap();
            let body = |id: DelayId, record: &leveret::broker::delay::Record| {
                (id, String::from_utf8_lossy(record.message().unwrap().body.as_slice()).into_owned())
            };
            found.iter().map(|delayed| body(delayed.id, &delayed.record)).collect::<Vec<_>>()
        };
        let all = list(DelayId::START, 10);
        assert_eq!(all.iter().map(|(_, body)| body.as_str()).collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(list(all[1].0, 1), all[1..2]);
        let round = inside.cancel_delayed("/", &place, all[1].0).unwrap();
        inside.durable(round).await.unwrap();
        assert_eq!(inside.cancel_delayed("/", &place, all[1].0), None);
        assert_eq!(list(DelayId::START, 10).len(), 2);
        assert!(inside.delayed("/", &queue("plain"), DelayId::START, 1).is_none());
        assert!(inside.delayed("nowhere", &place, DelayId::START, 1).is_none());
    }
    broker.restart().await;
    assert_eq!((count(&broker, &queue("q")), count(&broker, &exchange("x"))), (2, 2));
    broker.stop().await;
}

#[tokio::test]
async fn what_waits_goes_with_its_queue_or_exchange_for_good() {
    let mut broker = TestBroker::start().await;
    let client = broker.publisher().await;
    declare_both(&client).await;
    for target in [("", "q"), ("x", "")] {
        publish_with(&client, target, delay(FAR), "m").await;
    }
    client.queue_delete("q".into(), Default::default()).await.unwrap();
    client.exchange_delete("x".into(), Default::default()).await.unwrap();
    declare_both(&client).await;
    assert_eq!((count(&broker, &queue("q")), count(&broker, &exchange("x"))), (0, 0));
    broker.restart().await;
    assert_eq!((count(&broker, &queue("q")), count(&broker, &exchange("x"))), (0, 0));
    broker.stop().await;
}

#[tokio::test]
async fn transient_owners_begin_anew_after_a_restart() {
    let mut broker = TestBroker::start().await;
    for _ in 0..2 {
        let client = broker.publisher().await;
        client.queue_declare("q".into(), QueueDeclareOptions::default(), delayed_queue()).await.unwrap();
        let kind = lapin::ExchangeKind::Custom("x-delayed-message".into());
        client.exchange_declare("x".into(), kind, ExchangeDeclareOptions::default(), fanout()).await.unwrap();
        assert_eq!((count(&broker, &queue("q")), count(&broker, &exchange("x"))), (0, 0));
        for target in [("", "q"), ("x", "")] {
            publish_with(&client, target, delay(FAR), "m").await;
        }
        broker.restart().await;
        assert!(!broker.has_queue("q"));
    }
    broker.stop().await;
}

#[tokio::test]
async fn a_delayed_queue_may_drop_duplicates_too() {
    let mut broker = TestBroker::start().await;
    let client = broker.publisher().await;
    let mut arguments = delayed_queue();
    arguments.insert("x-message-deduplication".into(), AMQPValue::Boolean(true));
    declare_with(&client, "q", arguments).await;
    let properties = || headed([("x-delay", AMQPValue::LongInt(1_000)), ("x-deduplication-header", text("a"))]);
    publish_with(&client, ("", "q"), properties(), "1").await;
    publish_with(&client, ("", "q"), properties(), "2").await;
    assert_eq!(broker.counts("q").delayed, 1);
    broker.restart().await;
    let client = broker.publisher().await;
    publish_with(&client, ("", "q"), properties(), "3").await;
    assert_eq!(take(&client, "q").await.data, b"1");
    let counts = broker.counts("q");
    assert_eq!((counts.ready, counts.delayed), (0, 0));
    broker.stop().await;
}

#[tokio::test]
async fn thousands_of_delayed_messages_come_once_each() {
    let broker = TestBroker::start().await;
    let client = broker.client().await;
    declare_both(&client).await;
    const MESSAGES: i32 = 3_000;
    for number in 0..MESSAGES {
        let delay = delay(1 + number % 500);
        client
            .basic_publish("x".into(), "".into(), Default::default(), number.to_string().as_bytes(), delay)
            .await
            .unwrap();
    }
    eventually("all came", async || (broker.counts("plain").ready == MESSAGES as u64).then_some(())).await;
    assert_eq!(count(&broker, &exchange("x")), 0);
    let mut bodies: Vec<i32> = drain(&client, "plain").await.iter().map(|body| body.parse().unwrap()).collect();
    bodies.sort_unstable();
    assert!(bodies.into_iter().eq(0..MESSAGES));
    broker.stop().await;
}
