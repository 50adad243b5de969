//! Publishers that are not sure what arrived and publish it all again: a value that was confirmed once is in the queue once,
//! however often the broker was killed in between.

use std::{
    collections::{HashSet, VecDeque},
    net::SocketAddr,
    time::Duration,
};

use amq_protocol::types::{AMQPValue, FieldTable};

use super::{
    arena::{Arena, Ledger, publish, rounds, some, table, take_confirm, text, until_killed},
    client::{Answer, Client, PATIENCE, Rng},
    facts::{self, Id},
};

/// Exchange, routing key and queue; the queue drops duplicates, or the exchange does.
const WAYS: [(&str, &str, &str); 3] =
    [("", "once", "once"), ("", "once.quorum", "once.quorum"), ("once", "key", "behind")];

fn declare(client: &mut Client) -> Answer<()> {
    let once = || table([("x-message-deduplication", true.into()), ("x-cache-size", AMQPValue::LongInt(1_000_000))]);
    client.declare_queue_with("once", once())?;
    let mut quorum = once();
    quorum.insert("x-queue-type".into(), text("quorum"));
    quorum.insert("x-delivery-limit".into(), (-1i32).into());
    client.declare_queue_with("once.quorum", quorum)?;
    client.declare_exchange_with("once", "direct", once())?;
    client.declare_queue("behind", true, false)?;
    client.bind("behind", "once", "key")
}

fn publish_one(client: &mut Client, (exchange, key, _): (&str, &str, &str), id: Id) {
    let mut headers = FieldTable::default();
    headers.insert("x-deduplication-header".into(), text(&format!("{id:x}")));
    let len = (id % 300) as usize;
    publish(client, exchange, key, id, len, &facts::properties(id, len, true).with_headers(headers));
}

/// Publishes new values, and old ones among them, until the broker dies.
fn publish_some(address: SocketAddr, way: usize, publisher: u64, old: &[Id], mut rng: Rng) -> Ledger {
    until_killed("publisher", |ledger| {
        let mut client = Client::connect(address)?;
        client.confirm_select()?;
        let mut mine = old.to_vec();
        let (mut count, mut number) = (0, 0);
        let mut open: VecDeque<(u64, Id)> = VecDeque::new();
        loop {
            if open.len() < 400 && count < 4_000 {
                for _ in 0..rng.range(1..64) {
                    let id = if mine.is_empty() || rng.one_in(2) {
                        count += 1;
                        publisher << 32 | count
                    } else {
                        mine[rng.range(0..mine.len() as u64) as usize]
                    };
                    mine.push(id);
                    ledger.sent.insert(id);
                    number += 1;
                    open.push_back((number, id));
                    publish_one(&mut client, WAYS[way], id);
                }
            }
            client.flush()?;
            let mut wait = Duration::from_millis(2);
            while let Some(incoming) = client.receive(wait)? {
                wait = Duration::ZERO;
                take_confirm(&incoming, &mut open, ledger);
            }
        }
    })
}

/// Publishes values until all are confirmed.
fn publish_again(address: SocketAddr, way: usize, ids: &[Id]) -> Answer<()> {
    let mut client = Client::connect(address)?;
    client.confirm_select()?;
    let mut ledger = Ledger::default();
    let mut open: VecDeque<(u64, Id)> = VecDeque::new();
    for (number, &id) in (1..).zip(ids) {
        open.push_back((number, id));
        publish_one(&mut client, WAYS[way], id);
    }
    client.flush()?;
    while !open.is_empty() {
        take_confirm(&client.receive(PATIENCE)?.expect("a confirm"), &mut open, &mut ledger);
    }
    client.close()
}

#[test]
fn what_is_published_again_after_a_crash_is_there_once() {
    let mut arena = Arena::new("duplicates", declare);
    // All that was sent by each way, and whether it was confirmed.
    let mut ledgers: Vec<Ledger> = WAYS.iter().map(|_| Ledger::default()).collect();
    for round in 1..=rounds() {
        let mut threads = Vec::new();
        for (way, ledger) in ledgers.iter().enumerate() {
            for _ in 0..2 {
                let (address, publisher, rng) = (arena.address, arena.publisher(), arena.rng.fork());
                let old: Vec<Id> = ledger.sent.iter().take(2_000).copied().collect();
                threads.push(std::thread::spawn(move || (way, publish_some(address, way, publisher, &old, rng))));
            }
        }
        for (way, mut known) in arena.kill_under(threads, 700) {
            arena.errors.append(&mut known.errors);
            ledgers[way].merge(known);
        }
        let mut total = 0;
        for (way, ledger) in ledgers.iter_mut().enumerate() {
            let queue = WAYS[way].2;
            // Now and then it is looked at what is there before everything is sent again.
            if arena.rng.one_in(2) {
                let found = arena.drain(&[queue], &ledger.confirmed, false);
                let there: HashSet<Id> = found[queue].iter().map(|(id, _)| *id).collect();
                let lost: Vec<Id> = ledger.confirmed.difference(&there).copied().collect();
                if !lost.is_empty() {
                    arena.errors.push(format!("{queue}: confirmed messages are LOST: {}", some(&lost)));
                }
            }
            let again: Vec<Id> = ledger.sent.iter().copied().collect();
            publish_again(arena.address, way, &again).expect("the broker answers");
            let found = arena.drain(&[queue], &ledger.sent, false);
            let there: HashSet<Id> = found[queue].iter().map(|(id, _)| *id).collect();
            if there.len() != found[queue].len() {
                arena.errors.push(format!("{queue}: {} messages are there TWICE", found[queue].len() - there.len()));
            }
            if there != ledger.sent {
                let lost: Vec<Id> = ledger.sent.difference(&there).copied().collect();
                arena.errors.push(format!("{queue}: messages are LOST that were published again: {}", some(&lost)));
            }
            ledger.confirmed = there;
            total += found[queue].len();
        }
        arena.report(round, &format!("{total} values, each there once"));
        // Longer queues would only make the rounds longer.
        if total > 60_000 {
            let all: Vec<&str> = WAYS.iter().map(|way| way.2).collect();
            arena.drain(&all, &HashSet::new(), true);
            ledgers = WAYS.iter().map(|_| Ledger::default()).collect();
        }
    }
    arena.finish("each value there once");
}
