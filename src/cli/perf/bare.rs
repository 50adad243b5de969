//! A connection that owns its socket and nothing else: the read buffer is lent for each dialogue.
//!
//! For connections by the thousand, of which one talks at a time, and which negotiate heartbeats away: nothing has to
//! be read or written while they are idle.

use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Instant;

use socket2::{Domain, Socket, Type};

use super::connection::{CONNECT_LIMIT, PROGRESS_LIMIT, is_not_yet, notice, prepare, start_ok};
use super::error::PerfError;
use super::uri::Uri;
use super::wire::{
    self, ArgumentReader, Arguments, Frame, FrameReader, MAX_FRAME_BYTES, MethodId, PROTOCOL_HEADER, method,
};

const REPLY_SUCCESS: u16 = 200;

/// An open connection, without channels as yet.
#[derive(Debug)]
pub(super) struct Bare {
    pub(super) stream: TcpStream,
}

impl Bare {
    /// Connects from `source` (or wherever the system likes), logs in and opens the virtual host.
    ///
    /// # Errors
    /// Whatever is in the way, within about [`PROGRESS_LIMIT`] per step.
    pub(super) fn open(
        uri: &Uri,
        address: SocketAddr,
        source: Option<IpAddr>,
        reader: &mut FrameReader,
    ) -> Result<Self, PerfError> {
        let stream =
            connect(address, source).map_err(|source| PerfError::Connect { address: address.to_string(), source })?;
        let mut bare = Self { stream };
        reader.clear();
        bare.send(&PROTOCOL_HEADER)?;
        bare.reply(reader, method::CONNECTION_START, |_| Ok(()))?;
        let mut out = Vec::new();
        wire::append_method(&mut out, 0, method::CONNECTION_START_OK, &start_ok(uri));
        bare.send(&out)?;
        let (channel_max, offered) = bare.reply(reader, method::CONNECTION_TUNE, |tune| {
            let mut tune = ArgumentReader::new(tune);
            Ok((tune.short()?, tune.long()?))
        })?;
        out.clear();
        let own = u32::try_from(MAX_FRAME_BYTES).unwrap_or(u32::MAX);
        let frame_max = if offered == 0 { own } else { offered.min(own) };
        let answer = Arguments::new().short(channel_max).long(frame_max).short(0);
        wire::append_method(&mut out, 0, method::CONNECTION_TUNE_OK, &answer);
        let open = Arguments::new().short_string(&uri.vhost).short_string("").octet(0);
        wire::append_method(&mut out, 0, method::CONNECTION_OPEN, &open);
        bare.send(&out)?;
        bare.reply(reader, method::CONNECTION_OPEN_OK, |_| Ok(()))?;
        Ok(bare)
    }

    /// Sends a method and waits for its reply.
    pub(super) fn call(
        &mut self,
        reader: &mut FrameReader,
        channel: u16,
        id: MethodId,
        arguments: &Arguments,
        reply: MethodId,
    ) -> Result<(), PerfError> {
        let mut out = Vec::new();
        wire::append_method(&mut out, channel, id, arguments);
        self.send(&out)?;
        self.reply(reader, reply, |_| Ok(()))
    }

    /// Takes leave by the closing handshake.
    pub(super) fn close(mut self, reader: &mut FrameReader) -> Result<(), PerfError> {
        let bye = Arguments::new().short(REPLY_SUCCESS).short_string("done").short(0).short(0);
        reader.clear();
        self.call(reader, 0, method::CONNECTION_CLOSE, &bye, method::CONNECTION_CLOSE_OK)
    }

    /// What is sent here is short; the socket of a connection that waits has room for it.
    fn send(&mut self, bytes: &[u8]) -> Result<(), PerfError> {
        self.stream.write_all(bytes).map_err(|source| PerfError::Io { during: "asking the broker", source })
    }

    /// Waits for the method `expected`, and lets `read` take what it needs of its arguments.
    fn reply<T>(
        &mut self,
        reader: &mut FrameReader,
        expected: MethodId,
        read: impl Fn(&[u8]) -> Result<T, PerfError>,
    ) -> Result<T, PerfError> {
        let during = "waiting for an answer";
        let give_up = Instant::now() + PROGRESS_LIMIT;
        loop {
            while let Some(frame) = reader.next_frame()? {
                if let Frame::Method { id, arguments, .. } = frame {
                    if id == expected {
                        return read(arguments);
                    }
                    notice(id, arguments)?;
                }
            }
            match reader.fill(&mut self.stream) {
                Ok(0) => return Err(PerfError::Disconnected { during }),
                Ok(_) => {}
                Err(error) if is_not_yet(&error) && Instant::now() < give_up => {}
                Err(error) if is_not_yet(&error) => {
                    return Err(PerfError::Stalled { during, seconds: PROGRESS_LIMIT.as_secs() });
                }
                Err(source) => return Err(PerfError::Io { during, source }),
            }
        }
    }
}

fn connect(address: SocketAddr, source: Option<IpAddr>) -> io::Result<TcpStream> {
    let Some(source) = source else {
        return prepare(TcpStream::connect_timeout(&address, CONNECT_LIMIT)?);
    };
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.bind(&SocketAddr::new(source, 0).into())?;
    socket.connect_timeout(&address.into(), CONNECT_LIMIT)?;
    prepare(socket.into())
}
