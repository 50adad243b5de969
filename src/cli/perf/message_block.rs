//! A publisher's messages, encoded once and repeated to fill a block, so that one write sends many.
//!
//! Messages that are all the same are always sent from the block's front. A mix (several sizes, random bodies)
//! is a ring: each write goes on where the one before it ended.

use super::options::Sizes;
use super::properties::Properties;
use super::wire::{self, Arguments, method};

/// Bytes per write: enough that the system call is nothing per message, and still at home in the cache.
const BLOCK_BYTES: usize = 64 << 10;
/// What the blocks of all publishers may take together before each gets a smaller one.
const ALL_BLOCKS_BYTES: usize = 4 << 20;
const MIN_BLOCK_BYTES: usize = 4 << 10;
/// A mix is so many writes long, so that a compressor finds no repetition.
const MIX_BLOCKS: usize = 4;
/// A range of sizes is represented by so many of them at most.
const MAX_MIX: usize = 1_024;
/// And by 16 at least, unless they were larger than this together.
const LARGE_MIX_BYTES: usize = 64 << 20;
/// A body from this size on begins with the time at which it was (due to be) sent.
pub(super) const STAMP_BYTES: usize = size_of::<u64>();
const MANDATORY: u8 = 1;

/// What is published, over and over.
#[derive(Debug)]
pub(super) struct MessageShape<'a> {
    pub(super) channel: u16,
    pub(super) exchange: &'a str,
    pub(super) routing_key: &'a str,
    pub(super) sizes: &'a Sizes,
    pub(super) random_body: bool,
    pub(super) properties: &'a Properties,
    pub(super) mandatory: bool,
    pub(super) frame_max: usize,
}

/// How a block is to be filled.
#[derive(Debug, Clone, Copy)]
pub(super) struct Filling {
    pub(super) block_bytes: usize,
    pub(super) max_messages: u64,
    /// Publishers with different seeds send different random bytes.
    pub(super) seed: u64,
}

/// Some messages as they go over the wire.
#[derive(Debug)]
pub(super) struct MessageBlock {
    bytes: Vec<u8>,
    layout: Layout,
}

#[derive(Debug)]
enum Layout {
    /// The same message, repeated.
    Same {
        message_bytes: usize,
        /// Where in a message the time stamp goes; `None` if the body is too short for one.
        stamp_at: Option<usize>,
    },
    Mix(Mix),
}

/// A ring of messages, each of its own length.
#[derive(Debug)]
struct Mix {
    messages: Vec<Placed>,
    /// The message that the next write begins with.
    next: usize,
    /// Bytes and messages per write, at most; but at least one message.
    block_bytes: usize,
    max_messages: usize,
}

/// A message's place in the block.
#[derive(Debug, Clone, Copy)]
struct Placed {
    start: usize,
    end: usize,
    /// Where in the block the time stamp goes.
    stamp_at: Option<usize>,
}

/// Bytes per write of each of `publishers`, so that all blocks together stay small.
pub(super) fn block_bytes(publishers: usize) -> usize {
    (ALL_BLOCKS_BYTES / publishers.max(1)).clamp(MIN_BLOCK_BYTES, BLOCK_BYTES)
}

impl MessageBlock {
    /// Encodes as many messages as a block holds, at least one.
    pub(super) fn new(shape: &MessageShape<'_>, filling: Filling) -> Self {
        let max_messages = usize::try_from(filling.max_messages).unwrap_or(usize::MAX);
        match shape.sizes {
            Sizes::Each(size) if !shape.random_body => Self::same(shape, *size, filling.block_bytes, max_messages),
            sizes => Self::mix(shape, sizes, filling, max_messages),
        }
    }

    fn same(shape: &MessageShape<'_>, size: usize, block_bytes: usize, max_messages: usize) -> Self {
        let mut message = Vec::new();
        let body_at = append_message(&mut message, shape, &vec![0; size]);
        let copies = (block_bytes / message.len()).min(max_messages).max(1);
        Self {
            bytes: message.repeat(copies),
            layout: Layout::Same { message_bytes: message.len(), stamp_at: (size >= STAMP_BYTES).then_some(body_at) },
        }
    }

    fn mix(shape: &MessageShape<'_>, sizes: &Sizes, filling: Filling, max_messages: usize) -> Self {
        let mut random = Random(filling.seed);
        let mut bytes = Vec::new();
        let mut messages = Vec::new();
        for size in mixed_sizes(sizes, filling.block_bytes * MIX_BLOCKS, &mut random) {
            let mut body = vec![0; size];
            if shape.random_body {
                random.fill(&mut body);
            }
            let start = bytes.len();
            let body_at = append_message(&mut bytes, shape, &body);
            messages.push(Placed { start, end: bytes.len(), stamp_at: (size >= STAMP_BYTES).then_some(body_at) });
        }
        let mix = Mix { messages, next: 0, block_bytes: filling.block_bytes, max_messages };
        Self { bytes, layout: Layout::Mix(mix) }
    }

