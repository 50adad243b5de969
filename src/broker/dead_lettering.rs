//! Dead letters on their way: from the queue that gives them up, through its dead-letter exchange or into its parking queue.
//!
//! A dead letter's copies are stored in the round in which its original is consumed, so that a crash neither loses nor
//! doubles it.

use std::sync::Arc;

use super::{
    Broker, Queue, Settled, Vhost,
    dead_letter::{DeadLetter, DeadLetterTarget, Death},
    extension::Extension,
    port::{DyingMessage, Effects},
};
use crate::clock;

/// Messages moved in one atomic section.
const BATCH: usize = 256;

impl Broker {
    /// Moves the messages that queues have given up. Nothing is locked by the caller.
    pub(super) fn dead_letter(&self, effects: &mut Effects) {
        let dying = std::mem::take(&mut effects.dead);
        for batch in dying.chunks(BATCH) {
            let _one_round = self.store.atomic();
            let mut finished: Vec<(&Arc<Queue>, Vec<Settled>)> = Vec::new();
            for message in batch {
                self.dead_letter_one(message, effects);
                let Some(seq) = message.position else { continue };
                let settled = Settled { seq, body_bytes: message.body_bytes, persistent: message.durable };
                match finished.last_mut() {
                    Some((queue, all)) if Arc::ptr_eq(queue, &message.queue) => all.push(settled),
                    _ => finished.push((&message.queue, vec![settled])),
                }
            }
            for (queue, all) in finished {
                queue.finish_dead(&all);
            }
        }
    }

    fn dead_letter_one(&self, dying: &DyingMessage, effects: &mut Effects) {
        let queue = &dying.queue;
        let read;
        let original = match &dying.message {
            Some(message) => message,
            None => match dying.position.and_then(|position| queue.read_held(position)) {
                Some(message) => {
                    read = message;
                    &read
                }
                None => return, // damaged on disk, which was reported
            },
        };
        let Some(vhost) = self.vhost(&queue.options.vhost) else { return };
        let parked = dying.target.is_none().then(|| format!("{}.parked", queue.options.name));
        let target = match (&dying.target, &parked) {
            (Some((exchange, key)), _) => DeadLetterTarget { exchange, routing_key: key.as_deref() },
            (None, parked) => DeadLetterTarget { exchange: "", routing_key: parked.as_deref() },
        };
        if let Some(name) = &parked {
            park(&vhost, queue, name);
        }
        let view = original.view();
        let death = Death {
            queue: &queue.options.name,
            reason: dying.reason,
            at_unix_ms: clock::now_unix_ms(),
            deliveries: Extension::parse(view.extension).deliveries.saturating_add(dying.deliveries),
        };
        let letter = DeadLetter::new(&view, &death, &target);
        vhost.publish_dead_letter(target.exchange, &letter.message(view.body, view.persistent), effects);
    }
}

/// Makes sure that a queue's parking queue is there.
fn park(vhost: &Vhost, queue: &Queue, name: &str) {
    match vhost.declare_parking_queue(name) {
        Ok(created) => {
            if created {
                tracing::warn!(queue = %queue.options.name, vhost = %vhost.name, parking_queue = name, "messages that failed too often are kept in a parking queue");
            }
        }
        Err(error) => {
            tracing::error!(queue = %queue.options.name, vhost = %vhost.name, parking_queue = name, %error, "a message that failed too often cannot be parked and is dropped");
        }
    }
}
