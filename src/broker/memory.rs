//! The memory budget: how many bytes of messages queues hold in memory, all together, and how many of them still wait for
//! the disk.

use std::{
    collections::HashMap,
    mem,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use parking_lot::Mutex;

/// What publishers may be ahead of the store by, as a share of the budget: a round that is being written has its bytes in
/// memory two more times (its runs, and RocksDB's batch of them).
const UNWRITTEN_SHARE: usize = 3;

/// Counters with limits. Chunks report their capacity and runs of publishes their size, so a message costs no counting of its
/// own; only large bodies, which queues share, do.
#[derive(Debug)]
pub struct MemoryBudget {
    used: AtomicUsize,
    unwritten: AtomicUsize,
    limit_bytes: usize,
    /// In chunks.
    bodies: Held,
    /// That wait for a round.
    unwritten_bodies: Held,
}

/// Shared bodies, by address and length, and how often they are held. The holders keep them where they are.
#[derive(Debug, Default)]
struct Held(Mutex<HashMap<(usize, usize), usize>>);

impl Held {
    /// Whether nobody else holds it.
    fn hold(&self, body: &Bytes) -> bool {
        let mut held = self.0.lock();
        let holders = held.entry(identity(body)).or_default();
        *holders += 1;
        *holders == 1
    }

    /// Whether nobody holds it any more.
    fn release(&self, body: &Bytes) -> bool {
        let mut held = self.0.lock();
        let Some(holders) = held.get_mut(&identity(body)) else { return false };
        *holders -= 1;
        let was_last = *holders == 0;
        if was_last {
            held.remove(&identity(body));
        }
        was_last
    }
}

impl MemoryBudget {
    /// A budget of `limit_bytes`.
    pub fn new(limit_bytes: usize) -> Self {
        MemoryBudget {
            used: AtomicUsize::new(0),
            unwritten: AtomicUsize::new(0),
            limit_bytes,
            bodies: Held::default(),
            unwritten_bodies: Held::default(),
        }
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

    /// Accounts for a body that may be shared: the first to hold it pays for all. Whoever calls this keeps `body` (or a clone
    /// of it) until [`MemoryBudget::release_body`].
    pub fn hold_body(&self, body: &Bytes) {
        if self.bodies.hold(body) {
            self.grow(body.len());
        }
    }

    /// Takes back one [`MemoryBudget::hold_body`].
    pub fn release_body(&self, body: &Bytes) {
        if self.bodies.release(body) {
            self.shrink(body.len());
        }
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
    /// A round writes them once for all queues, so they are counted once.
    bodies: Vec<Bytes>,
    budget: Arc<MemoryBudget>,
}

impl Unwritten {
    /// Nothing yet.
    pub fn new(budget: Arc<MemoryBudget>) -> Self {
        Unwritten { bytes: 0, bodies: Vec::new(), budget }
    }

    /// Accounts for messages that were just accepted.
    #[inline]
    pub fn add(&mut self, bytes: usize) {
        self.bytes += bytes;
        self.budget.add_unwritten(bytes);
    }

    /// Accounts for a large body of a message that was just accepted.
    pub fn add_body(&mut self, body: &Bytes) {
        if self.budget.unwritten_bodies.hold(body) {
            self.budget.add_unwritten(body.len());
        }
        self.bodies.push(body.clone());
    }

    /// A round has taken whatever there was.
    pub fn taken(&mut self) {
        self.budget.sub_unwritten(mem::take(&mut self.bytes));
        for body in mem::take(&mut self.bodies) {
            if self.budget.unwritten_bodies.release(&body) {
                self.budget.sub_unwritten(body.len());
            }
        }
    }
}

impl Drop for Unwritten {
    fn drop(&mut self) {
        self.taken();
    }
}

fn identity(body: &Bytes) -> (usize, usize) {
    (body.as_ptr() as usize, body.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_counts_once_however_often_it_is_held() {
        let budget = MemoryBudget::new(10);
        let (body, twin) = (Bytes::from(vec![1; 100]), Bytes::from(vec![1; 100]));
        let clones: Vec<Bytes> = (0..50).map(|_| body.clone()).collect();
        clones.iter().for_each(|body| budget.hold_body(body));
        assert_eq!(budget.used_bytes(), 100);
        budget.hold_body(&twin);
        assert_eq!(budget.used_bytes(), 200);
        clones[1..].iter().for_each(|body| budget.release_body(body));
        assert_eq!(budget.used_bytes(), 200);
        budget.release_body(&clones[0]);
        budget.release_body(&twin);
        assert_eq!((budget.used_bytes(), budget.bodies.0.lock().len()), (0, 0));
    }

    #[test]
    fn a_body_waits_for_the_disk_once_until_the_last_queue_has_given_it_to_a_round() {
        let budget = Arc::new(MemoryBudget::new(300));
        let body = Bytes::from(vec![1; 90]);
        let mut queues: Vec<Unwritten> = (0..50).map(|_| Unwritten::new(budget.clone())).collect();
        queues.iter_mut().for_each(|queue| queue.add_body(&body));
        assert!(!budget.must_hold_back());
        queues[0].add(20);
        assert!(budget.must_hold_back());
        queues.iter_mut().skip(1).for_each(Unwritten::taken);
        assert!(budget.must_hold_back());
        queues[0].taken();
        assert_eq!(budget.unwritten.load(Ordering::Relaxed), 0);
    }
}
