//! Notes: order, limits, deletion, damage, space.

use super::reading::{damage_largest, noise};
use super::*;

fn put(key: &[u8], value: &[u8]) -> Change {
    Change::PutNote(key.to_vec(), value.to_vec())
}

fn note(key: &[u8], value: &[u8]) -> (Vec<u8>, Vec<u8>) {
    (key.to_vec(), value.to_vec())
}

fn numbered_notes(range: std::ops::Range<u64>) -> Vec<(Vec<u8>, Vec<u8>)> {
    range.map(|number| (number_key(number), format!("note {number}").into_bytes())).collect()
}

fn number_key(number: u64) -> Vec<u8> {
    [&b"l"[..], &number.to_be_bytes()].concat()
}

fn put_all(notes: &[(Vec<u8>, Vec<u8>)]) -> impl Iterator<Item = Change> {
    notes.iter().map(|(key, value)| put(key, value))
}

fn with_notes<T>(store: &Store, work: impl FnOnce(&rocksdb::DB, &rocksdb::ColumnFamily) -> T) -> T {
    store.rocks.with(|db| Ok(work(db, db.cf_handle(key::NOTES).unwrap()))).unwrap()
}

/// Deletes an owner, and tells how many changes that costs the database.
fn cost_of_deleting(store: &Store, owner: QueueId) -> u64 {
    let changes = || with_notes(store, |db, _| db.latest_sequence_number());
    commit(store, store.open_round());
    let before = changes();
    commit(store, store.delete_queue(owner));
    changes() - before
}

#[test]
fn notes_come_in_key_order_per_owner_and_are_replaced_and_deleted() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let (one, two) = (TestQueue::new(&store), TestQueue::new(&store));
    one.change(&store, [put(b"b", b"1"), put(b"a", b"2"), put(b"ab", b""), put(b"", b"empty key")]);
    two.change(&store, [put(b"a", b"of two")]);
    commit(&store, store.open_round());
    assert_eq!(
        read_notes(&store, one.id),
        [note(b"", b"empty key"), note(b"a", b"2"), note(b"ab", b""), note(b"b", b"1")]
    );

    // Within a round, the order of the calls counts.
    one.change(
        &store,
        [
            put(b"a", b"3"),
            put(b"c", b"4"),
            put(b"d", b"gone"),
            Change::DeleteNotes(b"b".to_vec(), b"e".to_vec()),
            put(b"d", b"5"),
            Change::DeleteNote(b"".to_vec()),
            Change::DeleteNote(b"ab".to_vec()),
            put(b"ab", b"6"),
            Change::DeleteNote(b"never there".to_vec()),
            Change::DeleteNotes(b"z".to_vec(), b"a".to_vec()),
        ],
    );
    commit(&store, store.open_round());
    store.abandon();
    let (store, _) = open(directory.path());
    assert_eq!(read_notes(&store, one.id), [note(b"a", b"3"), note(b"ab", b"6"), note(b"d", b"5")]);
    assert_eq!(read_notes(&store, two.id), [note(b"a", b"of two")]);
    assert_eq!(store.note_owners(), Ok(vec![one.id, two.id]));
    assert_eq!(store.stats().damaged_records, 0);
}

#[test]
fn reading_stops_at_the_limit_and_goes_on_from_there() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let owner = TestQueue::new(&store);
    let notes = numbered_notes(100..200);
    commit(&store, owner.change(&store, put_all(&notes)));
    let (mut read, mut from, mut turns) = (Vec::new(), number_key(120), 0);
    let until = number_key(180);
    loop {
        let mut each = |key: &[u8], value: &[u8]| read.push(note(key, value));
        // Each note has 9 bytes of key and 8 of value.
        let next = store.read_notes(owner.id, &from, &until, 10 * 17, &mut each).unwrap();
        turns += 1;
        let Some(next) = next else { break };
        assert!(read.last().unwrap().0 < next && next <= number_key(120 + read.len() as u64));
        from = next;
    }
    assert_eq!(read, notes[20..80]);
    assert_eq!(turns, 7, "six full ones, and one that finds the end");
    let read = store.read_notes(owner.id, &until, &until, 1, &mut |_, _| panic!("nothing there"));
    assert_eq!(read, Ok(None));
}

