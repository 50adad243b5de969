//! Delivery from an ordinary queue: what is ready goes to whose turn it is.

use super::{
    ConsumerId,
    attempts::Attempts,
    checkouts::Checkouts,
    chunk::{PlainRun, RUN_MESSAGES},
    consumers::Consumer,
    lane::HandedOut,
    lanes::queue_position,
    log::{Peek, QueueLog},
    state::{QueueState, Turn, decorate_attempts, failed_before},
};
use crate::broker::{
    extension,
    message::Message,
    port::{Delivery, DeliveryWriter, Effects, Offer},
};
use crate::clock;

/// Fewer ready messages are handed out one by one.
const BACKLOG_MESSAGES: u64 = 64;
/// Turns that each of several consumers has at a backlog, at least.
const TURNS: u64 = 4;
/// Messages for one turn of several consumers at most.
const MAX_STRETCH: u64 = 32;
/// Deliveries in one go before the lock is given up.
const DELIVERY_BUDGET: usize = 16 << 10;

/// One consumer's turn at one lane, while its outbox is locked.
struct Run<'a, 'm> {
    log: &'a mut QueueLog,
    level: u8,
    /// The returned message whose turn it is, whatever is ready before it.
    returned: Option<u64>,
    limit: usize,
    /// What stands at the cursor, if it has just arrived.
    arrived: &'m [Message<'m>],
    consumer: &'a mut Consumer,
    consumer_id: Option<ConsumerId>,
    now_unix_ms: u64,
    deadline_unix_ms: u64,
    /// Positions before it were offered to a round.
    written_to: u64,
    /// What the deliveries tell of earlier ones, where they do.
    attempts: Option<&'a Attempts>,
    checkouts: Option<&'a mut Checkouts>,
    decorated: &'a mut Vec<u8>,
    handed: HandedOut,
    last: Offer,
    ended: Option<Turn>,
}

impl Run<'_, '_> {
    /// Hands out plain messages, for as long as there is nothing else. Answers whether there may be more to hand out.
    ///
    /// Hot path: messages are read from the log by the dozen.
    #[inline]
    fn hand_out_fresh(&mut self, writer: &mut dyn DeliveryWriter) -> bool {
        if self.returned.is_some() || self.attempts.is_some() || self.checkouts.is_some() {
            return true;
        }
        loop {
            let room = (self.limit - self.handed.messages).min(self.consumer.credit());
            let first = self.log.next();
            let (to, position) = (self.consumer.address, queue_position(self.level, first));
            let mut read = PlainRun::new();
            let run: &[Message<'_>] = if self.arrived.is_empty() {
                self.log.fresh_run(room.min(RUN_MESSAGES), &mut read);
                &read
            } else {
                &self.arrived[..room.min(self.arrived.len())]
            };
            if run.is_empty() {
                return room > 0;
            }
            let (taken, offer) = writer.deliver_run(to, position, run);
            self.handed.add_run(first, &run[..taken], self.consumer.no_ack, self.written_to);
            drop(read);
            self.arrived = self.arrived.get(taken..).unwrap_or_default();
            self.log.take_run(taken);
            if self.consumer.no_ack {
                self.log.consume_range(first, first + taken as u64);
            }
            self.last = offer;
            if !self.consumer.delivered_all(taken) || offer != Offer::Taken {
                return false;
            }
        }
    }

    /// Hot path: once a message, for those that are not [plain](Run::hand_out_fresh).
    #[inline]
    fn hand_out(&mut self, writer: &mut dyn DeliveryWriter) {
        if !self.hand_out_fresh(writer) {
            return;
        }
        self.arrived = &[];
        while self.handed.messages < self.limit {
            let peek = match self.returned {
                None => self.log.peek(&mut self.handed.lost),
                Some(seq) => self.log.peek_returned(seq),
            };
            let (seq, redelivered, mut message) = match peek {
                Peek::Ready { seq, redelivered, message } => (seq, redelivered, message),
                Peek::Absent(seq) => {
                    self.ended = Some(Turn::Absent { level: self.level, seq });
                    return;
                }
                Peek::Empty => return,
            };
            let mut shown = redelivered;
            if !message.extension.is_empty() {
                if extension::expires_unix_ms(message.extension).is_some_and(|expires| expires < self.now_unix_ms) {
                    self.ended = Some(Turn::Expired { level: self.level, seq });
                    return;
                }
                shown |= failed_before(&message);
            }
            let position = queue_position(self.level, seq);
            if let Some(attempts) = self.attempts {
                decorate_attempts(attempts, position, &mut message, self.decorated);
            }
            let (body_bytes, persistent) = (message.body.len() as u64, message.persistent);
            let delivery = Delivery { to: self.consumer.address, seq: position, redelivered: shown, message };
            self.last = writer.deliver(&delivery);
            if self.last != Offer::Taken {
                return;
            }
            self.log.take(seq, redelivered);
            self.handed.add(seq, body_bytes, persistent, self.consumer.no_ack, self.written_to);
            if self.consumer.no_ack {
                self.log.consume(seq);
            } else if let Some(checkouts) = &mut self.checkouts {
                checkouts.begin(position, self.consumer_id, self.deadline_unix_ms, body_bytes as u32, persistent);
            }
            if !self.consumer.delivered() {
                return;
            }
        }
    }
}

