//! When a message is due that asks to wait: headers `x-delay` and `x-deliver-at`.
//!
//! `x-delay` is read as RabbitMQ's plugin `rabbitmq_delayed_message_exchange` reads it; `x-deliver-at`, a point in time, is
//! this broker's own.

use crate::model::{
    headers::{AddedHeader, AddedValue, add_headers},
    properties::{Properties, RawEntry, raw_entry},
};

/// Milliseconds to wait: an integer of any width, a numeric string, or a float, which is truncated.
pub const DELAY: &str = "x-delay";
/// When to deliver: milliseconds since 1970 as an integer or a numeric string, or a timestamp, which has seconds.
pub const DELIVER_AT: &str = "x-deliver-at";

/// The longest delay (the plugin's, which is that of Erlang's timers); a message with a longer one does not wait.
pub const MAX_DELAY_MS: i64 = u32::MAX as i64;

/// When the message with these properties is due, in Unix milliseconds; `None` if it does not wait at all. `now_unix_ms` is
/// rounded up ([`clock::ceil_unix_ms`](crate::clock::ceil_unix_ms)), so what is due just then is still ahead.
///
/// `x-delay` counts if it can be read, `x-deliver-at` otherwise. Delays from 1 to [`MAX_DELAY_MS`] and points in time that
/// are ahead wait; negative delays do not, so that a delivered message can be published again as it is.
pub fn due_unix_ms(properties: &Properties<'_>, now_unix_ms: u64) -> Option<u64> {
    let table = properties.raw_headers()?;
    if let Some(delay) = raw_entry(table, DELAY.as_bytes()).and_then(|entry| number(&entry)) {
        let delay = u64::try_from(delay).ok().filter(|_| delay <= MAX_DELAY_MS)?;
        return (delay > 0).then(|| now_unix_ms.saturating_add(delay));
    }
    let entry = raw_entry(table, DELIVER_AT.as_bytes())?;
    let at = match entry.tag {
        b'T' => u64::from_be_bytes(*entry.value().first_chunk()?).saturating_mul(1000),
        _ => u64::try_from(number(&entry)?).ok()?,
    };
    (at >= now_unix_ms).then_some(at)
}

/// Replaces `out` with `properties` whose `x-delay` is negated, as the delayed exchange delivers it: a 64-bit integer,
/// whatever the publisher used, in a sorted table (see [`headers`](crate::model::headers)).
///
/// # Returns
/// False if there is no `x-delay` that can be read; `out` is then a copy.
pub fn negate_delay(properties: &[u8], out: &mut Vec<u8>) -> bool {
    let table = Properties::parse(properties).ok().and_then(|view| view.raw_headers());
    let delay = table.and_then(|table| raw_entry(table, DELAY.as_bytes())).and_then(|entry| number(&entry));
    match delay {
        Some(delay) => {
            let value = AddedValue::Long(delay.saturating_neg());
            add_headers(properties, &[AddedHeader { key: DELAY.as_bytes(), value }], out);
        }
        None => {
            out.clear();
            out.extend_from_slice(properties);
        }
    }
    delay.is_some()
}

