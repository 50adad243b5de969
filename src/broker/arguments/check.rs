//! What an argument's value may be, with RabbitMQ's terms for what is wrong with it.

use amq_protocol::types::{AMQPValue, FieldTable};

use crate::{
    broker::rules::Retry,
    model::arguments::{as_integer, as_longstr, lookup, type_name},
};

/// RabbitMQ's bound on times: about ten years, in milliseconds.
pub const MAX_TIME_MS: i64 = 315_360_000_000;
/// The most values that deduplication may remember; each costs memory.
const MAX_CACHE_SIZE: i64 = 1_000_000;
const MAX_PRIORITY: i64 = 255;
/// A header's name is a short string.
const MAX_HEADER_NAME_BYTES: usize = 255;

/// The rule for one argument.
#[derive(Clone, Copy, Debug)]
pub(super) enum Check {
    NonNegative,
    Positive,
    /// Milliseconds, at least `min` (0 or 1).
    Time {
        min: i64,
    },
    MaxPriority,
    Text,
    /// Text, with an exchange to go with it.
    DeadLetterRoutingKey,
    /// One of these words, or the error.
    OneOf(&'static [&'static str], &'static str),
    Bool,
    Version2,
    MaxAge,
    Retry,
    /// A header's name, or whether the default one counts.
    MessageGroup,
    CacheSize,
    /// A header's name, or the error.
    HeaderName(&'static str),
}

impl Check {
    /// Checks a value.
    ///
    /// # Errors
    /// What RabbitMQ's text says after the queue's name.
    pub(super) fn check(self, value: &AMQPValue, arguments: &FieldTable) -> Result<(), String> {
        match self {
            Check::NonNegative => non_negative(value).map(drop),
            Check::Positive => positive(value).map(drop),
            Check::Time { min } => match integer(value)? {
                0 if min > 0 => Err("{value_zero,0}".into()),
                n if n < 0 => Err(format!("{{value_negative,{n}}}")),
                n if n > MAX_TIME_MS => Err(format!("{{value_too_large,{n}}}")),
                _ => Ok(()),
            },
            Check::MaxPriority => match non_negative(value)? {
                n if n > MAX_PRIORITY => Err(format!("{{max_value_exceeded,{n}}}")),
                _ => Ok(()),
            },
            Check::Text => longstr(value).map(drop),
            Check::DeadLetterRoutingKey => match (longstr(value)?, lookup(arguments, "x-dead-letter-exchange")) {
                (_, None) => Err("routing_key_but_no_dlx_defined".into()),
                (_, Some(_)) => Ok(()),
            },
            Check::OneOf(words, error) => {
                let text = longstr(value)?;
                words.iter().any(|word| word.as_bytes() == text).then_some(()).ok_or_else(|| error.into())
            }
            Check::Bool => match value {
                AMQPValue::Boolean(_) => Ok(()),
                other => Err(unacceptable(other)),
            },
            Check::Version2 => match non_negative(value)? {
                2 => Ok(()),
                other => Err(format!("\"unsupported queue version '{other}'\"")),
            },
            Check::MaxAge => max_age_ms(longstr(value)?).map(drop).ok_or_else(|| "invalid_max_age".into()),
            Check::Retry => Retry::from_argument(value).map(drop),
            Check::MessageGroup => match value {
                AMQPValue::Boolean(_) => Ok(()),
                other => header_name(other, "invalid_message_group"),
            },
            Check::CacheSize => match positive(value)? {
                n if n > MAX_CACHE_SIZE => Err(format!("{{value_too_large,{n}}}")),
                _ => Ok(()),
            },
            Check::HeaderName(error) => header_name(value, error),
        }
    }
}

fn integer(value: &AMQPValue) -> Result<i64, String> {
    as_integer(value).ok_or_else(|| format!("\"expected integer, got {}\"", type_name(value)))
}

fn non_negative(value: &AMQPValue) -> Result<i64, String> {
    match integer(value)? {
        n if n < 0 => Err(format!("{{value_negative,{n}}}")),
        n => Ok(n),
    }
}

fn positive(value: &AMQPValue) -> Result<i64, String> {
    match non_negative(value)? {
        0 => Err("{value_zero,0}".into()),
        n => Ok(n),
    }
}

fn longstr(value: &AMQPValue) -> Result<&[u8], String> {
    as_longstr(value).ok_or_else(|| unacceptable(value))
}

fn header_name(value: &AMQPValue, error: &str) -> Result<(), String> {
    let name = longstr(value)?;
    let valid = (1..=MAX_HEADER_NAME_BYTES).contains(&name.len()) && std::str::from_utf8(name).is_ok();
    valid.then_some(()).ok_or_else(|| error.to_owned())
}

pub(super) fn unacceptable(value: &AMQPValue) -> String {
    format!("{{unacceptable_type,{}}}", type_name(value))
}

/// A stream's age limit (`1h`, `7D`) in milliseconds: a number above 0 and one of `Y` (365 days), `M` (30 days), `D`,
/// `h`, `m` and `s`. More than fits is taken as the most that does. As in RabbitMQ, a line end stops the text.
#[must_use]
pub fn max_age_ms(text: &[u8]) -> Option<u64> {
    const SECOND: u64 = 1000;
    const DAY: u64 = 24 * 3600 * SECOND;
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (digits, unit) = text.split_at(digits);
    let unit = match unit.split(|&byte| byte == b'\n').next()? {
        b"Y" => 365 * DAY,
        b"M" => 30 * DAY,
        b"D" => DAY,
        b"h" => 3600 * SECOND,
        b"m" => 60 * SECOND,
        b"s" => SECOND,
        _ => return None,
    };
    let number = digits.iter().fold(0_u64, |n, digit| n.saturating_mul(10).saturating_add(u64::from(digit - b'0')));
    (number > 0).then(|| number.saturating_mul(unit))
}
