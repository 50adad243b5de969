//! A selector's meaning: the expression that a term stands for, and its value for a message's headers.
//!
//! As RabbitMQ's plugin evaluates it (`sjx_evaluator`): SQL-92's logic of true, false and unknown over Erlang's order of
//! values, in which numbers come before atoms and atoms before byte strings, and 1 equals 1.0. What makes the plugin fail
//! in the middle of a publish, adding to a string for example, is unknown here.

use std::cmp::Ordering;

use amq_protocol::types::{AMQPValue, FieldTable};

use super::pattern::Pattern;
use super::term::Term;
use crate::model::arguments::{as_integer, as_longstr, lookup};

/// What an expression comes to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    /// Of a header that is not there, and of what depends on it.
    Unknown,
    Integer(i128),
    Float(f64),
    /// `true` and `false` among them, and what the plugin has for a division by zero and for operators it does not know.
    Atom(&'static str),
    Bytes(&'a [u8]),
    /// A list or tuple: known, but no operator takes it.
    Compound,
}

pub const TRUE: Value<'static> = Value::Atom("true");
const FALSE: Value<'static> = Value::Atom("false");
const ERROR: Value<'static> = Value::Atom("error");

fn truth(value: bool) -> Value<'static> {
    if value { TRUE } else { FALSE }
}

impl<'a> Value<'a> {
    fn of_term(term: &'a Term) -> Self {
        match term {
            Term::Integer(value) => Self::Integer(*value),
            Term::Float(value) => Self::Float(*value),
            Term::Atom(name) => Self::Atom(name),
            Term::Binary(bytes) => Self::Bytes(bytes),
            Term::List(_) | Term::Tuple(_) => Self::Compound,
        }
    }

    fn of_header(value: &'a AMQPValue) -> Self {
        let float = |value: f64| if value.is_finite() { Self::Float(value) } else { Self::Unknown };
        match value {
            AMQPValue::Boolean(value) => truth(*value),
            AMQPValue::Float(value) => float((*value).into()),
            AMQPValue::Double(value) => float(*value),
            AMQPValue::ByteArray(bytes) => Self::Bytes(bytes.as_slice()),
            other => match (as_longstr(other), as_integer(other)) {
                (Some(bytes), _) => Self::Bytes(bytes),
                (_, Some(integer)) => Self::Integer(integer.into()),
                // The plugin fails on these.
                (None, None) => Self::Unknown,
            },
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "beyond 2^53 neighbours may be equal")]
    fn as_float(self) -> Option<f64> {
        match self {
            Self::Integer(value) => Some(value as f64),
            Self::Float(value) => Some(value),
            _ => None,
        }
    }

    /// Erlang's order; none if there is nothing to compare.
    fn compare(self, other: Self) -> Option<Ordering> {
        let rank = |value| match value {
            Self::Integer(_) | Self::Float(_) => Some(0),
            Self::Atom(_) => Some(1),
            Self::Bytes(_) => Some(2),
            Self::Unknown | Self::Compound => None,
        };
        match (self, other) {
            (Self::Integer(a), Self::Integer(b)) => Some(a.cmp(&b)),
            (Self::Atom(a), Self::Atom(b)) => Some(a.cmp(b)),
            (Self::Bytes(a), Self::Bytes(b)) => Some(a.cmp(b)),
            (a, b) => match (a.as_float(), b.as_float()) {
                (Some(a), Some(b)) => a.partial_cmp(&b),
                _ => Some(rank(a)?.cmp(&rank(b)?)),
            },
        }
    }

