use std::path::Path;

use super::*;
use crate::{model::headers::write_counted, store::StoreOptions};
use proptest::prelude::*;
use std::sync::Arc;

const NOW: u64 = 1_800_000_000_000;
const OWNER: QueueId = QueueId(7);

fn rules(cache_size: u64, cache_ttl_ms: Option<u64>) -> Deduplication {
    Deduplication { header: "id".into(), cache_size, cache_ttl_ms }
}

fn table(headers: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    write_counted(&mut out, |out| {
        for (key, value) in headers {
            out.push(key.len() as u8);
            out.extend_from_slice(key.as_bytes());
            out.extend_from_slice(value);
        }
    });
    out
}

fn number(id: i32) -> Vec<u8> {
    table(&[("id", &[&b"I"[..], &id.to_be_bytes()].concat())])
}

fn is_new(verdict: Verdict) -> bool {
    matches!(verdict, Verdict::New(_))
}

/// Checks a message at `NOW + at`.
fn admits(cache: &mut DedupCache, at: u64, headers: &[u8]) -> bool {
    match cache.check_and_insert(NOW + at, Some(headers), true) {
        Verdict::New(_) => true,
        Verdict::Duplicate => false,
        Verdict::NoKey => panic!("no key in {}", headers.escape_ascii()),
    }
}

fn open(path: &Path) -> Arc<Store> {
    Store::open(StoreOptions { path: path.into(), ..StoreOptions::default() }).unwrap().0
}

#[test]
fn a_value_is_known_once_it_was_seen() {
    let mut cache = DedupCache::new(&rules(10, None), true);
    assert!(admits(&mut cache, 0, &number(1)));
    assert!(!admits(&mut cache, 1 << 50, &number(1)));
    assert!(admits(&mut cache, 0, &number(2)));
    assert_eq!((cache.duplicates(), cache.len()), (1, 2));
    for headers in [None, Some(&table(&[])[..]), Some(&table(&[("other", b"V")])), Some(&table(&[("id", b"V")]))] {
        assert_eq!(cache.check_and_insert(NOW, headers, true), Verdict::NoKey);
    }
    assert_eq!(cache.check_and_insert(NOW, Some(&table(&[("id", b"t\0")])), true), Verdict::NoKey);
}

#[test]
fn values_are_compared_by_family_and_value() {
    let mut cache = DedupCache::new(&rules(100, None), false);
    let families: [&[&[u8]]; 9] = [
        &[b"b\x05", b"B\x05", b"u\0\x05", b"l\0\0\0\0\0\0\0\x05", b"d\x40\x14\0\0\0\0\0\0", b"f\x40\xa0\0\0"],
        &[b"S\0\0\0\x015"],
        &[b"x\0\0\0\x015"],
        &[b"T\0\0\0\0\0\0\0\x05"],
        &[b"t\x01", b"t\x02"],
        &[b"d\x40\x14\0\0\0\0\0\x01"],
        &[b"D\0\0\0\0\x05"],
        &[b"A\0\0\0\x02b\x05"],
        &[b"S\0\0\0\0"],
    ];
    for family in families {
        for (place, value) in family.iter().enumerate() {
            assert_eq!(admits(&mut cache, 0, &table(&[("id", value)])), place == 0, "{}", value.escape_ascii());
        }
    }
}

#[test]
fn the_oldest_goes_first_whatever_was_seen_again() {
    let mut cache = DedupCache::new(&rules(3, None), true);
    for id in [1, 2, 3, 1] {
        admits(&mut cache, 0, &number(id));
    }
    assert!(admits(&mut cache, 0, &number(4)));
    assert!(!admits(&mut cache, 0, &number(2)));
    assert!(admits(&mut cache, 0, &number(1)));
    cache.set_limits(1, None);
    assert!(!admits(&mut cache, 0, &number(1)));
    assert!(admits(&mut cache, 0, &number(4)));
    cache.set_limits(0, None);
    assert!(admits(&mut cache, 0, &number(4)) && admits(&mut cache, 0, &number(4)));
    assert!(cache.is_empty());
}

