//! A consumer that dies with a million messages.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use super::{
    broker::Broker,
    client::{PATIENCE, cut},
    figures::{Place, alone, demand, percentiles, scaled},
    support::{FLOOD, connect, mb, peak_resident, publish},
    wire::{Event, Wire, number},
};

const QUEUE: &str = "work";

/// Publishes to a queue of its own and consumes from it, one message at a time; answers how long each took, in ms.
fn ping(broker: &Broker, stop: &AtomicBool) -> Vec<f64> {
    let mut client = connect(broker);
    client.declare_queue("ping", false, false).expect("declares");
    client.consume("ping", true, 0).expect("consumes");
    let mut wire = Wire::new(client);
    let template = super::wire::Template::new("ping", &Default::default(), 16);
    let mut took = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let began = Instant::now();
        template.append_to(&mut wire.out);
        wire.flush().expect("goes out");
        loop {
            match wire.next() {
                Some(Event::Delivery { .. }) => break,
                Some(_) => {}
                None => assert!(wire.fill(PATIENCE).expect("a message"), "a message comes"),
            }
        }
        took.push(began.elapsed().as_secs_f64() * 1e3);
        std::thread::sleep(Duration::from_micros(500));
    }
    took
}

/// Holds everything that is in the queue.
fn hold(broker: &Broker, count: u64) -> std::net::TcpStream {
    let mut client = connect(broker);
    let socket = client.socket().expect("has one");
    client.consume(QUEUE, false, 0).expect("consumes");
    let mut wire = Wire::new(client);
    let mut taken = 0;
    while taken < count {
        match wire.next() {
            Some(event) => taken += u64::from(matches!(event, Event::Delivery { .. })),
            None => assert!(wire.fill(PATIENCE).expect("messages come"), "{taken} messages came of {count}"),
        }
    }
    socket
}

#[test]
fn a_million_unacknowledged_messages_come_back_at_once() {
    let _alone = alone();
    let count = scaled(1_000_000, 50_000);
    for persistent in [true, false] {
        let place = Place::new();
        let broker = &place.broker;
        connect(broker).declare_queue(QUEUE, true, false).expect("declares");
        publish(broker, QUEUE, persistent, 16, 0, count, FLOOD);
        let socket = hold(broker, count);
        std::thread::sleep(Duration::from_secs(1));
        let before = broker.resident_kib() * 1024;
        let (stop, mut back) = (AtomicBool::new(false), Duration::ZERO);
        let mut latencies = Vec::new();
        let peak = peak_resident(broker, || {
            std::thread::scope(|scope| {
                let pings = scope.spawn(|| ping(broker, &stop));
                let mut client = connect(broker);
                std::thread::sleep(Duration::from_millis(200));
                let began = Instant::now();
                cut(&socket);
                while u64::from(client.declare_queue(QUEUE, true, true).expect("answers")) < count {
                    assert!(began.elapsed() < PATIENCE, "messages come back");
                    std::thread::sleep(Duration::from_millis(1));
                }
                back = began.elapsed();
                std::thread::sleep(Duration::from_millis(300));
                stop.store(true, Ordering::Relaxed);
                latencies = pings.join().expect("pings go through");
            });
        });
        let (p50, p99, most) = percentiles(&mut latencies);
        let what = if persistent { "persistent" } else { "transient" };
        println!("requeue: {count} unacknowledged {what} messages of a connection that ends");
        println!(
            "  resident {:.1} MB before, {:.1} MB at most; another queue's latency p50 {p50:.2} ms, p99 {p99:.2} ms, max {most:.2} ms",
            mb(before),
            mb(peak)
        );
        demand(&format!("back in {back:?}, of 2 s"), back < Duration::from_secs(2));
        demand("resident growth under 100 MB", peak < before + 100_000_000);
        demand("another queue's p99 under 50 ms", p99 < 50.0);
        in_order(broker, count);
    }
}

fn in_order(broker: &Broker, count: u64) {
    let mut client = connect(broker);
    client.consume(QUEUE, true, 0).expect("consumes");
    let mut wire = Wire::new(client);
    let mut next = 0;
    while next < count {
        let Some(event) = wire.next() else {
            assert!(wire.fill(PATIENCE).expect("messages come"), "{next} messages came of {count}");
            continue;
        };
        let Event::Delivery { redelivered, body, .. } = event else { panic!("a consumer was told {event:?}") };
        assert!(redelivered);
        assert_eq!(number(wire.bytes(body), 0), next, "in order");
        next += 1;
    }
}
