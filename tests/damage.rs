//! Damage to a data directory: whatever file is cut off or has bits flipped, the broker's store opens, or refuses with an
//! explanation and opens after a repair; what is lost is named before anything is changed; and a second start finds what the
//! first one did.
//!
//! A real broker fills one directory, with a known content, and is killed. Every round damages one file of a copy of it.
//! `DAMAGE_ROUNDS` sets how many rounds (25), `DAMAGE_SEED` the choices (1), `DAMAGE_ROUND` runs one round only.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

#[path = "crash/broker.rs"]
mod broker;
#[path = "crash/client.rs"]
mod client;
#[path = "damage/contents.rs"]
mod contents;
#[path = "damage/harm.rs"]
mod harm;
#[path = "damage/pristine.rs"]
mod pristine;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    time::Instant,
};

use client::Rng;
use contents::Contents;
use harm::Harm;
use leveret::store::{self, DamageReport, Loss, Store, StoreError, StoreOptions};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// What came of all rounds.
#[derive(Default)]
struct Tally {
    rounds: u64,
    opened: u64,
    repaired: u64,
    with_loss: u64,
    lost: u64,
    lost_notes: u64,
    redelivered: u64,
    most_lost: BTreeMap<&'static str, usize>,
    by_kind: BTreeMap<&'static str, (u64, u64, u64)>,
    violations: Vec<String>,
}

#[test]
fn whatever_is_damaged_the_store_opens_or_is_repaired_and_what_is_lost_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let pristine = directory.path().join("pristine");
    pristine::fill(&pristine);
    let report = store::check(&pristine).unwrap();
    assert!(report.is_clean(), "{}", report.to_text(&|queue| format!("{queue:?}")));
    let whole = {
        let copy = directory.path().join("whole");
        harm::copy(&pristine, &copy);
        let (store, recovered) = open(&copy).unwrap();
        let whole = Contents::read(&store, &recovered);
        store.shutdown().unwrap();
        fs::remove_dir_all(&copy).unwrap();
        whole
    };
    pristine::verify(&whole);

    let rounds = number("DAMAGE_ROUNDS").unwrap_or(25);
    let seed = number("DAMAGE_SEED").unwrap_or(1);
    let only = number("DAMAGE_ROUND");
    let mut tally = Tally::default();
    let began = Instant::now();
    for round in only.map_or(0..rounds, |only| only..only + 1) {
        let copy = directory.path().join(format!("round-{round}"));
        let mut rng = Rng(seed.wrapping_mul(0x0100_0003).wrapping_add(round));
        rng.next();
        harm::copy(&pristine, &copy);
        let harm = Harm::do_some(&copy, &mut rng, round);
        let before = tally.violations.len();
        if let Err(violation) = run_round(&copy, &whole, &harm, &mut tally) {
            tally.violations.push(violation);
        }
        for violation in &mut tally.violations[before..] {
            *violation = format!("round {round} ({harm}): {violation}");
            println!("{violation}");
        }
        if only.is_some() {
            println!("{harm}; the directory is kept: {}", directory.path().display());
            std::mem::forget(directory);
            break;
        }
        fs::remove_dir_all(&copy).unwrap();
    }
    println!(
        "{} rounds in {:?}: {} opened directly, {} refused and repaired; {} rounds with loss, {} messages and {} notes lost, \
         {} redelivered; {} violations",
        tally.rounds,
        began.elapsed(),
        tally.opened,
        tally.repaired,
        tally.with_loss,
        tally.lost,
        tally.lost_notes,
        tally.redelivered,
        tally.violations.len()
    );
    for (kind, (rounds, repaired, with_loss)) in &tally.by_kind {
        let most = tally.most_lost.get(kind).copied().unwrap_or(0);
        println!("  {kind}: {rounds} rounds, {repaired} repaired, {with_loss} with loss (at most {most} messages)");
    }
    assert!(tally.violations.is_empty(), "{} violations", tally.violations.len());
}

fn open(path: &Path) -> Result<(std::sync::Arc<Store>, store::Recovered), StoreError> {
    Store::open(StoreOptions { path: path.to_owned(), ..StoreOptions::default() })
}

