use amq_protocol::types::LongString;
use serde_json::{Value, json};

use super::*;
use crate::broker::policy::PolicyKind;

fn text(text: &str) -> AMQPValue {
    AMQPValue::LongString(LongString::from(text))
}

fn int(number: i64) -> AMQPValue {
    AMQPValue::LongLongInt(number)
}

fn table(entries: &[(&str, AMQPValue)]) -> FieldTable {
    let mut table = FieldTable::default();
    for (key, value) in entries {
        table.insert((*key).into(), value.clone());
    }
    table
}

fn definition(kind: PolicyKind, value: &Value) -> Option<PolicyDefinition> {
    (!value.is_null()).then(|| PolicyDefinition::parse(kind, value).unwrap())
}

fn rules(queue_type: QueueType, arguments: &[(&str, AMQPValue)], user: Value, operator: Value) -> QueueRules {
    let (user, operator) = (definition(PolicyKind::User, &user), definition(PolicyKind::Operator, &operator));
    QueueRules::of(queue_type, &table(arguments), user.as_ref(), operator.as_ref(), &RuleDefaults::default())
}

fn classic(arguments: &[(&str, AMQPValue)], user: Value) -> QueueRules {
    rules(QueueType::Classic, arguments, user, Value::Null)
}

fn quorum(arguments: &[(&str, AMQPValue)], user: Value) -> QueueRules {
    rules(QueueType::Quorum, arguments, user, Value::Null)
}

#[test]
fn without_arguments_and_policies_the_defaults_hold() {
    assert_eq!(classic(&[], Value::Null), QueueRules::default());
    let expected =
        QueueRules { delivery_limit: Some(20), consumer_timeout_ms: Some(1_800_000), ..QueueRules::default() };
    assert_eq!(quorum(&[], Value::Null), expected);
    let stream = rules(QueueType::Stream, &[], Value::Null, Value::Null);
    assert_eq!(stream, QueueRules { parking: false, ..QueueRules::default() });
    let defaults = RuleDefaults { consumer_timeout_ms: None, delivery_limit: None, parking: false };
    let rules = QueueRules::of(QueueType::Quorum, &FieldTable::default(), None, None, &defaults);
    assert_eq!((rules.delivery_limit, rules.consumer_timeout_ms, rules.parking), (None, None, false));
}

#[test]
fn of_an_argument_and_a_policy_the_smaller_number_holds() {
    for (key, read) in [
        ("message-ttl", (|rules| rules.message_ttl_ms) as fn(&QueueRules) -> Option<u64>),
        ("expires", |rules| rules.expires_ms),
        ("max-length", |rules| rules.max_length),
        ("max-length-bytes", |rules| rules.max_length_bytes),
        ("consumer-timeout", |rules| rules.consumer_timeout_ms),
    ] {
        let argument = format!("x-{key}");
        let of = |number: i64, user: Value| read(&quorum(&[(&argument, int(number))], user));
        assert_eq!(of(5, Value::Null), Some(5), "{key}");
        assert_eq!(of(5, json!({key: 7})), Some(5), "{key}");
        assert_eq!(of(9, json!({key: 7})), Some(7), "{key}");
        assert_eq!(read(&quorum(&[], json!({key: 7}))), Some(7), "{key}");
    }
}

#[test]
fn a_consumer_timeout_is_for_quorum_queues_only() {
    assert_eq!(classic(&[], json!({"consumer-timeout": 5})).consumer_timeout_ms, None);
}

#[test]
fn an_argument_names_the_dead_letter_target_before_a_policy_does() {
    let policy = json!({"dead-letter-exchange": "p", "dead-letter-routing-key": "k"});
    let rules = classic(&[("x-dead-letter-exchange", text(""))], policy.clone());
    assert_eq!(rules.dead_letter_exchange.as_deref(), Some(""));
    assert_eq!(rules.dead_letter_routing_key.as_deref(), Some("k"), "each by itself");
    assert_eq!(classic(&[], policy).dead_letter_exchange.as_deref(), Some("p"));
}

#[test]
fn overflow_is_the_arguments_for_classic_queues_and_the_policys_for_quorum_queues() {
    let argument = [("x-overflow", text("reject-publish"))];
    let policy = json!({"overflow": "drop-head"});
    assert_eq!(classic(&argument, policy.clone()).overflow, Overflow::RejectPublish);
    assert_eq!(quorum(&argument, policy).overflow, Overflow::DropHead);
    let dlx = [("x-overflow", text("reject-publish-dlx"))];
    assert_eq!(classic(&dlx, Value::Null).overflow, Overflow::RejectPublishDlx);
    assert_eq!(quorum(&dlx, Value::Null).overflow, Overflow::DropHead, "which quorum queues do not have");
    assert_eq!(quorum(&dlx, json!({"overflow": "reject-publish"})).overflow, Overflow::RejectPublish);
}

