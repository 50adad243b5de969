//! What the tests share: a broker of their own, a stock client, a client that speaks frames, and the real program.

pub mod broker;
pub mod frames;
pub mod login;
pub mod peer;
pub mod program;

use std::{future::Future, time::Duration};

use amq_protocol::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, ExchangeKind, message::BasicGetMessage, options::*};

pub use broker::TestBroker;
pub use login::Login;
pub use peer::Peer;

/// How long anything that must happen may take.
pub const LIMIT: Duration = Duration::from_secs(10);

/// Polls until `ready` answers something; fails the test after [`LIMIT`].
pub async fn eventually<T>(what: &str, mut ready: impl AsyncFnMut() -> Option<T>) -> T {
    let polled = tokio::time::timeout(LIMIT, async {
        loop {
            if let Some(value) = ready().await {
                return value;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    polled.await.unwrap_or_else(|_| panic!("not within {LIMIT:?}: {what}"))
}

/// Waits for `future`, at most [`LIMIT`].
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LIMIT, future).await.unwrap_or_else(|_| panic!("not within {LIMIT:?}: {what}"))
}

pub fn persistent() -> BasicProperties {
    BasicProperties::default().with_delivery_mode(2)
}

/// A table of arguments.
pub fn table<'a>(entries: impl IntoIterator<Item = (&'a str, AMQPValue)>) -> FieldTable {
    let mut table = FieldTable::default();
    for (key, value) in entries {
        table.insert(key.into(), value);
    }
    table
}

pub fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

/// Declares a durable queue.
pub async fn declare_durable(channel: &Channel, queue: &str) {
    channel
        .queue_declare(queue.into(), QueueDeclareOptions { durable: true, ..Default::default() }, FieldTable::default())
        .await
        .unwrap();
}

/// Publishes to a queue through the default exchange; returns when it is confirmed.
pub async fn publish_confirmed(channel: &Channel, queue: &str, body: &[u8]) {
    let sent = channel
        .basic_publish("".into(), queue.into(), BasicPublishOptions::default(), body, persistent())
        .await
        .unwrap();
    let confirmation = within("confirm", sent).await.unwrap();
    assert!(matches!(confirmation, Confirmation::Ack(None)), "{confirmation:?}");
}

/// Declares a durable queue with arguments.
pub async fn declare_with(channel: &Channel, queue: &str, arguments: FieldTable) {
    let options = QueueDeclareOptions { durable: true, ..Default::default() };
    channel.queue_declare(queue.into(), options, arguments).await.unwrap();
}

/// Declares a durable exchange with arguments.
pub async fn declare_exchange(channel: &Channel, exchange: &str, kind: &str, arguments: FieldTable) {
    let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
    let kind = ExchangeKind::Custom(kind.into());
    channel.exchange_declare(exchange.into(), kind, options, arguments).await.unwrap();
}

/// Binds a queue to an exchange.
pub async fn bind(channel: &Channel, queue: &str, exchange: &str, key: &str) {
    let (options, arguments) = Default::default();
    channel.queue_bind(queue.into(), exchange.into(), key.into(), options, arguments).await.unwrap();
}

/// Publishes with confirms; whether the broker confirmed it without returning it, returned it, or nacked it.
pub async fn publish_with(
    channel: &Channel,
    (exchange, key): (&str, &str),
    properties: BasicProperties,
    body: &str,
) -> Confirmation {
    let options = BasicPublishOptions { mandatory: true, ..Default::default() };
    let sent = channel.basic_publish(exchange.into(), key.into(), options, body.as_bytes(), properties).await.unwrap();
    within("confirm", sent).await.unwrap()
}

/// A persistent message's properties with headers.
pub fn headed<'a>(headers: impl IntoIterator<Item = (&'a str, AMQPValue)>) -> BasicProperties {
    persistent().with_headers(table(headers))
}

/// Waits for the message at the head of a queue, and takes it.
pub async fn take(channel: &Channel, queue: &str) -> BasicGetMessage {
    eventually("a message", async || channel.basic_get(queue.into(), BasicGetOptions { no_ack: true }).await.unwrap())
        .await
}

/// The bodies in a queue, taken out.
pub async fn drain(channel: &Channel, queue: &str) -> Vec<String> {
    let mut bodies = Vec::new();
    while let Some(message) = channel.basic_get(queue.into(), BasicGetOptions { no_ack: true }).await.unwrap() {
        bodies.push(String::from_utf8_lossy(&message.data).into_owned());
    }
    bodies
}

/// The message at the head of a queue, to be acked by the caller.
pub async fn get(channel: &Channel, queue: &str) -> BasicGetMessage {
    let message = channel.basic_get(queue.into(), BasicGetOptions::default()).await.unwrap();
    message.unwrap_or_else(|| panic!("queue {queue} is empty"))
}

/// Ready messages and consumers, by passive declaration.
pub async fn depth(channel: &Channel, queue: &str) -> (u32, u32) {
    let passive = QueueDeclareOptions { passive: true, ..Default::default() };
    let queue = channel.queue_declare(queue.into(), passive, FieldTable::default()).await.unwrap();
    (queue.message_count(), queue.consumer_count())
}

/// The reply code a stock client was told.
pub fn code<T>(result: Result<T, lapin::Error>) -> u16 {
    match result {
        Ok(_) => panic!("expected a refusal"),
        Err(error) => match error.kind() {
            lapin::ErrorKind::ProtocolError(error) => error.get_id(),
            other => panic!("expected a refusal, got {other:?}"),
        },
    }
}
