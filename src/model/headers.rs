//! Header tables edited as bytes: what the broker adds to a message's headers, in the form in which RabbitMQ sends them.
//!
//! RabbitMQ decodes and encodes the table of every message it delivers. What clients can see of that: the entries are
//! sorted by their keys' bytes, of entries with the same key the first one stays, the broker's own win over the client's,
//! 64-bit integers have the tag `l` and booleans are 0 or 1. Tables inside keep their order. See
//! `rabbit_binary_parser` and `mc_amqpl:protocol_state/2` in its source.

use smallvec::SmallVec;

use super::properties::{Properties, raw_entries, value_width};

/// Tables and arrays inside one another; more than a publish may have.
const MAX_DEPTH: usize = 64;

/// A value the broker adds.
#[derive(Clone, Copy, Debug)]
pub enum AddedValue<'a> {
    /// A 64-bit integer (`l`).
    Long(i64),
    /// A long string (`S`).
    LongString(&'a [u8]),
    /// Type tag and value, encoded.
    Raw(&'a [u8]),
}

/// A header the broker adds. The key has at most 255 bytes.
#[derive(Clone, Copy, Debug)]
pub struct AddedHeader<'a> {
    pub key: &'a [u8],
    pub value: AddedValue<'a>,
}

impl AddedHeader<'_> {
    fn write(&self, out: &mut Vec<u8>) {
        out.push(self.key.len() as u8);
        out.extend_from_slice(self.key);
        match self.value {
            AddedValue::Long(number) => {
                out.push(b'l');
                out.extend_from_slice(&number.to_be_bytes());
            }
            AddedValue::LongString(text) => write_long_string(text, out),
            AddedValue::Raw(bytes) => out.extend_from_slice(bytes),
        }
    }
}

/// Appends type tag, length and bytes of a long string.
pub fn write_long_string(text: &[u8], out: &mut Vec<u8>) {
    out.push(b'S');
    out.extend_from_slice(&(text.len() as u32).to_be_bytes());
    out.extend_from_slice(text);
}

/// Appends a length that is not known yet to `out`, lets `write` append what it counts, and fills it in.
pub fn write_counted(out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) {
    let at = out.len();
    out.extend_from_slice(&[0; 4]);
    write(out);
    let len = (out.len() - at - 4) as u32;
    out[at..at + 4].copy_from_slice(&len.to_be_bytes());
}

