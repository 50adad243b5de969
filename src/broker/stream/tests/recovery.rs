//! What survives a restart, and what a crash or a damaged disk leaves.

use super::*;
use crate::store::RoundBuilder;

const TRACKED: (&str, AMQPValue) = ("x-stream-automatic-offset-tracking", AMQPValue::Boolean(true));

#[test]
fn a_stream_comes_back_with_its_segments_and_goes_on_at_its_tail() {
    let rules = StreamRules { segment_bytes: Some(20_000), ..StreamRules::default() };
    let mut world = World::new(rules);
    for _ in 0..10 {
        world.publish(100, 100);
    }
    let counts = world.stream.counts();
    let segments = world.stream.state.lock().segments.len();
    let mut world = world.restart();
    assert_eq!(world.stream.counts(), counts);
    let (_, last) = world.read("", 200, offset(text("last")));
    assert_eq!(last.wait_for(100), Vec::from_iter(900..1_000));
    assert_eq!(world.stream.state.lock().segments.len(), segments);
    world.publish(5, 100);
    assert_eq!(last.wait_for(105)[100..], [1_000, 1_001, 1_002, 1_003, 1_004]);
    let (_, all) = world.read("", 0, from_first());
    assert_eq!(all.wait_for(1_005), Vec::from_iter(0..1_005));
    assert!(world.stream.oldest_unix_ms().is_some());
}

#[test]
fn what_failed_to_commit_is_gone_and_was_never_delivered() {
    let mut world = World::new(StreamRules::default());
    world.publish(10, 100);
    let (_, client) = world.read("", 100, from_first());
    client.wait_for(10);
    world.gate.0.store(FAILING, Ordering::SeqCst);
    world.publish_raw(5, 100, &[0, 0]);
    assert!(futures_lite::future::block_on(world.store.durable(world.round)).is_err());
    assert_eq!(client.count(), 10);
    let id = world.stream.id;
    let World { directory, gate, store, stream, .. } = world;
    drop(stream);
    let _ = store.shutdown();
    drop(store);
    gate.0.store(RUNNING, Ordering::SeqCst);
    let (_store, recovered) = open_store(directory.path(), &gate);
    let (_, record) = recovered.states.iter().find(|(queue, _)| *queue == id).expect("a state");
    assert_eq!((record.head, record.tail, record.message_count), (0, 10, 10));
}

#[test]
fn a_tracked_consumer_goes_on_after_what_it_acknowledged() {
    let mut world = World::new(StreamRules::default());
    world.publish(20, 10);
    let (id, client) = world.read("mine", 10, [TRACKED, ("x-stream-offset", text("first"))]);
    assert_eq!(client.wait_for(10), Vec::from_iter(0..10));
    world.settle(id, &[0, 1, 2, 4]);
    client.wait_for(14);
    world.stream.cancel(id);
    world.flush();
    let world = world.restart();
    // What it acknowledged wins over what it asks for.
    let (id, client) = world.read("mine", 3, [TRACKED, ("x-stream-offset", text("next"))]);
    assert_eq!(client.wait_for(3), [3, 4, 5]);
    world.stream.cancel(id);
    let (_, untracked) = world.read("mine", 100, []);
    let (_, other) = world.read("other", 100, [TRACKED]);
    assert_eq!((untracked.wait_for(0).len(), other.count()), (0, 0), "both begin with the next message");
}

#[test]
fn a_tracked_consumer_that_begins_with_the_next_message_misses_nothing_while_it_is_away() {
    let mut world = World::new(StreamRules::default());
    world.publish(5, 10);
    let (id, _) = world.read("mine", 10, [TRACKED]);
    world.stream.cancel(id);
    world.publish(5, 10);
    world.flush();
    let world = world.restart();
    let (_, client) = world.read("mine", 10, [TRACKED]);
    assert_eq!(client.wait_for(5), [5, 6, 7, 8, 9]);
}

/// Deletes records behind the stream's back, as a damaged disk would.
struct Eraser(QueueId, u64, u64);

impl crate::store::RoundSource for Eraser {
    fn drain(&self, round: &mut RoundBuilder) {
        round.delete_segments(self.0, self.1, self.2);
    }

    fn round_ended(&self, _: bool) {}
}

#[test]
fn missing_records_are_skipped() {
    let mut world = World::new(StreamRules::default());
    for _ in 0..20 {
        world.publish(1_000, 100);
    }
    world.store.mark_dirty(Arc::new(Eraser(world.stream.id, 1, 3)));
    world.flush();
    let expected: Vec<u64> = (0..4_096).chain(3 * 4_096..20_000).collect();
    let (_, client) = world.read("", 0, from_first());
    assert_eq!(client.wait_for(expected.len()), expected);
    let (_, within) = world.read("", 1, offset(AMQPValue::LongInt(5_000)));
    assert_eq!(within.wait_for(1), [3 * 4_096]);
    let (_, time) = world.read("", 1, offset(text("1h")));
    assert_eq!(time.wait_for(1), [0]);
}
