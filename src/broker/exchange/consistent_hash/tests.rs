use amq_protocol::{
    frame::WriteContext,
    protocol::{BasicProperties, basic::gen_properties},
    types::AMQPValue,
};
use proptest::prelude::*;

use super::*;
use crate::broker::exchange::subject::Attributes;

const KEYS: u32 = 2000;

fn arguments(entries: &[(&str, AMQPValue)]) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in entries {
        table.insert((*name).into(), value.clone());
    }
    table
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

fn binding(name: &str, weight: u16) -> Binding {
    Binding {
        source: "x".into(),
        destination: Destination::Queue(name.into()),
        key: weight.to_string().into(),
        arguments: FieldTable::default(),
    }
}

fn table(arguments: &FieldTable, weights: &[u16]) -> ConsistentHashTable {
    let mut table = ConsistentHashTable::new(arguments);
    for (slot, weight) in (0..).zip(weights) {
        table.add(&binding(&format!("queue-{slot}"), *weight), Target::queue(slot));
    }
    table
}

fn choose(table: &ConsistentHashTable, key: &[u8], attributes: &Attributes<'_>) -> Option<Target> {
    let mut out = Targets::default();
    table.collect(&Subject { keys: &[key, b"copy"], attributes }, &mut out);
    assert!(out.as_slice().len() <= 1);
    out.as_slice().first().copied()
}

/// Where each of many keys leads.
fn map(table: &ConsistentHashTable) -> Vec<Option<Target>> {
    (0..KEYS).map(|key| choose(table, format!("key {key}").as_bytes(), &Attributes::none())).collect()
}

fn moved(before: &[Option<Target>], after: &[Option<Target>]) -> usize {
    before.iter().zip(after).filter(|(before, after)| before != after).count()
}

#[test]
fn weights_are_integers_as_erlang_reads_them() {
    let error = |text: &str| Err(text.to_owned());
    for (key, weight) in [("1", 1), ("10000", 10_000), ("+5", 5), ("05", 5), ("0000000000000000000000007", 7)] {
        assert_eq!(parse_weight(key.as_bytes()), Ok(weight), "{key}");
    }
    for key in ["0", "-1", "-0", "-99999999999999999999", "+0"] {
        assert_eq!(parse_weight(key.as_bytes()), error("The binding key must be greater than 0"), "{key}");
    }
    for key in ["10001", "65536", "4294967297", "99999999999999999999"] {
        assert_eq!(parse_weight(key.as_bytes()), error("The binding key must not exceed 10000"), "{key}");
    }
    for (key, shown) in
        [("", "<<>>"), ("a", "<<\"a\">>"), (" 5", "<<\" 5\">>"), ("1.0", "<<\"1.0\">>"), ("-", "<<\"-\">>")]
    {
        assert_eq!(check_key(key.as_bytes()), Err(format!("The binding key must be an integer: {shown}")));
    }
}

#[test]
fn arguments_are_refused_with_rabbitmqs_texts() {
    let resource = ResourceName::exchange("x", &"/".into());
    let check = |entries: &[(&str, AMQPValue)]| check_arguments(&resource, &arguments(entries));
    let error = |text: &str| Err(text.to_owned());
    let (header, property) = (|value| ("hash-header", value), |value| ("hash-property", value));
    assert_eq!(check(&[]), Ok(()));
    assert_eq!(check(&[header(text("h"))]), Ok(()));
    for name in ["correlation_id", "message_id", "timestamp"] {
        assert_eq!(check(&[property(text(name))]), Ok(()));
    }
    assert_eq!(check(&[property(text("content_type"))]), error("Unsupported property: content_type"));
    assert_eq!(check(&[property(text(""))]), error("Unsupported property: "));
    let both = "hash-header and hash-property are mutually exclusive";
    assert_eq!(check(&[header(text("")), property(text("nope"))]), error(both));
    let wrong = "invalid type 'signedint' for arg 'hash-header' in exchange 'x' in vhost '/'";
    assert_eq!(check(&[header(AMQPValue::LongInt(5)), property(text("nope"))]), error(wrong));
    let wrong = "invalid type 'void' for arg 'hash-property' in exchange 'x' in vhost '/'";
    assert_eq!(check(&[property(AMQPValue::Void)]), error(wrong));
    assert_eq!(check(&[("x-hash-on", text("h")), ("x-algorithm", text("ring"))]), Ok(()));
}

#[test]
fn rabbitmqs_arguments_win_over_lavinmqs() {
    let input = |entries: &[(&str, AMQPValue)]| HashInput::of(&arguments(entries));
    let on = ("x-hash-on", text("other"));
    assert_eq!(input(&[]), HashInput::RoutingKey);
    assert_eq!(input(std::slice::from_ref(&on)), HashInput::Header("other".into()));
    assert_eq!(input(&[("hash-header", text("h")), on.clone()]), HashInput::Header("h".into()));
    assert_eq!(input(&[("hash-property", text("timestamp")), on]), HashInput::Property(Property::Timestamp));
    assert_eq!(input(&[("x-hash-on", AMQPValue::LongInt(1))]), HashInput::RoutingKey);
}

#[test]
fn without_destinations_there_is_none() {
    let mut table = table(&FieldTable::default(), &[1]);
    table.remove(Target::queue(0));
    table.remove(Target::queue(0));
    assert_eq!(choose(&table, b"k", &Attributes::none()), None);
}

