//! Messages that are rejected, expire, or are too many: each is in its queue or among the dead letters, never in both, never
//! in neither, and its history says that it died once.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    time::Duration,
};

use amq_protocol::types::AMQPValue;

use super::{
    arena::{Arena, Ledger, Publishing, deaths, rounds, some, table, text, until_killed},
    client::{Answer, Client, Delivery, Incoming, Rng},
    facts::{self, Id},
};

/// A queue and where its dead letters go.
struct Pair {
    source: &'static str,
    dead: &'static str,
    reason: &'static str,
    arguments: &'static [(&'static str, Value)],
    /// Whether consumers reject.
    consumed: bool,
}

#[derive(Clone, Copy)]
enum Value {
    Text(&'static str),
    Number(i32),
}

const QUORUM: (&str, Value) = ("x-queue-type", Value::Text("quorum"));

const PAIRS: [Pair; 6] = [
    Pair { source: "reject", dead: "reject.dead", reason: "rejected", arguments: &[], consumed: true },
    Pair {
        source: "ttl",
        dead: "ttl.dead",
        reason: "expired",
        arguments: &[("x-message-ttl", Value::Number(60))],
        consumed: false,
    },
    Pair {
        source: "length",
        dead: "length.dead",
        reason: "maxlen",
        arguments: &[("x-max-length", Value::Number(50))],
        consumed: false,
    },
    Pair {
        source: "quorum",
        dead: "quorum.dead",
        reason: "rejected",
        arguments: &[QUORUM, ("x-delivery-limit", Value::Number(-1))],
        consumed: true,
    },
    Pair {
        source: "quorum.length",
        dead: "quorum.length.dead",
        reason: "maxlen",
        arguments: &[QUORUM, ("x-max-length", Value::Number(20)), ("x-delivery-limit", Value::Number(-1))],
        consumed: false,
    },
    Pair {
        source: "sure",
        dead: "sure.dead",
        reason: "rejected",
        arguments: &[
            QUORUM,
            ("x-delivery-limit", Value::Number(-1)),
            ("x-dead-letter-strategy", Value::Text("at-least-once")),
            ("x-overflow", Value::Text("reject-publish")),
        ],
        consumed: true,
    },
];

fn declare(client: &mut Client) -> Answer<()> {
    for pair in &PAIRS {
        let mut arguments =
            table([("x-dead-letter-exchange", text("")), ("x-dead-letter-routing-key", text(pair.dead))]);
        for (key, value) in pair.arguments {
            let value = match value {
                Value::Text(value) => text(value),
                Value::Number(number) => AMQPValue::LongInt(*number),
            };
            arguments.insert((*key).into(), value);
        }
        client.declare_queue_with(pair.source, arguments)?;
        match pair.consumed && pair.source != "reject" {
            true => client.declare_queue_with(
                pair.dead,
                table([("x-queue-type", text("quorum")), ("x-delivery-limit", (-1i32).into())]),
            )?,
            false => client.declare_queue(pair.dead, true, false).map(drop)?,
        }
    }
    Ok(())
}

/// Takes messages and settles them in every way. In transactions it is known afterwards what was settled.
fn settle(address: SocketAddr, queue: &'static str, in_transactions: bool, mut rng: Rng) -> Ledger {
    until_killed(queue, |ledger| {
        let mut client = Client::connect(address)?;
        if in_transactions {
            client.tx_select()?;
        }
        client.consume(queue, false, 40)?;
        let mut open: Vec<(u64, Id)> = Vec::new();
        loop {
            let mut wait = Duration::from_millis(20);
            while let Some(incoming) = client.receive(wait)? {
                wait = Duration::ZERO;
                let Incoming::Delivery(delivery) = incoming else { panic!("a consumer was told {incoming:?}") };
                match facts::read(&delivery) {
                    Ok((id, _)) => open.push((delivery.tag, id)),
                    Err(error) => ledger.errors.push(format!("queue {queue}: {error}")),
                }
            }
            let (mut acked, mut dead) = (Vec::new(), Vec::new());
            for _ in 0..rng.range(0..open.len() as u64 + 1) {
                let (tag, id) = open.swap_remove(rng.range(0..open.len() as u64) as usize);
                match rng.range(0..8) {
                    0 => {
                        ledger.acked.insert(id);
                        acked.push(id);
                        client.queue_ack(tag, false);
                    }
                    1 => client.queue_nack(tag, true),
                    2..5 => {
                        dead.push(id);
                        client.queue_nack(tag, false);
                    }
                    _ => {
                        dead.push(id);
                        client.queue_reject(tag, false);
                    }
                }
            }
            client.flush()?;
            if in_transactions {
                client.tx_commit()?;
                ledger.gone.extend(acked);
                ledger.dead.extend(dead);
            }
        }
    })
}

/// Acks a few dead letters.
fn take_dead(address: SocketAddr, queue: &'static str, mut rng: Rng) -> Ledger {
    until_killed(queue, |ledger| {
        let mut client = Client::connect(address)?;
        client.consume(queue, false, 10)?;
        loop {
            let Some(Incoming::Delivery(delivery)) = client.receive(Duration::from_millis(100))? else { continue };
            if rng.one_in(3) {
                ledger.acked.extend(facts::read(&delivery).ok().map(|(id, _)| id));
                client.queue_ack(delivery.tag, false);
            } else {
                client.queue_requeue(delivery.tag);
                std::thread::sleep(Duration::from_millis(1));
            }
            client.flush()?;
        }
    })
}

/// Compares what is in a queue and its dead-letter queue with what is known; answers all that was found.
fn check(
    pair: &Pair,
    ledger: &Ledger,
    retired: &HashSet<Id>,
    found: &HashMap<&'static str, Vec<(Id, Delivery)>>,
    errors: &mut Vec<String>,
) -> HashSet<Id> {
    let mut complain = |text: String| errors.push(format!("{}: {text}", pair.source));
    let mut places: HashMap<Id, (u32, u32)> = HashMap::new();
    for (id, delivery) in &found[pair.source] {
        places.entry(*id).or_default().0 += 1;
        if !deaths(delivery).is_empty() {
            complain(format!("message {id:x} is in its queue and has died: {:?}", deaths(delivery)));
        }
    }
    for (id, delivery) in &found[pair.dead] {
        places.entry(*id).or_default().1 += 1;
        let expected = [(pair.source.to_owned(), pair.reason.to_owned(), 1)];
        if deaths(delivery) != expected {
            complain(format!("dead letter {id:x} has the history {:?}, not {expected:?}", deaths(delivery)));
        }
    }
    let double: Vec<Id> = places.iter().filter(|(_, (source, dead))| source + dead > 1).map(|(id, _)| *id).collect();
    if !double.is_empty() {
        complain(format!("messages are there TWICE: {}, such as {:?}", some(&double), places[&double[0]]));
    }
    let all: HashSet<Id> = places.keys().copied().collect();
    let lost: Vec<Id> = ledger.wanted().difference(&all).copied().collect();
    if !lost.is_empty() {
        complain(format!("confirmed messages are LOST: {}", some(&lost)));
    }
    let strangers: Vec<Id> = all.difference(&ledger.sent).copied().collect();
    if !strangers.is_empty() {
        let retired = strangers.iter().filter(|id| retired.contains(id)).count();
        complain(format!("messages that should not be there: {}, {retired} of them settled before", some(&strangers)));
    }
    let back: Vec<Id> = all.intersection(&ledger.gone).copied().collect();
    if !back.is_empty() {
        complain(format!("messages came back whose ack was committed: {}", some(&back)));
    }
    let undead: Vec<Id> = ledger
        .dead
        .iter()
        .filter(|id| !ledger.acked.contains(id) && places.get(id).is_none_or(|place| place.1 == 0))
        .copied()
        .collect();
    if !undead.is_empty() {
        complain(format!("rejects were committed and made no dead letters: {}", some(&undead)));
    }
    all
}

#[test]
fn a_dead_letter_is_in_one_place() {
    let mut arena = Arena::new("dead letters", declare);
    let mut ledgers: Vec<Ledger> = PAIRS.iter().map(|_| Ledger::default()).collect();
    let mut retired: HashSet<Id> = HashSet::new();
    let (mut confirmed, mut dead_letters) = (0, 0);
    for round in 1..=rounds() {
        let mut threads = Vec::new();
        for (at, pair) in PAIRS.iter().enumerate() {
            let publishing = Publishing {
                address: arena.address,
                publisher: arena.publisher(),
                exchange: "",
                key: pair.source,
                window: [10, 100, 500][arena.rng.range(0..3) as usize],
                max: 3_000,
            };
            let (address, rng) = (arena.address, arena.rng.fork());
            threads.push(std::thread::spawn(move || (at, publishing.run(rng, |_, _| {}))));
            for in_transactions in [false, true] {
                let (rng, source) = (arena.rng.fork(), pair.source);
                if pair.consumed {
                    threads.push(std::thread::spawn(move || (at, settle(address, source, in_transactions, rng))));
                }
            }
            if arena.rng.one_in(2) {
                let (rng, dead) = (arena.rng.fork(), pair.dead);
                threads.push(std::thread::spawn(move || (at, take_dead(address, dead, rng))));
            }
        }
        for (at, mut known) in arena.kill_under(threads, 1_200) {
            arena.errors.append(&mut known.errors);
            ledgers[at].merge(known);
        }
        let settled = arena.rng.one_in(2);
        for (pair, ledger) in PAIRS.iter().zip(&mut ledgers) {
            let mut wanted = ledger.wanted();
            confirmed += wanted.len();
            let found = arena.drain(&[pair.source, pair.dead], &wanted, settled);
            if found.is_empty() {
                break;
            }
            // What expires while it is drained has left its queue.
            wanted = check(pair, ledger, &retired, &found, &mut arena.errors);
            dead_letters += found[pair.dead].len();
            if settled {
                retired.extend(&wanted);
                *ledger = Ledger::default();
            } else {
                ledger.carry(&wanted);
                ledger.dead.retain(|id| wanted.contains(id));
                ledger.gone.clear();
            }
        }
        arena.report(round, &format!("{confirmed} messages checked so far, {dead_letters} of them dead letters"));
    }
    arena.finish(&format!("{confirmed} messages checked, {dead_letters} of them dead letters"));
}
