//! What every queue of a broker shares.

use std::sync::{Arc, Weak};

use super::{Broker, definitions, events::Events, memory::MemoryBudget, port::Effects, timers::Timers};
use crate::store::{QueueId, Store};

/// Store, memory budget, timers and events of a broker, and the broker itself for what a queue cannot do alone.
pub struct Environment {
    pub store: Arc<Store>,
    pub budget: Arc<MemoryBudget>,
    pub timers: Timers,
    pub events: Events,
    broker: Weak<Broker>,
}

impl Environment {
    /// An environment; without a broker (in tests), dead letters go nowhere.
    pub fn new(store: Arc<Store>, budget: Arc<MemoryBudget>, events: Events, broker: Weak<Broker>) -> Arc<Self> {
        Arc::new(Environment { store, budget, timers: Timers::default(), events, broker })
    }

    /// Has what the store keeps for a transient owner deleted at the next start, if it is still there then.
    pub fn note_leftover(&self, owner: QueueId) {
        let (key, value) = definitions::leftover(owner);
        self.store.put_definition(key, value);
    }

    /// Takes [`Environment::note_leftover`] back, once what was kept is deleted.
    pub fn forget_leftover(&self, owner: QueueId) {
        self.store.delete_definition(definitions::leftover(owner).0);
    }

    /// The broker, while there is one.
    pub fn broker(&self) -> Option<Arc<Broker>> {
        self.broker.upgrade()
    }

    /// Does what queues asked for while they were locked. Nothing is locked by the caller.
    pub fn carry_out(&self, effects: &mut Effects) {
        match self.broker.upgrade() {
            Some(broker) => broker.carry_out(effects),
            None => effects.deliver_and_wake(),
        }
    }
}
