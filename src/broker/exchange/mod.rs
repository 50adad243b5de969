//! Exchanges: what one is, and the matcher of each type.
//!
//! # Ownership
//! A [`Topology`](super::router::Topology) holds every exchange with its [`Matcher`]. A matcher knows bindings of one
//! exchange only, already resolved to [`Target`]s; it neither follows other exchanges nor knows names.
//!
//! # Invariants
//! - X1: a matcher holds exactly the bindings of which its exchange is the source.
//! - X2: matching allocates nothing per word or binding, and its work is polynomial in the bindings and the key.
//!
//! # Further types
//! An `x-` type gets a variant of [`ExchangeKind`] and one of [`Matcher`]. A matcher sees all keys and the headers at once
//! ([`Subject`]), so that types which pick one destination, or look at a header, fit as well.

use std::fmt;

use amq_protocol::types::FieldTable;

use super::binding::Binding;
use crate::model::arguments::{self, InequivalentArgument};
use crate::model::{Name, ResourceName, erlang, is_reserved};

mod direct;
mod fanout;
mod headers;
mod slots;
mod target;
mod topic;

use direct::DirectTable;
use fanout::FanoutTable;
use headers::HeadersTable;
use topic::TopicTrie;

pub(super) use slots::{Slot, Slots};
pub(super) use target::{Target, Targets};

/// The argument that names an exchange's alternate exchange.
pub const ALTERNATE_EXCHANGE: &str = "alternate-exchange";

/// How an exchange routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExchangeKind {
    Direct,
    Fanout,
    Topic,
    Headers,
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
    /// The type a client names in `exchange.declare`. Case counts.
    ///
    /// # Errors
    /// The text for a type that is none.
    pub fn parse(name: &str) -> Result<Self, UnknownExchangeKind> {
        match name {
            "direct" => Ok(Self::Direct),
            "fanout" => Ok(Self::Fanout),
            "topic" => Ok(Self::Topic),
            "headers" => Ok(Self::Headers),
            word if KNOWN_WORDS.contains(&word) => Err(UnknownExchangeKind::Invalid(word.to_owned())),
            word => Err(UnknownExchangeKind::Unknown(word.to_owned())),
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
        }
    }
}

impl fmt::Display for ExchangeKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The flags of `exchange.declare`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExchangeOptions {
    /// Survives a restart.
    pub durable: bool,
    /// Goes with the last binding of which it is the source.
    pub auto_delete: bool,
    /// Takes messages from other exchanges only.
    pub internal: bool,
}

/// An exchange as it was declared, and what policies add to it.
#[derive(Clone, Debug, PartialEq)]
pub struct Exchange {
    pub name: Name,
    pub kind: ExchangeKind,
    pub durable: bool,
    pub auto_delete: bool,
    pub internal: bool,
    /// Stored as sent; arguments nobody knows are kept and ignored.
    pub arguments: FieldTable,
    /// The alternate exchange by argument.
    pub alternate: Option<Name>,
    /// The alternate exchange by policy; the argument wins.
    pub policy_alternate: Option<Name>,
}

impl Exchange {
    /// An exchange to be declared. Whether its arguments are good is checked by
    /// [`Topology::check_declare`](super::router::Topology::check_declare).
    #[must_use]
    pub fn new(name: Name, kind: ExchangeKind, options: ExchangeOptions, arguments: FieldTable) -> Self {
        let alternate = arguments::lookup(&arguments, ALTERNATE_EXCHANGE)
            .and_then(arguments::as_longstr)
            .and_then(|bytes| std::str::from_utf8(bytes).ok())
            .map(Name::from);
        let ExchangeOptions { durable, auto_delete, internal } = options;
        Self { name, kind, durable, auto_delete, internal, arguments, alternate, policy_alternate: None }
    }

