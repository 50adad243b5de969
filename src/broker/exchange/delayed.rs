//! The `x-delayed-message` type: keeps a message back as long as its header `x-delay` says, then routes it as another
//! type would, the one its argument `x-delayed-type` names. `LavinMQ`'s argument `x-delayed-exchange` makes an exchange
//! of any other type do the same. When and what is kept back is not decided here.

use amq_protocol::types::{AMQPValue, FieldTable};

use super::kind::ExchangeKind;
use crate::model::arguments::{as_longstr, lookup};
use crate::model::erlang;

const DELAYED_TYPE: &str = "x-delayed-type";
const DELAYED_EXCHANGE: &str = "x-delayed-exchange";

/// The type that `x-delayed-type` names; the error is the text of the 406.
///
/// Which of its texts RabbitMQ's plugin uses when looks accidental: a type that is missing "must be an existing exchange
/// type", one that does not exist is answered as in any other declaration.
pub fn parse_type(arguments: &FieldTable) -> Result<ExchangeKind, String> {
    let bytes = match lookup(arguments, DELAYED_TYPE) {
        Some(AMQPValue::ByteArray(bytes)) => Some(bytes.as_slice()),
        other => other.and_then(as_longstr),
    };
    let Some(name) = bytes.map(erlang::text) else {
        return Err(format!("Invalid argument, '{DELAYED_TYPE}' must be an existing exchange type"));
    };
    match ExchangeKind::parse(&name).map_err(|error| error.to_string())? {
        ExchangeKind::Delayed => {
            Err(format!("Invalid argument, '{}' can't be used for '{DELAYED_TYPE}'", ExchangeKind::Delayed.as_str()))
        }
        kind => Ok(kind),
    }
}

/// Whether an ordinary type's arguments ask for delays.
pub fn is_requested(arguments: &FieldTable) -> bool {
    matches!(lookup(arguments, DELAYED_EXCHANGE), Some(AMQPValue::Boolean(true)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_type_must_be_another_that_exists() {
        let parse = |value: Option<AMQPValue>| {
            let mut table = FieldTable::default();
            if let Some(value) = value {
                table.insert(DELAYED_TYPE.into(), value);
            }
            parse_type(&table)
        };
        let text = |text: &str| Some(AMQPValue::LongString(text.into()));
        let error = |text: &str| Err(text.to_owned());
        assert_eq!(parse(text("topic")), Ok(ExchangeKind::Topic));
        assert_eq!(parse(text("x-consistent-hash")), Ok(ExchangeKind::ConsistentHash));
        assert_eq!(parse(Some(AMQPValue::ByteArray(b"fanout"[..].into()))), Ok(ExchangeKind::Fanout));
        let missing = "Invalid argument, 'x-delayed-type' must be an existing exchange type";
        assert_eq!(parse(None), error(missing));
        assert_eq!(parse(Some(AMQPValue::LongInt(1))), error(missing));
        assert_eq!(parse(text("nope-nope")), error("unknown exchange type 'nope-nope'"));
        assert_eq!(parse(text("queue")), error("invalid exchange type 'queue'"));
        let itself = "Invalid argument, 'x-delayed-message' can't be used for 'x-delayed-type'";
        assert_eq!(parse(text("x-delayed-message")), error(itself));
    }

    #[test]
    fn only_true_asks_for_delays() {
        let requested = |value| {
            let mut table = FieldTable::default();
            table.insert(DELAYED_EXCHANGE.into(), value);
            is_requested(&table)
        };
        assert!(requested(AMQPValue::Boolean(true)));
        assert!(!requested(AMQPValue::Boolean(false)));
        assert!(!requested(AMQPValue::LongString("true".into())));
        assert!(!is_requested(&FieldTable::default()));
    }
}
