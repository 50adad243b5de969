use std::sync::Arc;

use super::*;

fn policy(kind: PolicyKind, name: &str, object: Value) -> Arc<Policy> {
    Arc::new(Policy::from_json(kind, name, &object).unwrap())
}

fn user(name: &str, pattern: &str, priority: i64, definition: Value) -> Arc<Policy> {
    policy(PolicyKind::User, name, json!({"pattern": pattern, "priority": priority, "definition": definition}))
}

fn set(policies: &[Arc<Policy>]) -> PolicySet {
    let mut set = PolicySet::default();
    for policy in policies {
        assert!(set.insert(policy.clone()));
    }
    set
}

fn winner(set: &PolicySet, queue: &str, queue_type: QueueType) -> Option<String> {
    set.of_queue(&queue.into(), queue_type).user.map(|policy| policy.name.to_string())
}

/// The texts were answered by RabbitMQ 4.3.6.
#[test]
fn wrong_definitions_are_refused_in_rabbitmqs_words() {
    for (definition, expected) in [
        (json!({"message-ttl": "x", "max-length": -1}), "-1 is not a valid maximum length"),
        (json!({"message-ttl": "x", "foo": 1}), r#"<<"x">> is not a valid message TTL"#),
        (
            json!({"foo": 1, "bar": [1, 2], "c": {"a": null}}),
            r#"[{<<"bar">>,[1,2]},{<<"c">>,#{<<"a">> => null}},{<<"foo">>,1}] are not recognised policy settings"#,
        ),
        (json!({}), "no policy provided"),
        (json!({"max-length": 1.5}), "1.5 is not a valid maximum length"),
        (json!({"max-length": true, "delayed-retry-type": "x"}), "true is not a valid maximum length"),
        (json!({"delayed-retry-type": "all"}), "delayed-retry-min is required when delayed-retry-type is all"),
        (
            json!({"delayed-retry-type": "all", "delayed-retry-min": 10, "delayed-retry-max": 5}),
            "delayed-retry-max (5) must not be smaller than delayed-retry-min (10)",
        ),
        (json!({"overflow": "é"}), r#"<<"é"/utf8>> is not a valid overflow value"#),
        (json!({"overflow": [104, 105]}), r#""hi" is not a valid overflow value"#),
        (json!({"overflow": null}), "null is not a valid overflow value"),
        (json!({"max-age": "5"}), r#"<<"5">> is not a valid max age"#),
        (json!({"stream-filter-size-bytes": 5}), "5 is not a valid filter size. Valid range is 16-255"),
        (
            json!({"member-placement-tag": "5"}),
            r#"[{<<"member-placement-tag">>,<<"5">>}] are not recognised policy settings"#,
        ),
        (json!({"ha-mode": "all"}), r#"[{<<"ha-mode">>,<<"all">>}] are not recognised policy settings"#),
        (json!({"max-priority": 3}), r#"[{<<"max-priority">>,3}] are not recognised policy settings"#),
    ] {
        assert_eq!(PolicyDefinition::parse(PolicyKind::User, &definition).unwrap_err(), expected);
    }
    let operator = |definition: Value| PolicyDefinition::parse(PolicyKind::Operator, &definition).unwrap_err();
    assert_eq!(
        operator(json!({"dead-letter-exchange": "x"})),
        r#"[{<<"dead-letter-exchange">>,<<"x">>}] are not recognised policy settings"#
    );
    assert_eq!(operator(json!({"max-length": -5, "dead-letter-exchange": "x"})), "-5 is not a valid maximum length");
}

#[test]
fn every_key_is_checked() {
    for (key, good, bad, noun) in [
        ("alternate-exchange", json!("x"), json!(1), "alternate exchange name"),
        ("consumer-disconnected-timeout", json!(0), json!(-1), "consumer disconnected timeout"),
        ("consumer-timeout", json!(0), json!(-1), "consumer timeout"),
        ("dead-letter-exchange", json!(""), json!(1), "dead letter exchange name"),
        ("dead-letter-routing-key", json!(""), json!(1), "dead letter routing key"),
        ("dead-letter-strategy", json!("at-least-once"), json!("always"), "dead letter strategy"),
        ("delivery-limit", json!(-1), json!("1"), "delivery limit"),
        ("expires", json!(1), json!(0), "queue expiry"),
        ("initial-cluster-size", json!(0), json!(-1), "cluster size"),
        ("max-age", json!("1h"), json!(5), "max age"),
        ("max-in-memory-bytes", json!(0), json!(-1), "maximum memory in bytes"),
        ("max-in-memory-length", json!(0), json!(-1), "maximum memory in bytes"),
        ("max-length", json!(0), json!(1.0), "maximum length"),
        ("max-length-bytes", json!(u64::MAX), json!("1"), "maximum length in bytes"),
        ("message-ttl", json!(0), json!(-1), "message TTL"),
        ("overflow", json!("reject-publish-dlx"), json!("reject"), "overflow value"),
        ("queue-leader-locator", json!("random"), json!("near"), "queue leader locator value"),
        ("queue-master-locator", json!("client-local"), json!("near"), "master locator"),
        ("queue-mode", json!("lazy"), json!("busy"), "queue-mode value"),
        ("queue-version", json!(1), json!(3), "queue-version value"),
        ("stream-max-segment-size-bytes", json!(3_000_000_000_u64), json!(3_000_000_001_u64), "segment size"),
        ("target-group-size", json!(1), json!(0), "qq target count value"),
        ("delayed-retry-max", json!(1), json!(0), "delayed retry maximum delay. Must be a positive integer"),
        ("delayed-retry-min", json!(1), json!(0), "delayed retry minimum delay. Must be a positive integer"),
        (
            "delayed-retry-type",
            json!("disabled"),
            json!("some"),
            "delayed retry type. Must be one of: all, failed, returned, disabled",
        ),
        ("durability", json!("os"), json!("none"), "durability value. Must be fsync or os"),
        ("parking", json!(true), json!("true"), "parking value. Must be true or false"),
        ("retry", json!({}), json!({"max": -1}), "retry: max must be from 0 to 4294967295, got -1"),
    ] {
        let parsed = PolicyDefinition::parse(PolicyKind::User, &json!({key: good}));
        assert!(parsed.is_ok(), "{key}: {parsed:?}");
        let refused = PolicyDefinition::parse(PolicyKind::User, &json!({key: bad})).unwrap_err();
        assert_eq!(refused, format!("{} is not a valid {noun}", erlang::json_term(&bad)));
    }
}

#[test]
fn everything_wrong_with_a_policy_is_said_at_once() {
    let invalid = |object: Value| Policy::from_json(PolicyKind::User, "p", &object).unwrap_err();
    let error = invalid(json!({"pattern": "(", "definition": {"max-length": 1.5}, "priority": "x", "apply-to": "foo"}));
    assert_eq!(
        error.reasons(),
        [
            "1.5 is not a valid maximum length",
            "apply-to 'foo' unrecognised; should be one of: 'queues', 'classic_queues',  'quorum_queues', 'streams', 'exchanges', or 'all'",
            "pattern should be regular expression but is invalid: unclosed group",
            "priority should be a number, actually was <<\"x\">>",
        ]
    );
    assert!(error.to_string().starts_with("Validation failed\n\n1.5 is not a valid maximum length\napply-to 'foo'"));
    assert_eq!(invalid(json!({})).reasons(), [r#"Key "definition" not found in p"#, r#"Key "pattern" not found in p"#]);
    assert_eq!(
        invalid(json!({"pattern": 1, "definition": [1], "priority": 1.5})).reasons(),
        [
            "definition must be a dictionary: [1]",
            "pattern should be a binary but was 1",
            "priority should be a whole number, actually was 1.5",
        ]
    );
    let long = "a".repeat(1025);
    assert_eq!(
        invalid(json!({"pattern": long, "definition": {"max-length": 1}})).reasons(),
        ["pattern must not exceed 1024 bytes"]
    );
}

#[test]
fn what_is_left_out_is_for_all_and_of_priority_0() {
    let policy = user("p", "^a", 0, json!({"max-length": 1}));
    assert_eq!(policy.apply_to, ApplyTo::All);
    let object = json!({"pattern": "^a", "definition": {"max-length": 1}, "priority": 2.0, "vhost": "ignored"});
    let policy = Policy::from_json(PolicyKind::User, "p", &object).unwrap();
    assert_eq!(
        policy.to_json(),
        json!({"pattern": "^a", "definition": {"max-length": 1}, "priority": 2, "apply-to": "all"})
    );
    assert_eq!(Policy::from_json(PolicyKind::User, "p", &policy.to_json()), Ok(policy));
}

#[test]
fn the_highest_priority_that_matches_wins_and_the_first_name_among_equals() {
    let length = || json!({"max-length": 1});
    let set = set(&[user("b", "^a", 1, length()), user("a", "^a", 1, length()), user("low", "", -1, length())]);
    assert_eq!(winner(&set, "abc", QueueType::Classic).unwrap(), "a");
    assert_eq!(winner(&set, "xa", QueueType::Classic).unwrap(), "low");
    let names: Vec<_> = set.list(PolicyKind::User).map(|policy| policy.name.to_string()).collect();
    assert_eq!(names, ["a", "b", "low"]);
}

#[test]
fn replacing_a_policy_moves_it_to_its_new_place() {
    let mut set = set(&[user("a", "x", 1, json!({"max-length": 1})), user("b", "x", 2, json!({"max-length": 1}))]);
    assert_eq!(winner(&set, "x", QueueType::Classic).unwrap(), "b");
    assert!(set.insert(user("a", "x", 3, json!({"max-length": 2}))));
    assert_eq!(winner(&set, "x", QueueType::Classic).unwrap(), "a");
    assert!(set.remove(PolicyKind::User, "a").is_some() && set.remove(PolicyKind::User, "a").is_none());
    assert_eq!(winner(&set, "x", QueueType::Classic).unwrap(), "b");
}

#[test]
fn a_policy_is_for_what_it_applies_to() {
    let applied = |apply_to: &str| {
        let object = json!({"pattern": "", "definition": {"max-length-bytes": 1}, "apply-to": apply_to});
        let set = set(&[policy(PolicyKind::User, "p", object)]);
        let queues = QueueType::ALL.map(|queue_type| winner(&set, "q", queue_type).is_some());
        (queues, set.of_exchange(&"x".into()).user.is_some())
    };
    assert_eq!(applied("all"), ([true, true, true], true));
    assert_eq!(applied("queues"), ([true, true, true], false));
    assert_eq!(applied("exchanges"), ([false, false, false], true));
    assert_eq!(applied("classic_queues"), ([true, false, false], false));
    assert_eq!(applied("quorum_queues"), ([false, true, false], false));
    assert_eq!(applied("streams"), ([false, false, true], false));
}

#[test]
fn a_policy_with_a_key_the_type_does_not_know_is_passed_over() {
    let passed_over = |definition: Value| {
        let set = set(&[user("p", "", 1, definition), user("next", "", 0, json!({"max-length-bytes": 1}))]);
        QueueType::ALL.map(|queue_type| winner(&set, "q", queue_type).unwrap() == "next")
    };
    assert_eq!(passed_over(json!({"max-length": 1, "alternate-exchange": "x"})), [false, false, true]);
    assert_eq!(passed_over(json!({"max-length": 1, "delivery-limit": 5})), [true, false, true]);
    assert_eq!(passed_over(json!({"max-age": "1h"})), [true, true, false]);
    assert_eq!(passed_over(json!({"queue-mode": "lazy"})), [false, true, true]);
    assert_eq!(passed_over(json!({"consumer-timeout": 1})), [false, false, false]);
    assert_eq!(passed_over(json!({"parking": false})), [false, false, true]);
    assert_eq!(passed_over(json!({"durability": "os"})), [false, false, false]);
}

#[test]
fn user_and_operator_policies_are_selected_apart_and_merged() {
    let set = set(&[
        user("u", "^a", 0, json!({"max-length": 5, "message-ttl": 10, "dead-letter-exchange": "x"})),
        policy(PolicyKind::Operator, "o", json!({"pattern": "", "definition": {"max-length": 9, "message-ttl": 3}})),
        policy(PolicyKind::Operator, "u", json!({"pattern": "^b", "definition": {"max-length": 1}, "priority": 1})),
    ]);
    let effective = |queue: &str| {
        let effective = set.of_queue(&queue.into(), QueueType::Classic);
        let name = |policy: &Option<Arc<Policy>>| policy.as_ref().map(|policy| policy.name.to_string());
        (name(&effective.user), name(&effective.operator), effective.definition().map(|merged| merged.to_json()))
    };
    let merged = json!({"max-length": 5, "message-ttl": 3, "dead-letter-exchange": "x"});
    assert_eq!(effective("a"), (Some("u".into()), Some("o".into()), Some(merged)));
    assert_eq!(effective("b"), (None, Some("u".into()), Some(json!({"max-length": 1}))));
    assert_eq!(effective("c").1.unwrap(), "o");
}

#[test]
fn keys_that_both_kinds_have_are_merged_each_in_its_way() {
    for (key, user, operator, expected) in [
        ("expires", json!(5), json!(6), json!(5)),
        ("expires", json!(7), json!(6), json!(6)),
        ("max-length-bytes", json!(7), json!(6), json!(6)),
        ("max-in-memory-length", json!(7), json!(6), json!(6)),
        ("delivery-limit", json!(7), json!(6), json!(6)),
        ("delivery-limit", json!(-1), json!(6), json!(6)),
        ("delivery-limit", json!(7), json!(-1), json!(7)),
        ("delivery-limit", json!(-5), json!(-1), json!(-1)),
        ("overflow", json!("drop-head"), json!("reject-publish"), json!("reject-publish")),
        ("queue-version", json!(1), json!(2), json!(2)),
        ("target-group-size", json!(3), json!(5), json!(5)),
        ("target-group-size", json!(5), json!(3), json!(5)),
        ("delayed-retry-type", json!("disabled"), json!("disabled"), json!("disabled")),
        ("delayed-retry-min", json!(3), json!(5), json!(5)),
        ("delayed-retry-max", json!(3), json!(5), json!(3)),
        ("parking", json!(true), json!(false), json!(false)),
        ("durability", json!("os"), json!("fsync"), json!("fsync")),
        ("retry", json!({"max": 1}), json!("max=2"), json!("max=2")),
    ] {
        let user = PolicyDefinition::parse(PolicyKind::User, &json!({key: user})).unwrap();
        let operator = PolicyDefinition::parse(PolicyKind::Operator, &json!({key: operator})).unwrap();
        let merged = PolicyDefinition::effective(Some(&user), Some(&operator)).unwrap();
        assert_eq!(merged.to_json(), json!({key: expected}));
    }
}

#[test]
fn a_policy_of_the_configuration_is_neither_replaced_nor_hidden() {
    let length = |number: i64| json!({"max-length": number});
    let mut set = PolicySet::configured([user("p", "", 0, length(1))]);
    assert!(!set.insert(user("p", "", 5, length(2))));
    assert!(set.is_configured(PolicyKind::User, "p") && !set.is_configured(PolicyKind::Operator, "p"));
    let operator = policy(PolicyKind::Operator, "p", json!({"pattern": "", "definition": length(3)}));
    assert!(set.insert(operator), "the kinds have names of their own");
    assert_eq!(set.get(PolicyKind::User, "p").unwrap().definition.integer("max-length"), Some(1));
}

#[test]
fn patterns_match_anywhere() {
    let matches = |pattern: &str, name: &str| Pattern::parse(pattern).unwrap().matches(name);
    assert!(matches("foo", "xfoobar") && matches("", "anything") && matches("^a$|b", "xb"));
    assert!(!matches("^foo", "xfoobar") && !matches("^a$", "ab"));
}

#[test]
fn look_ahead_at_the_start_is_understood() {
    for (pattern, yes, no) in [
        (r"^(?!amq\.)", vec!["orders", "", "x.amq.y", "amq"], vec!["amq.direct", "amq."]),
        (r"^(?!amq\.).*", vec!["orders"], vec!["amq.direct"]),
        (r"^(?!amq\.|tmp-)o.*s$", vec!["orders"], vec!["order", "tmp-os"]),
        (r"^(?=.*live)(?!.*test)shop", vec!["shop-live"], vec!["shop", "shop-live-test", "x-shop-live"]),
        (r"^(?!a)b|c", vec!["b", "xc", "ac"], vec!["ab", "x"]),
        (r"^(?!(a|b\)[)(]))x?", vec!["x", "b"], vec!["a", "ab", "b))", "b)("]),
        (r"(?i)^(?!AMQ\.)Orders", vec!["orders"], vec!["amq.orders", "x"]),
    ] {
        let pattern = Pattern::parse(pattern).unwrap();
        for name in yes {
            assert!(pattern.matches(name), "{pattern:?} {name}");
        }
        for name in no {
            assert!(!pattern.matches(name), "{pattern:?} {name}");
        }
    }
}

#[test]
fn other_look_around_and_what_is_no_expression_is_refused() {
    for (pattern, reason) in [
        ("(?!a)b", "look-around"),
        ("a(?!b)", "look-around"),
        ("^(?!a(?!b))", "look-around"),
        ("^((?!a).)*$", "look-around"),
        ("(?<!a)b", "look-around"),
        (r"(a)\1", "backreferences"),
        ("^(?!a", "look-around"),
        ("^(?!a)b)", "look-around"),
        ("[", "unclosed character class"),
        ("*", "repetition operator"),
        ("a{1000}{1000}", "size limit"),
    ] {
        let error = Pattern::parse(pattern).unwrap_err();
        assert!(error.starts_with("pattern should be regular expression but is invalid: "), "{error}");
        assert!(error.contains(reason), "{pattern}: {error}");
    }
}
