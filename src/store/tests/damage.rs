//! Damage to files: what a start heals, what it refuses, what a repair makes of it.

use super::reading::{damage_largest, noise};
use super::*;

fn refused(path: &Path) -> String {
    let error = Store::open(options(path)).err().unwrap();
    assert!(matches!(error, StoreError::Damaged { .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("leveret check --repair --data-dir") && text.contains(&path.display().to_string()), "{text}");
    text
}

/// Commits records one by one and abandons the store, so that they are in the write-ahead log, one batch each. The state
/// says how many there are.
fn fill(path: &Path, count: u64) -> (QueueId, Records) {
    let (store, _) = open(path);
    let queue = TestQueue::new(&store);
    let records: Records = (0..count).map(|seq| (seq, noise(seq, 300))).collect();
    for (seq, record) in &records {
        let state = QueueStateRecord { tail: seq + 1, message_count: seq + 1, ..QueueStateRecord::default() };
        queue.change(&store, [Change::State(state)]);
        commit(&store, queue.append(&store, *seq, record));
    }
    store.abandon();
    (queue.id, records)
}

/// The write-ahead log with the most in it.
fn log_of(path: &Path) -> PathBuf {
    let paths = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    let logs = paths.filter(|path| path.extension().is_some_and(|found| found == "log"));
    logs.max_by_key(|path| std::fs::metadata(path).unwrap().len()).unwrap()
}

#[test]
fn a_flipped_bit_in_the_write_ahead_log_costs_one_record_and_none_behind_it() {
    let directory = tempfile::tempdir().unwrap();
    let (queue, records) = fill(directory.path(), 300);
    let log = log_of(directory.path());
    let mut bytes = std::fs::read(&log).unwrap();
    let (seq, record) = &records[123];
    let at = bytes.windows(record.len()).position(|window| window == record.as_slice()).unwrap();
    bytes[at + 17] ^= 4;
    std::fs::write(&log, bytes).unwrap();

    let (store, recovered) = open(directory.path());
    let [healed] = &recovered.healed[..] else { panic!("{:?}", recovered.healed) };
    assert_eq!(healed.findings[0].file, log.file_name().unwrap().to_str().unwrap());
    assert!(matches!(healed.losses[..], [Loss::Run { queue: of, first, .. }] if of == queue && first == *seq));
    assert!(healed.quarantine.as_ref().unwrap().join("report.txt").exists());
    let left: Records = records.iter().filter(|(other, _)| other != seq).cloned().collect();
    assert!(read_all(&store, queue) == left);
    assert_eq!(recovered.states[0].1.tail, 300);
    store.shutdown().unwrap();
    let (store, recovered) = open(directory.path());
    assert!(recovered.healed.is_empty() && read_all(&store, queue) == left);
    store.shutdown().unwrap();

    let report = check(directory.path()).unwrap();
    let missing = QueueLoss { queue, expected: 300, found: 299, missing: vec![(*seq, seq + 1)] };
    assert_eq!(report.queues, [missing]);
}

#[test]
fn the_end_of_the_write_ahead_log_is_torn_silently_unless_it_was_noted_as_synced() {
    for noted in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let (queue, records) = fill(directory.path(), 50);
        if !noted {
            std::fs::remove_file(directory.path().join("mirror/noted")).unwrap();
        }
        let log = log_of(directory.path());
        let mut bytes = std::fs::read(&log).unwrap();
        let (_, record) = &records[45];
        let at = bytes.windows(record.len()).position(|window| window == record.as_slice()).unwrap();
        bytes.truncate(at + 10);
        std::fs::write(&log, bytes).unwrap();
        let report = check(directory.path()).unwrap();
        assert_eq!(report.is_clean(), !noted, "{report:?}");
        if noted {
            let missing = QueueLoss { queue, expected: 50, found: 45, missing: vec![(45, 50)] };
            assert_eq!(report.queues, [missing]);
        }
        let (store, recovered) = open(directory.path());
        assert_eq!(recovered.healed.len(), usize::from(noted));
        assert!(read_all(&store, queue) == records[..45]);
    }
}

#[test]
fn a_manifest_that_ends_within_a_record_is_opened_if_the_mirror_knows_of_no_more() {
    let directory = tempfile::tempdir().unwrap();
    let (queue, records) = fill(directory.path(), 5);
    let current = std::fs::read_to_string(directory.path().join("CURRENT")).unwrap();
    let manifest = directory.path().join(current.trim());
    let mut bytes = std::fs::read(&manifest).unwrap();
    bytes.extend_from_slice(&[1, 2, 3, 4, 100, 0, 1, 9, 9, 9]); // the beginning of a record that was never synced
    std::fs::write(&manifest, bytes).unwrap();
    assert!(read_all(&open(directory.path()).0, queue) == records);
}

#[test]
fn a_last_batch_with_a_hole_is_what_a_power_failure_leaves() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let queue = TestQueue::new(&store);
    for (seq, record) in [(0, noise(0, 100)), (1, noise(1, 100)), (2, noise(2, 200_000))] {
        commit(&store, queue.append(&store, seq, &record));
    }
    store.abandon();
    std::fs::remove_file(directory.path().join("mirror/noted")).unwrap();
    let log = log_of(directory.path());
    let mut bytes = std::fs::read(&log).unwrap();
    bytes[100_000..104_096].fill(0);
    std::fs::write(&log, bytes).unwrap();
    let (store, recovered) = open(directory.path());
    assert!(recovered.healed.is_empty(), "{:?}", recovered.healed);
    assert_eq!(read_all(&store, queue.id), [(0, noise(0, 100)), (1, noise(1, 100))]);
}

