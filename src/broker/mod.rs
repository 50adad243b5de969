//! Exchanges, queues and rules, without frames and sockets. [`Broker`] is the face the session and the HTTP API see.

mod alarm;
pub mod arguments;
pub mod binding;
pub mod dead_letter;
mod dead_lettering;
pub mod deduplication;
mod definitions;
pub mod delay;
pub mod delay_headers;
pub mod delivery_headers;
mod environment;
mod error;
mod events;
pub mod exchange;
mod exchange_state;
pub mod extension;
mod memory;
mod message;
mod overview;
pub mod policy;
mod port;
mod queue;
pub mod recent_history;
mod reply;
pub mod router;
pub mod rules;
mod stream;
#[cfg(test)]
mod test_port;
mod timers;
mod trace;
mod vhost;

use std::sync::{
    Arc, Weak,
    atomic::{AtomicU32, Ordering},
};

use ahash::AHashMap;
use dashmap::DashMap;

pub use self::{
    alarm::{Alarm, Alarms},
    definitions::log_names,
    error::BrokerError,
    events::{EVENT_EXCHANGE, EventProperties, Events},
    memory::MemoryBudget,
    message::{Body, Message, OwnedMessage, copy_large_bodies, encode_names, with_bodies},
    overview::{CheckpointError, Overview},
    port::{Address, Delivery, DeliveryWriter, DyingMessage, Effects, Offer, Port, TimedOut},
    queue::{
        ConnectionId, Consumer, ConsumerId, Counts, DeletedQueue, Outcome, Queue, QueueOptions, SHARED_BODY_BYTES,
        Settled, SettledRun, Settlement,
    },
    reply::{REPLY_TO, ReplyRegistry, ReplyTarget},
    stream::ReaderOptions,
    trace::{Origin, TRACE_EXCHANGE, TracedDelivery, is_traced},
    vhost::{Arrival, DeclaredQueue, DelayedIn, PolicyError, Published, QueueSettings, Route, Vhost},
};
pub use crate::store::{AtomicSection, Round, StoreStats, WatermarkListener};

/// For benchmarks.
#[doc(hidden)]
pub use self::queue::RangeSet;

use self::{
    definitions::Definition,
    delay::{DelayId, Delayed},
    environment::Environment,
    policy::{Policy, PolicyKind},
};
use crate::{
    clock,
    model::Name,
    store::{DiskCondition, DiskListener, QueueId, Recovered, Store},
};

/// How much the broker may use, and when it says stop.
#[derive(Clone, Copy, Debug)]
pub struct BrokerLimits {
    /// Messages held in memory.
    pub memory_budget_bytes: usize,
    /// Free bytes on the data volume below which publishers are blocked; 0 is never.
    pub disk_free_limit_bytes: u64,
}

/// How the broker treats queues where clients leave it open, and the policies that are not theirs to change.
#[derive(Clone, Debug)]
pub struct BrokerSettings {
    /// This broker's name, as clients and operators see it.
    pub node_name: Name,
    /// The vhost that has the exchange `amq.rabbitmq.event`, if there is one of that name.
    pub event_vhost: Name,
    /// Vhosts whose messages are traced from the start.
    pub traced_vhosts: Vec<Name>,
    pub queues: QueueSettings,
    /// By vhost. They are not stored, and hide stored ones of the same kind and name.
    pub policies: Vec<(Name, Arc<Policy>)>,
}

impl Default for BrokerSettings {
    fn default() -> Self {
        BrokerSettings {
            node_name: "leveret@localhost".into(),
            event_vhost: "/".into(),
            traced_vhosts: Vec::new(),
            queues: QueueSettings::default(),
            policies: Vec::new(),
        }
    }
}

/// Sweeps in a row that may find the memory budget exhausted before that is an alarm: paging gets its chance first.
const EXHAUSTED_SWEEPS: u32 = 8;

/// Timers fired before others get a chance to run.
const TIMERS_AT_ONCE: usize = 256;

/// The broker: vhosts over one store.
pub struct Broker {
    vhosts: DashMap<Name, Arc<Vhost>>,
    environment: Arc<Environment>,
    store: Arc<Store>,
    budget: Arc<MemoryBudget>,
    settings: BrokerSettings,
    disk_free_limit_bytes: u64,
    alarms: Alarms,
    exhausted_sweeps: AtomicU32,
    /// Direct reply-to targets of this broker.
    pub replies: ReplyRegistry,
}

