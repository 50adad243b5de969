//! The `x-consistent-hash` type: a message goes to one destination, chosen by a hash, and few messages change theirs when
//! a destination comes or goes. A binding's key is its destination's weight.
//!
//! # Why
//! RabbitMQ hashes to a list of buckets; taking some out in the middle moves nearly every message behind them. Here every
//! destination draws a score for the message from the hash of both, and the best score wins (weighted rendezvous
//! hashing). So a destination that comes takes its share and moves nothing else, one that goes leaves only its share
//! behind, and neither the order of bindings nor a restart matters. It costs a look at every destination, some
//! nanoseconds each, instead of memory for every bucket of every weight.
//!
//! # Invariants
//! - C1: a destination draws once, with the weight of its first binding; removing any of its bindings takes it out.
//!   Both as in RabbitMQ.

use ahash::AHashMap;
use amq_protocol::types::FieldTable;

use super::stable_hash::{StableHasher, hash_bytes, hash_nothing, hash_value, mix};
use super::subject::Subject;
use super::target::{Target, Targets};
use crate::broker::binding::{Binding, Destination};
use crate::model::arguments::{InvalidArgumentType, as_longstr, lookup, type_name};
use crate::model::properties::Properties;
use crate::model::{ResourceName, erlang};

const HASH_HEADER: &str = "hash-header";
const HASH_PROPERTY: &str = "hash-property";
/// `LavinMQ`'s word for the header to hash; RabbitMQ's arguments win over it.
const HASH_ON: &str = "x-hash-on";

/// RabbitMQ's bound on weights (4.x).
const MAX_WEIGHT: u16 = 10_000;

/// A property that can be hashed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Property {
    CorrelationId,
    MessageId,
    Timestamp,
}

impl Property {
    fn parse(name: &[u8]) -> Option<Self> {
        match name {
            b"correlation_id" => Some(Self::CorrelationId),
            b"message_id" => Some(Self::MessageId),
            b"timestamp" => Some(Self::Timestamp),
            _ => None,
        }
    }

    fn hash(self, properties: Option<&Properties<'_>>) -> u64 {
        let Some(properties) = properties else {
            return hash_nothing();
        };
        match self {
            Self::CorrelationId => properties.correlation_id().map_or_else(hash_nothing, hash_bytes),
            Self::MessageId => properties.message_id().map_or_else(hash_nothing, hash_bytes),
            Self::Timestamp => properties
                .timestamp()
                .map_or_else(hash_nothing, |seconds| StableHasher::new().bytes(&seconds.to_le_bytes()).finish()),
        }
    }
}

/// What of a message is hashed.
#[derive(Clone, Debug, PartialEq, Eq)]
enum HashInput {
    RoutingKey,
    Header(Box<str>),
    Property(Property),
}

impl HashInput {
    /// Reads the arguments of an exchange, which [`check_arguments`] has accepted.
    fn of(arguments: &FieldTable) -> Self {
        let text = |key| lookup(arguments, key).and_then(as_longstr);
        if let Some(header) = text(HASH_HEADER) {
            return Self::Header(erlang::text(header).into());
        }
        if let Some(property) = text(HASH_PROPERTY).and_then(Property::parse) {
            return Self::Property(property);
        }
        text(HASH_ON).map_or(Self::RoutingKey, |header| Self::Header(erlang::text(header).into()))
    }

    /// The hash of a message. Messages that lack what is hashed have all the same.
    fn hash(&self, subject: &Subject<'_>) -> u64 {
        match self {
            Self::RoutingKey => hash_bytes(subject.routing_key()),
            Self::Header(name) => {
                let header = subject.headers().and_then(|headers| lookup(headers, name));
                header.map_or_else(hash_nothing, hash_value)
            }
            Self::Property(property) => property.hash(subject.attributes.properties()),
        }
    }
}

/// Checks an exchange's arguments; the error is the text of the 406.
pub fn check_arguments(resource: &ResourceName, arguments: &FieldTable) -> Result<(), String> {
    // Of another type RabbitMQ's channel dies (541).
    let text = |key: &'static str| match lookup(arguments, key) {
        None => Ok(None),
        Some(value) => as_longstr(value).map(Some).ok_or_else(|| {
            InvalidArgumentType { type_name: type_name(value), key, resource: resource.clone() }.to_string()
        }),
    };
    match (text(HASH_HEADER)?, text(HASH_PROPERTY)?) {
        (Some(_), Some(_)) => Err(format!("{HASH_HEADER} and {HASH_PROPERTY} are mutually exclusive")),
        (None, Some(property)) if Property::parse(property).is_none() => {
            Err(format!("Unsupported property: {}", erlang::text(property)))
        }
        _ => Ok(()),
    }
}