#[test]
fn a_deleted_owner_takes_its_notes_along_and_one_without_notes_costs_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let (before, noted, fresh, plain) =
        (TestQueue::new(&store), TestQueue::new(&store), TestQueue::new(&store), TestQueue::new(&store));
    for queue in [&noted, &before] {
        commit(&store, queue.change(&store, [put(b"a", b"1"), put(b"b", b"2")]));
    }
    commit(&store, plain.append(&store, 0, b"record"));
    let plain_cost = cost_of_deleting(&store, plain.id);
    assert_eq!(cost_of_deleting(&store, noted.id), plain_cost + 1);
    assert_eq!(cost_of_deleting(&store, noted.id), plain_cost, "nothing is left of it");
    // What the source adds to the very round goes as well.
    let section = store.atomic();
    store.delete_queue(fresh.id);
    let round = fresh.change(&store, [put(b"late", b"1")]);
    drop(section);
    commit(&store, round);
    for queue in [&noted, &fresh] {
        assert_eq!(read_notes(&store, queue.id), []);
    }
    assert_eq!(read_notes(&store, before.id).len(), 2);
    store.abandon();

    // Owners from before the start are looked up.
    let (store, _) = open(directory.path());
    assert_eq!(store.note_owners(), Ok(vec![before.id]));
    for queue in [&plain, &noted, &TestQueue::new(&store)] {
        assert_eq!(cost_of_deleting(&store, queue.id), plain_cost);
    }
    assert_eq!(cost_of_deleting(&store, before.id), plain_cost + 1);
    assert_eq!(read_notes(&store, before.id), []);
}

#[test]
fn a_damaged_note_is_skipped_and_counted_and_its_neighbours_are_read() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let owner = TestQueue::new(&store);
    let notes = numbered_notes(0..10);
    commit(&store, owner.change(&store, put_all(&notes)));
    with_notes(&store, |db, family| {
        let at = |number: u64| key::note(owner.id, &number_key(number));
        let mut value = db.get_cf(family, at(3)).unwrap().unwrap();
        *value.last_mut().unwrap() ^= 1;
        db.put_cf(family, at(3), value).unwrap();
        // A note in the place of another one, and one that is no note at all.
        let other = db.get_cf(family, at(5)).unwrap().unwrap();
        db.put_cf(family, at(6), other).unwrap();
        db.put_cf(family, at(8), b"").unwrap();
    });
    let expected: Vec<_> = [0, 1, 2, 4, 5, 7, 9].map(|number| notes[number].clone()).into();
    assert_eq!(read_notes(&store, owner.id), expected);
    assert_eq!(store.stats().damaged_records, 3);
}

#[test]
fn a_damaged_table_block_costs_the_notes_in_it() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let owner = TestQueue::new(&store);
    let notes: Vec<_> = (0..600u64).map(|number| (number_key(number), noise(number, 200))).collect();
    commit(&store, owner.change(&store, put_all(&notes)));
    with_notes(&store, |db, family| db.flush_cf(family).unwrap());
    store.shutdown().unwrap();

    let (store, _) = open(directory.path());
    // Only the notes make a table of this size.
    damage_largest(directory.path(), "sst");
    let read = read_notes(&store, owner.id);
    assert!((500..600).contains(&read.len()), "{} left", read.len());
    assert!(read.iter().all(|note| notes.contains(note)));
    assert!(read.is_sorted() && read.last() == notes.last() && read.first() == notes.first());
    assert_eq!(store.stats().damaged_records, 1);
}

#[test]
fn notes_that_came_and_went_are_swept_up() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(directory.path());
    let owner = TestQueue::new(&store);
    let value = noise(1, 100);
    for part in 0..10u64 {
        let keys = (part * 10_000..(part + 1) * 10_000).map(number_key);
        commit(&store, owner.change(&store, keys.map(|key| put(&key, &value))));
    }
    commit(&store, owner.change(&store, [put(b"m", &value)]));
    for part in 0..10u64 {
        let keys = (part * 10_000..(part + 1) * 10_000).map(number_key);
        commit(&store, owner.change(&store, keys.map(Change::DeleteNote)));
    }
    with_notes(&store, |db, family| db.flush_cf(family).unwrap());
    let swept =
        BTreeMap::from([(key::queue(owner.id), (key::queue(owner.id).into(), key::after_queue(owner.id).into()))]);
    store.rocks.sweep_notes(&swept);
    let used = with_notes(&store, |db, family| {
        db.property_int_value_cf(family, "rocksdb.live-sst-files-size").unwrap().unwrap()
    });
    assert!(used < 100_000, "{used} bytes");
    assert_eq!(read_notes(&store, owner.id), [note(b"m", &value)]);
}
