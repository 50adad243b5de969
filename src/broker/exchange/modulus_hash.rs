//! The `x-modulus-hash` type: a message goes by one binding, chosen by a hash of its keys modulo the number of bindings.
//!
//! Bindings are in the order of their destinations, so a restart changes nothing; one more or less changes nearly
//! everything.

use super::stable_hash::StableHasher;
use super::target::{Target, Targets};
use crate::broker::binding::Destination;

/// All bindings, sorted as RabbitMQ sorts destinations: exchanges before queues, then by name.
#[derive(Clone, Debug, Default)]
pub struct ModulusHashTable {
    bound: Vec<(Destination, Target)>,
}

fn order(destination: &Destination) -> (bool, &str) {
    (matches!(destination, Destination::Queue(_)), destination.name())
}

impl ModulusHashTable {
    pub fn add(&mut self, destination: &Destination, target: Target) {
        let place = self.bound.partition_point(|(other, _)| order(other) < order(destination));
        self.bound.insert(place, (destination.clone(), target));
    }

    pub fn remove(&mut self, destination: &Destination) {
        if let Ok(place) = self.bound.binary_search_by(|(other, _)| order(other).cmp(&order(destination))) {
            self.bound.remove(place);
        }
    }

    /// `keys` are hashed one after the other, those of CC and BCC included.
    pub fn collect(&self, keys: &[&[u8]], out: &mut Targets) {
        let hash = keys.iter().fold(StableHasher::new(), |hash, key| hash.string(key)).finish();
        // Without a binding there is nothing to choose from.
        let place = hash.checked_rem(self.bound.len() as u64);
        if let Some((_, target)) = place.and_then(|place| self.bound.get(usize::try_from(place).ok()?)) {
            out.push(*target);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(slot: u32) -> (Destination, Target) {
        (Destination::Queue(format!("q{slot}").as_str().into()), Target::queue(slot))
    }

    fn collect(table: &ModulusHashTable, keys: &[&[u8]]) -> Vec<Target> {
        let mut out = Targets::default();
        table.collect(keys, &mut out);
        out.as_slice().to_vec()
    }

    #[test]
    fn the_order_of_bindings_does_not_matter() {
        let (mut forward, mut backward) = (ModulusHashTable::default(), ModulusHashTable::default());
        assert_eq!(collect(&forward, &[b"k"]), []);
        let exchange = (Destination::Exchange("z".into()), Target::exchange(9));
        let mut all: Vec<_> = (0..5).map(queue).chain([exchange]).collect();
        all.iter().for_each(|(destination, target)| forward.add(destination, *target));
        all.reverse();
        all.iter().for_each(|(destination, target)| backward.add(destination, *target));
        assert_eq!(forward.bound[0].1, Target::exchange(9));
        let mut counts = [0; 6];
        for number in 0..6000u32 {
            let key = number.to_string();
            let found = collect(&forward, &[key.as_bytes()]);
            assert_eq!(found, collect(&backward, &[key.as_bytes()]));
            assert_eq!(found.len(), 1);
            counts[forward.bound.iter().position(|(_, target)| *target == found[0]).unwrap()] += 1;
        }
        assert!(counts.iter().all(|count| (850..1150).contains(count)), "{counts:?}");
    }

    #[test]
    fn every_binding_counts_and_every_key_is_hashed() {
        let mut table = ModulusHashTable::default();
        let ((a, target_a), (b, target_b)) = (queue(0), queue(1));
        for _ in 0..9 {
            table.add(&a, target_a);
        }
        table.add(&b, target_b);
        let to_b = (0..10_000u32).filter(|n| collect(&table, &[n.to_string().as_bytes()]) == [target_b]).count();
        assert!((800..1200).contains(&to_b), "{to_b}");
        let with_copies: std::collections::BTreeSet<_> =
            (0..100u8).map(|n| collect(&table, &[b"k".as_slice(), &[n]])[0]).collect();
        assert_eq!(with_copies.len(), 2);
        for _ in 0..9 {
            table.remove(&a);
        }
        table.remove(&a);
        assert_eq!(collect(&table, &[b"k"]), [target_b]);
        table.remove(&b);
        assert_eq!(collect(&table, &[b"k"]), []);
    }
}
