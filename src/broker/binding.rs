//! Bindings: what one is, when two are the same, and the table that holds all of a vhost.
//!
//! # Invariants
//! - B1: two bindings are one if source, destination, key and arguments (sorted, value types included) agree.
//! - B2: the table holds each binding once; its slot stays the same until it is removed.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::Deref;
use std::sync::Arc;

use ahash::AHashMap;
use amq_protocol::types::FieldTable;

use super::exchange::{Slot, Slots, Target};
use crate::model::arguments::{hash_table, identical_tables};
use crate::model::{Name, erlang};

/// Where a binding leads.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Destination {
    Queue(Name),
    Exchange(Name),
}

impl Destination {
    /// The name of the queue or exchange.
    #[must_use]
    pub fn name(&self) -> &Name {
        match self {
            Self::Queue(name) | Self::Exchange(name) => name,
        }
    }
}

/// The key of a binding: a pattern for topic exchanges, bytes to compare for direct ones. Up to 255 bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BindingKey(Box<[u8]>);

impl Deref for BindingKey {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl<B: Into<Vec<u8>>> From<B> for BindingKey {
    fn from(bytes: B) -> Self {
        Self(bytes.into().into())
    }
}

impl fmt::Display for BindingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&erlang::text(&self.0))
    }
}

/// A rule of an exchange: what matches `key` or `arguments` goes to `destination` as well.
#[derive(Clone, Debug)]
pub struct Binding {
    /// The exchange that routes.
    pub source: Name,
    pub destination: Destination,
    pub key: BindingKey,
    pub arguments: FieldTable,
}

impl PartialEq for Binding {
    fn eq(&self, other: &Self) -> bool {
        self.source == other.source
            && self.destination == other.destination
            && self.key == other.key
            && identical_tables(&self.arguments, &other.arguments)
    }
}

impl Eq for Binding {}

impl Hash for Binding {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.source.hash(state);
        self.destination.hash(state);
        self.key.hash(state);
        hash_table(&self.arguments, state);
    }
}

/// A binding in its vhost, with its two ends resolved.
#[derive(Clone, Debug)]
pub(super) struct BoundBinding {
    pub binding: Arc<Binding>,
    /// The exchange that is the source.
    pub source: Slot,
    pub target: Target,
}

/// All bindings of a vhost.
#[derive(Clone, Debug, Default)]
pub(super) struct BindingTable {
    slots: Slots<BoundBinding>,
    by_identity: AHashMap<Arc<Binding>, Slot>,
}

impl BindingTable {
    pub fn find(&self, binding: &Binding) -> Option<Slot> {
        self.by_identity.get(binding).copied()
    }

    pub fn get(&self, slot: Slot) -> Option<&BoundBinding> {
        self.slots.get(slot)
    }

    /// Adds a binding; none if it is there already.
    pub fn insert(&mut self, binding: Binding, source: Slot, target: Target) -> Option<Slot> {
        if self.by_identity.contains_key(&binding) {
            return None;
        }
        let binding = Arc::new(binding);
        let slot = self.slots.insert(BoundBinding { binding: Arc::clone(&binding), source, target });
        self.by_identity.insert(binding, slot);
        Some(slot)
    }

    pub fn remove(&mut self, slot: Slot) -> Option<BoundBinding> {
        let bound = self.slots.remove(slot)?;
        self.by_identity.remove(&bound.binding);
        Some(bound)
    }

    pub fn iter(&self) -> impl Iterator<Item = &Arc<Binding>> {
        self.slots.iter().map(|(_, bound)| &bound.binding)
    }

    pub fn len(&self) -> usize {
        self.by_identity.len()
    }
}

#[cfg(test)]
mod tests {
    use amq_protocol::types::AMQPValue;

    use super::*;

    fn binding(key: &str, arguments: &[(&str, AMQPValue)]) -> Binding {
        let mut table = FieldTable::default();
        for (name, value) in arguments {
            table.insert((*name).into(), value.clone());
        }
        Binding { source: "x".into(), destination: Destination::Queue("q".into()), key: key.into(), arguments: table }
    }

    #[test]
    fn identity_is_key_and_arguments_with_their_types_in_any_order() {
        let int = AMQPValue::LongInt(1);
        let long = AMQPValue::LongLongInt(1);
        let mut table = BindingTable::default();
        let mut insert = |binding: Binding| table.insert(binding, 0, Target::queue(0)).is_some();
        assert!(insert(binding("k", &[("a", int.clone()), ("b", long.clone())])));
        assert!(!insert(binding("k", &[("b", long.clone()), ("a", int.clone())])));
        assert!(insert(binding("k", &[("a", long.clone()), ("b", long.clone())])));
        assert!(insert(binding("k", &[])));
        assert!(insert(binding("l", &[])));
        let exchange = Binding { destination: Destination::Exchange("q".into()), ..binding("k", &[]) };
        assert!(insert(exchange));
        assert_eq!(table.len(), 5);
    }

    #[test]
    fn a_removed_binding_can_be_added_again() {
        let mut table = BindingTable::default();
        let slot = table.insert(binding("k", &[]), 0, Target::queue(0)).unwrap();
        assert_eq!(table.find(&binding("k", &[])), Some(slot));
        assert!(table.remove(slot).is_some());
        assert!(table.remove(slot).is_none());
        assert_eq!(table.find(&binding("k", &[])), None);
        assert!(table.insert(binding("k", &[]), 0, Target::queue(0)).is_some());
        assert_eq!(table.iter().count(), 1);
    }
}
