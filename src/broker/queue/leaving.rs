//! How messages leave a queue other than by an ack: expired, dropped for length, rejected, given up after too many
//! attempts; and how they come back.

use std::sync::Arc;

use super::{
    ConsumerId, Queue, Settled, SettledRun, Settlement,
    checkouts::OverdueHolder,
    lane::Tally,
    lanes::queue_position,
    state::{Next, QueueState},
};
use crate::{
    broker::{
        arguments::QueueType,
        dead_letter::DeathReason,
        message::{Message, OwnedMessage},
        port::{DyingMessage, Effects, TimedOut},
        rules::{DelayedRetryKind, Overflow},
    },
    clock,
};

/// Messages that expire in one go before the lock is given up.
const EXPIRY_BATCH: usize = 1024;
/// Messages dropped for length in one go.
const DROP_BATCH: usize = 4096;
/// Time between looks at a long queue for messages that expire within it, in milliseconds.
const EXPIRY_PAUSE_MS: u64 = 20;
/// A queue of more ready messages is a long one.
const LONG_QUEUE: u64 = 8192;

impl QueueState {
    /// Whether a publish may have to be refused.
    pub(super) fn may_reject(&self) -> bool {
        self.rejects() && self.has_length_limit()
    }

    /// Whether too much is refused at the tail. Quorum queues take `reject-publish-dlx` for `drop-head`.
    fn rejects(&self) -> bool {
        match self.rules.overflow {
            Overflow::DropHead => false,
            Overflow::RejectPublish => true,
            Overflow::RejectPublishDlx => self.traits.queue_type == QueueType::Classic,
        }
    }

    fn has_length_limit(&self) -> bool {
        self.rules.max_length.is_some() || self.rules.max_length_bytes.is_some()
    }

    /// Whether anything but acks makes messages leave.
    #[inline]
    pub(super) fn has_limits_or_deadlines(&self) -> bool {
        self.wake_at_unix_ms < u64::MAX || self.has_length_limit()
    }

    /// Whether a message more would be too much.
    pub(super) fn is_full_for(&self, message: &Message<'_>) -> bool {
        let Tally { messages, bytes } = self.limited();
        self.rejects()
            && (self.rules.max_length.is_some_and(|max| messages + 1 > max)
                || self.rules.max_length_bytes.is_some_and(|max| bytes + message.body.len() as u64 > max))
    }

    fn is_too_long(&self) -> bool {
        let Tally { messages, bytes } = self.limited();
        self.rules.max_length.is_some_and(|max| messages > max)
            || self.rules.max_length_bytes.is_some_and(|max| bytes > max)
    }

    /// When an unused queue goes, if it is unused now.
    pub(super) fn lease_ends_unix_ms(&self) -> Option<u64> {
        // What somebody has got keeps a quorum queue in use.
        let is_used = !self.consumers.is_empty() || (self.checkouts.is_some() && self.unacked.messages > 0);
        let expires = self.rules.expires_ms.filter(|_| !is_used)?;
        Some(self.last_used_unix_ms.saturating_add(expires))
    }

    /// Makes sure that the end of the lease is noticed.
    pub(super) fn renew_lease(&mut self) {
        if let Some(end) = self.lease_ends_unix_ms() {
            self.wake_at_unix_ms = self.wake_at_unix_ms.min(end);
        }
    }

    /// Finds out when something will be due next.
    pub(super) fn find_next_deadline(&mut self, now_unix_ms: u64) {
        let mut at = self.attempts.next_due_unix_ms().min(self.lease_ends_unix_ms().unwrap_or(u64::MAX));
        if let Some(checkouts) = &self.checkouts {
            at = at.min(checkouts.next_deadline_unix_ms());
        }
        let expiry = self.lanes.iter().map(|lane| lane.log.next_expiry_unix_ms()).min().unwrap_or(u64::MAX);
        let pause = if self.lanes.ready().messages > LONG_QUEUE { EXPIRY_PAUSE_MS } else { 1 };
        at = at.min(expiry.max(now_unix_ms + pause));
        self.wake_at_unix_ms = at;
    }
}

