//! Figures of the subcommands, for people and as JSON.

use std::time::Duration;

use serde::Serialize;

use super::meter::Latencies;
use super::process::ProcessSample;
use super::report::grouped;

/// Percentiles of a histogram that has something in it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Percentiles {
    pub(super) samples: u64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    pub(super) p999_us: f64,
    pub(super) max_us: f64,
}

impl Percentiles {
    pub(super) fn of(latencies: &Latencies) -> Option<Self> {
        let us = |ns: u64| ns as f64 / 1e3;
        (latencies.count() > 0).then(|| Self {
            samples: latencies.count(),
            p50_us: us(latencies.at_quantile_ns(0.5)),
            p99_us: us(latencies.at_quantile_ns(0.99)),
            p999_us: us(latencies.at_quantile_ns(0.999)),
            max_us: us(latencies.max_ns()),
        })
    }

    pub(super) fn text(&self) -> String {
        let Self { p50_us, p99_us, p999_us, max_us, .. } = self;
        let [p50, p99, p999, max] = [p50_us, p99_us, p999_us, max_us].map(|us| duration(*us));
        format!("p50 {p50}   p99 {p99}   p99.9 {p999}   max {max}")
    }
}

/// CPU time that a process used from one sample to a later one.
pub(super) fn cpu_between(before: &ProcessSample, after: &ProcessSample) -> Duration {
    after.cpu.saturating_sub(before.cpu)
}

/// How often in a second; 0 where there was no time.
pub(super) fn per_second(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}

pub(super) fn duration(us: f64) -> String {
    match us {
        us if us < 1e3 => format!("{} µs", significant(us)),
        us if us < 1e6 => format!("{} ms", significant(us / 1e3)),
        us => format!("{} s", significant(us / 1e6)),
    }
}

/// A number of bytes, which may be negative, in the unit that suits it.
pub(super) fn bytes(bytes: f64) -> String {
    match bytes.abs() {
        size if size < 1024.0 => format!("{bytes:.0} B"),
        size if size < 1024.0 * 1024.0 => format!("{:.1} KiB", bytes / 1024.0),
        _ => format!("{:.1} MiB", bytes / (1024.0 * 1024.0)),
    }
}

/// Rounded down, so that only what is complete says so.
pub(super) fn percent(share: f64) -> String {
    let tenths = (share * 1e3).floor() / 10.0;
    if tenths.fract() == 0.0 { format!("{tenths:.0} %") } else { format!("{tenths:.1} %") }
}

/// Three significant digits, without an exponent.
pub(super) fn significant(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => grouped(value),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 1.0 => format!("{value:.2}"),
        size if size >= 0.1 => format!("{value:.3}"),
        size if size >= 0.01 => format!("{value:.4}"),
        _ => format!("{value:.5}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_and_only_what_is_complete_is_a_hundred_percent() {
        assert_eq!(
            [0.001_234, 0.059_84, 0.5, 1.0, 18.5, 154.2, 1_540.0].map(significant),
            ["0.00123", "0.0598", "0.500", "1.00", "18.5", "154", "1,540"]
        );
        assert_eq!([1.0, 0.999_99, 0.5, 3.0].map(percent), ["100 %", "99.9 %", "50 %", "300 %"]);
        assert_eq!([12.34, 1_500.0, 2e6].map(duration), ["12.3 µs", "1.50 ms", "2.00 s"]);
        assert_eq!([-2_048.0, 512.0, 3e6].map(bytes), ["-2.0 KiB", "512 B", "2.9 MiB"]);
    }

    #[test]
    fn percentiles_need_a_sample() {
        let mut latencies = Latencies::new();
        assert_eq!(Percentiles::of(&latencies), None);
        latencies.record(2_000_000, 10);
        let percentiles = Percentiles::of(&latencies).expect("ten");
        assert_eq!(percentiles.samples, 10);
        assert!(percentiles.text().starts_with("p50 2.00 ms   p99 2.00 ms"), "{}", percentiles.text());
    }
}
