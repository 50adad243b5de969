//! Histograms of latencies: recorded by the workers, collected by the supervisor.
//!
//! A worker notes what it measured and hands it over once per block of messages. Many workers share few
//! histograms, for one takes 200 KiB. The supervisor swaps a full histogram for an empty one, so that
//! workers wait no longer for it than two pointers take, and it can add up at leisure.

use std::sync::Arc;

use parking_lot::Mutex;

use super::meter::Latencies;

/// Up to so many workers have a histogram of their own.
const MAX_SHARDS: usize = 32;

/// One worker's end of a [`LatencyPool`].
#[derive(Debug)]
pub(super) struct Recorder {
    shared: Arc<Mutex<Latencies>>,
    /// Latency in nanoseconds, and how many messages had it.
    noted: Vec<(u64, u64)>,
}

impl Recorder {
    /// Notes that `count` messages took `latency_ns` each. Hot path: no lock.
    #[inline]
    pub(super) fn note(&mut self, latency_ns: u64, count: u64) {
        if count > 0 {
            self.noted.push((latency_ns, count));
        }
    }

    /// Hands over what was noted; to be called once per block of messages.
    pub(super) fn hand_over(&mut self) {
        if self.noted.is_empty() {
            return;
        }
        let mut shared = self.shared.lock();
        self.noted.drain(..).for_each(|(latency_ns, count)| shared.record(latency_ns, count));
    }

    /// What was noted and not yet handed over.
    #[cfg(test)]
    pub(super) fn noted(&self) -> &[(u64, u64)] {
        &self.noted
    }
}

/// The latencies of all workers of a kind.
#[derive(Debug)]
pub(super) struct LatencyPool {
    shards: Vec<Arc<Mutex<Latencies>>>,
    /// Empty, to be swapped in.
    spare: Latencies,
    latest: Latencies,
    total: Latencies,
}

impl LatencyPool {
    pub(super) fn new(workers: usize) -> Self {
        let shards = workers.clamp(1, MAX_SHARDS);
        Self {
            shards: (0..shards).map(|_| Arc::new(Mutex::new(Latencies::new()))).collect(),
            spare: Latencies::new(),
            latest: Latencies::new(),
            total: Latencies::new(),
        }
    }

    pub(super) fn recorder(&self, worker: usize) -> Recorder {
        Recorder { shared: self.shards[worker % self.shards.len()].clone(), noted: Vec::new() }
    }

    /// Takes what was recorded since the last time, adds it to the total, and shows it.
    pub(super) fn collect(&mut self) -> &Latencies {
        self.latest.clear();
        for shard in &self.shards {
            std::mem::swap(&mut *shard.lock(), &mut self.spare);
            if self.spare.count() > 0 {
                self.latest.add(&self.spare);
                self.spare.clear();
            }
        }
        self.total.add(&self.latest);
        &self.latest
    }

    /// Throws away all that was recorded so far.
    pub(super) fn forget(&mut self) {
        self.collect();
        self.total.clear();
    }

    pub(super) fn into_total(mut self) -> Latencies {
        self.collect();
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_of_workers_add_up_and_outliers_count_as_the_longest() {
        let pool = LatencyPool::new(2);
        let (mut one, mut other) = (pool.recorder(0), pool.recorder(1));
        one.note(100_000, 98);
        other.note(u64::MAX, 1);
        other.note(0, 1);
        one.hand_over();
        other.hand_over();
        let total = pool.into_total();
        assert_eq!(total.count(), 100);
        assert!(total.at_quantile_ns(0.5).abs_diff(100_000) < 200);
        assert!(total.max_ns() >= 600_000_000_000);
    }

    #[test]
    fn each_collection_shows_what_is_new_and_the_total_has_everything() {
        let mut pool = LatencyPool::new(100);
        let mut recorders: Vec<_> = (0..100).map(|worker| pool.recorder(worker)).collect();
        let mut record = |latency_ns| {
            for recorder in &mut recorders {
                recorder.note(latency_ns, 1);
                recorder.hand_over();
            }
        };
        record(1_000_000);
        assert_eq!(pool.collect().count(), 100);
        record(50);
        let latest = pool.collect();
        assert_eq!((latest.count(), latest.max_ns() < 100), (100, true));
        assert_eq!(pool.collect().count(), 0);
        assert_eq!(pool.into_total().count(), 200);
    }

    #[test]
    fn what_is_forgotten_is_in_no_total() {
        let mut pool = LatencyPool::new(1);
        let mut recorder = pool.recorder(0);
        recorder.note(9, 9);
        recorder.hand_over();
        pool.forget();
        recorder.note(7, 3);
        recorder.hand_over();
        assert_eq!(pool.into_total().count(), 3);
    }
}
