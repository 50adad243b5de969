//! Disks that fail: what is refused meanwhile, what is kept, and how the store gets back to work.

use super::*;

/// A store that tries to get back to work every few milliseconds.
fn open_failing(path: &Path, hook: &Arc<TestHook>) -> Arc<Store> {
    let hook: Arc<dyn CommitHook> = Arc::clone(hook) as _;
    let retry = Duration::from_millis(5);
    Store::open(StoreOptions { hook: Some(hook), retry, ..options(path) }).unwrap().0
}

fn back_at_work(store: &Store) {
    eventually("the store is back at work", || !store.is_failing());
}

fn numbers(queue: &[(QueueSeq, Vec<u8>)]) -> Vec<QueueSeq> {
    queue.iter().map(|(seq, _)| *seq).collect()
}

#[test]
fn rounds_fail_until_the_disk_is_back_and_nothing_is_lost_meanwhile() {
    let directory = tempfile::tempdir().unwrap();
    let hook = Arc::new(TestHook::default());
    let store = open_failing(directory.path(), &hook);
    let (queue, other) = (TestQueue::new(&store), TestQueue::new(&store));
    let good = queue.append(&store, 0, b"good");
    commit(&store, good);

    hook.break_down("the disk says no");
    let bad = queue.append(&store, 1, b"bad");
    wait(&store, bad);
    assert!(store.is_failed(bad) && !store.is_failed(good));
    assert_eq!(store.has_failed().as_deref(), Some("the disk says no"));
    let meanwhile = [other.append(&store, 0, b"meanwhile"), store.put_definition(vec![1], vec![2])];
    meanwhile.iter().for_each(|round| wait(&store, *round));
    assert!(meanwhile.iter().all(|round| store.is_failed(*round)));
    eventually("it was tried in vain", || hook.seen().iter().filter(|seen| **seen == bad).count() >= 3);
    assert!(store.is_failing() && queue.endings() == [true], "the failed round has not ended yet");
    assert_eq!(numbers(&read_all(&store, queue.id)), [0], "what there is can be read");

    hook.mend();
    back_at_work(&store);
    commit(&store, queue.append(&store, 2, b"after"));
    assert!(store.is_failed(bad) && meanwhile.iter().all(|round| store.is_failed(*round)), "they stay failed");
    assert_eq!((queue.endings(), other.endings()), (vec![true; 3], vec![true]));
    assert!(store.stats().failed_rounds >= 2);
    store.abandon();

    let (store, recovered) = open(directory.path());
    assert_eq!(numbers(&read_all(&store, queue.id)), [0, 1, 2]);
    assert_eq!(numbers(&read_all(&store, other.id)), [0]);
    assert_eq!(recovered.definitions, [(vec![1], vec![2])]);
}

#[test]
fn a_round_whose_sync_failed_is_written_again_after_the_database_was_opened_anew() {
    let directory = tempfile::tempdir().unwrap();
    let hook = Arc::new(TestHook::default());
    let store = open_failing(directory.path(), &hook);
    let queue = TestQueue::new(&store);
    for failure in 0..3 {
        let first = failure * 10;
        hook.fail_after_with("fsync: Input/output error");
        let changes = [
            Change::Append(first, b"deleted".to_vec()),
            Change::Append(first + 1, b"kept".to_vec()),
            Change::PutNote(vec![1], vec![failure as u8]),
            Change::PutNote(vec![2], vec![1]),
            Change::DeleteNote(vec![2]),
            Change::Consumed(0, vec![(0, first + 1)]),
        ];
        let round = queue.change(&store, changes);
        wait(&store, round);
        assert!(store.is_failed(round));
        back_at_work(&store);
        commit(&store, queue.append(&store, first + 2, b"good"));
    }
    store.abandon();

    let (store, _) = open(directory.path());
    assert_eq!(numbers(&read_all(&store, queue.id)), [0, 1, 2, 10, 11, 12, 20, 21, 22]);
    assert_eq!(read_notes(&store, queue.id), [(vec![1], vec![2])]);
    assert_eq!(store.read_consumed(queue.id).unwrap(), [(0, 21)]);
    assert_eq!(store.stats().damaged_records, 0);
}

