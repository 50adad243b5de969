//! Streams as clients see them, beyond what RabbitMQ's own behaviour covers in the interoperability tests: restarts, kept
//! offsets, filters of LavinMQ's, policies. The engine is tested in `src/broker/stream`.

use amq_protocol::{
    protocol::{AMQPClass, BasicProperties, basic},
    types::{AMQPValue, FieldTable},
};
use leveret::broker::policy::{Policy, PolicyKind};
use serde_json::json;

use crate::support::{
    Peer, TestBroker,
    peer::{Declare, Delivered},
    table, text,
};

fn stream(name: &str, arguments: FieldTable) -> Declare {
    let mut arguments = arguments;
    arguments.insert("x-queue-type".into(), text("stream"));
    Declare { queue: name.into(), durable: true, arguments, ..Default::default() }
}

/// A broker with a stream `s` and the bodies `0..count` in it, transient and confirmed.
async fn filled(count: u64) -> (TestBroker, Peer) {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare(1, stream("s", FieldTable::default())).await;
    peer.select_confirms(1).await;
    for number in 0..count {
        peer.publish(1, "s", number.to_string()).await;
    }
    peer.confirms(1, 1..=count).await;
    (broker, peer)
}

fn consume<'a>(tag: &str, arguments: impl IntoIterator<Item = (&'a str, AMQPValue)>) -> basic::Consume {
    let (queue, consumer_tag, arguments) = ("s".into(), tag.into(), table(arguments));
    basic::Consume { queue, consumer_tag, arguments, ..Default::default() }
}

fn from_first() -> (&'static str, AMQPValue) {
    ("x-stream-offset", text("first"))
}

async fn read<'a>(
    broker: &TestBroker,
    tag: &str,
    prefetch: u16,
    arguments: impl IntoIterator<Item = (&'a str, AMQPValue)>,
) -> Peer {
    let mut peer = broker.peer().await;
    peer.qos(1, prefetch, false).await;
    peer.consume_as(1, consume(tag, arguments)).await;
    peer
}

async fn deliveries(peer: &mut Peer, count: usize) -> Vec<Delivered> {
    let mut delivered = Vec::new();
    while delivered.len() < count {
        delivered.push(peer.delivery(1).await);
    }
    delivered
}

fn offsets(delivered: &[Delivered]) -> Vec<i64> {
    let offset =
        |delivered: &Delivered| match delivered.properties.headers().as_ref().unwrap().inner().get("x-stream-offset") {
            Some(AMQPValue::LongLongInt(offset)) => *offset,
            other => panic!("no offset: {other:?}"),
        };
    delivered.iter().map(offset).collect()
}

fn bodies(delivered: &[Delivered]) -> Vec<&str> {
    delivered.iter().map(Delivered::text).collect()
}

#[tokio::test]
async fn a_stream_survives_a_restart_and_its_offsets_go_on() {
    let (mut broker, _) = filled(20).await;
    broker.restart().await;
    assert_eq!(broker.counts("s").ready, 20);
    let mut reader = read(&broker, "r", 100, [from_first()]).await;
    let mut peer = broker.peer().await;
    peer.publish(1, "s", "new").await;
    let delivered = deliveries(&mut reader, 21).await;
    assert_eq!(offsets(&delivered), Vec::from_iter(0..21));
    assert_eq!((delivered[19].text(), delivered[20].text()), ("19", "new"));
    assert!(delivered.iter().all(|delivered| !delivered.redelivered));
    broker.stop().await;
}

#[tokio::test]
async fn a_tracked_consumer_goes_on_where_it_was_before_the_restart() {
    let tracked = || ("x-stream-automatic-offset-tracking", AMQPValue::Boolean(true));
    let (mut broker, _) = filled(10).await;
    let mut reader = read(&broker, "mine", 4, [tracked(), from_first()]).await;
    let delivered = deliveries(&mut reader, 4).await;
    reader.ack(1, delivered[2].tag, true).await;
    deliveries(&mut reader, 3).await;
    reader.close_channel(1).await;
    broker.restart().await;
    let mut reader = read(&broker, "mine", 100, [tracked(), from_first()]).await;
    assert_eq!(offsets(&deliveries(&mut reader, 7).await), Vec::from_iter(3..10));
    let mut other = read(&broker, "other", 2, [tracked(), from_first()]).await;
    assert_eq!(offsets(&deliveries(&mut other, 2).await), [0, 1]);
    broker.stop().await;
}

#[tokio::test]
async fn headers_can_be_filtered_by_their_values() {
    let (broker, mut peer) = filled(3).await;
    for (body, colour, size) in [("a", "red", 1), ("b", "blue", 1), ("c", "red", 2), ("d", "blue", 2)] {
        let headers = table([("colour", text(colour)), ("size", AMQPValue::LongInt(size))]);
        peer.publish_to(1, "", "s", &BasicProperties::default().with_headers(headers), body).await;
    }
    peer.confirms(1, 4..=7).await;
    let wanted = |size: &str| {
        let pairs = table([("colour", text("red")), ("size", text(size))]);
        ("x-stream-filter", AMQPValue::FieldTable(pairs))
    };
    let mut all = read(&broker, "r", 10, [from_first(), wanted("2")]).await;
    assert_eq!(bodies(&deliveries(&mut all, 1).await), ["c"]);
    let any = ("x-filter-match-type", text("any"));
    let mut any = read(&broker, "r", 10, [from_first(), wanted("2"), any]).await;
    let delivered = deliveries(&mut any, 3).await;
    assert_eq!((bodies(&delivered), offsets(&delivered)), (vec!["a", "c", "d"], vec![3, 5, 6]));
    let wrong = consume("w", [("x-stream-filter", text("v")), ("x-filter-match-type", text("some"))]);
    all.send(1, AMQPClass::Basic(basic::AMQPMethod::Consume(wrong))).await;
    all.expect_channel_error(1, 406, "PRECONDITION_FAILED - x-filter-match-type must be 'any' or 'all'").await;
    broker.stop().await;
}

#[tokio::test]
async fn a_policy_shortens_a_stream_at_once() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    let small = table([("x-stream-max-segment-size-bytes", AMQPValue::LongInt(1_000))]);
    peer.declare(1, stream("s", small)).await;
    peer.select_confirms(1).await;
    for number in 0..100 {
        peer.publish(1, "s", format!("{number:0100}")).await;
    }
    peer.confirms(1, 1..=100).await;
    assert_eq!(broker.counts("s").ready, 100);
    let definition = json!({"pattern": "^s$", "definition": {"max-length-bytes": 3_000}});
    let policy = Policy::from_json(PolicyKind::User, "short", &definition).unwrap();
    broker.server().broker().set_policy("/", policy).unwrap();
    let left = broker.counts("s").ready;
    assert!((1..50).contains(&left), "{left} are left");
    let mut reader = read(&broker, "r", 200, [("x-stream-offset", AMQPValue::LongInt(0))]).await;
    let first = 100 - i64::try_from(left).unwrap();
    assert_eq!(offsets(&deliveries(&mut reader, left as usize).await), Vec::from_iter(first..100));
    broker.stop().await;
}
