//! One task for everything that recurs (heartbeats of all connections, paging, alarms), and one for what is due at an instant.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use super::registry::{Command, Handle, Registry};
use crate::{broker::Broker, clock, wire::encode::HEARTBEAT_FRAME};

const TICK: Duration = Duration::from_millis(250);
/// The wall clock may be set meanwhile, so nothing sleeps for longer.
const LONGEST_PAUSE_MS: u64 = 1000;

/// A connection's heartbeat clocks.
#[derive(Debug)]
pub struct Beat {
    send_at: Instant,
    check_at: Instant,
    silent_checks: u8,
}

impl Default for Beat {
    fn default() -> Self {
        let now = Instant::now();
        Beat { send_at: now, check_at: now, silent_checks: 0 }
    }
}

impl Beat {
    /// Starts the clocks, once the interval is negotiated.
    pub fn start(&mut self, interval: Duration) {
        let now = Instant::now();
        *self = Beat { send_at: now + interval / 2, check_at: now + interval, silent_checks: 0 };
    }
}

/// Runs until it is aborted.
pub async fn keep_time(registry: Arc<Registry>, broker: Arc<Broker>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let now = Instant::now();
        for handle in registry.handles() {
            beat(&handle, now);
        }
        broker.sweep();
    }
}

/// Has queues do what is due by the wall clock, when it is due. Runs until it is aborted.
pub async fn keep_deadlines(broker: Arc<Broker>) {
    loop {
        let next = broker.fire_timers();
        let pause = Duration::from_millis(next.saturating_sub(clock::now_unix_ms()).min(LONGEST_PAUSE_MS));
        if pause.is_zero() {
            tokio::task::yield_now().await;
            continue;
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = broker.timers_changed() => {}
        }
    }
}

/// Publishes events soon after they happen. Runs until it is aborted.
pub async fn keep_events(broker: Arc<Broker>) {
    loop {
        broker.events_noted().await;
        while broker.publish_events() {
            tokio::task::yield_now().await;
        }
    }
}

/// RabbitMQ's rules: a heartbeat every half interval in which nothing else was sent; after two whole intervals in which
/// nothing was received the peer is dead.
fn beat(handle: &Handle, now: Instant) {
    let interval = Duration::from_secs(handle.heartbeat_secs.load(Ordering::Relaxed).into());
    if interval.is_zero() {
        return;
    }
    let mut beat = handle.beat.lock();
    if now >= beat.send_at {
        // From the last due time, not from now: ticks are coarse, and heartbeats must not drift apart.
        beat.send_at = (beat.send_at + interval / 2).max(now);
        if !handle.take_sent() {
            handle.outbox.push(&HEARTBEAT_FRAME);
            handle.outbox.wake_writer();
        }
    }
    if now >= beat.check_at {
        beat.check_at = (beat.check_at + interval).max(now);
        if handle.take_received() || handle.paused.load(Ordering::Relaxed) {
            beat.silent_checks = 0;
            return;
        }
        beat.silent_checks += 1;
        if beat.silent_checks >= 2 {
            tracing::warn!(connection = handle.id, "missed heartbeats from client, timeout: {}s", interval.as_secs());
            handle.command(Command::Drop("missed heartbeats"));
        }
    }
}
