//! A lazy view of a content header's properties: a flag word and the list of what it announces, as the wire has them.

use amq_protocol::types::{AMQPValue, FieldTable, parsing::parse_field_table};

/// Flag bits, highest first in the order of the list (specification section 4.2.6.1); the ones not named are short strings.
const CONTENT_TYPE: u16 = 1 << 15;
const CONTENT_ENCODING: u16 = 1 << 14;
const HEADERS: u16 = 1 << 13;
const DELIVERY_MODE: u16 = 1 << 12;
const PRIORITY: u16 = 1 << 11;
const CORRELATION_ID: u16 = 1 << 10;
const REPLY_TO: u16 = 1 << 9;
const EXPIRATION: u16 = 1 << 8;
const MESSAGE_ID: u16 = 1 << 7;
const TIMESTAMP: u16 = 1 << 6;
const USER_ID: u16 = 1 << 4;

/// Properties whose presence makes the broker look closer at a message.
const BROKER_READS: u16 = HEADERS | REPLY_TO | EXPIRATION | USER_ID;

/// Properties that do not decode: cut short, with bytes left over, or with flags AMQP 0-9-1 does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MalformedProperties;

/// Where each variable property stands in the raw bytes; offsets are from the start of the flag word.
#[derive(Clone, Copy, Debug, Default)]
pub struct Properties<'a> {
    raw: &'a [u8],
    headers: Option<&'a [u8]>,
    correlation_id: Option<&'a [u8]>,
    reply_to: Option<&'a [u8]>,
    expiration: Option<&'a [u8]>,
    message_id: Option<&'a [u8]>,
    timestamp: Option<u64>,
    user_id: Option<&'a [u8]>,
    delivery_mode: Option<u8>,
    priority: Option<u8>,
}

/// The delivery mode, for the path that needs nothing else: `Some(persistent)` when the properties are empty or hold only
/// a delivery mode, `None` when [`Properties::parse`] has to look.
#[inline]
pub fn plain_delivery_mode(raw: &[u8]) -> Option<bool> {
    match raw {
        [0, 0] => Some(false),
        [0x10, 0x00, mode] => Some(*mode == 2),
        _ => None,
    }
}

impl<'a> Properties<'a> {
    /// Walks the list once.
    ///
    /// # Errors
    /// [`MalformedProperties`]; RabbitMQ's channel dies of it with 541.
    pub fn parse(raw: &'a [u8]) -> Result<Self, MalformedProperties> {
        let (flags, mut rest) = raw.split_first_chunk::<2>().ok_or(MalformedProperties)?;
        let flags = u16::from_be_bytes(*flags);
        if flags & 0b11 != 0 {
            return Err(MalformedProperties);
        }
        let mut view = Properties { raw, ..Properties::default() };
        for bit in (2..16).rev().map(|shift| 1u16 << shift) {
            if flags & bit == 0 {
                continue;
            }
            rest = match bit {
                DELIVERY_MODE | PRIORITY => {
                    let (&octet, rest) = rest.split_first().ok_or(MalformedProperties)?;
                    *(if bit == PRIORITY { &mut view.priority } else { &mut view.delivery_mode }) = Some(octet);
                    rest
                }
                TIMESTAMP => {
                    let (seconds, rest) = rest.split_first_chunk::<8>().ok_or(MalformedProperties)?;
                    view.timestamp = Some(u64::from_be_bytes(*seconds));
                    rest
                }
                HEADERS => {
                    let (len, after) = rest.split_first_chunk::<4>().ok_or(MalformedProperties)?;
                    let len = u32::from_be_bytes(*len) as usize;
                    view.headers = Some(rest.get(..4 + len).ok_or(MalformedProperties)?);
                    after.get(len..).ok_or(MalformedProperties)?
                }
                _ => {
                    let (&len, after) = rest.split_first().ok_or(MalformedProperties)?;
                    let (text, rest) = after.split_at_checked(len as usize).ok_or(MalformedProperties)?;
                    match bit {
                        CORRELATION_ID => view.correlation_id = Some(text),
                        REPLY_TO => view.reply_to = Some(text),
                        EXPIRATION => view.expiration = Some(text),
                        MESSAGE_ID => view.message_id = Some(text),
                        USER_ID => view.user_id = Some(text),
                        _ => {} // passed through unread
                    }
                    rest
                }
            };
        }
        if rest.is_empty() { Ok(view) } else { Err(MalformedProperties) }
    }

