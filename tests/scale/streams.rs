//! A long stream, read from many places at once.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use amq_protocol::{
    protocol::{AMQPClass, BasicProperties, basic},
    types::{AMQPValue, FieldTable},
};

use super::{
    client::{Incoming, PATIENCE, Rng},
    figures::{Cost, Place, alone, demand, is_full, percentiles, scaled, watch_resident},
    wire::{Event, Template, Wire, number},
};

const STREAM: &str = "stream";
const BODY_BYTES: usize = 100;
const PREFETCH: u16 = 1_000;

fn now_unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

fn from(offset: AMQPValue) -> FieldTable {
    let mut arguments = FieldTable::default();
    arguments.insert("x-stream-offset".into(), offset);
    arguments
}

fn publish(place: &Place, count: u64) {
    let mut client = place.client();
    client.confirm_select().expect("confirms");
    let mut template = Template::new(STREAM, &BasicProperties::default().with_delivery_mode(2), BODY_BYTES);
    let mut now = now_unix_ms();
    Wire::new(client).publish(count, 50_000, |at, out| {
        if at % 256 == 0 {
            now = now_unix_ms();
        }
        template.set_body(0, at);
        template.set_body(8, now);
        template.append_to(out);
    });
}

/// Reads `count` messages from an offset on.
fn read(place: &Place, offset: u64, count: u64) {
    let mut client = place.client();
    client.consume_with(STREAM, false, PREFETCH, from(AMQPValue::LongLongInt(offset as i64))).expect("consumes");
    let mut wire = Wire::new(client);
    let mut next = offset;
    while next < offset + count {
        assert!(wire.fill(PATIENCE).expect("messages come"), "the reader from {offset} stands at {next}");
        let mut last_tag = 0;
        while let Some(event) = wire.next() {
            let Event::Delivery { tag, body, .. } = event else { panic!("a reader was told {event:?}") };
            let body = wire.bytes(body);
            assert_eq!((body.len(), number(body, 0)), (BODY_BYTES, next), "the reader from {offset}");
            (next, last_tag) = (next + 1, tag);
        }
        if last_tag > 0 {
            wire.ack_up_to(last_tag);
            wire.flush().expect("acks go out");
        }
    }
}

/// From `basic.consume` to the first delivery: how long, in ms, and what it was (number, time of its publish).
fn seek(place: &Place, offset: AMQPValue) -> (f64, u64, u64) {
    let mut client = place.client();
    client.qos(10).expect("answers");
    let consume = basic::Consume { queue: STREAM.into(), arguments: from(offset), ..basic::Consume::default() };
    let began = Instant::now();
    client.send(1, AMQPClass::Basic(basic::AMQPMethod::Consume(consume))).expect("goes out");
    loop {
        match client.receive(PATIENCE).expect("an answer") {
            Some(Incoming::Delivery(delivery)) => {
                let ms = began.elapsed().as_secs_f64() * 1e3;
                return (ms, number(&delivery.body, 0), number(&delivery.body, 8));
            }
            Some(_) => {}
            None => panic!("nothing comes"),
        }
    }
}

fn seeks(place: &Place, count: u64, from_ms: u64, until_ms: u64) {
    let mut rng = Rng(count);
    let mut took = Vec::new();
    for _ in 0..scaled(300, 30) {
        let offset = rng.range(0..count);
        let (ms, number, _) = seek(place, AMQPValue::LongLongInt(offset as i64));
        assert_eq!(number, offset);
        took.push(ms);
    }
    report("offset", &mut took);
    let mut took = Vec::new();
    for _ in 0..scaled(300, 30) {
        let seconds = rng.range(from_ms / 1000..until_ms / 1000 + 1);
        let (ms, _, published_ms) = seek(place, AMQPValue::Timestamp(seconds));
        // A chunk has the time at which it was stored, a little after that of its messages' publishes.
        let wanted = seconds * 1000;
        assert!(
            published_ms + 5_000 >= wanted && published_ms <= wanted.max(from_ms) + 5_000,
            "seeking {wanted} came to a message of {published_ms}"
        );
        took.push(ms);
    }
    report("timestamp", &mut took);
}

fn report(what: &str, took_ms: &mut [f64]) {
    let (half, most, all) = percentiles(took_ms);
    println!(
        "  first delivery after {} seeks by {what}: p50 {half:.2} ms, p99 {most:.2} ms, max {all:.2} ms",
        took_ms.len()
    );
    demand(&format!("p99 of seeks by {what} below 10 ms"), most < 10.0);
}

#[test]
fn a_long_stream_is_read_from_many_places() {
    let _alone = alone();
    let (count, readers, stretch) = scaled((5_000_000, 100, 50_000), (50_000, 10, 3_000));
    let place = Place::new();
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString("stream".into()));
    place.client().declare_queue_with(STREAM, arguments).expect("declares");
    let before = place.resident_mib();
    let (pid, from_ms) = (place.broker.pid(), now_unix_ms());
    let mut most = 0.0;
    let published = Cost::of(pid, count, || {
        std::thread::scope(|scope| {
            let publisher = scope.spawn(|| publish(&place, count));
            most = watch_resident(&place, || !publisher.is_finished());
        });
    });
    let until_ms = now_unix_ms();
    println!("streams: {count} messages of {BODY_BYTES} bytes published at {}", published.text());
    println!("  resident {before:.0} MiB before, {most:.0} MiB at most while publishing");
    let done = AtomicU64::new(0);
    let read_all = Cost::of(pid, readers * stretch, || {
        std::thread::scope(|scope| {
            for reader in 0..readers {
                let (place, done) = (&place, &done);
                scope.spawn(move || {
                    read(place, reader * (count - stretch) / (readers - 1), stretch);
                    done.fetch_add(1, Ordering::Relaxed);
                });
            }
            let began = Instant::now();
            most = watch_resident(&place, || {
                assert!(began.elapsed() < Duration::from_secs(300), "nothing moves");
                done.load(Ordering::Relaxed) < readers
            })
            .max(most);
        });
    });
    println!("  {readers} readers of {stretch} messages each from different offsets: {} in all", read_all.text());
    demand(&format!("{most:.0} MiB resident at most, of 200 MiB"), most < 200.0 || !is_full());
    seeks(&place, count, from_ms, until_ms);
}