fn run_round(path: &Path, whole: &Contents, harm: &Harm, tally: &mut Tally) -> Result<(), String> {
    tally.rounds += 1;
    let by_kind = tally.by_kind.entry(harm.kind).or_default();
    by_kind.0 += 1;
    let checked = store::check(path).map_err(|error| format!("check: {error}"))?;
    let opened = match open(path) {
        Ok(opened) => {
            tally.opened += 1;
            opened
        }
        Err(error @ StoreError::Damaged { .. }) => {
            if !error.to_string().contains("check --repair") {
                return Err(format!("the refusal does not say what to do: {error}"));
            }
            tally.repaired += 1;
            by_kind.1 += 1;
            store::repair(path).map_err(|error| format!("repair: {error}"))?;
            open(path).map_err(|error| format!("open after the repair: {error}"))?
        }
        Err(error) => return Err(format!("open: {error}")),
    };
    let (store, recovered) = opened;
    let found = Contents::read(&store, &recovered);
    let written = write_something(&store);
    store.shutdown().map_err(|error| format!("shutdown: {error}"))?;
    written?;
    let lost = judge(whole, &found, &checked, harm, tally)?;
    if lost > 0 {
        tally.with_loss += 1;
        tally.by_kind.entry(harm.kind).or_default().2 += 1;
        let most = tally.most_lost.entry(harm.kind).or_default();
        *most = (*most).max(lost);
    }
    let (store, recovered) = open(path).map_err(|error| format!("second open: {error}"))?;
    let again = Contents::read(&store, &recovered);
    store.shutdown().map_err(|error| format!("second shutdown: {error}"))?;
    if again != found {
        return Err(format!("the second start found something else: {}", found.difference(&again)));
    }
    Ok(())
}

/// Rounds are committed after damage as before.
fn write_something(store: &Store) -> Result<(), String> {
    store.put_definition(b"something".to_vec(), vec![1; 100]);
    let round = store.delete_definition(b"something".to_vec());
    futures_lite::future::block_on(store.durable(round)).map_err(|error| format!("a round after damage: {error}"))
}

/// Compares what was found with what was there and with what the check has said. Answers how many messages are lost.
fn judge(
    whole: &Contents,
    found: &Contents,
    report: &DamageReport,
    harm: &Harm,
    tally: &mut Tally,
) -> Result<usize, String> {
    let named: BTreeSet<(u64, u64)> = report
        .queues
        .iter()
        .flat_map(|queue| queue.missing.iter().flat_map(|(from, until)| (*from..*until).map(|at| (queue.queue.0, at))))
        .collect();
    let log_end = report.losses.iter().any(|loss| matches!(loss, Loss::LogEnd { .. }));
    let lost: BTreeSet<(u64, u64)> = whole.ready.keys().filter(|at| !found.ready.contains_key(at)).copied().collect();
    let unnamed: Vec<_> = lost.difference(&named).take(5).collect();
    if !unnamed.is_empty() {
        return Err(format!("{} lost, unnamed among them {unnamed:?}; {}", lost.len(), text(report)));
    }
    let alive: Vec<_> = named.iter().filter(|at| found.ready.contains_key(at)).take(5).collect();
    if !alive.is_empty() {
        return Err(format!("named as lost and still there: {alive:?}"));
    }
    for (at, hash) in &found.ready {
        match whole.ready.get(at) {
            Some(was) if was != hash => return Err(format!("the message at {at:?} is another one")),
            Some(_) => {}
            None if whole.consumed.contains(at) => tally.redelivered += 1,
            None => return Err(format!("a message from nowhere at {at:?}")),
        }
    }
    if found.definitions != whole.definitions && !log_end && report.definitions.is_empty() {
        return Err(format!("definitions differ: {}", text(report)));
    }
    let lost_notes = whole.notes.iter().filter(|(key, value)| found.notes.get(*key) != Some(*value)).count();
    let about_notes = |loss: &Loss| match loss {
        Loss::Keys { family, .. } | Loss::Entry { family, .. } => family == "notes",
        Loss::LogEnd { .. } | Loss::Bytes { .. } => true,
        Loss::Run { .. } => false,
    };
    if lost_notes > 0 && report.unreadable_notes.is_empty() && !report.losses.iter().any(about_notes) {
        return Err(format!("{lost_notes} notes are lost and not named; {}", text(report)));
    }
    tally.lost_notes += lost_notes as u64;
    tally.lost += lost.len() as u64;
    if (!lost.is_empty() || lost_notes > 0) && harm.is_harmless() {
        return Err(format!("{} messages and {lost_notes} notes are lost", lost.len()));
    }
    // A run is at most this long here, and a flipped bit costs at most a run, or what a block of a table has of them.
    const LONGEST_RUN: usize = 64;
    if let Some(flips) = harm.flips()
        && matches!(harm.kind, "log" | "blob")
        && lost.len() > flips * LONGEST_RUN
    {
        return Err(format!("{} messages lost by {flips} flipped bits", lost.len()));
    }
    Ok(lost.len())
}

fn text(report: &DamageReport) -> String {
    report.to_text(&|queue| format!("log {}", queue.0))
}
