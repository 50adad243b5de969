//! The header `x-stream-offset` that every delivery from a stream carries.

use crate::{
    broker::delivery_headers::add_counts,
    model::properties::{Properties, raw_entries},
};

const NAME: &str = "x-stream-offset";

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
            add_counts(properties, &[(NAME, 0)], &mut self.with_offset);
            self.value_at = value_at(&self.with_offset).unwrap_or(usize::MAX);
        }
        let value = i64::try_from(offset).unwrap_or(i64::MAX).to_be_bytes();
        if let Some(place) = self.with_offset.get_mut(self.value_at..).and_then(<[u8]>::first_chunk_mut) {
            *place = value;
        }
        &self.with_offset
    }

    /// Gives the memory of large properties back.
    pub fn rest(&mut self) {
        if self.original.capacity() > 4 << 10 {
            *self = OffsetHeader::default();
        }
    }
}

/// Where the value of the header stands in raw properties.
fn value_at(properties: &[u8]) -> Option<usize> {
    let headers = Properties::parse(properties).ok()?.raw_headers()?;
    let table_at = headers.as_ptr() as usize - properties.as_ptr() as usize;
    let mut end = table_at + 4;
    for entry in raw_entries(headers) {
        end += entry.bytes.len();
        if entry.key == NAME.as_bytes() {
            return end.checked_sub(8);
        }
    }
    None
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
}
