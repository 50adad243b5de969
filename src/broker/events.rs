//! The event exchange: what happens in the broker, told as messages of the topic exchange `amq.rabbitmq.event`, as
//! RabbitMQ's plugin `rabbitmq_event_exchange` does.
//!
//! An event has an empty body and its properties as headers. It is noted where it happens, which may be under any lock,
//! and published later by [`Broker::publish_events`], with nothing locked. While nothing is bound to the exchange,
//! noting costs one load.
//!
//! # Locks
//! A leaf lock around the events that wait.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use amq_protocol::{
    frame::WriteContext,
    types::{AMQPValue, FieldTable, ShortString, generation::gen_field_table},
};
use dashmap::DashMap;
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::Notify;

use super::{
    Broker,
    message::{Body, Message, encode_names},
    port::{Effects, Port},
    queue::ConnectionId,
};
use crate::{
    clock,
    model::{Name, arguments::type_name, erlang},
};

/// The exchange that tells what happens in the broker.
pub const EVENT_EXCHANGE: &str = "amq.rabbitmq.event";
/// Who acts where no client does, in RabbitMQ's words.
pub const INTERNAL_USER: &str = "rmq-internal";

/// Events that may wait to be published; what comes on top is dropped, with a warning in the log.
const MAX_WAITING: usize = 1 << 16;
/// Events published before others get a chance to run.
const AT_ONCE: usize = 256;
/// Headers, delivery mode and timestamp.
const PROPERTY_FLAGS: u16 = 1 << 13 | 1 << 12 | 1 << 6;

/// The properties of an event, which become the headers of its message. Text is a long string, a number a 64-bit integer.
#[derive(Debug, Default)]
pub struct EventProperties(BTreeMap<ShortString, AMQPValue>);

impl EventProperties {
    fn with(mut self, name: &'static str, value: AMQPValue) -> Self {
        self.0.insert(name.into(), value);
        self
    }

    /// Adds a text.
    #[must_use]
    pub fn text(self, name: &'static str, text: impl Into<String>) -> Self {
        self.with(name, AMQPValue::LongString(text.into().into()))
    }

    /// Adds a whole number.
    #[must_use]
    pub fn number(self, name: &'static str, number: i64) -> Self {
        self.with(name, AMQPValue::LongLongInt(number))
    }

    /// Adds a truth.
    #[must_use]
    pub fn flag(self, name: &'static str, flag: bool) -> Self {
        self.with(name, AMQPValue::Boolean(flag))
    }

    /// Adds a list of texts.
    #[must_use]
    pub fn texts<T: Into<String>>(self, name: &'static str, texts: impl IntoIterator<Item = T>) -> Self {
        let texts: Vec<_> = texts.into_iter().map(|text| AMQPValue::LongString(text.into().into())).collect();
        self.with(name, AMQPValue::FieldArray(texts.into()))
    }

    /// Adds a text as Erlang's list of characters.
    #[must_use]
    pub fn characters(self, name: &'static str, text: &str) -> Self {
        let numbers: Vec<_> = text.chars().map(|c| AMQPValue::LongLongInt(i64::from(u32::from(c)))).collect();
        self.with(name, AMQPValue::FieldArray(numbers.into()))
    }

    /// Adds a table of arguments: a list with a text for each, as Erlang shows it.
    #[must_use]
    pub fn arguments(self, name: &'static str, arguments: &FieldTable) -> Self {
        let shown = arguments.inner().iter().map(|(key, value)| {
            format!("{{{},{},{}}}", erlang::binary(key.as_str().as_bytes()), type_name(value), erlang::term(value))
        });
        self.texts(name, shown)
    }

    /// Adds a JSON object as a table, such as the definition of a policy.
    #[must_use]
    pub fn json(self, name: &'static str, value: &Value) -> Self {
        self.with(name, amqp_value(value))
    }
}

/// A JSON value as RabbitMQ puts it into a table.
fn amqp_value(value: &Value) -> AMQPValue {
    match value {
        Value::Null => AMQPValue::Void,
        Value::Bool(truth) => AMQPValue::Boolean(*truth),
        Value::Number(number) => match number.as_i64() {
            Some(number) => AMQPValue::LongLongInt(number),
            None => AMQPValue::Double(number.as_f64().unwrap_or_default()),
        },
        Value::String(text) => AMQPValue::LongString(text.as_str().into()),
        Value::Array(items) => AMQPValue::FieldArray(items.iter().map(amqp_value).collect::<Vec<_>>().into()),
        Value::Object(entries) => {
            // A key that is no short string cannot be in a table.
            let entry =
                |(key, value): (&String, &Value)| Some((ShortString::try_new(key.as_str()).ok()?, amqp_value(value)));
            AMQPValue::FieldTable(entries.iter().filter_map(entry).collect::<BTreeMap<_, _>>().into())
        }
    }
}

