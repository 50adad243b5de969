//! Permissions: three patterns per user and vhost, and the refusal that a client reads.

use std::fmt;

use regex::Regex;

/// What an operation does to an exchange or a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    Configure,
    Write,
    Read,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Configure => "configure",
            Self::Write => "write",
            Self::Read => "read",
        })
    }
}

/// The kind of thing that an operation touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Resource {
    Exchange,
    Queue,
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Exchange => "exchange",
            Self::Queue => "queue",
        })
    }
}

/// The name that permissions are tested against: the default exchange is called `amq.default` there.
pub(super) fn permission_name(resource: Resource, name: &str) -> &str {
    if resource == Resource::Exchange && name.is_empty() { "amq.default" } else { name }
}

/// A name pattern: a regular expression that may match anywhere in the name (`foo` allows `xfoobar`).
///
/// The empty pattern matches the empty name only, and a pattern that is not a valid regular expression matches
/// nothing, both as in RabbitMQ. Look-around and back-references count as invalid.
#[derive(Clone, Debug)]
pub struct Pattern {
    source: String,
    matcher: Matcher,
}

#[derive(Clone, Debug)]
enum Matcher {
    Nothing,
    EmptyName,
    /// `.*` and its anchored forms, by far the most frequent ones.
    Everything,
    Regex(Regex),
}

/// A pattern that is not a valid regular expression; the text is one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a valid regular expression: {reason}")]
pub struct InvalidPattern {
    reason: String,
}

impl Pattern {
    /// Compiles a pattern; an invalid one matches nothing.
    #[must_use]
    pub fn new(source: &str) -> Self {
        Self::parse(source).unwrap_or_else(|_| Self { source: source.to_owned(), matcher: Matcher::Nothing })
    }

    /// Compiles a pattern.
    ///
    /// # Errors
    /// [`InvalidPattern`] with the reason, for those who can still have it corrected.
    pub fn parse(source: &str) -> Result<Self, InvalidPattern> {
        let matcher = match source {
            "" | "^$" => Matcher::EmptyName,
            ".*" | "^.*" | ".*$" | "^.*$" => Matcher::Everything,
            _ => Matcher::Regex(Regex::new(source).map_err(|error| invalid(&error))?),
        };
        Ok(Self { source: source.to_owned(), matcher })
    }

    #[must_use]
    pub fn matches(&self, name: &str) -> bool {
        match &self.matcher {
            Matcher::Nothing => false,
            Matcher::EmptyName => name.is_empty(),
            Matcher::Everything => true,
            Matcher::Regex(regex) => regex.is_match(name),
        }
    }

    /// The pattern as it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.source
    }
}

/// Keeps the last line of the regex crate's report; the ones before it draw the place.
fn invalid(error: &regex::Error) -> InvalidPattern {
    let text = error.to_string();
    let last = text.lines().next_back().unwrap_or_default();
    InvalidPattern { reason: last.trim_start_matches("error: ").to_owned() }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
    }
}

impl Eq for Pattern {}

/// What one user may do in one vhost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permission {
    pub configure: Pattern,
    pub write: Pattern,
    pub read: Pattern,
}

impl Permission {
    /// Everything on every name.
    #[must_use]
    pub fn full() -> Self {
        Self { configure: Pattern::new(".*"), write: Pattern::new(".*"), read: Pattern::new(".*") }
    }

    /// Whether this access to a resource is allowed. The default exchange is tested as `amq.default`.
    #[must_use]
    pub fn allows(&self, access: Access, resource: Resource, name: &str) -> bool {
        let pattern = match access {
            Access::Configure => &self.configure,
            Access::Write => &self.write,
            Access::Read => &self.read,
        };
        pattern.matches(permission_name(resource, name))
    }
}

/// An operation that the user's permissions do not cover. Shown as clients know it, without the reply code's name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{access} access to {resource} '{name}' in vhost '{vhost}' refused for user '{user}'")]
pub struct Refusal {
    pub access: Access,
    pub resource: Resource,
    pub name: String,
    pub vhost: String,
    pub user: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_are_not_anchored() {
        let pattern = Pattern::new("foo");
        assert!(pattern.matches("foo") && pattern.matches("xfoobar"));
        assert!(!pattern.matches("fo"));
        let anchored = Pattern::new(r"^amq\.gen-.*$");
        assert!(anchored.matches("amq.gen-abc") && !anchored.matches("x-amq.gen-abc"));
    }

    #[test]
    fn the_empty_pattern_matches_the_empty_name_only() {
        let pattern = Pattern::new("");
        assert!(pattern.matches("") && !pattern.matches("a"));
        assert!(Pattern::new("^$").matches("") && !Pattern::new("^$").matches("a"));
    }

    #[test]
    fn an_invalid_pattern_matches_nothing() {
        let pattern = Pattern::new("(");
        assert!(!pattern.matches("(") && !pattern.matches(""));
        assert_eq!(pattern.as_str(), "(");
        assert_eq!(Pattern::parse("(").unwrap_err().to_string(), "not a valid regular expression: unclosed group");
        assert!(Pattern::parse("(?!amq)").is_err());
    }

    #[test]
    fn everything_means_everything() {
        for source in [".*", "^.*$"] {
            assert!(Pattern::new(source).matches("") && Pattern::new(source).matches("a\nb"));
        }
    }

    #[test]
    fn each_access_has_its_own_pattern() {
        let permission =
            Permission { configure: Pattern::new("^c"), write: Pattern::new("^w"), read: Pattern::new("^r") };
        for (access, name) in [(Access::Configure, "c"), (Access::Write, "w"), (Access::Read, "r")] {
            assert!(permission.allows(access, Resource::Queue, name));
            assert!(!permission.allows(access, Resource::Queue, "other"));
        }
    }

    #[test]
    fn the_default_exchange_is_tested_as_amq_default() {
        let mut permission = Permission::full();
        permission.write = Pattern::new(r"^amq\.default$");
        assert!(permission.allows(Access::Write, Resource::Exchange, ""));
        assert!(!permission.allows(Access::Write, Resource::Queue, ""));
    }
}
