//! Content that does not stand whole in one read: method, header and body frames put together, per channel.

use bytes::Bytes;

use super::close::{CloseReason, Fault};
use crate::wire::hot::HeaderView;

/// RabbitMQ's hard cap on announced bodies.
const MAX_BODY_BYTES: u64 = 536_870_912;
/// Memory reserved at a header's word; the rest grows as bytes arrive, so that an announcement costs nothing.
const FIRST_RESERVE_BYTES: usize = 256 << 10;

/// A `basic.publish` waiting for its content.
#[derive(Debug)]
pub struct Publish {
    pub names: Vec<u8>,
    pub mandatory: bool,
    pub immediate: bool,
}

/// What a channel expects next.
#[derive(Debug, Default)]
pub enum Assembler {
    #[default]
    Method,
    Header(Publish),
    Body(Content),
}

/// A publish whose header has arrived.
#[derive(Debug)]
pub struct Content {
    pub publish: Publish,
    pub properties: Vec<u8>,
    pub body: Vec<u8>,
    body_size: usize,
    received: usize,
    /// Too large to be accepted: its bytes are counted, not kept.
    oversized: bool,
}

/// A whole message.
#[derive(Debug)]
pub struct Assembled {
    pub publish: Publish,
    pub properties: Vec<u8>,
    pub body: Bytes,
    /// Announced body bytes; more than `body` holds when the message was too large to be kept.
    pub body_size: usize,
}

/// Frames out of sequence (505) or wrong in themselves (501); the whole connection goes.
fn fault(code: u16, text: &str) -> Fault {
    Fault::Connection(CloseReason::new(code, text)).at(60, 40)
}

/// Checks a header's fixed fields.
///
/// # Errors
/// 501 and 505 with RabbitMQ's texts.
pub fn check_header(header: &HeaderView<'_>) -> Result<(), Fault> {
    if header.weight != 0 {
        return Err(fault(505, "expected content header for class 60, got non content header frame instead"));
    }
    if header.class != 60 {
        let text = format!("expected content header for class 60, got one for class {} instead", header.class);
        return Err(fault(505, &text));
    }
    if header.body_size > MAX_BODY_BYTES {
        let text = format!("content body size {} exceeds maximum allowed size {MAX_BODY_BYTES}", header.body_size);
        return Err(fault(501, &text));
    }
    Ok(())
}

impl Assembler {
    /// Whether no content is under way.
    #[inline]
    pub fn is_idle(&self) -> bool {
        matches!(self, Assembler::Method)
    }

    /// The fault of a method frame (or a frame of the wrong kind) while content is expected.
    pub fn interrupted(&self) -> Fault {
        match self {
            Assembler::Method => fault_without_method("expected method frame, got non method frame instead"),
            Assembler::Header(_) => {
                fault(505, "expected content header for class 60, got non content header frame instead")
            }
            Assembler::Body(_) => fault(505, "expected content body, got non content body frame instead"),
        }
    }

    /// Takes a header; answers the message when it has no body. A body over `max_body_bytes` is read to its end, so that
    /// framing stays right, but not kept.
    ///
    /// # Errors
    /// 501 and 505 with RabbitMQ's texts.
    pub fn on_header(&mut self, header: &HeaderView<'_>, max_body_bytes: u64) -> Result<Option<Assembled>, Fault> {
        let publish = match std::mem::take(self) {
            Assembler::Header(publish) => publish,
            other => {
                *self = other;
                return Err(self.interrupted());
            }
        };
        check_header(header)?;
        let body_size = usize::try_from(header.body_size).unwrap_or(usize::MAX);
        let properties = header.properties.to_vec();
        if body_size == 0 {
            return Ok(Some(Assembled { publish, properties, body: Bytes::new(), body_size }));
        }
        let oversized = header.body_size > max_body_bytes;
        let body = Vec::with_capacity(if oversized { 0 } else { body_size.min(FIRST_RESERVE_BYTES) });
        *self = Assembler::Body(Content { publish, properties, body, body_size, received: 0, oversized });
        Ok(None)
    }

