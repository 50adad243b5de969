//! As much of AMQP 0-9-1 as a load generator needs: writing its own frames, reading the broker's.
//!
//! Reading is done in large blocks: [`FrameReader::fill`] takes what the socket has, and
//! [`FrameReader::next_frame`] walks over it without copying. No length that the broker sends costs memory:
//! a frame longer than the buffer is an error.

use std::io::{self, Read};

use super::properties::Properties;

/// Class and method id.
pub(super) type MethodId = (u16, u16);

/// The methods that the generator sends or understands.
pub(super) mod method {
    use super::MethodId;

    pub const CONNECTION_START: MethodId = (10, 10);
    pub const CONNECTION_START_OK: MethodId = (10, 11);
    pub const CONNECTION_SECURE: MethodId = (10, 20);
    pub const CONNECTION_TUNE: MethodId = (10, 30);
    pub const CONNECTION_TUNE_OK: MethodId = (10, 31);
    pub const CONNECTION_OPEN: MethodId = (10, 40);
    pub const CONNECTION_OPEN_OK: MethodId = (10, 41);
    pub const CONNECTION_CLOSE: MethodId = (10, 50);
    pub const CONNECTION_CLOSE_OK: MethodId = (10, 51);
    pub const CONNECTION_BLOCKED: MethodId = (10, 60);
    pub const CONNECTION_UNBLOCKED: MethodId = (10, 61);
    pub const CHANNEL_OPEN: MethodId = (20, 10);
    pub const CHANNEL_OPEN_OK: MethodId = (20, 11);
    pub const CHANNEL_FLOW: MethodId = (20, 20);
    pub const CHANNEL_FLOW_OK: MethodId = (20, 21);
    pub const CHANNEL_CLOSE: MethodId = (20, 40);
    pub const CHANNEL_CLOSE_OK: MethodId = (20, 41);
    pub const EXCHANGE_DECLARE: MethodId = (40, 10);
    pub const EXCHANGE_DECLARE_OK: MethodId = (40, 11);
    pub const EXCHANGE_DELETE: MethodId = (40, 20);
    pub const EXCHANGE_DELETE_OK: MethodId = (40, 21);
    pub const QUEUE_DECLARE: MethodId = (50, 10);
    pub const QUEUE_DECLARE_OK: MethodId = (50, 11);
    pub const QUEUE_BIND: MethodId = (50, 20);
    pub const QUEUE_BIND_OK: MethodId = (50, 21);
    pub const QUEUE_DELETE: MethodId = (50, 40);
    pub const QUEUE_DELETE_OK: MethodId = (50, 41);
    pub const QUEUE_UNBIND: MethodId = (50, 50);
    pub const QUEUE_UNBIND_OK: MethodId = (50, 51);
    pub const BASIC_QOS: MethodId = (60, 10);
    pub const BASIC_QOS_OK: MethodId = (60, 11);
    pub const BASIC_CONSUME: MethodId = (60, 20);
    pub const BASIC_CONSUME_OK: MethodId = (60, 21);
    pub const BASIC_CANCEL: MethodId = (60, 30);
    pub const BASIC_CANCEL_OK: MethodId = (60, 31);
    pub const BASIC_PUBLISH: MethodId = (60, 40);
    pub const BASIC_RETURN: MethodId = (60, 50);
    pub const BASIC_DELIVER: MethodId = (60, 60);
    pub const BASIC_GET: MethodId = (60, 70);
    pub const BASIC_GET_OK: MethodId = (60, 71);
    pub const BASIC_GET_EMPTY: MethodId = (60, 72);
    pub const BASIC_ACK: MethodId = (60, 80);
    pub const BASIC_NACK: MethodId = (60, 120);
    pub const CONFIRM_SELECT: MethodId = (85, 10);
    pub const CONFIRM_SELECT_OK: MethodId = (85, 11);
    pub const TX_SELECT: MethodId = (90, 10);
    pub const TX_SELECT_OK: MethodId = (90, 11);
    pub const TX_COMMIT: MethodId = (90, 20);
    pub const TX_COMMIT_OK: MethodId = (90, 21);
}

