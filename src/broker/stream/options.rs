//! What a consumer of a stream asks for: where to begin, what to see, and whether its offset is kept.

use std::sync::Arc;

use amq_protocol::types::{AMQPValue, FieldTable};

use super::filter::Filter;
use crate::{
    broker::{BrokerError, arguments::max_age_ms},
    model::{
        Name, ResourceName,
        arguments::{as_integer, as_longstr, lookup, type_name},
        erlang,
    },
};

/// What consumer tags begin with that the broker made up: they do not come again.
const GENERATED_TAG: &str = "amq.ctag-";

/// Where a reader begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    First,
    /// With the last chunk: the messages of the last committed round.
    Last,
    Next,
    /// With this offset, or the first retained one if that is later.
    Offset(u64),
    /// With the first message published at this time or later, in Unix milliseconds.
    Time(u64),
}

/// See the module.
#[derive(Clone, Debug)]
pub struct ReaderOptions {
    /// `None` when the consumer leaves it open.
    pub(super) start: Option<Start>,
    pub(super) filter: Option<Arc<Filter>>,
    /// The name under which the consumer's offset is kept.
    pub(super) tracked_as: Option<Name>,
}

impl ReaderOptions {
    /// Reads the arguments of `basic.consume`. `now_unix_ms` is what intervals count back from.
    ///
    /// # Errors
    /// 406: RabbitMQ's text for an `x-stream-offset` it does not know, LavinMQ's for filters only it knows.
    pub fn parse(
        resource: &ResourceName,
        arguments: &FieldTable,
        consumer_tag: &Name,
        now_unix_ms: u64,
    ) -> Result<Self, BrokerError> {
        let start = match lookup(arguments, "x-stream-offset") {
            None => None,
            Some(value) => Some(parse_start(value, now_unix_ms).ok_or_else(|| {
                BrokerError::InvalidArgument(format!(
                    "invalid arg 'x-stream-offset' for {resource}: {{invalid_stream_offset_arg,{{{},{}}}}}",
                    type_name(value),
                    erlang::term(value)
                ))
            })?),
        };
        let filter = Filter::parse(arguments)?.map(Arc::new);
        let is_tracked = match lookup(arguments, "x-stream-automatic-offset-tracking") {
            Some(AMQPValue::Boolean(flag)) => *flag,
            Some(value) => as_longstr(value) == Some(b"true"),
            None => false,
        };
        let has_name = !consumer_tag.is_empty() && !consumer_tag.starts_with(GENERATED_TAG);
        Ok(ReaderOptions { start, filter, tracked_as: (is_tracked && has_name).then(|| consumer_tag.clone()) })
    }
}

fn parse_start(value: &AMQPValue, now_unix_ms: u64) -> Option<Start> {
    let text = match value {
        AMQPValue::ByteArray(bytes) => Some(bytes.as_slice()),
        other => as_longstr(other),
    };
    match (value, text) {
        (_, Some(b"first")) => Some(Start::First),
        (_, Some(b"last")) => Some(Start::Last),
        (_, Some(b"next")) => Some(Start::Next),
        (AMQPValue::Timestamp(seconds), _) => Some(Start::Time(seconds.saturating_mul(1000))),
        (AMQPValue::ByteArray(_), _) => None,
        (_, Some(text)) => max_age_ms(text).map(|interval| Start::Time(now_unix_ms.saturating_sub(interval))),
        // A negative offset is before the first.
        _ => as_integer(value).map(|offset| Start::Offset(u64::try_from(offset).unwrap_or(0))),
    }
}

#[cfg(test)]
mod tests {
    use amq_protocol::types::DecimalValue;

    use super::*;

    const NOW: u64 = 1_800_000_000_000;

    fn options<const N: usize>(tag: &str, arguments: [(&str, AMQPValue); N]) -> Result<ReaderOptions, BrokerError> {
        let mut table = FieldTable::default();
        for (key, value) in arguments {
            table.insert(key.into(), value);
        }
        ReaderOptions::parse(&ResourceName::queue("q", &"/".into()), &table, &tag.into(), NOW)
    }

    fn start(value: AMQPValue) -> Result<Option<Start>, String> {
        options("t", [("x-stream-offset", value)]).map(|options| options.start).map_err(|error| error.to_string())
    }

    fn text(text: &str) -> AMQPValue {
        AMQPValue::LongString(text.into())
    }

    #[test]
    fn every_form_of_offset_is_read() {
        for (value, expected) in [
            (text("first"), Start::First),
            (text("last"), Start::Last),
            (text("next"), Start::Next),
            (AMQPValue::ByteArray(b"first"[..].into()), Start::First),
            (AMQPValue::LongInt(7), Start::Offset(7)),
            (AMQPValue::ShortShortUInt(7), Start::Offset(7)),
            (AMQPValue::LongLongInt(i64::MAX), Start::Offset(i64::MAX as u64)),
            (AMQPValue::LongLongInt(-3), Start::Offset(0)),
            (AMQPValue::Timestamp(12), Start::Time(12_000)),
            (AMQPValue::Timestamp(u64::MAX), Start::Time(u64::MAX)),
            (text("1h"), Start::Time(NOW - 3_600_000)),
            (text("7D"), Start::Time(NOW - 7 * 24 * 3_600_000)),
            (text("99999999999999999999999Y"), Start::Time(0)),
        ] {
            assert_eq!(start(value.clone()), Ok(Some(expected)), "{value:?}");
        }
        assert_eq!(options("t", []).unwrap().start, None);
    }

    #[test]
    fn other_values_are_refused_in_rabbitmqs_words() {
        for (value, term) in [
            (text("foo"), "{longstr,<<\"foo\">>}"),
            (text(""), "{longstr,<<>>}"),
            (text("1"), "{longstr,<<\"1\">>}"),
            (text("0s"), "{longstr,<<\"0s\">>}"),
            (text("1H"), "{longstr,<<\"1H\">>}"),
            (text("-1h"), "{longstr,<<\"-1h\">>}"),
            (AMQPValue::Boolean(true), "{bool,true}"),
            (AMQPValue::Double(1.5), "{double,1.5}"),
            (AMQPValue::DecimalValue(DecimalValue { scale: 1, value: 15 }), "{decimal,{1,15}}"),
            (AMQPValue::Void, "{void,undefined}"),
            (AMQPValue::FieldTable(FieldTable::default()), "{table,[]}"),
        ] {
            let expected = format!(
                "invalid arg 'x-stream-offset' for queue 'q' in vhost '/': {{invalid_stream_offset_arg,{term}}}"
            );
            assert_eq!(start(value), Err(expected));
        }
    }

    #[test]
    fn only_consumers_with_a_name_of_their_own_are_tracked() {
        let tracked = |tag, value| options(tag, [("x-stream-automatic-offset-tracking", value)]).unwrap().tracked_as;
        assert_eq!(tracked("mine", AMQPValue::Boolean(true)).as_deref(), Some("mine"));
        assert_eq!(tracked("mine", text("true")).as_deref(), Some("mine"));
        assert_eq!(tracked("mine", AMQPValue::Boolean(false)), None);
        assert_eq!(tracked("mine", AMQPValue::LongInt(1)), None);
        assert_eq!(tracked("amq.ctag-x", AMQPValue::Boolean(true)), None);
        assert_eq!(options("mine", []).unwrap().tracked_as, None);
    }
}
