//! Random work with kills in it, against a sorted map.

use proptest::{collection::vec, prelude::*};

use super::*;

#[derive(Clone, Debug)]
enum Step {
    Push {
        after_ms: u64,
        size: usize,
        count: u64,
    },
    /// Time passes, and at most so many are taken.
    Take {
        ms: u64,
        max: usize,
    },
    Cancel {
        part: u8,
    },
    List {
        part: u8,
        limit: usize,
    },
    Clear,
    Commit,
    Kill,
}

fn step() -> impl Strategy<Value = Step> {
    let size = prop_oneof![20 => 0..200usize, 1 => Just(20_000)];
    let after_ms = prop_oneof![6 => 0..3_000u64, 2 => 0..100u64, 1 => 0..100_000_000u64];
    let max = prop_oneof![2 => Just(MANY), 1 => 1..50usize];
    prop_oneof![
        12 => (after_ms, size, 1..30u64).prop_map(|(after_ms, size, count)| Step::Push { after_ms, size, count }),
        8 => (0..800u64, max).prop_map(|(ms, max)| Step::Take { ms, max }),
        3 => any::<u8>().prop_map(|part| Step::Cancel { part }),
        2 => (any::<u8>(), 0..40usize).prop_map(|(part, limit)| Step::List { part, limit }),
        1 => Just(Step::Clear),
        5 => Just(Step::Commit),
        2 => Just(Step::Kill),
    ]
}

type Waiting = BTreeMap<DelayId, String>;

struct Subject {
    directory: tempfile::TempDir,
    store: Arc<Store>,
    delays: Arc<Delays>,
    after_ms: u64,
    next_serial: u64,
    waiting: Waiting,
    /// As of the last round that was waited for.
    committed: (Waiting, u64),
}

impl Subject {
    fn new() -> Subject {
        let directory = tempfile::tempdir().unwrap();
        let store = open(directory.path());
        let delays = fresh(&store, SMALL);
        let (waiting, committed) = Default::default();
        Subject { directory, store, delays, after_ms: 0, next_serial: 0, waiting, committed }
    }

    fn run(&mut self, step: Step) {
        match step {
            Step::Push { after_ms, size, count } => {
                for number in 0..count {
                    let due = NOW + self.after_ms + after_ms * (number + 1) / count;
                    let id = DelayId { due_unix_ms: due, serial: self.next_serial };
                    let body =
                        format!("{}{}", self.next_serial, "x".repeat(if number == 0 { size } else { size % 200 }));
                    with_message(&body, |message| self.delays.push_at(NOW + self.after_ms, due, message));
                    self.waiting.insert(id, body);
                    self.next_serial += 1;
                }
            }
            Step::Take { ms, max } => {
                if self.delays.state.lock().clearing != Clearing::No {
                    self.run(Step::Commit); // nothing is read before that
                }
                self.after_ms += ms;
                let now = NOW + self.after_ms;
                let due: Vec<_> = self.waiting.range(..DelayId { due_unix_ms: now + 1, serial: 0 }).take(max).collect();
                let expected: Vec<_> = due.iter().map(|(_, body)| (*body).clone()).collect();
                let ids: Vec<_> = due.iter().map(|(id, _)| **id).collect();
                assert_eq!(take_up_to(&self.delays, self.after_ms, max), expected);
                ids.iter().for_each(|id| drop(self.waiting.remove(id)));
            }
            Step::Cancel { part } => {
                if let Some(id) = self.pick(part) {
                    assert!(self.delays.cancel(id));
                    assert!(!self.delays.cancel(id));
                    self.waiting.remove(&id);
                }
            }
            Step::List { part, limit } => {
                let from = self.pick(part).unwrap_or(DelayId::START);
                let expected: Vec<_> =
                    self.waiting.range(from..).take(limit).map(|(id, body)| (*id, body.clone())).collect();
                let listed = self.delays.list(from, limit);
                assert_eq!(listed.iter().map(|delayed| delayed.id).zip(bodies(&listed)).collect::<Vec<_>>(), expected);
            }
            Step::Clear => {
                assert_eq!(self.delays.clear(), self.waiting.len() as u64);
                self.waiting.clear();
            }
            Step::Commit => {
                commit(&self.store);
                self.committed = (self.waiting.clone(), self.next_serial);
                let largest = self.waiting.values().map(String::len).max().unwrap_or(0) + 200;
                // While the store is read, what has become durable meanwhile is kept.
                eventually("memory within its limit", || self.delays.resident_bytes() <= SMALL.window_bytes + largest);
            }
            Step::Kill => {
                self.store.abandon();
                self.store = open(self.directory.path());
                self.delays = recovered(&self.store, SMALL);
                (self.waiting, self.next_serial) = self.committed.clone();
            }
        }
        assert_eq!(self.delays.len(), self.waiting.len() as u64);
        if let Some((first, _)) = self.waiting.first_key_value() {
            let idle = {
                let state = self.delays.state.lock();
                state.loading.is_none() && state.clearing == Clearing::No
            };
            assert!(!idle || self.delays.next_due().is_some_and(|due| due <= first.due_unix_ms));
        }
    }

    fn pick(&self, part: u8) -> Option<DelayId> {
        self.waiting.keys().nth(self.waiting.len() * usize::from(part) / 256).copied()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_waits_is_what_a_sorted_map_says(steps in vec(step(), 1..80)) {
        let mut subject = Subject::new();
        for step in steps {
            subject.run(step);
        }
        subject.run(Step::Commit);
        subject.run(Step::Kill);
        subject.run(Step::Take { ms: 200_000_000, max: MANY });
        subject.run(Step::Commit);
        assert_eq!(notes(&subject.store).len(), usize::from(subject.next_serial > 0));
    }
}
