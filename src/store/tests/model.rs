//! Random work with kills and torn logs in it, against a model: what is found afterwards is what some prefix of the
//! rounds wrote, no shorter than what was confirmed, and never half a round.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const QUEUES: u64 = 4;

#[derive(Clone, Debug)]
enum Step {
    /// Appends this many records after a gap.
    Append {
        queue: u64,
        gap: u64,
        count: u64,
        size: usize,
    },
    Page {
        queue: u64,
        count: u64,
    },
    Consume {
        queue: u64,
        segment: u64,
        ranges: Vec<(u64, u64)>,
    },
    State {
        queue: u64,
        number: u64,
    },
    DeleteSegments {
        queue: u64,
        from: u64,
        count: u64,
    },
    DeleteQueue {
        queue: u64,
    },
    PutNote {
        queue: u64,
        key: u8,
        size: usize,
    },
    DeleteNote {
        queue: u64,
        key: u8,
    },
    DeleteNotes {
        queue: u64,
        from: u8,
        count: u8,
    },
    Define {
        key: u8,
        value: Option<u8>,
    },
    /// Ends the round, and waits for it or not.
    Commit {
        wait: bool,
    },
    /// A round that fails before or after it is written, and is written after all.
    Fail {
        written: bool,
    },
    Kill,
    Restart,
    /// A kill that leaves the last WAL cut off, or with junk at its end, at this part of its length.
    Tear {
        part: u8,
        junk: bool,
    },
}

fn step() -> impl Strategy<Value = Step> {
    let queue = 0..QUEUES;
    let ranges = vec((0..40u64, 1..9u64), 0..4);
    prop_oneof![
        8 => (queue.clone(), prop_oneof![3 => Just(0u64), 1 => 1..3000u64], 1..50u64, prop_oneof![9 => 0..300usize, 1 => Just(70_000)])
            .prop_map(|(queue, gap, count, size)| Step::Append { queue, gap, count, size }),
        1 => (queue.clone(), 1..30u64).prop_map(|(queue, count)| Step::Page { queue, count }),
        2 => (queue.clone(), 0..4u64, ranges).prop_map(|(queue, segment, ranges)| Step::Consume { queue, segment, ranges }),
        2 => (queue.clone(), any::<u64>()).prop_map(|(queue, number)| Step::State { queue, number: number / 4 }),
        1 => (queue.clone(), 0..4u64, 0..3u64).prop_map(|(queue, from, count)| Step::DeleteSegments { queue, from, count }),
        1 => queue.clone().prop_map(|queue| Step::DeleteQueue { queue }),
        4 => (queue.clone(), 0..30u8, prop_oneof![9 => 0..300usize, 1 => Just(40_000)])
            .prop_map(|(queue, key, size)| Step::PutNote { queue, key, size }),
        2 => (queue.clone(), 0..30u8).prop_map(|(queue, key)| Step::DeleteNote { queue, key }),
        1 => (queue, 0..30u8, 0..9u8).prop_map(|(queue, from, count)| Step::DeleteNotes { queue, from, count }),
        2 => (0..6u8, any::<Option<u8>>()).prop_map(|(key, value)| Step::Define { key, value }),
        6 => any::<bool>().prop_map(|wait| Step::Commit { wait }),
        1 => any::<bool>().prop_map(|written| Step::Fail { written }),
        1 => Just(Step::Kill),
        1 => Just(Step::Restart),
        2 => (any::<u8>(), any::<bool>()).prop_map(|(part, junk)| Step::Tear { part, junk }),
    ]
}

/// A store, and what it should hold.
struct Subject {
    directory: tempfile::TempDir,
    /// The subdirectory that the store is in; kills move it on.
    generation: u32,
    hook: Arc<TestHook>,
    store: Arc<Store>,
    queues: Vec<Arc<TestQueue>>,
    /// The position after the last record of each queue.
    tails: BTreeMap<QueueId, QueueSeq>,
    /// Every id that was ever used.
    used: Vec<QueueId>,
    now: Contents,
    /// What was true at the start, and at the end of each round since.
    history: Vec<Contents>,
    /// How much of `history` must have happened: everything up to the last round that was waited for.
    confirmed: usize,
}

