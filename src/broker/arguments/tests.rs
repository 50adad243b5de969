//! The texts were answered by RabbitMQ 4.3.6.

use std::slice::from_ref;

use super::*;
use crate::{broker::queue::ConnectionId, model::Name};

fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(text.into())
}

fn table(entries: &[(&str, AMQPValue)]) -> FieldTable {
    let mut table = FieldTable::default();
    for (key, value) in entries {
        table.insert((*key).into(), value.clone());
    }
    table
}

fn options(entries: &[(&str, AMQPValue)]) -> QueueOptions {
    QueueOptions {
        name: "q".into(),
        vhost: "/".into(),
        durable: true,
        auto_delete: false,
        exclusive_to: None,
        arguments: table(entries),
    }
}

/// What a declaration with these arguments is refused with, in front of and behind the name of the queue.
fn refused(entries: &[(&str, AMQPValue)]) -> String {
    let resource = ResourceName::queue("q", &"/".into());
    let refused = check_queue_arguments(&resource, &table(entries));
    refused.map_or_else(|error| error.to_string(), |()| "accepted".into()).replace(" for queue 'q' in vhost '/'", "")
}

fn with_type(queue_type: &str, key: &str, value: AMQPValue) -> String {
    refused(&[("x-queue-type", text(queue_type)), (key, value)])
}

#[test]
fn wrong_values_are_refused_in_rabbitmqs_words() {
    for (key, value, expected) in [
        ("x-message-ttl", text("1"), "\"expected integer, got longstr\""),
        ("x-message-ttl", AMQPValue::Boolean(true), "\"expected integer, got bool\""),
        ("x-message-ttl", AMQPValue::Void, "\"expected integer, got void\""),
        ("x-message-ttl", AMQPValue::Timestamp(1), "\"expected integer, got timestamp\""),
        ("x-message-ttl", AMQPValue::LongInt(-1), "{value_negative,-1}"),
        ("x-message-ttl", AMQPValue::LongLongInt(MAX_TIME_MS + 1), "{value_too_large,315360000001}"),
        ("x-expires", AMQPValue::LongInt(0), "{value_zero,0}"),
        ("x-expires", AMQPValue::LongInt(-1), "{value_negative,-1}"),
        ("x-max-length", AMQPValue::LongInt(-1), "{value_negative,-1}"),
        ("x-max-length-bytes", AMQPValue::Double(1.0), "\"expected integer, got double\""),
        ("x-max-priority", AMQPValue::LongInt(256), "{max_value_exceeded,256}"),
        ("x-max-priority", AMQPValue::LongInt(-1), "{value_negative,-1}"),
        ("x-overflow", text("explode"), "invalid_overflow"),
        ("x-overflow", AMQPValue::LongInt(1), "{unacceptable_type,signedint}"),
        ("x-queue-version", AMQPValue::LongInt(1), "\"unsupported queue version '1'\""),
        ("x-queue-version", AMQPValue::LongInt(-1), "{value_negative,-1}"),
        ("x-single-active-consumer", text("true"), "{unacceptable_type,longstr}"),
        ("x-dead-letter-routing-key", text("k"), "routing_key_but_no_dlx_defined"),
        ("x-dead-letter-routing-key", AMQPValue::LongInt(1), "{unacceptable_type,signedint}"),
        ("x-queue-leader-locator", text("foo"), "invalid_queue_locator_arg"),
        ("x-queue-type", text("foo"), "\"unsupported queue type 'foo'\""),
        ("x-queue-type", text("rabbit_quorum_queue"), "\"unsupported queue type 'rabbit_quorum_queue'\""),
        ("x-queue-type", AMQPValue::LongInt(1), "{unacceptable_type,signedint}"),
        ("x-queue-type", AMQPValue::Void, "{unacceptable_type,void}"),
    ] {
        assert_eq!(refused(&[(key, value)]), format!("invalid arg '{key}': {expected}"));
    }
    assert_eq!(
        refused(&[("x-dead-letter-exchange", AMQPValue::LongInt(1))]),
        "invalid type 'signedint' for arg 'x-dead-letter-exchange' in queue 'q' in vhost '/'"
    );
}

