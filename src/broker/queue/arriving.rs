//! How messages enter a queue: appended, or handed straight to a consumer; refused by a full queue, dropped as duplicates, or
//! kept until they are due.
//!
//! # Order
//! A duplicate goes first, whether it would wait or not. A message that waits is not counted by the length limits; when it is
//! due it enters even a full queue, as there is nobody left to refuse it to.

use std::sync::{Arc, atomic::Ordering};

use super::{Outcome, Queue, lanes::queue_position, record, state::QueueState};
use crate::{
    broker::{
        dead_letter,
        deduplication::{Admission, DedupCache, Verdict},
        delay::{DelayOwner, Delays, Origin, RELEASE_BATCH, with_released},
        delay_headers::due_unix_ms,
        environment::Environment,
        extension::Extension,
        message::{Body, Message, copy_large_bodies, with_bodies},
        port::{Effects, Offer},
        rules::{Overflow, QueueTraits},
    },
    clock,
    model::properties::Properties,
    store::{QueueId, Round},
};

/// What deduplication says of a message.
enum Admitted {
    Yes(Option<Admission>),
    /// Of a message that is durable with this round.
    Duplicate(Round),
}

/// Which of its messages a queue has after a restart.
#[derive(Clone, Copy)]
enum Persistence {
    /// A persistent message in a transient queue is as transient as the queue.
    None,
    Persistent,
    /// A quorum-type queue keeps everything.
    All,
}

impl Persistence {
    #[inline]
    fn keeps(self, message: &Message<'_>) -> bool {
        match self {
            Persistence::None => false,
            Persistence::Persistent => message.persistent,
            Persistence::All => true,
        }
    }
}

/// The deduplication of a queue.
pub(super) struct QueueDedup {
    pub cache: DedupCache,
    /// The last round that took a value, with its message.
    last: Round,
}

impl QueueDedup {
    /// The deduplication of a queue that asks for it, of a recovered one with what the store has.
    pub fn of(
        traits: &QueueTraits,
        id: QueueId,
        durable: bool,
        origin: Origin,
        environment: &Environment,
    ) -> Option<Box<Self>> {
        let rules = traits.deduplication.as_ref()?;
        let recovered = (origin == Origin::Recovered && durable).then(|| {
            DedupCache::recover(rules, id, &environment.store, clock::now_unix_ms()).inspect_err(|error| {
                tracing::error!(queue_id = id.0, %error, "values seen before the start cannot be read; duplicates of them will pass");
            })
        });
        let cache = recovered.and_then(Result::ok).unwrap_or_else(|| DedupCache::new(rules, durable));
        Some(Box::new(QueueDedup { cache, last: 0 }))
    }
}

