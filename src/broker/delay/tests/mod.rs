//! Delays over a real store, in a time of the tests' own.

mod lateness;
mod model;

use std::{
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::*;
use crate::{
    broker::message::{Body, encode_names},
    store::{RoundBuilder, RoundSource, StoreOptions, WatermarkListener},
};

/// How long anything may take before a test gives up.
const LIMIT: Duration = Duration::from_secs(60);
/// The present of the tests.
const NOW: u64 = 1_800_000_000_000;
const OWNER: QueueId = QueueId(1);

const MANY: usize = usize::MAX;

/// A window of a few dozen messages.
const SMALL: Limits = Limits { window_bytes: 8_000, lookahead_ms: 1_000 };

/// Rounds end when a test waits for one.
fn open(path: &Path) -> Arc<Store> {
    let linger = Duration::from_secs(3_600);
    let options =
        StoreOptions { path: path.to_owned(), linger, write_buffer_bytes: 1 << 20, ..StoreOptions::default() };
    Store::open(options).unwrap().0
}

fn budget() -> Arc<MemoryBudget> {
    Arc::new(MemoryBudget::new(usize::MAX / 4))
}

fn fresh(store: &Arc<Store>, limits: Limits) -> Arc<Delays> {
    assert_eq!(store.allocate_queue_id(), OWNER);
    Delays::with_limits(OWNER, store.clone(), budget(), Box::new(|_| {}), Opening::Done, limits)
}

fn recovered(store: &Arc<Store>, limits: Limits) -> Arc<Delays> {
    Delays::with_limits(OWNER, store.clone(), budget(), Box::new(|_| {}), Opening::Unread, limits)
}

struct Nobody;

impl WatermarkListener for Nobody {
    fn on_watermark(&self, _: Round, _: bool) {}
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LIMIT, "it never happened that {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn commit(store: &Store) {
    let round = store.open_round();
    let nobody: Arc<dyn WatermarkListener> = Arc::new(Nobody);
    store.when_durable(round, &nobody);
    eventually("the round is durable", || store.watermark() >= round);
    assert!(!store.is_failed(round), "{:?}", store.has_failed());
}

fn with_message<T>(body: &str, work: impl FnOnce(&Message<'_>) -> T) -> T {
    let names = encode_names(b"exchange", b"key");
    work(&Message {
        names: &names,
        properties: &[0, 0],
        body: Body::Inline(body.as_bytes()),
        persistent: true,
        extension: &[],
    })
}

fn push(delays: &Delays, after_ms: u64, body: &str) -> Round {
    with_message(body, |message| delays.push_at(NOW, NOW + after_ms, message))
}

fn body(message: &Message<'_>) -> String {
    String::from_utf8(message.body.as_slice().to_vec()).unwrap()
}

/// Takes all that is due after so many milliseconds, and waits for what has to be read first.
fn take(delays: &Delays, after_ms: u64) -> Vec<String> {
    take_up_to(delays, after_ms, MANY)
}

fn take_up_to(delays: &Delays, after_ms: u64, max: usize) -> Vec<String> {
    let mut taken = Vec::new();
    let start = Instant::now();
    while taken.len() < max {
        let before = taken.len();
        let mut each = |id: DelayId, message: &Message<'_>| {
            assert!(id.due_unix_ms <= NOW + after_ms, "{id:?} is early");
            taken.push(body(message));
        };
        delays.take_due(NOW + after_ms, max - before, &mut each);
        let loading = delays.state.lock().loading.is_some();
        let clearing = delays.state.lock().clearing != Clearing::No;
        if taken.len() == before && !loading && !clearing && delays.next_due().is_none_or(|due| due > NOW + after_ms) {
            break;
        }
        if clearing {
            commit(&delays.store); // nothing is read before that
        }
        assert!(start.elapsed() < LIMIT, "what is due does not come");
        std::thread::yield_now();
    }
    taken
}

fn bodies(listed: &[Delayed]) -> Vec<String> {
    listed.iter().map(|delayed| body(&delayed.record.message().unwrap())).collect()
}

fn notes(store: &Store) -> Vec<Vec<u8>> {
    let mut keys = Vec::new();
    store.read_notes(OWNER, b"", b"\xff", MANY, &mut |key, _| keys.push(key.to_vec())).unwrap();
    keys
}

#[test]
fn messages_come_in_the_order_of_their_due_times_and_never_early() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let delays = fresh(&store, Limits::default());
    assert_eq!(delays.next_due(), None);
    for (after, body) in [(50, "c"), (10, "a"), (50, "d"), (20, "b"), (0, "now"), (50, "e")] {
        push(&delays, after, body);
    }
    assert_eq!((delays.len(), delays.next_due()), (6, Some(NOW)));
    assert_eq!(take(&delays, 0), ["now"]);
    assert_eq!(delays.next_due(), Some(NOW + 10));
    assert_eq!(take(&delays, 9), [""; 0]);
    assert_eq!(take(&delays, 49), ["a", "b"]);
    assert_eq!(take_up_to(&delays, 50, 2), ["c", "d"]);
    push(&delays, 50, "f");
    push(&delays, 3, "late");
    assert_eq!(take(&delays, 1_000), ["late", "e", "f"]);
    assert_eq!((delays.len(), delays.next_due(), delays.resident_bytes()), (0, None, 0));
}

