//! Whole segments go, from the start.

use super::*;
use crate::store::SEGMENT_RECORDS;

const SMALL: StreamRules =
    StreamRules { max_age_ms: None, max_bytes: Some(200_000), segment_bytes: Some(50_000), durability: None };

/// What the store still has.
fn stored(world: &World) -> Vec<u64> {
    let mut offsets = Vec::new();
    let read =
        world.store.read_records(world.stream.id, 0, u64::MAX, usize::MAX, &mut |offset, _| offsets.push(offset));
    read.expect("a readable log");
    offsets
}

#[test]
fn old_segments_go_when_a_new_one_begins() {
    let mut world = World::new(SMALL);
    for _ in 0..200 {
        world.publish(100, 100);
    }
    let counts = world.stream.counts();
    assert!((1_000..2_300).contains(&counts.ready), "{counts:?}");
    let head = 20_000 - counts.ready;
    let (_, client) = world.read("", 0, from_first());
    assert_eq!(client.wait_for(counts.ready as usize), Vec::from_iter(head..20_000));
    let stored = stored(&world);
    assert_eq!(stored.first(), Some(&(head - head % SEGMENT_RECORDS)), "whole segments of the store's are deleted");
    assert_eq!(world.stream.counts().ready_bytes, counts.ready * 100);
}

#[test]
fn readers_left_behind_go_on_with_the_first_message() {
    let mut world = World::new(SMALL);
    world.publish(1_000, 100);
    let (id, client) = world.read("", 10, from_first());
    assert_eq!(client.wait_for(10), Vec::from_iter(0..10));
    for _ in 0..200 {
        world.publish(100, 100);
    }
    let head = world.stream.state.lock().segments.head();
    world.settle(id, &client.offsets());
    assert_eq!(client.wait_for(20)[10..], Vec::from_iter(head..head + 10));
}

#[test]
fn age_counts_at_a_tick_too_and_spares_the_last_segment() {
    let mut world = World::new(StreamRules { max_age_ms: Some(60_000), max_bytes: None, ..SMALL });
    for _ in 0..20 {
        world.publish(100, 100);
    }
    world.stream.tick(clock::now_unix_ms(), &mut Effects::default());
    assert_eq!(world.stream.counts().ready, 2_000);
    world.stream.tick(clock::now_unix_ms() + 120_000, &mut Effects::default());
    assert!(world.stream.counts().ready <= 500);
    world.flush();
    let world = world.restart();
    let counts = world.stream.counts();
    let (_, client) = world.read("", 0, from_first());
    assert_eq!(client.wait_for(counts.ready as usize), Vec::from_iter(2_000 - counts.ready..2_000));
}

#[test]
fn new_rules_count_at_once() {
    let mut world = World::new(StreamRules { max_bytes: None, ..SMALL });
    for _ in 0..20 {
        world.publish(100, 100);
    }
    assert_eq!(world.stream.counts().ready, 2_000);
    world.stream.apply_rules(StreamRules { max_bytes: Some(0), ..SMALL });
    let ready = world.stream.counts().ready;
    assert!((1..=500).contains(&ready), "{ready}");
    world.flush();
    assert_eq!(world.restart().stream.counts().ready, ready);
}

#[test]
fn large_dropped_messages_give_their_space_back_before_their_segment_is_whole() {
    let mut world =
        World::new(StreamRules { max_bytes: Some(4 << 20), segment_bytes: Some(1 << 20), ..StreamRules::default() });
    for _ in 0..60 {
        world.publish(1, 1 << 20);
    }
    world.flush();
    let stored = stored(&world);
    assert!(stored.len() < 30, "{} of 60 are left", stored.len());
    let ready = world.stream.counts().ready;
    assert!(ready <= 5, "{ready}");
    assert!(Vec::from_iter(60 - ready..60).iter().all(|offset| stored.contains(offset)));
}
