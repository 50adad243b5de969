//! How much free space the store needs, so that publishers can be stopped before a write fails for want of it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::DiskListener;

/// What is written twice: to the write-ahead log, and from memory to tables.
const COPIES: u64 = 2;

/// For files that are begun while others are still there.
const MARGIN_BYTES: u64 = 1024 * 1024;

/// A large round is expected again for about so long.
const HALF_LIFE: Duration = Duration::from_secs(10);

/// See the module.
pub(super) struct Space {
    /// What flushing all write buffers takes, while new ones fill.
    reserve_bytes: u64,
    largest: Mutex<Largest>,
    low: AtomicBool,
    listener: Mutex<Option<Weak<dyn DiskListener>>>,
}

/// The largest round of late.
struct Largest {
    bytes: u64,
    at: Instant,
}

impl Largest {
    fn bytes(&self, now: Instant) -> u64 {
        let half_lives = now.saturating_duration_since(self.at).as_secs() / HALF_LIFE.as_secs();
        self.bytes.checked_shr(half_lives.try_into().unwrap_or(u32::MAX)).unwrap_or(0)
    }
}

impl Space {
    pub fn new(write_buffer_bytes: usize) -> Space {
        Space {
            reserve_bytes: COPIES * write_buffer_bytes as u64 + MARGIN_BYTES,
            largest: Mutex::new(Largest { bytes: 0, at: Instant::now() }),
            low: AtomicBool::new(false),
            listener: Mutex::default(),
        }
    }

    /// Takes in the size of a round that is about to be written.
    pub fn note_round(&self, bytes: usize) {
        let now = Instant::now();
        let mut largest = self.largest.lock();
        if bytes as u64 >= largest.bytes(now) {
            *largest = Largest { bytes: bytes as u64, at: now };
        }
    }

    /// Free bytes below which the next rounds may not fit: while one is written, another of that size gathers.
    pub fn needed(&self) -> u64 {
        self.reserve_bytes + COPIES * self.largest.lock().bytes(Instant::now())
    }

    /// Free bytes that writing so much takes, after a failure.
    pub fn needed_for(&self, bytes: usize) -> u64 {
        self.reserve_bytes + COPIES * bytes as u64
    }

    /// Whether less than that was free at the last look.
    pub fn is_low(&self) -> bool {
        self.low.load(Ordering::Relaxed)
    }

    pub fn note_low(&self, low: bool) {
        self.low.store(low, Ordering::Relaxed);
    }

    pub fn listen(&self, listener: Weak<dyn DiskListener>) {
        *self.listener.lock() = Some(listener);
    }

    pub fn listener(&self) -> Option<Arc<dyn DiskListener>> {
        self.listener.lock().as_ref()?.upgrade()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_round_is_expected_again_for_a_while() {
        let space = Space::new(1 << 20);
        let quiet = space.needed();
        assert_eq!(quiet, 3 << 20);
        space.note_round(10 << 20);
        space.note_round(1);
        assert_eq!(space.needed(), quiet + (20 << 20));
        let largest = Largest { bytes: 1 << 20, at: Instant::now() };
        assert_eq!(largest.bytes(largest.at + HALF_LIFE), 1 << 19);
        assert_eq!(largest.bytes(largest.at + HALF_LIFE * 1000), 0);
    }
}
