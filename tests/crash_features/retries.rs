//! Messages that fail again and again: each is tried as often as its queue says, its count of failures survives, and in the
//! end it is dead-lettered or parked, once.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use amq_protocol::{
    protocol::BasicProperties,
    types::{AMQPValue, FieldTable},
};

use super::{
    arena::{Arena, Ledger, Publishing, deaths, integer, rounds, some, table, take_confirm, text, until_killed},
    client::{Answer, Client, ClientError, Incoming, Rng, publish_frames},
    facts::{self, Id},
};

/// A queue that retries, and where its messages end.
struct Case {
    source: &'static str,
    end: &'static str,
    /// Failed deliveries a message may have.
    max: i64,
    /// Whether it is dead-lettered, and not parked.
    dead_letters: bool,
}

const CASES: [Case; 3] = [
    Case { source: "retry", end: "retry.dead", max: 3, dead_letters: true },
    Case { source: "park", end: "park.parked", max: 2, dead_letters: false },
    Case { source: "retry.quorum", end: "retry.quorum.dead", max: 2, dead_letters: true },
];
const MARKERS: &str = "markers";
/// No backoff is longer, so that a consumer that has had nothing for so long has had everything.
const SILENCE: Duration = Duration::from_millis(600);

fn declare(client: &mut Client) -> Answer<()> {
    let mut retry = FieldTable::default();
    for (key, value) in [("max", 3), ("initial", 5), ("multiplier", 2), ("max-delay", 40)] {
        retry.insert(key.into(), AMQPValue::LongInt(value));
    }
    retry.insert("jitter".into(), AMQPValue::Double(0.2));
    let dead = |queue: &str| [("x-dead-letter-exchange", text("")), ("x-dead-letter-routing-key", text(queue))];
    let mut arguments = table(dead("retry.dead"));
    arguments.insert("x-retry".into(), AMQPValue::FieldTable(retry));
    client.declare_queue_with("retry", arguments)?;
    client.declare_queue("retry.dead", true, false)?;
    client.declare_queue_with("park", table([("x-retry", text("max=2,initial=5"))]))?;
    let mut arguments = table(dead("retry.quorum.dead"));
    arguments.insert("x-retry".into(), text("max=2,initial=3,multiplier=1"));
    arguments.insert("x-queue-type".into(), text("quorum"));
    client.declare_queue_with("retry.quorum", arguments)?;
    client.declare_queue("retry.quorum.dead", true, false)?;
    client.declare_queue(MARKERS, true, false).map(drop)
}

/// What is known of a message's attempts.
#[derive(Clone, Copy, Debug)]
struct Seen {
    /// Which run of the broker delivered it last.
    run: u32,
    /// The failures it showed then; by now it has had one more.
    failures: i64,
    /// What it cannot fall back behind: a rejection that was on disk.
    floor: i64,
    deliveries: u32,
}

type Attempts = Arc<Mutex<HashMap<Id, Seen>>>;

fn note(case: &Case, id: Id, failures: i64, run: u32, attempts: &Attempts) -> Result<(), String> {
    let mut attempts = attempts.lock().unwrap();
    let before = attempts.get(&id).copied();
    let floor = before.map_or(0, |seen| seen.floor);
    attempts.insert(id, Seen { run, failures, floor, deliveries: before.map_or(0, |seen| seen.deliveries) + 1 });
    let right = match before {
        None => failures == 0,
        Some(seen) if seen.run == run => failures == seen.failures + 1,
        Some(seen) => (seen.floor..=seen.failures + 1).contains(&failures),
    };
    match right && failures <= case.max {
        true => Ok(()),
        false => Err(format!("{}: message {id:x} shows {failures} failures, run {run}, after {before:?}", case.source)),
    }
}

/// Fails every message. After each batch a marker is published: when that is confirmed, the rejections before it are on
/// disk, for rounds come in order. Not so the last one of a message: it counts with its dead letter, which comes later. Ends with the broker, or when `done` is set and nothing has come for a while.
fn fail_all(
    address: SocketAddr,
    case: &'static Case,
    run: u32,
    attempts: &Attempts,
    done: &AtomicBool,
    mut rng: Rng,
) -> Ledger {
    until_killed(case.source, |ledger| {
        let mut client = Client::connect(address)?;
        client.confirm_select()?;
        client.consume(case.source, false, 60)?;
        let mut open: VecDeque<(u64, Id)> = VecDeque::new();
        let mut batches: VecDeque<(u64, Vec<(Id, i64)>)> = VecDeque::new();
        let (mut markers, mut last_came) = (0, Instant::now());
        loop {
            let mut wait = Duration::from_millis(5);
            let mut batch = Vec::new();
            while let Some(incoming) = client.receive(wait)? {
                wait = Duration::ZERO;
                let Incoming::Delivery(delivery) = incoming else {
                    let mut confirms = Ledger::default();
                    take_confirm(&incoming, &mut open, &mut confirms);
                    while batches.front().is_some_and(|(marker, _)| confirms.confirmed.contains(marker)) {
                        let mut attempts = attempts.lock().unwrap();
                        for (id, failures) in batches.pop_front().expect("looked at").1 {
                            attempts
                                .entry(id)
                                .and_modify(|seen| seen.floor = seen.floor.max(case.max.min(failures + 1)));
                        }
                    }
                    continue;
                };
                last_came = Instant::now();
                let id = match facts::read(&delivery) {
                    Ok((id, _)) => id,
                    Err(error) => {
                        ledger.errors.push(error);
                        continue;
                    }
                };
                let failures = integer(&delivery, "x-delivery-count").unwrap_or(0);
                ledger.errors.extend(note(case, id, failures, run, attempts).err());
                match rng.range(0..3) {
                    0 => client.queue_nack(delivery.tag, true),
                    1 => client.queue_reject(delivery.tag, true),
                    _ => client.queue_reject(delivery.tag, false),
                }
                batch.push((id, failures));
            }
            if !batch.is_empty() {
                markers += 1;
                open.push_back((markers, markers));
                batches.push_back((markers, batch));
                let properties = BasicProperties::default().with_delivery_mode(2);
                publish_frames(client.buffer(), 1, "", MARKERS, false, &properties, b"");
            }
            client.flush()?;
            if done.load(Ordering::Relaxed) && last_came.elapsed() > SILENCE {
                return client.close();
            }
        }
    })
}

