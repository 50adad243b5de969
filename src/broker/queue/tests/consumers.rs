//! The ring of consumers on its own.

use super::*;
use crate::broker::queue::consumers::ConsumerRing;

fn ring_consumer(no_ack: bool, priority: i64, prefetch: u16) -> Consumer {
    Consumer::new(
        FakePort::new(&EventLog::default()),
        Address { channel: 1, slot: 0 },
        no_ack,
        false,
        priority,
        prefetch,
    )
}

/// Hands out one delivery; answers the address slot of who got it.
fn turn(ring: &mut ConsumerRing) -> Option<u32> {
    let (consumer, _) = ring.current()?;
    let slot = consumer.address.slot;
    consumer.delivered();
    ring.end_turn();
    Some(slot)
}

fn add(ring: &mut ConsumerRing, slot: u32, priority: i64, prefetch: u16) -> ConsumerId {
    let mut consumer = ring_consumer(false, priority, prefetch);
    consumer.address.slot = slot;
    ring.add(consumer)
}

#[test]
fn equals_take_turns_and_nobody_gets_two_before_the_others_got_one() {
    let mut ring = ConsumerRing::default();
    let ids: Vec<ConsumerId> = (0..5).map(|slot| add(&mut ring, slot, 0, 0)).collect();
    let turns: Vec<u32> = (0..12).filter_map(|_| turn(&mut ring)).collect();
    assert_eq!(turns, [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]);
    // Who leaves is not waited for, who comes is last, and the others keep their places.
    ring.remove(ids[3]);
    add(&mut ring, 9, 0, 0);
    assert_eq!((0..6).filter_map(|_| turn(&mut ring)).collect::<Vec<_>>(), [2, 4, 0, 1, 9, 2]);
}

#[test]
fn the_higher_priority_gets_all_until_its_credit_is_used() {
    let mut ring = ConsumerRing::default();
    add(&mut ring, 0, -5, 0);
    let high = add(&mut ring, 1, 10, 3);
    add(&mut ring, 2, 0, 1);
    assert_eq!((0..6).filter_map(|_| turn(&mut ring)).collect::<Vec<_>>(), [1, 1, 1, 2, 0, 0]);
    ring.settled(high, 2, 0);
    assert_eq!((0..3).filter_map(|_| turn(&mut ring)).collect::<Vec<_>>(), [1, 1, 0]);
}

#[test]
fn a_blocked_consumer_is_passed_over_until_it_is_unblocked() {
    let mut ring = ConsumerRing::default();
    let first = add(&mut ring, 0, 0, 0);
    add(&mut ring, 1, 0, 0);
    ring.block_current();
    assert_eq!((0..2).filter_map(|_| turn(&mut ring)).collect::<Vec<_>>(), [1, 1]);
    ring.settled(first, 1, 0); // credit is not what it lacks
    assert_eq!(turn(&mut ring), Some(1));
    ring.unblock(first);
    ring.unblock(first);
    assert_eq!((0..3).filter_map(|_| turn(&mut ring)).collect::<Vec<_>>(), [1, 0, 1]);
}

#[test]
fn an_id_of_a_consumer_that_is_gone_names_nobody_else() {
    let mut ring = ConsumerRing::default();
    let gone = add(&mut ring, 0, 0, 1);
    assert!(ring.remove(gone).is_some() && ring.remove(gone).is_none());
    let other = add(&mut ring, 1, 0, 1);
    assert_ne!(gone, other);
    assert_eq!(turn(&mut ring), Some(1));
    ring.settled(gone, 1, 0);
    ring.unblock(gone);
    assert!(ring.current().is_none(), "somebody else's credit was given back");
    ring.settled(other, 1, 0);
    assert_eq!(turn(&mut ring), Some(1));
    assert_eq!((ring.len(), ring.take_all().len(), ring.len()), (1, 1, 0));
    assert!(ring.remove(other).is_none());
}

#[test]
fn without_acks_there_is_no_limit_and_with_them_prefetch_is_one() {
    let mut ring = ConsumerRing::default();
    ring.add(ring_consumer(true, 0, 1));
    assert_eq!((0..5).filter_map(|_| turn(&mut ring)).count(), 5);
    let mut ring = ConsumerRing::default();
    let id = ring.add(ring_consumer(false, 0, 2));
    assert_eq!((0..5).filter_map(|_| turn(&mut ring)).count(), 2);
    ring.settled(id, 9, 0);
    assert_eq!((0..5).filter_map(|_| turn(&mut ring)).count(), 2);
}