    /// The bytes this is a view of.
    pub fn raw(&self) -> &'a [u8] {
        self.raw
    }

    /// Whether the message asks to survive a restart (delivery mode 2; every other value is transient).
    pub fn is_persistent(&self) -> bool {
        self.delivery_mode == Some(2)
    }

    /// The priority property.
    pub fn priority(&self) -> Option<u8> {
        self.priority
    }

    /// Whether any property is present that the broker acts on at publish.
    pub fn needs_attention(raw: &[u8]) -> bool {
        raw.first_chunk::<2>().is_none_or(|flags| u16::from_be_bytes(*flags) & BROKER_READS != 0)
    }

    /// The header table with its length, undecoded.
    pub fn raw_headers(&self) -> Option<&'a [u8]> {
        self.headers
    }

    /// The decoded header table. The caller has bounded its nesting.
    pub fn headers(&self) -> Option<FieldTable> {
        let parsed = parse_field_table(self.headers?);
        parsed.ok().map(|(_, table)| table)
    }

    /// `correlation-id`, as bytes: content properties are not checked for UTF-8.
    pub fn correlation_id(&self) -> Option<&'a [u8]> {
        self.correlation_id
    }

    /// `message-id`, as bytes.
    pub fn message_id(&self) -> Option<&'a [u8]> {
        self.message_id
    }

    /// `timestamp`, in seconds since 1970 as far as clients keep to it.
    pub fn timestamp(&self) -> Option<u64> {
        self.timestamp
    }

    /// `reply-to`, `expiration` and `user-id`, as bytes.
    pub fn reply_to(&self) -> Option<&'a [u8]> {
        self.reply_to
    }

    pub fn expiration(&self) -> Option<&'a [u8]> {
        self.expiration
    }

    pub fn user_id(&self) -> Option<&'a [u8]> {
        self.user_id
    }

    /// Appends the properties to `out` with the header table that `write_table` appends (with its length) when it is given
    /// the present one; without `expiration` unless it is to be kept.
    pub fn write_with_headers(
        &self,
        out: &mut Vec<u8>,
        keep_expiration: bool,
        write_table: impl FnOnce(Option<&'a [u8]>, &mut Vec<u8>),
    ) {
        let Some(flags) = self.raw.first_chunk::<2>() else { return };
        let flags = u16::from_be_bytes(*flags);
        let mut table_at = 2;
        for bit in [CONTENT_TYPE, CONTENT_ENCODING] {
            if flags & bit != 0 {
                table_at += 1 + self.raw[table_at] as usize;
            }
        }
        let after_table = table_at + self.headers.map_or(0, <[u8]>::len);
        let expiration = if keep_expiration { None } else { self.expiration };
        let flags = (flags | HEADERS) & if expiration.is_some() { !EXPIRATION } else { u16::MAX };
        out.extend_from_slice(&flags.to_be_bytes());
        out.extend_from_slice(&self.raw[2..table_at]);
        write_table(self.headers, out);
        match expiration {
            None => out.extend_from_slice(&self.raw[after_table..]),
            Some(text) => {
                let text_at = self.offset_of(text);
                out.extend_from_slice(&self.raw[after_table..text_at - 1]);
                out.extend_from_slice(&self.raw[text_at + text.len()..]);
            }
        }
    }

    /// Where `part` (one of the views of this struct) begins in the raw bytes.
    fn offset_of(&self, part: &'a [u8]) -> usize {
        part.as_ptr() as usize - self.raw.as_ptr() as usize
    }

    /// The property bytes with `part` (one of the views of this struct) replaced by `new`, lengths included by the caller.
    fn replaced(&self, part: &'a [u8], before: usize, new: &[u8]) -> Vec<u8> {
        let start = self.offset_of(part) - before;
        let mut out = Vec::with_capacity(self.raw.len() + new.len());
        out.extend_from_slice(&self.raw[..start]);
        out.extend_from_slice(new);
        out.extend_from_slice(&self.raw[start + before + part.len()..]);
        out
    }

    /// The properties with another `reply-to` of at most 255 bytes; unchanged when there is none.
    pub fn with_reply_to(&self, reply_to: &[u8]) -> Vec<u8> {
        let Some(old) = self.reply_to else { return self.raw.to_vec() };
        let len = reply_to.len().min(255);
        let new = [&[len as u8], &reply_to[..len]].concat();
        self.replaced(old, 1, &new)
    }

    /// The properties with another `expiration` of at most 255 bytes; unchanged when there is none.
    pub fn with_expiration(&self, expiration: &[u8]) -> Vec<u8> {
        let Some(old) = self.expiration else { return self.raw.to_vec() };
        let len = expiration.len().min(255);
        let new = [&[len as u8], &expiration[..len]].concat();
        self.replaced(old, 1, &new)
    }

    /// The properties with the top-level header `name` cut out of the raw table.
    pub fn without_header(&self, name: &[u8]) -> Vec<u8> {
        let Some(table) = self.headers else { return self.raw.to_vec() };
        let mut kept = vec![0; 4];
        for entry in raw_entries(table) {
            if entry.key != name {
                kept.extend_from_slice(entry.bytes);
            }
        }
        let len = (kept.len() - 4) as u32;
        kept[..4].copy_from_slice(&len.to_be_bytes());
        self.replaced(table, 0, &kept)
    }
}

