//! The readers of a stream, each at its own offset, and whose turn it is: round robin.

use std::{collections::VecDeque, sync::Arc};

use super::{filter::Filter, offsets::Tracker};
use crate::{
    broker::queue::{Consumer, ConsumerId, chunk::Chunk},
    model::Name,
};

/// A read from the store that readers wait for.
pub(super) type LoadId = u64;

/// What is kept of a tracked consumer.
pub(super) struct Tracking {
    pub tag: Name,
    pub tracker: Tracker,
    /// What was last remembered of it.
    pub stored: Option<u64>,
}

/// One consumer and its place in the stream.
pub(super) struct Reader {
    pub consumer: Consumer,
    serial: u32,
    /// The offset it looks at next.
    pub next: u64,
    pub unacked: u32,
    pub filter: Option<Arc<Filter>>,
    pub tracking: Option<Tracking>,
    /// What was read from the store for it.
    pub chunk: Option<Arc<Chunk>>,
    pub waiting_for: Option<LoadId>,
    /// Its first offset is being looked for.
    pub is_seeking: bool,
    /// A read failed; tried again when something happens to it, or after a while.
    pub is_stalled: bool,
    pub is_blocked: bool,
    in_turn: bool,
}

impl Reader {
    /// A reader that begins at `next`.
    pub fn new(consumer: Consumer, next: u64, filter: Option<Arc<Filter>>, tracking: Option<Tracking>) -> Self {
        Reader {
            consumer,
            serial: 0,
            next,
            unacked: 0,
            filter,
            tracking,
            chunk: None,
            waiting_for: None,
            is_seeking: false,
            is_stalled: false,
            is_blocked: false,
            in_turn: false,
        }
    }

    /// Deliveries it may still get before it acknowledges any.
    #[inline]
    pub fn credit(&self) -> u32 {
        match self.consumer.prefetch {
            Some(limit) if !self.consumer.no_ack => u32::from(limit.get()).saturating_sub(self.unacked),
            _ => u32::MAX,
        }
    }

    #[inline]
    fn can_take(&self, committed_to: u64) -> bool {
        self.next < committed_to
            && !self.is_blocked
            && !self.is_seeking
            && !self.is_stalled
            && self.waiting_for.is_none()
            && self.credit() > 0
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Readers {
    slots: Vec<Option<Reader>>,
    free: Vec<u32>,
    turn: VecDeque<u32>,
    count: usize,
    next_serial: u32,
}

impl Readers {
    pub fn len(&self) -> usize {
        self.count
    }

    /// Adds a reader.
    pub fn add(&mut self, mut reader: Reader) -> ConsumerId {
        self.next_serial = self.next_serial.wrapping_add(1);
        reader.serial = self.next_serial;
        let serial = reader.serial;
        let index = match self.free.pop() {
            Some(index) => {
                self.slots[index as usize] = Some(reader);
                index
            }
            None => {
                self.slots.push(Some(reader));
                self.slots.len() as u32 - 1
            }
        };
        self.count += 1;
        ConsumerId { index, serial }
    }

    /// Takes a reader out; `None` when it is gone already.
    pub fn remove(&mut self, id: ConsumerId) -> Option<Reader> {
        self.get_mut(id)?;
        let reader = self.slots[id.index as usize].take()?;
        if reader.in_turn {
            self.turn.retain(|&index| index != id.index);
        }
        self.free.push(id.index);
        self.count -= 1;
        Some(reader)
    }

    /// Takes all readers out.
    pub fn take_all(&mut self) -> Vec<Consumer> {
        let slots = std::mem::take(&mut self.slots);
        *self = Readers { next_serial: self.next_serial, ..Readers::default() };
        slots.into_iter().flatten().map(|reader| reader.consumer).collect()
    }

    pub fn get_mut(&mut self, id: ConsumerId) -> Option<&mut Reader> {
        self.slots.get_mut(id.index as usize)?.as_mut().filter(|reader| reader.serial == id.serial)
    }

    /// The reader of a turn.
    #[inline]
    pub fn at_mut(&mut self, index: u32) -> Option<&mut Reader> {
        self.slots.get_mut(index as usize)?.as_mut()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Reader> {
        self.slots.iter().flatten()
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Reader> {
        self.slots.iter_mut().flatten()
    }

    /// Gives a reader a turn if it can take something and has none.
    #[inline]
    pub fn queue_up(&mut self, index: u32, committed_to: u64) {
        let Some(Some(reader)) = self.slots.get_mut(index as usize) else { return };
        if !reader.in_turn && reader.can_take(committed_to) {
            reader.in_turn = true;
            self.turn.push_back(index);
        }
    }

    /// Gives every reader a turn that can take something.
    pub fn queue_up_all(&mut self, committed_to: u64) {
        for index in 0..self.slots.len() as u32 {
            self.queue_up(index, committed_to);
        }
    }

    /// The reader whose turn it is; its turn is over with that.
    #[inline]
    pub fn take_turn(&mut self) -> Option<u32> {
        let index = self.turn.pop_front()?;
        if let Some(Some(reader)) = self.slots.get_mut(index as usize) {
            reader.in_turn = false;
        }
        Some(index)
    }

    /// Whether any reader has a turn.
    pub fn has_turn(&self) -> bool {
        !self.turn.is_empty()
    }
}
