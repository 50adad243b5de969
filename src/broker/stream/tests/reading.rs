//! Where readers begin, what they get, and what that costs in memory.

use super::*;
use crate::broker::queue::chunk::CHUNK_BYTES;

fn valued(value: &str) -> Vec<u8> {
    let mut properties = vec![0x20, 0, 0, 0, 0, 0, 21];
    properties.extend_from_slice(b"x-stream-filter-valueS");
    properties.extend_from_slice(&(value.len() as u32).to_be_bytes());
    properties.extend_from_slice(value.as_bytes());
    let table_len = (properties.len() - 6) as u32;
    properties[2..6].copy_from_slice(&table_len.to_be_bytes());
    properties
}

#[test]
fn readers_begin_where_they_ask_to() {
    let mut world = World::new(StreamRules::default());
    for _ in 0..5 {
        world.publish(2, 10);
    }
    for (start, expected) in [
        (text("first"), 0..10),
        (text("last"), 8..10),
        (AMQPValue::LongInt(7), 7..10),
        (AMQPValue::LongInt(-7), 0..10),
        (AMQPValue::Timestamp(0), 0..10),
        (text("1h"), 0..10),
        (text("next"), 10..10),
        (AMQPValue::LongInt(12), 12..12),
        (AMQPValue::Timestamp(u64::from(u32::MAX)), 10..10),
    ] {
        let (_, client) = world.read("", 100, offset(start.clone()));
        assert_eq!(client.wait_for(expected.clone().count()), Vec::from_iter(expected), "{start:?}");
    }
    let (_, next) = world.read("", 100, []);
    let (_, beyond) = world.read("", 100, offset(AMQPValue::LongInt(12)));
    world.publish(3, 10);
    assert_eq!(next.wait_for(3), [10, 11, 12]);
    assert_eq!(beyond.wait_for(1), [12]);
}

#[test]
fn nothing_is_delivered_before_it_is_committed() {
    let mut world = World::new(StreamRules::default());
    let (_, client) = world.read("", 100, []);
    world.gate.0.store(HELD, Ordering::SeqCst);
    world.publish_raw(3, 10, &[0, 0]);
    let (_, late) = world.read("", 100, from_first());
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!((client.count(), late.count()), (0, 0));
    world.gate.0.store(RUNNING, Ordering::SeqCst);
    assert_eq!(client.wait_for(3), [0, 1, 2]);
    assert_eq!(late.wait_for(3), [0, 1, 2]);
    world.gate.0.store(FAILING, Ordering::SeqCst);
    world.publish_raw(3, 10, &[0, 0]);
    assert!(futures_lite::future::block_on(world.store.durable(world.round)).is_err());
    assert_eq!(client.wait_for(3), [0, 1, 2]);
}

