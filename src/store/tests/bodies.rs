//! Bodies that records have in common: stored once, counted right, and gone with the last record that ends with them.

mod model;

use super::*;

fn head(seq: QueueSeq) -> Vec<u8> {
    format!("head of {seq} ").into_bytes()
}

fn body(number: u64, bytes: usize) -> Bytes {
    // Nothing that compresses.
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..bytes).map(next).collect()
}

fn whole(seq: QueueSeq, body: &Bytes) -> (QueueSeq, Vec<u8>) {
    (seq, [&head(seq)[..], body].concat())
}

fn append(seq: QueueSeq, body: &Bytes) -> Change {
    Change::AppendWithBody(seq, head(seq), body.clone())
}

/// A state with this much consumed.
fn state(head: QueueSeq, tail: QueueSeq) -> Change {
    Change::State(QueueStateRecord { head, delivered: head, tail, message_count: tail - head, message_bytes: 0 })
}

/// What stands in the families: the bodies by id with their counts, and what refers to them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Shared {
    bodies: BTreeMap<u64, (Bytes, u64)>,
    references: BTreeMap<(QueueId, QueueSeq), u64>,
    /// Queues whose references are not yet let go of.
    unfinished: usize,
}

impl Shared {
    fn read(store: &Store) -> Shared {
        let mut shared = Shared::default();
        let number = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().unwrap());
        let read = |db: &rocksdb::DB| {
            let all = |family| db.iterator_cf(db.cf_handle(family).unwrap(), rocksdb::IteratorMode::Start);
            for (key, value) in all(key::BODIES).map(Result::unwrap) {
                shared.bodies.insert(number(&key), (Bytes::from(value), 0));
            }
            for (key, value) in all(key::BODY_REFERENCES).map(Result::unwrap) {
                match key::parse_body_reference(&key) {
                    _ if key::parse_body_release(&key).is_some() => shared.unfinished += 1,
                    Some(place) => drop(shared.references.insert(place, number(&value[5..]))),
                    None => shared.bodies.get_mut(&number(&key[1..])).unwrap().1 = number(&value[5..]),
                }
            }
            Ok(())
        };
        store.rocks.with(read).unwrap();
        shared
    }

    /// Every count is right, and there is no body without a reference or the reverse.
    fn check(&self) {
        let mut counts: BTreeMap<u64, u64> = BTreeMap::new();
        self.references.values().for_each(|id| *counts.entry(*id).or_default() += 1);
        let stored: BTreeMap<u64, u64> = self.bodies.iter().map(|(id, (_, count))| (*id, *count)).collect();
        assert_eq!(counts, stored);
    }

    fn is_empty(&self) -> bool {
        *self == Shared::default()
    }
}

impl Store {
    /// Bodies that are stored apart, and references to them. Fails the test if they do not agree.
    pub(crate) fn body_counts(&self) -> (usize, usize) {
        let shared = Shared::read(self);
        shared.check();
        (shared.bodies.len(), shared.references.len())
    }
}

fn corrupt(store: &Store, family: &str, key: &[u8], change: impl FnOnce(&mut Vec<u8>)) {
    let write = |db: &rocksdb::DB| {
        let family = db.cf_handle(family).unwrap();
        let mut value = db.get_cf(family, key).unwrap().unwrap();
        change(&mut value);
        db.put_cf(family, key, value).unwrap();
        Ok(())
    };
    store.rocks.with(write).unwrap();
}

/// A store with one body in `count` queues, at position 0, followed by a short record in each.
fn fanned_out(directory: &Path, count: u64, body: &Bytes) -> (Arc<Store>, Vec<Arc<TestQueue>>) {
    let (store, _) = open(directory);
    let queues: Vec<_> = (0..count).map(|_| TestQueue::new(&store)).collect();
    let one_round = store.atomic();
    for queue in &queues {
        queue.change(&store, [append(0, body), Change::Append(1, b"short".to_vec()), state(0, 2)]);
    }
    drop(one_round);
    commit(&store, store.open_round());
    (store, queues)
}