#[test]
fn who_waits_for_a_failed_round_can_wait_for_its_content_instead() {
    let directory = tempfile::tempdir().unwrap();
    let hook = Arc::new(TestHook::default());
    let store = open_failing(directory.path(), &hook);
    let queue = TestQueue::new(&store);
    hook.break_down("no");
    let bad = queue.append(&store, 0, b"bad");
    wait(&store, bad);
    let failing = store.renewed(bad);
    assert!(failing > bad);
    wait(&store, failing);
    assert!(store.is_failed(failing));
    hook.mend();
    back_at_work(&store);
    let renewed = store.renewed(bad);
    commit(&store, renewed);
    assert_eq!(store.renewed(renewed), renewed);
}

#[test]
fn the_listener_hears_of_a_failure_before_those_who_wait_and_of_its_end() {
    struct Listener(Arc<Mutex<Vec<(bool, Round)>>>, Mutex<Weak<Store>>);
    impl DiskListener for Listener {
        fn on_disk(&self, condition: DiskCondition) {
            assert!(condition.free_bytes.is_some() && condition.needed_bytes > 0);
            let watermark = self.1.lock().upgrade().map_or(0, |store| store.watermark());
            self.0.lock().push((condition.is_failing, watermark));
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let hook = Arc::new(TestHook::default());
    let store = open_failing(directory.path(), &hook);
    let heard = Arc::new(Mutex::default());
    let listener = Arc::new(Listener(Arc::clone(&heard), Mutex::new(Arc::downgrade(&store))));
    let dynamic: Weak<dyn DiskListener> = Arc::<Listener>::downgrade(&listener);
    store.watch_disk(dynamic);
    let queue = TestQueue::new(&store);
    hook.break_down("no");
    let bad = queue.append(&store, 0, b"bad");
    wait(&store, bad);
    assert!(heard.lock().iter().any(|(failing, watermark)| *failing && *watermark < bad), "{heard:?}");
    hook.mend();
    eventually("its end is heard of", || heard.lock().last().is_some_and(|(failing, _)| !failing));
    drop(listener);
}

#[test]
fn a_stop_tries_once_more_and_says_if_it_was_in_vain() {
    for mended in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let hook = Arc::new(TestHook::default());
        let dynamic: Arc<dyn CommitHook> = Arc::clone(&hook) as _;
        let retry = Duration::from_secs(3600);
        let store = Store::open(StoreOptions { hook: Some(dynamic), retry, ..options(directory.path()) }).unwrap().0;
        let queue = TestQueue::new(&store);
        commit(&store, queue.append(&store, 0, b"good"));
        hook.break_down("the disk says no");
        let bad = queue.append(&store, 1, b"bad");
        wait(&store, bad);
        if mended {
            hook.mend();
            assert_eq!(store.shutdown(), Ok(()));
        } else {
            let reason = "the disk says no".to_owned();
            assert_eq!(store.shutdown(), Err(StoreError::RoundFailed { round: store.watermark(), reason }));
        }
        let (store, _) = open(directory.path());
        assert_eq!(read_all(&store, queue.id).len(), 1 + usize::from(mended));
    }
}

#[test]
fn a_round_is_synced_if_anything_in_it_asks_for_that() {
    use Durability::{Fsync, Os};
    for default in [Fsync, Os] {
        let directory = tempfile::tempdir().unwrap();
        let hook = Arc::new(TestHook::default());
        let dynamic: Arc<dyn CommitHook> = Arc::clone(&hook) as _;
        let linger = Duration::from_secs(3600);
        let store =
            Store::open(StoreOptions { hook: Some(dynamic), durability: default, linger, ..options(directory.path()) });
        let store = store.unwrap().0;
        let queues = [Some(Os), Some(Fsync), None].map(|durability| {
            let queue = TestQueue::new(&store);
            queue.state.lock().durability = durability;
            queue
        });
        let mut seq = 0;
        let mut synced = |of: &[usize], define: bool| {
            seq += 1;
            let section = store.atomic();
            let mut round = store.open_round();
            of.iter().for_each(|index| round = queues[*index].append(&store, seq, b"x"));
            if define {
                round = store.put_definition(vec![1], vec![1]);
            }
            drop(section);
            commit(&store, round);
            hook.was_synced(round).unwrap()
        };
        assert!(!synced(&[0], false));
        assert!(synced(&[1], false));
        assert_eq!(synced(&[2], false), default == Fsync);
        assert!(synced(&[0, 1], false) && synced(&[1, 0], false));
        assert_eq!(synced(&[0, 2], false), default == Fsync);
        assert_eq!(synced(&[0], true), default == Fsync);
        assert!(!synced(&[], false), "an empty round needs no sync");
        store.abandon();
        let (store, _) = open(directory.path());
        assert_eq!(queues.each_ref().map(|queue| read_all(&store, queue.id).len()), [5, 3, 2]);
    }
}

#[test]
fn a_source_that_has_nothing_to_add_does_not_ask_for_a_sync() {
    let directory = tempfile::tempdir().unwrap();
    let hook = Arc::new(TestHook::default());
    let store = open_failing(directory.path(), &hook);
    let queue = TestQueue::new(&store);
    let round = queue.change(&store, []);
    commit(&store, round);
    assert_eq!(hook.was_synced(round), Some(false));
}

#[test]
fn records_that_cannot_be_paged_out_fail_nothing_and_are_taken_later() {
    let directory = tempfile::tempdir().unwrap();
    let hook = Arc::new(TestHook::default());
    let store = open_failing(directory.path(), &hook);
    let queue = TestQueue::new(&store);
    let obstacle = directory.path().join("pages");
    std::fs::write(&obstacle, b"in the way").unwrap();
    let page = |seq| Change::Page(seq, b"transient".to_vec());
    commit(&store, queue.change(&store, [Change::Append(0, b"durable".to_vec()), page(1)]));
    assert_eq!(queue.state.lock().failed_pagings, 1);
    assert_eq!(numbers(&read_all(&store, queue.id)), [0]);
    std::fs::remove_file(&obstacle).unwrap();
    eventually("pages are taken again", || {
        let before = queue.state.lock().failed_pagings;
        commit(&store, queue.change(&store, [page(1)]));
        queue.state.lock().failed_pagings == before
    });
    assert_eq!(numbers(&read_all(&store, queue.id)), [0, 1]);
}

#[test]
fn a_database_of_pages_that_has_given_up_is_replaced_and_still_read() {
    let directory = tempfile::tempdir().unwrap();
    let retry = Duration::from_millis(5);
    let options = StoreOptions { write_buffer_bytes: 256 * 1024, retry, ..options(directory.path()) };
    let (store, _) = Store::open(options).unwrap();
    let queue = TestQueue::new(&store);
    let record = |seq: QueueSeq| -> Vec<u8> {
        let noise = (0..2_000).map(|at: u64| (seq + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15 ^ at).to_be_bytes()[0]);
        noise.collect()
    };
    // Pages a record out until that succeeds; answers how often it did not.
    let page_out = |seq: QueueSeq| {
        let mut failures = 0;
        eventually("the record is paged out", || {
            let before = queue.state.lock().failed_pagings;
            commit(&store, queue.change(&store, [Change::Page(seq, record(seq))]));
            let failed = queue.state.lock().failed_pagings - before;
            failures += failed;
            failed == 0
        });
        failures
    };
    assert_eq!((0..10).map(page_out).sum::<u32>(), 0);
    std::fs::remove_dir_all(directory.path().join("pages")).unwrap();
    // The next flush finds no place for its file.
    let mut seq = 10;
    while page_out(seq) == 0 {
        seq += 1;
        assert!(seq < 10_000, "it never failed");
    }
    for seq in seq + 1..seq + 10 {
        page_out(seq);
    }
    let read = read_all(&store, queue.id);
    let expected: Records = (0..seq + 10).map(|seq| (seq, record(seq))).collect();
    assert!(read == expected, "{} of {} records", read.len(), expected.len());
    store.shutdown().unwrap();
}
