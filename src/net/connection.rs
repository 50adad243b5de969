//! A connection's reader task: bytes from the socket into the session, a whole read at a time.

use std::{
    cell::RefCell,
    future::poll_fn,
    io,
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf},
    net::{TcpStream, tcp::OwnedReadHalf},
    task::JoinHandle,
    time::{Instant, Sleep, sleep, sleep_until, timeout},
};

use super::{
    registry::{Command, Handle, Registry},
    writer::write_loop,
};
use crate::session::{CloseReason, ConnectionContext, Endpoints, HeaderAnswer, Phase, Session, Step, judge_header};

/// Bytes read at a time, into a buffer that the connections of a thread share.
const READ_BYTES: usize = 256 << 10;
/// A read of this size is likely to be followed by another; others get their turn first.
const BUSY_READ_BYTES: usize = 64 << 10;
/// How long a publisher waits after a read, when consumers of a queue it publishes to do not keep up.
const CONGESTION_PAUSE: Duration = Duration::from_millis(1);
/// How often a publisher that is held back looks whether it may go on.
const HOLD_STEP: Duration = Duration::from_millis(5);
/// Looks after which a read is let through although memory is still exhausted: paging must slow publishers down, never
/// stop them for good. What lasts becomes an alarm.
const EXHAUSTED_STEPS: u32 = 20;
/// RabbitMQ's pause before it drops a connection without a word; it slows guessing.
const DROP_PAUSE: Duration = Duration::from_secs(3);
/// How long a client may take to answer `connection.close`.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the last bytes may take to leave.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

thread_local! {
    static READ_BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; READ_BYTES]);
}

/// What all connections of the broker share.
pub struct Shared {
    pub context: ConnectionContext,
    pub registry: Arc<Registry>,
    pub handshake_timeout: Duration,
    pub max_connections: Option<u32>,
}

/// Serves one socket to its end.
pub async fn serve(mut socket: TcpStream, peer: SocketAddr, shared: Arc<Shared>) {
    let _ = socket.set_nodelay(true);
    let deadline = Instant::now() + shared.handshake_timeout;
    let mut header = [0; 8];
    match tokio::time::timeout_at(deadline, socket.read_exact(&mut header)).await {
        Ok(Ok(_)) => {}
        // Nothing, or too little, is a health check; slower than the handshake allows is nobody.
        Ok(Err(_)) | Err(_) => return,
    }
    if let HeaderAnswer::Refuse(answer) = judge_header(&header) {
        tracing::warn!(%peer, header = %header.escape_ascii(), "unsupported protocol");
        let _ = socket.write_all(&answer).await;
        return;
    }
    let id = shared.registry.next_id();
    let mut session = shared.context.session(id, peer.ip());
    if let Ok(local) = socket.local_addr() {
        session.set_endpoints(Endpoints { peer, local });
    }
    let handle = shared.registry.add(id, session.outbox().clone());
    let reader_of = Arc::downgrade(&handle);
    handle.outbox.on_attention(Box::new(move || {
        if let Some(handle) = reader_of.upgrade() {
            handle.command(Command::Attend);
        }
    }));
    let (reader, writer) = socket.into_split();
    let writer = Arc::new(writer);
    let (socket_of, sender_of) = (Arc::downgrade(&writer), Arc::downgrade(&handle));
    handle.outbox.on_little(Box::new(move |bytes| {
        let (Some(socket), Some(handle)) = (socket_of.upgrade(), sender_of.upgrade()) else { return 0 };
        handle.note_sent();
        // An error is the writer's to meet.
        socket.try_write(bytes).unwrap_or(0)
    }));
    handle.outbox.wake_writer();
    let connection = Connection {
        writer: Some(tokio::spawn(write_loop(writer, handle.clone()))),
        session,
        handle,
        registry: shared.registry.clone(),
        read_bytes: 0,
    };
    connection.run(reader, deadline).await;
}

/// Everything that has to be given up when the connection ends, however it does.
struct Connection {
    session: Session,
    handle: Arc<Handle>,
    registry: Arc<Registry>,
    writer: Option<JoinHandle<()>>,
    /// Bytes of the last read.
    read_bytes: usize,
}

