//! What a reader of a stream wants to see: exact, message by message, from the raw headers.
//!
//! Two dialects. RabbitMQ's: `x-stream-filter` is a value or an array of values, and a message matches when its header
//! `x-stream-filter-value` is one of them. LavinMQ's, in force when the filter contains a table or `x-filter-match-type` is
//! given: a list of filters (values separated by commas, header pairs, places), all or any of which have to match, and a
//! message may carry several filter values separated by commas.

use std::io::Write as _;

use amq_protocol::types::{AMQPValue, FieldTable};

use super::geo::{self, Area};
use crate::{
    broker::BrokerError,
    model::{
        arguments::{as_longstr, lookup},
        properties::{Properties, raw_entries},
    },
};

/// The header that carries a message's filter value.
const VALUE_HEADER: &[u8] = b"x-stream-filter-value";
/// Filters a consumer may have.
const MAX_FILTERS: usize = 1024;
/// The longest number, as text.
const NUMBER_BYTES: usize = 32;

/// One condition of LavinMQ's dialect.
#[derive(Clone, Debug, PartialEq)]
enum Condition {
    /// One of the message's filter values.
    Value(Vec<u8>),
    /// A header of the message, compared as text.
    Header {
        name: Vec<u8>,
        text: Vec<u8>,
    },
    Area(Area),
}

#[derive(Clone, Debug, PartialEq)]
enum Rule {
    /// RabbitMQ's: one of these, sorted.
    OneOf(Vec<Vec<u8>>),
    All(Vec<Condition>),
    Any(Vec<Condition>),
}

/// See the module.
#[derive(Clone, Debug, PartialEq)]
pub struct Filter {
    rule: Rule,
    match_unfiltered: bool,
}

impl Filter {
    /// Reads a consumer's arguments; `None` when they filter nothing. As in RabbitMQ, filters of other types than text,
    /// array and table are ignored.
    ///
    /// # Errors
    /// 406 for a filter of LavinMQ's dialect that cannot be read, or too many filters.
    pub fn parse(arguments: &FieldTable) -> Result<Option<Self>, BrokerError> {
        let Some(wanted) = lookup(arguments, "x-stream-filter") else { return Ok(None) };
        let match_all = match_type(arguments)?;
        let rule = if match_all.is_some() || has_table(wanted) {
            let mut conditions = Vec::new();
            read_conditions(wanted, &mut conditions)?;
            if match_all.unwrap_or(true) { Rule::All(conditions) } else { Rule::Any(conditions) }
        } else {
            let texts = match wanted {
                AMQPValue::FieldArray(values) => values.as_slice().iter().filter_map(as_longstr).collect(),
                one => Vec::from_iter(as_longstr(one)),
            };
            let mut values: Vec<Vec<u8>> = texts.into_iter().map(<[u8]>::to_vec).collect();
            values.sort_unstable();
            Rule::OneOf(values)
        };
        let count = match &rule {
            Rule::OneOf(values) => values.len(),
            Rule::All(conditions) | Rule::Any(conditions) => conditions.len(),
        };
        if count > MAX_FILTERS {
            return Err(refused(format!("x-stream-filter has {count} filters; at most {MAX_FILTERS} are allowed")));
        }
        let match_unfiltered = matches!(lookup(arguments, "x-stream-match-unfiltered"), Some(AMQPValue::Boolean(true)));
        Ok((count > 0).then_some(Filter { rule, match_unfiltered }))
    }

    /// What one evaluation costs, in messages that are simply delivered.
    pub fn cost(&self) -> usize {
        match &self.rule {
            Rule::OneOf(_) => 1,
            Rule::All(conditions) | Rule::Any(conditions) => 1 + conditions.len() / 4,
        }
    }

    /// Whether a message with these raw properties is wanted. Reads headers only, and copies nothing.
    pub fn matches(&self, properties: &[u8]) -> bool {
        let headers = Properties::parse(properties).ok().and_then(|view| view.raw_headers()).unwrap_or_default();
        let value = find(headers, VALUE_HEADER);
        if value.is_none() && self.match_unfiltered {
            return true;
        }
        match &self.rule {
            Rule::OneOf(values) => match value {
                Some((b'S' | b'x', value)) => values.binary_search_by(|one| one.as_slice().cmp(value)).is_ok(),
                _ => false,
            },
            Rule::All(conditions) => conditions.iter().all(|condition| condition.holds(headers, value)),
            Rule::Any(conditions) => conditions.iter().any(|condition| condition.holds(headers, value)),
        }
    }
}

