//! Where a publish goes: to queues that are known, or through an exchange that does more than routing.

use super::{Fault, Session};
use crate::{
    broker::{Arrival, Message},
    model::Name,
    session::channel::CachedRoute,
};

/// See the module.
pub enum Way {
    Queues(CachedRoute),
    /// One that sees every message, or that leads to one.
    Exchange(Name),
}

impl Session {
    /// Publishes through an exchange that sees every message, returns the message if it is mandatory and no queue has it, and
    /// confirms.
    pub(super) fn publish_through(
        &mut self,
        number: u16,
        exchange: &str,
        message: &Message<'_>,
        mandatory: bool,
    ) -> Result<(), Fault> {
        let Some(vhost) = self.vhost.clone() else { return Ok(()) };
        self.count_publish(number);
        if message.persistent && self.broker.is_store_failing() {
            self.needs_disk = true;
            if self.is_confirming(number) {
                self.refuse(number);
                return Ok(());
            }
        }
        let published = vhost
            .publish(exchange, message, Arrival::Client, &mut self.effects)
            .map_err(|error| Fault::from(error).at(60, 40))?;
        self.trace_publish(number, message, &published.queues);
        if published.is_unrouted && mandatory {
            self.outbox.return_message(number, message);
            self.check_clogged();
        }
        self.answer_publish(number, published.outcome);
        Ok(())
    }
}
