//! Where deliveries leave the broker. A connection implements these traits over its outbox; the broker sees no frames.

use std::{pin::Pin, sync::Arc};

use crate::model::Name;

use super::{
    dead_letter::DeathReason,
    message::{Message, OwnedMessage},
    queue::ConnectionId,
};

/// A consumer's place on its connection: the channel, and the slot the session keeps for it there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    pub channel: u16,
    pub slot: u32,
}

/// A message handed to a [`DeliveryWriter`].
#[derive(Clone, Copy, Debug)]
pub struct Delivery<'a> {
    pub to: Address,
    /// The position in its queue's log; comes back with the settlement.
    pub seq: u64,
    pub redelivered: bool,
    pub message: Message<'a>,
}

/// What a writer did with a delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offer {
    Taken,
    /// The outbox is full, the channel's prefetch is used up or the channel's flow is off. The consumer gets nothing
    /// until the connection calls [`Queue::unblock`](super::queue::Queue::unblock).
    Blocked,
    /// The channel or the consumer is gone; its cancellation is on the way.
    Gone,
}

/// The inside of a locked outbox.
pub trait DeliveryWriter {
    /// Writes `basic.deliver` and its content, and remembers it as unacked unless the slot is no-ack.
    fn deliver(&mut self, delivery: &Delivery<'_>) -> Offer;

    /// [`DeliveryWriter::deliver`] of messages that stand side by side in their queue, `first` being the position of the first,
    /// and were never handed out; up to the first one that is not taken. Answers how many were, and what was done with the last
    /// one that was offered. For a no-ack consumer the position is of no account.
    fn deliver_run(&mut self, to: Address, first: u64, messages: &[Message<'_>]) -> (usize, Offer) {
        for (taken, (seq, &message)) in (first..).zip(messages).enumerate() {
            let offer = self.deliver(&Delivery { to, seq, redelivered: false, message });
            if offer != Offer::Taken {
                return (taken, offer);
            }
        }
        (messages.len(), Offer::Taken)
    }

    /// Whether so much waits for the connection's writer that whoever adds to it should let it catch up.
    fn is_behind(&self) -> bool {
        false
    }

    /// Writes `basic.get-ok` with `remaining` ready messages; never blocked.
    fn answer_get(&mut self, delivery: &Delivery<'_>, remaining: u64) -> Offer;
}

/// A connection as queues see it. Lock order: queue, then port, then leaf locks.
pub trait Port: Send + Sync {
    /// Runs `write` with the outbox locked. Answers whether the connection's writer has to be woken afterwards, by the
    /// caller, with [`Port::wake`], once no lock is held.
    fn with_writer(&self, write: &mut dyn FnMut(&mut dyn DeliveryWriter)) -> bool;

    /// Wakes the connection's writer.
    fn wake(&self);

    /// Waits until the connection's writer has taken what waits for it, if that is much.
    fn caught_up(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(std::future::ready(()))
    }

    /// Publishes the traces of what was delivered since the last call; answers whether there were any. Whoever has been
    /// told to call [`Port::wake`] may call this before; otherwise it is done later. No lock is held.
    fn publish_traces(&self, _effects: &mut Effects) -> bool {
        false
    }

    /// Tells the client that its consumer is gone (`basic.cancel`), if it wants to be told. No queue is locked.
    fn consumer_cancelled(&self, to: Address);

    /// A consumer did not settle in time, and what it held went back to its queue: it is cancelled if the client wants to be
    /// told of that, its channel is closed otherwise. No queue is locked.
    fn consumer_timed_out(&self, to: Address);

    /// The same for a `basic.get`, which can only be told by the end of its channel.
    fn get_timed_out(&self, to: Address);
}

/// How a message was had that was not settled in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimedOut {
    Consumer,
    Get,
}

/// A message that a queue gives up, on its way to the dead-letter exchange or the parking queue.
pub struct DyingMessage {
    pub queue: Arc<super::queue::Queue>,
    /// Its place in the queue, where it is held until its copies are made; `None` when it was taken out already.
    pub position: Option<u64>,
    pub body_bytes: u32,
    pub durable: bool,
    pub reason: DeathReason,
    /// Failed deliveries it has behind it.
    pub deliveries: u32,
    /// The dead-letter exchange, with the key that takes the place of the message's own; without one the message is parked.
    pub target: Option<(Name, Option<Name>)>,
    /// `None` when it has to be read from the store.
    pub message: Option<OwnedMessage>,
}

/// What a queue wants done once it is unlocked. Reused: [`Effects::is_empty`] between uses.
#[derive(Default)]
pub struct Effects {
    /// Whose doing it is; the broker's own if it is no connection's.
    pub on_behalf_of: Option<ConnectionId>,
    /// Ports whose writers have something to write.
    pub wakes: Vec<Arc<dyn Port>>,
    /// Queues to be deleted because their last consumer has left.
    pub unused: Vec<Arc<super::queue::Queue>>,
    /// A queue that was published to has consumers and a backlog: its publisher should let them catch up for a moment.
    pub congested: bool,
    /// The connection of a consumer that was given more than its writer keeps up with: its publisher should let it catch up,
    /// or the queue has to keep what could have gone straight through.
    pub behind: Option<Arc<dyn Port>>,
    /// Queues that gave up the lock with deliveries still possible.
    pub again: Vec<Arc<super::queue::Queue>>,
    /// Messages to be dead-lettered.
    pub dead: Vec<DyingMessage>,
    /// Consumers that did not settle in time.
    pub timed_out: Vec<(Arc<dyn Port>, Address, TimedOut)>,
    /// Queues nobody has used for longer than they may be unused.
    pub expired: Vec<Arc<super::queue::Queue>>,
}

impl Effects {
    /// Whether nothing is left to do.
    pub fn is_empty(&self) -> bool {
        self.wakes.is_empty()
            && self.unused.is_empty()
            && self.again.is_empty()
            && self.dead.is_empty()
            && self.timed_out.is_empty()
            && self.expired.is_empty()
    }

    /// Publishes the traces of deliveries; answers whether there were any, which may have caused more.
    pub fn publish_traces(&mut self) -> bool {
        let mut ports = std::mem::take(&mut self.wakes);
        let mut any = false;
        for port in &ports {
            any |= port.publish_traces(self);
        }
        ports.append(&mut self.wakes);
        self.wakes = ports;
        any
    }

    /// Carries out what needs no broker: continues cut deliveries and wakes writers. What only a broker can do is dropped.
    pub fn deliver_and_wake(&mut self) {
        while let Some(queue) = self.again.pop() {
            queue.deliver(self);
        }
        for port in self.wakes.drain(..) {
            port.wake();
        }
    }
}
