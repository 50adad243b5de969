//! Deliveries of one channel that wait for their settlement, in the order of their tags.

use std::collections::VecDeque;

/// A delivery the client has not settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unacked {
    pub tag: u64,
    pub seq: u64,
    pub slot: u32,
    pub body_bytes: u32,
    pub persistent: bool,
    settled: bool,
}

impl Unacked {
    pub fn new(tag: u64, seq: u64, slot: u32, body_bytes: usize, persistent: bool) -> Self {
        Unacked {
            tag,
            seq,
            slot,
            body_bytes: u32::try_from(body_bytes).unwrap_or(u32::MAX),
            persistent,
            settled: false,
        }
    }
}

/// A settlement named a delivery that is not outstanding; RabbitMQ closes the channel with 406.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownDeliveryTag(pub u64);

/// See the module.
#[derive(Debug, Default)]
pub struct UnackedRing {
    ring: VecDeque<Unacked>,
    len: usize,
}

impl UnackedRing {
    /// Outstanding deliveries.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Adds a delivery; tags rise.
    #[inline]
    pub fn push(&mut self, unacked: Unacked) {
        self.ring.push_back(unacked);
        self.len += 1;
    }

    /// Adds deliveries; tags rise.
    #[inline]
    pub fn extend(&mut self, unacked: impl ExactSizeIterator<Item = Unacked>) {
        self.len += unacked.len();
        self.ring.extend(unacked);
    }

    /// Takes out the deliveries that one ack, nack or reject settles, oldest first.
    ///
    /// With `multiple`, that is every outstanding delivery up to and including `tag`, and `tag` itself must be
    /// outstanding (as in RabbitMQ). Tag 0 with `multiple` means all of them, even when there are none.
    ///
    /// # Errors
    /// [`UnknownDeliveryTag`] if `tag` is not outstanding; the ring is then unchanged.
    #[inline]
    pub fn settle(
        &mut self,
        tag: u64,
        multiple: bool,
        mut each: impl FnMut(Unacked),
    ) -> Result<(), UnknownDeliveryTag> {
        if multiple && tag == 0 {
            self.drain().for_each(each);
            return Ok(());
        }
        let at = self.position(tag).ok_or(UnknownDeliveryTag(tag))?;
        if multiple {
            for unacked in self.ring.drain(..=at) {
                if !unacked.settled {
                    self.len -= 1;
                    each(unacked);
                }
            }
            self.drop_settled_front();
        } else {
            each(self.ring[at]);
            self.ring[at].settled = true;
            self.len -= 1;
            self.drop_settled_front();
        }
        Ok(())
    }

    /// Takes out the deliveries of `count` tags from `first` on, as so many calls of [`UnackedRing::settle`] would, if all of
    /// them are outstanding. Answers whether they are; if not, nothing has changed.
    #[inline]
    pub fn settle_each(&mut self, first: u64, count: usize, mut each: impl FnMut(Unacked)) -> bool {
        let Some(at) = self.position(first) else { return false };
        let until = at + count;
        let has_gap = match self.ring.get(until.saturating_sub(1)) {
            Some(last) => last.tag - first != count as u64 - 1,
            None => true,
        };
        if has_gap || self.ring.range(at..until).any(|unacked| unacked.settled) {
            return false;
        }
        self.len -= count;
        if at == 0 {
            self.ring.drain(..count).for_each(each);
            self.drop_settled_front();
            return true;
        }
        for unacked in self.ring.range_mut(at..until) {
            each(*unacked);
            unacked.settled = true;
        }
        true
    }

    #[inline]
    fn position(&self, tag: u64) -> Option<usize> {
        let first = self.ring.front()?;
        // Tags without gaps, the usual case, are found by subtraction.
        let guess = usize::try_from(tag.checked_sub(first.tag)?).ok()?;
        let at = match self.ring.get(guess) {
            Some(unacked) if unacked.tag == tag => guess,
            _ => self.ring.binary_search_by_key(&tag, |unacked| unacked.tag).ok()?,
        };
        (!self.ring[at].settled).then_some(at)
    }

    #[inline]
    fn drop_settled_front(&mut self) {
        while self.ring.front().is_some_and(|unacked| unacked.settled) {
            self.ring.pop_front();
        }
        if self.ring.is_empty() && self.ring.capacity() > 8192 {
            self.ring = VecDeque::new();
        }
    }

    /// Takes all deliveries out, oldest first.
    pub fn drain(&mut self) -> impl Iterator<Item = Unacked> + use<> {
        self.len = 0;
        std::mem::take(&mut self.ring).into_iter().filter(|unacked| !unacked.settled)
    }

    /// Puts deliveries back that [`UnackedRing::settle`] had taken out; for a transaction that is rolled back.
    pub fn restore(&mut self, unacked: impl IntoIterator<Item = Unacked>) {
        let mut all: Vec<Unacked> = self.drain().collect();
        all.extend(unacked);
        all.sort_unstable_by_key(|unacked| unacked.tag);
        self.len = all.len();
        self.ring = all.into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agrees_with_a_plain_list(steps in proptest::collection::vec((0u8..5, 0u64..40), 0..150)) {
            let (mut ring, mut model, mut tag) = (UnackedRing::default(), Vec::<u64>::new(), 0);
            for (step, at) in steps {
                match step {
                    0 | 1 => {
                        tag += 1 + at % 2;
                        ring.push(Unacked::new(tag, tag, 0, 1, false));
                        model.push(tag);
                    }
                    4 => {
                        let (first, count) = (at, 1 + at as usize % 5);
                        let wanted: Vec<u64> = (first..).take(count).collect();
                        let mut settled = Vec::new();
                        let done = ring.settle_each(first, count, |unacked| settled.push(unacked.tag));
                        prop_assert_eq!(done, wanted.iter().all(|tag| model.contains(tag)));
                        prop_assert_eq!(&settled, if done { &wanted } else { &Vec::new() });
                        model.retain(|tag| !settled.contains(tag));
                    }
                    _ => {
                        let multiple = step == 2;
                        let mut settled = Vec::new();
                        let result = ring.settle(at, multiple, |unacked| settled.push(unacked.tag));
                        let known = (multiple && at == 0) || model.contains(&at);
                        prop_assert_eq!(result.is_ok(), known);
                        let gone = |tag: u64| known && (tag == at || (multiple && (at == 0 || tag <= at)));
                        let expected: Vec<u64> = model.iter().copied().filter(|&tag| gone(tag)).collect();
                        model.retain(|&tag| !gone(tag));
                        prop_assert_eq!(settled, expected);
                    }
                }
                prop_assert_eq!(ring.len(), model.len());
            }
            prop_assert_eq!(ring.drain().map(|unacked| unacked.tag).collect::<Vec<_>>(), model);
        }
    }
}
