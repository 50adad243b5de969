//! Reading back: order, bounds, gaps, pages, deletions, and damage.

use super::*;

/// The first position of a segment.
const fn segment(number: u64) -> QueueSeq {
    number * SEGMENT_RECORDS
}

#[test]
fn records_come_in_order_from_anywhere_and_up_to_the_limit() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let (queue, neighbour) = (TestQueue::new(&store), TestQueue::new(&store));
    let records: Records = numbered(0..10_000).into_iter().filter(|(seq, _)| seq % 7 != 3).collect();
    for part in records.chunks(999) {
        neighbour.append_all(&store, &part.to_vec());
        commit(&store, queue.append_all(&store, &part.to_vec()));
    }
    assert_eq!(read_all(&store, queue.id), records);
    for from in [0, 1, 2, 3, 4, 998, 999, 1000, segment(1) - 1, segment(1), segment(1) + 1, 9_999, 10_000, 20_000] {
        for length in [0, 1, 2, 5_000] {
            let wanted: Records =
                records.iter().filter(|(seq, _)| (from..from + length).contains(seq)).cloned().collect();
            assert_eq!(read_range(&store, queue.id, from, from + length), wanted, "{from} and {length} more");
        }
    }
    let mut read = Vec::new();
    let end = store.read_records(queue.id, 2, 10_000, 20, &mut |seq, _| read.push(seq)).unwrap();
    assert_eq!((read, end), (vec![2, 4, 5], 6), "8 bytes each, so the third record reaches the limit");
    assert_eq!(store.read_records(queue.id, 9_998, 9_999, 1, &mut |_, _| {}), Ok(9_999));
    assert_eq!(store.stats().damaged_records, 0);
}

#[test]
fn large_records_come_back_whole() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let queue = TestQueue::new(&store);
    let sizes = [0, 1, 127, 128, 4_000, 16 << 10, 100_000, 255 << 10, 256 << 10, 1 << 20, 20 << 20, 3];
    let records: Records = (0..).zip(sizes).map(|(seq, size)| (seq, vec![seq as u8; size])).collect();
    commit(&store, queue.append_all(&store, &records));
    assert!(read_all(&store, queue.id) == records);
    drop(store);
    let (store, _) = open(directory.path());
    assert!(read_all(&store, queue.id) == records);
}

#[test]
fn log_and_pages_are_read_as_one_and_pages_are_gone_after_a_restart() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let queue = TestQueue::new(&store);
    let (durable, transient): (Records, Records) = numbered(0..9_000).into_iter().partition(|(seq, _)| seq % 3 == 0);
    queue.append_all(&store, &durable);
    let pages = transient.iter().cloned().map(|(seq, record)| Change::Page(seq, record));
    commit(&store, queue.change(&store, pages.clone()));
    assert_eq!(read_all(&store, queue.id), numbered(0..9_000));
    assert_eq!(read_range(&store, queue.id, 4_001, 4_005), numbered(4_001..4_005));
    // A page that is written again, in other runs, is still read once.
    commit(&store, queue.change(&store, pages.skip(500)));
    assert_eq!(read_range(&store, queue.id, 300, 9_000), numbered(300..9_000));
    let round = queue.change(&store, [Change::DeleteSegments(0, 1)]);
    commit(&store, round);
    assert_eq!(read_all(&store, queue.id), numbered(segment(1)..9_000));
    store.rocks.pages().of(queue.id).unwrap().families().last().unwrap().0.flush().unwrap();
    store.abandon();

    let (store, _) = open(directory.path());
    let durable: Records = durable.into_iter().filter(|(seq, _)| *seq >= segment(1)).collect();
    assert_eq!(read_all(&store, queue.id), durable);
    // The emptied family works like a new one.
    commit(&store, queue.change(&store, [Change::Page(8_999, b"again".to_vec())]));
    assert_eq!(read_range(&store, queue.id, 8_998, 9_000), [(8_999, b"again".to_vec())]);
}

