//! How late messages come when there are many, and what that costs. Run by hand, on an idle machine:
//! `cargo test --release --lib delay::tests::lateness -- --ignored --nocapture --test-threads 1`.

use hdrhistogram::Histogram;
use parking_lot::Condvar;

use super::*;

const MESSAGES: u64 = 1_000_000;
const SPAN_MS: u64 = 60_000;
const BODY: &str = "a body of two hundred bytes, more or less; a body of two hundred bytes, more or less; \
                    a body of two hundred bytes, more or less; a body of two hundred bytes, more or less; the end of it";

/// The owner's timer: a thread that waits for the next due time.
struct Timer {
    due: Mutex<Option<u64>>,
    changed: Condvar,
}

impl Timer {
    fn new() -> Arc<Timer> {
        Arc::new(Timer { due: Mutex::new(None), changed: Condvar::new() })
    }

    fn on_earlier(self: &Arc<Timer>) -> OnEarlier {
        let this = self.clone();
        Box::new(move |due| {
            let mut told = this.due.lock();
            if told.is_none_or(|told| due < told) {
                *told = Some(due);
                this.changed.notify_one();
            }
        })
    }

    fn wait(&self, next_due: Option<u64>) {
        let mut told = self.due.lock();
        loop {
            let due = [told.take(), next_due].into_iter().flatten().min();
            let wait_ms = due.map_or(u64::MAX, |due| due.saturating_sub(clock::now_unix_ms()));
            if wait_ms == 0 {
                return;
            }
            self.changed.wait_for(&mut told, Duration::from_millis(wait_ms.min(1_000)));
            if told.is_none() && wait_ms > 1_000 {
                return;
            }
        }
    }
}

fn precise_unix_ms() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis() as u64
}

/// Ticks of 10 ms of processor time, and resident bytes.
fn process() -> (u64, u64) {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<_> = stat[stat.rfind(')').unwrap()..].split(' ').collect();
    let ticks = fields[12].parse::<u64>().unwrap() + fields[13].parse::<u64>().unwrap();
    (ticks, fields[22].parse::<u64>().unwrap() * 4096)
}

fn cpu_seconds_since(ticks: u64) -> f64 {
    (process().0 - ticks) as f64 / 100.0
}

fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

fn subject() -> (tempfile::TempDir, Arc<Store>, Arc<Delays>, Arc<Timer>) {
    let directory = tempfile::tempdir().unwrap();
    let options = StoreOptions { path: directory.path().to_owned(), ..StoreOptions::default() };
    let store = Store::open(options).unwrap().0;
    let timer = Timer::new();
    let delays = Delays::new(store.allocate_queue_id(), store.clone(), budget(), timer.on_earlier());
    (directory, store, delays, timer)
}

fn push_all(store: &Store, delays: &Delays, due: impl Fn(u64) -> u64) {
    let start = Instant::now();
    let (ticks, _) = process();
    let mut seed = 99;
    for number in 0..MESSAGES {
        with_message(BODY, |message| delays.push(due(random(&mut seed)), message));
        if number % 1_000 == 999 {
            commit(store); // a publisher with a thousand unconfirmed messages
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "pushed {MESSAGES}: {:.0} a second, {:.1} s of processor time, {} KiB of messages, {} MiB resident",
        MESSAGES as f64 / seconds,
        cpu_seconds_since(ticks),
        delays.resident_bytes() >> 10,
        process().1 >> 20
    );
}

#[test]
#[ignore = "takes more than a minute, and its figures mean something on an idle machine only"]
fn a_million_messages_within_a_minute_come_on_time() {
    let (_directory, store, delays, timer) = subject();
    let start = clock::now_unix_ms() + 30_000;
    push_all(&store, &delays, |random| start + random % SPAN_MS);
    assert!(clock::now_unix_ms() < start, "pushing took too long for this test");
    let mut lateness = Histogram::<u64>::new(3).unwrap();
    let (mut taken, mut resident, mut began) = (0, 0, None);
    while taken < MESSAGES {
        timer.wait(delays.next_due());
        let section = store.atomic();
        let count = delays.take_due(clock::now_unix_ms(), 512, &mut |id, _| {
            lateness.record(precise_unix_ms() - id.due_unix_ms).unwrap(); // panics if it is early
        });
        drop(section);
        if count > 0 {
            began.get_or_insert_with(|| process().0);
        }
        taken += count as u64;
        resident = resident.max(process().1);
    }
    commit(&store);
    let seconds = SPAN_MS as f64 / 1000.0;
    println!(
        "taken {taken}: late by {} ms (median), {} ms (99 %), {} ms (99.9 %), {} ms (most)",
        lateness.value_at_quantile(0.5),
        lateness.value_at_quantile(0.99),
        lateness.value_at_quantile(0.999),
        lateness.max()
    );
    println!(
        "{:.1} % of a core, {} MiB resident at most, of which messages {} KiB",
        cpu_seconds_since(began.unwrap()) / seconds * 100.0,
        resident >> 20,
        delays.resident_bytes() >> 10
    );
    assert!(lateness.value_at_quantile(0.99) < 100);
}

#[test]
#[ignore = "its figures mean something on an idle machine only"]
fn a_million_messages_that_are_due_already() {
    let (_directory, store, delays, timer) = subject();
    let now = clock::now_unix_ms();
    push_all(&store, &delays, |random| now - random % SPAN_MS);
    let (start, (ticks, _)) = (Instant::now(), process());
    let (mut taken, mut last) = (0, DelayId::START);
    while taken < MESSAGES {
        timer.wait(delays.next_due());
        let _section = store.atomic();
        taken += delays.take_due(clock::now_unix_ms(), 512, &mut |id, _| {
            assert!(id > last);
            last = id;
        }) as u64;
    }
    commit(&store);
    println!(
        "taken {taken}: {:.0} a second, {:.1} s of processor time, {} MiB resident",
        MESSAGES as f64 / start.elapsed().as_secs_f64(),
        cpu_seconds_since(ticks),
        process().1 >> 20
    );
}
