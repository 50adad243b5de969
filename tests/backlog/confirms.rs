//! Confirmed rates beside what the disk and the store can do.

use std::{
    io::{Seek, SeekFrom, Write},
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use leveret::store::{QueueId, QueueStateRecord, RoundBuilder, RoundSource, Store, StoreOptions};

use super::{
    figures::{Place, alone, demand, scaled},
    support::{connect, publish},
};

const BODY_BYTES: usize = 128;

/// A record of such a message, with what the store adds.
const RECORD_BYTES: usize = BODY_BYTES + 40;

/// Appends and syncs a second's time, on blocks that were written before, and answers how often that went in a second.
fn bare_syncs(directory: &Path, bytes: usize) -> f64 {
    let mut file = std::fs::File::create(directory.join("bare")).unwrap();
    let size = 16 << 20;
    file.write_all(&vec![1; size]).unwrap();
    file.sync_all().unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let (began, mut rounds, mut at) = (Instant::now(), 0u32, 0);
    while began.elapsed() < Duration::from_millis(scaled(2000, 100)) {
        if at + bytes > size {
            at = 0;
            file.seek(SeekFrom::Start(0)).unwrap();
        }
        file.write_all(&vec![7; bytes]).unwrap();
        file.sync_data().unwrap();
        at += bytes;
        rounds += 1;
    }
    f64::from(rounds) / began.elapsed().as_secs_f64()
}

/// A queue whose every round holds the same number of records.
struct Steady {
    tail: Mutex<u64>,
    records: u64,
}

impl RoundSource for Steady {
    fn drain(&self, round: &mut RoundBuilder) {
        let mut tail = self.tail.lock().unwrap();
        for seq in *tail..*tail + self.records {
            round.append(QueueId(1), seq, &[7; BODY_BYTES + 30]);
        }
        *tail += self.records;
        round.put_state(QueueId(1), &QueueStateRecord { tail: *tail, ..QueueStateRecord::default() });
    }

    fn round_ended(&self, committed: bool) {
        assert!(committed);
    }
}

/// Records in a second that the store takes in rounds of so many.
fn store_only(directory: &Path, records: u64) -> f64 {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let (store, _) =
        Store::open(StoreOptions { path: directory.join("store"), ..StoreOptions::default() }).expect("opens");
    let source = Arc::new(Steady { tail: Mutex::new(0), records });
    let (began, mut rounds) = (Instant::now(), 0u64);
    while began.elapsed() < Duration::from_millis(scaled(2000, 100)) {
        let round = store.mark_dirty(source.clone());
        runtime.block_on(store.durable(round)).expect("commits");
        rounds += 1;
    }
    let rate = (rounds * records) as f64 / began.elapsed().as_secs_f64();
    store.shutdown().expect("closes");
    rate
}

/// Messages confirmed in a second, by one publisher to each of so many queues, the window shared between them.
fn confirmed(place: &Place, queues: u64, window: u64, count: u64) -> f64 {
    let names: Vec<String> = (0..queues).map(|index| format!("confirmed-{queues}-{index}")).collect();
    for name in &names {
        connect(&place.broker).declare_queue(name, true, false).expect("declares");
    }
    let began = Instant::now();
    std::thread::scope(|scope| {
        for name in &names {
            scope.spawn(|| publish(&place.broker, name, true, BODY_BYTES, 0, count / queues, window));
        }
    });
    let rate = (count / queues * queues) as f64 / began.elapsed().as_secs_f64();
    let mut client = connect(&place.broker);
    for name in &names {
        client.delete_queue(name).expect("deletes");
    }
    rate
}

#[test]
fn confirms_keep_up_with_the_disk() {
    let _alone = alone();
    println!("confirms: persistent messages of {BODY_BYTES} bytes");
    let (mut single, mut thousand, mut many) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..scaled(5, 1) {
        let place = Place::new();
        let bare = bare_syncs(place.directory.path(), RECORD_BYTES);
        let one = confirmed(&place, 1, 1, scaled(10_000, 100));
        single.push(one / bare);
        let only = store_only(place.directory.path(), 1_000);
        let windows = [10, 100, 1_000].map(|window| confirmed(&place, 1, window, scaled(window * 2_000, 1_000)));
        thousand.push(windows[2] / only);
        let of_many = [1, 10, 100, 1_000]
            .map(|window| confirmed(&place, 100, window, scaled(500_000.min(window * 50_000), 1_000)));
        many.push(of_many[3] / windows[2]);
        println!(
            "  bare sync {bare:.0}/s; 1 queue: window 1 {one:.0}/s, 10 {:.0}/s, 100 {:.0}/s, 1,000 {:.0}/s; store alone, rounds of 1,000: {only:.0}/s",
            windows[0], windows[1], windows[2]
        );
        println!(
            "  100 queues with a publisher each: window 1 {:.0}/s, 10 {:.0}/s, 100 {:.0}/s, 1,000 {:.0}/s",
            of_many[0], of_many[1], of_many[2], of_many[3]
        );
    }
    let median = |values: &mut Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let (single, thousand, many) = (median(&mut single), median(&mut thousand), median(&mut many));
    demand(&format!("window 1 at {:.0} % of a bare sync's rate, of 55 %", single * 100.0), single >= 0.55);
    demand(&format!("window 1,000 at {:.0} % of the store's rate, of 50 %", thousand * 100.0), thousand >= 0.5);
    demand(&format!("100 queues at {:.0} % of one queue's rate, of 75 %", many * 100.0), many >= 0.75);
}
