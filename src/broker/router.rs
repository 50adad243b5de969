//! A vhost's topology: its exchanges, bindings and queues' names, and where a message goes.
//!
//! # Ownership
//! A [`Topology`] is plain data, without a lock and without the queues' state. Its vhost holds it behind a lock and
//! counts an epoch up with every change; publishers route under the read side, or not at all while the epoch stands and
//! the [`RouteResult`] was `cacheable`. A queue is known by the target `T` that its vhost registered for it.
//!
//! # Invariants
//! - R1: a binding exists only while both its ends do; whatever removes an end removes the binding.
//! - R2: a queue is in a route once, an exchange is visited once per message, whatever leads there how often.
//! - R3: nothing recurses: chains of exchanges and cascades of auto-delete are worked off from lists.
//!
//! # Elsewhere
//! Permissions, exclusive queues and reply codes on the wire: `session`. Matching: `broker::exchange`.

use std::borrow::Borrow;
use std::collections::BTreeSet;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use ahash::AHashMap;

use super::arguments::QueueType;
use super::binding::{Binding, BindingTable, Destination};
use super::exchange::{ALTERNATE_EXCHANGE, Exchange, Matcher, Slot, Slots, Target, UnknownExchangeKind};
use crate::model::arguments::{InequivalentArgument, InvalidArgumentType, exchange_name_argument};
use crate::model::{Name, ResourceName, is_reserved};

mod route;

pub use route::RouteResult;

/// Why a change of the topology is refused, or a message cannot be routed. `Display` is RabbitMQ's text, without the
/// name of the code in front.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    #[error("no {0}")]
    NotFound(ResourceName),
    #[error("operation not permitted on the default exchange")]
    DefaultExchange,
    #[error("exchange name '{0}' contains reserved prefix 'amq.*'")]
    ReservedName(Name),
    #[error("deletion of system {0} not allowed")]
    SystemExchange(ResourceName),
    #[error("cannot publish to internal {0}")]
    InternalExchange(ResourceName),
    #[error("{0} in use")]
    InUse(ResourceName),
    #[error(transparent)]
    Inequivalent(#[from] InequivalentArgument),
    #[error(transparent)]
    InvalidArgumentType(#[from] InvalidArgumentType),
    /// For callers that parse the type and declare in one go. RabbitMQ 3.x closed the connection with 503 here.
    #[error(transparent)]
    UnknownKind(#[from] UnknownExchangeKind),
    /// The exchange's type does not accept its arguments.
    #[error("{0}")]
    InvalidExchange(String),
    /// The exchange's type does not accept the binding's key, arguments or queue.
    #[error("{0}")]
    InvalidBinding(String),
}

impl TopologyError {
    /// The reply code: 403, 404 or 406, all of them on the channel.
    #[must_use]
    pub fn code(&self) -> u16 {
        match self {
            Self::DefaultExchange | Self::ReservedName(_) | Self::SystemExchange(_) | Self::InternalExchange(_) => 403,
            Self::NotFound(_) => 404,
            Self::InUse(_)
            | Self::Inequivalent(_)
            | Self::InvalidArgumentType(_)
            | Self::UnknownKind(_)
            | Self::InvalidExchange(_)
            | Self::InvalidBinding(_) => 406,
        }
    }
}

/// What a declaration does, or would do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Declared {
    Created,
    /// An equivalent exchange was there.
    Existed,
}

/// What went, in the order it went: what was asked for and what went with it.
#[derive(Clone, Debug, Default)]
pub struct Removed {
    pub exchanges: Vec<Exchange>,
    pub bindings: Vec<Arc<Binding>>,
}

impl Removed {
    /// Whether nothing was removed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.exchanges.is_empty() && self.bindings.is_empty()
    }
}

#[derive(Clone, Debug)]
struct ExchangeEntry {
    exchange: Exchange,
    matcher: Matcher,
    /// Whether the next message with the same keys goes the same way and the exchange need not see it.
    cacheable: bool,
    /// The exchange has to see every message, because it does more with them than routing.
    observes: bool,
    /// Bindings of which it is the source.
    outgoing: BTreeSet<Slot>,
    /// Bindings of which it is the destination.
    incoming: BTreeSet<Slot>,
}

