//! Damage: what is wrong with the files of a data directory, and what can be done about it.
//!
//! # What is found where
//! | What | Found | What happens |
//! |---|---|---|
//! | write-ahead log | at every start | the start writes it anew with all that can be read |
//! | CURRENT, MANIFEST | at every start | the start refuses; [`repair`](super::repair) has the mirror |
//! | size of a table; size, header, footer of a blob file | at every start | the start refuses; repair mends |
//! | blocks of tables | at start for the latest [`TABLE_BYTES_AT_START`], in the background for the others | the same |
//! | values in blob files, records | when they are read | they are skipped |
//!
//! Everything is found by [`check`](super::check), which verifies every byte.
//!
//! # Why a start refuses
//! A table with a damaged block hides more than the block: RocksDB's iterators stop at it, whatever other tables have for the
//! same stretch of keys. And a compaction that meets it stops the database. Both are gone once the block is.
//!
//! # Elsewhere
//! Formats: `logfile` (logs and MANIFESTs), `version` (MANIFESTs' records), `batch`, `table`, `blob`. The mirror:
//! [`mirror`](super::mirror). What a repaired directory has lost: `contents`.

mod batch;
mod blob;
mod bytes;
mod contents;
mod logfile;
pub(super) mod manifest;
mod repair;
mod report;
mod table;
mod version;
mod wal;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::mirror::{self, write_whole};
use super::rocks::Rocks;
use super::{QueueId, QueueSeq, StoreError};
use manifest::Catalog;
use table::Condition;
use version::{BlobFile, Table};
use wal::Logs;

pub(super) use contents::log_owners;
pub use repair::{check, repair};
pub use report::{DamageReport, Finding, Loss, QueueLoss};

/// Of the latest tables, so many bytes are verified before a start; that takes a few hundredths of a second.
pub const TABLE_BYTES_AT_START: u64 = 64 * 1024 * 1024;

/// A table that is damaged or missing.
#[derive(Debug)]
struct BadTable {
    family: u64,
    family_name: String,
    number: u64,
    table: Table,
    condition: Condition,
}

/// A blob file without which, or parts of which, values cannot be read.
#[derive(Debug)]
struct BadBlobFile {
    family: u64,
    number: u64,
    known: BlobFile,
}

/// What was found in a directory.
#[derive(Debug, Default)]
struct Inspection {
    catalog: Catalog,
    logs: Logs,
    /// Where queues ended, if the end of the logs is missing.
    noted_tails: BTreeMap<QueueId, QueueSeq>,
    tables: Vec<BadTable>,
    /// Those that cannot be opened; files with single damaged values are in `findings` only.
    blobs: Vec<BadBlobFile>,
    findings: Vec<Finding>,
    files: u64,
    bytes: u64,
    /// Tables that were too much for a start.
    unverified: Vec<(u64, Table)>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Depth {
    Start,
    Everything,
}

/// The tables that a start has left for later.
pub(super) type Unverified = Vec<(u64, Table)>;

/// Looks through a directory before it is opened, and heals the write-ahead log.
///
/// # Errors
/// [`StoreError::Damaged`] for what only a repair can mend, [`StoreError::Open`] for failures of the file system.
pub(super) fn before_open(path: &Path) -> Result<(Vec<DamageReport>, Unverified), StoreError> {
    let failed = |error: io::Error| StoreError::Open { path: path.to_owned(), reason: error.to_string() };
    if path.join(repair::UNFINISHED).exists() {
        let reason = "a repair of it was cut short".to_owned();
        return Err(StoreError::Damaged { path: path.to_owned(), reason });
    }
    let inspection = match inspect(path, Depth::Start) {
        Ok(Some(inspection)) => inspection,
        Ok(None) => return Ok((Vec::new(), Vec::new())),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            return Err(StoreError::Damaged { path: path.to_owned(), reason: error.to_string() });
        }
        Err(error) => return Err(failed(error)),
    };
    let grave: Vec<_> = inspection.all_findings().filter(|finding| !finding.heals_at_start).collect();
    if let [first, others @ ..] = &grave[..] {
        let more = if others.is_empty() { String::new() } else { format!(" (and {} more)", others.len()) };
        let reason = format!("{}: {}{more}", first.file, first.what);
        return Err(StoreError::Damaged { path: path.to_owned(), reason });
    }
    let mut reports = Vec::new();
    if !inspection.logs.healed.is_empty() {
        let report = repair::heal_logs(path, &inspection).map_err(failed)?;
        for finding in &report.findings {
            tracing::error!(file = finding.file, "the write-ahead log is damaged: {}", finding.what);
        }
        for loss in &report.losses {
            tracing::error!("lost: {loss}");
        }
        reports.push(report);
    }
    Ok((reports, inspection.unverified))
}

/// Finishes what [`before_open`] has begun.
pub(super) fn after_open(path: &Path, rocks: &Rocks) -> Result<(), StoreError> {
    let mark = path.join(repair::UNMENDED);
    if mark.exists() {
        contents::mend_after_healing(rocks)?;
        rocks.sync().and_then(|()| fs::remove_file(mark).map_err(|error| rocks.open_error(error)))?;
    }
    Ok(())
}

