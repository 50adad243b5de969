//! A virtual host: its topology, and the operations that change it, each with the round that makes it durable.
//!
//! # Locks
//! The topology lock comes before every queue's lock. Publishing takes it for reading only when a channel's route cache
//! misses; a change holds it for writing while it alters memory and hands the definition to the store, never for I/O.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use parking_lot::RwLock;

use super::{
    BrokerError,
    arguments::{self, QueueType},
    binding::{Binding, Destination},
    definitions,
    exchange::{Attributes, Exchange},
    memory::MemoryBudget,
    port::Effects,
    queue::{ConnectionId, Counts, DeletedQueue, Queue, QueueOptions},
    router::{Declared, Removed, RouteResult, Topology, TopologyError, check_ends},
};
use crate::{
    model::{Name, ResourceName, is_reserved},
    store::{QueueId, QueueStateRecord, Round, Store},
};

/// What routing answers: the queues themselves.
pub type Route = RouteResult<Arc<Queue>>;

/// See the module.
pub struct Vhost {
    pub name: Name,
    topology: RwLock<Topology<Arc<Queue>>>,
    /// Moves with every change that could route a message elsewhere.
    epoch: AtomicU64,
    /// The round of the last definition written: who finds a thing declared by another waits for it, too.
    last_definition: AtomicU64,
    store: Arc<Store>,
    budget: Arc<MemoryBudget>,
}

/// A declared queue.
pub struct DeclaredQueue {
    pub queue: Arc<Queue>,
    pub created: bool,
    /// When it is on disk.
    pub round: Round,
}

impl Vhost {
    /// A vhost with the predeclared exchanges.
    pub fn new(name: Name, store: Arc<Store>, budget: Arc<MemoryBudget>) -> Self {
        Vhost {
            topology: RwLock::new(Topology::with_predeclared(name.clone())),
            name,
            epoch: AtomicU64::new(1),
            last_definition: AtomicU64::new(0),
            store,
            budget,
        }
    }

    /// A number that stands still as long as routes stay valid.
    #[inline]
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    fn changed(&self) {
        self.epoch.fetch_add(1, Ordering::Release);
    }

    fn define(&self, key: Vec<u8>, value: Vec<u8>) -> Round {
        let round = self.store.put_definition(key, value);
        self.last_definition.fetch_max(round, Ordering::Relaxed);
        round
    }

    /// Whether clients may publish to the exchange.
    ///
    /// # Errors
    /// 404 without such an exchange, 403 for an internal one.
    pub fn check_publish(&self, exchange: &str) -> Result<(), TopologyError> {
        self.topology.read().check_publish(exchange).map(|_| ())
    }

    /// The queues a message goes to.
    ///
    /// # Errors
    /// 404 without such an exchange, 403 for an internal one.
    pub fn route(
        &self,
        exchange: &str,
        keys: &[&[u8]],
        attributes: &Attributes<'_>,
        out: &mut Route,
    ) -> Result<(), TopologyError> {
        let topology = self.topology.read();
        topology.check_publish(exchange)?;
        topology.route(exchange, keys, attributes, out)
    }

    /// The exchange of that name.
    pub fn exchange(&self, name: &str) -> Option<Exchange> {
        self.topology.read().exchange(name).cloned()
    }

    /// The queue of that name.
    pub fn queue(&self, name: &str) -> Option<Arc<Queue>> {
        self.topology.read().queue(name).cloned()
    }

    /// The queue of that name, if `connection` may use it.
    ///
    /// # Errors
    /// 404 if there is none, 405 if it is exclusive to another connection.
    pub fn queue_for(&self, name: &str, connection: ConnectionId) -> Result<Arc<Queue>, BrokerError> {
        let queue = self.queue(name).ok_or_else(|| self.no_queue(name))?;
        self.check_owner(&queue, connection)?;
        Ok(queue)
    }

    fn check_owner(&self, queue: &Queue, connection: ConnectionId) -> Result<(), BrokerError> {
        match queue.options.exclusive_to {
            Some(owner) if owner != connection => Err(self.locked(queue)),
            _ => Ok(()),
        }
    }

    fn locked(&self, queue: &Queue) -> BrokerError {
        BrokerError::QueueLocked { queue: queue.options.name.clone(), vhost: self.name.clone() }
    }

    fn no_queue(&self, name: &str) -> BrokerError {
        BrokerError::QueueNotFound { queue: name.into(), vhost: self.name.clone() }
    }

    /// All queues.
    pub fn queues(&self) -> Vec<Arc<Queue>> {
        self.topology.read().queues().map(|(_, queue)| queue.clone()).collect()
    }

    // Exchanges

