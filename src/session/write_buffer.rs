//! Bytes on their way to a socket: one buffer, with large bodies spliced in instead of copied.

use std::io::IoSlice;

use bytes::Bytes;

use crate::wire::{encode, frame::FRAME_END};

/// Slices offered to one vectored write.
const MAX_SLICES: usize = 64;

/// An append-only buffer; a splice stands before the byte at its offset.
#[derive(Debug, Default)]
pub struct WriteBuffer {
    pub bytes: Vec<u8>,
    splices: Vec<(usize, Bytes)>,
    spliced_bytes: usize,
}

impl WriteBuffer {
    /// Bytes to be written.
    #[inline]
    pub fn len(&self) -> usize {
        self.bytes.len() + self.spliced_bytes
    }

    #[inline]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Whether nothing is spliced in.
    pub fn is_plain(&self) -> bool {
        self.splices.is_empty()
    }

    /// Appends the frames of a shared body without copying it.
    pub fn body_frames(&mut self, channel: u16, body: &Bytes, frame_max: u32) {
        let max = encode::body_payload_max(frame_max);
        for start in (0..body.len()).step_by(max) {
            let end = (start + max).min(body.len());
            self.bytes.extend_from_slice(&encode::body_head(channel, end - start));
            self.splices.push((self.bytes.len(), body.slice(start..end)));
            self.spliced_bytes += end - start;
            self.bytes.push(FRAME_END);
        }
    }

    /// Empties the buffer; keeps at most `keep_bytes` of its memory.
    pub fn clear(&mut self, keep_bytes: usize) {
        self.bytes.clear();
        self.bytes.shrink_to(keep_bytes);
        self.splices = Vec::new();
        self.spliced_bytes = 0;
    }
}

/// How far a [`WriteBuffer`] was written.
#[derive(Debug, Default)]
pub struct WriteCursor {
    at: usize,
    splice: usize,
    splice_at: usize,
}

impl WriteCursor {
    /// Calls `write` with what is left, as slices; `None` when nothing is.
    pub fn slices<R>(&self, buffer: &WriteBuffer, write: impl FnOnce(&[IoSlice<'_>]) -> R) -> Option<R> {
        if self.at >= buffer.bytes.len() && self.splice >= buffer.splices.len() {
            return None;
        }
        if buffer.splices.is_empty() {
            return Some(write(&[IoSlice::new(&buffer.bytes[self.at..])]));
        }
        let mut slices = Vec::with_capacity(MAX_SLICES);
        let (mut at, mut splice_at) = (self.at, self.splice_at);
        for (offset, body) in &buffer.splices[self.splice..] {
            if slices.len() + 2 > MAX_SLICES {
                return Some(write(&slices));
            }
            if at < *offset {
                slices.push(IoSlice::new(&buffer.bytes[at..*offset]));
                at = *offset;
            }
            slices.push(IoSlice::new(&body[splice_at..]));
            splice_at = 0;
        }
        if at < buffer.bytes.len() {
            slices.push(IoSlice::new(&buffer.bytes[at..]));
        }
        Some(write(&slices))
    }

    /// Moves on by `written` bytes.
    pub fn advance(&mut self, buffer: &WriteBuffer, mut written: usize) {
        while written > 0 {
            let until = buffer.splices.get(self.splice).map_or(buffer.bytes.len(), |(offset, _)| *offset);
            let plain = written.min(until - self.at);
            self.at += plain;
            written -= plain;
            if written == 0 {
                return;
            }
            let Some((_, body)) = buffer.splices.get(self.splice) else { return };
            let spliced = written.min(body.len() - self.splice_at);
            self.splice_at += spliced;
            written -= spliced;
            if self.splice_at == body.len() {
                self.splice += 1;
                self.splice_at = 0;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_split_of_the_writes_gives_the_same_bytes(pieces in proptest::collection::vec((any::<bool>(), 1usize..9000), 1..20), chunk in 1usize..5000) {
            let (mut buffer, mut expected) = (WriteBuffer::default(), Vec::new());
            for (shared, len) in pieces {
                let body = Bytes::from(vec![len as u8; len]);
                let mut plain = Vec::new();
                encode::body_frames(&mut plain, 1, &body, 4096);
                if shared { buffer.body_frames(1, &body, 4096) } else { buffer.bytes.extend_from_slice(&plain) }
                expected.extend(plain);
            }
            prop_assert_eq!(buffer.len(), expected.len());
            let (mut cursor, mut written) = (WriteCursor::default(), Vec::new());
            loop {
                let step = cursor.slices(&buffer, |slices| {
                    let flat: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
                    let len = flat.len().min(chunk);
                    written.extend_from_slice(&flat[..len]);
                    len
                });
                let Some(len) = step else { break };
                cursor.advance(&buffer, len);
            }
            prop_assert_eq!(written, expected);
        }
    }
}
