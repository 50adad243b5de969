//! A hash that is the same on every machine and in every run, so that a hashed message keeps its destination over a
//! restart and an upgrade. Changing it sends messages elsewhere: that is a breaking change.
//!
//! FNV-1a over the bytes, then SplitMix64's finalizer, which spreads the result over all 64 bits.

use amq_protocol::types::AMQPValue;

use crate::model::{arguments, erlang};

const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;
const FNV_PRIME: u64 = 0x0000_0100_0000_01b3;

/// A hash in the making.
#[derive(Clone, Copy, Debug)]
pub struct StableHasher(u64);

impl StableHasher {
    pub fn new() -> Self {
        Self(FNV_OFFSET)
    }

    /// Adds bytes. What tells two neighbours apart is the caller's business.
    #[must_use]
    pub fn bytes(self, bytes: &[u8]) -> Self {
        Self(bytes.iter().fold(self.0, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(FNV_PRIME)))
    }

    /// Adds a string with its length, so that neighbours stay apart.
    #[must_use]
    pub fn string(self, bytes: &[u8]) -> Self {
        self.bytes(&(bytes.len() as u64).to_le_bytes()).bytes(bytes)
    }

    pub fn finish(self) -> u64 {
        mix(self.0)
    }
}

/// Spreads a number over all 64 bits, one to one.
pub fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// Hashes a byte string.
pub fn hash_bytes(bytes: &[u8]) -> u64 {
    StableHasher::new().bytes(b"s").bytes(bytes).finish()
}

/// Hashes what is not there; a value without content counts as not there.
pub fn hash_nothing() -> u64 {
    StableHasher::new().bytes(b"n").finish()
}

/// Hashes a header's value. As in RabbitMQ the width of an integer does not matter, and of an array the first element is
/// hashed.
pub fn hash_value(value: &AMQPValue) -> u64 {
    let mut value = value;
    while let AMQPValue::FieldArray(array) = value {
        let Some(first) = array.as_slice().first() else {
            return hash_nothing();
        };
        value = first;
    }
    if let Some(bytes) = arguments::as_longstr(value) {
        return hash_bytes(bytes);
    }
    if let Some(integer) = arguments::as_integer(value) {
        return StableHasher::new().bytes(b"i").bytes(&integer.to_le_bytes()).finish();
    }
    match value {
        AMQPValue::Void => hash_nothing(),
        AMQPValue::ByteArray(bytes) => hash_bytes(bytes.as_slice()),
        // Everything else is rare: what a text shows of it is enough.
        other => StableHasher::new()
            .string(arguments::type_name(other).as_bytes())
            .string(erlang::term(other).as_bytes())
            .finish(),
    }
}

#[cfg(test)]
mod tests {
    use amq_protocol::types::FieldArray;

    use super::*;

    #[test]
    fn the_hash_never_changes() {
        assert_eq!(hash_bytes(b""), 0xbdf1_8d39_90fb_6460);
        assert_eq!(hash_bytes(b"key"), 0x03be_12a1_cae6_4173);
        assert_eq!(hash_nothing(), 0x0a86_dec9_6e5f_3ef6);
        assert_eq!(hash_value(&AMQPValue::LongInt(1)), 0x81a0_0fd3_bfdc_2c48);
    }

    #[test]
    fn values_hash_by_what_they_are_and_not_by_their_width() {
        let array = |values: Vec<AMQPValue>| AMQPValue::FieldArray(FieldArray::from(values));
        let one = hash_value(&AMQPValue::LongInt(1));
        assert_eq!(hash_value(&AMQPValue::ShortShortUInt(1)), one);
        assert_eq!(hash_value(&array(vec![AMQPValue::LongLongInt(1), AMQPValue::LongInt(2)])), one);
        assert_eq!(hash_value(&AMQPValue::LongString("1".into())), hash_bytes(b"1"));
        assert_eq!(hash_value(&AMQPValue::Void), hash_nothing());
        assert_eq!(hash_value(&array(vec![])), hash_nothing());
        let different = [
            one,
            hash_bytes(b"1"),
            hash_bytes(b""),
            hash_nothing(),
            hash_value(&AMQPValue::Double(1.0)),
            hash_value(&AMQPValue::Boolean(true)),
            hash_value(&AMQPValue::Timestamp(1)),
        ];
        for (place, hash) in different.iter().enumerate() {
            assert!(!different[..place].contains(hash), "{place}");
        }
    }
}
