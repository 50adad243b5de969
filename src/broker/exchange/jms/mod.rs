//! The `x-jms-topic` type: bindings are selectors of the Java Message Service, and a message goes wherever one is true of
//! its headers. Keys play no part.
//!
//! RabbitMQ's JMS client compiles a selector from SQL to an Erlang term and sends its text as the binding argument
//! `rjms_erlang_selector`; SQL itself never gets here. The text comes from outside, so its size, depth and cost are
//! bounded.

use amq_protocol::types::FieldTable;

use super::rules::Rules;
use super::slots::Slot;
use super::subject::Subject;
use super::target::{Target, Targets};
use crate::model::arguments::{as_longstr, lookup};
use expression::{Expression, TRUE};

mod expression;
mod parser;
mod pattern;
mod term;

const SELECTOR: &str = "rjms_erlang_selector";

/// A binding's selector, compiled.
#[derive(Clone, Debug)]
struct Selector(Expression);

impl Selector {
    /// Reads a binding's arguments; the error is the text of the 406.
    fn compile(arguments: &FieldTable) -> Result<Self, String> {
        // Without one RabbitMQ's channel dies (541).
        let text = lookup(arguments, SELECTOR).and_then(as_longstr);
        let text = text.ok_or_else(|| format!("invalid JMS selector: argument '{SELECTOR}' must be a longstr"))?;
        let term = parser::parse(text).map_err(|reason| format!("invalid JMS selector: {reason}"))?;
        let expression = Expression::compile(&term);
        expression.map(Self).map_err(|reason| format!("invalid JMS selector pattern: {reason}"))
    }

    fn matches(&self, headers: Option<&FieldTable>) -> bool {
        self.0.evaluate(headers) == TRUE
    }
}

/// Checks a binding's selector; the error is the text of the 406.
pub fn check_arguments(arguments: &FieldTable) -> Result<(), String> {
    Selector::compile(arguments).map(|_| ())
}

/// The selectors of all bindings, tried one by one.
#[derive(Clone, Debug, Default)]
pub struct SelectorTable {
    rules: Rules<Selector>,
}

impl SelectorTable {
    pub fn add(&mut self, slot: Slot, arguments: &FieldTable, target: Target) {
        if let Ok(selector) = Selector::compile(arguments) {
            self.rules.add(slot, target, selector);
        }
    }

    pub fn remove(&mut self, slot: Slot) {
        self.rules.remove(slot);
    }

    pub fn collect(&self, subject: &Subject<'_>, out: &mut Targets) {
        let headers = subject.headers();
        for (target, selector) in self.rules.iter() {
            if selector.matches(headers) {
                out.push(target);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use amq_protocol::types::AMQPValue;

    use super::*;
    use crate::broker::exchange::subject::Attributes;

    fn arguments(selector: &str) -> FieldTable {
        let mut table = FieldTable::default();
        table.insert(SELECTOR.into(), AMQPValue::LongString(selector.into()));
        table
    }

    #[test]
    fn a_message_goes_where_a_selector_is_true() {
        let mut table = SelectorTable::default();
        let selectors = [
            "{'=',{'ident',<<\"colour\">>},<<\"blue\">>}.",
            "{'>',{'ident',<<\"weight\">>},10}.",
            "{'is_null',{'ident',<<\"weight\">>}}.",
            "{'ident',<<\"weight\">>}.",
        ];
        for (slot, selector) in (0..).zip(selectors) {
            table.add(slot, &arguments(selector), Target::queue(slot));
        }
        let collect = |table: &SelectorTable, headers: Option<&FieldTable>| {
            let attributes = headers.map_or_else(Attributes::none, Attributes::with_headers);
            let mut out = Targets::default();
            table.collect(&Subject { keys: &[b"k"], attributes: &attributes }, &mut out);
            out.as_slice().to_vec()
        };
        let mut headers = FieldTable::default();
        headers.insert("colour".into(), AMQPValue::LongString("blue".into()));
        assert_eq!(collect(&table, Some(&headers)), [Target::queue(0), Target::queue(2)]);
        headers.insert("weight".into(), AMQPValue::LongInt(11));
        assert_eq!(collect(&table, Some(&headers)), [Target::queue(0), Target::queue(1)]);
        assert_eq!(collect(&table, None), [Target::queue(2)]);
        table.remove(0);
        assert_eq!(collect(&table, Some(&headers)), [Target::queue(1)]);
    }

    #[test]
    fn bad_selectors_are_refused() {
        let text = |selector: &str| check_arguments(&arguments(selector)).unwrap_err();
        assert_eq!(text(""), "invalid JMS selector: unexpected_end");
        assert_eq!(text("queue"), "invalid JMS selector: {disallowed_atom,\"queue\"}");
        assert_eq!(
            text("{like,{ident,<<\"a\">>},<<\"x\">>,<<\"ab\">>}"),
            "invalid JMS selector pattern: {invalid_like_pattern,invalid_escape}"
        );
        let missing = "invalid JMS selector: argument 'rjms_erlang_selector' must be a longstr";
        assert_eq!(check_arguments(&FieldTable::default()), Err(missing.to_owned()));
        assert_eq!(check_arguments(&arguments("true.")), Ok(()));
    }
}
