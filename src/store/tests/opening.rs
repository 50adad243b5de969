//! Opening: locks, formats, ids, states.

use std::process::Command;

use super::*;

/// Tells the test below, run in a second process, what to open.
const CHILD_PATH: &str = "LEVERET_STORE_TEST_CHILD_PATH";

#[test]
fn a_second_instance_is_refused_by_name_and_told_what_to_do() {
    if let Some(path) = std::env::var_os(CHILD_PATH) {
        let error = Store::open(options(Path::new(&path))).err().unwrap();
        assert!(matches!(error, StoreError::InUse { .. }), "{error:?}");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let error = Store::open(options(directory.path())).err().unwrap();
    assert_eq!(error, StoreError::InUse { path: directory.path().to_owned() });
    let text = error.to_string();
    assert!(text.contains(&directory.path().display().to_string()) && text.contains("--data-dir"), "{text}");

    let (_, module) = module_path!().split_once("::").unwrap();
    let name = format!("{module}::a_second_instance_is_refused_by_name_and_told_what_to_do");
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &name])
        .env(CHILD_PATH, directory.path())
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && output.contains("1 passed"), "{output}");

    commit(&store, store.put_definition(vec![1], vec![2]));
    store.shutdown().unwrap();
    open(directory.path()).0.shutdown().unwrap();
}

#[test]
fn an_unknown_format_is_refused_and_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let put_format = |store: &Store, value: &[u8]| {
        store
            .rocks
            .with(|db| {
                let _: () = db.put_cf(db.cf_handle(key::META).unwrap(), key::FORMAT_KEY, value).unwrap();
                Ok(())
            })
            .unwrap();
    };
    let (store, _) = open(directory.path());
    put_format(&store, &7u64.to_be_bytes());
    store.shutdown().unwrap();
    for _ in 0..2 {
        let error = Store::open(options(directory.path())).err().unwrap();
        assert_eq!(error, StoreError::UnknownFormat { path: directory.path().to_owned(), found: 7, known: 3 });
    }
}

#[test]
fn a_later_versions_families_do_not_hide_its_format() {
    let directory = tempfile::tempdir().unwrap();
    {
        let mut later = rocksdb::Options::default();
        later.create_if_missing(true);
        later.create_missing_column_families(true);
        let db = rocksdb::DB::open_cf(&later, directory.path(), [key::META, "what comes next"]).unwrap();
        db.put_cf(db.cf_handle(key::META).unwrap(), key::FORMAT_KEY, 4u64.to_be_bytes()).unwrap();
    }
    let error = Store::open(options(directory.path())).err().unwrap();
    assert!(matches!(error, StoreError::UnknownFormat { found: 4, known: 3, .. }), "{error}");
}

/// Makes of a directory what a version without notes and bodies would have left.
fn downgrade(path: &Path) {
    let later = [key::NOTES, key::META_COPY, key::BODIES, key::BODY_REFERENCES];
    let families = ["default", key::META, key::LOG, key::STATE, key::CONSUMED].into_iter().chain(later);
    let mut options = rocksdb::Options::default();
    options.set_wal_recovery_mode(rocksdb::DBRecoveryMode::PointInTime);
    let mut db = rocksdb::DB::open_cf(&options, path, families).unwrap();
    later.into_iter().for_each(|family| db.drop_cf(family).unwrap());
    db.put_cf(db.cf_handle(key::META).unwrap(), key::FORMAT_KEY, 1u64.to_be_bytes()).unwrap();
}

fn stored_format(store: &Store) -> u64 {
    let read = |db: &rocksdb::DB| Ok(db.get_cf(db.cf_handle(key::META).unwrap(), key::FORMAT_KEY).unwrap().unwrap());
    u64::from_be_bytes(store.rocks.with(read).unwrap().try_into().unwrap())
}

#[test]
fn a_directory_without_notes_is_taken_over_and_then_refused_to_versions_that_know_none() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let queue = TestQueue::new(&store);
    let state = QueueStateRecord { tail: 100, message_count: 90, ..QueueStateRecord::default() };
    queue.append_all(&store, &numbered(0..100));
    queue.change(&store, [Change::Consumed(0, vec![(5, 15)]), Change::State(state)]);
    commit(&store, store.put_definition(b"kept".to_vec(), b"1".to_vec()));
    store.shutdown().unwrap();
    downgrade(directory.path());

    let (store, recovered) = open(directory.path());
    assert_eq!(stored_format(&store), 3, "a version that reads format 1 only refuses it from now on");
    assert_eq!(recovered.states, [(queue.id, state)]);
    assert_eq!(recovered.definitions, [(b"kept".to_vec(), b"1".to_vec())]);
    assert_eq!(read_all(&store, queue.id), numbered(0..100));
    assert_eq!(store.read_consumed(queue.id), Ok(vec![(5, 15)]));
    assert_eq!(read_notes(&store, queue.id), []);
    assert!(store.allocate_queue_id() > queue.id);
    let queue = TestQueue::with_id(queue.id);
    commit(&store, queue.change(&store, [Change::PutNote(b"key".to_vec(), b"value".to_vec())]));
    store.abandon();

    let (store, _) = open(directory.path());
    assert_eq!(stored_format(&store), 3);
    assert_eq!(read_notes(&store, queue.id), [(b"key".to_vec(), b"value".to_vec())]);
}

