//! Fuzzing without a fuzzer: the targets of `fuzz/`, fed by a plain random number generator, for `FUZZ_SECONDS` (10).
//! No panic, no hang, no growth. `FUZZ_SEED` repeats a run; a failing input is printed with its target, for
//! `FUZZ_INPUT=<target>:<hex>` to repeat it alone.

#![allow(
    clippy::unwrap_used,
    clippy::too_many_lines,
    clippy::type_complexity,
    reason = "a test that cannot go on should say where, and tells its story in one piece"
)]

#[path = "../fuzz/src/lib.rs"]
mod harness;

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use harness::Lab;
use leveret::{
    broker::Broker,
    store::{Durability, Store, StoreOptions},
};

/// How long one input may take.
const INPUT_PATIENCE: Duration = Duration::from_secs(20);
/// Resident memory at the end, beyond that after the warm-up.
const MAX_GROWTH_KIB: u64 = 48 << 10;

/// Random numbers that a seed repeats (splitmix64).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    /// An input: mostly random, with stretches of the small numbers that choose ordinary things.
    fn input(&mut self, max: u64) -> Vec<u8> {
        let len = self.below(max) as usize;
        let mut input = Vec::with_capacity(len);
        while input.len() < len {
            let run = 1 + self.below(24);
            let small = self.below(4) == 0;
            input.extend((0..run).map(|_| self.next() as u8 & if small { 15 } else { 255 }));
        }
        input
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What is being tried, for the watchdog and for the report of a panic.
#[derive(Clone, Default)]
struct Current(Arc<Mutex<Option<(Instant, &'static str, Vec<u8>)>>>);

impl Current {
    fn set(&self, target: &'static str, input: &[u8]) {
        *self.0.lock().unwrap() = Some((Instant::now(), target, input.to_vec()));
    }

    fn describe(&self) -> String {
        match &*self.0.lock().unwrap() {
            Some((_, target, input)) => format!("FUZZ_INPUT={target}:{}", hex(input)),
            None => String::new(),
        }
    }

    /// A hang cannot be unwound, so it ends the process.
    fn watch(&self) {
        let current = self.clone();
        std::thread::spawn(move || {
            loop {
                std::thread::sleep(Duration::from_millis(500));
                let began = current.0.lock().unwrap().as_ref().map(|(began, ..)| *began);
                if began.is_some_and(|began| began.elapsed() > INPUT_PATIENCE) {
                    eprintln!("an input HANGS: {}", current.describe());
                    // Who waits for whom, if a debugger is there to tell.
                    let this = std::process::id().to_string();
                    let stacks = ["-p", &this, "-batch", "-ex", "thread apply all backtrace 30"];
                    let _ = std::process::Command::new("gdb").args(stacks).stdin(std::process::Stdio::null()).status();
                    std::process::abort();
                }
            }
        });
    }
}

fn run(lab: &Lab, target: &str, input: &[u8]) {
    match target {
        "frames" => harness::frames(lab, input),
        "tables" => harness::tables(input),
        "properties" => harness::properties(input),
        "records" => harness::records(lab, input),
        other => panic!("no target '{other}'"),
    }
}

#[test]
fn no_input_makes_the_broker_panic_hang_or_grow() {
    let lab = Lab::new();
    if let Ok(again) = std::env::var("FUZZ_INPUT") {
        let (target, digits) = again.split_once(':').expect("FUZZ_INPUT=<target>:<hex>");
        let input: Vec<u8> =
            (0..digits.len() / 2).map(|at| u8::from_str_radix(&digits[2 * at..2 * at + 2], 16).expect("hex")).collect();
        return run(&lab, target, &input);
    }
    let patience = Duration::from_secs(number("FUZZ_SECONDS").unwrap_or(10));
    let seed = number("FUZZ_SEED")
        .unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_nanos() as u64));
    println!("FUZZ_SEED={seed}");
    let (mut rng, current, began) = (Rng(seed), Current::default(), Instant::now());
    current.watch();
    let mut tried: BTreeMap<&str, u64> = BTreeMap::new();
    let (mut warm_kib, mut peak_kib) = (0, 0);
    let mut next_look = began;
    while began.elapsed() < patience {
        let (target, max) = match rng.below(20) {
            0..9 => ("frames", 3_000),
            9..13 => ("tables", 300),
            13..18 => ("properties", 200),
            _ => ("records", 400),
        };
        let input = rng.input(max);
        current.set(target, &input);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(&lab, target, &input)));
        let tried_now = current.describe();
        *current.0.lock().unwrap() = None;
        assert!(outcome.is_ok(), "{tried_now}");
        *tried.entry(target).or_default() += 1;
        if Instant::now() > next_look {
            next_look = Instant::now() + Duration::from_millis(100);
            let resident = resident_kib();
            peak_kib = peak_kib.max(resident);
            // The caches are full and everything has happened once.
            if began.elapsed() < patience.mul_f32(0.4).min(Duration::from_secs(60)) {
                warm_kib = warm_kib.max(resident);
            }
        }
    }
    lab.tidy();
    assert_eq!(lab.queue_count(), 0);
    let used = lab.broker.memory().used_bytes();
    assert_eq!(used, 0, "bytes of messages that belong to no queue");
    std::thread::sleep(Duration::from_millis(300));
    let end_kib = resident_kib();
    println!(
        "{tried:?} inputs in {:?}; resident: {} MiB after the warm-up, {} MiB at most, {} MiB at the end; store: {:?}",
        began.elapsed(),
        warm_kib >> 10,
        peak_kib >> 10,
        end_kib >> 10,
        lab.broker.store_stats(),
    );
    println!("the broker said, by class and method: {:?}", lab.said.lock().unwrap());
    *current.0.lock().unwrap() = None;
    assert!(end_kib <= warm_kib + MAX_GROWTH_KIB, "resident memory grew from {warm_kib} to {end_kib} KiB");
}

