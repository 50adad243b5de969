//! How RabbitMQ's texts show values: Erlang's `~ts` for text and `~tp` for terms.
//!
//! Old client suites compare these texts, so a rejected argument must look the way an Erlang node prints it:
//! byte strings as `<<"foo">>`, tables as `[{<<"k">>,longstr,<<"v">>}]`, no value as `undefined`.
//! One difference remains: Erlang breaks terms longer than a line, this module never does.

use std::borrow::Cow;
use std::fmt::Write as _;

use amq_protocol::types::{AMQPValue, FieldTable};
use serde_json::Value;

use super::arguments::type_name;

/// How much of a nested value is shown before `...`; a text on the wire holds 255 bytes anyway.
const MAX_TERM_BYTES: usize = 1024;

/// Bytes as `~ts` shows them: UTF-8 where it is valid, else every byte as the Latin-1 character it is.
#[must_use]
pub fn text(bytes: &[u8]) -> Cow<'_, str> {
    match std::str::from_utf8(bytes) {
        Ok(text) => Cow::Borrowed(text),
        Err(_) => Cow::Owned(bytes.iter().copied().map(char::from).collect()),
    }
}

/// A value as `~ts` shows bytes and `~tp` everything else: the rule of RabbitMQ's `inequivalent arg` texts.
#[must_use]
pub fn value_text(value: &AMQPValue) -> Cow<'_, str> {
    match bytes_of(value) {
        Some(bytes) => text(bytes),
        None => Cow::Owned(term(value)),
    }
}

/// A value as `~tp` shows it.
#[must_use]
pub fn term(value: &AMQPValue) -> String {
    let mut out = String::new();
    let mut work = vec![Piece::Value(value)];
    while let Some(piece) = work.pop() {
        if out.len() > MAX_TERM_BYTES {
            out.push_str("...");
            break;
        }
        match piece {
            Piece::Text(text) => out.push_str(&text),
            Piece::Value(value) => push_value(value, &mut out, &mut work),
        }
    }
    out
}

/// A JSON value as `~tp` shows what RabbitMQ decodes it to: strings as byte strings, objects as maps.
#[must_use]
pub fn json_term(value: &Value) -> String {
    let mut out = String::new();
    push_json(value, &mut out);
    if out.len() > MAX_TERM_BYTES {
        out.truncate(out.floor_char_boundary(MAX_TERM_BYTES));
        out.push_str("...");
    }
    out
}

/// Recurses as deep as `serde_json` parses, which is 128 levels.
fn push_json(value: &Value, out: &mut String) {
    match value {
        Value::String(text) => push_binary(text.as_bytes(), out),
        Value::Number(number) => match number.as_f64() {
            Some(value) if number.is_f64() => out.push_str(&float(value)),
            _ => out.push_str(&number.to_string()),
        },
        Value::Array(items) => match characters(items) {
            Some(text) => push_quoted(text.chars(), out),
            None => push_joined("[", items.iter().map(|item| (None, item)), "]", out),
        },
        Value::Object(entries) => {
            push_joined("#{", entries.iter().map(|(key, item)| (Some(key.as_str()), item)), "}", out);
        }
        Value::Null | Value::Bool(_) => out.push_str(&value.to_string()),
    }
}

fn push_joined<'a>(
    open: &str,
    items: impl Iterator<Item = (Option<&'a str>, &'a Value)>,
    close: &str,
    out: &mut String,
) {
    out.push_str(open);
    for (position, (key, item)) in items.enumerate() {
        if position > 0 {
            out.push(',');
        }
        if let Some(key) = key {
            push_binary(key.as_bytes(), out);
            out.push_str(" => ");
        }
        if out.len() > MAX_TERM_BYTES {
            break;
        }
        push_json(item, out);
    }
    out.push_str(close);
}

/// A list of printable characters' numbers is a string in Erlang.
fn characters(items: &[Value]) -> Option<String> {
    let character = |item: &Value| char::from_u32(u32::try_from(item.as_u64()?).ok()?).filter(|&c| is_printable(c));
    if items.is_empty() { None } else { items.iter().map(character).collect() }
}

/// An atom as `~tp` shows it: quoted unless it is a plain lower-case word, so that the type `x-random` reads
/// `'x-random'`.
#[must_use]
pub fn atom(word: &str) -> String {
    let plain = word.starts_with(|first: char| first.is_ascii_lowercase())
        && word.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '@'));
    if plain { word.to_owned() } else { format!("'{word}'") }
}

