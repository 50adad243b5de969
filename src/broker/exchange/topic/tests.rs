use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;

fn collect(trie: &TopicTrie, key: &[u8]) -> BTreeSet<Slot> {
    let mut out = Targets::default();
    trie.collect(key, &mut out);
    let found: BTreeSet<_> = out.as_slice().iter().filter_map(|target| target.as_queue()).collect();
    assert_eq!(found.len(), out.as_slice().len(), "a target was collected twice");
    found
}

fn matches(pattern: &str, key: &str) -> bool {
    let mut trie = TopicTrie::default();
    trie.add(pattern.as_bytes(), Target::queue(0));
    !collect(&trie, key.as_bytes()).is_empty()
}

fn is_pristine(trie: &TopicTrie) -> bool {
    trie.nodes.iter().count() == 1
        && trie.nodes.get(ROOT).is_some_and(|root| !root.has_children() && root.targets.is_empty())
        && trie.edges.is_empty()
        && trie.words.is_empty()
}

/// What the specification says, word by word.
fn naive(pattern: &[&[u8]], key: &[&[u8]]) -> bool {
    match (pattern.split_first(), key.split_first()) {
        (None, None) => true,
        (None, Some(_)) => false,
        (Some((&b"#", rest)), None) => naive(rest, key),
        (Some((&b"#", rest)), Some((_, key_rest))) => naive(rest, key) || naive(pattern, key_rest),
        (Some(_), None) => false,
        (Some((&word, rest)), Some((&key_word, key_rest))) => {
            (word == b"*" || word == key_word) && naive(rest, key_rest)
        }
    }
}

fn naive_matches(pattern: &[u8], key: &[u8]) -> bool {
    let split = |bytes| words(bytes).collect::<Vec<_>>();
    naive(&split(pattern), &split(key))
}

#[test]
fn stars_take_one_word_and_hashes_any_number() {
    assert!(matches("a.*.c", "a.b.c") && !matches("a.*.c", "a.c") && !matches("a.*", "a.b.c"));
    assert!(matches("a.#", "a") && matches("a.#", "a.b.c") && !matches("a.#", "b"));
    assert!(matches("#.c", "c") && matches("#.c", "a.b.c") && !matches("#.c", "a.c.b"));
    assert!(matches("a.#.c", "a.c") && matches("a.#.c", "a.c.c") && !matches("a.#.c", "a"));
    assert!(matches("#.#", "") && matches("#.*", "a") && !matches("#.*", ""));
    assert!(matches("#.a.#", "x.a.y") && matches("#.a.#.a.#", "a.a") && !matches("#.a.#.a.#", "a"));
    assert!(matches("*.#.*", "a.b") && !matches("*.#.*", "a"));
}

#[test]
fn empty_words_count_and_the_empty_key_has_none() {
    assert!(matches("", "") && !matches("", "a") && !matches("", "."));
    assert!(matches("#", "") && matches("#", "a.b") && matches("#", ".") && !matches("*", ""));
    assert!(matches("*.*", ".") && matches("a.*.b", "a..b") && matches("a..b", "a..b") && !matches("a..b", "a.b"));
    assert!(matches("*.a", ".a") && matches("a.*", "a.") && matches("a.", "a.") && !matches("a", "a."));
}

#[test]
fn wildcards_are_whole_words_and_literal_in_a_routing_key() {
    assert!(matches("a*", "a*") && !matches("a*", "ab"));
    assert!(matches("a#.b", "a#.b") && !matches("a#.b", "a.b"));
    assert!(matches("*", "*") && matches("*", "#") && !matches("a", "*") && !matches("a.b", "#"));
}

#[test]
fn a_target_is_collected_once_and_stays_until_its_last_binding_goes() {
    let mut trie = TopicTrie::default();
    for pattern in ["#.a.#", "a.*", "#", "a.b", "a.b"] {
        trie.add(pattern.as_bytes(), Target::queue(1));
    }
    assert_eq!(collect(&trie, b"a.b"), BTreeSet::from([1]));
    for pattern in ["#.a.#", "a.*", "#", "a.b"] {
        trie.remove(pattern.as_bytes(), Target::queue(1));
    }
    assert_eq!(collect(&trie, b"a.b"), BTreeSet::from([1]));
    trie.remove(b"a.b", Target::queue(1));
    assert!(is_pristine(&trie));
}

