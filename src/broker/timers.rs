//! When queues want to be looked at: one heap for all of them, one task that sleeps until the earliest is due.

use std::{
    cmp::Reverse,
    collections::BinaryHeap,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::port::Effects;

/// Something with work that is due at an instant of the wall clock.
pub trait Timed: Send + Sync {
    /// Does what is due, and schedules itself again if more will be. Nothing is locked by the caller.
    fn on_time(self: Arc<Self>, now_unix_ms: u64, effects: &mut Effects);
}

struct Entry {
    due_unix_ms: u64,
    /// Makes entries different; the earlier one first.
    serial: u64,
    timed: Weak<dyn Timed>,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        (self.due_unix_ms, self.serial) == (other.due_unix_ms, other.serial)
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.due_unix_ms, self.serial).cmp(&(other.due_unix_ms, other.serial))
    }
}

/// Entries from which on those of things that are gone are looked for.
const PRUNE_AT: usize = 1024;

/// See the module. A leaf lock.
#[derive(Default)]
pub struct Timers {
    heap: Mutex<(BinaryHeap<Reverse<Entry>>, u64)>,
    earlier: Notify,
}

impl Timers {
    /// Has `timed` called at `due_unix_ms` or soon after. Whoever schedules itself often remembers the earliest instant it
    /// asked for; an entry is not taken back.
    pub fn schedule(&self, due_unix_ms: u64, timed: Weak<dyn Timed>) {
        let mut guard = self.heap.lock();
        let (heap, serial) = &mut *guard;
        *serial += 1;
        // An entry keeps the memory of what it names, and may be due in years: what is gone leaves before the heap grows.
        if heap.len() >= PRUNE_AT && heap.len() == heap.capacity() {
            heap.retain(|Reverse(entry)| entry.timed.strong_count() > 0);
        }
        let is_first = heap.peek().is_none_or(|Reverse(first)| due_unix_ms < first.due_unix_ms);
        heap.push(Reverse(Entry { due_unix_ms, serial: *serial, timed }));
        drop(guard);
        if is_first {
            self.earlier.notify_one();
        }
    }

    /// The next one that is due, if any is; otherwise when that will be (`u64::MAX` for never).
    pub fn next(&self, now_unix_ms: u64) -> Result<Arc<dyn Timed>, u64> {
        let mut guard = self.heap.lock();
        loop {
            let Some(Reverse(first)) = guard.0.peek() else { return Err(u64::MAX) };
            if first.due_unix_ms > now_unix_ms {
                return Err(first.due_unix_ms);
            }
            if let Some(Reverse(entry)) = guard.0.pop()
                && let Some(timed) = entry.timed.upgrade()
            {
                return Ok(timed);
            }
        }
    }

    /// Waits until something was scheduled before everything else.
    pub async fn changed(&self) {
        self.earlier.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Nothing;

    impl Timed for Nothing {
        fn on_time(self: Arc<Self>, _: u64, _: &mut Effects) {}
    }

    #[test]
    fn the_earliest_comes_first_and_the_dead_are_passed_over() {
        let timers = Timers::default();
        let (a, b) = (Arc::new(Nothing), Arc::new(Nothing));
        let weak = |timed: &Arc<Nothing>| -> Weak<dyn Timed> { Arc::downgrade(&(timed.clone() as Arc<dyn Timed>)) };
        timers.schedule(20, weak(&b));
        timers.schedule(10, weak(&a));
        assert_eq!(timers.next(5).err(), Some(10));
        drop(a);
        assert_eq!(timers.next(15).err(), Some(20));
        assert!(timers.next(20).is_ok());
        assert_eq!(timers.next(99).err(), Some(u64::MAX));
    }
}
