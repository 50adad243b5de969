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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use amq_protocol::types::{AMQPValue, FieldTable};

    use super::*;
    use crate::{
        broker::{
            Body, Broker, BrokerLimits, ConnectionId, DelayedIn, Message, QueueOptions, definitions, encode_names,
            exchange::{ExchangeKind, ExchangeOptions},
        },
        store::{Store, StoreOptions},
    };

    fn open(path: &Path) -> (Arc<Store>, Arc<Broker>) {
        let (store, recovered) = Store::open(StoreOptions { path: path.into(), ..StoreOptions::default() }).unwrap();
        let limits = BrokerLimits { memory_budget_bytes: 64 << 20, disk_free_limit_bytes: 0 };
        let broker = Broker::new(store.clone(), recovered, limits);
        broker.ensure_vhost("/");
        (store, broker)
    }

    fn delayed(name: &str, durable: bool) -> Exchange {
        let mut arguments = FieldTable::default();
        arguments.insert("x-delayed-exchange".into(), AMQPValue::Boolean(true));
        let options = ExchangeOptions { durable, ..ExchangeOptions::default() };
        Exchange::new(name.into(), ExchangeKind::Fanout, options, arguments)
    }

    fn delayed_queue() -> QueueOptions {
        let mut arguments = FieldTable::default();
        arguments.insert("x-delayed".into(), AMQPValue::Boolean(true));
        QueueOptions {
            name: "q".into(),
            vhost: "/".into(),
            durable: false,
            auto_delete: false,
            exclusive_to: None,
            arguments,
        }
    }

    /// Publishes a message with a delay of some 25 days.
    fn publish(broker: &Broker, exchange: &str, key: &str) {
        let names = encode_names(exchange.as_bytes(), key.as_bytes());
        let properties = b"\x20\0\0\0\0\x0d\x07x-delayI\x7f\xff\xff\xff";
        let message = Message { names: &names, properties, body: Body::Inline(b"m"), persistent: true, extension: &[] };
        let mut effects = Effects::default();
        let vhost = broker.vhost("/").unwrap();
        let published = vhost.publish(exchange, &message, Arrival::Client, &mut effects).unwrap();
        assert_eq!(published.is_unrouted, !exchange.is_empty());
    }

    fn note_count(store: &Store, owner: QueueId) -> usize {
        let mut count = 0;
        store.read_notes(owner, b"\0", b"\xff", usize::MAX, &mut |_, _| count += 1).unwrap();
        count
    }

    #[tokio::test]
    async fn what_transient_owners_leave_in_the_store_is_deleted_at_the_next_start() {
        let dir = tempfile::tempdir().unwrap();
        let owners = {
            let (store, broker) = open(dir.path());
            let vhost = broker.vhost("/").unwrap();
            vhost.declare_exchange(delayed("x", false), ConnectionId(1)).unwrap();
            let queue = vhost.declare_queue(delayed_queue(), ConnectionId(1), false).unwrap().queue;
            publish(&broker, "x", "");
            publish(&broker, "", "q");
            assert_eq!(vhost.delayed_count(&DelayedIn::Queue("q".into())), Some(1));
            let owners = [vhost.exchange_state("x").unwrap().id, queue.id];
            store.durable(store.open_round()).await.unwrap();
            owners.iter().for_each(|owner| assert!(note_count(&store, *owner) > 0));
            store.shutdown().unwrap();
            owners
        };
        let (store, _broker) = open(dir.path());
        store.durable(store.open_round()).await.unwrap();
        owners.iter().for_each(|owner| assert_eq!(note_count(&store, *owner), 0));
        store.shutdown().unwrap();
        drop((store, _broker));
        let (store, recovered) =
            Store::open(StoreOptions { path: dir.path().into(), ..StoreOptions::default() }).unwrap();
        assert!(recovered.definitions.iter().all(|(key, _)| key[0] != b'l'));
        store.shutdown().unwrap();
    }

    #[tokio::test]
    async fn an_exchange_from_before_there_was_state_gets_an_owner_and_keeps_it() {
        let dir = tempfile::tempdir().unwrap();
        {
            let (store, _broker) = open(dir.path());
            let exchange = delayed("x", true);
            let key = definitions::exchange_key("/", "x");
            store.durable(store.put_definition(key, definitions::exchange_value(&exchange, None))).await.unwrap();
            store.shutdown().unwrap();
        }
        let mut owners = Vec::new();
        for count in 0..3 {
            let (store, broker) = open(dir.path());
            let vhost = broker.vhost("/").unwrap();
            owners.push(vhost.exchange_state("x").unwrap().id);
            assert_eq!(vhost.delayed_count(&DelayedIn::Exchange("x".into())), Some(count));
            publish(&broker, "x", "");
            store.durable(store.open_round()).await.unwrap();
            store.shutdown().unwrap();
        }
        assert!(owners.iter().all(|owner| *owner == owners[0]), "{owners:?}");
    }
}
