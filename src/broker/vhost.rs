//! A virtual host: its topology, and the operations that change it, each with the round that makes it durable.
//!
//! # Locks
//! The topology lock comes before the lock of the policies, and that before every queue's lock. Publishing takes it for reading only when a channel's route cache
//! misses; a change holds it for writing while it alters memory and hands the definition to the store, never for I/O.

mod events;
mod exchange_states;
mod passage;
mod policies;

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use ahash::AHashMap;
use amq_protocol::types::AMQPValue;
use parking_lot::RwLock;

use super::{
    BrokerError,
    arguments::{self, QueueType},
    binding::{Binding, Destination},
    definitions,
    environment::Environment,
    exchange::{Attributes, Exchange},
    exchange_state::ExchangeState,
    policy::{Policy, PolicySet},
    port::Effects,
    queue::{ConnectionId, Counts, DeletedQueue, Queue, QueueOptions},
    router::{Declared, Removed, RouteResult, Topology, TopologyError, check_ends},
    rules::{QueueTraits, RuleDefaults},
};
use crate::{
    model::{Name, ResourceName, is_reserved},
    store::{QueueId, QueueStateRecord, Round},
};

pub use exchange_states::DelayedIn;
pub use passage::{Arrival, Published};
pub use policies::PolicyError;

/// What routing answers: the queues themselves.
pub type Route = RouteResult<Arc<Queue>>;

/// See the module.
pub struct Vhost {
    pub name: Name,
    topology: RwLock<Topology<Arc<Queue>>>,
    /// Changed with the topology locked, so that no queue or exchange is declared in between.
    policies: RwLock<PolicySet>,
    /// Of the few exchanges that have state. Changed with the topology locked for writing.
    exchange_states: RwLock<AHashMap<Name, Arc<ExchangeState>>>,
    settings: QueueSettings,
    /// Moves with every change that could route a message elsewhere.
    epoch: AtomicU64,
    /// Whether messages are copied to the trace exchange.
    tracing: AtomicBool,
    /// The round of the last definition written: who finds a thing declared by another waits for it, too.
    last_definition: AtomicU64,
    environment: Arc<Environment>,
}

/// What the configuration says about queues.
#[derive(Clone, Copy, Debug)]
pub struct QueueSettings {
    /// Of a queue that is declared without `x-queue-type`, if its properties suit the type; else it is classic.
    pub default_type: QueueType,
    pub rules: RuleDefaults,
    /// Whether a queue may be neither durable nor exclusive, which RabbitMQ 4.3 does not permit by default.
    pub permit_transient_nonexclusive: bool,
}

impl Default for QueueSettings {
    fn default() -> Self {
        let (default_type, rules) = (QueueType::Classic, RuleDefaults::default());
        QueueSettings { default_type, rules, permit_transient_nonexclusive: true }
    }
}

/// A declared queue.
pub struct DeclaredQueue {
    pub queue: Arc<Queue>,
    pub created: bool,
    /// When it is on disk.
    pub round: Round,
}

impl Vhost {
    /// A vhost with the predeclared exchanges, and with the policies that the configuration has for it.
    pub(super) fn new(
        name: Name,
        environment: Arc<Environment>,
        settings: QueueSettings,
        configured: impl IntoIterator<Item = Arc<Policy>>,
    ) -> Self {
        let vhost = Vhost {
            topology: RwLock::new(Topology::with_predeclared(name.clone())),
            policies: RwLock::new(PolicySet::configured(configured)),
            exchange_states: RwLock::default(),
            settings,
            name,
            epoch: AtomicU64::new(1),
            tracing: AtomicBool::new(false),
            last_definition: AtomicU64::new(0),
            environment,
        };
        {
            let mut topology = vhost.topology.write();
            vhost.add_event_exchange(&mut topology);
            vhost.apply_to_exchanges(&mut topology);
        }
        vhost
    }

    /// A number that stands still as long as routes stay valid.
    #[inline]
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    fn changed(&self) {
        self.epoch.fetch_add(1, Ordering::Release);
    }

    /// The round with which everything that is defined is on disk.
    fn definitions_round(&self) -> Round {
        self.environment.store.renewed(self.last_definition.load(Ordering::Relaxed))
    }

