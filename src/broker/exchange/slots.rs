//! A list whose entries keep their place: slots that are given out, freed and given out again.

/// The place of an entry.
pub type Slot = u32;

/// Entries by [`Slot`]. A freed slot is the next to be used again, so whoever frees one has forgotten it before.
#[derive(Clone, Debug)]
pub struct Slots<E> {
    entries: Vec<Option<E>>,
    free: Vec<Slot>,
}

impl<E> Default for Slots<E> {
    fn default() -> Self {
        Self { entries: Vec::new(), free: Vec::new() }
    }
}

impl<E> Slots<E> {
    /// Puts an entry into a free slot.
    ///
    /// # Panics
    /// With 2^31 entries, which would be hundreds of gigabytes of them: [`Target`](super::Target) needs one bit.
    pub fn insert(&mut self, entry: E) -> Slot {
        if let Some(slot) = self.free.pop() {
            self.entries[slot as usize] = Some(entry);
            return slot;
        }
        assert!(self.entries.len() < 1 << 31, "2^31 entries");
        #[expect(clippy::cast_possible_truncation, reason = "asserted above")]
        let slot = self.entries.len() as Slot;
        self.entries.push(Some(entry));
        slot
    }

    pub fn remove(&mut self, slot: Slot) -> Option<E> {
        let entry = self.entries.get_mut(slot as usize)?.take()?;
        self.free.push(slot);
        Some(entry)
    }

    pub fn get(&self, slot: Slot) -> Option<&E> {
        self.entries.get(slot as usize)?.as_ref()
    }

    pub fn get_mut(&mut self, slot: Slot) -> Option<&mut E> {
        self.entries.get_mut(slot as usize)?.as_mut()
    }

    pub fn iter(&self) -> impl Iterator<Item = (Slot, &E)> {
        (0..).zip(&self.entries).filter_map(|(slot, entry)| Some((slot, entry.as_ref()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_slot_is_used_again_and_others_keep_theirs() {
        let mut slots = Slots::default();
        let (a, b) = (slots.insert('a'), slots.insert('b'));
        assert_eq!(slots.remove(a), Some('a'));
        assert_eq!(slots.remove(a), None);
        assert_eq!(slots.get(b), Some(&'b'));
        assert_eq!(slots.insert('c'), a);
        assert_eq!(slots.iter().collect::<Vec<_>>(), [(a, &'c'), (b, &'b')]);
        assert_eq!(slots.get(77), None);
    }
}
