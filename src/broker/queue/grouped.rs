//! Delivery from a queue with message groups.

use std::sync::Arc;

use super::{
    ConsumerId, Settled,
    groups::{GroupKey, Owner, Parked},
    lane::HandedOut,
    lanes::{lane_position, queue_position},
    log::Peek,
    state::{Next, QueueState, Turn, decorate_attempts},
};
use crate::broker::{
    extension,
    message::Message,
    port::{Address, Delivery, Effects, Offer, Port},
};

/// Messages looked at in one go before the lock is given up.
const BUDGET: usize = 16 << 10;

/// A message by its place, as far as delivering it goes.
#[derive(Clone, Copy)]
struct Found {
    level: u8,
    seq: u64,
    redelivered: bool,
}

/// What became of an attempt to deliver.
enum Given {
    Taken { no_ack: bool },
    Blocked,
    Absent,
    Expired,
}

/// What stands at the cursor.
enum AtCursor {
    Nothing,
    Absent { level: u8, seq: u64 },
    Found { found: Found, key: Option<GroupKey>, parked: Parked },
}

impl QueueState {
    /// [`QueueState::deliver_ready`] for a queue with groups.
    pub(super) fn deliver_grouped(&mut self, now_unix_ms: u64, effects: &mut Effects) -> Turn {
        let mut put_off = 0;
        for _ in 0..BUDGET {
            let Some(current) = self.consumers.next_id() else { return Turn::Idle };
            let Some(groups) = &mut self.groups else { return Turn::Idle };
            groups.recall(current);
            let open = if put_off < groups.open_len() { groups.next_open() } else { None };
            let turn = match open {
                Some((_, Owner::Getter, _)) => {
                    groups.put_off();
                    put_off += 1;
                    None
                }
                Some((key, owner, parked)) => self.deliver_parked(key, owner, parked, current, now_unix_ms, effects),
                None => match self.deliver_at_cursor(current, now_unix_ms, effects) {
                    Ok(turn) => turn,
                    Err(()) => return Turn::Idle,
                },
            };
            if let Some(turn) = turn {
                return turn;
            }
        }
        Turn::Again
    }

    fn deliver_parked(
        &mut self,
        key: GroupKey,
        owner: Owner,
        parked: Parked,
        current: ConsumerId,
        now_unix_ms: u64,
        effects: &mut Effects,
    ) -> Option<Turn> {
        let consumer = match owner {
            Owner::Consumer(owner) if self.consumers.can_take(owner) => owner,
            Owner::Consumer(owner) => {
                self.groups.as_mut()?.wait_for(owner, key);
                return None;
            }
            _ => current,
        };
        let (level, seq) = lane_position(parked.position);
        let found = Found { level, seq, redelivered: parked.redelivered };
        match self.offer_to(consumer, found, now_unix_ms, effects) {
            Given::Absent => return Some(Turn::Absent { level, seq }),
            Given::Blocked => return None,
            Given::Taken { no_ack } => {
                let groups = self.groups.as_mut()?;
                groups.unpark(key);
                if no_ack {
                    self.finish(&settled(&parked));
                } else {
                    groups.hold(key, Owner::Consumer(consumer), parked.position);
                    self.unacked.add(1, parked.body_bytes.into());
                }
            }
            Given::Expired => {
                self.groups.as_mut()?.unpark(key);
                self.expired_parked.push(settled(&parked));
                return Some(Turn::Again);
            }
        }
        None
    }

