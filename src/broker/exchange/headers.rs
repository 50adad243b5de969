//! The headers type: a binding's arguments are conditions on a message's headers.
//!
//! `x-match` says how they combine (`all`, the default, or `any`) and whether arguments whose name starts with `x-`
//! are conditions too (`all-with-x`, `any-with-x`). An argument without a value asks only whether the header is there.

use amq_protocol::types::{AMQPValue, FieldTable};

use super::rules::Rules;
use super::slots::Slot;
use super::target::{Target, Targets};
use crate::model::arguments::{self, header_matches};
use crate::model::erlang;

const X_MATCH: &str = "x-match";

/// How conditions combine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Combine {
    All,
    Any,
}

/// Reads `x-match`: how conditions combine, and whether `x-` arguments are conditions. None if it is no known word.
fn parse_x_match(value: &AMQPValue) -> Option<(Combine, bool)> {
    match arguments::as_longstr(value)? {
        b"all" => Some((Combine::All, false)),
        b"any" => Some((Combine::Any, false)),
        b"all-with-x" => Some((Combine::All, true)),
        b"any-with-x" => Some((Combine::Any, true)),
        _ => None,
    }
}

/// Checks a binding's `x-match`; the error is the text of the 406.
pub fn check_arguments(table: &FieldTable) -> Result<(), String> {
    let Some(value) = arguments::lookup(table, X_MATCH) else {
        return Ok(());
    };
    if parse_x_match(value).is_some() {
        return Ok(());
    }
    let shown = erlang::term(value);
    Err(if arguments::as_longstr(value).is_some() {
        format!("Invalid x-match field value {shown}; expected all, any, all-with-x, or any-with-x")
    } else {
        let kind = arguments::type_name(value);
        format!("Invalid x-match field type {kind} (value {shown}); expected longstr")
    })
}

/// What a condition asks of its header.
#[derive(Clone, Debug)]
enum Test {
    Present,
    Equals(AMQPValue),
}

/// A binding's arguments, compiled.
#[derive(Clone, Debug)]
struct Rule {
    combine: Combine,
    conditions: Box<[(Box<str>, Test)]>,
}

impl Rule {
    /// An `x-match` that [`check_arguments`] refuses means `all`, as RabbitMQ takes it in old definitions.
    fn compile(table: &FieldTable) -> Self {
        let (combine, with_x) =
            arguments::lookup(table, X_MATCH).and_then(parse_x_match).unwrap_or((Combine::All, false));
        let conditions = table
            .into_iter()
            .filter(|(key, _)| key.as_str() != X_MATCH && (with_x || !key.as_str().starts_with("x-")))
            .map(|(key, value)| {
                let test = match value {
                    AMQPValue::Void => Test::Present,
                    value => Test::Equals(value.clone()),
                };
                (key.as_str().into(), test)
            })
            .collect();
        Self { combine, conditions }
    }

    fn matches(&self, headers: Option<&FieldTable>) -> bool {
        let holds = |(key, test): &(Box<str>, Test)| {
            let Some(header) = headers.and_then(|headers| arguments::lookup(headers, key)) else {
                return false;
            };
            match test {
                Test::Present => true,
                Test::Equals(value) => header_matches(value, header),
            }
        };
        match self.combine {
            Combine::All => self.conditions.iter().all(holds),
            Combine::Any => self.conditions.iter().any(holds),
        }
    }
}

/// The rules of all bindings, tried one by one.
#[derive(Clone, Debug, Default)]
pub struct HeadersTable {
    rules: Rules<Rule>,
}

impl HeadersTable {
    pub fn add(&mut self, slot: Slot, table: &FieldTable, target: Target) {
        self.rules.add(slot, target, Rule::compile(table));
    }

    pub fn remove(&mut self, slot: Slot) {
        self.rules.remove(slot);
    }

