//! `amqp://user:pass@host:port/vhost`, percent-decoded.

use std::fmt;

use super::error::PerfError;

const DEFAULT_PORT: u16 = 5672;

/// Where the broker is and who calls. Shown without the password.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Uri {
    pub(super) user: String,
    pub(super) password: String,
    /// Without the brackets of an IPv6 literal.
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) vhost: String,
}

impl Uri {
    /// Reads a URI. User and password default to `guest`, the port to 5672, an absent or empty path
    /// to the vhost `/`; a query (`?heartbeat=…`) is ignored.
    ///
    /// # Errors
    /// [`PerfError::Usage`] that names what is wrong: another scheme, no host, a bad port or escape.
    pub(super) fn parse(text: &str) -> Result<Self, PerfError> {
        let rest = text.strip_prefix("amqp://").ok_or_else(|| usage(text, "must start with amqp://"))?;
        let rest = rest.split(['?', '#']).next().unwrap_or(rest);
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (login, address) = authority.rsplit_once('@').unwrap_or(("", authority));
        let (user, password) = match login.split_once(':') {
            Some(pair) => pair,
            None if login.is_empty() => ("guest", "guest"),
            None => (login, ""),
        };
        let (host, port) = split_port(address).ok_or_else(|| usage(text, "has a bad port"))?;
        let decode = |part: &str| percent_decode(part).ok_or_else(|| usage(text, "has a bad percent escape"));
        let vhost = decode(path)?;
        if vhost.len() > 255 {
            return Err(usage(text, "has a vhost of more than 255 bytes"));
        }
        Ok(Self {
            user: decode(user)?,
            password: decode(password)?,
            host: if host.is_empty() { "localhost".into() } else { decode(host)? },
            port,
            vhost: if vhost.is_empty() { "/".into() } else { vhost },
        })
    }

    /// `host:port`, with brackets where the host needs them.
    pub(super) fn address(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "amqp://{}@{} vhost '{}'", self.user, self.address(), self.vhost)
    }
}

impl fmt::Debug for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Uri({self})")
    }
}

/// Complains about `text` with its login left out, for it may end in a log.
fn usage(text: &str, complaint: &str) -> PerfError {
    let shown = match (text.find("://"), text.rfind('@')) {
        (Some(scheme), Some(at)) if at > scheme => format!("{}://…{}", &text[..scheme], &text[at..]),
        _ => text.to_owned(),
    };
    PerfError::Usage(format!("URI '{shown}' {complaint}"))
}

fn split_port(address: &str) -> Option<(&str, u16)> {
    if let Some(inner) = address.strip_prefix('[') {
        let (host, rest) = inner.split_once(']')?;
        return match rest.strip_prefix(':') {
            Some(port) => Some((host, port.parse().ok()?)),
            None => rest.is_empty().then_some((host, DEFAULT_PORT)),
        };
    }
    match address.split_once(':') {
        Some((host, port)) => Some((host, port.parse().ok()?)),
        None => Some((address, DEFAULT_PORT)),
    }
}

fn percent_decode(text: &str) -> Option<String> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        if *first == b'%' {
            let [high, low, after @ ..] = after else { return None };
            let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
            decoded.push(digit(*high)? << 4 | digit(*low)?);
            rest = after;
        } else {
            decoded.push(*first);
            rest = after;
        }
    }
    String::from_utf8(decoded).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> (String, String, String, String) {
        let uri = Uri::parse(text).expect(text);
        (uri.user.clone(), uri.password.clone(), uri.address(), uri.vhost)
    }

    fn parts(user: &str, password: &str, address: &str, vhost: &str) -> (String, String, String, String) {
        (user.into(), password.into(), address.into(), vhost.into())
    }

    #[test]
    fn absent_parts_have_the_defaults_every_client_has() {
        assert_eq!(parsed("amqp://"), parts("guest", "guest", "localhost:5672", "/"));
        assert_eq!(parsed("amqp://broker/"), parts("guest", "guest", "broker:5672", "/"));
    }

    #[test]
    fn every_part_is_percent_decoded() {
        assert_eq!(
            parsed("amqp://a%40b:p%3aw%2F@10.0.0.1:5673/%2fshop?heartbeat=0"),
            parts("a@b", "p:w/", "10.0.0.1:5673", "/shop")
        );
    }

    #[test]
    fn an_ipv6_host_keeps_its_colons() {
        assert_eq!(parsed("amqp://[::1]:5674/v"), parts("guest", "guest", "[::1]:5674", "v"));
        assert_eq!(parsed("amqp://[::1]"), parts("guest", "guest", "[::1]:5672", "/"));
    }

    #[test]
    fn bad_uris_are_refused_without_showing_the_password() {
        for text in
            ["http://h", "h:5672", "amqp://h:port", "amqp://h:70000", "amqp://h/%zz", "amqp://h/%2", "amqp://[::1"]
        {
            assert!(Uri::parse(text).is_err(), "{text}");
        }
        let refused = Uri::parse("amqp://u:secret@h:x/").expect_err("bad port").to_string();
        assert!(!refused.contains("secret"), "{refused}");
        assert!(!format!("{:?}", Uri::parse("amqp://u:secret@h").expect("good")).contains("secret"));
    }
}
