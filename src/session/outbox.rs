//! The way out of a connection: its write buffer and, per channel, the next delivery tag, the unacked ring and the
//! confirm ledger. Queues deliver into it from any thread; the connection's writer takes the buffer out.
//!
//! # Locks
//! One mutex, after every queue's. Under it only leaf locks are taken (the store's list of waiters).

use std::sync::{
    Arc, Weak,
    atomic::{AtomicBool, Ordering},
};

use ahash::AHashMap;
use amq_protocol::protocol::{AMQPClass, basic};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;

use super::{
    channel_map::ChannelMap,
    confirms::ConfirmLedger,
    unacked::{Unacked, UnackedRing, UnknownDeliveryTag},
    write_buffer::WriteBuffer,
};
use crate::{
    broker::{
        Address, Body, Broker, ConsumerId, Delivery, DeliveryWriter, Effects, Message, Offer, Port, Queue, Round,
        Settled, WatermarkListener,
    },
    model::Name,
    wire::{encode, frame::FRAME_END, method},
};

/// Bytes after which consumers of the connection are blocked until the writer has caught up.
pub const HIGH_WATER_BYTES: usize = 512 << 10;
/// Bytes after which direct replies to the connection are dropped.
const REPLY_LIMIT_BYTES: usize = 64 << 20;
/// Memory an idle connection's buffers may keep.
const IDLE_BUFFER_BYTES: usize = 4 << 10;

/// A consumer, or the target of a `basic.get`, on its channel.
struct Slot {
    queue: Option<Arc<Queue>>,
    consumer: Option<ConsumerId>,
    /// The consumer tag as a short string.
    tag: Vec<u8>,
    no_ack: bool,
    /// `basic.consume-ok` is in the buffer, so deliveries may follow.
    started: bool,
    cancelled: bool,
    unacked: u32,
}

#[derive(Default)]
struct ChannelOut {
    last_tag: u64,
    unacked: UnackedRing,
    slots: Vec<Option<Slot>>,
    free_slots: Vec<u32>,
    tags: AHashMap<Name, u32>,
    /// Unacked deliveries of the whole channel; 0 is unlimited. `basic.qos` with `global`.
    prefetch: u16,
    blocked: Vec<u32>,
    confirms: ConfirmLedger,
    closing: bool,
}

/// The frames of the last delivery up to its body: the next one mostly differs in nothing but its tag.
#[derive(Default)]
struct Template {
    to: Option<Address>,
    names_len: usize,
    properties_len: usize,
    body_len: usize,
    redelivered: bool,
    tag_at: usize,
    names_at: usize,
    properties_at: usize,
    bytes: Vec<u8>,
}

impl Template {
    #[inline]
    fn fits(&self, delivery: &Delivery<'_>) -> bool {
        let message = &delivery.message;
        self.to == Some(delivery.to)
            && self.body_len == message.body.len()
            && self.redelivered == delivery.redelivered
            && self.bytes[self.names_at..self.names_at + self.names_len] == *message.names
            && self.bytes[self.properties_at..self.properties_at + self.properties_len] == *message.properties
    }

    /// Takes over the frames just written: `written` begins with the method frame and ends before the body's bytes.
    fn remember(&mut self, delivery: &Delivery<'_>, written: &[u8], consumer_tag_len: usize) {
        let message = &delivery.message;
        self.to = Some(delivery.to);
        self.body_len = message.body.len();
        self.redelivered = delivery.redelivered;
        self.names_len = message.names.len();
        self.properties_len = message.properties.len();
        self.tag_at = 11 + consumer_tag_len;
        self.names_at = self.tag_at + 9;
        // Method frame end, header frame head, class, weight and body size stand between.
        self.properties_at = self.names_at + self.names_len + 1 + 7 + 12;
        self.bytes.clear();
        self.bytes.extend_from_slice(written);
    }
}

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
    closed: bool,
}

/// See the module.
pub struct Outbox {
    inner: Mutex<Inner>,
    writable: Notify,
    closed: AtomicBool,
    finished: AtomicBool,
    broker: Arc<Broker>,
    this: Weak<Outbox>,
}

/// Consumers that may have become able to take deliveries: their queues have to be told, with nothing locked.
pub type Unblocked = Vec<(Arc<Queue>, ConsumerId)>;

/// Settlements sorted into runs of one queue and consumer. Reused between batches.
#[derive(Default)]
pub struct SettleBatch {
    pub deliveries: Vec<Settled>,
    /// Queue, consumer and the end of the run in `deliveries`.
    pub runs: Vec<(Arc<Queue>, Option<ConsumerId>, usize)>,
    last_slot: Option<(u16, u32)>,
    pub unblocked: Unblocked,
}

