//! The program. Everything is in the library; see [`leveret::cli`].

use std::process::ExitCode;

/// One allocator for Rust and RocksDB. A broker's memory is a tide of chunks and buffers; this one gives the ebb back to the
/// system within seconds, where the C library's keeps it.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Read by the allocator at start: few arenas for few threads, unused pages returned after a third of a second, and what is
/// as large as a round (but no body that is common) returned at once.
#[expect(non_upper_case_globals, reason = "the symbol the allocator looks for")]
#[unsafe(export_name = "malloc_conf")]
pub static malloc_conf: &[u8] =
    b"narenas:2,dirty_decay_ms:300,muzzy_decay_ms:0,oversize_threshold:2097152,background_thread:true,tcache_max:4096\0";

fn main() -> ExitCode {
    leveret::cli::main()
}