impl Drop for Connection {
    fn drop(&mut self) {
        // A panic while handling this connection must not keep its queues' messages unacked.
        let released = catch_unwind(AssertUnwindSafe(|| self.session.release()));
        if released.is_err() {
            tracing::error!(connection = self.handle.id, "cleaning up after a failed connection has failed as well");
        }
        self.handle.outbox.close();
        if let Some(writer) = self.writer.take() {
            writer.abort();
        }
        self.registry.remove(self.handle.id);
    }
}

/// Why the reader stops.
enum End {
    Peer(io::Result<()>),
    Drop { later: bool, reason: String },
    Flush,
}

impl Connection {
    async fn run(mut self, mut reader: OwnedReadHalf, handshake_deadline: Instant) {
        match self.read_loop(&mut reader, handshake_deadline).await {
            End::Peer(Ok(())) => tracing::debug!(connection = self.handle.id, "closed by the client"),
            End::Peer(Err(error)) => tracing::debug!(connection = self.handle.id, %error, "connection lost"),
            End::Drop { later, reason } => {
                tracing::warn!(connection = self.handle.id, reason, "dropping connection");
                if later {
                    self.session.release();
                    sleep(DROP_PAUSE).await;
                }
            }
            End::Flush => {
                self.handle.outbox.finish();
                if let Some(writer) = self.writer.take() {
                    let abort = writer.abort_handle();
                    if timeout(FLUSH_TIMEOUT, writer).await.is_err() {
                        abort.abort();
                    }
                }
            }
        }
    }

    async fn read_loop(&mut self, reader: &mut OwnedReadHalf, handshake_deadline: Instant) -> End {
        let mut carry = Vec::new();
        let mut deadline = Some(Box::pin(sleep_until(handshake_deadline)));
        let mut phase = self.session.phase();
        let mut registered = None;
        loop {
            let event = poll_fn(|cx| {
                if let Poll::Ready(command) = self.handle.poll_commanded(cx, &mut registered) {
                    return Poll::Ready(Event::Command(command));
                }
                if deadline.as_mut().is_some_and(|deadline| deadline.as_mut().poll(cx).is_ready()) {
                    return Poll::Ready(Event::Late);
                }
                poll_batch(reader, cx, &mut carry, &mut self.session).map(Event::Batch)
            });
            let step = match event.await {
                Event::Command(Command::Close(reason)) => {
                    self.session.close(&reason);
                    self.after_phase(&mut phase, &mut deadline);
                    continue;
                }
                Event::Command(Command::Drop(reason)) => {
                    return End::Drop { later: false, reason: reason.into() };
                }
                Event::Command(Command::Attend) => {
                    self.session.close_timed_out_channels();
                    continue;
                }
                Event::Late => return End::Drop { later: false, reason: format!("timeout in phase {phase:?}") },
                Event::Batch(Ok(Batch { read: 0, .. })) => return End::Peer(Ok(())),
                Event::Batch(Ok(Batch { read, step })) => {
                    self.handle.note_received();
                    self.read_bytes = read;
                    if read >= BUSY_READ_BYTES {
                        tokio::task::yield_now().await;
                    }
                    step
                }
                Event::Batch(Err(error)) => return End::Peer(Err(error)),
            };
            if let Some(end) = self.after_batch(step, &mut carry).await {
                return end;
            }
            self.after_phase(&mut phase, &mut deadline);
        }
    }

    /// Waits for what a batch has to wait for, and handles what was left of it.
    async fn after_batch(&mut self, mut step: Step, carry: &mut Vec<u8>) -> Option<End> {
        loop {
            match step {
                Step::More => break,
                Step::Flush => return Some(End::Flush),
                Step::Drop { later, reason } => return Some(End::Drop { later, reason }),
                Step::Await => self.session.wait().await,
                Step::Drain => {}
            }
            self.unclog().await;
            if self.handle.is_commanded() || self.handle.outbox.is_closed() {
                // Said by the read loop; what is unread is not handled any more.
                break;
            }
            let (used, next) = self.session.feed(carry);
            carry.drain(..used);
            step = next;
        }
        self.unclog().await;
        if let Some(port) = self.session.take_behind() {
            // Bounded as well: whoever reads nothing at all is passed over from now on.
            let _ = timeout(CONGESTION_PAUSE, port.caught_up()).await;
        }
        if self.session.take_published() {
            if self.session.take_congested(self.read_bytes) {
                // Bounded, so that consumers which are slow for good cost a publisher rate, never progress.
                sleep(CONGESTION_PAUSE).await;
            }
            self.hold_back().await;
        }
        None
    }

