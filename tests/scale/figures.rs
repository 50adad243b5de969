//! Long or short, what was measured, and whether that is good enough.

#![allow(dead_code, reason = "several test programs share it, and each uses a part")]

use std::{
    sync::{Mutex, MutexGuard},
    time::{Duration, Instant},
};

use super::{broker::Broker, client::Client};

/// Measurements do not run beside each other.
static ALONE: Mutex<()> = Mutex::new(());

pub fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

pub fn is_full() -> bool {
    std::env::var("SCALE").is_ok_and(|scale| scale == "full")
}

pub fn scaled<T>(full: T, short: T) -> T {
    if is_full() { full } else { short }
}

/// A broker on a directory of its own.
pub struct Place {
    pub broker: Broker,
    pub directory: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Place {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let broker = Broker::start(&directory.path().join("data"), &[]).expect("starts");
        Place { broker, directory }
    }

    pub fn client(&self) -> Client {
        Client::connect(self.broker.address).expect("connects")
    }

    pub fn resident_mib(&self) -> f64 {
        self.broker.resident_kib() as f64 / 1024.0
    }
}

/// Processor time of a process, in user and system mode.
pub fn cpu(pid: u32) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Behind the name, which may hold anything; `utime` and `stime` are fields 14 and 15, in hundredths of a second.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
    Duration::from_millis(10 * (ticks(11) + ticks(12)))
}

/// How long something took, by the clock and of the broker's processor time.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    pub messages: u64,
    pub took: Duration,
    pub cpu: Duration,
}

impl Cost {
    pub fn of(pid: u32, messages: u64, work: impl FnOnce()) -> Cost {
        let (began, cpu_before) = (Instant::now(), cpu(pid));
        work();
        Cost { messages, took: began.elapsed(), cpu: cpu(pid) - cpu_before }
    }

    pub fn rate(&self) -> f64 {
        self.messages as f64 / self.took.as_secs_f64()
    }

    pub fn text(&self) -> String {
        let cpu_us = self.cpu.as_secs_f64() * 1e6 / self.messages as f64;
        format!("{:.0}/s ({cpu_us:.2} us of the broker's processor time each)", self.rate())
    }
}

/// The best of several runs: other work on the machine only ever makes them slower.
pub fn best(costs: &[Cost]) -> Cost {
    *costs.iter().max_by(|a, b| a.rate().total_cmp(&b.rate())).expect("one at least")
}

/// Values of which the small ones are good.
pub fn percentiles(values: &mut [f64]) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    let at = |part: f64| values.get(((values.len() as f64 * part) as usize).min(values.len() - 1)).copied();
    (at(0.5).unwrap_or(0.0), at(0.99).unwrap_or(0.0), at(1.0).unwrap_or(0.0))
}

/// Demands something in the long form, and says how it stands in the short one.
pub fn demand(what: &str, is_met: bool) {
    println!("  {} {what}", if is_met { "met:" } else { "NOT MET:" });
    assert!(is_met || !is_full(), "not met: {what}");
}

/// The greatest resident memory while something goes on, in MiB.
pub fn watch_resident(place: &Place, mut goes_on: impl FnMut() -> bool) -> f64 {
    let mut most = place.resident_mib();
    while goes_on() {
        most = most.max(place.resident_mib());
        std::thread::sleep(Duration::from_millis(20));
    }
    most.max(place.resident_mib())
}