impl SettleBatch {
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty() && self.unblocked.is_empty()
    }

    /// Empties the batch, keeping its memory.
    pub fn clear(&mut self) {
        self.deliveries.clear();
        self.deliveries.shrink_to(16 << 10);
        self.runs.clear();
        self.unblocked.clear();
        self.last_slot = None;
    }
}

/// What a closing channel leaves behind.
#[derive(Default)]
pub struct Remains {
    pub consumers: Vec<(Arc<Queue>, ConsumerId)>,
    /// Unacked deliveries by queue, oldest first, to be requeued.
    pub unacked: Vec<(Arc<Queue>, Vec<Settled>)>,
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
                closed: false,
            }),
            writable: Notify::new(),
            closed: AtomicBool::new(false),
            finished: AtomicBool::new(false),
            broker,
            this: this.clone(),
        })
    }

    /// This outbox as queues see it.
    pub fn port(&self) -> Option<Arc<dyn Port>> {
        self.this.upgrade().map(|this| this as Arc<dyn Port>)
    }

    /// Takes over what the handshake has settled.
    pub fn negotiated(&self, frame_max: u32, cancel_notify: bool) {
        let mut inner = self.inner.lock();
        inner.frame_max = frame_max;
        inner.cancel_notify = cancel_notify;
    }

    /// Appends ready-made bytes. The caller wakes the writer.
    pub fn push(&self, bytes: &[u8]) {
        self.inner.lock().out.bytes.extend_from_slice(bytes);
    }

    /// Appends a method frame. The caller wakes the writer.
    pub fn push_method(&self, channel: u16, class: &AMQPClass) {
        method::write(&mut self.inner.lock().out.bytes, channel, class);
    }

    /// Whether bytes wait for the writer.
    pub fn has_output(&self) -> bool {
        !self.inner.lock().out.is_empty()
    }

    /// Bytes that wait for the writer.
    pub fn waiting_bytes(&self) -> usize {
        self.inner.lock().out.len()
    }

    /// Swaps the waiting bytes into `batch`, which is empty; `false` when nothing waits.
    pub fn take(&self, batch: &mut WriteBuffer) -> bool {
        let mut inner = self.inner.lock();
        inner.wake_pending = false;
        if inner.out.is_empty() {
            return false;
        }
        std::mem::swap(&mut inner.out, batch);
        true
    }

    /// Keeps a written buffer for the next batch.
    pub fn recycle(&self, batch: &mut WriteBuffer) {
        batch.clear(HIGH_WATER_BYTES);
        let mut inner = self.inner.lock();
        if inner.out.is_empty() && inner.out.bytes.capacity() == 0 {
            std::mem::swap(&mut inner.out, batch);
        }
    }

    /// Gives the buffers' memory back but for a little: the connection has fallen idle.
    pub fn rest(&self, batch: &mut WriteBuffer) {
        batch.clear(0);
        let mut inner = self.inner.lock();
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

    /// Wakes the writer if it has something to write and nobody has woken it.
    pub fn wake_if_needed(&self) {
        let wake = {
            let mut inner = self.inner.lock();
            !inner.out.is_empty() && !std::mem::replace(&mut inner.wake_pending, true)
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

    /// Consumers on a channel.
    pub fn consumer_count(&self, channel: u16) -> usize {
        self.inner.lock().channels.get(channel).map_or(0, |channel| channel.tags.len())
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
        let mut guard = self.inner.lock();
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
            all.iter().for_each(|unacked| out.note_settled(channel, unacked, batch));
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
            unacked.iter().for_each(|unacked| out.note_settled(channel, unacked, batch));
            if out.prefetch > 0 {
                out.take_blocked(&mut batch.unblocked);
            }
        }
    }

    /// Notes publishes up to `last` that are durable with `round`, and answers what needs no waiting.
    pub fn confirm(&self, channel: u16, last: u64, round: Round) {
        let mut guard = self.inner.lock();
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
        let mut guard = self.inner.lock();
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
        let mut guard = self.inner.lock();
        let inner = &mut *guard;
        encode::basic_return_no_route(&mut inner.out.bytes, channel, message.names);
        content(&mut inner.out, channel, message, inner.frame_max);
    }
}

fn short(text: &str) -> amq_protocol::types::ShortString {
    let cut = &text[..text.floor_char_boundary(255)];
    amq_protocol::types::ShortString::try_new(cut).unwrap_or_default()
}

/// Content header and body.
#[inline]
fn content(out: &mut WriteBuffer, channel: u16, message: &Message<'_>, frame_max: u32) {
    encode::content_header(&mut out.bytes, channel, message.body.len() as u64, message.properties);
    match message.body {
        Body::Inline(body) => encode::body_frames(&mut out.bytes, channel, body, frame_max),
        Body::Shared(body) => out.body_frames(channel, body, frame_max),
    }
}

/// A locked outbox, settling deliveries of one channel.
pub struct Settler<'a> {
    inner: MutexGuard<'a, Inner>,
    channel: u16,
}

