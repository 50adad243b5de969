#![no_main]

use std::sync::LazyLock;

use leveret_fuzz::{Lab, frames};

static LAB: LazyLock<Lab> = LazyLock::new(Lab::new);

libfuzzer_sys::fuzz_target!(|data: &[u8]| frames(&LAB, data));