/// Fails what is left until it is where it ends, and looks at it there.
fn finish(arena: &mut Arena, run: u32, ledgers: &mut [Ledger], attempts: &Attempts) -> usize {
    let done = Arc::new(AtomicBool::new(true));
    let threads: Vec<_> = CASES
        .iter()
        .map(|case| {
            let (address, attempts, done, rng) = (arena.address, attempts.clone(), done.clone(), arena.rng.fork());
            std::thread::spawn(move || fail_all(address, case, run, &attempts, &done, rng))
        })
        .collect();
    for thread in threads {
        arena.errors.append(&mut thread.join().expect("no client panics").errors);
    }
    let mut ended = 0;
    for (case, ledger) in CASES.iter().zip(ledgers) {
        // The parking queue is there when something was parked.
        if !case.dead_letters && ledger.confirmed.is_empty() {
            continue;
        }
        let found =
            match Client::connect(arena.address).and_then(|mut client| client.declare_queue(case.end, true, true)) {
                Err(ClientError::Closed { code: 404, .. }) => HashMap::new(),
                _ => arena.drain(&[case.source, case.end], &ledger.confirmed, true),
            };
        let mut complain = |text: String| arena.errors.push(format!("{}: {text}", case.source));
        let at_the_end: Vec<Id> = found.get(case.end).into_iter().flatten().map(|(id, _)| *id).collect();
        let all: HashSet<Id> = at_the_end.iter().copied().collect();
        if all.len() != at_the_end.len() {
            complain(format!("{} messages ended TWICE", at_the_end.len() - all.len()));
        }
        let left: Vec<Id> = found.get(case.source).into_iter().flatten().map(|(id, _)| *id).collect();
        if !left.is_empty() {
            complain(format!("messages are left, or back: {}", some(&left)));
        }
        let lost: Vec<Id> = ledger.confirmed.difference(&all).copied().collect();
        if !lost.is_empty() {
            complain(format!("confirmed messages are LOST: {}", some(&lost)));
        }
        let strangers: Vec<Id> = all.difference(&ledger.sent).copied().collect();
        if !strangers.is_empty() {
            complain(format!("messages that should not be there: {}", some(&strangers)));
        }
        let expected = [(case.source.to_owned(), "delivery_limit".to_owned(), 1)];
        for (id, delivery) in found.get(case.end).into_iter().flatten() {
            if deaths(delivery) != expected {
                complain(format!("message {id:x} has the history {:?}", deaths(delivery)));
            }
        }
        ended += all.len();
        *ledger = Ledger::default();
    }
    ended
}

#[test]
fn failing_messages_end_once_and_their_attempts_are_counted() {
    let mut arena = Arena::new("retries", declare);
    let mut ledgers: Vec<Ledger> = CASES.iter().map(|_| Ledger::default()).collect();
    let attempts = Attempts::default();
    let (mut run, mut ended) = (0, 0);
    for round in 1..=rounds() {
        let mut threads = Vec::new();
        for (at, case) in CASES.iter().enumerate() {
            let publishing = Publishing {
                address: arena.address,
                publisher: arena.publisher(),
                exchange: "",
                key: case.source,
                window: 100,
                max: 3_000,
            };
            let rng = arena.rng.fork();
            threads.push(std::thread::spawn(move || (at, publishing.run(rng, |_, _| {}))));
            let (address, attempts, rng) = (arena.address, attempts.clone(), arena.rng.fork());
            threads.push(std::thread::spawn(move || {
                (at, fail_all(address, case, run, &attempts, &AtomicBool::new(false), rng))
            }));
        }
        for (at, mut known) in arena.kill_under(threads, 700) {
            arena.errors.append(&mut known.errors);
            ledgers[at].merge(known);
        }
        run += 1;
        // Mostly on and on, over several kills.
        if round == rounds() || arena.rng.one_in(3) {
            ended += finish(&mut arena, run, &mut ledgers, &attempts);
            run += 1;
        }
        let most = attempts.lock().unwrap().values().map(|seen| seen.deliveries).max().unwrap_or(0);
        let tried = attempts.lock().unwrap().len();
        arena.report(
            round,
            &format!("{tried} messages tried, {ended} at their end so far, at most {most} deliveries of one"),
        );
    }
    arena.finish(&format!("{ended} messages at their end"));
}
