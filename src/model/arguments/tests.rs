use std::hash::BuildHasher as _;

use amq_protocol::types::{DecimalValue, FieldArray, LongString};

use super::*;

fn table(entries: &[(&str, AMQPValue)]) -> FieldTable {
    let mut table = FieldTable::default();
    for (key, value) in entries {
        table.insert((*key).into(), value.clone());
    }
    table
}

fn longstr(bytes: &[u8]) -> AMQPValue {
    AMQPValue::LongString(LongString::from(bytes))
}

fn resource() -> ResourceName {
    ResourceName::queue("q", &"/".into())
}

#[test]
fn integers_are_the_same_across_widths_and_signs_but_no_float_is_an_integer() {
    let fives = [
        AMQPValue::ShortShortInt(5),
        AMQPValue::ShortShortUInt(5),
        AMQPValue::ShortInt(5),
        AMQPValue::ShortUInt(5),
        AMQPValue::LongInt(5),
        AMQPValue::LongUInt(5),
        AMQPValue::LongLongInt(5),
    ];
    for a in &fives {
        assert_eq!(as_integer(a), Some(5));
        for b in &fives {
            assert!(same_value(a, b), "{a:?} {b:?}");
        }
        assert!(!same_value(a, &AMQPValue::Double(5.0)));
        assert!(!same_value(a, &AMQPValue::Boolean(true)));
        assert!(!same_value(a, &longstr(b"5")));
    }
    assert_eq!(as_integer(&AMQPValue::Timestamp(5)), None);
    assert!(!same_value(&AMQPValue::LongLongInt(-1), &AMQPValue::Timestamp(u64::MAX)));
}

#[test]
fn strings_floats_and_empty_lists_are_the_same_by_value() {
    assert!(same_value(&longstr(b"\xffa"), &AMQPValue::ByteArray(b"\xffa"[..].into())));
    assert!(same_value(&AMQPValue::Float(1.5), &AMQPValue::Double(1.5)));
    assert!(same_value(&AMQPValue::FieldArray(FieldArray::default()), &AMQPValue::FieldTable(FieldTable::default())));
    assert!(same_value(&AMQPValue::Void, &AMQPValue::Void));
    let decimal = |value| AMQPValue::DecimalValue(DecimalValue { scale: 1, value });
    assert!(same_value(&decimal(2), &decimal(2)) && !same_value(&decimal(2), &decimal(3)));
}

#[test]
fn types_count_inside_arrays() {
    let array = |value| AMQPValue::FieldArray(FieldArray::from(vec![value]));
    assert!(same_value(&array(AMQPValue::LongInt(1)), &array(AMQPValue::LongInt(1))));
    assert!(!same_value(&array(AMQPValue::LongInt(1)), &array(AMQPValue::LongLongInt(1))));
}

#[test]
fn a_timestamp_argument_does_not_match_a_timestamp_header() {
    let five = AMQPValue::Timestamp(5);
    assert!(same_value(&five, &five));
    assert!(!header_matches(&five, &five));
    assert!(header_matches(&five, &AMQPValue::LongInt(5)));
    assert!(header_matches(&AMQPValue::LongInt(5000), &five));
}

#[test]
fn inequivalent_property_has_rabbitmqs_text() {
    assert_eq!(check_flag(&resource(), "durable", true, true), Ok(()));
    assert_eq!(
        check_flag(&resource(), "durable", true, false).unwrap_err().to_string(),
        "inequivalent arg 'durable' for queue 'q' in vhost '/': received 'false' but current is 'true'"
    );
}

#[test]
fn inequivalent_argument_has_rabbitmqs_texts() {
    let text = |current: &FieldTable, received: &FieldTable| {
        check_argument(&resource(), "x-message-ttl", current, received).unwrap_err().to_string()
    };
    let none = FieldTable::default();
    let thousand = table(&[("x-message-ttl", AMQPValue::LongInt(1000))]);
    let five = table(&[("x-message-ttl", AMQPValue::LongLongInt(5000))]);
    let start = "inequivalent arg 'x-message-ttl' for queue 'q' in vhost '/': received";
    assert_eq!(text(&five, &thousand), format!("{start} '1000' but current is '5000'"));
    assert_eq!(text(&none, &thousand), format!("{start} the value '1000' of type 'signedint' but current is none"));
    assert_eq!(text(&thousand, &none), format!("{start} none but current is the value '1000' of type 'signedint'"));
    let odd = table(&[("x-message-ttl", longstr(b"\xe4"))]);
    assert_eq!(text(&thousand, &odd), format!("{start} 'ä' but current is '1000'"));
    let wide = table(&[("x-message-ttl", AMQPValue::LongLongInt(1000))]);
    assert_eq!(check_argument(&resource(), "x-message-ttl", &thousand, &wide), Ok(()));
}

#[test]
fn a_missing_queue_type_is_classic() {
    let none = FieldTable::default();
    let typed = |name: &[u8]| table(&[("x-queue-type", longstr(name))]);
    assert_eq!(check_argument(&resource(), "x-queue-type", &none, &typed(b"classic")), Ok(()));
    assert_eq!(check_argument(&resource(), "x-queue-type", &typed(b"classic"), &none), Ok(()));
    assert!(check_argument(&resource(), "x-queue-type", &none, &typed(b"quorum")).is_err());
    assert_eq!(
        check_argument(&resource(), "x-queue-type", &typed(b"classic"), &typed(b"quorum")).unwrap_err().to_string(),
        "inequivalent arg 'x-queue-type' for queue 'q' in vhost '/': received 'quorum' but current is 'classic'"
    );
}

#[test]
fn an_exchange_name_argument_must_be_a_longstr() {
    let key = "x-dead-letter-exchange";
    let read = |value| exchange_name_argument(&resource(), key, &table(&[(key, value)]));
    assert_eq!(read(longstr(b"dlx")), Ok(Some("dlx".into())));
    assert_eq!(read(longstr(b"\xe4")), Ok(None));
    assert_eq!(exchange_name_argument(&resource(), key, &FieldTable::default()), Ok(None));
    assert_eq!(
        read(AMQPValue::LongInt(1)).unwrap_err().to_string(),
        "invalid type 'signedint' for arg 'x-dead-letter-exchange' in queue 'q' in vhost '/'"
    );
}

#[test]
fn identical_tables_agree_in_types_and_hash_alike() {
    let hasher = ahash::RandomState::with_seeds(1, 2, 3, 4);
    let hash = |t: &FieldTable| {
        let mut state = hasher.build_hasher();
        hash_table(t, &mut state);
        state.finish()
    };
    let a = table(&[("n", AMQPValue::Double(f64::NAN)), ("s", longstr(b"x"))]);
    assert!(identical_tables(&a, &a.clone()));
    assert_eq!(hash(&a), hash(&a.clone()));
    let int = table(&[("n", AMQPValue::LongInt(1))]);
    let long = table(&[("n", AMQPValue::LongLongInt(1))]);
    assert!(!identical_tables(&int, &long));
    assert_ne!(hash(&int), hash(&long));
}
