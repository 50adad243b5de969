//! The policies of a vhost, and what a change of them does to its queues and exchanges.
//!
//! # Locks
//! A change is made with the topology locked for writing, so that it sees every queue and exchange, and every later one
//! sees it. Queues take their new rules under the read side: routing goes on meanwhile.

use std::sync::{Arc, atomic::Ordering};

use parking_lot::RwLockWriteGuard;

use super::Vhost;
use crate::{
    broker::{
        arguments::QueueType,
        definitions,
        policy::{EffectivePolicy, Policy, PolicyKind},
        port::Effects,
        queue::{Queue, QueueOptions},
        router::Topology,
        rules::QueueRules,
    },
    model::Name,
    store::Round,
};

/// Why a policy is neither set nor cleared.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    #[error("no vhost '{vhost}'")]
    NoVhost { vhost: Name },
    #[error("no {kind} '{policy}' in vhost '{vhost}'")]
    NotFound { kind: PolicyKind, policy: Name, vhost: Name },
    #[error("{kind} '{policy}' in vhost '{vhost}' comes from the configuration file and can only be changed there")]
    Configured { kind: PolicyKind, policy: Name, vhost: Name },
}

impl Vhost {
    /// Sets a policy, or replaces the one of its kind and name. Queues and exchanges follow at once; answers when the
    /// policy is on disk.
    ///
    /// # Errors
    /// [`PolicyError::Configured`]; nothing has changed then.
    pub fn set_policy(&self, policy: Policy, effects: &mut Effects) -> Result<Round, PolicyError> {
        let policy = Arc::new(policy);
        let (kind, name) = (policy.kind, policy.name.clone());
        let topology = self.topology.write();
        if !self.policies.write().insert(policy.clone()) {
            return Err(self.configured_policy(kind, &name));
        }
        let round = self.define(definitions::policy_key(&self.name, kind, &name), definitions::policy_value(&policy));
        tracing::info!(vhost = %self.name, %kind, policy = %name, pattern = policy.pattern.as_str(), "policy set");
        self.policies_changed(topology, effects);
        self.note_policy_set(&policy, effects.on_behalf_of);
        Ok(round)
    }

    /// Removes a policy. Queues and exchanges follow at once; answers when that is on disk.
    ///
    /// # Errors
    /// [`PolicyError::NotFound`] and [`PolicyError::Configured`].
    pub fn clear_policy(&self, kind: PolicyKind, name: &str, effects: &mut Effects) -> Result<Round, PolicyError> {
        let topology = self.topology.write();
        let mut policies = self.policies.write();
        if policies.is_configured(kind, name) {
            return Err(self.configured_policy(kind, name));
        }
        if policies.remove(kind, name).is_none() {
            return Err(PolicyError::NotFound { kind, policy: name.into(), vhost: self.name.clone() });
        }
        drop(policies);
        let round = self.environment.store.delete_definition(definitions::policy_key(&self.name, kind, name));
        self.last_definition.fetch_max(round, Ordering::Relaxed);
        tracing::info!(vhost = %self.name, %kind, policy = name, "policy cleared");
        self.policies_changed(topology, effects);
        self.note_policy_cleared(kind, name, effects.on_behalf_of);
        Ok(round)
    }

    fn configured_policy(&self, kind: PolicyKind, name: &str) -> PolicyError {
        PolicyError::Configured { kind, policy: name.into(), vhost: self.name.clone() }
    }

    /// All policies of a kind, the ones that win first.
    pub fn policies(&self, kind: PolicyKind) -> Vec<Arc<Policy>> {
        self.policies.read().list(kind).cloned().collect()
    }

    /// The policy of that kind and name.
    pub fn policy(&self, kind: PolicyKind, name: &str) -> Option<Arc<Policy>> {
        self.policies.read().get(kind, name).cloned()
    }

    /// The policies that a queue has.
    pub fn queue_policy(&self, queue: &Queue) -> EffectivePolicy {
        self.policies.read().of_queue(&queue.options.name, QueueType::of(&queue.options.arguments))
    }

    /// The policies that an exchange of this name has.
    pub fn exchange_policy(&self, exchange: &Name) -> EffectivePolicy {
        self.policies.read().of_exchange(exchange)
    }

    /// The rules of a queue with these options.
    pub(super) fn rules_of(&self, options: &QueueOptions) -> QueueRules {
        let queue_type = QueueType::of(&options.arguments);
        let policy = self.policies.read().of_queue(&options.name, queue_type);
        let (user, operator) = (policy.user_definition(), policy.operator_definition());
        QueueRules::of(queue_type, &options.arguments, user, operator, &self.settings.rules)
    }

    /// Puts a policy from the store back, before the queues and exchanges; the configuration's stays if it has one of
    /// that name.
    pub(in crate::broker) fn restore_policy(&self, policy: Policy) {
        let (kind, name) = (policy.kind, policy.name.clone());
        let mut topology = self.topology.write();
        if !self.policies.write().insert(Arc::new(policy)) {
            tracing::warn!(vhost = %self.name, %kind, policy = %name, "the stored policy is hidden by the one in the configuration file");
            return;
        }
        self.apply_to_exchanges(&mut topology); // the predeclared ones are there
    }

    fn policies_changed(&self, mut topology: RwLockWriteGuard<'_, Topology<Arc<Queue>>>, effects: &mut Effects) {
        self.apply_to_exchanges(&mut topology);
        self.changed();
        let topology = RwLockWriteGuard::downgrade(topology);
        for (_, queue) in topology.queues() {
            let rules = self.rules_of(&queue.options);
            if queue.rules() != rules {
                queue.apply_rules(rules, effects);
                self.note_queue_policy(queue, effects.on_behalf_of);
            }
        }
    }

    /// Gives every exchange the alternate that its policies name.
    pub(super) fn apply_to_exchanges(&self, topology: &mut Topology<Arc<Queue>>) {
        let names: Vec<Name> = topology.exchanges().map(|exchange| exchange.name.clone()).collect();
        for name in names {
            self.apply_to_exchange(topology, &name);
        }
    }

    /// Gives an exchange the alternate that its policies name. The default exchange has none, whatever matches it.
    pub(super) fn apply_to_exchange(&self, topology: &mut Topology<Arc<Queue>>, name: &Name) {
        if !name.is_empty() {
            let definition = self.exchange_policy(name).definition();
            let alternate = definition.and_then(|definition| definition.text("alternate-exchange").map(Name::from));
            topology.set_policy_alternate(name, alternate);
        }
    }
}