#[test]
fn removing_what_is_not_there_changes_nothing() {
    let mut trie = TopicTrie::default();
    trie.add(b"a.b.c", Target::queue(1));
    for (pattern, queue) in [("a.b.c", 2), ("a.b", 1), ("a.b.d", 1), ("#", 1), ("a.*.c", 1), ("", 1)] {
        trie.remove(pattern.as_bytes(), Target::queue(queue));
    }
    assert_eq!(collect(&trie, b"a.b.c"), BTreeSet::from([1]));
}

/// 60 times `#` would take a backtracking matcher longer than the universe is old.
#[test]
fn many_hashes_do_not_explode() {
    let mut trie = TopicTrie::default();
    for word in ["a", "b", "*"] {
        let pattern = vec![format!("#.{word}"); 60].join(".");
        trie.add(pattern.as_bytes(), Target::queue(0));
        trie.add(format!("{pattern}.x").as_bytes(), Target::queue(1));
    }
    let key = vec!["a"; 127].join(".");
    let start = Instant::now();
    assert_eq!(collect(&trie, key.as_bytes()), BTreeSet::from([0]));
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
}

/// Up to six words of a small alphabet, empty ones among them.
fn dotted(words: &'static [&'static str]) -> impl Strategy<Value = String> {
    prop::collection::vec(prop::sample::select(words), 0..7).prop_map(|words| words.join("."))
}

fn key() -> impl Strategy<Value = String> {
    dotted(&["a", "b", "", "*", "#"])
}

fn pattern() -> impl Strategy<Value = String> {
    dotted(&["a", "b", "", "*", "#", "#", "a*"])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn the_trie_agrees_with_the_naive_matcher(
        patterns in prop::collection::vec(pattern(), 1..25),
        keys in prop::collection::vec(key(), 1..10),
    ) {
        let mut trie = TopicTrie::default();
        for (slot, pattern) in (0..).zip(&patterns) {
            trie.add(pattern.as_bytes(), Target::queue(slot));
        }
        for key in &keys {
            let expected: BTreeSet<Slot> = (0..)
                .zip(&patterns)
                .filter(|(_, pattern)| naive_matches(pattern.as_bytes(), key.as_bytes()))
                .map(|(slot, _)| slot)
                .collect();
            prop_assert_eq!(collect(&trie, key.as_bytes()), expected, "key {:?} in {:?}", key, &patterns);
        }
    }

    #[test]
    fn binding_and_unbinding_agree_with_a_list(
        steps in prop::collection::vec((any::<bool>(), pattern(), 0..4u32), 1..60),
        keys in prop::collection::vec(key(), 1..6),
    ) {
        let mut trie = TopicTrie::default();
        let mut model: Vec<(String, Slot)> = Vec::new();
        for (add, pattern, slot) in steps {
            let place = model.iter().position(|entry| *entry == (pattern.clone(), slot));
            if add {
                trie.add(pattern.as_bytes(), Target::queue(slot));
                model.push((pattern, slot));
            } else if let Some(place) = place.or_else(|| model.len().checked_sub(1)) {
                // Mostly patterns that exist, or nothing would ever be removed.
                let (pattern, slot) = model.swap_remove(place);
                trie.remove(pattern.as_bytes(), Target::queue(slot));
            }
            for key in &keys {
                let expected: BTreeSet<Slot> = model
                    .iter()
                    .filter(|(pattern, _)| naive_matches(pattern.as_bytes(), key.as_bytes()))
                    .map(|(_, slot)| *slot)
                    .collect();
                prop_assert_eq!(collect(&trie, key.as_bytes()), expected);
            }
        }
        for (pattern, slot) in model {
            trie.remove(pattern.as_bytes(), Target::queue(slot));
        }
        prop_assert!(is_pristine(&trie));
    }
}
