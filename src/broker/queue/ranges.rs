//! A set of positions kept as ranges: small when the positions stand together, which consumed and returned ones do.

use std::collections::BTreeMap;

/// Disjoint, non-adjacent half-open ranges.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet {
    ranges: BTreeMap<u64, u64>,
}

impl RangeSet {
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// The smallest position.
    #[inline]
    pub fn first(&self) -> Option<u64> {
        self.ranges.first_key_value().map(|(&start, _)| start)
    }

    /// The range `position` is in.
    pub fn range_of(&self, position: u64) -> Option<(u64, u64)> {
        let (&start, &end) = self.ranges.range(..=position).next_back()?;
        (position < end).then_some((start, end))
    }

    pub fn contains(&self, position: u64) -> bool {
        self.range_of(position).is_some()
    }

    /// Adds one position; answers whether it was new.
    #[inline]
    pub fn insert(&mut self, position: u64) -> bool {
        // The range behind it is joined. There is none where the position is in the set: ranges do not touch.
        let end = self.ranges.remove(&(position + 1)).unwrap_or(position + 1);
        match self.ranges.range_mut(..=position).next_back() {
            Some((_, until)) if position < *until => return false,
            Some((_, until)) if position == *until => *until = end,
            _ => {
                self.ranges.insert(position, end);
            }
        }
        true
    }

    /// Adds `[start, end)`, joining what it touches.
    pub fn insert_range(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let (mut joined_start, mut joined_end) = (start, end);
        while let Some((&at, &until)) = self.ranges.range(..=joined_end).next_back() {
            if until < joined_start {
                break;
            }
            self.ranges.remove(&at);
            joined_start = joined_start.min(at);
            joined_end = joined_end.max(until);
        }
        self.ranges.insert(joined_start, joined_end);
    }

    /// Takes one position out; answers whether it was there.
    pub fn remove(&mut self, position: u64) -> bool {
        let Some((start, end)) = self.range_of(position) else { return false };
        self.ranges.remove(&start);
        if start < position {
            self.ranges.insert(start, position);
        }
        if position + 1 < end {
            self.ranges.insert(position + 1, end);
        }
        true
    }

    /// Takes out the range that starts at `position`, if one does; answers its end.
    #[inline]
    pub fn take_range_at(&mut self, position: u64) -> Option<u64> {
        let mut entry = self.ranges.first_entry()?;
        if *entry.key() != position {
            return None;
        }
        let end = *entry.get_mut();
        entry.remove();
        Some(end)
    }

    /// The ranges that touch `[from, until)`, cut to it.
    pub fn within(&self, from: u64, until: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let before = self.ranges.range(..from).next_back().filter(|&(_, &end)| end > from);
        before
            .into_iter()
            .chain(self.ranges.range(from..until.max(from)))
            .map(move |(&start, &end)| (start.max(from), end.min(until)))
            .filter(|(start, end)| start < end)
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        self.ranges.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn agrees_with_a_plain_set(steps in proptest::collection::vec((0u8..4, 0u64..60, 0u64..20), 0..120)) {
            let (mut ranges, mut model) = (RangeSet::default(), BTreeSet::new());
            for (step, position, len) in steps {
                match step {
                    0 | 1 => prop_assert_eq!(ranges.insert(position), model.insert(position)),
                    2 => { ranges.insert_range(position, position + len); model.extend(position..position + len); }
                    _ => prop_assert_eq!(ranges.remove(position), model.remove(&position)),
                }
                prop_assert_eq!(ranges.first(), model.first().copied());
                let flat: Vec<u64> = ranges.within(10, 50).flat_map(|(start, end)| start..end).collect();
                let expected: Vec<u64> = model.range(10..50).copied().collect();
                prop_assert_eq!(flat, expected);
            }
        }
    }
}
