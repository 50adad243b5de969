//! All that a store holds, as far as a broker would see it.

use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash, Hasher},
    sync::Arc,
};

use leveret::store::{QueueStateRecord, Recovered, Store};

/// Queue and position.
pub type At = (u64, u64);

#[derive(Default, PartialEq, Eq)]
pub struct Contents {
    pub definitions: BTreeMap<Vec<u8>, Vec<u8>>,
    pub states: BTreeMap<u64, QueueStateRecord>,
    /// Hashes of the records that are not consumed.
    pub ready: BTreeMap<At, u64>,
    /// Records that are consumed, as far as they are still there.
    pub consumed: BTreeSet<At>,
    pub notes: BTreeMap<(u64, Vec<u8>), u64>,
}

pub fn hash(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

impl Contents {
    pub fn read(store: &Arc<Store>, recovered: &Recovered) -> Contents {
        let mut contents = Contents {
            definitions: recovered.definitions.iter().cloned().collect(),
            states: recovered.states.iter().map(|(queue, state)| (queue.0, *state)).collect(),
            ..Contents::default()
        };
        for (queue, state) in &recovered.states {
            let consumed = store.read_consumed(*queue).unwrap();
            let is_consumed =
                |seq: u64| seq < state.head || consumed.iter().any(|(from, until)| (*from..*until).contains(&seq));
            // As a broker reads: from the head to the tail, a part at a time.
            let mut from = 0;
            while from < state.tail {
                let mut each = |seq: u64, record: &[u8]| {
                    match is_consumed(seq) {
                        true => drop(contents.consumed.insert((queue.0, seq))),
                        false => drop(contents.ready.insert((queue.0, seq), hash(record))),
                    };
                };
                let end = store.read_records(*queue, from, state.tail, 256 * 1024, &mut each).unwrap();
                assert!(end > from);
                from = end;
            }
        }
        for owner in store.note_owners().unwrap() {
            let mut each = |key: &[u8], value: &[u8]| {
                contents.notes.insert((owner.0, key.to_vec()), hash(value));
            };
            store.read_notes(owner, &[], &[0xff; 40], usize::MAX, &mut each).unwrap();
        }
        contents
    }

    /// Something that is in one and not in the other, in words.
    pub fn difference(&self, other: &Contents) -> String {
        let (mine, others): (BTreeSet<_>, BTreeSet<_>) = (self.ready.keys().collect(), other.ready.keys().collect());
        let gone: Vec<_> = mine.difference(&others).take(5).collect();
        let new: Vec<_> = others.difference(&mine).take(5).collect();
        format!(
            "gone {gone:?}, new {new:?}, consumed records {} and {}, definitions {} and {}, notes {} and {}, states {}",
            self.consumed.len(),
            other.consumed.len(),
            self.definitions.len(),
            other.definitions.len(),
            self.notes.len(),
            other.notes.len(),
            if self.states == other.states { "equal" } else { "different" }
        )
    }
}
