//! The write-ahead logs that hold what is in no table yet.
//!
//! RocksDB replays them up to the first damage and drops the rest. After a crash that is right: a torn end was never
//! confirmed. But where intact records follow, or the mirror has noted that more had been synced, it is damage, and what
//! follows was confirmed. Then the logs are written anew with all that can be read, before RocksDB sees them.

use std::io;
use std::path::Path;

use super::batch::{self, FamilyNames, Lost, salvage};
use super::logfile::{self, Record, Walk};
use super::manifest::file_names;
use super::version::Version;
use super::{Finding, Loss, read_optional};

/// What the logs hold.
#[derive(Debug, Default)]
pub struct Logs {
    pub findings: Vec<Finding>,
    /// Logs by number as they have to be for RocksDB to read all there is; none if it can as they are.
    pub healed: Vec<(u64, Vec<u8>)>,
    pub losses: Vec<Loss>,
}

/// The file name of a log.
pub fn name(number: u64) -> String {
    format!("{number:06}.log")
}

/// Reads the live logs. `noted` is the last sequence number of which the mirror knows that it was synced.
///
/// # Errors
/// Of the file system.
///
/// # Cost
/// One pass over the logs, which are held in memory one at a time.
pub fn inspect(directory: &Path, version: &Version, noted: Option<u64>) -> io::Result<Logs> {
    let numbers = live_logs(directory, version)?;
    let mut logs = Logs::default();
    let mut expected = Expected { next: None, in_tables: version.last_sequence };
    let mut is_whole = true;
    let beginnings = beginnings(directory, &numbers)?;
    for &number in &numbers {
        let Some(data) = read_optional(&directory.join(name(number)))? else { continue };
        let follows = following(&beginnings, number);
        is_whole &= expected.pass(&data, &logfile::walk(&data, Some(number)), noted, follows);
    }
    let end = expected.next.unwrap_or(version.last_sequence + 1).max(version.last_sequence + 1);
    let missing = noted.map_or(0, |noted| (noted + 1).saturating_sub(end));
    if is_whole && missing == 0 {
        return Ok(logs);
    }
    heal(directory, &numbers, version, noted, &mut logs)?;
    Ok(logs)
}

/// The sequence numbers that logs with anything in them begin with.
fn beginnings(directory: &Path, numbers: &[u64]) -> io::Result<Vec<(u64, u64)>> {
    let mut beginnings = Vec::new();
    for &number in numbers {
        let Some(data) = read_optional(&directory.join(name(number)))? else { continue };
        let walk = logfile::walk(&data, Some(number));
        let first = walk.records[..walk.proven()].iter().find(|record| !record.damaged);
        beginnings.extend(first.and_then(|record| record.head(&data)).map(|head| (number, head_of(&head).0)));
    }
    Ok(beginnings)
}

/// What the next log begins with that has anything in it.
///
/// When that is the number that a torn end before it should have had, the end was thrown away by a start: it had never been
/// synced, and its number was given out again.
fn following(beginnings: &[(u64, u64)], number: u64) -> Option<u64> {
    beginnings.iter().find(|(log, _)| *log > number).map(|(_, sequence)| *sequence)
}

fn live_logs(directory: &Path, version: &Version) -> io::Result<Vec<u64>> {
    let names = file_names(directory)?;
    let numbers = names.iter().filter_map(|name| name.strip_suffix(".log")?.parse().ok());
    let mut live: Vec<u64> = numbers.filter(|number| *number >= version.first_live_log()).collect();
    live.sort_unstable();
    Ok(live)
}

/// Follows sequence numbers from record to record and from log to log.
struct Expected {
    next: Option<u64>,
    /// What tables have, and more is in the logs, if any.
    in_tables: u64,
}

impl Expected {
    /// Whether a log goes on where the one before ended, and has no damage.
    fn pass(&mut self, data: &[u8], walk: &Walk, noted: Option<u64>, follows: Option<u64>) -> bool {
        let mut whole = !walk.records[..walk.proven()].iter().any(|record| record.damaged);
        for record in &walk.records[..walk.proven()] {
            let Some((sequence, count)) = record.head(data).map(|head| head_of(&head)) else {
                whole = false;
                continue;
            };
            whole &= record.damaged || self.next.is_none_or(|next| next == sequence);
            if !record.damaged {
                self.next = Some(sequence + u64::from(count));
            }
        }
        if walk.torn.is_some() || walk.proven() < walk.records.len() {
            let sequence = self.next.unwrap_or(self.in_tables + 1);
            whole &= match follows {
                Some(follows) => follows == sequence,
                None => noted.is_none_or(|noted| noted < sequence),
            };
        }
        whole
    }
}

fn head_of(head: &[u8; batch::HEADER_BYTES]) -> (u64, u32) {
    let (sequence, count) = head.split_at(8);
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |number, byte| number << 8 | u64::from(*byte));
    (number(sequence), number(count) as u32)
}

