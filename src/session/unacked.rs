//! Deliveries of one channel that wait for their settlement, in the order of their tags.
//!
//! # Invariants
//! - U1: runs are in the order of their tags and do not overlap; none is empty.
//! - U2: the first delivery of the first run is outstanding.
//! - U3: every tag in `settled` is in a run.

use std::collections::VecDeque;

use crate::broker::{RangeSet, SettledRun};

/// Runs for which an empty ring may keep memory.
const IDLE_RUNS: usize = 1024;

/// Deliveries with tags and positions in a row and otherwise alike, which the client has not settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unacked {
    /// Of the first.
    pub tag: u64,
    /// The position of the first.
    pub seq: u64,
    pub count: u32,
    pub slot: u32,
    /// Of each.
    pub body_bytes: u32,
    pub persistent: bool,
}

impl Unacked {
    /// One delivery.
    pub fn new(tag: u64, seq: u64, slot: u32, body_bytes: usize, persistent: bool) -> Self {
        Unacked { tag, seq, count: 1, slot, body_bytes: u32::try_from(body_bytes).unwrap_or(u32::MAX), persistent }
    }

    /// What its queue is told when it is settled.
    #[inline]
    pub fn settled(&self) -> SettledRun {
        let Unacked { seq, count, body_bytes, persistent, .. } = *self;
        SettledRun { seq, count, body_bytes, persistent }
    }

    /// The tag after the last.
    #[inline]
    fn end(&self) -> u64 {
        self.tag + u64::from(self.count)
    }

    #[inline]
    fn joins(&self, next: &Unacked) -> bool {
        self.end() == next.tag && self.slot == next.slot && self.settled().joins(&next.settled())
    }

    /// The deliveries with tags of `[from, until)`, which are some of them.
    #[inline]
    fn part(&self, from: u64, until: u64) -> Unacked {
        Unacked { tag: from, seq: self.seq + (from - self.tag), count: (until - from) as u32, ..*self }
    }
}

/// A settlement named a delivery that is not outstanding; RabbitMQ closes the channel with 406.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownDeliveryTag(pub u64);

/// See the module.
#[derive(Debug, Default)]
pub struct UnackedRing {
    runs: VecDeque<Unacked>,
    /// Tags that were settled before others in front of them.
    settled: RangeSet,
    /// Outstanding deliveries.
    len: usize,
}

impl UnackedRing {
    /// Outstanding deliveries.
    #[inline]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Adds deliveries; tags rise.
    #[inline]
    pub fn push(&mut self, unacked: Unacked) {
        if unacked.count == 0 {
            return;
        }
        self.len += unacked.count as usize;
        match self.runs.back_mut() {
            Some(last) if last.joins(&unacked) => last.count += unacked.count,
            _ => self.runs.push_back(unacked),
        }
    }

    /// Takes out the deliveries that one ack, nack or reject settles, oldest first.
    ///
    /// With `multiple`, that is every outstanding delivery up to and including `tag`, and `tag` itself must be
    /// outstanding (as in RabbitMQ). Tag 0 with `multiple` means all of them, even when there are none.
    ///
    /// # Errors
    /// [`UnknownDeliveryTag`] if `tag` is not outstanding; the ring is then unchanged.
    #[inline]
    pub fn settle(&mut self, tag: u64, multiple: bool, each: impl FnMut(Unacked)) -> Result<(), UnknownDeliveryTag> {
        if multiple && tag == 0 {
            self.drain().for_each(each);
            return Ok(());
        }
        if !multiple {
            let settled = self.settle_oldest(tag, each);
            return if settled { Ok(()) } else { Err(UnknownDeliveryTag(tag)) };
        }
        if self.find(tag).is_none() || self.settled.contains(tag) {
            return Err(UnknownDeliveryTag(tag));
        }
        self.settle_front(tag + 1, each);
        Ok(())
    }