/// Checks a binding's key; the error is the text of the 406.
pub fn check_key(key: &[u8]) -> Result<(), String> {
    parse_weight(key).map(|_| ())
}

/// Reads a weight as Erlang reads integers: digits with a sign or without.
fn parse_weight(key: &[u8]) -> Result<u16, String> {
    let (negative, digits) = match key {
        [b'-', digits @ ..] => (true, digits),
        [b'+', digits @ ..] => (false, digits),
        digits => (false, digits),
    };
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Err(format!("The binding key must be an integer: {}", erlang::binary(key)));
    }
    let value = digits.iter().fold(0u32, |value, digit| value.saturating_mul(10).saturating_add((digit - b'0').into()));
    match u16::try_from(value) {
        _ if negative || value == 0 => Err("The binding key must be greater than 0".to_owned()),
        Ok(weight) if weight <= MAX_WEIGHT => Ok(weight),
        _ => Err(format!("The binding key must not exceed {MAX_WEIGHT}")),
    }
}

/// A destination that draws.
#[derive(Clone, Copy, Debug)]
struct Drawer {
    target: Target,
    /// The hash of its kind and name.
    seed: u64,
    weight: f64,
}

impl Drawer {
    /// The hash's share of this destination as a number above 0 and up to 1.
    #[expect(clippy::cast_precision_loss, reason = "the upper 53 bits fit")]
    fn draw(&self, hash: u64) -> f64 {
        let bits = mix(hash ^ self.seed) >> 11;
        (bits + 1) as f64 / (1u64 << 53) as f64
    }
}

/// All destinations.
#[derive(Clone, Debug)]
pub struct ConsistentHashTable {
    input: HashInput,
    drawers: Vec<Drawer>,
    place: AHashMap<Target, usize>,
}

impl ConsistentHashTable {
    pub fn new(arguments: &FieldTable) -> Self {
        Self { input: HashInput::of(arguments), drawers: Vec::new(), place: AHashMap::default() }
    }

    /// Whether the same routing key always leads to the same destination.
    pub fn is_by_key(&self) -> bool {
        self.input == HashInput::RoutingKey
    }

    pub fn add(&mut self, binding: &Binding, target: Target) {
        let Ok(weight) = parse_weight(&binding.key) else { return };
        if self.place.contains_key(&target) {
            return;
        }
        let kind = match binding.destination {
            Destination::Queue(_) => b"q",
            Destination::Exchange(_) => b"x",
        };
        let seed = StableHasher::new().bytes(kind).bytes(binding.destination.name().as_bytes()).finish();
        self.place.insert(target, self.drawers.len());
        self.drawers.push(Drawer { target, seed, weight: weight.into() });
    }

    pub fn remove(&mut self, target: Target) {
        let Some(place) = self.place.remove(&target) else { return };
        self.drawers.swap_remove(place);
        if let Some(moved) = self.drawers.get(place) {
            self.place.insert(moved.target, place);
        }
    }

    /// Draws for every destination.
    pub fn collect(&self, subject: &Subject<'_>, out: &mut Targets) {
        if let Some(drawer) = self.winner(self.input.hash(subject)) {
            out.push(drawer.target);
        }
    }

    /// The destination with the shortest waiting time `-ln(draw) / weight`: exponential, so that it wins in proportion
    /// to its weight.
    fn winner(&self, hash: u64) -> Option<&Drawer> {
        let mut best: Option<(f64, &Drawer)> = None;
        for drawer in &self.drawers {
            let draw = drawer.draw(hash);
            let Some((time, winner)) = best else {
                best = Some((-draw.ln() / drawer.weight, drawer));
                continue;
            };
            // -ln(x) is never less than 1 - x, which spares most of the logarithms.
            if (1.0 - draw) / drawer.weight > time {
                continue;
            }
            let other = -draw.ln() / drawer.weight;
            if other < time || (other == time && drawer.seed < winner.seed) {
                best = Some((other, drawer));
            }
        }
        best.map(|(_, drawer)| drawer)
    }
}

#[cfg(test)]
mod tests;
