//! Dead-lettering: what becomes of a message that leaves its queue for a dead-letter exchange.
//!
//! Pure: a message and its death in, a message out. Who routes it, and when, is the queue's business.
//!
//! # Invariants
//! - D1: the properties of a dead letter are, byte for byte, those RabbitMQ 4.3 delivers (`mc:record_death/3`,
//!   `mc_amqpl:protocol_state/2`, `rabbit_dead_letter:publish/5`), save for the limit below.
//! - D2: of `x-death` only what this broker wrote is believed ([`Extension::died`]): one that a client sent does not count
//!   and is replaced.
//!
//! # Limits
//! `x-death` holds [`MAX_HISTORY_BYTES`]; beyond that the oldest deaths are left out.

mod history;
#[cfg(test)]
mod tests;

use ahash::AHashMap;
use smallvec::SmallVec;

use self::history::push_history;
use super::{
    extension::{Extension, ExtensionBytes},
    message::{Body, Message, encode_names},
};
use crate::model::{
    headers::{AddedHeader, AddedValue, merge},
    properties::Properties,
};

pub use self::history::{DeathRecord, MAX_HISTORY_BYTES, deaths};

/// Why a message died.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeathReason {
    /// Rejected without being requeued.
    Rejected,
    Expired,
    /// Dropped because the queue was too long, or refused by a queue that dead-letters what it refuses.
    MaxLen,
    DeliveryLimit,
}

impl DeathReason {
    /// RabbitMQ's word.
    pub fn as_str(self) -> &'static str {
        match self {
            DeathReason::Rejected => "rejected",
            DeathReason::Expired => "expired",
            DeathReason::MaxLen => "maxlen",
            DeathReason::DeliveryLimit => "delivery_limit",
        }
    }
}

/// How a message died.
#[derive(Clone, Copy, Debug)]
pub struct Death<'a> {
    /// Where it died.
    pub queue: &'a str,
    pub reason: DeathReason,
    pub at_unix_ms: u64,
    /// Failed deliveries the message has behind it, in this queue and those before ([`Extension::deliveries`]); a rejection
    /// is one. They travel along: with any, RabbitMQ delivers a dead letter as redelivered from the start, and a quorum
    /// queue goes on counting from there.
    pub deliveries: u32,
}

/// Where dead letters go.
#[derive(Clone, Copy, Debug)]
pub struct DeadLetterTarget<'a> {
    /// Empty is the default exchange.
    pub exchange: &'a str,
    /// Takes the place of all routing keys, those of `CC` and `BCC` included.
    pub routing_key: Option<&'a str>,
}

/// A dead letter, but for its body, which is the dead message's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeadLetter {
    pub names: Vec<u8>,
    pub properties: Vec<u8>,
    pub extension: ExtensionBytes,
}

impl DeadLetter {
    /// What a message becomes by dying.
    ///
    /// Headers `x-death`, `x-first-death-*` and `x-last-death-*` are added, `expiration` is removed and recorded, everything
    /// else stays, `CC` included. The keys to route by are the message's ([`Message::routing_keys`]): the dead-letter routing
    /// key alone, else all the keys it was routed by before.
    ///
    /// # Cost
    /// Linear in headers, history and keys, and three allocations.
    pub fn new(message: &Message<'_>, death: &Death<'_>, target: &DeadLetterTarget<'_>) -> Self {
        let (exchange, routing_key) = message.exchange_and_key();
        let extension = Extension::parse(message.extension);
        let next_key = target.routing_key.map_or(routing_key, str::as_bytes);
        DeadLetter {
            names: encode_names(target.exchange.as_bytes(), next_key),
            properties: properties_after(message, &extension, exchange, death),
            extension: Extension {
                expires_unix_ms: None,
                died: true,
                sole_key: extension.sole_key || target.routing_key.is_some(),
                deliveries: death.deliveries,
                hidden_keys: extension.hidden_keys,
            }
            .encode(),
        }
    }

    /// The message with its body; persistence does not change by dying.
    pub fn message<'a>(&'a self, body: Body<'a>, persistent: bool) -> Message<'a> {
        Message { names: &self.names, properties: &self.properties, body, persistent, extension: &self.extension }
    }
}

/// Whether a message was dead-lettered from this queue before.
pub fn died_in(message: &Message<'_>, queue: &str) -> bool {
    deaths(message).any(|death| death.queue == queue.as_bytes())
}

/// Whether delivering a dead letter to the queue `target` would close a cycle that no client's reject is part of. It is then
/// not delivered there (RabbitMQ's `mc:is_death_cycle/2`).
///
/// The queue is among those the message died in, and neither that death nor a later one was a rejection.
pub fn is_cycle(message: &Message<'_>, target: &str) -> bool {
    for death in deaths(message) {
        if death.reason == DeathReason::Rejected.as_str().as_bytes() {
            return false;
        }
        if death.queue == target.as_bytes() {
            return true;
        }
    }
    false
}

fn properties_after(message: &Message<'_>, extension: &Extension<'_>, exchange: &[u8], death: &Death<'_>) -> Vec<u8> {
    let Ok(view) = Properties::parse(message.properties) else { return message.properties.to_vec() };
    let mut history = Vec::with_capacity(256);
    let deaths: SmallVec<[DeathRecord<'_>; 4]> = deaths(message).collect();
    let record = NewDeath { death, exchange, keys: recorded_keys(message, extension), expiration: view.expiration() };
    push_history(&deaths, &record, &mut history);
    let reason = death.reason.as_str().as_bytes();
    let text = |key: &'static str, text| AddedHeader { key: key.as_bytes(), value: AddedValue::LongString(text) };
    let mut added: SmallVec<[AddedHeader<'_>; 7]> = SmallVec::new();
    added.push(AddedHeader { key: b"x-death", value: AddedValue::Raw(&history) });
    if deaths.is_empty() {
        added.push(text("x-first-death-exchange", exchange));
        added.push(text("x-first-death-queue", death.queue.as_bytes()));
        added.push(text("x-first-death-reason", reason));
    }
    added.push(text("x-last-death-exchange", exchange));
    added.push(text("x-last-death-queue", death.queue.as_bytes()));
    added.push(text("x-last-death-reason", reason));
    let mut out = Vec::with_capacity(message.properties.len() + history.len() + 256);
    view.write_with_headers(&mut out, false, |table, out| merge(table, &added, out));
    out
}

/// What the newest entry of `x-death` says, if there is none yet for this queue and reason.
struct NewDeath<'a> {
    death: &'a Death<'a>,
    exchange: &'a [u8],
    keys: SmallVec<[&'a [u8]; 4]>,
    expiration: Option<&'a [u8]>,
}

/// The routing keys that `x-death` shows: without those of `BCC`.
///
/// RabbitMQ takes the hidden keys away from the list of all keys, one occurrence each, from the front. So a key that is
/// hidden and not stays, but may change its place; and a dead-letter routing key that was a hidden key is not shown.
fn recorded_keys<'a>(message: &Message<'a>, extension: &Extension<'a>) -> SmallVec<[&'a [u8]; 4]> {
    let mut keys = message.routing_keys();
    if !extension.hidden_keys.is_empty() {
        let mut hidden: AHashMap<&[u8], usize> = AHashMap::new();
        extension.keys().for_each(|key| *hidden.entry(key).or_default() += 1);
        keys.retain(|key| match hidden.get_mut(*key) {
            Some(count) if *count > 0 => {
                *count -= 1;
                false
            }
            _ => true,
        });
    }
    keys
}