/// A piece of a term that is still to be written; a list keeps nested values off the call stack.
enum Piece<'a> {
    Text(Cow<'static, str>),
    Value(&'a AMQPValue),
}

fn push_value<'a>(value: &'a AMQPValue, out: &mut String, work: &mut Vec<Piece<'a>>) {
    if let Some(bytes) = bytes_of(value) {
        return push_binary(bytes, out);
    }
    // Writing to a String cannot fail.
    let _ = match value {
        AMQPValue::Boolean(v) => write!(out, "{v}"),
        AMQPValue::ShortShortInt(v) => write!(out, "{v}"),
        AMQPValue::ShortShortUInt(v) => write!(out, "{v}"),
        AMQPValue::ShortInt(v) => write!(out, "{v}"),
        AMQPValue::ShortUInt(v) => write!(out, "{v}"),
        AMQPValue::LongInt(v) => write!(out, "{v}"),
        AMQPValue::LongUInt(v) => write!(out, "{v}"),
        AMQPValue::LongLongInt(v) => write!(out, "{v}"),
        AMQPValue::Timestamp(v) => write!(out, "{v}"),
        AMQPValue::Float(v) => write!(out, "{}", float(f64::from(*v))),
        AMQPValue::Double(v) => write!(out, "{}", float(*v)),
        AMQPValue::DecimalValue(v) => write!(out, "{{{},{}}}", v.scale, v.value),
        AMQPValue::FieldArray(array) => {
            push_list(array.as_slice().iter().map(|item| (None, item)), work);
            Ok(())
        }
        AMQPValue::FieldTable(table) => {
            push_table(table, work);
            Ok(())
        }
        AMQPValue::ShortString(_) | AMQPValue::LongString(_) | AMQPValue::ByteArray(_) | AMQPValue::Void => {
            write!(out, "undefined")
        }
    };
}

fn push_table<'a>(table: &'a FieldTable, work: &mut Vec<Piece<'a>>) {
    push_list(table.into_iter().map(|(key, item)| (Some(key.as_str()), item)), work);
}

/// Puts a list of `{Key,Type,Value}` (tables) or `{Type,Value}` (arrays) before all other work.
fn push_list<'a>(items: impl Iterator<Item = (Option<&'a str>, &'a AMQPValue)>, work: &mut Vec<Piece<'a>>) {
    let start = work.len();
    work.push(Piece::Text("[".into()));
    for (position, (key, item)) in items.enumerate() {
        let mut open = String::from(if position == 0 { "{" } else { ",{" });
        if let Some(key) = key {
            push_binary(key.as_bytes(), &mut open);
            open.push(',');
        }
        open.push_str(type_name(item));
        open.push(',');
        work.push(Piece::Text(open.into()));
        work.push(Piece::Value(item));
        work.push(Piece::Text("}".into()));
    }
    work.push(Piece::Text("]".into()));
    work[start..].reverse(); // the list is taken from its end
}

/// Bytes as `~tp` shows a binary on a node with the default printable range (Latin-1): `<<"text">>` or `<<1,2>>`.
#[must_use]
pub fn binary(bytes: &[u8]) -> String {
    let mut out = String::new();
    push_binary(bytes, &mut out);
    out
}

/// Bytes as `~tp` shows a list of them, which is what Erlang's strings are: `"text"` or `[1,2]`.
#[must_use]
pub fn string(bytes: &[u8]) -> String {
    let mut out = String::new();
    if bytes.is_empty() || !bytes.iter().copied().map(char::from).all(is_printable) {
        push_numbers(bytes, ["[", "]"], &mut out);
    } else {
        push_quoted(bytes.iter().copied().map(char::from), &mut out);
    }
    out
}

fn push_binary(bytes: &[u8], out: &mut String) {
    if bytes.is_empty() {
        return out.push_str("<<>>");
    }
    match std::str::from_utf8(bytes) {
        Ok(text) if text.chars().all(is_printable) => {
            out.push_str("<<");
            push_quoted(text.chars(), out);
            out.push_str(if text.is_ascii() { ">>" } else { "/utf8>>" });
        }
        Err(_) if bytes.iter().copied().map(char::from).all(is_printable) => {
            out.push_str("<<");
            push_quoted(bytes.iter().copied().map(char::from), out);
            out.push_str(">>");
        }
        _ => push_numbers(bytes, ["<<", ">>"], out),
    }
}

