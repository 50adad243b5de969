//! How a message passes an exchange that does more than routing: the one way in for clients, transactions, dead letters and
//! delayed messages.
//!
//! # Atomicity
//! All that a message changes is in one round: what exchanges on the way keep of it, and its copies in queues.
//!
//! # Order at an exchange
//! A duplicate goes no further. A message that asks to wait is kept, and comes back when it is due, past those two. What is
//! left is remembered by the history and routed.

use std::sync::Arc;

use smallvec::SmallVec;

use super::{Route, Vhost};
use crate::{
    broker::{
        dead_letter,
        deduplication::{Admission, ExchangeDedup, Verdict},
        delay_headers::due_unix_ms,
        exchange::{Attributes, Exchange},
        message::Message,
        port::Effects,
        queue::{Outcome, Queue},
        router::{Topology, TopologyError},
    },
    clock,
    model::properties::Properties,
    store::{AtomicSection, Round},
};

/// Where a message comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// From a client, or from the broker itself.
    Client,
    /// From a queue. It is no duplicate, wherever it was before, and does not go where that would close a cycle.
    DeadLetter,
    /// From the exchange's own delayed messages.
    Due,
    /// From the history of another exchange, for a new binding.
    Replay,
}

/// What became of a message.
#[derive(Clone, Debug)]
pub struct Published {
    pub outcome: Outcome,
    /// No queue has it, and it is no duplicate. Also of a message that waits in an exchange, as in RabbitMQ's plugin: a
    /// mandatory one is returned.
    pub is_unrouted: bool,
    /// Where it was routed to.
    pub queues: SmallVec<[Arc<Queue>; 4]>,
}

/// A message on its way through the exchanges.
struct Passage<'a> {
    vhost: &'a Vhost,
    section: &'a AtomicSection<'a>,
    message: &'a Message<'a>,
    properties: Properties<'a>,
    arrival: Arrival,
    /// Where it was published.
    start: &'a str,
    now_unix_ms: u64,
    /// When what the exchanges keep is durable.
    round: Round,
    admissions: SmallVec<[(Arc<ExchangeDedup>, Admission); 1]>,
    is_duplicate: bool,
    waits: bool,
}

impl Passage<'_> {
    /// Shows the message to an exchange; `false` if it goes no further from there.
    fn enter(&mut self, exchange: &Exchange) -> bool {
        let Some(state) = self.vhost.exchange_state(&exchange.name) else { return true };
        let persistent = self.message.persistent && state.durable;
        let came_back = self.arrival == Arrival::Due && *exchange.name == *self.start;
        if let (Some(dedup), false) = (&state.dedup, came_back || self.arrival == Arrival::DeadLetter) {
            let headers = self.properties.raw_headers();
            let (verdict, round) = dedup.check_and_insert(self.section, self.now_unix_ms, headers, persistent);
            self.round = self.round.max(round);
            match verdict {
                Verdict::New(admission) => self.admissions.push((dedup.clone(), admission)),
                Verdict::NoKey => {}
                Verdict::Duplicate => {
                    self.is_duplicate = true;
                    return false;
                }
            }
        }
        if let (Some(delays), false) = (&state.delays, came_back)
            && let Some(due) = due_unix_ms(&self.properties, clock::ceil_unix_ms())
        {
            let round = delays.push(due, self.message);
            self.round = self.round.max(if persistent { round } else { 0 });
            self.waits = true;
            return false;
        }
        if let Some(history) = &state.history {
            let round = history.record(self.section, std::slice::from_ref(self.message));
            self.round = self.round.max(if persistent { round } else { 0 });
        }
        true
    }

    /// Hands the message to the queues that were found.
    fn deliver(self, route: Route, effects: &mut Effects) -> Published {
        let mut round = Some(self.round);
        for queue in &route.queues {
            if self.closes_cycle(queue) {
                continue;
            }
            round = match (queue.offer(self.message, effects), round) {
                (Outcome::Accepted(another), Some(round)) => Some(round.max(another)),
                _ => None,
            };
        }
        let is_nowhere = route.queues.is_empty() && !self.waits;
        if round.is_none() || is_nowhere {
            // Whoever publishes it again means it.
            for (dedup, admission) in self.admissions {
                dedup.withdraw(admission);
            }
        }
        Published {
            outcome: round.map_or(Outcome::Rejected, Outcome::Accepted),
            is_unrouted: route.queues.is_empty() && !self.is_duplicate,
            queues: route.queues,
        }
    }

    fn closes_cycle(&self, queue: &Queue) -> bool {
        let closes = self.arrival == Arrival::DeadLetter && dead_letter::is_cycle(self.message, &queue.options.name);
        if closes {
            tracing::warn!(vhost = %self.vhost.name, queue = %queue.options.name, "a dead letter has gone in a circle and is dropped");
        }
        closes
    }
}

impl Vhost {
    /// Publishes a message through an exchange: the state of every exchange on the way takes part. Permissions, and whether
    /// clients may publish there, are not looked at.
    ///
    /// # Errors
    /// 404 without such an exchange.
    pub fn publish(
        &self,
        exchange: &str,
        message: &Message<'_>,
        arrival: Arrival,
        effects: &mut Effects,
    ) -> Result<Published, TopologyError> {
        // Before the topology is locked, as everywhere.
        let section = self.environment.store.atomic();
        let mut route = Route::default();
        let passage = self.pass(&self.topology.read(), &section, exchange, message, arrival, &mut route)?;
        Ok(passage.deliver(route, effects))
    }

    /// [`Vhost::publish`] while the topology is locked already.
    pub(super) fn publish_in(
        &self,
        topology: &Topology<Arc<Queue>>,
        section: &AtomicSection<'_>,
        exchange: &str,
        message: &Message<'_>,
        effects: &mut Effects,
    ) -> Result<Published, TopologyError> {
        let mut route = Route::default();
        let passage = self.pass(topology, section, exchange, message, Arrival::Replay, &mut route)?;
        Ok(passage.deliver(route, effects))
    }

    fn pass<'a>(
        &'a self,
        topology: &Topology<Arc<Queue>>,
        section: &'a AtomicSection<'a>,
        exchange: &'a str,
        message: &'a Message<'a>,
        arrival: Arrival,
        route: &mut Route,
    ) -> Result<Passage<'a>, TopologyError> {
        let properties = Properties::parse(message.properties).unwrap_or_default();
        let mut passage = Passage {
            vhost: self,
            section,
            message,
            properties,
            arrival,
            start: exchange,
            now_unix_ms: clock::now_unix_ms(),
            round: 0,
            admissions: SmallVec::new(),
            is_duplicate: false,
            waits: false,
        };
        let attributes = Attributes::of(properties);
        let keys = message.routing_keys();
        topology.route_observed(exchange, &keys, &attributes, &mut |seen| passage.enter(seen), route)?;
        Ok(passage)
    }

    /// Publishes a dead letter through its exchange, to every queue in which it did not die before. An exchange that is
    /// missing, or leads nowhere, drops it.
    pub(in crate::broker) fn publish_dead_letter(&self, exchange: &str, letter: &Message<'_>, effects: &mut Effects) {
        if self.publish(exchange, letter, Arrival::DeadLetter, effects).is_err() {
            tracing::debug!(vhost = %self.name, exchange, "dead-letter exchange is missing; the message is dropped");
        }
    }
}