/// Memtables so small that the files are flushed, and the WALs recycled, while the test runs.
fn small(path: &Path, hook: &Arc<TestHook>) -> StoreOptions {
    let (linger, hook) = (Duration::from_secs(3600), Arc::clone(hook) as Arc<dyn CommitHook>);
    StoreOptions {
        write_buffer_bytes: 256 * 1024,
        linger,
        retry: Duration::from_millis(1),
        hook: Some(hook),
        ..options(path)
    }
}

impl Subject {
    fn new() -> Subject {
        let directory = tempfile::tempdir().unwrap();
        let hook = Arc::default();
        let (store, _) = Store::open(small(&directory.path().join("0"), &hook)).unwrap();
        let queues: Vec<_> = (0..QUEUES).map(|_| TestQueue::new(&store)).collect();
        Subject {
            directory,
            generation: 0,
            hook,
            store,
            tails: BTreeMap::new(),
            used: queues.iter().map(|queue| queue.id).collect(),
            queues,
            now: Contents::default(),
            history: vec![Contents::default()],
            confirmed: 0,
        }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join(self.generation.to_string())
    }

    fn run(&mut self, step: Step) {
        match step {
            Step::Append { queue, gap, count, size } => self.append(queue, gap, count, size),
            Step::Page { queue, count } => {
                let queue = &self.queues[queue as usize];
                let tail = self.tails.entry(queue.id).or_default();
                queue.change(&self.store, (*tail..*tail + count).map(|seq| Change::Page(seq, vec![9; 100])));
                *tail += count;
            }
            Step::Consume { queue, segment, ranges } => self.consume(queue, segment, &ranges),
            Step::State { queue, number } => {
                let state = QueueStateRecord {
                    head: number,
                    delivered: number + 1,
                    tail: number + 9,
                    message_count: number,
                    message_bytes: 3,
                };
                let queue = &self.queues[queue as usize];
                queue.change(&self.store, [Change::State(state)]);
                self.now.states.insert(queue.id, state);
            }
            Step::DeleteSegments { queue, from, count } => {
                let queue = &self.queues[queue as usize];
                queue.change(&self.store, [Change::DeleteSegments(from, from + count)]);
                self.now.delete(queue.id, from * SEGMENT_RECORDS..(from + count) * SEGMENT_RECORDS);
            }
            Step::DeleteQueue { queue } => self.delete_queue(queue as usize),
            Step::PutNote { queue, key, size } => {
                let queue = &self.queues[queue as usize];
                let value = vec![key.wrapping_add(size as u8); size];
                queue.change(&self.store, [Change::PutNote(vec![b'n', key], value.clone())]);
                self.now.notes.entry(queue.id).or_default().insert(vec![b'n', key], value);
            }
            Step::DeleteNote { queue, key } => {
                let queue = &self.queues[queue as usize];
                queue.change(&self.store, [Change::DeleteNote(vec![b'n', key])]);
                self.now.delete_notes(queue.id, key..key + 1);
            }
            Step::DeleteNotes { queue, from, count } => {
                let queue = &self.queues[queue as usize];
                let (first, end) = (vec![b'n', from], vec![b'n', from + count]);
                queue.change(&self.store, [Change::DeleteNotes(first, end)]);
                self.now.delete_notes(queue.id, from..from + count);
            }
            Step::Define { key, value: Some(value) } => {
                self.store.put_definition(vec![key], vec![value]);
                self.now.definitions.insert(vec![key], vec![value]);
            }
            Step::Define { key, value: None } => {
                self.store.delete_definition(vec![key]);
                self.now.definitions.remove(&vec![key]);
            }
            Step::Commit { wait } => self.commit(wait),
            Step::Fail { written } => self.fail(written),
            Step::Kill => {
                self.continue_on_copy();
                self.reopen(self.confirmed);
                assert!(self.store.allocate_queue_id() > *self.used.iter().max().unwrap());
            }
            Step::Restart => {
                self.store.open_round();
                self.history.push(self.now.clone());
                self.store.shutdown().unwrap();
                self.reopen(self.history.len() - 1);
            }
            Step::Tear { part, junk } => {
                self.continue_on_copy();
                self.tear_last_wal(part, junk);
                self.reopen(0);
                // Ids that were durable may be gone with the rest; in this test they are not to come back.
                while self.store.allocate_queue_id() < *self.used.iter().max().unwrap() {}
            }
        }
    }

