//! `leveret perf floor`: what no AMQP broker on this machine can beat with the same load and the same sockets.
//!
//! It shakes hands, then turns every `basic.publish` it reads into a `basic.deliver` to the latest consumer (with
//! `--fan-out`: to all). No queue, no routing, no acknowledgement state, no confirms, no storage, no checks: only the
//! frames read, rewritten and written. Blocking sockets, reads of 256 KiB, one write per wake-up. A broker's CPU time
//! per message is measured against this one's, in the same run.
//!
//! # Whose bytes are whose
//! A connection has a reader thread and a writer thread. What is to be written waits in its [`Outbox`]; publishers
//! append to the consumer's under its lock, whole messages at a time: an unfinished one stays in the read buffer until
//! it is complete. One that is too long for that is passed on piece by piece, and its publisher holds the outbox
//! meanwhile. No thread holds two outboxes' locks; that of the consumers may be taken while one is held.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::error::PerfError;
use super::wire::{
    self, ArgumentReader, Arguments, FRAME_OVERHEAD_BYTES, MAX_FRAME_BYTES, MethodId, PROTOCOL_HEADER, method,
};

const READ_BUFFER_BYTES: usize = 256 << 10;
/// A publisher waits while the consumer's outbox holds more than this.
const HIGH_WATER_BYTES: usize = 1 << 20;
/// A message with a longer body is passed on before all of it has arrived.
const WHOLE_BODY_BYTES: u64 = 64 << 10;
/// Each has two threads; further ones are turned away.
const MAX_CONNECTIONS: usize = 2_000;
const THREAD_STACK_BYTES: usize = 256 << 10;
/// After an accept that failed, for want of file descriptors most likely.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

const FRAME_END: u8 = 0xCE;
const KIND_METHOD: u8 = 1;
const KIND_HEADER: u8 = 2;
const KIND_BODY: u8 = 3;
const FRAME_HEADER_BYTES: usize = 7;
/// Class, weight, body size, flags: what every content header begins with.
const BODY_SIZE_AT: usize = FRAME_HEADER_BYTES + 4;
/// Class, method and ticket of a `basic.publish`.
const PUBLISH_NAMES_AT: usize = FRAME_HEADER_BYTES + 6;
/// The one consumer tag, in wire form.
const CONSUMER_TAG: &[u8] = &[1, b'c'];

/// Serves the floor: a program that only rewrites frames, to measure brokers against.
///
/// Every message goes to the latest consumer, whatever its queue; there are no queues, no acknowledgements, no
/// confirms (they are accepted, and never come) and no disk. What a broker needs beyond this is its own work.
/// Runs until it is stopped.
///
/// Examples:
///   leveret perf floor & floor=$!
///   leveret perf --uri amqp://127.0.0.1:5675 --pid $floor
///   leveret perf floor --listen 127.0.0.1:0 --fan-out     a port of the system's choice; every consumer gets a copy
#[derive(Debug, Clone, clap::Args)]
#[command(verbatim_doc_comment)]
pub(super) struct FloorArgs {
    /// Address to listen on
    #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:5675")]
    listen: SocketAddr,
    /// Send every message to all consumers there are, not to the latest only
    #[arg(long)]
    fan_out: bool,
}

/// Serves until the process is ended.
///
/// # Errors
/// An address that cannot be listened on.
pub(super) fn run(args: &FloorArgs) -> Result<(), PerfError> {
    let failed = |source| PerfError::Listen { address: args.listen, source };
    let listener = TcpListener::bind(args.listen).map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    // Who started it may not care to read this.
    let _ = writeln!(io::stdout(), "the floor listens on {address}, process {}", std::process::id());
    serve(&listener, args.fan_out)
}

fn serve(listener: &TcpListener, fan_out: bool) -> ! {
    let consumers = Arc::new(Consumers { fan_out, ..Consumers::default() });
    let open = Arc::new(AtomicUsize::new(0));
    let mut id = 0;
    loop {
        id += 1;
        let started = listener.accept().and_then(|(socket, _)| start(socket, id, &consumers, &open));
        if let Err(error) = started {
            eprintln!("a connection could not be served: {error}");
            thread::sleep(ACCEPT_PAUSE);
        }
    }
}

