//! Mixed load for a long time: publishers, competing consumers that acknowledge, send back and reject, expiry, dead letters,
//! priorities, delays, a quorum queue, a stream, transactions, and queues, exchanges, connections and channels that come and
//! go. At the end everything is drained and every count is right, memory and disk are where they were after ten minutes, and
//! the log has nothing to complain of.
//!
//! `SOAK_SECONDS` sets how long (15), `SOAK_SEED` repeats the choices of a run (not its timing).

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

#[path = "crash/broker.rs"]
mod broker;
#[path = "soak/churn.rs"]
mod churn;
#[path = "crash/client.rs"]
mod client;
#[path = "crash/facts.rs"]
#[allow(dead_code, reason = "several test programs share it, and each uses a part")]
mod facts;
#[path = "soak/flows.rs"]
mod flows;
#[path = "soak/ledger.rs"]
mod ledger;
#[path = "soak/measure.rs"]
mod measure;

use std::{
    path::Path,
    sync::{Arc, atomic::Ordering},
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use amq_protocol::types::{AMQPValue, FieldTable};

use broker::Broker;
use client::{Answer, Client, Rng};
use flows::{DRAINING, Flow, Habit, OVER, Site};
use ledger::Totals;
use measure::Sample;

/// Two looks at the broker are so far apart.
const SAMPLE_EVERY: Duration = Duration::from_secs(5);
/// The end is compared with this minute, or with the last but one of a shorter run.
const COMPARED_MINUTE: u64 = 10;
/// How long everything that is still there may take to come.
const DRAIN_PATIENCE: Duration = Duration::from_secs(120);
/// Longer than any message is delayed.
const LAST_DUE: Duration = Duration::from_secs(6);
/// A few pages and buffers more or less.
const MEMORY_SLACK_KIB: u64 = 4 << 10;
/// Table and blob files come and go by the dozen of MiB.
const DISK_SLACK_KIB: u64 = 64 << 10;

/// Small limits, so that they are met soon: memory has to be given up, files are compacted all the time, and the cache of
/// blocks, which fills slowly, is full long before it is looked at.
const ARGUMENTS: [&str; 6] =
    ["--memory-budget", "12MiB", "--store-write-buffer", "4MiB", "--store-block-cache", "2MiB"];

/// The queues whose messages are counted.
const QUEUES: [&str; 13] = [
    "work.1",
    "work.2",
    "quorum",
    "urgent",
    "dead",
    "short-lived",
    "expired",
    "delayed",
    "transient",
    "got",
    "tx",
    "bulk",
    "routed",
];
const STREAM: &str = "stream";

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

fn table<const N: usize>(entries: [(&str, AMQPValue); N]) -> FieldTable {
    let mut table = FieldTable::default();
    for (key, value) in entries {
        table.insert(key.into(), value);
    }
    table
}

fn declare(client: &mut Client) -> Answer<()> {
    let dies_into = |queue| [("x-dead-letter-exchange", text("")), ("x-dead-letter-routing-key", text(queue))];
    for queue in ["dead", "expired", "got", "tx", "bulk", "routed"] {
        client.declare_queue(queue, true, false)?;
    }
    client.declare_queue("transient", false, false)?;
    for queue in ["work.1", "work.2"] {
        client.declare_queue_with(queue, table(dies_into("dead")))?;
    }
    let [exchange, key] = dies_into("dead");
    client.declare_queue_with("quorum", table([exchange, key, ("x-queue-type", text("quorum"))]))?;
    let [exchange, key] = dies_into("dead");
    client.declare_queue_with("urgent", table([exchange, key, ("x-max-priority", AMQPValue::LongInt(5))]))?;
    let [exchange, key] = dies_into("expired");
    client.declare_queue_with("short-lived", table([exchange, key, ("x-message-ttl", AMQPValue::LongInt(2_000))]))?;
    client.declare_queue_with("delayed", table([("x-delayed", true.into())]))?;
    client.declare_queue_with(
        STREAM,
        table([
            ("x-queue-type", text("stream")),
            ("x-max-length-bytes", AMQPValue::LongLongInt(16 << 20)),
            ("x-stream-max-segment-size-bytes", AMQPValue::LongLongInt(1 << 20)),
        ]),
    )?;
    client.declare_exchange("topics", "topic", false)?;
    client.bind("routed", "topics", "a.*.c")
}

/// Everything that publishes, declares, or comes and goes.
fn publishers(site: &Arc<Site>, rng: &mut Rng) -> Vec<JoinHandle<()>> {
    let mut threads = Vec::new();
    let flows = [
        Flow::to("work.1", 400),
        Flow::to("work.1", 200),
        Flow::to("work.2", 400),
        Flow::to("quorum", 200),
        Flow { add: |properties, rng| properties.with_priority(rng.range(0..7) as u8), ..Flow::to("urgent", 200) },
        Flow {
            add: |properties, rng| match rng.one_in(2) {
                true => properties.with_expiration(rng.range(0..3_000).to_string().into()),
                false => properties,
            },
            ..Flow::to("short-lived", 200)
        },
        Flow {
            add: |properties, rng| {
                let delay = AMQPValue::LongInt(rng.range(0..5_000) as i32);
                properties.with_headers(table([("x-delay", delay)]))
            },
            ..Flow::to("delayed", 100)
        },
        Flow { persistent: false, ..Flow::to("transient", 400) },
        Flow::to("got", 50),
        Flow { exchange: "topics", ..Flow::to("a.b.c", 200) },
        Flow::to(STREAM, 200),
    ];
    for flow in flows {
        let (site, rng) = (site.clone(), rng.fork());
        threads.push(std::thread::spawn(move || flow.publish(&site, rng)));
    }
    for worker in 0..2 {
        let (site, rng) = (site.clone(), rng.fork());
        threads.push(std::thread::spawn(move || churn::queues(&site, worker, rng)));
    }
    let works: [fn(&Site, Rng); 2] = [churn::connections, |site, rng| churn::bursts(site, "bulk", rng)];
    for work in works {
        let (site, rng) = (site.clone(), rng.fork());
        threads.push(std::thread::spawn(move || work(&site, rng)));
    }
    threads
}

fn consumers(site: &Arc<Site>, rng: &mut Rng) -> Vec<JoinHandle<()>> {
    let careless = Habit { prefetch: 50, sent_back: 10, rejected: 5, dead: false };
    let mut threads = Vec::new();
    for (queue, habit) in [
        ("work.1", careless),
        ("work.1", Habit { prefetch: 10, ..careless }),
        ("work.1", Habit::ACKS),
        ("work.2", careless),
        ("work.2", careless),
        ("quorum", careless),
        ("quorum", Habit { sent_back: 2, ..careless }),
        ("urgent", careless),
        ("urgent", careless),
        ("delayed", Habit::ACKS),
        ("bulk", Habit { prefetch: 300, ..Habit::ACKS }),
        ("routed", careless_without_dead_letters()),
        ("dead", Habit { dead: true, ..Habit::ACKS }),
        ("expired", Habit { dead: true, ..Habit::ACKS }),
    ] {
        let (site, rng) = (site.clone(), rng.fork());
        threads.push(std::thread::spawn(move || flows::consume(&site, queue, habit, rng)));
    }
    let works: [fn(&Site, Rng); 4] = [
        |site, _| flows::consume_without_acks(site, "transient"),
        |site, rng| flows::read_stream(site, STREAM, rng),
        |site, rng| churn::transactions(site, "tx", rng),
        |site, _| churn::gets(site, "got"),
    ];
    for work in works {
        let (site, rng) = (site.clone(), rng.fork());
        threads.push(std::thread::spawn(move || work(&site, rng)));
    }
    threads
}

/// A rejected message of a queue without a dead letter exchange would be gone.
fn careless_without_dead_letters() -> Habit {
    Habit { prefetch: 50, sent_back: 20, rejected: 0, dead: false }
}

/// Looks at the broker until `ends`, and says each minute how things are.
fn watch(site: &Site, broker: &mut Broker, data_dir: &Path, began: Instant, ends: Instant) -> Vec<Sample> {
    let mut samples: Vec<Sample> = Vec::new();
    let (mut before, mut said_at) = (Totals::default(), began);
    println!("minute  resident MiB  disk MiB  published/s  done/s  open    connections  cuts");
    while Instant::now() < ends && site.ledger.errors().is_empty() && !broker.has_ended() {
        std::thread::sleep(SAMPLE_EVERY.min(ends.saturating_duration_since(Instant::now())));
        let at_seconds = began.elapsed().as_secs();
        let last_minute = samples.last().map_or(0, |sample| sample.at_seconds / 60);
        if at_seconds / 60 > last_minute || Instant::now() >= ends {
            let now = site.ledger.totals();
            let seconds = said_at.elapsed().as_secs().max(1);
            println!(
                "{last_minute:6}  {:12}  {:8}  {:11}  {:6}  {:6}  {:11}  {}",
                measure::resident_kib(&samples, last_minute) >> 10,
                measure::least_disk_kib(&samples, last_minute) >> 10,
                (now.sent - before.sent) / seconds,
                (now.done - before.done) / seconds,
                site.ledger.outstanding(),
                site.connections.load(Ordering::Relaxed),
                site.cuts.load(Ordering::Relaxed),
            );
            (before, said_at) = (now, Instant::now());
        }
        samples.push(Sample { at_seconds, resident_kib: broker.resident_kib(), disk_kib: measure::disk_kib(data_dir) });
    }
    samples
}

/// Waits until every message has come. What was never confirmed may have been accepted all the same and be due later, so
/// nothing may come for a while.
fn drain(site: &Site) -> Answer<()> {
    let deadline = Instant::now() + DRAIN_PATIENCE;
    let mut client = Client::connect(site.address)?;
    let mut busy = Instant::now();
    while Instant::now() < deadline && busy.elapsed() < LAST_DUE {
        let mut ready = 0;
        for queue in QUEUES {
            ready += client.declare_queue(queue, queue != "transient", true)?;
        }
        if ready != 0 || site.ledger.outstanding() != 0 {
            busy = Instant::now();
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    client.close()
}

fn check_empty(site: &Site, when: &str) -> Answer<()> {
    let mut client = Client::connect(site.address)?;
    for queue in QUEUES.into_iter().filter(|&queue| when.is_empty() || queue != "transient") {
        let count = client.declare_queue(queue, queue != "transient", true)?;
        if count != 0 {
            site.ledger.complain(format!("queue {queue} has {count} messages at the end{when}"));
        }
    }
    client.close()
}

/// Whether a warning is one that the load asks for.
fn is_expected(warning: &serde_json::Value) -> bool {
    // Things that are not there are asked for, to see that they are not, and exclusive queues of connections just cut.
    let asked_for = warning["message"] == "channel error" && (warning["code"] == 404 || warning["code"] == 405);
    let cut = warning["message"] == "dropping connection" && warning["reason"] == "write failed";
    // The disk was slower than the load for a moment; this machine may have other work.
    let slow = warning["target"] == "leveret::store::rocksdb"
        && warning["message"]
            .as_str()
            .is_some_and(|text| text.contains("Stopping writes") || text.contains("Stalling writes"));
    asked_for || cut || slow
}

fn minutes_apart(samples: &[Sample], errors: &mut Vec<String>) {
    let last = samples.last().map_or(0, |sample| sample.at_seconds);
    // Of the last minute nothing may be there but its beginning.
    let end = (last / 60).saturating_sub(u64::from(last % 60 < 30));
    let compared = COMPARED_MINUTE.min(end.saturating_sub(1));
    if end == 0 {
        println!("memory and disk are not compared: the run was too short");
        return;
    }
    let [then, now] = [compared, end].map(|minute| measure::resident_kib(samples, minute));
    measure::compare("resident memory", then, now, MEMORY_SLACK_KIB, errors);
    let [then, now] = [compared, end].map(|minute| measure::least_disk_kib(samples, minute));
    measure::compare("disk", then, now, DISK_SLACK_KIB, errors);
}

#[test]
fn memory_and_disk_stay_and_every_count_is_right_under_mixed_load() {
    let duration = Duration::from_secs(number("SOAK_SECONDS").unwrap_or(15));
    let seed = number("SOAK_SEED").unwrap_or_else(|| {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_nanos() as u64 % 1_000_000_007)
    });
    let mut rng = Rng(seed);
    let directory = tempfile::tempdir().expect("a temporary directory");
    let data_dir = directory.path().join("data");
    let mut broker = Broker::start(&data_dir, &ARGUMENTS).expect("starts");
    let mut client = Client::connect(broker.address).expect("connects");
    declare(&mut client).expect("the queues are declared");
    client.close().expect("a goodbye");

    let site = Site::new(broker.address);
    let began = Instant::now();
    let consumers = consumers(&site, &mut rng);
    let publishers = publishers(&site, &mut rng);
    let samples = watch(&site, &mut broker, &data_dir, began, began + duration);
    site.phase.store(DRAINING, Ordering::Relaxed);
    publishers.into_iter().for_each(|thread| thread.join().expect("no client panics"));
    site.run("the drain", || drain(&site));
    site.phase.store(OVER, Ordering::Relaxed);
    consumers.into_iter().for_each(|thread| thread.join().expect("no client panics"));
    site.run("the last look", || check_empty(&site, ""));
    site.ledger.settle();

    let mut errors = site.ledger.errors();
    minutes_apart(&samples, &mut errors);
    let warnings = broker.take_warnings();
    errors.extend(warnings.iter().filter(|warning| !is_expected(warning)).map(|warning| format!("logged: {warning}")));
    let (status, took, complaints) = broker.terminate();
    if !status.is_some_and(|status| status.success()) {
        errors.push(format!("SIGTERM: {status:?} after {took:?}"));
    }
    errors.extend(complaints.into_iter().map(|line| format!("logged: {line}")));
    println!("{:?} in {:?}; SOAK_SEED={seed}", site.ledger.totals(), began.elapsed());
    assert!(errors.is_empty(), "SOAK_SEED={seed}: {errors:#?}");

    // And nothing comes back.
    let broker = Broker::start(&data_dir, &ARGUMENTS).expect("starts again");
    let site = Site::new(broker.address);
    site.run("a look after the restart", || check_empty(&site, " after a restart"));
    assert_eq!(site.ledger.errors(), Vec::<String>::new());
    assert_eq!(broker.kill(), Vec::<String>::new());
}
