//! The consumers of a queue and whose turn it is: the highest priority that can take something, round robin within it; or,
//! with a single active consumer, that one alone.

use std::{collections::VecDeque, sync::Arc};

use smallvec::SmallVec;

use crate::broker::port::{Address, Port};

/// A consumer of one queue; an id is not used twice while anything may still name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConsumerId {
    pub(in crate::broker) index: u32,
    pub(in crate::broker) serial: u32,
}

/// One subscription.
pub struct Consumer {
    pub port: Arc<dyn Port>,
    pub address: Address,
    pub no_ack: bool,
    pub exclusive: bool,
    /// Higher first; `x-priority`.
    pub priority: i64,
    /// Unacked deliveries it may hold; `None` is unlimited.
    pub prefetch: Option<std::num::NonZeroU16>,
    /// How long it may hold a message unacked, in milliseconds; its own argument, where the queue's type has such a limit.
    pub timeout_ms: Option<u64>,
    unacked: u32,
    /// Deliveries that were taken back and that it has not settled yet: until then it gets nothing.
    overdue: u32,
    serial: u32,
    blocked: bool,
    in_turn: bool,
}

impl Consumer {
    /// A consumer without deliveries.
    pub fn new(
        port: Arc<dyn Port>,
        address: Address,
        no_ack: bool,
        exclusive: bool,
        priority: i64,
        prefetch: u16,
    ) -> Self {
        Consumer {
            port,
            address,
            no_ack,
            exclusive,
            priority,
            prefetch: std::num::NonZeroU16::new(prefetch),
            timeout_ms: None,
            unacked: 0,
            overdue: 0,
            serial: 0,
            blocked: false,
            in_turn: false,
        }
    }

    /// The same with a time in which it has to settle, in milliseconds; `None` leaves that to its queue.
    pub fn with_timeout(self, timeout_ms: Option<u64>) -> Self {
        Consumer { timeout_ms, ..self }
    }

    #[inline]
    fn is_ready(&self) -> bool {
        !self.blocked
            && self.overdue == 0
            && (self.no_ack || self.prefetch.is_none_or(|limit| self.unacked < u32::from(limit.get())))
    }

    /// Unacked deliveries it holds.
    pub fn unacked(&self) -> u32 {
        self.unacked
    }

    /// Deliveries that a consumer which is ready can take before it has to settle some.
    #[inline]
    pub fn credit(&self) -> usize {
        match (self.no_ack, self.prefetch) {
            (false, Some(limit)) => u32::from(limit.get()).saturating_sub(self.unacked) as usize,
            _ => usize::MAX,
        }
    }

    /// Counts deliveries; answers whether the consumer can take another.
    #[inline]
    pub fn delivered_all(&mut self, count: usize) -> bool {
        if !self.no_ack {
            self.unacked += count as u32;
        }
        self.is_ready()
    }

    /// Counts a delivery; answers whether the consumer can take another.
    #[inline]
    pub fn delivered(&mut self) -> bool {
        if !self.no_ack {
            self.unacked += 1;
        }
        self.is_ready()
    }
}

/// Who of several consumers gets messages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Sharing {
    /// All of them.
    #[default]
    Competing,
    /// One, until it leaves (`x-single-active-consumer`). The next is the one of the highest priority, then the oldest.
    SingleActive,
    /// One, until it leaves or one of a higher priority comes and it has settled everything; as in quorum queues.
    SingleActiveYielding,
}

/// See the module.
#[derive(Default)]
pub struct ConsumerRing {
    sharing: Sharing,
    /// The single active one.
    active: Option<u32>,
    /// The active one gets no more, and goes once it has settled everything.
    yielding: bool,
    consumers: Vec<Option<Consumer>>,
    free: Vec<u32>,
    /// Ready consumers by priority, highest first, in turn.
    levels: SmallVec<[(i64, VecDeque<u32>); 1]>,
    count: usize,
    next_serial: u32,
}

impl ConsumerRing {
    /// An empty ring.
    pub fn new(sharing: Sharing) -> Self {
        ConsumerRing { sharing, ..ConsumerRing::default() }
    }