/// Replaces `out` with `properties` that have `added` among their headers, whose keys ascend and differ.
///
/// Properties without a header table get one. Bytes that are no properties are copied as they are.
///
/// # Cost
/// One walk over the table and one copy; a table whose keys do not ascend is sorted.
pub fn add_headers(properties: &[u8], added: &[AddedHeader<'_>], out: &mut Vec<u8>) {
    out.clear();
    match Properties::parse(properties) {
        Ok(view) => view.write_with_headers(out, true, |table, out| merge(table, added, out)),
        Err(_) => out.extend_from_slice(properties),
    }
}

/// Appends the raw table (with its length) of the entries of `table` and of `added`, whose keys ascend and differ.
pub fn merge(table: Option<&[u8]>, added: &[AddedHeader<'_>], out: &mut Vec<u8>) {
    debug_assert!(added.is_sorted_by(|a, b| a.key < b.key));
    let mut kept: SmallVec<[(&[u8], &[u8]); 16]> = SmallVec::new();
    let mut ascending = true;
    for entry in table.into_iter().flat_map(raw_entries) {
        ascending &= kept.last().is_none_or(|last| last.0 < entry.key);
        kept.push((entry.key, entry.bytes));
    }
    if !ascending {
        kept.sort_by_key(|entry| entry.0);
        kept.dedup_by_key(|entry| entry.0);
    }
    out.reserve(table.map_or(4, <[u8]>::len) + added.len() * 48);
    write_counted(out, |out| {
        let mut added = added;
        for (key, bytes) in kept {
            while let Some((first, rest)) = added.split_first()
                && first.key < key
            {
                first.write(out);
                added = rest;
            }
            if added.first().is_some_and(|first| first.key == key) {
                continue; // written before the next key, or at the end
            }
            let value_at = out.len() + 1 + key.len();
            out.extend_from_slice(bytes);
            normalise(&mut out[value_at..], MAX_DEPTH);
        }
        added.iter().for_each(|header| header.write(out));
    });
}

/// Gives a value (with its tag) the form RabbitMQ sends; lengths do not change.
fn normalise(value: &mut [u8], depth: usize) {
    let Some((tag, content)) = value.split_first_mut() else { return };
    match *tag {
        b'L' => *tag = b'l',
        b't' => content.iter_mut().for_each(|truth| *truth = u8::from(*truth != 0)),
        b'F' | b'A' if depth > 0 => {
            let keyed = *tag == b'F';
            let mut rest = content.get_mut(4..).unwrap_or_default();
            while !rest.is_empty() {
                let value_at = if keyed { 1 + rest[0] as usize } else { 0 };
                let Some((&tag, after)) = rest.get(value_at..).and_then(<[u8]>::split_first) else { return };
                let Some(width) = value_width(tag, after) else { return };
                let bytes = std::mem::take(&mut rest);
                let Some((entry, tail)) = bytes.split_at_mut_checked(value_at + 1 + width) else { return };
                normalise(&mut entry[value_at..], depth - 1);
                rest = tail;
            }
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn table(entries: &[(&[u8], &[u8])]) -> Vec<u8> {
        let mut out = Vec::new();
        write_counted(&mut out, |out| {
            for (key, value) in entries {
                out.push(key.len() as u8);
                out.extend_from_slice(key);
                out.extend_from_slice(value);
            }
        });
        out
    }

    fn merged(entries: &[(&[u8], &[u8])], added: &[(&[u8], i64)]) -> Vec<u8> {
        let added: Vec<_> =
            added.iter().map(|&(key, number)| AddedHeader { key, value: AddedValue::Long(number) }).collect();
        let mut out = Vec::new();
        merge(Some(&table(entries)), &added, &mut out);
        out
    }

    #[test]
    fn entries_are_sorted_and_the_first_of_a_key_stays() {
        let out = merged(&[(b"b", b"t\x01"), (b"a", b"V"), (b"b", b"V"), (b"", b"V"), (b"a", b"t\x01")], &[]);
        assert_eq!(out, table(&[(b"", b"V"), (b"a", b"V"), (b"b", b"t\x01")]));
    }

    #[test]
    fn the_brokers_value_wins_wherever_its_key_belongs() {
        let one: &[u8] = b"l\0\0\0\0\0\0\0\x01";
        let entries: [(&[u8], &[u8]); 4] = [(b"m", b"V"), (b"c", b"V"), (b"x", b"V"), (b"c", b"V")];
        let out = merged(&entries, &[(b"a", 1), (b"c", 1), (b"n", 1), (b"z", 1)]);
        assert_eq!(out, table(&[(b"a", one), (b"c", one), (b"m", b"V"), (b"n", one), (b"x", b"V"), (b"z", one)]));
    }

    #[test]
    fn integers_and_booleans_are_written_as_rabbitmq_writes_them() {
        let nested = [b"F".as_slice(), &table(&[(b"z", b"L\0\0\0\0\0\0\0\x07"), (b"a", b"t\x09")])].concat();
        let array = [b"A\0\0\0\x0b".as_slice(), b"L\0\0\0\0\0\0\0\x07", b"t\x05"].concat();
        let out = merged(&[(b"a", b"L\0\0\0\0\0\0\0\x07"), (b"b", b"t\x02"), (b"n", &nested), (b"o", &array)], &[]);
        let nested = [b"F".as_slice(), &table(&[(b"z", b"l\0\0\0\0\0\0\0\x07"), (b"a", b"t\x01")])].concat();
        let array = [b"A\0\0\0\x0b".as_slice(), b"l\0\0\0\0\0\0\0\x07", b"t\x01"].concat();
        assert_eq!(out, table(&[(b"a", b"l\0\0\0\0\0\0\0\x07"), (b"b", b"t\x01"), (b"n", &nested), (b"o", &array)]));
    }

    #[test]
    fn absent_tables_are_added_behind_the_content_encoding() {
        let added = [AddedHeader { key: b"h", value: AddedValue::Long(5) }];
        let table = table(&[(b"h", b"l\0\0\0\0\0\0\0\x05")]);
        let mut out = Vec::new();
        add_headers(&[0, 0], &added, &mut out);
        assert_eq!(out, [&[0x20, 0][..], &table].concat());
        add_headers(b"\xd0\x00\x01t\x02ee\x02", &added, &mut out);
        assert_eq!(out, [&b"\xf0\x00\x01t\x02ee"[..], &table, b"\x02"].concat());
    }

    proptest! {
        #[test]
        fn merging_is_a_map_of_first_values(
            entries in proptest::collection::vec(("[a-f]{0,2}", 0u8..2), 0..12),
            added in proptest::collection::btree_map("[a-f]{0,2}", any::<i64>(), 0..4),
        ) {
            let truth = |value: u8| [b't', value];
            let values: Vec<[u8; 2]> = entries.iter().map(|entry| truth(entry.1)).collect();
            let pairs: Vec<(&[u8], &[u8])> = entries.iter().zip(&values).map(|(entry, value)| (entry.0.as_bytes(), &value[..])).collect();
            let mut expected = std::collections::BTreeMap::new();
            for (key, value) in &pairs {
                expected.entry(key.to_vec()).or_insert(value.to_vec());
            }
            for (key, number) in &added {
                expected.insert(key.clone().into_bytes(), [&b"l"[..], &number.to_be_bytes()].concat());
            }
            let expected: Vec<(&[u8], &[u8])> = expected.iter().map(|(key, value)| (&key[..], &value[..])).collect();
            let added: Vec<(&[u8], i64)> = added.iter().map(|(key, number)| (key.as_bytes(), *number)).collect();
            prop_assert_eq!(merged(&pairs, &added), table(&expected));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let added = [AddedHeader { key: b"x", value: AddedValue::LongString(b"y") }];
            let mut out = Vec::new();
            add_headers(&bytes, &added, &mut out);
            merge(Some(&bytes), &added, &mut out);
            normalise(&mut out, 3);
        }
    }
}
