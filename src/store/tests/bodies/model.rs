//! Random fan-out, consumption, deletion and kills, against queues as their owners know them: every count is right, and no
//! body outlives the last position that ends with it.

use std::collections::BTreeSet;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

const QUEUES: usize = 4;

#[derive(Clone, Debug)]
enum Step {
    /// A body to the queues of these bits, after gaps.
    Publish {
        queues: u8,
        size: usize,
        gap: u64,
    },
    /// A short record to a queue.
    Append {
        queue: usize,
    },
    /// So many of the oldest unconsumed positions are consumed.
    ConsumeFront {
        queue: usize,
        count: usize,
    },
    /// Every so-manieth of the unconsumed positions is consumed.
    ConsumeSome {
        queue: usize,
        step: usize,
    },
    Delete {
        queue: usize,
    },
    Commit,
    /// As if killed after the last commit.
    Kill,
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let queue = 0..QUEUES;
    prop_oneof![
        8 => (1..16u8, prop_oneof![0..50usize, Just(20_000), Just(300_000)], prop_oneof![4 => Just(0u64), 1 => 0..3000u64])
            .prop_map(|(queues, size, gap)| Step::Publish { queues, size: size + 1, gap }),
        2 => queue.clone().prop_map(|queue| Step::Append { queue }),
        4 => (queue.clone(), 1..6usize).prop_map(|(queue, count)| Step::ConsumeFront { queue, count }),
        3 => (queue.clone(), 2..4usize).prop_map(|(queue, step)| Step::ConsumeSome { queue, step }),
        1 => queue.prop_map(|queue| Step::Delete { queue }),
        5 => Just(Step::Commit),
        1 => Just(Step::Kill),
        1 => Just(Step::Restart),
    ]
}

/// A queue as its owner knows it.
#[derive(Clone, Debug, Default)]
struct Model {
    records: BTreeMap<QueueSeq, Vec<u8>>,
    consumed: BTreeSet<QueueSeq>,
    tail: QueueSeq,
    /// Segments that are deleted in the store.
    deleted: u64,
}

impl Model {
    fn head(&self) -> QueueSeq {
        self.records.first_key_value().map_or(self.tail, |(seq, _)| *seq)
    }

    /// What a queue contributes to its round when some positions were consumed.
    fn consume(&mut self, positions: &[QueueSeq]) -> Vec<Change> {
        for seq in positions {
            self.records.remove(seq);
            self.consumed.insert(*seq);
        }
        let head = self.head();
        self.consumed.retain(|seq| *seq >= head);
        let mut segments: BTreeMap<u64, Vec<(QueueSeq, QueueSeq)>> = BTreeMap::new();
        for &seq in &self.consumed {
            let ranges = segments.entry(seq / SEGMENT_RECORDS).or_default();
            match ranges.last_mut() {
                Some((_, until)) if *until == seq => *until += 1,
                _ => ranges.push((seq, seq + 1)),
            }
        }
        let mut changes: Vec<_> =
            segments.into_iter().map(|(segment, ranges)| Change::Consumed(segment, ranges)).collect();
        if head / SEGMENT_RECORDS > self.deleted {
            changes.push(Change::DeleteSegments(self.deleted, head / SEGMENT_RECORDS));
            self.deleted = head / SEGMENT_RECORDS;
        }
        changes.push(state(head, self.tail));
        changes
    }
}

struct Subject {
    directory: tempfile::TempDir,
    store: Arc<Store>,
    queues: Vec<(Arc<TestQueue>, Model)>,
    committed: Vec<(QueueId, Model)>,
    bodies: u64,
}

impl Subject {
    fn new() -> Subject {
        let directory = tempfile::tempdir().unwrap();
        let (store, _) = Store::open(Subject::options(directory.path())).unwrap();
        let queues: Vec<_> = (0..QUEUES).map(|_| (TestQueue::new(&store), Model::default())).collect();
        let committed = queues.iter().map(|(queue, model)| (queue.id, model.clone())).collect();
        Subject { directory, store, queues, committed, bodies: 0 }
    }