#[derive(Clone, Debug)]
struct QueueEntry<T> {
    target: T,
    incoming: BTreeSet<Slot>,
}

/// A name that is looked up by the bytes of a routing key.
#[derive(Clone, Debug, PartialEq, Eq)]
struct NameBytes(Name);

impl Borrow<[u8]> for NameBytes {
    fn borrow(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl Hash for NameBytes {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.as_bytes().hash(state);
    }
}

/// The exchanges, bindings and queues of one vhost.
#[derive(Clone, Debug)]
pub struct Topology<T> {
    vhost: Name,
    exchanges: Slots<ExchangeEntry>,
    exchange_slots: AHashMap<Name, Slot>,
    queues: Slots<QueueEntry<T>>,
    queue_slots: AHashMap<NameBytes, Slot>,
    bindings: BindingTable,
}

impl<T: Clone> Topology<T> {
    /// A topology without any exchange.
    #[must_use]
    pub fn empty(vhost: Name) -> Self {
        Self {
            vhost,
            exchanges: Slots::default(),
            exchange_slots: AHashMap::default(),
            queues: Slots::default(),
            queue_slots: AHashMap::default(),
            bindings: BindingTable::default(),
        }
    }

    /// The topology of a new vhost: the default exchange and the `amq.` exchanges.
    #[must_use]
    pub fn with_predeclared(vhost: Name) -> Self {
        let mut topology = Self::empty(vhost);
        for exchange in Exchange::predeclared() {
            topology.insert_exchange(exchange);
        }
        topology
    }

    /// The vhost it belongs to, as texts name it.
    #[must_use]
    pub fn vhost(&self) -> &Name {
        &self.vhost
    }

    // Exchanges

    #[must_use]
    pub fn exchange(&self, name: &str) -> Option<&Exchange> {
        Some(&self.exchange_entry(name)?.1.exchange)
    }

    /// All exchanges, the default exchange among them.
    pub fn exchanges(&self) -> impl Iterator<Item = &Exchange> {
        self.exchanges.iter().map(|(_, entry)| &entry.exchange)
    }

    /// The exchange of that name, as passive declare wants it.
    ///
    /// # Errors
    /// 403 for the default exchange, 404 if there is none of that name.
    pub fn declare_passive(&self, name: &str) -> Result<&Exchange, TopologyError> {
        check_not_default(name)?;
        self.exchange(name).ok_or_else(|| self.no_exchange(name))
    }

    /// The exchange of that name, if it takes messages from clients.
    ///
    /// # Errors
    /// 404 if there is none, 403 if it is internal.
    pub fn check_publish(&self, name: &str) -> Result<&Exchange, TopologyError> {
        let exchange = self.exchange(name).ok_or_else(|| self.no_exchange(name))?;
        if exchange.internal {
            return Err(TopologyError::InternalExchange(self.exchange_resource(name)));
        }
        Ok(exchange)
    }

    /// What declaring this exchange would do. Whoever is told `Created` checks the permissions that its alternate
    /// exchange needs, and declares.
    ///
    /// # Errors
    /// In this order: 403 for the default exchange; for one that exists, 406 if it is not equivalent; for a new one,
    /// 403 for a reserved name and 406 for an alternate exchange that is no `longstr`.
    pub fn check_declare(&self, new: &Exchange) -> Result<Declared, TopologyError> {
        check_not_default(&new.name)?;
        if let Some(current) = self.exchange(&new.name) {
            current.check_equivalent(new, &self.vhost)?;
            return Ok(Declared::Existed);
        }
        if is_reserved(&new.name) {
            return Err(TopologyError::ReservedName(Arc::clone(&new.name)));
        }
        let resource = self.exchange_resource(&new.name);
        exchange_name_argument(&resource, ALTERNATE_EXCHANGE, &new.arguments)?;
        Ok(Declared::Created)
    }

