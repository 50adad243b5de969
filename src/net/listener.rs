//! The accept loop.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{net::TcpListener, task::JoinHandle};

use super::{
    connection::{Shared, serve},
    registry::Registry,
};

const BACKLOG: i32 = 4096;
/// How long accepting pauses when the system has no file descriptor left.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(200);
/// File descriptors kept for the store, logs and listeners.
const RESERVED_FILES: u64 = 512;

/// A bound address.
pub struct Listener {
    pub address: SocketAddr,
    task: JoinHandle<()>,
}

impl Listener {
    /// Binds and starts accepting.
    ///
    /// # Errors
    /// The system's, when the address cannot be bound.
    pub fn start(address: SocketAddr, shared: Arc<Shared>) -> io::Result<Self> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        if address.is_ipv6() {
            // 0.0.0.0 may be bound beside it.
            socket.set_only_v6(true)?;
        }
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        let listener = TcpListener::from_std(socket.into())?;
        let address = listener.local_addr()?;
        let task = tokio::spawn(accept_loop(listener, shared));
        Ok(Listener { address, task })
    }

    /// Stops accepting. Connections go on.
    pub fn stop(&self) {
        self.task.abort();
    }
}

async fn accept_loop(listener: TcpListener, shared: Arc<Shared>) {
    let max_sockets = max_sockets(shared.max_connections);
    let paused = AtomicBool::new(false);
    loop {
        wait_for_room(&shared.registry, max_sockets, &paused).await;
        match listener.accept().await {
            Ok((socket, peer)) => {
                if paused.swap(false, Ordering::Relaxed) {
                    tracing::info!("accepting connections again");
                }
                let counted = shared.registry.socket();
                let shared = shared.clone();
                tokio::spawn(async move {
                    let _counted = counted;
                    serve(socket, peer, shared).await;
                });
            }
            Err(error) if is_exhaustion(&error) => {
                if !paused.swap(true, Ordering::Relaxed) {
                    tracing::warn!(%error, "accepting connections is paused: no file descriptors are left; raise the limit of open files (ulimit -n, LimitNOFILE=)");
                }
                tokio::time::sleep(EXHAUSTED_PAUSE).await;
            }
            Err(error) => tracing::debug!(%error, "a connection was gone before it was accepted"),
        }
    }
}

/// Waits while as many sockets are open as file descriptors allow.
async fn wait_for_room(registry: &Registry, max_sockets: usize, paused: &AtomicBool) {
    while registry.sockets() >= max_sockets {
        if !paused.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                connections = registry.sockets(),
                "accepting connections is paused: the limit of open files (ulimit -n, LimitNOFILE=) or of connections is reached"
            );
        }
        tokio::select! {
            () = registry.socket_closed() => {}
            () = tokio::time::sleep(EXHAUSTED_PAUSE) => {}
        }
    }
}

fn is_exhaustion(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM))
}

/// Sockets that may be open at once: what the limit of open files leaves after the store's share.
fn max_sockets(max_connections: Option<u32>) -> usize {
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let by_files = limit.saturating_sub(RESERVED_FILES.min(limit / 2)).max(1);
    let by_files = usize::try_from(by_files).unwrap_or(usize::MAX);
    max_connections.map_or(by_files, |max| by_files.min(max as usize))
}

/// Raises the limit of open files to what the system allows the process; best effort.
pub fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current < limit.maximum {
        // Refused means that the limit stays, which only brings the pause in accepting nearer.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit });
    }
}
