//! Password hashes in RabbitMQ's form, so that they can be carried over: base64(salt ‖ digest(salt ‖ password)).

use std::fmt;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256, Sha512};

const SALT_BYTES: usize = 4;

/// How a stored password was hashed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HashAlgorithm {
    #[default]
    Sha256,
    Sha512,
}

impl HashAlgorithm {
    fn digest(self, salt: [u8; SALT_BYTES], password: &[u8]) -> Vec<u8> {
        match self {
            Self::Sha256 => Sha256::new().chain_update(salt).chain_update(password).finalize().to_vec(),
            Self::Sha512 => Sha512::new().chain_update(salt).chain_update(password).finalize().to_vec(),
        }
    }

    fn digest_bytes(self) -> usize {
        match self {
            Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }
}

impl fmt::Display for HashAlgorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        })
    }
}

impl FromStr for HashAlgorithm {
    type Err = PasswordHashError;

    /// Takes our short names and those that RabbitMQ writes into exported definitions.
    fn from_str(name: &str) -> Result<Self, Self::Err> {
        match name {
            "sha256" | "rabbit_password_hashing_sha256" => Ok(Self::Sha256),
            "sha512" | "rabbit_password_hashing_sha512" => Ok(Self::Sha512),
            _ => Err(PasswordHashError::UnknownAlgorithm),
        }
    }
}

/// Why a stored hash cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PasswordHashError {
    #[error("not a known hash algorithm; use sha256 or sha512")]
    UnknownAlgorithm,
    #[error("not valid base64")]
    NotBase64,
    #[error("decodes to {found} bytes, but {algorithm} needs {expected} (a salt of 4 and the digest)")]
    WrongLength { algorithm: HashAlgorithm, expected: usize, found: usize },
}

/// A salted password hash; the password itself is not kept anywhere.
#[derive(Clone, PartialEq, Eq)]
pub struct PasswordHash {
    algorithm: HashAlgorithm,
    salt: [u8; SALT_BYTES],
    digest: Vec<u8>,
}

impl PasswordHash {
    /// Hashes a password with a fresh salt.
    #[must_use]
    pub fn new(password: &str) -> Self {
        Self::with_salt(HashAlgorithm::Sha256, fresh_salt(), password.as_bytes())
    }

    fn with_salt(algorithm: HashAlgorithm, salt: [u8; SALT_BYTES], password: &[u8]) -> Self {
        let digest = algorithm.digest(salt, password);
        Self { algorithm, salt, digest }
    }

    /// Reads a stored hash, as RabbitMQ exports it.
    ///
    /// # Errors
    /// [`PasswordHashError`] if `text` is not base64 of a salt and a digest of this algorithm.
    pub fn decode(algorithm: HashAlgorithm, text: &str) -> Result<Self, PasswordHashError> {
        let bytes = STANDARD.decode(text).map_err(|_| PasswordHashError::NotBase64)?;
        let expected = SALT_BYTES + algorithm.digest_bytes();
        let found = bytes.len();
        match bytes.split_first_chunk() {
            Some((salt, digest)) if found == expected => Ok(Self { algorithm, salt: *salt, digest: digest.to_vec() }),
            _ => Err(PasswordHashError::WrongLength { algorithm, expected, found }),
        }
    }

    /// The hash as text, in the form that [`decode`](Self::decode) reads.
    #[must_use]
    pub fn encode(&self) -> String {
        STANDARD.encode([&self.salt[..], &self.digest].concat())
    }

    #[must_use]
    pub fn algorithm(&self) -> HashAlgorithm {
        self.algorithm
    }

    /// Compares in constant time. A blank password never matches, even if its hash is the stored one.
    #[must_use]
    pub fn matches(&self, password: &[u8]) -> bool {
        let offered = self.algorithm.digest(self.salt, password);
        let difference = offered.iter().zip(&self.digest).fold(0, |seen, (a, b)| seen | (a ^ b));
        difference == 0 && !password.is_empty()
    }
}

/// Four bytes that differ from user to user. A salt need not be secret, so the seed that the standard library
/// takes from the operating system for its hash maps is enough, and it cannot fail.
fn fresh_salt() -> [u8; SALT_BYTES] {
    let [a, b, c, d, ..] = RandomState::new().build_hasher().finish().to_le_bytes();
    [a, b, c, d]
}

/// Neither salt nor digest belongs into a log.
impl fmt::Debug for PasswordHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PasswordHash({})", self.algorithm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The worked example of RabbitMQ's guide to password hashes: salt 908DC60A, password `test12`.
    const RABBITMQ_EXAMPLE: &str = "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR";

    #[test]
    fn a_hash_made_by_rabbitmq_matches_its_password_only() {
        let hash = PasswordHash::decode(HashAlgorithm::Sha256, RABBITMQ_EXAMPLE).unwrap();
        assert!(hash.matches(b"test12"));
        assert!(!hash.matches(b"test13"));
        assert!(!hash.matches(b""));
        assert_eq!(hash.encode(), RABBITMQ_EXAMPLE);
    }

    #[test]
    fn a_new_hash_matches_and_survives_encoding() {
        let hash = PasswordHash::new("secret");
        assert!(hash.matches(b"secret"));
        let again = PasswordHash::decode(HashAlgorithm::Sha256, &hash.encode()).unwrap();
        assert_eq!(again, hash);
        assert_ne!(PasswordHash::new("secret"), PasswordHash::new("secret"));
    }

    #[test]
    fn sha512_is_understood_under_both_names() {
        let algorithm: HashAlgorithm = "rabbit_password_hashing_sha512".parse().unwrap();
        assert_eq!("sha512".parse(), Ok(algorithm));
        let hash = PasswordHash::with_salt(algorithm, [1, 2, 3, 4], b"secret");
        assert!(hash.matches(b"secret"));
        assert_eq!(PasswordHash::decode(algorithm, &hash.encode()), Ok(hash));
    }

    #[test]
    fn a_blank_password_is_refused_even_where_one_is_stored() {
        assert!(!PasswordHash::new("").matches(b""));
    }

    #[test]
    fn damaged_hashes_are_refused_with_the_reason() {
        let decode = |text| PasswordHash::decode(HashAlgorithm::Sha256, text).unwrap_err();
        assert_eq!(decode("not base64!"), PasswordHashError::NotBase64);
        assert_eq!(decode("AAAA").to_string(), "decodes to 3 bytes, but sha256 needs 36 (a salt of 4 and the digest)");
        assert_eq!("md5".parse::<HashAlgorithm>(), Err(PasswordHashError::UnknownAlgorithm));
    }

    #[test]
    fn debug_output_shows_no_secret() {
        let shown = format!("{:?}", PasswordHash::with_salt(HashAlgorithm::Sha256, [7; 4], b"x"));
        assert_eq!(shown, "PasswordHash(sha256)");
    }
}
