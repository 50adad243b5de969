//! The small encodings that RocksDB's files are made of. Nothing here trusts a length.

use super::super::run::take_varint;

/// RocksDB stores CRCs of data that may hold CRCs itself, so it turns and shifts them.
const MASK_DELTA: u32 = 0xa282_ead8;

/// A CRC-32C as RocksDB stores it.
pub fn masked_crc(data: &[u8]) -> u32 {
    mask(crc32c::crc32c(data))
}

pub fn mask(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(MASK_DELTA)
}

pub fn fixed32(data: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*data.get(at..)?.first_chunk()?))
}

pub fn fixed64(data: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(*data.get(at..)?.first_chunk()?))
}

/// Takes a byte string with its length in front off `rest`.
pub fn take_slice<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::try_from(take_varint(rest)?).ok()?;
    let (slice, after) = rest.split_at_checked(length)?;
    *rest = after;
    Some(slice)
}

/// Decompresses an LZ4 block until it has given `raw_len` bytes. Answers them, and how many bytes of `source` they took.
pub fn lz4_decode(source: &[u8], raw_len: usize) -> Option<(Vec<u8>, usize)> {
    const MIN_MATCH: usize = 4;
    let mut out = Vec::with_capacity(raw_len.min(1 << 20));
    let mut at = 0usize;
    loop {
        let token = *source.get(at)?;
        at += 1;
        let literals = extended(source, &mut at, usize::from(token >> 4))?;
        out.extend_from_slice(source.get(at..at.checked_add(literals)?)?);
        at += literals;
        if out.len() >= raw_len {
            return (out.len() == raw_len).then_some((out, at));
        }
        let offset = usize::from(u16::from_le_bytes(*source.get(at..)?.first_chunk()?));
        at += 2;
        let length = MIN_MATCH + extended(source, &mut at, usize::from(token & 15))?;
        let start = out.len().checked_sub(offset).filter(|_| offset > 0)?;
        if out.len() + length > raw_len {
            return None;
        }
        for index in start..start + length {
            out.push(out[index]); // the source may run into what it writes
        }
    }
}

fn extended(source: &[u8], at: &mut usize, mut length: usize) -> Option<usize> {
    if length == 15 {
        loop {
            let more = *source.get(*at)?;
            *at += 1;
            length = length.checked_add(usize::from(more))?;
            if more != 255 {
                break;
            }
        }
    }
    Some(length)
}

/// The raw length that RocksDB puts in front of what it compresses, and how many bytes it takes there.
pub fn raw_length(compressed: &[u8]) -> Option<(usize, usize)> {
    /// No block and no blob of ours is larger: a message is at most 512 MiB.
    const LARGEST: usize = 1 << 30;
    let mut rest = compressed;
    let raw_len = usize::try_from(take_varint(&mut rest)?).ok().filter(|length| *length <= LARGEST)?;
    Some((raw_len, compressed.len() - rest.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_and_overlapping_matches_are_decoded_and_nothing_else() {
        // "abc" and nine more bytes from three back, then the literals "xy".
        let block = [0x35, b'a', b'b', b'c', 3, 0, 0x20, b'x', b'y', 99];
        assert_eq!(lz4_decode(&block, 14), Some((b"abcabcabcabcxy".to_vec(), 9)));
        for raw_len in [0, 4, 11, 13, 15, 1000] {
            assert_eq!(lz4_decode(&block[..9], raw_len), None, "{raw_len}");
        }
        for end in 0..9 {
            assert_eq!(lz4_decode(&block[..end], 14), None);
        }
        assert_eq!(lz4_decode(&[0x10, b'a', 9, 0], 20), None, "a match before the beginning");
    }
}
