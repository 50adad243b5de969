//! The `x-` arguments of a queue: what a declaration may say, and what a redeclaration must repeat.
//!
//! Texts and order are RabbitMQ 4.3's (`rabbit_amqqueue:check_declare_arguments`, `assert_args_equivalence`, and each
//! type's `capabilities` and `declare`). What an argument does is [`super::rules`]' affair.

mod check;
mod table;

#[cfg(test)]
mod tests;

use amq_protocol::types::{AMQPValue, FieldTable};

pub use self::{
    check::{MAX_TIME_MS, max_age_ms},
    table::{FILTER_BYTES, MAX_SEGMENT_BYTES},
};
use super::{BrokerError, queue::QueueOptions};
use crate::model::{
    ResourceName,
    arguments::{
        InequivalentArgument, as_integer, as_longstr, check_argument, check_flag, exchange_name_argument, lookup,
    },
    erlang,
};

const QUEUE_TYPE: &str = "x-queue-type";
const MAX_AGE: &str = "x-max-age";
const SEGMENT_SIZE: &str = "x-stream-max-segment-size-bytes";
const FILTER_SIZE: &str = "x-stream-filter-size-bytes";

/// The type a queue's arguments ask for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum QueueType {
    #[default]
    Classic,
    Quorum,
    Stream,
}

impl QueueType {
    pub const ALL: [QueueType; 3] = [QueueType::Classic, QueueType::Quorum, QueueType::Stream];

    /// Reads `x-queue-type`; whatever it does not know is classic.
    #[must_use]
    pub fn of(arguments: &FieldTable) -> Self {
        lookup(arguments, QUEUE_TYPE).and_then(as_longstr).and_then(Self::parse).unwrap_or_default()
    }

    fn parse(name: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|queue_type| queue_type.name().as_bytes() == name)
    }

    /// The value of `x-queue-type`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            QueueType::Classic => "classic",
            QueueType::Quorum => "quorum",
            QueueType::Stream => "stream",
        }
    }

    /// RabbitMQ's module, which its texts name.
    #[must_use]
    pub fn module(self) -> &'static str {
        match self {
            QueueType::Classic => "rabbit_classic_queue",
            QueueType::Quorum => "rabbit_quorum_queue",
            QueueType::Stream => "rabbit_stream_queue",
        }
    }

    /// Whether a queue of this type can have these properties.
    fn suits(self, options: &QueueOptions) -> bool {
        self == QueueType::Classic || (options.durable && options.exclusive_to.is_none() && !options.auto_delete)
    }
}

/// Puts the type into the arguments of a declaration that leaves it open: `default` if the queue's properties suit it,
/// else classic. `x-queue-type` counts as left open when it is missing, empty or `undefined`; where that means classic, an
/// empty or `undefined` one stays as it is, as in RabbitMQ, and a redeclaration must repeat it.
pub fn complete_queue_type(options: &mut QueueOptions, default: QueueType) {
    let given = lookup(&options.arguments, QUEUE_TYPE);
    let open = given.is_none_or(|value| matches!(as_longstr(value), Some(b"" | b"undefined")));
    let queue_type = if default.suits(options) { default } else { QueueType::Classic };
    if open && (given.is_none() || queue_type != QueueType::Classic) {
        options.arguments.insert(QUEUE_TYPE.into(), AMQPValue::LongString(queue_type.name().into()));
    }
}

/// Checks the arguments of a queue that is about to be created.
///
/// # Errors
/// 406 with RabbitMQ's text for a wrong type, value or combination, or an argument of another queue type.
pub fn check_queue_arguments(resource: &ResourceName, arguments: &FieldTable) -> Result<(), BrokerError> {
    exchange_name_argument(resource, "x-dead-letter-exchange", arguments)
        .map_err(|error| BrokerError::InvalidArgument(error.to_string()))?;
    let invalid =
        |key: &str, error: String| BrokerError::InvalidArgument(format!("invalid arg '{key}' for {resource}: {error}"));
    if let Some(value) = lookup(arguments, QUEUE_TYPE) {
        check_queue_type(value).map_err(|error| invalid(QUEUE_TYPE, error))?;
    }
    let queue_type = QueueType::of(arguments);
    for (key, check) in table::CHECKS {
        if let Some(value) = lookup(arguments, key)
            && table::known_to(queue_type).any(|known| known == *key)
        {
            check.check(value, arguments).map_err(|error| invalid(key, error))?;
        }
    }
    // RabbitMQ names the first in the order the client sent; ours come sorted.
    if let Some((key, _)) = arguments.into_iter().find(|(key, _)| table::is_foreign(key.as_str(), queue_type)) {
        let text = format!("invalid arg '{key}' for {resource} of queue type {}", queue_type.module());
        return Err(BrokerError::InvalidArgument(text));
    }
    Ok(())
}