struct Event {
    key: &'static str,
    at_unix_ms: u64,
    properties: EventProperties,
}

impl Event {
    /// The message's properties, as the wire has them.
    fn encode(self) -> Vec<u8> {
        let in_ms = i64::try_from(self.at_unix_ms).unwrap_or(i64::MAX);
        let headers: FieldTable = self.properties.number("timestamp_in_ms", in_ms).0.into();
        let mut out = PROPERTY_FLAGS.to_be_bytes().to_vec();
        match gen_field_table(&headers)(WriteContext::from(Vec::new())) {
            Ok(written) => out.extend_from_slice(&written.into_inner().0),
            Err(_) => out.extend_from_slice(&[0; 4]), // writing to memory cannot fail
        }
        out.push(2);
        out.extend_from_slice(&(self.at_unix_ms / 1000).to_be_bytes());
        out
    }
}

/// See the module.
pub struct Events {
    node: Name,
    vhost: Name,
    bound: AtomicBool,
    waiting: Mutex<VecDeque<Event>>,
    overflowing: AtomicBool,
    news: Notify,
    /// Connections with deliveries to be traced, from threads that must not publish.
    untraced: Mutex<Vec<Arc<dyn Port>>>,
    /// Whose connection it is.
    users: DashMap<ConnectionId, Name>,
}

impl Default for Events {
    fn default() -> Self {
        Self::new("leveret@localhost".into(), "/".into())
    }
}

impl Events {
    /// The events of a node, published in `vhost` if there is one of that name.
    pub fn new(node: Name, vhost: Name) -> Self {
        Events {
            node,
            vhost,
            bound: AtomicBool::new(false),
            waiting: Mutex::default(),
            overflowing: AtomicBool::new(false),
            news: Notify::new(),
            untraced: Mutex::default(),
            users: DashMap::new(),
        }
    }

    /// The node's name.
    pub fn node(&self) -> &Name {
        &self.node
    }

    /// The vhost whose event exchange it is.
    pub fn vhost(&self) -> &Name {
        &self.vhost
    }

    /// Says whether anything is bound to the event exchange.
    pub(super) fn set_bound(&self, bound: bool) {
        self.bound.store(bound, Ordering::Relaxed);
    }

    /// Whether anything is bound to the event exchange.
    #[inline]
    pub fn has_listeners(&self) -> bool {
        self.bound.load(Ordering::Relaxed)
    }

    /// Notes an event, to be published soon; its properties are made only if somebody listens. May be called under any
    /// lock.
    #[inline]
    pub fn note(&self, key: &'static str, properties: impl FnOnce() -> EventProperties) {
        if self.has_listeners() {
            self.push(Event { key, at_unix_ms: clock::now_unix_ms(), properties: properties() });
        }
    }

    #[cold]
    fn push(&self, event: Event) {
        let mut waiting = self.waiting.lock();
        let is_full = waiting.len() >= MAX_WAITING;
        if !is_full {
            waiting.push_back(event);
        }
        drop(waiting);
        if !self.overflowing.swap(is_full, Ordering::Relaxed) && is_full {
            tracing::warn!(waiting = MAX_WAITING, "events happen faster than they can be published; some are dropped");
        }
        self.news.notify_one();
    }

    fn take(&self) -> Vec<Event> {
        let mut waiting = self.waiting.lock();
        let count = waiting.len().min(AT_ONCE);
        waiting.drain(..count).collect()
    }

    /// Has the traces of a connection's deliveries published soon. May be called under any lock.
    pub fn hand_over_traces(&self, port: Arc<dyn Port>) {
        self.untraced.lock().push(port);
        self.news.notify_one();
    }

    /// Notes whose connection it is, until [`Events::forget_user`].
    pub fn remember_user(&self, connection: ConnectionId, user: &Name) {
        self.users.insert(connection, user.clone());
    }

    /// Ends what [`Events::remember_user`] began.
    pub fn forget_user(&self, connection: ConnectionId) {
        self.users.remove(&connection);
    }

    /// Who acts: the user of the connection, or the broker itself.
    pub fn actor(&self, connection: Option<ConnectionId>) -> String {
        let user = connection.and_then(|connection| self.users.get(&connection).map(|user| user.to_string()));
        user.unwrap_or_else(|| INTERNAL_USER.to_owned())
    }

    /// A connection's name among the processes, in the form of RabbitMQ's.
    pub fn connection_pid(&self, connection: ConnectionId) -> String {
        self.channel_pid(connection, 0)
    }

