//! The firehose: while tracing is on in a vhost, every message that is published or delivered there is copied to the
//! exchange `amq.rabbitmq.trace`, with keys and headers as RabbitMQ's (`rabbit_trace` in its source).
//!
//! A message that was published to the trace exchange is not traced, so traces lead to no further ones, whoever consumes
//! them.

use std::sync::Arc;

use super::{
    Broker, Vhost,
    message::{Message, OwnedMessage, encode_names},
    port::Effects,
    queue::ConnectionId,
};
use crate::model::{
    Name,
    headers::{write_counted, write_long_string},
};

/// The exchange that gets the copies.
pub const TRACE_EXCHANGE: &str = "amq.rabbitmq.trace";

/// Only headers.
const PROPERTY_FLAGS: u16 = 1 << 13;

/// The properties in the order of their flags, the highest first.
const PROPERTIES: [(&str, PropertyKind); 14] = [
    ("content_type", PropertyKind::Text),
    ("content_encoding", PropertyKind::Text),
    ("headers", PropertyKind::Table),
    ("delivery_mode", PropertyKind::Octet),
    ("priority", PropertyKind::Octet),
    ("correlation_id", PropertyKind::Text),
    ("reply_to", PropertyKind::Text),
    ("expiration", PropertyKind::Text),
    ("message_id", PropertyKind::Text),
    ("timestamp", PropertyKind::Timestamp),
    ("type", PropertyKind::Text),
    ("user_id", PropertyKind::Text),
    ("app_id", PropertyKind::Text),
    ("cluster_id", PropertyKind::Text),
];

#[derive(Clone, Copy)]
enum PropertyKind {
    Text,
    Octet,
    Timestamp,
    Table,
}

/// A delivery that is to be traced once nothing is locked.
pub struct TracedDelivery {
    pub channel: u16,
    pub queue: Name,
    pub redelivered: bool,
    pub message: OwnedMessage,
}

/// A connection as events and traces name it.
pub struct Origin {
    pub connection: ConnectionId,
    /// `127.0.0.1:50000 -> 127.0.0.1:5672`, as far as it is known.
    pub name: String,
    pub user: Name,
    pub vhost: Arc<Vhost>,
}

impl Origin {
    /// Copies a message that was published to these queues to the trace exchange. Nothing is locked by the caller.
    pub fn trace_publish<'a>(
        &self,
        broker: &Broker,
        channel: u16,
        message: &Message<'_>,
        queues: impl Iterator<Item = &'a str>,
        effects: &mut Effects,
    ) {
        let (exchange, _) = message.exchange_and_key();
        let routed = |out: &mut Vec<u8>| {
            write_key("routed_queues", out);
            out.push(b'A');
            write_counted(out, |out| queues.for_each(|queue| write_long_string(queue.as_bytes(), out)));
        };
        self.publish(broker, &[b"publish.", exchange].concat(), channel, message, routed, effects);
    }

    /// Copies a delivered message to the trace exchange. Nothing is locked by the caller.
    pub fn trace_delivery(&self, broker: &Broker, delivery: &TracedDelivery, effects: &mut Effects) {
        let redelivered = |out: &mut Vec<u8>| write_number("redelivered", u32::from(delivery.redelivered), out);
        let key = [b"deliver.", delivery.queue.as_bytes()].concat();
        self.publish(broker, &key, delivery.channel, &delivery.message.view(), redelivered, effects);
    }

    fn publish(
        &self,
        broker: &Broker,
        key: &[u8],
        channel: u16,
        message: &Message<'_>,
        write_last: impl FnOnce(&mut Vec<u8>),
        effects: &mut Effects,
    ) {
        let (exchange, _) = message.exchange_and_key();
        if exchange == TRACE_EXCHANGE.as_bytes() {
            return;
        }
        let mut properties = PROPERTY_FLAGS.to_be_bytes().to_vec();
        write_counted(&mut properties, |out| {
            write_number("channel", u32::from(channel), out);
            write_text("connection", self.name.as_bytes(), out);
            write_text("exchange_name", exchange, out);
            write_text("node", broker.events().node().as_bytes(), out);
            write_key("properties", out);
            out.push(b'F');
            write_counted(out, |out| write_properties(message.properties, out));
            write_key("routing_keys", out);
            out.push(b'A');
            write_counted(out, |out| message.routing_keys().iter().for_each(|key| write_long_string(key, out)));
            write_text("user", self.user.as_bytes(), out);
            write_text("vhost", self.vhost.name.as_bytes(), out);
            write_last(out);
        });
        let trace = Message {
            names: &encode_names(TRACE_EXCHANGE.as_bytes(), key),
            properties: &properties,
            body: message.body,
            persistent: false,
            extension: &[],
        };
        self.vhost.publish_to_system_exchange(TRACE_EXCHANGE, &trace, effects);
    }
}