impl Settler<'_> {
    /// Settles into `batch`.
    ///
    /// # Errors
    /// [`UnknownDeliveryTag`]; nothing of this call is then settled.
    #[inline]
    pub fn settle(&mut self, tag: u64, multiple: bool, batch: &mut SettleBatch) -> Result<(), UnknownDeliveryTag> {
        let Some(out) = self.inner.channels.get_mut(self.channel) else { return Err(UnknownDeliveryTag(tag)) };
        let ChannelOut { unacked, slots, free_slots, .. } = out;
        unacked.settle(tag, multiple, |unacked| note_settled(slots, free_slots, self.channel, &unacked, batch))?;
        if out.prefetch > 0 {
            out.take_blocked(&mut batch.unblocked);
        }
        Ok(())
    }

    /// Takes deliveries out without settling them yet, for a transaction.
    ///
    /// # Errors
    /// [`UnknownDeliveryTag`].
    pub fn take(&mut self, tag: u64, multiple: bool, taken: &mut Vec<Unacked>) -> Result<(), UnknownDeliveryTag> {
        let Some(out) = self.inner.channels.get_mut(self.channel) else { return Err(UnknownDeliveryTag(tag)) };
        out.unacked.settle(tag, multiple, |unacked| taken.push(unacked))
    }
}

#[inline]
fn note_settled(
    slots: &mut [Option<Slot>],
    free: &mut Vec<u32>,
    channel: u16,
    unacked: &Unacked,
    batch: &mut SettleBatch,
) {
    let Some(entry) = slots.get_mut(unacked.slot as usize) else { return };
    let Some(slot) = entry.as_mut() else { return };
    slot.unacked = slot.unacked.saturating_sub(1);
    batch.deliveries.push(Settled { seq: unacked.seq, body_bytes: unacked.body_bytes, persistent: unacked.persistent });
    let end = batch.deliveries.len();
    match batch.runs.last_mut() {
        Some(run) if batch.last_slot == Some((channel, unacked.slot)) => run.2 = end,
        _ => {
            let Some(queue) = slot.queue.clone() else { return };
            batch.runs.push((queue, slot.consumer, end));
            batch.last_slot = Some((channel, unacked.slot));
        }
    }
    if slot.cancelled && slot.unacked == 0 {
        *entry = None;
        free.push(unacked.slot);
        batch.last_slot = None;
    }
}

impl ChannelOut {
    fn add_slot(&mut self, slot: Slot) -> u32 {
        match self.free_slots.pop() {
            Some(index) => {
                self.slots[index as usize] = Some(slot);
                index
            }
            None => {
                self.slots.push(Some(slot));
                self.slots.len() as u32 - 1
            }
        }
    }

    /// Frees a slot that no consumer and no delivery uses.
    fn release_slot(&mut self, index: u32) {
        let Some(entry) = self.slots.get_mut(index as usize) else { return };
        if entry.as_ref().is_some_and(|slot| slot.cancelled && slot.unacked == 0) {
            *entry = None;
            self.free_slots.push(index);
            self.blocked.retain(|&blocked| blocked != index);
        }
    }

    fn note_settled(&mut self, channel: u16, unacked: &Unacked, batch: &mut SettleBatch) {
        note_settled(&mut self.slots, &mut self.free_slots, channel, unacked, batch);
    }

    fn take_blocked(&mut self, unblocked: &mut Unblocked) {
        for index in std::mem::take(&mut self.blocked) {
            if let Some(Some(Slot { queue: Some(queue), consumer: Some(consumer), .. })) =
                self.slots.get(index as usize)
            {
                unblocked.push((queue.clone(), *consumer));
            }
        }
    }

    fn into_remains(mut self) -> Remains {
        let mut remains = Remains::default();
        let mut by_slot: Vec<Vec<Settled>> = Vec::new();
        by_slot.resize_with(self.slots.len(), Vec::new);
        for unacked in self.unacked.drain() {
            if let Some(deliveries) = by_slot.get_mut(unacked.slot as usize) {
                deliveries.push(Settled {
                    seq: unacked.seq,
                    body_bytes: unacked.body_bytes,
                    persistent: unacked.persistent,
                });
            }
        }
        for (slot, deliveries) in self.slots.into_iter().zip(by_slot) {
            let Some(Slot { queue: Some(queue), consumer, cancelled, .. }) = slot else { continue };
            if let (Some(consumer), false) = (consumer, cancelled) {
                remains.consumers.push((queue.clone(), consumer));
            }
            if !deliveries.is_empty() {
                remains.unacked.push((queue, deliveries));
            }
        }
        remains
    }
}

