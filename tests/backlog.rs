//! What a backlog costs: memory, disk, bytes written, the time of a start, and how long its return takes. Right answers are
//! demanded always; figures are printed, and demanded in the long form.
//!
//! `make scale` (`SCALE=full`) runs the long form, one at a time on a machine that does nothing else. `LEVERET_BIN` puts
//! another build to the test, `BACKLOG=100000000` makes the first test's queue that long.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

#[path = "crash/broker.rs"]
mod broker;
#[path = "crash/client.rs"]
mod client;
#[path = "backlog/confirms.rs"]
mod confirms;
#[path = "backlog/disk.rs"]
mod disk;
#[path = "scale/figures.rs"]
mod figures;
#[path = "backlog/memory.rs"]
mod memory;
#[path = "backlog/queues.rs"]
mod queues;
#[path = "backlog/requeue.rs"]
mod requeue;
#[path = "backlog/support.rs"]
mod support;
#[path = "scale/wire.rs"]
mod wire;