    /// One look-up per condition until a rule is decided.
    pub fn collect(&self, headers: Option<&FieldTable>, out: &mut Targets) {
        for (target, rule) in self.rules.iter() {
            if rule.matches(headers) {
                out.push(target);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use amq_protocol::types::FieldArray;

    use super::*;

    fn table(entries: &[(&str, AMQPValue)]) -> FieldTable {
        let mut table = FieldTable::default();
        for (key, value) in entries {
            table.insert((*key).into(), value.clone());
        }
        table
    }

    fn text(value: &str) -> AMQPValue {
        AMQPValue::LongString(value.into())
    }

    fn matches(arguments: &[(&str, AMQPValue)], headers: &[(&str, AMQPValue)]) -> bool {
        Rule::compile(&table(arguments)).matches(Some(&table(headers)))
    }

    #[test]
    fn all_is_the_default_and_any_needs_one() {
        let arguments = [("a", text("1")), ("b", text("2"))];
        assert!(matches(&arguments, &[("a", text("1")), ("b", text("2")), ("c", text("3"))]));
        assert!(!matches(&arguments, &[("a", text("1"))]));
        assert!(!matches(&arguments, &[("a", text("1")), ("b", text("1"))]));
        let any = [("x-match", text("any")), ("a", text("1")), ("b", text("2"))];
        assert!(matches(&any, &[("b", text("2"))]));
        assert!(!matches(&any, &[("b", text("1"))]));
    }

    #[test]
    fn without_conditions_all_matches_everything_and_any_nothing() {
        for (word, expected) in [("all", true), ("all-with-x", true), ("any", false), ("any-with-x", false)] {
            let rule = Rule::compile(&table(&[("x-match", text(word))]));
            assert_eq!(rule.matches(None), expected, "{word}");
            assert_eq!(rule.matches(Some(&table(&[("x-match", text(word))]))), expected, "{word}");
        }
        assert!(matches(&[], &[]));
    }

    #[test]
    fn x_arguments_are_conditions_only_with_x() {
        let arguments = |word| [("x-match", text(word)), ("x-a", text("1")), ("b", text("2"))];
        assert!(matches(&arguments("all"), &[("b", text("2"))]));
        assert!(!matches(&arguments("all-with-x"), &[("b", text("2"))]));
        assert!(matches(&arguments("all-with-x"), &[("b", text("2")), ("x-a", text("1"))]));
        assert!(!matches(&arguments("any"), &[("x-a", text("1"))]));
        assert!(matches(&arguments("any-with-x"), &[("x-a", text("1"))]));
    }

    #[test]
    fn a_void_argument_asks_for_presence() {
        assert!(matches(&[("a", AMQPValue::Void)], &[("a", AMQPValue::LongInt(3))]));
        assert!(matches(&[("a", AMQPValue::Void)], &[("a", AMQPValue::Void)]));
        assert!(!matches(&[("a", AMQPValue::Void)], &[("b", AMQPValue::Void)]));
        assert!(!matches(&[("a", text("1"))], &[("a", AMQPValue::Void)]));
    }

    #[test]
    fn values_match_by_family() {
        let one = |value: AMQPValue, header: AMQPValue| matches(&[("a", value)], &[("a", header)]);
        assert!(one(AMQPValue::LongInt(1), AMQPValue::LongLongInt(1)));
        assert!(one(AMQPValue::ShortShortUInt(200), AMQPValue::LongInt(200)));
        assert!(!one(AMQPValue::LongInt(1), AMQPValue::Double(1.0)));
        assert!(!one(AMQPValue::LongInt(1), AMQPValue::Boolean(true)));
        assert!(!one(AMQPValue::LongInt(1), text("1")));
        assert!(one(text("x"), AMQPValue::ByteArray(b"x"[..].into())));
        assert!(!one(AMQPValue::Timestamp(1), AMQPValue::Timestamp(1)));
        let array = |value| AMQPValue::FieldArray(FieldArray::from(vec![value]));
        assert!(one(array(text("x")), array(text("x"))));
        assert!(!one(array(AMQPValue::LongInt(1)), array(AMQPValue::LongLongInt(1))));
        let nested = |value| AMQPValue::FieldTable(table(&[("k", value)]));
        assert!(one(nested(text("x")), nested(text("x"))));
        assert!(!one(nested(text("x")), nested(text("y"))));
    }

    #[test]
    fn a_message_without_headers_is_one_with_none() {
        assert!(!Rule::compile(&table(&[("a", AMQPValue::Void)])).matches(None));
        assert!(Rule::compile(&table(&[("x-a", AMQPValue::Void)])).matches(None));
    }

    #[test]
    fn bad_x_match_has_rabbitmqs_texts() {
        let error = |value| check_arguments(&table(&[("x-match", value)])).unwrap_err();
        let expected = "expected all, any, all-with-x, or any-with-x";
        assert_eq!(error(text("foo")), format!("Invalid x-match field value <<\"foo\">>; {expected}"));
        assert_eq!(error(text("")), format!("Invalid x-match field value <<>>; {expected}"));
        assert_eq!(
            error(AMQPValue::LongString(vec![0xe4].into())),
            format!("Invalid x-match field value <<\"ä\">>; {expected}")
        );
        let of_type = |kind: &str| format!("Invalid x-match field type {kind}; expected longstr");
        assert_eq!(error(AMQPValue::LongInt(5)), of_type("signedint (value 5)"));
        assert_eq!(error(AMQPValue::Boolean(true)), of_type("bool (value true)"));
        assert_eq!(error(AMQPValue::Void), of_type("void (value undefined)"));
        assert_eq!(
            error(AMQPValue::FieldTable(table(&[("a", text("b"))]))),
            of_type(r#"table (value [{<<"a">>,longstr,<<"b">>}])"#)
        );
        assert_eq!(check_arguments(&table(&[("a", AMQPValue::Void)])), Ok(()));
    }
}
