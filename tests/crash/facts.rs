//! What the clients of one round know, and what the broker must therefore hold after the kill.

use std::collections::{HashMap, HashSet};

use amq_protocol::protocol::BasicProperties;

use super::client::{Delivery, Rng};

/// A message: publisher in the upper half, its count in the lower.
pub type Id = u64;

/// The publisher of a message.
pub fn publisher(id: Id) -> u64 {
    id >> 32
}

/// A body that follows from its message's id and length alone.
pub fn body(id: Id, len: usize) -> Vec<u8> {
    let mut rng = Rng(id ^ (len as u64) << 40);
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend_from_slice(&rng.next().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

pub fn properties(id: Id, len: usize, persistent: bool) -> BasicProperties {
    let message_id = format!("{id:x}.{len:x}");
    BasicProperties::default().with_message_id(message_id.into()).with_delivery_mode(if persistent { 2 } else { 1 })
}

/// The id and length a message carries; a body that is not the one published is an error.
pub fn read(delivery: &Delivery) -> Result<(Id, usize), String> {
    let text = delivery.message_id();
    let parsed = text
        .split_once('.')
        .and_then(|(id, len)| Some((Id::from_str_radix(id, 16).ok()?, usize::from_str_radix(len, 16).ok()?)));
    let Some((id, len)) = parsed else { return Err(format!("message id '{text}'")) };
    match delivery.body == body(id, len) {
        true => Ok((id, len)),
        false => Err(format!("message {id:x} has a damaged body of {} bytes (published: {len})", delivery.body.len())),
    }
}

/// What the clients of one round know of a queue.
#[derive(Debug, Default)]
pub struct QueueFacts {
    /// Persistent messages whose publish was begun.
    pub sent: HashSet<Id>,
    pub confirmed: HashSet<Id>,
    /// Transient messages: they never survive.
    pub transient: HashSet<Id>,
    /// A settlement that ends the message was begun.
    pub acked: HashSet<Id>,
    /// And is known to be on disk.
    pub acked_for_good: HashSet<Id>,
    pub received: HashSet<Id>,
    /// A consumer without acks was there: a delivered message is gone whether it arrived or not.
    pub auto_acked: bool,
}

/// What was done in one transaction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// No commit was sent (or a rollback was).
    Open,
    /// It was sent; what came of it is unknown.
    Sent,
    Committed,
}

#[derive(Debug)]
pub struct Transaction {
    /// Queue and message.
    pub published: Vec<(&'static str, Id)>,
    pub acked: Vec<(&'static str, Id)>,
    pub outcome: Outcome,
}

/// Whether a definition is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presence {
    Present,
    Absent,
    /// Its declaration or deletion was under way.
    Unknown,
}

/// An exchange, a queue and a binding between them that come and go.
#[derive(Clone, Debug)]
pub struct Definition {
    pub exchange: Presence,
    pub queue: Presence,
    pub binding: Presence,
    /// Messages in the queue: at least, at most.
    pub messages: (u32, u32),
}

impl Default for Definition {
    fn default() -> Self {
        Definition { exchange: Presence::Absent, queue: Presence::Absent, binding: Presence::Absent, messages: (0, 0) }
    }
}

/// What one client, or all of a round, know.
#[derive(Debug, Default)]
pub struct Facts {
    pub queues: HashMap<&'static str, QueueFacts>,
    pub transactions: Vec<Transaction>,
    pub definitions: HashMap<String, Definition>,
    pub errors: Vec<String>,
}

impl Facts {
    pub fn queue(&mut self, name: &'static str) -> &mut QueueFacts {
        self.queues.entry(name).or_default()
    }

    pub fn merge(&mut self, other: Facts) {
        for (name, from) in other.queues {
            let to = self.queue(name);
            to.sent.extend(from.sent);
            to.confirmed.extend(from.confirmed);
            to.transient.extend(from.transient);
            to.acked.extend(from.acked);
            to.acked_for_good.extend(from.acked_for_good);
            to.received.extend(from.received);
            to.auto_acked |= from.auto_acked;
        }
        self.transactions.extend(other.transactions);
        self.definitions.extend(other.definitions);
        self.errors.extend(other.errors);
    }

    /// Counts transactions as what they amount to for each queue.
    pub fn settle_transactions(&mut self) {
        for transaction in std::mem::take(&mut self.transactions) {
            for &(queue, id) in &transaction.published {
                let facts = self.queue(queue);
                if transaction.outcome != Outcome::Open {
                    facts.sent.insert(id);
                }
                if transaction.outcome == Outcome::Committed {
                    facts.confirmed.insert(id);
                }
            }
            for &(queue, id) in &transaction.acked {
                let facts = self.queue(queue);
                if transaction.outcome != Outcome::Open {
                    facts.acked.insert(id);
                }
                if transaction.outcome == Outcome::Committed {
                    facts.acked_for_good.insert(id);
                }
            }
            self.transactions.push(transaction);
        }
    }
}

/// Compares what a queue holds with what it must and may hold. `base` is what it held when the round began, in order.
pub fn check_queue(name: &str, base: &[Id], facts: &QueueFacts, found: &[Id], errors: &mut Vec<String>) {
    let base_set: HashSet<Id> = base.iter().copied().collect();
    let found_set: HashSet<Id> = found.iter().copied().collect();
    let mut complain = |text: String| errors.push(format!("queue {name}: {text}"));
    if found_set.len() != found.len() {
        complain(format!("{} messages came twice in one drain", found.len() - found_set.len()));
    }
    let some = |mut ids: Vec<Id>| {
        ids.sort_unstable();
        format!("{} ({})", ids.len(), ids.iter().take(8).map(|id| format!("{id:x}")).collect::<Vec<_>>().join(" "))
    };
    let strangers: Vec<Id> =
        found_set.iter().copied().filter(|id| !base_set.contains(id) && !facts.sent.contains(id)).collect();
    if !strangers.is_empty() {
        let transient = strangers.iter().filter(|id| facts.transient.contains(id)).count();
        complain(format!(
            "holds messages that should not be there: {}, of them {transient} transient",
            some(strangers)
        ));
    }
    let back: Vec<Id> = found_set.intersection(&facts.acked_for_good).copied().collect();
    if !back.is_empty() {
        complain(format!("messages came back whose ack was synced: {}", some(back)));
    }
    let must = base_set.union(&facts.confirmed).copied().filter(|id| !facts.acked.contains(id));
    let lost: Vec<Id> = must.filter(|id| !found_set.contains(id)).collect();
    if !facts.auto_acked && !lost.is_empty() {
        complain(format!("confirmed messages are LOST: {}", some(lost)));
    } else if facts.auto_acked {
        // What one consumer took without acks is a prefix of the queue.
        let first: HashMap<u64, Id> = found.iter().rev().map(|&id| (publisher(id), id)).collect();
        let after: Vec<Id> =
            lost.into_iter().filter(|&id| first.get(&publisher(id)).is_some_and(|&first| id > first)).collect();
        if !after.is_empty() {
            complain(format!("confirmed messages are LOST behind ones that are there: {}", some(after)));
        }
    }
    let kept: Vec<Id> = base.iter().copied().filter(|id| found_set.contains(id)).collect();
    if !found.starts_with(&kept) {
        complain("older messages are not in front, or not in their order".to_owned());
    }
    let mut last: HashMap<u64, Id> = HashMap::new();
    for &id in found.iter().filter(|id| !base_set.contains(id)) {
        if last.insert(publisher(id), id).is_some_and(|before| before > id) {
            complain(format!("message {id:x} is out of its publisher's order"));
            break;
        }
    }
}

/// A transaction is there as a whole, or not at all. `durable` is what was promised to each queue before.
pub fn check_transaction(
    transaction: &Transaction,
    found: &HashMap<&'static str, HashSet<Id>>,
    durable: &HashMap<&'static str, HashSet<Id>>,
    errors: &mut Vec<String>,
) {
    let published = transaction.published.iter().map(|(queue, id)| found[queue].contains(id));
    // A message that was never promised may be gone without its ack.
    let acked = transaction.acked.iter().filter_map(|(queue, id)| match found[queue].contains(id) {
        true => Some(false),
        false => durable[queue].contains(id).then_some(true),
    });
    let steps: Vec<bool> = published.chain(acked).collect();
    let done = steps.iter().filter(|&&done| done).count();
    let right = match transaction.outcome {
        Outcome::Open => done == 0,
        Outcome::Sent => done == 0 || done == steps.len(),
        Outcome::Committed => done == steps.len(),
    };
    if !right {
        errors.push(format!(
            "{done} of {} steps of a transaction are there, which was {:?}: {transaction:x?}",
            steps.len(),
            transaction.outcome
        ));
    }
}