#[test]
fn a_delivery_limit_beats_none_and_the_smaller_one_holds() {
    let limit = |argument: Option<AMQPValue>, user: Value| {
        let argument: Vec<_> = argument.into_iter().map(|value| ("x-delivery-limit", value)).collect();
        quorum(&argument, user).delivery_limit
    };
    assert_eq!(limit(Some(int(-1)), Value::Null), None);
    assert_eq!(limit(Some(int(0)), Value::Null), Some(0));
    assert_eq!(limit(Some(int(-1)), json!({"delivery-limit": 5})), Some(5));
    assert_eq!(limit(Some(int(7)), json!({"delivery-limit": -1})), Some(7));
    assert_eq!(limit(Some(int(7)), json!({"delivery-limit": 5})), Some(5));
    assert_eq!(limit(Some(int(-7)), json!({"delivery-limit": -5})), None);
    assert_eq!(limit(Some(text("7")), Value::Null), Some(20), "no integer is as good as none");
    assert_eq!(limit(Some(int(i64::MAX)), Value::Null), Some(u32::MAX));
    assert_eq!(classic(&[("x-delivery-limit", int(5))], Value::Null).delivery_limit, None);
}

#[test]
fn dead_letters_are_at_least_once_where_that_can_be() {
    let strategy = |user: Value| quorum(&[], user).dead_letter_strategy;
    let at_least_once = |overflow: &str| json!({"dead-letter-strategy": "at-least-once", "overflow": overflow, "dead-letter-exchange": "x"});
    assert_eq!(strategy(at_least_once("reject-publish")), DeadLetterStrategy::AtLeastOnce);
    assert_eq!(strategy(at_least_once("drop-head")), DeadLetterStrategy::AtMostOnce);
    let without = json!({"dead-letter-strategy": "at-least-once", "overflow": "reject-publish"});
    assert_eq!(strategy(without), DeadLetterStrategy::AtMostOnce);
    let argument = [("x-dead-letter-strategy", text("at-most-once"))];
    let rules = quorum(&argument, at_least_once("reject-publish"));
    assert_eq!(rules.dead_letter_strategy, DeadLetterStrategy::AtMostOnce, "the argument wins");
}

#[test]
fn a_delayed_retry_takes_its_kind_from_the_policy_and_the_smaller_times() {
    let arguments =
        [("x-delayed-retry-type", text("all")), ("x-delayed-retry-min", int(10)), ("x-delayed-retry-max", int(100))];
    let expected = DelayedRetry { kind: DelayedRetryKind::All, min_ms: 10, max_ms: 100 };
    assert_eq!(quorum(&arguments, Value::Null).delayed_retry, expected);
    let policy = json!({"delayed-retry-type": "failed", "delayed-retry-min": 20, "delayed-retry-max": 50});
    let expected = DelayedRetry { kind: DelayedRetryKind::Failed, min_ms: 10, max_ms: 50 };
    assert_eq!(quorum(&arguments, policy).delayed_retry, expected);
    let no_max = quorum(&[], json!({"delayed-retry-type": "returned", "delayed-retry-min": 20})).delayed_retry;
    assert_eq!(no_max, DelayedRetry { kind: DelayedRetryKind::Returned, min_ms: 20, max_ms: 20 });
    for arguments in [
        vec![("x-delayed-retry-type", text("all"))],
        vec![("x-delayed-retry-type", text("all")), ("x-delayed-retry-min", int(0))],
        vec![("x-delayed-retry-type", text("foo")), ("x-delayed-retry-min", int(5))],
        vec![("x-delayed-retry-type", text("disabled")), ("x-delayed-retry-min", int(5))],
    ] {
        assert_eq!(quorum(&arguments, Value::Null).delayed_retry, DelayedRetry::default());
    }
}

#[test]
fn a_policy_wins_over_the_arguments_of_a_stream() {
    let arguments =
        [("x-max-age", text("1h")), ("x-max-length-bytes", int(100)), ("x-stream-max-segment-size-bytes", int(1000))];
    let stream = |user: Value| rules(QueueType::Stream, &arguments, user, Value::Null).stream;
    let declared =
        StreamRules { max_age_ms: Some(3_600_000), max_bytes: Some(100), segment_bytes: Some(1000), durability: None };
    assert_eq!(stream(Value::Null), declared);
    let policy = json!({"max-age": "2s", "max-length-bytes": 200, "stream-max-segment-size-bytes": 5});
    let changed =
        StreamRules { max_age_ms: Some(2000), max_bytes: Some(200), segment_bytes: Some(5), durability: None };
    assert_eq!(stream(policy), changed);
}

