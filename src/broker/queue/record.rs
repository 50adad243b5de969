//! A message as a queue's log keeps it, in memory and on disk.
//!
//! Layout, little-endian: `flags:u8 properties_len:u24 body_len:u32 published:u40 [extension_len:u16 extension] names properties
//! body`. `published` is in milliseconds since [`EPOCH_UNIX_MS`]; the extension is there if the flags say so; `names` are two
//! short strings, so they tell their own length. The body of a [`SHARED`] record stands beside the chunk in memory; the store
//! is given every record whole, or in two parts that are whole when they are put together.

use bytes::Bytes;

use crate::broker::{
    extension::{self, EPOCH_UNIX_MS},
    message::{Body, Message},
};

/// Bodies from this size on are shared, not copied.
pub const SHARED_BODY_BYTES: usize = 16 << 10;

const HEAD_BYTES: usize = 13;
const PERSISTENT: u8 = 1;
const SHARED: u8 = 2;
const EXTENDED: u8 = 4;

/// The fixed part of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHead {
    pub persistent: bool,
    shared: bool,
    extended: bool,
    properties_len: usize,
    pub body_len: usize,
    pub published_unix_ms: u64,
}

/// Appends `message` to `out`; a shared body is left out and has to be kept by the caller. Always inlined: the log's append,
/// its hottest caller, is measurably slower otherwise.
#[inline(always)]
pub fn encode(out: &mut Vec<u8>, message: &Message<'_>, now_unix_ms: u64) {
    let shared = matches!(message.body, Body::Shared(_));
    let extension = if message.extension.len() <= extension::MAX_BYTES { message.extension } else { &[] };
    let flags = (u8::from(message.persistent) * PERSISTENT)
        | (u8::from(shared) * SHARED)
        | (u8::from(!extension.is_empty()) * EXTENDED);
    let mut head = [0; HEAD_BYTES];
    head[0..4].copy_from_slice(&((message.properties.len() as u32) << 8 | u32::from(flags)).to_le_bytes());
    head[4..8].copy_from_slice(&(message.body.len() as u32).to_le_bytes());
    head[8..13].copy_from_slice(&now_unix_ms.saturating_sub(EPOCH_UNIX_MS).to_le_bytes()[..5]);
    out.extend_from_slice(&head);
    if !extension.is_empty() {
        out.extend_from_slice(&(extension.len() as u16).to_le_bytes());
        out.extend_from_slice(extension);
    }
    out.extend_from_slice(message.names);
    out.extend_from_slice(message.properties);
    if let Body::Inline(body) = message.body {
        out.extend_from_slice(body);
    }
}

/// Appends `message`, which [is like](Message::is_like) the one whose record begins at `like`; both are made in the same
/// millisecond.
#[inline(always)]
pub fn encode_like(out: &mut Vec<u8>, like: usize, message: &Message<'_>) {
    let body = message.body.as_slice();
    out.extend_from_within(like..like + encoded_len(message) - body.len());
    out.extend_from_slice(body);
}

/// Bytes [`encode`] appends.
#[inline]
pub fn encoded_len(message: &Message<'_>) -> usize {
    let inline = match message.body {
        Body::Inline(body) => body.len(),
        Body::Shared(_) => 0,
    };
    let extension = if message.extension.is_empty() { 0 } else { 2 + message.extension.len() };
    HEAD_BYTES + extension + message.names.len() + message.properties.len() + inline
}

/// Bytes a message takes in the store, beside what the store adds.
#[inline]
pub fn stored_len(message: &Message<'_>) -> usize {
    match message.body {
        Body::Inline(_) => encoded_len(message),
        Body::Shared(body) => encoded_len(message) + body.len(),
    }
}

/// Reads the fixed part.
#[inline]
pub fn head(record: &[u8]) -> Option<RecordHead> {
    let head = record.first_chunk::<HEAD_BYTES>()?;
    let word = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
    let since = u64::from_le_bytes([head[8], head[9], head[10], head[11], head[12], 0, 0, 0]);
    Some(RecordHead {
        persistent: word as u8 & PERSISTENT != 0,
        shared: word as u8 & SHARED != 0,
        extended: word as u8 & EXTENDED != 0,
        properties_len: (word >> 8) as usize,
        body_len: u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize,
        published_unix_ms: EPOCH_UNIX_MS + since,
    })
}

