//! Copies of a store that is written to.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::*;

/// The records of a queue, which must be numbered without a gap from 0.
fn count(store: &Store, queue: QueueId) -> u64 {
    let mut next = 0_u64;
    let each = &mut |seq, record: &[u8]| {
        assert_eq!((seq, &record[..8]), (next, &next.to_le_bytes()[..]));
        next += 1;
    };
    store.read_records(queue, 0, u64::MAX, usize::MAX, each).unwrap();
    next
}

#[test]
fn copies_end_between_rounds_while_wal_files_come_and_go() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("data");
    // A WAL file lasts for a round or two, and the next that takes its place is rarely as long.
    let small = StoreOptions { write_buffer_bytes: 256 << 10, durability: Durability::Os, ..options(&path) };
    let (store, _) = Store::open(small).unwrap();
    let (left, right) = (TestQueue::new(&store), TestQueue::new(&store));
    let (durable, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut next = 0_u64;
            while !stop.load(Ordering::SeqCst) {
                let batch = [1, 40, 3, 25][(next % 4) as usize];
                let records: Records = (next..next + batch)
                    .map(|seq| {
                        let noise = (0..700_u64).flat_map(|at| (seq * 1_009 + at).wrapping_pow(7).to_le_bytes());
                        (seq, seq.to_le_bytes().into_iter().chain(noise).collect())
                    })
                    .collect();
                next += batch;
                let round = {
                    let _one_round = store.atomic();
                    left.append_all(&store, &records);
                    right.append_all(&store, &records)
                };
                futures_lite::future::block_on(store.durable(round)).unwrap();
                durable.store(next, Ordering::SeqCst);
            }
        });
        for at in 0..5 {
            let began = Instant::now();
            while durable.load(Ordering::SeqCst) < 100 * (at + 1) {
                assert!(began.elapsed() < LIMIT);
                std::thread::sleep(Duration::from_millis(1));
            }
            let before = durable.load(Ordering::SeqCst);
            let copy = place.path().join("copy");
            let made = store.checkpoint(&copy).unwrap_or_else(|error| {
                stop.store(true, Ordering::SeqCst);
                panic!("{error}")
            });
            assert!(made.linked && made.files > 3);
            let (store, _) = open(&copy);
            let counts = (count(&store, left.id), count(&store, right.id));
            if counts.0 != counts.1 || counts.0 < before {
                stop.store(true, Ordering::SeqCst);
                panic!("{before} were durable, {counts:?} are in the copy");
            }
            store.shutdown().unwrap();
            std::fs::remove_dir_all(&copy).unwrap();
        }
        stop.store(true, Ordering::SeqCst);
    });
    store.shutdown().unwrap();
    let (store, _) = open(&path);
    assert_eq!(count(&store, left.id), durable.load(Ordering::SeqCst));
}

#[test]
fn what_a_killed_broker_has_left_of_a_copy_goes_at_the_next_start_or_attempt() {
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("data");
    let (store, _) = open(&path);
    let queue = TestQueue::new(&store);
    futures_lite::future::block_on(store.durable(queue.append(&store, 0, &[0; 8]))).unwrap();
    store.shutdown().unwrap();
    let leftovers = ["data/checkpoint.links", "data/checkpoint.links.tmp", ".copy.checkpoint", ".copy.checkpoint.tmp"];
    for name in leftovers {
        std::fs::create_dir(place.path().join(name)).unwrap();
        std::fs::write(place.path().join(name).join("file"), b"x").unwrap();
    }
    let (store, _) = open(&path);
    assert!(!path.join("checkpoint.links").exists() && !path.join("checkpoint.links.tmp").exists());
    store.checkpoint(&place.path().join("copy")).unwrap();
    let there = |name: &str| place.path().join(name).exists();
    assert!(there("copy/CURRENT") && !there(".copy.checkpoint") && !there(".copy.checkpoint.tmp"));
    // Not a second time in the same place; nor by a store that is closed.
    assert!(matches!(store.checkpoint(&place.path().join("copy")), Err(StoreError::Checkpoint { .. })));
    store.shutdown().unwrap();
    assert!(store.checkpoint(&place.path().join("late")).is_err());
    assert!(!there("late") && !there(".late.checkpoint") && !there(".late.checkpoint.tmp"));
    assert_eq!(count(&open(&place.path().join("copy")).0, queue.id), 1);
}