impl Condition {
    fn holds(&self, headers: &[u8], value: Option<(u8, &[u8])>) -> bool {
        match self {
            Condition::Value(wanted) => value.is_some_and(|(tag, value)| {
                with_text(tag, value, |text| text.split(|&byte| byte == b',').any(|one| one == wanted.as_slice()))
            }),
            Condition::Header { name, text: wanted } => {
                find(headers, name).is_some_and(|(tag, value)| with_text(tag, value, |text| text == wanted.as_slice()))
            }
            Condition::Area(area) => {
                let number = |name| find(headers, name).and_then(|(tag, value)| raw_number(tag, value));
                let (Some(lat), Some(lon)) = (number(b"x-geo-lat"), number(b"x-geo-lon")) else { return false };
                area.contains(lat, lon)
            }
        }
    }
}

fn refused(text: String) -> BrokerError {
    BrokerError::InvalidArgument(text)
}

/// `x-filter-match-type`: whether all filters have to match; `None` when it is not given.
fn match_type(arguments: &FieldTable) -> Result<Option<bool>, BrokerError> {
    let Some(value) = lookup(arguments, "x-filter-match-type") else { return Ok(None) };
    match as_longstr(value).map(<[u8]>::to_ascii_lowercase).as_deref() {
        Some(b"all") => Ok(Some(true)),
        Some(b"any") => Ok(Some(false)),
        _ => Err(refused("x-filter-match-type must be 'any' or 'all'".into())),
    }
}

fn has_table(value: &AMQPValue) -> bool {
    match value {
        AMQPValue::FieldTable(_) => true,
        AMQPValue::FieldArray(items) => {
            items.as_slice().iter().any(|item| matches!(item, AMQPValue::FieldTable(_) | AMQPValue::FieldArray(_)))
        }
        _ => false,
    }
}

/// Filters as LavinMQ 2.9 reads them.
fn read_conditions(wanted: &AMQPValue, conditions: &mut Vec<Condition>) -> Result<(), BrokerError> {
    // A list keeps nested arrays off the call stack; it is taken from its end.
    let mut work = vec![wanted];
    while let Some(value) = work.pop() {
        match value {
            AMQPValue::FieldArray(items) => work.extend(items.as_slice().iter().rev()),
            AMQPValue::FieldTable(table) => {
                for (name, value) in table {
                    read_pair(name.as_str(), value, conditions)?;
                }
            }
            value => conditions.extend(as_longstr(value).into_iter().flat_map(values_of)),
        }
    }
    Ok(())
}

fn values_of(text: &[u8]) -> impl Iterator<Item = Condition> {
    text.split(|&byte| byte == b',').map(|one| Condition::Value(one.trim_ascii().to_vec()))
}

fn read_pair(name: &str, value: &AMQPValue, conditions: &mut Vec<Condition>) -> Result<(), BrokerError> {
    if name == "x-stream-filter" {
        conditions.extend(as_longstr(value).into_iter().flat_map(values_of));
        return Ok(());
    }
    if let Some(read) = geo::reader(name) {
        let area = match value {
            AMQPValue::FieldTable(table) => read(table),
            _ => Err("expected a table".to_owned()),
        };
        let area = area.map_err(|reason| refused(format!("Invalid value for filter {name}: {reason}")))?;
        conditions.push(Condition::Area(area));
        return Ok(());
    }
    let text = text_of(value).ok_or_else(|| {
        refused(format!("Invalid value for filter {name}: expected text, a number, a boolean or a timestamp"))
    })?;
    conditions.push(Condition::Header { name: name.as_bytes().to_vec(), text });
    Ok(())
}

/// Type tag and value of the header `name` in a raw table.
fn find<'a>(headers: &'a [u8], name: &[u8]) -> Option<(u8, &'a [u8])> {
    let entry = raw_entries(headers).find(|entry| entry.key == name)?;
    let value = entry.bytes.get(2 + name.len()..)?;
    // Strings and byte arrays have a length before them.
    Some((entry.tag, if matches!(entry.tag, b'S' | b'x') { value.get(4..)? } else { value }))
}

/// Runs `compare` on a raw value as text; what has no text compares with nothing.
fn with_text(tag: u8, value: &[u8], compare: impl FnOnce(&[u8]) -> bool) -> bool {
    let mut buffer = [0; NUMBER_BYTES];
    match (tag, value) {
        (b'S' | b'x', text) => compare(text),
        (b't', [flag, ..]) => compare(if *flag != 0 { b"true" } else { b"false" }),
        (b'V', _) => compare(b""),
        (b'f' | b'd', _) => raw_number(tag, value).is_some_and(|number| compare(float_text(number, &mut buffer))),
        _ => raw_integer(tag, value).is_some_and(|number| compare(integer_text(number, &mut buffer))),
    }
}

