//! Plain values that every layer shares: names, how things are called in texts, and arguments.
//!
//! # Invariants
//! - M1: nothing here has a task, a lock or a socket, and nothing here knows the broker.
//! - M2: whatever a client sent may be rendered: no function panics on bytes that are not UTF-8.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

pub mod arguments;
pub mod erlang;
pub mod headers;
pub mod properties;

/// The name of an exchange, queue, vhost or user; cheap to clone.
pub type Name = Arc<str>;

/// What RabbitMQ reserves for itself: nobody declares a name with this prefix.
pub const RESERVED_PREFIX: &str = "amq.";

/// Whether clients may neither declare nor delete a thing of this name (`amq.` and anything behind it).
#[must_use]
pub fn is_reserved(name: &str) -> bool {
    name.starts_with(RESERVED_PREFIX)
}

/// The name without CR and LF, which RabbitMQ removes silently in declare, delete, bind and passive declare.
#[must_use]
pub fn strip_cr_lf(name: &str) -> Cow<'_, str> {
    if name.bytes().any(|byte| matches!(byte, b'\r' | b'\n')) {
        Cow::Owned(name.replace(['\r', '\n'], ""))
    } else {
        Cow::Borrowed(name)
    }
}

/// What a [`ResourceName`] names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ResourceKind {
    Exchange,
    Queue,
}

impl ResourceKind {
    /// The word RabbitMQ's texts use.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Exchange => "exchange",
            Self::Queue => "queue",
        }
    }
}

impl fmt::Display for ResourceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A queue or an exchange as texts call it: `queue 'q' in vhost '/'`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ResourceName {
    pub kind: ResourceKind,
    pub name: Name,
    pub vhost: Name,
}

impl ResourceName {
    /// An exchange of a vhost.
    #[must_use]
    pub fn exchange(name: &str, vhost: &Name) -> Self {
        Self { kind: ResourceKind::Exchange, name: name.into(), vhost: Arc::clone(vhost) }
    }

    /// A queue of a vhost.
    #[must_use]
    pub fn queue(name: &str, vhost: &Name) -> Self {
        Self { kind: ResourceKind::Queue, name: name.into(), vhost: Arc::clone(vhost) }
    }
}

impl fmt::Display for ResourceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} '{}' in vhost '{}'", self.kind, self.name, self.vhost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resource_is_named_as_rabbitmq_does() {
        let vhost: Name = "/".into();
        assert_eq!(ResourceName::queue("q", &vhost).to_string(), "queue 'q' in vhost '/'");
        assert_eq!(ResourceName::exchange("x", &vhost).to_string(), "exchange 'x' in vhost '/'");
    }

    #[test]
    fn only_the_prefix_with_its_dot_is_reserved() {
        assert!(is_reserved("amq.") && is_reserved("amq.direct"));
        assert!(!is_reserved("amq") && !is_reserved("") && !is_reserved("amqp.x"));
    }

    #[test]
    fn line_ends_are_removed_from_names() {
        assert_eq!(strip_cr_lf("a\r\nb\n"), "ab");
        assert!(matches!(strip_cr_lf("ab"), Cow::Borrowed("ab")));
    }
}
