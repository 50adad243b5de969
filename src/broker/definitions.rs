//! Definitions as the store keeps them: one record each, with a version octet in front.
//!
//! Keys begin with the kind (`v` vhost, `x` exchange, `q` queue, `b` binding, `p` policy, `o` operator policy, `l` leftover)
//! and hold what identifies the thing; values hold the rest. A leftover is the id of a transient owner for which the store
//! keeps something, to be deleted at the next start. Strings and tables carry their length as `u32`, big-endian; tables are
//! in AMQP's own encoding, policies in JSON.

use std::collections::HashMap;

use amq_protocol::{
    frame::WriteContext,
    types::{FieldTable, generation::gen_field_table, parsing::parse_field_table},
};

use super::{
    binding::{Binding, Destination},
    exchange::{Exchange, ExchangeKind, ExchangeOptions},
    policy::{Policy, PolicyKind},
    queue::QueueOptions,
    rules::QueueTraits,
};
use crate::{model::Name, store::QueueId};

const VERSION: u8 = 1;
/// Of an exchange with state, whose value ends with the id of that.
const STATEFUL_VERSION: u8 = 2;

/// A definition read back. What was stored is durable: a bit that says otherwise is damage.
#[derive(Debug)]
pub enum Definition {
    Vhost(Name),
    /// With the owner of its state, if it is known.
    Exchange {
        vhost: Name,
        exchange: Exchange,
        state: Option<QueueId>,
    },
    Queue {
        id: QueueId,
        options: QueueOptions,
    },
    Binding {
        vhost: Name,
        binding: Binding,
    },
    Policy {
        vhost: Name,
        policy: Policy,
    },
    Leftover {
        owner: QueueId,
    },
}

/// A definition that cannot be read: damaged, or written by a later version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the definition cannot be decoded")]
pub struct Undecodable;

#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn key(kind: u8) -> Self {
        Writer(vec![kind])
    }

    fn value() -> Self {
        Writer(vec![VERSION])
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
        self.0.extend_from_slice(bytes);
        self
    }

    fn table(self, table: &FieldTable) -> Self {
        let written = gen_field_table(table)(WriteContext::from(Vec::new())).map(|written| written.into_inner().0);
        self.bytes(&written.unwrap_or_default())
    }

    fn octet(mut self, octet: u8) -> Self {
        self.0.push(octet);
        self
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn value(bytes: &'a [u8]) -> Result<Self, Undecodable> {
        match bytes.split_first() {
            Some((&VERSION, rest)) => Ok(Reader(rest)),
            _ => Err(Undecodable),
        }
    }

    fn id(&mut self) -> Result<QueueId, Undecodable> {
        self.bytes()?.try_into().map(|id| QueueId(u64::from_be_bytes(id))).map_err(|_| Undecodable)
    }

    fn bytes(&mut self) -> Result<&'a [u8], Undecodable> {
        let (len, rest) = self.0.split_first_chunk::<4>().ok_or(Undecodable)?;
        let (bytes, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize).ok_or(Undecodable)?;
        self.0 = rest;
        Ok(bytes)
    }

    fn name(&mut self) -> Result<Name, Undecodable> {
        std::str::from_utf8(self.bytes()?).map(Name::from).map_err(|_| Undecodable)
    }

    fn table(&mut self) -> Result<FieldTable, Undecodable> {
        let bytes = self.bytes()?;
        parse_field_table(bytes).map(|(_, table)| table).map_err(|_| Undecodable)
    }

    fn octet(&mut self) -> Result<u8, Undecodable> {
        let (&octet, rest) = self.0.split_first().ok_or(Undecodable)?;
        self.0 = rest;
        Ok(octet)
    }
}

fn flags(bits: [bool; 3]) -> u8 {
    bits.iter().enumerate().map(|(at, &bit)| u8::from(bit) << at).sum()
}

/// Key and value of a vhost.
pub fn vhost(name: &str) -> (Vec<u8>, Vec<u8>) {
    (Writer::key(b'v').bytes(name.as_bytes()).0, Writer::value().0)
}

/// Key of an exchange.
pub fn exchange_key(vhost: &str, name: &str) -> Vec<u8> {
    Writer::key(b'x').bytes(vhost.as_bytes()).bytes(name.as_bytes()).0
}

/// Value of an exchange, with the owner of its state if it has any.
pub fn exchange_value(exchange: &Exchange, state: Option<QueueId>) -> Vec<u8> {
    let bits = flags([exchange.durable, exchange.auto_delete, exchange.internal]);
    let version = if state.is_some() { STATEFUL_VERSION } else { VERSION };
    let value = Writer::key(version).octet(bits).bytes(exchange.kind.as_str().as_bytes()).table(&exchange.arguments);
    match state {
        Some(id) => value.bytes(&id.0.to_be_bytes()).0,
        None => value.0,
    }
}

