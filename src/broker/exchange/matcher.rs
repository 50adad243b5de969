//! The bindings of one exchange, arranged for matching as its type needs them.

use super::consistent_hash::{self, ConsistentHashTable};
use super::direct::DirectTable;
use super::fanout::FanoutTable;
use super::headers::{self, HeadersTable};
use super::jms::{self, SelectorTable};
use super::modulus_hash::ModulusHashTable;
use super::random::RandomTable;
use super::slots::Slot;
use super::target::{Target, Targets};
use super::topic::TopicTrie;
use super::{Exchange, ExchangeKind, Subject, local_random};
use crate::broker::binding::Binding;

/// See the module.
#[derive(Clone, Debug)]
pub enum Matcher {
    Direct(DirectTable),
    Fanout(FanoutTable),
    Topic(TopicTrie),
    Headers(HeadersTable),
    ConsistentHash(ConsistentHashTable),
    Random(RandomTable),
    LocalRandom(RandomTable),
    ModulusHash(ModulusHashTable),
    JmsTopic(SelectorTable),
}

impl Matcher {
    /// A matcher without bindings for an exchange, whose arguments are good.
    pub fn new(exchange: &Exchange) -> Self {
        match exchange.routing_kind() {
            // `Exchange::routing_kind` is never `Delayed`.
            ExchangeKind::Direct | ExchangeKind::Delayed => Self::Direct(DirectTable::default()),
            ExchangeKind::Fanout | ExchangeKind::RecentHistory => Self::Fanout(FanoutTable::default()),
            ExchangeKind::Topic => Self::Topic(TopicTrie::default()),
            ExchangeKind::Headers => Self::Headers(HeadersTable::default()),
            ExchangeKind::ConsistentHash => Self::ConsistentHash(ConsistentHashTable::new(&exchange.arguments)),
            ExchangeKind::Random => Self::Random(RandomTable::default()),
            ExchangeKind::LocalRandom => Self::LocalRandom(RandomTable::default()),
            ExchangeKind::ModulusHash => Self::ModulusHash(ModulusHashTable::default()),
            ExchangeKind::JmsTopic => Self::JmsTopic(SelectorTable::default()),
        }
    }

    /// What the type demands of a binding's key and arguments; the error is the 406 text.
    pub fn check(&self, binding: &Binding) -> Result<(), String> {
        match self {
            Self::Direct(_) | Self::Fanout(_) | Self::Topic(_) | Self::Random(_) | Self::ModulusHash(_) => Ok(()),
            Self::Headers(_) => headers::check_arguments(&binding.arguments),
            Self::ConsistentHash(_) => consistent_hash::check_key(&binding.key),
            Self::LocalRandom(_) => local_random::check_binding(binding),
            Self::JmsTopic(_) => jms::check_arguments(&binding.arguments),
        }
    }

    /// Adds a binding that [`Matcher::check`] accepted; `slot` is its place in the binding table.
    pub fn add(&mut self, slot: Slot, binding: &Binding, target: Target) {
        match self {
            Self::Direct(table) => table.add(&binding.key, target),
            Self::Fanout(table) => table.add(target),
            Self::Topic(trie) => trie.add(&binding.key, target),
            Self::Headers(table) => table.add(slot, &binding.arguments, target),
            Self::ConsistentHash(table) => table.add(binding, target),
            Self::Random(table) | Self::LocalRandom(table) => table.add(slot, target),
            Self::ModulusHash(table) => table.add(&binding.destination, target),
            Self::JmsTopic(table) => table.add(slot, &binding.arguments, target),
        }
    }

    /// Removes a binding that was added with the same values.
    pub fn remove(&mut self, slot: Slot, binding: &Binding, target: Target) {
        match self {
            Self::Direct(table) => table.remove(&binding.key, target),
            Self::Fanout(table) => table.remove(target),
            Self::Topic(trie) => trie.remove(&binding.key, target),
            Self::Headers(table) => table.remove(slot),
            Self::ConsistentHash(table) => table.remove(target),
            Self::Random(table) | Self::LocalRandom(table) => table.remove(slot),
            Self::ModulusHash(table) => table.remove(&binding.destination),
            Self::JmsTopic(table) => table.remove(slot),
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
            Self::Headers(table) => table.collect(subject.headers(), out),
            Self::ConsistentHash(table) => table.collect(subject, out),
            Self::Random(table) | Self::LocalRandom(table) => table.collect(out),
            Self::ModulusHash(table) => table.collect(subject.keys, out),
            Self::JmsTopic(table) => table.collect(subject, out),
        }
    }

    /// Whether the result depends on the keys only, so that it holds for the next message with the same key.
    pub fn is_cacheable(&self) -> bool {
        match self {
            Self::Direct(_) | Self::Fanout(_) | Self::Topic(_) | Self::ModulusHash(_) => true,
            Self::ConsistentHash(table) => table.is_by_key(),
            Self::Headers(_) | Self::Random(_) | Self::LocalRandom(_) | Self::JmsTopic(_) => false,
        }
    }
}