    /// Three-valued negation: what is neither true nor false is unknown.
    fn not(self) -> Self {
        match self {
            TRUE => FALSE,
            FALSE => TRUE,
            _ => Self::Unknown,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    Equal,
    NotEqual,
    Greater,
    Less,
    GreaterOrEqual,
    LessOrEqual,
    Add,
    Subtract,
    Multiply,
    Divide,
    /// None that the plugin knows.
    Other,
}

impl Operator {
    fn of(term: &Term) -> Self {
        match term {
            Term::Atom("=") => Self::Equal,
            Term::Atom("<>") => Self::NotEqual,
            Term::Atom(">") => Self::Greater,
            Term::Atom("<") => Self::Less,
            Term::Atom(">=") => Self::GreaterOrEqual,
            Term::Atom("<=") => Self::LessOrEqual,
            Term::Atom("+") => Self::Add,
            Term::Atom("-") => Self::Subtract,
            Term::Atom("*") => Self::Multiply,
            Term::Atom("/") => Self::Divide,
            _ => Self::Other,
        }
    }

    fn apply<'a>(self, left: Value<'a>, right: Value<'a>) -> Value<'a> {
        if left == Value::Unknown || right == Value::Unknown {
            return Value::Unknown;
        }
        let compared = |holds: fn(Ordering) -> bool| left.compare(right).map_or(Value::Unknown, |o| truth(holds(o)));
        match self {
            Self::Equal => compared(Ordering::is_eq),
            Self::NotEqual => compared(Ordering::is_ne),
            Self::Greater => compared(Ordering::is_gt),
            Self::Less => compared(Ordering::is_lt),
            Self::GreaterOrEqual => compared(Ordering::is_ge),
            Self::LessOrEqual => compared(Ordering::is_le),
            Self::Add => calculate(left, right, i128::checked_add, |a, b| a + b),
            Self::Subtract => calculate(left, right, i128::checked_sub, |a, b| a - b),
            Self::Multiply => calculate(left, right, i128::checked_mul, |a, b| a * b),
            Self::Divide => divide(left, right),
            Self::Other => ERROR,
        }
    }
}

/// Calculates with integers as long as they last, then with floats.
fn calculate<'a>(
    left: Value<'a>,
    right: Value<'a>,
    exact: fn(i128, i128) -> Option<i128>,
    approximate: fn(f64, f64) -> f64,
) -> Value<'a> {
    if let (Value::Integer(a), Value::Integer(b)) = (left, right)
        && let Some(value) = exact(a, b)
    {
        return Value::Integer(value);
    }
    match (left.as_float(), right.as_float()) {
        (Some(a), Some(b)) => Some(approximate(a, b)).filter(|v| v.is_finite()).map_or(Value::Unknown, Value::Float),
        _ => Value::Unknown,
    }
}

/// Two integers have a float as their quotient.
fn divide<'a>(left: Value<'a>, right: Value<'a>) -> Value<'a> {
    let zero = Value::Integer(0);
    if right.compare(zero) != Some(Ordering::Equal) {
        return calculate(left, right, |_, _| None, |a, b| a / b);
    }
    match left.compare(zero) {
        Some(Ordering::Greater) => Value::Atom("plus_infinity"),
        Some(Ordering::Less) => Value::Atom("minus_infinity"),
        Some(Ordering::Equal) => Value::Atom("nan"),
        None => Value::Unknown,
    }
}

/// An expression. As deep as the term it was made of, which the parser has bounded.
#[derive(Clone, Debug)]
pub enum Expression {
    Constant(Term),
    /// A header; none of a name that no header has.
    Header(Option<Box<str>>),
    Not(Box<Expression>),
    IsNull(Box<Expression>),
    Plus(Box<Expression>),
    Minus(Box<Expression>),
    /// With one operand, and none that the plugin knows.
    OtherUnary(Box<Expression>),
    And(Box<[Expression; 2]>),
    Or(Box<[Expression; 2]>),
    Like(Box<Expression>, Pattern),
    /// A value and its bounds.
    Between(Box<[Expression; 3]>),
    In(Box<Expression>, Vec<Term>),
    Binary(Operator, Box<[Expression; 2]>),
}

