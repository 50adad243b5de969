//! What can end a load run, in words for the person who started it.

use std::io;
use std::net::SocketAddr;

use super::wire::WireError;

/// Why a load run could not start, or was cut short.
#[derive(Debug, thiserror::Error)]
pub enum PerfError {
    /// The options contradict each other or are out of range.
    #[error("{0}")]
    Usage(String),
    /// No address of the host accepted a connection.
    #[error("cannot connect to {address}: {source}")]
    Connect { address: String, source: io::Error },
    /// The floor's address is taken or not this machine's.
    #[error("cannot listen on {address}: {source}; choose another one with --listen")]
    Listen { address: SocketAddr, source: io::Error },
    /// A socket failed while it was in use.
    #[error("connection failed while {during}: {source}")]
    Io { during: &'static str, source: io::Error },
    /// The broker ended the stream without a word.
    #[error("the broker closed the connection while {during}")]
    Disconnected { during: &'static str },
    /// The broker sent `connection.close`.
    #[error("the broker closed the connection: {code} {text}")]
    ConnectionClosed { code: u16, text: String },
    /// The broker sent `channel.close`.
    #[error("the broker closed the channel: {code} {text}")]
    ChannelClosed { code: u16, text: String },
    /// The broker sent `basic.cancel`.
    #[error("the broker cancelled the consumer of queue '{queue}'")]
    Cancelled { queue: String },
    /// Nothing moved for so long that waiting on is pointless.
    #[error("no progress for {seconds} s while {during}")]
    Stalled { during: &'static str, seconds: u64 },
    /// The broker's bytes are not the protocol.
    #[error("the broker broke the protocol: {0}")]
    Wire(#[from] WireError),
    /// The broker's process cannot be read under `/proc`.
    #[error("cannot read {path}: {source}")]
    Process { path: String, source: io::Error },
    /// A local resource (thread, output) failed.
    #[error("{what}: {source}")]
    Local { what: &'static str, source: io::Error },
    /// A worker thread panicked; the panic itself is on standard error.
    #[error("a worker thread panicked")]
    WorkerPanicked,
}
