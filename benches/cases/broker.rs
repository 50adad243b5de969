//! A broker for what needs one.

use std::{
    cell::{Cell, OnceCell},
    sync::Arc,
};

use amq_protocol::types::FieldTable;
use leveret::{
    broker::{Broker, BrokerLimits, ConnectionId, Queue, QueueOptions, Vhost},
    store::{Durability, Store, StoreOptions},
};
use tempfile::TempDir;

const VHOST: &str = "/";
const CONNECTION: ConnectionId = ConnectionId(1);

/// Starts the broker when it is first asked for, with its files under the target directory.
#[derive(Default)]
pub struct Fixture {
    broker: OnceCell<(Arc<Broker>, TempDir)>,
    queues: Cell<usize>,
}

impl Fixture {
    pub fn broker(&self) -> &Arc<Broker> {
        let (broker, _) = self.broker.get_or_init(|| {
            let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory to write to");
            let options = StoreOptions {
                path: directory.path().to_owned(),
                durability: Durability::Os,
                ..StoreOptions::default()
            };
            let (store, recovered) = Store::open(options).expect("a fresh store");
            let limits = BrokerLimits { memory_budget_bytes: 256 << 20, disk_free_limit_bytes: 0 };
            let broker = Broker::new(store, recovered, limits);
            let round = broker.ensure_vhost(VHOST);
            while broker.watermark() < round {
                std::thread::yield_now(); // the store's threads rest afterwards
            }
            (broker, directory)
        });
        broker
    }

    pub fn vhost(&self) -> Arc<Vhost> {
        self.broker().vhost(VHOST).expect("made with the broker")
    }

    /// A new transient queue, of which the store never hears; `label` begins its name.
    pub fn queue(&self, label: &str) -> Arc<Queue> {
        self.queues.set(self.queues.get() + 1);
        let options = QueueOptions {
            name: format!("{label}-{}", self.queues.get()).into(),
            vhost: VHOST.into(),
            durable: false,
            auto_delete: false,
            exclusive_to: None,
            arguments: FieldTable::default(),
        };
        self.vhost().declare_queue(options, CONNECTION, false).expect("a new queue").queue
    }
}