fn push_numbers(bytes: &[u8], [open, close]: [&str; 2], out: &mut String) {
    out.push_str(open);
    for (position, byte) in bytes.iter().enumerate() {
        let _ = write!(out, "{}{byte}", if position == 0 { "" } else { "," });
    }
    out.push_str(close);
}

fn push_quoted(chars: impl Iterator<Item = char>, out: &mut String) {
    out.push('"');
    for c in chars {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{b}' => out.push_str("\\v"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\u{1b}' => out.push_str("\\e"),
            other => out.push(other),
        }
    }
    out.push('"');
}

/// `io_lib:printable_latin1_list/1`.
fn is_printable(c: char) -> bool {
    matches!(c, ' '..='~' | '\u{a0}'..='\u{ff}' | '\n' | '\r' | '\t' | '\u{b}' | '\u{8}' | '\u{c}' | '\u{1b}')
}

/// A float as `~p` shows it: the shortest digits, decimal or scientific, whichever is shorter.
fn float(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return format!("{value:?}");
    }
    let scientific = format!("{:e}", value.abs());
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let digits: String = mantissa.chars().filter(char::is_ascii_digit).collect();
    let place = exponent.parse::<i32>().unwrap_or(0) + 1; // where the point stands, counted in digits
    let sign = if value < 0.0 { "-" } else { "" };
    let scientific = in_scientific(&digits, place);
    // From 2^53 on not every integer is a float, so Erlang does not pretend that the digits are exact.
    if value.abs() >= MAX_EXACT_INTEGER {
        return format!("{sign}{scientific}");
    }
    let decimal = in_decimal(&digits, place);
    let shorter = if decimal.len() <= scientific.len() { decimal } else { scientific };
    format!("{sign}{shorter}")
}

const MAX_EXACT_INTEGER: f64 = 9_007_199_254_740_992.0;

/// Digits with the point after the first: `1.5e3`.
fn in_scientific(digits: &str, place: i32) -> String {
    let (first, rest) = digits.split_at(1);
    format!("{first}.{}e{}", if rest.is_empty() { "0" } else { rest }, place - 1)
}

/// Digits with the point at its place: `1500.0`.
fn in_decimal(digits: &str, place: i32) -> String {
    let zeros = |count: usize| "0".repeat(count);
    let distance = place.unsigned_abs() as usize;
    if place <= 0 {
        return format!("0.{}{digits}", zeros(distance));
    }
    match digits.split_at_checked(distance) {
        None | Some((_, "")) => format!("{digits}{}.0", zeros(distance - digits.len())),
        Some((whole, fraction)) => format!("{whole}.{fraction}"),
    }
}

