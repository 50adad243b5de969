//! A broker in this process, on a port and a data directory of its own.

use std::{
    net::SocketAddr,
    ops::Deref,
    sync::{Arc, Condvar, Mutex, Once},
};

use lapin::{Channel, Connection, ConnectionProperties};
use leveret::{
    broker::Counts,
    config::Config,
    server::Server,
    store::{CommitHook, Round},
};
use tempfile::TempDir;

use super::{
    login::Login,
    peer::{Peer, hang_up},
};

/// Panics of anything that is not a test, with their places.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());
static WATCH: Once = Once::new();

fn watch_for_panics() {
    WATCH.call_once(|| {
        let report = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let place = panic.location().map(ToString::to_string).unwrap_or_default();
            if !place.starts_with("tests/") {
                PANICS.lock().unwrap().push(place);
            }
            report(panic);
        }));
    });
}

/// See the module.
pub struct TestBroker {
    server: Option<Server>,
    config: Config,
    gate: Option<Arc<Gate>>,
    _data: TempDir,
}

impl TestBroker {
    /// A broker with the default configuration.
    pub async fn start() -> Self {
        Self::with(|_| {}).await
    }

    /// A broker with a changed configuration.
    pub async fn with(change: impl FnOnce(&mut Config)) -> Self {
        Self::build(None, change).await
    }

    /// A broker with an (open) gate in front of every sync.
    pub async fn gated() -> (Self, Arc<Gate>) {
        Self::gated_with(|_| {}).await
    }

    /// [`TestBroker::gated`] with a changed configuration.
    pub async fn gated_with(change: impl FnOnce(&mut Config)) -> (Self, Arc<Gate>) {
        let gate = Arc::new(Gate::default());
        (Self::build(Some(gate.clone()), change).await, gate)
    }

    async fn build(gate: Option<Arc<Gate>>, change: impl FnOnce(&mut Config)) -> Self {
        watch_for_panics();
        let data = tempfile::tempdir().unwrap();
        let mut config = Config::for_tests(data.path().join("data"));
        change(&mut config);
        let mut broker = TestBroker { server: None, config, gate, _data: data };
        broker.launch().await;
        broker
    }

    async fn launch(&mut self) {
        let hook = self.gate.clone().map(|gate| gate as Arc<dyn CommitHook>);
        self.server = Some(Server::start_with_hook(self.config.clone(), hook).await.unwrap());
    }

    /// Stops the broker cleanly and starts it again on the same data.
    pub async fn restart(&mut self) {
        self.shut_down().await;
        self.launch().await;
    }

    /// [`TestBroker::restart`] with a changed configuration.
    pub async fn restart_with(&mut self, change: impl FnOnce(&mut Config)) {
        change(&mut self.config);
        self.restart().await;
    }

    /// Stops the broker; fails the test if anything of it has panicked.
    pub async fn stop(mut self) {
        self.shut_down().await;
        let panics = PANICS.lock().unwrap().clone();
        assert!(panics.is_empty(), "the broker (of this test or another) has panicked at {panics:?}");
    }

    /// Stops the broker with its clients still there.
    pub async fn shut_down_politely(&mut self) {
        self.server.take().unwrap().stop().await.unwrap();
    }

    /// Stops the broker after its peers have hung up.
    pub async fn shut_down(&mut self) {
        if let Some(server) = self.server.take() {
            server.addresses().into_iter().for_each(hang_up);
            server.stop().await.unwrap();
        }
    }

    pub fn server(&self) -> &Server {
        self.server.as_ref().unwrap()
    }

    pub fn address(&self) -> SocketAddr {
        self.server().addresses()[0]
    }

    pub fn data_dir(&self) -> &std::path::Path {
        &self.config.data_dir
    }

