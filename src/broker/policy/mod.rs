//! Policies: rules for exchanges and queues by name, set by users and above them by operators.
//!
//! An object has at most one policy of each kind, the one of the highest priority that matches. What the two say is
//! merged into one definition, and that with the object's own arguments ([`super::rules`]). Validation, its texts, the
//! selection and the merge are RabbitMQ 4.3's (`rabbit_policy`, `rabbit_policies`, and each queue type's
//! `capabilities`).
//!
//! # Ownership
//! A [`Policy`] is a value that never changes. Each vhost has a [`PolicySet`]; see `vhost/policies.rs` for what a change
//! of it does.

mod definition;
mod pattern;
mod set;

use std::fmt;

use serde_json::{Value, json};

pub use self::{
    definition::PolicyDefinition,
    pattern::Pattern,
    set::{EffectivePolicy, PolicySet},
};
use super::arguments::QueueType;
use crate::model::{Name, erlang};

/// Whose policy it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PolicyKind {
    User,
    /// What its definition says wins over, or bounds, what the user policy says.
    Operator,
}

impl fmt::Display for PolicyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PolicyKind::User => "policy",
            PolicyKind::Operator => "operator policy",
        })
    }
}

/// What a policy is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ApplyTo {
    #[default]
    All,
    Queues,
    Exchanges,
    ClassicQueues,
    QuorumQueues,
    Streams,
}

impl ApplyTo {
    const ALL: [ApplyTo; 6] = [
        ApplyTo::All,
        ApplyTo::Queues,
        ApplyTo::Exchanges,
        ApplyTo::ClassicQueues,
        ApplyTo::QuorumQueues,
        ApplyTo::Streams,
    ];

    fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|apply_to| apply_to.name() == name)
    }

    /// The word of definitions and of the HTTP API.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            ApplyTo::All => "all",
            ApplyTo::Queues => "queues",
            ApplyTo::Exchanges => "exchanges",
            ApplyTo::ClassicQueues => "classic_queues",
            ApplyTo::QuorumQueues => "quorum_queues",
            ApplyTo::Streams => "streams",
        }
    }

    fn queues_of(self, queue_type: QueueType) -> bool {
        match self {
            ApplyTo::All | ApplyTo::Queues => true,
            ApplyTo::Exchanges => false,
            ApplyTo::ClassicQueues => queue_type == QueueType::Classic,
            ApplyTo::QuorumQueues => queue_type == QueueType::Quorum,
            ApplyTo::Streams => queue_type == QueueType::Stream,
        }
    }
}

/// What makes a policy invalid. `Display` is the text of RabbitMQ's tools and HTTP API, line ends included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidPolicy {
    reasons: Vec<String>,
}

impl InvalidPolicy {
    /// The single faults, in RabbitMQ's order; at least one.
    #[must_use]
    pub fn reasons(&self) -> &[String] {
        &self.reasons
    }
}

impl fmt::Display for InvalidPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Validation failed\n\n")?;
        self.reasons.iter().try_for_each(|reason| writeln!(f, "{reason}"))
    }
}

impl std::error::Error for InvalidPolicy {}

/// A policy, known to be valid.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    pub kind: PolicyKind,
    pub name: Name,
    pub pattern: Pattern,
    pub definition: PolicyDefinition,
    pub priority: i64,
    pub apply_to: ApplyTo,
}

impl Policy {
    /// Makes a policy of an object with `pattern`, `definition` and, if they are not 0 and `all`, `priority` and
    /// `apply-to`, as the HTTP API and exported definitions have it. Other keys are ignored.
    ///
    /// # Errors
    /// [`InvalidPolicy`] with everything that is wrong.
    pub fn from_json(kind: PolicyKind, name: &str, object: &Value) -> Result<Self, InvalidPolicy> {
        let missing = |key: &str| format!("Key \"{key}\" not found in {name}");
        let definition = match object.get("definition") {
            Some(definition) => PolicyDefinition::parse(kind, definition),
            None => Err(missing("definition")),
        };
        let apply_to = object.get("apply-to").map_or(Ok(ApplyTo::default()), apply_to);
        let pattern = match object.get("pattern") {
            Some(Value::String(source)) => Pattern::parse(source),
            Some(other) => Err(format!("pattern should be a binary but was {}", erlang::json_term(other))),
            None => Err(missing("pattern")),
        };
        let priority = object.get("priority").map_or(Ok(0), priority);
        match (definition, apply_to, pattern, priority) {
            (Ok(definition), Ok(apply_to), Ok(pattern), Ok(priority)) => {
                Ok(Policy { kind, name: name.into(), pattern, definition, priority, apply_to })
            }
            (definition, apply_to, pattern, priority) => {
                let reasons = [definition.err(), apply_to.err(), pattern.err(), priority.err()];
                Err(InvalidPolicy { reasons: reasons.into_iter().flatten().collect() })
            }
        }
    }

    /// What [`Policy::from_json`] reads.
    #[must_use]
    pub fn to_json(&self) -> Value {
        json!({
            "pattern": self.pattern.as_str(),
            "definition": self.definition.to_json(),
            "priority": self.priority,
            "apply-to": self.apply_to.name(),
        })
    }

    /// Whether it is for a queue of this name and type: one that is of another type, or does not know all keys of the
    /// definition, is passed over.
    #[must_use]
    pub fn matches_queue(&self, name: &str, queue_type: QueueType) -> bool {
        self.apply_to.queues_of(queue_type) && self.definition.suits(queue_type) && self.pattern.matches(name)
    }

    /// Whether it is for an exchange of this name.
    #[must_use]
    pub fn matches_exchange(&self, name: &str) -> bool {
        matches!(self.apply_to, ApplyTo::All | ApplyTo::Exchanges) && self.pattern.matches(name)
    }
}

fn apply_to(value: &Value) -> Result<ApplyTo, String> {
    let shown = value.as_str().map_or_else(|| erlang::json_term(value), str::to_owned);
    value.as_str().and_then(ApplyTo::parse).ok_or_else(|| {
        // The two spaces are RabbitMQ's.
        format!(
            "apply-to '{shown}' unrecognised; should be one of: 'queues', 'classic_queues',  'quorum_queues', 'streams', 'exchanges', or 'all'"
        )
    })
}

/// Any number for RabbitMQ; a fraction would order policies too, but nobody has one.
fn priority(value: &Value) -> Result<i64, String> {
    let whole = |float: f64| (float.fract() == 0.0 && float.abs() <= 1e15).then_some(float as i64);
    value.as_i64().or_else(|| value.as_f64().and_then(whole)).ok_or_else(|| {
        let number = if value.is_number() { "a whole number" } else { "a number" };
        format!("priority should be {number}, actually was {}", erlang::json_term(value))
    })
}

#[cfg(test)]
mod tests;