    /// What declaring `new` would do, for the checks that only a new exchange needs.
    ///
    /// # Errors
    /// As RabbitMQ's, in its order.
    pub fn check_declare_exchange(&self, new: &Exchange) -> Result<Declared, TopologyError> {
        self.topology.read().check_declare(new)
    }

    /// Declares an exchange; answers when it is on disk.
    ///
    /// # Errors
    /// Those of [`Vhost::check_declare_exchange`].
    pub fn declare_exchange(&self, new: Exchange) -> Result<Round, TopologyError> {
        let mut topology = self.topology.write();
        let definition =
            new.durable.then(|| (definitions::exchange_key(&self.name, &new.name), definitions::exchange_value(&new)));
        let name = new.name.clone();
        if topology.declare_exchange(new)? == Declared::Existed {
            return Ok(self.last_definition.load(Ordering::Relaxed));
        }
        self.changed();
        tracing::info!(vhost = %self.name, exchange = %name, "exchange declared");
        Ok(definition.map_or(0, |(key, value)| self.define(key, value)))
    }

    /// Whether the exchange is there, for a passive declaration.
    ///
    /// # Errors
    /// 404, or 403 for the default exchange.
    pub fn declare_exchange_passive(&self, name: &str) -> Result<(), TopologyError> {
        self.topology.read().declare_passive(name).map(|_| ())
    }

    /// Deletes an exchange and its bindings; answers when that is on disk.
    ///
    /// # Errors
    /// 403 for a system exchange, 406 for one in use with `if_unused`.
    pub fn delete_exchange(&self, name: &str, if_unused: bool) -> Result<Round, TopologyError> {
        let mut topology = self.topology.write();
        let removed = topology.delete_exchange(name, if_unused)?;
        Ok(self.forget(&removed))
    }

    /// Removes the definitions of what a change has taken away.
    fn forget(&self, removed: &Removed) -> Round {
        if removed.is_empty() {
            return 0;
        }
        self.changed();
        let mut round = 0;
        for binding in &removed.bindings {
            round = round.max(self.store.delete_definition(definitions::binding_key(&self.name, binding)));
        }
        for exchange in &removed.exchanges {
            tracing::info!(vhost = %self.name, exchange = %exchange.name, "exchange deleted");
            if exchange.durable {
                round = round.max(self.store.delete_definition(definitions::exchange_key(&self.name, &exchange.name)));
            }
        }
        round
    }

    // Bindings

    /// Makes a binding; answers when it is on disk.
    ///
    /// # Errors
    /// As RabbitMQ's, in its order; 405 for a queue exclusive to another connection.
    pub fn bind(&self, binding: Binding, connection: ConnectionId) -> Result<Round, BrokerError> {
        let mut topology = self.topology.write();
        topology.check_bind(&binding)?;
        let queue_durable = match &binding.destination {
            Destination::Queue(name) => {
                let queue = topology.queue(name).cloned().ok_or_else(|| self.no_queue(name))?;
                topology.check_queue_type(&binding.source, QueueType::of(&queue.options.arguments))?;
                self.check_owner(&queue, connection)?;
                queue.options.durable
            }
            Destination::Exchange(_) => false,
        };
        let durable = topology.is_durable_binding(&binding, queue_durable);
        let key = durable.then(|| definitions::binding_key(&self.name, &binding));
        if !topology.bind(binding)? {
            return Ok(self.last_definition.load(Ordering::Relaxed));
        }
        self.changed();
        Ok(key.map_or(0, |key| self.define(key, definitions::binding_value())))
    }

    /// Removes a binding; answers when that is on disk. A missing one, or a missing end, is no error.
    ///
    /// # Errors
    /// 403 for the default exchange, 405 for a queue exclusive to another connection.
    pub fn unbind(&self, binding: &Binding, connection: ConnectionId) -> Result<Round, BrokerError> {
        check_ends(binding)?;
        let mut topology = self.topology.write();
        if let Destination::Queue(name) = &binding.destination
            && let Some(queue) = topology.queue(name)
        {
            self.check_owner(queue, connection)?;
        }
        let removed = topology.unbind(binding);
        Ok(self.forget(&removed))
    }

    // Queues

