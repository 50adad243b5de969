//! The `x-recent-history` type: routes as a fanout, and keeps its last messages for destinations that are bound later.
//! What is kept and delivered is not decided here.

use amq_protocol::types::{AMQPValue, FieldTable};

use crate::model::arguments::{as_integer, lookup};
use crate::model::erlang;

const LENGTH: &str = "x-recent-history-length";
/// How many messages are kept if the exchange does not say.
const DEFAULT_LENGTH: u64 = 20;

/// Checks an exchange's arguments; the error is the text of the 406.
pub fn check_arguments(arguments: &FieldTable) -> Result<(), String> {
    match lookup(arguments, LENGTH) {
        Some(value) if parse_length(value).is_none() => {
            Err(format!("Invalid argument {}, '{LENGTH}' must be a positive integer", erlang::term(value)))
        }
        _ => Ok(()),
    }
}

/// How many messages an exchange of this type keeps.
pub fn length(arguments: &FieldTable) -> u64 {
    lookup(arguments, LENGTH).and_then(parse_length).unwrap_or(DEFAULT_LENGTH)
}

/// Only signed integers will do, as in RabbitMQ.
fn parse_length(value: &AMQPValue) -> Option<u64> {
    match value {
        AMQPValue::ShortShortInt(_) | AMQPValue::ShortInt(_) | AMQPValue::LongInt(_) | AMQPValue::LongLongInt(_) => {
            as_integer(value).and_then(|length| u64::try_from(length).ok()).filter(|length| *length > 0)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(value: AMQPValue) -> FieldTable {
        let mut table = FieldTable::default();
        table.insert(LENGTH.into(), value);
        table
    }

    #[test]
    fn the_length_is_a_positive_signed_integer() {
        assert_eq!(check_arguments(&FieldTable::default()), Ok(()));
        assert_eq!(length(&FieldTable::default()), 20);
        for (value, expected) in [
            (AMQPValue::ShortShortInt(5), 5),
            (AMQPValue::ShortInt(5), 5),
            (AMQPValue::LongInt(1), 1),
            (AMQPValue::LongLongInt(1 << 40), 1 << 40),
        ] {
            let table = arguments(value);
            assert_eq!((check_arguments(&table), length(&table)), (Ok(()), expected));
        }
        for (value, shown) in [
            (AMQPValue::LongInt(0), "0"),
            (AMQPValue::LongInt(-1), "-1"),
            (AMQPValue::ShortShortUInt(5), "5"),
            (AMQPValue::LongUInt(5), "5"),
            (AMQPValue::Timestamp(5), "5"),
            (AMQPValue::LongString("5".into()), r#"<<"5">>"#),
            (AMQPValue::Boolean(true), "true"),
            (AMQPValue::Void, "undefined"),
        ] {
            let text = format!("Invalid argument {shown}, 'x-recent-history-length' must be a positive integer");
            assert_eq!(check_arguments(&arguments(value)), Err(text));
        }
    }
}
