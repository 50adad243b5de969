//! The type `x-random`: a message goes by one binding, chosen by chance. A destination with many bindings is chosen as
//! often.

use std::hash::{BuildHasher, RandomState};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use super::rules::Rules;
use super::slots::Slot;
use super::stable_hash::mix;
use super::target::{Target, Targets};

/// All bindings.
#[derive(Clone, Debug, Default)]
pub struct RandomTable {
    rules: Rules<()>,
}

impl RandomTable {
    pub fn add(&mut self, slot: Slot, target: Target) {
        self.rules.add(slot, target, ());
    }

    pub fn remove(&mut self, slot: Slot) {
        self.rules.remove(slot);
    }

    pub fn collect(&self, out: &mut Targets) {
        if let Some(target) = self.rules.target(random_below(self.rules.len())) {
            out.push(target);
        }
    }
}

/// A random number below `bound`; 0 if that is 0. Good enough to spread load, not to keep secrets (`SplitMix64`).
fn random_below(bound: usize) -> usize {
    static STATE: LazyLock<AtomicU64> = LazyLock::new(|| AtomicU64::new(RandomState::new().hash_one(0)));
    let number = mix(STATE.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed));
    ((u128::from(number) * bound as u128) >> 64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_binding_is_chosen_as_often_as_any_other() {
        let mut table = RandomTable::default();
        let mut out = Targets::default();
        table.collect(&mut out);
        assert!(out.as_slice().is_empty());
        for slot in 0..9 {
            table.add(slot, Target::queue(0));
        }
        table.add(9, Target::queue(1));
        let mut counts = [0; 2];
        for _ in 0..10_000 {
            out.clear();
            table.collect(&mut out);
            let [target] = out.as_slice() else { panic!("{out:?}") };
            counts[target.as_queue().unwrap() as usize] += 1;
        }
        // The standard deviation is 30.
        assert!((800..1200).contains(&counts[1]), "{counts:?}");
    }

    #[test]
    fn random_numbers_stay_below_their_bound() {
        assert_eq!(random_below(0), 0);
        assert_eq!(random_below(1), 0);
        assert!((0..1000).all(|_| random_below(3) < 3));
    }
}