impl Queue {
    /// Gives a held message up: dead-letters it, or consumes it where nothing is to be done with dead letters. `failures`
    /// are the failed deliveries it has behind it.
    fn bury(
        self: &Arc<Self>,
        state: &mut QueueState,
        delivery: &Settled,
        (reason, failures): (DeathReason, u32),
        message: Option<OwnedMessage>,
        effects: &mut Effects,
    ) {
        if !self.keeps_dead(state, reason) {
            state.finish(delivery);
            return;
        }
        let message = message.or_else(|| {
            let (lane, seq) = state.lanes.find(delivery.seq)?;
            lane.log.message(seq).as_ref().map(OwnedMessage::from)
        });
        effects.dead.push(DyingMessage {
            position: Some(delivery.seq),
            deliveries: failures,
            message,
            ..self.dying(state, reason, delivery.body_bytes, delivery.persistent)
        });
    }

    /// A message that is given up: no longer in the queue, never failed, and still without its content.
    fn dying(
        self: &Arc<Self>,
        state: &QueueState,
        reason: DeathReason,
        body_bytes: u32,
        durable: bool,
    ) -> DyingMessage {
        let exchange = state.rules.dead_letter_exchange.clone();
        DyingMessage {
            queue: self.clone(),
            deliveries: 0,
            position: None,
            body_bytes,
            durable,
            reason,
            target: exchange.map(|exchange| (exchange, state.rules.dead_letter_routing_key.clone())),
            message: None,
        }
    }

    /// Whether messages that die of `reason` go somewhere.
    fn keeps_dead(&self, state: &QueueState, reason: DeathReason) -> bool {
        state.rules.dead_letter_exchange.is_some() || (reason == DeathReason::DeliveryLimit && state.rules.parking)
    }

    /// Dead-letters a copy of a publish that was refused.
    pub(super) fn dead_letter_refused(
        self: &Arc<Self>,
        state: &QueueState,
        message: &Message<'_>,
        effects: &mut Effects,
    ) {
        if self.keeps_dead(state, DeathReason::MaxLen) {
            effects.dead.push(DyingMessage {
                message: Some(OwnedMessage::from(message)),
                ..self.dying(state, DeathReason::MaxLen, message.body.len() as u32, message.persistent)
            });
        }
    }

    /// Takes a ready message out that is in memory, and buries it.
    fn drop_ready(
        self: &Arc<Self>,
        state: &mut QueueState,
        (level, seq): (u8, u64),
        reason: DeathReason,
        effects: &mut Effects,
    ) {
        let Some((message, consumed)) = state.take_out(level, seq) else { return };
        let body_bytes = message.body.len() as u32;
        if !consumed {
            let delivery = Settled { seq: queue_position(level, seq), body_bytes, persistent: message.persistent };
            let failures = state.attempts.failures(delivery.seq);
            self.bury(state, &delivery, (reason, failures), Some(message), effects);
        } else if self.keeps_dead(state, reason) {
            let dying = self.dying(state, reason, body_bytes, message.persistent);
            effects.dead.push(DyingMessage { message: Some(message), ..dying });
        }
    }

    /// Ends the message that is next, which has expired.
    pub(super) fn expire(self: &Arc<Self>, state: &mut QueueState, level: u8, seq: u64, effects: &mut Effects) {
        self.drop_ready(state, (level, seq), DeathReason::Expired, effects);
    }

    /// Ends the parked messages that were found to have expired.
    pub(super) fn bury_expired_parked(self: &Arc<Self>, state: &mut QueueState, effects: &mut Effects) {
        for delivery in std::mem::take(&mut state.expired_parked) {
            let failures = state.attempts.failures(delivery.seq);
            self.bury(state, &delivery, (DeathReason::Expired, failures), None, effects);
        }
    }

