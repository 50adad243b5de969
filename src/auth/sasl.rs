//! SASL: from the client's response to a user name and a password. Pure functions; nothing is checked here.

use std::fmt;

use amq_protocol::types::{AMQPValue, FieldTable};

/// What `connection.start` offers.
pub const MECHANISMS: &str = "PLAIN AMQPLAIN";

/// A login mechanism; names are compared as they are written, as in RabbitMQ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mechanism {
    Plain,
    AmqPlain,
}

impl Mechanism {
    /// The mechanism that a client chose, if it is one of [`MECHANISMS`].
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "PLAIN" => Some(Self::Plain),
            "AMQPLAIN" => Some(Self::AmqPlain),
            _ => None,
        }
    }

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "PLAIN",
            Self::AmqPlain => "AMQPLAIN",
        }
    }

    /// The refusal as clients know it, without the reply code's name. The reason is for the log only.
    #[must_use]
    pub fn refusal_text(self) -> String {
        format!("Login was refused using authentication mechanism {}. For details see the broker logfile.", self.name())
    }
}

/// Who a client says it is, not yet checked.
#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    pub user: String,
    pub password: Vec<u8>,
}

/// The password belongs into no log.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("user", &self.user).finish_non_exhaustive()
    }
}

/// A response that is not of its mechanism's form. The connection is dropped without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed {} response", mechanism.name())]
pub struct MalformedResponse {
    pub mechanism: Mechanism,
}

/// Reads a PLAIN response: NUL, user, NUL, password. The authorisation id in front must be empty.
///
/// # Errors
/// [`MalformedResponse`] for anything else, including a NUL in the password.
pub fn parse_plain(response: &[u8]) -> Result<Credentials, MalformedResponse> {
    let mut parts = response.split(|&byte| byte == 0);
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some([]), Some(user), Some(password), None) => Ok(credentials(user, password)),
        _ => Err(MalformedResponse { mechanism: Mechanism::Plain }),
    }
}

/// Reads an AMQPLAIN response: `LOGIN` and `PASSWORD` of a table that the caller has decoded. Other keys are ignored.
///
/// # Errors
/// [`MalformedResponse`] if either is missing or not text.
pub fn parse_amqplain(response: &FieldTable) -> Result<Credentials, MalformedResponse> {
    match (text(response, "LOGIN"), text(response, "PASSWORD")) {
        (Some(user), Some(password)) => Ok(credentials(user, password)),
        _ => Err(MalformedResponse { mechanism: Mechanism::AmqPlain }),
    }
}

fn text<'a>(table: &'a FieldTable, key: &str) -> Option<&'a [u8]> {
    match table.inner().get(key)? {
        AMQPValue::LongString(text) => Some(text.as_bytes()),
        AMQPValue::ByteArray(bytes) => Some(bytes.as_slice()),
        _ => None,
    }
}

/// A name that is not UTF-8 names no user; it is kept readable for the log.
fn credentials(user: &[u8], password: &[u8]) -> Credentials {
    Credentials { user: String::from_utf8_lossy(user).into_owned(), password: password.to_vec() }
}

#[cfg(test)]
mod tests {
    use amq_protocol::types::{ByteArray, LongString};

    use super::*;

    #[test]
    fn plain_takes_user_and_password() {
        let parsed = parse_plain(b"\0guest\0secret").unwrap();
        assert_eq!((parsed.user.as_str(), parsed.password.as_slice()), ("guest", &b"secret"[..]));
    }

    #[test]
    fn plain_leaves_blank_parts_to_the_password_check() {
        let parsed = parse_plain(b"\0guest\0").unwrap();
        assert_eq!((parsed.user.as_str(), parsed.password.as_slice()), ("guest", &b""[..]));
        assert!(parse_plain(b"\0\0").is_ok());
    }

    #[test]
    fn plain_refuses_every_other_form() {
        for response in
            [&b""[..], b"xx", b"\0", b"\0guest", b"guest\0secret", b"as\0guest\0secret", b"\0a\0b\0c", b"\0a\0b\0"]
        {
            assert!(parse_plain(response).is_err(), "{response:?}");
        }
    }

    fn table(entries: &[(&str, AMQPValue)]) -> FieldTable {
        let mut table = FieldTable::default();
        for (key, value) in entries {
            table.insert((*key).into(), value.clone());
        }
        table
    }

    #[test]
    fn amqplain_takes_long_strings_and_byte_arrays_and_ignores_other_keys() {
        let parsed = parse_amqplain(&table(&[
            ("LOGIN", AMQPValue::LongString(LongString::from("guest"))),
            ("PASSWORD", AMQPValue::ByteArray(ByteArray::from(b"secret".to_vec()))),
            ("OTHER", AMQPValue::Boolean(true)),
        ]));
        let parsed = parsed.unwrap();
        assert_eq!((parsed.user.as_str(), parsed.password.as_slice()), ("guest", &b"secret"[..]));
    }

    #[test]
    fn amqplain_refuses_missing_and_mistyped_keys() {
        let login = ("LOGIN", AMQPValue::LongString(LongString::from("guest")));
        assert!(parse_amqplain(&table(&[])).is_err());
        assert!(parse_amqplain(&table(std::slice::from_ref(&login))).is_err());
        assert!(parse_amqplain(&table(&[login, ("PASSWORD", AMQPValue::LongInt(1))])).is_err());
    }

    #[test]
    fn mechanisms_are_known_by_their_exact_names() {
        for name in MECHANISMS.split(' ') {
            assert_eq!(Mechanism::from_name(name).map(Mechanism::name), Some(name));
        }
        assert_eq!(Mechanism::from_name("plain"), None);
        assert_eq!(Mechanism::from_name("EXTERNAL"), None);
    }

    #[test]
    fn debug_output_shows_no_password() {
        let shown = format!("{:?}", parse_plain(b"\0guest\0secret").unwrap());
        assert_eq!(shown, r#"Credentials { user: "guest", .. }"#);
    }
}