    fn define(&self, key: Vec<u8>, value: Vec<u8>) -> Round {
        let round = self.environment.store.put_definition(key, value);
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

    /// Declares an exchange for a connection; answers when it is on disk.
    ///
    /// # Errors
    /// Those of [`Vhost::check_declare_exchange`].
    pub fn declare_exchange(&self, new: Exchange, connection: ConnectionId) -> Result<Round, TopologyError> {
        let mut topology = self.topology.write();
        let name = new.name.clone();
        if topology.declare_exchange(new.clone())? == Declared::Existed {
            return Ok(self.definitions_round());
        }
        let state = self.begin_state(&new);
        let definition = new
            .durable
            .then(|| (definitions::exchange_key(&self.name, &name), definitions::exchange_value(&new, state)));
        self.apply_to_exchange(&mut topology, &name);
        self.changed();
        if let Some(exchange) = topology.exchange(&name) {
            self.note_exchange_created(exchange, connection);
        }
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

    /// Deletes an exchange and its bindings for a connection; answers when that is on disk.
    ///
    /// # Errors
    /// 403 for a system exchange, 406 for one in use with `if_unused`.
    pub fn delete_exchange(
        &self,
        name: &str,
        if_unused: bool,
        connection: ConnectionId,
    ) -> Result<Round, TopologyError> {
        let mut topology = self.topology.write();
        let removed = topology.delete_exchange(name, if_unused)?;
        Ok(self.forget(&topology, &removed, None, Some(connection)))
    }

    /// Removes the definitions of what a change has taken away.
    fn forget(
        &self,
        topology: &Topology<Arc<Queue>>,
        removed: &Removed,
        queue: Option<&Arc<Queue>>,
        connection: Option<ConnectionId>,
    ) -> Round {
        if removed.is_empty() {
            return 0;
        }
        self.changed();
        self.look_for_listeners(topology);
        self.note_removed(removed, connection);
        let mut round = 0;
        for binding in removed.bindings.iter().filter(|binding| was_durable(topology, removed, queue, binding)) {
            round = round.max(self.environment.store.delete_definition(definitions::binding_key(&self.name, binding)));
        }
        for exchange in &removed.exchanges {
            round = round.max(self.end_state(&exchange.name));
            tracing::info!(vhost = %self.name, exchange = %exchange.name, "exchange deleted");
            if exchange.durable {
                round = round.max(
                    self.environment.store.delete_definition(definitions::exchange_key(&self.name, &exchange.name)),
                );
            }
        }
        round
    }

    // Bindings

    /// Makes a binding; answers when it is on disk. The first one of its kind gets the source's recent history.
    ///
    /// # Errors
    /// As RabbitMQ's, in its order; 405 for a queue exclusive to another connection.
    pub fn bind(
        &self,
        binding: Binding,
        connection: ConnectionId,
        effects: &mut Effects,
    ) -> Result<Round, BrokerError> {
        // For the history, and before the topology is locked: publishers take both in this order.
        let section = self.environment.store.atomic();
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
        if !topology.bind(binding.clone())? {
            return Ok(self.definitions_round());
        }
        self.changed();
        self.look_for_listeners(&topology);
        self.note_binding_created(&binding, connection);
        self.replay_history(&topology, &section, &binding, effects);
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
        Ok(self.forget(&topology, &removed, None, Some(connection)))
    }

    // Queues

    /// Whether a queue like this may be declared without a name of the client's. Its own name is not looked at.
    ///
    /// # Errors
    /// 406 for a type of queue that wants one.
    pub fn check_server_named(&self, mut options: QueueOptions) -> Result<(), BrokerError> {
        arguments::complete_queue_type(&mut options, self.settings.default_type);
        arguments::check_server_named(QueueType::of(&options.arguments))
    }

    /// Declares a queue. An `x-queue-type` that was left open is filled in.
    ///
    /// # Errors
    /// 405 or 406 when one of that name is there and differs; 403 for a reserved name; 406 for wrong arguments, or
    /// properties that the type cannot have; 541 for what the configuration does not permit.
    pub fn declare_queue(
        &self,
        mut options: QueueOptions,
        connection: ConnectionId,
        server_named: bool,
    ) -> Result<DeclaredQueue, BrokerError> {
        arguments::complete_queue_type(&mut options, self.settings.default_type);
        if let Some(queue) = self.queue(&options.name) {
            return self.redeclare(queue, &options, connection);
        }
        if !server_named && is_reserved(&options.name) {
            return Err(BrokerError::ReservedQueueName { queue: options.name });
        }
        self.check_new_queue(&options)?;
        let mut topology = self.topology.write();
        if let Some(queue) = topology.queue(&options.name).cloned() {
            drop(topology); // somebody was faster
            return self.redeclare(queue, &options, connection);
        }
        let ignored = arguments::arguments_without_effect(&options.arguments);
        if !ignored.is_empty() {
            tracing::warn!(vhost = %self.name, queue = %options.name, arguments = ?ignored, "queue arguments are stored but have no effect in this version");
        }
        let traits = QueueTraits::of(&options.arguments);
        let rules = self.rules_of(&options);
        let id = self.environment.store.allocate_queue_ids(u64::from(traits.max_priority) + 1);
        let name = options.name.clone();
        let round = match options.durable {
            true => self.define(definitions::queue_key(&self.name, &name), definitions::queue_value(id, &options)),
            false => 0,
        };
        let queue = Queue::new(options, traits, rules, id, self.environment.clone());
        if queue.may_leave_notes() {
            self.environment.note_leftover(id);
        }
        topology.add_queue(name, queue.clone());
        self.changed();
        self.note_queue_created(&queue, connection);
        tracing::info!(vhost = %self.name, queue = %queue.options.name, durable = queue.options.durable, "queue declared");
        Ok(DeclaredQueue { queue, created: true, round })
    }

    /// The checks that only a new queue needs, in RabbitMQ's order.
    fn check_new_queue(&self, options: &QueueOptions) -> Result<(), BrokerError> {
        let resource = ResourceName::queue(&options.name, &self.name);
        arguments::check_queue_arguments(&resource, &options.arguments)?;
        let transient = !options.durable && options.exclusive_to.is_none();
        if transient && !self.settings.permit_transient_nonexclusive {
            return Err(BrokerError::NotPermitted {
                feature: "transient_nonexcl_queues",
                setting: "compatibility.permit_transient_nonexclusive_queues",
            });
        }
        arguments::check_properties(options)
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
        let round = if current.durable { self.definitions_round() } else { 0 };
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
        let mut round = self.forget(&topology, &removed, Some(queue), None);
        self.changed();
        self.note_queue_deleted(queue, effects.on_behalf_of);
        if queue.options.durable {
            round = round.max(self.environment.store.delete_definition(definitions::queue_key(&self.name, name)));
        }
        for log in in_store {
            // Also of a transient queue, some of which was paged out; nobody waits for that.
            let deleted = self.environment.store.delete_queue(log);
            if queue.options.durable {
                round = round.max(deleted);
            }
        }
        if queue.may_leave_notes() {
            self.environment.forget_leftover(queue.id);
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
        if queue.traits.queue_type == QueueType::Stream {
            return Ok(()); // which knows neither flag
        }
        let (queue, vhost) = (queue.options.name.clone(), self.name.clone());
        if if_empty && counts.ready > 0 {
            return Err(BrokerError::QueueNotEmpty { queue, vhost });
        }
        if if_unused && counts.consumers > 0 {
            return Err(BrokerError::QueueInUse { queue, vhost });
        }
        Ok(())
    }

    // Dead letters

    /// Makes sure that the queue is there which keeps messages that failed too often; answers whether it was made now.
    ///
    /// # Errors
    /// When such a queue cannot be made.
    pub(super) fn declare_parking_queue(&self, name: &str) -> Result<bool, BrokerError> {
        if self.queue(name).is_some() {
            return Ok(false);
        }
        // Not one that would count failures and park them in turn.
        let classic = AMQPValue::LongString(QueueType::Classic.name().into());
        let options = QueueOptions {
            name: name.into(),
            vhost: self.name.clone(),
            durable: true,
            auto_delete: false,
            exclusive_to: None,
            arguments: std::collections::BTreeMap::from([("x-queue-type".into(), classic)]).into(),
        };
        Ok(self.declare_queue(options, ConnectionId(0), true)?.created)
    }

    // Recovery

    /// Puts a definition from the store back; `false` for a binding whose ends are gone.
    pub(super) fn restore_exchange(&self, exchange: Exchange, state: Option<QueueId>) {
        let mut topology = self.topology.write();
        self.restore_state(&exchange, state);
        let name = exchange.name.clone();
        topology.insert_exchange(exchange);
        self.apply_to_exchange(&mut topology, &name);
    }

    pub(super) fn restore_queue(
        &self,
        id: QueueId,
        mut options: QueueOptions,
        states: &mut AHashMap<QueueId, QueueStateRecord>,
    ) {
        arguments::complete_queue_type(&mut options, QueueType::Classic);
        let name = options.name.clone();
        let traits = QueueTraits::of(&options.arguments);
        let rules = self.rules_of(&options);
        let records: Vec<_> = (0..=traits.max_priority)
            .filter_map(|level| Some((level, states.remove(&QueueId(id.0 + u64::from(level)))?)))
            .collect();
        let queue = Queue::recovered(options, traits, rules, id, self.environment.clone(), &records);
        self.topology.write().add_queue(name, queue);
    }

    pub(super) fn restore_binding(&self, binding: Binding) -> bool {
        let mut topology = self.topology.write();
        let bound = topology.bind(binding).is_ok();
        self.look_for_listeners(&topology);
        bound
    }
}

/// Whether the store has the definition of a removed binding: both its ends are durable, or gone without a trace. `queue` is
/// gone as well.
fn was_durable(
    topology: &Topology<Arc<Queue>>,
    removed: &Removed,
    queue: Option<&Arc<Queue>>,
    binding: &Binding,
) -> bool {
    let exchange = |name: &str| {
        let gone = removed.exchanges.iter().find(|exchange| *exchange.name == *name);
        topology.exchange(name).or(gone).is_none_or(|exchange| exchange.durable)
    };
    exchange(&binding.source)
        && match &binding.destination {
            Destination::Exchange(name) => exchange(name),
            Destination::Queue(name) => topology.queue(name).or(queue).is_none_or(|queue| queue.options.durable),
        }
}
