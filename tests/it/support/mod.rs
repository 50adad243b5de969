//! What the tests share: a broker of their own, a stock client, a client that speaks frames, and the real program.

pub mod broker;
pub mod frames;
pub mod login;
pub mod peer;
pub mod program;

use std::{future::Future, time::Duration};

use amq_protocol::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, message::BasicGetMessage, options::*};

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