impl Broker {
    /// A broker over an open store, with what the store has recovered and the default settings.
    pub fn new(store: Arc<Store>, recovered: Recovered, limits: BrokerLimits) -> Arc<Self> {
        Self::with_settings(store, recovered, limits, BrokerSettings::default())
    }

    /// [`Broker::new`] with settings.
    pub fn with_settings(
        store: Arc<Store>,
        recovered: Recovered,
        limits: BrokerLimits,
        settings: BrokerSettings,
    ) -> Arc<Self> {
        let budget = Arc::new(MemoryBudget::new(limits.memory_budget_bytes));
        let events = Events::new(settings.node_name.clone(), settings.event_vhost.clone());
        let broker = Arc::new_cyclic(|this| Broker {
            vhosts: DashMap::new(),
            environment: Environment::new(store.clone(), budget.clone(), events, this.clone()),
            store,
            budget,
            settings,
            disk_free_limit_bytes: limits.disk_free_limit_bytes,
            alarms: Alarms::default(),
            exhausted_sweeps: AtomicU32::new(0),
            replies: ReplyRegistry::default(),
        });
        let listener: Weak<dyn DiskListener> = Arc::<Broker>::downgrade(&broker);
        broker.store.watch_disk(listener);
        broker.restore(recovered);
        broker
    }

    fn restore(&self, recovered: Recovered) {
        let mut states: AHashMap<QueueId, _> = recovered.states.into_iter().collect();
        let mut bindings = Vec::new();
        let mut queues = Vec::new();
        let mut exchanges = Vec::new();
        let mut unreadable = recovered.damaged_definitions;
        for (key, value) in &recovered.definitions {
            match definitions::decode(key, value) {
                Ok(Definition::Vhost(name)) => {
                    self.vhost_or_new(&name);
                }
                // Before everything they apply to.
                Ok(Definition::Policy { vhost, policy }) => self.vhost_or_new(&vhost).restore_policy(policy),
                Ok(Definition::Exchange { vhost, exchange, state }) => exchanges.push((vhost, exchange, state)),
                Ok(Definition::Queue { id, options }) => queues.push((id, options)),
                Ok(Definition::Binding { vhost, binding }) => bindings.push((vhost, binding)),
                Ok(Definition::Leftover { owner }) => {
                    self.store.delete_queue(owner);
                    self.environment.forget_leftover(owner);
                }
                Err(error) => {
                    unreadable += 1;
                    tracing::error!(key = %key.escape_ascii(), %error, "definition skipped");
                }
            }
        }
        for (vhost, exchange, state) in exchanges {
            self.vhost_or_new(&vhost).restore_exchange(exchange, state);
        }
        for (id, options) in queues {
            let vhost = self.vhost_or_new(&options.vhost);
            vhost.restore_queue(id, options, &mut states);
        }
        for (vhost, binding) in bindings {
            if !self.vhost_or_new(&vhost).restore_binding(binding.clone()) {
                tracing::warn!(vhost = %vhost, source = %binding.source, destination = %binding.destination.name(), "binding skipped: an end of it is gone");
            }
        }
        if unreadable > 0 && !states.is_empty() {
            let queue_ids: Vec<u64> = states.keys().map(|id| id.0).collect();
            tracing::error!(?queue_ids, "messages of unknown queues are kept on disk: a definition is damaged");
            return;
        }
        // Messages of a queue whose definition did not make it to disk belong to nobody.
        for id in states.into_keys() {
            self.store.delete_queue(id);
        }
    }

    fn vhost_or_new(&self, name: &Name) -> Arc<Vhost> {
        let configured = self.settings.policies.iter().filter(|(vhost, _)| vhost == name);
        let configured = configured.map(|(_, policy)| policy.clone());
        let (environment, settings) = (self.environment.clone(), self.settings.queues);
        let new = || {
            let vhost = Vhost::new(name.clone(), environment, settings, configured);
            vhost.set_tracing(self.settings.traced_vhosts.contains(name));
            Arc::new(vhost)
        };
        self.vhosts.entry(name.clone()).or_insert_with(new).clone()
    }

    /// Makes sure a vhost is there; answers when it is on disk.
    pub fn ensure_vhost(&self, name: &str) -> Round {
        let name: Name = name.into();
        if self.vhosts.contains_key(&name) {
            return 0;
        }
        self.vhost_or_new(&name).note_created();
        let (key, value) = definitions::vhost(&name);
        self.store.put_definition(key, value)
    }

    /// The vhost of that name.
    pub fn vhost(&self, name: &str) -> Option<Arc<Vhost>> {
        self.vhosts.get(name).map(|vhost| vhost.clone())
    }

