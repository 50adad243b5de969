//! The event exchange and the firehose, where it takes more than a client: policies, alarms, restarts, and tracing
//! switched while messages flow. What the headers hold is tested in `interop/test_event_exchange.py` and
//! `interop/test_trace.py`.

use futures_lite::StreamExt;
use lapin::{message::BasicGetMessage, options::*, types::FieldTable};
use leveret::broker::{
    EVENT_EXCHANGE, TRACE_EXCHANGE,
    policy::{Policy, PolicyKind},
};
use serde_json::json;

use crate::support::{
    TestBroker, broker::Client, declare_durable, depth, eventually, persistent, publish_confirmed, table, text, within,
};

/// A durable queue that gets what an exchange of the broker's says.
async fn listen(client: &Client, queue: &str, exchange: &str) {
    declare_durable(client, queue).await;
    client
        .queue_bind(queue.into(), exchange.into(), "#".into(), QueueBindOptions::default(), FieldTable::default())
        .await
        .unwrap();
}

async fn take(client: &Client, queue: &str) -> Option<BasicGetMessage> {
    client.basic_get(queue.into(), BasicGetOptions { no_ack: true }).await.unwrap()
}

fn header(message: &BasicGetMessage, name: &str) -> Option<String> {
    let value = message.properties.headers().as_ref()?.inner().get(name)?;
    Some(value.as_long_string()?.to_string())
}

/// Waits for a message with this key and header, and takes what comes before.
async fn find(client: &Client, queue: &str, key: &str, name: &str, value: &str) -> BasicGetMessage {
    eventually(key, async || {
        while let Some(message) = take(client, queue).await {
            if message.routing_key.as_str() == key && header(&message, name).as_deref() == Some(value) {
                return Some(message);
            }
        }
        None
    })
    .await
}

/// The keys of all messages in a queue.
async fn keys(client: &Client, queue: &str) -> Vec<String> {
    let mut keys = Vec::new();
    while let Some(message) = take(client, queue).await {
        keys.push(message.routing_key.to_string());
    }
    keys
}

#[tokio::test]
async fn policies_are_events_of_theirs_and_of_their_queues() {
    let broker = TestBroker::start().await;
    let client = broker.client().await;
    listen(&client, "events", EVENT_EXCHANGE).await;
    declare_durable(&client, "bounded").await;
    let policy = json!({"pattern": "^bounded$", "definition": {"max-length": 3}, "priority": 7});
    let policy = Policy::from_json(PolicyKind::User, "p", &policy).unwrap();
    broker.server().broker().set_policy("/", policy).unwrap();
    let updated = find(&client, "events", "queue.policy.updated", "name", "bounded").await;
    assert_eq!(header(&updated, "pattern").as_deref(), Some("^bounded$"));
    let set = find(&client, "events", "policy.set", "name", "p").await;
    assert_eq!(header(&set, "apply-to").as_deref(), Some("all"));
    assert_eq!(header(&set, "user_who_performed_action").as_deref(), Some("rmq-internal"));
    broker.server().broker().clear_policy("/", PolicyKind::User, "p").unwrap();
    find(&client, "events", "queue.policy.cleared", "name", "bounded").await;
    find(&client, "events", "policy.cleared", "name", "p").await;
    broker.stop().await;
}

#[tokio::test]
async fn what_the_broker_does_itself_has_no_user() {
    let broker = TestBroker::start().await;
    let (client, other) = (broker.client().await, broker.client().await);
    listen(&client, "events", EVENT_EXCHANGE).await;
    for name in ["theirs", "own"] {
        let exclusive = QueueDeclareOptions { exclusive: true, ..Default::default() };
        other.queue_declare(name.into(), exclusive, FieldTable::default()).await.unwrap();
    }
    other.queue_delete("own".into(), QueueDeleteOptions::default()).await.unwrap();
    other.close().await;
    for (queue, user) in [("own", "guest"), ("theirs", "rmq-internal")] {
        let deleted = find(&client, "events", "queue.deleted", "name", queue).await;
        assert_eq!(header(&deleted, "user_who_performed_action").as_deref(), Some(user));
    }
    broker.stop().await;
}

#[tokio::test]
async fn a_durable_listener_hears_of_the_stop_and_of_the_start() {
    let mut broker = TestBroker::start().await;
    let client = broker.client().await;
    listen(&client, "events", EVENT_EXCHANGE).await;
    broker.shut_down_politely().await;
    broker.restart_with(|config| config.disk_free_limit_bytes = u64::MAX).await;
    let client = broker.client().await;
    let alarm = eventually("alarm.set", async || {
        let mut closed = false;
        while let Some(message) = take(&client, "events").await {
            closed |= message.routing_key.as_str() == "connection.closed";
            if message.routing_key.as_str() == "alarm.set" {
                return Some((message, closed));
            }
        }
        None
    });
    let (alarm, closed) = alarm.await;
    assert!(closed, "the connection was closed before the alarm was set");
    assert_eq!(header(&alarm, "source").as_deref(), Some("disk"));
    broker.stop().await;
}