#[test]
fn what_is_taken_before_its_round_is_never_written() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let delays = fresh(&store, Limits::default());
    for number in 0..100 {
        push(&delays, number, "short");
    }
    push(&delays, 5_000, "long");
    assert_eq!(take(&delays, 200).len(), 100);
    commit(&store);
    assert_eq!(notes(&store).len(), 2, "the state, and what still waits");
    assert_eq!(take(&delays, 5_000), ["long"]);
    commit(&store);
    assert_eq!(notes(&store), [b"l"]);
}

#[test]
fn a_start_knows_number_and_next_due_time_and_reads_no_message_before_it_is_time() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let delays = fresh(&store, SMALL);
    for number in 0..2_000u64 {
        push(&delays, 10_000 + number * 7 % 2_000, &format!("{:04}", number * 7 % 2_000));
    }
    push(&delays, 1 << 40, "in 34 years");
    with_message("at the end of time", |message| delays.push_at(NOW, u64::MAX, message));
    commit(&store);
    push(&delays, 0, "lost with the kill");
    store.abandon();
    drop(delays);

    let store = open(directory.path());
    let delays = recovered(&store, SMALL);
    assert_eq!(delays.len(), 2_002);
    let due = delays.next_due().unwrap();
    assert!(due <= NOW + 10_000 && due > NOW + 8_000, "{due}");
    assert_eq!(take(&delays, 9_000), [""; 0]);
    assert_eq!(delays.resident_bytes(), 0);
    assert_eq!(take(&delays, 9_999), [""; 0]);
    assert!(delays.resident_bytes() > 0, "what comes next is brought ahead of its time");
    let all = take(&delays, 20_000);
    assert_eq!(all.len(), 2_000);
    assert!(all.is_sorted());
    assert_eq!(delays.len(), 2);
    push(&delays, 30_000, "new");
    assert_eq!(take(&delays, 1 << 41), ["new", "in 34 years"]);
    commit(&store);
    store.abandon();

    let store = open(directory.path());
    let delays = recovered(&store, SMALL);
    assert_eq!((delays.len(), delays.next_due().is_some()), (1, true));
    assert_eq!(take(&delays, u64::MAX - NOW), ["at the end of time"]);
    assert_eq!((delays.len(), delays.next_due()), (0, None));
}

#[test]
fn memory_stays_flat_however_many_wait() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let delays = fresh(&store, SMALL);
    let mut expected = Vec::new();
    for number in 0..20_000u64 {
        let after = number * 7_919 % 900;
        let body = format!("{after:03} {number:05}");
        push(&delays, after, &body);
        expected.push(body);
        if number % 500 == 499 {
            commit(&store);
            assert!(delays.resident_bytes() <= SMALL.window_bytes, "{}", delays.resident_bytes());
        }
    }
    expected.sort();
    let mut taken = Vec::new();
    for after in 0..900 {
        let due = take(&delays, after);
        assert!(due.iter().all(|body| body.starts_with(&format!("{after:03}"))), "{after}: {due:?}");
        taken.extend(due);
        assert!(delays.resident_bytes() <= SMALL.window_bytes);
    }
    assert_eq!(taken, expected);
    commit(&store);
    assert_eq!(notes(&store), [b"l"]);
}

