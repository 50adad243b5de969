//! The broker under test.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use leveret::{
    auth::{Authenticator, PasswordHash, Permission, User},
    broker::{Broker, ConnectionId},
    session::{ConnectionContext, Session, SessionLimits},
    store::{Durability, Store, StoreOptions},
};

use super::{FRAME_MAX, MAX_MESSAGE_BYTES, traffic::NAMES};

/// A broker without sockets over a store in a temporary directory. One for all inputs.
pub struct Lab {
    pub broker: Arc<Broker>,
    pub(super) store: Arc<Store>,
    pub(super) context: ConnectionContext,
    next_id: AtomicU64,
    directory: PathBuf,
    /// How often the broker sent each method, by class and method number: what the inputs have reached.
    pub said: Mutex<BTreeMap<(u16, u16), u64>>,
}

impl Lab {
    pub fn new() -> Lab {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let name = format!("leveret-fuzz-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let directory = std::env::temp_dir().join(name);
        let _ = std::fs::remove_dir_all(&directory);
        let options = StoreOptions { path: directory.clone(), durability: Durability::Os, ..StoreOptions::default() };
        let (store, recovered) = Store::open(options).expect("a fresh store opens");
        // A small budget, so that inputs with large messages page out.
        let broker = Broker::new(
            store.clone(),
            recovered,
            leveret::broker::BrokerLimits { memory_budget_bytes: 2 << 20, disk_free_limit_bytes: 0 },
        );
        futures_lite::future::block_on(store.durable(broker.ensure_vhost("/"))).expect("a vhost is made");
        let context = context_of(&broker);
        Lab { broker, store, context, next_id: AtomicU64::new(1), directory, said: Mutex::default() }
    }

    pub(super) fn session(&self) -> Session {
        self.context.session(self.next_id.fetch_add(1, Ordering::Relaxed), IpAddr::V4(Ipv4Addr::LOCALHOST))
    }

    /// Deletes everything clients have made.
    pub fn tidy(&self) {
        let vhost = self.broker.vhost("/").expect("there from the start");
        let mut effects = leveret::broker::Effects::default();
        for queue in vhost.queues() {
            vhost.delete_queue(&queue, &mut effects, |_| Ok(())).expect("nobody objects");
        }
        for name in NAMES {
            let _ = vhost.delete_exchange(name, false, ConnectionId(0)); // the predeclared ones stay
        }
        self.broker.carry_out(&mut effects);
    }

    pub fn queue_count(&self) -> usize {
        self.broker.vhost("/").expect("there from the start").queues().len()
    }
}

impl Default for Lab {
    fn default() -> Self {
        Lab::new()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.store.shutdown();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// What clients connect with: as `guest`, who may do everything.
pub(super) fn context_of(broker: &Arc<Broker>) -> ConnectionContext {
    let guest = User::new("guest", PasswordHash::new("guest")).with_permission("/", Permission::full());
    let limits = SessionLimits {
        cluster_name: "fuzz".into(),
        channel_max: 64,
        frame_max: FRAME_MAX,
        initial_frame_max: FRAME_MAX,
        heartbeat_secs: 60,
        max_message_bytes: MAX_MESSAGE_BYTES,
        permit_global_qos: true,
    };
    let auth = Arc::new(Authenticator::new([guest], []));
    ConnectionContext { broker: broker.clone(), auth, limits: Arc::new(limits) }
}