impl Inner {
    #[inline]
    fn offer(&mut self, delivery: &Delivery<'_>, get_remaining: Option<u64>) -> Offer {
        let is_full = self.out.len() >= HIGH_WATER_BYTES;
        let Address { channel: number, slot: index } = delivery.to;
        let Some(channel) = self.channels.get_mut(number) else { return Offer::Gone };
        if channel.closing || self.closed {
            return Offer::Gone;
        }
        let Some(Some(slot)) = channel.slots.get_mut(index as usize) else { return Offer::Gone };
        let message = &delivery.message;
        let limited = !slot.no_ack && channel.prefetch > 0 && channel.unacked.len() >= usize::from(channel.prefetch);
        if slot.queue.is_none() {
            // A direct reply: there is no queue to hold it back in, so only a requester that does not read loses some.
            if self.out.len() >= REPLY_LIMIT_BYTES {
                return Offer::Gone;
            }
        } else if get_remaining.is_none() && (is_full || limited || !slot.started) {
            self.full |= is_full;
            channel.blocked.push(index);
            return Offer::Blocked;
        }
        channel.last_tag += 1;
        let tag = channel.last_tag;
        if !slot.no_ack {
            slot.unacked += 1;
            channel.unacked.push(Unacked::new(tag, delivery.seq, index, message.body.len(), message.persistent));
        }
        let start = self.out.bytes.len();
        match (get_remaining, message.body) {
            (None, Body::Inline(body))
                if !body.is_empty() && body.len() <= encode::body_payload_max(self.frame_max) =>
            {
                if self.template.fits(delivery) {
                    self.out.bytes.extend_from_slice(&self.template.bytes);
                    let tag_at = start + self.template.tag_at;
                    self.out.bytes[tag_at..tag_at + 8].copy_from_slice(&tag.to_be_bytes());
                } else {
                    encode::basic_deliver(
                        &mut self.out.bytes,
                        number,
                        &slot.tag,
                        tag,
                        delivery.redelivered,
                        message.names,
                    );
                    encode::content_header(&mut self.out.bytes, number, body.len() as u64, message.properties);
                    self.out.bytes.extend_from_slice(&encode::body_head(number, body.len()));
                    self.template.remember(delivery, &self.out.bytes[start..], slot.tag.len());
                }
                self.out.bytes.extend_from_slice(body);
                self.out.bytes.push(FRAME_END);
                return Offer::Taken;
            }
            (None, _) => {
                encode::basic_deliver(&mut self.out.bytes, number, &slot.tag, tag, delivery.redelivered, message.names)
            }
            (Some(remaining), _) => {
                let remaining = u32::try_from(remaining).unwrap_or(u32::MAX);
                encode::basic_get_ok(&mut self.out.bytes, number, tag, delivery.redelivered, message.names, remaining);
            }
        }
        content(&mut self.out, number, message, self.frame_max);
        Offer::Taken
    }
}

impl DeliveryWriter for Inner {
    #[inline]
    fn deliver(&mut self, delivery: &Delivery<'_>) -> Offer {
        self.offer(delivery, None)
    }

    fn answer_get(&mut self, delivery: &Delivery<'_>, remaining: u64) -> Offer {
        self.offer(delivery, Some(remaining))
    }
}

impl Port for Outbox {
    #[inline]
    fn with_writer(&self, write: &mut dyn FnMut(&mut dyn DeliveryWriter)) -> bool {
        let mut inner = self.inner.lock();
        write(&mut *inner);
        !inner.out.is_empty() && !std::mem::replace(&mut inner.wake_pending, true)
    }

    fn wake(&self) {
        self.writable.notify_one();
    }

    fn consumer_cancelled(&self, to: Address) {
        let mut guard = self.inner.lock();
        let inner = &mut *guard;
        let Some(out) = inner.channels.get_mut(to.channel) else { return };
        let Some(tag) = out.tags.iter().find(|(_, slot)| **slot == to.slot).map(|(tag, _)| tag.clone()) else { return };
        out.tags.remove(&tag);
        if let Some(Some(slot)) = out.slots.get_mut(to.slot as usize) {
            slot.cancelled = true;
        }
        out.release_slot(to.slot);
        if inner.cancel_notify {
            let cancel = basic::Cancel { consumer_tag: short(&tag), nowait: true };
            method::write(&mut inner.out.bytes, to.channel, &AMQPClass::Basic(basic::AMQPMethod::Cancel(cancel)));
            drop(guard);
            self.wake();
        }
    }
}

impl WatermarkListener for Outbox {
    fn on_watermark(&self, watermark: Round) {
        let mut guard = self.inner.lock();
        let inner = &mut *guard;
        inner.listening = false;
        self.settle_confirms(inner, watermark);
        self.listen(inner);
        let wake = !inner.out.is_empty();
        drop(guard);
        if wake {
            self.wake();
        }
    }
}