impl Queue {
    /// Appends messages and hands out what consumers can take. Answers the round that makes all of them durable; 0 when
    /// there is nothing to wait for (transient messages, or all of them consumed already).
    ///
    /// A queue that [may reject](Queue::may_reject) is published to with [`Queue::offer`]; this takes what fits and drops the
    /// rest.
    ///
    /// Hot path: one lock for the whole run, no allocation a message. Queues that look into messages take them one by one.
    pub fn publish(self: &Arc<Self>, messages: &[Message<'_>], effects: &mut Effects) -> Round {
        if let Some(stream) = &self.stream {
            return stream.publish(messages);
        }
        if self.is_particular || self.may_reject() {
            let rounds = messages.iter().map(|message| match self.offer(message, effects) {
                Outcome::Accepted(round) => round,
                Outcome::Rejected => 0,
            });
            return rounds.max().unwrap_or(0);
        }
        match self.attend(messages.len()) {
            Ok(mut attended) => {
                let round = self.publish_locked(&mut attended.state, messages, effects);
                attended.finish(effects);
                round
            }
            Err(mut state) => self.publish_locked(&mut state, messages, effects),
        }
    }

    fn publish_locked(
        self: &Arc<Self>,
        state: &mut QueueState,
        messages: &[Message<'_>],
        effects: &mut Effects,
    ) -> Round {
        if state.deleted {
            return 0; // routed, then gone: counts as accepted
        }
        let mut messages = messages;
        if state.may_pass_through() {
            let taken = state.pass_through(messages, effects);
            messages = &messages[taken..];
            if messages.is_empty() {
                return 0;
            }
        }
        let bodies = copy_large_bodies(messages);
        if bodies.is_empty() {
            return self.append_locked(state, messages, effects);
        }
        self.append_locked(state, &with_bodies(messages, &bodies), effects)
    }

    /// The part of publishing that comes after what consumers take at once.
    fn append_locked(
        self: &Arc<Self>,
        state: &mut QueueState,
        messages: &[Message<'_>],
        effects: &mut Effects,
    ) -> Round {
        let now = clock::now_unix_ms();
        let is_next = state.append_all(messages, now);
        if state.can_deliver() {
            let arrived = if is_next { messages } else { &[] };
            self.deliver_arrived(state, arrived, now, effects);
            effects.congested |= state.is_congested();
        }
        if state.has_limits_or_deadlines() {
            self.expire_head(state, now, effects);
            self.enforce_limits(state, effects);
            self.schedule(state);
        }
        if state.lanes.has_unwritten() {
            state.unwritten.add(messages.iter().map(record::encoded_len).sum());
            for message in messages {
                if let Body::Shared(body) = message.body {
                    state.unwritten.add_body(body);
                }
            }
            return self.mark_dirty(state);
        }
        if self.environment.budget.is_over() {
            self.mark_dirty(state);
        }
        0
    }

    /// Whether a large body is best left where it stands, as one that a consumer takes at once is never kept. Others keep it
    /// in any case.
    #[inline]
    pub fn takes_bodies_in_place(&self) -> bool {
        self.stream.is_none() && !self.is_particular
    }

    /// Whether the queue refuses publishes when it is full (`x-overflow`).
    #[inline]
    pub fn may_reject(&self) -> bool {
        self.may_reject.load(Ordering::Relaxed)
    }

    /// [`Queue::publish`] of one message, to a queue that may refuse it.
    pub fn offer(self: &Arc<Self>, message: &Message<'_>, effects: &mut Effects) -> Outcome {
        if let Some(stream) = &self.stream {
            return Outcome::Accepted(stream.publish(std::slice::from_ref(message)));
        }
        if self.is_particular {
            return self.offer_particular(message, effects);
        }
        let mut state = self.open();
        self.offer_locked(&mut state, message, effects)
    }

    fn offer_locked(self: &Arc<Self>, state: &mut QueueState, message: &Message<'_>, effects: &mut Effects) -> Outcome {
        if !state.deleted && state.is_full_for(message) {
            if state.rules.overflow == Overflow::RejectPublishDlx {
                self.dead_letter_refused(state, message, effects);
            }
            return Outcome::Rejected;
        }
        Outcome::Accepted(self.publish_locked(state, std::slice::from_ref(message), effects))
    }

    /// [`Queue::offer`] to a queue that drops duplicates or delays messages.
    fn offer_particular(self: &Arc<Self>, message: &Message<'_>, effects: &mut Effects) -> Outcome {
        // The value that tells duplicates is stored with the message, wherever that is kept.
        let _one_round = self.environment.store.atomic();
        let mut guard = self.open();
        let state = &mut *guard;
        if state.deleted {
            return Outcome::Accepted(0);
        }
        let now = clock::now_unix_ms();
        let properties = Properties::parse(message.properties).unwrap_or_default();
        let persistent = state.persistence().keeps(message);
        let admission = match self.admit(state, message, &properties, persistent, now) {
            Admitted::Yes(admission) => admission,
            Admitted::Duplicate(round) => return Outcome::Accepted(round),
        };
        let due =
            self.delays.as_ref().and_then(|delays| Some((delays, due_unix_ms(&properties, clock::ceil_unix_ms())?)));
        let outcome = match due {
            Some((delays, due)) => {
                let round = delays.push(due, message);
                Outcome::Accepted(if persistent { round } else { 0 })
            }
            None => self.offer_locked(state, message, effects),
        };
        self.note_admission(state, admission, outcome, persistent)
    }

    /// A dead letter that died here before is no duplicate of itself.
    fn admit(
        &self,
        state: &mut QueueState,
        message: &Message<'_>,
        properties: &Properties<'_>,
        persistent: bool,
        now_unix_ms: u64,
    ) -> Admitted {
        let Some(dedup) = &mut state.dedup else { return Admitted::Yes(None) };
        if dead_letter::died_in(message, &self.options.name) {
            return Admitted::Yes(None);
        }
        match dedup.cache.check_and_insert(now_unix_ms, properties.raw_headers(), persistent) {
            Verdict::New(admission) => Admitted::Yes(Some(admission)),
            Verdict::NoKey => Admitted::Yes(None),
            Verdict::Duplicate if persistent => Admitted::Duplicate(self.environment.store.renewed(dedup.last)),
            Verdict::Duplicate => Admitted::Duplicate(0),
        }
    }

    /// Has the value of a message stored with it, or forgotten if the message was refused.
    fn note_admission(
        self: &Arc<Self>,
        state: &mut QueueState,
        admission: Option<Admission>,
        outcome: Outcome,
        persistent: bool,
    ) -> Outcome {
        let (Some(admission), Some(dedup)) = (admission, &mut state.dedup) else { return outcome };
        if outcome == Outcome::Rejected {
            dedup.cache.withdraw(admission);
        }
        if !dedup.cache.has_news() {
            return outcome;
        }
        let round = self.mark_dirty(state);
        if let Some(dedup) = &mut state.dedup {
            dedup.last = round;
        }
        match outcome {
            Outcome::Accepted(others) if persistent => Outcome::Accepted(others.max(round)),
            outcome => outcome,
        }
    }

    /// The messages that wait in a queue with `x-delayed`.
    pub(in crate::broker) fn delays(&self) -> Option<&Arc<Delays>> {
        self.delays.as_ref()
    }

    /// Whether the store may keep something for the queue that would be nobody's after a restart.
    pub(in crate::broker) fn may_leave_notes(&self) -> bool {
        self.delays.is_some() && !self.options.durable
    }
}

impl DelayOwner for Queue {
    /// Makes ready what is due.
    fn release_due(self: Arc<Self>, now_unix_ms: u64, effects: &mut Effects) -> Option<u64> {
        let delays = self.delays.as_ref()?;
        delays.take_due(now_unix_ms, RELEASE_BATCH, &mut |_, message| {
            with_released(message, now_unix_ms, |message| {
                let mut state = self.open();
                self.publish_locked(&mut state, std::slice::from_ref(message), effects);
            });
        });
        delays.next_due()
    }
}

impl QueueState {
    /// Whether messages that have just arrived may go straight to a consumer.
    #[inline]
    pub(super) fn may_pass_through(&self) -> bool {
        !self.consumers.is_empty() && self.groups.is_none() && !self.lanes.has_ready()
    }

    /// Hands messages that have just arrived straight to no-ack consumers while nothing is ready before them, so that
    /// they never enter the log. Answers how many were taken.
    pub(super) fn pass_through(&mut self, messages: &[Message<'_>], effects: &mut Effects) -> usize {
        let mut taken = 0;
        let stretch = self.stretch(messages.len() as u64);
        while taken < messages.len() {
            let Some((consumer, alone)) = self.consumers.current() else { break };
            if !consumer.no_ack {
                break;
            }
            let run = if alone { messages.len() } else { messages.len().min(taken + stretch) };
            let (to, mut last, mut is_behind) = (consumer.address, Offer::Taken, false);
            let wake = consumer.port.with_writer(&mut |writer| {
                let (more, offer) = writer.deliver_run(to, 0, &messages[taken..run]);
                taken += more;
                last = offer;
                is_behind = writer.is_behind();
            });
            if is_behind && effects.behind.is_none() {
                effects.behind = Some(consumer.port.clone());
            }
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

    /// Which messages survive a restart.
    #[inline]
    fn persistence(&self) -> Persistence {
        match (self.durable, self.checkouts.is_some()) {
            (false, _) => Persistence::None,
            (true, false) => Persistence::Persistent,
            (true, true) => Persistence::All,
        }
    }

    /// Appends a run of messages. Answers whether they are what now stands at the cursor, with nothing more to be known of them
    /// than what `messages` says.
    ///
    /// Hot path: what an ordinary queue and ordinary messages need is decided once a run.
    fn append_all(&mut self, messages: &[Message<'_>], now_unix_ms: u64) -> bool {
        let persistence = self.persistence();
        let is_plain =
            |message: &Message<'_>| message.extension.is_empty() && persistence.keeps(message) == message.persistent;
        let plain = self.traits.max_priority == 0 && self.rules.message_ttl_ms.is_none();
        let mut appended = 0;
        let mut is_next = false;
        if let (true, Some(lane)) = (plain, self.lanes.only()) {
            appended = messages.iter().position(|message| !is_plain(message)).unwrap_or(messages.len());
            is_next = appended == messages.len() && lane.log.is_drained();
            lane.log.append_run(&messages[..appended], now_unix_ms);
            lane.appended_all(&messages[..appended]);
        }
        let others = &messages[appended..];
        let expected_bytes = others.iter().map(record::encoded_len).sum();
        for message in others {
            self.append(message, now_unix_ms, expected_bytes);
        }
        is_next
    }

    pub(super) fn append(&mut self, message: &Message<'_>, now_unix_ms: u64, expected_bytes: usize) {
        let persistent = self.persistence().keeps(message);
        let message = Message { persistent, ..*message };
        let level = if self.traits.max_priority == 0 { 0 } else { self.level_of(message.properties) };
        if self.rules.message_ttl_ms.is_none() && message.extension.is_empty() {
            let lane = self.lanes.at_level(level);
            lane.log.append(&message, now_unix_ms, || expected_bytes);
            lane.appended(message.body.len() as u64, persistent);
        } else {
            self.append_extended(level, &message, now_unix_ms, expected_bytes);
        }
    }

    fn append_extended(&mut self, level: u8, message: &Message<'_>, now_unix_ms: u64, expected_bytes: usize) {
        let mut extension = Extension::parse(message.extension);
        // Who has no time at all may still be taken by a consumer that is ready now.
        extension.expires_unix_ms = extension.expires_unix_ms.map(|expires| expires.max(now_unix_ms));
        let by_queue = self.rules.message_ttl_ms.map(|ttl| match ttl {
            0 => now_unix_ms,
            _ => clock::ceil_unix_ms().saturating_add(ttl),
        });
        extension.expires_unix_ms = match (extension.expires_unix_ms, by_queue) {
            (Some(own), Some(queue)) => Some(own.min(queue)),
            (own, queue) => own.or(queue),
        };
        if let Some(expires) = extension.expires_unix_ms {
            self.wake_at_unix_ms = self.wake_at_unix_ms.min(expires);
        }
        let deliveries = extension.deliveries;
        let extension = extension.encode();
        let message = Message { extension: &extension, ..*message };
        let quorum = self.is_quorum();
        let lane = self.lanes.at_level(level);
        let seq = lane.log.append(&message, now_unix_ms, || expected_bytes);
        if deliveries > 0 && quorum {
            self.attempts.seed(queue_position(level, seq), deliveries);
        }
        lane.appended(message.body.len() as u64, message.persistent);
    }

    fn level_of(&self, properties: &[u8]) -> u8 {
        let priority = Properties::parse(properties).ok().and_then(|view| view.priority());
        priority.unwrap_or(self.traits.default_priority).min(self.traits.max_priority)
    }
}