#[test]
fn deleting_segments_takes_exactly_those() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let (queue, neighbour) = (TestQueue::new(&store), TestQueue::new(&store));
    let records: Records = numbered(0..segment(5)).into_iter().step_by(16).collect();
    for queue in [&queue, &neighbour] {
        queue.append_all(&store, &records);
        queue.change(&store, (0..5).map(|number| Change::Page(segment(number) + 1, b"page".to_vec())));
        let consumed = (0..5).map(|number| Change::Consumed(number, vec![(segment(number) + 2, segment(number) + 4)]));
        commit(&store, queue.change(&store, consumed));
    }
    let whole = read_all(&store, queue.id);
    let whole_consumed = store.read_consumed(queue.id).unwrap();
    assert_eq!((whole.len(), whole_consumed.len()), (records.len() + 5, 5));

    let round = queue.change(&store, [Change::DeleteSegments(1, 3), Change::DeleteSegments(4, 4)]);
    commit(&store, round);

    let left = |seq: QueueSeq| !(segment(1)..segment(3)).contains(&seq);
    let check = |store: &Store| {
        let expected: Records = whole.iter().filter(|(seq, _)| left(*seq)).cloned().collect();
        assert_eq!(read_all(store, queue.id), expected);
        assert_eq!(read_range(store, queue.id, segment(1) + 5, segment(3)), vec![]);
        let expected: Vec<_> = whole_consumed.iter().copied().filter(|(seq, _)| left(*seq)).collect();
        assert_eq!(store.read_consumed(queue.id).unwrap(), expected);
        assert_eq!(read_all(store, neighbour.id), whole);
        assert_eq!(store.read_consumed(neighbour.id).unwrap(), whole_consumed);
    };
    check(&store);
    // And so they stay after the tombstones have been through a flush and a compaction.
    store
        .rocks
        .with(|db| {
            let pages = store.rocks.pages().of(queue.id).unwrap();
            let log = db.cf_handle(key::LOG).unwrap();
            let consumed = db.cf_handle(key::CONSUMED).unwrap();
            for (db, family) in [(db, log), (db, consumed), pages.families().last().unwrap()] {
                db.flush_cf(family).unwrap();
                db.compact_range_cf(family, None::<&[u8]>, None::<&[u8]>);
            }
            Ok(())
        })
        .unwrap();
    check(&store);
}

#[test]
fn deleting_records_takes_whole_runs_within_the_range_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let queue = TestQueue::new(&store);
    let records = numbered(0..5_000);
    for part in records.chunks(100) {
        commit(&store, queue.append_all(&store, &part.to_vec()));
    }
    // (from, until) and what is gone after it, together with what was gone before.
    let cases = [
        ((50, 99), 0..0),
        ((0, 250), 0..200),
        ((0, 300), 0..200),
        ((0, 301), 0..300),
        ((0, segment(1)), 0..segment(1)),
        ((segment(1), segment(1) + 30), 0..4_100),
        ((0, 4_150), 0..4_100),
        ((0, 4_350), 0..4_300),
        ((0, 6_000), 0..4_900),
    ];
    for ((from, until), gone) in cases {
        commit(&store, queue.change(&store, [Change::DeleteRecords(from, until)]));
        let left: Records = records.iter().filter(|(seq, _)| !gone.contains(seq)).cloned().collect();
        assert!(read_all(&store, queue.id) == left, "{from}..{until}");
    }
    commit(&store, queue.append(&store, 5_000, b"next"));
    assert_eq!(read_range(&store, queue.id, 4_999, 6_000), [records[4_999].clone(), (5_000, b"next".to_vec())]);
    for (seq, record) in &records[..3] {
        commit(&store, queue.change(&store, [Change::Page(*seq, record.clone())]));
    }
    commit(&store, queue.change(&store, [Change::DeleteRecords(0, 2)]));
    assert_eq!(read_range(&store, queue.id, 0, 10), records[1..3]);
}

