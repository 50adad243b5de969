//! Messages that wait in one queue, more than memory holds; and the start of a broker that has them.

use std::time::{Duration, Instant};

use super::{
    broker::Broker,
    client::Client,
    figures::{alone, demand, is_full, scaled},
    support::{FLOOD, connect, disk_bytes, mb, peak_resident, publish, settle_to},
};

const QUEUE: &str = "backlog";
const BODY_BYTES: usize = 16;

/// The least `memory.budget` that is allowed.
const LEAST: &[&str] = &["--memory-budget", "12MiB"];

fn backlog() -> u64 {
    let asked = std::env::var("BACKLOG").ok().and_then(|count| count.parse().ok());
    asked.unwrap_or(scaled(10_000_000, 200_000))
}

#[test]
fn a_backlog_takes_disk_and_no_memory() {
    let _alone = alone();
    let count = backlog();
    let (limit, least_limit) = if count > 10_000_000 { (100e6, 60e6) } else { (80e6, 48e6) };
    println!("backlog: {count} messages of {BODY_BYTES} random bytes wait in one queue");
    for (name, arguments, persistent, limit) in [
        ("persistent", &[][..], true, limit),
        ("transient", &[], false, limit),
        ("persistent, smallest budget", LEAST, true, least_limit),
        ("transient, smallest budget", LEAST, false, least_limit),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        let broker = Broker::start(&data, arguments).expect("starts");
        let idle = broker.resident_kib() * 1024;
        connect(&broker).declare_queue(QUEUE, true, false).expect("declares");
        let began = Instant::now();
        let peak = peak_resident(&broker, || publish(&broker, QUEUE, persistent, BODY_BYTES, 0, count, FLOOD));
        let rate = count as f64 / began.elapsed().as_secs_f64();
        let (disk, _) = settle_to(48 * count, Duration::from_secs(30), || disk_bytes(&data));
        let after = broker.resident_kib() * 1024;
        println!(
            "  {name}: {rate:.0}/s accepted; resident {:.1} MB idle, {:.1} MB at most, {:.1} MB after; {:.1} bytes of disk each",
            mb(idle),
            mb(peak),
            mb(after),
            disk as f64 / count as f64
        );
        demand(&format!("{:.1} MB at most, of {:.0} MB", mb(peak), mb(limit as u64)), (peak as f64) < limit);
        demand(
            &format!("{:.1} bytes of disk each, of 48", disk as f64 / count as f64),
            disk < 48 * count || !is_full(),
        );
        if persistent {
            restart(broker, &data, arguments, count);
        }
    }
}

/// Kills the broker, and measures how long it takes until a message can be had again.
fn restart(broker: Broker, data: &std::path::Path, arguments: &[&str], count: u64) {
    broker.kill();
    let began = Instant::now();
    let broker = Broker::start(data, arguments).expect("starts");
    let mut client: Client = connect(&broker);
    let first = client.get(QUEUE).expect("answers").expect("a message");
    let took = began.elapsed();
    assert_eq!(u64::from_le_bytes(first.body[..8].try_into().unwrap()), 0, "the first message comes first");
    drop(client);
    demand(&format!("started again and had a message in {took:?}, of 300 ms"), took < Duration::from_millis(300));
    let waiting = connect(&broker).declare_queue(QUEUE, true, true).expect("there");
    assert!(u64::from(waiting) + 1 >= count, "{waiting} messages of {count} are there");
}
