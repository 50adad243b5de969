//! The policies of one vhost, and which of them an object has.

use std::sync::Arc;

use super::{Policy, PolicyDefinition, PolicyKind};
use crate::{broker::arguments::QueueType, model::Name};

/// What one queue or exchange has: at most one policy of each kind.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EffectivePolicy {
    pub user: Option<Arc<Policy>>,
    pub operator: Option<Arc<Policy>>,
}

impl EffectivePolicy {
    /// What they amount to.
    #[must_use]
    pub fn definition(&self) -> Option<PolicyDefinition> {
        PolicyDefinition::effective(self.user_definition(), self.operator_definition())
            .map(|merged| merged.into_owned())
    }

    #[must_use]
    pub fn user_definition(&self) -> Option<&PolicyDefinition> {
        self.user.as_ref().map(|policy| &policy.definition)
    }

    #[must_use]
    pub fn operator_definition(&self) -> Option<&PolicyDefinition> {
        self.operator.as_ref().map(|policy| &policy.definition)
    }
}

#[derive(Clone, Debug)]
struct Entry {
    policy: Arc<Policy>,
    /// From the configuration file: fixed while the broker runs.
    configured: bool,
}

/// Policies of both kinds, the ones that win first: by priority, and by name among equals, where RabbitMQ leaves it open.
#[derive(Clone, Debug, Default)]
pub struct PolicySet {
    user: Vec<Entry>,
    operator: Vec<Entry>,
}

impl PolicySet {
    /// A set with the policies of the configuration file.
    #[must_use]
    pub fn configured(policies: impl IntoIterator<Item = Arc<Policy>>) -> Self {
        let mut set = PolicySet::default();
        for policy in policies {
            set.put(Entry { policy, configured: true });
        }
        set
    }

    /// Adds a policy, or replaces the one of its kind and name. False if that is the configuration file's.
    pub fn insert(&mut self, policy: Arc<Policy>) -> bool {
        let fixed = self.is_configured(policy.kind, &policy.name);
        if !fixed {
            self.put(Entry { policy, configured: false });
        }
        !fixed
    }

    fn put(&mut self, entry: Entry) {
        self.remove(entry.policy.kind, &entry.policy.name);
        let entries = self.entries_mut(entry.policy.kind);
        let rank = |policy: &Policy| (std::cmp::Reverse(policy.priority), policy.name.clone());
        let at = entries.partition_point(|other| rank(&other.policy) < rank(&entry.policy));
        entries.insert(at, entry);
    }

    /// Takes a policy out; `None` if there is none.
    pub fn remove(&mut self, kind: PolicyKind, name: &str) -> Option<Arc<Policy>> {
        let entries = self.entries_mut(kind);
        let at = entries.iter().position(|entry| &*entry.policy.name == name)?;
        Some(entries.remove(at).policy)
    }

    #[must_use]
    pub fn get(&self, kind: PolicyKind, name: &str) -> Option<&Arc<Policy>> {
        self.list(kind).find(|policy| &*policy.name == name)
    }

    /// Whether there is a policy of that name, and it is the configuration file's.
    #[must_use]
    pub fn is_configured(&self, kind: PolicyKind, name: &str) -> bool {
        self.entries(kind).iter().any(|entry| entry.configured && &*entry.policy.name == name)
    }

    /// All of a kind, the ones that win first.
    pub fn list(&self, kind: PolicyKind) -> impl Iterator<Item = &Arc<Policy>> {
        self.entries(kind).iter().map(|entry| &entry.policy)
    }

    /// The policies of a queue.
    #[must_use]
    pub fn of_queue(&self, name: &Name, queue_type: QueueType) -> EffectivePolicy {
        self.select(|policy| policy.matches_queue(name, queue_type))
    }

    /// The policies of an exchange.
    #[must_use]
    pub fn of_exchange(&self, name: &Name) -> EffectivePolicy {
        self.select(|policy| policy.matches_exchange(name))
    }

    fn select(&self, matches: impl Fn(&Policy) -> bool) -> EffectivePolicy {
        let first = |kind| self.list(kind).find(|policy| matches(policy)).cloned();
        EffectivePolicy { user: first(PolicyKind::User), operator: first(PolicyKind::Operator) }
    }

    fn entries(&self, kind: PolicyKind) -> &Vec<Entry> {
        match kind {
            PolicyKind::User => &self.user,
            PolicyKind::Operator => &self.operator,
        }
    }

    fn entries_mut(&mut self, kind: PolicyKind) -> &mut Vec<Entry> {
        match kind {
            PolicyKind::User => &mut self.user,
            PolicyKind::Operator => &mut self.operator,
        }
    }
}