    /// Delivers or parks the message at the cursor; an error when there is nothing that can be done now.
    fn deliver_at_cursor(
        &mut self,
        current: ConsumerId,
        now_unix_ms: u64,
        effects: &mut Effects,
    ) -> Result<Option<Turn>, ()> {
        let (found, key, parked) = match self.at_cursor() {
            AtCursor::Nothing => return Err(()),
            AtCursor::Absent { level, seq } => return Ok(Some(Turn::Absent { level, seq })),
            AtCursor::Found { found, key, parked } => (found, key, parked),
        };
        let groups = self.groups.as_mut().ok_or(())?;
        let consumer = match key.map(|key| (key, groups.owner_at_cursor(key))) {
            None | Some((_, Some(Owner::Nobody))) => current,
            Some((_, Some(Owner::Consumer(owner)))) if self.consumers.can_take(owner) => owner,
            Some((key, _)) => {
                if !groups.has_room() {
                    return Err(());
                }
                groups.park(key, parked);
                self.take_at_cursor(found, &parked, false);
                return Ok(None);
            }
        };
        match self.offer_to(consumer, found, now_unix_ms, effects) {
            Given::Absent => return Ok(Some(Turn::Absent { level: found.level, seq: found.seq })),
            Given::Expired => return Ok(Some(Turn::Expired { level: found.level, seq: found.seq })),
            Given::Blocked => {}
            Given::Taken { no_ack } => {
                self.take_at_cursor(found, &parked, no_ack);
                if !no_ack {
                    self.unacked.add(1, parked.body_bytes.into());
                    if let (Some(groups), Some(key)) = (&mut self.groups, key) {
                        groups.hold(key, Owner::Consumer(consumer), parked.position);
                    }
                }
            }
        }
        Ok(None)
    }

    fn at_cursor(&mut self) -> AtCursor {
        while let Some(lane) = self.lanes.first_ready() {
            let level = lane.level;
            let mut lost = 0;
            let at = match lane.log.peek(&mut lost) {
                Peek::Ready { seq, redelivered, message } => {
                    let key = self.groups.as_ref().and_then(|groups| groups.key_of(message.properties));
                    Some(AtCursor::Found {
                        found: Found { level, seq, redelivered },
                        key,
                        parked: Parked {
                            position: queue_position(level, seq),
                            redelivered,
                            body_bytes: message.body.len() as u32,
                            durable: message.persistent,
                        },
                    })
                }
                Peek::Absent(seq) => Some(AtCursor::Absent { level, seq }),
                Peek::Empty => None,
            };
            lane.consumption_unwritten |= lost > 0;
            match at {
                Some(at) => return at,
                None => lane.nothing_ready(),
            }
        }
        AtCursor::Nothing
    }

    /// Moves the cursor past a message: it is held now, or consumed.
    fn take_at_cursor(&mut self, found: Found, message: &Parked, no_ack: bool) {
        let lane = self.lanes.at_level(found.level);
        let mut handed = HandedOut::default();
        handed.add(found.seq, message.body_bytes.into(), message.durable, no_ack, lane.written_to);
        lane.log.take(found.seq, found.redelivered);
        if no_ack {
            lane.log.consume(found.seq);
        }
        lane.account(&handed, no_ack);
    }

    /// Offers one message to one consumer.
    fn offer_to(&mut self, id: ConsumerId, found: Found, now_unix_ms: u64, effects: &mut Effects) -> Given {
        let Found { level, seq, redelivered } = found;
        let position = queue_position(level, seq);
        let lane = self.lanes.at_level(level);
        let Some(mut message) = lane.log.message(seq) else { return Given::Absent };
        if extension::expires_unix_ms(message.extension).is_some_and(|expires| expires <= now_unix_ms) {
            return Given::Expired;
        }
        let Some(consumer) = self.consumers.get_mut(id) else { return Given::Blocked };
        if !self.attempts.is_empty() && (self.checkouts.is_some() || self.rules.retry.is_some()) {
            decorate_attempts(&self.attempts, position, &mut message, &mut self.decorated);
        }
        let (body_bytes, durable) = (message.body.len() as u32, message.persistent);
        let delivery = Delivery { to: consumer.address, seq: position, redelivered, message };
        let mut offer = Offer::Gone;
        if consumer.port.with_writer(&mut |writer| offer = writer.deliver(&delivery)) {
            effects.wakes.push(consumer.port.clone());
        }
        if offer != Offer::Taken {
            self.consumers.block(id);
            return Given::Blocked;
        }
        let no_ack = consumer.no_ack;
        let timeout_ms = consumer.timeout_ms.or(self.rules.consumer_timeout_ms);
        consumer.delivered();
        self.consumers.end_turn_of(id);
        if let (Some(checkouts), false) = (&mut self.checkouts, no_ack) {
            let deadline = timeout_ms.map_or(u64::MAX, |timeout| now_unix_ms.saturating_add(timeout));
            checkouts.begin(position, Some(id), deadline, body_bytes, durable);
            self.wake_at_unix_ms = self.wake_at_unix_ms.min(checkouts.next_deadline_unix_ms());
        }
        Given::Taken { no_ack }
    }

