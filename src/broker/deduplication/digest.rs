//! What stands for a header value in the cache: 128 bits of the SHA-256 of its type and value.
//!
//! A cryptographic hash, because publishers choose the values: with a weaker one, somebody could make two that are taken
//! for the same.

use sha2::{Digest as _, Sha256};

use crate::model::properties::RawEntry;

pub(super) const DIGEST_BYTES: usize = 16;

pub(super) type Digest = [u8; DIGEST_BYTES];

/// From here on, not every integer is a double.
const MAX_EXACT_INTEGER: f64 = 9_007_199_254_740_992.0;

/// The digest of a value; `None` for void and false, which are no value.
pub(super) fn of(entry: &RawEntry<'_>) -> Option<Digest> {
    let value = entry.value();
    if let Some(integer) = entry.integer() {
        return Some(hash(b'n', &integer.to_be_bytes()));
    }
    match entry.tag {
        b'V' => None,
        b't' => (value.first()? != &0).then(|| hash(b't', &[])),
        b'f' => Some(of_float(f64::from(f32::from_be_bytes(*value.first_chunk()?)))),
        b'd' => Some(of_float(f64::from_be_bytes(*value.first_chunk()?))),
        tag => Some(hash(tag, value)),
    }
}

fn of_float(number: f64) -> Digest {
    if number.fract() == 0.0 && number.abs() <= MAX_EXACT_INTEGER {
        return hash(b'n', &(number as i64).to_be_bytes());
    }
    hash(b'd', &number.to_be_bytes())
}

fn hash(family: u8, value: &[u8]) -> Digest {
    let whole = Sha256::new().chain_update([family]).chain_update(value).finalize();
    let mut digest = [0; DIGEST_BYTES];
    digest.copy_from_slice(&whole[..DIGEST_BYTES]);
    digest
}
