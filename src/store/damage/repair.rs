//! Repairing a data directory, and checking one, which is a repair of a shadow of it.
//!
//! Nothing large is copied. A damaged file is replaced by one that can be used, of the same name; a table that cannot be is
//! taken out of the MANIFEST, and what can be found of it is written again. The originals of damaged files move to a
//! directory `quarantine-N` inside the data directory.
//!
//! # Cut short
//! Every step leaves a directory that another repair can go on from. Only what a table that was taken out held must not be
//! forgotten: the file [`UNFINISHED`] says so from before until after, and a start refuses as long as it is there.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use super::super::key;
use super::super::lock::DirectoryLock;
use super::super::rocks::Rocks;
use super::contents::{self, KeyRange, Restored};
use super::version::delete_table;
use super::{
    BadTable, Condition, DamageReport, Depth, Inspection, Loss, StoreError, blob, blob_name, inspect, logfile,
    manifest, mirror, read_optional, table, table_name, wal, write_whole,
};

/// Names the quarantine of a repair that has yet to write what it found again.
pub const UNFINISHED: &str = "repair.unfinished";

/// There while what a healed write-ahead log lost may have left queues and definitions at odds.
pub const UNMENDED: &str = "mend.unfinished";

const QUARANTINE: &str = "quarantine-";

/// Says what is wrong with a data directory and what a repair would leave, without changing anything in it.
///
/// # Errors
/// [`StoreError::InUse`], or [`StoreError::Open`] if nothing can be said: the directory cannot be read, or no MANIFEST is
/// left.
///
/// # Cost
/// Reads every file. Needs room for the write-ahead log and damaged files in the system's directory for temporary files.
pub fn check(path: &Path) -> Result<DamageReport, StoreError> {
    let _lock = DirectoryLock::take(path)?;
    let shadow = Shadow::of(path).map_err(|error| open_error(path, &error))?;
    let report = repair_locked(&shadow.path).map_err(|error| renamed(error, path))?;
    Ok(DamageReport { path: path.to_owned(), quarantine: None, ..report })
}

/// Makes a data directory one that can be opened and written to, with all that can be read.
///
/// # Errors
/// As [`check`].
pub fn repair(path: &Path) -> Result<DamageReport, StoreError> {
    let _lock = DirectoryLock::take(path)?;
    repair_locked(path)
}

fn open_error(path: &Path, error: &io::Error) -> StoreError {
    StoreError::Open { path: path.to_owned(), reason: error.to_string() }
}

/// The error of a shadow, as one of the directory.
fn renamed(error: StoreError, path: &Path) -> StoreError {
    match error {
        StoreError::Open { reason, .. } => StoreError::Open { path: path.to_owned(), reason },
        other => other,
    }
}

fn repair_locked(path: &Path) -> Result<DamageReport, StoreError> {
    let failed = |error: io::Error| open_error(path, &error);
    let mut report = DamageReport { path: path.to_owned(), ..DamageReport::default() };
    let Some(mut inspection) = inspect(path, Depth::Everything).map_err(failed)? else { return Ok(report) };
    report.findings = inspection.all_findings().cloned().collect();
    (report.files, report.bytes) = (inspection.files, inspection.bytes);
    let mut quarantine = Quarantine::of(path).map_err(failed)?;
    let restored = apply(path, &mut inspection, &mut quarantine, &mut report.losses).map_err(failed)?;
    let rocks = Rocks::open_to_repair(path)?;
    contents::restore(&rocks, &restored)?;
    contents::mend(&rocks, &restored, &mut report)?;
    contents::survey(&rocks, &inspection.noted_tails, &mut report)?;
    contents::settle(&rocks, &restored)?;
    rocks.close().map_err(|error| rocks.open_error(error))?;
    for done in [UNFINISHED, UNMENDED] {
        remove_optional(&path.join(done)).map_err(failed)?;
    }
    report.quarantine = quarantine.finish(&report).map_err(failed)?;
    Ok(report)
}