#[test]
fn sweeping_gives_back_what_was_deleted_and_what_short_runs_share_with_long_ones() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let (short, long) = (TestQueue::new(&store), TestQueue::new(&store));
    let blobs = || std::fs::read_dir(directory.path()).unwrap().map(Result::unwrap);
    let used = || {
        let files = blobs().filter(|entry| entry.path().extension().is_some_and(|kind| kind == "blob"));
        files.map(|entry| entry.metadata().map_or(0, |data| data.len())).sum::<u64>()
    };
    // Every blob file holds something of both.
    let mut kept = Records::new();
    for part in 0..45 {
        let (record, keep) = ((part, noise(part, 2 << 20)), (part, noise(part + 99, 2_000)));
        short.append_all(&store, &vec![record]);
        commit(&store, long.append_all(&store, &vec![keep.clone()]));
        kept.push(keep);
    }
    store
        .rocks
        .with(|db| {
            let _: () = db.flush_cf(db.cf_handle(key::LOG).unwrap()).unwrap();
            Ok(())
        })
        .unwrap();
    assert!(used() > 85 << 20, "{}", used());
    commit(&store, short.change(&store, [Change::DeleteSegments(0, 1)]));
    let deleted = BTreeMap::from([(short.id, (0, segment(1)))]);
    store.rocks.sweep(&deleted); // out of the older half; the garbage that is left is not worth another go
    eventually("the files are gone", || used() < 60 << 20);
    assert!(read_all(&store, long.id) == kept);
    store.shutdown().unwrap();
    let (store, _) = open(directory.path());
    assert!(read_all(&store, long.id) == kept);
}

#[test]
fn consumed_ranges_are_merged_over_segments_and_replaced_as_a_whole() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let queue = TestQueue::new(&store);
    let ranges = |store: &Store| store.read_consumed(queue.id).unwrap();
    assert_eq!(ranges(&store), vec![]);
    let first = Change::Consumed(0, vec![(1, 3), (5, 6), (4_000, segment(1))]);
    let second = Change::Consumed(1, vec![(segment(1), segment(1) + 2), (segment(1) + 9, segment(1) + 10)]);
    let round = queue.change(&store, [first, second]);
    commit(&store, round);
    let last = (segment(1) + 9, segment(1) + 10);
    assert_eq!(ranges(&store), [(1, 3), (5, 6), (4_000, segment(1) + 2), last]);
    commit(&store, queue.change(&store, [Change::Consumed(0, vec![(1, 6)])]));
    assert_eq!(ranges(&store), [(1, 6), (segment(1), segment(1) + 2), last]);
    commit(&store, queue.change(&store, [Change::Consumed(1, vec![])]));
    assert_eq!(ranges(&store), [(1, 6)]);
}