    fn append(&mut self, queue: u64, gap: u64, count: u64, size: usize) {
        let queue = &self.queues[queue as usize];
        let tail = self.tails.entry(queue.id).or_default();
        *tail += gap;
        let count = if size > 1000 { 2 } else { count };
        let records: Records =
            (*tail..*tail + count).map(|seq| (seq, vec![seq as u8; size + seq as usize % 5])).collect();
        *tail += count;
        queue.append_all(&self.store, &records);
        self.now.logs.entry(queue.id).or_default().extend(records);
    }

    fn consume(&mut self, queue: u64, segment: u64, ranges: &[(u64, u64)]) {
        let queue = &self.queues[queue as usize];
        let start = segment * SEGMENT_RECORDS;
        let mut end = start;
        let mut set = Vec::new();
        for &(gap, length) in ranges {
            let from = end + gap + u64::from(!set.is_empty());
            end = from + length;
            set.push((from, end));
        }
        queue.change(&self.store, [Change::Consumed(segment, set.clone())]);
        self.now.replace_consumed(queue.id, start..start + SEGMENT_RECORDS, set);
    }

    /// The queue is gone for good, and another one takes its place.
    fn delete_queue(&mut self, index: usize) {
        let fresh = TestQueue::new(&self.store);
        self.used.push(fresh.id);
        let old = std::mem::replace(&mut self.queues[index], fresh);
        self.store.delete_queue(old.id);
        self.now.states.remove(&old.id);
        self.now.logs.remove(&old.id);
        self.now.consumed.remove(&old.id);
        self.now.notes.remove(&old.id);
    }

    fn commit(&mut self, wait: bool) {
        let round = self.store.open_round();
        self.history.push(self.now.clone());
        if wait {
            commit(&self.store, round);
            self.confirmed = self.history.len() - 1;
        } else {
            // Under way at least; what comes next is in a later round.
            let nobody: Arc<dyn WatermarkListener> = Arc::new(TestListener::default());
            self.store.when_durable(round, &nobody);
            eventually("the next round is open", || self.store.open_round() > round);
        }
    }

    /// What was in the failed round counts as written as soon as the store is back at work.
    fn fail(&mut self, written: bool) {
        match written {
            true => self.hook.fail_after_with("asked for by the test"),
            false => self.hook.fail_with("asked for by the test"),
        }
        let round = self.store.open_round();
        self.history.push(self.now.clone());
        wait(&self.store, round);
        assert!(self.store.is_failed(round));
        eventually("the store is back at work", || !self.store.is_failing());
        self.confirmed = self.history.len() - 1;
    }

    /// What a kill leaves behind, while the store that is killed still has its files open: preallocated and recycled
    /// WALs have their whole length then.
    fn continue_on_copy(&mut self) {
        let from = self.path();
        self.generation += 1;
        copy_when_quiet(&from, &self.path());
        self.store.abandon();
        std::fs::remove_dir_all(&from).unwrap();
    }

