//! Arguments of declarations and bindings: their types' names, their values, and when two are the same.
//!
//! RabbitMQ compares arguments as Erlang terms, so what matters is the value and not the width it was sent with:
//! the `signedint` 5 and the `long` 5 are one number, a `longstr` and a `binary` of the same bytes are one string, and
//! 1 is not 1.0. Inside tables and arrays the types count, because there they are part of the term.

use std::hash::{Hash, Hasher};

use amq_protocol::types::{AMQPValue, FieldTable};

use super::erlang;
use super::{Name, ResourceName};

/// The type's name in RabbitMQ's texts.
#[must_use]
pub fn type_name(value: &AMQPValue) -> &'static str {
    match value {
        AMQPValue::Boolean(_) => "bool",
        AMQPValue::ShortShortInt(_) => "byte",
        AMQPValue::ShortShortUInt(_) => "unsignedbyte",
        AMQPValue::ShortInt(_) => "short",
        AMQPValue::ShortUInt(_) => "unsignedshort",
        AMQPValue::LongInt(_) => "signedint",
        AMQPValue::LongUInt(_) => "unsignedint",
        AMQPValue::LongLongInt(_) => "long",
        AMQPValue::Float(_) => "float",
        AMQPValue::Double(_) => "double",
        AMQPValue::DecimalValue(_) => "decimal",
        AMQPValue::ShortString(_) | AMQPValue::LongString(_) => "longstr",
        AMQPValue::FieldArray(_) => "array",
        AMQPValue::Timestamp(_) => "timestamp",
        AMQPValue::FieldTable(_) => "table",
        AMQPValue::ByteArray(_) => "binary",
        AMQPValue::Void => "void",
    }
}

/// The number, if the value is of an integer type of any width. Timestamps, decimals and floats are not integers.
#[must_use]
pub fn as_integer(value: &AMQPValue) -> Option<i64> {
    match value {
        AMQPValue::ShortShortInt(v) => Some((*v).into()),
        AMQPValue::ShortShortUInt(v) => Some((*v).into()),
        AMQPValue::ShortInt(v) => Some((*v).into()),
        AMQPValue::ShortUInt(v) => Some((*v).into()),
        AMQPValue::LongInt(v) => Some((*v).into()),
        AMQPValue::LongUInt(v) => Some((*v).into()),
        AMQPValue::LongLongInt(v) => Some(*v),
        _ => None,
    }
}

/// The bytes, if the value is a `longstr`.
#[must_use]
pub fn as_longstr(value: &AMQPValue) -> Option<&[u8]> {
    match value {
        AMQPValue::LongString(v) => Some(v.as_bytes()),
        AMQPValue::ShortString(v) => Some(v.as_str().as_bytes()),
        _ => None,
    }
}

/// The argument called `key`.
#[must_use]
pub fn lookup<'a>(arguments: &'a FieldTable, key: &str) -> Option<&'a AMQPValue> {
    arguments.inner().get(key)
}

