//! What a queue's mutex guards: its lanes, its consumers, and the rules that move messages between them. Pure: no I/O, no
//! lock but the ports' while delivering.

use std::{collections::VecDeque, sync::Arc};

use super::{
    ConsumerId, DeletedQueue, Settled,
    arriving::QueueDedup,
    attempts::Attempts,
    checkouts::Checkouts,
    consumers::{ConsumerRing, Sharing},
    groups::{GroupKey, Groups, Parked},
    lane::{HandedOut, Lane, Tally},
    lanes::{Lanes, lane_position, queue_position},
    log::{Peek, QueueLog},
};
use crate::{
    broker::{
        arguments::QueueType,
        delivery_headers,
        extension::{self, Extension},
        memory::{MemoryBudget, Unwritten},
        message::{Message, OwnedMessage},
        port::{Address, Delivery, Offer, Port},
        rules::{QueueRules, QueueTraits},
    },
    clock,
    store::{QueueId, Round},
};

/// The backlog of a queue with consumers from which on its publishers are slowed down.
const CONGESTED_MESSAGES: u64 = 32 << 10;
const CONGESTED_BYTES: u64 = 4 << 20;

/// How a call of [`QueueState::deliver_ready`] ended.
pub(super) enum Turn {
    /// Nothing ready, or nobody to take it.
    Idle,
    /// The budget is used up.
    Again,
    /// The next message of a level has to be read from the store.
    Absent { level: u8, seq: u64 },
    /// The next message has expired; it has to be taken out first.
    Expired { level: u8, seq: u64 },
}

/// Depth and use of a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub ready: u64,
    pub ready_bytes: u64,
    pub unacked: u64,
    pub unacked_bytes: u64,
    /// Returned messages that wait for their next attempt.
    pub waiting: u64,
    /// Published messages that wait until they are due. Neither ready nor subject to the limits.
    pub delayed: u64,
    pub consumers: u64,
}

/// See the module.
pub(super) struct QueueState {
    pub lanes: Lanes,
    pub consumers: ConsumerRing,
    pub unacked: Tally,
    pub rules: QueueRules,
    pub traits: QueueTraits,
    /// Survives a restart.
    pub durable: bool,
    /// Drops duplicates, where the queue does that.
    pub dedup: Option<Box<QueueDedup>>,
    /// Failed deliveries, where the queue counts them.
    pub attempts: Attempts,
    /// Who holds what, where consumers have to settle in time.
    pub checkouts: Option<Box<Checkouts>>,
    /// Message groups, where the queue has such.
    pub groups: Option<Box<Groups>>,
    /// The group of the message that a `basic.get` is about to have, and the message if it is parked.
    pub getting: Option<(GroupKey, Option<Parked>)>,
    /// Parked messages that have expired and are to be buried.
    pub expired_parked: Vec<Settled>,
    /// Returned messages in the order of their return, where that is the order of redelivery (quorum-type queues).
    pub return_order: VecDeque<u64>,
    /// The round that will take the present changes, once the queue is on the store's list.
    pub dirty: Option<Round>,
    /// Of durable messages, until a round takes them.
    pub unwritten: Unwritten,
    /// The earliest instant at which something has to be done, as far as is known; `u64::MAX` for none.
    pub wake_at_unix_ms: u64,
    /// The earliest instant the timer was asked for.
    pub scheduled_at_unix_ms: u64,
    /// When the queue was last declared, got from or consumed from.
    pub last_used_unix_ms: u64,
    /// Attempts were not read from the store yet.
    pub attempts_unread: bool,
    /// Reused for records that have to be made whole.
    pub scratch: Vec<u8>,
    /// Reused for properties with headers of the broker's own.
    pub decorated: Vec<u8>,
    pub had_consumer: bool,
    pub deleted: bool,
}

/// The message that is next, or why it is not known.
pub(super) enum Next {
    Nothing,
    Absent { level: u8, seq: u64 },
    Ready { level: u8, seq: u64, expires_unix_ms: Option<u64> },
}

