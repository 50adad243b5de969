//! RocksDB's blob files: large values, each behind its key.
//!
//! A header of 30 bytes (magic, version, family, flags, compression, expiration), records, and a footer of 32 (magic,
//! count, expiration, CRC). A record is a header of 32 bytes (key length, value length, expiration, CRC of these three, CRC
//! of key and value), the key, and the value, compressed as the file's header says.
//!
//! A reader needs the header and the footer of a file for any of its values, so a bit in either hides all of them. Both
//! can be made anew. What a damaged record was cannot.

use std::ops::Range;

use super::bytes::{fixed32, fixed64, lz4_decode, mask, masked_crc, raw_length};
use super::version::BlobFile;

pub const HEADER_BYTES: usize = 30;
pub const FOOTER_BYTES: usize = 32;
const RECORD_HEADER_BYTES: usize = 32;
const MAGIC: u32 = 2_395_959;
const VERSION: u32 = 1;
const LZ4: u8 = 4;
/// No key of ours is longer.
const LONGEST_KEY: u64 = 64 * 1024;

/// A record whose header can be read.
pub struct BlobRecord<'a> {
    pub key: &'a [u8],
    value: &'a [u8],
    compression: u8,
}

impl BlobRecord<'_> {
    /// The value as it was given to RocksDB.
    pub fn value(&self) -> Option<Vec<u8>> {
        match self.compression {
            0 => Some(self.value.to_vec()),
            LZ4 => {
                let (raw_len, prefix) = raw_length(self.value)?;
                lz4_decode(&self.value[prefix..], raw_len).map(|(value, _)| value)
            }
            _ => None,
        }
    }
}

/// The header that the blob files of a family begin with.
pub fn header(family: u64, compression: u8) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    header[4..8].copy_from_slice(&VERSION.to_le_bytes());
    header[8..12].copy_from_slice(&(family as u32).to_le_bytes());
    header[13] = compression;
    header
}

/// The footer of a file of `count` records.
pub fn footer(count: u64) -> [u8; FOOTER_BYTES] {
    let mut footer = [0; FOOTER_BYTES];
    footer[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    footer[4..12].copy_from_slice(&count.to_le_bytes());
    let crc = masked_crc(&footer[..FOOTER_BYTES - 4]);
    footer[FOOTER_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
    footer
}

/// What is wrong with a file's size, header and footer, without which nothing in it can be read. `ends` are its first and
/// last bytes.
pub fn fault(file_bytes: u64, head: &[u8], foot: &[u8], family: u64, known: &BlobFile) -> Option<String> {
    let expected = known.bytes + (HEADER_BYTES + FOOTER_BYTES) as u64;
    if file_bytes != expected {
        return Some(format!("it has {file_bytes} bytes and should have {expected}"));
    }
    let compression = head.get(13).copied().unwrap_or_default();
    if !matches!(compression, 0 | LZ4) || head != header(family, compression) {
        return Some("its header is damaged".to_owned());
    }
    (foot != footer(known.count)).then(|| "its footer is damaged".to_owned())
}

/// The file with a header and a footer that can be read, and of its full length, so that no record moves. What is missing
/// at its end is zeros.
pub fn mended(data: &[u8], family: u64, known: &BlobFile) -> Vec<u8> {
    let bytes = usize::try_from(known.bytes).unwrap_or(0);
    let mut file = Vec::with_capacity(HEADER_BYTES + bytes + FOOTER_BYTES);
    file.extend_from_slice(&header(family, LZ4));
    file.extend_from_slice(data.get(HEADER_BYTES..).map_or(&[], |rest| &rest[..rest.len().min(bytes)]));
    file.resize(HEADER_BYTES + bytes, 0);
    file.extend_from_slice(&footer(known.count));
    file
}

/// Calls `each` with every intact record; answers the stretches that hold none.
pub fn scan(data: &[u8], known: &BlobFile, each: &mut dyn FnMut(BlobRecord<'_>)) -> Vec<Range<usize>> {
    let end = HEADER_BYTES + usize::try_from(known.bytes).unwrap_or(0);
    let records = &data[..data.len().min(end)];
    // A flipped bit here must not make all values unreadable: all our files are compressed.
    let compression = data.get(13).copied().filter(|found| matches!(*found, 0 | LZ4)).unwrap_or(LZ4);
    let mut damaged: Vec<Range<usize>> = Vec::new();
    let mut at = HEADER_BYTES;
    while at < end {
        match record_at(records, at, compression) {
            Some((record, intact, next)) => {
                match intact {
                    true => each(record),
                    false => damaged.push(at..next),
                }
                at = next;
            }
            None => {
                let next = (at + 1..records.len()).find(|next| record_at(records, *next, compression).is_some());
                let next = next.unwrap_or(end);
                damaged.push(at..next);
                at = next;
            }
        }
    }
    damaged
}

/// The record at `at`, whether it is intact, and where the next one begins, if the header can be believed.
fn record_at(data: &[u8], at: usize, compression: u8) -> Option<(BlobRecord<'_>, bool, usize)> {
    let header = data.get(at..at + RECORD_HEADER_BYTES)?;
    let key_len = fixed64(header, 0).filter(|length| *length <= LONGEST_KEY)?;
    if fixed32(header, 24)? != masked_crc(&header[..24]) {
        return None;
    }
    let key_start = at + RECORD_HEADER_BYTES;
    let value_start = key_start + usize::try_from(key_len).ok()?;
    let end = value_start.checked_add(usize::try_from(fixed64(header, 8)?).ok()?)?;
    let (key, value) = (data.get(key_start..value_start)?, data.get(value_start..end)?);
    let crc = mask(crc32c::crc32c_append(crc32c::crc32c(key), value));
    Some((BlobRecord { key, value, compression }, fixed32(header, 28)? == crc, end))
}