#[test]
fn a_push_before_the_end_of_the_window_finds_its_place() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let delays = fresh(&store, SMALL);
    let number = |number: u64| format!("{number:05}");
    for after in (0..1_000).step_by(2) {
        push(&delays, after, &number(after));
    }
    commit(&store);
    let mut taken = take(&delays, 99);
    assert!(delays.state.lock().window.end() < DelayId { due_unix_ms: NOW + 999, serial: 0 });
    // Before, in and behind the window, and while it is loaded.
    for after in (101..1_000).step_by(2) {
        push(&delays, after, &number(after));
        if after % 100 == 51 {
            commit(&store);
            taken.extend(take(&delays, 100 + after / 3));
        }
    }
    taken.extend(take(&delays, 1_000));
    assert!(taken.is_sorted());
    assert_eq!(taken.len(), 50 + 900);
}

#[test]
fn cancelled_messages_do_not_come_wherever_they_are() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let delays = fresh(&store, SMALL);
    for after in 0..300 {
        push(&delays, after * 10, &format!("{after:03}"));
    }
    let listed = delays.list(DelayId::START, MANY);
    assert_eq!(listed.len(), 300);
    assert!(bodies(&listed).is_sorted());
    // Not written yet.
    assert!(delays.cancel(listed[3].id) && delays.cancel(listed[250].id));
    assert!(!delays.cancel(listed[3].id) && !delays.cancel(listed[250].id));
    commit(&store);
    assert_eq!(notes(&store).len(), 299);
    // In the store; the first in memory, too.
    assert!(delays.cancel(listed[4].id) && delays.cancel(listed[251].id));
    assert!(!delays.cancel(listed[4].id) && !delays.cancel(listed[251].id) && !delays.cancel(listed[250].id));
    let unknown = DelayId { serial: 9_999, ..listed[200].id };
    assert!(!delays.cancel(unknown));
    let wanted = |after: &usize| ![3, 4, 250, 251].contains(after);
    let left: Vec<_> = (0..300).filter(wanted).map(|after| format!("{after:03}")).collect();
    assert_eq!(delays.len(), 296);
    assert_eq!(bodies(&delays.list(DelayId::START, MANY)), left);
    assert_eq!(bodies(&delays.list(listed[248].id, 3)), ["248", "249", "252"]);
    assert_eq!(bodies(&delays.list(listed[2].id, 2)), ["002", "005"]);
    assert_eq!(delays.list(DelayId::START, 0).len(), 0);
    // Taken, and cancelled behind the window without a round in between.
    let mut taken = take(&delays, 2_000);
    assert!(delays.cancel(listed[260].id));
    taken.extend(take(&delays, 3_000));
    assert_eq!(taken, left.into_iter().filter(|body| body != "260").collect::<Vec<_>>());
    commit(&store);
    assert_eq!(notes(&store), [b"l"]);
}

#[test]
fn clearing_leaves_what_is_pushed_afterwards() {
    for count in [50, 3_000] {
        let directory = tempfile::tempdir().unwrap();
        let store = open(directory.path());
        let delays = fresh(&store, SMALL);
        for after in 0..count {
            push(&delays, after, "old");
            if after == count / 2 {
                commit(&store);
            }
        }
        assert_eq!(delays.clear(), count);
        assert_eq!((delays.len(), delays.next_due(), delays.resident_bytes()), (0, None, 0));
        assert_eq!(delays.list(DelayId::START, MANY).len(), 0);
        for after in 0..1_000 {
            push(&delays, after, "new");
        }
        assert_eq!(delays.list(DelayId::START, MANY).len(), 1_000);
        assert_eq!(take(&delays, 99), ["new"; 100]);
        commit(&store);
        assert_eq!(notes(&store).len(), 901);
        store.abandon();

        let store = open(directory.path());
        let delays = recovered(&store, SMALL);
        assert_eq!(delays.len(), 900);
        assert_eq!(take(&delays, 5_000), ["new"; 900]);
        assert_eq!(delays.clear(), 0);
    }
}

