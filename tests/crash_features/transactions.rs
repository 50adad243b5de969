//! Transactions that take from one queue and publish to several: all of it or nothing, whenever the broker is killed.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    time::Duration,
};

use super::{
    arena::{Arena, Ledger, Publishing, publish, rounds, some, table, text, until_killed},
    client::{Answer, Client, Delivery, Incoming, Rng},
    facts::{self, Id},
};

const SOURCE: &str = "tx.in";
const DEAD: &str = "tx.dead";
const TARGETS: [&str; 3] = ["tx.one", "tx.two", "tx.three"];
const ALL: [&str; 5] = [SOURCE, DEAD, TARGETS[0], TARGETS[1], TARGETS[2]];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    RolledBack,
    /// The commit was sent; what came of it is unknown.
    Sent,
    Committed,
}

/// What one transaction was to do.
#[derive(Debug)]
struct Transaction {
    moved: Vec<Id>,
    rejected: Vec<Id>,
    outcome: Outcome,
}

fn declare(client: &mut Client) -> Answer<()> {
    let dead_letters = [("x-dead-letter-exchange", text("")), ("x-dead-letter-routing-key", text(DEAD))];
    client.declare_queue_with(SOURCE, table(dead_letters))?;
    client.declare_queue(DEAD, true, false)?;
    client.declare_queue_with(
        TARGETS[0],
        table([("x-queue-type", text("quorum")), ("x-delivery-limit", (-1i32).into())]),
    )?;
    client.declare_queue_with(TARGETS[1], table([("x-max-priority", 5i32.into())]))?;
    client.declare_queue(TARGETS[2], true, false).map(drop)
}

fn work(address: SocketAddr, mut rng: Rng) -> (Ledger, Vec<Transaction>) {
    let mut transactions: Vec<Transaction> = Vec::new();
    let ledger = until_killed("worker", |ledger| {
        let mut client = Client::connect(address)?;
        client.tx_select()?;
        client.consume(SOURCE, false, 80)?;
        let mut open: Vec<Delivery> = Vec::new();
        loop {
            let mut wait = Duration::from_millis(if open.is_empty() { 20 } else { 0 });
            while let Some(incoming) = client.receive(wait)? {
                wait = Duration::ZERO;
                let Incoming::Delivery(delivery) = incoming else { panic!("a worker was told {incoming:?}") };
                open.push(delivery);
            }
            let take = rng.range(0..open.len().min(30) as u64 + 1) as usize;
            let batch: Vec<Delivery> = open.drain(..take).collect();
            let roll_back = rng.one_in(5);
            let outcome = if roll_back { Outcome::RolledBack } else { Outcome::Sent };
            let mut transaction = Transaction { moved: Vec::new(), rejected: Vec::new(), outcome };
            for delivery in &batch {
                let (id, len) = match facts::read(delivery) {
                    Ok(read) => read,
                    Err(error) => {
                        ledger.errors.push(error);
                        continue;
                    }
                };
                if rng.one_in(5) {
                    transaction.rejected.push(id);
                    client.queue_reject(delivery.tag, false);
                    continue;
                }
                transaction.moved.push(id);
                for target in TARGETS {
                    publish(&mut client, "", target, id, len, &delivery.properties);
                }
                client.queue_ack(delivery.tag, false);
            }
            transactions.push(transaction);
            client.flush()?;
            if roll_back {
                client.tx_rollback()?;
                open.extend(batch); // they are ours still
            } else {
                client.tx_commit()?;
                transactions.last_mut().expect("begun").outcome = Outcome::Committed;
            }
        }
    });
    (ledger, transactions)
}

/// Where a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Nowhere,
    Source,
    Dead,
    Targets,
    /// In more or fewer places than a whole transaction leaves it.
    Torn([u32; 5]),
}

