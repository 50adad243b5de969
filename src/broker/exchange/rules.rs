//! The bindings of one exchange in a dense list, each with what its type made of it.

use ahash::AHashMap;

use super::slots::Slot;
use super::target::Target;

/// Rules in no order; adding and removing one costs a look-up.
#[derive(Clone, Debug)]
pub struct Rules<R> {
    rules: Vec<(Slot, Target, R)>,
    place: AHashMap<Slot, usize>,
}

impl<R> Default for Rules<R> {
    fn default() -> Self {
        Self { rules: Vec::new(), place: AHashMap::default() }
    }
}

impl<R> Rules<R> {
    /// Adds the rule of the binding in `slot`, which has none here.
    pub fn add(&mut self, slot: Slot, target: Target, rule: R) {
        self.place.insert(slot, self.rules.len());
        self.rules.push((slot, target, rule));
    }

    pub fn remove(&mut self, slot: Slot) {
        let Some(place) = self.place.remove(&slot) else {
            return;
        };
        self.rules.swap_remove(place);
        if let Some((moved, ..)) = self.rules.get(place) {
            self.place.insert(*moved, place);
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = (Target, &R)> {
        self.rules.iter().map(|(_, target, rule)| (*target, rule))
    }

    pub fn len(&self) -> usize {
        self.rules.len()
    }

    /// The target at a place from 0 to [`Rules::len`].
    pub fn target(&self, place: usize) -> Option<Target> {
        Some(self.rules.get(place)?.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removing_a_rule_leaves_the_others() {
        let mut rules = Rules::default();
        for slot in 0..4 {
            rules.add(slot, Target::queue(slot), slot);
        }
        for slot in [1, 3, 3] {
            rules.remove(slot);
        }
        let mut left: Vec<_> = rules.iter().map(|(target, rule)| (target, *rule)).collect();
        left.sort();
        assert_eq!(left, [(Target::queue(0), 0), (Target::queue(2), 2)]);
        assert_eq!((rules.len(), rules.target(2)), (2, None));
        rules.remove(2);
        assert_eq!(rules.target(0), Some(Target::queue(0)));
    }
}