#[test]
fn a_body_in_many_queues_is_stored_once_until_the_last_lets_go_across_restarts() {
    let directory = tempfile::tempdir().unwrap();
    let large = body(1, 200_000);
    let (mut store, mut queues) = fanned_out(directory.path(), 20, &large);
    assert!(store.stats().bytes_written < 250_000, "{}", store.stats().bytes_written);
    for consumed in 0..20 {
        if consumed % 7 == 3 {
            store.abandon();
            store = open(directory.path()).0;
            queues = queues.iter().map(|queue| TestQueue::with_id(queue.id)).collect();
        }
        let shared = Shared::read(&store);
        shared.check();
        assert_eq!(shared.references.len(), 20 - consumed);
        assert!(shared.bodies.values().all(|(bytes, _)| *bytes == large) && shared.bodies.len() == 1);
        let queue = &queues[consumed];
        assert_eq!(read_all(&store, queue.id), [whole(0, &large), (1, b"short".to_vec())]);
        commit(&store, queue.change(&store, [state(1, 2)]));
        assert_eq!(read_range(&store, queue.id, 1, 2), [(1, b"short".to_vec())]);
        // Consumed, so it is no damage that its body may be gone.
        read_range(&store, queue.id, 0, 2);
    }
    assert!(Shared::read(&store).is_empty());
    assert_eq!(store.stats().damaged_records, 0);
}

#[test]
fn a_body_of_one_record_stays_in_the_record() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let queue = TestQueue::new(&store);
    // The same bytes, but not the same memory; and the same memory, but not in the same round.
    let (first, second) = (body(1, 50_000), body(1, 50_000));
    commit(&store, queue.change(&store, [append(0, &first), append(1, &second), Change::Append(2, vec![7])]));
    commit(&store, queue.change(&store, [append(3, &first)]));
    assert!(Shared::read(&store).is_empty());
    let expected = [whole(0, &first), whole(1, &second), (2, vec![7]), whole(3, &first)];
    assert_eq!(read_all(&store, queue.id), expected);
}

#[test]
fn a_run_may_mix_whole_records_with_references() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let (queue, other) = (TestQueue::new(&store), TestQueue::new(&store));
    let (large, alone) = (body(1, 30_000), body(2, 20_000));
    let one_round = store.atomic();
    let mut changes = vec![Change::Append(0, b"a".to_vec()), append(1, &large), append(2, &alone)];
    changes.extend([Change::Append(5, b"b".to_vec()), append(6, &large), Change::Append(7, vec![])]);
    queue.change(&store, changes);
    other.change(&store, [append(9, &large)]);
    drop(one_round);
    commit(&store, store.open_round());
    let mut expected = vec![(0, b"a".to_vec()), whole(1, &large), whole(2, &alone)];
    expected.extend([(5, b"b".to_vec()), whole(6, &large), (7, vec![])]);
    assert_eq!(read_all(&store, queue.id), expected);
    assert_eq!(read_all(&store, other.id), [whole(9, &large)]);
    let shared = Shared::read(&store);
    shared.check();
    assert_eq!((shared.bodies.len(), shared.references.len()), (1, 3));
    let end = store.read_records(queue.id, 0, 8, 20_001, &mut |_, _| {}).unwrap();
    assert_eq!(end, 2, "a body counts for the limit");
}

#[test]
fn readers_at_the_same_time_share_the_memory_of_a_body() {
    let directory = tempfile::tempdir().unwrap();
    let (store, queues) = fanned_out(directory.path(), 5, &body(1, 50_000));
    let read = |queue: &TestQueue| {
        let mut found = None;
        let each = &mut |_, _: &[u8], body: Option<&Bytes>| found = body.cloned();
        store.read_split_records(queue.id, 0, 1, 1, each).unwrap();
        found.unwrap()
    };
    let bodies: Vec<Bytes> = queues.iter().map(|queue| read(queue)).collect();
    assert!(bodies.iter().all(|body| body.as_ptr() == bodies[0].as_ptr()));
    assert_eq!(bodies[0], body(1, 50_000));
    drop(bodies);
    assert_eq!(read(&queues[0]), body(1, 50_000));
}

#[test]
fn a_damaged_or_missing_body_costs_its_records_and_no_others() {
    let directory = tempfile::tempdir().unwrap();
    let (store, queues) = fanned_out(directory.path(), 2, &body(1, 50_000));
    let (id, _) = Shared::read(&store).bodies.pop_first().unwrap();
    corrupt(&store, key::BODIES, &key::body(id), |bytes| bytes[777] ^= 1);
    assert_eq!(read_all(&store, queues[0].id), [(1, b"short".to_vec())]);
    assert_eq!(store.stats().damaged_records, 1);
    let delete = |db: &rocksdb::DB| {
        db.delete_cf(db.cf_handle(key::BODIES).unwrap(), key::body(id)).unwrap();
        Ok(())
    };
    store.rocks.with(delete).unwrap();
    assert_eq!(read_all(&store, queues[1].id), [(1, b"short".to_vec())]);
    assert_eq!(store.stats().damaged_records, 2);
    // They are consumed like any others.
    for queue in &queues {
        queue.change(&store, [state(2, 2)]);
    }
    commit(&store, store.open_round());
    assert!(Shared::read(&store).is_empty());
}

