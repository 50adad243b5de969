//! One blocking AMQP connection with one channel: handshake, calls, and what the broker says unasked.
//!
//! Reads and writes time out after [`POLL_INTERVAL`], so that whoever waits looks around ten times a second
//! and no wait is without an end. Where there are thousands of connections, once a second has to do
//! ([`Connection::set_patience`]), for looking around costs CPU time.

use std::io::{self, ErrorKind, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use super::error::PerfError;
use super::posix;
use super::uri::Uri;
use super::wire::{
    self, ArgumentReader, Arguments, Frame, FrameReader, MAX_FRAME_BYTES, MethodId, PROTOCOL_HEADER, WireError, method,
};

/// The one channel that each connection opens.
pub(super) const CHANNEL: u16 = 1;
/// Longest that a read or a write blocks, unless there are many connections.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// With more connections than this, each one's reads block longer in proportion.
const FEW_CONNECTIONS: usize = 200;
const MAX_POLL_INTERVAL: Duration = Duration::from_secs(1);
/// Without any progress for so long, waiting ends.
pub(super) const PROGRESS_LIMIT: Duration = Duration::from_secs(10);

pub(super) const CONNECT_LIMIT: Duration = Duration::from_secs(5);
const CLOSE_LIMIT: Duration = Duration::from_secs(10);
/// The kernel doubles it for its own use.
const SEND_BUFFER_BYTES: usize = 256 << 10;
/// What the send buffers of all publishers may hold together before each gets a smaller one.
const ALL_SEND_BUFFERS_BYTES: usize = 16 << 20;
const MIN_SEND_BUFFER_BYTES: usize = 16 << 10;
const MIN_FRAME_MAX_BYTES: u32 = 4096;
const REPLY_SUCCESS: u16 = 200;

/// A connection that is open, with [`CHANNEL`] open in it.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    pub(super) reader: FrameReader,
    patience: Duration,
    /// Largest frame to send, as agreed.
    pub(super) frame_max: usize,
}

/// What the broker may say at any time. Closes are not here: they are errors.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Notice<'a> {
    Blocked {
        reason: &'a [u8],
    },
    Unblocked,
    Flow {
        active: bool,
    },
    Cancelled,
    Confirm {
        tag: u64,
        multiple: bool,
        acked: bool,
    },
    /// Any other method; the receiver knows whether it expects one.
    Other,
}

/// A method to send, and the one that answers it.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) id: MethodId,
    pub(super) arguments: Arguments,
    pub(super) reply: MethodId,
}

impl Connection {
    /// Connects, logs in, opens the virtual host and a channel.
    ///
    /// # Errors
    /// Whatever is in the way, within about [`PROGRESS_LIMIT`] per step.
    pub(super) fn open(uri: &Uri) -> Result<Self, PerfError> {
        let stream = connect(uri)?;
        let mut connection =
            Self { stream, reader: FrameReader::new(), patience: POLL_INTERVAL, frame_max: MAX_FRAME_BYTES };
        connection.send_all(&PROTOCOL_HEADER, "opening")?;
        connection.await_reply(method::CONNECTION_START)?;
        let tune = connection
            .call_on(0, method::CONNECTION_START_OK, &start_ok(uri), method::CONNECTION_TUNE)
            .map_err(|error| match error {
                PerfError::Disconnected { .. } => {
                    PerfError::Disconnected { during: "logging in (wrong user or password?)" }
                }
                other => other,
            })?;
        connection.tune(&tune)?;
        let open = Arguments::new().short_string(&uri.vhost).short_string("").octet(0);
        connection.call_on(0, method::CONNECTION_OPEN, &open, method::CONNECTION_OPEN_OK)?;
        connection.call(method::CHANNEL_OPEN, &Arguments::new().short_string(""), method::CHANNEL_OPEN_OK)?;
        Ok(connection)
    }

    /// Where the broker listens, the one of its addresses that answered.
    pub(super) fn peer_address(&self) -> Result<SocketAddr, PerfError> {
        self.stream.peer_addr().map_err(|source| PerfError::Io { during: "setting up", source })
    }

    /// Keeps what `publishers` are ahead of the broker small: bytes in the kernel count as published.
    pub(super) fn bound_send_buffer(&self, publishers: usize) -> Result<(), PerfError> {
        let bytes = (ALL_SEND_BUFFERS_BYTES / publishers.max(1)).clamp(MIN_SEND_BUFFER_BYTES, SEND_BUFFER_BYTES);
        socket2::SockRef::from(&self.stream)
            .set_send_buffer_size(bytes)
            .map_err(|source| PerfError::Io { during: "setting up", source })
    }

