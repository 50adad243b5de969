//! Who holds which message since when, for queues whose consumers must settle in time (quorum-type ones).

use std::collections::VecDeque;

use ahash::AHashMap;

use super::ConsumerId;

/// See the module. Positions are queue-wide.
#[derive(Default)]
pub struct Checkouts {
    holders: AHashMap<u64, Holder>,
    /// In the order of the deadlines of most; some may be settled.
    deadlines: VecDeque<(u64, u64)>,
}

#[derive(Clone, Copy)]
struct Holder {
    /// `None` is a `basic.get`, which has no deadline.
    consumer: Option<ConsumerId>,
    deadline_unix_ms: u64,
    body_bytes: u32,
    durable: bool,
}

/// A message that its consumer did not settle in time.
pub struct Overdue {
    pub position: u64,
    pub consumer: ConsumerId,
    pub body_bytes: u32,
    pub durable: bool,
}

impl Checkouts {
    /// Notes a delivery; `deadline_unix_ms` is `u64::MAX` for none.
    pub fn begin(
        &mut self,
        position: u64,
        consumer: Option<ConsumerId>,
        deadline_unix_ms: u64,
        body_bytes: u32,
        durable: bool,
    ) {
        self.holders.insert(position, Holder { consumer, deadline_unix_ms, body_bytes, durable });
        if deadline_unix_ms < u64::MAX {
            self.deadlines.push_back((deadline_unix_ms, position));
        }
    }

    /// Ends a delivery; `false` when the consumer does not hold the message any more.
    pub fn end(&mut self, position: u64, consumer: Option<ConsumerId>) -> bool {
        let holds = self.holders.get(&position).is_some_and(|holder| holder.consumer == consumer);
        if holds {
            self.holders.remove(&position);
            self.drop_settled();
        }
        holds
    }

    fn drop_settled(&mut self) {
        while let Some((deadline, position)) = self.deadlines.front() {
            if self.holders.get(position).is_some_and(|holder| holder.deadline_unix_ms == *deadline) {
                return;
            }
            self.deadlines.pop_front();
        }
    }

    /// When to look for overdue ones; `u64::MAX` for never.
    pub fn next_deadline_unix_ms(&self) -> u64 {
        self.deadlines.front().map_or(u64::MAX, |(deadline, _)| *deadline)
    }

    /// The consumer that has held a message beyond its deadline, if one has.
    pub fn overdue_consumer(&mut self, now_unix_ms: u64) -> Option<ConsumerId> {
        self.drop_settled();
        let (deadline, position) = self.deadlines.front()?;
        let holder = self.holders.get(position)?;
        (*deadline <= now_unix_ms).then_some(holder.consumer).flatten()
    }

    /// Takes away everything a consumer holds, oldest first.
    pub fn take_all_of(&mut self, consumer: ConsumerId) -> Vec<Overdue> {
        let held_by = |holder: &Holder| holder.consumer == Some(consumer);
        let mut taken: Vec<Overdue> = self
            .holders
            .iter()
            .filter(|(_, holder)| held_by(holder))
            .map(|(&position, holder)| Overdue {
                position,
                consumer,
                body_bytes: holder.body_bytes,
                durable: holder.durable,
            })
            .collect();
        self.holders.retain(|_, holder| !held_by(holder));
        self.drop_settled();
        taken.sort_unstable_by_key(|overdue| overdue.position);
        taken
    }
}
