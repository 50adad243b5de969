//! A message on its way through the broker: a borrowed view of what a publish carries and what a record decodes to.

use bytes::Bytes;
use smallvec::SmallVec;

use super::{
    extension::{Extension, ExtensionBytes},
    queue::SHARED_BODY_BYTES,
};
use crate::model::properties::{Properties, raw_elements, raw_entry};

/// The bytes of a body: next to the rest of the message, or a large one that is shared instead of copied.
#[derive(Clone, Copy, Debug)]
pub enum Body<'a> {
    /// In a buffer that the message does not outlive. Queues copy a large one before they keep it.
    Inline(&'a [u8]),
    Shared(&'a Bytes),
}

impl<'a> Body<'a> {
    #[inline]
    pub fn as_slice(&self) -> &'a [u8] {
        match self {
            Body::Inline(bytes) => bytes,
            Body::Shared(bytes) => bytes,
        }
    }

    #[inline]
    pub fn len(&self) -> usize {
        self.as_slice().len()
    }

    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A message. `names` are exchange and routing key as two short strings end to end, `properties` a flag word and its list:
/// both as AMQP writes them, so that they pass through without being taken apart.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    pub names: &'a [u8],
    pub properties: &'a [u8],
    pub body: Body<'a>,
    /// Delivery mode 2.
    pub persistent: bool,
    /// What the broker itself notes of the message, see [`extension`](super::extension); empty for most.
    pub extension: &'a [u8],
}

impl<'a> Message<'a> {
    /// Exchange and routing key.
    #[inline]
    pub fn exchange_and_key(&self) -> (&'a [u8], &'a [u8]) {
        let short = |bytes: &'a [u8]| {
            let (&len, rest) = bytes.split_first()?;
            rest.split_at_checked(len as usize)
        };
        let (exchange, rest) = short(self.names).unwrap_or_default();
        (exchange, short(rest).unwrap_or_default().0)
    }

    /// Whether `other` differs from it in nothing but the bytes of a body that stands beside the rest. Messages of one read
    /// mostly share what is alike, so that it is not compared byte by byte.
    #[inline]
    pub fn is_like(&self, other: &Message<'_>) -> bool {
        let same = |one: &[u8], other: &[u8]| std::ptr::eq(one, other) || one == other;
        let (Body::Inline(body), Body::Inline(others)) = (self.body, other.body) else { return false };
        body.len() == others.len()
            && self.persistent == other.persistent
            && same(self.names, other.names)
            && same(self.properties, other.properties)
            && self.extension.is_empty()
            && other.extension.is_empty()
    }

    /// The body, if it is large enough to be shared and is not.
    #[inline]
    pub fn large_inline_body(&self) -> Option<&'a [u8]> {
        match self.body {
            Body::Inline(body) if body.len() >= SHARED_BODY_BYTES => Some(body),
            _ => None,
        }
    }

    /// Every key the message is routed by: its routing key, those of its `CC` header, and the hidden ones from `BCC`. Behind
    /// a dead-letter routing key there are no others.
    pub fn routing_keys(&self) -> SmallVec<[&'a [u8]; 4]> {
        let mut keys = SmallVec::new();
        keys.push(self.exchange_and_key().1);
        let extension = Extension::parse(self.extension);
        if extension.sole_key {
            return keys;
        }
        let headers = Properties::parse(self.properties).ok().and_then(|view| view.raw_headers());
        if let Some(entry) = headers.and_then(|table| raw_entry(table, b"CC"))
            && entry.tag == b'A'
        {
            keys.extend(raw_elements(entry.value()).filter(|element| element.0 == b'S').map(|element| &element.1[4..]));
        }
        keys.extend(extension.keys());
        keys
    }

    /// The extension as if the message were published now: its own `expiration` begins anew, that of a queue is forgotten.
    pub fn extension_anew(&self, now_unix_ms: u64) -> ExtensionBytes {
        let own = Properties::parse(self.properties).ok().and_then(|view| view.expiration());
        let ttl_ms = own.and_then(|text| std::str::from_utf8(text).ok()?.parse::<u64>().ok());
        let expires_unix_ms = ttl_ms.map(|ttl| now_unix_ms.saturating_add(ttl));
        Extension { expires_unix_ms, ..Extension::parse(self.extension) }.encode()
    }
}

/// The large bodies of messages that stand in a buffer which is not kept, each copied so that whoever keeps it can share it.
#[inline]
pub fn copy_large_bodies(messages: &[Message<'_>]) -> Vec<Bytes> {
    messages.iter().filter_map(Message::large_inline_body).map(Bytes::copy_from_slice).collect()
}

/// The messages with the bodies that [`copy_large_bodies`] has made of theirs.
pub fn with_bodies<'a>(messages: &[Message<'a>], bodies: &'a [Bytes]) -> Vec<Message<'a>> {
    let mut bodies = bodies.iter();
    let mut with_body = |message: &Message<'a>| match message.large_inline_body().and_then(|_| bodies.next()) {
        Some(body) => Message { body: Body::Shared(body), ..*message },
        None => *message,
    };
    messages.iter().map(&mut with_body).collect()
}

/// Writes exchange and routing key as [`Message::names`] holds them; each is cut at 255 bytes.
pub fn encode_names(exchange: &[u8], routing_key: &[u8]) -> Vec<u8> {
    let mut names = Vec::with_capacity(2 + exchange.len() + routing_key.len());
    for name in [exchange, routing_key] {
        let len = name.len().min(255);
        names.push(len as u8);
        names.extend_from_slice(&name[..len]);
    }
    names
}

/// A message that outlives the buffer it came in.
#[derive(Clone, Debug)]
pub struct OwnedMessage {
    pub names: Vec<u8>,
    pub properties: Vec<u8>,
    pub extension: Vec<u8>,
    pub body: Bytes,
    pub persistent: bool,
}

impl From<&Message<'_>> for OwnedMessage {
    fn from(message: &Message<'_>) -> Self {
        OwnedMessage {
            names: message.names.to_vec(),
            properties: message.properties.to_vec(),
            extension: message.extension.to_vec(),
            body: match message.body {
                Body::Inline(body) => Bytes::copy_from_slice(body),
                Body::Shared(body) => body.clone(),
            },
            persistent: message.persistent,
        }
    }
}

impl OwnedMessage {
    /// The message, with its body shared if that is large enough.
    pub fn view(&self) -> Message<'_> {
        let body = match self.body.len() {
            0..SHARED_BODY_BYTES => Body::Inline(&self.body),
            _ => Body::Shared(&self.body),
        };
        Message {
            names: &self.names,
            properties: &self.properties,
            body,
            persistent: self.persistent,
            extension: &self.extension,
        }
    }
}