#[test]
fn destinations_get_messages_in_proportion_to_their_weights() {
    let table = table(&FieldTable::default(), &[1, 2, 5, 2]);
    let mut counts = [0; 4];
    for key in 0..10_000u32 {
        let target = choose(&table, &key.to_le_bytes(), &Attributes::none()).unwrap();
        counts[target.as_queue().unwrap() as usize] += 1;
    }
    for (count, expected) in counts.into_iter().zip([1000i32, 2000, 5000, 2000]) {
        assert!((expected - count).abs() < 200, "{counts:?}");
    }
}

#[test]
fn a_second_binding_of_a_destination_is_ignored_and_either_takes_it_out() {
    let mut changed = table(&FieldTable::default(), &[1, 1]);
    let before = map(&changed);
    changed.add(&binding("queue-0", 500), Target::queue(0));
    assert_eq!(map(&changed), before);
    changed.remove(Target::queue(0));
    assert!(map(&changed).iter().all(|target| *target == Some(Target::queue(1))));
}

#[test]
fn only_what_is_named_is_hashed() {
    let raw = |properties: BasicProperties| {
        gen_properties(&properties)(WriteContext::from(Vec::new())).unwrap().into_inner().0
    };
    let header = |value: AMQPValue| BasicProperties::default().with_headers(arguments(&[("h", value)]));
    let plain = BasicProperties::default;
    type Make<'a> = &'a dyn Fn(u32) -> BasicProperties;
    let cases: [((&str, &str), Make<'_>); 4] = [
        (("hash-header", "h"), &|n| header(text(&n.to_string()))),
        (("hash-property", "correlation_id"), &|n| plain().with_correlation_id(n.to_string().into())),
        (("hash-property", "message_id"), &|n| plain().with_message_id(n.to_string().into())),
        (("hash-property", "timestamp"), &|n| plain().with_timestamp(n.into())),
    ];
    for ((argument, value), make) in cases {
        let table = table(&arguments(&[(argument, text(value))]), &[1; 5]);
        assert!(!table.is_by_key());
        let choose = |properties: BasicProperties, key: &str| {
            let raw = raw(properties);
            choose(&table, key.as_bytes(), &Attributes::of(Properties::parse(&raw).unwrap())).unwrap()
        };
        let chosen: std::collections::BTreeSet<_> = (0..100).map(|n| choose(make(n), "k")).collect();
        assert_eq!(chosen.len(), 5, "{argument} {value}");
        for n in 0..20 {
            assert_eq!(choose(make(n), "k"), choose(make(n).with_priority(3), "l"));
        }
        let absent: std::collections::BTreeSet<_> = (0..20).map(|n| choose(plain(), &n.to_string())).collect();
        assert_eq!(absent.len(), 1, "{argument} {value}");
    }
}

#[test]
fn the_choice_never_changes() {
    let table = table(&FieldTable::default(), &[1, 2, 3]);
    let chosen: Vec<_> = map(&table)[..12].iter().map(|target| target.unwrap().as_queue().unwrap()).collect();
    assert_eq!(chosen, [2, 1, 0, 2, 0, 2, 0, 2, 0, 1, 1, 1]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Of `n` equal destinations each has about `KEYS / n` keys; the standard deviation is below the root of that.
    #[test]
    fn one_more_destination_takes_its_share_and_nothing_else_moves(count in 1u32..20) {
        let mut changed = table(&FieldTable::default(), &vec![1; count as usize]);
        let before = map(&changed);
        let newcomer = Target::queue(count);
        changed.add(&binding(&format!("queue-{count}"), 1), newcomer);
        let after = map(&changed);
        for (before, after) in before.iter().zip(&after) {
            prop_assert!(before == after || *after == Some(newcomer));
        }
        let share = f64::from(KEYS) / f64::from(count + 1);
        prop_assert!((moved(&before, &after) as f64) < share + 5.0 * share.sqrt());
        changed.remove(newcomer);
        prop_assert_eq!(map(&changed), before);
    }

    #[test]
    fn one_that_goes_leaves_only_its_own_behind(
        weights in proptest::collection::vec(1u16..=10_000, 2..12),
        gone: prop::sample::Index,
    ) {
        let mut changed = table(&FieldTable::default(), &weights);
        let gone = Target::queue(u32::try_from(gone.index(weights.len())).unwrap());
        let before = map(&changed);
        changed.remove(gone);
        for (before, after) in before.iter().zip(map(&changed)) {
            prop_assert!(*before == after || *before == Some(gone));
            prop_assert_ne!(after, Some(gone));
        }
    }

    #[test]
    fn the_order_of_bindings_does_not_matter(
        weights in proptest::collection::vec(1u16..=10_000, 1..12),
        start: prop::sample::Index,
    ) {
        let forward = table(&FieldTable::default(), &weights);
        let mut rotated = ConsistentHashTable::new(&FieldTable::default());
        for place in 0..weights.len() {
            let slot = (place + start.index(weights.len())) % weights.len();
            let target = Target::queue(u32::try_from(slot).unwrap());
            rotated.add(&binding(&format!("queue-{slot}"), weights[slot]), target);
        }
        prop_assert_eq!(map(&forward), map(&rotated));
    }
}
