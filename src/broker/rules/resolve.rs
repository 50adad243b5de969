//! How arguments and policies become traits and rules, as RabbitMQ 4.3 does it for each queue type.
//!
//! A number that both an argument and a policy give is the smaller one, what names something is the argument's, and
//! whatever else there is stands at the line that reads it. The sources: `rabbit_amqqueue_process:process_args_policy`,
//! `rabbit_quorum_queue:gather_policy_config`, `rabbit_stream_queue:update_stream_conf`.

use amq_protocol::types::{AMQPValue, FieldTable};

use super::{
    DeadLetterStrategy, Deduplication, DelayedRetry, DelayedRetryKind, Overflow, QueueRules, QueueTraits, Retry,
    RuleDefaults, StreamRules,
};
use crate::{
    broker::{
        arguments::{QueueType, max_age_ms},
        policy::PolicyDefinition,
    },
    model::{
        Name,
        arguments::{as_integer, as_longstr, lookup},
    },
    store::Durability,
};

/// Priorities of a quorum-type queue, which has them always.
const QUORUM_MAX_PRIORITY: u8 = 31;
const QUORUM_DEFAULT_PRIORITY: u8 = 4;
/// The header that groups messages when `x-message-group` is `true`.
const DEFAULT_GROUP_HEADER: &str = "x-group-id";
/// LavinMQ's defaults.
const DEFAULT_DEDUPLICATION_HEADER: &str = "x-deduplication-header";
const DEFAULT_CACHE_SIZE: u64 = 128;

fn text(arguments: &FieldTable, key: &str) -> Option<Name> {
    let bytes = lookup(arguments, key).and_then(as_longstr)?;
    Some(String::from_utf8_lossy(bytes).into())
}

fn flag(arguments: &FieldTable, key: &str) -> Option<bool> {
    match lookup(arguments, key) {
        Some(AMQPValue::Boolean(flag)) => Some(*flag),
        _ => None,
    }
}

fn natural(arguments: &FieldTable, key: &str) -> Option<u64> {
    lookup(arguments, key).and_then(as_integer).and_then(|number| u64::try_from(number).ok())
}

impl Deduplication {
    /// Reads LavinMQ's arguments, of a queue or an exchange; `None` unless `x-message-deduplication` is true.
    #[must_use]
    pub fn of(arguments: &FieldTable) -> Option<Self> {
        flag(arguments, "x-message-deduplication")?.then(|| Deduplication {
            header: text(arguments, DEFAULT_DEDUPLICATION_HEADER)
                .unwrap_or_else(|| DEFAULT_DEDUPLICATION_HEADER.into()),
            cache_size: natural(arguments, "x-cache-size").unwrap_or(DEFAULT_CACHE_SIZE),
            cache_ttl_ms: natural(arguments, "x-cache-ttl"),
        })
    }
}

impl QueueTraits {
    /// Reads a queue's arguments, which were checked when it was declared.
    #[must_use]
    pub fn of(arguments: &FieldTable) -> Self {
        let queue_type = QueueType::of(arguments);
        if queue_type == QueueType::Stream {
            return QueueTraits { queue_type, ..QueueTraits::default() };
        }
        let (max_priority, default_priority) = match queue_type {
            QueueType::Quorum => (QUORUM_MAX_PRIORITY, QUORUM_DEFAULT_PRIORITY),
            // Asking for 0 gives 1, as `rabbit_priority_queue:priorities/1` has it.
            _ => (natural(arguments, "x-max-priority").map_or(0, |max| max.clamp(1, 255) as u8), 0),
        };
        let message_group = match lookup(arguments, "x-message-group") {
            Some(AMQPValue::Boolean(true)) => Some(DEFAULT_GROUP_HEADER.into()),
            _ => text(arguments, "x-message-group"),
        };
        QueueTraits {
            queue_type,
            max_priority,
            default_priority,
            single_active_consumer: flag(arguments, "x-single-active-consumer").unwrap_or(false),
            delayed: flag(arguments, "x-delayed").unwrap_or(false),
            message_group,
            deduplication: Deduplication::of(arguments),
        }
    }
}

/// What a queue was declared with, and the one definition that its policies amount to.
struct Sources<'a> {
    arguments: &'a FieldTable,
    policy: Option<&'a PolicyDefinition>,
}

impl Sources<'_> {
    fn policy_natural(&self, key: &str) -> Option<u64> {
        self.policy?.integer(key).and_then(|number| u64::try_from(number).ok())
    }

    fn argument_natural(&self, key: &str) -> Option<u64> {
        natural(self.arguments, &argument(key))
    }

    /// The smaller of the two.
    fn least(&self, key: &str) -> Option<u64> {
        match (self.argument_natural(key), self.policy_natural(key)) {
            (Some(argument), Some(policy)) => Some(argument.min(policy)),
            (argument, policy) => argument.or(policy),
        }
    }

    fn policy_number(&self, key: &str) -> Option<u64> {
        self.policy_natural(key).or_else(|| self.argument_natural(key))
    }

    fn policy_text(&self, key: &str) -> Option<Name> {
        self.policy?.text(key).map(Name::from)
    }

    fn argument_text(&self, key: &str) -> Option<Name> {
        text(self.arguments, &argument(key))
    }

    fn argument_before_policy(&self, key: &str) -> Option<Name> {
        self.argument_text(key).or_else(|| self.policy_text(key))
    }

    fn policy_before_argument(&self, key: &str) -> Option<Name> {
        self.policy_text(key).or_else(|| self.argument_text(key))
    }
}

fn argument(key: &str) -> String {
    format!("x-{key}")
}