impl QueueState {
    pub(super) fn new(
        base: QueueId,
        budget: Arc<MemoryBudget>,
        durable: bool,
        traits: QueueTraits,
        rules: QueueRules,
        now_unix_ms: u64,
    ) -> Self {
        let quorum = traits.queue_type == QueueType::Quorum;
        let sharing = match (traits.single_active_consumer, quorum) {
            (false, _) => Sharing::Competing,
            (true, false) => Sharing::SingleActive,
            (true, true) => Sharing::SingleActiveYielding,
        };
        let traits_groups = traits.message_group.as_deref().map(|header| Box::new(Groups::new(header)));
        QueueState {
            unwritten: Unwritten::new(budget.clone()),
            lanes: Lanes::new(base, budget),
            consumers: ConsumerRing::new(sharing),
            unacked: Tally::default(),
            rules,
            traits,
            durable,
            dedup: None,
            attempts: Attempts::default(),
            checkouts: quorum.then(Box::default),
            groups: traits_groups,
            getting: None,
            expired_parked: Vec::new(),
            return_order: VecDeque::new(),
            dirty: None,
            wake_at_unix_ms: u64::MAX,
            scheduled_at_unix_ms: u64::MAX,
            last_used_unix_ms: now_unix_ms,
            attempts_unread: false,
            scratch: Vec::new(),
            decorated: Vec::new(),
            had_consumer: false,
            deleted: false,
        }
    }

    pub(super) fn is_quorum(&self) -> bool {
        self.checkouts.is_some()
    }

    /// Whether failed deliveries are counted: where there is a limit to them, and where dead letters tell of them.
    pub(super) fn counts_attempts(&self) -> bool {
        self.shows_attempts() || self.rules.dead_letter_exchange.is_some()
    }

    /// Whether deliveries carry the counts in their headers.
    pub(super) fn shows_attempts(&self) -> bool {
        self.is_quorum() || self.rules.retry.is_some()
    }

    /// Whether the store should hear of something besides new messages.
    #[inline]
    pub(super) fn has_news(&self) -> bool {
        !self.deleted && (self.lanes.iter().any(Lane::has_news) || (self.durable && self.attempts.is_dirty()))
    }

    pub(super) fn counts(&self) -> Counts {
        let (ready, parked) = (self.lanes.ready(), self.parked());
        Counts {
            ready: ready.messages + parked.messages,
            ready_bytes: ready.bytes + parked.bytes,
            unacked: self.unacked.messages,
            unacked_bytes: self.unacked.bytes,
            waiting: self.attempts.waiting_tally.messages,
            delayed: 0,
            consumers: self.shown_consumers(),
        }
    }

    /// Consumers as RabbitMQ counts them: of a quorum queue with a single active one, that one.
    fn shown_consumers(&self) -> u64 {
        let all = self.consumers.len() as u64;
        if self.is_quorum() && self.traits.single_active_consumer { all.min(1) } else { all }
    }

    /// What the length limits count: ready messages, and those that wait for their next attempt.
    pub(super) fn limited(&self) -> Tally {
        let (ready, waiting, parked) = (self.lanes.ready(), self.attempts.waiting_tally, self.parked());
        Tally {
            messages: ready.messages + waiting.messages + parked.messages,
            bytes: ready.bytes + waiting.bytes + parked.bytes,
        }
    }

    fn parked(&self) -> Tally {
        self.groups.as_ref().map_or(Tally::default(), |groups| groups.parked)
    }

    #[inline]
    pub(super) fn can_deliver(&self) -> bool {
        !self.consumers.is_empty()
            && !self.deleted
            && (self.lanes.has_ready() || self.groups.as_ref().is_some_and(|groups| groups.parked.messages > 0))
    }

    /// Whether nobody could take a message now.
    pub(super) fn is_idle(&self) -> bool {
        self.consumers.current_id().is_none()
    }

    /// Whether messages arrive faster than the present consumers take them.
    #[inline]
    pub(super) fn is_congested(&self) -> bool {
        let ready = self.lanes.ready();
        !self.consumers.is_empty() && (ready.messages > CONGESTED_MESSAGES || ready.bytes > CONGESTED_BYTES)
    }

    /// The level whose turn it is because a message was returned to it first, with that message.
    pub(super) fn next_returned(&mut self) -> Option<(u8, u64)> {
        while let Some(&position) = self.return_order.front() {
            let (level, seq) = lane_position(position);
            if self.lanes.find(position).is_some_and(|(lane, seq)| lane.log.is_returned(seq)) {
                return Some((level, seq));
            }
            self.return_order.pop_front();
        }
        None
    }