    /// Ends what has expired and is next.
    pub(super) fn expire_head(self: &Arc<Self>, state: &mut QueueState, now_unix_ms: u64, effects: &mut Effects) {
        for _ in 0..EXPIRY_BATCH {
            match state.next() {
                Next::Ready { level, seq, expires_unix_ms: Some(expires) } if expires <= now_unix_ms => {
                    self.expire(state, level, seq, effects);
                }
                _ => return,
            }
        }
        effects.again.push(self.clone());
    }

    /// Ends what has expired, at the head and wherever it is in memory.
    ///
    /// What is taken out behind the head is consumed at once, so its dead letter must be stored in the same round: the caller
    /// holds an [atomic section](crate::store::AtomicSection).
    pub(super) fn drop_expired(self: &Arc<Self>, state: &mut QueueState, now_unix_ms: u64, effects: &mut Effects) {
        let mut room = EXPIRY_BATCH;
        let expiring: Vec<u8> = state
            .lanes
            .iter()
            .filter(|lane| lane.log.next_expiry_unix_ms() <= now_unix_ms)
            .map(|lane| lane.level)
            .collect();
        for level in expiring {
            let found = state.log(level).expired(now_unix_ms, room);
            room -= found.len();
            for seq in found {
                self.drop_ready(state, (level, seq), DeathReason::Expired, effects);
            }
        }
        // What expires behind a head that is only in the store is found when the head is read.
        if state.rules.message_ttl_ms.is_some()
            && let Next::Absent { level, seq } = state.next()
        {
            self.request_load(state, level, seq);
        }
    }

    /// Drops what is too much, next to be delivered first.
    pub(super) fn enforce_limits(self: &Arc<Self>, state: &mut QueueState, effects: &mut Effects) {
        let rejects = state.rejects() && self.traits.queue_type == QueueType::Classic;
        let mut room = DROP_BATCH;
        while !rejects && state.is_too_long() {
            if room == 0 {
                effects.again.push(self.clone());
                break;
            }
            room -= 1;
            match state.next() {
                Next::Nothing => break,
                Next::Absent { level, seq } => {
                    if !self.load_now(state, level, seq) {
                        break;
                    }
                }
                Next::Ready { level, seq, .. } => self.drop_ready(state, (level, seq), DeathReason::MaxLen, effects),
            }
        }
        if room < DROP_BATCH {
            self.note_changes(state);
        }
    }

    /// Applies rejections and returns; answers how many came too late.
    pub(super) fn settle_undone(
        self: &Arc<Self>,
        state: &mut QueueState,
        consumer: Option<ConsumerId>,
        runs: &[SettledRun],
        how: Settlement,
        effects: &mut Effects,
    ) -> u32 {
        let now = if state.counts_attempts() { clock::ceil_unix_ms() } else { 0 };
        let mut late = 0;
        for delivery in runs.iter().flat_map(|run| run.each()) {
            if !state.check_in(consumer, &delivery) {
                late += 1;
                continue;
            }
            match how {
                Settlement::Rejected | Settlement::Discarded if state.rules.retry.is_none() => {
                    if how == Settlement::Rejected && state.counts_attempts() {
                        state.attempts.count(delivery.seq, true);
                    }
                    let failures = state.attempts.failures(delivery.seq);
                    self.bury(state, &delivery, (DeathReason::Rejected, failures), None, effects);
                }
                _ => self.put_back(state, &delivery, how, now, effects),
            }
        }
        late
    }

