//! The types of exchanges, by the names clients give them.

use std::fmt;

/// How an exchange routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExchangeKind {
    Direct,
    Fanout,
    Topic,
    Headers,
    /// One destination, chosen by a hash, so that few messages change theirs when a destination comes or goes.
    ConsistentHash,
    /// One binding, chosen by chance.
    Random,
    /// As [`ExchangeKind::Random`], for classic queues on the publisher's node.
    LocalRandom,
    /// One binding, chosen by a hash of the keys modulo the number of bindings.
    ModulusHash,
    /// A fanout that keeps its last messages for destinations to come.
    RecentHistory,
    /// Bindings are selectors of the Java Message Service.
    JmsTopic,
    /// Keeps messages back for a while, then routes as the type that its argument names.
    Delayed,
}

/// Words that are no exchange type but that every RabbitMQ node knows as atoms; it has another text for them.
const KNOWN_WORDS: [&str; 22] = [
    "",
    "any",
    "all",
    "bad",
    "binding",
    "channel",
    "classic",
    "connection",
    "default",
    "error",
    "exchange",
    "foo",
    "invalid",
    "message",
    "ok",
    "queue",
    "quorum",
    "rabbit",
    "stream",
    "test",
    "undefined",
    "unknown",
];

/// Whether every RabbitMQ node knows the word as an atom. A guess that holds for the words clients are likely to send.
pub(super) fn is_known_word(word: &str) -> bool {
    KNOWN_WORDS.contains(&word) || matches!(word.as_bytes(), [b'a'..=b'z'])
}

/// A type that is none. RabbitMQ 4 answers 406 on the channel; 3.x answered 503 on the connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnknownExchangeKind {
    #[error("unknown exchange type '{0}'")]
    Unknown(String),
    /// A word the node knows as something else.
    #[error("invalid exchange type '{0}'")]
    Invalid(String),
}

impl ExchangeKind {
    /// Every type.
    pub(in crate::broker) const ALL: [Self; 11] = [
        Self::Direct,
        Self::Fanout,
        Self::Topic,
        Self::Headers,
        Self::ConsistentHash,
        Self::Random,
        Self::LocalRandom,
        Self::ModulusHash,
        Self::RecentHistory,
        Self::JmsTopic,
        Self::Delayed,
    ];

    /// The type a client names in `exchange.declare`. Case counts.
    ///
    /// # Errors
    /// The text for a type that is none.
    pub fn parse(name: &str) -> Result<Self, UnknownExchangeKind> {
        match Self::ALL.into_iter().find(|kind| kind.as_str() == name) {
            Some(kind) => Ok(kind),
            None if KNOWN_WORDS.contains(&name) => Err(UnknownExchangeKind::Invalid(name.to_owned())),
            None => Err(UnknownExchangeKind::Unknown(name.to_owned())),
        }
    }

    /// The type as clients name it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Fanout => "fanout",
            Self::Topic => "topic",
            Self::Headers => "headers",
            Self::ConsistentHash => "x-consistent-hash",
            Self::Random => "x-random",
            Self::LocalRandom => "x-local-random",
            Self::ModulusHash => "x-modulus-hash",
            Self::RecentHistory => "x-recent-history",
            Self::JmsTopic => "x-jms-topic",
            Self::Delayed => "x-delayed-message",
        }
    }
}

impl fmt::Display for ExchangeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_parsed_case_sensitively_with_rabbitmqs_texts() {
        for kind in ExchangeKind::ALL {
            assert_eq!(ExchangeKind::parse(kind.as_str()), Ok(kind));
        }
        assert_eq!(ExchangeKind::parse("x-delayed-message"), Ok(ExchangeKind::Delayed));
        let text = |kind| ExchangeKind::parse(kind).unwrap_err().to_string();
        assert_eq!(text("Direct"), "unknown exchange type 'Direct'");
        assert_eq!(text("x-nonsense"), "unknown exchange type 'x-nonsense'");
        assert_eq!(text("queue"), "invalid exchange type 'queue'");
        assert_eq!(text(""), "invalid exchange type ''");
    }
}
