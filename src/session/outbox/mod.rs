//! The way out of a connection: its write buffer and, per channel, the next delivery tag, the unacked ring and the
//! confirm ledger. Queues deliver into it from any thread; the connection's writer takes the buffer out.
//!
//! # Locks
//! One mutex, after every queue's. Under it only leaf locks are taken (the store's list of waiters).

mod channel;
mod deliver;

use std::{
    pin::Pin,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use amq_protocol::protocol::{AMQPClass, basic};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

pub use self::channel::{Remains, SettleBatch, Settler, Unblocked};

use self::{
    channel::{ChannelOut, Slot},
    deliver::{Template, content},
};
use super::{channel_map::ChannelMap, unacked::Unacked, write_buffer::WriteBuffer};
use crate::{
    broker::{
        Address, Broker, ConsumerId, DeliveryWriter, Effects, EventProperties, Message, Origin, Port, Queue, Round,
        TracedDelivery, WatermarkListener,
    },
    model::Name,
    wire::{encode, method},
};

/// Bytes after which consumers of the connection are blocked until the writer has caught up.
pub const HIGH_WATER_BYTES: usize = 512 << 10;
/// Bytes after which publishers let the writer catch up, so that what they publish next finds room.
const BEHIND_BYTES: usize = HIGH_WATER_BYTES / 2;
/// Memory that a busy connection's buffers keep: the mark, and what one read can add to it.
const BUSY_BUFFER_BYTES: usize = HIGH_WATER_BYTES + (512 << 10);
/// Bytes waiting for a client from which on nothing is read from it: answers, returns and confirms are bounded by that,
/// as deliveries are by the high-water mark.
const CLOGGED_BYTES: usize = 4 << 20;
/// Bytes after which direct replies to the connection are dropped.
const REPLY_LIMIT_BYTES: usize = 64 << 20;
/// What is written at once while the writer rests: more is worth a second core.
const AT_ONCE_BYTES: usize = 32 << 10;
/// Memory an idle connection's buffers may keep.
const IDLE_BUFFER_BYTES: usize = 4 << 10;

/// Writes to the socket what it takes without waiting, and answers how much that was.
pub type DirectWrite = Box<dyn Fn(&[u8]) -> usize + Send + Sync>;

struct Inner {
    out: WriteBuffer,
    template: Template,
    channels: ChannelMap<ChannelOut>,
    frame_max: u32,
    /// Consumers wait for the writer.
    full: bool,
    listening: bool,
    cancel_notify: bool,
    wake_pending: bool,
    /// The writer has taken something out that it may not have written yet.
    writing: bool,
    /// The writer sleeps, and has given the buffer's memory back.
    rested: bool,
    closed: bool,
    /// The deliveries of the present turn are traced.
    tracing: bool,
    traces: Vec<TracedDelivery>,
}

/// See the module.
pub struct Outbox {
    inner: Mutex<Inner>,
    writable: Notify,
    /// The writer has taken much.
    caught_up: Notify,
    closed: AtomicBool,
    finished: AtomicBool,
    /// Channels on which a consumer did not settle in time.
    timed_out: Mutex<Vec<u16>>,
    attention: OnceLock<Box<dyn Fn() + Send + Sync>>,
    direct_write: OnceLock<DirectWrite>,
    origin: OnceLock<Arc<Origin>>,
    /// Deliveries were noted that are to be traced.
    has_traces: AtomicBool,
    /// The session has said something that nobody may have sent.
    unsent: AtomicBool,
    /// The session has said something since [`Outbox::is_clogged`] found little.
    grown: AtomicBool,
    broker: Arc<Broker>,
    this: Weak<Outbox>,
}

impl Outbox {
    /// An outbox with no channel but channel 0.
    pub fn new(broker: Arc<Broker>) -> Arc<Self> {
        Arc::new_cyclic(|this| Outbox {
            inner: Mutex::new(Inner {
                out: WriteBuffer::default(),
                template: Template::default(),
                channels: ChannelMap::default(),
                frame_max: 8192,
                full: false,
                listening: false,
                cancel_notify: false,
                wake_pending: false,
                writing: false,
                rested: false,
                closed: false,
                tracing: false,
                traces: Vec::new(),
            }),
            writable: Notify::new(),
            caught_up: Notify::new(),
            closed: AtomicBool::new(false),
            finished: AtomicBool::new(false),
            timed_out: Mutex::default(),
            attention: OnceLock::new(),
            direct_write: OnceLock::new(),
            origin: OnceLock::new(),
            has_traces: AtomicBool::new(false),
            unsent: AtomicBool::new(false),
            grown: AtomicBool::new(false),
            broker,
            this: this.clone(),
        })
    }

    /// This outbox as queues see it.
    pub fn port(&self) -> Option<Arc<dyn Port>> {
        self.this.upgrade().map(|this| this as Arc<dyn Port>)
    }

    /// Gives the connection its name in events and traces.
    pub fn set_origin(&self, origin: Arc<Origin>) {
        let _ = self.origin.set(origin);
    }

    /// Whether [`Port::publish_traces`] has something to do.
    pub fn has_traces(&self) -> bool {
        self.has_traces.load(Ordering::Relaxed)
    }

    /// Has `call` called when [`Outbox::take_timed_out`] has something to answer.
    pub fn on_attention(&self, call: Box<dyn Fn() + Send + Sync>) {
        let _ = self.attention.set(call);
    }

    /// Writes what waits if that is little and the writer rests: to wake another thread for it would cost more than the write.
    /// Answers whether nothing is left.
    fn write_at_once(&self, inner: &mut Inner) -> bool {
        let is_little = inner.out.is_plain() && (1..=AT_ONCE_BYTES).contains(&inner.out.len());
        if is_little
            && !inner.writing
            && !inner.full
            && let Some(write) = self.direct_write.get()
        {
            let written = write(&inner.out.bytes);
            inner.out.bytes.drain(..written);
            if std::mem::take(&mut inner.rested) {
                self.writable.notify_one(); // it gives the buffer's memory back when nothing comes any more
            }
        }
        inner.out.is_empty()
    }

    /// Has what waits written: at once, or by the writer.
    fn send(&self) {
        let done = {
            let mut inner = self.inner.lock();
            let done = self.write_at_once(&mut inner);
            inner.wake_pending &= !done;
            done
        };
        if !done {
            self.writable.notify_one();
        }
    }

    /// Has `write` called for what is little enough to be written at once, on whatever thread, while the writer rests.
    pub fn on_little(&self, write: DirectWrite) {
        let _ = self.direct_write.set(write);
    }

    /// The channels that have to be closed because a consumer did not settle in time.
    pub fn take_timed_out(&self) -> Vec<u16> {
        std::mem::take(&mut *self.timed_out.lock())
    }

    /// Takes over what the handshake has settled.
    pub fn negotiated(&self, frame_max: u32, cancel_notify: bool) {
        let mut inner = self.inner.lock();
        inner.frame_max = frame_max;
        inner.cancel_notify = cancel_notify;
    }

    /// Locks it for the session to say something, which [`Outbox::wake_if_needed`] has sent.
    #[inline]
    fn speak(&self) -> MutexGuard<'_, Inner> {
        let inner = self.inner.lock();
        // Under the lock: whoever takes a mark away before he locks finds what it was set for.
        self.unsent.store(true, Ordering::Relaxed);
        self.grown.store(true, Ordering::Relaxed);
        inner
    }

    /// Appends ready-made bytes. The caller wakes the writer.
    pub fn push(&self, bytes: &[u8]) {
        self.speak().out.bytes.extend_from_slice(bytes);
    }

    /// Appends a method frame. The caller wakes the writer.
    pub fn push_method(&self, channel: u16, class: &AMQPClass) {
        method::write(&mut self.speak().out.bytes, channel, class);
    }

    /// Bytes that wait for the writer.
    pub fn waiting_bytes(&self) -> usize {
        self.inner.lock().out.len()
    }

    /// Whether so much waits for the client that nothing more should be read from it. Deliveries have a mark of their own, so
    /// that of a session which has said nothing is not looked at.
    #[inline]
    pub fn is_clogged(&self) -> bool {
        if !self.grown.load(Ordering::Relaxed) {
            return false;
        }
        let inner = self.inner.lock();
        let is_clogged = inner.out.len() > CLOGGED_BYTES;
        self.grown.store(is_clogged, Ordering::Relaxed);
        is_clogged
    }

    /// Swaps the waiting bytes into `batch`, which is empty; `false` when nothing waits.
    pub fn take(&self, batch: &mut WriteBuffer) -> bool {
        let mut inner = self.inner.lock();
        inner.wake_pending = false;
        inner.writing = !inner.out.is_empty();
        if !inner.writing {
            return false;
        }
        std::mem::swap(&mut inner.out, batch);
        drop(inner);
        if batch.len() >= BEHIND_BYTES {
            self.caught_up.notify_waiters();
        }
        true
    }

    /// Keeps a written buffer for the next batch.
    pub fn recycle(&self, batch: &mut WriteBuffer) {
        batch.clear(BUSY_BUFFER_BYTES);
        let mut inner = self.inner.lock();
        if inner.out.is_empty() && inner.out.bytes.capacity() == 0 {
            std::mem::swap(&mut inner.out, batch);
        }
    }

    /// Gives the buffers' memory back but for a little: the connection has fallen idle.
    pub fn rest(&self, batch: &mut WriteBuffer) {
        batch.clear(0);
        let mut inner = self.inner.lock();
        inner.rested = true;
        if inner.out.is_empty() {
            inner.out.bytes.shrink_to(IDLE_BUFFER_BYTES);
        }
    }

    /// The writer has caught up: lets the consumers go on that waited for it.
    pub fn refill(&self) {
        let mut unblocked = Vec::new();
        {
            let mut inner = self.inner.lock();
            if !std::mem::take(&mut inner.full) {
                return;
            }
            for (_, channel) in inner.channels.iter_mut() {
                channel.take_blocked(&mut unblocked);
            }
        }
        let mut effects = Effects::default();
        for (queue, consumer) in unblocked {
            queue.unblock(consumer, &mut effects);
        }
        self.broker.carry_out(&mut effects);
    }

    /// Nothing follows what waits now: the writer writes it and ends.
    pub fn finish(&self) {
        self.finished.store(true, Ordering::Release);
        self.writable.notify_one();
    }

    pub fn is_finished(&self) -> bool {
        self.finished.load(Ordering::Acquire)
    }

    /// Wakes the writer.
    pub fn wake_writer(&self) {
        self.writable.notify_one();
    }

    /// Has written what the session has said, if nobody has done so.
    #[inline]
    pub fn wake_if_needed(&self) {
        if self.unsent.load(Ordering::Relaxed) {
            self.unsent.store(false, Ordering::Relaxed);
            self.send_if_needed();
        }
    }

    fn send_if_needed(&self) {
        let wake = {
            let mut inner = self.inner.lock();
            let waits = !inner.out.is_empty() && !inner.wake_pending && !self.write_at_once(&mut inner);
            inner.wake_pending |= waits;
            waits
        };
        if wake {
            self.wake_writer();
        }
    }

    /// Waits until somebody has woken the writer.
    pub async fn writable(&self) {
        self.writable.notified().await;
    }

    /// Drops everything and refuses what comes; the connection is gone.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        let mut inner = self.inner.lock();
        inner.closed = true;
        inner.out = WriteBuffer::default();
        self.writable.notify_one();
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Opens a channel.
    pub fn open_channel(&self, channel: u16) {
        self.inner.lock().channels.insert(channel, ChannelOut::default());
    }

    /// Stops deliveries, returns and confirms on a channel and answers what has to be cleaned up. The channel's entry
    /// is gone afterwards.
    pub fn close_channel(&self, channel: u16) -> Remains {
        let closed = self.inner.lock().channels.remove(channel);
        closed.map(ChannelOut::into_remains).unwrap_or_default()
    }

    /// Closes every channel.
    pub fn close_channels(&self) -> Vec<Remains> {
        let channels = self.inner.lock().channels.take_all();
        channels.into_iter().map(|(_, channel)| channel.into_remains()).collect()
    }

    /// Whether the tag names a consumer of the channel.
    pub fn has_tag(&self, channel: u16, tag: &str) -> bool {
        self.inner.lock().channels.get(channel).is_some_and(|channel| channel.tags.contains_key(tag))
    }

    /// Reserves a slot for a consumer. Nothing is delivered to it before [`Outbox::start_consumer`].
    pub fn add_consumer(&self, channel: u16, tag: &Name, queue: Option<Arc<Queue>>, no_ack: bool) -> Option<u32> {
        let mut inner = self.inner.lock();
        let channel = inner.channels.get_mut(channel)?;
        let len = tag.len().min(255);
        let short_tag = [&[len as u8], &tag.as_bytes()[..len]].concat();
        let slot = Slot { queue, consumer: None, tag: short_tag, no_ack, started: false, cancelled: false, unacked: 0 };
        let index = channel.add_slot(slot);
        channel.tags.insert(tag.clone(), index);
        Some(index)
    }

    /// Announces the consumer (unless `no_wait`) and lets deliveries follow; the caller then kicks the queue.
    pub fn start_consumer(&self, channel: u16, slot: u32, consumer: Option<ConsumerId>, tag: &Name, no_wait: bool) {
        let mut guard = self.speak();
        let inner = &mut *guard;
        inner.template.to = None; // it may be of an earlier consumer in the same slot
        let Some(out) = inner.channels.get_mut(channel) else { return };
        if !no_wait {
            let consumer_tag = short(tag);
            method::write(
                &mut inner.out.bytes,
                channel,
                &AMQPClass::Basic(basic::AMQPMethod::ConsumeOk(basic::ConsumeOk { consumer_tag })),
            );
        }
        if let Some(Some(slot)) = out.slots.get_mut(slot as usize) {
            slot.consumer = consumer;
            slot.started = true;
        }
        out.blocked.retain(|&blocked| blocked != slot);
    }

    /// Takes a consumer off its channel, after a failed `basic.consume` or for a cancellation; its deliveries stay.
    pub fn remove_consumer(&self, channel: u16, tag: &str) -> Option<(Option<Arc<Queue>>, Option<ConsumerId>)> {
        let mut inner = self.inner.lock();
        let channel = inner.channels.get_mut(channel)?;
        let index = channel.tags.remove(tag)?;
        let slot = channel.slots.get_mut(index as usize)?.as_mut()?;
        slot.cancelled = true;
        let owner = (slot.queue.clone(), slot.consumer);
        channel.release_slot(index);
        Some(owner)
    }

    /// A slot for a `basic.get` from `queue`; given back by [`Outbox::end_get`].
    pub fn begin_get(&self, channel: u16, queue: &Arc<Queue>, no_ack: bool) -> Option<u32> {
        let mut inner = self.inner.lock();
        let channel = inner.channels.get_mut(channel)?;
        let same = |slot: &Slot| {
            slot.cancelled
                && slot.consumer.is_none()
                && slot.no_ack == no_ack
                && slot.queue.as_ref().is_some_and(|of| Arc::ptr_eq(of, queue))
        };
        // Gets of one queue share the slot that their unacked deliveries keep.
        if let Some(index) = channel.slots.iter().rposition(|slot| slot.as_ref().is_some_and(same)) {
            return Some(index as u32);
        }
        Some(channel.add_slot(Slot {
            queue: Some(queue.clone()),
            consumer: None,
            tag: Vec::new(),
            no_ack,
            started: true,
            cancelled: true,
            unacked: 0,
        }))
    }

    /// Ends what [`Outbox::begin_get`] began.
    pub fn end_get(&self, channel: u16, slot: u32) {
        if let Some(channel) = self.inner.lock().channels.get_mut(channel) {
            channel.release_slot(slot);
        }
    }

    /// The bound on unacked deliveries of a whole channel; 0 is none.
    pub fn channel_prefetch(&self, channel: u16) -> u16 {
        self.inner.lock().channels.get(channel).map_or(0, |out| out.prefetch)
    }

    /// Sets the channel-wide prefetch and answers consumers that may go on.
    pub fn set_channel_prefetch(&self, channel: u16, prefetch: u16) -> Unblocked {
        let mut unblocked = Vec::new();
        if let Some(channel) = self.inner.lock().channels.get_mut(channel) {
            channel.prefetch = prefetch;
            channel.take_blocked(&mut unblocked);
        }
        unblocked
    }

    /// Locks the outbox to settle a run of deliveries of one channel.
    pub fn settler(&self, channel: u16) -> Settler<'_> {
        Settler { inner: self.inner.lock(), channel }
    }

    /// Takes every unacked delivery of a channel, for `basic.recover`.
    pub fn take_unacked(&self, channel: u16, batch: &mut SettleBatch) {
        if let Some(out) = self.inner.lock().channels.get_mut(channel) {
            let all: Vec<Unacked> = out.unacked.drain().collect();
            out.note_settled(channel, &all, batch);
            out.take_blocked(&mut batch.unblocked);
        }
    }

    /// Puts deliveries back that a rolled-back transaction had settled.
    pub fn restore_unacked(&self, channel: u16, unacked: Vec<Unacked>) {
        if let Some(out) = self.inner.lock().channels.get_mut(channel) {
            out.unacked.restore(unacked);
        }
    }

    /// Sorts deliveries that a transaction has settled into `batch`.
    pub fn settle_taken(&self, channel: u16, unacked: &[Unacked], batch: &mut SettleBatch) {
        if let Some(out) = self.inner.lock().channels.get_mut(channel) {
            out.note_settled(channel, unacked, batch);
            if out.prefetch > 0 {
                out.take_blocked(&mut batch.unblocked);
            }
        }
    }

    /// Notes publishes up to `last` that are durable with `round`, and answers what needs no waiting.
    pub fn confirm(&self, channel: u16, last: u64, round: Round) {
        let mut guard = self.speak();
        let inner = &mut *guard;
        if let Some(out) = inner.channels.get_mut(channel) {
            out.confirms.published(last, round, channel, &mut inner.out.bytes);
            if round > 0 {
                self.listen(inner);
            }
        }
    }

    /// Nacks publishes up to `last`.
    pub fn refuse(&self, channel: u16, last: u64) {
        let mut guard = self.speak();
        let inner = &mut *guard;
        if let Some(out) = inner.channels.get_mut(channel) {
            out.confirms.refused(last, channel, &mut inner.out.bytes);
        }
    }

    /// Asks the store to call when the first waiting publish is durable; answers at once what already is.
    fn listen(&self, inner: &mut Inner) {
        while !inner.listening && !inner.closed {
            let first = inner.channels.iter().filter_map(|(_, channel)| channel.confirms.first_round()).min();
            let (Some(round), Some(this)) = (first, self.this.upgrade()) else { return };
            let this: Arc<dyn WatermarkListener> = this;
            inner.listening = self.broker.when_durable(round, &this);
            if !inner.listening {
                self.settle_confirms(inner, self.broker.watermark());
            }
        }
    }

    fn settle_confirms(&self, inner: &mut Inner, watermark: Round) {
        let Inner { out, channels, .. } = inner;
        for (number, channel) in channels.iter_mut() {
            channel.confirms.settle(watermark, |round| self.broker.is_failed(round), number, &mut out.bytes);
        }
    }

    /// Writes `basic.return` for an unroutable message.
    pub fn return_message(&self, channel: u16, message: &Message<'_>) {
        let mut guard = self.speak();
        let inner = &mut *guard;
        encode::basic_return_no_route(&mut inner.out.bytes, channel, message.names);
        content(&mut inner.out, channel, message, inner.frame_max);
    }
}

