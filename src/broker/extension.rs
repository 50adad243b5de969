//! What the broker notes of a message beside what its publisher said: when it expires, that the broker dead-lettered it
//! before, with which routing key and after how many failed deliveries, and the keys of a `BCC` header, which is not
//! delivered.
//!
//! Layout: `bits:u8`, then what the bits announce: `expires:u40` (milliseconds since [`EPOCH_UNIX_MS`], little-endian),
//! `deliveries:u32` (little-endian), nothing for a death or a sole key, the keys as short strings to the end. An ordinary
//! message has no extension at all.

use smallvec::SmallVec;

/// 2025-01-01 00:00 UTC.
pub const EPOCH_UNIX_MS: u64 = 1_735_689_600_000;
/// The latest time that can be written, some 34 years after the epoch.
const MAX_SINCE_MS: u64 = (1 << 40) - 1;
/// Extensions stay below it: their length is written in two bytes.
pub const MAX_BYTES: usize = 0xffff;

const EXPIRES: u8 = 1;
const DIED: u8 = 2;
const KEYS: u8 = 4;
const SOLE_KEY: u8 = 8;
const DELIVERIES: u8 = 16;
const EXPIRES_BYTES: usize = 5;
const DELIVERIES_BYTES: usize = 4;

/// An extension taken apart. The default is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extension<'a> {
    /// When the message expires, in Unix milliseconds.
    pub expires_unix_ms: Option<u64>,
    /// The broker dead-lettered it before: `x-death` among its headers is the broker's own.
    pub died: bool,
    /// A dead-letter routing key took the place of all its routing keys: `CC` and `BCC` route it no more.
    pub sole_key: bool,
    /// Failed deliveries in the queues it was dead-lettered from; with any, it is redelivered from the first delivery on.
    pub deliveries: u32,
    /// Routing keys from `BCC`, as short strings end to end.
    pub hidden_keys: &'a [u8],
}

/// An encoded extension.
pub type ExtensionBytes = SmallVec<[u8; 16]>;

/// The expiry instant of an encoded extension, without reading the rest.
#[inline]
pub fn expires_unix_ms(extension: &[u8]) -> Option<u64> {
    let (bits, rest) = extension.split_first()?;
    if bits & EXPIRES == 0 {
        return None;
    }
    let [a, b, c, d, e] = *rest.first_chunk::<EXPIRES_BYTES>()?;
    Some(EPOCH_UNIX_MS + u64::from_le_bytes([a, b, c, d, e, 0, 0, 0]))
}

impl<'a> Extension<'a> {
    /// Takes encoded bytes apart; what is cut short is left out.
    pub fn parse(bytes: &'a [u8]) -> Self {
        let Some((&bits, mut rest)) = bytes.split_first() else { return Extension::default() };
        let expires_unix_ms = expires_unix_ms(bytes);
        if bits & EXPIRES != 0 {
            rest = rest.get(EXPIRES_BYTES..).unwrap_or_default();
        }
        let mut deliveries = 0;
        if bits & DELIVERIES != 0
            && let Some((count, after)) = rest.split_first_chunk::<DELIVERIES_BYTES>()
        {
            (deliveries, rest) = (u32::from_le_bytes(*count), after);
        }
        let hidden_keys = if bits & KEYS != 0 { rest } else { &[] };
        let (died, sole_key) = (bits & DIED != 0, bits & SOLE_KEY != 0);
        Extension { expires_unix_ms, died, sole_key, deliveries, hidden_keys }
    }

    /// Whether there is nothing to note.
    pub fn is_empty(&self) -> bool {
        *self == Extension::default()
    }

    /// Encodes it; empty when there is nothing to note. Hidden keys that would make it too long are left out.
    pub fn encode(&self) -> ExtensionBytes {
        let mut out = ExtensionBytes::new();
        if self.is_empty() {
            return out;
        }
        let fixed_bytes = 1 + EXPIRES_BYTES + DELIVERIES_BYTES;
        let keys = if self.hidden_keys.len() + fixed_bytes <= MAX_BYTES { self.hidden_keys } else { &[] };
        let bits = (u8::from(self.expires_unix_ms.is_some()) * EXPIRES)
            | (u8::from(self.died) * DIED)
            | (u8::from(!keys.is_empty()) * KEYS)
            | (u8::from(self.sole_key) * SOLE_KEY)
            | (u8::from(self.deliveries > 0) * DELIVERIES);
        out.push(bits);
        if let Some(expires) = self.expires_unix_ms {
            let since = expires.saturating_sub(EPOCH_UNIX_MS).min(MAX_SINCE_MS);
            out.extend_from_slice(&since.to_le_bytes()[..EXPIRES_BYTES]);
        }
        if self.deliveries > 0 {
            out.extend_from_slice(&self.deliveries.to_le_bytes());
        }
        out.extend_from_slice(keys);
        out
    }

    /// The hidden keys one by one.
    pub fn keys(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let mut rest = self.hidden_keys;
        std::iter::from_fn(move || {
            let (&len, after) = rest.split_first()?;
            let (key, after) = after.split_at_checked(len as usize)?;
            rest = after;
            Some(key)
        })
    }
}

/// Keys as [`Extension::hidden_keys`] holds them; each is cut at 255 bytes.
pub fn encode_keys<'k>(keys: impl IntoIterator<Item = &'k [u8]>) -> Vec<u8> {
    let mut out = Vec::new();
    for key in keys {
        let len = key.len().min(255);
        out.push(len as u8);
        out.extend_from_slice(&key[..len]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn extensions_survive_the_round_trip(since in proptest::option::of(0u64..1 << 39), died: bool, sole_key: bool, deliveries in 0u32..3, keys in proptest::collection::vec("[a-z]{0,9}", 0..4)) {
            let hidden_keys = encode_keys(keys.iter().map(String::as_bytes));
            let extension = Extension { expires_unix_ms: since.map(|since| EPOCH_UNIX_MS + since), died, sole_key, deliveries, hidden_keys: &hidden_keys };
            let bytes = extension.encode();
            prop_assert_eq!(bytes.is_empty(), extension.is_empty());
            prop_assert_eq!(Extension::parse(&bytes), extension);
            prop_assert_eq!(expires_unix_ms(&bytes), extension.expires_unix_ms);
            prop_assert_eq!(Extension::parse(&bytes).keys().map(<[u8]>::to_vec).collect::<Vec<_>>(), keys.iter().map(|key| key.clone().into_bytes()).collect::<Vec<_>>());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            let _ = Extension::parse(&bytes).keys().count();
        }
    }
}
