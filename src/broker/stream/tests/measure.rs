//! Measurements, run by hand: `cargo test --release --lib -- --ignored --nocapture stream::tests::measure`.