fn text_of(value: &AMQPValue) -> Option<Vec<u8>> {
    let mut buffer = [0; NUMBER_BYTES];
    Some(match value {
        AMQPValue::ByteArray(bytes) => bytes.as_slice().to_vec(),
        AMQPValue::Boolean(flag) => if *flag { "true" } else { "false" }.into(),
        AMQPValue::Void => Vec::new(),
        AMQPValue::Timestamp(seconds) => integer_text(*seconds as i64, &mut buffer).to_vec(),
        AMQPValue::Float(number) => float_text(f64::from(*number), &mut buffer).to_vec(),
        AMQPValue::Double(number) => float_text(*number, &mut buffer).to_vec(),
        other => match crate::model::arguments::as_integer(other) {
            Some(number) => integer_text(number, &mut buffer).to_vec(),
            None => as_longstr(other)?.to_vec(),
        },
    })
}

fn integer_text(number: i64, buffer: &mut [u8; NUMBER_BYTES]) -> &[u8] {
    written(buffer, format_args!("{number}"))
}

fn float_text(number: f64, buffer: &mut [u8; NUMBER_BYTES]) -> &[u8] {
    written(buffer, format_args!("{number:?}"))
}

fn written<'b>(buffer: &'b mut [u8; NUMBER_BYTES], text: std::fmt::Arguments<'_>) -> &'b [u8] {
    let mut rest = &mut buffer[..];
    let _ = rest.write_fmt(text); // what does not fit is cut on both sides of a comparison
    let used = NUMBER_BYTES - rest.len();
    &buffer[..used]
}

fn raw_integer(tag: u8, value: &[u8]) -> Option<i64> {
    Some(match tag {
        b'b' => i64::from(*value.first()? as i8),
        b'B' => i64::from(*value.first()?),
        b's' | b'U' => i64::from(i16::from_be_bytes(*value.first_chunk()?)),
        b'u' => i64::from(u16::from_be_bytes(*value.first_chunk()?)),
        b'I' => i64::from(i32::from_be_bytes(*value.first_chunk()?)),
        b'i' => i64::from(u32::from_be_bytes(*value.first_chunk()?)),
        b'l' | b'L' | b'T' => i64::from_be_bytes(*value.first_chunk()?),
        _ => return None,
    })
}

fn raw_number(tag: u8, value: &[u8]) -> Option<f64> {
    match tag {
        b'f' => Some(f64::from(f32::from_be_bytes(*value.first_chunk()?))),
        b'd' => Some(f64::from_be_bytes(*value.first_chunk()?)),
        b'T' => None,
        _ => raw_integer(tag, value).map(|number| number as f64),
    }
}

#[cfg(test)]
mod tests {
    use amq_protocol::{
        frame::WriteContext,
        protocol::{BasicProperties, basic::gen_properties},
    };

    use super::*;

    fn table<const N: usize>(entries: [(&str, AMQPValue); N]) -> FieldTable {
        let mut table = FieldTable::default();
        for (key, value) in entries {
            table.insert(key.into(), value);
        }
        table
    }

    fn text(text: &str) -> AMQPValue {
        AMQPValue::LongString(text.into())
    }

    fn array<const N: usize>(items: [AMQPValue; N]) -> AMQPValue {
        AMQPValue::FieldArray(Vec::from(items).into())
    }

    fn properties<const N: usize>(headers: [(&str, AMQPValue); N]) -> Vec<u8> {
        let properties = BasicProperties::default().with_content_type("t".into()).with_headers(table(headers));
        gen_properties(&properties)(WriteContext::from(Vec::new())).unwrap().into_inner().0
    }

    fn valued(value: &str) -> Vec<u8> {
        properties([("a", AMQPValue::LongInt(1)), ("x-stream-filter-value", text(value)), ("z", AMQPValue::Void)])
    }

    fn filter<const N: usize>(arguments: [(&str, AMQPValue); N]) -> Filter {
        Filter::parse(&table(arguments)).unwrap().expect("a filter")
    }

    #[test]
    fn values_match_as_a_whole_and_one_is_enough() {
        let one = filter([("x-stream-filter", text("b"))]);
        let more = filter([("x-stream-filter", array([text("c"), AMQPValue::LongInt(3), text("a,b"), text("b")]))]);
        for (value, first, second) in [("b", true, true), ("a,b", false, true), ("bb", false, false)] {
            assert_eq!((one.matches(&valued(value)), more.matches(&valued(value))), (first, second), "{value}");
        }
        for unfiltered in [&[0, 0][..], &[0x10, 0, 2], &properties([("b", text("b"))])] {
            assert!(!one.matches(unfiltered));
        }
    }

    #[test]
    fn unfiltered_messages_match_when_that_is_asked_for() {
        let asked = |value| filter([("x-stream-filter", text("b")), ("x-stream-match-unfiltered", value)]);
        assert!(asked(AMQPValue::Boolean(true)).matches(&[0, 0]));
        assert!(asked(AMQPValue::Boolean(true)).matches(&valued("b")));
        assert!(!asked(AMQPValue::Boolean(true)).matches(&valued("c")));
        assert!(!asked(text("yes")).matches(&[0, 0]));
    }