    /// The exchanges every vhost has: the default exchange first, then the `amq.` ones.
    #[must_use]
    pub fn predeclared() -> Vec<Self> {
        use ExchangeKind::{Direct, Fanout, Headers, Topic};
        let exchange = |name: &str, kind, internal| {
            let options = ExchangeOptions { durable: true, auto_delete: false, internal };
            Self::new(name.into(), kind, options, FieldTable::default())
        };
        vec![
            exchange("", Direct, false),
            exchange("amq.direct", Direct, false),
            exchange("amq.fanout", Fanout, false),
            exchange("amq.topic", Topic, false),
            exchange("amq.headers", Headers, false),
            exchange("amq.match", Headers, false),
            exchange("amq.rabbitmq.trace", Topic, true),
        ]
    }

    /// Whether this is the default exchange: it has no name, and every queue is bound to it under its own.
    #[must_use]
    pub fn is_default(&self) -> bool {
        self.name.is_empty()
    }

    /// Whether the server made it: clients may neither declare a new one of such a name nor delete it.
    #[must_use]
    pub fn is_system(&self) -> bool {
        self.is_default() || is_reserved(&self.name)
    }

    /// The alternate exchange in force: the argument's, else the policy's.
    #[must_use]
    pub fn effective_alternate(&self) -> Option<&Name> {
        self.alternate.as_ref().or(self.policy_alternate.as_ref())
    }

    /// Compares a redeclaration with this exchange: type, flags, and of the arguments only the alternate exchange.
    ///
    /// # Errors
    /// The first difference, in RabbitMQ's order and words (406).
    pub fn check_equivalent(&self, new: &Self, vhost: &Name) -> Result<(), InequivalentArgument> {
        let resource = ResourceName::exchange(&self.name, vhost);
        let kind = |kind: ExchangeKind| erlang::atom(kind.as_str());
        arguments::check_property(&resource, "type", &kind(self.kind), &kind(new.kind))?;
        arguments::check_flag(&resource, "durable", self.durable, new.durable)?;
        arguments::check_flag(&resource, "auto_delete", self.auto_delete, new.auto_delete)?;
        arguments::check_flag(&resource, "internal", self.internal, new.internal)?;
        arguments::check_argument(&resource, ALTERNATE_EXCHANGE, &self.arguments, &new.arguments)
    }
}

/// What a message offers for routing: its routing key with CC and BCC behind it, and its headers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Subject<'a> {
    pub keys: &'a [&'a [u8]],
    pub headers: Option<&'a FieldTable>,
}

/// The bindings of one exchange, arranged for matching.
#[derive(Clone, Debug)]
pub(super) enum Matcher {
    Direct(DirectTable),
    Fanout(FanoutTable),
    Topic(TopicTrie),
    Headers(HeadersTable),
}

impl Matcher {
    pub fn new(kind: ExchangeKind) -> Self {
        match kind {
            ExchangeKind::Direct => Self::Direct(DirectTable::default()),
            ExchangeKind::Fanout => Self::Fanout(FanoutTable::default()),
            ExchangeKind::Topic => Self::Topic(TopicTrie::default()),
            ExchangeKind::Headers => Self::Headers(HeadersTable::default()),
        }
    }

    /// What the type demands of a binding's key and arguments; the error is the 406 text.
    pub fn check(&self, binding: &Binding) -> Result<(), String> {
        match self {
            Self::Direct(_) | Self::Fanout(_) | Self::Topic(_) => Ok(()),
            Self::Headers(_) => headers::check_arguments(&binding.arguments),
        }
    }

    /// Adds a binding that [`Matcher::check`] accepted; `slot` is its place in the binding table.
    pub fn add(&mut self, slot: Slot, binding: &Binding, target: Target) {
        match self {
            Self::Direct(table) => table.add(&binding.key, target),
            Self::Fanout(table) => table.add(target),
            Self::Topic(trie) => trie.add(&binding.key, target),
            Self::Headers(table) => table.add(slot, &binding.arguments, target),
        }
    }

    /// Removes a binding that was added with the same values.
    pub fn remove(&mut self, slot: Slot, binding: &Binding, target: Target) {
        match self {
            Self::Direct(table) => table.remove(&binding.key, target),
            Self::Fanout(table) => table.remove(target),
            Self::Topic(trie) => trie.remove(&binding.key, target),
            Self::Headers(table) => table.remove(slot),
        }
    }