/// What a client says first.
pub(super) const PROTOCOL_HEADER: [u8; 8] = *b"AMQP\0\0\x09\x01";
/// Frame bytes around a payload: type, channel, length, end.
pub(super) const FRAME_OVERHEAD_BYTES: usize = 8;
/// The largest frame that the generator sends or accepts.
pub(super) const MAX_FRAME_BYTES: usize = 128 << 10;

const FRAME_HEADER_BYTES: usize = 7;
const FRAME_END: u8 = 0xCE;
const KIND_METHOD: u8 = 1;
const KIND_HEADER: u8 = 2;
const KIND_BODY: u8 = 3;
const KIND_HEARTBEAT: u8 = 8;
const CLASS_BASIC: u16 = 60;
/// Read buffer: a read never starts with room for less than one of the largest frames.
const BUFFER_BYTES: usize = 4 * MAX_FRAME_BYTES;
/// An unread rest of up to this size is moved to the front, which keeps the hot part of the buffer small.
const CHEAP_MOVE_BYTES: usize = 4 << 10;

/// Bytes from the broker that are not frames of this protocol.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// It answered with a protocol header.
    #[error("it does not speak AMQP 0-9-1 but version {0:?}")]
    Version([u8; 4]),
    /// A frame of an unknown type.
    #[error("frame type {0}")]
    FrameType(u8),
    /// A frame whose last byte is not the end mark.
    #[error("a frame does not end with 0xCE")]
    FrameEnd,
    /// A frame longer than was agreed.
    #[error("a frame of {0} bytes")]
    TooLarge(usize),
    /// A method or header that ends too early.
    #[error("a truncated {0}")]
    Truncated(&'static str),
    /// A frame that has no place here.
    #[error("unexpected {0}")]
    Unexpected(&'static str),
}

/// Arguments of a method, written in order.
#[derive(Debug, Default)]
pub(super) struct Arguments(Vec<u8>);

impl Arguments {
    pub(super) fn new() -> Self {
        Self::default()
    }

    pub(super) fn octet(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    pub(super) fn short(mut self, value: u16) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    pub(super) fn long(mut self, value: u32) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    pub(super) fn long_long(mut self, value: u64) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    /// A short string; the options allow no longer one, and what is too long is cut.
    pub(super) fn short_string(mut self, text: &str) -> Self {
        let text = &text.as_bytes()[..text.len().min(usize::from(u8::MAX))];
        self.0.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
        self.0.extend(text);
        self
    }

    pub(super) fn long_string(self, bytes: &[u8]) -> Self {
        let mut written = self.long(length(bytes.len()));
        written.0.extend(bytes);
        written
    }

    /// An empty table.
    pub(super) fn empty_table(self) -> Self {
        self.long(0)
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

fn append_frame(out: &mut Vec<u8>, kind: u8, channel: u16, payload: &[&[u8]]) {
    out.push(kind);
    out.extend(channel.to_be_bytes());
    out.extend(length(payload.iter().map(|part| part.len()).sum()).to_be_bytes());
    payload.iter().for_each(|part| out.extend_from_slice(part));
    out.push(FRAME_END);
}

/// Appends one method frame.
pub(super) fn append_method(out: &mut Vec<u8>, channel: u16, id: MethodId, arguments: &Arguments) {
    append_frame(out, KIND_METHOD, channel, &[&id.0.to_be_bytes(), &id.1.to_be_bytes(), &arguments.0]);
}

/// Appends a `basic.ack`. Hot path: constant size, no temporary.
pub(super) fn append_ack(out: &mut Vec<u8>, channel: u16, delivery_tag: u64, multiple: bool) {
    let mut frame = [0, 0, 0, 0, 0, 0, 13, 0, 60, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0, FRAME_END];
    frame[0] = KIND_METHOD;
    frame[1..3].copy_from_slice(&channel.to_be_bytes());
    frame[11..19].copy_from_slice(&delivery_tag.to_be_bytes());
    frame[19] = u8::from(multiple);
    out.extend_from_slice(&frame);
}

/// Appends a `basic.nack` of one delivery.
pub(super) fn append_nack(out: &mut Vec<u8>, channel: u16, delivery_tag: u64, requeue: bool) {
    const REQUEUE: u8 = 1 << 1;
    let arguments = Arguments::new().long_long(delivery_tag).octet(if requeue { REQUEUE } else { 0 });
    append_method(out, channel, method::BASIC_NACK, &arguments);
}

/// Appends a content header and the body frames; returns where in `out` the body's first byte is.
///
/// A body that fits one frame of `frame_max` has one, an empty one has none.
pub(super) fn append_content_with(
    out: &mut Vec<u8>,
    channel: u16,
    body: &[u8],
    properties: &Properties,
    frame_max: usize,
) -> usize {
    let body_size = u64::try_from(body.len()).unwrap_or(u64::MAX);
    append_frame(
        out,
        KIND_HEADER,
        channel,
        &[&CLASS_BASIC.to_be_bytes(), &[0, 0], &body_size.to_be_bytes(), properties.as_bytes()],
    );
    let body_start = out.len() + FRAME_HEADER_BYTES;
    for part in body.chunks(frame_max.saturating_sub(FRAME_OVERHEAD_BYTES).max(1)) {
        append_frame(out, KIND_BODY, channel, &[part]);
    }
    body_start
}

/// The same for a message with no other property than its delivery mode.
#[cfg(test)]
pub(super) fn append_content(
    out: &mut Vec<u8>,
    channel: u16,
    body: &[u8],
    persistent: bool,
    frame_max: usize,
) -> usize {
    append_content_with(out, channel, body, &Properties::new(persistent, &[], &[]), frame_max)
}

/// Reads the arguments of a method in order.
#[derive(Debug, Clone, Copy)]
pub(super) struct ArgumentReader<'a>(&'a [u8]);

impl<'a> ArgumentReader<'a> {
    pub(super) fn new(arguments: &'a [u8]) -> Self {
        Self(arguments)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (taken, rest) = self.0.split_first_chunk::<N>().ok_or(WireError::Truncated("method"))?;
        self.0 = rest;
        Ok(*taken)
    }

    pub(super) fn octet(&mut self) -> Result<u8, WireError> {
        self.take::<1>().map(|[byte]| byte)
    }

    pub(super) fn short(&mut self) -> Result<u16, WireError> {
        self.take().map(u16::from_be_bytes)
    }

    pub(super) fn long(&mut self) -> Result<u32, WireError> {
        self.take().map(u32::from_be_bytes)
    }

    pub(super) fn long_long(&mut self) -> Result<u64, WireError> {
        self.take().map(u64::from_be_bytes)
    }

    pub(super) fn short_string(&mut self) -> Result<&'a [u8], WireError> {
        let length = usize::from(self.octet()?);
        let (text, rest) = self.0.split_at_checked(length).ok_or(WireError::Truncated("method"))?;
        self.0 = rest;
        Ok(text)
    }
}

/// A frame of the broker, as it stands in the read buffer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Frame<'a> {
    Method { channel: u16, id: MethodId, arguments: &'a [u8] },
    Header { body_size: u64 },
    Body { payload: &'a [u8] },
    Heartbeat,
}

/// The read side of a connection: a buffer of bytes, walked frame by frame.
#[derive(Debug)]
pub(super) struct FrameReader {
    buffer: Vec<u8>,
    /// Unread bytes are `buffer[start..end]`.
    start: usize,
    end: usize,
}

impl FrameReader {
    pub(super) fn new() -> Self {
        // Zeroed by the allocator: pages that no read reaches are never touched.
        Self { buffer: vec![0; BUFFER_BYTES], start: 0, end: 0 }
    }

    /// Forgets what is unread, so that another connection can use the buffer.
    pub(super) fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }

    /// Reads once, as much as `source` has and the buffer holds. 0 is the end of the stream.
    ///
    /// There is always room, provided the frames read so far have been walked over.
    pub(super) fn fill(&mut self, source: &mut impl Read) -> io::Result<usize> {
        let unread = self.end - self.start;
        if unread <= CHEAP_MOVE_BYTES || self.buffer.len() - self.end < MAX_FRAME_BYTES {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, unread);
        }
        let read = source.read(&mut self.buffer[self.end..])?;
        self.end += read;
        Ok(read)
    }

    /// The next frame that is complete in the buffer; `None` until more was read.
    ///
    /// # Errors
    /// [`WireError`] for anything that is no frame; the stream is then useless.
    // Left to itself the compiler inlines it or not as the number of callers changes, at half a consumer's cost.
    #[inline(always)]
    pub(super) fn next_frame(&mut self) -> Result<Option<Frame<'_>>, WireError> {
        let unread = &self.buffer[self.start..self.end];
        let Some((&[kind, c1, c2, l1, l2, l3, l4], rest)) = unread.split_first_chunk::<FRAME_HEADER_BYTES>() else {
            return Ok(None);
        };
        let payload_bytes = u32::from_be_bytes([l1, l2, l3, l4]) as usize;
        let Some((payload, [end, ..])) = rest.split_at_checked(payload_bytes) else {
            return check_incomplete(unread, payload_bytes).map(|()| None);
        };
        if *end != FRAME_END {
            return Err(WireError::FrameEnd);
        }
        self.start += payload_bytes + FRAME_OVERHEAD_BYTES;
        match kind {
            KIND_METHOD => match payload {
                [a, b, c, d, arguments @ ..] => Ok(Some(Frame::Method {
                    channel: u16::from_be_bytes([c1, c2]),
                    id: (u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d])),
                    arguments,
                })),
                _ => Err(WireError::Truncated("method")),
            },
            KIND_HEADER => match payload.get(4..12).and_then(<[u8]>::first_chunk) {
                Some(body_size) => Ok(Some(Frame::Header { body_size: u64::from_be_bytes(*body_size) })),
                None => Err(WireError::Truncated("content header")),
            },
            KIND_BODY => Ok(Some(Frame::Body { payload })),
            KIND_HEARTBEAT => Ok(Some(Frame::Heartbeat)),
            _ => Err(WireError::FrameType(kind)),
        }
    }
}