    /// Declares an exchange.
    ///
    /// # Errors
    /// Those of [`Topology::check_declare`], then 406 if the type of a new one does not accept its arguments; nothing has
    /// changed then.
    pub fn declare_exchange(&mut self, new: Exchange) -> Result<Declared, TopologyError> {
        let declared = self.check_declare(&new)?;
        if declared == Declared::Created {
            new.check_arguments(&self.vhost).map_err(TopologyError::InvalidExchange)?;
            self.insert_exchange(new);
        }
        Ok(declared)
    }

    /// Adds an exchange without any check: a predeclared one, or one from the definitions on disk. False if there is one
    /// of that name, which stays as it is.
    pub fn insert_exchange(&mut self, exchange: Exchange) -> bool {
        if self.exchange_slots.contains_key(&exchange.name) {
            return false;
        }
        let name = Arc::clone(&exchange.name);
        let matcher = Matcher::new(&exchange);
        let observes = exchange.observes_messages();
        let slot = self.exchanges.insert(ExchangeEntry {
            cacheable: matcher.is_cacheable() && !observes,
            observes,
            matcher,
            exchange,
            outgoing: BTreeSet::new(),
            incoming: BTreeSet::new(),
        });
        self.exchange_slots.insert(name, slot);
        true
    }

    /// Sets the alternate exchange that a policy gives; the exchange's own argument still wins. False if there is no
    /// such exchange.
    pub fn set_policy_alternate(&mut self, exchange: &str, alternate: Option<Name>) -> bool {
        let slot = self.exchange_slots.get(exchange).copied();
        let Some(entry) = slot.and_then(|slot| self.exchanges.get_mut(slot)) else {
            return false;
        };
        entry.exchange.policy_alternate = alternate;
        true
    }

    /// Deletes an exchange with its bindings, and the auto-delete exchanges that this leaves without a binding.
    /// A missing exchange is no error.
    ///
    /// # Errors
    /// 403 for the default exchange and for system exchanges; 406 with `if_unused` if it is the source of a binding.
    pub fn delete_exchange(&mut self, name: &str, if_unused: bool) -> Result<Removed, TopologyError> {
        check_deletable(name, &self.vhost)?;
        let mut removed = Removed::default();
        let Some((slot, entry)) = self.exchange_entry(name) else {
            return Ok(removed);
        };
        if if_unused && !entry.outgoing.is_empty() {
            return Err(TopologyError::InUse(self.exchange_resource(name)));
        }
        let bindings = self.detach_exchange(slot, &mut removed);
        self.remove_bindings(bindings, &mut removed);
        Ok(removed)
    }

    // Queues

    /// Makes a queue known: the default exchange routes to it, and it can be bound. Gives back the target of an
    /// existing queue of that name, which keeps its bindings.
    pub fn add_queue(&mut self, name: Name, target: T) -> Option<T> {
        let slot = self.queue_slots.get(name.as_bytes()).copied();
        if let Some(entry) = slot.and_then(|slot| self.queues.get_mut(slot)) {
            return Some(std::mem::replace(&mut entry.target, target));
        }
        let slot = self.queues.insert(QueueEntry { target, incoming: BTreeSet::new() });
        self.queue_slots.insert(NameBytes(name), slot);
        None
    }

    #[must_use]
    pub fn queue(&self, name: &str) -> Option<&T> {
        Some(&self.queue_entry(name.as_bytes())?.1.target)
    }

    /// All queues, in no order.
    pub fn queues(&self) -> impl Iterator<Item = (&Name, &T)> {
        self.queue_slots.iter().filter_map(|(name, slot)| Some((&name.0, &self.queues.get(*slot)?.target)))
    }

    /// Forgets a queue: its bindings go, and the auto-delete exchanges that this leaves without one.
    pub fn remove_queue(&mut self, name: &str) -> Removed {
        let mut removed = Removed::default();
        if let Some(slot) = self.queue_slots.remove(name.as_bytes())
            && let Some(entry) = self.queues.remove(slot)
        {
            self.remove_bindings(entry.incoming.into_iter().collect(), &mut removed);
        }
        removed
    }

    // Bindings

