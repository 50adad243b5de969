//! RocksDB's block-based tables: checking the checksum of every block, and taking damaged blocks out.
//!
//! A table is data blocks, then blocks about them (index, properties, range deletions, and the metaindex that says where
//! these are), then a footer of 53 bytes. A block is followed by its compression (1 byte) and a checksum over both (4), to
//! which the table adds a number of its own and the block's place.
//!
//! # A block taken out
//! A damaged data block is overwritten with an intact one of the same size that holds nothing but a deletion, older than
//! everything, of a key that nothing has (the first one behind the block before). So the table keeps its size, its index
//! and its place in the database, what stands in its other blocks keeps its age, and nothing has to be copied.

use xxhash_rust::xxh3::xxh3_64;

use super::super::run::{put_varint, take_varint};
use super::bytes::{fixed32, fixed64, lz4_decode, mask, raw_length};

const FOOTER_BYTES: usize = 53;
const TRAILER_BYTES: usize = 5;
const MAGIC: u64 = 0x88e2_41b7_85f4_cff7;
const EXTENDED_MAGIC: [u8; 4] = [0x3e, 0x00, 0x7a, 0x00];
const CRC32C: u8 = 1;
const XXH3: u8 = 4;
const LZ4: u8 = 4;

/// A place in the file, without the trailer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    offset: usize,
    size: usize,
}

/// A data block whose checksum is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadBlock {
    block: Block,
    /// The user keys it held are behind this one (nothing: from the table's first on),
    pub after: Vec<u8>,
    /// and none is behind this.
    pub until: Vec<u8>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    Intact,
    /// These data blocks are lost, the others can be used.
    Blocks(Vec<BadBlock>),
    /// Nothing in it can be used by RocksDB.
    Unusable(String),
}

/// What the footer says.
#[derive(Clone, Copy)]
struct Footer {
    checksum: u8,
    base: u32,
    metaindex: Block,
}

/// Checks a whole table, which should have `file_bytes`.
pub fn inspect(data: &[u8], file_bytes: u64) -> Condition {
    if data.len() as u64 != file_bytes {
        return Condition::Unusable(format!("it has {} bytes and should have {file_bytes}", data.len()));
    }
    match data_blocks(data) {
        Err(reason) => Condition::Unusable(reason.to_owned()),
        Ok((footer, blocks)) => {
            let bad: Vec<_> = blocks.into_iter().filter(|bad| !is_intact(data, &footer, bad.block)).collect();
            if bad.is_empty() { Condition::Intact } else { Condition::Blocks(bad) }
        }
    }
}

/// Takes damaged blocks out. `smallest` is the first user key of the table.
///
/// # Errors
/// A block too small for what takes its place.
pub fn take_out(data: &mut [u8], blocks: &[BadBlock], smallest: &[u8]) -> Result<(), &'static str> {
    let footer = footer(data)?;
    for bad in blocks {
        let block = bad.block;
        let mut filler = if bad.after.is_empty() { smallest.to_vec() } else { [&bad.after[..], &[0]].concat() };
        filler.extend_from_slice(&[0; 8]); // sequence number 0, a deletion
        let contents = filler_block(&filler, block.size).ok_or("a damaged block is too small to be replaced")?;
        let end = block.offset + block.size;
        data[block.offset..end].copy_from_slice(&contents);
        data[end] = 0;
        let sum = checksum(&data[block.offset..=end], block.offset, &footer)
            .ok_or("the checksum is of a kind unknown here")?;
        data[end + 1..end + TRAILER_BYTES].copy_from_slice(&sum.to_le_bytes());
    }
    Ok(())
}

/// A block of exactly `size` bytes with one entry, whose value is zeros.
fn filler_block(key: &[u8], size: usize) -> Option<Vec<u8>> {
    const RESTARTS_BYTES: usize = 8;
    const VALUE_LENGTH_BYTES: usize = 4;
    let mut block = vec![0]; // nothing in common with the key before
    put_varint(&mut block, key.len() as u64);
    let value = size.checked_sub(block.len() + VALUE_LENGTH_BYTES + key.len() + RESTARTS_BYTES)?;
    // In four bytes, whatever it needs.
    let bits = |shift: u32| ((value >> shift) & 0x7f) as u8;
    block.extend_from_slice(&[bits(0) | 0x80, bits(7) | 0x80, bits(14) | 0x80, bits(21)]);
    block.extend_from_slice(key);
    block.resize(block.len() + value, 0);
    block.extend_from_slice(&0u32.to_le_bytes());
    block.extend_from_slice(&1u32.to_le_bytes());
    (value < 1 << 28).then_some(block)
}