    /// All vhosts.
    pub fn vhosts(&self) -> Vec<Arc<Vhost>> {
        self.vhosts.iter().map(|vhost| vhost.clone()).collect()
    }

    // Tracing

    /// Switches tracing of a vhost on or off, until the broker stops: while it is on, every message that is published or
    /// delivered there is copied to the exchange `amq.rabbitmq.trace`. Answers whether there is such a vhost.
    pub fn set_tracing(&self, vhost: &str, on: bool) -> bool {
        let vhost = self.vhost(vhost);
        vhost.as_ref().inspect(|vhost| vhost.set_tracing(on)).is_some()
    }

    // Policies

    /// Sets a policy in a vhost, or replaces the one of its kind and name. Queues and exchanges follow at once; answers
    /// when the policy is on disk.
    ///
    /// # Errors
    /// Without such a vhost, or for a policy of the configuration file.
    pub fn set_policy(&self, vhost: &str, policy: Policy) -> Result<Round, PolicyError> {
        let mut effects = Effects::default();
        let round = self.vhost_of_policy(vhost)?.set_policy(policy, &mut effects)?;
        self.carry_out(&mut effects);
        Ok(round)
    }

    /// Removes a policy from a vhost. Queues and exchanges follow at once; answers when that is on disk.
    ///
    /// # Errors
    /// Without such a vhost or policy, or for one of the configuration file.
    pub fn clear_policy(&self, vhost: &str, kind: PolicyKind, name: &str) -> Result<Round, PolicyError> {
        let mut effects = Effects::default();
        let round = self.vhost_of_policy(vhost)?.clear_policy(kind, name, &mut effects)?;
        self.carry_out(&mut effects);
        Ok(round)
    }

    /// The policies of a vhost, the ones that win first.
    ///
    /// # Errors
    /// Without such a vhost.
    pub fn policies(&self, vhost: &str, kind: PolicyKind) -> Result<Vec<Arc<Policy>>, PolicyError> {
        Ok(self.vhost_of_policy(vhost)?.policies(kind))
    }

    // Delayed messages

    /// The first `limit` delayed messages of a queue or an exchange from `from` on, in the order in which they are due;
    /// `None` without such a vhost, or if nothing of that name delays messages.
    pub fn delayed(&self, vhost: &str, place: &DelayedIn, from: DelayId, limit: usize) -> Option<Vec<Delayed>> {
        self.vhost(vhost)?.delayed(place, from, limit)
    }

    /// Removes a delayed message before it is due; answers the round in which that is on disk, or `None` if it does not
    /// wait, or not any more.
    pub fn cancel_delayed(&self, vhost: &str, place: &DelayedIn, id: DelayId) -> Option<Round> {
        self.vhost(vhost)?.cancel_delayed(place, id)
    }

    fn vhost_of_policy(&self, name: &str) -> Result<Arc<Vhost>, PolicyError> {
        self.vhost(name).ok_or_else(|| PolicyError::NoVhost { vhost: name.into() })
    }

    /// Does what queues asked for while they were locked. Nothing is locked by the caller.
    pub fn carry_out(&self, effects: &mut Effects) {
        loop {
            while let Some(queue) = effects.unused.pop() {
                if queue.is_abandoned() {
                    self.delete_queue(&queue, effects);
                }
            }
            while let Some(queue) = effects.expired.pop() {
                if queue.is_expired(clock::now_unix_ms()) {
                    tracing::info!(queue = %queue.options.name, vhost = %queue.options.vhost, "queue unused for too long");
                    self.delete_queue(&queue, effects);
                }
            }
            for (port, to, how) in effects.timed_out.drain(..) {
                match how {
                    TimedOut::Consumer => port.consumer_timed_out(to),
                    TimedOut::Get => port.get_timed_out(to),
                }
            }
            if !effects.dead.is_empty() {
                self.dead_letter(effects);
            } else if let Some(queue) = effects.again.pop() {
                queue.deliver(effects);
            } else if effects.unused.is_empty()
                && effects.expired.is_empty()
                && effects.timed_out.is_empty()
                && !effects.publish_traces()
            {
                break;
            }
        }
        effects.deliver_and_wake();
    }

    fn delete_queue(&self, queue: &Arc<Queue>, effects: &mut Effects) {
        if let Some(vhost) = self.vhost(&queue.options.vhost) {
            let on_behalf_of = effects.on_behalf_of.take(); // it is nobody's doing
            // Cannot be refused: nothing is checked.
            let _ = vhost.delete_queue(queue, effects, |_| Ok(()));
            effects.on_behalf_of = on_behalf_of;
        }
    }

