//! What a MANIFEST says: which tables and blob files make up the database, by the records (version edits) in it.

use std::collections::BTreeMap;

use super::super::run::{put_varint, take_varint};
use super::bytes::take_slice;

/// Tags of a version edit.
mod tag {
    pub const COMPARATOR: u64 = 1;
    pub const LOG_NUMBER: u64 = 2;
    pub const NEXT_FILE_NUMBER: u64 = 3;
    pub const LAST_SEQUENCE: u64 = 4;
    pub const COMPACT_CURSOR: u64 = 5;
    pub const DELETED_FILE: u64 = 6;
    pub const PREV_LOG_NUMBER: u64 = 9;
    pub const MIN_LOG_NUMBER_TO_KEEP: u64 = 10;
    pub const NEW_FILE: u64 = 103;
    pub const COLUMN_FAMILY: u64 = 200;
    pub const COLUMN_FAMILY_ADD: u64 = 201;
    pub const COLUMN_FAMILY_DROP: u64 = 202;
    pub const MAX_COLUMN_FAMILY: u64 = 203;
    pub const IN_ATOMIC_GROUP: u64 = 300;
    pub const BLOB_FILE_ADDITION: u64 = 400;
    pub const BLOB_FILE_GARBAGE: u64 = 401;
    /// Tags from it on are followed by a length and may be passed over.
    pub const IGNORABLE: u64 = 1 << 13;
}

/// Fields of a new file that are of interest.
mod field {
    pub const END: u64 = 1;
    pub const OLDEST_BLOB_FILE: u64 = 4;
}

/// A table of the database.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    pub level: u64,
    pub file_bytes: u64,
    /// User keys.
    pub smallest: Vec<u8>,
    pub largest: Vec<u8>,
    /// 0: none.
    pub oldest_blob_file: u64,
}

/// A blob file of the database.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlobFile {
    pub count: u64,
    /// Of all records, with their headers.
    pub bytes: u64,
    pub garbage_count: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Family {
    pub name: String,
    pub log_number: u64,
    /// By file number.
    pub tables: BTreeMap<u64, Table>,
    pub blobs: BTreeMap<u64, BlobFile>,
}

/// What a MANIFEST amounts to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Version {
    pub families: BTreeMap<u64, Family>,
    pub min_log_number_to_keep: u64,
    pub last_sequence: u64,
    pub next_file_number: u64,
}

impl Version {
    /// Applies the records of a MANIFEST in order. `None` for one that cannot be read, or names what is not there.
    pub fn replay<'a>(edits: impl Iterator<Item = &'a [u8]>) -> Option<Version> {
        let mut version = Version::default();
        version.families.insert(0, Family { name: "default".to_owned(), ..Family::default() });
        for edit in edits {
            version.apply(edit)?;
        }
        Some(version)
    }

    fn apply(&mut self, edit: &[u8]) -> Option<()> {
        let mut family = 0;
        let mut rest = edit;
        // The family is named (and added) somewhere in the edit, and holds for all of it.
        let mut changes = Vec::new();
        while !rest.is_empty() {
            match take_varint(&mut rest)? {
                tag::COLUMN_FAMILY => family = take_varint(&mut rest)?,
                tag => changes.push(self.take_change(tag, &mut rest)?),
            }
        }
        let (additions, others): (Vec<_>, Vec<_>) =
            changes.into_iter().partition(|change| matches!(change, Change::AddFamily(_)));
        for change in additions.into_iter().chain(others) {
            self.change(family, change)?;
        }
        Some(())
    }

    fn take_change(&mut self, tag: u64, rest: &mut &[u8]) -> Option<Change> {
        Some(match tag {
            tag::COMPARATOR => {
                take_slice(rest)?;
                Change::Nothing
            }
            tag::LOG_NUMBER => Change::LogNumber(take_varint(rest)?),
            tag::NEXT_FILE_NUMBER => {
                self.next_file_number = take_varint(rest)?;
                Change::Nothing
            }
            tag::LAST_SEQUENCE => {
                self.last_sequence = take_varint(rest)?;
                Change::Nothing
            }
            tag::MIN_LOG_NUMBER_TO_KEEP => {
                self.min_log_number_to_keep = self.min_log_number_to_keep.max(take_varint(rest)?);
                Change::Nothing
            }
            tag::PREV_LOG_NUMBER | tag::MAX_COLUMN_FAMILY | tag::IN_ATOMIC_GROUP => {
                take_varint(rest)?;
                Change::Nothing
            }
            tag::COMPACT_CURSOR => {
                take_varint(rest)?;
                take_slice(rest)?;
                Change::Nothing
            }
            tag::DELETED_FILE => {
                take_varint(rest)?;
                Change::DeleteTable(take_varint(rest)?)
            }
            tag::NEW_FILE => take_new_table(rest)?,
            tag::COLUMN_FAMILY_ADD => Change::AddFamily(String::from_utf8_lossy(take_slice(rest)?).into_owned()),
            tag::COLUMN_FAMILY_DROP => Change::DropFamily,
            tag::BLOB_FILE_ADDITION => take_new_blob_file(rest)?,
            tag::BLOB_FILE_GARBAGE => {
                let (number, count) = (take_varint(rest)?, take_varint(rest)?);
                take_varint(rest)?;
                pass_fields(rest, 0)?;
                Change::Garbage(number, count)
            }
            tag if tag & tag::IGNORABLE != 0 => {
                take_slice(rest)?;
                Change::Nothing
            }
            _ => return None,
        })
    }

    fn change(&mut self, family: u64, change: Change) -> Option<()> {
        if let Change::AddFamily(name) = change {
            self.families.insert(family, Family { name, ..Family::default() });
            return Some(());
        }
        if matches!(change, Change::DropFamily) {
            return self.families.remove(&family).map(|_| ());
        }
        let family = self.families.get_mut(&family)?;
        match change {
            Change::LogNumber(number) => family.log_number = family.log_number.max(number),
            Change::DeleteTable(number) => drop(family.tables.remove(&number)),
            Change::AddTable(number, table) => drop(family.tables.insert(number, table)),
            Change::AddBlobFile(number, file) => drop(family.blobs.insert(number, file)),
            Change::Garbage(number, count) => family.blobs.get_mut(&number)?.garbage_count += count,
            Change::Nothing | Change::AddFamily(_) | Change::DropFamily => {}
        }
        Some(())
    }

    /// The first write-ahead log that may hold what is in no table.
    pub fn first_live_log(&self) -> u64 {
        let unflushed = self.families.values().map(|family| family.log_number).min().unwrap_or(0);
        unflushed.max(self.min_log_number_to_keep)
    }
}