/// Key and value of a leftover.
pub fn leftover(owner: QueueId) -> (Vec<u8>, Vec<u8>) {
    (Writer::key(b'l').bytes(&owner.0.to_be_bytes()).0, Writer::value().0)
}

/// Key of a queue.
pub fn queue_key(vhost: &str, name: &str) -> Vec<u8> {
    Writer::key(b'q').bytes(vhost.as_bytes()).bytes(name.as_bytes()).0
}

/// Value of a durable queue.
pub fn queue_value(id: QueueId, options: &QueueOptions) -> Vec<u8> {
    let bits = flags([options.durable, options.auto_delete, false]);
    Writer::value().octet(bits).bytes(&id.0.to_be_bytes()).table(&options.arguments).0
}

/// Key of a binding, which is all of it.
pub fn binding_key(vhost: &str, binding: &Binding) -> Vec<u8> {
    let kind = match binding.destination {
        Destination::Queue(_) => b'q',
        Destination::Exchange(_) => b'x',
    };
    Writer::key(b'b')
        .bytes(vhost.as_bytes())
        .bytes(binding.source.as_bytes())
        .octet(kind)
        .bytes(binding.destination.name().as_bytes())
        .bytes(&binding.key)
        .table(&binding.arguments)
        .0
}

/// Value of a binding.
pub fn binding_value() -> Vec<u8> {
    Writer::value().0
}

/// Key of a policy.
pub fn policy_key(vhost: &str, kind: PolicyKind, name: &str) -> Vec<u8> {
    let kind = match kind {
        PolicyKind::User => b'p',
        PolicyKind::Operator => b'o',
    };
    Writer::key(kind).bytes(vhost.as_bytes()).bytes(name.as_bytes()).0
}

/// Value of a policy.
pub fn policy_value(policy: &Policy) -> Vec<u8> {
    Writer::value().bytes(policy.to_json().to_string().as_bytes()).0
}

/// What the logs and notes of queues and exchanges belong to, by the definitions as the store keeps them.
pub fn log_names(definitions: &[(Vec<u8>, Vec<u8>)]) -> HashMap<QueueId, String> {
    let mut names = HashMap::new();
    for (key, value) in definitions {
        match decode(key, value) {
            Ok(Definition::Queue { id, options }) => {
                let levels = QueueTraits::of(&options.arguments).max_priority;
                let queue = format!("queue '{}' in vhost '{}'", options.name, options.vhost);
                for level in 0..=levels {
                    let of_level = if levels == 0 { String::new() } else { format!(", priority {level}") };
                    names.insert(QueueId(id.0 + u64::from(level)), format!("{queue}{of_level}"));
                }
            }
            Ok(Definition::Exchange { vhost, exchange, state: Some(id) }) => {
                names.insert(id, format!("exchange '{}' in vhost '{vhost}'", exchange.name));
            }
            _ => {}
        }
    }
    names
}

/// Reads a definition back.
///
/// # Errors
/// [`Undecodable`]; the caller reports the key and goes on.
pub fn decode(key: &[u8], value: &[u8]) -> Result<Definition, Undecodable> {
    let (&kind, rest) = key.split_first().ok_or(Undecodable)?;
    let mut key = Reader(rest);
    if kind == b'l' {
        return Ok(Definition::Leftover { owner: key.id()? });
    }
    let vhost = key.name()?;
    if kind == b'x' {
        return decode_exchange(vhost, key.name()?, value);
    }
    let mut value = Reader::value(value)?;
    match kind {
        b'v' => Ok(Definition::Vhost(vhost)),
        b'q' => {
            let name = key.name()?;
            let bits = value.octet()?;
            let id = value.id()?;
            let arguments = value.table()?;
            let options =
                QueueOptions { name, vhost, durable: true, auto_delete: bits & 2 != 0, exclusive_to: None, arguments };
            Ok(Definition::Queue { id, options })
        }
        b'b' => {
            let source = key.name()?;
            let to_queue = key.octet()? == b'q';
            let name = key.name()?;
            let destination = if to_queue { Destination::Queue(name) } else { Destination::Exchange(name) };
            let binding_key = key.bytes()?.into();
            Ok(Definition::Binding {
                vhost,
                binding: Binding { source, destination, key: binding_key, arguments: key.table()? },
            })
        }
        b'p' => decode_policy(vhost, PolicyKind::User, &key.name()?, value.bytes()?),
        b'o' => decode_policy(vhost, PolicyKind::Operator, &key.name()?, value.bytes()?),
        _ => Err(Undecodable),
    }
}