    /// Does what is due by the wall clock; answers when something will be next (Unix milliseconds, `u64::MAX` for never).
    pub fn fire_timers(&self) -> u64 {
        let mut effects = Effects::default();
        for _ in 0..TIMERS_AT_ONCE {
            let now = clock::now_unix_ms();
            match self.environment.timers.next(now) {
                Ok(timed) => {
                    // What leaves one queue and enters another does so in one round.
                    let _one_round = self.store.atomic();
                    timed.on_time(now, &mut effects);
                    self.carry_out(&mut effects);
                }
                Err(next) => return next,
            }
        }
        clock::now_unix_ms()
    }

    /// Waits until something is due earlier than [`Broker::fire_timers`] has said.
    pub async fn timers_changed(&self) {
        self.environment.timers.changed().await;
    }

    /// Looks after memory and disk: has queues page out when the budget is exceeded, sets and clears alarms. Called a
    /// few times a second.
    pub fn sweep(&self) {
        self.on_disk(self.store.disk_condition());
        let exhausted = self.budget.is_exhausted();
        let sweeps = if exhausted { self.exhausted_sweeps.fetch_add(1, Ordering::Relaxed) + 1 } else { 0 };
        self.exhausted_sweeps.store(sweeps, Ordering::Relaxed);
        self.set_alarm(Alarm::Memory, sweeps > EXHAUSTED_SWEEPS);
        if !self.budget.is_over() {
            return;
        }
        for vhost in self.vhosts() {
            for queue in vhost.queues() {
                queue.offer_eviction();
            }
        }
    }

    /// Answers whether it is a change.
    fn set_alarm(&self, alarm: Alarm, active: bool) -> bool {
        let changed = self.alarms.set(alarm, active);
        if changed {
            let events = self.events();
            let key = if active { "alarm.set" } else { "alarm.cleared" };
            events.note(key, || EventProperties::default().text("source", alarm.name()).text("node", &**events.node()));
        }
        changed
    }

    /// Resource alarms.
    pub fn alarms(&self) -> &Alarms {
        &self.alarms
    }

    /// Messages in memory against their budget.
    pub fn memory(&self) -> &MemoryBudget {
        &self.budget
    }

    /// The round up to which everything is durable (or known to have failed).
    #[inline]
    pub fn watermark(&self) -> Round {
        self.store.watermark()
    }

    /// Whether a round could not be written.
    #[inline]
    pub fn is_failed(&self, round: Round) -> bool {
        self.store.is_failed(round)
    }

    /// Whether durable work is refused.
    #[inline]
    pub fn is_store_failing(&self) -> bool {
        self.store.is_failing()
    }

    /// Why durable work is refused, if it is.
    pub fn store_failure(&self) -> Option<String> {
        self.store.has_failed()
    }

    /// Registers for one call when `round` is durable; `false` when it already is.
    pub fn when_durable(&self, round: Round, listener: &Arc<dyn WatermarkListener>) -> bool {
        self.store.when_durable(round, listener)
    }

    /// Waits until `round` is durable.
    ///
    /// # Errors
    /// When the round could not be written.
    pub async fn durable(&self, round: Round) -> Result<(), BrokerError> {
        self.store.durable(round).await.map_err(|error| BrokerError::Store { reason: error.to_string() })
    }

    /// The round that is open now; it will be committed, even if it stays empty.
    pub fn open_round(&self) -> Round {
        self.store.open_round()
    }

    /// Everything done while the answer lives is in one round.
    pub fn atomic(&self) -> AtomicSection<'_> {
        self.store.atomic()
    }

    /// What the store has done so far.
    pub fn store_stats(&self) -> StoreStats {
        self.store.stats()
    }
}

impl DiskListener for Broker {
    /// The disk alarm: below the limit, and also while what rounds and write buffers may still need is not free, so that
    /// publishers stop before a write fails.
    fn on_disk(&self, condition: DiskCondition) {
        let limit = self.disk_free_limit_bytes;
        let enough = limit.max(condition.needed_bytes);
        let low = limit > 0 && condition.free_bytes.is_some_and(|free| free < enough);
        if self.set_alarm(Alarm::Disk, low) && low {
            tracing::warn!(
                free_bytes = condition.free_bytes,
                wanted_bytes = enough,
                disk_free_limit_bytes = limit,
                "free space on the volume of the data directory is low; writes may need up to what is wanted"
            );
        }
        self.set_alarm(Alarm::DiskFailure, condition.is_failing);
    }
}