    /// Bytes of all files in the data directory.
    pub fn data_bytes(&self) -> u64 {
        fn bytes(directory: &std::path::Path) -> u64 {
            let Ok(entries) = std::fs::read_dir(directory) else { return 0 };
            let of = |entry: std::fs::DirEntry| match entry.metadata() {
                Ok(file) if file.is_file() => file.len(),
                Ok(_) => bytes(&entry.path()),
                Err(_) => 0, // gone meanwhile
            };
            entries.flatten().map(of).sum()
        }
        bytes(&self.config.data_dir)
    }

    /// Depth and use of a queue, from the inside.
    pub fn counts(&self, queue: &str) -> Counts {
        let vhost = self.server().broker().vhost("/").unwrap();
        vhost.queue(queue).unwrap_or_else(|| panic!("no queue {queue}")).counts()
    }

    pub fn has_queue(&self, queue: &str) -> bool {
        self.server().broker().vhost("/").unwrap().queue(queue).is_some()
    }

    /// A connection of the stock client, with a channel.
    pub async fn client(&self) -> Client {
        let connection = self.connection().await;
        let channel = connection.create_channel().await.unwrap();
        Client { channel, connection }
    }

    /// [`TestBroker::client`] with confirms.
    pub async fn publisher(&self) -> Client {
        let client = self.client().await;
        client.confirm_select(Default::default()).await.unwrap();
        client
    }

    pub async fn connection(&self) -> Connection {
        let uri = format!("amqp://guest:guest@{}/%2f?heartbeat=0", self.address());
        Connection::connect(&uri, ConnectionProperties::default()).await.unwrap()
    }

    /// A logged-in connection of the frame client, with channel 1 open.
    pub async fn peer(&self) -> Peer {
        let mut peer = Login::default().open(self.address()).await;
        peer.open_channel(1).await;
        peer
    }

    /// A logged-in connection of the frame client without a channel.
    pub async fn login(&self) -> Peer {
        Login::default().open(self.address()).await
    }

    /// A socket on which nothing was said yet.
    pub async fn bare(&self) -> Peer {
        Peer::connect(self.address()).await
    }
}

/// A stock client: a connection and one channel of it.
pub struct Client {
    pub channel: Channel,
    pub connection: Connection,
}

impl Deref for Client {
    type Target = Channel;

    fn deref(&self) -> &Channel {
        &self.channel
    }
}

impl Client {
    pub async fn close(self) {
        self.connection.close(200, "bye".into()).await.unwrap();
    }
}

/// Holds syncs back, or fails them.
#[derive(Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    closed: bool,
    failing: bool,
    waiting: u32,
    /// Of each round that was written, whether it was synced.
    synced: Vec<bool>,
}

impl Gate {
    /// From now on no sync begins.
    pub fn close(&self) {
        self.state.lock().unwrap().closed = true;
    }

    /// Lets syncs go on.
    pub fn open(&self) {
        self.state.lock().unwrap().closed = false;
        self.changed.notify_all();
    }

    /// From now on every sync fails.
    pub fn fail(&self) {
        let mut state = self.state.lock().unwrap();
        (state.failing, state.closed) = (true, false);
        self.changed.notify_all();
    }

    /// Of the rounds written since the last call, whether they were synced.
    pub fn take_written(&self) -> Vec<bool> {
        std::mem::take(&mut self.state.lock().unwrap().synced)
    }

    /// Whether a sync is held back right now.
    pub fn is_holding(&self) -> bool {
        self.state.lock().unwrap().waiting > 0
    }
}

impl CommitHook for Gate {
    fn before_sync(&self, _: Round) -> Result<(), String> {
        let mut state = self.state.lock().unwrap();
        state.waiting += 1;
        while state.closed {
            state = self.changed.wait(state).unwrap();
        }
        state.waiting -= 1;
        if state.failing { Err("the disk is on fire".into()) } else { Ok(()) }
    }

    fn after_write(&self, _: Round, synced: bool) -> Result<(), String> {
        self.state.lock().unwrap().synced.push(synced);
        Ok(())
    }
}

/// A gate left closed would keep the commit thread, and with it a failed test, from ending.
impl Drop for TestBroker {
    fn drop(&mut self) {
        if let Some(gate) = &self.gate {
            gate.open();
        }
    }
}
