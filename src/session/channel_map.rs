//! Channels by number. A connection has one or a few, so a sorted vector beats a hash map, and a channel number of 65,535
//! costs no more than 1.

/// A small sorted map from channel number to `T`.
#[derive(Debug)]
pub struct ChannelMap<T> {
    entries: Vec<(u16, Box<T>)>,
}

impl<T> Default for ChannelMap<T> {
    fn default() -> Self {
        ChannelMap { entries: Vec::new() }
    }
}

impl<T> ChannelMap<T> {
    #[inline]
    fn position(&self, channel: u16) -> Result<usize, usize> {
        match self.entries.first() {
            Some((first, _)) if *first == channel => Ok(0),
            _ => self.entries.binary_search_by_key(&channel, |(number, _)| *number),
        }
    }

    #[inline]
    pub fn get(&self, channel: u16) -> Option<&T> {
        self.position(channel).ok().map(|at| &*self.entries[at].1)
    }

    #[inline]
    pub fn get_mut(&mut self, channel: u16) -> Option<&mut T> {
        self.position(channel).ok().map(|at| &mut *self.entries[at].1)
    }

    /// Adds or replaces.
    pub fn insert(&mut self, channel: u16, value: T) {
        match self.position(channel) {
            Ok(at) => *self.entries[at].1 = value,
            Err(at) => self.entries.insert(at, (channel, Box::new(value))),
        }
    }

    pub fn remove(&mut self, channel: u16) -> Option<T> {
        self.position(channel).ok().map(|at| *self.entries.remove(at).1)
    }

    pub fn len(&self) -> usize {
        self.entries.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = (u16, &T)> {
        self.entries.iter().map(|(channel, value)| (*channel, &**value))
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u16, &mut T)> {
        self.entries.iter_mut().map(|(channel, value)| (*channel, &mut **value))
    }

    /// Empties the map.
    pub fn take_all(&mut self) -> Vec<(u16, Box<T>)> {
        std::mem::take(&mut self.entries)
    }
}