    /// Lets reads block longer, as one of `connections`.
    pub(super) fn set_patience(&mut self, connections: usize) -> Result<(), PerfError> {
        self.patience = patience_of(connections);
        self.stream
            .set_read_timeout(Some(self.patience))
            .map_err(|source| PerfError::Io { during: "setting up", source })
    }

    /// How long [`Self::read`] blocks at most.
    pub(super) fn patience(&self) -> Duration {
        self.patience
    }

    /// The socket, to wait for its input together with others.
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Accepts the broker's limits as far as ours allow, without heartbeats.
    fn tune(&mut self, tune: &[u8]) -> Result<(), PerfError> {
        let mut tune = ArgumentReader::new(tune);
        let (channel_max, offered, _heartbeat) = (tune.short()?, tune.long()?, tune.short()?);
        let own = u32::try_from(MAX_FRAME_BYTES).unwrap_or(u32::MAX);
        let agreed = if offered == 0 { own } else { offered.clamp(MIN_FRAME_MAX_BYTES, own) };
        self.frame_max = usize::try_from(agreed).unwrap_or(MAX_FRAME_BYTES);
        let answer = Arguments::new().short(channel_max).long(agreed).short(0);
        let mut frame = Vec::new();
        wire::append_method(&mut frame, 0, method::CONNECTION_TUNE_OK, &answer);
        self.send_all(&frame, "tuning")
    }

    /// Sends a method on the channel and waits for its reply, whose arguments it returns.
    pub(super) fn call(&mut self, id: MethodId, arguments: &Arguments, reply: MethodId) -> Result<Vec<u8>, PerfError> {
        self.call_on(CHANNEL, id, arguments, reply)
    }

    /// Sends many methods on the channel at once and waits for their replies, whose arguments it returns.
    ///
    /// The replies of one call have to fit into the sockets' buffers: a few hundred do.
    pub(super) fn call_all(&mut self, calls: &[Call]) -> Result<Vec<Vec<u8>>, PerfError> {
        let mut frames = Vec::new();
        calls.iter().for_each(|call| wire::append_method(&mut frames, CHANNEL, call.id, &call.arguments));
        self.send_all(&frames, "asking the broker")?;
        calls.iter().map(|call| self.await_reply(call.reply)).collect()
    }

    fn call_on(
        &mut self,
        channel: u16,
        id: MethodId,
        arguments: &Arguments,
        reply: MethodId,
    ) -> Result<Vec<u8>, PerfError> {
        let mut frame = Vec::new();
        wire::append_method(&mut frame, channel, id, arguments);
        self.send_all(&frame, "asking the broker")?;
        self.await_reply(reply)
    }

    /// Waits for the method `expected`. What else arrives is of no interest, except for a close.
    fn await_reply(&mut self, expected: MethodId) -> Result<Vec<u8>, PerfError> {
        let give_up = Instant::now() + PROGRESS_LIMIT;
        loop {
            while let Some(frame) = self.reader.next_frame()? {
                if let Frame::Method { id, arguments, .. } = frame {
                    if id == expected {
                        return Ok(arguments.to_vec());
                    }
                    if id == method::CONNECTION_SECURE {
                        return Err(WireError::Unexpected("further login step").into());
                    }
                    notice(id, arguments)?;
                }
            }
            if !self.read("waiting for an answer")? && Instant::now() > give_up {
                return Err(PerfError::Stalled { during: "waiting for an answer", seconds: PROGRESS_LIMIT.as_secs() });
            }
        }
    }

    /// Reads once, for up to [`Self::patience`]; says whether anything came.
    ///
    /// # Errors
    /// [`PerfError::Disconnected`] at the end of the stream.
    pub(super) fn read(&mut self, during: &'static str) -> Result<bool, PerfError> {
        match self.reader.fill(&mut self.stream) {
            Ok(0) => Err(PerfError::Disconnected { during }),
            Ok(_) => Ok(true),
            Err(error) if is_not_yet(&error) => Ok(false),
            Err(source) => Err(PerfError::Io { during, source }),
        }
    }

    /// Like [`Self::read`], but waits at most `timeout`, to the microsecond.
    pub(super) fn read_within(&mut self, timeout: Duration, during: &'static str) -> Result<bool, PerfError> {
        let timeout = timeout.min(self.patience);
        match posix::wait_readable(self.stream.as_fd(), timeout) {
            Ok(true) => self.read(during),
            Ok(false) => Ok(false),
            Err(source) => Err(PerfError::Io { during, source }),
        }
    }