fn footer(data: &[u8]) -> Result<Footer, &'static str> {
    const FAULT: &str = "its footer is damaged";
    let start = data.len().checked_sub(FOOTER_BYTES).ok_or(FAULT)?;
    let footer = &data[start..];
    let version = fixed32(footer, 41).ok_or(FAULT)?;
    if fixed64(footer, 45) != Some(MAGIC) || !(6..=7).contains(&version) || footer[1..5] != EXTENDED_MAGIC {
        return Err(FAULT);
    }
    let base = fixed32(footer, 9).ok_or(FAULT)?;
    let size = fixed32(footer, 13).ok_or(FAULT)? as usize;
    let offset = start.checked_sub(size + TRAILER_BYTES).ok_or(FAULT)?;
    let found = Footer { checksum: footer[0], base, metaindex: Block { offset, size } };
    let mut cleared = footer.to_vec();
    cleared[5..9].fill(0);
    match checksum(&cleared, start, &found) == fixed32(footer, 5) {
        true => Ok(found),
        false => Err(FAULT),
    }
}

/// RocksDB's checksum of a block with its compression behind it, at `offset`.
fn checksum(data: &[u8], offset: usize, footer: &Footer) -> Option<u32> {
    let plain = match footer.checksum {
        CRC32C => mask(crc32c::crc32c(data)),
        XXH3 => {
            const PRIME: u32 = 0x6b90_83d9;
            let (&last, rest) = data.split_last()?;
            xxh3_64(rest) as u32 ^ u32::from(last).wrapping_mul(PRIME)
        }
        _ => return None,
    };
    let place = (offset as u32).wrapping_add((offset as u64 >> 32) as u32);
    Some(plain.wrapping_add(if footer.base == 0 { 0 } else { footer.base ^ place }))
}

fn is_intact(data: &[u8], footer: &Footer, block: Block) -> bool {
    let Some(end) = block.offset.checked_add(block.size) else { return false };
    let (Some(bytes), Some(stored)) = (data.get(block.offset..=end), fixed32(data, end + 1)) else { return false };
    checksum(bytes, block.offset, footer) == Some(stored)
}

/// A block's contents, as they were before compression.
fn contents(data: &[u8], footer: &Footer, block: Block) -> Option<Vec<u8>> {
    is_intact(data, footer, block).then(|| unpack(data, block)).flatten()
}

fn unpack(data: &[u8], block: Block) -> Option<Vec<u8>> {
    let stored = data.get(block.offset..block.offset + block.size)?;
    match data.get(block.offset + block.size)? {
        0 => Some(stored.to_vec()),
        &LZ4 => {
            let (raw_len, prefix) = raw_length(stored)?;
            lz4_decode(&stored[prefix..], raw_len).map(|(raw, _)| raw)
        }
        _ => None,
    }
}

/// The data blocks by the index, after every other block was found intact. The last key of each is that of the index, so
/// at or behind the block's own.
fn data_blocks(data: &[u8]) -> Result<(Footer, Vec<BadBlock>), &'static str> {
    let footer = footer(data)?;
    let metaindex = contents(data, &footer, footer.metaindex).ok_or("its metaindex is damaged")?;
    let mut index = None;
    let mut properties = None;
    for (name, value) in entries(&metaindex).ok_or("its metaindex is damaged")? {
        let mut value = value.as_slice();
        let Some(block) = take_block(&mut value) else { continue };
        if !is_intact(data, &footer, block) {
            return Err(match name.as_slice() {
                b"rocksdb.index" => "its index is damaged",
                b"rocksdb.properties" => "its properties are damaged",
                b"rocksdb.range_del" => "its range deletions are damaged",
                _ => "a block about its contents is damaged",
            });
        }
        match name.as_slice() {
            b"rocksdb.index" => index = contents(data, &footer, block),
            b"rocksdb.properties" => properties = contents(data, &footer, block),
            _ => {}
        }
    }
    let properties = properties.as_deref().and_then(entries).ok_or("its properties are damaged")?;
    let flag = |name: &[u8]| properties.iter().any(|(key, value)| key == name && value.first().is_some_and(|v| *v > 0));
    let user_keys = flag(b"rocksdb.index.key.is.user.key");
    let delta = flag(b"rocksdb.index.value.is.delta.encoded");
    let index = index.ok_or("its index is damaged")?;
    let blocks = index_entries(&index, user_keys, delta).ok_or("its index is damaged")?;
    Ok((footer, blocks))
}

fn take_block(rest: &mut &[u8]) -> Option<Block> {
    let offset = usize::try_from(take_varint(rest)?).ok()?;
    Some(Block { offset, size: usize::try_from(take_varint(rest)?).ok()? })
}

/// Where the entries of a block end.
fn entries_end(block: &[u8]) -> Option<usize> {
    const FEATURES: u32 = !0 << 28;
    let packed = fixed32(block, block.len().checked_sub(4)?)?;
    let restarts = usize::try_from(packed & !FEATURES).ok()?;
    (packed & FEATURES == 0).then_some(())?;
    block.len().checked_sub(4 + restarts.checked_mul(4)?)
}

/// The entries of a block that is not an index.
fn entries(block: &[u8]) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut rest = &block[..entries_end(block)?];
    let (mut entries, mut key) = (Vec::new(), Vec::new());
    while !rest.is_empty() {
        let (shared, unshared) = (take_varint(&mut rest)?, take_varint(&mut rest)?);
        let value_len = usize::try_from(take_varint(&mut rest)?).ok()?;
        take_key(&mut key, shared, unshared, &mut rest)?;
        let (value, after) = rest.split_at_checked(value_len)?;
        entries.push((key.clone(), value.to_vec()));
        rest = after;
    }
    Some(entries)
}

