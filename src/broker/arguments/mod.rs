//! The `x-` arguments of a queue: what a declaration may say, and what a redeclaration must repeat.
//!
//! Texts and order are RabbitMQ's (`rabbit_amqqueue:check_declare_arguments`, `assert_args_equivalence`).

use amq_protocol::types::{AMQPValue, FieldTable};

use super::{BrokerError, queue::QueueOptions};
use crate::model::{
    ResourceName,
    arguments::{as_integer, as_longstr, check_argument, check_flag, exchange_name_argument, lookup, type_name},
    erlang,
};

/// RabbitMQ's bound on times: about ten years, in milliseconds.
const MAX_TIME_MS: i64 = 315_360_000_000;

enum Rule {
    Integer { min: i64, max: i64 },
    Text,
    OneOf(&'static [&'static str], &'static str),
    Bool,
    Version2,
    Any,
}

/// Arguments of an ordinary queue, in the order RabbitMQ checks and compares them.
const RULES: &[(&str, Rule)] = &[
    ("x-queue-type", Rule::Any),
    ("x-expires", Rule::Integer { min: 1, max: MAX_TIME_MS }),
    ("x-message-ttl", Rule::Integer { min: 0, max: MAX_TIME_MS }),
    ("x-dead-letter-exchange", Rule::Text),
    ("x-dead-letter-routing-key", Rule::Text),
    ("x-max-length", Rule::Integer { min: 0, max: i64::MAX }),
    ("x-max-length-bytes", Rule::Integer { min: 0, max: i64::MAX }),
    ("x-overflow", Rule::OneOf(&["drop-head", "reject-publish", "reject-publish-dlx"], "invalid_overflow")),
    ("x-max-priority", Rule::Integer { min: 0, max: 255 }),
    ("x-queue-mode", Rule::Any),
    ("x-queue-version", Rule::Version2),
    ("x-single-active-consumer", Rule::Bool),
    (
        "x-queue-leader-locator",
        Rule::OneOf(&["client-local", "balanced", "random", "least-leaders"], "invalid_queue_locator_arg"),
    ),
];

/// Arguments that a queue type does not know, though another does.
const FOREIGN_TO_CLASSIC: &[&str] = &[
    "x-dead-letter-strategy",
    "x-delivery-limit",
    "x-max-in-memory-length",
    "x-max-in-memory-bytes",
    "x-quorum-initial-group-size",
    "x-consumer-timeout",
    "x-max-age",
    "x-stream-max-segment-size-bytes",
    "x-stream-filter-size-bytes",
    "x-initial-cluster-size",
];
const FOREIGN_TO_QUORUM: &[&str] = &[
    "x-max-priority",
    "x-queue-mode",
    "x-queue-version",
    "x-max-age",
    "x-stream-max-segment-size-bytes",
    "x-stream-filter-size-bytes",
    "x-initial-cluster-size",
];

/// The type a queue's arguments ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueueType {
    Classic,
    Quorum,
    Stream,
}

impl QueueType {
    /// Reads `x-queue-type`; whatever it does not know is classic.
    pub fn of(arguments: &FieldTable) -> Self {
        match lookup(arguments, "x-queue-type").and_then(as_longstr) {
            Some(b"quorum") => QueueType::Quorum,
            Some(b"stream") => QueueType::Stream,
            _ => QueueType::Classic,
        }
    }

    /// RabbitMQ's module, which its texts name.
    pub fn module(self) -> &'static str {
        match self {
            QueueType::Classic => "rabbit_classic_queue",
            QueueType::Quorum => "rabbit_quorum_queue",
            QueueType::Stream => "rabbit_stream_queue",
        }
    }

    fn foreign(self) -> &'static [&'static str] {
        match self {
            QueueType::Classic => FOREIGN_TO_CLASSIC,
            QueueType::Quorum => FOREIGN_TO_QUORUM,
            QueueType::Stream => &[],
        }
    }
}

/// Arguments this version accepts without acting on them; a declaration that uses one is logged.
const WITHOUT_EFFECT: &[&str] = &[
    "x-expires",
    "x-message-ttl",
    "x-dead-letter-exchange",
    "x-dead-letter-routing-key",
    "x-max-length",
    "x-max-length-bytes",
    "x-overflow",
    "x-max-priority",
    "x-single-active-consumer",
    "x-delivery-limit",
    "x-consumer-timeout",
];

/// Checks the arguments of a queue that is about to be created.
///
/// # Errors
/// 406 with RabbitMQ's text for a wrong type, value or combination.
pub fn check_queue_arguments(resource: &ResourceName, arguments: &FieldTable) -> Result<(), BrokerError> {
    exchange_name_argument(resource, "x-dead-letter-exchange", arguments)
        .map_err(|error| BrokerError::InvalidArgument(error.to_string()))?;
    let invalid =
        |key: &str, error: String| BrokerError::InvalidArgument(format!("invalid arg '{key}' for {resource}: {error}"));
    if let Some(value) = lookup(arguments, "x-queue-type") {
        check_queue_type(value).map_err(|error| invalid("x-queue-type", error))?;
    }
    for (key, rule) in RULES {
        if let Some(value) = lookup(arguments, key) {
            rule.check(value).map_err(|error| invalid(key, error))?;
        }
    }
    let queue_type = QueueType::of(arguments);
    if let Some(key) = queue_type.foreign().iter().find(|key| arguments.contains_key(key)) {
        let text = format!("invalid arg '{key}' for {resource} of queue type {}", queue_type.module());
        return Err(BrokerError::InvalidArgument(text));
    }
    if lookup(arguments, "x-dead-letter-routing-key").is_some() && lookup(arguments, "x-dead-letter-exchange").is_none()
    {
        return Err(invalid("x-dead-letter-routing-key", "routing_key_but_no_dlx_defined".into()));
    }
    Ok(())
}

