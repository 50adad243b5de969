//! Who holds which message since when, for queues whose consumers must settle in time (quorum-type ones).

use std::{collections::VecDeque, sync::Arc};

use ahash::AHashMap;

use super::{ConsumerId, Settled};
use crate::broker::port::{Address, Port};

/// See the module. Positions are queue-wide.
#[derive(Default)]
pub struct Checkouts {
    holders: AHashMap<u64, Holder>,
    /// Who had it by `basic.get`.
    getters: AHashMap<u64, (Arc<dyn Port>, Address)>,
    /// In the order of the deadlines of most; some may be settled.
    deadlines: VecDeque<(u64, u64)>,
}

#[derive(Clone, Copy)]
struct Holder {
    /// `None` is a `basic.get`.
    consumer: Option<ConsumerId>,
    deadline_unix_ms: u64,
    body_bytes: u32,
    durable: bool,
}

/// Who has held messages for too long.
pub enum OverdueHolder {
    Consumer(ConsumerId),
    Getter(Arc<dyn Port>, Address),
}

/// What somebody has held for too long, oldest first.
pub struct Overdue {
    pub holder: OverdueHolder,
    pub deliveries: Vec<Settled>,
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

    /// Notes who had a message by `basic.get`.
    pub fn begin_get(&mut self, position: u64, port: Arc<dyn Port>, to: Address) {
        self.getters.insert(position, (port, to));
    }

    /// Ends a delivery; `false` when the consumer does not hold the message any more.
    pub fn end(&mut self, position: u64, consumer: Option<ConsumerId>) -> bool {
        let holds = self.holders.get(&position).is_some_and(|holder| holder.consumer == consumer);
        if holds {
            self.holders.remove(&position);
            self.getters.remove(&position);
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

    /// Takes away what somebody has held beyond a deadline: of a consumer everything it holds, as it is not trusted any
    /// more; of a `basic.get` that message.
    pub fn take_overdue(&mut self, now_unix_ms: u64) -> Option<Overdue> {
        loop {
            self.drop_settled();
            let &(deadline, position) = self.deadlines.front()?;
            if deadline > now_unix_ms {
                return None;
            }
            let holder = *self.holders.get(&position)?;
            match (holder.consumer, self.getters.remove(&position)) {
                (Some(consumer), _) => {
                    let deliveries = self.take_all_of(consumer);
                    return Some(Overdue { holder: OverdueHolder::Consumer(consumer), deliveries });
                }
                (None, Some((port, to))) => {
                    self.holders.remove(&position);
                    let deliveries = vec![holder.settled(position)];
                    return Some(Overdue { holder: OverdueHolder::Getter(port, to), deliveries });
                }
                (None, None) => {
                    self.deadlines.pop_front();
                }
            }
        }
    }

    fn take_all_of(&mut self, consumer: ConsumerId) -> Vec<Settled> {
        let mut taken = Vec::new();
        self.holders.retain(|&position, holder| {
            let held = holder.consumer == Some(consumer);
            if held {
                taken.push(holder.settled(position));
            }
            !held
        });
        self.drop_settled();
        taken.sort_unstable_by_key(|delivery| delivery.seq);
        taken
    }
}

impl Holder {
    fn settled(&self, position: u64) -> Settled {
        Settled { seq: position, body_bytes: self.body_bytes, persistent: self.durable }
    }
}
