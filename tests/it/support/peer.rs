//! A client that speaks frames, for what a client library would hide.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex, Weak},
    time::Duration,
};

use amq_protocol::{
    protocol::{AMQPClass, BasicProperties, basic, channel, confirm, connection, exchange, parse_class, queue, tx},
    types::FieldTable,
};
use tokio::{net::TcpStream, time::timeout};

use super::{
    LIMIT,
    frames::{self, Frame},
};

pub use amq_protocol::protocol::queue::Declare;

/// A message as it arrived, by deliver, get or return.
#[derive(Clone, Debug, PartialEq)]
pub struct Delivered {
    pub consumer: String,
    pub tag: u64,
    pub redelivered: bool,
    pub exchange: String,
    pub key: String,
    /// Of get-ok.
    pub remaining: u32,
    pub properties: BasicProperties,
    pub body: Vec<u8>,
}

impl Delivered {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }
}

/// Every open socket, so that a broker that is stopped need not wait for peers that do not listen any more.
static SOCKETS: Mutex<Vec<(SocketAddr, Weak<TcpStream>)>> = Mutex::new(Vec::new());

/// Ends all connections to `broker`.
pub fn hang_up(broker: SocketAddr) {
    SOCKETS.lock().unwrap().retain(|(address, socket)| {
        let Some(socket) = socket.upgrade() else { return false };
        if *address == broker {
            let _ = socket2::SockRef::from(&*socket).shutdown(std::net::Shutdown::Both);
        }
        *address != broker
    });
}

/// See the module.
pub struct Peer {
    socket: Arc<TcpStream>,
    read: Vec<u8>,
    /// Of `read`, what was handed out.
    at: usize,
    pub frame_max: usize,
}

impl Peer {
    pub async fn connect(address: SocketAddr) -> Peer {
        let socket = Arc::new(TcpStream::connect(address).await.unwrap());
        socket.set_nodelay(true).unwrap();
        SOCKETS.lock().unwrap().push((address, Arc::downgrade(&socket)));
        Peer { socket, read: Vec::new(), at: 0, frame_max: 131_072 }
    }

    pub async fn write(&mut self, bytes: &[u8]) {
        timeout(LIMIT, self.try_write(bytes)).await.expect("the broker does not read").unwrap();
    }