/// Gives a connection its threads.
fn start(socket: TcpStream, id: u64, consumers: &Arc<Consumers>, open: &Arc<AtomicUsize>) -> io::Result<()> {
    if open.load(Ordering::Relaxed) >= MAX_CONNECTIONS {
        return Err(io::Error::other(format!("there are {MAX_CONNECTIONS} already")));
    }
    socket.set_nodelay(true)?;
    let own = Arc::new(Outbox::default());
    let session = Session {
        id,
        own: own.clone(),
        consumers: consumers.clone(),
        targets: Vec::new(),
        epoch: 0,
        body_left: 0,
        answers: Vec::new(),
        wish: None,
    };
    let (writer_socket, writer_outbox, open) = (socket.try_clone()?, own.clone(), open.clone());
    spawn("floor writer", move || write_loop(&writer_outbox, writer_socket))?;
    let reader = spawn("floor reader", move || {
        open.fetch_add(1, Ordering::Relaxed);
        session.run(socket);
        open.fetch_sub(1, Ordering::Relaxed);
    });
    if reader.is_err() {
        own.close();
    }
    reader
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.to_owned()).stack_size(THREAD_STACK_BYTES).spawn(work).map(drop)
}

/// Bytes waiting for one connection's writer.
#[derive(Debug, Default)]
struct Outbox {
    pending: Mutex<Pending>,
    filled: Condvar,
    /// Also: released by the publisher that held it.
    drained: Condvar,
}

#[derive(Debug, Default)]
struct Pending {
    bytes: Vec<u8>,
    /// Channel that deliveries go to.
    channel: [u8; 2],
    /// Tag of the latest delivery.
    delivery_tag: u64,
    /// The connection that is in the middle of a message.
    held_by: Option<u64>,
    /// Nothing more is taken in; what is there is still written.
    closed: bool,
}

impl Outbox {
    /// Locks it for a publisher, once no other one is in the middle of a message. `None` if its connection is over.
    fn lock_for(&self, publisher: u64) -> Option<MutexGuard<'_, Pending>> {
        let mut pending = self.pending.lock();
        while pending.held_by.is_some_and(|holder| holder != publisher) && !pending.closed {
            self.drained.wait(&mut pending);
        }
        (!pending.closed).then_some(pending)
    }

    /// Wakes the writer, and waits until it has caught up.
    fn unlock(&self, mut pending: MutexGuard<'_, Pending>, hold: Option<u64>) {
        if pending.held_by.is_some() && hold.is_none() {
            self.drained.notify_all();
        }
        pending.held_by = hold;
        self.filled.notify_one();
        while pending.bytes.len() > HIGH_WATER_BYTES && !pending.closed {
            self.drained.wait(&mut pending);
        }
    }

    fn close(&self) {
        self.pending.lock().closed = true;
        self.filled.notify_one();
        self.drained.notify_all();
    }
}

/// Everybody that messages may go to.
#[derive(Debug, Default)]
struct Consumers {
    /// In the order in which they began.
    current: Mutex<Vec<Arc<Outbox>>>,
    /// Changes whenever `current` does.
    epoch: AtomicU64,
    fan_out: bool,
}

impl Consumers {
    fn add(&self, outbox: &Arc<Outbox>) {
        self.change(outbox, true);
    }

    fn remove(&self, outbox: &Arc<Outbox>) {
        self.change(outbox, false);
    }

    fn change(&self, outbox: &Arc<Outbox>, present: bool) {
        let mut current = self.current.lock();
        current.retain(|other| !Arc::ptr_eq(other, outbox));
        if present {
            current.push(outbox.clone());
        }
        self.epoch.fetch_add(1, Ordering::Release);
    }

    /// Where a message of `own`'s connection goes to: never to itself.
    fn targets(&self, own: &Arc<Outbox>) -> Vec<Arc<Outbox>> {
        let current = self.current.lock();
        let others = current.iter().rev().filter(|outbox| !Arc::ptr_eq(outbox, own)).cloned();
        others.take(if self.fan_out { usize::MAX } else { 1 }).collect()
    }
}

