//! Rounds, the watermark and who waits for it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;

#[test]
fn what_a_source_holds_when_it_is_marked_is_readable_once_its_round_is_durable() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let queues: Vec<_> = (0..3).map(|_| (TestQueue::new(&store), Mutex::new(0u64))).collect();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (store, queues) = (&store, &queues);
            scope.spawn(move || {
                for turn in 0..150 {
                    let (queue, tail) = &queues[(thread + turn) % queues.len()];
                    let (seq, round) = {
                        let mut tail = tail.lock();
                        let seq = *tail;
                        *tail += 1;
                        (seq, queue.append(store, seq, format!("{thread} {turn}").as_bytes()))
                    };
                    commit(store, round);
                    let read = read_range(store, queue.id, seq, seq + 1);
                    assert_eq!(read, [(seq, format!("{thread} {turn}").into_bytes())]);
                }
            });
        }
    });
    let stats = store.stats();
    assert_eq!((stats.records_written, stats.failed_rounds), (600, 0));
    assert!(stats.rounds <= 600);
}

#[test]
fn nothing_arrives_while_the_sync_is_held_back_and_everything_after() {
    let directory = tempfile::tempdir().unwrap();
    let hook = Arc::new(TestHook::default());
    let store = open_hooked(directory.path(), &hook);
    let queue = TestQueue::new(&store);
    hook.hold();
    let first = queue.append(&store, 0, b"first");
    let listener = Arc::new(TestListener::default());
    assert!(store.when_durable(first, &(Arc::clone(&listener) as _)));
    hook.wait_for(first);
    // The next round gathers meanwhile.
    let second = queue.append(&store, 1, b"second");
    assert_eq!(second, first + 1);
    assert_eq!(queue.append(&store, 2, b"third"), second);
    assert!(store.when_durable(second, &(Arc::clone(&listener) as _)));
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!((store.watermark(), listener.calls.lock().len(), queue.endings()), (first - 1, 0, vec![]));
    assert_eq!(read_all(&store, queue.id), vec![]);

    hook.release();

    commit(&store, second);
    eventually("both calls arrive", || listener.calls.lock().len() == 2);
    assert_eq!(*listener.calls.lock(), [first, second]);
    assert_eq!(queue.endings(), [true, true]);
    assert_eq!(read_all(&store, queue.id).len(), 3);
}

#[test]
fn a_panic_while_a_source_is_drained_fails_the_round_and_not_the_thread() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let (bad, good) = (TestQueue::new(&store), TestQueue::new(&store));
    let section = store.atomic();
    let round = bad.change(&store, [Change::Append(0, vec![1]), Change::Panic]);
    assert_eq!(good.append(&store, 0, b"innocent"), round);
    drop(section);
    wait(&store, round);
    assert!(store.is_failed(round));
    assert_eq!((bad.endings(), good.endings()), (vec![false], vec![false]));
    let later = good.append(&store, 1, b"later");
    wait(&store, later);
    assert!(store.is_failed(later));
    assert_eq!(read_all(&store, good.id), vec![]);
}

#[test]
fn what_happens_in_an_atomic_section_is_in_one_round() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let stop = AtomicBool::new(false);
    let other = TestQueue::new(&store);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Ends rounds as fast as it can.
            for seq in 0.. {
                commit(&store, other.append(&store, seq, b"x"));
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        for thread in 0..2u64 {
            let (store, stop) = (&store, &stop);
            scope.spawn(move || {
                let queues: Vec<_> = (0..4).map(|_| TestQueue::new(store)).collect();
                for seq in 0..200 {
                    let section = store.atomic();
                    let mut rounds: Vec<_> = queues.iter().map(|queue| queue.append(store, seq, b"part")).collect();
                    rounds.push(store.put_definition(vec![thread as u8], seq.to_be_bytes().to_vec()));
                    std::thread::yield_now();
                    rounds.push(store.open_round());
                    drop(section);
                    assert!(rounds.iter().all(|round| *round == rounds[0]), "{rounds:?}");
                    if seq % 8 == 0 {
                        commit(store, rounds[0]);
                    }
                }
                stop.store(true, Ordering::Relaxed);
            });
        }
    });
}