    /// Small memtables, so that files are flushed; and no round before it is asked for.
    fn options(path: &Path) -> StoreOptions {
        StoreOptions { write_buffer_bytes: 256 * 1024, linger: Duration::from_secs(3600), ..options(path) }
    }

    fn run(&mut self, step: Step) {
        match step {
            Step::Publish { queues, size, gap } => {
                self.bodies += 1;
                let large = body(self.bodies, size);
                for (index, (queue, model)) in self.queues.iter_mut().enumerate() {
                    if queues & 1 << index == 0 {
                        continue;
                    }
                    // A gap is what was consumed before its round.
                    model.consumed.extend(model.tail..model.tail + gap);
                    let seq = model.tail + gap;
                    model.tail = seq + 1;
                    model.records.extend([whole(seq, &large)]);
                    queue.change(&self.store, [append(seq, &large)]);
                    queue.change(&self.store, model.consume(&[]));
                }
            }
            Step::Append { queue } => {
                let (queue, model) = &mut self.queues[queue];
                let seq = model.tail;
                model.tail += 1;
                model.records.insert(seq, vec![1, 2, 3]);
                queue.change(&self.store, [Change::Append(seq, vec![1, 2, 3]), state(model.head(), model.tail)]);
            }
            Step::ConsumeFront { queue, count } => {
                self.consume(queue, |all| all.into_iter().take(count).collect());
            }
            Step::ConsumeSome { queue, step } => {
                self.consume(queue, |all| all.into_iter().skip(1).step_by(step).collect());
            }
            Step::Delete { queue } => {
                let fresh = (TestQueue::new(&self.store), Model::default());
                let (old, _) = std::mem::replace(&mut self.queues[queue], fresh);
                self.store.delete_queue(old.id);
            }
            Step::Commit => self.commit(),
            Step::Kill => {
                self.store.abandon();
                self.reopen();
            }
            Step::Restart => {
                self.store.shutdown().unwrap();
                self.committed = self.queues.iter().map(|(queue, model)| (queue.id, model.clone())).collect();
                self.reopen();
            }
        }
    }

    /// Of what is in a committed round, as a queue does: what is consumed before is not given to a round at all.
    fn consume(&mut self, queue: usize, choose: impl FnOnce(Vec<QueueSeq>) -> Vec<QueueSeq>) {
        self.commit();
        let (queue, model) = &mut self.queues[queue];
        let chosen = choose(model.records.keys().copied().collect());
        let changes = model.consume(&chosen);
        queue.change(&self.store, changes);
    }

    fn commit(&mut self) {
        commit(&self.store, self.store.open_round());
        self.committed = self.queues.iter().map(|(queue, model)| (queue.id, model.clone())).collect();
        self.check();
    }

    fn reopen(&mut self) {
        self.store = Store::open(Subject::options(self.directory.path())).unwrap().0;
        self.queues = self.committed.iter().map(|(id, model)| (TestQueue::with_id(*id), model.clone())).collect();
        commit(&self.store, self.store.open_round());
        self.check();
    }

    fn check(&self) {
        let shared = Shared::read(&self.store);
        shared.check();
        for (queue, model) in &self.queues {
            let mut read: BTreeMap<_, _> =
                read_range(&self.store, queue.id, model.head(), model.tail).into_iter().collect();
            read.retain(|seq, _| !model.consumed.contains(seq));
            assert!(read == model.records, "{:?} instead of {:?}", read.keys(), model.records.keys());
        }
        let held = |(queue, seq): &(QueueId, QueueSeq)| {
            self.queues.iter().any(|(owner, model)| owner.id == *queue && model.records.contains_key(seq))
        };
        assert!(shared.references.keys().all(held), "a consumed position still holds a body");
        assert_eq!(self.store.stats().damaged_records, 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn counts_agree_with_a_model_whatever_is_consumed_deleted_and_killed(steps in vec(step(), 1..60)) {
        let mut subject = Subject::new();
        for step in steps {
            subject.run(step);
        }
        subject.run(Step::Commit);
        for queue in 0..QUEUES {
            subject.run(Step::ConsumeFront { queue, count: usize::MAX });
        }
        subject.run(Step::Commit);
        assert!(Shared::read(&subject.store).is_empty());
    }
}