    /// Declares a queue.
    ///
    /// # Errors
    /// 405 or 406 when one of that name is there and differs; 403 for a reserved name; 406 for wrong arguments.
    pub fn declare_queue(
        &self,
        options: QueueOptions,
        connection: ConnectionId,
        server_named: bool,
    ) -> Result<DeclaredQueue, BrokerError> {
        if let Some(queue) = self.queue(&options.name) {
            return self.redeclare(queue, &options, connection);
        }
        if !server_named && is_reserved(&options.name) {
            return Err(BrokerError::ReservedQueueName { queue: options.name });
        }
        arguments::check_queue_arguments(&ResourceName::queue(&options.name, &self.name), &options.arguments)?;
        let mut topology = self.topology.write();
        if let Some(queue) = topology.queue(&options.name).cloned() {
            drop(topology); // somebody was faster
            return self.redeclare(queue, &options, connection);
        }
        let ignored = arguments::arguments_without_effect(&options.arguments);
        if !ignored.is_empty() {
            tracing::warn!(vhost = %self.name, queue = %options.name, arguments = ?ignored, "queue arguments are stored but have no effect in this version");
        }
        let id = self.store.allocate_queue_id();
        let name = options.name.clone();
        let round = match options.durable {
            true => self.define(definitions::queue_key(&self.name, &name), definitions::queue_value(id, &options)),
            false => 0,
        };
        let queue = Queue::new(options, id, self.store.clone(), self.budget.clone());
        topology.add_queue(name, queue.clone());
        self.changed();
        tracing::info!(vhost = %self.name, queue = %queue.options.name, durable = queue.options.durable, "queue declared");
        Ok(DeclaredQueue { queue, created: true, round })
    }

    fn redeclare(
        &self,
        queue: Arc<Queue>,
        options: &QueueOptions,
        connection: ConnectionId,
    ) -> Result<DeclaredQueue, BrokerError> {
        let current = &queue.options;
        if current.exclusive_to != options.exclusive_to || current.exclusive_to.is_some_and(|owner| owner != connection)
        {
            return Err(self.locked(&queue));
        }
        arguments::check_equivalent(current, options)?;
        let round = if current.durable { self.last_definition.load(Ordering::Relaxed) } else { 0 };
        Ok(DeclaredQueue { queue, created: false, round })
    }

    /// Deletes a queue: its consumers are told, its bindings and messages go. Answers how many messages were ready and when
    /// the deletion is on disk.
    ///
    /// # Errors
    /// What `check` says of the queue's counts.
    pub fn delete_queue(
        &self,
        queue: &Arc<Queue>,
        effects: &mut Effects,
        check: impl FnOnce(&Counts) -> Result<(), BrokerError>,
    ) -> Result<(u64, Round), BrokerError> {
        let mut topology = self.topology.write();
        let Some(DeletedQueue { consumers, ready, in_store }) = queue.delete(check)? else { return Ok((0, 0)) };
        let name = &queue.options.name;
        let removed = topology.remove_queue(name);
        let mut round = self.forget(&removed);
        self.changed();
        if queue.options.durable {
            round = round.max(self.store.delete_definition(definitions::queue_key(&self.name, name)));
        }
        if in_store {
            // Also of a transient queue, some of which was paged out; nobody waits for that.
            let deleted = self.store.delete_queue(queue.id);
            if queue.options.durable {
                round = round.max(deleted);
            }
        }
        drop(topology);
        tracing::info!(vhost = %self.name, queue = %name, messages = ready, "queue deleted");
        for consumer in consumers {
            consumer.port.consumer_cancelled(consumer.address);
            effects.wakes.push(consumer.port);
        }
        Ok((ready, round))
    }

    /// RabbitMQ's refusals of `queue.delete` with flags.
    ///
    /// # Errors
    /// 406 for a queue that is not empty, or in use.
    pub fn check_delete(
        &self,
        queue: &Queue,
        counts: &Counts,
        if_unused: bool,
        if_empty: bool,
    ) -> Result<(), BrokerError> {
        let (queue, vhost) = (queue.options.name.clone(), self.name.clone());
        if if_empty && counts.ready > 0 {
            return Err(BrokerError::QueueNotEmpty { queue, vhost });
        }
        if if_unused && counts.consumers > 0 {
            return Err(BrokerError::QueueInUse { queue, vhost });
        }
        Ok(())
    }

    // Recovery

    /// Puts a definition from the store back; `false` for a binding whose ends are gone.
    pub(super) fn restore_exchange(&self, exchange: Exchange) {
        self.topology.write().insert_exchange(exchange);
    }

    pub(super) fn restore_queue(&self, id: QueueId, options: QueueOptions, record: Option<QueueStateRecord>) {
        let name = options.name.clone();
        let (store, budget) = (self.store.clone(), self.budget.clone());
        let queue = match record {
            Some(record) => Queue::recovered(options, id, store, budget, record),
            None => Queue::new(options, id, store, budget),
        };
        self.topology.write().add_queue(name, queue);
    }

    pub(super) fn restore_binding(&self, binding: Binding) -> bool {
        self.topology.write().bind(binding).is_ok()
    }
}