    /// Writes once, for up to [`POLL_INTERVAL`]; returns how much went out, 0 if nothing could.
    pub(super) fn write(&mut self, bytes: &[u8], during: &'static str) -> Result<usize, PerfError> {
        match self.stream.write(bytes) {
            Ok(0) => Err(PerfError::Disconnected { during }),
            Ok(written) => Ok(written),
            Err(error) if is_not_yet(&error) => Ok(0),
            Err(source) => Err(self.reason_of(PerfError::Io { during, source })),
        }
    }

    /// Writes all of it, or fails after [`PROGRESS_LIMIT`] in which the broker took nothing.
    pub(super) fn send_all(&mut self, mut bytes: &[u8], during: &'static str) -> Result<(), PerfError> {
        let mut last_progress = Instant::now();
        while !bytes.is_empty() {
            let written = self.write(bytes, during)?;
            bytes = &bytes[written..];
            if written > 0 {
                last_progress = Instant::now();
            } else if last_progress.elapsed() > PROGRESS_LIMIT {
                return Err(PerfError::Stalled { during, seconds: PROGRESS_LIMIT.as_secs() });
            }
        }
        Ok(())
    }

    /// After a failed write: the broker's own words about it, if they are there to read.
    fn reason_of(&mut self, failure: PerfError) -> PerfError {
        while let Ok(true) = self.read_within(Duration::ZERO, "closing") {
            while let Ok(Some(frame)) = self.reader.next_frame() {
                if let Frame::Method { id, arguments, .. } = frame
                    && let Err(reason) = notice(id, arguments)
                {
                    return reason;
                }
            }
        }
        failure
    }

    /// Ends a worker's connection; returns what went wrong first. An aborted run is in no mood for handshakes.
    pub(super) fn finish_after(self, work: Result<(), PerfError>, aborted: bool) -> Option<PerfError> {
        match work {
            Ok(()) if aborted => None,
            Ok(()) => self.finish(None).err(),
            Err(error) => {
                // The first error says more than a failing farewell.
                let _ = self.finish(Some(&error));
                Some(error)
            }
        }
    }

    /// Takes leave: by the closing handshake if all went well, by its answer if the broker closed.
    ///
    /// When the handshake is over, the broker has handled all that was sent before it.
    pub(super) fn finish(mut self, error: Option<&PerfError>) -> Result<(), PerfError> {
        let mut frame = Vec::new();
        match error {
            Some(PerfError::ConnectionClosed { .. }) => {
                wire::append_method(&mut frame, 0, method::CONNECTION_CLOSE_OK, &Arguments::new());
                self.send_all(&frame, "closing")
            }
            Some(
                PerfError::Io { .. } | PerfError::Disconnected { .. } | PerfError::Wire(_) | PerfError::Stalled { .. },
            ) => Ok(()),
            _ => {
                let bye = Arguments::new().short(REPLY_SUCCESS).short_string("done").short(0).short(0);
                wire::append_method(&mut frame, 0, method::CONNECTION_CLOSE, &bye);
                self.send_all(&frame, "closing")?;
                self.await_close_ok()
            }
        }
    }

    fn await_close_ok(&mut self) -> Result<(), PerfError> {
        let give_up = Instant::now() + CLOSE_LIMIT;
        while Instant::now() < give_up {
            while let Some(frame) = self.reader.next_frame()? {
                if matches!(frame, Frame::Method { id: method::CONNECTION_CLOSE_OK, .. }) {
                    return Ok(());
                }
            }
            match self.read("closing") {
                Ok(_) => {}
                Err(PerfError::Disconnected { .. }) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Err(PerfError::Stalled { during: "closing", seconds: CLOSE_LIMIT.as_secs() })
    }
}

/// What a method that nobody asked for means.
///
/// # Errors
/// [`PerfError::ConnectionClosed`] and [`PerfError::ChannelClosed`], with the broker's code and text.
pub(super) fn notice(id: MethodId, arguments: &[u8]) -> Result<Notice<'_>, PerfError> {
    let mut arguments = ArgumentReader::new(arguments);
    Ok(match id {
        method::BASIC_ACK | method::BASIC_NACK => {
            let (tag, bits) = (arguments.long_long()?, arguments.octet()?);
            Notice::Confirm { tag, multiple: bits & 1 != 0, acked: id == method::BASIC_ACK }
        }
        method::CONNECTION_BLOCKED => Notice::Blocked { reason: arguments.short_string()? },
        method::CONNECTION_UNBLOCKED => Notice::Unblocked,
        method::CHANNEL_FLOW => Notice::Flow { active: arguments.octet()? & 1 != 0 },
        method::BASIC_CANCEL => Notice::Cancelled,
        method::CONNECTION_CLOSE | method::CHANNEL_CLOSE => {
            let code = arguments.short()?;
            let text = String::from_utf8_lossy(arguments.short_string()?).into_owned();
            return Err(if id == method::CONNECTION_CLOSE {
                PerfError::ConnectionClosed { code, text }
            } else {
                PerfError::ChannelClosed { code, text }
            });
        }
        _ => Notice::Other,
    })
}

fn patience_of(connections: usize) -> Duration {
    let times = u32::try_from(connections.div_ceil(FEW_CONNECTIONS)).unwrap_or(u32::MAX).max(1);
    POLL_INTERVAL.saturating_mul(times).min(MAX_POLL_INTERVAL)
}

pub(super) fn is_not_yet(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted)
}