/// Reads a record. `shared` is the body kept beside it, if there is one.
///
/// `None` when the bytes are not a whole record: never for one that [`encode`] wrote.
#[inline]
pub fn decode<'a>(record: &'a [u8], shared: Option<&'a Bytes>) -> Option<Message<'a>> {
    let head = head(record)?;
    let mut rest = record.get(HEAD_BYTES..)?;
    let mut extension: &[u8] = &[];
    if head.extended {
        let (len, after) = rest.split_first_chunk::<2>()?;
        (extension, rest) = after.split_at_checked(u16::from_le_bytes(*len) as usize)?;
    }
    let exchange_len = 1 + *rest.first()? as usize;
    let names_len = exchange_len + 1 + *rest.get(exchange_len)? as usize;
    let (names, rest) = rest.split_at_checked(names_len)?;
    let (properties, rest) = rest.split_at_checked(head.properties_len)?;
    let body = match shared {
        Some(bytes) if head.shared => Body::Shared(bytes),
        _ => Body::Inline(rest.get(..head.body_len)?),
    };
    Some(Message { names, properties, body, persistent: head.persistent, extension })
}

/// [`decode`] of a record that differs from `before` in nothing but the time and the bytes of its body; `message` is what that
/// one was read as, with the body inside. `None` when it differs in more.
#[inline]
pub fn decode_like<'a>(record: &'a [u8], before: &[u8], message: &Message<'a>) -> Option<Message<'a>> {
    let body_at = record.len().checked_sub(message.body.len())?;
    let is_like = record.len() == before.len()
        && message.extension.is_empty()
        && record.first_chunk::<8>()? == before.first_chunk::<8>()?
        && record.get(HEAD_BYTES..body_at)? == before.get(HEAD_BYTES..body_at)?;
    is_like.then(|| Message { body: Body::Inline(&record[body_at..]), ..*message })
}

/// The record with its body inside, as the store keeps it.
pub fn whole(record: &[u8], shared: &Bytes, out: &mut Vec<u8>) {
    out.clear();
    out.extend_from_slice(record);
    out[0] &= !SHARED;
    out.extend_from_slice(shared);
}

/// What stands before the body in a whole record; `record` is the one whose body is beside it.
pub fn before_body(record: &[u8], out: &mut Vec<u8>) {
    out.clear();
    out.extend_from_slice(record);
    if let Some(flags) = out.first_mut() {
        *flags &= !SHARED;
    }
}

/// The inverse of [`before_body`].
pub fn without_body(before_body: &[u8]) -> Vec<u8> {
    let mut kept = before_body.to_vec();
    if let Some(flags) = kept.first_mut() {
        *flags |= SHARED;
    }
    kept
}

/// Takes the body out of a whole record read from the store when it is large enough to be shared.
pub fn share_body(record: &[u8]) -> Option<(Vec<u8>, Bytes)> {
    let body_len = head(record)?.body_len;
    if body_len < SHARED_BODY_BYTES || record.len() < body_len {
        return None;
    }
    let (kept, body) = record.split_at(record.len() - body_len);
    let mut kept = kept.to_vec();
    *kept.first_mut()? |= SHARED;
    Some((kept, Bytes::copy_from_slice(body)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::message::encode_names;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn records_survive_the_round_trip(exchange in "[a-z]{0,20}", key in "[a-z]{0,20}", properties in proptest::collection::vec(any::<u8>(), 2..40), body in proptest::collection::vec(any::<u8>(), 0..200), persistent: bool, shared: bool, extension in proptest::collection::vec(any::<u8>(), 0..12)) {
            let names = encode_names(exchange.as_bytes(), key.as_bytes());
            let bytes = Bytes::from(body.clone());
            let message = Message { names: &names, properties: &properties, persistent, extension: &extension,
                body: if shared { Body::Shared(&bytes) } else { Body::Inline(&body) } };
            let mut record = Vec::new();
            encode(&mut record, &message, EPOCH_UNIX_MS + 123_456);
            prop_assert_eq!(record.len(), encoded_len(&message));
            prop_assert_eq!(head(&record).unwrap().published_unix_ms, EPOCH_UNIX_MS + 123_456);
            let mut on_disk = record.clone();
            if shared {
                whole(&record, &bytes, &mut on_disk);
                let mut head = Vec::new();
                before_body(&record, &mut head);
                prop_assert_eq!(&[&head[..], &body[..]].concat(), &on_disk);
                prop_assert_eq!(&without_body(&head), &record);
            }
            for (record, beside) in [(&record, shared.then_some(&bytes)), (&on_disk, None)] {
                let read = decode(record, beside).unwrap();
                prop_assert_eq!((read.names, read.properties, read.body.as_slice(), read.persistent, read.extension), (&names[..], &properties[..], &body[..], persistent, &extension[..]));
            }
            for cut in 0..on_disk.len() {
                prop_assert!(decode(&on_disk[..cut], None).is_none());
            }
        }
    }
}