/// A change that has to wait until the answers before it are in the outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Consume { channel: [u8; 2] },
    Cancel,
}

/// One connection, seen from its reader.
#[derive(Debug)]
struct Session {
    id: u64,
    own: Arc<Outbox>,
    consumers: Arc<Consumers>,
    /// As of `epoch`; stays as it is while a message is passed on piece by piece.
    targets: Vec<Arc<Outbox>>,
    epoch: u64,
    /// What the message that is passed on piece by piece still lacks.
    body_left: u64,
    answers: Vec<u8>,
    wish: Option<Wish>,
}

impl Session {
    /// Reads until the peer is gone, or sends what is no frame.
    fn run(mut self, mut socket: TcpStream) {
        let _ = self.read_loop(&mut socket); // the peer knows, and nobody else needs to
        self.consumers.remove(&self.own);
        if self.body_left > 0 {
            // Consumers that got half a message cannot be given another one.
            self.targets.iter().for_each(|target| target.close());
        }
        self.own.close();
    }

    fn read_loop(&mut self, socket: &mut TcpStream) -> io::Result<()> {
        let mut header = [0; PROTOCOL_HEADER.len()];
        socket.read_exact(&mut header)?;
        if header != PROTOCOL_HEADER {
            return socket.write_all(&PROTOCOL_HEADER);
        }
        socket.write_all(&connection_start())?;
        let mut buffer = vec![0; READ_BUFFER_BYTES];
        let mut filled = 0;
        loop {
            let read = socket.read(&mut buffer[filled..])?;
            if read == 0 {
                return Ok(()); // or the buffer is full of what makes no message
            }
            filled += read;
            let taken = self.take(&buffer[..filled]);
            buffer.copy_within(taken..filled, 0);
            filled -= taken;
        }
    }

    /// Passes on and answers what is complete in `bytes`; returns how much that is.
    fn take(&mut self, bytes: &[u8]) -> usize {
        let epoch = self.consumers.epoch.load(Ordering::Acquire);
        if epoch != self.epoch && self.body_left == 0 {
            self.targets = self.consumers.targets(&self.own);
            self.epoch = epoch;
        }
        let mut end = None;
        for index in 0..self.targets.len() {
            let target = self.targets[index].clone();
            let Some(mut pending) = target.lock_for(self.id) else { continue };
            let walked = self.walk(bytes, Some(&mut pending), end.is_none());
            target.unlock(pending, (walked.body_left > 0).then_some(self.id));
            end = Some(walked);
        }
        let end = match end {
            Some(end) => end,
            None => self.walk(bytes, None, true),
        };
        self.body_left = end.body_left;
        self.flush();
        end.taken
    }

    /// Rewrites the publishes of `bytes` into `out`, and answers the other methods if this is the walk to do so.
    ///
    /// Hot path: three frames per message. No clock, no lock, no allocation but `out`'s.
    fn walk(&mut self, bytes: &[u8], mut out: Option<&mut Pending>, answering: bool) -> Walked {
        let mut at = 0;
        // Where the last publish begins, here and in `out`.
        let mut latest = None;
        while let Some(frame) = whole_frame(bytes, at) {
            match (frame[0], out.as_mut()) {
                (KIND_METHOD, out) if method_of(frame) == method::BASIC_PUBLISH => {
                    latest = Some((at, out.as_ref().map_or(0, |out| out.bytes.len())));
                    if let Some(out) = out {
                        out.delivery_tag += 1;
                        deliver_method(frame, out);
                    }
                }
                (KIND_METHOD, _) if answering => {
                    self.on_method(frame);
                    latest = None; // it must not be walked over twice
                }
                (KIND_HEADER | KIND_BODY, Some(out)) => {
                    out.bytes.extend_from_slice(&[frame[0], out.channel[0], out.channel[1]]);
                    out.bytes.extend_from_slice(&frame[3..]);
                }
                _ => {}
            }
            at += frame.len();
        }
        if latest.is_none() && self.body_left == 0 {
            return Walked { taken: at, body_left: 0 };
        }
        let known_left = if latest.is_some() { None } else { Some(self.body_left) };
        let (begin, out_begin) = latest.unwrap_or((0, 0));
        match Rest::of(&bytes[begin..at], known_left) {
            Some(rest) if rest.left == 0 || rest.body_size > WHOLE_BODY_BYTES => {
                Walked { taken: at, body_left: rest.left }
            }
            _ => {
                if let Some(out) = out {
                    out.bytes.truncate(out_begin);
                    out.delivery_tag -= 1;
                }
                Walked { taken: begin, body_left: 0 }
            }
        }
    }

