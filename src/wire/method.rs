//! Methods off the hot path, through `amq-protocol`'s parser and generator.

use amq_protocol::{
    frame::WriteContext,
    protocol::{AMQPClass, gen_class, parse_class},
};

use super::{
    frame::{FRAME_END, METHOD},
    limits::{TableError, check_method_table},
};

/// Why a method payload gives no method. RabbitMQ answers each of them differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MethodError {
    /// Class or method number out of the specification.
    Unknown,
    /// A field table that is malformed or nested too deeply.
    Table(TableError),
    /// A short string that is not UTF-8.
    NotUtf8,
    /// Arguments too short, too long or otherwise not those of the method.
    Undecodable,
}

/// Method numbers of every class of AMQP 0-9-1 as RabbitMQ extends it.
fn is_known(id: u32) -> bool {
    let (class, method) = (id >> 16, id & 0xFFFF);
    match class {
        10 => matches!(method, 10 | 11 | 20 | 21 | 30 | 31 | 40 | 41 | 50 | 51 | 60 | 61 | 70 | 71),
        20 => matches!(method, 10 | 11 | 20 | 21 | 40 | 41),
        30 => matches!(method, 10 | 11),
        40 => matches!(method, 10 | 11 | 20 | 21 | 30 | 31 | 40 | 51),
        50 => matches!(method, 10 | 11 | 20 | 21 | 30 | 31 | 40 | 41 | 50 | 51),
        60 => matches!(method, 10 | 11 | 20 | 21 | 30 | 31 | 40 | 50 | 60 | 70..=72 | 80 | 90 | 100 | 110 | 111 | 120),
        85 => matches!(method, 10 | 11),
        90 => matches!(method, 10 | 11 | 20 | 21 | 30 | 31),
        _ => false,
    }
}

/// Parses a method payload.
///
/// # Errors
/// [`MethodError`]; the caller turns it into RabbitMQ's answer (a 501, or a dropped socket).
pub fn parse(payload: &[u8]) -> Result<AMQPClass, MethodError> {
    let id = super::hot::method_id(payload).ok_or(MethodError::Undecodable)?;
    if !is_known(id) {
        return Err(MethodError::Unknown);
    }
    check_method_table(payload).map_err(|error| match error {
        TableError::Truncated => MethodError::Undecodable,
        TableError::Malformed | TableError::TooDeep => MethodError::Table(error),
    })?;
    match parse_class(payload) {
        Ok(([], class)) => Ok(class),
        Ok(_) => Err(MethodError::Undecodable),
        Err(_) if first_short_strings_are_text(id, payload) => Err(MethodError::Undecodable),
        Err(_) => Err(MethodError::NotUtf8),
    }
}

/// Whether the leading short strings of the method are UTF-8, for telling a bad encoding from bad framing.
fn first_short_strings_are_text(id: u32, payload: &[u8]) -> bool {
    let (skip, mut count) = match id >> 16 {
        10 => (if id & 0xFFFF == 40 { 0 } else { return true }, 1),
        40 => (2, 3),
        50 => (2, 3),
        60 => match id & 0xFFFF {
            20 => (2, 2),
            30 | 31 | 21 => (0, 1),
            40 => (2, 2),
            70 => (2, 1),
            _ => return true,
        },
        _ => return true,
    };
    let mut rest = payload.get(4 + skip..).unwrap_or_default();
    while count > 0 {
        let Some((&len, tail)) = rest.split_first() else { return true };
        let Some((text, tail)) = tail.split_at_checked(len as usize) else { return true };
        if std::str::from_utf8(text).is_err() {
            return false;
        }
        // A queue.declare or exchange.delete has fewer names; its next byte is a bit field, not a length.
        rest = tail;
        count -= 1;
    }
    true
}

/// The payload of `class`: ids and arguments.
pub fn payload(class: &AMQPClass) -> Vec<u8> {
    match gen_class(class)(WriteContext::from(Vec::with_capacity(64))) {
        Ok(written) => written.into_inner().0,
        // Writing into a Vec fails only for a field over its length limit, which our own methods never hold.
        Err(error) => {
            tracing::error!(?error, "method could not be encoded");
            Vec::new()
        }
    }
}

/// Appends `class` as a method frame.
pub fn write(out: &mut Vec<u8>, channel: u16, class: &AMQPClass) {
    write_raw(out, channel, &payload(class));
}

/// Appends a method frame around ready-made payload bytes.
pub fn write_raw(out: &mut Vec<u8>, channel: u16, payload: &[u8]) {
    out.push(METHOD);
    out.extend_from_slice(&channel.to_be_bytes());
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    out.extend_from_slice(payload);
    out.push(FRAME_END);
}

#[cfg(test)]
mod tests {
    use super::*;
    use amq_protocol::protocol::{basic, queue};

    #[test]
    fn methods_survive_the_round_trip_and_no_cut_panics() {
        let class = AMQPClass::Queue(queue::AMQPMethod::Declare(queue::Declare {
            queue: "q".into(),
            durable: true,
            ..Default::default()
        }));
        let bytes = payload(&class);
        assert_eq!(parse(&bytes), Ok(class));
        for cut in 0..bytes.len() {
            assert!(parse(&bytes[..cut]).is_err());
        }
    }

    #[test]
    fn errors_are_told_apart() {
        assert_eq!(parse(&[0, 60, 0, 99]), Err(MethodError::Unknown));
        assert_eq!(parse(&[0, 61, 0, 10]), Err(MethodError::Unknown));
        assert_eq!(parse(&[0, 60]), Err(MethodError::Undecodable));
        let cancel = payload(&AMQPClass::Basic(basic::AMQPMethod::Cancel(basic::Cancel {
            consumer_tag: "ab".into(),
            nowait: false,
        })));
        let mut bad = cancel.clone();
        bad[5] = 0xFF;
        assert_eq!(parse(&bad), Err(MethodError::NotUtf8));
        let mut long = cancel;
        long.push(0);
        assert_eq!(parse(&long), Err(MethodError::Undecodable));
    }
}
