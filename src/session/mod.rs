//! The protocol without sockets: handshake, channels, methods, deliveries and confirms of one connection.
//!
//! [`Session`] takes bytes in and acts on the broker; what goes out is gathered in its [`Outbox`], into which queues also
//! deliver from other connections' threads. `net` moves the bytes.

mod assembler;
mod channel;
mod channel_map;
mod close;
mod confirms;
mod connection;
mod events;
mod frames;
mod handshake;
mod methods;
mod outbox;
mod publish;
mod settle;
mod tx;
mod unacked;
mod write_buffer;

pub use self::{
    close::CloseReason,
    connection::{ConnectionContext, Phase, Session, SessionLimits, Step},
    events::Endpoints,
    handshake::{HeaderAnswer, judge_header},
    outbox::Outbox,
    write_buffer::{WriteBuffer, WriteCursor},
};

/// For benchmarks.
#[doc(hidden)]
pub use self::channel::RouteCache;