    /// What is next, with the counts corrected for records that turn out to be gone.
    pub(super) fn next(&mut self) -> Next {
        if let Some((level, seq)) = self.next_returned() {
            return match self.lanes.at_level(level).log.peek_returned(seq) {
                Peek::Ready { message, .. } => {
                    let expires_unix_ms = extension::expires_unix_ms(message.extension);
                    Next::Ready { level, seq, expires_unix_ms }
                }
                Peek::Absent(seq) => Next::Absent { level, seq },
                Peek::Empty => {
                    self.lose(level, seq);
                    self.next()
                }
            };
        }
        while let Some(lane) = self.lanes.first_ready() {
            let mut lost = 0;
            let found = match lane.log.peek(&mut lost) {
                Peek::Ready { seq, message, .. } => {
                    let expires_unix_ms = extension::expires_unix_ms(message.extension);
                    Some(Next::Ready { level: lane.level, seq, expires_unix_ms })
                }
                Peek::Absent(seq) => Some(Next::Absent { level: lane.level, seq }),
                Peek::Empty => None,
            };
            lane.consumption_unwritten |= lost > 0;
            match found {
                Some(next) => return next,
                None => lane.nothing_ready(),
            }
        }
        Next::Nothing
    }

    /// Drops a returned position whose record cannot be read.
    pub(super) fn lose(&mut self, level: u8, seq: u64) {
        let lane = self.lanes.at_level(level);
        if !lane.log.take_out(seq) {
            lane.log.consume(seq);
        }
        lane.consumption_unwritten = true;
    }

    /// Hands the message that [`QueueState::next_for_get`] has just shown to a `basic.get`.
    pub(super) fn answer_get(&mut self, place: (u8, u64), port: &Arc<dyn Port>, to: Address, no_ack: bool) -> Offer {
        let getting = self.getting.take();
        if let Some((key, Some(parked))) = getting {
            return self.hand_parked_to_get(key, parked, port, to, no_ack);
        }
        let offer = self.hand_to_get(place, port, to, no_ack);
        if let (Some((key, None)), Some(groups), Offer::Taken, false) = (getting, &mut self.groups, offer, no_ack) {
            groups.hold(key, super::groups::Owner::Getter, queue_position(place.0, place.1));
        }
        offer
    }

    fn hand_to_get(&mut self, (level, seq): (u8, u64), port: &Arc<dyn Port>, to: Address, no_ack: bool) -> Offer {
        let mut handed = HandedOut::default();
        let remaining = self.lanes.ready().messages.saturating_sub(1);
        let position = queue_position(level, seq);
        let shows_attempts = self.shows_attempts();
        let lane = self.lanes.at_level(level);
        let redelivered = lane.log.is_returned(seq);
        let Some(mut message) = lane.log.message(seq) else { return Offer::Gone };
        if shows_attempts {
            decorate_attempts(&self.attempts, position, &mut message, &mut self.decorated);
        }
        let (body_bytes, persistent) = (message.body.len() as u64, message.persistent);
        let mut offer = Offer::Gone;
        port.with_writer(&mut |writer| {
            let shown = redelivered || failed_before(&message);
            offer = writer.answer_get(&Delivery { to, seq: position, redelivered: shown, message }, remaining);
        });
        if offer == Offer::Taken {
            lane.log.take(seq, redelivered);
            handed.add(seq, body_bytes, persistent, no_ack, lane.written_to);
            if no_ack {
                lane.log.consume(seq);
            } else if let Some(checkouts) = &mut self.checkouts {
                let deadline = self.rules.consumer_timeout_ms.map_or(u64::MAX, |ms| clock::ceil_unix_ms() + ms);
                checkouts.begin(position, None, deadline, body_bytes as u32, persistent);
                checkouts.begin_get(position, port.clone(), to);
                self.wake_at_unix_ms = self.wake_at_unix_ms.min(deadline);
            }
            lane.account(&handed, no_ack);
            if !no_ack {
                self.unacked.add(1, body_bytes);
            }
        }
        offer
    }

    /// Counts a delivery as settled; `false` when the consumer does not hold it any more.
    #[inline]
    pub(super) fn check_in(&mut self, consumer: Option<ConsumerId>, delivery: &Settled) -> bool {
        if let Some(checkouts) = &mut self.checkouts
            && !checkouts.end(delivery.seq, consumer)
        {
            return false; // it timed out, and went back to the queue
        }
        self.unacked.sub(1, delivery.body_bytes.into());
        true
    }