    /// Whether body bytes are expected.
    #[inline]
    pub fn wants_body(&self) -> bool {
        matches!(self, Assembler::Body(_))
    }

    /// Takes body bytes, a whole frame's or the beginning of one. The message is whole when [`Assembler::finish`] says so.
    ///
    /// # Errors
    /// 501 for more bytes than announced, 505 when no body is expected.
    pub fn on_body(&mut self, bytes: &[u8]) -> Result<(), Fault> {
        let Assembler::Body(content) = self else { return Err(self.interrupted()) };
        if bytes.len() > content.body_size - content.received {
            return Err(fault(501, "content body frame exceeds remaining content size"));
        }
        content.received += bytes.len();
        if content.oversized {
            return Ok(());
        }
        if content.body.capacity() - content.body.len() < bytes.len() {
            // Grows fourfold, as every growth may copy what is there, but never past what was announced.
            let wanted = (content.body.capacity() * 4).max(content.body.len() + bytes.len()).min(content.body_size);
            content.body.reserve_exact(wanted - content.body.len());
        }
        content.body.extend_from_slice(bytes);
        Ok(())
    }

    /// The message, once its whole body is there.
    pub fn finish(&mut self) -> Option<Assembled> {
        match self {
            Assembler::Body(content) if content.received == content.body_size => {}
            _ => return None,
        }
        let Assembler::Body(content) = std::mem::take(self) else { return None };
        let Content { publish, properties, body, body_size, .. } = content;
        Some(Assembled { publish, properties, body: body.into(), body_size })
    }
}

fn fault_without_method(text: &str) -> Fault {
    Fault::Connection(CloseReason::new(505, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(body_size: u64) -> HeaderView<'static> {
        HeaderView { class: 60, weight: 0, body_size, properties: &[0, 0] }
    }

    fn waiting() -> Assembler {
        Assembler::Header(Publish { names: vec![0, 0], mandatory: false, immediate: false })
    }

    #[test]
    fn a_body_may_come_in_any_pieces() {
        let mut assembler = waiting();
        assert!(assembler.on_header(&header(5), 1 << 20).unwrap().is_none());
        for piece in [&b"he"[..], b"", b"llo"] {
            assert!(assembler.finish().is_none());
            assembler.on_body(piece).unwrap();
        }
        assert_eq!(assembler.finish().unwrap().body, "hello");
        assert!(assembler.is_idle());
    }

    #[test]
    fn frames_out_of_sequence_are_505_and_too_many_bytes_501() {
        let code = |fault: Fault| match fault {
            Fault::Connection(reason) => (reason.code, reason.text),
            other => panic!("{other:?}"),
        };
        let mut assembler = Assembler::Method;
        assert_eq!(code(assembler.on_body(b"x").unwrap_err()).0, 505);
        let mut assembler = waiting();
        assert_eq!(
            code(assembler.on_body(b"x").unwrap_err()).1,
            "UNEXPECTED_FRAME - expected content header for class 60, got non content header frame instead"
        );
        let mut assembler = waiting();
        assembler.on_header(&header(2), 1 << 20).unwrap();
        assert_eq!(
            code(assembler.on_header(&header(2), 1 << 20).unwrap_err()).1,
            "UNEXPECTED_FRAME - expected content body, got non content body frame instead"
        );
        assert_eq!(
            code(assembler.on_body(b"xyz").unwrap_err()),
            (501, "FRAME_ERROR - content body frame exceeds remaining content size".into())
        );
        let mut assembler = waiting();
        assert_eq!(code(assembler.on_header(&header(MAX_BODY_BYTES + 1), 1 << 20).unwrap_err()).0, 501);
        let mut assembler = waiting();
        assert_eq!(code(assembler.on_header(&HeaderView { class: 61, ..header(1) }, 1 << 20).unwrap_err()).0, 505);
    }
}