    /// [`UnackedRing::settle_each`] of one delivery, which most likely is the oldest.
    #[inline]
    fn settle_oldest(&mut self, tag: u64, mut each: impl FnMut(Unacked)) -> bool {
        match self.runs.front_mut() {
            // Whatever comes after it is outstanding as well.
            Some(run) if run.tag == tag && self.settled.is_empty() => {
                each(Unacked { count: 1, ..*run });
                self.len -= 1;
                if run.count > 1 {
                    (run.tag, run.seq, run.count) = (run.tag + 1, run.seq + 1, run.count - 1);
                } else {
                    self.runs.pop_front();
                    self.give_back_memory();
                }
                true
            }
            _ => self.settle_each(tag, 1, each),
        }
    }

    /// Takes out the deliveries of `count` tags from `first` on, as so many calls of [`UnackedRing::settle`] would, if all of
    /// them are outstanding. Answers whether they are; if not, nothing has changed.
    #[inline]
    pub fn settle_each(&mut self, first: u64, count: usize, mut each: impl FnMut(Unacked)) -> bool {
        let (Some(index), Some(until)) = (self.find(first), first.checked_add(count as u64)) else { return false };
        let mut end = first;
        for run in self.runs.range(index..) {
            if end >= until || run.tag > end {
                break;
            }
            end = run.end();
        }
        let has_settled = !self.settled.is_empty() && self.settled.within(first, until).next().is_some();
        if end < until || has_settled {
            return false;
        }
        if self.runs.front().is_some_and(|run| run.tag == first) {
            self.settle_front(until, each);
            return true;
        }
        for run in self.runs.range(index..).take_while(|run| run.tag < until) {
            each(run.part(run.tag.max(first), run.end().min(until)));
        }
        match count {
            1 => _ = self.settled.insert(first),
            _ => self.settled.insert_range(first, until),
        }
        self.len -= count;
        true
    }

    /// Takes out every delivery with a tag before `until`.
    #[inline]
    fn settle_front(&mut self, until: u64, mut each: impl FnMut(Unacked)) {
        while let Some(run) = self.runs.front().filter(|run| run.tag < until) {
            let end = run.end().min(until);
            if self.settled.is_empty() {
                self.len -= (end - run.tag) as usize;
                each(run.part(run.tag, end));
            } else {
                for (from, until) in outstanding(&self.settled, run.tag, end) {
                    self.len -= (until - from) as usize;
                    each(run.part(from, until));
                }
            }
            self.drop_front(end);
        }
        while let Some(start) = self.settled.first().filter(|&start| start < until)
            && let Some(end) = self.settled.take_range_at(start)
        {
            self.settled.insert_range(until, end);
        }
        // What was settled before has its turn now.
        while let Some(run) = self.runs.front()
            && let Some(end) = self.settled.take_range_at(run.tag)
        {
            self.drop_front(end);
        }
        self.give_back_memory();
    }

    #[inline]
    fn give_back_memory(&mut self) {
        if self.runs.is_empty() && self.runs.capacity() > IDLE_RUNS {
            self.runs = VecDeque::new();
        }
    }

    /// Drops the deliveries with tags before `end`.
    #[inline]
    fn drop_front(&mut self, end: u64) {
        while let Some(run) = self.runs.front_mut().filter(|run| run.tag < end) {
            if run.end() > end {
                *run = run.part(end, run.end());
                return;
            }
            self.runs.pop_front();
        }
    }

    /// The run that holds a tag.
    #[inline]
    fn find(&self, tag: u64) -> Option<usize> {
        let first = self.runs.front()?;
        let index = if tag < first.end() { 0 } else { self.runs.partition_point(|run| run.end() <= tag) };
        self.runs.get(index).filter(|run| run.tag <= tag).map(|_| index)
    }

    /// Takes all deliveries out, oldest first.
    pub fn drain(&mut self) -> impl Iterator<Item = Unacked> + use<> {
        let UnackedRing { runs, settled, .. } = std::mem::take(self);
        runs.into_iter().flat_map(move |run| {
            let parts: Vec<_> = outstanding(&settled, run.tag, run.end()).collect();
            parts.into_iter().map(move |(from, until)| run.part(from, until))
        })
    }

    /// Puts deliveries back that [`UnackedRing::settle`] had taken out; for a transaction that is rolled back.
    pub fn restore(&mut self, unacked: impl IntoIterator<Item = Unacked>) {
        let mut all: Vec<Unacked> = self.drain().collect();
        all.extend(unacked);
        all.sort_unstable_by_key(|unacked| unacked.tag);
        all.into_iter().for_each(|unacked| self.push(unacked));
    }
}