#[test]
fn values_of_quorum_queues_and_streams_are_checked_too() {
    let int = AMQPValue::LongInt;
    for (queue_type, key, value, expected) in [
        ("quorum", "x-dead-letter-strategy", text("foo"), "invalid_dlx_strategy"),
        ("quorum", "x-dead-letter-strategy", int(1), "{unacceptable_type,signedint}"),
        ("quorum", "x-max-in-memory-length", int(-1), "{value_negative,-1}"),
        ("quorum", "x-consumer-timeout", text("1"), "\"expected integer, got longstr\""),
        ("quorum", "x-consumer-disconnected-timeout", int(-1), "{value_negative,-1}"),
        ("quorum", "x-quorum-initial-group-size", int(0), "{value_zero,0}"),
        ("stream", "x-max-length-bytes", int(-1), "{value_negative,-1}"),
        ("stream", "x-max-age", text("1"), "invalid_max_age"),
        ("stream", "x-max-age", int(1), "{unacceptable_type,signedint}"),
        ("stream", "x-stream-max-segment-size-bytes", int(-1), "{value_negative,-1}"),
        ("stream", "x-stream-filter-size-bytes", text("1"), "\"expected integer, got longstr\""),
        ("stream", "x-initial-cluster-size", int(0), "{value_zero,0}"),
    ] {
        assert_eq!(with_type(queue_type, key, value), format!("invalid arg '{key}': {expected}"));
    }
    for (key, value) in [
        // Accepted as they are, whatever they are.
        ("x-delivery-limit", text("1")),
        ("x-delivery-limit", int(-1)),
        ("x-delayed-retry-type", text("foo")),
        ("x-delayed-retry-min", int(-1)),
        ("x-overflow", text("reject-publish-dlx")),
        ("x-consumer-timeout", int(0)),
    ] {
        assert_eq!(with_type("quorum", key, value), "accepted", "{key}");
    }
    assert_eq!(refused(&[("x-queue-mode", int(5))]), "accepted");
}

#[test]
fn arguments_of_another_type_are_refused_whatever_their_value() {
    let foreign = |key: &str, module: &str| format!("invalid arg '{key}' of queue type {module}");
    for key in ["x-delivery-limit", "x-consumer-timeout", "x-max-age", "x-delayed-retry-type", "x-max-in-memory-bytes"]
    {
        assert_eq!(refused(&[(key, text("x"))]), foreign(key, "rabbit_classic_queue"));
    }
    for key in ["x-max-priority", "x-queue-mode", "x-queue-version", "x-max-age", "x-queue-master-locator"] {
        assert_eq!(with_type("quorum", key, text("x")), foreign(key, "rabbit_quorum_queue"));
    }
    for key in ["x-expires", "x-message-ttl", "x-max-length", "x-single-active-consumer", "x-retry", "x-parking"] {
        assert_eq!(with_type("stream", key, text("x")), foreign(key, "rabbit_stream_queue"));
    }
    assert_eq!(
        with_type("stream", "x-dead-letter-exchange", text("x")),
        foreign("x-dead-letter-exchange", "rabbit_stream_queue")
    );
}

#[test]
fn arguments_that_nobody_knows_are_accepted() {
    for queue_type in QueueType::ALL {
        for key in ["x-anything", "x-member-placement-tag", "x-ha-policy", "foo"] {
            assert_eq!(with_type(queue_type.name(), key, AMQPValue::Void), "accepted");
        }
    }
}

#[test]
fn values_are_checked_in_rabbitmqs_order_and_before_foreign_arguments() {
    let minus = AMQPValue::LongInt(-1);
    assert_eq!(
        refused(&[("x-max-length", minus.clone()), ("x-expires", minus)]),
        "invalid arg 'x-expires': {value_negative,-1}"
    );
    assert_eq!(
        refused(&[
            ("x-queue-type", text("quorum")),
            ("x-max-age", text("1")),
            ("x-max-priority", AMQPValue::LongInt(1))
        ]),
        "invalid arg 'x-max-age' of queue type rabbit_quorum_queue"
    );
    assert_eq!(
        refused(&[("x-max-age", text("1")), ("x-message-ttl", text("a"))]),
        "invalid arg 'x-message-ttl': \"expected integer, got longstr\""
    );
}