#[test]
fn a_thread_may_enter_a_section_again_while_the_commit_thread_waits_for_the_first() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let (entered, done) = mpsc::channel();
    let nested = Arc::clone(&store);
    std::thread::spawn(move || {
        let queue = TestQueue::new(&nested);
        let outer = nested.atomic();
        let round = queue.append(&nested, 0, b"first");
        eventually("the commit thread waits for the section", || nested.committer.waits_for_sections());
        let inner = nested.atomic();
        assert_eq!(queue.append(&nested, 1, b"second"), round);
        drop(inner);
        assert_eq!(nested.open_round(), round, "the outer section is still held");
        drop(outer);
        entered.send((queue.id, round)).unwrap();
    });
    let (queue, round) = done.recv_timeout(LIMIT).expect("the second section was entered");
    commit(&store, round);
    assert_eq!(read_all(&store, queue).len(), 2);
    // Nobody is in a section any more: the next one stands in line again.
    commit(&store, store.open_round());
}

#[test]
fn definitions_take_effect_in_call_order_and_after_the_sources() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let queue = TestQueue::new(&store);
    let section = store.atomic();
    store.put_definition(b"kept".to_vec(), b"1".to_vec());
    store.put_definition(b"gone".to_vec(), b"2".to_vec());
    store.delete_definition(b"gone".to_vec());
    store.delete_definition(b"back".to_vec());
    store.put_definition(b"back".to_vec(), b"3".to_vec());
    store.put_definition(Vec::new(), b"empty key".to_vec());
    store.delete_queue(queue.id);
    let round = queue.change(
        &store,
        [
            Change::Append(0, b"late".to_vec()),
            Change::Page(1, b"late".to_vec()),
            Change::Consumed(0, vec![(0, 1)]),
            Change::State(QueueStateRecord { tail: 2, ..QueueStateRecord::default() }),
        ],
    );
    drop(section);
    commit(&store, round);
    assert_eq!(read_all(&store, queue.id), vec![]);
    assert_eq!(store.read_consumed(queue.id), Ok(vec![]));
    store.shutdown().unwrap();

    let (_store, recovered) = open(directory.path());
    let definitions: Vec<_> = recovered.definitions.iter().map(|(k, v)| (k.as_slice(), v.as_slice())).collect();
    assert_eq!(definitions, [(&b""[..], &b"empty key"[..]), (b"back", b"3"), (b"kept", b"1")]);
    assert_eq!(recovered.states, vec![]);
}

#[test]
fn an_open_round_is_committed_even_if_it_stays_empty() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let round = store.open_round();
    eventually("the empty round ends", || store.watermark() >= round);
    assert!(!store.is_failed(round));
    assert!(!store.is_failed(0));
}

#[test]
fn a_round_that_nobody_waits_for_lingers_and_a_waiter_ends_that() {
    let directory = tempfile::tempdir().unwrap();
    let linger = Duration::from_secs(3600);
    let (store, _) = Store::open(StoreOptions { linger, ..options(directory.path()) }).unwrap();
    let queue = TestQueue::new(&store);
    let round = queue.append(&store, 0, b"unhurried");
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(queue.append(&store, 1, b"same round"), round);
    assert_eq!(store.watermark(), 0);
    commit(&store, round);
    queue.append(&store, 2, b"at shutdown");
    store.shutdown().unwrap();
    assert_eq!(queue.endings(), [true, true]);
}

