//! Memory and disk over time.

use std::path::Path;

/// One look at the broker.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    pub at_seconds: u64,
    pub resident_kib: u64,
    pub disk_kib: u64,
}

/// What a directory takes up on disk, in KiB.
pub fn disk_kib(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() => disk_kib(&entry.path()),
        Ok(metadata) => metadata.blocks() / 2,
        Err(_) => 0, // removed since
    });
    sizes.sum()
}

fn in_minute(samples: &[Sample], minute: u64, of: impl Fn(&Sample) -> u64) -> Vec<u64> {
    let mut values: Vec<u64> = samples.iter().filter(|sample| sample.at_seconds / 60 == minute).map(of).collect();
    values.sort_unstable();
    values
}

/// The middle of a minute's samples; load comes in bursts, and a minute has several.
pub fn resident_kib(samples: &[Sample], minute: u64) -> u64 {
    let values = in_minute(samples, minute, |sample| sample.resident_kib);
    values.get(values.len() / 2).copied().unwrap_or(0)
}

/// The least of a minute's samples: what is above it waits to be compacted, more or less of it by the disk's other work.
pub fn least_disk_kib(samples: &[Sample], minute: u64) -> u64 {
    in_minute(samples, minute, |sample| sample.disk_kib).first().copied().unwrap_or(0)
}

/// Complains if `then` and `now` are further apart than a tenth and `slack_kib`.
pub fn compare(what: &str, then: u64, now: u64, slack_kib: u64, errors: &mut Vec<String>) {
    let allowed = then / 10 + slack_kib;
    let verdict = if now.abs_diff(then) <= allowed { "" } else { ": TOO FAR APART" };
    let text = format!(
        "{what}: {} MiB at the end, {} MiB in the minute it is compared with, {} MiB apart are allowed{verdict}",
        now >> 10,
        then >> 10,
        allowed >> 10
    );
    println!("{text}");
    if !verdict.is_empty() {
        errors.push(text);
    }
}
