//! CURRENT and the MANIFEST it names, and the mirror that is kept of both.
//!
//! RocksDB knows its tables and logs by the MANIFEST alone: what is not in there, it deletes at start. So a MANIFEST that is
//! damaged or shorter than it was must not be opened, and no database may be begun where there was one.

use std::io;
use std::path::Path;

use super::super::mirror;
use super::version::Version;
use super::{Finding, logfile, read_optional};

pub const CURRENT: &str = "CURRENT";
const PREFIX: &str = "MANIFEST-";

/// What the database consists of.
#[derive(Debug, Default)]
pub struct Catalog {
    /// The MANIFEST's file name.
    pub name: String,
    pub records: Vec<Vec<u8>>,
    pub version: Version,
    pub findings: Vec<Finding>,
    /// The MANIFEST has to be written anew from `records`.
    pub is_rewritten: bool,
}

/// Reads CURRENT and MANIFEST, or what can be had instead of them. Nothing: there is no database yet.
///
/// # Errors
/// Of the file system; and [`io::ErrorKind::InvalidData`] when neither they nor the mirror can be used.
pub fn read(directory: &Path) -> io::Result<Option<Catalog>> {
    let mirrored = directory.join(mirror::DIRECTORY);
    let current = read_optional(&directory.join(CURRENT))?;
    if current.is_none() && !has_database_files(directory)? {
        return Ok(None);
    }
    let mut findings = Vec::new();
    let named = current.as_deref().and_then(manifest_name);
    let exists = |name: &String| directory.join(name).exists();
    let named = match named {
        Some(name) if exists(&name) => Some(name),
        Some(name) if mirrored.join(&name).exists() => {
            findings.push(Finding::new(&name, "it is missing", "it is put back from the mirror"));
            Some(name)
        }
        _ => {
            let what = if current.is_some() { "it does not name a MANIFEST" } else { "it is missing" };
            findings.push(Finding::new(CURRENT, what, "it is written anew"));
            None
        }
    };
    let by_mirror = read_optional(&mirrored.join(CURRENT))?.as_deref().and_then(manifest_name);
    let by_mirror = by_mirror.filter(|name| exists(name) || mirrored.join(name).exists());
    let mut names: Vec<_> = named.into_iter().chain(by_mirror).collect();
    names.extend(manifests(directory)?);
    for name in names {
        let own = read_optional(&directory.join(&name))?;
        let copy = read_optional(&mirrored.join(&name))?;
        if let Some(mut catalog) = choose(&name, own.as_deref(), copy.as_deref()) {
            findings.append(&mut catalog.findings);
            return Ok(Some(Catalog { findings, ..catalog }));
        }
    }
    let reason = "neither CURRENT and MANIFEST nor their mirror can be used; restore the directory from a backup";
    Err(io::Error::new(io::ErrorKind::InvalidData, reason))
}

/// The name in CURRENT, if it is one.
fn manifest_name(current: &[u8]) -> Option<String> {
    let name = std::str::from_utf8(current).ok()?.strip_suffix('\n')?;
    let number = name.strip_prefix(PREFIX)?;
    (!number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())).then(|| name.to_owned())
}

/// The MANIFESTs that are there, the latest first.
fn manifests(directory: &Path) -> io::Result<Vec<String>> {
    let mut names: Vec<String> = file_names(directory)?;
    names.retain(|name| manifest_name(format!("{name}\n").as_bytes()).is_some());
    names.sort_by_key(|name| std::cmp::Reverse(name[PREFIX.len()..].parse::<u64>().unwrap_or(0)));
    Ok(names)
}

/// Whether there was a database. A MANIFEST alone is what is left of a first start that did not get to write CURRENT.
fn has_database_files(directory: &Path) -> io::Result<bool> {
    let of_a_database =
        |name: &String| [".sst", ".blob", ".log"].iter().any(|end| name.ends_with(end)) || name == mirror::DIRECTORY;
    Ok(file_names(directory)?.iter().any(of_a_database))
}

/// The names of what is in a directory; none if there is no such directory.
pub fn file_names(directory: &Path) -> io::Result<Vec<String>> {
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut names: Vec<String> = Vec::new();
    for entry in entries {
        names.extend(entry?.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

/// The records of one MANIFEST from the file and its copy: a copy is the beginning of the file as it was when it was made.
fn choose(name: &str, own: Option<&[u8]>, copy: Option<&[u8]>) -> Option<Catalog> {
    let joined = match (own, copy) {
        (Some(own), Some(copy)) if own.len() > copy.len() => Some([copy, &own[copy.len()..]].concat()),
        _ => None,
    };
    let own_records = own.map(Records::of);
    let copied = copy.map(Records::of);
    if let Some(records) = &own_records
        && !records.damaged
        && copied.as_ref().is_none_or(|copied| copied.intact.len() <= records.intact.len())
        && let Some(version) = replay(&records.intact)
    {
        return Some(Catalog { name: name.to_owned(), records: own_records?.intact, version, ..Catalog::default() });
    }
    let what = match &own_records {
        None => "it is missing",
        Some(records) if records.damaged => "a record in it is damaged",
        Some(_) => "it is shorter than it was",
    };
    let joined = joined.as_deref().map(Records::of);
    let written = [&own_records, &copied, &joined].into_iter().flatten().map(|records| records.written).max()?;
    let sources = [(joined, "it is completed from the mirror"), (copied, "it is put back from the mirror")];
    let own = (own_records, "it is written anew without the damaged records, which are lost");
    let mut best: Option<(Vec<Vec<u8>>, Version, &str)> = None;
    for (records, repair) in sources.into_iter().chain([own]) {
        let Some(records) = records else { continue };
        // Records behind damage are of use only if what they build upon is there.
        let (all, until) = (replay(&records.intact), records.until_damage);
        let found = all.map(|version| (records.intact.clone(), version));
        let found = found.or_else(|| Some((records.intact[..until].to_vec(), replay(&records.intact[..until])?)));
        if let Some((records, version)) = found
            && best.as_ref().is_none_or(|(best, ..)| records.len() > best.len())
        {
            best = Some((records, version, repair));
        }
    }
    let (records, version, repair) = best?;
    let mut finding = Finding::new(name, what, repair);
    if records.len() < written {
        finding.what.push_str(&format!("; {} of {written} records are left", records.len()));
    }
    Some(Catalog { name: name.to_owned(), records, version, findings: vec![finding], is_rewritten: true })
}

/// A version that a database can be opened with.
fn replay(records: &[Vec<u8>]) -> Option<Version> {
    let version = Version::replay(records.iter().map(Vec::as_slice))?;
    (version.next_file_number > 0).then_some(version)
}

struct Records {
    intact: Vec<Vec<u8>>,
    /// How many of them stand before the first damage.
    until_damage: usize,
    damaged: bool,
    /// With the damaged ones.
    written: usize,
}

impl Records {
    fn of(data: &[u8]) -> Records {
        let walk = logfile::walk(data, None);
        // An end that is cut off was not written as a whole, and RocksDB passes over it; unless the mirror knows more.
        let damaged = walk.is_damaged() || (walk.torn.is_some() && !walk.is_cut);
        let until_damage = walk.records.iter().take_while(|record| !record.damaged).count();
        let intact: Vec<_> =
            walk.records.iter().filter(|record| !record.damaged).map(|record| record.bytes(data)).collect();
        let written = walk.records.len() + usize::from(walk.torn.is_some());
        Records { intact, until_damage, damaged, written }
    }
}
