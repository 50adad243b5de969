//! What an owner of delayed messages needs beside them: the timer that ends their wait, and how they leave it.

use std::sync::{
    Arc, Weak,
    atomic::{AtomicU64, Ordering},
};

use super::Delays;
use crate::{
    broker::{delay_headers::negate_delay, environment::Environment, message::Message, port::Effects, timers::Timed},
    store::QueueId,
};

/// Messages released in one atomic section.
pub const RELEASE_BATCH: usize = 256;

/// A queue or an exchange that keeps messages back.
pub trait DelayOwner: Send + Sync {
    /// Takes up to [`RELEASE_BATCH`] messages that are due and hands them on; answers when to be called again, if ever. Called
    /// within an atomic section, by one caller at a time, with nothing locked.
    fn release_due(self: Arc<Self>, now_unix_ms: u64, effects: &mut Effects) -> Option<u64>;
}

/// Has an owner called when its messages are due.
struct DelayTimer<O> {
    environment: Arc<Environment>,
    owner: Weak<O>,
    /// The earliest instant the timers were asked for; an entry that it made idle does no harm.
    scheduled_unix_ms: AtomicU64,
    this: Weak<DelayTimer<O>>,
}

impl<O: DelayOwner + 'static> DelayTimer<O> {
    fn schedule(&self, at_unix_ms: u64) {
        if self.scheduled_unix_ms.fetch_min(at_unix_ms, Ordering::Relaxed) > at_unix_ms {
            let timed: Weak<dyn Timed> = self.this.clone();
            self.environment.timers.schedule(at_unix_ms, timed);
        }
    }
}

impl<O: DelayOwner + 'static> Timed for DelayTimer<O> {
    fn on_time(self: Arc<Self>, now_unix_ms: u64, effects: &mut Effects) {
        self.scheduled_unix_ms.store(u64::MAX, Ordering::Relaxed);
        let next = self.owner.upgrade().and_then(|owner| owner.release_due(now_unix_ms, effects));
        if let Some(at) = next {
            self.schedule(at);
        }
    }
}

/// Whether the store may know of an owner already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    New,
    /// It was there before the last shutdown.
    Recovered,
}

/// The delayed messages of an owner, with the timer that has it called. What a recovered one has is scheduled at once.
pub fn delays_of<O: DelayOwner + 'static>(
    id: QueueId,
    owner: Weak<O>,
    environment: &Arc<Environment>,
    origin: Origin,
) -> Arc<Delays> {
    let timer = Arc::new_cyclic(|this| DelayTimer {
        environment: environment.clone(),
        owner,
        scheduled_unix_ms: AtomicU64::new(u64::MAX),
        this: this.clone(),
    });
    let on_earlier = {
        let timer = timer.clone();
        Box::new(move |at| timer.schedule(at))
    };
    let (store, budget) = (environment.store.clone(), environment.budget.clone());
    if origin == Origin::New {
        return Delays::new(id, store, budget, on_earlier);
    }
    let delays = Delays::recovered(id, store, budget, on_earlier);
    if let Some(at) = delays.next_due() {
        timer.schedule(at);
    }
    delays
}

/// Calls `work` with a message as it leaves its wait: `x-delay` negated, so that it is not delayed again, and with an
/// expiration that begins now.
pub fn with_released<T>(message: &Message<'_>, now_unix_ms: u64, work: impl FnOnce(&Message<'_>) -> T) -> T {
    let mut properties = Vec::with_capacity(message.properties.len() + 16);
    negate_delay(message.properties, &mut properties);
    let extension = message.extension_anew(now_unix_ms);
    work(&Message { properties: &properties, extension: &extension, ..*message })
}