impl QueueRules {
    /// What a queue's arguments, the user policy and the operator policy that were selected for it, and the
    /// configuration ask for together.
    #[must_use]
    pub fn of(
        queue_type: QueueType,
        arguments: &FieldTable,
        policy: Option<&PolicyDefinition>,
        operator: Option<&PolicyDefinition>,
        defaults: &RuleDefaults,
    ) -> Self {
        let merged = PolicyDefinition::effective(policy, operator);
        let sources = Sources { arguments, policy: merged.as_deref() };
        match queue_type {
            QueueType::Classic => Self::classic(&sources, defaults),
            QueueType::Quorum => Self::quorum(&sources, defaults),
            QueueType::Stream => Self::stream(&sources),
        }
    }

    fn classic(sources: &Sources<'_>, defaults: &RuleDefaults) -> Self {
        QueueRules {
            message_ttl_ms: sources.least("message-ttl"),
            expires_ms: sources.least("expires"),
            max_length: sources.least("max-length"),
            max_length_bytes: sources.least("max-length-bytes"),
            overflow: sources.argument_before_policy("overflow").map_or_else(Overflow::default, |mode| overflow(&mode)),
            dead_letter_exchange: sources.argument_before_policy("dead-letter-exchange"),
            dead_letter_routing_key: sources.argument_before_policy("dead-letter-routing-key"),
            parking: flag(sources.arguments, "x-parking")
                .or_else(|| sources.policy?.boolean("parking"))
                .unwrap_or(defaults.parking),
            retry: retry(sources),
            durability: durability(sources),
            ..QueueRules::default()
        }
    }

    fn quorum(sources: &Sources<'_>, defaults: &RuleDefaults) -> Self {
        let mut rules = Self::classic(sources, defaults);
        rules.overflow = match sources.policy_before_argument("overflow").map(|mode| overflow(&mode)) {
            Some(Overflow::RejectPublish) => Overflow::RejectPublish,
            // Quorum queues accept `reject-publish-dlx` and do not have it.
            Some(Overflow::DropHead | Overflow::RejectPublishDlx) | None => Overflow::DropHead,
        };
        let at_least_once = sources.argument_before_policy("dead-letter-strategy").as_deref() == Some("at-least-once");
        if at_least_once && rules.overflow == Overflow::RejectPublish && rules.dead_letter_exchange.is_some() {
            rules.dead_letter_strategy = DeadLetterStrategy::AtLeastOnce;
        }
        rules.delivery_limit = delivery_limit(sources, defaults);
        rules.consumer_timeout_ms = sources.least("consumer-timeout").or(defaults.consumer_timeout_ms);
        rules.delayed_retry = delayed_retry(sources);
        rules
    }

    fn stream(sources: &Sources<'_>) -> Self {
        QueueRules {
            parking: false,
            stream: StreamRules {
                max_age_ms: sources.policy_before_argument("max-age").and_then(|age| max_age_ms(age.as_bytes())),
                max_bytes: sources.policy_number("max-length-bytes"),
                segment_bytes: sources.policy_number("stream-max-segment-size-bytes"),
                durability: durability(sources),
            },
            ..QueueRules::default()
        }
    }
}

fn durability(sources: &Sources<'_>) -> Option<Durability> {
    match sources.argument_before_policy("durability")?.as_ref() {
        "fsync" => Some(Durability::Fsync),
        "os" => Some(Durability::Os),
        _ => None,
    }
}

fn overflow(mode: &str) -> Overflow {
    match mode {
        "reject-publish" => Overflow::RejectPublish,
        "reject-publish-dlx" => Overflow::RejectPublishDlx,
        _ => Overflow::DropHead,
    }
}

/// The argument's; it was checked, and so was the policy's.
fn retry(sources: &Sources<'_>) -> Option<Retry> {
    let argument = lookup(sources.arguments, "x-retry").and_then(|value| Retry::from_argument(value).ok());
    argument.or_else(|| sources.policy?.retry())
}

/// Negative is unlimited, and loses against a limit. RabbitMQ does not check the argument's type: what is no integer is
/// as good as none.
fn delivery_limit(sources: &Sources<'_>, defaults: &RuleDefaults) -> Option<u32> {
    let argument = lookup(sources.arguments, "x-delivery-limit").and_then(as_integer);
    let policy = sources.policy.and_then(|policy| policy.integer("delivery-limit"));
    let limit = match (argument, policy) {
        (Some(a), Some(b)) if a < 0 || b < 0 => a.max(b),
        (Some(a), Some(b)) => a.min(b),
        (Some(limit), None) | (None, Some(limit)) => limit,
        (None, None) => return defaults.delivery_limit,
    };
    (limit >= 0).then(|| u32::try_from(limit).unwrap_or(u32::MAX))
}

/// A type that does not exist, or no positive `delayed-retry-min`, is no delay; without a maximum it is the minimum.
fn delayed_retry(sources: &Sources<'_>) -> DelayedRetry {
    let kind = match sources.policy_before_argument("delayed-retry-type").as_deref() {
        Some("all") => DelayedRetryKind::All,
        Some("failed") => DelayedRetryKind::Failed,
        Some("returned") => DelayedRetryKind::Returned,
        _ => DelayedRetryKind::Disabled,
    };
    let positive = |key| sources.least(key).filter(|&ms| ms > 0);
    match positive("delayed-retry-min") {
        Some(min_ms) if kind != DelayedRetryKind::Disabled => {
            DelayedRetry { kind, min_ms, max_ms: positive("delayed-retry-max").unwrap_or(min_ms) }
        }
        _ => DelayedRetry::default(),
    }
}

#[cfg(test)]
mod tests;