#[test]
fn taking_and_passing_on_are_in_one_round() {
    /// Something else that is written.
    struct Target {
        this: Weak<Target>,
        store: Arc<Store>,
        arrived: Mutex<Vec<String>>,
    }
    impl RoundSource for Target {
        fn drain(&self, round: &mut RoundBuilder) {
            for body in self.arrived.lock().drain(..) {
                round.put_note(QueueId(2), body.as_bytes(), b"");
            }
        }

        fn round_ended(&self, _: bool) {}
    }
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let delays = fresh(&store, SMALL);
    let target = Arc::new_cyclic(|this: &Weak<Target>| Target {
        this: this.clone(),
        store: store.clone(),
        arrived: Mutex::default(),
    });
    for after in 0..500 {
        push(&delays, after, &format!("{after:03}"));
    }
    commit(&store);
    // The commit thread is at it all the time, and the store is killed somewhere in between.
    let stop = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while stop.load(Ordering::Relaxed) < 100 {
                commit(&store);
            }
            store.abandon();
        });
        for after in 0..400 {
            let _section = store.atomic();
            delays.take_due(NOW + after, 7, &mut |_, message| {
                let mut arrived = target.arrived.lock();
                if arrived.is_empty() {
                    target.store.mark_dirty(target.this.upgrade().unwrap());
                }
                arrived.push(body(message));
                drop(arrived);
                delays.push_at(NOW, NOW + 10_000, message); // into the very delays it came from
            });
            std::thread::yield_now();
            stop.store(after, Ordering::Relaxed);
        }
    });

    let store = open(directory.path());
    let mut arrived = Vec::new();
    store.read_notes(QueueId(2), b"", b"\xff", MANY, &mut |key, _| arrived.push(key.to_vec())).unwrap();
    let delays = recovered(&store, SMALL);
    assert_eq!(delays.len(), 500);
    let waiting = take(&delays, 5_000);
    assert_eq!(arrived.len() + waiting.len(), 500);
    let again = take(&delays, 10_000);
    let arrived: Vec<_> = arrived.into_iter().map(|key| String::from_utf8(key).unwrap()).collect();
    assert_eq!(again, arrived);
    let all: Vec<_> = (0..500).map(|after| format!("{after:03}")).collect();
    assert_eq!([arrived, waiting].concat(), all);
}

#[test]
fn the_owner_is_told_when_the_next_due_time_is_earlier() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    store.allocate_queue_id();
    let told = Arc::new(Mutex::new(Vec::new()));
    let on_earlier = || -> OnEarlier {
        let told = told.clone();
        Box::new(move |due| told.lock().push(due - NOW))
    };
    let delays = Delays::with_limits(OWNER, store.clone(), budget(), on_earlier(), Opening::Done, SMALL);
    for after in [500, 600, 400, 400, 900, 7] {
        push(&delays, after, "x");
    }
    assert_eq!(*told.lock(), [500, 400, 7]);
    told.lock().clear();
    commit(&store);
    drop(delays);
    // After a start, somebody has to ask.
    let delays = Delays::with_limits(OWNER, store.clone(), budget(), on_earlier(), Opening::Unread, SMALL);
    assert!(delays.next_due().unwrap() <= NOW);
    assert_eq!(delays.take_due(NOW, MANY, &mut |_, _| panic!("nothing is due")), 0);
    eventually("what was read is announced", || *told.lock() == [7]);
    assert_eq!(delays.next_due(), Some(NOW + 7));
}