    fn on_method(&mut self, frame: &[u8]) {
        let (channel, id) = ([frame[1], frame[2]], method_of(frame));
        let arguments = frame.get(FRAME_HEADER_BYTES + 4..frame.len() - 1).unwrap_or_default();
        match id {
            method::BASIC_CONSUME => self.wish = Some(Wish::Consume { channel }),
            method::BASIC_CANCEL => self.wish = Some(Wish::Cancel),
            _ => {}
        }
        if let Some((reply, reply_arguments)) = answer(id, arguments) {
            wire::append_method(&mut self.answers, u16::from_be_bytes(channel), reply, &reply_arguments);
        }
    }

    /// Hands the answers over, and does what had to wait for that.
    fn flush(&mut self) {
        if self.answers.is_empty() {
            return;
        }
        let wish = self.wish.take();
        if wish == Some(Wish::Cancel) {
            self.consumers.remove(&self.own);
        }
        if let Some(mut pending) = self.own.lock_for(self.id) {
            pending.bytes.append(&mut self.answers);
            if let Some(Wish::Consume { channel }) = wish {
                pending.channel = channel;
                // Under the lock: no delivery may be before the answer, and none may be missed after it.
                self.consumers.add(&self.own);
            }
            self.own.filled.notify_one();
        }
    }
}

/// How far a walk came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Walked {
    taken: usize,
    /// More than 0 in the middle of a message that is passed on piece by piece.
    body_left: u64,
}

/// The body of a message, as far as whole frames tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rest {
    body_size: u64,
    left: u64,
}

impl Rest {
    /// Of the message that `frames` begin with, or go on with if it is known what is left of it.
    /// `None` as long as its header is missing.
    fn of(frames: &[u8], known_left: Option<u64>) -> Option<Self> {
        let mut rest = known_left.map(|left| Self { body_size: u64::MAX, left });
        let mut at = 0;
        while let Some(frame) = whole_frame(frames, at) {
            match (frame[0], &mut rest) {
                (KIND_HEADER, None) => {
                    let size = frame.get(BODY_SIZE_AT..).and_then(<[u8]>::first_chunk)?;
                    let body_size = u64::from_be_bytes(*size);
                    rest = Some(Self { body_size, left: body_size });
                }
                (KIND_BODY, Some(rest)) => {
                    rest.left = rest.left.saturating_sub((frame.len() - FRAME_OVERHEAD_BYTES) as u64);
                }
                _ => {}
            }
            at += frame.len();
        }
        rest
    }
}

/// The frame at `at`, if all of it is there; never shorter than [`FRAME_OVERHEAD_BYTES`].
#[inline]
fn whole_frame(bytes: &[u8], at: usize) -> Option<&[u8]> {
    let length = bytes.get(at + 3..)?.first_chunk()?;
    bytes.get(at..at + u32::from_be_bytes(*length) as usize + FRAME_OVERHEAD_BYTES)
}

/// Class and method id; (0, 0) where a method frame is too short for one.
#[inline]
fn method_of(frame: &[u8]) -> MethodId {
    match frame {
        [_, _, _, _, _, _, _, a, b, c, d, ..] => (u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d])),
        _ => (0, 0),
    }
}

