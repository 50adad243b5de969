//! Tests of the store as a whole. What they share: a queue that does as it is told, and a hook on the commit thread.

mod bodies;
mod checkpoint;
mod damage;
mod failing;
mod model;
mod notes;
mod opening;
mod reading;
mod rounds;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::*;

/// How long anything may take before a test gives up.
const LIMIT: Duration = Duration::from_secs(20);

type Records = Vec<(QueueSeq, Vec<u8>)>;

fn options(path: &Path) -> StoreOptions {
    StoreOptions { path: path.to_owned(), ..StoreOptions::default() }
}

fn open(path: &Path) -> (Arc<Store>, Recovered) {
    Store::open(options(path)).unwrap()
}

fn open_hooked(path: &Path, hook: &Arc<TestHook>) -> Arc<Store> {
    let hook: Arc<dyn CommitHook> = Arc::clone(hook) as _;
    Store::open(StoreOptions { hook: Some(hook), ..options(path) }).unwrap().0
}

/// A durable queue without rules: it holds changes until it is drained.
struct TestQueue {
    id: QueueId,
    state: Mutex<TestQueueState>,
}

#[derive(Default)]
struct TestQueueState {
    changes: Vec<Change>,
    /// The round that the changes were promised to, while there are any.
    promised: Option<Round>,
    endings: Vec<bool>,
    durability: Option<Durability>,
    failed_pagings: u32,
}

#[derive(Clone, Debug)]
enum Change {
    Append(QueueSeq, Vec<u8>),
    AppendWithBody(QueueSeq, Vec<u8>, Bytes),
    Page(QueueSeq, Vec<u8>),
    State(QueueStateRecord),
    Consumed(u64, Vec<(QueueSeq, QueueSeq)>),
    DeleteSegments(u64, u64),
    DeleteRecords(QueueSeq, QueueSeq),
    PutNote(Vec<u8>, Vec<u8>),
    DeleteNote(Vec<u8>),
    DeleteNotes(Vec<u8>, Vec<u8>),
    Panic,
}

impl TestQueue {
    fn new(store: &Store) -> Arc<TestQueue> {
        TestQueue::with_id(store.allocate_queue_id())
    }

    fn with_id(id: QueueId) -> Arc<TestQueue> {
        Arc::new(TestQueue { id, state: Mutex::default() })
    }

    fn change(self: &Arc<Self>, store: &Store, changes: impl IntoIterator<Item = Change>) -> Round {
        let mut state = self.state.lock();
        state.changes.extend(changes);
        *state.promised.get_or_insert_with(|| store.mark_dirty(Arc::clone(self) as _))
    }

    fn append(self: &Arc<Self>, store: &Store, seq: QueueSeq, record: &[u8]) -> Round {
        self.change(store, [Change::Append(seq, record.to_vec())])
    }

    fn append_all(self: &Arc<Self>, store: &Store, records: &Records) -> Round {
        self.change(store, records.iter().map(|(seq, record)| Change::Append(*seq, record.clone())))
    }

    fn endings(&self) -> Vec<bool> {
        self.state.lock().endings.clone()
    }
}

impl RoundSource for TestQueue {
    fn drain(&self, round: &mut RoundBuilder) {
        let mut state = self.state.lock();
        state.promised = None;
        if let Some(durability) = state.durability {
            round.set_durability(durability);
        }
        for change in std::mem::take(&mut state.changes) {
            match change {
                Change::Append(seq, record) => round.append(self.id, seq, &record),
                Change::AppendWithBody(seq, head, body) => round.append_with_body(self.id, seq, &head, &body),
                Change::Page(seq, record) => round.page_out(self.id, seq, &record),
                Change::State(record) => round.put_state(self.id, &record),
                Change::Consumed(segment, ranges) => round.put_consumed(self.id, segment, &ranges),
                Change::DeleteSegments(from, until) => round.delete_segments(self.id, from, until),
                Change::DeleteRecords(from, until) => round.delete_records(self.id, from, until),
                Change::PutNote(key, value) => round.put_note(self.id, &key, &value),
                Change::DeleteNote(key) => round.delete_note(self.id, &key),
                Change::DeleteNotes(from, until) => round.delete_notes(self.id, &from, &until),
                Change::Panic => panic!("asked for by the test"),
            }
        }
    }

    fn round_ended(&self, committed: bool) {
        self.state.lock().endings.push(committed);
    }

    fn paging_failed(&self) {
        self.state.lock().failed_pagings += 1;
    }
}

/// Holds rounds back, fails them, and remembers them.
#[derive(Default)]
struct TestHook {
    state: Mutex<TestHookState>,
    changed: Condvar,
}

#[derive(Default)]
struct TestHookState {
    held: bool,
    /// Rounds that came by.
    seen: Vec<Round>,
    /// Fails one round, before or after it is written.
    fail_with: Option<String>,
    fail_after_with: Option<String>,
    /// Fails them all.
    broken: Option<String>,
    /// Rounds that were written, and whether they were synced.
    written: Vec<(Round, bool)>,
}

impl TestHook {
    fn hold(&self) {
        self.state.lock().held = true;
    }

