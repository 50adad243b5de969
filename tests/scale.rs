//! What queues with rules cost when there is much in them, beside plain queues in the same run. Right answers are demanded
//! always; rates, lateness and memory are printed, and demanded in the long form.
//!
//! `make scale` (`SCALE=full`) runs the long form, one at a time on a machine that does nothing else. `LEVERET_BIN` puts
//! another build to the test.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

#[path = "crash/broker.rs"]
mod broker;
#[path = "scale/checkpoint.rs"]
mod checkpoint;
#[path = "crash/client.rs"]
mod client;
#[path = "scale/delays.rs"]
mod delays;
#[path = "scale/figures.rs"]
mod figures;
#[path = "scale/groups.rs"]
mod groups;
#[path = "scale/priorities.rs"]
mod priorities;
#[path = "scale/streams.rs"]
mod streams;
#[path = "scale/wire.rs"]
mod wire;