impl Expression {
    /// The meaning of a term; the error is what `~tp` shows of the plugin's reason to refuse a pattern.
    ///
    /// Tuples that stand for nothing are constants or errors, as the plugin has it; only bad patterns are refused.
    pub fn compile(term: &Term) -> Result<Self, String> {
        let Term::Tuple(items) = term else {
            return Ok(Self::Constant(term.clone()));
        };
        let one = |term: &Term| Self::compile(term).map(Box::new);
        let two = |a: &Term, b: &Term| Ok::<_, String>(Box::new([Self::compile(a)?, Self::compile(b)?]));
        match items.as_slice() {
            [Term::Atom("not"), operand] => Ok(Self::Not(one(operand)?)),
            [Term::Atom("ident"), name] => Ok(Self::header(name)),
            [Term::Atom("is_null"), operand] => Ok(Self::IsNull(Box::new(Self::operand(operand)))),
            [Term::Atom("not_null"), operand] => Ok(Self::IsNull(Box::new(Self::operand(operand))).negated()),
            [Term::Atom("+"), operand] => Ok(Self::Plus(one(operand)?)),
            [Term::Atom("-"), operand] => Ok(Self::Minus(one(operand)?)),
            [_, operand] => Ok(Self::OtherUnary(one(operand)?)),
            [Term::Atom("and"), a, b] => Ok(Self::And(two(a, b)?)),
            [Term::Atom("or"), a, b] => Ok(Self::Or(two(a, b)?)),
            [operator, a, Term::Tuple(range)] if matches!(range.as_slice(), [Term::Atom("range"), _, _]) => {
                Self::compile_ternary(term, operator, [a, &range[1], &range[2]])
            }
            [Term::Atom("in"), a, list] => Self::membership(a, list),
            [Term::Atom("not_in"), a, list] => Self::membership(a, list).map(Self::negated),
            [operator, a, b] => Ok(Self::Binary(Operator::of(operator), two(a, b)?)),
            [operator, a, b, c] => Self::compile_ternary(term, operator, [a, b, c]),
            _ => Ok(Self::Constant(term.clone())),
        }
    }

    fn compile_ternary(term: &Term, operator: &Term, [a, b, c]: [&Term; 3]) -> Result<Self, String> {
        let like = || Ok::<_, String>(Self::Like(Box::new(Self::operand(a)), Pattern::compile(b, c)?));
        let between =
            || Ok::<_, String>(Self::Between(Box::new([Self::compile(a)?, Self::compile(b)?, Self::compile(c)?])));
        match operator {
            Term::Atom("like") => like(),
            Term::Atom("not_like") => like().map(Self::negated),
            Term::Atom("between") => between(),
            Term::Atom("not_between") => between().map(Self::negated),
            _ => Ok(Self::Constant(term.clone())),
        }
    }

    fn membership(a: &Term, list: &Term) -> Result<Self, String> {
        match list {
            Term::List(items) => Ok(Self::In(Box::new(Self::compile(a)?), items.clone())),
            other => Ok(Self::Constant(Term::Tuple(vec![other.clone()]))),
        }
    }

    fn header(name: &Term) -> Self {
        let name = match name {
            Term::Binary(bytes) => str::from_utf8(bytes).ok(),
            _ => None,
        };
        Self::Header(name.map(Box::from))
    }

    /// What `like` and `is_null` look at: a header or a constant, no expression.
    fn operand(term: &Term) -> Self {
        match term {
            Term::Tuple(items) => match items.as_slice() {
                [Term::Atom("ident"), name] => Self::header(name),
                _ => Self::Constant(term.clone()),
            },
            other => Self::Constant(other.clone()),
        }
    }

    fn negated(self) -> Self {
        Self::Not(Box::new(self))
    }