#[test]
fn values_expire_by_the_cache_or_by_their_message() {
    let mut cache = DedupCache::new(&rules(10, Some(100)), true);
    let with_ttl = |id: i32, ttl: &[u8]| table(&[("id", &[&b"I"[..], &id.to_be_bytes()].concat()), (CACHE_TTL, ttl)]);
    admits(&mut cache, 0, &number(1));
    admits(&mut cache, 0, &with_ttl(2, b"I\0\0\0\x0a"));
    admits(&mut cache, 0, &with_ttl(3, b"S\0\0\0\x0210"));
    admits(&mut cache, 0, &with_ttl(4, b"I\xff\xff\xff\xff"));
    admits(&mut cache, 0, &with_ttl(5, b"B\0"));
    assert!(admits(&mut cache, 0, &number(5)));
    assert!(!admits(&mut cache, 9, &number(2)));
    assert!(admits(&mut cache, 10, &number(2)));
    for (at, known) in [(99, true), (100, false)] {
        for id in [1, 3, 4] {
            assert_eq!(admits(&mut cache, at, &number(id)), !known, "{id} at {at}");
        }
    }
}

#[test]
fn values_that_expire_while_an_older_one_stays_leave_nothing_behind() {
    let mut cache = DedupCache::new(&rules(10, Some(1)), true);
    let stays = table(&[("id", b"B\0"), (CACHE_TTL, b"l\x0f\xff\xff\xff\xff\xff\xff\xff")]);
    admits(&mut cache, 0, &stays);
    for at in 0..10_000 {
        assert!(admits(&mut cache, at, &number(1)));
    }
    assert!(cache.order.len() < 100 && cache.unwritten.len() < 200 && cache.len() == 2);
    assert!(!admits(&mut cache, 0, &stays));
}

#[test]
fn a_refused_message_is_forgotten() {
    let mut cache = DedupCache::new(&rules(10, None), true);
    let Verdict::New(admission) = cache.check_and_insert(NOW, Some(&number(1)), true) else { panic!() };
    cache.withdraw(admission);
    assert!(admits(&mut cache, 0, &number(1)));
    cache.withdraw(admission); // which is another's by now
    assert!(!admits(&mut cache, 0, &number(1)));
}

#[tokio::test]
async fn durable_values_survive_and_others_do_not() {
    let dir = tempfile::tempdir().unwrap();
    {
        let store = open(dir.path());
        let dedup = ExchangeDedup::new(store.clone(), OWNER, &rules(3, Some(1000)), true);
        let transient = ExchangeDedup::new(store.clone(), QueueId(8), &rules(3, None), false);
        let mut round = 0;
        for (id, persistent) in [(1, true), (2, true), (3, false), (4, true)] {
            let section = store.atomic();
            let (verdict, wait) = dedup.check_and_insert(&section, NOW, Some(&number(id)), persistent);
            assert!(is_new(verdict));
            round = round.max(wait);
            assert!(is_new(transient.check_and_insert(&section, NOW, Some(&number(id)), persistent).0));
        }
        store.durable(round).await.unwrap();
        let section = store.atomic();
        let (verdict, wait) = dedup.check_and_insert(&section, NOW, Some(&number(4)), true);
        assert_eq!(verdict, Verdict::Duplicate);
        assert!(wait >= 1 && wait <= round);
        assert_eq!(dedup.duplicates(), 1);
        let transient_duplicate = |persistent| transient.check_and_insert(&section, NOW, Some(&number(4)), persistent);
        assert_eq!(transient_duplicate(false), (Verdict::Duplicate, 0));
        assert!(transient_duplicate(true).1 > round);
        let (Verdict::New(admission), _) = dedup.check_and_insert(&section, NOW, Some(&number(5)), true) else {
            panic!()
        };
        dedup.withdraw(admission);
        drop(section);
        store.shutdown().unwrap();
    }
    let store = open(dir.path());
    let mut cache = DedupCache::recover(&rules(3, Some(1000)), OWNER, &store, NOW + 10).unwrap();
    // 3 was a transient message, 5 was withdrawn.
    let known: Vec<i32> =
        (1..6).filter(|id| !is_new(cache.check_and_insert(NOW + 10, Some(&number(*id)), false))).collect();
    assert!(known.ends_with(&[2, 4]), "{known:?}");
    assert!(DedupCache::recover(&rules(3, None), OWNER, &store, NOW + 1000).unwrap().is_empty());
    assert!(DedupCache::recover(&rules(3, None), QueueId(8), &store, NOW).unwrap().is_empty());
}

