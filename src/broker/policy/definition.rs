//! What a policy says: keys and values, checked, merged and looked up.

use std::borrow::Cow;

use serde_json::{Map, Value};

use super::PolicyKind;
use crate::{
    broker::{
        arguments::{FILTER_BYTES, MAX_SEGMENT_BYTES, QueueType, max_age_ms},
        rules::Retry,
    },
    model::erlang,
};

/// What a key's value may be.
#[derive(Clone, Copy)]
enum Check {
    Text,
    Integer { min: i64, max: i64 },
    OneOf(&'static [&'static str]),
    MaxAge,
    Boolean,
    Retry,
}

/// What becomes of a key that user and operator policy both have.
#[derive(Clone, Copy)]
enum Merge {
    Least,
    Greatest,
    /// The smaller one, but a limit beats none at all (negative).
    Limit,
    Operator,
}

struct Key {
    name: &'static str,
    check: Check,
    /// What a value of it is called when it is refused.
    noun: &'static str,
    /// `None` for a key that operator policies do not have.
    operator: Option<Merge>,
    /// The types of queues that a policy with this key is not for.
    not_for: &'static [QueueType],
}

const ANY: i64 = i64::MAX;
const CLASSIC: QueueType = QueueType::Classic;
const QUORUM: QueueType = QueueType::Quorum;
const STREAM: QueueType = QueueType::Stream;

impl Key {
    const fn new(name: &'static str, check: Check, noun: &'static str) -> Self {
        Key { name, check, noun, operator: None, not_for: &[] }
    }

    const fn number(name: &'static str, min: i64, noun: &'static str) -> Self {
        Self::new(name, Check::Integer { min, max: ANY }, noun)
    }

    const fn operator(self, merge: Merge) -> Self {
        Key { operator: Some(merge), ..self }
    }

    const fn not_for(self, not_for: &'static [QueueType]) -> Self {
        Key { not_for, ..self }
    }

    fn find(name: &str) -> Option<&'static Key> {
        KEYS.iter().copied().flatten().find(|key| key.name == name)
    }

    fn is_known(&self, kind: PolicyKind) -> bool {
        kind == PolicyKind::User || self.operator.is_some()
    }

    fn check(&self, value: &Value) -> Result<(), String> {
        let valid = match self.check {
            Check::Text => value.is_string(),
            Check::Integer { min, max } => integer(value).is_some_and(|number| (min..=max).contains(&number)),
            Check::OneOf(words) => value.as_str().is_some_and(|text| words.contains(&text)),
            Check::MaxAge => value.as_str().is_some_and(|text| max_age_ms(text.as_bytes()).is_some()),
            Check::Boolean => value.is_boolean(),
            Check::Retry => {
                return Retry::from_json(value).map(drop).map_err(|reason| self.refusal(value) + &reason);
            }
        };
        if valid { Ok(()) } else { Err(self.refusal(value)) }
    }

    fn refusal(&self, value: &Value) -> String {
        format!("{} is not a valid {}", erlang::json_term(value), self.noun)
    }
}

/// RabbitMQ's validators, which it asks one after the other, and ours.
const KEYS: [&[Key]; 3] = [CORE_KEYS, QUORUM_KEYS, OWN_KEYS];

