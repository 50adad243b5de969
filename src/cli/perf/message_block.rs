//! A publisher's message, encoded once and repeated to fill a block, so that one write sends many.

use super::wire::{self, Arguments, method};

/// Bytes per write: enough that the system call is nothing per message, and still at home in the cache.
const BLOCK_BYTES: usize = 64 << 10;
/// A body from this size on begins with the time at which it was (due to be) sent.
pub(super) const STAMP_BYTES: usize = size_of::<u64>();

/// What is published, over and over.
#[derive(Debug)]
pub(super) struct MessageShape<'a> {
    pub(super) channel: u16,
    pub(super) exchange: &'a str,
    pub(super) routing_key: &'a str,
    pub(super) size_bytes: usize,
    pub(super) persistent: bool,
    pub(super) frame_max: usize,
}

/// Some copies of a message as they go over the wire.
#[derive(Debug)]
pub(super) struct MessageBlock {
    bytes: Vec<u8>,
    message_bytes: usize,
    /// Where in a message the time stamp goes; `None` if the body is too short for one.
    stamp_at: Option<usize>,
}

impl MessageBlock {
    /// Encodes the message as often as a block holds, at least once and at most `max_messages` times.
    pub(super) fn new(shape: &MessageShape<'_>, max_messages: u64) -> Self {
        let mut message = Vec::new();
        let publish = Arguments::new().short(0).short_string(shape.exchange).short_string(shape.routing_key).octet(0);
        wire::append_method(&mut message, shape.channel, method::BASIC_PUBLISH, &publish);
        let body = vec![0; shape.size_bytes];
        let body_at = wire::append_content(&mut message, shape.channel, &body, shape.persistent, shape.frame_max);
        let max_messages = usize::try_from(max_messages).unwrap_or(usize::MAX);
        let copies = (BLOCK_BYTES / message.len()).min(max_messages).max(1);
        Self {
            bytes: message.repeat(copies),
            message_bytes: message.len(),
            stamp_at: (shape.size_bytes >= STAMP_BYTES).then_some(body_at),
        }
    }

    /// How many messages one write can send.
    pub(super) fn capacity(&self) -> u64 {
        self.complete_messages(self.bytes.len())
    }

    /// How many messages are complete in the first `bytes` of the block.
    pub(super) fn complete_messages(&self, bytes: usize) -> u64 {
        u64::try_from(bytes / self.message_bytes).unwrap_or(u64::MAX)
    }

    /// Writes the sending times into the first `count` messages.
    pub(super) fn stamp(&mut self, count: u64, mut sending_ns: impl FnMut(u64) -> u64) {
        let Some(at) = self.stamp_at else { return };
        for (index, message) in (0..count).zip(self.bytes.chunks_exact_mut(self.message_bytes)) {
            if let Some(stamp) = message[at..].first_chunk_mut() {
                *stamp = sending_ns(index).to_le_bytes();
            }
        }
    }

    /// The first `count` messages as they go over the wire; never more than [`Self::capacity`].
    pub(super) fn messages(&self, count: u64) -> &[u8] {
        let bytes = usize::try_from(count).unwrap_or(usize::MAX).saturating_mul(self.message_bytes);
        &self.bytes[..bytes.min(self.bytes.len())]
    }
}

/// The sending time at the front of a body; `None` if it is too short.
pub(super) fn sending_ns(body: &[u8]) -> Option<u64> {
    body.first_chunk().map(|stamp| u64::from_le_bytes(*stamp))
}

#[cfg(test)]
mod tests {
    use super::super::wire::{Frame, FrameReader};
    use super::*;

    fn shape(size_bytes: usize) -> MessageShape<'static> {
        MessageShape { channel: 1, exchange: "", routing_key: "q", size_bytes, persistent: false, frame_max: 4096 }
    }

    /// The bodies' sizes and stamps, as a consumer would find them.
    fn decode(mut bytes: &[u8]) -> Vec<(u64, Option<u64>)> {
        let mut reader = FrameReader::new();
        let mut messages = Vec::new();
        while reader.fill(&mut bytes).expect("slice") > 0 {
            while let Some(frame) = reader.next_frame().expect("valid") {
                match frame {
                    Frame::Header { body_size } => messages.push((body_size, None)),
                    Frame::Body { payload } => {
                        let stamp = &mut messages.last_mut().expect("header first").1;
                        *stamp = stamp.or(sending_ns(payload));
                    }
                    Frame::Method { id, .. } => assert_eq!(id, method::BASIC_PUBLISH),
                    Frame::Heartbeat => panic!("no heartbeat was written"),
                }
            }
        }
        messages
    }

    #[test]
    fn a_block_repeats_the_message_with_a_stamp_in_each() {
        let mut block = MessageBlock::new(&shape(16), u64::MAX);
        let capacity = block.capacity();
        assert!(capacity > 500);
        block.stamp(3, |index| 70 + index);
        let messages = decode(block.messages(capacity));
        assert_eq!(messages.len() as u64, capacity);
        assert_eq!(messages[..4], [(16, Some(70)), (16, Some(71)), (16, Some(72)), (16, Some(0))]);
        assert_eq!(decode(block.messages(2)).len(), 2);
    }

    #[test]
    fn a_large_message_is_alone_in_its_block_and_stamped_in_its_first_frame() {
        let mut block = MessageBlock::new(&shape(100_000), u64::MAX);
        assert_eq!(block.capacity(), 1);
        block.stamp(1, |_| 9);
        assert_eq!(decode(block.messages(1)), [(100_000, Some(9))]);
        assert_eq!(block.complete_messages(100_000), 0);
    }

    #[test]
    fn a_body_too_short_for_a_stamp_has_none() {
        let mut block = MessageBlock::new(&shape(7), 4);
        assert_eq!(block.capacity(), 4);
        block.stamp(4, |_| u64::MAX);
        assert_eq!(decode(block.messages(4)), [(7, None); 4]);
        let mut empty = MessageBlock::new(&shape(0), 1);
        empty.stamp(1, |_| 1);
        assert_eq!(decode(empty.messages(1)), [(0, None)]);
    }
}