#[test]
fn large_bodies_are_shared_and_come_back_whole() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let budget = budget();
    store.allocate_queue_id();
    let delays = Delays::with_limits(OWNER, store.clone(), budget.clone(), Box::new(|_| {}), Opening::Done, SMALL);
    let large = Bytes::from(vec![7; 100_000]);
    let names = encode_names(b"", b"key");
    for after in 0..5 {
        let message = Message {
            names: &names,
            properties: &[0x80, 0, 1, b'x'],
            body: Body::Shared(&large),
            persistent: false,
            extension: &[1, 2, 3],
        };
        delays.push_at(NOW, NOW + after, &message);
    }
    assert!(delays.resident_bytes() >= 500_000, "not in the store yet");
    commit(&store);
    assert!(delays.resident_bytes() < 101_000, "one of them stays");
    assert_eq!(budget.used_bytes(), delays.resident_bytes());
    let mut count = 0;
    while count < 5 {
        delays.take_due(NOW + 9, 1, &mut |_, message| {
            assert!(matches!(message.body, Body::Shared(body) if *body == large));
            assert_eq!((message.names, message.extension, message.persistent), (&names[..], &[1, 2, 3][..], false));
            count += 1;
        });
    }
    assert_eq!((budget.used_bytes(), delays.len()), (0, 0));
}

#[test]
fn less_is_kept_in_memory_while_queues_want_it() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    store.allocate_queue_id();
    let budget = Arc::new(MemoryBudget::new(100_000));
    let limits = Limits { window_bytes: 100_000, ..SMALL };
    let delays = Delays::with_limits(OWNER, store.clone(), budget.clone(), Box::new(|_| {}), Opening::Done, limits);
    budget.grow(200_000);
    for after in 0..1_000 {
        push(&delays, after, "x");
    }
    commit(&store);
    assert!(delays.resident_bytes() <= 100_000 / SCARCE_PART, "{}", delays.resident_bytes());
    assert_eq!(take(&delays, 1_000).len(), 1_000);
    budget.shrink(200_000);
    push(&delays, 0, "x");
    drop(delays);
    commit(&store);
    eventually("nothing is accounted for any more", || budget.used_bytes() == 0);
}

#[test]
fn a_damaged_note_costs_that_message_and_the_count_is_put_right() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let delays = fresh(&store, SMALL);
    for after in 0..300 {
        push(&delays, after * 10, &format!("{after:03}"));
    }
    commit(&store);
    let keys = notes(&store);
    drop(delays);
    // A record that is none, and a state that is none.
    struct Vandal(Vec<(Vec<u8>, Vec<u8>)>);
    impl RoundSource for Vandal {
        fn drain(&self, round: &mut RoundBuilder) {
            self.0.iter().for_each(|(key, value)| round.put_note(OWNER, key, value));
        }

        fn round_ended(&self, _: bool) {}
    }
    store.mark_dirty(Arc::new(Vandal(vec![(keys[0].clone(), b"no state".to_vec()), (keys[201].clone(), vec![1, 2])])));
    commit(&store);

    let delays = recovered(&store, SMALL);
    assert_eq!(delays.len(), 300);
    let taken = take(&delays, 5_000);
    assert_eq!(taken, (0..300).filter(|after| *after != 200).map(|after| format!("{after:03}")).collect::<Vec<_>>());
    assert_eq!((delays.len(), delays.next_due()), (0, None));
    let next = delays.state.lock().next_serial;
    assert_eq!(next, 300, "no serial is given twice");
}

#[test]
fn a_closed_owner_writes_nothing_and_lets_its_memory_go() {
    let directory = tempfile::tempdir().unwrap();
    let store = open(directory.path());
    let delays = fresh(&store, SMALL);
    for after in 0..300 {
        push(&delays, after * 10, "x");
    }
    commit(&store);
    push(&delays, 5, "y");
    delays.close();
    store.delete_queue(OWNER);
    assert_eq!(push(&delays, 1, "z"), 0);
    commit(&store);
    assert_eq!(delays.take_due(NOW + 9_999, MANY, &mut |_, _| panic!("nothing is left")), 0);
    assert_eq!((delays.len(), delays.next_due(), delays.resident_bytes(), delays.clear()), (0, None, 0, 0));
    assert!(delays.list(DelayId::START, MANY).is_empty() && !delays.cancel(DelayId::START));
    commit(&store);
    assert_eq!(notes(&store), [b""; 0]);
}
