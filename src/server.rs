//! The whole program: store, then broker, then listeners, from a [`Config`]; stopped in reverse.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::task::JoinHandle;

use crate::{
    auth::Authenticator,
    broker::{Broker, BrokerLimits, BrokerSettings, QueueSettings, rules::RuleDefaults},
    config::{Config, Durability},
    control::{self, Control},
    net::{Listener, Registry, Shared, keep_deadlines, keep_events, keep_time, raise_file_limit},
    session::{CloseReason, ConnectionContext, SessionLimits},
    store::{self, CommitHook, Store, StoreError, StoreOptions},
};

/// How long connections may take to say goodbye when the broker stops.
const CLOSE_PATIENCE: Duration = Duration::from_millis(2500);

/// Why the broker does not run.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    #[error("cannot open the data directory")]
    Store(#[from] StoreError),
    #[error("cannot listen on {address}; is another broker running, or is the address not this machine's?")]
    Listen { address: SocketAddr, source: io::Error },
    #[error("cannot wait for signals")]
    Signals(#[source] io::Error),
}

/// A running broker.
pub struct Server {
    store: Arc<Store>,
    broker: Arc<Broker>,
    registry: Arc<Registry>,
    listeners: Vec<Listener>,
    timers: [JoinHandle<()>; 3],
    /// The operator's socket; a broker can do without.
    control: Option<Control>,
}

impl Server {
    /// Opens the store and starts listening.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn start(config: Config) -> Result<Self, ServerError> {
        Self::start_with_hook(config, None).await
    }

    /// [`Server::start`] with a hook in front of every sync, for tests that hold one back or fail it.
    ///
    /// # Errors
    /// [`ServerError`].
    pub async fn start_with_hook(config: Config, hook: Option<Arc<dyn CommitHook>>) -> Result<Self, ServerError> {
        let started = Instant::now();
        raise_file_limit();
        let (store, recovered) = Store::open(StoreOptions {
            path: config.data_dir.clone(),
            block_cache_bytes: config.store.block_cache_bytes.unwrap_or(config.memory.block_cache_bytes),
            write_buffer_bytes: config.store.write_buffer_bytes.unwrap_or(config.memory.write_buffer_bytes),
            durability: match config.store.durability {
                Durability::Fsync => store::Durability::Fsync,
                Durability::Os => store::Durability::Os,
            },
            hook,
            ..StoreOptions::default()
        })?;
        let limits = BrokerLimits {
            memory_budget_bytes: config.memory.message_bytes,
            disk_free_limit_bytes: config.disk_free_limit_bytes,
        };
        let broker = Broker::with_settings(store.clone(), recovered, limits, settings(&config));
        broker.sweep(); // an alarm that is due stands before the first client does
        for vhost in &config.vhosts {
            store.durable(broker.ensure_vhost(vhost)).await?;
        }
        let auth = Arc::new(Authenticator::new(config.users.clone(), config.loopback_users.clone()));
        let limits = Arc::new(SessionLimits {
            cluster_name: config.cluster_name.clone(),
            channel_max: config.amqp.channel_max,
            frame_max: config.amqp.frame_max_bytes,
            initial_frame_max: config.amqp.initial_frame_max_bytes,
            heartbeat_secs: config.amqp.heartbeat_secs,
            max_message_bytes: config.amqp.max_message_size_bytes,
            permit_global_qos: config.compatibility.permit_global_qos,
        });
        let registry = Arc::new(Registry::default());
        let shared = Arc::new(Shared {
            context: ConnectionContext { broker: broker.clone(), auth, limits },
            registry: registry.clone(),
            handshake_timeout: config.amqp.handshake_timeout,
            max_connections: config.max_connections,
        });
        let listeners = listen(&config.bind, config.port, &shared)?;
        let timers = [
            tokio::spawn(keep_time(registry.clone(), broker.clone())),
            tokio::spawn(keep_deadlines(broker.clone())),
            tokio::spawn(keep_events(broker.clone())),
        ];
        let context = control::Context { broker: broker.clone(), registry: registry.clone(), started };
        let control = Control::start(&config.data_dir, context)
            .inspect_err(|error| tracing::warn!(%error, "there is no control socket, so leveret ctl will not work"))
            .ok();
        Ok(Server { store, broker, registry, listeners, timers, control })
    }

    /// The addresses listened on.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.listeners.iter().map(|listener| listener.address).collect()
    }

    pub fn broker(&self) -> &Arc<Broker> {
        &self.broker
    }

    /// Stops accepting, closes connections with 320, commits what is dirty and closes the store.
    ///
    /// # Errors
    /// When the last round could not be written.
    pub async fn stop(self) -> Result<(), ServerError> {
        drop(self.control);
        self.listeners.iter().for_each(Listener::stop);
        let reason = CloseReason::new(320, "broker forced connection closure with reason 'shutdown'");
        for handle in self.registry.handles() {
            handle.command(reason.clone().into());
        }
        if tokio::time::timeout(CLOSE_PATIENCE, self.registry.drained()).await.is_err() {
            tracing::warn!(connections = self.registry.sockets(), "clients did not answer connection.close in time");
        }
        self.timers.iter().for_each(JoinHandle::abort);
        while self.broker.publish_events() {} // those of the end
        let store = self.store.clone();
        match tokio::task::spawn_blocking(move || store.shutdown()).await {
            Ok(stopped) => Ok(stopped?),
            Err(error) => {
                tracing::error!(%error, "closing the store has failed");
                Ok(())
            }
        }
    }
}

/// What the configuration says about queues and policies, in the broker's words.
fn settings(config: &Config) -> BrokerSettings {
    let timeout_ms = |timeout: Duration| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
    let policies = config.policies.iter();
    BrokerSettings {
        node_name: config.node_name.as_str().into(),
        event_vhost: config.event_vhost.as_str().into(),
        traced_vhosts: config.traced_vhosts.iter().map(|vhost| vhost.as_str().into()).collect(),
        queues: QueueSettings {
            default_type: config.queues.default_type,
            rules: RuleDefaults {
                consumer_timeout_ms: config.queues.consumer_timeout.map(timeout_ms),
                delivery_limit: config.queues.delivery_limit,
                parking: config.queues.parking,
            },
            permit_transient_nonexclusive: config.compatibility.permit_transient_nonexclusive_queues,
        },
        policies: policies.map(|entry| (entry.vhost.as_str().into(), Arc::new(entry.policy.clone()))).collect(),
    }
}

fn listen(bind: &[IpAddr], port: u16, shared: &Arc<Shared>) -> Result<Vec<Listener>, ServerError> {
    bind.iter()
        .map(|&ip| {
            let address = SocketAddr::new(ip, port);
            Listener::start(address, shared.clone()).map_err(|source| ServerError::Listen { address, source })
        })
        .collect()
}

/// Runs a broker until SIGTERM or SIGINT.
///
/// # Errors
/// [`ServerError`].
pub async fn run(config: Config) -> Result<(), ServerError> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).map_err(ServerError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ServerError::Signals)?;
    let (data_dir, durability) = (config.data_dir.display().to_string(), config.store.durability.name());
    let server = Server::start(config).await?;
    let addresses: Vec<String> = server.addresses().iter().map(SocketAddr::to_string).collect();
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        address = addresses.join(", "),
        data_dir,
        durability,
        "leveret is ready"
    );
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
        _ = interrupt.recv() => tracing::info!("SIGINT: stopping"),
    }
    server.stop().await?;
    tracing::info!("stopped");
    Ok(())
}