const CORE_KEYS: &[Key] = &[
    Key::new("alternate-exchange", Check::Text, "alternate exchange name"),
    Key::number("consumer-disconnected-timeout", 0, "consumer disconnected timeout"),
    Key::number("consumer-timeout", 0, "consumer timeout"),
    Key::new("dead-letter-exchange", Check::Text, "dead letter exchange name").not_for(&[STREAM]),
    Key::new("dead-letter-routing-key", Check::Text, "dead letter routing key").not_for(&[STREAM]),
    Key::new("dead-letter-strategy", Check::OneOf(&["at-most-once", "at-least-once"]), "dead letter strategy")
        .not_for(&[CLASSIC, STREAM]),
    Key::number("delivery-limit", i64::MIN, "delivery limit").operator(Merge::Limit).not_for(&[CLASSIC, STREAM]),
    Key::number("expires", 1, "queue expiry").operator(Merge::Least).not_for(&[STREAM]),
    Key::number("initial-cluster-size", 0, "cluster size").not_for(&[CLASSIC, QUORUM]),
    Key::new("max-age", Check::MaxAge, "max age").not_for(&[CLASSIC, QUORUM]),
    Key::number("max-in-memory-bytes", 0, "maximum memory in bytes").operator(Merge::Least).not_for(&[CLASSIC, STREAM]),
    Key::number("max-in-memory-length", 0, "maximum memory in bytes")
        .operator(Merge::Least)
        .not_for(&[CLASSIC, STREAM]),
    Key::number("max-length", 0, "maximum length").operator(Merge::Least).not_for(&[STREAM]),
    Key::number("max-length-bytes", 0, "maximum length in bytes").operator(Merge::Least),
    Key::number("message-ttl", 0, "message TTL").operator(Merge::Least).not_for(&[STREAM]),
    Key::new("overflow", Check::OneOf(&["drop-head", "reject-publish", "reject-publish-dlx"]), "overflow value")
        .operator(Merge::Operator)
        .not_for(&[STREAM]),
    Key::new("queue-leader-locator", LOCATOR, "queue leader locator value"),
    // Deprecated in RabbitMQ 4, and refused there unless it is permitted.
    Key::new("queue-master-locator", LOCATOR, "master locator").operator(Merge::Operator).not_for(&[QUORUM, STREAM]),
    Key::new("queue-mode", Check::OneOf(&["default", "lazy"]), "queue-mode value").not_for(&[QUORUM, STREAM]),
    Key::new("queue-version", Check::Integer { min: 1, max: 2 }, "queue-version value").operator(Merge::Operator),
    Key::new(
        "stream-filter-size-bytes",
        Check::Integer { min: *FILTER_BYTES.start(), max: *FILTER_BYTES.end() },
        "filter size. Valid range is 16-255",
    ),
    Key::new("stream-max-segment-size-bytes", Check::Integer { min: 0, max: MAX_SEGMENT_BYTES }, "segment size")
        .not_for(&[CLASSIC, QUORUM]),
];

const LOCATOR: Check = Check::OneOf(&["client-local", "balanced", "random", "least-leaders"]);

const QUORUM_KEYS: &[Key] = &[
    Key::new(
        "delayed-retry-type",
        Check::OneOf(&["all", "failed", "returned", "disabled"]),
        "delayed retry type. Must be one of: all, failed, returned, disabled",
    )
    .operator(Merge::Operator),
    Key::number("delayed-retry-min", 1, "delayed retry minimum delay. Must be a positive integer")
        .operator(Merge::Greatest),
    Key::number("delayed-retry-max", 1, "delayed retry maximum delay. Must be a positive integer")
        .operator(Merge::Least),
    Key::number("target-group-size", 1, "qq target count value").operator(Merge::Greatest).not_for(&[CLASSIC, STREAM]),
];

const OWN_KEYS: &[Key] = &[
    Key::new("durability", Check::OneOf(&["fsync", "os"]), "durability value. Must be fsync or os")
        .operator(Merge::Operator),
    Key::new("parking", Check::Boolean, "parking value. Must be true or false")
        .operator(Merge::Operator)
        .not_for(&[STREAM]),
    Key::new("retry", Check::Retry, "retry: ").operator(Merge::Operator).not_for(&[STREAM]),
];

/// A whole number; one beyond what fits is the most that does.
fn integer(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| value.is_u64().then_some(i64::MAX))
}

/// A policy's definition, or what a user and an operator policy amount to; known to be valid.
#[derive(Clone, Debug, PartialEq)]
pub struct PolicyDefinition {
    values: Map<String, Value>,
}

