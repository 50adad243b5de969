//! Measurements, run by hand: `cargo test --release --lib stream::tests::measure -- --ignored --nocapture`.

use super::*;

/// A connection that counts and throws away.
#[derive(Default)]
struct Counter {
    count: std::sync::atomic::AtomicU64,
}

impl TestPort for Counter {
    fn deliver(&self, _: &Delivery<'_>) -> Offer {
        self.count.fetch_add(1, Ordering::Relaxed);
        Offer::Taken
    }
}

fn resident_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("0");
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) / 1024
}

fn start(world: &World, prefetch: u16, value: AMQPValue, filter: Option<&str>) -> (ConsumerId, Arc<Counter>) {
    let mut table = FieldTable::default();
    table.insert("x-stream-offset".into(), value);
    if let Some(filter) = filter {
        table.insert("x-stream-filter".into(), text(filter));
    }
    let options = ReaderOptions::parse(&resource(), &table, &"".into(), clock::now_unix_ms()).expect("arguments");
    let client = Arc::<Counter>::default();
    let to = Address { channel: 1, slot: 0 };
    let id = world.stream.consume(Consumer::new(client.clone(), to, false, false, 0, prefetch), options).expect("room");
    world.stream.unblock(id, &mut Effects::default());
    (id, client)
}

fn wait(client: &Counter, count: u64) {
    let deadline = Instant::now() + Duration::from_secs(600);
    while client.count.load(Ordering::Relaxed) < count && Instant::now() < deadline {
        std::thread::sleep(Duration::from_micros(100));
    }
    assert!(client.count.load(Ordering::Relaxed) >= count);
}

const MESSAGES: u64 = 5_000_000;

#[test]
#[ignore = "takes a minute and a gigabyte of disk"]
fn five_million_messages_and_a_hundred_readers() {
    let (world, marks) = fill();
    let mut world = world.restart();
    let began = Instant::now();
    assert_eq!(world.stream.counts().ready, MESSAGES);
    drop(world.stream.open());
    println!("opened in {:?}, {} MiB resident", began.elapsed(), resident_mib());
    seek(&world, &marks);
    read_everything(&world);
    read_beside_others(&mut world);
    filter_everything(&world);
}

/// The stream, and seconds in which some of it was published.
fn fill() -> (World, Vec<u64>) {
    let mut world = World::new(StreamRules { segment_bytes: Some(50_000_000), ..StreamRules::default() });
    let (began, mut marks) = (Instant::now(), Vec::new());
    for run in 0..MESSAGES / 1_000 {
        world.publish_raw(1_000, 100, &[0x10, 0, 2]);
        if run % 10 == 0 {
            world.commit();
        }
        if run % 500 == 0 {
            marks.push(clock::now_unix_ms() / 1_000);
        }
    }
    world.commit();
    println!("published in {:?}, {} MiB resident", began.elapsed(), resident_mib());
    (world, marks)
}

fn seek(world: &World, marks: &[u64]) {
    let starts = [
        ("first", text("first")),
        ("last", text("last")),
        ("offset", AMQPValue::LongInt(2_345_678)),
        ("offset", AMQPValue::LongInt(4_345_678)),
        ("interval", text("1h")),
    ];
    let times = marks.iter().map(|&seconds| ("time", AMQPValue::Timestamp(seconds)));
    for (name, value) in starts.into_iter().chain(times) {
        let began = Instant::now();
        let (id, client) = start(world, 1, value, None);
        wait(&client, 1);
        println!("{name}: first message after {:?}", began.elapsed());
        world.stream.cancel(id);
    }
}

fn read_everything(world: &World) {
    let before = resident_mib();
    let readers: Vec<_> = (0..100).map(|index| start(world, 1_000, AMQPValue::LongInt(index * 49_000), None)).collect();
    readers.iter().for_each(|(_, client)| wait(client, 1_000));
    println!(
        "100 readers in 100 places: {} MiB more, {} bytes in the budget",
        resident_mib().saturating_sub(before),
        world.budget.used_bytes()
    );
    readers.iter().for_each(|(id, _)| world.stream.cancel(*id));
    let began = Instant::now();
    let (id, client) = start(world, 0, text("first"), None);
    wait(&client, MESSAGES);
    println!("one reader, everything: {:.0} messages/s", MESSAGES as f64 / began.elapsed().as_secs_f64());
    world.stream.cancel(id);
}

/// A hundred readers a little apart, first from the disk, then at the end of a stream that is published to.
fn read_beside_others(world: &mut World) {
    let began = Instant::now();
    let place = |index: u64| MESSAGES - 400_000 + index * 3_000;
    let readers: Vec<_> =
        (0..100).map(|index| start(world, 0, AMQPValue::LongLongInt(place(index) as i64), None)).collect();
    let wait_to =
        |tail: u64| readers.iter().zip(0..).for_each(|((_, client), index)| wait(client, tail - place(index)));
    let delivered = || readers.iter().map(|(_, client)| client.count.load(Ordering::Relaxed)).sum::<u64>() as f64;
    wait_to(MESSAGES);
    let rate = delivered() / began.elapsed().as_secs_f64();
    println!("100 readers: {rate:.0} messages/s in all, {} MiB resident", resident_mib());

    let (began, before) = (Instant::now(), delivered());
    for _ in 0..200 {
        world.publish_raw(1_000, 100, &[0x10, 0, 2]);
    }
    world.commit();
    let committed = began.elapsed();
    wait_to(MESSAGES + 200_000);
    let rate = (delivered() - before) / began.elapsed().as_secs_f64();
    println!("200,000 messages committed in {committed:?} with 100 readers at the tail, {rate:.0} deliveries/s");
    readers.iter().for_each(|(id, _)| world.stream.cancel(*id));
}

fn filter_everything(world: &World) {
    let began = Instant::now();
    let (_, client) = start(world, 0, text("first"), Some("nothing"));
    let is_through = || world.stream.state.lock().readers.iter().any(|reader| reader.next >= MESSAGES);
    eventually(is_through, || "the filter's end".into());
    println!("a filter that matches nothing: {:.0} messages/s", MESSAGES as f64 / began.elapsed().as_secs_f64());
    assert_eq!(client.count.load(Ordering::Relaxed), 0);
}