    /// Consumes a message that is held: handed out and settled, or taken out of the ready ones.
    #[inline]
    pub(super) fn finish(&mut self, delivery: &Settled) {
        self.attempts.forget(delivery.seq);
        if let Some(groups) = &mut self.groups {
            groups.release(delivery.seq);
        }
        if let Some((lane, seq)) = self.lanes.find(delivery.seq) {
            lane.consume(seq, delivery.body_bytes.into(), delivery.persistent);
        }
    }

    /// Makes a held message ready again.
    pub(super) fn give_back(&mut self, delivery: &Settled) {
        if let Some(groups) = &mut self.groups
            && let Some(key) = groups.release(delivery.seq)
        {
            let parked = Parked {
                position: delivery.seq,
                redelivered: true,
                body_bytes: delivery.body_bytes,
                durable: delivery.persistent,
            };
            groups.park_returned(key, parked);
            return;
        }
        let quorum = self.is_quorum();
        let Some((lane, seq)) = self.lanes.find(delivery.seq) else { return };
        lane.give_back(seq, delivery.body_bytes.into(), delivery.persistent);
        self.wake_at_unix_ms = self.wake_at_unix_ms.min(lane.log.next_expiry_unix_ms());
        if quorum {
            self.return_order.push_back(delivery.seq);
        }
    }

    /// Takes a ready message out, so that it is held. `None` when its record is not in memory. The second value tells that it
    /// is consumed already.
    pub(super) fn take_out(&mut self, level: u8, seq: u64) -> Option<(OwnedMessage, bool)> {
        let lane = self.lanes.at_level(level);
        let message = lane.log.message(seq)?;
        let (body_bytes, durable) = (message.body.len() as u64, message.persistent);
        let message = OwnedMessage::from(&message);
        let consumed = lane.take_out(seq, body_bytes, durable);
        if consumed {
            self.attempts.forget(queue_position(level, seq));
        }
        Some((message, consumed))
    }

    /// Consumes everything ready, and what waits for its next attempt; answers how much that was.
    pub(super) fn purge(&mut self) -> u64 {
        let mut purged = 0;
        for lane in self.lanes.iter_mut() {
            purged += lane.purge();
        }
        self.return_order.clear();
        let parked = self.groups.as_mut().map(|groups| groups.take_parked()).unwrap_or_default();
        for parked in parked {
            purged += 1;
            self.finish(&Settled { seq: parked.position, body_bytes: parked.body_bytes, persistent: parked.durable });
        }
        let waiting: Vec<(u64, u32)> = self.attempts.waiting().collect();
        for (seq, body_bytes) in waiting {
            purged += 1;
            self.finish(&Settled { seq, body_bytes, persistent: self.durable });
        }
        purged
    }

    pub(super) fn delete(&mut self) -> DeletedQueue {
        let ready = self.counts().ready;
        let in_store = self.lanes.iter().filter(|lane| lane.in_store).map(|lane| lane.id).collect();
        self.deleted = true;
        self.lanes.clear();
        self.unacked = Tally::default();
        self.dedup = None;
        self.attempts = Attempts::default();
        self.checkouts = None;
        self.groups = None;
        self.return_order = VecDeque::new();
        DeletedQueue { consumers: self.consumers.take_all(), ready, in_store }
    }

    /// The log that holds a level's messages, for reading chunks into it.
    pub(super) fn log(&mut self, level: u8) -> &mut QueueLog {
        &mut self.lanes.at_level(level).log
    }
}

/// Whether a message was dead-lettered after a failed delivery: it counts as redelivered from the start, as in RabbitMQ.
#[inline]
pub(super) fn failed_before(message: &Message<'_>) -> bool {
    !message.extension.is_empty() && Extension::parse(message.extension).deliveries > 0
}

/// Adds what is known of failed deliveries to a message's headers.
pub(super) fn decorate_attempts<'m>(
    attempts: &Attempts,
    position: u64,
    message: &mut Message<'m>,
    decorated: &'m mut Vec<u8>,
) {
    let Some(attempt) = attempts.get(position) else { return };
    let counts = [("x-acquired-count", i64::from(attempt.returned)), ("x-delivery-count", i64::from(attempt.failed))];
    let shown = if attempt.failed > 0 { &counts[..] } else { &counts[..1] };
    delivery_headers::add_counts(message.properties, shown, decorated);
    message.properties = decorated;
}