impl Family {
    /// The blob files that tables refer to: RocksDB lets go of the others.
    pub fn live_blobs(&self) -> impl Iterator<Item = (u64, BlobFile)> {
        let oldest = self.tables.values().map(|table| table.oldest_blob_file).filter(|number| *number > 0).min();
        let oldest = oldest.unwrap_or(u64::MAX);
        let live = move |(number, file): &(&u64, &BlobFile)| **number >= oldest && file.garbage_count < file.count;
        self.blobs.iter().filter(live).map(|(number, file)| (*number, *file))
    }
}

enum Change {
    Nothing,
    LogNumber(u64),
    AddTable(u64, Table),
    DeleteTable(u64),
    AddBlobFile(u64, BlobFile),
    Garbage(u64, u64),
    AddFamily(String),
    DropFamily,
}

fn take_new_table(rest: &mut &[u8]) -> Option<Change> {
    let (level, number, file_bytes) = (take_varint(rest)?, take_varint(rest)?, take_varint(rest)?);
    let mut user_key = || {
        let internal = take_slice(rest)?;
        Some(internal.get(..internal.len().checked_sub(8)?)?.to_vec())
    };
    let (smallest, largest) = (user_key()?, user_key()?);
    take_varint(rest)?;
    take_varint(rest)?;
    let mut table = Table { level, file_bytes, smallest, largest, oldest_blob_file: 0 };
    loop {
        let tag = take_varint(rest)?;
        if tag == field::END {
            return Some(Change::AddTable(number, table));
        }
        let mut value = take_slice(rest)?;
        if tag == field::OLDEST_BLOB_FILE {
            table.oldest_blob_file = take_varint(&mut value)?;
        }
    }
}

fn take_new_blob_file(rest: &mut &[u8]) -> Option<Change> {
    let (number, count, bytes) = (take_varint(rest)?, take_varint(rest)?, take_varint(rest)?);
    take_slice(rest)?;
    take_slice(rest)?;
    pass_fields(rest, 0)?;
    Some(Change::AddBlobFile(number, BlobFile { count, bytes, garbage_count: 0 }))
}

fn pass_fields(rest: &mut &[u8], end: u64) -> Option<()> {
    while take_varint(rest)? != end {
        take_slice(rest)?;
    }
    Some(())
}

/// An edit that takes a table out of the database.
pub fn delete_table(family: u64, level: u64, number: u64) -> Vec<u8> {
    let mut edit = Vec::new();
    for part in [tag::DELETED_FILE, level, number, tag::COLUMN_FAMILY, family] {
        put_varint(&mut edit, part);
    }
    edit
}