/// Tells a frame that is still arriving from one that never can.
#[cold]
fn check_incomplete(unread: &[u8], payload_bytes: usize) -> Result<(), WireError> {
    if let [b'A', b'M', b'Q', b'P', version @ ..] = unread {
        return match version.first_chunk() {
            Some(version) => Err(WireError::Version(*version)),
            None => Ok(()),
        };
    }
    match unread.first() {
        Some(&(KIND_METHOD | KIND_HEADER | KIND_BODY | KIND_HEARTBEAT)) | None => {}
        Some(&kind) => return Err(WireError::FrameType(kind)),
    }
    let frame_bytes = payload_bytes + FRAME_OVERHEAD_BYTES;
    if frame_bytes > MAX_FRAME_BYTES {
        return Err(WireError::TooLarge(frame_bytes));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHANNEL: u16 = 0x0102;

    /// A source that hands out `step` bytes at a time.
    struct Trickle<'a> {
        bytes: &'a [u8],
        step: usize,
    }

    impl Read for Trickle<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            let count = self.step.min(self.bytes.len()).min(into.len());
            let (now, later) = self.bytes.split_at(count);
            into[..count].copy_from_slice(now);
            self.bytes = later;
            Ok(count)
        }
    }

    /// Every frame of `bytes`, read `step` bytes at a time, in short form.
    fn walk(bytes: &[u8], step: usize) -> Result<Vec<String>, WireError> {
        let mut reader = FrameReader::new();
        let mut source = Trickle { bytes, step };
        let mut seen = Vec::new();
        while reader.fill(&mut source).expect("no errors from a slice") > 0 {
            while let Some(frame) = reader.next_frame()? {
                seen.push(match frame {
                    Frame::Method { channel, id, arguments } => format!("{channel} {id:?} {arguments:?}"),
                    Frame::Header { body_size } => format!("header {body_size}"),
                    Frame::Body { payload } => format!("body {} {:?}", payload.len(), payload.first()),
                    Frame::Heartbeat => "heartbeat".to_owned(),
                });
            }
        }
        Ok(seen)
    }

    fn sample_stream() -> Vec<u8> {
        let mut bytes = Vec::new();
        let arguments = Arguments::new().short(7).short_string("key").octet(1).long(9).long_string(b"xy");
        append_method(&mut bytes, CHANNEL, method::BASIC_PUBLISH, &arguments);
        append_content(&mut bytes, CHANNEL, &[5; 300], true, 108);
        append_frame(&mut bytes, KIND_HEARTBEAT, 0, &[]);
        append_content(&mut bytes, CHANNEL, &[], false, 4096);
        append_ack(&mut bytes, CHANNEL, 3, true);
        bytes
    }

    #[test]
    fn frames_are_the_same_however_the_reads_are_split() {
        let bytes = sample_stream();
        let whole = walk(&bytes, bytes.len()).expect("valid");
        assert_eq!(whole[0], "258 (60, 40) [0, 7, 3, 107, 101, 121, 1, 0, 0, 0, 9, 0, 0, 0, 2, 120, 121]");
        assert_eq!(
            whole[1..],
            [
                "header 300",
                "body 100 Some(5)",
                "body 100 Some(5)",
                "body 100 Some(5)",
                "heartbeat",
                "header 0",
                "258 (60, 80) [0, 0, 0, 0, 0, 0, 0, 3, 1]"
            ]
        );
        for step in 1..40 {
            assert_eq!(walk(&bytes, step).expect("valid"), whole, "in steps of {step}");
        }
    }

    #[test]
    fn a_long_stream_of_large_frames_passes_through_the_buffer() {
        let mut bytes = Vec::new();
        for index in 0..40u8 {
            let body = vec![index; MAX_FRAME_BYTES - FRAME_OVERHEAD_BYTES];
            append_content(&mut bytes, 1, &body, false, MAX_FRAME_BYTES);
        }
        for step in [1 << 20, 100_001, 4_099] {
            let seen = walk(&bytes, step).expect("valid");
            assert_eq!(seen.len(), 80);
            assert_eq!(seen[79], format!("body {} Some(39)", MAX_FRAME_BYTES - FRAME_OVERHEAD_BYTES));
        }
    }

    #[test]
    fn the_content_header_carries_the_delivery_mode_only_when_persistent() {
        let (mut persistent, mut transient) = (Vec::new(), Vec::new());
        append_content(&mut persistent, 1, b"ab", true, 4096);
        let body_start = append_content(&mut transient, 1, b"ab", false, 4096);
        assert_eq!(persistent[..23], [2, 0, 1, 0, 0, 0, 15, 0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0x10, 0, 2, 0xCE]);
        assert_eq!(transient[..22], [2, 0, 1, 0, 0, 0, 14, 0, 60, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0xCE]);
        assert_eq!(&transient[body_start..body_start + 2], b"ab");
    }

    #[test]
    fn what_is_no_frame_is_refused_as_early_as_possible() {
        assert_eq!(walk(b"AMQP\0\x01\0\0", 3), Err(WireError::Version([0, 1, 0, 0])));
        assert_eq!(walk(b"HTTP/1.1 400 Bad Request", 9), Err(WireError::FrameType(b'H')));
        assert_eq!(walk(&[1, 0, 0, 0, 0, 0, 4, 0, 10, 0, 10, 0], 99), Err(WireError::FrameEnd));
        assert_eq!(walk(&[1, 0, 0, 0, 0, 0, 2, 0, 10, 0xCE], 99), Err(WireError::Truncated("method")));
        assert_eq!(walk(&[2, 0, 0, 0, 0, 0, 2, 0, 60, 0xCE], 99), Err(WireError::Truncated("content header")));
        assert_eq!(walk(&[3, 0, 1, 0xFF, 0xFF, 0xFF, 0xFF, 1], 99), Err(WireError::TooLarge(0xFFFF_FFFF + 8)));
        assert_eq!(walk(&[9, 0, 0, 0, 0, 0, 0, 0xCE], 99), Err(WireError::FrameType(9)));
    }

    #[test]
    fn arguments_come_back_as_written_and_never_past_the_end() {
        let arguments = Arguments::new().octet(1).short(2).long(3).short_string("four").long_string(b"");
        let mut reader = ArgumentReader::new(arguments.as_bytes());
        assert_eq!((reader.octet(), reader.short(), reader.long()), (Ok(1), Ok(2), Ok(3)));
        assert_eq!((reader.short_string(), reader.long()), (Ok(&b"four"[..]), Ok(0)));
        assert_eq!(reader.octet(), Err(WireError::Truncated("method")));
        assert!(ArgumentReader::new(&[5, b'a']).short_string().is_err());
        assert!(ArgumentReader::new(&[0; 7]).long_long().is_err());
    }
}