/// Whether a message is one that is traced.
pub fn is_traced(message: &Message<'_>) -> bool {
    message.exchange_and_key().0 != TRACE_EXCHANGE.as_bytes()
}

fn write_key(key: &str, out: &mut Vec<u8>) {
    out.push(key.len() as u8);
    out.extend_from_slice(key.as_bytes());
}

fn write_text(key: &str, text: &[u8], out: &mut Vec<u8>) {
    write_key(key, out);
    write_long_string(text, out);
}

fn write_number(key: &str, number: u32, out: &mut Vec<u8>) {
    write_key(key, out);
    out.push(b'I');
    out.extend_from_slice(&number.to_be_bytes());
}

/// Appends raw properties as the entries of a table, up to the first malformed one. All numbers are signed 32-bit
/// integers, of a timestamp the lowest bits, as in RabbitMQ.
fn write_properties(raw: &[u8], out: &mut Vec<u8>) {
    let Some((flags, mut rest)) = raw.split_first_chunk::<2>() else { return };
    let flags = u16::from_be_bytes(*flags);
    for (place, (name, kind)) in PROPERTIES.into_iter().enumerate() {
        if flags & 1 << (15 - place) != 0 {
            match write_property(name, kind, rest, out) {
                Some(after) => rest = after,
                None => return,
            }
        }
    }
}

fn write_property<'a>(name: &str, kind: PropertyKind, raw: &'a [u8], out: &mut Vec<u8>) -> Option<&'a [u8]> {
    match kind {
        PropertyKind::Text => {
            let (&len, after) = raw.split_first()?;
            let (text, rest) = after.split_at_checked(len.into())?;
            write_text(name, text, out);
            Some(rest)
        }
        PropertyKind::Octet => {
            let (&octet, rest) = raw.split_first()?;
            write_number(name, octet.into(), out);
            Some(rest)
        }
        PropertyKind::Timestamp => {
            let (seconds, rest) = raw.split_first_chunk::<8>()?;
            write_number(name, u64::from_be_bytes(*seconds) as u32, out);
            Some(rest)
        }
        PropertyKind::Table => {
            let len = u32::from_be_bytes(*raw.first_chunk::<4>()?) as usize;
            let (table, rest) = raw.split_at_checked(4 + len)?;
            write_key(name, out);
            out.push(b'F');
            out.extend_from_slice(table);
            Some(rest)
        }
    }
}

#[cfg(test)]
mod tests {
    use amq_protocol::{
        frame::WriteContext,
        protocol::{BasicProperties, basic::gen_properties},
        types::{AMQPValue, FieldTable, parsing::parse_field_table},
    };

    use super::*;
    use crate::broker::Body;

    fn shown(raw: &[u8]) -> FieldTable {
        let mut table = Vec::new();
        write_counted(&mut table, |out| write_properties(raw, out));
        parse_field_table(table.as_slice()).unwrap().1
    }

    #[test]
    fn properties_are_a_table_of_strings_and_32_bit_integers() {
        let mut headers = FieldTable::default();
        headers.insert("a".into(), AMQPValue::LongLongInt(7));
        let properties = BasicProperties::default()
            .with_content_type("text/plain".into())
            .with_headers(headers.clone())
            .with_delivery_mode(2)
            .with_timestamp((1 << 32) + 77)
            .with_app_id("app".into());
        let raw = gen_properties(&properties)(WriteContext::from(Vec::new())).unwrap().into_inner().0;
        let mut expected = FieldTable::default();
        expected.insert("content_type".into(), AMQPValue::LongString("text/plain".into()));
        expected.insert("headers".into(), AMQPValue::FieldTable(headers));
        expected.insert("delivery_mode".into(), AMQPValue::LongInt(2));
        expected.insert("timestamp".into(), AMQPValue::LongInt(77));
        expected.insert("app_id".into(), AMQPValue::LongString("app".into()));
        assert_eq!(shown(&raw), expected);
        for cut in 0..raw.len() {
            assert!(shown(&raw[..cut]).inner().len() < 5);
        }
        assert_eq!(shown(&[0, 0]), FieldTable::default());
    }

    #[test]
    fn traces_are_not_traced() {
        let message = |exchange: &'static [u8]| {
            let names = encode_names(exchange, b"key").leak();
            Message { names, properties: &[0, 0], body: Body::Inline(b""), persistent: false, extension: &[] }
        };
        assert!(is_traced(&message(b"amq.topic")));
        assert!(!is_traced(&message(TRACE_EXCHANGE.as_bytes())));
    }
}
