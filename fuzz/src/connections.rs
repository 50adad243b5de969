//! Connections that send frames, and what the broker answers.

use amq_protocol::protocol::{AMQPClass, basic, channel, confirm, exchange, parse_class, queue, tx};
use leveret::{
    model::properties::Properties,
    session::{Phase, Session, Step, WriteBuffer, WriteCursor},
};

use super::{
    Choices, FRAME_MAX, Lab, MAX_MESSAGE_BYTES,
    traffic::{
        TAME_EXCHANGES, TAME_QUEUES, push_handshake, push_known_settlement, push_method, push_odd_handshake,
        push_something,
    },
};

/// What a connection may hold for a client that does not read, beside one message and its frames.
const MAX_WAITING_BYTES: usize = (1 << 20) + 2 * MAX_MESSAGE_BYTES as usize;

/// One connection, from its side of the socket.
pub(super) struct Wire<'a> {
    session: Session,
    carry: Vec<u8>,
    unread: Vec<u8>,
    lab: &'a Lab,
    /// What is inside the frames has to be right, too.
    strict: bool,
    /// Channels the broker has closed.
    closed: Vec<u16>,
    /// Deliveries that were read.
    tags: Vec<(u16, u64)>,
}

impl<'a> Wire<'a> {
    pub(super) fn new(session: Session, lab: &'a Lab, strict: bool) -> Wire<'a> {
        Wire { session, carry: Vec::new(), unread: Vec::new(), lab, strict, closed: Vec::new(), tags: Vec::new() }
    }

    /// Hands bytes over as `net` does; false when the connection has ended.
    pub(super) fn receive(&mut self, bytes: &[u8]) -> bool {
        self.carry.extend_from_slice(bytes);
        let mut turns = 0;
        loop {
            turns += 1;
            assert!(turns < 10_000 + bytes.len(), "a batch does not end");
            let (used, step) = self.session.feed(&self.carry);
            assert!(used <= self.carry.len());
            self.carry.drain(..used);
            let waiting = self.session.outbox().waiting_bytes();
            assert!(waiting <= MAX_WAITING_BYTES, "{waiting} bytes wait for a client that does not read");
            match step {
                Step::More => return true,
                Step::Await => futures_lite::future::block_on(self.session.wait()),
                Step::Drain => self.read(),
                Step::Flush => {
                    self.read();
                    return false;
                }
                Step::Drop { .. } => return false,
            }
        }
    }

    /// Reads everything the broker has written; it must be frames that another implementation understands.
    pub(super) fn read(&mut self) {
        let outbox = self.session.outbox().clone();
        let mut batch = WriteBuffer::default();
        for _ in 0..10_000 {
            if !outbox.take(&mut batch) {
                return;
            }
            let mut cursor = WriteCursor::default();
            while let Some(written) = cursor.slices(&batch, |slices| {
                slices.iter().for_each(|slice| self.unread.extend_from_slice(slice));
                slices.iter().map(|slice| slice.len()).sum()
            }) {
                cursor.advance(&batch, written);
            }
            outbox.recycle(&mut batch);
            outbox.refill();
            let strict = self.strict;
            let mut said = self.lab.said.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            each_frame(&self.unread, &mut |kind, channel, payload| match kind {
                1 if strict => {
                    let (rest, class) = parse_class(payload).expect("the broker writes methods that others can read");
                    assert!(rest.is_empty());
                    *said.entry((class.get_amqp_class_id(), class.get_amqp_method_id())).or_default() += 1;
                    match class {
                        AMQPClass::Channel(channel::AMQPMethod::Close(_)) => {
                            self.closed.push(channel);
                            self.tags.retain(|(of, _)| *of != channel);
                        }
                        AMQPClass::Basic(basic::AMQPMethod::Deliver(deliver)) => {
                            self.tags.push((channel, deliver.delivery_tag))
                        }
                        AMQPClass::Basic(basic::AMQPMethod::GetOk(got)) => self.tags.push((channel, got.delivery_tag)),
                        _ => {}
                    }
                }
                2 if strict => {
                    let _ = Properties::parse(&payload[12..]).expect("the broker writes properties that can be read");
                }
                _ => {}
            });
            drop(said);
            self.unread.clear();
            self.unread.shrink_to(64 << 10);
        }
        panic!("the broker does not stop talking");
    }
}

impl Drop for Wire<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.session.release();
            self.session.outbox().close();
            self.lab.broker.sweep();
        }
    }
}