#[test]
fn a_start_refuses_a_damaged_catalog_and_a_repair_has_it_in_the_mirror() {
    type Deed = fn(&Path, &Path);
    let deeds: [(&str, Deed); 6] = [
        ("CURRENT is missing", |path, _| std::fs::remove_file(path.join("CURRENT")).unwrap()),
        ("CURRENT is garbage", |path, _| std::fs::write(path.join("CURRENT"), b"MANIFEST-0000x5\n").unwrap()),
        ("the MANIFEST is missing", |_, manifest| std::fs::remove_file(manifest).unwrap()),
        ("the MANIFEST is empty", |_, manifest| std::fs::write(manifest, b"").unwrap()),
        ("the MANIFEST is cut off", |_, manifest| {
            let bytes = std::fs::read(manifest).unwrap();
            std::fs::write(manifest, &bytes[..bytes.len() - 20]).unwrap();
        }),
        ("a bit of the MANIFEST is flipped", |_, manifest| {
            let mut bytes = std::fs::read(manifest).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            std::fs::write(manifest, bytes).unwrap();
        }),
    ];
    for (what, deed) in deeds {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        let (queue, records) = fill(path, 20);
        open(path).0.shutdown().unwrap(); // what was in the log is in a table
        let manifest = path.join(std::fs::read_to_string(path.join("CURRENT")).unwrap().trim());
        deed(path, &manifest);
        let text = refused(path);
        assert!(text.contains("CURRENT") || text.contains("MANIFEST"), "{what}: {text}");
        let report = check(path).unwrap();
        assert!(!report.is_clean() && report.lost_messages() == 0, "{what}: {report:?}");
        refused(path); // a check changes nothing
        repair(path).unwrap();
        let (store, _) = open(path);
        assert!(read_all(&store, queue) == records, "{what}");
        store.shutdown().unwrap();
        assert!(check(path).unwrap().is_clean(), "{what}");
    }
}

#[test]
fn a_start_refuses_a_damaged_table_and_a_repair_keeps_all_but_the_block() {
    let directory = tempfile::tempdir().unwrap();
    let (queue, records) = fill(directory.path(), 600);
    open(directory.path()).0.shutdown().unwrap();
    let name = damage_largest(directory.path(), "sst");
    assert!(refused(directory.path()).contains(&name));

    let report = repair(directory.path()).unwrap();
    let [loss] = &report.queues[..] else { panic!("{report:?}") };
    let lost: Vec<u64> = loss.missing.iter().flat_map(|(from, until)| *from..*until).collect();
    assert!((1..150).contains(&lost.len()) && loss.queue == queue && loss.expected - loss.found == lost.len() as u64);
    assert!(report.quarantine.as_ref().unwrap().join(&name).exists());
    let (store, _) = open(directory.path());
    let left: Records = records.into_iter().filter(|(seq, _)| !lost.contains(seq)).collect();
    assert!(read_all(&store, queue) == left);
    assert_eq!(store.stats().damaged_records, 0);
    store.shutdown().unwrap();
    let again = repair(directory.path()).unwrap();
    assert!(again.findings.is_empty() && again.quarantine.is_none(), "{again:?}");
}

#[test]
fn a_repair_that_was_cut_short_is_run_again_before_a_start() {
    let directory = tempfile::tempdir().unwrap();
    let (queue, records) = fill(directory.path(), 20);
    std::fs::create_dir(directory.path().join("quarantine-1")).unwrap();
    std::fs::write(directory.path().join("repair.unfinished"), b"quarantine-1").unwrap();
    refused(directory.path());
    repair(directory.path()).unwrap();
    assert!(read_all(&open(directory.path()).0, queue) == records);
}

#[test]
fn a_definition_survives_in_its_copy_and_what_is_used_is_not_checked() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    for key in [b"kept", b"lost"] {
        commit(&store, store.put_definition(key.to_vec(), b"value".to_vec()));
    }
    assert_eq!(check(directory.path()), Err(StoreError::InUse { path: directory.path().to_owned() }));
    let spoil = |family: &str, key: &[u8]| {
        let put = |db: &rocksdb::DB| {
            let _: () = db.put_cf(db.cf_handle(family).unwrap(), key::definition(key), b"junk").unwrap();
            Ok(())
        };
        store.rocks.with(put).unwrap();
    };
    spoil(key::META, b"kept");
    spoil(key::META, b"lost");
    spoil(key::META_COPY, b"lost");
    store.shutdown().unwrap();
    let (store, recovered) = open(directory.path());
    assert_eq!(recovered.definitions, [(b"kept".to_vec(), b"value".to_vec())]);
    assert_eq!(recovered.damaged_definitions, 1);
    store.shutdown().unwrap();
    let report = check(directory.path()).unwrap();
    assert_eq!(report.definitions, [key::definition(b"lost")]);
}