impl QueueState {
    /// Messages for one turn of several consumers at so many that are ready. One, as in RabbitMQ, unless they are many: then so
    /// many that everybody has several turns, and that what one of them acknowledges stands side by side.
    #[inline]
    pub(super) fn stretch(&self, ready: u64) -> usize {
        if ready < BACKLOG_MESSAGES {
            return 1;
        }
        (ready / (TURNS * self.consumers.len().max(1) as u64)).clamp(1, MAX_STRETCH) as usize
    }

    /// Offers ready messages to consumers that can take them, round robin within the highest priority. `arrived` is what
    /// stands at the cursor, as far as that is known: it need not be read from the log.
    ///
    /// Hot path: under the queue's lock; takes the outbox of the consumer whose turn it is, once for a whole run while
    /// it is the only one ready.
    pub(super) fn deliver_ready<'m>(
        &mut self,
        mut arrived: &'m [Message<'m>],
        now_unix_ms: u64,
        effects: &mut Effects,
    ) -> Turn {
        if self.deleted {
            return Turn::Idle;
        }
        if self.groups.is_some() {
            return self.deliver_grouped(now_unix_ms, effects);
        }
        let mut budget = DELIVERY_BUDGET;
        let stretch = self.stretch(self.lanes.ready().messages);
        while budget > 0 {
            let returned = if self.return_order.is_empty() { None } else { self.next_returned() };
            let consumer_id = if self.checkouts.is_some() { self.consumers.current_id() } else { None };
            let shows_attempts = !self.attempts.is_empty() && self.shows_attempts();
            let lane = match returned {
                Some((level, _)) => self.lanes.at_level(level),
                None => match self.lanes.first_ready() {
                    Some(lane) => lane,
                    None => return Turn::Idle,
                },
            };
            let Some((consumer, alone)) = self.consumers.current() else { return Turn::Idle };
            let timeout_ms =
                consumer.timeout_ms.or(self.rules.consumer_timeout_ms).filter(|_| self.checkouts.is_some());
            let (port, no_ack) = (consumer.port.clone(), consumer.no_ack);
            let mut run = Run {
                level: lane.level,
                returned: returned.map(|(_, seq)| seq),
                limit: match returned {
                    None if alone => budget,
                    None => stretch,
                    Some(_) => 1,
                },
                arrived,
                consumer,
                consumer_id,
                now_unix_ms,
                deadline_unix_ms: timeout_ms.map_or(u64::MAX, |timeout| clock::ceil_unix_ms().saturating_add(timeout)),
                written_to: lane.written_to,
                log: &mut lane.log,
                attempts: shows_attempts.then_some(&self.attempts),
                checkouts: self.checkouts.as_deref_mut(),
                decorated: &mut self.decorated,
                handed: HandedOut::default(),
                last: Offer::Taken,
                ended: None,
            };
            let mut is_behind = false;
            let wake = port.with_writer(&mut |writer| {
                run.hand_out(writer);
                is_behind = writer.is_behind();
            });
            let Run { handed, last, ended, arrived: rest, .. } = run;
            arrived = rest;
            if is_behind && effects.behind.is_none() {
                effects.behind = Some(port.clone());
            }
            if wake {
                effects.wakes.push(port);
            }
            budget = budget.saturating_sub(handed.messages.max(1));
            lane.account(&handed, no_ack);
            match last {
                Offer::Taken => self.consumers.end_turn(),
                Offer::Blocked | Offer::Gone => self.consumers.block_current(),
            }
            if !no_ack {
                self.unacked.add(handed.messages as u64, handed.bytes);
            }
            if let Some(checkouts) = &self.checkouts {
                self.wake_at_unix_ms = self.wake_at_unix_ms.min(checkouts.next_deadline_unix_ms());
            }
            if let Some(turn) = ended {
                return turn;
            }
            if let (Some((level, seq)), 0, Offer::Taken) = (returned, handed.messages, last) {
                self.lose(level, seq);
            }
        }
        Turn::Again
    }
}