// Damaged data directories

type Family = Vec<(Vec<u8>, Vec<u8>)>;

const FAMILIES: [&str; 9] =
    ["default", "meta", "meta_copy", "log", "state", "consumed", "notes", "bodies", "body_references"];

fn options(path: &Path) -> StoreOptions {
    StoreOptions { path: path.to_owned(), durability: Durability::Os, ..StoreOptions::default() }
}

/// Makes a data directory with everything in it, through a client's eyes.
fn make_directory(path: &Path) {
    let (store, recovered) = Store::open(options(path)).expect("opens");
    let broker = Broker::new(
        store.clone(),
        recovered,
        leveret::broker::BrokerLimits { memory_budget_bytes: 1 << 30, disk_free_limit_bytes: 0 },
    );
    futures_lite::future::block_on(store.durable(broker.ensure_vhost("/"))).expect("written");
    harness::fill(&broker);
    drop(broker);
    store.shutdown().expect("a clean end");
}

/// Changes what the database holds behind the broker's back; some of it with checksums that fit.
fn scribble(path: &Path, rng: &mut Rng) -> usize {
    let db = rocksdb::DB::open_cf(&rocksdb::Options::default(), path, FAMILIES).expect("a database");
    let mut changed = 0;
    for name in FAMILIES {
        let family = db.cf_handle(name).expect("a family");
        let all: Family = db
            .iterator_cf(family, rocksdb::IteratorMode::Start)
            .flatten()
            .map(|(key, value)| (key.into(), value.into()))
            .collect();
        for (key, mut value) in all {
            // The store's own records say which format it is; without them it refuses to start, as it should.
            if (name == "meta" && key.first() == Some(&0)) || rng.below(4) != 0 {
                continue;
            }
            changed += 1;
            let how = rng.below(6);
            if std::env::var_os("FUZZ_VERBOSE").is_some() {
                println!("{name} {} change {how}: was {}", hex(&key), hex(&value[..value.len().min(60)]));
            }
            match how {
                0 => db.delete_cf(family, &key).expect("written"),
                1 => {
                    value.truncate(rng.below(value.len() as u64 + 1) as usize);
                    db.put_cf(family, &key, &value).expect("written");
                }
                2 => db.put_cf(family, &key, rng.input(80)).expect("written"),
                3 => {
                    let mut other = key.clone();
                    let at = rng.below(other.len() as u64) as usize;
                    other[at] ^= 1 << rng.below(8);
                    if other.first() != Some(&0) || name != "meta" {
                        db.put_cf(family, other, &value).expect("written");
                    }
                }
                how => {
                    for _ in 0..1 + rng.below(3) {
                        if !value.is_empty() {
                            let at = rng.below(value.len() as u64) as usize;
                            value[at] ^= 1 << rng.below(8);
                        }
                    }
                    if how == 4 && matches!(name, "state" | "consumed") && value.len() > 5 {
                        let sum = crc32c::crc32c_append(crc32c::crc32c(&key), &value[5..]);
                        value[1..5].copy_from_slice(&sum.to_le_bytes());
                    }
                    db.put_cf(family, &key, &value).expect("written");
                }
            }
        }
    }
    changed
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).expect("made");
    for entry in std::fs::read_dir(from).expect("there").flatten() {
        if entry.metadata().is_ok_and(|metadata| metadata.is_file()) {
            std::fs::copy(entry.path(), to.join(entry.file_name())).expect("copied");
        }
    }
}