    /// All bindings but those of the default exchange, which are implied by the queues.
    pub fn bindings(&self) -> impl Iterator<Item = &Arc<Binding>> {
        self.bindings.iter()
    }

    #[must_use]
    pub fn binding_count(&self) -> usize {
        self.bindings.len()
    }

    /// The bindings of which an exchange is the source.
    pub fn bindings_from(&self, exchange: &str) -> impl Iterator<Item = &Arc<Binding>> {
        let slots = self.exchange_entry(exchange).map(|(_, entry)| &entry.outgoing);
        self.resolve(slots)
    }

    /// The bindings that lead to a queue or an exchange.
    pub fn bindings_to(&self, destination: &Destination) -> impl Iterator<Item = &Arc<Binding>> {
        let slots = match destination {
            Destination::Queue(name) => self.queue_entry(name.as_bytes()).map(|(_, entry)| &entry.incoming),
            Destination::Exchange(name) => self.exchange_entry(name).map(|(_, entry)| &entry.incoming),
        };
        self.resolve(slots)
    }

    /// Whether a binding can be made: both ends are there, and the source's type accepts it.
    ///
    /// # Errors
    /// In this order: 403 if an end is the default exchange, 404 if the source or the destination is missing, 406 if
    /// the type refuses key or arguments.
    pub fn check_bind(&self, binding: &Binding) -> Result<(), TopologyError> {
        self.resolve_ends(binding).map(|_| ())
    }

    /// Whether a queue of this type can be bound to an exchange; true of an exchange that is missing.
    ///
    /// # Errors
    /// 406 if the exchange's type does not take such queues.
    pub fn check_queue_type(&self, source: &str, queue_type: QueueType) -> Result<(), TopologyError> {
        let check = |exchange: &Exchange| exchange.check_queue_type(queue_type);
        self.exchange(source).map_or(Ok(()), check).map_err(TopologyError::InvalidBinding)
    }

    /// Makes a binding. False if it was there already.
    ///
    /// # Errors
    /// Those of [`Topology::check_bind`]; nothing has changed then.
    pub fn bind(&mut self, binding: Binding) -> Result<bool, TopologyError> {
        let (source, target) = self.resolve_ends(&binding)?;
        let Some(slot) = self.bindings.insert(binding, source, target) else {
            return Ok(false);
        };
        if let Some(incoming) = self.incoming_mut(target) {
            incoming.insert(slot);
        }
        if let Some(bound) = self.bindings.get(slot)
            && let Some(entry) = self.exchanges.get_mut(source)
        {
            entry.matcher.add(slot, &bound.binding, target);
            entry.outgoing.insert(slot);
        }
        Ok(true)
    }

    /// Removes a binding, and the auto-delete exchanges that this leaves without one. What is missing (the binding, its
    /// source or its destination) is no error; whether an end is the default exchange is for
    /// [`check_not_default`] to say.
    pub fn unbind(&mut self, binding: &Binding) -> Removed {
        let mut removed = Removed::default();
        if let Some(slot) = self.bindings.find(binding) {
            self.remove_bindings(vec![slot], &mut removed);
        }
        removed
    }

    /// Whether a binding survives a restart: both its ends do.
    #[must_use]
    pub fn is_durable_binding(&self, binding: &Binding, queue_durable: bool) -> bool {
        let durable = |name: &str| self.exchange(name).is_some_and(|exchange| exchange.durable);
        durable(&binding.source)
            && match &binding.destination {
                Destination::Queue(_) => queue_durable,
                Destination::Exchange(name) => durable(name),
            }
    }

    fn resolve_ends(&self, binding: &Binding) -> Result<(Slot, Target), TopologyError> {
        check_ends(binding)?;
        let (source, entry) = self.exchange_entry(&binding.source).ok_or_else(|| self.no_exchange(&binding.source))?;
        let target = match &binding.destination {
            Destination::Exchange(name) => {
                Target::exchange(self.exchange_entry(name).ok_or_else(|| self.no_exchange(name))?.0)
            }
            Destination::Queue(name) => {
                let missing = || TopologyError::NotFound(ResourceName::queue(name, &self.vhost));
                Target::queue(self.queue_entry(name.as_bytes()).ok_or_else(missing)?.0)
            }
        };
        entry.matcher.check(binding).map_err(TopologyError::InvalidBinding)?;
        Ok((source, target))
    }

