//! The states of a vhost's exchanges: when one begins and ends, what a new binding gets of it, and looking into it.

use std::sync::Arc;

use super::Vhost;
use crate::{
    broker::{
        binding::{Binding, Destination},
        definitions,
        delay::{DelayId, Delayed, Delays, Origin},
        exchange::Exchange,
        exchange_state::ExchangeState,
        message::Message,
        port::Effects,
        queue::Queue,
        router::Topology,
    },
    clock,
    model::Name,
    store::{AtomicSection, QueueId, Round},
};

/// What keeps delayed messages.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum DelayedIn {
    Exchange(Name),
    Queue(Name),
}

impl Vhost {
    /// The state of an exchange, if it has any.
    pub fn exchange_state(&self, exchange: &str) -> Option<Arc<ExchangeState>> {
        self.exchange_states.read().get(exchange).cloned()
    }

    /// Begins the state of a new exchange, if it has any; answers the id to be stored with it.
    pub(super) fn begin_state(&self, exchange: &Exchange) -> Option<QueueId> {
        if !ExchangeState::is_needed(exchange) {
            return None;
        }
        let id = self.environment.store.allocate_queue_id();
        let state = ExchangeState::new(exchange, &self.name, id, &self.environment, Origin::New);
        if state.is_in_store() && !state.durable {
            self.environment.note_leftover(id);
        }
        self.exchange_states.write().insert(exchange.name.clone(), state);
        Some(id)
    }

    /// Puts the state of an exchange back. A definition from before exchanges had state has no id: it gets one now.
    pub(super) fn restore_state(&self, exchange: &Exchange, id: Option<QueueId>) {
        if !ExchangeState::is_needed(exchange) {
            return;
        }
        let Some(id) = id else {
            let id = self.begin_state(exchange);
            let key = definitions::exchange_key(&self.name, &exchange.name);
            self.define(key, definitions::exchange_value(exchange, id));
            return;
        };
        let state = ExchangeState::new(exchange, &self.name, id, &self.environment, Origin::Recovered);
        self.exchange_states.write().insert(exchange.name.clone(), state);
    }

    /// Ends the state of an exchange that is deleted; answers when that is on disk.
    pub(super) fn end_state(&self, exchange: &str) -> Round {
        let Some(state) = self.exchange_states.write().remove(exchange) else { return 0 };
        state.close();
        if !state.is_in_store() {
            return 0;
        }
        let round = self.environment.store.delete_queue(state.id);
        if state.durable {
            return round;
        }
        self.environment.forget_leftover(state.id);
        0
    }

    /// Gives the history of a new binding's source to its destination, oldest first; answers when that is on disk.
    ///
    /// The topology is locked for writing, so that nothing is published in between: what came before the binding comes by the
    /// history, what comes after it by the binding.
    pub(super) fn replay_history(
        &self,
        topology: &Topology<Arc<Queue>>,
        section: &AtomicSection<'_>,
        binding: &Binding,
        effects: &mut Effects,
    ) {
        let Some(history) = self.exchange_state(&binding.source).and_then(|state| state.history.clone()) else {
            return;
        };
        let now = clock::now_unix_ms();
        for kept in history.replay() {
            let Some(message) = kept.message() else { continue };
            let extension = message.extension_anew(now);
            let message = Message { extension: &extension, ..message };
            match &binding.destination {
                Destination::Queue(name) => {
                    if let Some(queue) = topology.queue(name) {
                        queue.publish(std::slice::from_ref(&message), effects);
                    }
                }
                // That it leads nowhere is no error.
                Destination::Exchange(name) => {
                    let _ = self.publish_in(topology, section, name, &message, effects);
                }
            }
        }
    }

    fn delays(&self, place: &DelayedIn) -> Option<Arc<Delays>> {
        match place {
            DelayedIn::Exchange(name) => self.exchange_state(name)?.delays.clone(),
            DelayedIn::Queue(name) => self.queue(name)?.delays().cloned(),
        }
    }

    /// The first `limit` delayed messages from `from` on, in the order in which they are due; `None` if nothing of that name
    /// delays messages.
    pub fn delayed(&self, place: &DelayedIn, from: DelayId, limit: usize) -> Option<Vec<Delayed>> {
        Some(self.delays(place)?.list(from, limit))
    }

    /// How many messages wait.
    pub fn delayed_count(&self, place: &DelayedIn) -> Option<u64> {
        Some(self.delays(place)?.len())
    }

    /// Removes a delayed message before it is due; answers the round in which that is on disk, or `None` if it does not
    /// wait, or not any more.
    pub fn cancel_delayed(&self, place: &DelayedIn, id: DelayId) -> Option<Round> {
        let delays = self.delays(place)?;
        let _one_round = self.environment.store.atomic();
        delays.cancel(id).then(|| self.environment.store.open_round())
    }
}