fn heal(directory: &Path, numbers: &[u64], version: &Version, noted: Option<u64>, logs: &mut Logs) -> io::Result<()> {
    let names: FamilyNames = version.families.iter().map(|(id, family)| (*id, family.name.clone())).collect();
    let (mut next, mut floor) = (None, 0);
    let mut last = None;
    let beginnings = beginnings(directory, numbers)?;
    for &number in numbers {
        let Some(data) = read_optional(&directory.join(name(number)))? else { continue };
        let walk = logfile::walk(&data, Some(number));
        let (out, damage) = (Vec::with_capacity(walk.end), String::new());
        let mut log = HealedLog { number, names: &names, next, floor, noted, out, damage };
        let (proven, unproven) = walk.records.split_at(walk.proven());
        for (at, record) in proven.iter().enumerate() {
            let following = walk.records[at + 1..].iter().find(|record| !record.damaged);
            let following = following.and_then(|record| record.head(&data)).map(|head| head_of(&head).0);
            log.take(&data, record, following, logs);
        }
        for record in unproven.iter().chain(&walk.torn) {
            let expected = log.next.unwrap_or(version.last_sequence + 1);
            // Before another log, it was written whole, or thrown away; at the very end, only the mirror can tell.
            let was_synced = match following(&beginnings, number) {
                Some(follows) => follows != expected,
                None => noted.is_some_and(|noted| noted >= expected),
            };
            if was_synced {
                log.take(&data, record, None, logs);
            }
        }
        (next, floor) = (log.next, log.floor);
        if !log.damage.is_empty() {
            let repair = "the log is written anew with all that can be read, which any start does by itself";
            logs.findings.push(Finding::healing(&name(number), &log.damage, repair));
        }
        last = Some(number);
        logs.healed.push((number, log.out));
    }
    let end = next.unwrap_or(0).max(version.last_sequence + 1);
    let missing = noted.map_or(0, |noted| (noted + 1).saturating_sub(end));
    if missing > 0 {
        let what = format!("its end is missing: {missing} entries that were synced, from number {end} on");
        let file = last.map_or_else(|| "*.log".to_owned(), name);
        logs.findings.push(Finding::healing(&file, &what, "what was in it is lost"));
        logs.losses.push(Loss::LogEnd { entries: missing });
    }
    Ok(())
}

struct HealedLog<'a> {
    number: u64,
    names: &'a FamilyNames,
    /// The sequence number that the next batch should have.
    next: Option<u64>,
    /// The least that it may have: numbers must not go back.
    floor: u64,
    noted: Option<u64>,
    out: Vec<u8>,
    damage: String,
}

impl HealedLog<'_> {
    fn take(&mut self, data: &[u8], record: &Record, following: Option<u64>, logs: &mut Logs) {
        let bytes = record.bytes(data);
        let head = bytes.first_chunk().map(head_of).filter(|_| !record.headless);
        if let Some((sequence, count)) = head.filter(|_| !record.damaged) {
            let missing = self.next.map_or(0, |next| sequence.saturating_sub(next));
            if missing > 0 {
                self.describe(record.at, &format!("{missing} entries before it are missing"));
                logs.losses.push(Loss::LogEnd { entries: missing });
            }
            self.next = Some(sequence + u64::from(count));
            self.write(sequence, count, &bytes[batch::HEADER_BYTES..]);
            return;
        }
        let from = if record.headless { 0 } else { batch::HEADER_BYTES };
        let salvaged = salvage(&bytes, from, self.names);
        self.describe(record.at, &format!("a batch is damaged; {} of its entries are whole", salvaged.count));
        logs.losses.extend(salvaged.lost.into_iter().map(|lost| Loss::in_log(self.number, lost)));
        let latest = following.map(|following| following.saturating_sub(u64::from(salvaged.count)));
        let by_head =
            head.map(|(sequence, _)| sequence).filter(|sequence| latest.is_none_or(|latest| *sequence <= latest));
        let sequence = self.next.or(by_head).or(latest).unwrap_or(1);
        if salvaged.count > 0 {
            self.write(sequence, salvaged.count, &salvaged.entries);
        }
        // Its count is believed if its number is right; and a last batch was the one that was noted last.
        let counted = head.filter(|(found, _)| *found == sequence).map(|(_, count)| sequence + u64::from(count));
        self.next = following.or(counted).or(self.noted.map(|noted| self.floor.max(noted + 1)));
    }

    fn write(&mut self, sequence: u64, count: u32, entries: &[u8]) {
        let sequence = sequence.max(self.floor);
        let mut batch = Vec::with_capacity(batch::HEADER_BYTES + entries.len());
        batch.extend_from_slice(&sequence.to_le_bytes());
        batch.extend_from_slice(&count.to_le_bytes());
        batch.extend_from_slice(entries);
        logfile::append(&mut self.out, &batch);
        self.floor = sequence + u64::from(count);
    }

    fn describe(&mut self, at: usize, what: &str) {
        const LONGEST: usize = 2000;
        if self.damage.len() < LONGEST {
            let separator = if self.damage.is_empty() { "" } else { "; " };
            self.damage.push_str(&format!("{separator}at byte {at} {what}"));
        }
    }
}

impl Loss {
    fn in_log(number: u64, lost: Lost) -> Loss {
        let file = name(number);
        match lost {
            Lost::Records(queue, first) => Loss::Run { file, queue, first },
            Lost::Entry(family, key) => Loss::Entry { file, family, key },
            Lost::Bytes(bytes) => Loss::Bytes { file, bytes: bytes as u64 },
        }
    }
}