#[test]
fn arguments_beyond_rabbitmqs_are_checked_in_the_same_shape() {
    let int = AMQPValue::LongInt;
    for (key, value, expected) in [
        ("x-delayed", int(1), "{unacceptable_type,signedint}"),
        ("x-durability", text("none"), "invalid_durability"),
        ("x-durability", AMQPValue::Boolean(true), "{unacceptable_type,bool}"),
        ("x-parking", text("yes"), "{unacceptable_type,longstr}"),
        ("x-retry", int(1), "{unacceptable_type,signedint}"),
        ("x-retry", text("max=x"), "\"max: expected integer, got text\""),
        ("x-message-group", int(1), "{unacceptable_type,signedint}"),
        ("x-message-group", text(""), "invalid_message_group"),
        ("x-message-deduplication", text("true"), "{unacceptable_type,longstr}"),
        ("x-cache-size", int(0), "{value_zero,0}"),
        ("x-cache-size", int(1_000_001), "{value_too_large,1000001}"),
        ("x-cache-ttl", int(-1), "{value_negative,-1}"),
        ("x-deduplication-header", text(""), "invalid_deduplication_header"),
    ] {
        for queue_type in ["classic", "quorum"] {
            assert_eq!(with_type(queue_type, key, value.clone()), format!("invalid arg '{key}': {expected}"));
        }
    }
    let all = [
        ("x-durability", text("os")),
        ("x-delayed", AMQPValue::Boolean(true)),
        ("x-parking", AMQPValue::Boolean(false)),
        ("x-retry", text("max=3")),
        ("x-message-group", AMQPValue::Boolean(true)),
        ("x-message-deduplication", AMQPValue::Boolean(true)),
        ("x-cache-size", int(10)),
        ("x-cache-ttl", int(0)),
        ("x-deduplication-header", text("id")),
    ];
    assert_eq!(refused(&all), "accepted");
    assert_eq!(with_type("stream", "x-durability", text("fsync")), "accepted");
    assert_eq!(with_type("stream", "x-durability", text("none")), "invalid arg 'x-durability': invalid_durability");
}

#[test]
fn ages_are_a_number_and_a_unit() {
    for (age, ms) in [
        ("1s", Some(1000)),
        ("2m", Some(120_000)),
        ("1h", Some(3_600_000)),
        ("01D", Some(86_400_000)),
        ("1M", Some(30 * 86_400_000)),
        ("1Y", Some(365 * 86_400_000)),
        ("1D\n", Some(86_400_000)),
        ("9999999999999999999999D", Some(u64::MAX)),
        ("0s", None),
        ("1", None),
        ("s", None),
        ("", None),
        ("1x", None),
        ("1.5D", None),
        (" 1D", None),
        ("1D ", None),
        ("1DD", None),
        ("१D", None),
    ] {
        assert_eq!(max_age_ms(age.as_bytes()), ms, "{age}");
    }
}

#[test]
fn quorum_queues_and_streams_refuse_what_they_cannot_be() {
    let refused = |durable, exclusive: bool, auto_delete| {
        let mut options = options(&[("x-queue-type", text("quorum"))]);
        (options.durable, options.auto_delete) = (durable, auto_delete);
        options.exclusive_to = exclusive.then_some(ConnectionId(1));
        check_properties(&options).map_or_else(|error| error.to_string(), |()| "accepted".into())
    };
    let property = |name: &str| format!("invalid property '{name}' for queue 'q' in vhost '/'");
    assert_eq!(refused(true, false, false), "accepted");
    assert_eq!(refused(false, true, true), property("auto-delete"));
    assert_eq!(refused(false, true, false), property("exclusive-owner"));
    assert_eq!(refused(false, false, false), property("non-durable"));
    let mut classic = options(&[]);
    (classic.durable, classic.auto_delete) = (false, true);
    assert!(check_properties(&classic).is_ok());
}

#[test]
fn segments_and_filters_of_streams_have_bounds() {
    let refused = |key: &str, number: i64| {
        let options = options(&[("x-queue-type", text("stream")), (key, AMQPValue::LongLongInt(number))]);
        check_properties(&options).map_or_else(|error| error.to_string(), |()| "accepted".into())
    };
    assert_eq!(refused(SEGMENT_SIZE, 3_000_000_000), "accepted");
    assert_eq!(refused(SEGMENT_SIZE, 3_000_000_001), "Exceeded max value for x-stream-max-segment-size-bytes");
    assert_eq!(refused(FILTER_SIZE, 16), "accepted");
    for number in [0, 15, 256] {
        assert_eq!(refused(FILTER_SIZE, number), "Invalid value for x-stream-filter-size-bytes");
    }
}

#[test]
fn only_classic_queues_are_named_by_the_server() {
    assert!(check_server_named(QueueType::Classic).is_ok());
    assert_eq!(
        check_server_named(QueueType::Quorum).unwrap_err().to_string(),
        "Cannot declare a server-named queue for type rabbit_quorum_queue"
    );
    assert_eq!(
        check_server_named(QueueType::Stream).unwrap_err().to_string(),
        "Cannot declare a server-named queue for type rabbit_stream_queue"
    );
}