    /// Takes an exchange out; gives back the bindings that must go with it.
    fn detach_exchange(&mut self, slot: Slot, removed: &mut Removed) -> Vec<Slot> {
        let Some(entry) = self.exchanges.remove(slot) else {
            return Vec::new();
        };
        self.exchange_slots.remove(&entry.exchange.name);
        removed.exchanges.push(entry.exchange);
        entry.outgoing.union(&entry.incoming).copied().collect()
    }

    /// Removes bindings and, as long as that leaves an auto-delete exchange without one, the exchange and its bindings.
    ///
    /// No slot is given out in between, so a slot in the list is this binding or none.
    fn remove_bindings(&mut self, mut work: Vec<Slot>, removed: &mut Removed) {
        let mut done = 0;
        while let Some(&slot) = work.get(done) {
            done += 1;
            let Some(bound) = self.bindings.remove(slot) else {
                continue;
            };
            if let Some(incoming) = self.incoming_mut(bound.target) {
                incoming.remove(&slot);
            }
            let mut orphaned = false;
            if let Some(source) = self.exchanges.get_mut(bound.source) {
                source.matcher.remove(slot, &bound.binding, bound.target);
                source.outgoing.remove(&slot);
                orphaned = source.exchange.auto_delete && source.outgoing.is_empty();
            }
            removed.bindings.push(bound.binding);
            if orphaned {
                work.extend(self.detach_exchange(bound.source, removed));
            }
        }
    }

    fn incoming_mut(&mut self, target: Target) -> Option<&mut BTreeSet<Slot>> {
        match (target.as_queue(), target.as_exchange()) {
            (Some(queue), _) => self.queues.get_mut(queue).map(|entry| &mut entry.incoming),
            (_, Some(exchange)) => self.exchanges.get_mut(exchange).map(|entry| &mut entry.incoming),
            (None, None) => None,
        }
    }

    fn resolve<'a>(&'a self, slots: Option<&'a BTreeSet<Slot>>) -> impl Iterator<Item = &'a Arc<Binding>> {
        slots.into_iter().flatten().filter_map(|slot| Some(&self.bindings.get(*slot)?.binding))
    }

    fn exchange_entry(&self, name: &str) -> Option<(Slot, &ExchangeEntry)> {
        let slot = *self.exchange_slots.get(name)?;
        Some((slot, self.exchanges.get(slot)?))
    }

    fn queue_entry(&self, name: &[u8]) -> Option<(Slot, &QueueEntry<T>)> {
        let slot = *self.queue_slots.get(name)?;
        Some((slot, self.queues.get(slot)?))
    }

    fn exchange_resource(&self, name: &str) -> ResourceName {
        ResourceName::exchange(name, &self.vhost)
    }

    fn no_exchange(&self, name: &str) -> TopologyError {
        TopologyError::NotFound(self.exchange_resource(name))
    }
}

/// Refuses the default exchange, which nobody can declare, delete or bind.
///
/// # Errors
/// 403 if the name is empty.
pub fn check_not_default(exchange: &str) -> Result<(), TopologyError> {
    if exchange.is_empty() { Err(TopologyError::DefaultExchange) } else { Ok(()) }
}

/// Refuses bindings from or to the default exchange, for bind and unbind.
///
/// # Errors
/// 403 if an end is the default exchange.
pub fn check_ends(binding: &Binding) -> Result<(), TopologyError> {
    if let Destination::Exchange(name) = &binding.destination {
        check_not_default(name)?;
    }
    check_not_default(&binding.source)
}

/// Refuses names that no client may delete, whether they exist or not.
///
/// # Errors
/// 403 for the default exchange and for system exchanges.
pub fn check_deletable(exchange: &str, vhost: &Name) -> Result<(), TopologyError> {
    check_not_default(exchange)?;
    if is_reserved(exchange) {
        return Err(TopologyError::SystemExchange(ResourceName::exchange(exchange, vhost)));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
