//! The direct type: a binding's key equals a routing key, byte for byte.

use ahash::AHashMap;

use super::target::{Target, TargetSet, Targets};

/// Targets by binding key.
#[derive(Clone, Debug, Default)]
pub struct DirectTable {
    by_key: AHashMap<Box<[u8]>, TargetSet>,
}

impl DirectTable {
    pub fn add(&mut self, key: &[u8], target: Target) {
        self.by_key.entry(key.into()).or_default().add(target);
    }

    pub fn remove(&mut self, key: &[u8], target: Target) {
        if let Some(targets) = self.by_key.get_mut(key) {
            targets.remove(target);
            if targets.is_empty() {
                self.by_key.remove(key);
            }
        }
    }

    /// One look-up.
    pub fn collect(&self, key: &[u8], out: &mut Targets) {
        if let Some(targets) = self.by_key.get(key) {
            out.extend(targets);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_compared_as_bytes_and_removed_with_their_last_binding() {
        let mut table = DirectTable::default();
        let (a, b) = (Target::queue(1), Target::queue(2));
        table.add(b"k.*", a);
        table.add(b"k.*", b);
        table.add(b"", a);
        let collect = |table: &DirectTable, key: &[u8]| {
            let mut out = Targets::default();
            table.collect(key, &mut out);
            out.as_slice().to_vec()
        };
        assert_eq!(collect(&table, b"k.*"), [a, b]);
        assert_eq!(collect(&table, b"k.x"), []);
        assert_eq!(collect(&table, b""), [a]);
        table.remove(b"k.*", a);
        table.remove(b"k.*", b);
        table.remove(b"k.*", b);
        assert_eq!(collect(&table, b"k.*"), []);
        assert_eq!(table.by_key.len(), 1);
    }
}