    /// Writes as long as the broker reads.
    pub async fn try_write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.socket.try_write(bytes) {
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.socket.writable().await?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    async fn read_block(&mut self) -> io::Result<usize> {
        let mut block = [0; 64 << 10];
        loop {
            match self.socket.try_read(&mut block) {
                Ok(read) => {
                    self.read.extend_from_slice(&block[..read]);
                    return Ok(read);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.socket.readable().await?,
                Err(error) => return Err(error),
            }
        }
    }

    pub async fn send(&mut self, channel: u16, class: AMQPClass) {
        self.write(&frames::method(channel, &class)).await;
    }

    /// The next frame; `None` at the end of the connection.
    pub async fn frame_or_end(&mut self) -> Option<Frame> {
        loop {
            let read = &self.read[self.at..];
            if read.len() >= 7 {
                let size = u32::from_be_bytes(read[3..7].try_into().unwrap()) as usize;
                if read.len() >= size + 8 {
                    assert_eq!(read[size + 7], frames::END, "no frame end");
                    assert!(size + 8 <= self.frame_max.max(8192), "a frame over frame_max");
                    let channel = u16::from_be_bytes([read[1], read[2]]);
                    let frame = Frame { kind: read[0], channel, payload: read[7..size + 7].to_vec() };
                    self.at += size + 8;
                    return Some(frame);
                }
            }
            self.read.drain(..std::mem::take(&mut self.at));
            match timeout(LIMIT, self.read_block()).await.expect("the broker says nothing") {
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }

    /// The next frame that is no heartbeat.
    pub async fn frame(&mut self) -> Frame {
        loop {
            let frame = self.frame_or_end().await.expect("the connection has ended");
            if frame.kind != frames::HEARTBEAT {
                return frame;
            }
        }
    }

    /// The next frame, which is a method of `channel`.
    pub async fn method(&mut self, channel: u16) -> AMQPClass {
        let frame = self.frame().await;
        assert_eq!(frame.kind, frames::METHOD, "{frame:?}");
        let (_, class) = parse_class(frame.payload.as_slice()).unwrap();
        assert_eq!(frame.channel, channel, "{class:?}");
        class
    }

    /// Sends a method and reads its answer.
    pub async fn call(&mut self, channel: u16, class: AMQPClass) -> AMQPClass {
        self.send(channel, class).await;
        self.method(channel).await
    }

    pub async fn open_channel(&mut self, number: u16) {
        let answer = self.call(number, AMQPClass::Channel(channel::AMQPMethod::Open(channel::Open {}))).await;
        assert!(matches!(answer, AMQPClass::Channel(channel::AMQPMethod::OpenOk(_))), "{answer:?}");
    }

    pub async fn close_channel(&mut self, number: u16) {
        let close = channel::Close { reply_code: 200, reply_text: "bye".into(), class_id: 0, method_id: 0 };
        let answer = self.call(number, AMQPClass::Channel(channel::AMQPMethod::Close(close))).await;
        assert!(matches!(answer, AMQPClass::Channel(channel::AMQPMethod::CloseOk(_))), "{answer:?}");
    }

    /// Closes the connection cleanly.
    pub async fn close(mut self) {
        self.send(0, close_method()).await;
        let answer = self.method(0).await;
        assert!(matches!(answer, AMQPClass::Connection(connection::AMQPMethod::CloseOk(_))), "{answer:?}");
        assert_eq!(self.frame_or_end().await, None);
    }

    /// The next method, whatever channel it is on.
    pub async fn method_of_any_channel(&mut self) -> AMQPClass {
        parse_class(self.frame().await.payload.as_slice()).unwrap().1
    }

    /// A round trip; fails if anything else comes first. After it, all that was sent before was handled.
    pub async fn nothing_more(&mut self, number: u16) {
        let answer =
            self.call(number, AMQPClass::Channel(channel::AMQPMethod::Flow(channel::Flow { active: true }))).await;
        assert!(matches!(answer, AMQPClass::Channel(channel::AMQPMethod::FlowOk(_))), "{answer:?}");
    }

    /// A round trip past whatever is being delivered.
    pub async fn nothing_more_but_deliveries(&mut self, number: u16) {
        self.send(number, AMQPClass::Channel(channel::AMQPMethod::Flow(channel::Flow { active: true }))).await;
        loop {
            let frame = self.frame().await;
            if frame.kind == frames::METHOD && frame.payload[..4] == [0, 20, 0, 21] {
                return;
            }
        }
    }

    pub async fn select_confirms(&mut self, number: u16) {
        let answer =
            self.call(number, AMQPClass::Confirm(confirm::AMQPMethod::Select(confirm::Select { nowait: false }))).await;
        assert!(matches!(answer, AMQPClass::Confirm(confirm::AMQPMethod::SelectOk(_))), "{answer:?}");
    }

    pub async fn select_tx(&mut self, number: u16) {
        let answer = self.call(number, AMQPClass::Tx(tx::AMQPMethod::Select(tx::Select {}))).await;
        assert!(matches!(answer, AMQPClass::Tx(tx::AMQPMethod::SelectOk(_))), "{answer:?}");
    }

    pub async fn commit(&mut self, number: u16) {
        let answer = self.call(number, AMQPClass::Tx(tx::AMQPMethod::Commit(tx::Commit {}))).await;
        assert!(matches!(answer, AMQPClass::Tx(tx::AMQPMethod::CommitOk(_))), "{answer:?}");
    }

    pub async fn rollback(&mut self, number: u16) {
        let answer = self.call(number, AMQPClass::Tx(tx::AMQPMethod::Rollback(tx::Rollback {}))).await;
        assert!(matches!(answer, AMQPClass::Tx(tx::AMQPMethod::RollbackOk(_))), "{answer:?}");
    }

    /// Declares and answers name, ready messages and consumers.
    pub async fn declare(&mut self, number: u16, declare: Declare) -> (String, u32, u32) {
        match self.call(number, AMQPClass::Queue(queue::AMQPMethod::Declare(declare))).await {
            AMQPClass::Queue(queue::AMQPMethod::DeclareOk(ok)) => {
                (ok.queue.to_string(), ok.message_count, ok.consumer_count)
            }
            other => panic!("no declare-ok: {other:?}"),
        }
    }

    pub async fn declare_exchange(&mut self, number: u16, name: &str, kind: &str, arguments: FieldTable) {
        let declare = exchange::Declare { exchange: name.into(), kind: kind.into(), arguments, ..Default::default() };
        let answer = self.call(number, AMQPClass::Exchange(exchange::AMQPMethod::Declare(declare))).await;
        assert!(matches!(answer, AMQPClass::Exchange(exchange::AMQPMethod::DeclareOk(_))), "{answer:?}");
    }

    pub async fn bind(&mut self, number: u16, queue: &str, exchange: &str, key: &str, arguments: FieldTable) {
        let bind = queue::Bind {
            queue: queue.into(),
            exchange: exchange.into(),
            routing_key: key.into(),
            nowait: false,
            arguments,
        };
        let answer = self.call(number, AMQPClass::Queue(queue::AMQPMethod::Bind(bind))).await;
        assert!(matches!(answer, AMQPClass::Queue(queue::AMQPMethod::BindOk(_))), "{answer:?}");
    }

    /// Ready messages and consumers.
    pub async fn depth(&mut self, number: u16, name: &str) -> (u32, u32) {
        let (_, ready, consumers) =
            self.declare(number, Declare { queue: name.into(), passive: true, ..Default::default() }).await;
        (ready, consumers)
    }

    /// Publishes to a queue through the default exchange, transient.
    pub async fn publish(&mut self, number: u16, queue: &str, body: impl AsRef<[u8]>) {
        self.publish_to(number, "", queue, &BasicProperties::default(), body).await;
    }

    /// [`Peer::publish`], persistent.
    pub async fn publish_persistent(&mut self, number: u16, queue: &str, body: impl AsRef<[u8]>) {
        self.publish_to(number, "", queue, &super::persistent(), body).await;
    }

    pub async fn publish_to(
        &mut self,
        number: u16,
        exchange: &str,
        key: &str,
        properties: &BasicProperties,
        body: impl AsRef<[u8]>,
    ) {
        let max = self.frame_max - 8;
        self.write(&frames::content(number, exchange, key, false, properties, body.as_ref(), max)).await;
    }

    pub async fn publish_mandatory(
        &mut self,
        number: u16,
        exchange: &str,
        key: &str,
        properties: &BasicProperties,
        body: impl AsRef<[u8]>,
    ) {
        let max = self.frame_max - 8;
        self.write(&frames::content(number, exchange, key, true, properties, body.as_ref(), max)).await;
    }

    /// The next ack or nack of publishes: the last one, whether earlier ones are meant too, whether it is an ack.
    async fn answer(&mut self, number: u16) -> (u64, bool, bool) {
        match self.method(number).await {
            AMQPClass::Basic(basic::AMQPMethod::Ack(ack)) => (ack.delivery_tag, ack.multiple, true),
            AMQPClass::Basic(basic::AMQPMethod::Nack(nack)) => (nack.delivery_tag, nack.multiple, false),
            other => panic!("no confirm: {other:?}"),
        }
    }

    /// The next ack or nack, when one publish is outstanding: its number, whether it is an ack.
    pub async fn confirm(&mut self, number: u16) -> (u64, bool) {
        let (seq, _, acked) = self.answer(number).await;
        (seq, acked)
    }

    /// Reads confirms until every publish of `seqs` is answered; answers whether each was acked. Others are answered
    /// already.
    pub async fn confirms(&mut self, number: u16, seqs: impl IntoIterator<Item = u64>) -> Vec<bool> {
        let mut answers: BTreeMap<u64, Option<bool>> = seqs.into_iter().map(|seq| (seq, None)).collect();
        while answers.values().any(Option::is_none) {
            let (last, multiple, acked) = self.answer(number).await;
            let first = if multiple { 0 } else { last };
            let mut answered = 0;
            for (_, answer) in answers.range_mut(first..=last).filter(|(_, answer)| answer.is_none()) {
                *answer = Some(acked);
                answered += 1;
            }
            assert!(answered > 0, "{last} was answered before");
        }
        answers.into_values().flatten().collect()
    }

    pub async fn qos(&mut self, number: u16, prefetch: u16, global: bool) {
        let qos = basic::Qos { prefetch_count: prefetch, global };
        let answer = self.call(number, AMQPClass::Basic(basic::AMQPMethod::Qos(qos))).await;
        assert!(matches!(answer, AMQPClass::Basic(basic::AMQPMethod::QosOk(_))), "{answer:?}");
    }

    /// Consumes with the queue's name as the tag.
    pub async fn consume(&mut self, number: u16, queue: &str, no_ack: bool) {
        self.consume_as(
            number,
            basic::Consume { queue: queue.into(), consumer_tag: queue.into(), no_ack, ..Default::default() },
        )
        .await;
    }

    pub async fn consume_as(&mut self, number: u16, consume: basic::Consume) -> String {
        match self.call(number, AMQPClass::Basic(basic::AMQPMethod::Consume(consume))).await {
            AMQPClass::Basic(basic::AMQPMethod::ConsumeOk(ok)) => ok.consumer_tag.to_string(),
            other => panic!("no consume-ok: {other:?}"),
        }
    }

    pub async fn cancel(&mut self, number: u16, tag: &str) {
        let cancel = basic::Cancel { consumer_tag: tag.into(), nowait: false };
        let answer = self.call(number, AMQPClass::Basic(basic::AMQPMethod::Cancel(cancel))).await;
        assert!(matches!(answer, AMQPClass::Basic(basic::AMQPMethod::CancelOk(_))), "{answer:?}");
    }

    /// The next delivery.
    pub async fn delivery(&mut self, number: u16) -> Delivered {
        match self.method(number).await {
            AMQPClass::Basic(basic::AMQPMethod::Deliver(deliver)) => self.delivered(number, deliver).await,
            other => panic!("no delivery: {other:?}"),
        }
    }

    async fn delivered(&mut self, number: u16, deliver: basic::Deliver) -> Delivered {
        let (properties, body) = self.content(number).await;
        Delivered {
            consumer: deliver.consumer_tag.to_string(),
            tag: deliver.delivery_tag,
            redelivered: deliver.redelivered,
            exchange: deliver.exchange.to_string(),
            key: deliver.routing_key.to_string(),
            remaining: 0,
            properties,
            body,
        }
    }

    /// Commit-ok and `count` deliveries, in whatever order.
    pub async fn deliveries_around_commit_ok(&mut self, number: u16, count: usize) -> Vec<Delivered> {
        let (mut deliveries, mut committed) = (Vec::new(), false);
        while !committed || deliveries.len() < count {
            match self.method(number).await {
                AMQPClass::Basic(basic::AMQPMethod::Deliver(deliver)) => {
                    deliveries.push(self.delivered(number, deliver).await)
                }
                AMQPClass::Tx(tx::AMQPMethod::CommitOk(_)) => committed = true,
                other => panic!("{other:?}"),
            }
        }
        deliveries
    }

    pub async fn get(&mut self, number: u16, queue: &str, no_ack: bool) -> Option<Delivered> {
        match self
            .call(number, AMQPClass::Basic(basic::AMQPMethod::Get(basic::Get { queue: queue.into(), no_ack })))
            .await
        {
            AMQPClass::Basic(basic::AMQPMethod::GetEmpty(_)) => None,
            AMQPClass::Basic(basic::AMQPMethod::GetOk(ok)) => {
                let (properties, body) = self.content(number).await;
                Some(Delivered {
                    consumer: String::new(),
                    tag: ok.delivery_tag,
                    redelivered: ok.redelivered,
                    exchange: ok.exchange.to_string(),
                    key: ok.routing_key.to_string(),
                    remaining: ok.message_count,
                    properties,
                    body,
                })
            }
            other => panic!("no get-ok: {other:?}"),
        }
    }

    /// The next method, a basic.return: code, text and the message.
    pub async fn returned(&mut self, number: u16) -> (u16, String, Delivered) {
        match self.method(number).await {
            AMQPClass::Basic(basic::AMQPMethod::Return(back)) => {
                let (properties, body) = self.content(number).await;
                let message = Delivered {
                    consumer: String::new(),
                    tag: 0,
                    redelivered: false,
                    exchange: back.exchange.to_string(),
                    key: back.routing_key.to_string(),
                    remaining: 0,
                    properties,
                    body,
                };
                (back.reply_code, back.reply_text.to_string(), message)
            }
            other => panic!("no return: {other:?}"),
        }
    }

    async fn content(&mut self, number: u16) -> (BasicProperties, Vec<u8>) {
        let header = self.frame().await;
        assert_eq!((header.kind, header.channel), (frames::HEADER, number));
        let size = u64::from_be_bytes(header.payload[4..12].try_into().unwrap()) as usize;
        let (rest, properties) = basic::parse_properties(&header.payload[12..]).unwrap();
        assert!(rest.is_empty());
        let mut body = Vec::with_capacity(size);
        while body.len() < size {
            let piece = self.frame().await;
            assert_eq!((piece.kind, piece.channel), (frames::BODY, number));
            body.extend(piece.payload);
        }
        assert_eq!(body.len(), size);
        (properties, body)
    }

    pub async fn ack(&mut self, number: u16, tag: u64, multiple: bool) {
        self.send(number, AMQPClass::Basic(basic::AMQPMethod::Ack(basic::Ack { delivery_tag: tag, multiple }))).await;
    }

    pub async fn nack(&mut self, number: u16, tag: u64, multiple: bool, requeue: bool) {
        self.send(
            number,
            AMQPClass::Basic(basic::AMQPMethod::Nack(basic::Nack { delivery_tag: tag, multiple, requeue })),
        )
        .await;
    }

    pub async fn reject(&mut self, number: u16, tag: u64, requeue: bool) {
        self.send(number, AMQPClass::Basic(basic::AMQPMethod::Reject(basic::Reject { delivery_tag: tag, requeue })))
            .await;
    }

    /// The next method closes the channel with this; the channel is then free again.
    pub async fn expect_channel_error(&mut self, number: u16, code: u16, text: &str) {
        match self.method(number).await {
            AMQPClass::Channel(channel::AMQPMethod::Close(close)) => {
                assert_eq!((close.reply_code, close.reply_text.as_str()), (code, text));
            }
            other => panic!("no channel.close: {other:?}"),
        }
        self.send(number, AMQPClass::Channel(channel::AMQPMethod::CloseOk(channel::CloseOk {}))).await;
    }

    /// The next method closes the connection with this, and the socket ends after close-ok.
    pub async fn expect_connection_error(mut self, code: u16, text: &str) {
        match self.method(0).await {
            AMQPClass::Connection(connection::AMQPMethod::Close(close)) => {
                assert_eq!((close.reply_code, close.reply_text.as_str()), (code, text));
            }
            other => panic!("no connection.close: {other:?}"),
        }
        self.send(0, AMQPClass::Connection(connection::AMQPMethod::CloseOk(connection::CloseOk {}))).await;
        assert_eq!(self.frame_or_end().await, None);
    }

    /// The next frame, or nothing if there is none for that long.
    pub async fn frame_or_end_within(&mut self, limit: Duration) -> Option<Frame> {
        timeout(limit, self.frame_or_end()).await.ok().flatten()
    }

    /// Every byte until the connection ends.
    pub async fn rest(&mut self) -> Vec<u8> {
        while timeout(LIMIT, self.read_block()).await.expect("the connection goes on").unwrap_or(0) > 0 {}
        self.read.split_off(self.at)
    }

    /// [`Peer::expect_drop`], within `limit`.
    pub async fn expect_drop_after(&mut self, limit: Duration) {
        let took = self.expect_drop().await;
        assert!(took < limit, "{took:?}");
    }

    /// The socket ends without a word. Answers how long that took.
    pub async fn expect_drop(&mut self) -> Duration {
        let begun = std::time::Instant::now();
        let frame = self.frame_or_end().await;
        assert_eq!(frame, None, "expected the end of the connection");
        begun.elapsed()
    }
}

pub fn close_method() -> AMQPClass {
    let close = connection::Close { reply_code: 200, reply_text: "bye".into(), class_id: 0, method_id: 0 };
    AMQPClass::Connection(connection::AMQPMethod::Close(close))
}

/// A queue that outlives a restart.
pub fn durable(name: &str) -> Declare {
    Declare { queue: name.into(), durable: true, ..Default::default() }
}

/// A queue that does not.
pub fn transient(name: &str) -> Declare {
    Declare { queue: name.into(), ..Default::default() }
}

pub fn exclusive(name: &str) -> Declare {
    Declare { queue: name.into(), exclusive: true, ..Default::default() }
}

pub fn auto_delete(name: &str) -> Declare {
    Declare { queue: name.into(), auto_delete: true, ..Default::default() }
}
