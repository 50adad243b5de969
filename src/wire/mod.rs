//! Bytes to frames and back. Knows the grammar of AMQP 0-9-1 and nothing of what the frames mean.
//!
//! The hot methods (`basic.publish`, `basic.ack`, `basic.nack`, `basic.reject`, `basic.get`, content headers, bodies) are
//! borrowed views over the read buffer ([`hot`]); every other method goes through `amq-protocol` ([`method`]), after
//! [`limits`] has bounded what a peer can make that parser do.

pub mod encode;
pub mod frame;
pub mod hot;
pub mod limits;
pub mod method;

pub use frame::{Frame, FrameHead, Scan, scan};