fn decode_exchange(vhost: Name, name: Name, value: &[u8]) -> Result<Definition, Undecodable> {
    let (version, mut value) = match value.split_first() {
        Some((&version @ (VERSION | STATEFUL_VERSION), rest)) => (version, Reader(rest)),
        _ => return Err(Undecodable),
    };
    let bits = value.octet()?;
    let kind = ExchangeKind::parse(&value.name()?).map_err(|_| Undecodable)?;
    let options = ExchangeOptions { durable: true, auto_delete: bits & 2 != 0, internal: bits & 4 != 0 };
    let exchange = Exchange::new(name, kind, options, value.table()?);
    let state = if version == STATEFUL_VERSION { Some(value.id()?) } else { None };
    Ok(Definition::Exchange { vhost, exchange, state })
}

fn decode_policy(vhost: Name, kind: PolicyKind, name: &str, json: &[u8]) -> Result<Definition, Undecodable> {
    let object = serde_json::from_slice(json).map_err(|_| Undecodable)?;
    let policy = Policy::from_json(kind, name, &object).map_err(|_| Undecodable)?;
    Ok(Definition::Policy { vhost, policy })
}

#[cfg(test)]
mod tests {
    use super::*;
    use amq_protocol::types::AMQPValue;

    fn arguments() -> FieldTable {
        let mut table = FieldTable::default();
        table.insert("x-match".into(), AMQPValue::LongString("any".into()));
        table.insert("n".into(), AMQPValue::Double(f64::NAN.to_bits() as f64));
        table
    }

    #[test]
    fn definitions_survive_the_round_trip_and_no_cut_panics() {
        let options = QueueOptions {
            name: "q\0é".into(),
            vhost: "/".into(),
            durable: true,
            auto_delete: true,
            exclusive_to: None,
            arguments: arguments(),
        };
        let (key, value) = (queue_key("/", "q\0é"), queue_value(QueueId(7), &options));
        let Ok(Definition::Queue { id, options: read }) = decode(&key, &value) else { panic!("not a queue") };
        assert_eq!((id, read.name, read.auto_delete, read.arguments), (QueueId(7), options.name, true, arguments()));
        let binding = Binding {
            source: "a".into(),
            destination: Destination::Exchange("b".into()),
            key: b"k\xff".to_vec().into(),
            arguments: arguments(),
        };
        let key = binding_key("v", &binding);
        let Ok(Definition::Binding { vhost, binding: read }) = decode(&key, &binding_value()) else {
            panic!("not a binding")
        };
        assert_eq!((&*vhost, read), ("v", binding));
        for cut in 0..key.len() {
            assert!(decode(&key[..cut], &binding_value()).is_err());
        }
        assert!(decode(&key, &[VERSION + 1]).is_err());
    }

    #[test]
    fn policies_of_both_kinds_survive_the_round_trip() {
        let object = serde_json::json!({
            "pattern": "^é", "definition": {"max-length": 5, "overflow": "drop-head"}, "priority": -3, "apply-to": "queues",
        });
        for kind in [PolicyKind::User, PolicyKind::Operator] {
            let policy = Policy::from_json(kind, "p\0é", &object).unwrap();
            let (key, value) = (policy_key("v", kind, &policy.name), policy_value(&policy));
            let Ok(Definition::Policy { vhost, policy: read }) = decode(&key, &value) else { panic!("not a policy") };
            assert_eq!((&*vhost, read), ("v", policy));
            for cut in 0..value.len() {
                assert!(decode(&key, &value[..cut]).is_err());
            }
        }
    }

    #[test]
    fn exchanges_of_every_type_survive_the_round_trip() {
        let mut arguments = FieldTable::default();
        arguments.insert("x-delayed-type".into(), AMQPValue::LongString("x-recent-history".into()));
        arguments.insert("x-recent-history-length".into(), AMQPValue::LongInt(7));
        let options = ExchangeOptions { durable: true, auto_delete: true, internal: true };
        for kind in ExchangeKind::ALL {
            let exchange = Exchange::new("x".into(), kind, options, arguments.clone());
            let stateful = exchange.observes_messages().then_some(QueueId(1 << 40));
            let decoded = decode(&exchange_key("/", "x"), &exchange_value(&exchange, stateful));
            let Ok(Definition::Exchange { exchange: read, state, .. }) = decoded else { panic!("not an exchange") };
            assert_eq!((&read, state), (&exchange, stateful));
            let before = decode(&exchange_key("/", "x"), &exchange_value(&exchange, None));
            assert!(matches!(before, Ok(Definition::Exchange { state: None, .. })));
            let (routing, length) = match kind {
                ExchangeKind::Delayed | ExchangeKind::RecentHistory => (ExchangeKind::RecentHistory, Some(7)),
                other => (other, None),
            };
            assert_eq!(
                (read.routing_kind(), read.history_length(), read.is_delayed()),
                (routing, length, kind == ExchangeKind::Delayed)
            );
        }
    }
}
