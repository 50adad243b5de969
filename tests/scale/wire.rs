//! Frames by hand: a client that costs little beside the broker, for messages with small bodies.

#![allow(dead_code, reason = "several test programs share it, and each uses a part")]

use std::{
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    ops::Range,
    time::Duration,
};

use amq_protocol::protocol::BasicProperties;

use super::client::{Client, ClientError, PATIENCE, publish_frames};

/// Bytes per read and per write.
const BLOCK_BYTES: usize = 128 << 10;

/// What the broker says, as far as it matters here. Ranges are of [`Wire::bytes`], until the next [`Wire::fill`].
#[derive(Debug)]
pub enum Event {
    Delivery {
        tag: u64,
        redelivered: bool,
        body: Range<usize>,
    },
    Confirmed {
        tag: u64,
    },
    /// Any other method, by class and id.
    Method(u16, u16),
}

/// A connection that is past its handshake.
pub struct Wire {
    stream: TcpStream,
    input: Vec<u8>,
    at: usize,
    end: usize,
    pub out: Vec<u8>,
}

impl Wire {
    pub fn new(client: Client) -> Wire {
        let (stream, mut input) = client.into_parts();
        let end = input.len();
        input.resize(end.max(2 * BLOCK_BYTES), 0);
        Wire { stream, input, at: 0, end, out: Vec::with_capacity(2 * BLOCK_BYTES) }
    }

    pub fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.input[range]
    }

    /// Writes what was queued.
    pub fn flush(&mut self) -> Result<(), ClientError> {
        let written = self.stream.write_all(&self.out);
        self.out.clear();
        Ok(written?)
    }

    /// Reads once; false if nothing came within `wait`.
    pub fn fill(&mut self, wait: Duration) -> Result<bool, ClientError> {
        self.input.copy_within(self.at..self.end, 0);
        (self.at, self.end) = (0, self.end - self.at);
        if self.input.len() - self.end < BLOCK_BYTES {
            self.input.resize(self.input.len() + BLOCK_BYTES, 0);
        }
        self.stream.set_nonblocking(wait.is_zero())?;
        if !wait.is_zero() {
            self.stream.set_read_timeout(Some(wait))?;
        }
        let read = self.stream.read(&mut self.input[self.end..]);
        if wait.is_zero() {
            self.stream.set_nonblocking(false)?;
        }
        match read {
            Ok(0) => Err(ClientError::Gone(ErrorKind::UnexpectedEof.into())),
            Ok(read) => {
                self.end += read;
                Ok(true)
            }
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) =>
            {
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The payload of the frame at `at`, if all of it is there.
    fn frame(&self, at: usize) -> Option<(u8, Range<usize>)> {
        let head = self.input[at..self.end].first_chunk::<7>()?;
        let size = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
        let payload = at + 7..at + 7 + size;
        (payload.end < self.end).then(|| {
            assert_eq!(self.input[payload.end], 0xCE, "the broker sent a frame without its end");
            (head[0], payload)
        })
    }

    /// The next whole thing that was read.
    pub fn next(&mut self) -> Option<Event> {
        loop {
            let (kind, payload) = self.frame(self.at)?;
            let next = payload.end + 1;
            if kind == 8 {
                self.at = next;
                continue;
            }
            assert_eq!(kind, 1, "content without its method");
            let short = |at: usize| u16::from_be_bytes([self.input[at], self.input[at + 1]]);
            let long = |at: usize| u64::from_be_bytes(self.input[at..at + 8].try_into().expect("8 bytes"));
            let (class, method, arguments) = (short(payload.start), short(payload.start + 2), payload.start + 4);
            let event = match (class, method) {
                (60, 60) => {
                    let tag_at = arguments + 1 + usize::from(self.input[arguments]);
                    let (_, header) = self.frame(next)?;
                    let size = long(header.start + 4) as usize;
                    let (_, body) = self.frame(header.end + 1)?;
                    assert_eq!(body.len(), size, "a small body comes in one frame");
                    self.at = body.end + 1;
                    return Some(Event::Delivery { tag: long(tag_at), redelivered: self.input[tag_at + 8] != 0, body });
                }
                (60, 80) => Event::Confirmed { tag: long(arguments) },
                (60, 120) => panic!("a publish was refused"),
                (10, 50) | (20, 40) => {
                    panic!("the broker closed: {:?}", String::from_utf8_lossy(&self.input[payload]))
                }
                _ => Event::Method(class, method),
            };
            self.at = next;
            return Some(event);
        }
    }

    /// Queues an ack of everything up to a delivery, on channel 1.
    pub fn ack_up_to(&mut self, tag: u64) {
        self.out.extend_from_slice(&[1, 0, 1, 0, 0, 0, 13, 0, 60, 0, 80]);
        self.out.extend_from_slice(&tag.to_be_bytes());
        self.out.extend_from_slice(&[1, 0xCE]);
    }

    /// Queues `basic.qos`, whose answer tells that everything before it was handled.
    pub fn queue_qos(&mut self) {
        self.out.extend_from_slice(&[1, 0, 1, 0, 0, 0, 11, 0, 60, 0, 10, 0, 0, 0, 0, 0, 1, 0, 0xCE]);
    }

    /// Publishes `count` messages, which `append` queues by their number, with at most `window` unconfirmed; waits for all
    /// confirms. Confirms of one queue's persistent messages come in order.
    pub fn publish(&mut self, count: u64, window: u64, mut append: impl FnMut(u64, &mut Vec<u8>)) {
        let (mut sent, mut confirmed) = (0, 0);
        while confirmed < count {
            let up_to = count.min(confirmed + window);
            while sent < up_to && self.out.len() < BLOCK_BYTES {
                append(sent, &mut self.out);
                sent += 1;
            }
            self.flush().expect("the broker takes what is published");
            let wait = if sent < up_to { Duration::ZERO } else { PATIENCE };
            let came = self.fill(wait).expect("the broker confirms");
            assert!(came || wait.is_zero(), "the broker confirms no more: {confirmed} of {sent}");
            while let Some(event) = self.next() {
                if let Event::Confirmed { tag } = event {
                    confirmed = confirmed.max(tag);
                }
            }
        }
    }
}

/// A publish that is encoded once; what differs between messages is written over it.
#[derive(Clone)]
pub struct Template {
    bytes: Vec<u8>,
    body_at: usize,
}

impl Template {
    pub fn new(key: &str, properties: &BasicProperties, body_bytes: usize) -> Template {
        let mut bytes = Vec::new();
        publish_frames(&mut bytes, 1, "", key, false, properties, &vec![0; body_bytes]);
        let body_at = bytes.len() - 1 - body_bytes;
        Template { bytes, body_at }
    }

    /// Where `needle` stands in front of the body.
    pub fn position_of(&self, needle: &[u8]) -> usize {
        let front = &self.bytes[..self.body_at];
        front.windows(needle.len()).rposition(|window| window == needle).expect("it is part of the message")
    }

    pub fn set(&mut self, at: usize, value: &[u8]) {
        self.bytes[at..at + value.len()].copy_from_slice(value);
    }

    pub fn set_body(&mut self, at: usize, value: u64) {
        self.set(self.body_at + at, &value.to_le_bytes());
    }

    /// Writes into the body from `at` on.
    pub fn set_body_bytes(&mut self, at: usize, bytes: &[u8]) {
        self.set(self.body_at + at, bytes);
    }

    pub fn append_to(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.bytes);
    }
}

/// A number of a body written by [`Template::set_body`].
pub fn number(body: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(body[at..at + 8].try_into().expect("8 bytes"))
}