#[test]
fn durability_is_the_arguments_then_the_operators_then_the_users_for_every_type() {
    let durability = |arguments: &[(&str, AMQPValue)], user: Value, operator: Value| {
        QueueType::ALL.map(|queue_type| {
            let rules = rules(queue_type, arguments, user.clone(), operator.clone());
            rules.durability.or(rules.stream.durability)
        })
    };
    let (os, fsync) = (json!({"durability": "os"}), json!({"durability": "fsync"}));
    assert_eq!(durability(&[], Value::Null, Value::Null), [None; 3]);
    assert_eq!(durability(&[], os.clone(), Value::Null), [Some(Durability::Os); 3]);
    assert_eq!(durability(&[], os.clone(), fsync.clone()), [Some(Durability::Fsync); 3]);
    assert_eq!(durability(&[("x-durability", text("os"))], fsync.clone(), fsync), [Some(Durability::Os); 3]);
    assert_eq!(durability(&[("x-durability", text("fsync"))], os, Value::Null), [Some(Durability::Fsync); 3]);
}

#[test]
fn retry_and_parking_are_the_arguments_then_the_operators_then_the_users() {
    let user = json!({"retry": {"max": 2}, "parking": true});
    let operator = json!({"retry": "max=3", "parking": false});
    let both = rules(QueueType::Classic, &[], user.clone(), operator.clone());
    assert_eq!((both.retry.unwrap().max, both.parking), (3, false));
    let arguments = [("x-retry", text("max=4")), ("x-parking", AMQPValue::Boolean(true))];
    let all = rules(QueueType::Quorum, &arguments, user.clone(), operator);
    assert_eq!((all.retry.unwrap().max, all.parking), (4, true));
    assert_eq!(classic(&[], user).retry.unwrap().max, 2);
}

#[test]
fn traits_are_read_from_the_arguments() {
    let traits = |entries: &[(&str, AMQPValue)]| QueueTraits::of(&table(entries));
    assert_eq!(traits(&[]), QueueTraits::default());
    for (asked, max) in [(0, 1), (1, 1), (10, 10), (255, 255)] {
        assert_eq!(traits(&[("x-max-priority", int(asked))]).max_priority, max);
    }
    let quorum = traits(&[("x-queue-type", text("quorum"))]);
    assert_eq!((quorum.queue_type, quorum.max_priority, quorum.default_priority), (QueueType::Quorum, 31, 4));
    let stream = traits(&[("x-queue-type", text("stream")), ("x-delayed", AMQPValue::Boolean(true))]);
    assert_eq!(stream, QueueTraits { queue_type: QueueType::Stream, ..QueueTraits::default() });
    let flags =
        traits(&[("x-single-active-consumer", AMQPValue::Boolean(true)), ("x-delayed", AMQPValue::Boolean(true))]);
    assert!(flags.single_active_consumer && flags.delayed);
    let group = |value| traits(&[("x-message-group", value)]).message_group;
    assert_eq!(group(AMQPValue::Boolean(true)).as_deref(), Some("x-group-id"));
    assert_eq!(group(AMQPValue::Boolean(false)), None);
    assert_eq!(group(text("customer")).as_deref(), Some("customer"));
}

#[test]
fn deduplication_has_lavinmqs_defaults_and_is_off_unless_asked_for() {
    let on = ("x-message-deduplication", AMQPValue::Boolean(true));
    let of = |entries: &[(&str, AMQPValue)]| Deduplication::of(&table(entries));
    assert_eq!(of(&[("x-cache-size", int(5))]), None);
    assert_eq!(of(&[("x-message-deduplication", AMQPValue::Boolean(false))]), None);
    let defaults = Deduplication { header: "x-deduplication-header".into(), cache_size: 128, cache_ttl_ms: None };
    assert_eq!(of(std::slice::from_ref(&on)), Some(defaults));
    let all = of(&[on, ("x-cache-size", int(5)), ("x-cache-ttl", int(9)), ("x-deduplication-header", text("id"))]);
    assert_eq!(all, Some(Deduplication { header: "id".into(), cache_size: 5, cache_ttl_ms: Some(9) }));
}