    /// Waits until the client has read most of what waits for it.
    async fn unclog(&self) {
        while self.session.is_clogged() && !self.handle.outbox.is_closed() && !self.handle.is_commanded() {
            sleep(HOLD_STEP).await;
        }
    }

    /// Keeps a publisher from outrunning the memory budget, for a bounded time, or an alarm, for as long as it lasts; the
    /// client is told of an alarm.
    async fn hold_back(&mut self) {
        let mut patience = EXHAUSTED_STEPS;
        while patience > 0 && self.session.must_hold_back() && self.session.alarm().is_none() {
            patience -= 1;
            sleep(HOLD_STEP).await;
        }
        let Some(reason) = self.session.alarm() else { return };
        self.session.tell_blocked(&reason);
        self.handle.paused.store(true, Ordering::Relaxed);
        while self.session.alarm().is_some() && !self.handle.outbox.is_closed() && !self.handle.is_commanded() {
            sleep(HOLD_STEP).await;
        }
        self.session.tell_unblocked();
        self.handle.paused.store(false, Ordering::Relaxed);
        self.handle.note_received();
    }

    /// Sets clocks that depend on the phase of the session.
    fn after_phase(&mut self, phase: &mut Phase, deadline: &mut Option<Pin<Box<Sleep>>>) {
        let now = self.session.phase();
        if now == *phase {
            return;
        }
        *phase = now;
        match now {
            Phase::Running => {
                *deadline = None;
                let secs = self.session.heartbeat_secs();
                self.handle.beat.lock().start(Duration::from_secs(secs.into()));
                self.handle.heartbeat_secs.store(secs, Ordering::Relaxed);
            }
            Phase::Closing => {
                self.handle.heartbeat_secs.store(0, Ordering::Relaxed);
                let secs = Duration::from_secs(self.session.heartbeat_secs().into());
                let patience = match (self.session.is_tuned(), self.session.has_lost_framing()) {
                    (true, false) if !secs.is_zero() => secs.min(CLOSE_TIMEOUT),
                    (true, false) => CLOSE_TIMEOUT,
                    _ => DROP_PAUSE,
                };
                *deadline = Some(Box::pin(sleep(patience)));
            }
            _ => {}
        }
    }
}

/// What the reader waits for.
enum Event {
    Command(Command),
    /// The deadline of the present phase has passed.
    Late,
    Batch(io::Result<Batch>),
}

/// One read, handled.
struct Batch {
    read: usize,
    step: Step,
}

/// Reads what the socket has and feeds it to the session, with nothing of the buffer kept but an unfinished frame.
fn poll_batch(
    reader: &mut OwnedReadHalf,
    cx: &mut Context<'_>,
    carry: &mut Vec<u8>,
    session: &mut Session,
) -> Poll<io::Result<Batch>> {
    READ_BUFFER.with_borrow_mut(|buffer| {
        let kept = carry.len();
        let in_front = kept <= READ_BYTES / 4;
        let offset = if in_front { kept } else { 0 };
        let mut read = ReadBuf::new(&mut buffer[offset..]);
        std::task::ready!(Pin::new(reader).poll_read(cx, &mut read))?;
        let read = read.filled().len();
        if read == 0 {
            return Poll::Ready(Ok(Batch { read, step: Step::More }));
        }
        let step = if in_front {
            buffer[..kept].copy_from_slice(carry);
            let input = &buffer[..kept + read];
            let (used, step) = session.feed(input);
            carry.clear();
            carry.extend_from_slice(&input[used..]);
            step
        } else {
            carry.extend_from_slice(&buffer[..read]);
            let (used, step) = session.feed(carry);
            carry.drain(..used);
            step
        };
        if carry.is_empty() && carry.capacity() > 0 {
            *carry = Vec::new();
        }
        Poll::Ready(Ok(Batch { read, step }))
    })
}

impl From<CloseReason> for Command {
    fn from(reason: CloseReason) -> Self {
        Command::Close(reason)
    }
}
