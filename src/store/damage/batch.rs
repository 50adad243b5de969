//! What can be read of a write batch of which some bytes are not what was written.
//!
//! A batch is a sequence number (8 bytes), a count (4), and entries: a tag, the family's id, a key, for some tags a value,
//! strings with their length in front. Our values carry checksums over their keys, so an entry that is whole proves itself,
//! wherever it is found: behind damage, the batch is searched for the next one.

use std::collections::BTreeMap;

use super::super::run::{RunReader, put_varint, take_varint};
use super::super::{QueueId, QueueSeq, key, notes, recovery};
use super::bytes::take_slice;

pub const HEADER_BYTES: usize = 12;

const DELETE: u8 = 4;
const PUT: u8 = 5;
const SINGLE_DELETE: u8 = 8;
const DELETE_RANGE: u8 = 14;

/// Families by their ids.
pub type FamilyNames = BTreeMap<u64, String>;

/// Something of a batch that is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lost {
    /// Records of a queue: the run that begins with this position, or a part of it.
    Records(QueueId, QueueSeq),
    /// An entry of a family with a key by which it is known.
    Entry(String, Vec<u8>),
    /// So many bytes that nothing can be said about.
    Bytes(usize),
}

/// What is left of a damaged batch.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Salvaged {
    pub count: u32,
    /// As they stand behind a batch's header.
    pub entries: Vec<u8>,
    pub lost: Vec<Lost>,
}

struct Entry<'a> {
    tag: u8,
    family: u64,
    key: &'a [u8],
    /// Of a put its value, of a deletion of a range its end.
    value: &'a [u8],
    end: usize,
}

/// Reads what can be read of a batch's entries, which begin at `from`.
pub fn salvage(batch: &[u8], from: usize, names: &FamilyNames) -> Salvaged {
    let mut salvaged = Salvaged::default();
    let mut at = from.min(batch.len());
    while at < batch.len() {
        if let Some(entry) = whole_entry(batch, at, names) {
            salvaged.entries.extend_from_slice(&batch[at..entry.end]);
            salvaged.count += 1;
            at = entry.end;
            continue;
        }
        let next = (at + 1..batch.len()).find(|next| whole_entry(batch, *next, names).is_some());
        let next = next.unwrap_or(batch.len());
        salvaged.take_broken(&batch[at..next], names);
        at = next;
    }
    salvaged
}

impl Salvaged {
    /// `bytes` begin where an entry should, and end where the next one does, or the batch.
    fn take_broken(&mut self, bytes: &[u8], names: &FamilyNames) {
        let Some((tag, family, key, value)) = entry_start(bytes, names) else {
            return self.lost.push(Lost::Bytes(bytes.len()));
        };
        let name = &names[&family];
        if name != key::LOG || tag != PUT {
            return self.lost.push(Lost::Entry(name.clone(), key.to_vec()));
        }
        let Some((queue, first)) = key::parse_numbered(key) else {
            return self.lost.push(Lost::Bytes(bytes.len()));
        };
        if !holds_a_record(queue, first, value) {
            return self.lost.push(Lost::Records(queue, first));
        }
        // Readers skip what is damaged in it.
        self.lost.push(Lost::Records(queue, first));
        self.entries.push(PUT);
        put_varint(&mut self.entries, family);
        for part in [key, value] {
            put_varint(&mut self.entries, part.len() as u64);
            self.entries.extend_from_slice(part);
        }
        self.count += 1;
    }
}

/// Tag, family, key and as much of the value as there is, if an entry of a known family begins here.
fn entry_start<'a>(bytes: &'a [u8], names: &FamilyNames) -> Option<(u8, u64, &'a [u8], &'a [u8])> {
    let (&tag, mut rest) = bytes.split_first()?;
    if !matches!(tag, PUT | DELETE | SINGLE_DELETE | DELETE_RANGE) {
        return None;
    }
    let family = take_varint(&mut rest)?;
    let name = names.get(&family)?;
    let key = take_slice(&mut rest).filter(|key| is_key_of(name, tag, key))?;
    if tag != PUT {
        return Some((tag, family, key, &[]));
    }
    let length = usize::try_from(take_varint(&mut rest)?).ok()?;
    Some((tag, family, key, rest.get(..length).unwrap_or(rest)))
}

/// Whether a family has keys of this length; bounds of ranges may be shorter.
fn is_key_of(family: &str, tag: u8, key: &[u8]) -> bool {
    match family {
        key::LOG | key::CONSUMED if tag == DELETE_RANGE => matches!(key.len(), 8 | 16),
        key::LOG | key::CONSUMED => key.len() == 16,
        key::STATE | key::BODIES => key.len() == 8,
        key::BODY_REFERENCES => matches!((key.first(), key.len()), (Some(0..=2), 9) | (Some(1), 17)),
        key::NOTES => key.len() >= key::OWNER_BYTES,
        key::META | key::META_COPY => matches!(key.first(), Some(0 | 1)),
        _ => !key.is_empty(), // of a later version
    }
}

