//! What a queue's mutex guards. Pure: no I/O, no lock but the ports' while delivering.

use std::sync::Arc;

use super::{
    ConsumerId, DeletedQueue, Settled, Settlement,
    consumers::ConsumerRing,
    log::{Peek, QueueLog},
    ranges::RangeSet,
};
use crate::{
    broker::{
        memory::MemoryBudget,
        message::Message,
        port::{Address, Delivery, Effects, Offer, Port},
    },
    store::{QueueStateRecord, Round, SEGMENT_RECORDS},
};

/// Deliveries in one go before the lock is given up.
const DELIVERY_BUDGET: usize = 16 << 10;

/// The backlog of a queue with consumers from which on its publishers are slowed down.
const CONGESTED_MESSAGES: u64 = 32 << 10;
const CONGESTED_BYTES: u64 = 4 << 20;

/// Consumed segments at the head that are worth a range delete.
const DELETE_SEGMENTS: u64 = 8;

/// How a call of [`QueueState::deliver_ready`] ended.
pub(super) enum Turn {
    /// Nothing ready, or nobody to take it.
    Idle,
    /// The budget is used up.
    Again,
    /// The next message has to be read from the store.
    Absent(u64),
}

/// Depth and use of a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub ready: u64,
    pub ready_bytes: u64,
    pub unacked: u64,
    pub unacked_bytes: u64,
    pub consumers: u64,
}

/// See the module.
pub(super) struct QueueState {
    pub log: QueueLog,
    pub consumers: ConsumerRing,
    counts: Counts,
    /// Durable messages not consumed, and their body bytes: what the store must count after a restart.
    durable_count: u64,
    durable_bytes: u64,
    /// Of those, the unacked ones.
    unacked_durable: u64,
    unacked_durable_bytes: u64,
    /// Durable, unconsumed messages that no round has taken yet.
    pub unwritten_durable: u64,
    /// Positions before it were offered to a round.
    pub written_to: u64,
    /// Positions before it are in a committed round.
    pub committed_to: u64,
    /// The round that will take the present changes, once the queue is on the store's list.
    pub dirty: Option<Round>,
    /// Something is consumed that the store does not know of.
    pub consumption_unwritten: bool,
    /// The delivery cursor as the store has it.
    pub delivered_written: u64,
    /// Segments whose consumed set has to be written.
    pub dirty_segments: RangeSet,
    /// Body bytes of stored messages consumed since their records were last deleted.
    pub consumed_bytes: u64,
    /// Segments before it are deleted in the store.
    pub deleted_segments: u64,
    /// The store has records of this queue.
    pub in_store: bool,
    /// A read from the store is under way.
    pub loading: bool,
    /// The recovered consumed set was not read yet.
    pub unopened: Option<QueueStateRecord>,
    /// Reused for records that have to be made whole.
    pub scratch: Vec<u8>,
    pub had_consumer: bool,
    pub deleted: bool,
}

impl QueueState {
    pub(super) fn new(log: QueueLog) -> Self {
        let tail = log.tail();
        QueueState {
            deleted_segments: log.head() / SEGMENT_RECORDS,
            log,
            consumers: ConsumerRing::default(),
            counts: Counts::default(),
            durable_count: 0,
            durable_bytes: 0,
            unacked_durable: 0,
            unacked_durable_bytes: 0,
            unwritten_durable: 0,
            written_to: tail,
            committed_to: tail,
            dirty: None,
            consumption_unwritten: false,
            delivered_written: 0,
            dirty_segments: RangeSet::default(),
            consumed_bytes: 0,
            in_store: false,
            loading: false,
            unopened: None,
            scratch: Vec::new(),
            had_consumer: false,
            deleted: false,
        }
    }

    pub(super) fn recovered(budget: Arc<MemoryBudget>, record: QueueStateRecord) -> Self {
        let mut state = QueueState::new(QueueLog::new(budget));
        state.counts.ready = record.message_count;
        state.counts.ready_bytes = record.message_bytes;
        state.durable_count = record.message_count;
        state.durable_bytes = record.message_bytes;
        state.in_store = true;
        state.unopened = Some(record);
        state
    }

