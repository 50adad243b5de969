//! Every connection that is open: what the timer task and a shutdown need of it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU16, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker},
};

use dashmap::DashMap;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::session::{CloseReason, Outbox};

/// What a connection's reader is asked to do.
#[derive(Clone, Debug)]
pub enum Command {
    /// Say `connection.close` and wait for the answer.
    Close(CloseReason),
    /// Close the socket.
    Drop(&'static str),
    /// Look after channels that a consumer's timeout has ended.
    Attend,
}

/// A request to a reader, and how the reader is woken for one.
#[derive(Default)]
struct Request {
    command: Option<Command>,
    waker: Option<Waker>,
}

/// A connection as others see it.
pub struct Handle {
    pub id: u64,
    pub outbox: Arc<Outbox>,
    request: Mutex<Request>,
    /// A request waits.
    is_commanded: AtomicBool,
    /// Bytes came in, or went out, since the timer last looked.
    received: AtomicBool,
    sent: AtomicBool,
    pub heartbeat_secs: AtomicU16,
    /// The reader is not reading, so silence means nothing.
    pub paused: AtomicBool,
    pub(super) beat: Mutex<super::timers::Beat>,
}

impl Handle {
    /// Asks the reader for something; a second request replaces an unread first.
    pub fn command(&self, command: Command) {
        let waker = {
            let mut request = self.request.lock();
            if !matches!((&command, &request.command), (Command::Attend, Some(_))) {
                request.command = Some(command);
            }
            self.is_commanded.store(true, Ordering::Release);
            request.waker.clone()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Whether a request waits.
    #[inline]
    pub fn is_commanded(&self) -> bool {
        self.is_commanded.load(Ordering::Acquire)
    }

    /// Answers a request to the reader, or has the reader woken for the next one. `registered` is the waker that is known
    /// already.
    ///
    /// Hot path: nothing is locked while the reader is the same task.
    #[inline]
    pub fn poll_commanded(&self, cx: &Context<'_>, registered: &mut Option<Waker>) -> Poll<Command> {
        let is_known = registered.as_ref().is_some_and(|waker| waker.will_wake(cx.waker()));
        if is_known && !self.is_commanded() {
            return Poll::Pending;
        }
        let mut request = self.request.lock();
        if !is_known {
            *registered = Some(cx.waker().clone());
            request.waker.clone_from(registered);
        }
        self.is_commanded.store(false, Ordering::Relaxed);
        request.command.take().map_or(Poll::Pending, Poll::Ready)
    }

    #[inline]
    pub fn note_received(&self) {
        self.received.store(true, Ordering::Relaxed);
    }

    #[inline]
    pub fn note_sent(&self) {
        self.sent.store(true, Ordering::Relaxed);
    }

    pub fn take_received(&self) -> bool {
        self.received.swap(false, Ordering::Relaxed)
    }

    pub fn take_sent(&self) -> bool {
        self.sent.swap(false, Ordering::Relaxed)
    }
}

/// All open connections of the broker.
#[derive(Default)]
pub struct Registry {
    handles: DashMap<u64, Arc<Handle>>,
    next: AtomicU64,
    /// Sockets, also those that have not shaken hands.
    sockets: AtomicUsize,
    closed: Notify,
}

impl Registry {
    /// A number for a new connection.
    pub fn next_id(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Adds a connection.
    pub fn add(&self, id: u64, outbox: Arc<Outbox>) -> Arc<Handle> {
        let handle = Arc::new(Handle {
            id,
            outbox,
            request: Mutex::default(),
            is_commanded: AtomicBool::new(false),
            received: AtomicBool::new(true),
            sent: AtomicBool::new(false),
            heartbeat_secs: AtomicU16::new(0),
            paused: AtomicBool::new(false),
            beat: Mutex::default(),
        });
        self.handles.insert(id, handle.clone());
        handle
    }

    /// Forgets a connection.
    pub fn remove(&self, id: u64) {
        self.handles.remove(&id);
    }

    /// Counts a socket until the answer is dropped.
    pub fn socket(self: &Arc<Self>) -> Socket {
        self.sockets.fetch_add(1, Ordering::Relaxed);
        Socket(self.clone())
    }

    /// Open sockets.
    pub fn sockets(&self) -> usize {
        self.sockets.load(Ordering::Relaxed)
    }

    /// All connections.
    pub fn handles(&self) -> Vec<Arc<Handle>> {
        self.handles.iter().map(|entry| entry.value().clone()).collect()
    }

    /// Waits until no socket is open.
    pub async fn drained(&self) {
        loop {
            let closed = self.closed.notified();
            if self.sockets() == 0 {
                return;
            }
            closed.await;
        }
    }

    /// Waits until a socket closes.
    pub async fn socket_closed(&self) {
        self.closed.notified().await;
    }
}

/// One open socket in the registry's count.
pub struct Socket(Arc<Registry>);

impl Drop for Socket {
    fn drop(&mut self) {
        self.0.sockets.fetch_sub(1, Ordering::Relaxed);
        self.0.closed.notify_one();
    }
}
