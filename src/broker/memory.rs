//! The memory budget: how many bytes of messages queues hold in memory, all together.

use std::sync::atomic::{AtomicUsize, Ordering};

/// A counter with a limit. Chunks report their capacity, so a message costs no counting of its own.
#[derive(Debug)]
pub struct MemoryBudget {
    used: AtomicUsize,
    limit_bytes: usize,
}

impl MemoryBudget {
    /// A budget of `limit_bytes`.
    pub fn new(limit_bytes: usize) -> Self {
        MemoryBudget { used: AtomicUsize::new(0), limit_bytes }
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

    /// Whether publishers have to wait until paging has caught up: half as much again as the limit.
    #[inline]
    pub fn is_exhausted(&self) -> bool {
        self.used_bytes() > self.limit_bytes + self.limit_bytes / 2 + (8 << 20)
    }
}