/// The arguments of a declaration that this version keeps, shows and compares, but does not act on.
pub fn arguments_without_effect(arguments: &FieldTable) -> Vec<&'static str> {
    WITHOUT_EFFECT.iter().copied().filter(|key| arguments.contains_key(key)).collect()
}

fn check_queue_type(value: &AMQPValue) -> Result<(), String> {
    match as_longstr(value) {
        Some(b"classic" | b"quorum" | b"" | b"undefined") => Ok(()),
        Some(other) => Err(format!("\"unsupported queue type '{}'\"", erlang::text(other))),
        None => Err(format!("{{unacceptable_type,{}}}", type_name(value))),
    }
}

impl Rule {
    fn check(&self, value: &AMQPValue) -> Result<(), String> {
        match self {
            Rule::Any => Ok(()),
            Rule::Integer { min, max } => {
                let number = as_integer(value).ok_or_else(|| expected_integer(value))?;
                match number {
                    n if n < 0 => Err(format!("{{value_negative,{n}}}")),
                    n if n < *min => Err(format!("{{value_zero,{n}}}")),
                    n if n > *max && *max == 255 => Err(format!("{{max_value_exceeded,{n}}}")),
                    n if n > *max => Err(format!("{{value_too_large,{n}}}")),
                    _ => Ok(()),
                }
            }
            Rule::Text => as_longstr(value).map(|_| ()).ok_or_else(|| unacceptable(value)),
            Rule::OneOf(allowed, error) => match as_longstr(value) {
                Some(text) if allowed.iter().any(|word| word.as_bytes() == text) => Ok(()),
                Some(_) => Err((*error).into()),
                None => Err(unacceptable(value)),
            },
            Rule::Bool => match value {
                AMQPValue::Boolean(_) => Ok(()),
                other => Err(unacceptable(other)),
            },
            Rule::Version2 => match as_integer(value) {
                Some(1 | 2) => Ok(()),
                Some(other) => Err(format!("\"unsupported queue version '{other}'\"")),
                None => Err(expected_integer(value)),
            },
        }
    }
}

fn expected_integer(value: &AMQPValue) -> String {
    format!("\"expected integer, got {}\"", type_name(value))
}

fn unacceptable(value: &AMQPValue) -> String {
    format!("{{unacceptable_type,{}}}", type_name(value))
}

/// Checks that a redeclaration means the queue that is there. Exclusivity was checked before.
///
/// # Errors
/// 406 `inequivalent arg …`.
pub fn check_equivalent(current: &QueueOptions, new: &QueueOptions) -> Result<(), BrokerError> {
    let resource = ResourceName::queue(&current.name, &current.vhost);
    let inequivalent =
        |error: crate::model::arguments::InequivalentArgument| BrokerError::InvalidArgument(error.to_string());
    check_flag(&resource, "durable", current.durable, new.durable).map_err(inequivalent)?;
    check_flag(&resource, "auto_delete", current.auto_delete, new.auto_delete).map_err(inequivalent)?;
    let (current_arguments, new_arguments) = (with_type(&current.arguments), with_type(&new.arguments));
    for (key, _) in RULES {
        check_argument(&resource, key, &current_arguments, &new_arguments).map_err(inequivalent)?;
    }
    Ok(())
}

/// The arguments with the type that a missing `x-queue-type` means.
fn with_type(arguments: &FieldTable) -> FieldTable {
    let mut arguments = arguments.clone();
    if lookup(&arguments, "x-queue-type").is_none() {
        arguments.insert("x-queue-type".into(), AMQPValue::LongString("classic".into()));
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(key: &str, value: AMQPValue) -> String {
        let mut arguments = FieldTable::default();
        arguments.insert(key.into(), value);
        let resource = ResourceName::queue("q", &"/".into());
        check_queue_arguments(&resource, &arguments).map_or_else(|error| error.to_string(), |()| "accepted".into())
    }

    #[test]
    fn wrong_values_are_refused_in_rabbitmqs_words() {
        let text = |text: &str| AMQPValue::LongString(text.into());
        for (key, value, expected) in [
            ("x-message-ttl", text("1"), "\"expected integer, got longstr\""),
            ("x-message-ttl", AMQPValue::LongInt(-1), "{value_negative,-1}"),
            ("x-expires", AMQPValue::LongInt(0), "{value_zero,0}"),
            ("x-expires", AMQPValue::LongLongInt(MAX_TIME_MS + 1), "{value_too_large,315360000001}"),
            ("x-max-priority", AMQPValue::LongInt(256), "{max_value_exceeded,256}"),
            ("x-overflow", text("explode"), "invalid_overflow"),
            ("x-single-active-consumer", text("true"), "{unacceptable_type,longstr}"),
            ("x-dead-letter-routing-key", text("k"), "routing_key_but_no_dlx_defined"),
            ("x-queue-type", text("foo"), "\"unsupported queue type 'foo'\""),
        ] {
            assert_eq!(refused(key, value), format!("invalid arg '{key}' for queue 'q' in vhost '/': {expected}"));
        }
        assert_eq!(refused("x-anything", AMQPValue::Void), "accepted");
        assert_eq!(
            refused("x-dead-letter-exchange", AMQPValue::LongInt(1)),
            "invalid type 'signedint' for arg 'x-dead-letter-exchange' in queue 'q' in vhost '/'"
        );
    }
}
