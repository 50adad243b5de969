//! The hot functions for a count of their instructions, which is the same on a busy machine. `make instructions` runs this
//! under callgrind, which counts nothing but [`measured`] and writes a file after each call.
//!
//! A line on standard output for each of them tells the name and the messages of one run. Arguments choose those whose
//! names have one of them in it.

mod cases;

use std::{
    ffi::{c_uint, c_void},
    slice,
};

use cases::{CASES, Fixture, Work};

/// Runs before the one that counts: buffers have their sizes then, and everything is loaded.
const WARM_UP_RUNS: u32 = 5;

/// Takes the place of the C library's for all that seeds hash maps: maps are then filled alike in every run.
///
/// # Safety
/// As of the original: `out` points to `len` writable bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(out: *mut c_void, len: usize, _flags: c_uint) -> isize {
    // SAFETY: the caller's promise.
    let out = unsafe { slice::from_raw_parts_mut(out.cast::<u8>(), len) };
    for (byte, value) in out.iter_mut().zip((0..=u8::MAX).cycle()) {
        *byte = value.wrapping_mul(167).wrapping_add(13);
    }
    isize::try_from(len).unwrap_or(isize::MAX)
}

/// What callgrind looks for.
#[inline(never)]
fn measured(work: &mut dyn Work) {
    work.run();
}

fn main() {
    let chosen: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let fixture = Fixture::default();
    for case in CASES {
        if !chosen.is_empty() && !chosen.iter().any(|part| case.name.contains(part.as_str())) {
            continue;
        }
        let mut work = (case.build)(&fixture);
        for _ in 0..WARM_UP_RUNS {
            work.prepare();
            work.run();
        }
        work.prepare();
        measured(&mut *work);
        println!("{}\t{}", case.name, case.messages);
    }
}
