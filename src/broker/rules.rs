//! What a queue's arguments and the policies that match it ask for together.
//!
//! [`QueueTraits`] are fixed by the declaration. [`QueueRules`] may change while the queue lives, with its policies.

mod resolve;
mod retry;

use crate::{model::Name, store::Durability};

use super::arguments::QueueType;

/// What happens to a publish that would make a queue too long (`x-overflow`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overflow {
    /// The message that would be delivered next is dropped, or dead-lettered with reason `maxlen`.
    #[default]
    DropHead,
    /// The publish is nacked.
    RejectPublish,
    /// The publish is nacked, and a copy dead-lettered with reason `maxlen`.
    RejectPublishDlx,
}

/// How sure a dead letter is of arriving (`x-dead-letter-strategy`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeadLetterStrategy {
    /// Routed once; what cannot be routed is dropped.
    #[default]
    AtMostOnce,
    /// Kept until every target has it. Of quorum-type queues that have a dead-letter exchange and reject publishes.
    AtLeastOnce,
}

/// Which returned messages of a quorum-type queue wait before they are delivered again (`x-delayed-retry-type`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DelayedRetryKind {
    #[default]
    Disabled,
    All,
    /// Those whose return counts as a failure.
    Failed,
    /// Those whose return does not.
    Returned,
}

/// RabbitMQ 4.3's delayed retry: `min_ms` times the delivery count, at most `max_ms`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DelayedRetry {
    pub kind: DelayedRetryKind,
    pub min_ms: u64,
    pub max_ms: u64,
}

/// Retry with backoff (`x-retry`): the n-th failed delivery comes back after `initial_ms * multiplier^(n-1)`, at most
/// `max_delay_ms`, give or take `jitter`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Retry {
    /// Failed deliveries after which the message goes to the dead-letter target or the parking queue.
    pub max: u32,
    pub initial_ms: u64,
    pub multiplier: f64,
    pub max_delay_ms: u64,
    /// Part of the delay that is random: 0 is none, 0.5 is half as much more or less.
    pub jitter: f64,
}

/// What holds for a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamRules {
    pub max_age_ms: Option<u64>,
    pub max_bytes: Option<u64>,
    /// Bytes after which a segment is complete; `None` is RabbitMQ's 500,000,000.
    pub segment_bytes: Option<u64>,
    /// As [`QueueRules::durability`].
    pub durability: Option<Durability>,
}

/// What may change while the queue lives.
#[derive(Clone, Debug, PartialEq)]
pub struct QueueRules {
    pub message_ttl_ms: Option<u64>,
    pub expires_ms: Option<u64>,
    pub max_length: Option<u64>,
    pub max_length_bytes: Option<u64>,
    pub overflow: Overflow,
    pub dead_letter_exchange: Option<Name>,
    pub dead_letter_routing_key: Option<Name>,
    pub dead_letter_strategy: DeadLetterStrategy,
    /// Failed deliveries a message may have; one more and it goes. `None` is unlimited.
    pub delivery_limit: Option<u32>,
    /// Whether a message beyond its delivery limit or its retries, without a dead-letter exchange, goes to `<queue>.parked`
    /// instead of being dropped.
    pub parking: bool,
    pub consumer_timeout_ms: Option<u64>,
    pub delayed_retry: DelayedRetry,
    pub retry: Option<Retry>,
    /// What confirms wait for; `None` is what the broker is set to. Of a stream, [`StreamRules`] say so.
    pub durability: Option<Durability>,
    pub stream: StreamRules,
}

impl Default for QueueRules {
    fn default() -> Self {
        QueueRules {
            message_ttl_ms: None,
            expires_ms: None,
            max_length: None,
            max_length_bytes: None,
            overflow: Overflow::DropHead,
            dead_letter_exchange: None,
            dead_letter_routing_key: None,
            dead_letter_strategy: DeadLetterStrategy::AtMostOnce,
            delivery_limit: None,
            parking: true,
            consumer_timeout_ms: None,
            delayed_retry: DelayedRetry::default(),
            retry: None,
            durability: None,
            stream: StreamRules::default(),
        }
    }
}

/// What holds where neither an argument nor a policy says anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RuleDefaults {
    /// Of quorum-type queues; `None` is no timeout.
    pub consumer_timeout_ms: Option<u64>,
    /// Of quorum-type queues; `None` is unlimited.
    pub delivery_limit: Option<u32>,
    pub parking: bool,
}

impl Default for RuleDefaults {
    /// RabbitMQ 4.3's, and parking.
    fn default() -> Self {
        RuleDefaults { consumer_timeout_ms: Some(1_800_000), delivery_limit: Some(20), parking: true }
    }
}

/// LavinMQ's deduplication arguments, of a queue or an exchange.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deduplication {
    /// The header whose value tells duplicates.
    pub header: Name,
    /// Values remembered; the oldest goes first.
    pub cache_size: u64,
    /// How long a value is remembered; `None` is for ever. A message's header `x-cache-ttl` wins.
    pub cache_ttl_ms: Option<u64>,
}

/// What a declaration fixes for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueueTraits {
    pub queue_type: QueueType,
    /// The highest priority; 0 is a queue without priorities.
    pub max_priority: u8,
    /// The priority of a message without one.
    pub default_priority: u8,
    pub single_active_consumer: bool,
    /// `x-delayed`: headers `x-delay` and `x-deliver-at` are honoured.
    pub delayed: bool,
    /// `x-message-group`: the header whose value groups messages.
    pub message_group: Option<Name>,
    pub deduplication: Option<Deduplication>,
}

impl Default for QueueTraits {
    fn default() -> Self {
        QueueTraits {
            queue_type: QueueType::Classic,
            max_priority: 0,
            default_priority: 0,
            single_active_consumer: false,
            delayed: false,
            message_group: None,
            deduplication: None,
        }
    }
}