    /// Collects where a message goes.
    pub fn collect(&self, subject: &Subject<'_>, out: &mut Targets) {
        match self {
            Self::Direct(table) => {
                for key in subject.keys {
                    table.collect(key, out);
                }
            }
            Self::Fanout(table) => table.collect(out),
            Self::Topic(trie) => {
                for key in subject.keys {
                    trie.collect(key, out);
                }
            }
            Self::Headers(table) => table.collect(subject.headers, out),
        }
    }

    /// Whether the result depends on the keys only, so that it holds for the next message with the same key.
    pub fn is_cacheable(&self) -> bool {
        match self {
            Self::Direct(_) | Self::Fanout(_) | Self::Topic(_) => true,
            Self::Headers(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use amq_protocol::types::AMQPValue;

    use super::*;

    #[test]
    fn types_are_parsed_case_sensitively_with_rabbitmqs_texts() {
        for kind in ["direct", "fanout", "topic", "headers"] {
            assert_eq!(ExchangeKind::parse(kind).map(ExchangeKind::as_str), Ok(kind));
        }
        let text = |kind| ExchangeKind::parse(kind).unwrap_err().to_string();
        assert_eq!(text("Direct"), "unknown exchange type 'Direct'");
        assert_eq!(text("x-nonsense"), "unknown exchange type 'x-nonsense'");
        assert_eq!(text("queue"), "invalid exchange type 'queue'");
        assert_eq!(text(""), "invalid exchange type ''");
    }

    #[test]
    fn the_argument_wins_over_the_policy_for_the_alternate_exchange() {
        let mut arguments = FieldTable::default();
        arguments.insert(ALTERNATE_EXCHANGE.into(), AMQPValue::LongString("by-argument".into()));
        let new = |arguments| Exchange::new("x".into(), ExchangeKind::Direct, ExchangeOptions::default(), arguments);
        let mut exchange = new(FieldTable::default());
        assert_eq!(exchange.effective_alternate(), None);
        exchange.policy_alternate = Some("by-policy".into());
        assert_eq!(exchange.effective_alternate().map(AsRef::as_ref), Some("by-policy"));
        let mut exchange = new(arguments);
        exchange.policy_alternate = Some("by-policy".into());
        assert_eq!(exchange.effective_alternate().map(AsRef::as_ref), Some("by-argument"));
    }

    #[test]
    fn equivalence_is_checked_in_rabbitmqs_order() {
        let vhost: Name = "/".into();
        let options = ExchangeOptions { durable: true, auto_delete: true, internal: true };
        let old = Exchange::new("x".into(), ExchangeKind::Direct, options, FieldTable::default());
        let mut new = Exchange::new("x".into(), ExchangeKind::Topic, ExchangeOptions::default(), FieldTable::default());
        new.arguments.insert(ALTERNATE_EXCHANGE.into(), AMQPValue::LongString("a".into()));
        new.arguments.insert("other".into(), AMQPValue::Void);
        let text = |new: &Exchange| old.check_equivalent(new, &vhost).unwrap_err().to_string();
        let start = "inequivalent arg";
        let received = "for exchange 'x' in vhost '/': received";
        assert_eq!(text(&new), format!("{start} 'type' {received} 'topic' but current is 'direct'"));
        new.kind = ExchangeKind::Direct;
        assert_eq!(text(&new), format!("{start} 'durable' {received} 'false' but current is 'true'"));
        new.durable = true;
        assert_eq!(text(&new), format!("{start} 'auto_delete' {received} 'false' but current is 'true'"));
        new.auto_delete = true;
        assert_eq!(text(&new), format!("{start} 'internal' {received} 'false' but current is 'true'"));
        new.internal = true;
        assert_eq!(
            text(&new),
            format!("{start} 'alternate-exchange' {received} the value 'a' of type 'longstr' but current is none")
        );
        let mut same = new.clone();
        same.arguments.insert("third".into(), AMQPValue::Void);
        assert_eq!(new.check_equivalent(&same, &vhost), Ok(()));
    }
}
