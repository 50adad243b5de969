//! The way of one message: from its exchange over bindings, further exchanges and alternate exchanges to queues.

use smallvec::SmallVec;

use super::{Topology, TopologyError};
use crate::broker::exchange::{Attributes, Exchange, Subject, Target, Targets};

/// Where a message goes. Kept and reused by whoever publishes, so that routing allocates nothing.
#[derive(Clone, Debug)]
pub struct RouteResult<T> {
    /// Each queue once.
    pub queues: SmallVec<[T; 4]>,
    /// Whether the next message with the same exchange and keys goes the same way, while the topology stands. False
    /// when properties or chance had a say, and when an exchange on the way has to see every message.
    pub cacheable: bool,
    /// Whether an exchange on the way does more with messages than routing, so that a message must be published through
    /// it instead of handed to these queues.
    pub observed: bool,
    /// What is collected on the way; its memory is reused.
    targets: Targets,
}

impl<T> Default for RouteResult<T> {
    fn default() -> Self {
        Self { queues: SmallVec::new(), cacheable: true, observed: false, targets: Targets::default() }
    }
}

impl<T: Clone> Topology<T> {
    /// Finds the queues of a message. `keys` are its routing key, then those of CC, then those of BCC.
    ///
    /// An exchange that matches nothing hands over to its alternate exchange, if it has one that exists. Whether the
    /// exchange is internal is [`Topology::check_publish`]'s business: dead letters may go there.
    ///
    /// # Errors
    /// 404 if the exchange does not exist. Without a queue the result is empty and no error.
    ///
    /// # Cost
    /// Hot path: no allocation with up to 4 queues and 16 matches. Default and direct exchange: one look-up per key;
    /// fanout: a copy; topic: a walk; headers, JMS selectors and consistent hash: every binding. Plus a clone of `T` per
    /// queue.
    pub fn route(
        &self,
        exchange: &str,
        keys: &[&[u8]],
        attributes: &Attributes<'_>,
        out: &mut RouteResult<T>,
    ) -> Result<(), TopologyError> {
        self.route_observed(exchange, keys, attributes, &mut |_| true, out)
    }

    /// [`Topology::route`] of a message that is published now: `observe` is called with every exchange on the way that
    /// has to see messages, and tells whether the message goes on from there.
    ///
    /// # Errors
    /// Those of [`Topology::route`].
    pub fn route_observed(
        &self,
        exchange: &str,
        keys: &[&[u8]],
        attributes: &Attributes<'_>,
        observe: &mut dyn FnMut(&Exchange) -> bool,
        out: &mut RouteResult<T>,
    ) -> Result<(), TopologyError> {
        let RouteResult { queues, cacheable, observed, targets } = out;
        queues.clear();
        targets.clear();
        (*cacheable, *observed) = (true, false);
        if exchange.is_empty() {
            self.collect_by_name(keys, targets);
        } else {
            let mut seen_by = |exchange: &Exchange| {
                *observed = true;
                observe(exchange)
            };
            *cacheable = self.collect_from(exchange, &Subject { keys, attributes }, &mut seen_by, targets)?;
        }
        let found = targets.as_slice().iter().filter_map(|target| self.queues.get(target.as_queue()?));
        queues.extend(found.map(|entry| entry.target.clone()));
        Ok(())
    }

    /// The default exchange: every key that is a queue's name.
    fn collect_by_name(&self, keys: &[&[u8]], out: &mut Targets) {
        for key in keys {
            if let Some(&slot) = self.queue_slots.get(*key) {
                out.push(Target::queue(slot));
            }
        }
    }

    /// Collects from an exchange and from all it leads to. `out` is the list of work as well: exchanges in it are
    /// visited in turn. Tells whether the result is cacheable.
    ///
    /// The default exchange can be an alternate exchange, but has no bindings there and so leads nowhere, as in
    /// RabbitMQ.
    fn collect_from(
        &self,
        exchange: &str,
        subject: &Subject<'_>,
        observe: &mut dyn FnMut(&Exchange) -> bool,
        out: &mut Targets,
    ) -> Result<bool, TopologyError> {
        let (start, mut entry) = self.exchange_entry(exchange).ok_or_else(|| self.no_exchange(exchange))?;
        let mut cacheable = true;
        let mut visited = 0;
        loop {
            cacheable &= entry.cacheable;
            let goes_on = !entry.observes || observe(&entry.exchange);
            if goes_on {
                entry.matcher.collect(subject, out);
            }
            if goes_on
                && !out.take_matched()
                && let Some(alternate) = entry.exchange.effective_alternate()
                && let Some(&slot) = self.exchange_slots.get(alternate)
            {
                out.push(Target::exchange(slot));
                out.take_matched(); // that was not a match of the next exchange
            }
            entry = loop {
                let Some(target) = out.as_slice().get(visited) else {
                    return Ok(cacheable);
                };
                visited += 1;
                if let Some(slot) = target.as_exchange()
                    && slot != start
                    && let Some(next) = self.exchanges.get(slot)
                {
                    break next;
                }
            };
        }
    }
}
