//! Headers the broker adds to what it delivers, such as `x-delivery-count`. The stored message stays as it is.

use smallvec::SmallVec;

use crate::model::headers::{AddedHeader, AddedValue, add_headers};

/// Failed deliveries of a message, from the first one on (quorum queues).
pub const DELIVERY_COUNT: &str = "x-delivery-count";
/// How often a message came back from a consumer, for whatever cause (quorum queues).
pub const ACQUIRED_COUNT: &str = "x-acquired-count";

/// Replaces `out` with `properties` that have the given headers as 64-bit integers, in the form RabbitMQ delivers: the table
/// is sorted by key, each key is there once, and the broker's values win. Names have at most 255 bytes; of equal ones the
/// first counts.
///
/// Hot path: once per redelivery. Nothing is decoded, and nothing allocated once `out` is large enough, unless there are
/// more than sixteen headers.
pub fn add_counts(properties: &[u8], counts: &[(&str, i64)], out: &mut Vec<u8>) {
    let mut added: SmallVec<[AddedHeader<'_>; 4]> = counts
        .iter()
        .map(|(name, count)| AddedHeader { key: name.as_bytes(), value: AddedValue::Long(*count) })
        .collect();
    added.sort_by_key(|header| header.key);
    added.dedup_by_key(|header| header.key);
    add_headers(properties, &added, out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{headers::write_counted, properties::Properties};

    /// The properties RabbitMQ 4.3.6 delivers from a quorum queue after one `basic.reject` with requeue.
    #[test]
    fn redeliveries_carry_their_counts_as_from_rabbitmq() {
        let counts = [(DELIVERY_COUNT, 1), (ACQUIRED_COUNT, 1)];
        let mut out = b"left over".to_vec();
        let published = [b"\x20\0\0\0\0\x11".as_slice(), b"\x04x-zzI\0\0\0\x01", b"\x01aI\0\0\0\x02"].concat();
        add_counts(&published, &counts, &mut out);
        let delivered = "2000000000450161490000000210782d61637175697265642d636f756e746c000000000000000110782d64656c697665\
                         72792d636f756e746c000000000000000104782d7a7a4900000001";
        assert_eq!(out, unhex(delivered));
        let mut repeated = b"\x20\0".to_vec();
        write_counted(&mut repeated, |out| {
            out.extend_from_slice(b"\x04x-zzI\0\0\0\x01\x10x-acquired-countS\0\0\0\x04mine");
            out.extend_from_slice(b"\x01aL\0\0\0\0\0\0\0\x02\x01aI\0\0\0\x03");
        });
        add_counts(&repeated, &counts, &mut out);
        let delivered = "20000000004901616c000000000000000210782d61637175697265642d636f756e746c000000000000000110782d6465\
                         6c69766572792d636f756e746c000000000000000104782d7a7a4900000001";
        assert_eq!(out, unhex(delivered));
    }

    #[test]
    fn properties_without_headers_get_a_table() {
        let mut out = Vec::new();
        add_counts(b"\x10\0\x02", &[(ACQUIRED_COUNT, 3)], &mut out);
        let view = Properties::parse(&out).unwrap();
        assert!(view.is_persistent());
        assert_eq!(view.raw_headers(), Some(&b"\0\0\0\x1a\x10x-acquired-countl\0\0\0\0\0\0\0\x03"[..]));
    }

    fn unhex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }
}
