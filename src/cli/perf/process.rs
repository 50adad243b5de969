//! What the broker's process costs, as the kernel accounts for it under `/proc`.

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use super::error::PerfError;
use super::posix;

/// One reading of a process's accounts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ProcessSample {
    /// User and system time of all threads, those that ended included.
    pub(super) cpu: Duration,
    pub(super) resident_bytes: u64,
    /// Highest since the process started, or since [`ProcessWatch`] cleared it.
    pub(super) peak_resident_bytes: u64,
    /// `None` where the kernel does not let us see it.
    pub(super) written_bytes: Option<u64>,
}

impl ProcessSample {
    /// Reads the accounts of process `pid`.
    pub(super) fn take(pid: u32) -> Result<Self, PerfError> {
        let read = |file: &str| {
            let path = format!("/proc/{pid}/{file}");
            fs::read_to_string(&path).map_err(|source| PerfError::Process { path, source })
        };
        let (stat, status) = (read("stat")?, read("status")?);
        let ticks = cpu_ticks(&stat).ok_or_else(|| PerfError::Process {
            path: format!("/proc/{pid}/stat"),
            source: io::Error::from(io::ErrorKind::InvalidData),
        })?;
        Ok(Self {
            cpu: Duration::from_secs_f64(ticks as f64 / posix::clock_ticks_per_second() as f64),
            resident_bytes: field(&status, "VmRSS:").unwrap_or(0) << 10,
            peak_resident_bytes: field(&status, "VmHWM:").unwrap_or(0) << 10,
            written_bytes: read("io").ok().and_then(|io| field(&io, "write_bytes:")),
        })
    }
}

/// Between two looks at the resident memory.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// Written to `clear_refs`: the highest resident size starts anew, and nothing else changes.
const CLEAR_PEAK: &str = "5";

/// What a process used in a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ProcessUse {
    pub(super) cpu: Duration,
    /// At the end.
    pub(super) resident_bytes: u64,
    /// Highest meanwhile.
    pub(super) peak_resident_bytes: u64,
    pub(super) written_bytes: Option<u64>,
}

/// A process that is being watched.
#[derive(Debug)]
pub(super) struct ProcessWatch {
    pid: u32,
    before: ProcessSample,
    /// Whether the kernel counts the highest resident size from the beginning of the watch.
    peak_is_cleared: bool,
    highest_seen_bytes: u64,
    last_look: Instant,
}

impl ProcessWatch {
    /// Begins to watch process `pid`.
    pub(super) fn begin(pid: u32) -> Result<Self, PerfError> {
        // Only its owner may; where it fails, looking often enough has to do.
        let peak_is_cleared = fs::write(format!("/proc/{pid}/clear_refs"), CLEAR_PEAK).is_ok();
        let before = ProcessSample::take(pid)?;
        let highest_seen_bytes = before.resident_bytes;
        Ok(Self { pid, before, peak_is_cleared, highest_seen_bytes, last_look: Instant::now() })
    }

    /// Looks at the resident memory, if it is time to.
    pub(super) fn look(&mut self) {
        if self.peak_is_cleared || self.last_look.elapsed() < LOOK_INTERVAL {
            return;
        }
        self.last_look = Instant::now();
        if let Ok(status) = fs::read_to_string(format!("/proc/{}/status", self.pid)) {
            self.highest_seen_bytes = self.highest_seen_bytes.max(field(&status, "VmRSS:").unwrap_or(0) << 10);
        }
    }

    /// Adds up what was used since the beginning.
    pub(super) fn end(self) -> Result<ProcessUse, PerfError> {
        let after = ProcessSample::take(self.pid)?;
        let seen = self.highest_seen_bytes.max(after.resident_bytes);
        let written = after.written_bytes.zip(self.before.written_bytes);
        Ok(ProcessUse {
            cpu: after.cpu.saturating_sub(self.before.cpu),
            resident_bytes: after.resident_bytes,
            peak_resident_bytes: if self.peak_is_cleared { seen.max(after.peak_resident_bytes) } else { seen },
            written_bytes: written.map(|(after, before)| after.saturating_sub(before)),
        })
    }
}

/// Fields 14 and 15; counted from behind the command, which may hold spaces and parentheses.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    Some(ticks()? + ticks()?)
}

fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name))?.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_behind_any_command_name() {
        let stat = "7 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 250 50 0 0 20 0 1 0";
        assert_eq!(cpu_ticks(stat), Some(300));
        assert_eq!(cpu_ticks("7 (short) S 1"), None);
    }

    #[test]
    fn the_peak_of_a_watch_has_what_was_held_meanwhile() {
        let mut watch = ProcessWatch::begin(std::process::id()).expect("exists");
        let before = watch.highest_seen_bytes;
        let held = std::hint::black_box(vec![1_u8; 64 << 20]);
        watch.last_look -= LOOK_INTERVAL;
        watch.look();
        drop(held);
        assert!(watch.end().expect("exists").peak_resident_bytes >= before + (32 << 20));
    }

    #[test]
    fn our_own_process_can_be_read_and_a_missing_one_is_named() {
        let own = ProcessSample::take(std::process::id()).expect("exists");
        assert!(own.resident_bytes > 0 && own.peak_resident_bytes >= own.resident_bytes);
        let missing = ProcessSample::take(u32::MAX).expect_err("no such process").to_string();
        assert!(missing.contains("/proc/4294967295/stat"), "{missing}");
    }
}