#[test]
fn async_waiters_are_woken_and_told_of_failures() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let hook = Arc::new(TestHook::default());
    let store = open_hooked(directory.path(), &hook);
    let queue = TestQueue::new(&store);
    runtime.block_on(async {
        assert_eq!(store.durable(0).await, Ok(()));
        hook.hold();
        let round = queue.append(&store, 0, b"one");
        let waiting: Vec<_> = (0..10)
            .map(|_| {
                let store = Arc::clone(&store);
                tokio::spawn(async move { store.durable(round).await })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(waiting.iter().all(|task| !task.is_finished()));
        hook.release();
        for task in waiting {
            assert_eq!(task.await.unwrap(), Ok(()));
        }
        hook.fail_with("full");
        let round = queue.append(&store, 1, b"two");
        let failed = Err(StoreError::RoundFailed { round, reason: "full".to_owned() });
        assert_eq!(store.durable(round).await, failed);
    });
}

#[test]
fn a_listener_is_called_once_and_not_at_all_if_it_comes_too_late() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let queue = TestQueue::new(&store);
    let waited = AtomicU64::new(0);
    for seq in 0..300 {
        let round = queue.append(&store, seq, b"x");
        let listener = Arc::new(TestListener::default());
        if store.when_durable(round, &(Arc::clone(&listener) as _)) {
            waited.fetch_add(1, Ordering::Relaxed);
            eventually("the listener is called", || !listener.calls.lock().is_empty());
        }
        assert!(!store.when_durable(round, &(Arc::clone(&listener) as _)));
        assert!(listener.calls.lock().len() <= 1);
    }
    assert!(waited.load(Ordering::Relaxed) > 0);
}

#[test]
fn a_panicking_listener_does_not_keep_the_others_from_being_called() {
    struct Panics;
    impl WatermarkListener for Panics {
        fn on_watermark(&self, _: Round, _: bool) {
            panic!("asked for by the test");
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let hook = Arc::new(TestHook::default());
    let store = open_hooked(directory.path(), &hook);
    hook.hold();
    let round = store.open_round();
    let listener = Arc::new(TestListener::default());
    let panics: Arc<dyn WatermarkListener> = Arc::new(Panics);
    assert!(store.when_durable(round, &panics));
    assert!(store.when_durable(round, &(Arc::clone(&listener) as _)));
    hook.release();
    eventually("the listener is called", || listener.calls.lock().len() == 1);
    commit(&store, store.open_round());
}

#[test]
fn shutdown_commits_what_is_dirty_and_later_calls_fail_quietly() {
    let directory = tempfile::tempdir().unwrap();
    let linger = Duration::from_secs(3600);
    let (store, _) = Store::open(StoreOptions { linger, ..options(directory.path()) }).unwrap();
    let queue = TestQueue::new(&store);
    let last = queue.append(&store, 0, b"last words");
    store.shutdown().unwrap();
    store.shutdown().unwrap();
    assert!(store.watermark() >= last && !store.is_failed(last));

    let late = queue.append(&store, 1, b"too late");
    assert!(store.is_failed(late));
    assert!(store.watermark() >= late, "nobody waits for a round that never comes");
    assert!(store.put_definition(vec![1], vec![2]) >= late);
    assert!(store.delete_queue(queue.id) >= late);
    assert!(store.has_failed().is_some());
    wait(&store, store.open_round());
    store.allocate_queue_id();
    store.spawn_read(Box::new(|| panic!("this is not run")));
    assert_eq!(store.read_records(queue.id, 0, 1, 1, &mut |_, _| {}), Err(StoreError::Closed));
    assert_eq!(store.read_consumed(queue.id), Err(StoreError::Closed));
    drop(store);

    let (store, _) = open(directory.path());
    assert_eq!(read_all(&store, queue.id), [(0, b"last words".to_vec())]);
}

#[test]
fn dropping_the_last_handle_commits_and_closes() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let queue = TestQueue::new(&store);
    queue.append(&store, 0, b"kept");
    drop(store);
    let (store, _) = open(directory.path());
    assert_eq!(read_all(&store, queue.id).len(), 1);
}

#[test]
fn reads_run_in_order_on_a_thread_of_their_own_and_survive_a_panic() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let (sender, results) = mpsc::channel();
    for number in 0..3 {
        let sender = sender.clone();
        store.spawn_read(Box::new(move || {
            sender.send((number, std::thread::current().name().map(str::to_owned))).unwrap();
            assert_ne!(number, 0, "asked for by the test");
        }));
    }
    store.shutdown().unwrap();
    let results: Vec<_> = results.try_iter().collect();
    assert_eq!(results, [0, 1, 2].map(|number| (number, Some("store-reader".to_owned()))));
}