/// Connections that send frames: valid ones, wrong ones, in any order and in any pieces.
pub fn frames(lab: &Lab, data: &[u8]) {
    let mut choices = Choices::new(data);
    let mut wires: Vec<Wire<'_>> = (0..1 + choices.below(3)).map(|_| Wire::new(lab.session(), lab, true)).collect();
    let mut out = Vec::new();
    for wire in &mut wires {
        out.clear();
        match choices.one_in(12) {
            true => (0..choices.below(6)).for_each(|_| push_odd_handshake(&mut out, &mut choices)),
            false => push_handshake(&mut out, &mut choices),
        }
        if !wire.receive(&out) {
            return;
        }
    }
    let (tame, mut steps) = (choices.flag(), 0);
    if tame {
        lab.tidy();
        out.clear();
        match choices.below(4) {
            0 => push_method(&mut out, 1, &AMQPClass::Tx(tx::AMQPMethod::Select(tx::Select {}))),
            1 => push_method(
                &mut out,
                1,
                &AMQPClass::Confirm(confirm::AMQPMethod::Select(confirm::Select { nowait: true })),
            ),
            _ => {}
        }
        for queue in TAME_QUEUES {
            let declare = queue::Declare { queue: queue.into(), durable: queue != "q3", ..queue::Declare::default() };
            push_method(&mut out, 1, &AMQPClass::Queue(queue::AMQPMethod::Declare(declare)));
        }
        for (exchange, kind) in TAME_EXCHANGES {
            let declare = exchange::Declare {
                exchange: exchange.into(),
                kind: kind.into(),
                durable: true,
                ..exchange::Declare::default()
            };
            push_method(&mut out, 1, &AMQPClass::Exchange(exchange::AMQPMethod::Declare(declare)));
            let bind = queue::Bind {
                queue: "q1".into(),
                exchange: exchange.into(),
                routing_key: "a.b.c".into(),
                ..queue::Bind::default()
            };
            push_method(&mut out, 1, &AMQPClass::Queue(queue::AMQPMethod::Bind(bind)));
        }
        if !wires[0].receive(&out) {
            return;
        }
    }
    while !choices.is_empty() && !wires.is_empty() && steps < 200 {
        steps += 1;
        let at = choices.below(wires.len());
        out.clear();
        for channel in std::mem::take(&mut wires[at].closed) {
            if tame || choices.flag() {
                push_method(&mut out, channel, &AMQPClass::Channel(channel::AMQPMethod::CloseOk(channel::CloseOk {})));
                push_method(&mut out, channel, &AMQPClass::Channel(channel::AMQPMethod::Open(channel::Open {})));
            }
        }
        for _ in 0..1 + choices.below(6) {
            push_something(&mut out, &mut choices, tame);
            if tame && choices.flag() && !wires[at].tags.is_empty() {
                push_known_settlement(&mut out, &mut choices, &mut wires[at].tags);
            }
        }
        let mut alive = true;
        let mut rest = out.as_slice();
        while alive && !rest.is_empty() {
            let cut = if choices.flag() { rest.len() } else { 1 + choices.below(65_536) % rest.len() };
            let (now, later) = rest.split_at(cut);
            alive = wires[at].receive(now);
            rest = later;
        }
        // Not everyone reads at once.
        if choices.flag() {
            wires[at].read();
        }
        if alive && choices.one_in(30) {
            let reason = leveret::session::CloseReason::new(320, "enough");
            wires[at].session.close(&reason);
        }
        if !alive || wires[at].session.phase() == Phase::Closed {
            wires.swap_remove(at);
        }
    }
    wires.iter_mut().for_each(Wire::read);
    drop(wires);
    if choices.one_in(4) || lab.queue_count() > 20 {
        lab.tidy();
    }
}

/// Walks over frames, whose envelopes must be right.
pub(super) fn each_frame(mut bytes: &[u8], each: &mut dyn FnMut(u8, u16, &[u8])) {
    while !bytes.is_empty() {
        let head = bytes.first_chunk::<7>().expect("the broker writes whole frames");
        let size = u32::from_be_bytes([head[3], head[4], head[5], head[6]]) as usize;
        assert!(matches!(head[0], 1 | 2 | 3 | 8), "a frame of type {}", head[0]);
        assert!(size + 8 <= FRAME_MAX as usize, "a frame larger than agreed");
        assert_eq!(bytes.get(7 + size), Some(&0xCE), "a frame without its end");
        each(head[0], u16::from_be_bytes([head[1], head[2]]), &bytes[7..7 + size]);
        bytes = &bytes[8 + size..];
    }
}