    /// A channel's name among the processes, in the form of RabbitMQ's.
    pub fn channel_pid(&self, connection: ConnectionId, channel: u16) -> String {
        format!("<{}.1.{}.{channel}>", self.node, connection.0)
    }
}

impl Broker {
    /// The broker's events.
    pub fn events(&self) -> &Events {
        &self.environment.events
    }

    /// Publishes the events noted so far, and traces that were handed over, at most some hundred of them; answers whether more wait. Nothing is locked by
    /// the caller.
    pub fn publish_events(&self) -> bool {
        let events = self.events().take();
        let more = events.len() == AT_ONCE;
        let mut effects = Effects::default();
        effects.wakes.append(&mut self.events().untraced.lock());
        let vhost = self.vhost(&self.events().vhost);
        for event in events {
            let Some(vhost) = &vhost else { break };
            let names = encode_names(EVENT_EXCHANGE.as_bytes(), event.key.as_bytes());
            let properties = event.encode();
            let message = Message {
                names: &names,
                properties: &properties,
                body: Body::Inline(&[]),
                persistent: true,
                extension: &[],
            };
            vhost.publish_to_system_exchange(EVENT_EXCHANGE, &message, &mut effects);
        }
        self.carry_out(&mut effects);
        more
    }

    /// Waits until an event was noted.
    pub async fn events_noted(&self) {
        self.events().news.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::properties::{Properties, raw_entry};

    #[test]
    fn nothing_is_noted_or_even_made_while_nobody_listens() {
        let events = Events::default();
        events.note("queue.created", || unreachable!("nobody listens"));
        events.set_bound(true);
        events.note("queue.created", EventProperties::default);
        assert_eq!(events.take().len(), 1);
        assert!(events.take().is_empty());
    }

    #[test]
    fn what_does_not_fit_is_dropped_and_the_rest_stays_in_order() {
        let events = Events::default();
        events.set_bound(true);
        for _ in 0..MAX_WAITING {
            events.note("first", EventProperties::default);
        }
        events.note("too many", EventProperties::default);
        assert_eq!(events.take().len(), AT_ONCE);
        events.note("last", EventProperties::default);
        let mut taken = Vec::new();
        loop {
            let batch = events.take();
            if batch.is_empty() {
                break;
            }
            taken.extend(batch.into_iter().map(|event| event.key));
        }
        assert_eq!(taken.len(), MAX_WAITING - AT_ONCE + 1);
        assert_eq!(taken.last(), Some(&"last"));
        assert!(!taken.contains(&"too many"));
    }

    #[test]
    fn an_event_is_persistent_and_has_its_time_twice() {
        let properties = EventProperties::default().text("name", "q").number("count", 7).flag("durable", true);
        let raw = Event { key: "queue.created", at_unix_ms: 12_345, properties }.encode();
        let view = Properties::parse(&raw).unwrap();
        assert!(view.is_persistent());
        assert_eq!(view.timestamp(), Some(12));
        let table = view.raw_headers().unwrap();
        let tag = |name: &str| raw_entry(table, name.as_bytes()).map(|entry| entry.tag);
        assert_eq!((tag("name"), tag("count"), tag("durable")), (Some(b'S'), Some(b'l'), Some(b't')));
        assert_eq!(raw_entry(table, b"timestamp_in_ms").and_then(|entry| entry.integer()), Some(12_345));
    }

    #[test]
    fn arguments_look_like_erlangs() {
        let mut arguments = FieldTable::default();
        arguments.insert("x-max-length".into(), AMQPValue::LongInt(5));
        arguments.insert("a".into(), AMQPValue::LongString("b".into()));
        let EventProperties(shown) = EventProperties::default().arguments("arguments", &arguments);
        let text = |text: &str| AMQPValue::LongString(text.into());
        let expected = vec![text("{<<\"a\">>,longstr,<<\"b\">>}"), text("{<<\"x-max-length\">>,signedint,5}")];
        assert_eq!(shown.get("arguments"), Some(&AMQPValue::FieldArray(expected.into())));
    }

    #[test]
    fn connections_and_their_users_have_names() {
        let events = Events::new("leveret@here".into(), "/".into());
        let connection = ConnectionId(7);
        assert_eq!(events.actor(Some(connection)), INTERNAL_USER);
        events.remember_user(connection, &"anna".into());
        assert_eq!((events.actor(Some(connection)), events.actor(None)), ("anna".into(), INTERNAL_USER.into()));
        events.forget_user(connection);
        assert_eq!(events.actor(Some(connection)), INTERNAL_USER);
        assert_eq!(events.connection_pid(connection), "<leveret@here.1.7.0>");
        assert_eq!(events.channel_pid(connection, 3), "<leveret@here.1.7.3>");
    }
}