/// Checks the arguments that deduplication has, of an exchange that asks for it. They mean nothing otherwise, as RabbitMQ
/// keeps arguments of exchanges that it does not know.
///
/// # Errors
/// The text of the 406, worded as that of a queue.
pub fn check_deduplication(resource: &ResourceName, arguments: &FieldTable) -> Result<(), String> {
    if lookup(arguments, table::DEDUPLICATION[0]).is_none() {
        return Ok(());
    }
    for (key, check) in table::CHECKS.iter().filter(|(key, _)| table::DEDUPLICATION.contains(key)) {
        if let Some(value) = lookup(arguments, key) {
            let invalid = |error| format!("invalid arg '{key}' for {resource}: {error}");
            check.check(value, arguments).map_err(invalid)?;
        }
    }
    Ok(())
}

fn check_queue_type(value: &AMQPValue) -> Result<(), String> {
    match as_longstr(value) {
        Some(b"" | b"undefined") => Ok(()),
        Some(name) if QueueType::parse(name).is_some() => Ok(()),
        Some(other) => Err(format!("\"unsupported queue type '{}'\"", erlang::text(other))),
        None => Err(check::unacceptable(value)),
    }
}

/// Checks what a type demands of a queue beyond its arguments' types: quorum queues and streams are durable, not
/// exclusive and not deleted by themselves, and a stream's segments and filters have bounds.
///
/// # Errors
/// 406 `invalid property …` and so on.
pub fn check_properties(options: &QueueOptions) -> Result<(), BrokerError> {
    let queue_type = QueueType::of(&options.arguments);
    if queue_type == QueueType::Classic {
        return Ok(());
    }
    let refused = [
        (options.auto_delete, "auto-delete"),
        (options.exclusive_to.is_some(), "exclusive-owner"),
        (!options.durable, "non-durable"),
    ];
    if let Some((_, property)) = refused.into_iter().find(|(refused, _)| *refused) {
        let resource = ResourceName::queue(&options.name, &options.vhost);
        return Err(BrokerError::InvalidArgument(format!("invalid property '{property}' for {resource}")));
    }
    if queue_type == QueueType::Stream {
        let number = |key| lookup(&options.arguments, key).and_then(as_integer);
        if number(SEGMENT_SIZE).is_some_and(|bytes| bytes > MAX_SEGMENT_BYTES) {
            return Err(BrokerError::InvalidArgument(format!("Exceeded max value for {SEGMENT_SIZE}")));
        }
        if number(FILTER_SIZE).is_some_and(|bytes| !FILTER_BYTES.contains(&bytes)) {
            return Err(BrokerError::InvalidArgument(format!("Invalid value for {FILTER_SIZE}")));
        }
    }
    Ok(())
}

/// Refuses to find a name for a queue whose type wants one from its client.
///
/// # Errors
/// 406 for quorum queues and streams.
pub fn check_server_named(queue_type: QueueType) -> Result<(), BrokerError> {
    if queue_type == QueueType::Classic {
        return Ok(());
    }
    let text = format!("Cannot declare a server-named queue for type {}", queue_type.module());
    Err(BrokerError::InvalidArgument(text))
}

/// Arguments this version accepts without acting on them; a declaration that uses one is logged.
const WITHOUT_EFFECT: &[&str] = &["x-dead-letter-strategy"];

/// The arguments of a declaration that this version keeps, shows and compares, but does not act on.
pub fn arguments_without_effect(arguments: &FieldTable) -> Vec<&'static str> {
    WITHOUT_EFFECT.iter().copied().filter(|key| arguments.contains_key(key)).collect()
}

/// Checks that a redeclaration means the queue that is there: the properties, then every argument that the type of the
/// queue that is there knows. Exclusivity was checked before; arguments that the type does not know are not compared.
///
/// # Errors
/// 406 `inequivalent arg …`.
pub fn check_equivalent(current: &QueueOptions, new: &QueueOptions) -> Result<(), BrokerError> {
    let resource = ResourceName::queue(&current.name, &current.vhost);
    let inequivalent = |error: InequivalentArgument| BrokerError::InvalidArgument(error.to_string());
    check_flag(&resource, "durable", current.durable, new.durable).map_err(inequivalent)?;
    check_flag(&resource, "auto_delete", current.auto_delete, new.auto_delete).map_err(inequivalent)?;
    for key in table::known_to(QueueType::of(&current.arguments)) {
        match key {
            MAX_AGE => check_argument(&resource, key, &age_in_ms(&current.arguments), &age_in_ms(&new.arguments)),
            _ => check_argument(&resource, key, &current.arguments, &new.arguments),
        }
        .map_err(inequivalent)?;
    }
    Ok(())
}

/// The age limit alone, as RabbitMQ compares and shows it: in milliseconds, whatever its unit was.
fn age_in_ms(arguments: &FieldTable) -> FieldTable {
    let mut age = FieldTable::default();
    if let Some(value) = lookup(arguments, MAX_AGE) {
        let ms = as_longstr(value).and_then(max_age_ms).map(|ms| AMQPValue::LongString(ms.to_string().into()));
        age.insert(MAX_AGE.into(), ms.unwrap_or_else(|| value.clone()));
    }
    age
}
