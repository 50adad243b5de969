//! What the broker's process costs, as the kernel accounts for it under `/proc`.

use std::fs;
use std::io;
use std::time::Duration;

use super::error::PerfError;
use super::posix;

/// One reading of a process's accounts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ProcessSample {
    /// User and system time of all threads, those that ended included.
    pub(super) cpu: Duration,
    pub(super) resident_bytes: u64,
    /// Highest since the process started.
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
    fn our_own_process_can_be_read_and_a_missing_one_is_named() {
        let own = ProcessSample::take(std::process::id()).expect("exists");
        assert!(own.resident_bytes > 0 && own.peak_resident_bytes >= own.resident_bytes);
        let missing = ProcessSample::take(u32::MAX).expect_err("no such process").to_string();
        assert!(missing.contains("/proc/4294967295/stat"), "{missing}");
    }
}