    /// What a `basic.get` may have: the first message of a group that belongs to nobody, or one of no group.
    pub(super) fn next_for_get(&mut self) -> Next {
        let Some(groups) = &mut self.groups else { return self.next() };
        for _ in 0..groups.open_len() {
            match groups.next_open() {
                Some((key, Owner::Nobody, parked)) => {
                    let (level, seq) = lane_position(parked.position);
                    self.getting = Some((key, Some(parked)));
                    return match self.lanes.at_level(level).log.message(seq) {
                        Some(_) => Next::Ready { level, seq, expires_unix_ms: None },
                        None => Next::Absent { level, seq },
                    };
                }
                Some(_) => groups.put_off(),
                None => break,
            }
        }
        loop {
            let (found, key, parked) = match self.at_cursor() {
                AtCursor::Nothing => return Next::Nothing,
                AtCursor::Absent { level, seq } => return Next::Absent { level, seq },
                AtCursor::Found { found, key, parked } => (found, key, parked),
            };
            let Some(groups) = &mut self.groups else { return Next::Nothing };
            match key {
                Some(key) if groups.owner_at_cursor(key) != Some(Owner::Nobody) => {
                    if !groups.has_room() {
                        return Next::Nothing;
                    }
                    groups.park(key, parked);
                    self.take_at_cursor(found, &parked, false);
                }
                _ => {
                    self.getting = key.map(|key| (key, None));
                    let message = self.lanes.at_level(found.level).log.message(found.seq);
                    let expires_unix_ms = message.and_then(|message| extension::expires_unix_ms(message.extension));
                    return Next::Ready { level: found.level, seq: found.seq, expires_unix_ms };
                }
            }
        }
    }

    /// Hands the parked message that [`QueueState::next_for_get`] has just shown to a `basic.get`.
    pub(super) fn hand_parked_to_get(
        &mut self,
        key: GroupKey,
        parked: Parked,
        port: &Arc<dyn Port>,
        to: Address,
        no_ack: bool,
    ) -> Offer {
        let remaining = self.counts().ready.saturating_sub(1);
        let (level, seq) = lane_position(parked.position);
        let lane = self.lanes.at_level(level);
        let Some(mut message): Option<Message<'_>> = lane.log.message(seq) else { return Offer::Gone };
        decorate_attempts(&self.attempts, parked.position, &mut message, &mut self.decorated);
        let delivery = Delivery { to, seq: parked.position, redelivered: parked.redelivered, message };
        let mut offer = Offer::Gone;
        port.with_writer(&mut |writer| offer = writer.answer_get(&delivery, remaining));
        if offer != Offer::Taken {
            return offer;
        }
        if let Some(groups) = &mut self.groups {
            groups.unpark(key);
            if !no_ack {
                groups.hold(key, Owner::Getter, parked.position);
            }
        }
        if no_ack {
            self.finish(&settled(&parked));
        } else {
            self.unacked.add(1, parked.body_bytes.into());
            if let Some(checkouts) = &mut self.checkouts {
                checkouts.begin(parked.position, None, u64::MAX, parked.body_bytes, parked.durable);
                checkouts.begin_get(parked.position, port.clone(), to);
            }
        }
        offer
    }
}

fn settled(parked: &Parked) -> Settled {
    Settled { seq: parked.position, body_bytes: parked.body_bytes, persistent: parked.durable }
}