    fn tear_last_wal(&self, part: u8, junk: bool) {
        let logs = listing(&self.path()).into_iter().filter(|(path, _)| path.extension().is_some_and(|e| e == "log"));
        let (last, _) = logs.max().unwrap();
        let mut bytes = std::fs::read(&last).unwrap();
        let keep = bytes.len() * usize::from(part) / 255;
        match junk {
            true => bytes[keep..].iter_mut().for_each(|byte| *byte = byte.wrapping_mul(31).wrapping_add(7)),
            false => bytes.truncate(keep),
        }
        std::fs::write(&last, bytes).unwrap();
    }

    /// The store now holds what was true after some round, and not before round `at_least` of the history.
    fn reopen(&mut self, at_least: usize) {
        let (store, recovered) = Store::open(small(&self.path(), &self.hook)).unwrap();
        let found = Contents::read(&store, &recovered, self.used.iter().copied());
        assert!(
            self.history[at_least..].contains(&found),
            "none of {:#?}\nbut {found:#?}",
            self.history[at_least..].iter().collect::<Vec<_>>()
        );
        assert_eq!(store.stats().damaged_records, 0);
        self.store = store;
        self.now = found.clone();
        self.history = vec![found];
        self.confirmed = 0;
        for queue in &mut self.queues {
            *queue = TestQueue::with_id(queue.id);
        }
    }
}

impl Contents {
    fn delete(&mut self, queue: QueueId, range: std::ops::Range<QueueSeq>) {
        if let Some(log) = self.logs.get_mut(&queue) {
            log.retain(|seq, _| !range.contains(seq));
            if log.is_empty() {
                self.logs.remove(&queue);
            }
        }
        self.replace_consumed(queue, range, vec![]);
    }

    fn delete_notes(&mut self, queue: QueueId, range: std::ops::Range<u8>) {
        if let Some(notes) = self.notes.get_mut(&queue) {
            notes.retain(|key, _| !range.contains(&key[1]));
            if notes.is_empty() {
                self.notes.remove(&queue);
            }
        }
    }

    fn replace_consumed(&mut self, queue: QueueId, range: std::ops::Range<QueueSeq>, by: Vec<(QueueSeq, QueueSeq)>) {
        let kept = self.consumed.remove(&queue).unwrap_or_default().into_iter().flat_map(|(from, until)| from..until);
        let mut positions: Vec<_> = kept.filter(|seq| !range.contains(seq)).collect();
        positions.extend(by.into_iter().flat_map(|(from, until)| from..until));
        positions.sort_unstable();
        let ranges: Vec<_> =
            positions.chunk_by(|a, b| a + 1 == *b).map(|run| (run[0], run[run.len() - 1] + 1)).collect();
        if !ranges.is_empty() {
            self.consumed.insert(queue, ranges);
        }
    }
}

/// Files and their lengths; without the pages, which are of no use after a kill.
fn listing(directory: &Path) -> BTreeMap<PathBuf, u64> {
    let entries = std::fs::read_dir(directory).unwrap().map(Result::unwrap);
    let files = entries.filter_map(|entry| Some((entry.path(), entry.metadata().ok().filter(|m| m.is_file())?.len())));
    files.collect()
}

/// Copies until no flush or compaction came between.
fn copy_when_quiet(from: &Path, to: &Path) {
    eventually("the store is quiet for long enough to copy its files", || {
        let before = listing(from);
        let _ = std::fs::remove_dir_all(to);
        std::fs::create_dir(to).unwrap();
        let copied = before.keys().all(|path| std::fs::copy(path, to.join(path.file_name().unwrap())).is_ok());
        copied && listing(from) == before
    });
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn after_any_kill_a_prefix_of_the_rounds_is_there(steps in vec(step(), 1..60)) {
        let mut subject = Subject::new();
        for step in steps {
            subject.run(step);
        }
        subject.run(Step::Commit { wait: true });
        subject.run(Step::Kill);
    }
}