    /// Takes over what the store knows of the consumed positions.
    pub(super) fn opened(&mut self, budget: Arc<MemoryBudget>, record: QueueStateRecord, consumed: &[(u64, u64)]) {
        self.log = QueueLog::recovered(budget, record.head, record.delivered, record.tail, consumed);
        self.written_to = self.log.tail();
        self.committed_to = self.log.tail();
        self.delivered_written = self.log.next();
        self.deleted_segments = self.log.head() / SEGMENT_RECORDS;
        self.unopened = None;
    }

    /// Whether the store should hear what was handed out or consumed: what is unacked comes back redelivered after a
    /// restart, and what is consumed gives its disk space back.
    pub(super) fn has_news(&self) -> bool {
        let handed_out = self.unacked_durable > 0 && self.log.next() > self.delivered_written;
        self.in_store
            && !self.deleted
            && (self.consumption_unwritten || handed_out || self.segments_to_delete().is_some())
    }

    /// Consumed segments before the head, once they are worth a range delete.
    pub(super) fn segments_to_delete(&self) -> Option<(u64, u64)> {
        let (from, until) = (self.deleted_segments, self.log.head() / SEGMENT_RECORDS);
        let worth_it = until - from >= DELETE_SEGMENTS || (until > from && self.log.head() == self.log.tail());
        worth_it.then_some((from, until))
    }

    pub(super) fn counts(&self) -> Counts {
        Counts { consumers: self.consumers.len() as u64, ..self.counts }
    }

    /// Depth and cursor, as a round stores them.
    pub(super) fn record(&self) -> QueueStateRecord {
        QueueStateRecord {
            head: self.log.head(),
            delivered: self.log.next(),
            tail: self.log.tail(),
            message_count: self.durable_count,
            message_bytes: self.durable_bytes,
        }
    }

    #[inline]
    pub(super) fn append(
        &mut self,
        message: &Message<'_>,
        now_unix_ms: u64,
        expected_bytes: usize,
        durable_queue: bool,
    ) {
        let body_bytes = message.body.len() as u64;
        // A persistent message in a transient queue is as transient as the queue.
        let message = Message { persistent: message.persistent && durable_queue, ..*message };
        self.log.append(&message, now_unix_ms, expected_bytes);
        self.counts.ready += 1;
        self.counts.ready_bytes += body_bytes;
        if message.persistent {
            self.durable_count += 1;
            self.durable_bytes += body_bytes;
            self.unwritten_durable += 1;
        }
    }

    #[inline]
    pub(super) fn can_deliver(&self) -> bool {
        !self.consumers.is_empty() && self.log.has_ready() && !self.deleted
    }

    /// Whether messages arrive faster than the present consumers take them.
    #[inline]
    pub(super) fn is_congested(&self) -> bool {
        !self.consumers.is_empty()
            && (self.counts.ready > CONGESTED_MESSAGES || self.counts.ready_bytes > CONGESTED_BYTES)
    }