#[test]
fn a_type_that_is_left_open_is_the_default_if_the_properties_suit_it() {
    let completed = |mut options: QueueOptions, default| {
        complete_queue_type(&mut options, default);
        lookup(&options.arguments, "x-queue-type").and_then(as_longstr).map(<[u8]>::to_vec)
    };
    // What is said stays as it was said where it means classic anyway.
    for (open, classic) in [
        (vec![], &b"classic"[..]),
        (vec![("x-queue-type", text(""))], b""),
        (vec![("x-queue-type", text("undefined"))], b"undefined"),
    ] {
        assert_eq!(completed(options(&open), QueueType::Classic).unwrap(), classic);
        assert_eq!(completed(options(&open), QueueType::Quorum).unwrap(), b"quorum");
        let exclusive = QueueOptions { exclusive_to: Some(ConnectionId(1)), ..options(&open) };
        assert_eq!(completed(exclusive, QueueType::Quorum).unwrap(), classic);
        let auto_delete = QueueOptions { auto_delete: true, ..options(&open) };
        assert_eq!(completed(auto_delete, QueueType::Quorum).unwrap(), classic);
        let transient = QueueOptions { durable: false, ..options(&open) };
        assert_eq!(completed(transient, QueueType::Quorum).unwrap(), classic);
    }
    assert_eq!(completed(options(&[("x-queue-type", text("classic"))]), QueueType::Quorum).unwrap(), b"classic");
    assert_eq!(completed(options(&[("x-queue-type", AMQPValue::Void)]), QueueType::Quorum), None);
}

#[test]
fn a_redeclaration_repeats_what_the_type_of_the_queue_knows() {
    let int = AMQPValue::LongInt;
    let refused = |current: &[(&str, AMQPValue)], new: &[(&str, AMQPValue)]| {
        let refused = check_equivalent(&options(current), &options(new));
        refused.map_or_else(|error| error.to_string(), |()| "same".into()).replace(" for queue 'q' in vhost '/'", "")
    };
    let quorum = ("x-queue-type", text("quorum"));
    let current = [quorum.clone(), ("x-delivery-limit", int(5))];
    assert_eq!(
        refused(&current, from_ref(&quorum)),
        "inequivalent arg 'x-delivery-limit': received none but current is the value '5' of type 'signedint'"
    );
    assert_eq!(refused(&current, &[quorum.clone(), ("x-delivery-limit", AMQPValue::LongLongInt(5))]), "same");
    // Foreign and unknown arguments are not compared, and not even checked.
    assert_eq!(refused(from_ref(&quorum), &[quorum.clone(), ("x-max-priority", text("x")), ("x-a", int(1))]), "same");
    assert_eq!(
        refused(from_ref(&quorum), &[("x-queue-type", text("classic"))]),
        "inequivalent arg 'x-queue-type': received 'classic' but current is 'quorum'"
    );
    // In the order of the type: quorum compares the dead-letter exchange before x-expires, classic the other way round.
    let both = [("x-dead-letter-exchange", text("x")), ("x-expires", int(1))];
    assert!(refused(&[], &both).starts_with("inequivalent arg 'x-expires'"));
    assert!(refused(&[quorum], &both).starts_with("inequivalent arg 'x-dead-letter-exchange'"));
    assert_eq!(
        refused(&[("x-retry", text("max=3"))], &[("x-retry", text("max=4"))]),
        "inequivalent arg 'x-retry': received 'max=4' but current is 'max=3'"
    );
    let parking = [("x-parking", AMQPValue::Boolean(false))];
    assert_eq!(
        refused(&[], &parking),
        "inequivalent arg 'x-parking': received the value 'false' of type 'bool' but current is none"
    );
}

#[test]
fn properties_are_compared_before_arguments() {
    let refused = |current: &QueueOptions, new: &QueueOptions| check_equivalent(current, new).unwrap_err().to_string();
    let current = options(&[]);
    let vhost: Name = "/".into();
    let new =
        QueueOptions { durable: false, auto_delete: true, vhost, ..options(&[("x-expires", AMQPValue::LongInt(1))]) };
    assert_eq!(
        refused(&current, &new),
        "inequivalent arg 'durable' for queue 'q' in vhost '/': received 'false' but current is 'true'"
    );
    let new = QueueOptions { durable: true, ..new };
    assert!(refused(&current, &new).starts_with("inequivalent arg 'auto_delete'"));
}
