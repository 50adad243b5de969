//! What is fuzzed, driven by bytes: `fuzz_targets/` lets libFuzzer choose them, `tests/fuzz.rs` a plain random number
//! generator (it includes this file), so that ten minutes of it need no nightly compiler.
//!
//! Every public function here panics when the broker does something it must not.

mod choices;
mod connections;
mod directories;
mod lab;
mod properties;
mod records;
mod tables;
mod traffic;

pub use choices::Choices;
pub use connections::frames;
pub use directories::{empty, fill};
pub use lab::Lab;
pub use properties::properties;
pub use records::records;
pub use tables::tables;

const FRAME_MAX: u32 = 8192;
const MAX_MESSAGE_BYTES: u64 = 70_000;