#[test]
fn a_damaged_data_directory_boots_and_serves_what_is_left() {
    let patience = Duration::from_secs(number("FUZZ_SECONDS").unwrap_or(10) / 2);
    let seed = number("FUZZ_SEED")
        .unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_nanos() as u64));
    let directory = tempfile::tempdir().expect("a temporary directory");
    let whole = directory.path().join("whole");
    make_directory(&whole);
    let (mut rng, current, began) = (Rng(seed), Current::default(), Instant::now());
    current.watch();
    let (mut rounds, mut changed, mut damaged, mut served) = (0, 0, 0, 0);
    while began.elapsed() < patience {
        current.set("directory", &rng.0.to_le_bytes());
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let path = directory.path().join("damaged");
            copy(&whole, &path);
            let changes = scribble(&path, &mut rng);
            let (store, recovered) = Store::open(options(&path)).expect("a damaged directory opens");
            let broker = Broker::new(
                store.clone(),
                recovered,
                leveret::broker::BrokerLimits { memory_budget_bytes: 1 << 30, disk_free_limit_bytes: 0 },
            );
            futures_lite::future::block_on(store.durable(broker.ensure_vhost("/"))).expect("written");
            let seen = harness::empty(&broker);
            let stats = store.stats();
            // What was emptied is empty the next time as well.
            drop(broker);
            store.shutdown().expect("a clean end");
            let (store, recovered) = Store::open(options(&path)).expect("opens again");
            let broker = Broker::new(
                store.clone(),
                recovered,
                leveret::broker::BrokerLimits { memory_budget_bytes: 1 << 30, disk_free_limit_bytes: 0 },
            );
            futures_lite::future::block_on(store.durable(broker.ensure_vhost("/"))).expect("written");
            assert_eq!(harness::empty(&broker), 0, "messages came back that were taken and synced");
            drop(broker);
            store.shutdown().expect("a clean end");
            std::fs::remove_dir_all(&path).expect("removed");
            (changes, stats.damaged_records, seen)
        }));
        let state = current.describe();
        *current.0.lock().unwrap() = None;
        let Ok((changes, damage, seen)) = outcome else { panic!("round {rounds} began with {state}") };
        (rounds, changed, damaged, served) = (rounds + 1, changed + changes, damaged + damage, served + seen);
    }
    *current.0.lock().unwrap() = None;
    println!(
        "{rounds} directories with {changed} changes: {damaged} damaged records reported, {served} messages served; FUZZ_SEED={seed}"
    );
}