    fn release(&self) {
        self.state.lock().held = false;
        self.changed.notify_all();
    }

    fn fail_with(&self, reason: &str) {
        self.state.lock().fail_with = Some(reason.to_owned());
    }

    fn fail_after_with(&self, reason: &str) {
        self.state.lock().fail_after_with = Some(reason.to_owned());
    }

    fn break_down(&self, reason: &str) {
        self.state.lock().broken = Some(reason.to_owned());
    }

    fn mend(&self) {
        self.state.lock().broken = None;
    }

    fn was_synced(&self, round: Round) -> Option<bool> {
        self.state.lock().written.iter().find(|(written, _)| *written == round).map(|(_, synced)| *synced)
    }

    fn seen(&self) -> Vec<Round> {
        self.state.lock().seen.clone()
    }

    /// Waits until the commit thread stands before the sync of `round` or a later one.
    fn wait_for(&self, round: Round) {
        let mut state = self.state.lock();
        while state.seen.last().is_none_or(|seen| *seen < round) {
            assert!(!self.changed.wait_for(&mut state, LIMIT).timed_out(), "round {round} did not come");
        }
    }
}

impl CommitHook for TestHook {
    fn before_sync(&self, round: Round) -> Result<(), String> {
        let mut state = self.state.lock();
        state.seen.push(round);
        self.changed.notify_all();
        while state.held {
            self.changed.wait(&mut state);
        }
        let failure = state.fail_with.take().or_else(|| state.broken.clone());
        failure.map_or(Ok(()), Err)
    }

    fn after_write(&self, round: Round, synced: bool) -> Result<(), String> {
        let mut state = self.state.lock();
        state.written.push((round, synced));
        state.fail_after_with.take().map_or(Ok(()), Err)
    }
}

/// Waits for a watermark, and counts the calls.
#[derive(Default)]
struct TestListener {
    calls: Mutex<Vec<Round>>,
    called: Condvar,
}

impl WatermarkListener for TestListener {
    fn on_watermark(&self, watermark: Round, _: bool) {
        self.calls.lock().push(watermark);
        self.called.notify_all();
    }
}

/// Waits until the watermark is at `round`, as a confirm would.
fn wait(store: &Store, round: Round) {
    let listener = Arc::new(TestListener::default());
    let dynamic: Arc<dyn WatermarkListener> = Arc::clone(&listener) as _;
    if store.when_durable(round, &dynamic) {
        let mut calls = listener.calls.lock();
        while calls.is_empty() {
            assert!(!listener.called.wait_for(&mut calls, LIMIT).timed_out(), "round {round} did not end");
        }
        assert!(calls[0] >= round);
    }
    assert!(store.watermark() >= round);
}

fn commit(store: &Store, round: Round) {
    wait(store, round);
    assert!(!store.is_failed(round), "{:?}", store.has_failed());
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < LIMIT, "it never happened that {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn read_range(store: &Store, queue: QueueId, from: QueueSeq, until: QueueSeq) -> Records {
    let mut records = Records::new();
    let end = store
        .read_records(queue, from, until, usize::MAX, &mut |seq, record| records.push((seq, record.to_vec())))
        .unwrap();
    assert_eq!(end, until);
    records
}

fn read_all(store: &Store, queue: QueueId) -> Records {
    read_range(store, queue, 0, QueueSeq::MAX)
}

/// Every note with a key below 0xff.
fn read_notes(store: &Store, owner: QueueId) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut notes = Vec::new();
    let mut each = |key: &[u8], value: &[u8]| notes.push((key.to_vec(), value.to_vec()));
    assert_eq!(store.read_notes(owner, b"", b"\xff", usize::MAX, &mut each), Ok(None));
    notes
}

fn numbered(range: std::ops::Range<QueueSeq>) -> Records {
    range.map(|seq| (seq, format!("record {seq}").into_bytes())).collect()
}

/// Everything durable that a store holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Contents {
    definitions: BTreeMap<Vec<u8>, Vec<u8>>,
    states: BTreeMap<QueueId, QueueStateRecord>,
    logs: BTreeMap<QueueId, BTreeMap<QueueSeq, Vec<u8>>>,
    consumed: BTreeMap<QueueId, Vec<(QueueSeq, QueueSeq)>>,
    notes: BTreeMap<QueueId, BTreeMap<Vec<u8>, Vec<u8>>>,
}

impl Contents {
    fn read(store: &Store, recovered: &Recovered, queues: impl Iterator<Item = QueueId>) -> Contents {
        let mut contents = Contents {
            definitions: recovered.definitions.iter().cloned().collect(),
            states: recovered.states.iter().copied().collect(),
            ..Contents::default()
        };
        for queue in queues {
            let log: BTreeMap<_, _> = read_all(store, queue).into_iter().collect();
            if !log.is_empty() {
                contents.logs.insert(queue, log);
            }
            let consumed = store.read_consumed(queue).unwrap();
            if !consumed.is_empty() {
                contents.consumed.insert(queue, consumed);
            }
            let notes: BTreeMap<_, _> = read_notes(store, queue).into_iter().collect();
            if !notes.is_empty() {
                contents.notes.insert(queue, notes);
            }
        }
        contents
    }
}
