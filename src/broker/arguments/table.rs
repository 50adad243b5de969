//! Which queue type knows which argument, and what each argument may be.
//!
//! # Why
//! RabbitMQ has two orders: values are checked in that of `rabbit_amqqueue:declare_args/0`, redeclarations compared in
//! that of the type's `capabilities`. Both show when several arguments are wrong at once, so both are kept: [`CHECKS`]
//! is the first, [`known_to`] the second.

use super::{QueueType, check::Check};

/// The largest segment of a stream, as in RabbitMQ.
pub const MAX_SEGMENT_BYTES: i64 = 3_000_000_000;
/// What the Bloom filter of a stream's chunk may take, as in RabbitMQ.
pub const FILTER_BYTES: std::ops::RangeInclusive<i64> = 16..=255;

const CLASSIC: &[&str] = &[
    "x-expires",
    "x-message-ttl",
    "x-dead-letter-exchange",
    "x-dead-letter-routing-key",
    "x-max-length",
    "x-max-length-bytes",
    "x-max-priority",
    "x-overflow",
    "x-queue-mode",
    "x-queue-version",
    "x-single-active-consumer",
    "x-queue-type",
    "x-queue-master-locator",
    "x-queue-leader-locator",
];

const QUORUM: &[&str] = &[
    "x-dead-letter-exchange",
    "x-dead-letter-routing-key",
    "x-dead-letter-strategy",
    "x-expires",
    "x-max-length",
    "x-max-length-bytes",
    "x-max-in-memory-length",
    "x-max-in-memory-bytes",
    "x-overflow",
    "x-single-active-consumer",
    "x-queue-type",
    "x-quorum-initial-group-size",
    "x-delivery-limit",
    "x-message-ttl",
    "x-queue-leader-locator",
    "x-consumer-disconnected-timeout",
    "x-consumer-timeout",
    "x-delayed-retry-type",
    "x-delayed-retry-min",
    "x-delayed-retry-max",
];

const STREAM: &[&str] = &[
    "x-max-length-bytes",
    "x-queue-type",
    "x-max-age",
    "x-stream-max-segment-size-bytes",
    "x-stream-filter-size-bytes",
    "x-initial-cluster-size",
    "x-queue-leader-locator",
];

/// What RabbitMQ does not have.
const OWN: &[&str] = &[
    "x-durability",
    "x-delayed",
    "x-retry",
    "x-parking",
    "x-message-group",
    "x-message-deduplication",
    "x-cache-size",
    "x-cache-ttl",
    "x-deduplication-header",
];

/// Of these, the ones that streams know.
const OWN_OF_STREAMS: &[&str] = &["x-durability"];

/// What deduplication is asked for with, of queues and exchanges; the first turns it on.
pub(super) const DEDUPLICATION: &[&str] =
    &["x-message-deduplication", "x-cache-size", "x-cache-ttl", "x-deduplication-header"];

/// What a declaration's arguments are checked for, in RabbitMQ's order. `x-queue-type` comes before all of them;
/// arguments without a line are accepted as they are.
pub(super) const CHECKS: &[(&str, Check)] = &[
    ("x-expires", Check::Time { min: 1 }),
    ("x-message-ttl", Check::Time { min: 0 }),
    ("x-dead-letter-exchange", Check::Text),
    ("x-dead-letter-routing-key", Check::DeadLetterRoutingKey),
    ("x-dead-letter-strategy", Check::OneOf(&["at-most-once", "at-least-once"], "invalid_dlx_strategy")),
    ("x-max-length", Check::NonNegative),
    ("x-max-length-bytes", Check::NonNegative),
    ("x-max-in-memory-length", Check::NonNegative),
    ("x-max-in-memory-bytes", Check::NonNegative),
    ("x-max-priority", Check::MaxPriority),
    ("x-overflow", Check::OneOf(&["drop-head", "reject-publish", "reject-publish-dlx"], "invalid_overflow")),
    ("x-queue-version", Check::Version2),
    ("x-single-active-consumer", Check::Bool),
    ("x-consumer-timeout", Check::NonNegative),
    ("x-consumer-disconnected-timeout", Check::NonNegative),
    ("x-quorum-initial-group-size", Check::Positive),
    ("x-max-age", Check::MaxAge),
    ("x-stream-max-segment-size-bytes", Check::NonNegative),
    ("x-stream-filter-size-bytes", Check::NonNegative),
    ("x-initial-cluster-size", Check::Positive),
    (
        "x-queue-leader-locator",
        Check::OneOf(&["client-local", "balanced", "random", "least-leaders"], "invalid_queue_locator_arg"),
    ),
    ("x-durability", Check::OneOf(&["fsync", "os"], "invalid_durability")),
    ("x-delayed", Check::Bool),
    ("x-retry", Check::Retry),
    ("x-parking", Check::Bool),
    ("x-message-group", Check::MessageGroup),
    ("x-message-deduplication", Check::Bool),
    ("x-cache-size", Check::CacheSize),
    ("x-cache-ttl", Check::Time { min: 0 }),
    ("x-deduplication-header", Check::HeaderName("invalid_deduplication_header")),
];

/// The arguments a type knows, in the order a redeclaration is compared in.
pub(super) fn known_to(queue_type: QueueType) -> impl Iterator<Item = &'static str> {
    let (theirs, own) = match queue_type {
        QueueType::Classic => (CLASSIC, OWN),
        QueueType::Quorum => (QUORUM, OWN),
        QueueType::Stream => (STREAM, OWN_OF_STREAMS),
    };
    theirs.iter().chain(own).copied()
}

/// Whether another type knows the argument, and this one does not.
pub(super) fn is_foreign(key: &str, queue_type: QueueType) -> bool {
    let knows = |queue_type| known_to(queue_type).any(|known| known == key);
    !knows(queue_type) && QueueType::ALL.into_iter().any(knows)
}
