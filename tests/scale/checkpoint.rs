//! What publishers notice of a checkpoint of a large store.
//!
//! `CHECKPOINT_DIR` puts the copies elsewhere, on another volume perhaps; `CHECKPOINT_MESSAGES` sets the backlog.

use std::{
    path::Path,
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use amq_protocol::protocol::BasicProperties;

use super::{
    broker::Broker,
    client::Client,
    figures::{Place, alone, demand, scaled},
    wire::{Event, Template, Wire, number},
};

const BACKLOG: &str = "backlog";
const BODY_BYTES: usize = 1024;
/// No publish may wait longer.
const MAX_LATENCY: Duration = Duration::from_millis(100);

/// Publishers with one message each that is not confirmed yet, and others that publish as fast as they may.
const PATIENT: usize = 3;
const EAGER_WINDOW: u64 = 500;
/// Of the eager one.
const EAGER_PER_SECOND: f64 = 20_000.0;

/// How long a publish took to be confirmed, and when that was.
type Latencies = Mutex<Vec<(Instant, Duration)>>;

fn template(queue: &str) -> Template {
    Template::new(queue, &BasicProperties::default().with_delivery_mode(2), BODY_BYTES)
}

/// Fills the body with its number, and then with what does not compress.
fn set_body(template: &mut Template, number: u64) {
    template.set_body(0, number);
    let mut state = number.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    for at in (8..=BODY_BYTES - 8).step_by(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        template.set_body(at, state);
    }
}

fn wire(place: &Place) -> Wire {
    let mut client = place.client();
    client.confirm_select().expect("confirms");
    Wire::new(client)
}

fn fill(place: &Place, messages: u64) {
    place.client().declare_queue(BACKLOG, true, false).expect("a queue");
    let mut template = template(BACKLOG);
    wire(place).publish(messages, 5_000, |at, out| {
        set_body(&mut template, at);
        template.append_to(out);
    });
}

/// Publishes one message after the other, each when the one before is confirmed. Answers how many.
fn publish_patiently(place: &Place, queue: &str, latencies: &Latencies, stop: &AtomicBool) -> u64 {
    place.client().declare_queue(queue, true, false).expect("a queue");
    let (mut wire, mut template, mut at) = (wire(place), template(queue), 0);
    while !stop.load(Ordering::SeqCst) {
        set_body(&mut template, at);
        let began = Instant::now();
        wire.publish(1, 1, |_, out| template.append_to(out));
        latencies.lock().unwrap().push((Instant::now(), began.elapsed()));
        at += 1;
    }
    at
}

/// Publishes at a rate, with a window.
fn publish_eagerly(place: &Place, queue: &str, stop: &AtomicBool) {
    place.client().declare_queue(queue, true, false).expect("a queue");
    let (mut wire, mut template, began, mut sent) = (wire(place), template(queue), Instant::now(), 0_u64);
    while !stop.load(Ordering::SeqCst) {
        let due = (began.elapsed().as_secs_f64() * EAGER_PER_SECOND) as u64;
        if due <= sent {
            std::thread::sleep(Duration::from_millis(2));
            continue;
        }
        let count = (due - sent).min(EAGER_WINDOW);
        wire.publish(count, count, |at, out| {
            set_body(&mut template, sent + at);
            template.append_to(out);
        });
        sent += count;
    }
}

fn checkpoint(place: &Place, to: &Path) -> serde_json::Value {
    let program = std::env::var_os("LEVERET_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_leveret").into());
    let data_dir = place.directory.path().join("data");
    let mut command = Command::new(program);
    let output = command.args(["ctl", "--json", "--data-dir"]).arg(data_dir).arg("checkpoint").arg(to).output();
    let output = output.expect("leveret ctl runs");
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// The 99.9th percentile and the greatest of what fell into a time, and how many there were.
fn of_time(latencies: &Latencies, from: Instant, until: Instant) -> (Duration, Duration, usize) {
    let all = latencies.lock().unwrap();
    // Those that were waited for at some time between the two.
    let within = all.iter().filter(|(ended, took)| *ended >= from && *ended - *took <= until);
    let mut took: Vec<Duration> = within.map(|(_, took)| *took).collect();
    took.sort_unstable();
    let at = |part: f64| took.get((took.len() as f64 * part) as usize).or(took.last()).copied().unwrap_or_default();
    (at(0.999), at(1.0), took.len())
}

#[test]
fn a_checkpoint_of_a_large_store_under_load_delays_no_publish_much() {
    let _alone = alone();
    let place = Place::new();
    let given = std::env::var("CHECKPOINT_MESSAGES").ok().and_then(|messages| messages.parse().ok());
    let backlog = given.unwrap_or(scaled(10_000_000, 50_000));
    let elsewhere = std::env::var_os("CHECKPOINT_DIR");
    let copies = elsewhere.map_or_else(tempfile::tempdir, tempfile::tempdir_in).expect("a temporary directory");
    let mut last = copies.path().to_owned();
    let began = Instant::now();
    fill(&place, backlog);
    println!("{backlog} messages of {BODY_BYTES} bytes published in {:.1?}", began.elapsed());
    let (latencies, stop) = (Latencies::default(), AtomicBool::new(false));
    let counts = Mutex::new(Vec::new());
    let mut worst = Duration::ZERO;
    std::thread::scope(|scope| {
        for at in 0..PATIENT {
            let (place, latencies, stop, counts) = (&place, &latencies, &stop, &counts);
            scope.spawn(move || {
                let count = publish_patiently(place, &format!("patient-{at}"), latencies, stop);
                counts.lock().unwrap().push((at, count));
            });
        }
        scope.spawn(|| publish_eagerly(&place, "eager", &stop));
        std::thread::sleep(scaled(Duration::from_secs(5), Duration::from_millis(300)));
        let quiet = Instant::now();
        std::thread::sleep(scaled(Duration::from_secs(20), Duration::from_millis(700)));
        let (p999, most, publishes) = of_time(&latencies, quiet, Instant::now());
        println!("without a checkpoint: {publishes} publishes, 99.9 % within {p999:.1?}, the slowest {most:.1?}");
        for at in 0..scaled(6, 2) {
            let began = Instant::now();
            last = copies.path().join(format!("copy-{at}"));
            let made = checkpoint(&place, &last);
            let took = began.elapsed();
            // Copies of 10 GB do not fit many times. Links do, and to delete thousands of them is work for the same disk.
            if at > 0 && made["linked"] == false {
                std::fs::remove_dir_all(copies.path().join(format!("copy-{}", at - 1))).expect("removed");
            }
            std::thread::sleep(scaled(Duration::from_secs(2), Duration::from_millis(300)));
            let (p999, most, publishes) = of_time(&latencies, began, began + took);
            let (_, after, _) = of_time(&latencies, began + took, Instant::now());
            worst = worst.max(most).max(after);
            println!(
                "checkpoint {at}: {:.2} GB in {} files (links: {}) in {} ms ({took:.1?} with leveret ctl); {publishes} publishes, \
                 99.9 % within {p999:.1?}, the slowest {most:.1?}, and {after:.1?} in the 2 s after",
                made["bytes"].as_f64().unwrap_or(0.0) / 1e9,
                made["files"],
                made["linked"],
                made["took_ms"],
            );
        }
        stop.store(true, Ordering::SeqCst);
    });
    demand(&format!("no publish waits longer than {MAX_LATENCY:?} ({worst:.1?})"), worst <= MAX_LATENCY);
    examine(&last, backlog, &counts.into_inner().unwrap());
}

/// A copy has the backlog as a whole, and of what was published meanwhile a first part.
fn examine(directory: &Path, backlog: u64, counts: &[(usize, u64)]) {
    let mut copy = Broker::start(directory, &[]).expect("a broker starts on the copy");
    let mut client = Client::connect(copy.address).expect("connects");
    let stored = |client: &mut Client, queue: &str| client.declare_queue(queue, true, true).expect("there");
    assert_eq!(u64::from(stored(&mut client, BACKLOG)), backlog);
    for (at, count) in counts {
        let queue = format!("patient-{at}");
        let there = u64::from(stored(&mut client, &queue));
        assert!(0 < there && there <= *count, "{queue}: {there} of {count}");
        let mut reader = Client::connect(copy.address).expect("connects");
        reader.consume(&queue, true, 0).expect("a consumer");
        let mut wire = Wire::new(reader);
        let mut expected = 0;
        while expected < there {
            assert!(wire.fill(super::client::PATIENCE).expect("delivers"), "{queue} ends at {expected} of {there}");
            while let Some(event) = wire.next() {
                if let Event::Delivery { body, .. } = event {
                    assert_eq!(number(wire.bytes(body), 0), expected, "{queue}");
                    expected += 1;
                }
            }
        }
    }
    println!("the broker on the copy started in {:.1?}", copy.started_in);
    copy.kill_and_wait();
}