/// Rewrites one `basic.publish` method frame as the `basic.deliver` that carries its exchange and key.
#[inline]
fn deliver_method(publish: &[u8], out: &mut Pending) {
    let names = names_of(publish).unwrap_or(&[0, 0]);
    let (tag, channel) = (out.delivery_tag, out.channel);
    let out = &mut out.bytes;
    out.extend_from_slice(&[KIND_METHOD, channel[0], channel[1]]);
    out.extend_from_slice(&(15 + names.len() as u32).to_be_bytes());
    out.extend_from_slice(&[0, 60, 0, 60]);
    out.extend_from_slice(CONSUMER_TAG);
    out.extend_from_slice(&tag.to_be_bytes());
    out.push(0);
    out.extend_from_slice(names);
    out.push(FRAME_END);
}

/// Exchange and routing key in wire form, at most 512 bytes.
#[inline]
fn names_of(publish: &[u8]) -> Option<&[u8]> {
    let names = publish.get(PUBLISH_NAMES_AT..)?;
    let key_at = 1 + usize::from(*names.first()?);
    names.get(..key_at + 1 + usize::from(*names.get(key_at)?))
}

fn connection_start() -> Vec<u8> {
    let keys = ["publisher_confirms", "basic.nack", "consumer_cancel_notify", "exchange_exchange_bindings"];
    let capabilities = keys.map(|key| Arguments::new().short_string(key).octet(b't').octet(1).as_bytes().to_vec());
    let table = Arguments::new().short_string("capabilities").octet(b'F').long_string(&capabilities.concat());
    let arguments =
        Arguments::new().octet(0).octet(9).long_string(table.as_bytes()).long_string(b"PLAIN").long_string(b"en_US");
    let mut frame = Vec::new();
    wire::append_method(&mut frame, 0, method::CONNECTION_START, &arguments);
    frame
}

/// The answer to every method that is not the hot one; `None` where no answer is due.
fn answer(id: MethodId, arguments: &[u8]) -> Option<(MethodId, Arguments)> {
    let nothing = Arguments::new();
    let tag = || Arguments::new().short_string("c");
    Some(match id {
        // No heartbeats.
        method::CONNECTION_START_OK => {
            let frame_max = u32::try_from(MAX_FRAME_BYTES).ok()?;
            (method::CONNECTION_TUNE, nothing.short(2047).long(frame_max).short(0))
        }
        method::CONNECTION_OPEN => (method::CONNECTION_OPEN_OK, nothing.short_string("")),
        method::CONNECTION_CLOSE => (method::CONNECTION_CLOSE_OK, nothing),
        method::CHANNEL_OPEN => (method::CHANNEL_OPEN_OK, nothing.long_string(b"")),
        method::CHANNEL_CLOSE => (method::CHANNEL_CLOSE_OK, nothing),
        method::EXCHANGE_DECLARE => (method::EXCHANGE_DECLARE_OK, nothing),
        method::EXCHANGE_DELETE => (method::EXCHANGE_DELETE_OK, nothing),
        method::QUEUE_DECLARE => {
            let mut arguments = ArgumentReader::new(arguments);
            arguments.short().ok()?;
            let name = str::from_utf8(arguments.short_string().ok()?).ok()?;
            (method::QUEUE_DECLARE_OK, nothing.short_string(name).long(0).long(0))
        }
        method::QUEUE_BIND => (method::QUEUE_BIND_OK, nothing),
        method::QUEUE_UNBIND => (method::QUEUE_UNBIND_OK, nothing),
        method::QUEUE_DELETE => (method::QUEUE_DELETE_OK, nothing.long(0)),
        method::BASIC_QOS => (method::BASIC_QOS_OK, nothing),
        method::BASIC_CONSUME => (method::BASIC_CONSUME_OK, tag()),
        method::BASIC_CANCEL => (method::BASIC_CANCEL_OK, tag()),
        method::CONFIRM_SELECT => (method::CONFIRM_SELECT_OK, nothing),
        _ => return None, // tune-ok, acknowledgements
    })
}

