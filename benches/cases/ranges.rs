//! The set of consumed positions.

use std::hint::black_box;

use leveret::broker::RangeSet;

use super::{MESSAGES, Work};

/// In which order positions come.
pub enum Order {
    Ascending,
    Descending,
    Random,
}

/// Positions that come in one by one and, once there is no gap left, go as one range.
pub fn insert(order: Order) -> Box<dyn Work> {
    let mut positions: Vec<u64> = (0..MESSAGES).collect();
    match order {
        Order::Ascending => {}
        Order::Descending => positions.reverse(),
        Order::Random => (0..positions.len()).for_each(|at| positions.swap(at, at * 7_919 % MESSAGES as usize)),
    }
    let mut ranges = RangeSet::default();
    Box::new(move || {
        for &position in &positions {
            assert!(ranges.insert(black_box(position)));
        }
        assert_eq!(ranges.take_range_at(0), Some(MESSAGES));
    })
}