impl Outbox {
    /// Notes that a consumer has gone with its queue.
    fn note_consumer_gone(&self, channel: u16, queue: &Queue, tag: &str) {
        let (Some(origin), events) = (self.origin.get(), self.broker.events()) else { return };
        events.note("consumer.deleted", || {
            EventProperties::default()
                .text("queue", &*queue.options.name)
                .text("vhost", &*queue.options.vhost)
                .text("consumer_tag", tag)
                .text("channel", events.channel_pid(origin.connection, channel))
        });
    }
}

fn short(text: &str) -> amq_protocol::types::ShortString {
    let cut = &text[..text.floor_char_boundary(255)];
    amq_protocol::types::ShortString::try_new(cut).unwrap_or_default()
}

impl Port for Outbox {
    #[inline]
    fn with_writer(&self, write: &mut dyn FnMut(&mut dyn DeliveryWriter)) -> bool {
        let tracing = self.origin.get().is_some_and(|origin| origin.vhost.is_tracing());
        let mut inner = self.inner.lock();
        inner.tracing = tracing;
        write(&mut *inner);
        let has_traces = tracing && !inner.traces.is_empty();
        if has_traces {
            self.has_traces.store(true, Ordering::Relaxed);
        }
        !inner.out.is_empty() && !std::mem::replace(&mut inner.wake_pending, true) || has_traces
    }

