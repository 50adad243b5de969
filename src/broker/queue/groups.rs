//! Message groups (`x-message-group`): the messages of one group go to one consumer at a time, in order, while other groups
//! flow beside it.
//!
//! A group belongs to a consumer for as long as that holds a message of it. A message whose group belongs to somebody who
//! cannot take it now is *parked*: taken out of the log, first in its group, so that what stands behind it can go on. The
//! number of parked messages is bounded; beyond it the queue waits.

use std::collections::VecDeque;

use ahash::{AHashMap, RandomState};

use super::{ConsumerId, lane::Tally};
use crate::model::properties::{Properties, raw_entries};

/// Messages that may be parked at a time.
const MAX_PARKED: u64 = 128 << 10;

/// The header that groups by default, and the name other brokers use.
pub const DEFAULT_HEADER: &str = "x-group-id";
const ALIAS: &[u8] = b"message-group-id";

/// A group's key: a keyed hash of the header's value. Values that collide share a group, which only keeps more in order than
/// was asked for.
pub type GroupKey = u64;

/// To whom a group belongs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Owner {
    #[default]
    Nobody,
    Consumer(ConsumerId),
    /// A `basic.get`.
    Getter,
}

impl From<Option<ConsumerId>> for Owner {
    fn from(consumer: Option<ConsumerId>) -> Self {
        consumer.map_or(Owner::Getter, Owner::Consumer)
    }
}

/// A message that waits in its group, or is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parked {
    pub position: u64,
    pub redelivered: bool,
    pub body_bytes: u32,
    pub durable: bool,
}

#[derive(Default)]
struct Group {
    owner: Owner,
    /// Messages its owner holds.
    held: u32,
    /// Oldest first.
    parked: VecDeque<Parked>,
    /// Is in `open`, or waits for its owner.
    listed: bool,
    /// Waits for its owner. Its entry in `waiting` counts only while this is set.
    waits: bool,
}

/// See the module. Positions are queue-wide.
pub struct Groups {
    header: Box<[u8]>,
    has_alias: bool,
    hasher: RandomState,
    groups: AHashMap<GroupKey, Group>,
    /// The group of each message that is held.
    held: AHashMap<u64, GroupKey>,
    /// Groups with parked messages that may be deliverable, in turn.
    open: VecDeque<GroupKey>,
    /// Groups with parked messages that wait for credit of their owner.
    waiting: AHashMap<ConsumerId, VecDeque<GroupKey>>,
    pub parked: Tally,
}

impl Groups {
    /// Groups by the value of a header.
    pub fn new(header: &str) -> Self {
        Groups {
            header: header.as_bytes().into(),
            has_alias: header == DEFAULT_HEADER,
            hasher: RandomState::new(),
            groups: AHashMap::new(),
            held: AHashMap::new(),
            open: VecDeque::new(),
            waiting: AHashMap::new(),
            parked: Tally::default(),
        }
    }

    /// The group of a message; `None` for one that is in none.
    pub fn key_of(&self, properties: &[u8]) -> Option<GroupKey> {
        let table = Properties::parse(properties).ok()?.raw_headers()?;
        let mut alias = None;
        for entry in raw_entries(table) {
            let value = &entry.bytes[1 + entry.key.len()..];
            if *entry.key == *self.header {
                return Some(self.hasher.hash_one(value));
            }
            if self.has_alias && entry.key == ALIAS {
                alias = Some(self.hasher.hash_one(value));
            }
        }
        alias
    }

    /// To whom a message of the group at the log's cursor may go: its owner, or (`Nobody`) anyone; `None` when older messages
    /// of the group are parked.
    pub fn owner_at_cursor(&self, key: GroupKey) -> Option<Owner> {
        match self.groups.get(&key) {
            None => Some(Owner::Nobody),
            Some(group) if group.parked.is_empty() => Some(group.owner),
            Some(_) => None,
        }
    }

    /// Whether another message may be parked.
    pub fn has_room(&self) -> bool {
        self.parked.messages < MAX_PARKED
    }

    /// Parks a message behind the others of its group; `blocked_on` is the owner whose credit it waits for.
    pub fn park(&mut self, key: GroupKey, message: Parked) {
        self.parked.add(1, message.body_bytes.into());
        self.groups.entry(key).or_default().parked.push_back(message);
        self.list(key);
    }