#[test]
fn a_damaged_reference_or_count_keeps_a_body_and_loses_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let large = body(1, 50_000);
    let (store, queues) = fanned_out(directory.path(), 3, &large);
    let (id, _) = Shared::read(&store).bodies.pop_first().unwrap();
    corrupt(&store, key::BODY_REFERENCES, &key::body_reference(queues[0].id, 0), |value| value[9] ^= 1);
    corrupt(&store, key::BODY_REFERENCES, &key::body_count(id), |value| value[9] ^= 1);
    commit(&store, queues[0].change(&store, [state(2, 2)]));
    assert_eq!(store.stats().damaged_records, 1);
    commit(&store, queues[1].change(&store, [state(2, 2)]));
    assert_eq!(store.stats().damaged_records, 2);
    assert_eq!(read_all(&store, queues[2].id), [whole(0, &large), (1, b"short".to_vec())]);
}

#[test]
fn ids_of_bodies_are_not_given_out_twice_even_if_the_next_one_is_forgotten() {
    let directory = tempfile::tempdir().unwrap();
    let large = body(1, 50_000);
    let (store, queues) = fanned_out(directory.path(), 2, &large);
    corrupt(&store, key::META, key::NEXT_BODY_ID_KEY, |value| *value = 1u64.to_be_bytes().to_vec());
    store.shutdown().unwrap();
    let (store, _) = open(directory.path());
    let queues: Vec<_> = queues.iter().map(|queue| TestQueue::with_id(queue.id)).collect();
    let next = body(2, 50_000);
    let one_round = store.atomic();
    for queue in &queues {
        queue.change(&store, [append(2, &next), state(0, 3)]);
    }
    drop(one_round);
    commit(&store, store.open_round());
    assert_eq!(read_all(&store, queues[1].id), [whole(0, &large), (1, b"short".to_vec()), whole(2, &next)]);
}

#[test]
fn what_a_round_takes_back_itself_is_not_stored() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let queues: Vec<_> = (0..2).map(|_| TestQueue::new(&store)).collect();
    let (large, other) = (body(1, 50_000), body(2, 50_000));
    let one_round = store.atomic();
    for queue in &queues {
        queue.change(&store, [append(0, &large), state(0, 1)]);
        store.delete_queue(queue.id);
    }
    let survivors: Vec<_> = (0..2).map(|_| TestQueue::new(&store)).collect();
    for queue in &survivors {
        queue.change(&store, [append(0, &other), state(0, 1)]);
    }
    store.delete_queue(survivors[0].id);
    drop(one_round);
    commit(&store, store.open_round());
    let shared = Shared::read(&store);
    shared.check();
    assert_eq!(shared.references.keys().collect::<Vec<_>>(), [&(survivors[1].id, 0)]);
    assert_eq!(read_all(&store, survivors[1].id), [whole(0, &other)]);
}

#[test]
fn a_damaged_state_is_rebuilt_without_what_was_consumed() {
    let directory = tempfile::tempdir().unwrap();
    let (large, next) = (body(1, 50_000), body(2, 50_000));
    let (store, queues) = fanned_out(directory.path(), 2, &large);
    let one_round = store.atomic();
    for queue in &queues {
        queue.change(&store, [append(2, &next), state(1, 3)]);
    }
    drop(one_round);
    commit(&store, store.open_round());
    corrupt(&store, key::STATE, &key::queue(queues[0].id), |value| value[6] ^= 1);
    store.shutdown().unwrap();
    let (store, recovered) = open(directory.path());
    let rebuilt = QueueStateRecord {
        head: 1,
        delivered: 3,
        tail: 3,
        message_count: 2,
        message_bytes: (5 + head(2).len() + next.len()) as u64,
    };
    assert_eq!(recovered.states[0], (queues[0].id, rebuilt));
    assert_eq!(store.stats().damaged_records, 1, "the state");
}

