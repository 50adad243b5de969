//! The `leveret` program. Everything is in the library; see [`leveret::cli`].

fn main() -> std::process::ExitCode {
    leveret::cli::main()
}