/// Heals the write-ahead logs before a start. The caller has the directory to itself.
pub fn heal_logs(path: &Path, inspection: &Inspection) -> io::Result<DamageReport> {
    let logs = &inspection.logs;
    write_whole(&path.join(UNMENDED), b"")?;
    let mut quarantine = Quarantine::of(path)?;
    for (number, bytes) in &logs.healed {
        quarantine.replace(&wal::name(*number), bytes)?;
    }
    let (findings, losses) = (logs.findings.clone(), logs.losses.clone());
    let mut report = DamageReport { path: path.to_owned(), findings, losses, ..DamageReport::default() };
    report.quarantine = quarantine.finish(&report)?;
    Ok(report)
}

/// Puts files in order, so that the database can be opened.
fn apply(
    path: &Path,
    inspection: &mut Inspection,
    quarantine: &mut Quarantine,
    losses: &mut Vec<Loss>,
) -> io::Result<Restored> {
    losses.append(&mut inspection.logs.losses);
    for (number, bytes) in &inspection.logs.healed {
        quarantine.replace(&wal::name(*number), bytes)?;
    }
    for file in &inspection.blobs {
        let name = blob_name(file.number);
        let data = read_optional(&path.join(&name))?.unwrap_or_default();
        quarantine.replace(&name, &blob::mended(&data, file.family, &file.known))?;
    }
    let mut restored = unfinished(path)?;
    restored.logs_were_healed = !inspection.logs.healed.is_empty() || path.join(UNMENDED).exists();
    let mut edits = Vec::new();
    for bad in &inspection.tables {
        let name = table_name(bad.number);
        if !take_out_blocks(path, bad, quarantine, losses, &mut restored)? {
            edits.push(delete_table(bad.family, bad.table.level, bad.number));
            take_out_table(path, bad, inspection, quarantine, &mut restored)?;
            let (after, until) = (bad.table.smallest.clone(), bad.table.largest.clone());
            losses.push(Loss::Keys { file: name, family: bad.family_name.clone(), after, until });
        }
    }
    let families = inspection.catalog.version.families.values();
    let of_large = families.filter(|family| matches!(family.name.as_str(), key::LOG | key::NOTES | key::BODIES));
    for family in of_large {
        let files = family.live_blobs().map(|(number, file)| (blob_name(number), file));
        restored.blob_files.entry(family.name.clone()).or_default().extend(files.map(|(name, file)| {
            let kept = quarantine.directory.join(&name);
            (if kept.exists() { kept } else { path.join(&name) }, file)
        }));
    }
    let catalog = &mut inspection.catalog;
    if catalog.findings.is_empty() && edits.is_empty() {
        return Ok(restored);
    }
    if catalog.is_rewritten {
        quarantine_unknown(path, inspection, quarantine)?;
    }
    write_catalog(path, inspection, edits, quarantine)?;
    Ok(restored)
}

/// Overwrites the damaged blocks of a table. False: it has to be taken out as a whole.
fn take_out_blocks(
    path: &Path,
    bad: &BadTable,
    quarantine: &mut Quarantine,
    losses: &mut Vec<Loss>,
    restored: &mut Restored,
) -> io::Result<bool> {
    let Condition::Blocks(blocks) = &bad.condition else { return Ok(false) };
    let name = table_name(bad.number);
    let mut data = fs::read(path.join(&name))?;
    if table::take_out(&mut data, blocks, &bad.table.smallest).is_err() {
        return Ok(false);
    }
    quarantine.replace(&name, &data)?;
    for block in blocks {
        let (after, until) = (block.after.clone(), block.until.clone());
        restored.ranges.push(KeyRange { family: bad.family_name.clone(), after: after.clone(), until: until.clone() });
        losses.push(Loss::Keys { file: name.clone(), family: bad.family_name.clone(), after, until });
    }
    Ok(true)
}