#[test]
fn very_many_references_are_let_go_of_in_several_rounds_which_a_kill_may_interrupt() {
    const COUNT: u64 = 20_000;
    let directory = tempfile::tempdir().unwrap();
    // No round ends that nobody waits for.
    let patient = StoreOptions { linger: Duration::from_secs(3600), ..options(directory.path()) };
    let (store, _) = Store::open(patient).unwrap();
    let (purged, deleted, kept) = (TestQueue::new(&store), TestQueue::new(&store), TestQueue::new(&store));
    let bodies: Vec<Bytes> = (0..COUNT).map(|number| body(number, 10)).collect();
    let one_round = store.atomic();
    for queue in [&purged, &deleted, &kept] {
        let appends = bodies.iter().zip(0..).map(|(body, seq)| append(seq, body));
        queue.change(&store, appends.chain([state(0, COUNT)]));
    }
    drop(one_round);
    commit(&store, store.open_round());
    purged.change(&store, [state(COUNT, COUNT)]);
    let round = store.delete_queue(deleted.id);
    commit(&store, round);
    let shared = Shared::read(&store);
    shared.check();
    assert!(shared.references.len() > COUNT as usize && shared.unfinished == 2, "one round has let go of all");
    store.abandon();

    let (store, _) = open(directory.path());
    eventually("the rest is let go of", || Shared::read(&store).unfinished == 0);
    let shared = Shared::read(&store);
    shared.check();
    assert!(shared.references.keys().map(|(queue, _)| *queue).eq((0..COUNT).map(|_| kept.id)));
    assert_eq!(read_range(&store, kept.id, COUNT - 1, COUNT), [whole(COUNT - 1, &bodies[COUNT as usize - 1])]);
    commit(&store, store.delete_queue(kept.id));
    eventually("all of it is let go of", || Shared::read(&store).is_empty());
}

fn blob_bytes(directory: &Path) -> u64 {
    let files = std::fs::read_dir(directory).unwrap().map(Result::unwrap);
    let blobs = files.filter(|file| file.path().extension().is_some_and(|extension| extension == "blob"));
    blobs.filter_map(|file| Some(file.metadata().ok()?.len())).sum()
}

#[test]
fn sweeping_gives_back_a_single_body_whose_deletion_came_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let (store, queues) = fanned_out(directory.path(), 3, &body(1, 1 << 20));
    store.abandon();
    let (store, _) = open(directory.path());
    assert!((1 << 20..2 << 20).contains(&blob_bytes(directory.path())));
    let (id, _) = Shared::read(&store).bodies.pop_first().unwrap();
    let queues: Vec<_> = queues.iter().map(|queue| TestQueue::with_id(queue.id)).collect();
    for queue in &queues {
        commit(&store, queue.change(&store, [state(2, 2)]));
    }
    store.rocks.sweep_bodies(id, id);
    eventually("it is given back", || blob_bytes(directory.path()) == 0);
}

#[test]
fn sweeping_gives_the_space_of_bodies_back() {
    let directory = tempfile::tempdir().unwrap();
    let blobs = || blob_bytes(directory.path());
    let (store, _) = open(directory.path());
    let queues: Vec<_> = (0..3).map(|_| TestQueue::new(&store)).collect();
    for seq in 0..32 {
        let one_round = store.atomic();
        let large = body(seq, 1 << 20);
        for queue in &queues {
            queue.change(&store, [append(seq, &large), state(0, seq + 1)]);
        }
        drop(one_round);
        commit(&store, store.open_round());
    }
    let flush = |db: &rocksdb::DB| {
        db.flush_cf(db.cf_handle(key::BODIES).unwrap()).unwrap();
        Ok(())
    };
    store.rocks.with(flush).unwrap();
    assert!((32 << 20..36 << 20).contains(&blobs()), "{}", blobs());
    for queue in &queues {
        queue.change(&store, [state(24, 32)]);
    }
    commit(&store, store.open_round());
    let shared = Shared::read(&store);
    shared.check();
    assert_eq!(shared.bodies.len(), 8);
    let first = shared.bodies.first_key_value().map(|(id, _)| *id).unwrap();
    store.rocks.sweep_bodies(first - 24, first - 1);
    eventually("what is gone is given back", || blobs() < 16 << 20);
    assert_eq!(read_range(&store, queues[0].id, 31, 32), [whole(31, &body(31, 1 << 20))]);
    for queue in &queues {
        store.delete_queue(queue.id);
    }
    commit(&store, store.open_round());
    store.rocks.sweep_bodies(first, first + 7);
    store.rocks.sweep_references();
    eventually("all is given back", || blobs() == 0);
}
