//! The consumers of a queue and whose turn it is: the highest priority that can take something, round robin within it.

use std::{collections::VecDeque, sync::Arc};

use smallvec::SmallVec;

use crate::broker::port::{Address, Port};

/// A consumer of one queue; an id is not used twice while anything may still name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConsumerId {
    index: u32,
    serial: u32,
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
    unacked: u32,
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
            unacked: 0,
            serial: 0,
            blocked: false,
            in_turn: false,
        }
    }

    #[inline]
    fn is_ready(&self) -> bool {
        !self.blocked && (self.no_ack || self.prefetch.is_none_or(|limit| self.unacked < u32::from(limit.get())))
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

/// See the module.
#[derive(Default)]
pub struct ConsumerRing {
    consumers: Vec<Option<Consumer>>,
    free: Vec<u32>,
    /// Ready consumers by priority, highest first, in turn.
    levels: SmallVec<[(i64, VecDeque<u32>); 1]>,
    count: usize,
    next_serial: u32,
}

impl ConsumerRing {
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
        self.queue_up(index);
        ConsumerId { index, serial: id_serial }
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
        Some(consumer)
    }

    /// Takes all consumers out.
    pub fn take_all(&mut self) -> Vec<Consumer> {
        let all = std::mem::take(&mut self.consumers).into_iter().flatten().collect();
        *self = ConsumerRing { next_serial: self.next_serial, ..ConsumerRing::default() };
        all
    }

    fn get_mut(&mut self, id: ConsumerId) -> Option<&mut Consumer> {
        self.consumers.get_mut(id.index as usize)?.as_mut().filter(|consumer| consumer.serial == id.serial)
    }

    /// Puts a ready consumer at the end of its level.
    #[inline]
    fn queue_up(&mut self, index: u32) {
        let Some(consumer) = self.consumers[index as usize].as_mut() else { return };
        if consumer.in_turn || !consumer.is_ready() {
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

    /// Gives back the credit of `count` settled deliveries; nothing for a consumer that is gone.
    #[inline]
    pub fn settled(&mut self, id: ConsumerId, count: u32) {
        if let Some(consumer) = self.get_mut(id) {
            consumer.unacked = consumer.unacked.saturating_sub(count);
            if !consumer.in_turn {
                self.queue_up(id.index);
            }
        }
    }
}
