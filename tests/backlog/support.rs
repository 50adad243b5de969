//! What the measurements have in common: filling and draining queues, and asking the system.

use std::{
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::{Duration, Instant},
};

use amq_protocol::protocol::BasicProperties;

use super::{
    broker::Broker,
    client::{Client, PATIENCE, Rng},
    wire::{Event, Template, Wire, number},
};

/// The flood of a publisher that waits for no confirm in particular.
pub const FLOOD: u64 = 1_000_000;

/// Random bytes that bodies are taken from.
const POOL_BYTES: usize = 4 << 20;

pub fn connect(broker: &Broker) -> Client {
    Client::connect(broker.address).expect("connects")
}

/// Publishes `count` messages with their numbers from `first` on and otherwise random bodies, and waits for all confirms.
pub fn publish(broker: &Broker, queue: &str, persistent: bool, bytes: usize, first: u64, count: u64, window: u64) {
    let mut client = connect(broker);
    client.confirm_select().expect("confirms");
    let mode = if persistent { 2 } else { 1 };
    let mut template = Template::new(queue, &BasicProperties::default().with_delivery_mode(mode), bytes);
    // RocksDB compresses where that pays, over some ten KiB at a time: pieces of a large random pool do not get smaller.
    let mut rng = Rng(first + 1);
    let pool: Vec<u8> = (0..POOL_BYTES / 8).flat_map(|_| rng.next().to_le_bytes()).collect();
    let random = bytes.saturating_sub(8);
    Wire::new(client).publish(count, window, |number, out| {
        template.set_body(0, first + number);
        let from = rng.range(0..(POOL_BYTES - random) as u64) as usize;
        template.set_body_bytes(8, &pool[from..from + random]);
        template.append_to(out);
    });
}

/// Takes `count` messages in order from the number `first` on, with an ack for each batch that comes.
pub fn consume(broker: &Broker, queue: &str, prefetch: u16, first: u64, count: u64) {
    let mut client = connect(broker);
    client.consume(queue, false, prefetch).expect("consumes");
    let mut wire = Wire::new(client);
    let mut next = first;
    while next < first + count {
        let mut last_tag = 0;
        while let Some(event) = wire.next() {
            let Event::Delivery { tag, body, .. } = event else { panic!("a consumer was told {event:?}") };
            assert_eq!(number(wire.bytes(body), 0), next, "in order");
            (next, last_tag) = (next + 1, tag);
        }
        if last_tag > 0 {
            wire.ack_up_to(last_tag);
            wire.flush().expect("acks go out");
        } else {
            assert!(wire.fill(PATIENCE).expect("messages come"), "{} messages came of {count}", next - first);
        }
    }
    settle(&mut wire);
}

/// Waits until the broker has handled all that was sent.
pub fn settle(wire: &mut Wire) {
    wire.queue_qos();
    wire.flush().expect("goes out");
    loop {
        match wire.next() {
            Some(Event::Method(60, 11)) => return,
            Some(_) => {}
            None => assert!(wire.fill(PATIENCE).expect("an answer"), "an answer comes"),
        }
    }
}

/// Bytes of files in a directory, as the disk has them.
pub fn disk_bytes(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(entries) = std::fs::read_dir(directory) else { return 0 };
    let sizes = entries.filter_map(Result::ok).map(|entry| match entry.metadata() {
        Ok(data) if data.is_dir() => disk_bytes(&entry.path()),
        Ok(data) => data.blocks() * 512,
        Err(_) => 0, // deleted meanwhile
    });
    sizes.sum()
}

/// Bytes the kernel has written to disk for a process.
pub fn written_bytes(pid: u32) -> u64 {
    let io = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    let line = io.lines().find_map(|line| line.strip_prefix("write_bytes: "));
    line.and_then(|bytes| bytes.parse().ok()).unwrap_or(0)
}

/// The greatest resident memory of the broker while `work` goes on, in bytes.
pub fn peak_resident(broker: &Broker, work: impl FnOnce()) -> u64 {
    let (done, peak) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                peak.fetch_max(broker.resident_kib() * 1024, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        // Ends the watch even if the work panics.
        struct Done<'a>(&'a AtomicBool);
        impl Drop for Done<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _done = Done(&done);
        work();
    });
    peak.into_inner()
}

/// Waits until `value` is at most `limit`, and answers the last value and how long that took.
pub fn settle_to(limit: u64, patience: Duration, mut value: impl FnMut() -> u64) -> (u64, Duration) {
    let began = Instant::now();
    loop {
        let now = value();
        if now <= limit || began.elapsed() >= patience {
            return (now, began.elapsed());
        }
        std::thread::sleep(Duration::from_millis(250));
    }
}

pub fn mb(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}