fn write_loop(outbox: &Outbox, mut socket: TcpStream) {
    let mut batch = Vec::new();
    loop {
        {
            let mut pending = outbox.pending.lock();
            while pending.bytes.is_empty() {
                if pending.closed {
                    let _ = socket.shutdown(Shutdown::Both); // gone already, if it fails
                    return;
                }
                outbox.filled.wait(&mut pending);
            }
            std::mem::swap(&mut pending.bytes, &mut batch);
            outbox.drained.notify_all();
        }
        if socket.write_all(&batch).is_err() {
            outbox.close(); // a dead peer drains to nowhere
        }
        batch.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(id: u64, consumers: &Arc<Consumers>) -> Session {
        Session {
            id,
            own: Arc::default(),
            consumers: consumers.clone(),
            targets: Vec::new(),
            epoch: 0,
            body_left: 0,
            answers: Vec::new(),
            wish: None,
        }
    }

    fn consumer(consumers: &Arc<Consumers>) -> Arc<Outbox> {
        let mut session = session(99, consumers);
        let mut consume = Vec::new();
        let arguments = Arguments::new().short(0).short_string("q").short_string("c").octet(2).empty_table();
        wire::append_method(&mut consume, 7, method::BASIC_CONSUME, &arguments);
        assert_eq!(session.take(&consume), consume.len());
        let answer = std::mem::take(&mut session.own.pending.lock().bytes);
        assert_eq!(answer, [1, 0, 7, 0, 0, 0, 6, 0, 60, 0, 21, 1, b'c', FRAME_END]);
        session.own
    }

    fn append_publish(out: &mut Vec<u8>, body: &[u8]) {
        let arguments = Arguments::new().short(0).short_string("x").short_string("key").octet(0);
        wire::append_method(out, 1, method::BASIC_PUBLISH, &arguments);
        wire::append_content(out, 1, body, false, MAX_FRAME_BYTES);
    }

    fn append_delivery(out: &mut Vec<u8>, tag: u8, body: &[u8]) {
        let arguments = Arguments::new().short_string("c").long(0).long(tag.into()).octet(0);
        wire::append_method(out, 7, method::BASIC_DELIVER, &arguments.short_string("x").short_string("key"));
        wire::append_content(out, 7, body, false, MAX_FRAME_BYTES);
    }

    /// Gives `session` the bytes as reads of `step` bytes would.
    fn feed(session: &mut Session, bytes: &[u8], step: usize) {
        let mut buffer = Vec::new();
        for part in bytes.chunks(step) {
            buffer.extend_from_slice(part);
            let taken = session.take(&buffer);
            buffer.drain(..taken);
        }
    }

    fn sent(outbox: &Outbox) -> Vec<u8> {
        std::mem::take(&mut outbox.pending.lock().bytes)
    }

    #[test]
    fn publishes_become_deliveries_however_the_reads_are_split() {
        let bodies: [&[u8]; 3] = [b"first", b"", &[7; 300]];
        let (mut published, mut expected) = (Vec::new(), Vec::new());
        for (tag, body) in (1..).zip(bodies) {
            append_publish(&mut published, body);
            append_delivery(&mut expected, tag, body);
        }
        for step in 1..published.len() {
            let consumers = Arc::default();
            let outbox = consumer(&consumers);
            feed(&mut session(1, &consumers), &published, step);
            assert_eq!(sent(&outbox), expected, "in steps of {step}");
        }
    }

    #[test]
    fn an_unfinished_message_waits_so_that_publishers_do_not_mix() {
        let consumers = Arc::default();
        let outbox = consumer(&consumers);
        let (mut one, mut other) = (session(1, &consumers), session(2, &consumers));
        let (mut first, mut second, mut expected) = (Vec::new(), Vec::new(), Vec::new());
        append_publish(&mut first, b"early");
        append_publish(&mut second, b"late");
        append_delivery(&mut expected, 1, b"late");
        append_delivery(&mut expected, 2, b"early");
        assert_eq!(one.take(&first[..first.len() - 1]), 0);
        assert_eq!(other.take(&second), second.len());
        assert_eq!(one.take(&first), first.len());
        assert_eq!(sent(&outbox), expected);
    }

    #[test]
    fn a_long_message_is_passed_on_piece_by_piece_and_keeps_others_out_meanwhile() {
        let consumers = Arc::default();
        let outbox = consumer(&consumers);
        let mut one = session(1, &consumers);
        let (mut published, mut expected) = (Vec::new(), Vec::new());
        append_publish(&mut published, &[5; 300_000]);
        append_delivery(&mut expected, 1, &[5; 300_000]);
        let taken = one.take(&published[..200_000]);
        assert!(taken > 100_000);
        assert_eq!(outbox.pending.lock().held_by, Some(1));
        assert_eq!(one.take(&published[taken..]), published.len() - taken);
        assert_eq!(outbox.pending.lock().held_by, None);
        assert_eq!(sent(&outbox), expected);
    }

    #[test]
    fn a_publisher_that_leaves_in_the_middle_of_a_message_takes_its_consumer_along() {
        let consumers = Arc::default();
        let outbox = consumer(&consumers);
        let mut published = Vec::new();
        append_publish(&mut published, &[5; 300_000]);
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let mut peer = TcpStream::connect(listener.local_addr().expect("bound")).expect("listens");
        let (socket, _) = listener.accept().expect("connected");
        peer.write_all(&PROTOCOL_HEADER).expect("open");
        peer.write_all(&published[..200_000]).expect("open");
        peer.shutdown(Shutdown::Write).expect("open");
        session(1, &consumers).run(socket);
        assert!(outbox.pending.lock().closed && outbox.lock_for(2).is_none());
    }

    #[test]
    fn the_latest_consumer_gets_everything_or_with_fan_out_all_do_with_tags_of_their_own() {
        let mut published = Vec::new();
        append_publish(&mut published, b"m");
        for (fan_out, expected) in [(false, [1, 2]), (true, [3, 2])] {
            let consumers = Arc::new(Consumers { fan_out, ..Consumers::default() });
            let mut publisher = session(1, &consumers);
            let earlier = consumer(&consumers);
            publisher.take(&published);
            let later = consumer(&consumers);
            publisher.take(&published);
            publisher.take(&published);
            assert_eq!([&earlier, &later].map(|outbox| outbox.pending.lock().delivery_tag), expected);
            consumers.remove(&later);
            publisher.take(&published);
            assert_eq!(earlier.pending.lock().delivery_tag, expected[0] + 1);
            assert_eq!(later.pending.lock().delivery_tag, expected[1]);
        }
    }

    #[test]
    fn any_bytes_are_survived() {
        let mut published = Vec::new();
        append_publish(&mut published, b"body");
        for at in 0..published.len() {
            for value in [0, 1, 2, 3, 8, 127, 255] {
                let consumers = Arc::default();
                let outbox = consumer(&consumers);
                let mut bytes = published.clone();
                bytes[at] = value;
                feed(&mut session(1, &consumers), &bytes, 11);
                assert!(sent(&outbox).len() < 200);
            }
        }
        for kind in 0..10 {
            assert_eq!(session(1, &Arc::default()).take(&[kind, 0, 0, 0, 0, 0, 0, FRAME_END]), 8);
        }
    }

    #[test]
    fn every_question_that_a_load_asks_is_answered() {
        let declare = Arguments::new().short(0).short_string("q").octet(0).empty_table();
        let (id, arguments) = answer(method::QUEUE_DECLARE, declare.as_bytes()).expect("answered");
        assert_eq!((id, arguments.as_bytes()), (method::QUEUE_DECLARE_OK, &[1, b'q', 0, 0, 0, 0, 0, 0, 0, 0][..]));
        assert!(answer(method::QUEUE_DECLARE, &[0, 0, 9]).is_none());
        for id in [method::CONFIRM_SELECT, method::BASIC_CANCEL, method::BASIC_QOS, method::QUEUE_BIND] {
            assert_eq!(answer(id, &[]).map(|(reply, _)| reply), Some((id.0, id.1 + 1)));
        }
        assert!(answer(method::BASIC_ACK, &[0; 9]).is_none());
    }
}
