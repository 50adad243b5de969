//! What workers count, and the switches by which they are stopped.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use hdrhistogram::Histogram;

/// Shortest latency told apart from 0: one part in a thousand of 64 µs.
const LOWEST_NS: u64 = 64;
/// Longer latencies count as this one: ten minutes.
const HIGHEST_NS: u64 = 600_000_000_000;
const SIGNIFICANT_DIGITS: u8 = 3;

/// A histogram of latencies in nanoseconds.
#[derive(Debug, Clone)]
pub(super) struct Latencies {
    /// `None` only if the constant bounds above were refused.
    histogram: Option<Histogram<u64>>,
}

impl Latencies {
    pub(super) fn new() -> Self {
        Self { histogram: Histogram::new_with_bounds(LOWEST_NS, HIGHEST_NS, SIGNIFICANT_DIGITS).ok() }
    }

    /// Counts `count` messages that took `latency_ns` each.
    pub(super) fn record(&mut self, latency_ns: u64, count: u64) {
        if count > 0
            && let Some(histogram) = &mut self.histogram
        {
            histogram.saturating_record_n(latency_ns, count);
        }
    }

    pub(super) fn add(&mut self, other: &Self) {
        if let (Some(histogram), Some(other)) = (&mut self.histogram, &other.histogram) {
            // Same bounds everywhere, so nothing can be out of range.
            let _ = histogram.add(other);
        }
    }

    pub(super) fn clear(&mut self) {
        if let Some(histogram) = &mut self.histogram
            && !histogram.is_empty()
        {
            histogram.reset();
        }
    }

    pub(super) fn count(&self) -> u64 {
        self.histogram.as_ref().map_or(0, Histogram::len)
    }

    pub(super) fn at_quantile_ns(&self, quantile: f64) -> u64 {
        self.histogram.as_ref().map_or(0, |histogram| histogram.value_at_quantile(quantile))
    }

    pub(super) fn max_ns(&self) -> u64 {
        self.histogram.as_ref().map_or(0, Histogram::max)
    }
}

/// What one worker did so far; written by the worker once per block, read by the progress line.
///
/// Own cache lines, so that workers do not slow each other down.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Meter {
    /// Published or delivered.
    messages: AtomicU64,
    confirmed: AtomicU64,
    /// Nacked by the broker, or returned.
    refused: AtomicU64,
    blocked: AtomicBool,
    /// 0 before the first message.
    first_ns: AtomicU64,
    last_ns: AtomicU64,
    done: AtomicBool,
}

impl Meter {
    /// Counts a block of messages that began at `begin_ns` and was over at `end_ns`. One writer only.
    pub(super) fn on_messages(&self, count: u64, begin_ns: u64, end_ns: u64) {
        let before = self.messages.load(Ordering::Relaxed);
        if before == 0 {
            self.first_ns.store(begin_ns, Ordering::Relaxed);
        }
        self.last_ns.store(end_ns, Ordering::Relaxed);
        self.messages.store(before + count, Ordering::Relaxed);
    }

    pub(super) fn set_confirmed(&self, count: u64) {
        self.confirmed.store(count, Ordering::Relaxed);
    }

    pub(super) fn set_refused(&self, count: u64) {
        self.refused.store(count, Ordering::Relaxed);
    }

    pub(super) fn set_blocked(&self, blocked: bool) {
        self.blocked.store(blocked, Ordering::Relaxed);
    }

    /// Says that the worker will count no more messages.
    pub(super) fn finish(&self) {
        self.done.store(true, Ordering::Release);
    }

    pub(super) fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }
}

/// The sum over several workers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Total {
    pub(super) messages: u64,
    pub(super) confirmed: u64,
    pub(super) refused: u64,
    /// Workers that the broker keeps from publishing at the moment.
    pub(super) blocked: u64,
    /// From the first message of any worker to the last one of any; `None` before the first.
    pub(super) active_ns: Option<(u64, u64)>,
}

