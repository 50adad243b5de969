//! Sockets: the accept loop, a reader and a writer task a connection, and the one task that keeps time for all of them.

mod connection;
mod listener;
mod registry;
mod timers;
mod writer;

pub use self::{
    connection::Shared,
    listener::{Listener, raise_file_limit},
    registry::Registry,
    timers::{keep_deadlines, keep_events, keep_time},
};
