//! `tx`: publishes and settlements of a channel, held back until commit, then applied in one round.

use amq_protocol::protocol::{AMQPClass, tx};

use super::{
    channel::{Channel, Mode},
    close::Fault,
    connection::{Answer, Session},
    publish::{Way, offer},
    unacked::Unacked,
};
use crate::broker::{Arrival, Message, Outcome, OwnedMessage, Round, Settlement};

/// A publish that waits for its commit. It was routed when it was published, as in RabbitMQ; through an exchange that sees
/// every message it goes with the commit.
pub struct TxPublish {
    way: Way,
    message: OwnedMessage,
    mandatory: bool,
}

impl TxPublish {
    pub fn new(way: Way, message: &Message<'_>, mandatory: bool) -> Self {
        TxPublish { way, message: message.into(), mandatory }
    }
}

/// What a commit will do.
#[derive(Default)]
pub struct Transaction {
    publishes: Vec<TxPublish>,
    settlements: Vec<(Settlement, Vec<Unacked>)>,
}

impl Transaction {
    pub fn publish(&mut self, publish: TxPublish) {
        self.publishes.push(publish);
    }

    pub fn settle(&mut self, how: Settlement, taken: Vec<Unacked>) {
        self.settlements.push((how, taken));
    }
}

impl Session {
    /// Undoes what an uncommitted transaction of the channel has settled.
    pub(super) fn undo_settlements(&mut self, number: u16) {
        if let Ok(transaction) = self.transaction(number) {
            for (_, taken) in std::mem::take(&mut transaction.settlements) {
                self.outbox.restore_unacked(number, taken);
            }
        }
    }

    fn transaction(&mut self, number: u16) -> Result<&mut Transaction, Fault> {
        match self.channels.get_mut(number) {
            Some(Channel { mode: Mode::Tx(transaction), .. }) => Ok(transaction),
            _ => Err(Fault::new(406, "channel is not transactional")),
        }
    }

    pub(super) fn on_tx(&mut self, number: u16, method: &tx::AMQPMethod) -> Result<Answer, Fault> {
        match method {
            tx::AMQPMethod::Select(_) => {
                let Some(channel) = self.channels.get_mut(number) else { return Ok(Answer::None) };
                match channel.mode {
                    Mode::Confirm { .. } => return Err(Fault::new(406, "cannot switch from confirm to tx mode")),
                    Mode::Plain => channel.mode = Mode::Tx(Box::default()),
                    Mode::Tx(_) => {}
                }
                Ok(Answer::Now(AMQPClass::Tx(tx::AMQPMethod::SelectOk(tx::SelectOk {}))))
            }
            tx::AMQPMethod::Commit(_) => {
                let transaction = std::mem::take(self.transaction(number)?);
                self.commit(number, transaction)
            }
            tx::AMQPMethod::Rollback(_) => {
                self.undo_settlements(number);
                *self.transaction(number)? = Transaction::default();
                Ok(Answer::Now(AMQPClass::Tx(tx::AMQPMethod::RollbackOk(tx::RollbackOk {}))))
            }
            _ => Err(Fault::new(503, "unimplemented method")),
        }
    }

    /// Publishes what a commit has let go, within its round.
    fn publish_committed(&mut self, number: u16, publish: &TxPublish) -> Outcome {
        let message = publish.message.view();
        let (outcome, is_unrouted) = match (&publish.way, &self.vhost) {
            (Way::Queues(route), _) => (offer(route, &message, &mut self.effects), route.is_empty()),
            (Way::Exchange(exchange), Some(vhost)) => {
                let vhost = vhost.clone();
                match vhost.publish(exchange, &message, Arrival::Client, &mut self.effects) {
                    Ok(published) => {
                        self.trace_publish(number, &message, &published.queues);
                        (published.outcome, published.is_unrouted)
                    }
                    Err(_) => (Outcome::Accepted(0), true), // the exchange has gone meanwhile
                }
            }
            (Way::Exchange(_), None) => (Outcome::Accepted(0), false),
        };
        if is_unrouted && publish.mandatory {
            self.outbox.return_message(number, &message);
        }
        outcome
    }

    fn commit(&mut self, number: u16, transaction: Transaction) -> Result<Answer, Fault> {
        if let (Some(reason), true) =
            (self.broker.store_failure(), transaction.publishes.iter().any(|publish| publish.message.persistent))
        {
            tracing::warn!(reason, "transaction refused");
            (self.published, self.needs_disk) = (true, true);
            return Err(Fault::new(406, "partial tx completion"));
        }
        let mut round: Round = 0;
        {
            let broker = self.broker.clone();
            let _one_round = broker.atomic();
            let mut refused = false;
            for publish in &transaction.publishes {
                match self.publish_committed(number, publish) {
                    Outcome::Accepted(durable) => round = round.max(durable),
                    Outcome::Rejected => refused = true,
                }
            }
            for (how, taken) in &transaction.settlements {
                self.outbox.settle_taken(number, taken, &mut self.settling);
                round = round.max(self.apply_settlements(*how, true));
            }
            if transaction
                .settlements
                .iter()
                .any(|(how, _)| matches!(how, Settlement::Rejected | Settlement::Discarded))
            {
                round = round.max(broker.open_round()); // the dead letters are in it
            }
            self.carry_out();
            if refused {
                // As in RabbitMQ: everything else has taken effect.
                return Err(Fault::new(406, "partial tx completion"));
            }
        }
        let answer = AMQPClass::Tx(tx::AMQPMethod::CommitOk(tx::CommitOk {}));
        Ok(Answer::After(round, Some(answer)))
    }
}
