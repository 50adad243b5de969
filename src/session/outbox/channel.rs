//! A channel's side of the outbox: its consumers' slots, its unacked deliveries, and their settlement.

use std::sync::Arc;

use ahash::AHashMap;
use parking_lot::MutexGuard;

use super::Inner;
use crate::{
    broker::{ConsumerId, Queue, SettledRun},
    model::Name,
    session::{
        confirms::ConfirmLedger,
        unacked::{Unacked, UnackedRing, UnknownDeliveryTag},
    },
};

/// A consumer, or the target of a `basic.get`, on its channel.
pub(super) struct Slot {
    pub(super) queue: Option<Arc<Queue>>,
    pub(super) consumer: Option<ConsumerId>,
    /// The consumer tag as a short string.
    pub(super) tag: Vec<u8>,
    pub(super) no_ack: bool,
    /// `basic.consume-ok` is in the buffer, so deliveries may follow.
    pub(super) started: bool,
    pub(super) cancelled: bool,
    pub(super) unacked: u32,
}

#[derive(Default)]
pub(super) struct ChannelOut {
    pub(super) last_tag: u64,
    pub(super) unacked: UnackedRing,
    pub(super) slots: Vec<Option<Slot>>,
    pub(super) free_slots: Vec<u32>,
    pub(super) tags: AHashMap<Name, u32>,
    /// Unacked deliveries of the whole channel; 0 is unlimited. `basic.qos` with `global`.
    pub(super) prefetch: u16,
    pub(super) blocked: Vec<u32>,
    pub(super) confirms: ConfirmLedger,
}

/// Consumers that may have become able to take deliveries: their queues have to be told, with nothing locked.
pub type Unblocked = Vec<(Arc<Queue>, ConsumerId)>;

/// Settlements sorted into runs of one queue and consumer. Reused between batches.
#[derive(Default)]
pub struct SettleBatch {
    pub deliveries: Vec<SettledRun>,
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
        self.deliveries.shrink_to(1 << 10);
        self.runs.clear();
        self.unblocked.clear();
        self.last_slot = None;
    }
}

/// What a closing channel leaves behind.
#[derive(Default)]
pub struct Remains {
    pub consumers: Vec<(Arc<Queue>, ConsumerId)>,
    /// Unacked deliveries by queue and consumer, oldest first, to be requeued.
    pub unacked: Vec<(Arc<Queue>, Option<ConsumerId>, Vec<SettledRun>)>,
}

impl ChannelOut {
    pub(super) fn add_slot(&mut self, slot: Slot) -> u32 {
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
    pub(super) fn release_slot(&mut self, index: u32) {
        let Some(entry) = self.slots.get_mut(index as usize) else { return };
        if entry.as_ref().is_some_and(|slot| slot.cancelled && slot.unacked == 0) {
            *entry = None;
            self.free_slots.push(index);
            self.blocked.retain(|&blocked| blocked != index);
        }
    }

    /// Sorts deliveries that are in the unacked ring no more into `batch`.
    pub(super) fn note_settled(&mut self, channel: u16, unacked: &[Unacked], batch: &mut SettleBatch) {
        let ChannelOut { slots, free_slots: free, .. } = self;
        let mut run = OpenRun::new(slots, free, channel, batch);
        unacked.iter().for_each(|unacked| run.add(unacked));
        run.end();
    }

    pub(super) fn take_blocked(&mut self, unblocked: &mut Unblocked) {
        for index in std::mem::take(&mut self.blocked) {
            if let Some(Some(Slot { queue: Some(queue), consumer: Some(consumer), .. })) =
                self.slots.get(index as usize)
            {
                unblocked.push((queue.clone(), *consumer));
            }
        }
    }

    pub(super) fn into_remains(mut self) -> Remains {
        let mut remains = Remains::default();
        let mut by_slot: Vec<Vec<SettledRun>> = Vec::new();
        by_slot.resize_with(self.slots.len(), Vec::new);
        for unacked in self.unacked.drain() {
            if let Some(deliveries) = by_slot.get_mut(unacked.slot as usize) {
                deliveries.push(unacked.settled());
            }
        }
        for (slot, deliveries) in self.slots.into_iter().zip(by_slot) {
            let Some(Slot { queue: Some(queue), consumer, cancelled, .. }) = slot else { continue };
            if let (Some(consumer), false) = (consumer, cancelled) {
                remains.consumers.push((queue.clone(), consumer));
            }
            if !deliveries.is_empty() {
                remains.unacked.push((queue, consumer, deliveries));
            }
        }
        remains
    }
}

/// Deliveries of one slot, on their way from the unacked ring into a batch.
struct OpenRun<'a> {
    slots: &'a mut [Option<Slot>],
    free: &'a mut Vec<u32>,
    channel: u16,
    slot: u32,
    count: u32,
    /// Where they begin in the batch.
    start: usize,
    batch: &'a mut SettleBatch,
}