    /// Makes a held message ready again: now, after its backoff, or not at all when it has failed too often.
    fn put_back(
        self: &Arc<Self>,
        state: &mut QueueState,
        delivery: &Settled,
        how: Settlement,
        now_unix_ms: u64,
        effects: &mut Effects,
    ) {
        if !state.counts_attempts() {
            state.give_back(delivery);
            return;
        }
        let failed = how != Settlement::Returned || state.rules.retry.is_some();
        if !failed && !state.shows_attempts() {
            state.give_back(delivery);
            return;
        }
        let failures = state.attempts.failures(delivery.seq) + u32::from(failed);
        let beyond_limit = state.rules.delivery_limit.is_some_and(|limit| failures > limit);
        let beyond_retries = state.rules.retry.is_some_and(|retry| failures > retry.max);
        if failed && (beyond_limit || beyond_retries) {
            tracing::warn!(queue = %self.options.name, vhost = %self.options.vhost, failures, "a message has failed too often and leaves its queue");
            // The last failure is not counted: were it stored before the dead letter is, a broker that ends in between would
            // deliver the message again, beyond its limit.
            self.bury(state, delivery, (DeathReason::DeliveryLimit, failures), None, effects);
            return;
        }
        state.attempts.count(delivery.seq, failed);
        let delay_ms = backoff_ms(state, failures, failed);
        if delay_ms > 0 {
            let due = now_unix_ms + delay_ms;
            state.attempts.delay(delivery.seq, due, delivery.body_bytes);
            state.wake_at_unix_ms = state.wake_at_unix_ms.min(due);
            return;
        }
        state.give_back(delivery);
    }

    /// Makes messages ready whose backoff is over.
    pub(super) fn end_waiting(&self, state: &mut QueueState, now_unix_ms: u64) {
        while let Some((seq, body_bytes)) = state.attempts.take_due(now_unix_ms) {
            let persistent = state.durable && state.is_stored(seq);
            state.give_back(&Settled { seq, body_bytes, persistent });
        }
    }

    /// Takes back what consumers have held for too long.
    pub(super) fn return_overdue(self: &Arc<Self>, state: &mut QueueState, now_unix_ms: u64, effects: &mut Effects) {
        while let Some(overdue) = state.checkouts.as_mut().and_then(|checkouts| checkouts.take_overdue(now_unix_ms)) {
            tracing::warn!(queue = %self.options.name, vhost = %self.options.vhost, messages = overdue.deliveries.len(), "a consumer did not acknowledge in time");
            for delivery in &overdue.deliveries {
                state.unacked.sub(1, delivery.body_bytes.into());
                self.put_back(state, delivery, Settlement::Returned, now_unix_ms, effects);
            }
            let port = match overdue.holder {
                OverdueHolder::Consumer(consumer) => {
                    state.consumers.suspend(consumer, overdue.deliveries.len() as u32);
                    state.consumers.get(consumer).map(|consumer| (consumer.port.clone(), consumer.address))
                }
                OverdueHolder::Getter(port, to) => {
                    effects.timed_out.push((port, to, TimedOut::Get));
                    None
                }
            };
            effects.timed_out.extend(port.map(|(port, to)| (port, to, TimedOut::Consumer)));
        }
    }

    /// Ends messages whose dead letters are made. Called within the atomic section in which that was done.
    pub fn finish_dead(self: &Arc<Self>, dead: &[Settled]) {
        let mut state = self.open();
        if state.deleted {
            return;
        }
        for delivery in dead {
            state.finish(delivery);
        }
        self.note_changes(&mut state);
    }
}

/// How long a returned message waits, in milliseconds.
fn backoff_ms(state: &QueueState, failures: u32, failed: bool) -> u64 {
    if let Some(retry) = state.rules.retry {
        let exponent = i32::try_from(failures.saturating_sub(1)).unwrap_or(i32::MAX);
        let delay = (retry.initial_ms as f64 * retry.multiplier.powi(exponent)).min(retry.max_delay_ms as f64);
        let spread = if retry.jitter > 0.0 { 1.0 + retry.jitter * (2.0 * fraction() - 1.0) } else { 1.0 };
        return (delay * spread).max(0.0) as u64;
    }
    let delayed = state.rules.delayed_retry;
    let applies = match delayed.kind {
        DelayedRetryKind::Disabled => false,
        DelayedRetryKind::All => true,
        DelayedRetryKind::Failed => failed,
        DelayedRetryKind::Returned => !failed,
    };
    if applies { delayed.min_ms.saturating_mul(failures.max(1).into()).min(delayed.max_ms) } else { 0 }
}

/// A random number of `[0, 1)`; 0.5 where the system has no randomness.
fn fraction() -> f64 {
    getrandom::u32().map_or(0.5, |bits| f64::from(bits) / 4_294_967_296.0)
}
