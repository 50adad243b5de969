//! The frame envelope: `type:u8 channel:u16 size:u32 payload[size] 0xCE` (specification section 4.2.3).

/// Frame type octets.
pub const METHOD: u8 = 1;
pub const HEADER: u8 = 2;
pub const BODY: u8 = 3;
pub const HEARTBEAT: u8 = 8;
/// The octet that ends every frame.
pub const FRAME_END: u8 = 0xCE;
/// Bytes before the payload.
pub const HEAD_BYTES: usize = 7;
/// Bytes of a frame that are not payload.
pub const OVERHEAD_BYTES: usize = 8;

/// The seven octets before a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHead {
    pub kind: u8,
    pub channel: u16,
    /// Payload bytes.
    pub size: u32,
}

impl FrameHead {
    /// Reads the head; `None` while fewer than seven bytes are there.
    #[inline]
    pub fn read(input: &[u8]) -> Option<FrameHead> {
        let head = input.first_chunk::<HEAD_BYTES>()?;
        Some(FrameHead {
            kind: head[0],
            channel: u16::from_be_bytes([head[1], head[2]]),
            size: u32::from_be_bytes([head[3], head[4], head[5], head[6]]),
        })
    }
}

/// A whole frame, borrowed from the read buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    pub kind: u8,
    pub channel: u16,
    pub payload: &'a [u8],
}

impl Frame<'_> {
    /// Bytes of the frame on the wire.
    #[inline]
    pub fn wire_len(&self) -> usize {
        self.payload.len() + OVERHEAD_BYTES
    }
}

/// What stands at the start of the input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scan<'a> {
    Frame(Frame<'a>),
    /// The head is there, the payload not all of it.
    Partial(FrameHead),
    /// Not even the head is there.
    Incomplete,
    /// The payload is larger than the limit.
    TooLarge(FrameHead),
    /// The octet after the payload is not [`FRAME_END`].
    BadEnd(Frame<'a>, u8),
}

/// Reads the envelope at the start of `input`. `max_payload_bytes` is RabbitMQ's rule: a payload of up to frame-max
/// bytes passes, though the frame is eight bytes longer.
#[inline]
pub fn scan(input: &[u8], max_payload_bytes: u32) -> Scan<'_> {
    let Some(head) = FrameHead::read(input) else {
        return Scan::Incomplete;
    };
    if head.size > max_payload_bytes {
        return Scan::TooLarge(head);
    }
    let end = HEAD_BYTES + head.size as usize;
    let Some(&last) = input.get(end) else {
        return Scan::Partial(head);
    };
    let frame = Frame { kind: head.kind, channel: head.channel, payload: &input[HEAD_BYTES..end] };
    if last == FRAME_END { Scan::Frame(frame) } else { Scan::BadEnd(frame, last) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_split_anywhere_is_never_misread() {
        let wire = [1, 0, 5, 0, 0, 0, 2, 10, 20, FRAME_END, 8, 0];
        for cut in 0..10 {
            assert!(matches!(scan(&wire[..cut], 100), Scan::Incomplete | Scan::Partial(_)), "cut at {cut}");
        }
        let expected = Frame { kind: METHOD, channel: 5, payload: &[10, 20] };
        assert_eq!(scan(&wire, 100), Scan::Frame(expected));
        assert_eq!(expected.wire_len(), 10);
    }

    #[test]
    fn size_limit_and_end_marker_are_checked() {
        let wire = [3, 0, 1, 0, 0, 0, 9];
        assert!(matches!(scan(&wire, 8), Scan::TooLarge(head) if head.size == 9));
        let wire = [3, 0, 1, 0, 0, 0, 1, 7, 0xCD];
        assert!(matches!(scan(&wire, 8), Scan::BadEnd(_, 0xCD)));
    }
}