    /// Consumers in all.
    pub fn len(&self) -> usize {
        self.count
    }

    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether one of them is exclusive.
    pub fn has_exclusive(&self) -> bool {
        self.consumers.iter().flatten().any(|consumer| consumer.exclusive)
    }

    /// Adds a consumer.
    pub fn add(&mut self, mut consumer: Consumer) -> ConsumerId {
        self.next_serial = self.next_serial.wrapping_add(1);
        consumer.serial = self.next_serial;
        let id_serial = consumer.serial;
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                self.consumers.push(None);
                self.consumers.len() as u32 - 1
            }
        };
        self.consumers[index as usize] = Some(consumer);
        self.count += 1;
        self.elect();
        self.queue_up(index);
        ConsumerId { index, serial: id_serial }
    }

    /// Finds the single active consumer, or has the present one yield.
    fn elect(&mut self) {
        if self.sharing == Sharing::Competing {
            return;
        }
        let rank = |consumer: &Consumer| (-i128::from(consumer.priority), consumer.serial);
        let present = self.active.and_then(|index| self.consumers[index as usize].as_ref());
        let best = (0u32..).zip(&self.consumers).filter_map(|(index, entry)| Some((index, entry.as_ref()?)));
        let best = best.filter(|(_, consumer)| consumer.overdue == 0);
        let Some((best, consumer)) = best.min_by_key(|(_, consumer)| rank(consumer)) else {
            (self.active, self.yielding) = (None, false);
            return;
        };
        match present {
            None => (self.active, self.yielding) = (Some(best), false),
            Some(present) if self.sharing == Sharing::SingleActiveYielding && consumer.priority > present.priority => {
                self.yielding = true;
                if present.unacked == 0 {
                    (self.active, self.yielding) = (Some(best), false);
                }
                self.levels.clear();
                self.consumers.iter_mut().flatten().for_each(|consumer| consumer.in_turn = false);
            }
            Some(_) => {}
        }
        if let Some(active) = self.active {
            self.queue_up(active);
        }
    }
    /// Takes a consumer out; `None` when it is gone already.
    pub fn remove(&mut self, id: ConsumerId) -> Option<Consumer> {
        self.get_mut(id)?;
        let consumer = self.consumers[id.index as usize].take()?;
        if let Some(at) = self.levels.iter().position(|(priority, _)| *priority == consumer.priority) {
            self.levels[at].1.retain(|&index| index != id.index);
            if self.levels[at].1.is_empty() {
                self.levels.remove(at);
            }
        }
        self.free.push(id.index);
        self.count -= 1;
        if self.active == Some(id.index) {
            self.active = None;
            self.elect();
        }
        Some(consumer)
    }

    /// The consumer of an id; `None` when it is gone.
    pub fn get(&self, id: ConsumerId) -> Option<&Consumer> {
        self.consumers.get(id.index as usize)?.as_ref().filter(|consumer| consumer.serial == id.serial)
    }

    /// Takes all consumers out.
    pub fn take_all(&mut self) -> Vec<Consumer> {
        let all = std::mem::take(&mut self.consumers).into_iter().flatten().collect();
        *self = ConsumerRing { next_serial: self.next_serial, sharing: self.sharing, ..ConsumerRing::default() };
        all
    }

    pub fn get_mut(&mut self, id: ConsumerId) -> Option<&mut Consumer> {
        self.consumers.get_mut(id.index as usize)?.as_mut().filter(|consumer| consumer.serial == id.serial)
    }

    /// Puts a ready consumer at the end of its level.
    #[inline]
    fn queue_up(&mut self, index: u32) {
        let Some(consumer) = self.consumers[index as usize].as_mut() else { return };
        if consumer.in_turn || !consumer.is_ready() {
            return;
        }
        if self.sharing != Sharing::Competing && (self.active != Some(index) || self.yielding) {
            return;
        }
        consumer.in_turn = true;
        let priority = consumer.priority;
        let at = self.levels.iter().position(|(level, _)| *level <= priority).unwrap_or(self.levels.len());
        if self.levels.get(at).is_none_or(|(level, _)| *level != priority) {
            self.levels.insert(at, (priority, VecDeque::new()));
        }
        self.levels[at].1.push_back(index);
    }

    /// The id of the next consumer that can take something.
    pub fn next_id(&mut self) -> Option<ConsumerId> {
        while let Some(id) = self.current_id() {
            if self.can_take(id) {
                return Some(id);
            }
            self.end_turn();
        }
        None
    }

    /// Whether a consumer can take a delivery now.
    pub fn can_take(&self, id: ConsumerId) -> bool {
        self.get(id).is_some_and(Consumer::is_ready)
            && (self.sharing == Sharing::Competing || self.active == Some(id.index) && !self.yielding)
    }

    /// Ends the turn of a consumer that was given something, if it was its turn.
    pub fn end_turn_of(&mut self, id: ConsumerId) {
        if self.current_id() == Some(id) {
            self.end_turn();
        }
    }

    /// Keeps a consumer out until [`ConsumerRing::unblock`].
    pub fn block(&mut self, id: ConsumerId) {
        if let Some(consumer) = self.get_mut(id) {
            consumer.blocked = true;
        }
        self.end_turn_of(id);
    }

    /// The id of the consumer whose turn it is.
    #[inline]
    pub fn current_id(&self) -> Option<ConsumerId> {
        let &index = self.levels.first()?.1.front()?;
        let serial = self.consumers[index as usize].as_ref()?.serial;
        Some(ConsumerId { index, serial })
    }

    /// The consumer whose turn it is, and whether it is the only one that can take anything.
    #[inline]
    pub fn current(&mut self) -> Option<(&mut Consumer, bool)> {
        while let Some((_, turn)) = self.levels.first() {
            let Some(&index) = turn.front() else {
                self.levels.remove(0);
                continue;
            };
            let alone = self.levels.len() == 1 && turn.len() == 1;
            return self.consumers[index as usize].as_mut().map(|consumer| (consumer, alone));
        }
        None
    }

    /// Ends the turn of [`ConsumerRing::current`]: to the end of its level while it can take more, out of it otherwise.
    #[inline]
    pub fn end_turn(&mut self) {
        let Some((_, turn)) = self.levels.first_mut() else { return };
        let Some(index) = turn.pop_front() else { return };
        match self.consumers[index as usize].as_mut() {
            Some(consumer) if consumer.is_ready() => turn.push_back(index),
            Some(consumer) => consumer.in_turn = false,
            None => {}
        }
        if turn.is_empty() {
            self.levels.remove(0);
        }
    }

    /// Ends the turn of [`ConsumerRing::current`] and keeps it out until [`ConsumerRing::unblock`].
    pub fn block_current(&mut self) {
        if let Some((consumer, _)) = self.current() {
            consumer.blocked = true;
        }
        self.end_turn();
    }

    /// Lets a blocked consumer take part again.
    pub fn unblock(&mut self, id: ConsumerId) {
        if let Some(consumer) = self.get_mut(id) {
            consumer.blocked = false;
            self.queue_up(id.index);
        }
    }

    /// Has a consumer get nothing until it has settled `overdue` deliveries that were taken back.
    pub fn suspend(&mut self, id: ConsumerId, overdue: u32) {
        let Some(consumer) = self.get_mut(id) else { return };
        consumer.overdue += overdue;
        consumer.in_turn = false;
        self.levels.iter_mut().for_each(|(_, turn)| turn.retain(|&index| index != id.index));
        self.levels.retain(|(_, turn)| !turn.is_empty());
        if self.active == Some(id.index) {
            self.active = None;
            self.elect();
        }
    }

    /// Gives back the credit of `count` settled deliveries, `late` of which had been taken back; nothing for a consumer that
    /// is gone.
    #[inline]
    pub fn settled(&mut self, id: ConsumerId, count: u32, late: u32) {
        let yielding = self.yielding;
        if let Some(consumer) = self.get_mut(id) {
            consumer.unacked = consumer.unacked.saturating_sub(count);
            consumer.overdue = consumer.overdue.saturating_sub(late);
            let idle = !consumer.in_turn;
            if yielding || late > 0 {
                self.elect();
            }
            if idle {
                self.queue_up(id.index);
            }
        }
    }
}