#[test]
fn settlements_of_any_kind_give_back_credit_and_nothing_else() {
    let mut world = World::new(StreamRules::default());
    world.publish(10, 10);
    let (id, client) = world.read("", 4, from_first());
    assert_eq!(client.wait_for(4), [0, 1, 2, 3]);
    world.settle(id, &[2]);
    assert_eq!(client.wait_for(5), [0, 1, 2, 3, 4]);
    world.stream.settle(
        None,
        &[SettledRun { seq: 0, count: 1, body_bytes: 8, persistent: true }],
        &mut Effects::default(),
    );
    world.settle(id, &[0, 1, 3]);
    assert_eq!(client.wait_for(8), [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(world.stream.counts(), Counts { ready: 10, ready_bytes: 100, consumers: 1, ..Counts::default() });
    world.stream.cancel(id);
    world.settle(id, &[4, 5]);
    assert_eq!(client.wait_for(8).len(), 8);
    assert_eq!(world.stream.counts().consumers, 0);
}

#[test]
fn a_full_connection_gets_nothing_until_it_has_room() {
    let mut world = World::new(StreamRules::default());
    let (id, client) = world.read("", 100, []);
    client.full.store(true, Ordering::SeqCst);
    world.publish(3, 10);
    world.flush();
    assert_eq!(client.count(), 0);
    client.full.store(false, Ordering::SeqCst);
    world.stream.unblock(id, &mut Effects::default());
    assert_eq!(client.wait_for(3), [0, 1, 2]);
}

#[test]
fn many_readers_read_everything_without_the_stream_in_memory() {
    const MESSAGES: u64 = 60_000;
    let mut world = World::new(StreamRules::default());
    for _ in 0..60 {
        world.publish(MESSAGES / 60, 100);
    }
    let quiet = world.budget.used_bytes();
    assert!(quiet < 4 * CHUNK_BYTES, "{quiet} bytes");
    let readers: Vec<_> = (0..20).map(|index| world.read("", 0, offset(AMQPValue::LongInt(index * 997)))).collect();
    let mut most = 0;
    for (index, (_, client)) in readers.iter().enumerate() {
        let first = index as u64 * 997;
        let expected = (MESSAGES - first) as usize;
        eventually(
            || {
                let now = world.budget.used_bytes();
                assert!(now < 20 * 3 * CHUNK_BYTES, "{now} bytes");
                client.count() >= expected
            },
            || format!("{expected} deliveries, not {}", client.count()),
        );
        most = most.max(world.budget.used_bytes());
        assert!(client.offsets().iter().copied().eq(first..MESSAGES));
        assert!(client.seen.lock().iter().all(|seen| seen.id == seen.offset));
    }
    world.publish(10, 100);
    for (_, client) in &readers {
        eventually(|| client.offsets().last() == Some(&(MESSAGES + 9)), || "the tail".into());
    }
}

#[test]
fn readers_at_the_same_place_share_what_is_read() {
    let mut world = World::new(StreamRules::default());
    for _ in 0..20 {
        world.publish(1_000, 100);
    }
    let readers: Vec<_> = (0..50).map(|_| world.read("", 10, from_first())).collect();
    for (_, client) in &readers {
        assert_eq!(client.wait_for(10).len(), 10);
    }
    let resident = world.stream.resident_bytes();
    assert!(resident < 12 * CHUNK_BYTES, "{resident} bytes for 50 readers");
    world.stream.offer_eviction();
    for (id, client) in &readers {
        world.settle(*id, &client.offsets());
        assert_eq!(client.wait_for(20), Vec::from_iter(0..20));
    }
}

#[test]
fn large_messages_are_shared_and_come_back_whole() {
    let mut world = World::new(StreamRules::default());
    let sizes = [8, record::SHARED_BODY_BYTES, 300_000, 100, 1 << 20];
    for &bytes in &sizes {
        world.publish(1, bytes);
    }
    let world = world.restart();
    let (_, client) = world.read("", 100, from_first());
    assert_eq!(client.wait_for(sizes.len()), [0, 1, 2, 3, 4]);
    let seen: Vec<usize> = client.seen.lock().iter().map(|seen| seen.bytes).collect();
    assert_eq!(seen, sizes);
}

#[test]
fn filters_let_through_what_matches_from_disk_and_from_memory() {
    let mut world = World::new(StreamRules::default());
    let publish = |world: &mut World, rounds: u64| {
        for round in 0..rounds {
            let other = if round % 2 == 0 { vec![0, 0] } else { valued("other") };
            world.publish_raw(999, 100, &other);
            world.publish_raw(1, 100, &valued("rare"));
        }
        world.commit();
    };
    publish(&mut world, 40);
    let rare = || ("x-stream-filter", text("rare"));
    let first = || ("x-stream-offset", text("first"));
    let (_, client) = world.read("", 100, [first(), rare()]);
    let (_, unfiltered) = world.read("", 0, [first(), rare(), ("x-stream-match-unfiltered", AMQPValue::Boolean(true))]);
    let expected: Vec<u64> = (0..45).map(|round| round * 1000 + 999).collect();
    assert_eq!(client.wait_for(40), expected[..40]);
    publish(&mut world, 5);
    assert_eq!(client.wait_for(45), expected);
    assert_eq!(unfiltered.wait_for(20 * 999 + 3 * 999 + 45).len(), 23 * 999 + 45);
}

#[test]
fn times_are_found_wherever_they_are() {
    let mut world = World::new(StreamRules { segment_bytes: Some(300_000), ..StreamRules::default() });
    let (mut marks, mut published) = (Vec::new(), 0);
    for round in 0..30 {
        if round % 10 == 0 {
            // Seconds are what a timestamp can say.
            std::thread::sleep(Duration::from_millis(1_100));
            marks.push((clock::now_unix_ms() / 1_000, published));
        }
        world.publish(700, 100);
        published += 700;
    }
    assert!(world.stream.state.lock().segments.len() > 3);
    for (seconds, expected) in marks {
        let (_, client) = world.read("", 1, offset(AMQPValue::Timestamp(seconds)));
        assert_eq!(client.wait_for(1), [expected]);
    }
}

#[test]
fn a_deleted_stream_lets_its_readers_go() {
    let mut world = World::new(StreamRules::default());
    world.publish(10, 10);
    let (id, client) = world.read("", 2, from_first());
    client.wait_for(2);
    let deleted = world.stream.delete(|_| Ok(())).expect("no objection").expect("a stream");
    assert_eq!((deleted.consumers.len(), deleted.ready, deleted.in_store), (1, 10, vec![world.stream.id]));
    assert!(world.stream.delete(|_| Ok(())).expect("no objection").is_none());
    world.settle(id, &[0, 1]);
    world.publish_raw(1, 10, &[0, 0]);
    assert_eq!((world.round, world.stream.counts()), (0, Counts::default()));
    world.flush();
    assert_eq!(client.count(), 2);
}
