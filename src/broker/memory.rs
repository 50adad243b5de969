//! The memory budget: how many bytes of messages queues hold in memory, all together, and how many of them still wait for
//! the disk.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// What publishers may be ahead of the store by, as a share of the budget: a round that is being written has its bytes in
/// memory two more times (its runs, and RocksDB's batch of them).
const UNWRITTEN_SHARE: usize = 3;

/// Counters with limits. Chunks report their capacity and runs of publishes their size, so a message costs no counting of its
/// own.
#[derive(Debug)]
pub struct MemoryBudget {
    used: AtomicUsize,
    unwritten: AtomicUsize,
    limit_bytes: usize,
}

impl MemoryBudget {
    /// A budget of `limit_bytes`.
    pub fn new(limit_bytes: usize) -> Self {
        MemoryBudget { used: AtomicUsize::new(0), unwritten: AtomicUsize::new(0), limit_bytes }
    }

    /// Accounts for bytes of durable messages that wait for a round.
    #[inline]
    pub fn add_unwritten(&self, bytes: usize) {
        self.unwritten.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Accounts for bytes that a round has taken, or that are gone.
    #[inline]
    pub fn sub_unwritten(&self, bytes: usize) {
        self.unwritten.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Whether publishers have to wait: for the store to take what they have published, or for paging to catch up.
    #[inline]
    pub fn must_hold_back(&self) -> bool {
        self.unwritten.load(Ordering::Relaxed) > self.limit_bytes / UNWRITTEN_SHARE || self.is_exhausted()
    }

    /// Accounts for bytes that became resident.
    #[inline]
    pub fn grow(&self, bytes: usize) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Accounts for bytes let go.
    #[inline]
    pub fn shrink(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Bytes held now.
    pub fn used_bytes(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    /// The limit.
    pub fn limit_bytes(&self) -> usize {
        self.limit_bytes
    }

    /// Whether queues should page out the middle of their logs.
    #[inline]
    pub fn is_over(&self) -> bool {
        self.used_bytes() > self.limit_bytes
    }

    /// Whether paging does not keep up: the limit is exceeded by a quarter.
    #[inline]
    pub fn is_exhausted(&self) -> bool {
        self.used_bytes() > self.limit_bytes + self.limit_bytes / 4
    }
}

/// What one source has of durable messages that wait for a round.
#[derive(Debug)]
pub struct Unwritten {
    bytes: usize,
    budget: Arc<MemoryBudget>,
}

impl Unwritten {
    /// Nothing yet.
    pub fn new(budget: Arc<MemoryBudget>) -> Self {
        Unwritten { bytes: 0, budget }
    }

    /// Accounts for messages that were just accepted.
    #[inline]
    pub fn add(&mut self, bytes: usize) {
        self.bytes += bytes;
        self.budget.add_unwritten(bytes);
    }

    /// A round has taken whatever there was.
    pub fn taken(&mut self) {
        self.budget.sub_unwritten(std::mem::take(&mut self.bytes));
    }
}

impl Drop for Unwritten {
    fn drop(&mut self) {
        self.taken();
    }
}