fn connect(uri: &Uri) -> Result<TcpStream, PerfError> {
    let address = uri.address();
    let failed = |source| PerfError::Connect { address: address.clone(), source };
    let candidates = (uri.host.as_str(), uri.port).to_socket_addrs().map_err(failed)?;
    let mut last = io::Error::new(ErrorKind::NotFound, "the name has no address");
    for candidate in candidates {
        match TcpStream::connect_timeout(&candidate, CONNECT_LIMIT) {
            Ok(stream) => return prepare(stream).map_err(failed),
            Err(error) => last = error,
        }
    }
    Err(failed(last))
}

pub(super) fn prepare(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(POLL_INTERVAL))?;
    stream.set_write_timeout(Some(POLL_INTERVAL))?;
    Ok(stream)
}

pub(super) fn start_ok(uri: &Uri) -> Arguments {
    let true_field = |key: &str| Arguments::new().short_string(key).octet(b't').octet(1);
    let capabilities = [
        "authentication_failure_close",
        "basic.nack",
        "connection.blocked",
        "consumer_cancel_notify",
        "publisher_confirms",
    ]
    .map(|key| true_field(key).as_bytes().to_vec())
    .concat();
    let product = Arguments::new().short_string("product").octet(b'S').long_string(b"leveret perf");
    let table = Arguments::new().short_string("capabilities").octet(b'F').long_string(&capabilities);
    let properties = [product.as_bytes(), table.as_bytes()].concat();
    let login = format!("\0{}\0{}", uri.user, uri.password);
    // A table has the same form as a long string: its length, then its fields.
    Arguments::new().long_string(&properties).short_string("PLAIN").long_string(login.as_bytes()).short_string("en_US")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_close_becomes_an_error_with_code_and_text() {
        let arguments = Arguments::new().short(404).short_string("NOT_FOUND - no queue 'q'").short(50).short(10);
        let channel = notice(method::CHANNEL_CLOSE, arguments.as_bytes()).expect_err("close").to_string();
        assert_eq!(channel, "the broker closed the channel: 404 NOT_FOUND - no queue 'q'");
        assert!(matches!(
            notice(method::CONNECTION_CLOSE, arguments.as_bytes()),
            Err(PerfError::ConnectionClosed { code: 404, .. })
        ));
        assert!(matches!(notice(method::CONNECTION_CLOSE, &[1]), Err(PerfError::Wire(WireError::Truncated(_)))));
    }

    #[test]
    fn many_connections_look_around_less_often() {
        assert_eq!([0, 2, 200, 400, 5_000].map(|count| patience_of(count).as_millis()), [100, 100, 100, 200, 1_000]);
    }

    #[test]
    fn unasked_methods_are_told_apart() {
        let confirm = [0, 0, 0, 0, 0, 0, 1, 0, 1];
        assert_eq!(
            notice(method::BASIC_ACK, &confirm).expect("valid"),
            Notice::Confirm { tag: 256, multiple: true, acked: true }
        );
        assert_eq!(
            notice(method::BASIC_NACK, &confirm).expect("valid"),
            Notice::Confirm { tag: 256, multiple: true, acked: false }
        );
        assert_eq!(notice(method::CHANNEL_FLOW, &[0]).expect("valid"), Notice::Flow { active: false });
        assert_eq!(
            notice(method::CONNECTION_BLOCKED, b"\x06memory").expect("valid"),
            Notice::Blocked { reason: b"memory" }
        );
        assert_eq!(notice(method::BASIC_DELIVER, &[]).expect("valid"), Notice::Other);
    }
}