    /// How many messages the next write can send.
    pub(super) fn capacity(&self) -> u64 {
        match &self.layout {
            Layout::Same { message_bytes, .. } => (self.bytes.len() / message_bytes) as u64,
            Layout::Mix(mix) => mix.capacity() as u64,
        }
    }

    /// How many messages are complete in the first `bytes` of the next write.
    pub(super) fn complete_messages(&self, bytes: usize) -> u64 {
        match &self.layout {
            Layout::Same { message_bytes, .. } => (bytes / message_bytes) as u64,
            Layout::Mix(mix) => mix.complete_messages(bytes) as u64,
        }
    }

    /// Writes the sending times into the next `count` messages.
    pub(super) fn stamp(&mut self, count: u64, mut sending_ns: impl FnMut(u64) -> u64) {
        match &self.layout {
            Layout::Same { message_bytes, stamp_at } => {
                let Some(at) = *stamp_at else { return };
                for (index, message) in (0..count).zip(self.bytes.chunks_exact_mut(*message_bytes)) {
                    if let Some(stamp) = message[at..].first_chunk_mut() {
                        *stamp = sending_ns(index).to_le_bytes();
                    }
                }
            }
            Layout::Mix(mix) => {
                for (index, placed) in (0..count).zip(&mix.messages[mix.next..]) {
                    if let Some(stamp) = placed.stamp_at.and_then(|at| self.bytes[at..].first_chunk_mut()) {
                        *stamp = sending_ns(index).to_le_bytes();
                    }
                }
            }
        }
    }

    /// The next `count` messages as they go over the wire; never more than [`Self::capacity`].
    pub(super) fn messages(&self, count: u64) -> &[u8] {
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        match &self.layout {
            Layout::Same { message_bytes, .. } => {
                &self.bytes[..count.saturating_mul(*message_bytes).min(self.bytes.len())]
            }
            Layout::Mix(mix) => &self.bytes[mix.range(count)],
        }
    }

    /// Says that `count` messages were sent.
    pub(super) fn advance(&mut self, count: u64) {
        if let Layout::Mix(mix) = &mut self.layout {
            let count = usize::try_from(count).unwrap_or(usize::MAX);
            mix.next = mix.next.saturating_add(count) % mix.messages.len().max(1);
        }
    }
}

impl Mix {
    fn start(&self) -> usize {
        self.messages.get(self.next).map_or(0, |placed| placed.start)
    }

    fn complete_messages(&self, bytes: usize) -> usize {
        let end = self.start().saturating_add(bytes);
        self.messages[self.next..].partition_point(|placed| placed.end <= end)
    }

    fn capacity(&self) -> usize {
        self.complete_messages(self.block_bytes).min(self.max_messages).max(1)
    }

    fn range(&self, count: usize) -> std::ops::Range<usize> {
        let rest = &self.messages[self.next..];
        let last = rest[..count.min(rest.len())].last();
        self.start()..last.map_or(self.start(), |placed| placed.end)
    }
}

/// Appends one whole message; returns where its body begins.
fn append_message(out: &mut Vec<u8>, shape: &MessageShape<'_>, body: &[u8]) -> usize {
    let flags = if shape.mandatory { MANDATORY } else { 0 };
    let publish = Arguments::new().short(0).short_string(shape.exchange).short_string(shape.routing_key).octet(flags);
    wire::append_method(out, shape.channel, method::BASIC_PUBLISH, &publish);
    wire::append_content_with(out, shape.channel, body, shape.properties, shape.frame_max)
}

/// The sizes of a ring of about `ring_bytes`: whole rounds of a list, or a range evenly and in random order.
fn mixed_sizes(sizes: &Sizes, ring_bytes: usize, random: &mut Random) -> Vec<usize> {
    match sizes {
        Sizes::Each(size) => vec![*size; (ring_bytes / size.max(&1)).clamp(1, MAX_MIX)],
        Sizes::InTurn(sizes) => {
            let round_bytes = sizes.iter().sum::<usize>().max(1);
            sizes.repeat((ring_bytes / round_bytes).clamp(1, MAX_MIX.div_ceil(sizes.len())))
        }
        Sizes::Between(least, most) => {
            let mean = (least + most).div_ceil(2).max(1);
            let few = (LARGE_MIX_BYTES / mean).clamp(2, 16);
            let count = (ring_bytes / mean).clamp(few, MAX_MIX);
            let mut chosen: Vec<_> = (0..count).map(|index| least + (most - least) * index / (count - 1)).collect();
            random.shuffle(&mut chosen);
            chosen
        }
    }
}

