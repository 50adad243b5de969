//! How a [`Retry`] is written: as a table or as text in `x-retry`, as an object or as text in a policy.

use amq_protocol::types::AMQPValue;
use serde_json::Value;

use super::Retry;
use crate::{
    broker::arguments::MAX_TIME_MS,
    model::arguments::{as_integer, as_longstr, type_name},
};

const KEYS: &str = "max, initial, multiplier, max-delay, jitter";
const MAX_MULTIPLIER: f64 = 1000.0;

impl Default for Retry {
    fn default() -> Self {
        Retry { max: 5, initial_ms: 1000, multiplier: 2.0, max_delay_ms: 60_000, jitter: 0.0 }
    }
}

/// A number as it was written; a type's name if it was none.
enum Number {
    Integer(i64),
    Float(f64),
    Other(&'static str),
}

impl Number {
    fn of_argument(value: &AMQPValue) -> Self {
        match value {
            AMQPValue::Float(v) => Number::Float((*v).into()),
            AMQPValue::Double(v) => Number::Float(*v),
            other => as_integer(other).map_or_else(|| Number::Other(type_name(other)), Number::Integer),
        }
    }

    fn of_json(value: &Value) -> Self {
        match value {
            Value::Number(number) => match (number.as_i64(), number.as_f64()) {
                (Some(integer), _) => Number::Integer(integer),
                (None, Some(float)) => Number::Float(float),
                (None, None) => Number::Other("number"),
            },
            Value::Null => Number::Other("null"),
            Value::Bool(_) => Number::Other("boolean"),
            Value::String(_) => Number::Other("string"),
            Value::Array(_) => Number::Other("array"),
            Value::Object(_) => Number::Other("object"),
        }
    }

    fn of_text(text: &str) -> Self {
        match (text.parse(), text.parse::<f64>()) {
            (Ok(integer), _) => Number::Integer(integer),
            (Err(_), Ok(float)) => Number::Float(float),
            (Err(_), Err(_)) => Number::Other("text"),
        }
    }

    fn integer(&self, key: &str, max: i64) -> Result<u64, String> {
        match self {
            Number::Integer(n) if (0..=max).contains(n) => Ok(n.unsigned_abs()),
            Number::Integer(n) => Err(format!("{key} must be from 0 to {max}, got {n}")),
            Number::Float(n) => Err(format!("{key}: expected integer, got {n}")),
            Number::Other(name) => Err(format!("{key}: expected integer, got {name}")),
        }
    }

    fn float(&self, key: &str, range: std::ops::RangeInclusive<f64>) -> Result<f64, String> {
        let number = match self {
            Number::Integer(n) => *n as f64,
            Number::Float(n) => *n,
            Number::Other(name) => return Err(format!("{key}: expected number, got {name}")),
        };
        if range.contains(&number) {
            return Ok(number);
        }
        Err(format!("{key} must be from {} to {}, got {number}", range.start(), range.end()))
    }
}

impl Retry {
    /// Reads `x-retry`: a table, or text such as `max=5,initial=1000`. What is left out has its default.
    ///
    /// # Errors
    /// What is wrong, in the form of RabbitMQ's terms.
    pub fn from_argument(value: &AMQPValue) -> Result<Self, String> {
        let retry = match (value, as_longstr(value)) {
            (AMQPValue::FieldTable(table), _) => {
                Self::read(table.into_iter().map(|(key, value)| (key.as_str(), Number::of_argument(value))))
            }
            (_, Some(text)) => Self::parse(&String::from_utf8_lossy(text)),
            (other, None) => return Err(format!("{{unacceptable_type,{}}}", type_name(other))),
        };
        retry.map_err(|reason| format!("\"{reason}\""))
    }

    /// Reads a policy's `retry`: an object, or the same text.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn from_json(value: &Value) -> Result<Self, String> {
        match value {
            Value::Object(entries) => {
                Self::read(entries.iter().map(|(key, value)| (key.as_str(), Number::of_json(value))))
            }
            Value::String(text) => Self::parse(text),
            _ => Err("expected an object, or text such as max=5,initial=1000".into()),
        }
    }

