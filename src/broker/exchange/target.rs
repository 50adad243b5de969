//! Resolved destinations: one of them, a set with counts for a matcher, and the collection of one message.

use ahash::AHashSet;
use smallvec::SmallVec;

use super::slots::Slot;

const EXCHANGE_BIT: u32 = 1 << 31;

/// A destination by its slot: a queue or an exchange of the vhost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Target(u32);

impl Target {
    pub fn queue(slot: Slot) -> Self {
        debug_assert_eq!(slot & EXCHANGE_BIT, 0);
        Self(slot)
    }

    pub fn exchange(slot: Slot) -> Self {
        debug_assert_eq!(slot & EXCHANGE_BIT, 0);
        Self(slot | EXCHANGE_BIT)
    }

    pub fn as_queue(self) -> Option<Slot> {
        (self.0 & EXCHANGE_BIT == 0).then_some(self.0)
    }

    pub fn as_exchange(self) -> Option<Slot> {
        (self.0 & EXCHANGE_BIT != 0).then_some(self.0 & !EXCHANGE_BIT)
    }
}

/// The targets of one place in a matcher, each once, with how many bindings lead to it.
///
/// Bindings of the same target may differ in what the place does not see (arguments, or the key in a fanout).
#[derive(Clone, Debug, Default)]
pub struct TargetSet {
    /// Sorted.
    targets: SmallVec<[Target; 2]>,
    /// Sorted: targets with more than one binding, and how many more.
    repeats: Vec<(Target, u32)>,
}

impl TargetSet {
    pub fn add(&mut self, target: Target) {
        let Err(place) = self.targets.binary_search(&target) else {
            match self.repeats.binary_search_by_key(&target, |repeat| repeat.0) {
                Ok(repeat) => self.repeats[repeat].1 += 1,
                Err(repeat) => self.repeats.insert(repeat, (target, 1)),
            }
            return;
        };
        self.targets.insert(place, target);
    }

    pub fn remove(&mut self, target: Target) {
        if let Ok(repeat) = self.repeats.binary_search_by_key(&target, |repeat| repeat.0) {
            self.repeats[repeat].1 -= 1;
            if self.repeats[repeat].1 == 0 {
                self.repeats.remove(repeat);
            }
        } else if let Ok(place) = self.targets.binary_search(&target) {
            self.targets.remove(place);
        }
    }

    pub fn as_slice(&self) -> &[Target] {
        &self.targets
    }

    pub fn is_empty(&self) -> bool {
        self.targets.is_empty()
    }
}

/// Up to so many targets, looking through them all is faster than hashing.
const LINEAR_COUNT: usize = 16;
/// A larger index is given back to the allocator, not cleared, because clearing costs its capacity.
const KEPT_INDEX_COUNT: usize = 512;

/// Where one message goes: queues, and exchanges that route it further. Each is collected once.
#[derive(Clone, Debug, Default)]
pub struct Targets {
    targets: SmallVec<[Target; LINEAR_COUNT]>,
    /// The first `indexed` of `targets`, once there are many.
    index: AHashSet<Target>,
    indexed: usize,
    matched: bool,
}

impl Targets {
    pub fn clear(&mut self) {
        self.targets.clear();
        if self.indexed > 0 {
            if self.index.capacity() > KEPT_INDEX_COUNT {
                self.index = AHashSet::default();
            } else {
                self.index.clear();
            }
            self.indexed = 0;
        }
        self.matched = false;
    }

    pub fn push(&mut self, target: Target) {
        self.matched = true;
        if self.targets.len() < LINEAR_COUNT {
            if self.targets.contains(&target) {
                return;
            }
        } else {
            self.index.extend(&self.targets[self.indexed..]);
            self.indexed = self.targets.len();
            if !self.index.insert(target) {
                return;
            }
            self.indexed += 1;
        }
        self.targets.push(target);
    }

    /// Adds a set's targets: a copy if they are the first.
    pub fn extend(&mut self, set: &TargetSet) {
        let set = set.as_slice();
        if self.targets.is_empty() {
            self.matched = !set.is_empty();
            self.targets.extend_from_slice(set);
        } else {
            for &target in set {
                self.push(target);
            }
        }
    }

    pub fn as_slice(&self) -> &[Target] {
        &self.targets
    }

    /// Whether anything matched since the last call, collected before or not.
    pub fn take_matched(&mut self) -> bool {
        std::mem::take(&mut self.matched)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_and_exchanges_of_one_slot_differ() {
        let (queue, exchange) = (Target::queue(7), Target::exchange(7));
        assert_ne!(queue, exchange);
        assert_eq!((queue.as_queue(), queue.as_exchange()), (Some(7), None));
        assert_eq!((exchange.as_queue(), exchange.as_exchange()), (None, Some(7)));
    }

    #[test]
    fn a_target_stays_in_the_set_until_its_last_binding_goes() {
        let mut set = TargetSet::default();
        let (a, b) = (Target::queue(1), Target::exchange(1));
        for target in [b, a, a, a] {
            set.add(target);
        }
        assert_eq!(set.as_slice(), [a, b]);
        set.remove(a);
        set.remove(a);
        assert_eq!(set.as_slice(), [a, b]);
        set.remove(a);
        assert_eq!(set.as_slice(), [b]);
        set.remove(a);
        set.remove(b);
        assert!(set.is_empty());
    }

    #[test]
    fn targets_are_collected_once_however_many() {
        let mut targets = Targets::default();
        for _ in 0..2 {
            for count in [3, 15, 16, 17, 100, 5000] {
                targets.clear();
                let mut set = TargetSet::default();
                (0..count / 2).for_each(|slot| set.add(Target::queue(slot)));
                targets.extend(&set);
                (0..count).for_each(|slot| targets.push(Target::queue(slot)));
                targets.extend(&set);
                let expected: Vec<_> = (0..count).map(Target::queue).collect();
                assert_eq!(targets.as_slice(), expected);
            }
        }
    }

    #[test]
    fn a_match_counts_even_when_it_was_collected_before() {
        let mut targets = Targets::default();
        targets.push(Target::queue(1));
        assert!(targets.take_matched());
        assert!(!targets.take_matched());
        targets.push(Target::queue(1));
        assert!(targets.take_matched());
    }
}
