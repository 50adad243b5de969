//! Disk space that comes back, and bytes written for each byte accepted.

use std::time::{Duration, Instant};

use super::{
    broker::Broker,
    client::PATIENCE,
    figures::{Place, alone, demand, is_full, percentiles, scaled},
    support::{connect, consume, disk_bytes, mb, publish, settle_to, written_bytes},
};

const QUEUE: &str = "pushed";

/// Publishes and consumes at the same time.
fn push_through(broker: &Broker, queue: &str, bytes: usize, first: u64, count: u64, window: u64) {
    std::thread::scope(|scope| {
        scope.spawn(|| publish(broker, queue, true, bytes, first, count, window));
        scope.spawn(|| consume(broker, queue, 1_000, first, count));
    });
}

#[test]
fn one_unacknowledged_message_does_not_hold_the_disk_space_of_the_rest() {
    let _alone = alone();
    let count = scaled(10_000_000, 20_000);
    let place = Place::new();
    let (broker, data) = (&place.broker, place.directory.path().join("data"));
    let mut holder = connect(broker);
    holder.declare_queue(QUEUE, true, false).expect("declares");
    publish(broker, QUEUE, true, 1024, 0, 1, 1);
    let held = holder.get(QUEUE).expect("answers").expect("a message");
    let began = Instant::now();
    push_through(broker, QUEUE, 1024, 1, count, 10_000);
    let took = began.elapsed();
    println!("disk: {count} messages of 1 KiB pushed through behind an unacknowledged one, in {took:.1?}");
    let limit = if is_full() { 1_000_000_000 } else { 250_000_000 };
    let (disk, after) = settle_to(limit, Duration::from_secs(120), || disk_bytes(&data));
    demand(&format!("{:.0} MB of disk {after:.0?} after, of 1 GB", mb(disk)), disk < limit);
    let some = scaled(2_000, 200);
    publish(broker, QUEUE, true, 1024, count + 1, some, 100);
    let mut client = connect(broker);
    let mut latencies = Vec::new();
    for number in 0..some {
        let began = Instant::now();
        let delivery = client.get(QUEUE).expect("answers").expect("a message");
        latencies.push(began.elapsed().as_secs_f64() * 1e3);
        assert_eq!(delivery.body[..8], (count + 1 + number).to_le_bytes());
        client.queue_ack(delivery.tag, false);
    }
    let (p50, p99, most) = percentiles(&mut latencies);
    demand(&format!("the head is read in p50 {p50:.3} ms, p99 {p99:.3} ms, max {most:.3} ms, of 2 ms"), p99 < 2.0);
    holder.queue_nack(held.tag, true);
    holder.flush().expect("goes out");
    let back = Instant::now();
    let again = loop {
        if let Some(delivery) = client.get(QUEUE).expect("answers") {
            break delivery;
        }
        assert!(back.elapsed() < PATIENCE, "the held message comes back");
    };
    assert_eq!(again.body[..8], 0u64.to_le_bytes(), "the held message comes back whole");
}

/// What `work` has written for each of `accepted` bytes. What is on its way (flushes, compactions, sweeping) counts.
fn amplification(broker: &Broker, accepted: u64, work: impl FnOnce()) -> f64 {
    let before = written_bytes(broker.pid());
    work();
    std::thread::sleep(Duration::from_secs(scaled(30, 1)));
    (written_bytes(broker.pid()) - before) as f64 / accepted as f64
}

#[test]
fn bytes_are_written_little_more_than_once() {
    let _alone = alone();
    println!("bytes written for each byte accepted (body, properties, routing key)");
    for bytes in [1024usize, 16] {
        let per_message = (bytes + 3 + QUEUE.len()) as u64;
        let limit = |most: f64| if bytes == 1024 { most } else { f64::INFINITY };
        let count = scaled(if bytes == 1024 { 1_000_000 } else { 5_000_000 }, 10_000);
        let place = Place::new();
        connect(&place.broker).declare_queue(QUEUE, true, false).expect("declares");
        let prompt = amplification(&place.broker, count * per_message, || {
            push_through(&place.broker, QUEUE, bytes, 0, count, 100);
        });
        demand(&format!("{bytes} bytes, window 100, consumed at once: {prompt:.2}, of 2.5"), prompt < limit(2.5));
        let drained = amplification(&place.broker, count * per_message, || {
            publish(&place.broker, QUEUE, true, bytes, 0, count, 1_000);
            consume(&place.broker, QUEUE, 1_000, 0, count);
        });
        demand(&format!("{bytes} bytes, backlog written and drained: {drained:.2}, of 4"), drained < limit(4.0));
        drop(place);
        let queues = 100;
        let each = count / queues;
        let place = Place::new();
        let names: Vec<String> = (0..queues).map(|index| format!("{QUEUE}{index}")).collect();
        for name in &names {
            connect(&place.broker).declare_queue(name, true, false).expect("declares");
        }
        let many = amplification(&place.broker, queues * each * per_message, || {
            std::thread::scope(|scope| {
                for name in &names {
                    scope.spawn(|| publish(&place.broker, name, true, bytes, 0, each, 100));
                    scope.spawn(|| consume(&place.broker, name, 100, 0, each));
                }
            });
        });
        demand(&format!("{bytes} bytes, {queues} queues at once: {many:.2}, of 4"), many < limit(4.0));
    }
}
