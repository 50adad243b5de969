//! A message on its way through the broker: a borrowed view of what a publish carries and what a record decodes to.

use bytes::Bytes;

/// The bytes of a body: next to the rest of the message, or a large one that is shared instead of copied.
#[derive(Clone, Copy, Debug)]
pub enum Body<'a> {
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