    fn parse(text: &str) -> Result<Self, String> {
        let entries = text.split(',').map(str::trim).filter(|entry| !entry.is_empty());
        let pairs = entries.map(|entry| match entry.split_once('=') {
            Some((key, number)) => Ok((key.trim(), Number::of_text(number.trim()))),
            None => Err(format!("'{entry}' is not of the form key=number")),
        });
        Self::read(pairs.collect::<Result<Vec<_>, _>>()?.into_iter())
    }

    fn read<'a>(entries: impl Iterator<Item = (&'a str, Number)>) -> Result<Self, String> {
        let mut retry = Retry::default();
        for (key, number) in entries {
            match key {
                "max" => retry.max = number.integer(key, i64::from(u32::MAX))?.try_into().unwrap_or(u32::MAX),
                "initial" => retry.initial_ms = number.integer(key, MAX_TIME_MS)?,
                "multiplier" => retry.multiplier = number.float(key, 1.0..=MAX_MULTIPLIER)?,
                "max-delay" => retry.max_delay_ms = number.integer(key, MAX_TIME_MS)?,
                "jitter" => retry.jitter = number.float(key, 0.0..=1.0)?,
                other => return Err(format!("unknown key '{other}'; known are {KEYS}")),
            }
        }
        Ok(retry)
    }
}

#[cfg(test)]
mod tests {
    use amq_protocol::types::FieldTable;
    use serde_json::json;

    use super::*;

    fn text(text: &str) -> Result<Retry, String> {
        Retry::from_argument(&AMQPValue::LongString(text.into()))
    }

    #[test]
    fn table_text_and_object_say_the_same() {
        let mut table = FieldTable::default();
        table.insert("max".into(), AMQPValue::ShortInt(3));
        table.insert("multiplier".into(), AMQPValue::Double(1.5));
        table.insert("jitter".into(), AMQPValue::LongInt(1));
        let expected = Retry { max: 3, multiplier: 1.5, jitter: 1.0, ..Retry::default() };
        assert_eq!(Retry::from_argument(&AMQPValue::FieldTable(table)), Ok(expected));
        assert_eq!(text("max=3, multiplier=1.5,jitter=1"), Ok(expected));
        assert_eq!(Retry::from_json(&json!({"max": 3, "multiplier": 1.5, "jitter": 1})), Ok(expected));
        assert_eq!(Retry::from_json(&json!("max=3,multiplier=1.5,jitter=1.0")), Ok(expected));
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        let all = text("max=5,initial=1000,multiplier=2,max-delay=60000,jitter=0");
        assert_eq!(all, Ok(Retry::default()));
        assert_eq!(text(""), Ok(Retry::default()));
        assert_eq!(Retry::from_argument(&AMQPValue::FieldTable(FieldTable::default())), Ok(Retry::default()));
    }

    #[test]
    fn refusals_name_the_key() {
        for (written, reason) in [
            ("max=x", "max: expected integer, got text"),
            ("max=1.5", "max: expected integer, got 1.5"),
            ("max=-1", "max must be from 0 to 4294967295, got -1"),
            ("initial=315360000001", "initial must be from 0 to 315360000000, got 315360000001"),
            ("multiplier=0.5", "multiplier must be from 1 to 1000, got 0.5"),
            ("multiplier=NaN", "multiplier must be from 1 to 1000, got NaN"),
            ("jitter=2", "jitter must be from 0 to 1, got 2"),
            ("delay=2", "unknown key 'delay'; known are max, initial, multiplier, max-delay, jitter"),
            ("max", "'max' is not of the form key=number"),
        ] {
            assert_eq!(text(written), Err(format!("\"{reason}\"")), "{written}");
        }
        assert_eq!(Retry::from_argument(&AMQPValue::Boolean(true)), Err("{unacceptable_type,bool}".into()));
        assert_eq!(Retry::from_json(&json!({"max": null})), Err("max: expected integer, got null".into()));
        assert_eq!(Retry::from_json(&json!(5)), Err("expected an object, or text such as max=5,initial=1000".into()));
    }
}
