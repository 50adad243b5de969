//! `key=value` as it is typed on the command line, and as a field of an AMQP table.

use super::wire::Arguments;

/// Longest key: a short string.
const MAX_KEY_BYTES: usize = 255;

/// A table's value. What looks like an integer or a truth value is one; in double quotes it is text all the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    Integer(i64),
    Boolean(bool),
    Text(String),
}

/// One `key=value`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    pub(super) key: String,
    pub(super) value: Value,
}

impl Field {
    pub(super) fn text(key: &str, value: &str) -> Self {
        Self { key: key.to_owned(), value: Value::Text(value.to_owned()) }
    }

    /// Reads `key=value`; the value may be empty and may hold more equals signs.
    ///
    /// # Errors
    /// What is wrong with it, for clap to show beside the option's name.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let (key, value) = split(text)?;
        Ok(Self { key: key.to_owned(), value: Value::parse(value) })
    }
}

/// The parts of `key=value`, the key checked.
///
/// # Errors
/// A sentence that says what is missing or too long.
pub(super) fn split(text: &str) -> Result<(&str, &str), String> {
    let (key, value) = text.split_once('=').ok_or("it needs the form key=value")?;
    match key.len() {
        0 => Err("the key is empty".to_owned()),
        1..=MAX_KEY_BYTES => Ok((key, value)),
        _ => Err(format!("a key holds up to {MAX_KEY_BYTES} bytes")),
    }
}

impl Value {
    fn parse(text: &str) -> Self {
        if let Some(inner) = text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
            return Self::Text(inner.to_owned());
        }
        match text {
            "true" => Self::Boolean(true),
            "false" => Self::Boolean(false),
            _ => text.parse().map_or_else(|_| Self::Text(text.to_owned()), Self::Integer),
        }
    }

    fn append_to(&self, arguments: Arguments) -> Arguments {
        match self {
            Self::Integer(number) => arguments.octet(b'l').long_long(number.cast_unsigned()),
            Self::Boolean(truth) => arguments.octet(b't').octet(u8::from(*truth)),
            Self::Text(text) => arguments.octet(b'S').long_string(text.as_bytes()),
        }
    }
}

/// Adds a table of `fields` to a method's arguments.
pub(super) fn table<'a>(arguments: Arguments, fields: impl IntoIterator<Item = &'a Field>) -> Arguments {
    match encode(fields) {
        none if none.is_empty() => arguments.empty_table(),
        // It has the form of a long string: its length, then its fields.
        some => arguments.long_string(&some),
    }
}

/// The fields one after the other, without the table's length.
fn encode<'a>(fields: impl IntoIterator<Item = &'a Field>) -> Vec<u8> {
    let encoded =
        fields.into_iter().fold(Arguments::new(), |table, field| field.value.append_to(table.short_string(&field.key)));
    encoded.as_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> Value {
        Field::parse(text).expect(text).value
    }

    #[test]
    fn values_are_told_apart_by_their_looks_unless_quoted() {
        assert_eq!(value("x-max-length=1000"), Value::Integer(1_000));
        assert_eq!(value("x=-1"), Value::Integer(-1));
        assert_eq!(value("x-single-active-consumer=true"), Value::Boolean(true));
        assert_eq!(value("x-overflow=reject-publish"), Value::Text("reject-publish".to_owned()));
        assert_eq!(value("x=\"12\""), Value::Text("12".to_owned()));
        assert_eq!(value("x=a=b"), Value::Text("a=b".to_owned()));
        assert_eq!(value("x="), Value::Text(String::new()));
    }

    #[test]
    fn what_is_no_pair_is_refused() {
        assert!(Field::parse("x-max-length").expect_err("no value").contains("key=value"));
        assert!(Field::parse("=1").expect_err("no key").contains("empty"));
        assert!(Field::parse(&format!("{}=1", "k".repeat(256))).is_err());
    }

    #[test]
    fn fields_are_written_with_their_types() {
        let fields = ["a=1", "b=false", "c=xy"].map(|text| Field::parse(text).expect(text));
        let expected = [
            &[1, b'a', b'l', 0, 0, 0, 0, 0, 0, 0, 1][..],
            &[1, b'b', b't', 0],
            &[1, b'c', b'S', 0, 0, 0, 2, b'x', b'y'],
        ];
        assert_eq!(encode(&fields), expected.concat());
    }
}