/// One entry of a raw table: its key, type tag and all its bytes.
#[derive(Clone, Copy, Debug)]
pub struct RawEntry<'a> {
    pub key: &'a [u8],
    pub tag: u8,
    pub bytes: &'a [u8],
}

impl<'a> RawEntry<'a> {
    /// What follows the type tag.
    #[inline]
    pub fn value(&self) -> &'a [u8] {
        &self.bytes[2 + self.key.len()..]
    }

    /// The value of an integer of whatever width.
    pub fn integer(&self) -> Option<i64> {
        let value = self.value();
        Some(match self.tag {
            b'b' => i64::from(*value.first()? as i8),
            b'B' => i64::from(*value.first()?),
            b's' | b'U' => i64::from(i16::from_be_bytes(*value.first_chunk()?)),
            b'u' => i64::from(u16::from_be_bytes(*value.first_chunk()?)),
            b'I' => i64::from(i32::from_be_bytes(*value.first_chunk()?)),
            b'i' => i64::from(u32::from_be_bytes(*value.first_chunk()?)),
            b'l' | b'L' => i64::from_be_bytes(*value.first_chunk()?),
            _ => return None,
        })
    }
}

/// The top-level entries of a raw table (with its length), up to the first malformed one.
pub fn raw_entries(table: &[u8]) -> impl Iterator<Item = RawEntry<'_>> {
    let mut rest = table.get(4..).unwrap_or_default();
    std::iter::from_fn(move || {
        let (&key_len, after) = rest.split_first()?;
        let (key, after) = after.split_at_checked(key_len as usize)?;
        let (&tag, value) = after.split_first()?;
        let width = value_width(tag, value)?;
        let (bytes, tail) = rest.split_at_checked(2 + key.len() + width)?;
        rest = tail;
        Some(RawEntry { key, tag, bytes })
    })
}

/// The elements of a raw array (with its length) as type tag and value, up to the first malformed one.
pub fn raw_elements(array: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    let mut rest = array.get(4..).unwrap_or_default();
    std::iter::from_fn(move || {
        let (&tag, after) = rest.split_first()?;
        let (value, tail) = after.split_at_checked(value_width(tag, after)?)?;
        rest = tail;
        Some((tag, value))
    })
}

/// The first entry of a raw table with the key `name`, which is the one RabbitMQ goes by.
pub fn raw_entry<'a>(table: &'a [u8], name: &[u8]) -> Option<RawEntry<'a>> {
    raw_entries(table).find(|entry| entry.key == name)
}