    /// The value for a message with these headers.
    pub fn evaluate<'a>(&'a self, headers: Option<&'a FieldTable>) -> Value<'a> {
        match self {
            Self::Constant(term) => Value::of_term(term),
            Self::Header(name) => {
                let found = name.as_deref().and_then(|name| lookup(headers?, name));
                found.map_or(Value::Unknown, Value::of_header)
            }
            Self::Not(operand) => operand.evaluate(headers).not(),
            Self::IsNull(operand) => truth(operand.evaluate(headers) == Value::Unknown),
            Self::Plus(operand) => Operator::Add.apply(Value::Integer(0), operand.evaluate(headers)),
            Self::Minus(operand) => Operator::Subtract.apply(Value::Integer(0), operand.evaluate(headers)),
            Self::OtherUnary(operand) => match operand.evaluate(headers) {
                Value::Unknown => Value::Unknown,
                _ => ERROR,
            },
            Self::And(both) => match both.each_ref().map(|operand| operand.evaluate(headers)) {
                [TRUE, TRUE] => TRUE,
                [FALSE, _] | [_, FALSE] => FALSE,
                _ => Value::Unknown,
            },
            Self::Or(both) => match both.each_ref().map(|operand| operand.evaluate(headers)) {
                [FALSE, FALSE] => FALSE,
                [TRUE, _] | [_, TRUE] => TRUE,
                _ => Value::Unknown,
            },
            Self::Like(operand, pattern) => match operand.evaluate(headers) {
                Value::Bytes(text) => truth(pattern.matches(text)),
                _ => Value::Unknown,
            },
            Self::Between(operands) => {
                let [value, low, high] = operands.each_ref().map(|operand| operand.evaluate(headers));
                match (low.compare(value), value.compare(high)) {
                    (Some(low), Some(high)) => truth(low.is_le() && high.is_le()),
                    _ => Value::Unknown,
                }
            }
            Self::In(operand, items) => match operand.evaluate(headers) {
                Value::Unknown | Value::Compound => Value::Unknown,
                // Exactly: 1 is not among [1.0].
                value => truth(items.iter().any(|item| Value::of_term(item) == value)),
            },
            Self::Binary(operator, operands) => {
                let [left, right] = operands.each_ref().map(|operand| operand.evaluate(headers));
                operator.apply(left, right)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::parser::parse;
    use super::*;

    fn headers() -> FieldTable {
        let mut table = FieldTable::default();
        let mut insert = |name: &str, value| {
            table.insert(name.into(), value);
        };
        insert("JMSType", AMQPValue::LongString("car".into()));
        insert("colour", AMQPValue::LongString("blue".into()));
        insert("altcol", AMQPValue::LongString("'blue".into()));
        insert("likevar", AMQPValue::LongString("bl_ue".into()));
        insert("weight", AMQPValue::LongInt(2501));
        insert("WeIgHt", AMQPValue::LongInt(2));
        insert("afloat", AMQPValue::Double(0.03));
        insert("abool", AMQPValue::Boolean(false));
        insert("void", AMQPValue::Void);
        table
    }

    /// The value as the plugin would print it.
    fn value(selector: &str) -> String {
        let expression = Expression::compile(&parse(selector.as_bytes()).unwrap()).unwrap();
        match expression.evaluate(Some(&headers())) {
            Value::Unknown => "undefined".into(),
            Value::Integer(value) => value.to_string(),
            Value::Float(value) => format!("{value:?}"),
            Value::Atom(name) => name.into(),
            Value::Bytes(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            Value::Compound => "compound".into(),
        }
    }

    fn check(cases: &[(&str, &str)]) {
        for (selector, expected) in cases {
            assert_eq!(value(selector), *expected, "{selector}");
        }
    }

    #[test]
    fn comparisons_follow_erlangs_order() {
        check(&[
            ("{'=',{ident,<<\"JMSType\">>},<<\"car\">>}", "true"),
            ("{'=',{ident,<<\"weight\">>},2501}", "true"),
            ("{'=',{ident,<<\"weight\">>},2501.0}", "true"),
            ("{'=',{ident,<<\"WeIgHt\">>},2}", "true"),
            ("{'=',{ident,<<\"afloat\">>},3.0e-2}", "true"),
            ("{'<>',{ident,<<\"weight\">>},5}", "true"),
            ("{'>',{ident,<<\"weight\">>},2500}", "true"),
            ("{'<',{ident,<<\"weight\">>},2502}", "true"),
            ("{'>=',{ident,<<\"weight\">>},2501}", "true"),
            ("{'<=',{ident,<<\"weight\">>},2500}", "false"),
            ("{'<',2500,{ident,<<\"weight\">>}}", "true"),
            ("{'=',{ident,<<\"abool\">>},false}", "true"),
            ("{'>',{ident,<<\"colour\">>},5}", "true"),
            ("{'>',true,{ident,<<\"weight\">>}}", "true"),
            ("{'=',{ident,<<\"weight\">>},<<\"2501\">>}", "false"),
        ]);
    }

    #[test]
    fn what_is_missing_is_unknown() {
        check(&[
            ("{ident,<<\"missing\">>}", "undefined"),
            ("{ident,\"colour\"}", "undefined"),
            ("{ident,<<\"void\">>}", "undefined"),
            ("{'<=',{ident,<<\"missing\">>},2500}", "undefined"),
            ("{'=',{ident,<<\"missing\">>},{ident,<<\"missing\">>}}", "undefined"),
            ("{'in',{ident,<<\"missing\">>},[<<\"blue\">>]}", "undefined"),
            ("{'not_in',{ident,<<\"missing\">>},[<<\"blue\">>]}", "undefined"),
            ("{'like',{ident,<<\"missing\">>},<<\"%\">>,no_escape}", "undefined"),
            ("{'between',{ident,<<\"missing\">>},{range,1,2}}", "undefined"),
            ("{'-',{ident,<<\"missing\">>}}", "undefined"),
            ("{is_null,{ident,<<\"missing\">>}}", "true"),
            ("{not_null,{ident,<<\"missing\">>}}", "false"),
            ("{is_null,{ident,<<\"colour\">>}}", "false"),
            ("{not_null,{ident,<<\"colour\">>}}", "true"),
            ("{is_null,{'+',{ident,<<\"missing\">>},1}}", "false"),
        ]);
    }

    #[test]
    fn logic_has_three_values() {
        let word = |value: usize| ["true", "false", "{ident,<<\"missing\">>}"][value];
        let shown = |value: usize| ["true", "false", "undefined"][value];
        let and = [[0, 1, 2], [1, 1, 1], [2, 1, 2]];
        let or = [[0, 0, 0], [0, 1, 2], [0, 2, 2]];
        for a in 0..3 {
            assert_eq!(value(&format!("{{'not',{}}}", word(a))), shown([1, 0, 2][a]));
            for b in 0..3 {
                assert_eq!(value(&format!("{{'and',{},{}}}", word(a), word(b))), shown(and[a][b]));
                assert_eq!(value(&format!("{{'or',{},{}}}", word(a), word(b))), shown(or[a][b]));
            }
        }
        check(&[("{'not',5}", "undefined"), ("{'and',true,5}", "undefined"), ("{'or',false,<<\"x\">>}", "undefined")]);
    }

    #[test]
    fn ranges_lists_and_patterns() {
        check(&[
            ("{'between',{ident,<<\"weight\">>},{'range',2500,2501}}", "true"),
            ("{'between',17,17,17}", "true"),
            ("{'between',17,18,17}", "false"),
            ("{'not_between',16,{'range',17,18}}", "true"),
            ("{'between',17,{'+',8,9},{ident,<<\"weight\">>}}", "true"),
            ("{'in',{ident,<<\"colour\">>},[<<\"blue\">>,<<\"green\">>]}", "true"),
            ("{'not_in',{ident,<<\"colour\">>},[<<\"green\">>,<<\"blue\">>]}", "false"),
            ("{'in',{ident,<<\"weight\">>},[2501.0]}", "false"),
            ("{'in',{ident,<<\"weight\">>},[1,2501]}", "true"),
            ("{'in',{ident,<<\"weight\">>},[]}", "false"),
            ("{'in',{ident,<<\"weight\">>},5}", "compound"),
            ("{'like',{ident,<<\"colour\">>},<<\"bl%\">>,'no_escape'}", "true"),
            ("{'like',{ident,<<\"likevar\">>},<<\"b_!_ue\">>,<<\"!\">>}", "true"),
            ("{'like',{ident,<<\"colour\">>},regex,<<\"bl[aeu]+\">>}", "true"),
            ("{'not_like',{ident,<<\"altcol\">>},<<\"bl%\">>,'no_escape'}", "true"),
            ("{'like',{ident,<<\"weight\">>},<<\"%\">>,no_escape}", "undefined"),
            ("{'like',<<\"abc\">>,<<\"a%\">>,no_escape}", "true"),
        ]);
    }

    #[test]
    fn arithmetic_is_exact_as_long_as_it_can_be() {
        check(&[
            ("{'+',{ident,<<\"weight\">>},1}", "2502"),
            ("{'-',12,4}", "8"),
            ("{'-',{ident,<<\"weight\">>}}", "-2501"),
            ("{'+',{ident,<<\"weight\">>}}", "2501"),
            ("{'*',3,0.5}", "1.5"),
            ("{'/',4,2}", "2.0"),
            ("{'/',1,0}", "plus_infinity"),
            ("{'/',-1,0.0}", "minus_infinity"),
            ("{'/',0,0}", "nan"),
            ("{'+',{ident,<<\"colour\">>},1}", "undefined"),
            ("{'*',1.0e300,1.0e300}", "undefined"),
            ("{'*',99999999999999999999999999999999999999,10}", "1e39"),
            ("{'-',9007199254740993,1}", "9007199254740992"),
        ]);
    }

    #[test]
    fn what_means_nothing_is_an_error_or_itself() {
        check(&[
            ("{in,5}", "error"),
            ("{in,{ident,<<\"missing\">>}}", "undefined"),
            ("{range,1,2}", "error"),
            ("{range,1,{ident,<<\"missing\">>}}", "undefined"),
            ("{'like',{ident,<<\"colour\">>},{<<\"bl%\">>,no_escape}}", "error"),
            ("{}", "compound"),
            ("{1,2,3,4}", "compound"),
            ("{'=',{1},{1}}", "undefined"),
            ("42", "42"),
            ("[true]", "compound"),
        ]);
    }

    #[test]
    fn bad_patterns_are_refused_wherever_they_are_evaluated() {
        let error = |selector: &str| Expression::compile(&parse(selector.as_bytes()).unwrap()).unwrap_err();
        let selector = "{'and',true,{'not',{'like',{ident,<<\"a\">>},<<\"x\">>,<<\"ab\">>}}}";
        assert_eq!(error(selector), "{invalid_like_pattern,invalid_escape}");
        assert_eq!(error("{'not_like',1,5,no_escape}"), "{invalid_like_pattern,{not_a_binary_pattern,5}}");
    }

    proptest! {
        #[test]
        fn whatever_is_read_can_be_evaluated(
            words in proptest::collection::vec(
                prop::sample::select(vec![
                    "{", "}", ",", "[", "]", "ident", "'and'", "'not'", "like", "between", "range", "in", "'+'", "'/'",
                    "'='", "<<\"weight\">>", "<<\"colour\">>", "0", "1.5", "true", "no_escape", "is_null", ",", "{", "}",
                ]),
                0..30,
            )
        ) {
            if let Ok(term) = parse(words.concat().as_bytes())
                && let Ok(expression) = Expression::compile(&term)
            {
                let _ = expression.evaluate(Some(&headers()));
            }
        }
    }
}