fn place(counts: &[u32; 5]) -> Place {
    match counts {
        [0, 0, 0, 0, 0] => Place::Nowhere,
        [1, 0, 0, 0, 0] => Place::Source,
        [0, 1, 0, 0, 0] => Place::Dead,
        [0, 0, 1, 1, 1] => Place::Targets,
        torn => Place::Torn(*torn),
    }
}

fn check(
    ledger: &Ledger,
    transactions: &[Transaction],
    places: &HashMap<Id, [u32; 5]>,
    retired: &HashSet<Id>,
    errors: &mut Vec<String>,
) {
    let place_of = |id: &Id| places.get(id).map_or(Place::Nowhere, place);
    let lost: Vec<Id> = ledger.confirmed.iter().filter(|id| place_of(id) == Place::Nowhere).copied().collect();
    if !lost.is_empty() {
        errors.push(format!("confirmed messages are LOST: {}", some(&lost)));
    }
    for (id, counts) in places {
        if let Place::Torn(counts) = place(counts) {
            errors.push(format!("message {id:x} is {counts:?} times in {ALL:?}"));
        }
        if !ledger.sent.contains(id) {
            errors.push(format!("message {id:x} should not be there; settled before: {}", retired.contains(id)));
        }
    }
    for transaction in transactions {
        let done = transaction.moved.iter().filter(|id| place_of(id) == Place::Targets).count()
            + transaction.rejected.iter().filter(|id| place_of(id) == Place::Dead).count();
        // What was rolled back may be part of a later one.
        let right = match transaction.outcome {
            Outcome::RolledBack => true,
            Outcome::Sent => done == 0 || done == transaction.moved.len() + transaction.rejected.len(),
            Outcome::Committed => done == transaction.moved.len() + transaction.rejected.len(),
        };
        if !right {
            errors.push(format!("{done} messages of a transaction are where they were to go: {transaction:x?}"));
        }
    }
}

#[test]
fn a_transaction_over_several_queues_is_whole() {
    let mut arena = Arena::new("transactions", declare);
    let mut ledger = Ledger::default();
    let mut retired: HashSet<Id> = HashSet::new();
    let (mut committed, mut unknown) = (0, 0);
    for round in 1..=rounds() {
        let address = arena.address;
        let mut threads = Vec::new();
        for _ in 0..2 {
            let publishing = Publishing {
                address,
                publisher: arena.publisher(),
                exchange: "",
                key: SOURCE,
                window: 100,
                max: 5_000,
            };
            let rng = arena.rng.fork();
            threads.push(std::thread::spawn(move || (publishing.run(rng, |_, _| {}), Vec::new())));
            let rng = arena.rng.fork();
            threads.push(std::thread::spawn(move || work(address, rng)));
        }
        let mut transactions = Vec::new();
        for (mut known, more) in arena.kill_under(threads, 700) {
            arena.errors.append(&mut known.errors);
            ledger.merge(known);
            transactions.extend(more);
        }
        let settled = arena.rng.one_in(2);
        let found = arena.drain(&ALL, &ledger.wanted(), settled);
        let mut places: HashMap<Id, [u32; 5]> = HashMap::new();
        for (at, queue) in ALL.iter().enumerate() {
            for (id, _) in found.get(queue).into_iter().flatten() {
                places.entry(*id).or_default()[at] += 1;
            }
        }
        check(&ledger, &transactions, &places, &retired, &mut arena.errors);
        committed += transactions.iter().filter(|transaction| transaction.outcome == Outcome::Committed).count();
        unknown += transactions.iter().filter(|transaction| transaction.outcome == Outcome::Sent).count();
        let all: HashSet<Id> = places.keys().copied().collect();
        if settled {
            retired.extend(&all);
            ledger = Ledger::default();
        } else {
            ledger.carry(&all);
        }
        arena.report(
            round,
            &format!("{committed} transactions committed so far, {unknown} cut short, {} messages", all.len()),
        );
    }
    arena.finish(&format!("{committed} transactions committed, {unknown} cut short"));
}