    /// Puts a message that came back into its place in its group.
    pub fn park_returned(&mut self, key: GroupKey, message: Parked) {
        self.parked.add(1, message.body_bytes.into());
        let parked = &mut self.groups.entry(key).or_default().parked;
        let at = parked.partition_point(|other| other.position < message.position);
        parked.insert(at, message);
        self.list(key);
    }

    fn list(&mut self, key: GroupKey) {
        if let Some(group) = self.groups.get_mut(&key)
            && !std::mem::replace(&mut group.listed, true)
        {
            self.open.push_back(key);
        }
    }

    /// The next group with a parked message, its owner, and that message. The caller delivers it ([`Groups::unpark`]) or says
    /// why it cannot ([`Groups::wait_for`], [`Groups::put_off`]).
    pub fn next_open(&mut self) -> Option<(GroupKey, Owner, Parked)> {
        while let Some(&key) = self.open.front() {
            if let Some(group) = self.groups.get_mut(&key) {
                if let Some(&first) = group.parked.front() {
                    return Some((key, group.owner, first));
                }
                group.listed = false;
            }
            self.open.pop_front();
        }
        None
    }

    /// Takes the message of [`Groups::next_open`] out, and puts the group at the end of the turn if it has more.
    pub fn unpark(&mut self, key: GroupKey) {
        self.open.pop_front();
        let Some(group) = self.groups.get_mut(&key) else { return };
        if let Some(message) = group.parked.pop_front() {
            self.parked.sub(1, message.body_bytes.into());
        }
        group.listed = !group.parked.is_empty();
        if group.listed {
            self.open.push_back(key);
        } else if group.held == 0 {
            self.groups.remove(&key);
        }
    }

    /// Has the group of [`Groups::next_open`] wait until its owner has credit again.
    pub fn wait_for(&mut self, consumer: ConsumerId, key: GroupKey) {
        self.open.pop_front();
        if let Some(group) = self.groups.get_mut(&key) {
            group.waits = true;
            self.waiting.entry(consumer).or_default().push_back(key);
        }
    }

    /// Puts the group of [`Groups::next_open`] at the end of the turn.
    pub fn put_off(&mut self) {
        if let Some(key) = self.open.pop_front() {
            self.open.push_back(key);
        }
    }

    /// Groups with parked messages that may be deliverable.
    pub fn open_len(&self) -> usize {
        self.open.len()
    }

    /// Notes that `owner` holds a message of the group.
    pub fn hold(&mut self, key: GroupKey, owner: Owner, position: u64) {
        let group = self.groups.entry(key).or_default();
        group.owner = owner;
        group.held += 1;
        self.held.insert(position, key);
    }

    /// Notes that a held message is held no more; answers its group. The group is free when its owner holds no other.
    pub fn release(&mut self, position: u64) -> Option<GroupKey> {
        let key = self.held.remove(&position)?;
        let group = self.groups.get_mut(&key)?;
        group.held = group.held.saturating_sub(1);
        if group.held == 0 {
            group.owner = Owner::Nobody;
            if group.parked.is_empty() {
                self.groups.remove(&key);
            } else if std::mem::take(&mut group.waits) {
                self.open.push_back(key);
            }
        }
        Some(key)
    }

    /// Puts a group that has waited for this consumer, which can take something now, before all others.
    pub fn recall(&mut self, consumer: ConsumerId) {
        let Some(waiting) = self.waiting.get_mut(&consumer) else { return };
        while let Some(key) = waiting.pop_front() {
            if let Some(group) = self.groups.get_mut(&key)
                && std::mem::take(&mut group.waits)
            {
                self.open.push_front(key);
                return;
            }
        }
        self.waiting.remove(&consumer);
    }

    /// Takes all parked messages out.
    pub fn take_parked(&mut self) -> Vec<Parked> {
        let mut all = Vec::new();
        for group in self.groups.values_mut() {
            all.extend(group.parked.drain(..));
            (group.listed, group.waits) = (false, false);
        }
        self.groups.retain(|_, group| group.held > 0);
        self.open.clear();
        self.waiting.clear();
        self.parked = Tally::default();
        all
    }
}
