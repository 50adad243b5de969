//! How `memory.budget` is shared out.

/// The budget of a broker that was told nothing.
pub(super) const DEFAULT_BYTES: u64 = 40 << 20;

/// Less does not hold a round and the blocks it takes to read one.
pub(super) const LEAST_BYTES: u64 = 12 << 20;

/// One budget and its shares. What they leave is for a round that is being written, which has the messages of the round in
/// memory two more times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Everything.
    pub budget_bytes: u64,
    /// Messages in queues; beyond it, the middle of long queues is on disk only.
    pub message_bytes: usize,
    /// Writes that are in the write-ahead log and not yet in a table file.
    pub write_buffer_bytes: usize,
    /// Blocks read back from disk, and the indexes that lead to them.
    pub block_cache_bytes: usize,
}

impl MemoryPlan {
    /// The shares of a budget.
    #[must_use]
    pub fn of(budget_bytes: u64) -> Self {
        let share = |part: u64| usize::try_from(budget_bytes / part).unwrap_or(usize::MAX);
        MemoryPlan {
            budget_bytes,
            message_bytes: share(4),
            // More would make starts slower, as the write-ahead log is read then, and gains nothing.
            write_buffer_bytes: share(4).min(64 << 20),
            block_cache_bytes: share(8),
        }
    }
}