/// How many bytes the value at the start of `value` has, as its tag and its own length say.
#[inline]
pub(super) fn value_width(tag: u8, value: &[u8]) -> Option<usize> {
    Some(match tag {
        b't' | b'b' | b'B' => 1,
        b's' | b'u' | b'U' => 2,
        b'I' | b'i' | b'f' => 4,
        b'l' | b'L' | b'd' | b'T' => 8,
        b'D' => 5,
        b'V' => 0,
        b'S' | b'x' | b'F' | b'A' => 4 + u32::from_be_bytes(*value.first_chunk::<4>()?) as usize,
        _ => return None,
    })
}

/// The `CC` or `BCC` header of a table, if there.
pub fn header<'a>(table: &'a FieldTable, name: &str) -> Option<&'a AMQPValue> {
    table.inner().get(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use amq_protocol::{
        frame::WriteContext,
        protocol::{BasicProperties, basic::gen_properties},
        types::ShortString,
    };
    use proptest::prelude::*;

    fn encode(properties: &BasicProperties) -> Vec<u8> {
        gen_properties(properties)(WriteContext::from(Vec::new())).unwrap().into_inner().0
    }

    fn table() -> FieldTable {
        let mut table = FieldTable::default();
        table.insert("BCC".into(), AMQPValue::FieldArray(vec![AMQPValue::LongString("b".into())].into()));
        table.insert("a".into(), AMQPValue::LongLongInt(7));
        table
    }

    proptest! {
        #[test]
        fn every_combination_is_read(flags in 0u16..512, mode: u8, priority: u8, text in "[a-z]{0,20}") {
            let mut properties = BasicProperties::default();
            let short = || ShortString::from(text.as_str());
            if flags & 1 != 0 { properties = properties.with_content_type(short()); }
            if flags & 2 != 0 { properties = properties.with_headers(table()); }
            if flags & 4 != 0 { properties = properties.with_delivery_mode(mode); }
            if flags & 8 != 0 { properties = properties.with_priority(priority); }
            if flags & 16 != 0 { properties = properties.with_reply_to(short()); }
            if flags & 32 != 0 { properties = properties.with_expiration(short()).with_timestamp(9); }
            if flags & 64 != 0 { properties = properties.with_user_id(short()).with_cluster_id(short()); }
            if flags & 128 != 0 { properties = properties.with_correlation_id(short()); }
            if flags & 256 != 0 { properties = properties.with_message_id(short()); }
            let raw = encode(&properties);
            let view = Properties::parse(&raw).unwrap();
            prop_assert_eq!(view.is_persistent(), flags & 4 != 0 && mode == 2);
            prop_assert_eq!(view.priority(), (flags & 8 != 0).then_some(priority));
            prop_assert_eq!(view.reply_to(), (flags & 16 != 0).then_some(text.as_bytes()));
            prop_assert_eq!(view.expiration(), (flags & 32 != 0).then_some(text.as_bytes()));
            prop_assert_eq!(view.user_id(), (flags & 64 != 0).then_some(text.as_bytes()));
            prop_assert_eq!(view.timestamp(), (flags & 32 != 0).then_some(9));
            prop_assert_eq!(view.correlation_id(), (flags & 128 != 0).then_some(text.as_bytes()));
            prop_assert_eq!(view.message_id(), (flags & 256 != 0).then_some(text.as_bytes()));
            prop_assert_eq!(view.headers(), (flags & 2 != 0).then(table));
            let other = view.with_reply_to(b"elsewhere");
            let changed = Properties::parse(&other).unwrap();
            prop_assert_eq!(changed.reply_to(), (flags & 16 != 0).then_some(&b"elsewhere"[..]));
            prop_assert_eq!(changed.user_id(), view.user_id());
            let stripped = view.without_header(b"BCC");
            let headers = Properties::parse(&stripped).unwrap().headers();
            prop_assert!(headers.is_none_or(|table| table.inner().len() == 1));
            for cut in 2..raw.len() {
                prop_assert!(Properties::parse(&raw[..cut]).is_err());
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(raw in proptest::collection::vec(any::<u8>(), 0..120)) {
            if let Ok(view) = Properties::parse(&raw) {
                let _ = (view.without_header(b"x"), view.with_reply_to(b"y"), view.with_expiration(b"1"));
            }
            let _ = raw_entries(&raw).count();
        }
    }
}