#[test]
fn ids_come_in_consecutive_blocks_too() {
    let directory = tempfile::tempdir().unwrap();
    let mut next = 1;
    for count in [1, 5, 10_000, 2, 4_096] {
        let (store, _) = open(directory.path());
        let first = store.allocate_queue_ids(count);
        assert!(first.0 >= next);
        next = first.0 + count;
        assert_eq!(store.allocate_queue_id(), QueueId(next));
        next += 1;
        commit(&store, store.open_round());
        store.abandon();
    }
}

#[test]
fn a_directory_that_cannot_be_made_is_named_with_the_reason() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    std::fs::write(&file, b"not a directory").unwrap();
    let error = Store::open(options(&file.join("data"))).err().unwrap();
    assert!(matches!(error, StoreError::Open { .. }), "{error:?}");
    assert!(error.to_string().contains("file/data"), "{error}");
}

#[test]
fn queue_ids_are_not_given_out_again() {
    let directory = tempfile::tempdir().unwrap();
    let mut last = QueueId(0);
    for (turn, count) in [1, 3, 5_000, 2, 10_000, 1].into_iter().enumerate() {
        let (store, recovered) = open(directory.path());
        assert!(recovered.next_queue_id > last.0);
        for index in 0..count {
            let id = store.allocate_queue_id();
            assert!(id > last);
            assert!(index > 0 || id.0 == recovered.next_queue_id);
            last = id;
        }
        match turn % 2 {
            0 => commit(&store, store.put_definition(vec![1], vec![2])), // and killed
            _ => store.shutdown().unwrap(),
        }
        store.abandon();
    }
}

#[test]
fn a_queue_id_whose_round_is_durable_is_reserved_with_it_at_the_latest() {
    let directory = tempfile::tempdir().unwrap();
    let hook = Arc::new(TestHook::default());
    let store = open_hooked(directory.path(), &hook);
    let ids: Vec<_> = (0..9_000).map(|_| store.allocate_queue_id()).collect();
    let queue = TestQueue::with_id(*ids.last().unwrap());
    let round = queue.change(&store, [Change::State(QueueStateRecord::default())]);
    commit(&store, round);
    commit(&store, store.delete_queue(queue.id));
    hook.hold();
    let held = store.open_round();
    hook.wait_for(held);
    let copy = directory.path().join("copy");
    std::fs::create_dir(&copy).unwrap();
    for entry in std::fs::read_dir(directory.path()).unwrap().map(Result::unwrap) {
        if entry.path().is_file() {
            std::fs::copy(entry.path(), copy.join(entry.file_name())).unwrap();
        }
    }
    hook.release();
    let (killed, recovered) = open(&copy);
    assert!(recovered.next_queue_id > queue.id.0);
    assert!(killed.allocate_queue_id() > queue.id);
}

#[test]
fn states_and_definitions_are_recovered_and_overwritten() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let queues: Vec<_> = (0..50).map(|_| TestQueue::new(&store)).collect();
    let state = |number: u64| QueueStateRecord {
        head: number * 1_000_000_007,
        delivered: number * 1_000_000_007 + number,
        tail: number * 1_000_000_007 + 2 * number,
        message_count: number,
        message_bytes: u64::MAX - number,
    };
    for queue in &queues {
        queue.change(&store, [Change::State(QueueStateRecord::default())]);
    }
    commit(&store, store.open_round());
    for (number, queue) in (0..).zip(&queues) {
        queue.change(&store, [Change::State(state(number))]);
        store.put_definition(format!("queue {number:02}").into_bytes(), vec![0; number as usize * 1000]);
    }
    commit(&store, store.open_round());
    store.abandon();
    let (_store, recovered) = open(directory.path());
    let expected: Vec<_> = (0..).zip(&queues).map(|(number, queue)| (queue.id, state(number))).collect();
    assert_eq!(recovered.states, expected);
    assert_eq!(recovered.definitions.len(), 50);
    assert!(recovered.definitions.is_sorted());
}

#[test]
fn a_damaged_state_is_rebuilt_from_the_log() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let (queue, fine) = (TestQueue::new(&store), TestQueue::new(&store));
    let state = QueueStateRecord { head: 7, delivered: 9, tail: 20, message_count: 12, message_bytes: 1 };
    fine.change(&store, [Change::State(state)]);
    queue.append_all(&store, &numbered(5..20));
    queue.change(&store, [Change::Consumed(0, vec![(5, 7), (10, 11)]), Change::State(state)]);
    commit(&store, store.open_round());
    store
        .rocks
        .with(|db| {
            let _: () = db.put_cf(db.cf_handle(key::STATE).unwrap(), key::queue(queue.id), b"\x01junk").unwrap();
            Ok(())
        })
        .unwrap();
    store.shutdown().unwrap();

    let (store, recovered) = open(directory.path());
    let bytes = numbered(7..20).iter().map(|(_, record)| record.len() as u64).sum::<u64>() - b"record 10".len() as u64;
    let rebuilt = QueueStateRecord { head: 7, delivered: 20, tail: 20, message_count: 12, message_bytes: bytes };
    assert_eq!(recovered.states, [(queue.id, rebuilt), (fine.id, state)]);
    assert_eq!(store.stats().damaged_records, 1);
}

#[test]
fn an_empty_store_opens_quickly() {
    let directory = tempfile::tempdir().unwrap();
    let start = Instant::now();
    for _ in 0..5 {
        open(directory.path()).0.shutdown().unwrap();
    }
    assert!(start.elapsed() < Duration::from_secs(5), "{:?} for five starts", start.elapsed());
}
