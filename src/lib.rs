//! Leveret, an AMQP 0-9-1 message broker.
//!
//! # The picture
//! ```text
//!  socket ─ net::reader ─ session ─ broker (route, append, deliver) ─ outbox ─ net::writer ─ socket
//!                                        │ dirty                        ▲ confirms
//!                                        ▼                              │
//!                                  store: rounds ── one watermark ──────┘
//! ```
//! A connection's reader task runs a whole read to completion: it parses, routes, appends to queues and delivers into
//! the outboxes of consumers, with no task switch a message. The store's commit thread gathers what queues changed,
//! writes it as one batch, syncs once and moves the watermark; confirms follow the watermark.
//!
//! # Layout
//! - [`wire`]: bytes to frames and back. [`session`]: the protocol, without sockets. [`net`]: the sockets.
//! - [`broker`]: exchanges, queues and rules, without frames. [`store`]: bytes, ids and rounds, without AMQP.
//! - [`model`]: plain values. [`auth`]: users and permissions. [`config`], [`clock`], [`telemetry`]: leaves.
//! - [`control`]: the operator's socket, behind `leveret ctl`.
//! - [`server`] puts them together; [`cli`] is the command line.
//!
//! `tests/layering.rs` holds who may import whom.
//!
//! # Locks
//! Always in this order, never over an `.await`:
//! 1. the store's atomic section (transactions hold it for reading while they apply),
//! 2. a vhost's topology,
//! 3. one queue's state,
//! 4. one connection's outbox,
//! 5. leaves: the store's dirty list and waiters, counters, pools.
//!
//! A settlement reads the unacked ring under the outbox lock, lets go, then takes queue locks run by run. What a queue
//! wants done elsewhere is collected while it is locked (`broker::Effects`) and carried out after.

pub mod auth;
pub mod broker;
pub mod cli;
pub mod clock;
pub mod config;
pub mod control;
pub mod model;
pub mod net;
pub mod server;
pub mod session;
pub mod store;
pub mod telemetry;
pub mod wire;