impl PolicyDefinition {
    /// Checks a definition.
    ///
    /// # Errors
    /// RabbitMQ's text for the first fault it finds: an empty definition, a wrong value, values that contradict each
    /// other, and last all keys that no policy (of this kind) has.
    pub fn parse(kind: PolicyKind, definition: &Value) -> Result<Self, String> {
        let Some(values) = definition.as_object() else {
            return Err(format!("definition must be a dictionary: {}", erlang::json_term(definition)));
        };
        if values.is_empty() {
            return Err("no policy provided".into());
        }
        for keys in KEYS {
            for (name, value) in values {
                if let Some(key) = keys.iter().find(|key| key.name == name && key.is_known(kind)) {
                    key.check(value)?;
                }
            }
        }
        check_delayed_retry(values)?;
        let unknown = |name: &str| !Key::find(name).is_some_and(|key| key.is_known(kind));
        let unknown: Vec<_> = values.iter().filter(|(name, _)| unknown(name)).map(unknown_term).collect();
        if !unknown.is_empty() {
            return Err(format!("[{}] are not recognised policy settings", unknown.join(",")));
        }
        Ok(PolicyDefinition { values: values.clone() })
    }

    /// What the policies of both kinds amount to.
    #[must_use]
    pub fn effective<'a>(user: Option<&'a Self>, operator: Option<&'a Self>) -> Option<Cow<'a, Self>> {
        match (user, operator) {
            (Some(user), Some(operator)) => Some(Cow::Owned(user.merged_with(operator))),
            (user, operator) => user.or(operator).map(Cow::Borrowed),
        }
    }

    fn merged_with(&self, operator: &Self) -> Self {
        let mut values = self.values.clone();
        for (name, theirs) in &operator.values {
            let merged = match values.get(name) {
                Some(ours) => merge(name, ours, theirs).clone(),
                None => theirs.clone(),
            };
            values.insert(name.clone(), merged);
        }
        PolicyDefinition { values }
    }

    /// Whether queues of this type know all of its keys. Those for exchanges disturb no queue.
    #[must_use]
    pub fn suits(&self, queue_type: QueueType) -> bool {
        let suits = |name: &String| !Key::find(name).is_some_and(|key| key.not_for.contains(&queue_type));
        self.values.keys().all(suits)
    }

    #[must_use]
    pub fn integer(&self, key: &str) -> Option<i64> {
        self.values.get(key).and_then(integer)
    }

    #[must_use]
    pub fn text(&self, key: &str) -> Option<&str> {
        self.values.get(key)?.as_str()
    }

    #[must_use]
    pub fn boolean(&self, key: &str) -> Option<bool> {
        self.values.get(key)?.as_bool()
    }

    #[must_use]
    pub fn retry(&self) -> Option<Retry> {
        self.values.get("retry").and_then(|value| Retry::from_json(value).ok())
    }

    /// The definition as an object, with its keys sorted.
    #[must_use]
    pub fn to_json(&self) -> Value {
        Value::Object(self.values.clone())
    }
}

fn merge<'a>(name: &str, user: &'a Value, operator: &'a Value) -> &'a Value {
    let (Some(a), Some(b)) = (integer(user), integer(operator)) else { return operator };
    let user_wins = match Key::find(name).and_then(|key| key.operator) {
        Some(Merge::Least) => a < b,
        Some(Merge::Greatest) => a > b,
        Some(Merge::Limit) if a < 0 || b < 0 => a > b,
        Some(Merge::Limit) => a < b,
        Some(Merge::Operator) | None => false,
    };
    if user_wins { user } else { operator }
}

/// `rabbit_quorum_queue:validate_delayed_retry_constraints/1`. It speaks of one definition; a user's and an operator's
/// may contradict each other.
fn check_delayed_retry(values: &Map<String, Value>) -> Result<(), String> {
    let number = |key: &str| values.get(key).and_then(integer);
    let kind = values.get("delayed-retry-type").and_then(Value::as_str).filter(|&kind| kind != "disabled");
    match (kind, number("delayed-retry-min"), number("delayed-retry-max")) {
        (Some(kind), None, _) => Err(format!("delayed-retry-min is required when delayed-retry-type is {kind}")),
        (_, Some(min), Some(max)) if max < min => {
            Err(format!("delayed-retry-max ({max}) must not be smaller than delayed-retry-min ({min})"))
        }
        _ => Ok(()),
    }
}

fn unknown_term((name, value): (&String, &Value)) -> String {
    format!("{{{},{}}}", erlang::binary(name.as_bytes()), erlang::json_term(value))
}
