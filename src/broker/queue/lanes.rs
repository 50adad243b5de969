//! The lanes of a queue, highest priority first, and the position that names a message outside of its lane.

use std::sync::Arc;

use smallvec::SmallVec;

use super::{
    lane::{Lane, Tally},
    log::QueueLog,
};
use crate::{broker::memory::MemoryBudget, store::QueueId};

/// Where the level stands in a queue-wide position; the bits below are the position in the lane's log.
const LEVEL_SHIFT: u32 = 56;
const LANE_POSITION: u64 = (1 << LEVEL_SHIFT) - 1;

/// The queue-wide position of a lane's position.
#[inline]
pub fn queue_position(level: u8, seq: u64) -> u64 {
    u64::from(level) << LEVEL_SHIFT | seq
}

/// The level and the lane's position of a queue-wide one.
#[inline]
pub fn lane_position(position: u64) -> (u8, u64) {
    ((position >> LEVEL_SHIFT) as u8, position & LANE_POSITION)
}

/// See the module. A level without a message has no lane, so it costs nothing.
pub struct Lanes {
    /// Highest level first; never empty.
    lanes: SmallVec<[Lane; 1]>,
    /// The log of level 0 in the store; the others follow.
    base: QueueId,
    budget: Arc<MemoryBudget>,
    /// No lane before it has anything ready.
    hint: usize,
}

impl Lanes {
    /// One empty lane, of level 0.
    pub fn new(base: QueueId, budget: Arc<MemoryBudget>) -> Self {
        let mut lanes = SmallVec::new();
        lanes.push(Lane::new(0, base, QueueLog::new(budget.clone())));
        Lanes { lanes, base, budget, hint: 0 }
    }

    /// Puts a lane into its place, instead of an empty one of its level.
    pub fn insert(&mut self, lane: Lane) {
        let at = self.lanes.partition_point(|other| other.level > lane.level);
        match self.lanes.get_mut(at).filter(|other| other.level == lane.level) {
            Some(other) => *other = lane,
            None => self.lanes.insert(at, lane),
        }
        self.hint = 0;
    }

    /// The lane of a level, made if there is none.
    #[inline]
    pub fn at_level(&mut self, level: u8) -> &mut Lane {
        if self.lanes.len() == 1 && self.lanes[0].level == level {
            self.hint = 0;
            return &mut self.lanes[0];
        }
        let at = self.lanes.partition_point(|lane| lane.level > level);
        if self.lanes.get(at).is_none_or(|lane| lane.level != level) {
            let id = QueueId(self.base.0 + u64::from(level));
            self.lanes.insert(at, Lane::new(level, id, QueueLog::new(self.budget.clone())));
        }
        self.hint = self.hint.min(at);
        &mut self.lanes[at]
    }

    /// The lane that holds a queue-wide position, and the position in it; `None` for one that never was.
    #[inline]
    pub fn find(&mut self, position: u64) -> Option<(&mut Lane, u64)> {
        let (level, seq) = lane_position(position);
        if self.lanes.len() == 1 {
            return (self.lanes[0].level == level).then(|| (&mut self.lanes[0], seq));
        }
        let at = self.lanes.binary_search_by(|lane| level.cmp(&lane.level)).ok()?;
        self.hint = self.hint.min(at);
        Some((&mut self.lanes[at], seq))
    }

    /// The lane of level 0, if there is no other.
    #[inline]
    pub fn only(&mut self) -> Option<&mut Lane> {
        match self.lanes.as_mut_slice() {
            [lane] if lane.level == 0 => Some(lane),
            _ => None,
        }
    }

    /// The highest lane with something ready.
    #[inline]
    pub fn first_ready(&mut self) -> Option<&mut Lane> {
        while let Some(lane) = self.lanes.get(self.hint) {
            if lane.log.has_ready() {
                return self.lanes.get_mut(self.hint);
            }
            self.lanes[self.hint].nothing_ready();
            self.hint += 1;
        }
        self.hint = self.lanes.len() - 1;
        None
    }

    /// Whether any lane has something ready.
    #[inline]
    pub fn has_ready(&self) -> bool {
        self.lanes.iter().any(|lane| lane.log.has_ready())
    }

    /// Ready messages and their bytes.
    #[inline]
    pub fn ready(&self) -> Tally {
        match self.lanes.as_slice() {
            [lane] => lane.ready,
            lanes => lanes.iter().fold(Tally::default(), |sum, lane| Tally {
                messages: sum.messages + lane.ready.messages,
                bytes: sum.bytes + lane.ready.bytes,
            }),
        }
    }

    /// Whether durable messages wait for a round.
    #[inline]
    pub fn has_unwritten(&self) -> bool {
        self.lanes.iter().any(|lane| lane.unwritten > 0)
    }

    #[inline]
    pub fn iter(&self) -> impl Iterator<Item = &Lane> {
        self.lanes.iter()
    }

    #[inline]
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Lane> {
        self.hint = 0;
        self.lanes.iter_mut()
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        *self = Lanes::new(self.base, self.budget.clone());
    }
}
