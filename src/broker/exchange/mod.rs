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
//! An `x-` type gets a variant of [`ExchangeKind`] and, unless it routes as another does, one of [`Matcher`]. A matcher
//! sees all keys and properties at once ([`Subject`]), so that types which pick one destination, or look at a header, fit
//! as well.

use amq_protocol::types::FieldTable;

use super::arguments::{self as argument_checks, QueueType};
use super::rules::Deduplication;
use super::{events::EVENT_EXCHANGE, trace::TRACE_EXCHANGE};
use crate::model::arguments::{self, InequivalentArgument};
use crate::model::{Name, ResourceName, erlang};

mod consistent_hash;
mod delayed;
mod direct;
mod fanout;
mod headers;
mod jms;
mod kind;
mod local_random;
mod matcher;
mod modulus_hash;
mod random;
mod recent_history;
mod rules;
mod slots;
mod stable_hash;
mod subject;
mod target;
mod topic;

pub use kind::{ExchangeKind, UnknownExchangeKind};
pub(super) use matcher::Matcher;
pub(super) use slots::{Slot, Slots};
pub use subject::Attributes;
pub(super) use subject::Subject;
pub(super) use target::{Target, Targets};

/// The argument that names an exchange's alternate exchange.
pub const ALTERNATE_EXCHANGE: &str = "alternate-exchange";

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
            exchange(TRACE_EXCHANGE, Topic, true),
        ]
    }

    /// The exchange of events, which one vhost has.
    #[must_use]
    pub fn of_events() -> Self {
        let options = ExchangeOptions { durable: true, auto_delete: false, internal: true };
        Self::new(EVENT_EXCHANGE.into(), ExchangeKind::Topic, options, FieldTable::default())
    }

    /// Whether this is the default exchange: it has no name, and every queue is bound to it under its own.
    #[must_use]
    pub fn is_default(&self) -> bool {
        self.name.is_empty()
    }

    /// The alternate exchange in force: the argument's, else the policy's.
    #[must_use]
    pub fn effective_alternate(&self) -> Option<&Name> {
        self.alternate.as_ref().or(self.policy_alternate.as_ref())
    }

    /// Whether it keeps messages back that ask for it by their header `x-delay`, by its type or by an argument.
    #[must_use]
    pub fn is_delayed(&self) -> bool {
        self.kind == ExchangeKind::Delayed || delayed::is_requested(&self.arguments)
    }

    /// The type that decides where messages go: its own, or of the type `x-delayed-message` that in `x-delayed-type`.
    #[must_use]
    pub fn routing_kind(&self) -> ExchangeKind {
        match self.kind {
            // No type was declared without a good argument, but a damaged definition may lack it.
            ExchangeKind::Delayed => delayed::parse_type(&self.arguments).unwrap_or(ExchangeKind::Direct),
            kind => kind,
        }
    }

    /// How many recent messages it keeps for destinations that are bound later, at least one; none unless it routes as
    /// `x-recent-history`.
    #[must_use]
    pub fn history_length(&self) -> Option<u64> {
        (self.routing_kind() == ExchangeKind::RecentHistory).then(|| recent_history::length(&self.arguments))
    }

    /// Whether the exchange has to see every message, because it does more with them than routing.
    pub(super) fn observes_messages(&self) -> bool {
        self.is_delayed() || self.history_length().is_some() || self.deduplication().is_some()
    }

    /// How it drops duplicates, if it does.
    #[must_use]
    pub fn deduplication(&self) -> Option<Deduplication> {
        Deduplication::of(&self.arguments)
    }

    /// Checks what the type demands of the arguments.
    ///
    /// # Errors
    /// The text of the 406, which is RabbitMQ's.
    pub(super) fn check_arguments(&self, vhost: &Name) -> Result<(), String> {
        argument_checks::check_deduplication(&ResourceName::exchange(&self.name, vhost), &self.arguments)?;
        let kind = match self.kind {
            ExchangeKind::Delayed => delayed::parse_type(&self.arguments)?,
            kind => kind,
        };
        match kind {
            ExchangeKind::ConsistentHash => {
                consistent_hash::check_arguments(&ResourceName::exchange(&self.name, vhost), &self.arguments)
            }
            ExchangeKind::RecentHistory => recent_history::check_arguments(&self.arguments),
            ExchangeKind::Direct
            | ExchangeKind::Fanout
            | ExchangeKind::Topic
            | ExchangeKind::Headers
            | ExchangeKind::Random
            | ExchangeKind::LocalRandom
            | ExchangeKind::ModulusHash
            | ExchangeKind::JmsTopic
            | ExchangeKind::Delayed => Ok(()),
        }
    }

    /// Checks whether queues of this type can be bound.
    ///
    /// # Errors
    /// The text of the 406, which is RabbitMQ's.
    pub(super) fn check_queue_type(&self, queue_type: QueueType) -> Result<(), String> {
        match self.routing_kind() {
            ExchangeKind::LocalRandom => local_random::check_queue_type(queue_type),
            _ => Ok(()),
        }
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

#[cfg(test)]
mod tests {
    use amq_protocol::types::AMQPValue;

    use super::*;

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

    fn with_arguments(kind: ExchangeKind, arguments: &[(&str, AMQPValue)]) -> Exchange {
        let mut table = FieldTable::default();
        for (name, value) in arguments {
            table.insert((*name).into(), value.clone());
        }
        Exchange::new("x".into(), kind, ExchangeOptions::default(), table)
    }

    fn text(value: &str) -> AMQPValue {
        AMQPValue::LongString(value.into())
    }

    #[test]
    fn a_delayed_exchange_routes_as_the_type_in_its_argument() {
        let delayed = |kind| with_arguments(ExchangeKind::Delayed, &[("x-delayed-type", text(kind))]);
        let exchange = delayed("topic");
        assert_eq!((exchange.is_delayed(), exchange.routing_kind()), (true, ExchangeKind::Topic));
        assert_eq!((exchange.history_length(), exchange.observes_messages()), (None, true));
        assert_eq!(delayed("x-recent-history").history_length(), Some(20));
        let by_argument = with_arguments(ExchangeKind::Fanout, &[("x-delayed-exchange", AMQPValue::Boolean(true))]);
        assert_eq!((by_argument.is_delayed(), by_argument.routing_kind()), (true, ExchangeKind::Fanout));
        let plain = with_arguments(ExchangeKind::Fanout, &[("x-delayed-exchange", AMQPValue::Boolean(false))]);
        assert!(!plain.is_delayed() && !plain.observes_messages());
        assert_eq!(with_arguments(ExchangeKind::Delayed, &[]).routing_kind(), ExchangeKind::Direct);
    }

    #[test]
    fn arguments_are_checked_by_type_and_those_of_a_delayed_exchange_by_both() {
        let check =
            |kind, arguments: &[(&str, AMQPValue)]| with_arguments(kind, arguments).check_arguments(&"/".into());
        let error = |text: &str| Err(text.to_owned());
        let property = ("hash-property", text("content_type"));
        let unsupported = "Unsupported property: content_type";
        assert_eq!(check(ExchangeKind::ConsistentHash, std::slice::from_ref(&property)), error(unsupported));
        assert_eq!(check(ExchangeKind::Direct, std::slice::from_ref(&property)), Ok(()));
        let inner = ("x-delayed-type", text("x-consistent-hash"));
        assert_eq!(check(ExchangeKind::Delayed, &[inner.clone(), property]), error(unsupported));
        assert_eq!(check(ExchangeKind::Delayed, &[inner]), Ok(()));
        let missing = "Invalid argument, 'x-delayed-type' must be an existing exchange type";
        assert_eq!(check(ExchangeKind::Delayed, &[]), error(missing));
        let length = ("x-recent-history-length", AMQPValue::LongInt(0));
        let positive = "Invalid argument 0, 'x-recent-history-length' must be a positive integer";
        assert_eq!(check(ExchangeKind::RecentHistory, std::slice::from_ref(&length)), error(positive));
        assert_eq!(check(ExchangeKind::Fanout, &[length]), Ok(()));
    }

    #[test]
    fn only_local_random_is_particular_about_queues() {
        let check = |exchange: Exchange| exchange.check_queue_type(QueueType::Quorum);
        let refused = Err("Queue type rabbit_quorum_queue not valid for this exchange type".to_owned());
        assert_eq!(check(with_arguments(ExchangeKind::LocalRandom, &[])), refused);
        let inner = ("x-delayed-type", text("x-local-random"));
        assert_eq!(check(with_arguments(ExchangeKind::Delayed, &[inner])), refused);
        assert_eq!(check(with_arguments(ExchangeKind::Random, &[])), Ok(()));
    }
}
