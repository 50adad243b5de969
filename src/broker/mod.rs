//! Exchanges, queues and rules, without frames and sockets. [`Broker`] is the face the session and the HTTP API see.

mod alarm;
pub mod arguments;
pub mod binding;
mod definitions;
pub mod delay;
mod error;
pub mod exchange;
pub mod extension;
mod memory;
mod message;
mod port;
mod queue;
mod reply;
pub mod router;
pub mod rules;
mod vhost;

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use ahash::AHashMap;
use dashmap::DashMap;

pub use self::{
    alarm::{Alarm, Alarms},
    error::BrokerError,
    memory::MemoryBudget,
    message::{Body, Message, encode_names},
    port::{Address, Delivery, DeliveryWriter, Effects, Offer, Port},
    queue::{
        ConnectionId, Consumer, ConsumerId, Counts, DeletedQueue, Queue, QueueOptions, SHARED_BODY_BYTES, Settled,
        Settlement,
    },
    reply::{REPLY_TO, ReplyRegistry, ReplyTarget},
    vhost::{DeclaredQueue, Route, Vhost},
};
pub use crate::store::{AtomicSection, Round, StoreStats, WatermarkListener};

use self::definitions::Definition;
use crate::{
    model::Name,
    store::{QueueId, Recovered, Store},
};

/// How much the broker may use, and when it says stop.
#[derive(Clone, Copy, Debug)]
pub struct BrokerLimits {
    /// Messages held in memory.
    pub memory_budget_bytes: usize,
    /// Free bytes on the data volume below which publishers are blocked; 0 is never.
    pub disk_free_limit_bytes: u64,
}

/// Sweeps in a row that may find the memory budget exhausted before that is an alarm: paging gets its chance first.
const EXHAUSTED_SWEEPS: u32 = 8;

/// The broker: vhosts over one store.
pub struct Broker {
    vhosts: DashMap<Name, Arc<Vhost>>,
    store: Arc<Store>,
    budget: Arc<MemoryBudget>,
    disk_free_limit_bytes: u64,
    alarms: Alarms,
    exhausted_sweeps: AtomicU32,
    /// Direct reply-to targets of this broker.
    pub replies: ReplyRegistry,
}

impl Broker {
    /// A broker over an open store, with what the store has recovered.
    pub fn new(store: Arc<Store>, recovered: Recovered, limits: BrokerLimits) -> Arc<Self> {
        let broker = Broker {
            vhosts: DashMap::new(),
            store,
            budget: Arc::new(MemoryBudget::new(limits.memory_budget_bytes)),
            disk_free_limit_bytes: limits.disk_free_limit_bytes,
            alarms: Alarms::default(),
            exhausted_sweeps: AtomicU32::new(0),
            replies: ReplyRegistry::default(),
        };
        broker.restore(recovered);
        Arc::new(broker)
    }

    fn restore(&self, recovered: Recovered) {
        let mut states: AHashMap<QueueId, _> = recovered.states.into_iter().collect();
        let mut bindings = Vec::new();
        let mut queues = Vec::new();
        let mut unreadable = recovered.damaged_definitions;
        for (key, value) in &recovered.definitions {
            match definitions::decode(key, value) {
                Ok(Definition::Vhost(name)) => {
                    self.vhost_or_new(&name);
                }
                Ok(Definition::Exchange { vhost, exchange }) => self.vhost_or_new(&vhost).restore_exchange(exchange),
                Ok(Definition::Queue { id, options }) => queues.push((id, options)),
                Ok(Definition::Binding { vhost, binding }) => bindings.push((vhost, binding)),
                Err(error) => {
                    unreadable += 1;
                    tracing::error!(key = %key.escape_ascii(), %error, "definition skipped");
                }
            }
        }
        for (id, options) in queues {
            let vhost = self.vhost_or_new(&options.vhost);
            vhost.restore_queue(id, options, states.remove(&id));
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
        let new = || Arc::new(Vhost::new(name.clone(), self.store.clone(), self.budget.clone()));
        self.vhosts.entry(name.clone()).or_insert_with(new).clone()
    }

    /// Makes sure a vhost is there; answers when it is on disk.
    pub fn ensure_vhost(&self, name: &str) -> Round {
        let name: Name = name.into();
        if self.vhosts.contains_key(&name) {
            return 0;
        }
        self.vhost_or_new(&name);
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

    /// Does what queues asked for while they were locked. Nothing is locked by the caller.
    pub fn carry_out(&self, effects: &mut Effects) {
        while let Some(queue) = effects.unused.pop() {
            if !queue.is_abandoned() {
                continue;
            }
            if let Some(vhost) = self.vhost(&queue.options.vhost) {
                // Cannot be refused: nothing is checked.
                let _ = vhost.delete_queue(&queue, effects, |_| Ok(()));
            }
        }
        effects.deliver_and_wake();
    }

    /// Looks after memory and disk: has queues page out when the budget is exceeded, sets and clears alarms. Called a
    /// few times a second.
    pub fn sweep(&self) {
        if let Some(free) = self.store.free_disk_bytes() {
            self.alarms.set(Alarm::Disk, free < self.disk_free_limit_bytes);
        }
        let exhausted = self.budget.is_exhausted();
        let sweeps = if exhausted { self.exhausted_sweeps.fetch_add(1, Ordering::Relaxed) + 1 } else { 0 };
        self.exhausted_sweeps.store(sweeps, Ordering::Relaxed);
        self.alarms.set(Alarm::Memory, sweeps > EXHAUSTED_SWEEPS);
        if !self.budget.is_over() {
            return;
        }
        for vhost in self.vhosts() {
            for queue in vhost.queues() {
                queue.offer_eviction();
            }
        }
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

    /// Everything done while the answer lives is in one round.
    pub fn atomic(&self) -> AtomicSection<'_> {
        self.store.atomic()
    }

    /// What the store has done so far.
    pub fn store_stats(&self) -> StoreStats {
        self.store.stats()
    }
}
