//! The header `x-stream-offset` that every delivery from a stream carries.

use crate::model::properties::{Properties, raw_entries};

const NAME: &[u8] = b"x-stream-offset";
/// Bit of the flag word: a header table is there.
const HEADERS: u16 = 1 << 13;
/// The properties before it, both short strings: content type and content encoding.
const BEFORE_HEADERS: [u16; 2] = [1 << 15, 1 << 14];
/// The entry: a name with its length, the type, and the value.
const ENTRY_BYTES: usize = 1 + NAME.len() + 1 + 8;

/// Writes properties with the offset added. Messages of a stream mostly have the same properties, so the last ones are
/// kept and only the number in them is replaced.
#[derive(Default)]
pub(super) struct OffsetHeader {
    original: Vec<u8>,
    with_offset: Vec<u8>,
    /// Where the value stands in `with_offset`.
    value_at: usize,
}

impl OffsetHeader {
    /// The raw properties with header `x-stream-offset`, a `long`, in its place in the order of names. One that the publisher
    /// had set is replaced.
    pub fn write(&mut self, properties: &[u8], offset: u64) -> &[u8] {
        if self.with_offset.is_empty() || self.original != properties {
            self.original.clear();
            self.original.extend_from_slice(properties);
            self.rebuild();
        }
        let value = i64::try_from(offset).unwrap_or(i64::MAX).to_be_bytes();
        if let Some(place) = self.with_offset.get_mut(self.value_at..self.value_at + 8) {
            place.copy_from_slice(&value);
        }
        &self.with_offset
    }

    /// Gives the memory of large properties back.
    pub fn rest(&mut self) {
        if self.original.capacity() > 4 << 10 {
            *self = OffsetHeader::default();
        }
    }

    fn rebuild(&mut self) {
        let (raw, out) = (self.original.as_slice(), &mut self.with_offset);
        out.clear();
        let flags = raw.first_chunk().map_or(0, |flags| u16::from_be_bytes(*flags));
        out.extend_from_slice(&(flags | HEADERS).to_be_bytes());
        let rest = raw.get(2..).unwrap_or_default();
        let mut at = 0;
        for bit in BEFORE_HEADERS {
            if flags & bit != 0 {
                at += 1 + usize::from(rest.get(at).copied().unwrap_or(0));
            }
        }
        let (before, after) = rest.split_at(at.min(rest.len()));
        out.extend_from_slice(before);
        let table = Properties::parse(raw).ok().and_then(|view| view.raw_headers()).unwrap_or_default();
        let table_at = out.len();
        out.extend_from_slice(&[0; 4]);
        self.value_at = add_entry(table, out);
        let table_len = (out.len() - table_at - 4) as u32;
        out[table_at..table_at + 4].copy_from_slice(&table_len.to_be_bytes());
        out.extend_from_slice(after.get(table.len()..).unwrap_or_default());
    }
}

/// Copies the entries of a raw table with the new one among them; answers where its value stands.
fn add_entry(table: &[u8], out: &mut Vec<u8>) -> usize {
    let mut value_at = None;
    let mut read = 4;
    for entry in raw_entries(table) {
        read += entry.bytes.len();
        if value_at.is_none() && entry.key >= NAME {
            value_at = Some(push_entry(out));
        }
        if entry.key != NAME {
            out.extend_from_slice(entry.bytes);
        }
    }
    let value_at = value_at.unwrap_or_else(|| push_entry(out));
    // A type that is not known here: passed through as it is.
    out.extend_from_slice(table.get(read..).unwrap_or_default());
    value_at
}

fn push_entry(out: &mut Vec<u8>) -> usize {
    out.reserve(ENTRY_BYTES);
    out.push(NAME.len() as u8);
    out.extend_from_slice(NAME);
    out.push(b'l');
    out.extend_from_slice(&[0; 8]);
    out.len() - 8
}

#[cfg(test)]
mod tests {
    use amq_protocol::{
        frame::WriteContext,
        protocol::{BasicProperties, basic::gen_properties},
        types::{AMQPValue, FieldTable},
    };
    use proptest::prelude::*;

    use super::*;

    fn encode(properties: &BasicProperties) -> Vec<u8> {
        gen_properties(properties)(WriteContext::from(Vec::new())).unwrap().into_inner().0
    }

    proptest! {
        #[test]
        fn the_header_is_added_and_nothing_else_changes(flags in 0u16..64, names in proptest::collection::btree_set("[a-z-]{1,18}", 0..6), own: bool, offset in 0u64..1 << 62, other in 0u64..1 << 62) {
            let mut table = FieldTable::default();
            for name in &names { table.insert(name.as_str().into(), AMQPValue::LongString(name.as_str().into())); }
            if own { table.insert("x-stream-offset".into(), AMQPValue::LongString("mine".into())); }
            let mut properties = BasicProperties::default();
            if flags & 1 != 0 { properties = properties.with_content_type("text".into()); }
            if flags & 2 != 0 { properties = properties.with_content_encoding("".into()); }
            if flags & 4 != 0 { properties = properties.with_headers(table.clone()); }
            if flags & 8 != 0 { properties = properties.with_delivery_mode(2); }
            if flags & 16 != 0 { properties = properties.with_expiration("7".into()); }
            if flags & 32 != 0 { properties = properties.with_cluster_id("c".into()); }
            let mut expected_table = if flags & 4 != 0 { table } else { FieldTable::default() };
            let mut header = OffsetHeader::default();
            for offset in [offset, other] {
                expected_table.insert("x-stream-offset".into(), AMQPValue::LongLongInt(offset as i64));
                let expected = encode(&properties.clone().with_headers(expected_table.clone()));
                prop_assert_eq!(header.write(&encode(&properties), offset), &expected[..]);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(raw in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = OffsetHeader::default().write(&raw, 7);
        }
    }

    #[test]
    fn a_type_that_is_not_known_passes_through() {
        let mut header = OffsetHeader::default();
        let raw = [0x20, 0, 0, 0, 0, 6, 1, b'a', b't', 1, b'?', b'?'];
        let written = header.write(&raw, 1).to_vec();
        assert!(written.windows(2).any(|pair| pair == b"??"));
        assert_eq!(written.len(), raw.len() + ENTRY_BYTES);
    }
}