impl<'a> OpenRun<'a> {
    fn new(slots: &'a mut [Option<Slot>], free: &'a mut Vec<u32>, channel: u16, batch: &'a mut SettleBatch) -> Self {
        OpenRun { slots, free, channel, slot: 0, count: 0, start: 0, batch }
    }

    #[inline]
    fn add(&mut self, unacked: &Unacked) {
        if unacked.slot != self.slot || self.count == 0 {
            self.end();
            self.slot = unacked.slot;
            self.start = self.batch.deliveries.len();
        }
        let continues = self.count > 0 || self.batch.last_slot == Some((self.channel, self.slot));
        let settled = unacked.settled();
        match self.batch.deliveries.last_mut() {
            Some(last) if continues && last.joins(&settled) => last.count += settled.count,
            _ => self.batch.deliveries.push(settled),
        }
        self.count += unacked.count;
    }

    /// Sorts what was added since the last call into the batch's runs.
    #[inline]
    fn end(&mut self) {
        let count = std::mem::take(&mut self.count);
        if count == 0 {
            return;
        }
        let Some(entry @ Some(_)) = self.slots.get_mut(self.slot as usize) else {
            return self.batch.deliveries.truncate(self.start);
        };
        let Some(slot) = entry.as_mut() else { return };
        slot.unacked = slot.unacked.saturating_sub(count);
        let end = self.batch.deliveries.len();
        match self.batch.runs.last_mut() {
            Some(run) if self.batch.last_slot == Some((self.channel, self.slot)) => run.2 = end,
            _ => {
                let Some(queue) = slot.queue.clone() else { return };
                self.batch.runs.push((queue, slot.consumer, end));
                self.batch.last_slot = Some((self.channel, self.slot));
            }
        }
        if slot.cancelled && slot.unacked == 0 {
            *entry = None;
            self.free.push(self.slot);
            self.batch.last_slot = None;
        }
    }
}

/// A locked outbox, settling deliveries of one channel.
pub struct Settler<'a> {
    pub(super) inner: MutexGuard<'a, Inner>,
    pub(super) channel: u16,
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
        let mut run = OpenRun::new(slots, free_slots, self.channel, batch);
        unacked.settle(tag, multiple, |unacked| run.add(&unacked))?;
        run.end();
        if out.prefetch > 0 {
            out.take_blocked(&mut batch.unblocked);
        }
        Ok(())
    }

    /// Settles `count` deliveries with tags from `first` on, as so many calls of [`Settler::settle`] would, if all of them are
    /// outstanding. Answers whether they are; if not, nothing has changed.
    #[inline]
    pub fn settle_each(&mut self, first: u64, count: usize, batch: &mut SettleBatch) -> bool {
        let Some(out) = self.inner.channels.get_mut(self.channel) else { return false };
        let ChannelOut { unacked, slots, free_slots, .. } = out;
        let mut run = OpenRun::new(slots, free_slots, self.channel, batch);
        let settled = unacked.settle_each(first, count, |unacked| run.add(&unacked));
        run.end();
        if settled && out.prefetch > 0 {
            out.take_blocked(&mut batch.unblocked);
        }
        settled
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