fn bytes_of(value: &AMQPValue) -> Option<&[u8]> {
    match value {
        AMQPValue::LongString(v) => Some(v.as_bytes()),
        AMQPValue::ByteArray(v) => Some(v.as_slice()),
        AMQPValue::ShortString(v) => Some(v.as_str().as_bytes()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use amq_protocol::types::{DecimalValue, FieldArray};

    use super::*;

    fn longstr_term(bytes: &[u8]) -> String {
        term(&AMQPValue::ByteArray(bytes.into()))
    }

    /// Each pair was printed by Erlang/OTP 25.
    #[test]
    fn byte_strings_look_like_erlangs() {
        assert_eq!(longstr_term(b"foo"), r#"<<"foo">>"#);
        assert_eq!(longstr_term(b""), "<<>>");
        assert_eq!(longstr_term("ä".as_bytes()), r#"<<"ä"/utf8>>"#);
        assert_eq!(binary(&[228]), r#"<<"ä">>"#);
        assert_eq!(binary(&[1, 2, 3]), "<<1,2,3>>");
        assert_eq!(longstr_term(b"a\nb\"c\\"), r#"<<"a\nb\"c\\">>"#);
        assert_eq!(longstr_term("€".as_bytes()), "<<226,130,172>>");
        assert_eq!(binary(&[212, 177]), "<<212,177>>"); // valid UTF-8, not Latin-1
        assert_eq!(longstr_term("ä\u{1}".as_bytes()), "<<195,164,1>>");
        assert_eq!(binary(&[127]), "<<127>>");
        assert_eq!(longstr_term(b"\x1b"), r#"<<"\e">>"#);
        assert_eq!(string(b"a\"b"), r#""a\"b""#);
        assert_eq!(string(&[228]), r#""ä""#);
        assert_eq!(string(&[1, 97]), "[1,97]");
        assert_eq!(string(b""), "[]");
    }

    /// Each pair was printed by Erlang/OTP 25.
    #[test]
    fn floats_look_like_erlangs() {
        let pairs = [
            (1.0, "1.0"),
            (1.0e10, "1.0e10"),
            (123_456.7, "123456.7"),
            (0.001, "0.001"),
            (0.0001, "0.0001"),
            (0.1, "0.1"),
            (1.0e22, "1.0e22"),
            (1.5e300, "1.5e300"),
            (-2.5, "-2.5"),
            (1.0e5, "1.0e5"),
            (123_456_789_012_345_680.0, "1.2345678901234568e17"),
            (9_007_199_254_740_992.0, "9.007199254740992e15"),
            (0.000_123_45, "1.2345e-4"),
            (1000.0, "1.0e3"),
            (100.0, "100.0"),
            (12.0e-5, "1.2e-4"),
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (0.0011, "0.0011"),
            (123_400.0, "1.234e5"),
            (12_300.0, "1.23e4"),
            (120.0, "120.0"),
        ];
        for (value, text) in pairs {
            assert_eq!(float(value), text);
        }
    }

    #[test]
    fn tables_arrays_and_the_rest_look_like_erlangs() {
        let mut table = FieldTable::default();
        table.insert("k".into(), AMQPValue::LongString("v".into()));
        table.insert("n".into(), AMQPValue::LongInt(5));
        assert_eq!(term(&AMQPValue::FieldTable(table.clone())), r#"[{<<"k">>,longstr,<<"v">>},{<<"n">>,signedint,5}]"#);
        let array = FieldArray::from(vec![AMQPValue::FieldTable(table), AMQPValue::Void]);
        assert_eq!(
            term(&AMQPValue::FieldArray(array)),
            r#"[{table,[{<<"k">>,longstr,<<"v">>},{<<"n">>,signedint,5}]},{void,undefined}]"#
        );
        assert_eq!(term(&AMQPValue::FieldArray(FieldArray::default())), "[]");
        assert_eq!(term(&AMQPValue::DecimalValue(DecimalValue { scale: 1, value: 2 })), "{1,2}");
        assert_eq!(term(&AMQPValue::Boolean(true)), "true");
    }

    /// Each was printed by RabbitMQ 4.3.6 in a refused policy.
    #[test]
    fn json_looks_like_what_rabbitmq_decodes_it_to() {
        for (json, text) in [
            (r#""x""#, r#"<<"x">>"#),
            (r#""é""#, r#"<<"é"/utf8>>"#),
            ("-1", "-1"),
            ("1.5", "1.5"),
            ("true", "true"),
            ("null", "null"),
            ("[1,2]", "[1,2]"),
            ("[104,105]", r#""hi""#),
            (r#"{"a":"b","c":[]}"#, r#"#{<<"a">> => <<"b">>,<<"c">> => []}"#),
            (r#"{"a":null}"#, r#"#{<<"a">> => null}"#),
        ] {
            assert_eq!(json_term(&serde_json::from_str(json).unwrap()), text);
        }
        let huge = Value::Array(vec![Value::from("x"); 100_000]);
        assert!(json_term(&huge).len() <= MAX_TERM_BYTES + 3);
    }

    #[test]
    fn atoms_are_quoted_when_erlang_quotes_them() {
        assert_eq!(atom("direct"), "direct");
        assert_eq!(atom("x_a@B"), "x_a@B");
        assert_eq!(atom("x-random"), "'x-random'");
        assert_eq!(atom("Abc"), "'Abc'");
        assert_eq!(atom(""), "''");
    }

    #[test]
    fn text_that_is_not_utf8_is_read_as_latin_1() {
        assert_eq!(text("ä€".as_bytes()), "ä€");
        assert_eq!(text(&[228, 255]), "äÿ");
    }

    #[test]
    fn a_huge_value_is_cut() {
        let array = FieldArray::from(vec![AMQPValue::LongInt(1); 100_000]);
        assert!(term(&AMQPValue::FieldArray(array)).len() < MAX_TERM_BYTES + 100);
    }
}