/// SplitMix64: fast, and random enough for bodies and orders.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(size_of::<u64>()) {
            let random = self.next().to_le_bytes();
            chunk.copy_from_slice(&random[..chunk.len()]);
        }
    }

    fn shuffle(&mut self, items: &mut [usize]) {
        for last in (1..items.len()).rev() {
            let other = usize::try_from(self.next() % (last as u64 + 1)).unwrap_or(0);
            items.swap(last, other);
        }
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

    fn block(sizes: &str, random_body: bool, max_messages: u64) -> MessageBlock {
        let shape = MessageShape {
            channel: 1,
            exchange: "",
            routing_key: "q",
            sizes: &Sizes::parse(sizes).expect(sizes),
            random_body,
            properties: &Properties::new(false, &[], &[]),
            mandatory: false,
            frame_max: 4096,
        };
        MessageBlock::new(&shape, Filling { block_bytes: BLOCK_BYTES, max_messages, seed: 1 })
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

    /// What `writes` writes of at most `count` messages send.
    fn sent(block: &mut MessageBlock, writes: usize, count: u64) -> Vec<(u64, Option<u64>)> {
        let mut messages = Vec::new();
        for write in 0..writes as u64 {
            let count = block.capacity().min(count);
            block.stamp(count, |index| 1_000 * write + index);
            let bytes = block.messages(count);
            assert_eq!(block.complete_messages(bytes.len()), count);
            assert_eq!(block.complete_messages(bytes.len() - 1), count - 1);
            messages.extend(decode(bytes));
            block.advance(count);
        }
        messages
    }

    #[test]
    fn a_block_repeats_the_message_with_a_stamp_in_each() {
        let mut block = block("16", false, u64::MAX);
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
        let mut block = block("100000", false, u64::MAX);
        assert_eq!(block.capacity(), 1);
        block.stamp(1, |_| 9);
        assert_eq!(decode(block.messages(1)), [(100_000, Some(9))]);
        assert_eq!(block.complete_messages(100_000), 0);
    }

    #[test]
    fn a_body_too_short_for_a_stamp_has_none() {
        let mut short = block("7", false, 4);
        assert_eq!(short.capacity(), 4);
        short.stamp(4, |_| u64::MAX);
        assert_eq!(decode(short.messages(4)), [(7, None); 4]);
        let mut empty = block("0", false, 1);
        empty.stamp(1, |_| 1);
        assert_eq!(decode(empty.messages(1)), [(0, None)]);
    }

    #[test]
    fn several_sizes_take_turns_however_few_go_in_a_write() {
        let mut block = block("16,1024,4", false, u64::MAX);
        let messages = sent(&mut block, 4, 1);
        assert_eq!(messages, [(16, Some(0)), (1024, Some(1_000)), (4, None), (16, Some(3_000))]);
        let many = sent(&mut block, 50, u64::MAX);
        assert!(many.iter().zip([1024, 4, 16].iter().cycle()).all(|((size, _), expected)| size == expected));
    }

    #[test]
    fn a_range_is_covered_evenly_from_end_to_end() {
        let mut block = block("100-5000", false, u64::MAX);
        let ring = match &block.layout {
            Layout::Mix(mix) => mix.messages.len(),
            Layout::Same { .. } => panic!("a mix"),
        };
        let messages = sent(&mut block, ring, 1);
        let sizes = || messages.iter().map(|(size, _)| *size);
        assert_eq!((sizes().min(), sizes().max()), (Some(100), Some(5_000)));
        assert!((sizes().sum::<u64>() / ring as u64).abs_diff(2_550) < 30);
        assert!(!sizes().is_sorted());
    }

    #[test]
    fn a_write_of_a_mix_is_no_longer_than_a_block_and_never_empty() {
        let mut small = block("100-5000", false, u64::MAX);
        for _ in 0..100 {
            let count = small.capacity();
            assert!((1..=BLOCK_BYTES).contains(&small.messages(count).len()));
            small.advance(count);
        }
        let mut large = block("16,300000", false, u64::MAX);
        assert_eq!([(); 3].map(|()| sent(&mut large, 1, u64::MAX)[0].0), [16, 300_000, 16]);
        assert_eq!(block("16,32", false, 3).capacity(), 3);
    }

    #[test]
    fn random_bodies_differ_from_each_other() {
        let mut random = block("64", true, u64::MAX);
        let bytes = random.messages(2).to_vec();
        let (one, other) = bytes.split_at(bytes.len() / 2);
        assert_eq!(one.len(), other.len());
        assert_ne!(one, other);
        assert_eq!(sent(&mut random, 3, 2).len(), 6);
    }

    #[test]
    fn blocks_of_many_publishers_are_smaller() {
        assert_eq!([1, 64, 256, 1_000_000].map(block_bytes), [65_536, 65_536, 16_384, 4_096]);
    }
}