/// Verifies tables that a start has left out; answers what is wrong with the first bad one.
pub(super) fn verify_later(path: &Path, tables: &Unverified, goes_on: &dyn Fn() -> bool) -> Option<(String, String)> {
    for (number, table) in tables {
        if !goes_on() {
            return None;
        }
        let name = table_name(*number);
        // Gone: a compaction has read all of it.
        let Ok(Some(data)) = read_optional(&path.join(&name)) else { continue };
        match table::inspect(&data, table.file_bytes) {
            Condition::Intact => {}
            Condition::Blocks(blocks) => return Some((name, format!("{} of its blocks are damaged", blocks.len()))),
            Condition::Unusable(reason) => return Some((name, reason)),
        }
    }
    None
}

/// Looks through the files of a directory. Nothing if it holds no database.
fn inspect(path: &Path, depth: Depth) -> io::Result<Option<Inspection>> {
    let Some(catalog) = manifest::read(path)? else { return Ok(None) };
    let noted = mirror::noted(path).unwrap_or_default();
    let sequence = (noted.sequence > 0).then_some(noted.sequence);
    let logs = wal::inspect(path, &catalog.version, sequence)?;
    let end_is_missing = logs.losses.iter().any(|loss| matches!(loss, Loss::LogEnd { .. }));
    let noted_tails = if end_is_missing { noted.tails } else { BTreeMap::new() };
    let mut inspection = Inspection { catalog, logs, noted_tails, ..Inspection::default() };
    inspection.inspect_tables(path, depth)?;
    inspection.inspect_blobs(path, depth)?;
    Ok(Some(inspection))
}

impl Inspection {
    fn all_findings(&self) -> impl Iterator<Item = &Finding> {
        self.catalog.findings.iter().chain(&self.logs.findings).chain(&self.findings)
    }

    fn inspect_tables(&mut self, path: &Path, depth: Depth) -> io::Result<()> {
        let families = &self.catalog.version.families;
        let mut tables: Vec<_> = families
            .iter()
            .flat_map(|(id, family)| family.tables.iter().map(move |(number, table)| (*number, *id, family, table)))
            .collect();
        tables.sort_unstable_by_key(|(number, ..)| std::cmp::Reverse(*number));
        let mut verified = 0;
        for (number, family, family_data, table) in tables {
            self.files += 1;
            let file = path.join(table_name(number));
            verified += table.file_bytes;
            let condition = if depth == Depth::Start && verified > TABLE_BYTES_AT_START {
                self.unverified.push((number, table.clone()));
                match fs::metadata(&file) {
                    Ok(data) if data.len() == table.file_bytes => Condition::Intact,
                    Ok(data) => wrong_size(data.len(), table.file_bytes),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => missing(),
                    Err(error) => return Err(error),
                }
            } else {
                match read_optional(&file)? {
                    Some(data) => {
                        self.bytes += data.len() as u64;
                        table::inspect(&data, table.file_bytes)
                    }
                    None => missing(),
                }
            };
            let (what, repair) = match &condition {
                Condition::Intact => continue,
                Condition::Blocks(blocks) => {
                    (format!("{} of its blocks are damaged", blocks.len()), "the blocks are taken out")
                }
                Condition::Unusable(reason) => {
                    (reason.clone(), "it is taken out, and what can be found of it is written anew")
                }
            };
            self.findings.push(Finding::new(&table_name(number), &what, repair));
            let family_name = family_data.name.clone();
            self.tables.push(BadTable { family, family_name, number, table: table.clone(), condition });
        }
        Ok(())
    }

    fn inspect_blobs(&mut self, path: &Path, depth: Depth) -> io::Result<()> {
        let families = &self.catalog.version.families;
        let files: Vec<_> =
            families.iter().flat_map(|(id, family)| family.live_blobs().map(|file| (*id, file))).collect();
        for (family, (number, known)) in files {
            self.files += 1;
            let file = path.join(blob_name(number));
            if let Some(what) = blob_fault(&file, family, &known)? {
                let repair = "it is mended as far as its values are there";
                self.findings.push(Finding::new(&blob_name(number), &what, repair));
                self.blobs.push(BadBlobFile { family, number, known });
            }
            if depth == Depth::Everything {
                let Some(data) = read_optional(&file)? else { continue };
                self.bytes += data.len() as u64;
                for damaged in blob::scan(&data, &known, &mut |_| {}) {
                    let what = format!("bytes {} to {} hold no value that can be read", damaged.start, damaged.end);
                    let repair = "readers skip it; the keys of what was there are taken out";
                    self.findings.push(Finding::new(&blob_name(number), &what, repair));
                }
            }
        }
        Ok(())
    }
}

/// See [`blob::fault`]; of the file only its ends are read.
fn blob_fault(path: &Path, family: u64, known: &BlobFile) -> io::Result<Option<String>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Some("it is missing".to_owned())),
        file => file?,
    };
    let bytes = file.metadata()?.len();
    let (mut head, mut foot) = ([0; blob::HEADER_BYTES], [0; blob::FOOTER_BYTES]);
    if bytes >= (blob::HEADER_BYTES + blob::FOOTER_BYTES) as u64 {
        file.read_exact_at(&mut head, 0)?;
        file.read_exact_at(&mut foot, bytes - blob::FOOTER_BYTES as u64)?;
    }
    Ok(blob::fault(bytes, &head, &foot, family, known))
}

fn missing() -> Condition {
    Condition::Unusable("it is missing".to_owned())
}

fn wrong_size(found: u64, expected: u64) -> Condition {
    Condition::Unusable(format!("it has {found} bytes and should have {expected}"))
}

fn table_name(number: u64) -> String {
    format!("{number:06}.sst")
}

fn blob_name(number: u64) -> String {
    format!("{number:06}.blob")
}

/// The contents of a file, if there is one.
fn read_optional(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(data) => Ok(Some(data)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