    fn wake(&self) {
        if self.has_traces()
            && let Some(this) = self.port()
        {
            self.broker.events().hand_over_traces(this);
        }
        self.send();
    }

    fn caught_up(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async {
            let taken = self.caught_up.notified();
            // What is taken from now on is noticed; what was taken before is not waited for.
            if self.waiting_bytes() >= BEHIND_BYTES {
                taken.await;
            }
        })
    }

    fn publish_traces(&self, effects: &mut Effects) -> bool {
        if !self.has_traces() || !self.has_traces.swap(false, Ordering::Relaxed) {
            return false;
        }
        let traces = std::mem::take(&mut self.inner.lock().traces);
        if let Some(origin) = self.origin.get() {
            traces.iter().for_each(|trace| origin.trace_delivery(&self.broker, trace, effects));
        }
        !traces.is_empty()
    }

    fn consumer_cancelled(&self, to: Address) {
        let mut guard = self.inner.lock();
        let inner = &mut *guard;
        let Some(out) = inner.channels.get_mut(to.channel) else { return };
        let Some(tag) = out.tags.iter().find(|(_, slot)| **slot == to.slot).map(|(tag, _)| tag.clone()) else { return };
        out.tags.remove(&tag);
        if let Some(Some(slot)) = out.slots.get_mut(to.slot as usize) {
            slot.cancelled = true;
            if let Some(queue) = &slot.queue {
                self.note_consumer_gone(to.channel, queue, &tag);
            }
        }
        out.release_slot(to.slot);
        if inner.cancel_notify {
            let cancel = basic::Cancel { consumer_tag: short(&tag), nowait: true };
            method::write(&mut inner.out.bytes, to.channel, &AMQPClass::Basic(basic::AMQPMethod::Cancel(cancel)));
            drop(guard);
            self.wake();
        }
    }

    fn consumer_timed_out(&self, to: Address) {
        let mut guard = self.inner.lock();
        let inner = &mut *guard;
        if !inner.cancel_notify {
            drop(guard);
            self.get_timed_out(to);
            return;
        }
        let Some(out) = inner.channels.get_mut(to.channel) else { return };
        // The tag stays taken: the consumer comes back once the client has settled what it holds.
        if let Some(tag) = out.tags.iter().find(|(_, slot)| **slot == to.slot).map(|(tag, _)| tag.clone()) {
            let cancel = basic::Cancel { consumer_tag: short(&tag), nowait: true };
            method::write(&mut inner.out.bytes, to.channel, &AMQPClass::Basic(basic::AMQPMethod::Cancel(cancel)));
            drop(guard);
            self.wake();
        }
    }

    fn get_timed_out(&self, to: Address) {
        self.timed_out.lock().push(to.channel);
        if let Some(call) = self.attention.get() {
            call();
        }
    }
}

impl WatermarkListener for Outbox {
    fn on_watermark(&self, watermark: Round, few: bool) {
        let mut guard = self.inner.lock();
        let inner = &mut *guard;
        inner.listening = false;
        self.settle_confirms(inner, watermark);
        self.listen(inner);
        let waits = !inner.out.is_empty() && !inner.wake_pending;
        let wake = waits && !(few && self.write_at_once(inner));
        inner.wake_pending |= wake;
        drop(guard);
        if wake {
            self.wake_writer();
        }
    }
}
