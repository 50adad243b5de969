//! Very many messages that wait, over a `kill -9`.

use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use amq_protocol::{
    protocol::BasicProperties,
    types::{AMQPValue, FieldTable},
};

use super::{
    broker::Broker,
    client::{Client, Rng},
    figures::{Cost, Place, alone, demand, percentiles, scaled},
    wire::{Event, Template, Wire, number},
};

const QUEUE: &str = "later";
/// In the template, and nowhere else there.
const DUE_MARK: i64 = 0x5A5A_5A5A_5A5A_5A5A;

fn now_unix_ms() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64() * 1e3)
}

fn publish(place: &Place, count: u64, within_ms: u64) {
    let mut client = place.client();
    client.confirm_select().expect("confirms");
    let mut headers = FieldTable::default();
    // Not `x-delay`, which counts from when the broker sees the message: that is later than when it is put into a block.
    headers.insert("x-deliver-at".into(), AMQPValue::LongLongInt(DUE_MARK));
    let properties = BasicProperties::default().with_delivery_mode(2).with_headers(headers);
    let mut template = Template::new(QUEUE, &properties, 16);
    let due_at = template.position_of(&DUE_MARK.to_be_bytes());
    let mut rng = Rng(count);
    let due_from = now_unix_ms() as u64;
    Wire::new(client).publish(count, 10_000, |at, out| {
        let now = now_unix_ms() as u64;
        let due = (due_from + rng.range(0..within_ms)).max(now);
        template.set(due_at, &due.to_be_bytes());
        template.set_body(0, at);
        template.set_body(8, due);
        template.append_to(out);
    });
}

/// What the consumer shares with the one who kills.
struct Watch {
    address: Mutex<SocketAddr>,
    missing: AtomicU64,
    stop: AtomicBool,
}

#[derive(Default)]
struct Seen {
    came: Vec<bool>,
    /// In milliseconds. What was due while nobody could be told is late from then on.
    lateness_ms: Vec<f64>,
    again: u64,
    /// By how many milliseconds the earliest came too early.
    early_ms: f64,
}

/// Takes what is due, on as many connections as it takes, until all has come.
fn consume(watch: &Watch, count: u64) -> Seen {
    let mut seen = Seen { came: vec![false; count as usize], ..Seen::default() };
    while watch.missing.load(Ordering::Relaxed) > 0 && !watch.stop.load(Ordering::Relaxed) {
        let address = *watch.address.lock().unwrap();
        let Ok(mut client) = Client::connect(address) else {
            std::thread::sleep(Duration::from_millis(2));
            continue;
        };
        if client.consume(QUEUE, false, 5_000).is_err() {
            continue;
        }
        let since_ms = now_unix_ms();
        let mut wire = Wire::new(client);
        while watch.missing.load(Ordering::Relaxed) > 0 && !watch.stop.load(Ordering::Relaxed) {
            if wire.fill(Duration::from_millis(20)).is_err() {
                break;
            }
            let (now, mut last_tag) = (now_unix_ms(), 0);
            while let Some(event) = wire.next() {
                let Event::Delivery { tag, body, .. } = event else { panic!("a consumer was told {event:?}") };
                last_tag = tag;
                let body = wire.bytes(body);
                let (id, due_ms) = (number(body, 0) as usize, number(body, 8) as f64);
                seen.early_ms = seen.early_ms.max(due_ms - now);
                if std::mem::replace(&mut seen.came[id], true) {
                    seen.again += 1;
                    continue;
                }
                seen.lateness_ms.push(now - due_ms.max(since_ms));
                watch.missing.fetch_sub(1, Ordering::Relaxed);
            }
            if last_tag > 0 {
                wire.ack_up_to(last_tag);
                if wire.flush().is_err() {
                    break;
                }
            }
        }
    }
    seen
}

#[test]
fn a_million_delayed_messages_come_in_time_over_a_kill() {
    let _alone = alone();
    let (count, within_ms) = scaled((1_000_000, 60_000), (10_000, 4_000));
    let mut place = Place::new();
    let mut arguments = FieldTable::default();
    arguments.insert("x-delayed".into(), true.into());
    place.client().declare_queue_with(QUEUE, arguments).expect("declares");
    let before = place.resident_mib();
    let watch = Watch {
        address: Mutex::new(place.broker.address),
        missing: AtomicU64::new(count),
        stop: AtomicBool::new(false),
    };
    let began = Instant::now();
    let half = Duration::from_millis(within_ms / 2);
    let mut most = before;
    let (mut seen, published, restarted_in) = std::thread::scope(|scope| {
        let consumer = scope.spawn(|| consume(&watch, count));
        let published = Cost::of(place.broker.pid(), count, || publish(&place, count, within_ms));
        while began.elapsed() < half {
            most = most.max(place.resident_mib());
            std::thread::sleep(Duration::from_millis(20));
        }
        let data: PathBuf = place.directory.path().join("data");
        let killed = Instant::now();
        place.broker.kill_and_wait();
        place.broker = Broker::start(&data, &[]).expect("starts again");
        let restarted_in = killed.elapsed();
        *watch.address.lock().unwrap() = place.broker.address;
        let deadline = Instant::now() + Duration::from_millis(within_ms) + Duration::from_secs(60);
        while watch.missing.load(Ordering::Relaxed) > 0 && Instant::now() < deadline {
            most = most.max(place.resident_mib());
            std::thread::sleep(Duration::from_millis(20));
        }
        watch.stop.store(true, Ordering::Relaxed);
        (consumer.join().expect("the consumer does not fail"), published, restarted_in)
    });
    let (p50, p99, max) = percentiles(&mut seen.lateness_ms);
    println!("delays: {count} persistent messages due within {} s, killed after {half:?}", within_ms / 1000);
    println!("  published at {}; away for {restarted_in:?}; {} came again after that", published.text(), seen.again);
    println!(
        "  late by p50 {p50:.1} ms, p99 {p99:.1} ms, max {max:.1} ms; resident {before:.0} MiB before, {most:.0} MiB at most"
    );
    assert_eq!(watch.missing.load(Ordering::Relaxed), 0, "messages are lost");
    assert!(seen.early_ms <= 0.0, "a message came {} ms early", seen.early_ms);
    demand("p99 of the lateness below 100 ms", p99 < 100.0);
    demand(&format!("{:.0} MiB more resident, of at most 100 MiB", most - before), most - before < 100.0);
}