/// The ranges of `[from, until)` that are not in `settled`.
#[inline]
fn outstanding(settled: &RangeSet, from: u64, until: u64) -> impl Iterator<Item = (u64, u64)> {
    let mut at = from;
    let gaps = settled.within(from, until).chain([(until, until)]);
    gaps.filter_map(move |(start, end)| {
        let part = (at, start);
        at = end;
        (part.0 < part.1).then_some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Tag, position and the rest of each delivery.
    fn each(unacked: Unacked) -> impl Iterator<Item = (u64, u64, u32, u32, bool)> {
        let Unacked { tag, seq, count, slot, body_bytes, persistent } = unacked;
        (0..u64::from(count)).map(move |at| (tag + at, seq + at, slot, body_bytes, persistent))
    }

    proptest! {
        #[test]
        fn agrees_with_a_plain_list(steps in proptest::collection::vec((0u8..7, 0u64..60, 0u32..5), 0..150)) {
            let (mut ring, mut model, mut tag, mut seq) = (UnackedRing::default(), Vec::new(), 1, 0);
            for (step, at, count) in steps {
                let is_there = |model: &[(u64, u64, u32, u32, bool)], tag: u64| model.iter().any(|entry| entry.0 == tag);
                let mut settled = Vec::new();
                match step {
                    0..=2 => {
                        tag += at % 2;
                        seq += at / 2 % 2;
                        let (slot, body_bytes, persistent) = ((at / 30) as u32, at as usize / 50, at == 7);
                        let unacked = Unacked { count, ..Unacked::new(tag, seq, slot, body_bytes, persistent) };
                        ring.push(unacked);
                        model.extend(each(unacked));
                        (tag, seq) = (tag + u64::from(count), seq + u64::from(count));
                    }
                    3 => {
                        let wanted: Vec<u64> = (at..).take(1 + count as usize).collect();
                        let done = ring.settle_each(at, wanted.len(), |unacked| settled.extend(each(unacked)));
                        prop_assert_eq!(done, wanted.iter().all(|&tag| is_there(&model, tag)));
                        let expected: Vec<_> =
                            model.iter().copied().filter(|entry| done && wanted.contains(&entry.0)).collect();
                        prop_assert_eq!(&settled, &expected);
                        model.retain(|entry| !settled.contains(entry));
                    }
                    4 => {
                        // A transaction that is rolled back.
                        let mut taken = Vec::new();
                        let _ = ring.settle(at, count.is_multiple_of(2), |unacked| taken.push(unacked));
                        ring.restore(taken);
                    }
                    _ => {
                        let multiple = step == 5;
                        let result = ring.settle(at, multiple, |unacked| settled.extend(each(unacked)));
                        let known = (multiple && at == 0) || is_there(&model, at);
                        prop_assert_eq!(result.is_ok(), known);
                        let gone = |tag: u64| known && (tag == at || (multiple && (at == 0 || tag <= at)));
                        let expected: Vec<_> = model.iter().copied().filter(|entry| gone(entry.0)).collect();
                        model.retain(|entry| !gone(entry.0));
                        prop_assert_eq!(settled, expected);
                    }
                }
                prop_assert_eq!(ring.len(), model.len());
            }
            prop_assert_eq!(ring.drain().flat_map(each).collect::<Vec<_>>(), model);
        }
    }

    #[test]
    fn what_follows_costs_nothing() {
        let mut ring = UnackedRing::default();
        (1..=1_000_000).for_each(|tag| ring.push(Unacked::new(tag, tag + 5, 0, 16, true)));
        assert_eq!((ring.len(), ring.runs.len()), (1_000_000, 1));
        ring.settle(600_000, true, |unacked| assert_eq!(unacked.count, 600_000)).unwrap();
        ring.settle(600_002, false, |_| ()).unwrap();
        ring.settle(600_001, false, |_| ()).unwrap();
        assert_eq!((ring.len(), ring.runs[0].tag, ring.settled.is_empty()), (399_998, 600_003, true));
    }
}