/// The integer a header says, if it says one.
fn number(entry: &RawEntry<'_>) -> Option<i64> {
    let value = entry.value();
    Some(match entry.tag {
        b'f' => f32::from_be_bytes(*value.first_chunk()?) as i64,
        b'd' => f64::from_be_bytes(*value.first_chunk()?) as i64,
        b'S' | b'x' => std::str::from_utf8(value.get(4..)?).ok()?.parse().ok()?,
        _ => entry.integer()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::headers::write_counted;

    const NOW: u64 = 1_800_000_000_000;

    fn properties(headers: &[(&str, &[u8])]) -> Vec<u8> {
        let mut out = b"\x20\0".to_vec();
        write_counted(&mut out, |out| {
            for (key, value) in headers {
                out.push(key.len() as u8);
                out.extend_from_slice(key.as_bytes());
                out.extend_from_slice(value);
            }
        });
        out
    }

    fn due(headers: &[(&str, &[u8])]) -> Option<u64> {
        due_unix_ms(&Properties::parse(&properties(headers)).unwrap(), NOW).map(|due| due - NOW)
    }

    #[test]
    fn delays_of_every_type_are_understood() {
        let waits: [&[u8]; 14] = [
            b"b\x64",
            b"B\x64",
            b"s\0\x64",
            b"u\0\x64",
            b"U\0\x64",
            b"I\0\0\0\x64",
            b"i\0\0\0\x64",
            b"l\0\0\0\0\0\0\0\x64",
            b"L\0\0\0\0\0\0\0\x64",
            b"S\0\0\0\x03100",
            b"S\0\0\0\x04+100",
            b"x\0\0\0\x03100",
            &[b'f', 0x42, 0xc9, 0x99, 0x9a],                         // 100.8
            &[b'd', 0x40, 0x59, 0x33, 0x33, 0x33, 0x33, 0x33, 0x33], // 100.8
        ];
        for value in waits {
            assert_eq!(due(&[(DELAY, value)]), Some(100), "{}", value.escape_ascii());
        }
        let at_once: [&[u8]; 9] = [
            b"I\0\0\0\0",
            b"I\xff\xff\xff\x9c",
            b"l\0\0\0\x01\0\0\0\0",
            b"S\0\0\0\x03abc",
            b"S\0\0\0\x04 100",
            b"t\x01",
            b"V",
            b"T\0\0\0\0\0\0\0\x64",
            b"d\x7f\xf8\0\0\0\0\0\0",
        ];
        for value in at_once {
            assert_eq!(due(&[(DELAY, value)]), None, "{}", value.escape_ascii());
        }
        assert_eq!(due(&[(DELAY, b"i\xff\xff\xff\xff")]), Some(u64::from(u32::MAX)));
        assert_eq!(due(&[]), None);
        assert_eq!(due_unix_ms(&Properties::parse(&[0, 0]).unwrap(), NOW), None);
    }

    #[test]
    fn points_in_time_wait_while_they_are_ahead() {
        let at = |offset: i64| [&b"l"[..], &(NOW as i64 + offset).to_be_bytes()].concat();
        assert_eq!(due(&[(DELIVER_AT, &at(250))]), Some(250));
        assert_eq!(due(&[(DELIVER_AT, &at(0))]), Some(0)); // now is rounded up
        assert_eq!(due(&[(DELIVER_AT, &at(-1))]), None);
        let seconds = [&b"T"[..], &(NOW / 1000 + 5).to_be_bytes()].concat();
        assert_eq!(due(&[(DELIVER_AT, &seconds)]), Some(5000));
        assert_eq!(due(&[(DELIVER_AT, &[b'T', 255, 255, 255, 255, 255, 255, 255, 255])]), Some(u64::MAX - NOW));
        // A delay that can be read counts alone, even when it says that there is none.
        assert_eq!(due(&[(DELAY, b"B\x64"), (DELIVER_AT, &at(250))]), Some(100));
        assert_eq!(due(&[(DELAY, b"b\x9c"), (DELIVER_AT, &at(250))]), None);
        assert_eq!(due(&[(DELAY, b"V"), (DELIVER_AT, &at(250))]), Some(250));
    }

    #[test]
    fn delivered_delays_are_negative_long_integers() {
        let mut out = Vec::new();
        assert!(negate_delay(&properties(&[("z", b"V"), (DELAY, b"S\0\0\0\x03100")]), &mut out));
        assert_eq!(out, properties(&[(DELAY, b"l\xff\xff\xff\xff\xff\xff\xff\x9c"), ("z", b"V")]));
        assert_eq!(due_unix_ms(&Properties::parse(&out).unwrap(), NOW), None);
        let without = properties(&[("z", b"V"), (DELAY, b"V")]);
        assert!(!negate_delay(&without, &mut out));
        assert_eq!(out, without);
    }
}