    /// What is next, with the counts corrected for records that turn out to be gone.
    pub(super) fn peek(&mut self) -> Peek<'_> {
        let mut lost = 0;
        if matches!(self.log.peek(&mut lost), Peek::Empty) {
            self.nothing_ready();
        }
        self.consumption_unwritten |= lost > 0;
        self.log.peek(&mut lost)
    }

    /// Hands messages that have just arrived straight to no-ack consumers while nothing is ready before them, so that
    /// they never enter the log. Answers how many were taken.
    pub(super) fn pass_through(&mut self, messages: &[Message<'_>], effects: &mut Effects) -> usize {
        let mut taken = 0;
        while taken < messages.len() {
            let Some((consumer, alone)) = self.consumers.current() else { break };
            if !consumer.no_ack {
                break;
            }
            let run = if alone { messages.len() } else { taken + 1 };
            let (to, mut last) = (consumer.address, Offer::Taken);
            let wake = consumer.port.with_writer(&mut |writer| {
                while taken < run {
                    last = writer.deliver(&Delivery { to, seq: 0, redelivered: false, message: messages[taken] });
                    if last != Offer::Taken {
                        return;
                    }
                    taken += 1;
                }
            });
            if wake {
                effects.wakes.push(consumer.port.clone());
            }
            match last {
                Offer::Taken => self.consumers.end_turn(),
                Offer::Blocked | Offer::Gone => self.consumers.block_current(),
            }
        }
        taken
    }

    /// Offers ready messages to consumers that can take them, round robin within the highest priority.
    ///
    /// Hot path: under the queue's lock; takes the outbox of the consumer whose turn it is, once for a whole run while
    /// it is the only one ready.
    pub(super) fn deliver_ready(&mut self, effects: &mut Effects) -> Turn {
        if self.deleted {
            return Turn::Idle;
        }
        let mut budget = DELIVERY_BUDGET;
        loop {
            if budget == 0 {
                return Turn::Again;
            }
            if !self.log.has_ready() {
                self.nothing_ready();
                return Turn::Idle;
            }
            let Some((consumer, alone)) = self.consumers.current() else { return Turn::Idle };
            let run = if alone { budget } else { 1 };
            let mut handed = HandedOut::default();
            let (mut last, mut absent) = (Offer::Taken, None);
            let log = &mut self.log;
            let wake = consumer.port.clone().with_writer(&mut |writer| {
                while handed.messages < run {
                    let (seq, redelivered, message) = match log.peek(&mut handed.lost) {
                        Peek::Ready { seq, redelivered, message } => (seq, redelivered, message),
                        Peek::Absent(seq) => {
                            absent = Some(seq);
                            return;
                        }
                        Peek::Empty => return,
                    };
                    let body_bytes = message.body.len() as u64;
                    let persistent = message.persistent;
                    last = writer.deliver(&Delivery { to: consumer.address, seq, redelivered, message });
                    if last != Offer::Taken {
                        return;
                    }
                    log.take(seq, redelivered);
                    handed.add(seq, body_bytes, persistent, consumer.no_ack, self.written_to);
                    if consumer.no_ack {
                        log.consume(seq);
                    }
                    if !consumer.delivered() {
                        return;
                    }
                }
            });
            if wake {
                effects.wakes.push(consumer.port.clone());
            }
            let no_ack = consumer.no_ack;
            budget = budget.saturating_sub(handed.messages.max(1));
            match last {
                Offer::Taken => self.consumers.end_turn(),
                Offer::Blocked | Offer::Gone => self.consumers.block_current(),
            }
            self.account(&handed, no_ack);
            if let Some(seq) = absent {
                return Turn::Absent(seq);
            }
        }
    }

    /// Hands the message that [`QueueState::peek`] has just shown to a `basic.get`.
    pub(super) fn hand_to_get(&mut self, port: &Arc<dyn Port>, to: Address, no_ack: bool) -> Offer {
        let mut handed = HandedOut::default();
        let remaining = self.counts.ready.saturating_sub(1);
        let Peek::Ready { seq, redelivered, message } = self.log.peek(&mut handed.lost) else { return Offer::Gone };
        let (body_bytes, persistent) = (message.body.len() as u64, message.persistent);
        let mut offer = Offer::Gone;
        port.with_writer(&mut |writer| {
            offer = writer.answer_get(&Delivery { to, seq, redelivered, message }, remaining);
        });
        if offer == Offer::Taken {
            self.log.take(seq, redelivered);
            handed.add(seq, body_bytes, persistent, no_ack, self.written_to);
            if no_ack {
                self.log.consume(seq);
            }
            self.account(&handed, no_ack);
        }
        offer
    }

    fn account(&mut self, handed: &HandedOut, no_ack: bool) {
        self.counts.ready = self.counts.ready.saturating_sub(handed.messages as u64);
        self.counts.ready_bytes = self.counts.ready_bytes.saturating_sub(handed.bytes);
        if no_ack {
            self.durable_count = self.durable_count.saturating_sub(handed.durable);
            self.durable_bytes = self.durable_bytes.saturating_sub(handed.durable_bytes);
            self.unwritten_durable = self.unwritten_durable.saturating_sub(handed.durable - handed.written);
            if handed.written > 0 {
                self.consumed_bytes += handed.durable_bytes;
                self.consumption_unwritten = true;
                self.dirty_segments
                    .insert_range(handed.first_written / SEGMENT_RECORDS, handed.last_written / SEGMENT_RECORDS + 1);
            }
        } else {
            self.counts.unacked += handed.messages as u64;
            self.counts.unacked_bytes += handed.bytes;
            // A restart must know that these were handed out: they come back as redelivered.
            self.consumption_unwritten |= handed.durable > 0;
            self.unacked_durable += handed.durable;
            self.unacked_durable_bytes += handed.durable_bytes;
        }
        self.consumption_unwritten |= handed.lost > 0;
    }

    pub(super) fn settle(&mut self, consumer: Option<ConsumerId>, deliveries: &[Settled], how: Settlement) {
        for delivery in deliveries {
            let bytes = u64::from(delivery.body_bytes);
            self.counts.unacked = self.counts.unacked.saturating_sub(1);
            self.counts.unacked_bytes = self.counts.unacked_bytes.saturating_sub(bytes);
            if delivery.persistent {
                self.unacked_durable = self.unacked_durable.saturating_sub(1);
                self.unacked_durable_bytes = self.unacked_durable_bytes.saturating_sub(bytes);
            }
            if how == Settlement::Requeue {
                self.log.give_back(delivery.seq);
                self.counts.ready += 1;
                self.counts.ready_bytes += bytes;
                continue;
            }
            self.log.consume(delivery.seq);
            if delivery.persistent {
                self.durable_count = self.durable_count.saturating_sub(1);
                self.durable_bytes = self.durable_bytes.saturating_sub(bytes);
                if delivery.seq < self.written_to {
                    self.consumed_bytes += bytes;
                    self.consumption_unwritten = true;
                    self.dirty_segments.insert(delivery.seq / SEGMENT_RECORDS);
                } else {
                    self.unwritten_durable = self.unwritten_durable.saturating_sub(1);
                }
            }
        }
        if let Some(id) = consumer {
            self.consumers.settled(id, deliveries.len() as u32);
        }
    }

    /// Consumes everything ready; answers how much that was.
    pub(super) fn purge(&mut self) -> u64 {
        let purged = self.counts.ready;
        for (start, end) in self.log.purge() {
            self.dirty_segments.insert_range(start / SEGMENT_RECORDS, (end - 1) / SEGMENT_RECORDS + 1);
        }
        self.nothing_ready();
        // What no round has taken yet is in memory, so it can be counted.
        let mut unwritten = 0;
        self.log.for_each_durable(self.written_to, &mut self.scratch, &mut |_, _| unwritten += 1);
        self.unwritten_durable = unwritten;
        self.consumption_unwritten = true;
        purged
    }

    /// Sets the counts to what an empty ready set means, whatever damaged records had left in them.
    fn nothing_ready(&mut self) {
        (self.counts.ready, self.counts.ready_bytes) = (0, 0);
        (self.durable_count, self.durable_bytes) = (self.unacked_durable, self.unacked_durable_bytes);
    }

    pub(super) fn delete(&mut self, budget: &Arc<MemoryBudget>) -> DeletedQueue {
        let ready = self.counts.ready;
        self.deleted = true;
        self.log = QueueLog::new(budget.clone());
        self.counts = Counts::default();
        (self.unacked_durable, self.unacked_durable_bytes, self.unwritten_durable) = (0, 0, 0);
        self.nothing_ready();
        self.unopened = None;
        DeletedQueue { consumers: self.consumers.take_all(), ready, in_store: self.in_store }
    }
}

/// What one turn has handed out.
#[derive(Default)]
struct HandedOut {
    messages: usize,
    bytes: u64,
    durable: u64,
    durable_bytes: u64,
    /// Of the durable ones, those a round has taken.
    written: u64,
    first_written: u64,
    last_written: u64,
    lost: u64,
}

impl HandedOut {
    #[inline]
    fn add(&mut self, seq: u64, body_bytes: u64, persistent: bool, no_ack: bool, written_to: u64) {
        self.messages += 1;
        self.bytes += body_bytes;
        if persistent {
            self.durable += 1;
            self.durable_bytes += body_bytes;
            if no_ack && seq < written_to {
                if self.written == 0 {
                    self.first_written = seq;
                }
                self.first_written = self.first_written.min(seq);
                self.last_written = self.last_written.max(seq);
                self.written += 1;
            }
        }
    }
}