/// Keeps what a table, and the blob files of its family, hold: RocksDB removes files that nothing refers to.
fn take_out_table(
    path: &Path,
    bad: &BadTable,
    inspection: &Inspection,
    quarantine: &mut Quarantine,
    restored: &mut Restored,
) -> io::Result<()> {
    quarantine.begin()?;
    let name = quarantine.directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let kept = quarantine.keep(&table_name(bad.number))?;
    // Also when the table is missing: its name tells the family.
    let mark = quarantine.directory.join(format!("{}.{}", table_name(bad.number), bad.family_name));
    fs::write(mark, b"")?;
    write_whole(&path.join(UNFINISHED), name.as_bytes())?;
    if let Some(family) = inspection.catalog.version.families.get(&bad.family) {
        for (number, _) in family.live_blobs() {
            quarantine.keep_for_now(&blob_name(number))?;
        }
    }
    let data = if kept { fs::read(quarantine.directory.join(table_name(bad.number)))? } else { Vec::new() };
    restored.tables.push((bad.family_name.clone(), data));
    let (after, until) = (Vec::new(), bad.table.largest.clone());
    restored.ranges.push(KeyRange { family: bad.family_name.clone(), after, until });
    Ok(())
}

/// What a repair that was cut short had taken out.
fn unfinished(path: &Path) -> io::Result<Restored> {
    let mut restored = Restored::default();
    let Some(name) = read_optional(&path.join(UNFINISHED))? else { return Ok(restored) };
    let directory = path.join(String::from_utf8_lossy(&name).as_ref());
    for name in manifest::file_names(&directory)? {
        let Some((table, family)) = name.split_once(".sst.") else { continue };
        let data = read_optional(&directory.join(format!("{table}.sst")))?.unwrap_or_default();
        restored.tables.push((family.to_owned(), data));
        restored.ranges.push(KeyRange { family: family.to_owned(), after: Vec::new(), until: vec![0xff; 32] });
    }
    for name in manifest::file_names(&directory)?.iter().filter(|name| name.ends_with(".blob")) {
        let data = fs::metadata(directory.join(name))?.len();
        let bytes = data.saturating_sub((blob::HEADER_BYTES + blob::FOOTER_BYTES) as u64);
        let known = super::BlobFile { bytes, ..super::BlobFile::default() };
        for family in [key::LOG, key::NOTES, key::BODIES] {
            restored.blob_files.entry(family.to_owned()).or_default().push((directory.join(name), known));
        }
    }
    Ok(restored)
}

/// Tables and blob files of which a MANIFEST that has lost records says nothing: they are kept for whoever wants to look.
fn quarantine_unknown(path: &Path, inspection: &Inspection, quarantine: &mut Quarantine) -> io::Result<()> {
    let families = inspection.catalog.version.families.values();
    let known: Vec<String> = families
        .flat_map(|family| {
            family
                .tables
                .keys()
                .map(|number| table_name(*number))
                .chain(family.blobs.keys().map(|number| blob_name(*number)))
        })
        .collect();
    for name in manifest::file_names(path)? {
        if (name.ends_with(".sst") || name.ends_with(".blob")) && !known.contains(&name) {
            quarantine.keep(&name)?;
        }
    }
    Ok(())
}

/// Writes MANIFEST and CURRENT, and their mirror.
fn write_catalog(
    path: &Path,
    inspection: &mut Inspection,
    edits: Vec<Vec<u8>>,
    quarantine: &mut Quarantine,
) -> io::Result<()> {
    let catalog = &mut inspection.catalog;
    let is_new = catalog.is_rewritten || !edits.is_empty() || !path.join(&catalog.name).exists();
    catalog.records.extend(edits);
    let mut bytes = Vec::new();
    catalog.records.iter().for_each(|record| logfile::append(&mut bytes, record));
    if is_new {
        quarantine.replace(&catalog.name, &bytes)?;
    }
    let current = format!("{}\n", catalog.name);
    quarantine.replace(manifest::CURRENT, current.as_bytes())?;
    let mirrored = path.join(mirror::DIRECTORY);
    fs::create_dir_all(&mirrored)?;
    write_whole(&mirrored.join(&catalog.name), &bytes)?;
    write_whole(&mirrored.join(manifest::CURRENT), current.as_bytes())?;
    Ok(())
}

