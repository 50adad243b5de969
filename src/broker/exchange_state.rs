//! What an exchange keeps beside its bindings: delayed messages, values seen by deduplication, recent history. Few exchanges
//! have any of it.

use std::sync::{Arc, Weak};

use super::{
    deduplication::ExchangeDedup,
    delay::{DelayOwner, Delays, Origin, RELEASE_BATCH, delays_of, with_released},
    environment::Environment,
    exchange::Exchange,
    port::Effects,
    recent_history::RecentHistory,
    vhost::Arrival,
};
use crate::{clock, model::Name, store::QueueId};

/// See the module. The state of a transient exchange goes with the broker.
pub struct ExchangeState {
    pub name: Name,
    vhost: Name,
    /// The owner of its notes in the store.
    pub id: QueueId,
    pub durable: bool,
    pub delays: Option<Arc<Delays>>,
    pub dedup: Option<Arc<ExchangeDedup>>,
    pub history: Option<Arc<RecentHistory>>,
    environment: Arc<Environment>,
}

impl ExchangeState {
    /// Whether an exchange has any state.
    pub fn is_needed(exchange: &Exchange) -> bool {
        exchange.observes_messages()
    }

    /// The state of an exchange; `id` is an id of its own. That of a durable one that was there before is read back.
    pub fn new(
        exchange: &Exchange,
        vhost: &Name,
        id: QueueId,
        environment: &Arc<Environment>,
        origin: Origin,
    ) -> Arc<Self> {
        let durable = exchange.durable;
        Arc::new_cyclic(|this: &Weak<Self>| ExchangeState {
            name: exchange.name.clone(),
            vhost: vhost.clone(),
            id,
            durable,
            delays: exchange.is_delayed().then(|| delays_of(id, this.clone(), environment, origin)),
            dedup: deduplication(exchange, id, environment, origin),
            history: history(exchange, id, environment, origin),
            environment: environment.clone(),
        })
    }

    /// Whether the store may hold something of it: delayed messages are stored whatever their exchange is.
    pub fn is_in_store(&self) -> bool {
        self.durable || self.delays.is_some()
    }

    /// Writes nothing any more, and forgets what waits. Before its notes are deleted.
    pub fn close(&self) {
        if let Some(delays) = &self.delays {
            delays.close();
        }
        if let Some(dedup) = &self.dedup {
            dedup.close();
        }
        if let Some(history) = &self.history {
            history.close();
        }
    }
}

fn deduplication(
    exchange: &Exchange,
    id: QueueId,
    environment: &Environment,
    origin: Origin,
) -> Option<Arc<ExchangeDedup>> {
    let rules = exchange.deduplication()?;
    let store = environment.store.clone();
    if origin == Origin::Recovered {
        match ExchangeDedup::recover(store.clone(), id, &rules, clock::now_unix_ms()) {
            Ok(dedup) => return Some(dedup),
            Err(error) => {
                tracing::error!(exchange = %exchange.name, %error, "values seen before the start cannot be read; duplicates of them will pass");
            }
        }
    }
    Some(ExchangeDedup::new(store, id, &rules, exchange.durable))
}

fn history(exchange: &Exchange, id: QueueId, environment: &Environment, origin: Origin) -> Option<Arc<RecentHistory>> {
    let length = exchange.history_length()?;
    let (store, budget) = (environment.store.clone(), environment.budget.clone());
    if origin == Origin::Recovered {
        match RecentHistory::recover(store.clone(), id, length, budget.clone()) {
            Ok(history) => return Some(history),
            Err(error) => {
                tracing::error!(exchange = %exchange.name, %error, "the recent history cannot be read; it begins anew");
            }
        }
    }
    Some(RecentHistory::new(store, id, length, exchange.durable, budget))
}

impl DelayOwner for ExchangeState {
    /// Routes what is due by the bindings there are now.
    fn release_due(self: Arc<Self>, now_unix_ms: u64, effects: &mut Effects) -> Option<u64> {
        let delays = self.delays.as_ref()?;
        let vhost = self.environment.broker()?.vhost(&self.vhost)?;
        delays.take_due(now_unix_ms, RELEASE_BATCH, &mut |_, message| {
            with_released(message, now_unix_ms, |message| {
                if vhost.publish(&self.name, message, Arrival::Due, effects).is_err() {
                    tracing::debug!(exchange = %self.name, "the exchange of a delayed message is gone; the message is dropped");
                }
            });
        });
        delays.next_due()
    }
}