/// Replaces a value behind the store's back.
fn tamper(store: &Store, family: &str, key: &[u8], change: impl FnOnce(&mut Vec<u8>)) {
    store
        .rocks
        .with(|db| {
            let family = db.cf_handle(family).unwrap();
            let mut value = db.get_cf(family, key).unwrap().unwrap();
            change(&mut value);
            db.put_cf(family, key, value).unwrap();
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_damaged_record_is_skipped_and_counted_and_its_neighbours_are_read() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let queue = TestQueue::new(&store);
    for part in [0..100, 100..200, 200..300] {
        commit(&store, queue.append_all(&store, &numbered(part)));
    }
    let find = |run: &[u8], text: &str| run.windows(text.len()).position(|part| part == text.as_bytes()).unwrap();
    tamper(&store, key::LOG, &key::numbered(queue.id, 100), |run| {
        let at = find(run, "record 150");
        run[at] ^= 0x40;
    });
    let expected: Records = numbered(0..300).into_iter().filter(|(seq, _)| *seq != 150).collect();
    assert_eq!(read_all(&store, queue.id), expected);
    assert_eq!(store.stats().damaged_records, 1);
    assert_eq!(read_range(&store, queue.id, 151, 300), numbered(151..300));
    assert_eq!(store.stats().damaged_records, 1, "a read that does not want it does not report it");

    // A run that cannot be decoded at all.
    tamper(&store, key::LOG, &key::numbered(queue.id, 100), |run| run[0] = 99);
    let expected: Records = numbered(0..300).into_iter().filter(|(seq, _)| !(100..200).contains(seq)).collect();
    assert_eq!(read_all(&store, queue.id), expected);
    // A run that breaks off.
    tamper(&store, key::LOG, &key::numbered(queue.id, 200), |run| run.truncate(find(run, "record 250") + 3));
    let expected: Records = expected.into_iter().filter(|(seq, _)| *seq < 250).collect();
    assert_eq!(read_all(&store, queue.id), expected);
}

#[test]
fn a_damaged_consumed_set_brings_its_segment_back_and_no_other() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let queue = TestQueue::new(&store);
    let sets = (0..3).map(|number| Change::Consumed(number, vec![(segment(number), segment(number) + 1)]));
    commit(&store, queue.change(&store, sets));
    tamper(&store, key::CONSUMED, &key::numbered(queue.id, 1), |value| *value.last_mut().unwrap() += 1);
    assert_eq!(store.read_consumed(queue.id).unwrap(), [(0, 1), (segment(2), segment(2) + 1)]);
    assert_eq!(store.stats().damaged_records, 1);
}

/// Flips bits in the middle of the largest file of `directory` with this extension, in place. Answers its name.
pub(super) fn damage_largest(directory: &Path, extension: &str) -> String {
    let paths = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    let paths = paths.filter(|path| path.extension().is_some_and(|found| found == extension));
    let path = paths.max_by_key(|path| std::fs::metadata(path).unwrap().len()).unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    std::fs::write(&path, bytes).unwrap();
    path.file_name().unwrap().to_string_lossy().into_owned()
}

#[test]
fn a_damaged_blob_file_costs_the_run_in_the_damaged_place() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let queue = TestQueue::new(&store);
    let records: Records = (0..2_000).map(|seq| (seq, noise(seq, 200))).collect();
    for part in records.chunks(100) {
        commit(&store, queue.append_all(&store, &part.to_vec()));
    }
    store
        .rocks
        .with(|db| {
            let _: () = db.flush_cf(db.cf_handle(key::LOG).unwrap()).unwrap();
            Ok(())
        })
        .unwrap();
    store.shutdown().unwrap();
    damage_largest(directory.path(), "blob");

    let (store, _) = open(directory.path());
    let read = read_all(&store, queue.id);
    assert_eq!(read.len(), 1_900);
    assert!(read.iter().all(|record| records.contains(record)));
    assert_eq!(store.stats().damaged_records, 1);
    let lost = records.iter().find(|record| !read.contains(record)).unwrap().0;
    assert_eq!(lost % 100, 0);
    for from in [lost, lost + 1, lost + 99] {
        assert_eq!(read_range(&store, queue.id, from, lost + 150), records[lost as usize + 100..lost as usize + 150]);
    }
}

#[test]
fn a_damaged_table_block_costs_the_records_in_it() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let queue = TestQueue::new(&store);
    // Runs of one record are too small for blob files.
    let records: Records = (0..600).map(|seq| (seq, noise(seq, 200))).collect();
    for (seq, record) in &records {
        commit(&store, queue.append(&store, *seq, record));
    }
    store
        .rocks
        .with(|db| {
            let _: () = db.flush_cf(db.cf_handle(key::LOG).unwrap()).unwrap();
            Ok(())
        })
        .unwrap();
    store.shutdown().unwrap();

    let (store, _) = open(directory.path());
    damage_largest(directory.path(), "sst"); // which a start would have refused
    let read = read_all(&store, queue.id);
    assert!((450..600).contains(&read.len()), "{} left", read.len());
    assert!(read.iter().all(|record| records.contains(record)));
    assert!(read.last() == records.last() && read.first() == records.first());
    assert_eq!(store.stats().damaged_records, 1);
}

/// Bytes that do not compress.
pub(super) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}
