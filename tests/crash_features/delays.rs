//! Messages that wait until they are due: none comes early, and none is lost with the broker.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use amq_protocol::types::{AMQPValue, FieldTable};

use super::{
    arena::{Arena, Ledger, Publishing, integer, now_unix_ms, rounds, some, table, text, until_killed},
    client::{Answer, Client, Incoming, Rng},
    facts,
};

/// Exchange, routing key and queue; the queue keeps messages back, or the exchange does.
const WAYS: [(&str, &str, &str); 2] = [("", "later", "later"), ("delayed", "key", "behind")];
const LONGEST_MS: u64 = 2_500;

fn declare(client: &mut Client) -> Answer<()> {
    client.declare_queue_with("later", table([("x-delayed", true.into())]))?;
    client.declare_exchange_with("delayed", "x-delayed-message", table([("x-delayed-type", text("direct"))]))?;
    client.declare_queue("behind", true, false)?;
    client.bind("behind", "delayed", "key")
}

/// Delays of both kinds, and when the message is due in the end.
fn add_delay(headers: &mut FieldTable, in_queue: bool, rng: &mut Rng) {
    let delay = rng.range(0..LONGEST_MS);
    let due = now_unix_ms() + delay;
    headers.insert("due".into(), AMQPValue::LongLongInt(due as i64));
    match in_queue && rng.one_in(2) {
        true => headers.insert("x-deliver-at".into(), AMQPValue::LongLongInt(due as i64)),
        false => headers.insert("x-delay".into(), AMQPValue::LongInt(delay as i32)),
    };
}

/// Takes what is due, until the broker dies, or all of `wanted` has come.
fn consume(address: SocketAddr, queue: &'static str, wanted: &mut Ledger, deadline: Option<Instant>) -> Ledger {
    until_killed("consumer", |ledger| {
        let mut client = Client::connect(address)?;
        client.consume(queue, false, 200)?;
        loop {
            let mut wait = Duration::from_millis(20);
            while let Some(incoming) = client.receive(wait)? {
                wait = Duration::ZERO;
                let now = now_unix_ms();
                let Incoming::Delivery(delivery) = incoming else { panic!("a consumer was told {incoming:?}") };
                let (id, due) = (facts::read(&delivery), integer(&delivery, "due").unwrap_or(0) as u64);
                match id {
                    Ok((id, _)) if now < due => ledger.errors.push(format!("message {id:x} is {} ms EARLY", due - now)),
                    Ok((id, _)) => {
                        wanted.confirmed.remove(&id);
                        ledger.received.insert(id);
                    }
                    Err(error) => ledger.errors.push(format!("queue {queue}: {error}")),
                }
                client.queue_ack(delivery.tag, false);
            }
            client.flush()?;
            if deadline.is_some_and(|deadline| wanted.confirmed.is_empty() || Instant::now() > deadline) {
                return client.close();
            }
        }
    })
}

#[test]
fn a_delayed_message_is_neither_early_nor_lost() {
    let mut arena = Arena::new("delays", declare);
    let mut ledgers: Vec<Ledger> = WAYS.iter().map(|_| Ledger::default()).collect();
    let mut came = 0;
    for round in 1..=rounds() {
        let mut threads = Vec::new();
        for (at, (exchange, key, queue)) in WAYS.into_iter().enumerate() {
            let publishing = Publishing {
                address: arena.address,
                publisher: arena.publisher(),
                exchange,
                key,
                window: 200,
                max: 4_000,
            };
            let rng = arena.rng.fork();
            threads.push(std::thread::spawn(move || {
                (at, publishing.run(rng, |headers, rng| add_delay(headers, exchange.is_empty(), rng)))
            }));
            let address = arena.address;
            threads.push(std::thread::spawn(move || (at, consume(address, queue, &mut Ledger::default(), None))));
        }
        for (at, mut known) in arena.kill_under(threads, 1_200) {
            arena.errors.append(&mut known.errors);
            ledgers[at].merge(known);
        }
        // Mostly on and on, over several kills.
        if round == rounds() || arena.rng.one_in(4) {
            for ((_, _, queue), ledger) in WAYS.into_iter().zip(&mut ledgers) {
                let received = std::mem::take(&mut ledger.received);
                let confirmed = ledger.confirmed.difference(&received).copied().collect();
                let mut wanted = Ledger { confirmed, ..Ledger::default() };
                let deadline = Instant::now() + Duration::from_millis(LONGEST_MS) + Duration::from_secs(20);
                let mut last = consume(arena.address, queue, &mut wanted, Some(deadline));
                arena.errors.append(&mut last.errors);
                if !wanted.confirmed.is_empty() {
                    arena.errors.push(format!("{queue}: confirmed messages are LOST: {}", some(&wanted.confirmed)));
                }
                let strangers: Vec<u64> = last.received.difference(&ledger.sent).copied().collect();
                if !strangers.is_empty() {
                    arena.errors.push(format!("{queue}: messages that should not be there: {}", some(&strangers)));
                }
                came += ledger.confirmed.len();
                // What was not confirmed may still come.
                ledger.confirmed.clear();
            }
        }
        arena.report(round, &format!("{came} confirmed messages came in time so far"));
    }
    arena.finish(&format!("{came} confirmed messages came, none early"));
}