/// The entry at `at`, if nothing about it is damaged. What has no checksum, has to be followed by what makes sense.
fn whole_entry<'a>(batch: &'a [u8], at: usize, names: &FamilyNames) -> Option<Entry<'a>> {
    let entry = sound_entry(batch, at, names)?;
    match entry.tag {
        PUT if has_checksums(&names[&entry.family], entry.key) => {
            is_whole_value(&names[&entry.family], entry.key, entry.value).then_some(entry)
        }
        _ => {
            let follows = entry.end == batch.len() || sound_entry(batch, entry.end, names).is_some();
            let ordered = entry.tag != DELETE_RANGE || entry.key < entry.value;
            (follows && ordered).then_some(entry)
        }
    }
}

/// The entry at `at`, if its structure is sound.
fn sound_entry<'a>(batch: &'a [u8], at: usize, names: &FamilyNames) -> Option<Entry<'a>> {
    let (tag, family, key, _) = entry_start(batch.get(at..)?, names)?;
    let mut rest = &batch[at + 1..];
    take_varint(&mut rest)?;
    take_slice(&mut rest)?;
    let value = match tag {
        PUT | DELETE_RANGE => take_slice(&mut rest)?,
        _ => &[],
    };
    if tag == DELETE_RANGE && !is_key_of(&names[&family], tag, value) {
        return None;
    }
    Some(Entry { tag, family, key, value, end: batch.len() - rest.len() })
}

/// Whether a value says itself if it is what was written.
fn has_checksums(family: &str, key: &[u8]) -> bool {
    match family {
        key::LOG | key::STATE | key::CONSUMED | key::NOTES => true,
        key::META | key::META_COPY => key.first() == Some(&key::DEFINITION_PREFIX),
        _ => false,
    }
}

/// Whether every checksum of a value is right. What has none is taken as it is.
pub fn is_whole_value(family: &str, key: &[u8], value: &[u8]) -> bool {
    match family {
        key::LOG => key::parse_numbered(key).is_some_and(|(queue, first)| {
            let mut reader = RunReader::new(queue, first);
            let mut records = std::iter::from_fn(|| reader.next(value)).peekable();
            records.peek().is_some() && records.all(|record| record.is_ok())
        }),
        key::NOTES => notes::is_intact(key, value),
        _ if !has_checksums(family, key) => !family.starts_with(key::META) || value.len() == 8,
        _ => recovery::is_intact(family, key, value),
    }
}

fn holds_a_record(queue: QueueId, first: QueueSeq, value: &[u8]) -> bool {
    let mut reader = RunReader::new(queue, first);
    std::iter::from_fn(|| reader.next(value)).any(|record| record.is_ok())
}

#[cfg(test)]
mod tests {
    use super::super::super::run::RunWriter;
    use super::*;

    const NAMES: [(u64, &str); 2] = [(2, key::LOG), (3, key::STATE)];

    fn names() -> FamilyNames {
        NAMES.into_iter().map(|(id, name)| (id, name.to_owned())).collect()
    }

    fn put(batch: &mut Vec<u8>, family: u8, key: &[u8], value: &[u8]) {
        batch.extend_from_slice(&[PUT, family]);
        for part in [key, value] {
            put_varint(batch, part.len() as u64);
            batch.extend_from_slice(part);
        }
    }

    /// Ten queues with ten records and a state each, and the ranges of their entries.
    fn batch() -> (Vec<u8>, Vec<std::ops::Range<usize>>) {
        let (mut batch, mut entries) = (vec![0; HEADER_BYTES], Vec::new());
        for id in 1..=10 {
            let mut runs = RunWriter::default();
            for seq in 0..10 {
                let cut = runs.append(QueueId(id), seq, format!("record {seq} of {id}").as_bytes());
                assert_eq!(cut, None);
            }
            let run = runs.finish().unwrap();
            let start = batch.len();
            put(
                &mut batch,
                2,
                &key::numbered(QueueId(id), 0),
                runs.encoded(&run, &mut Vec::new(), &mut |_, _| unreachable!("no large bodies")),
            );
            entries.push(start..batch.len());
            let state = recovery::encode_state(QueueId(id), &Default::default());
            let start = batch.len();
            put(&mut batch, 3, &key::queue(QueueId(id)), &state);
            entries.push(start..batch.len());
        }
        (batch, entries)
    }

    #[test]
    fn whatever_bit_is_flipped_only_its_entry_suffers() {
        let (batch, entries) = batch();
        for at in HEADER_BYTES..batch.len() {
            for bit in 0..8 {
                let mut broken = batch.clone();
                broken[at] ^= 1 << bit;
                let salvaged = salvage(&broken, HEADER_BYTES, &names());
                let damaged = entries.iter().position(|entry| entry.contains(&at)).unwrap();
                for (index, entry) in entries.iter().enumerate().filter(|(index, _)| *index != damaged) {
                    let bytes = &batch[entry.clone()];
                    let kept = salvaged.entries.windows(bytes.len()).any(|window| window == bytes);
                    assert!(kept, "entry {index} with bit {bit} of byte {at} flipped");
                }
                assert_eq!(salvaged.lost.len(), 1, "{:?}", salvaged.lost);
            }
        }
    }

    #[test]
    fn a_whole_batch_is_kept_as_it_is() {
        let (batch, entries) = batch();
        let salvaged = salvage(&batch, HEADER_BYTES, &names());
        assert_eq!((salvaged.count as usize, salvaged.lost), (entries.len(), vec![]));
        assert_eq!(salvaged.entries, batch[HEADER_BYTES..]);
    }
}