#[tokio::test]
async fn notes_of_evicted_values_are_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let dedup = ExchangeDedup::new(store.clone(), OWNER, &rules(10, None), true);
    for id in 0..30_000 {
        let (_, round) = dedup.check_and_insert(&store.atomic(), NOW, Some(&number(id)), true);
        if id % 50 == 0 {
            store.durable(round).await.unwrap();
        }
    }
    store.durable(store.open_round()).await.unwrap();
    let mut notes = 0;
    let next = store.read_notes(OWNER, &[NOTE_KIND], &[NOTE_KIND + 1], usize::MAX, &mut |_, _| notes += 1).unwrap();
    assert_eq!(next, None);
    assert!((10..10 + 2 * MIN_ERASED).contains(&notes), "{notes}");
    let mut cache = DedupCache::recover(&rules(10, None), OWNER, &store, NOW).unwrap();
    assert_eq!(cache.len(), 10);
    assert!(!admits(&mut cache, 0, &number(29_990)) && admits(&mut cache, 0, &number(29_989)));
    dedup.close();
    let (verdict, _) = dedup.check_and_insert(&store.atomic(), NOW, Some(&number(-1)), true);
    assert!(is_new(verdict));
    store.durable(store.delete_queue(OWNER)).await.unwrap();
    assert!(DedupCache::recover(&rules(10, None), OWNER, &store, NOW).unwrap().is_empty());
}

proptest! {
    /// LavinMQ's cache: an ordered map from which the oldest goes when it is full, expired or not.
    #[test]
    fn without_expiry_the_cache_is_lavinmqs(capacity in 1usize..6, ids in proptest::collection::vec(0i32..9, 0..60)) {
        let mut cache = DedupCache::new(&rules(capacity as u64, None), true);
        let mut model: VecDeque<i32> = VecDeque::new();
        for id in ids {
            let new = !model.contains(&id);
            if new {
                if model.len() == capacity {
                    model.pop_front();
                }
                model.push_back(id);
            }
            prop_assert_eq!(admits(&mut cache, 0, &number(id)), new);
            prop_assert_eq!(cache.len(), model.len());
        }
    }

    /// Within its capacity the cache knows exactly what was seen less than its ttl ago.
    #[test]
    fn expiry_is_exact_within_the_capacity(steps in proptest::collection::vec((0i32..6, 0u64..8, 0u64..20), 0..80)) {
        let mut cache = DedupCache::new(&rules(100, None), true);
        let mut model: AHashMap<i32, u64> = AHashMap::new();
        let mut now = 0;
        for (id, pause, ttl) in steps {
            now += pause;
            let headers = table(&[("id", &[&b"I"[..], &id.to_be_bytes()].concat()), (CACHE_TTL, &[b'B', ttl as u8])]);
            let new = model.get(&id).is_none_or(|expires| *expires <= now);
            if new {
                model.insert(id, now + ttl);
            }
            prop_assert_eq!(admits(&mut cache, now, &headers), new);
        }
    }
}