/// A value as Erlang holds it, without the type it was sent with.
#[derive(Clone, Copy, Debug)]
enum Term<'a> {
    Integer(i128),
    Float(f64),
    Boolean(bool),
    Undefined,
    Bytes(&'a [u8]),
    Decimal(u8, u32),
    Array(&'a [AMQPValue]),
    Table(&'a FieldTable),
}

impl<'a> Term<'a> {
    fn of(value: &'a AMQPValue) -> Self {
        match value {
            AMQPValue::Boolean(v) => Self::Boolean(*v),
            AMQPValue::Timestamp(v) => Self::Integer((*v).into()),
            AMQPValue::Float(v) => Self::Float((*v).into()),
            AMQPValue::Double(v) => Self::Float(*v),
            AMQPValue::DecimalValue(v) => Self::Decimal(v.scale, v.value),
            AMQPValue::ShortString(v) => Self::Bytes(v.as_str().as_bytes()),
            AMQPValue::LongString(v) => Self::Bytes(v.as_bytes()),
            AMQPValue::ByteArray(v) => Self::Bytes(v.as_slice()),
            AMQPValue::FieldArray(v) => Self::Array(v.as_slice()),
            AMQPValue::FieldTable(v) => Self::Table(v),
            AMQPValue::Void => Self::Undefined,
            integer => Self::Integer(as_integer(integer).unwrap_or_default().into()),
        }
    }

    fn same(self, other: Self) -> bool {
        match (self, other) {
            (Self::Integer(a), Self::Integer(b)) => a == b,
            (Self::Float(a), Self::Float(b)) => a == b,
            (Self::Boolean(a), Self::Boolean(b)) => a == b,
            (Self::Undefined, Self::Undefined) => true,
            (Self::Bytes(a), Self::Bytes(b)) => a == b,
            (Self::Decimal(a, b), Self::Decimal(c, d)) => (a, b) == (c, d),
            (Self::Array(a), Self::Array(b)) => a == b,
            (Self::Table(a), Self::Table(b)) => a == b,
            // Both are the empty list in Erlang.
            (Self::Array(a), Self::Table(t)) | (Self::Table(t), Self::Array(a)) => a.is_empty() && t.inner().is_empty(),
            _ => false,
        }
    }
}

/// Whether two argument values are equivalent: same value, whatever the width or string type.
#[must_use]
pub fn same_value(a: &AMQPValue, b: &AMQPValue) -> bool {
    Term::of(a).same(Term::of(b))
}

/// Whether a binding's argument and a message's header have the same value.
///
/// As [`same_value`], but RabbitMQ 4 counts header timestamps in milliseconds, so that a timestamp argument does not
/// match the timestamp header it looks like.
#[must_use]
pub fn header_matches(argument: &AMQPValue, header: &AMQPValue) -> bool {
    let header = match header {
        AMQPValue::Timestamp(seconds) => Term::Integer(i128::from(*seconds) * 1000),
        other => Term::of(other),
    };
    Term::of(argument).same(header)
}

/// Whether two argument tables are identical, value types included: what makes two bindings one.
#[must_use]
pub fn identical_tables(a: &FieldTable, b: &FieldTable) -> bool {
    a.inner().len() == b.inner().len()
        && a.into_iter().zip(b).all(|((key, value), (other_key, other))| {
            key == other_key
                && match (value, other) {
                    // By bits, so that a table is always identical to itself.
                    (AMQPValue::Float(x), AMQPValue::Float(y)) => x.to_bits() == y.to_bits(),
                    (AMQPValue::Double(x), AMQPValue::Double(y)) => x.to_bits() == y.to_bits(),
                    _ => value == other,
                }
        })
}

/// Hashes a table in agreement with [`identical_tables`]. Nested tables and arrays count by their size only.
pub fn hash_table<H: Hasher>(table: &FieldTable, state: &mut H) {
    for (key, value) in table {
        key.hash(state);
        type_name(value).hash(state);
        match Term::of(value) {
            Term::Integer(v) => v.hash(state),
            Term::Float(_) | Term::Undefined => {}
            Term::Boolean(v) => v.hash(state),
            Term::Bytes(v) => v.hash(state),
            Term::Decimal(scale, v) => (scale, v).hash(state),
            Term::Array(v) => v.len().hash(state),
            Term::Table(v) => v.inner().len().hash(state),
        }
    }
}

/// A redeclaration differs from what exists: 406, in RabbitMQ's words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("inequivalent arg '{key}' for {resource}: received {received} but current is {current}")]
pub struct InequivalentArgument {
    /// The property or argument that differs.
    pub key: String,
    pub resource: ResourceName,
    /// What the redeclaration says, rendered: `'5'`, `the value '5' of type 'long'` or `none`.
    pub received: String,
    /// What exists, rendered in the same way.
    pub current: String,
}

/// Compares a property (`durable`, `type`, …) of a redeclaration with what exists.
///
/// # Errors
/// The 406 text when they differ.
pub fn check_property(
    resource: &ResourceName,
    key: &str,
    current: &str,
    received: &str,
) -> Result<(), InequivalentArgument> {
    if current == received {
        return Ok(());
    }
    Err(InequivalentArgument {
        key: key.to_owned(),
        resource: resource.clone(),
        received: format!("'{received}'"),
        current: format!("'{current}'"),
    })
}

/// As [`check_property`], for a flag.
///
/// # Errors
/// The 406 text when they differ.
pub fn check_flag(
    resource: &ResourceName,
    key: &str,
    current: bool,
    received: bool,
) -> Result<(), InequivalentArgument> {
    let word = |flag| if flag { "true" } else { "false" };
    check_property(resource, key, word(current), word(received))
}

/// Compares the argument `key` of a redeclaration with what exists (`rabbit_misc:assert_args_equivalence/4`).
///
/// A missing `x-queue-type` is equivalent to `classic`.
///
/// # Errors
/// The 406 text when they differ.
pub fn check_argument(
    resource: &ResourceName,
    key: &str,
    current: &FieldTable,
    received: &FieldTable,
) -> Result<(), InequivalentArgument> {
    let (current, received) = (lookup(current, key), lookup(received, key));
    let (received, current) = match (current, received) {
        (None, None) => return Ok(()),
        (Some(current), Some(received)) => {
            if same_value(current, received) {
                return Ok(());
            }
            let quoted = |value| format!("'{}'", erlang::value_text(value));
            (quoted(received), quoted(current))
        }
        (Some(only), None) | (None, Some(only)) if is_default_queue_type(key, only) => {
            return Ok(());
        }
        (current, received) => (with_type(received), with_type(current)),
    };
    Err(InequivalentArgument { key: key.to_owned(), resource: resource.clone(), received, current })
}

fn is_default_queue_type(key: &str, value: &AMQPValue) -> bool {
    key == "x-queue-type" && as_longstr(value) == Some(b"classic")
}

fn with_type(value: Option<&AMQPValue>) -> String {
    match value {
        None => "none".to_owned(),
        Some(value) => {
            format!("the value '{}' of type '{}'", erlang::value_text(value), type_name(value))
        }
    }
}

/// An argument that names an exchange is not a `longstr`: 406, in RabbitMQ's words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid type '{type_name}' for arg '{key}' in {resource}")]
pub struct InvalidArgumentType {
    pub type_name: &'static str,
    pub key: &'static str,
    pub resource: ResourceName,
}

/// Reads an argument that names an exchange (`alternate-exchange`, `x-dead-letter-exchange`).
///
/// Bytes that are not UTF-8 are accepted and name nothing, as no exchange can be called that.
///
/// # Errors
/// The 406 text when the argument is there and not a `longstr`.
pub fn exchange_name_argument(
    resource: &ResourceName,
    key: &'static str,
    arguments: &FieldTable,
) -> Result<Option<Name>, InvalidArgumentType> {
    match lookup(arguments, key) {
        None => Ok(None),
        Some(value) => match as_longstr(value) {
            Some(bytes) => Ok(std::str::from_utf8(bytes).ok().map(Name::from)),
            None => Err(InvalidArgumentType { type_name: type_name(value), key, resource: resource.clone() }),
        },
    }
}

#[cfg(test)]
mod tests;
