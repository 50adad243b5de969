//! A small AMQP client over a blocking socket: it knows exactly what it has sent and what it was told, which is all that
//! a test of lost messages needs, and it never retries behind the test's back. Methods are `amq-protocol`'s, so that the
//! broker's own encoder is not its judge.

#![allow(dead_code, reason = "several test programs share it, and each uses a part")]

use std::{
    collections::VecDeque,
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use amq_protocol::{
    frame::WriteContext,
    protocol::{
        AMQPClass, BasicProperties, basic,
        basic::{gen_properties, parse_properties},
        channel, confirm, connection, exchange, gen_class, parse_class, queue, tx,
    },
    types::FieldTable,
};

const FRAME_MAX: usize = 131_072;
/// How long an answer may take before the broker counts as hanging.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Why an operation did not succeed.
#[derive(Debug)]
pub enum ClientError {
    /// The socket is gone.
    Gone(io::Error),
    /// The broker closed the channel or the connection.
    Closed { code: u16, text: String },
    /// No answer within [`PATIENCE`].
    Hanging(&'static str),
}

impl From<io::Error> for ClientError {
    fn from(error: io::Error) -> Self {
        ClientError::Gone(error)
    }
}

pub type Answer<T> = Result<T, ClientError>;

/// A message as it was received.
#[derive(Debug)]
pub struct Delivery {
    pub channel: u16,
    pub tag: u64,
    pub redelivered: bool,
    /// `basic.get-ok` only.
    pub remaining: Option<u32>,
    pub properties: BasicProperties,
    pub body: Vec<u8>,
}

impl Delivery {
    pub fn message_id(&self) -> &str {
        self.properties.message_id().as_ref().map_or("", |id| id.as_str())
    }
}

/// What the broker said.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "one at a time, and soon taken apart")]
pub enum Incoming {
    Method(u16, AMQPClass),
    Delivery(Delivery),
    /// `basic.return`, with the message's id.
    Returned(String),
}

/// A method that content follows.
struct Pending {
    channel: u16,
    method: basic::AMQPMethod,
    properties: Option<BasicProperties>,
    size: usize,
    body: Vec<u8>,
}

pub struct Client {
    stream: TcpStream,
    input: Vec<u8>,
    at: usize,
    pending: Option<Pending>,
    /// What came while [`Client::call`] waited for something else.
    backlog: VecDeque<Incoming>,
    out: Vec<u8>,
}

fn properties_bytes(properties: &BasicProperties) -> Vec<u8> {
    gen_properties(properties)(WriteContext::from(Vec::new())).expect("short properties").into_inner().0
}

fn frame(out: &mut Vec<u8>, kind: u8, channel: u16, payload: &[u8]) {
    out.push(kind);
    out.extend_from_slice(&channel.to_be_bytes());
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    out.extend_from_slice(payload);
    out.push(0xCE);
}

fn method_bytes(out: &mut Vec<u8>, channel: u16, class: &AMQPClass) {
    let payload = gen_class(class)(WriteContext::from(Vec::new())).expect("short arguments").into_inner().0;
    frame(out, 1, channel, &payload);
}

/// The frames of a `basic.publish` with its content.
pub fn publish_frames(
    out: &mut Vec<u8>,
    channel: u16,
    exchange: &str,
    key: &str,
    mandatory: bool,
    properties: &BasicProperties,
    body: &[u8],
) {
    let publish = basic::Publish { exchange: exchange.into(), routing_key: key.into(), mandatory, immediate: false };
    method_bytes(out, channel, &AMQPClass::Basic(basic::AMQPMethod::Publish(publish)));
    let mut header = vec![0, 60, 0, 0];
    header.extend_from_slice(&(body.len() as u64).to_be_bytes());
    header.extend_from_slice(&properties_bytes(properties));
    frame(out, 2, channel, &header);
    body.chunks(FRAME_MAX - 8).for_each(|chunk| frame(out, 3, channel, chunk));
}

impl Client {
    /// Connects, logs in and opens channel 1.
    pub fn connect(address: SocketAddr) -> Answer<Client> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        stream.set_nodelay(true)?;
        let mut client =
            Client { stream, input: Vec::new(), at: 0, pending: None, backlog: VecDeque::new(), out: Vec::new() };
        client.stream.write_all(b"AMQP\x00\x00\x09\x01")?;
        client.expect(0, (10, 10), "connection.start")?;
        client.send(
            0,
            AMQPClass::Connection(connection::AMQPMethod::StartOk(connection::StartOk {
                client_properties: FieldTable::default(),
                mechanism: "PLAIN".into(),
                response: "\0guest\0guest".into(),
                locale: "en_US".into(),
            })),
        )?;
        client.expect(0, (10, 30), "connection.tune")?;
        let tune_ok = connection::TuneOk { channel_max: 100, frame_max: FRAME_MAX as u32, heartbeat: 0 };
        client.send(0, AMQPClass::Connection(connection::AMQPMethod::TuneOk(tune_ok)))?;
        let open = AMQPClass::Connection(connection::AMQPMethod::Open(connection::Open { virtual_host: "/".into() }));
        client.call(0, open, (10, 41), "connection.open-ok")?;
        client.open_channel(1)?;
        Ok(client)
    }

    /// The socket, for whoever is to cut it.
    pub fn socket(&self) -> io::Result<TcpStream> {
        self.stream.try_clone()
    }

    /// The socket, and what was read from it and not looked at: for whoever reads frames by other means from here on.
    pub fn into_parts(mut self) -> (TcpStream, Vec<u8>) {
        (self.stream, self.input.split_off(self.at))
    }

    pub fn open_channel(&mut self, channel: u16) -> Answer<()> {
        self.call(channel, AMQPClass::Channel(channel::AMQPMethod::Open(channel::Open {})), (20, 11), "channel.open-ok")
            .map(drop)
    }

    /// Queues bytes for [`Client::flush`].
    pub fn buffer(&mut self) -> &mut Vec<u8> {
        &mut self.out
    }

    /// Writes what was queued.
    pub fn flush(&mut self) -> Answer<()> {
        let written = self.stream.write_all(&self.out);
        self.out.clear();
        Ok(written?)
    }

    pub fn queue_method(&mut self, channel: u16, class: AMQPClass) {
        method_bytes(&mut self.out, channel, &class);
    }

    pub fn send(&mut self, channel: u16, class: AMQPClass) -> Answer<()> {
        self.queue_method(channel, class);
        self.flush()
    }

    /// Sends a method and waits for the answer with these ids.
    pub fn call(
        &mut self,
        channel: u16,
        class: AMQPClass,
        answer: (u16, u16),
        what: &'static str,
    ) -> Answer<AMQPClass> {
        self.send(channel, class)?;
        self.expect(channel, answer, what)
    }

    fn expect(&mut self, channel: u16, answer: (u16, u16), what: &'static str) -> Answer<AMQPClass> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.receive_new(left)? {
                None => return Err(ClientError::Hanging(what)),
                Some(Incoming::Method(at, class))
                    if at == channel && (class.get_amqp_class_id(), class.get_amqp_method_id()) == answer =>
                {
                    return Ok(class);
                }
                Some(other) => self.backlog.push_back(other),
            }
        }
    }

    /// The next thing the broker says, or nothing within `wait`.
    pub fn receive(&mut self, wait: Duration) -> Answer<Option<Incoming>> {
        match self.backlog.pop_front() {
            Some(incoming) => Ok(Some(incoming)),
            None => self.receive_new(wait),
        }
    }

    /// Drops what has come and was not received; it was for a channel that is closed now.
    pub fn forget_backlog(&mut self) {
        self.backlog.clear();
    }

    fn receive_new(&mut self, wait: Duration) -> Answer<Option<Incoming>> {
        let deadline = Instant::now() + wait;
        loop {
            while let Some(incoming) = self.next_frame()? {
                if let Some(incoming) = incoming {
                    return Ok(Some(incoming));
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !self.fill(left)? {
                return Ok(None);
            }
        }
    }

    /// Reads once; false if nothing came within `wait`.
    fn fill(&mut self, wait: Duration) -> Answer<bool> {
        self.input.drain(..self.at);
        self.at = 0;
        self.stream.set_nonblocking(wait.is_zero())?;
        if !wait.is_zero() {
            self.stream.set_read_timeout(Some(wait))?;
        }
        let have = self.input.len();
        self.input.resize(have + (64 << 10), 0);
        let read = self.stream.read(&mut self.input[have..]);
        self.input.truncate(have + *read.as_ref().unwrap_or(&0));
        if wait.is_zero() {
            self.stream.set_nonblocking(false)?;
        }
        match read {
            Ok(0) => Err(ClientError::Gone(ErrorKind::UnexpectedEof.into())),
            Ok(_) => Ok(true),
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) =>
            {
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Takes one frame; `Some(None)` when it only was a part of something.
    fn next_frame(&mut self) -> Answer<Option<Option<Incoming>>> {
        let rest = &self.input[self.at..];
        let Some(head) = rest.first_chunk::<7>() else { return Ok(None) };
        let (kind, channel) = (head[0], u16::from_be_bytes([head[1], head[2]]));
        let size = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
        assert!(size <= FRAME_MAX, "the broker sent a frame of {size} bytes");
        let Some(&end) = rest.get(7 + size) else { return Ok(None) };
        assert_eq!(end, 0xCE, "the broker sent a frame without its end");
        let payload = rest[7..7 + size].to_vec();
        self.at += size + 8;
        match kind {
            1 => self.on_method(channel, &payload),
            2 => Ok(Some(self.on_header(&payload))),
            3 => Ok(Some(self.on_body(&payload))),
            8 => Ok(Some(None)),
            other => panic!("the broker sent a frame of type {other}"),
        }
    }

    fn on_method(&mut self, channel: u16, payload: &[u8]) -> Answer<Option<Option<Incoming>>> {
        use basic::AMQPMethod as B;
        let (rest, class) = parse_class(payload).expect("a method amq-protocol can read");
        assert!(rest.is_empty());
        assert!(self.pending.is_none(), "a method in the middle of content");
        match class {
            AMQPClass::Connection(connection::AMQPMethod::Close(close)) => {
                let _ = self.send(0, AMQPClass::Connection(connection::AMQPMethod::CloseOk(connection::CloseOk {})));
                Err(ClientError::Closed { code: close.reply_code, text: close.reply_text.to_string() })
            }
            AMQPClass::Channel(channel::AMQPMethod::Close(close)) => {
                self.send(channel, AMQPClass::Channel(channel::AMQPMethod::CloseOk(channel::CloseOk {})))?;
                Err(ClientError::Closed { code: close.reply_code, text: close.reply_text.to_string() })
            }
            AMQPClass::Basic(method @ (B::Deliver(_) | B::GetOk(_) | B::Return(_))) => {
                self.pending = Some(Pending { channel, method, properties: None, size: 0, body: Vec::new() });
                Ok(Some(None))
            }
            class => Ok(Some(Some(Incoming::Method(channel, class)))),
        }
    }

    fn on_header(&mut self, payload: &[u8]) -> Option<Incoming> {
        let pending = self.pending.as_mut().expect("a header after its method");
        pending.size = u64::from_be_bytes(payload[4..12].try_into().expect("8 bytes")) as usize;
        pending.properties = Some(parse_properties(&payload[12..]).expect("properties amq-protocol can read").1);
        self.complete()
    }

    fn on_body(&mut self, payload: &[u8]) -> Option<Incoming> {
        self.pending.as_mut().expect("a body after its header").body.extend_from_slice(payload);
        self.complete()
    }

    fn complete(&mut self) -> Option<Incoming> {
        let Pending { channel, method, properties, body, .. } =
            self.pending.take_if(|pending| pending.body.len() >= pending.size)?;
        let properties = properties.expect("a header came first");
        let delivery = |tag, redelivered, remaining| Delivery {
            channel,
            tag,
            redelivered,
            remaining,
            properties: properties.clone(),
            body,
        };
        Some(match method {
            basic::AMQPMethod::Deliver(deliver) => {
                Incoming::Delivery(delivery(deliver.delivery_tag, deliver.redelivered, None))
            }
            basic::AMQPMethod::GetOk(got) => {
                Incoming::Delivery(delivery(got.delivery_tag, got.redelivered, Some(got.message_count)))
            }
            _ => Incoming::Returned(properties.message_id().as_ref().map_or(String::new(), |id| id.to_string())),
        })
    }

    // Methods

    pub fn confirm_select(&mut self) -> Answer<()> {
        let select = AMQPClass::Confirm(confirm::AMQPMethod::Select(confirm::Select { nowait: false }));
        self.call(1, select, (85, 11), "confirm.select-ok").map(drop)
    }

    pub fn tx_select(&mut self) -> Answer<()> {
        self.call(1, AMQPClass::Tx(tx::AMQPMethod::Select(tx::Select {})), (90, 11), "tx.select-ok").map(drop)
    }

    pub fn tx_commit(&mut self) -> Answer<()> {
        self.call(1, AMQPClass::Tx(tx::AMQPMethod::Commit(tx::Commit {})), (90, 21), "tx.commit-ok").map(drop)
    }

    pub fn tx_rollback(&mut self) -> Answer<()> {
        self.call(1, AMQPClass::Tx(tx::AMQPMethod::Rollback(tx::Rollback {})), (90, 31), "tx.rollback-ok").map(drop)
    }

    pub fn recover(&mut self) -> Answer<()> {
        self.call(
            1,
            AMQPClass::Basic(basic::AMQPMethod::Recover(basic::Recover { requeue: true })),
            (60, 111),
            "basic.recover-ok",
        )
        .map(drop)
    }

    /// Declares a queue; answers its message count.
    pub fn declare_queue(&mut self, name: &str, durable: bool, passive: bool) -> Answer<u32> {
        let declare = queue::Declare { queue: name.into(), durable, passive, ..queue::Declare::default() };
        match self.call(1, AMQPClass::Queue(queue::AMQPMethod::Declare(declare)), (50, 11), "queue.declare-ok")? {
            AMQPClass::Queue(queue::AMQPMethod::DeclareOk(ok)) => Ok(ok.message_count),
            other => panic!("{other:?}"),
        }
    }

    /// Declares a durable queue with arguments.
    pub fn declare_queue_with(&mut self, name: &str, arguments: FieldTable) -> Answer<()> {
        let declare = queue::Declare { queue: name.into(), durable: true, arguments, ..queue::Declare::default() };
        self.call(1, AMQPClass::Queue(queue::AMQPMethod::Declare(declare)), (50, 11), "queue.declare-ok").map(drop)
    }

    pub fn delete_queue(&mut self, name: &str) -> Answer<()> {
        let delete = queue::Delete { queue: name.into(), ..queue::Delete::default() };
        self.call(1, AMQPClass::Queue(queue::AMQPMethod::Delete(delete)), (50, 41), "queue.delete-ok").map(drop)
    }

    pub fn purge_queue(&mut self, name: &str) -> Answer<u32> {
        let purge = queue::Purge { queue: name.into(), nowait: false };
        match self.call(1, AMQPClass::Queue(queue::AMQPMethod::Purge(purge)), (50, 31), "queue.purge-ok")? {
            AMQPClass::Queue(queue::AMQPMethod::PurgeOk(ok)) => Ok(ok.message_count),
            other => panic!("{other:?}"),
        }
    }

    pub fn declare_exchange(&mut self, name: &str, kind: &str, passive: bool) -> Answer<()> {
        let declare = exchange::Declare {
            exchange: name.into(),
            kind: kind.into(),
            durable: true,
            passive,
            ..exchange::Declare::default()
        };
        self.call(1, AMQPClass::Exchange(exchange::AMQPMethod::Declare(declare)), (40, 11), "exchange.declare-ok")
            .map(drop)
    }

    /// Declares a durable exchange with arguments.
    pub fn declare_exchange_with(&mut self, name: &str, kind: &str, arguments: FieldTable) -> Answer<()> {
        let declare = exchange::Declare {
            exchange: name.into(),
            kind: kind.into(),
            durable: true,
            arguments,
            ..exchange::Declare::default()
        };
        self.call(1, AMQPClass::Exchange(exchange::AMQPMethod::Declare(declare)), (40, 11), "exchange.declare-ok")
            .map(drop)
    }

    pub fn delete_exchange(&mut self, name: &str) -> Answer<()> {
        let delete = exchange::Delete { exchange: name.into(), ..exchange::Delete::default() };
        self.call(1, AMQPClass::Exchange(exchange::AMQPMethod::Delete(delete)), (40, 21), "exchange.delete-ok")
            .map(drop)
    }

    pub fn bind(&mut self, queue: &str, exchange: &str, key: &str) -> Answer<()> {
        let bind = queue::Bind {
            queue: queue.into(),
            exchange: exchange.into(),
            routing_key: key.into(),
            ..queue::Bind::default()
        };
        self.call(1, AMQPClass::Queue(queue::AMQPMethod::Bind(bind)), (50, 21), "queue.bind-ok").map(drop)
    }

    pub fn unbind(&mut self, queue: &str, exchange: &str, key: &str) -> Answer<()> {
        let unbind = queue::Unbind {
            queue: queue.into(),
            exchange: exchange.into(),
            routing_key: key.into(),
            arguments: FieldTable::default(),
        };
        self.call(1, AMQPClass::Queue(queue::AMQPMethod::Unbind(unbind)), (50, 51), "queue.unbind-ok").map(drop)
    }

    pub fn consume(&mut self, queue: &str, no_ack: bool, prefetch: u16) -> Answer<()> {
        self.consume_with(queue, no_ack, prefetch, FieldTable::default())
    }

    pub fn consume_with(&mut self, queue: &str, no_ack: bool, prefetch: u16, arguments: FieldTable) -> Answer<()> {
        self.qos(prefetch)?;
        let consume = basic::Consume {
            queue: queue.into(),
            consumer_tag: "c".into(),
            no_ack,
            arguments,
            ..basic::Consume::default()
        };
        self.call(1, AMQPClass::Basic(basic::AMQPMethod::Consume(consume)), (60, 21), "basic.consume-ok").map(drop)
    }

    /// Sets the prefetch of the consumers to come. When it is answered, what was sent before was handled.
    pub fn qos(&mut self, prefetch: u16) -> Answer<()> {
        let qos = basic::Qos { prefetch_count: prefetch, global: false };
        self.call(1, AMQPClass::Basic(basic::AMQPMethod::Qos(qos)), (60, 11), "basic.qos-ok").map(drop)
    }

    pub fn cancel(&mut self) -> Answer<()> {
        let cancel = basic::Cancel { consumer_tag: "c".into(), nowait: false };
        self.call(1, AMQPClass::Basic(basic::AMQPMethod::Cancel(cancel)), (60, 31), "basic.cancel-ok").map(drop)
    }

    /// `basic.get` with manual acks.
    pub fn get(&mut self, queue: &str) -> Answer<Option<Delivery>> {
        self.send(1, AMQPClass::Basic(basic::AMQPMethod::Get(basic::Get { queue: queue.into(), no_ack: false })))?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.receive_new(deadline.saturating_duration_since(Instant::now()))? {
                Some(Incoming::Delivery(delivery)) if delivery.remaining.is_some() => return Ok(Some(delivery)),
                Some(Incoming::Method(1, AMQPClass::Basic(basic::AMQPMethod::GetEmpty(_)))) => return Ok(None),
                Some(other) => self.backlog.push_back(other),
                None => return Err(ClientError::Hanging("basic.get-ok")),
            }
        }
    }

    pub fn queue_ack(&mut self, tag: u64, multiple: bool) {
        self.queue_method(1, AMQPClass::Basic(basic::AMQPMethod::Ack(basic::Ack { delivery_tag: tag, multiple })));
    }

    pub fn queue_requeue(&mut self, tag: u64) {
        self.queue_nack(tag, true);
    }

    pub fn queue_nack(&mut self, tag: u64, requeue: bool) {
        let nack = basic::Nack { delivery_tag: tag, multiple: false, requeue };
        self.queue_method(1, AMQPClass::Basic(basic::AMQPMethod::Nack(nack)));
    }

    pub fn queue_reject(&mut self, tag: u64, requeue: bool) {
        let reject = basic::Reject { delivery_tag: tag, requeue };
        self.queue_method(1, AMQPClass::Basic(basic::AMQPMethod::Reject(reject)));
    }

    /// Says goodbye and waits for the answer, so that everything sent before was handled.
    pub fn close(mut self) -> Answer<()> {
        let close = connection::Close { reply_code: 200, reply_text: "bye".into(), class_id: 0, method_id: 0 };
        self.call(0, AMQPClass::Connection(connection::AMQPMethod::Close(close)), (10, 51), "connection.close-ok")
            .map(drop)
    }
}

/// Makes a socket's end abrupt: a reset instead of a goodbye.
pub fn cut(socket: &TcpStream) {
    let _ = socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO));
    let _ = socket.shutdown(std::net::Shutdown::Both);
}

/// Random numbers that a seed repeats (splitmix64).
#[derive(Clone)]
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number of `range`.
    pub fn range(&mut self, range: std::ops::Range<u64>) -> u64 {
        range.start + self.next() % (range.end - range.start)
    }

    /// True once in `n`.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.next().is_multiple_of(n)
    }

    /// Another generator, for another thread.
    pub fn fork(&mut self) -> Rng {
        Rng(self.next())
    }
}