impl Total {
    pub(super) fn of<'a>(meters: impl IntoIterator<Item = &'a Meter>) -> Self {
        meters.into_iter().fold(Self::default(), |sum, meter| {
            let messages = meter.messages.load(Ordering::Relaxed);
            let own = (meter.first_ns.load(Ordering::Relaxed), meter.last_ns.load(Ordering::Relaxed));
            let active_ns = match sum.active_ns {
                _ if messages == 0 => sum.active_ns,
                None => Some(own),
                Some((first, last)) => Some((first.min(own.0), last.max(own.1))),
            };
            Self {
                messages: sum.messages + messages,
                confirmed: sum.confirmed + meter.confirmed.load(Ordering::Relaxed),
                refused: sum.refused + meter.refused.load(Ordering::Relaxed),
                blocked: sum.blocked + u64::from(meter.blocked.load(Ordering::Relaxed)),
                active_ns,
            }
        })
    }

    /// What was added since `earlier`, which was taken at `at_ns`.
    pub(super) fn since(&self, earlier: &Self, at_ns: u64) -> Self {
        let messages = self.messages.saturating_sub(earlier.messages);
        Self {
            messages,
            confirmed: self.confirmed.saturating_sub(earlier.confirmed),
            refused: self.refused.saturating_sub(earlier.refused),
            blocked: self.blocked,
            active_ns: self.active_ns.filter(|_| messages > 0).map(|(first, last)| (first.max(at_ns), last)),
        }
    }

    /// Length of the active window; 0 if there is none.
    pub(super) fn active_seconds(&self) -> f64 {
        self.active_ns.map_or(0.0, |(first, last)| last.saturating_sub(first) as f64 / 1e9)
    }
}

/// The switches that the supervisor throws and every worker looks at, at least ten times a second.
#[derive(Debug, Default)]
pub(super) struct Control {
    aborted: AtomicBool,
    blocking_told: AtomicBool,
    consumers_stopped: AtomicBool,
}

impl Control {
    /// Ends everything at once: something failed, or the user gave up.
    pub(super) fn abort(&self) {
        self.aborted.store(true, Ordering::Relaxed);
        self.stop_consumers();
    }

    pub(super) fn is_aborted(&self) -> bool {
        self.aborted.load(Ordering::Relaxed)
    }

    /// Whether the caller is the first to tell that the broker blocks publishers.
    pub(super) fn is_first_to_tell(&self) -> bool {
        !self.blocking_told.swap(true, Ordering::Relaxed)
    }

    pub(super) fn stop_consumers(&self) {
        self.consumers_stopped.store(true, Ordering::Relaxed);
    }

    pub(super) fn consumers_stopped(&self) -> bool {
        self.consumers_stopped.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_active_window_spans_all_workers_that_did_something() {
        let meters = [Meter::default(), Meter::default(), Meter::default()];
        meters[0].on_messages(2, 5_000, 6_000);
        meters[0].on_messages(3, 7_000, 8_000);
        meters[2].on_messages(1, 3_000, 4_000);
        let total = Total::of(&meters);
        assert_eq!((total.messages, total.active_ns), (6, Some((3_000, 8_000))));
        assert_eq!(Total::of(&meters[1..2]), Total::default());
    }

    #[test]
    fn what_came_after_the_warm_up_has_a_window_of_its_own() {
        let meters = [Meter::default()];
        meters[0].on_messages(5, 1_000, 2_000);
        let earlier = Total::of(&meters);
        assert_eq!(Total::of(&meters).since(&earlier, 3_000), Total::default());
        meters[0].on_messages(2, 4_000, 5_000);
        meters[0].set_confirmed(4);
        let later = Total::of(&meters).since(&earlier, 3_000);
        assert_eq!((later.messages, later.confirmed, later.active_ns), (2, 4, Some((3_000, 5_000))));
    }
}