#[tokio::test]
async fn only_the_configured_vhost_has_the_event_exchange() {
    let broker = TestBroker::with(|config| {
        config.vhosts = vec!["/".into(), "audit".into()];
        config.event_vhost = "audit".into();
    })
    .await;
    let has = |vhost| broker.server().broker().vhost(vhost).unwrap().exchange(EVENT_EXCHANGE).is_some();
    assert_eq!((has("/"), has("audit")), (false, true));
    broker.stop().await;
}

#[tokio::test]
async fn tracing_is_switched_while_messages_flow() {
    let broker = TestBroker::start().await;
    let client = broker.publisher().await;
    listen(&client, "traces", TRACE_EXCHANGE).await;
    declare_durable(&client, "q").await;
    publish_confirmed(&client, "q", b"before").await;
    assert!(broker.server().broker().set_tracing("/", true));
    assert!(!broker.server().broker().set_tracing("missing", true));
    // More than one, so that they come in one read: such a run is not traced as a whole.
    let mut sent = Vec::new();
    for _ in 0..50 {
        let publish = BasicPublishOptions::default();
        sent.push(client.basic_publish("".into(), "q".into(), publish, b"traced", persistent()).await.unwrap());
    }
    for confirm in sent {
        within("confirm", confirm).await.unwrap();
    }
    assert_eq!(depth(&client, "traces").await.0, 50);
    assert_eq!(keys(&client, "traces").await, vec!["publish."; 50]);
    assert_eq!(keys(&client, "q").await, vec!["q"; 51]);
    assert_eq!(keys(&client, "traces").await, vec!["deliver.q"; 51]);
    assert!(broker.server().broker().set_tracing("/", false));
    publish_confirmed(&client, "q", b"after").await;
    assert_eq!(keys(&client, "q").await, ["q"]);
    assert_eq!(keys(&client, "traces").await, Vec::<String>::new());
    broker.stop().await;
}

#[tokio::test]
async fn deliveries_of_every_type_of_queue_are_traced() {
    let broker = TestBroker::with(|config| config.traced_vhosts = vec!["/".into()]).await;
    let client = broker.publisher().await;
    client.basic_qos(10, BasicQosOptions::default()).await.unwrap();
    listen(&client, "traces", TRACE_EXCHANGE).await;
    for kind in ["classic", "quorum", "stream"] {
        let durable = QueueDeclareOptions { durable: true, ..Default::default() };
        client.queue_declare(kind.into(), durable, table([("x-queue-type", text(kind))])).await.unwrap();
        let mut consumer = client
            .basic_consume(kind.into(), kind.into(), BasicConsumeOptions::default(), FieldTable::default())
            .await
            .unwrap();
        publish_confirmed(&client, kind, b"m").await;
        let delivery = within("delivery", consumer.next()).await.unwrap().unwrap();
        delivery.ack(BasicAckOptions::default()).await.unwrap();
        let trace = find(&client, "traces", &format!("deliver.{kind}"), "exchange_name", "").await;
        assert_eq!(trace.data, b"m");
    }
    broker.stop().await;
}

#[tokio::test]
async fn a_queue_of_traces_and_other_messages_ends_up_with_each_once() {
    let broker = TestBroker::with(|config| config.traced_vhosts = vec!["/".into()]).await;
    let (publisher, reader) = (broker.publisher().await, broker.client().await);
    listen(&publisher, "mixed", TRACE_EXCHANGE).await;
    for _ in 0..20 {
        publish_confirmed(&publisher, "mixed", b"m").await;
    }
    let no_ack = BasicConsumeOptions { no_ack: true, ..Default::default() };
    let mut consumer = reader.basic_consume("mixed".into(), "c".into(), no_ack, FieldTable::default()).await.unwrap();
    // Each message, the trace of its publish, and the trace of its delivery.
    let mut counts = std::collections::BTreeMap::<String, u32>::new();
    for _ in 0..60 {
        let delivery = within("delivery", consumer.next()).await.unwrap().unwrap();
        *counts.entry(delivery.routing_key.to_string()).or_default() += 1;
    }
    let expected = [("deliver.mixed", 20), ("mixed", 20), ("publish.", 20)];
    assert_eq!(counts.into_iter().collect::<Vec<_>>(), expected.map(|(key, count)| (key.to_owned(), count)));
    assert_eq!(depth(&publisher, "mixed").await.0, 0);
    broker.stop().await;
}