fn remove_optional(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Where the originals of damaged files go. Made when the first one comes.
struct Quarantine {
    path: PathBuf,
    directory: PathBuf,
    exists: bool,
    temporary: Vec<PathBuf>,
}

impl Quarantine {
    fn of(path: &Path) -> io::Result<Quarantine> {
        let names = manifest::file_names(path)?;
        let numbers = names.iter().filter_map(|name| name.strip_prefix(QUARANTINE)?.parse::<u32>().ok());
        let number = numbers.max().unwrap_or(0) + 1;
        let directory = path.join(format!("{QUARANTINE}{number}"));
        Ok(Quarantine { path: path.to_owned(), directory, exists: false, temporary: Vec::new() })
    }

    fn begin(&mut self) -> io::Result<()> {
        if !self.exists {
            fs::create_dir(&self.directory)?;
            self.exists = true;
        }
        Ok(())
    }

    /// Puts `contents` in the place of a file, which is kept.
    fn replace(&mut self, name: &str, contents: &[u8]) -> io::Result<()> {
        self.keep(name)?;
        write_whole(&self.path.join(name), contents).map(|_| ())
    }

    /// Keeps a file whatever happens to it in its place. False: there is none.
    fn keep(&mut self, name: &str) -> io::Result<bool> {
        self.begin()?;
        let (from, to) = (self.path.join(name), self.directory.join(name));
        if fs::symlink_metadata(&to).is_ok() {
            return Ok(true);
        }
        match fs::hard_link(&from, &to) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            // A file system without links.
            Err(_) => fs::copy(&from, &to).map(|_| true),
        }
    }

    /// As [`Quarantine::keep`], until the repair is done: nothing is wrong with the file.
    fn keep_for_now(&mut self, name: &str) -> io::Result<()> {
        let kept = self.directory.join(name);
        if fs::symlink_metadata(&kept).is_err() && self.keep(name)? {
            self.temporary.push(kept);
        }
        Ok(())
    }

    /// Writes the report beside the files. Answers the directory, if there is one.
    fn finish(self, report: &DamageReport) -> io::Result<Option<PathBuf>> {
        if !self.exists {
            return Ok(None);
        }
        for file in &self.temporary {
            remove_optional(file)?;
        }
        let name = |queue: super::QueueId| format!("log {}", queue.0);
        fs::write(self.directory.join("report.txt"), report.to_text(&name))?;
        Ok(Some(self.directory))
    }
}

/// A directory that looks like another one and can be repaired without touching that.
struct Shadow {
    path: PathBuf,
}

impl Shadow {
    fn of(path: &Path) -> io::Result<Shadow> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let shadow = std::env::temp_dir().join(format!("leveret-check-{}-{number}", std::process::id()));
        fs::create_dir(&shadow)?;
        let shadow = Shadow { path: shadow };
        let path = path.canonicalize()?;
        for name in manifest::file_names(&path)? {
            let (from, to) = (path.join(&name), shadow.path.join(&name));
            if name.ends_with(".sst") || name.ends_with(".blob") || (name.starts_with(QUARANTINE) && from.is_dir()) {
                symlink(from, to)?; // which nobody writes to
            } else if name == mirror::DIRECTORY {
                copy_all(&from, &to)?;
            } else if from.is_file() && name != "LOCK" {
                fs::copy(from, to)?; // RocksDB writes over logs that it has done with
            }
        }
        Ok(shadow)
    }
}

impl Drop for Shadow {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(%error, "{} stays behind", self.path.display());
        }
    }
}

fn copy_all(from: &Path, to: &Path) -> io::Result<()> {
    fs::create_dir(to)?;
    for name in manifest::file_names(from)? {
        fs::copy(from.join(&name), to.join(&name))?;
    }
    Ok(())
}

/// The blob files of families, by the families' names.
pub type BlobFiles = HashMap<String, Vec<(PathBuf, super::BlobFile)>>;