fn take_key(key: &mut Vec<u8>, shared: u64, unshared: u64, rest: &mut &[u8]) -> Option<()> {
    let (shared, unshared) = (usize::try_from(shared).ok()?, usize::try_from(unshared).ok()?);
    let (tail, after) = rest.split_at_checked(unshared)?;
    (shared <= key.len()).then_some(())?;
    key.truncate(shared);
    key.extend_from_slice(tail);
    *rest = after;
    Some(())
}

/// The entries of an index block, as if all their blocks were bad.
fn index_entries(index: &[u8], user_keys: bool, delta: bool) -> Option<Vec<BadBlock>> {
    let mut rest = &index[..entries_end(index)?];
    let (mut blocks, mut key) = (Vec::<BadBlock>::new(), Vec::new());
    while !rest.is_empty() {
        let (shared, unshared) = (take_varint(&mut rest)?, take_varint(&mut rest)?);
        let length = if delta { None } else { Some(take_varint(&mut rest)?) };
        take_key(&mut key, shared, unshared, &mut rest)?;
        let block = match (length, blocks.last()) {
            (None, Some(before)) if shared > 0 => {
                let change = take_varint(&mut rest)?;
                let change = (change >> 1) as i64 ^ -((change & 1) as i64);
                let size = usize::try_from(before.block.size as i64 + change).ok()?;
                Block { offset: before.block.offset + before.block.size + TRAILER_BYTES, size }
            }
            _ => take_block(&mut rest)?,
        };
        let until = if user_keys { key.clone() } else { key.get(..key.len().checked_sub(8)?)?.to_vec() };
        let after = blocks.last().map_or_else(Vec::new, |before| before.until.clone());
        blocks.push(BadBlock { block, after, until });
    }
    Some(blocks)
}

/// An entry of a data block: user key, sequence number, type, value.
pub type TableEntry = (Vec<u8>, u64, u8, Vec<u8>);

/// Whatever entries can be found in the data blocks of a table that RocksDB cannot use: by its index if that is there, and
/// else block by block from its beginning, each of which tells its own end.
pub fn salvage(data: &[u8]) -> Vec<TableEntry> {
    let mut found = Vec::new();
    let mut take = |raw: &[u8]| {
        for (internal, value) in entries(raw).unwrap_or_default() {
            let Some((key, trailer)) = internal.split_last_chunk::<8>() else { continue };
            let trailer = u64::from_le_bytes(*trailer);
            found.push((key.to_vec(), trailer >> 8, trailer as u8, value));
        }
    };
    let known = footer(data).ok();
    let index = known.and_then(|footer| index_of(data, &footer));
    match (known, index) {
        (Some(footer), Some(blocks)) => {
            blocks.iter().filter_map(|bad| contents(data, &footer, bad.block)).for_each(|raw| take(&raw));
        }
        (known, _) => {
            let mut at = 0;
            while let Some((raw, next)) = block_from(data, at, known.as_ref()) {
                take(&raw);
                at = next;
            }
        }
    }
    found
}

/// The index, whatever else is damaged.
fn index_of(data: &[u8], footer: &Footer) -> Option<Vec<BadBlock>> {
    let metaindex = entries(&contents(data, footer, footer.metaindex)?)?;
    let (_, handle) = metaindex.iter().find(|(name, _)| name == b"rocksdb.index")?;
    let index = contents(data, footer, take_block(&mut handle.as_slice())?)?;
    // The common case; the other one shows itself by keys that are no keys.
    index_entries(&index, true, true)
}

/// The data block that begins at `at`, and where the next one does.
fn block_from(data: &[u8], at: usize, footer: Option<&Footer>) -> Option<(Vec<u8>, usize)> {
    /// Blocks are closed at 16 KiB, but for a last entry, and a value that is larger is in a blob file.
    const LARGEST_RAW: usize = 1 << 20;
    let packed = || {
        let (raw_len, prefix) = raw_length(data.get(at..)?)?;
        let (raw, taken) = lz4_decode(&data[at + prefix..], (raw_len <= LARGEST_RAW).then_some(raw_len)?)?;
        let block = Block { offset: at, size: prefix + taken };
        let sealed = footer.is_none_or(|footer| is_intact(data, footer, block));
        (data.get(at + block.size) == Some(&LZ4) && sealed).then_some((raw, block))
    };
    let plain = || {
        let footer = footer?;
        let largest = data.len().saturating_sub(at + TRAILER_BYTES).min(64 * 1024);
        let fits = |size: &usize| data[at + size] == 0 && is_intact(data, footer, Block { offset: at, size: *size });
        let block = Block { offset: at, size: (8..largest).find(fits)? };
        Some((data[at..at + block.size].to_vec(), block))
    };
    let (raw, block) = packed().or_else(plain)?;
    entries(&raw)?;
    Some((raw, at + block.size + TRAILER_BYTES))
}