    #[test]
    fn filters_of_unknown_types_are_no_filters() {
        for value in [AMQPValue::LongInt(5), AMQPValue::Boolean(true), array([]), array([AMQPValue::LongInt(1)])] {
            assert_eq!(Filter::parse(&table([("x-stream-filter", value)])).unwrap(), None);
        }
        assert_eq!(Filter::parse(&table([("x-stream-match-unfiltered", AMQPValue::Boolean(true))])).unwrap(), None);
    }

    #[test]
    fn lavinmqs_filters_are_lists_with_all_or_any() {
        let both = [("x-stream-filter", text("foo, bar")), ("x-filter-match-type", text("ALL"))];
        let any = [("x-stream-filter", text("foo, bar")), ("x-filter-match-type", text("any"))];
        let (both, any) = (filter(both), filter(any));
        for (value, all) in [("foo", false), ("foo,bar", true), ("x,bar,foo", true)] {
            assert_eq!((both.matches(&valued(value)), any.matches(&valued(value))), (all, true), "{value}");
        }
        assert!(!any.matches(&valued("x")));
    }

    #[test]
    fn header_pairs_compare_as_text() {
        let wanted = |value| filter([("x-stream-filter", AMQPValue::FieldTable(table([("h", value)])))]);
        let seven = wanted(text("7"));
        for (value, expected) in [
            (AMQPValue::LongInt(7), true),
            (AMQPValue::ShortShortUInt(7), true),
            (text("7"), true),
            (AMQPValue::Double(7.0), false),
            (AMQPValue::LongLongInt(-7), false),
        ] {
            assert_eq!(seven.matches(&properties([("h", value)])), expected);
        }
        assert!(wanted(AMQPValue::Boolean(true)).matches(&properties([("h", AMQPValue::Boolean(true))])));
        assert!(wanted(AMQPValue::Double(1.5)).matches(&properties([("h", AMQPValue::Float(1.5))])));
        assert!(wanted(text("1.5")).matches(&properties([("h", AMQPValue::Double(1.5))])));
        assert!(!seven.matches(&properties([("i", text("7"))])));
        let mixed = filter([(
            "x-stream-filter",
            array([
                text("foo,bar"),
                AMQPValue::FieldTable(table([("h", text("1")), ("x-stream-filter", text("baz"))])),
            ]),
        )]);
        assert!(mixed.matches(&properties([("h", text("1")), ("x-stream-filter-value", text("bar,foo,baz"))])));
        assert!(!mixed.matches(&properties([("h", text("1")), ("x-stream-filter-value", text("bar,foo"))])));
    }

    #[test]
    fn places_are_within_an_area_or_not() {
        let circle = table([
            ("lat", AMQPValue::Double(59.33)),
            ("lon", AMQPValue::Double(18.06)),
            ("radius_km", AMQPValue::LongInt(10)),
        ]);
        let near = filter([(
            "x-stream-filter",
            AMQPValue::FieldTable(table([("geo-within-radius", AMQPValue::FieldTable(circle))])),
        )]);
        let at = |lat, lon| properties([("x-geo-lat", AMQPValue::Double(lat)), ("x-geo-lon", AMQPValue::Float(lon))]);
        assert!(near.matches(&at(59.35, 18.10)));
        assert!(!near.matches(&at(57.70, 11.97)));
        assert!(!near.matches(&at(159.35, 18.10)));
        assert!(!near.matches(&properties([("x-geo-lat", AMQPValue::Double(59.35))])));
    }

    #[test]
    fn what_cannot_be_read_is_refused() {
        let error = |arguments: FieldTable| Filter::parse(&arguments).unwrap_err().to_string();
        let of = |filter: AMQPValue| table([("x-stream-filter", filter)]);
        assert_eq!(
            error(table([("x-stream-filter", text("a")), ("x-filter-match-type", text("some"))])),
            "x-filter-match-type must be 'any' or 'all'"
        );
        let pair = |name: &str, value| AMQPValue::FieldTable(table([(name, value)]));
        assert_eq!(error(of(pair("geo-bbox", text("x")))), "Invalid value for filter geo-bbox: expected a table");
        assert_eq!(
            error(of(pair("geo-bbox", AMQPValue::FieldTable(table([("min_lat", AMQPValue::LongInt(1))]))))),
            "Invalid value for filter geo-bbox: Missing hash key: \"min_lon\""
        );
        assert_eq!(
            error(of(pair("h", array([])))),
            "Invalid value for filter h: expected text, a number, a boolean or a timestamp"
        );
        let many = AMQPValue::FieldArray(vec![text("v"); MAX_FILTERS + 1].into());
        assert_eq!(error(of(many)), "x-stream-filter has 1025 filters; at most 1024 are allowed");
    }
}
