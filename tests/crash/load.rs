//! The clients of a round. Each runs until its socket dies, and hands over what it knows.

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    time::{Duration, Instant},
};

use amq_protocol::protocol::{AMQPClass, basic::AMQPMethod as B};

use super::{
    client::{Answer, Client, ClientError, Delivery, Incoming, Rng, publish_frames},
    facts::{self, Definition, Facts, Id, Outcome, Presence, Transaction},
};

/// Runs a client to its end; only a dying socket (or a broker that says goodbye) is a good one.
pub fn run(who: &'static str, work: impl FnOnce(&mut Facts) -> Answer<()>) -> Facts {
    let mut facts = Facts::default();
    match work(&mut facts) {
        Ok(()) | Err(ClientError::Gone(_)) | Err(ClientError::Closed { code: 320, .. }) => {}
        Err(error) => facts.errors.push(format!("{who}: {error:?}")),
    }
    facts
}

/// What a publisher does.
pub struct Publishing {
    pub address: SocketAddr,
    /// Upper half of its messages' ids.
    pub publisher: u64,
    pub exchange: &'static str,
    pub key: &'static str,
    /// Where its messages go.
    pub queues: &'static [&'static str],
    pub window: u64,
    pub transient_one_in: u64,
    pub max_messages: u64,
    pub small: bool,
}

fn size(rng: &mut Rng, small: bool) -> usize {
    let upper = match rng.range(0..20) {
        _ if small => 300,
        0..12 => 300,
        12..18 => 5_000,
        18 => 40_000,
        _ => 102_401,
    };
    rng.range(0..upper) as usize
}

impl Publishing {
    pub fn run(self, mut rng: Rng) -> Facts {
        run("publisher", |facts| self.publish(facts, &mut rng))
    }

    fn publish(&self, facts: &mut Facts, rng: &mut Rng) -> Answer<()> {
        let mut client = Client::connect(self.address)?;
        client.confirm_select()?;
        // Sent and not answered: confirm number, message, persistent.
        let mut open: VecDeque<(u64, Id, bool)> = VecDeque::new();
        let mut count = 0;
        loop {
            let room = self.window.saturating_sub(open.len() as u64).min(self.max_messages - count);
            let batch = if room == 0 { 0 } else { rng.range(1..room.min(64) + 1) };
            for _ in 0..batch {
                count += 1;
                let (id, len) = (self.publisher << 32 | count, size(rng, self.small));
                let persistent = self.transient_one_in == 0 || !rng.one_in(self.transient_one_in);
                for &queue in self.queues {
                    let facts = facts.queue(queue);
                    if persistent {
                        facts.sent.insert(id)
                    } else {
                        facts.transient.insert(id)
                    };
                }
                open.push_back((count, id, persistent));
                let properties = facts::properties(id, len, persistent);
                publish_frames(client.buffer(), 1, self.exchange, self.key, false, &properties, &facts::body(id, len));
            }
            client.flush()?;
            if rng.one_in(6) {
                std::thread::sleep(Duration::from_millis(rng.range(0..8)));
            }
            let mut wait = if room == batch { Duration::from_millis(50) } else { Duration::ZERO };
            while let Some(incoming) = client.receive(wait)? {
                wait = Duration::ZERO;
                let (up_to, multiple, acked) = match incoming {
                    Incoming::Method(_, AMQPClass::Basic(B::Ack(ack))) => (ack.delivery_tag, ack.multiple, true),
                    Incoming::Method(_, AMQPClass::Basic(B::Nack(nack))) => (nack.delivery_tag, nack.multiple, false),
                    other => panic!("a publisher was told {other:?}"),
                };
                let before = open.len();
                open.retain(|&(number, id, persistent)| {
                    let answered = number == up_to || (multiple && number < up_to);
                    if answered && acked && persistent {
                        for queue in self.queues {
                            facts.queue(queue).confirmed.insert(id);
                        }
                    }
                    !answered
                });
                if open.len() == before {
                    facts.errors.push(format!("publish {up_to} was confirmed twice, or never sent"));
                }
                if !acked {
                    facts.errors.push(format!("publish {up_to} was refused"));
                }
            }
        }
    }
}

/// How a consumer settles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// Now and then all up to the newest.
    InOrder,
    /// One at a time, any of them; some go back, some are never settled.
    Shuffled,
    /// No acks at all.
    Auto,
    /// One at a time through `basic.get`, out of order.
    Get,
    /// Acks, then publishes a result: when that is confirmed, the acks before it are on disk, for rounds come in order.
    Pipeline,
}

fn note_received(facts: &mut Facts, queue: &'static str, delivery: &Delivery) -> Option<Id> {
    match facts::read(delivery) {
        Ok((id, _)) => {
            facts.queue(queue).received.insert(id);
            Some(id)
        }
        Err(error) => {
            facts.errors.push(format!("queue {queue}: {error}"));
            None
        }
    }
}

/// A consumer; `results` are the ids of what it publishes.
pub fn consume(address: SocketAddr, queue: &'static str, style: Style, results: u64, mut rng: Rng) -> Facts {
    run("consumer", |facts| match style {
        Style::InOrder | Style::Shuffled => consume_acked(address, queue, style, facts, &mut rng),
        Style::Auto => consume_auto(address, queue, facts),
        Style::Get => get_acked(address, queue, facts, &mut rng),
        Style::Pipeline => pipeline(address, queue, results, facts, &mut rng),
    })
}

fn consume_acked(
    address: SocketAddr,
    queue: &'static str,
    style: Style,
    facts: &mut Facts,
    rng: &mut Rng,
) -> Answer<()> {
    loop {
        let mut client = Client::connect(address)?;
        client.consume(queue, false, 100)?;
        let lives_until = Instant::now() + Duration::from_millis(rng.range(50..1500));
        let mut unacked: Vec<(u64, Id)> = Vec::new();
        while Instant::now() < lives_until {
            let mut wait = Duration::from_millis(20);
            while let Some(incoming) = client.receive(wait)? {
                wait = Duration::ZERO;
                let Incoming::Delivery(delivery) = incoming else { panic!("a consumer was told {incoming:?}") };
                if let Some(id) = note_received(facts, queue, &delivery) {
                    unacked.push((delivery.tag, id));
                }
            }
            if style == Style::InOrder {
                // A few stay open, and are settled with the next batch.
                let Some(&(tag, _)) = unacked.get(unacked.len().saturating_sub(1 + rng.range(0..4) as usize)) else {
                    continue;
                };
                let done = unacked.iter().take_while(|(open, _)| *open <= tag).count();
                facts.queue(queue).acked.extend(unacked.drain(..done).map(|(_, id)| id));
                client.queue_ack(tag, true);
            } else {
                // Up to the prefetch stays unsettled for the rest of this connection's life.
                while unacked.len() > 40 {
                    let (tag, id) = unacked.swap_remove(rng.range(0..unacked.len() as u64) as usize);
                    if rng.one_in(8) {
                        client.queue_requeue(tag);
                    } else {
                        facts.queue(queue).acked.insert(id);
                        client.queue_ack(tag, false);
                    }
                }
            }
            client.flush()?;
        }
        // Sometimes a goodbye, sometimes none; what was not settled goes back either way.
        if rng.one_in(2) {
            client.close()?;
        }
    }
}

fn consume_auto(address: SocketAddr, queue: &'static str, facts: &mut Facts) -> Answer<()> {
    facts.queue(queue).auto_acked = true;
    let mut client = Client::connect(address)?;
    client.consume(queue, true, 0)?;
    loop {
        if let Some(Incoming::Delivery(delivery)) = client.receive(Duration::from_millis(100))?
            && let Some(id) = note_received(facts, queue, &delivery)
        {
            facts.queue(queue).acked.insert(id);
        }
    }
}

fn get_acked(address: SocketAddr, queue: &'static str, facts: &mut Facts, rng: &mut Rng) -> Answer<()> {
    let mut client = Client::connect(address)?;
    let mut unacked: Vec<(u64, Id)> = Vec::new();
    loop {
        match client.get(queue)? {
            None => std::thread::sleep(Duration::from_millis(2)),
            Some(delivery) => {
                if let Some(id) = note_received(facts, queue, &delivery) {
                    unacked.push((delivery.tag, id));
                }
            }
        }
        if unacked.len() > 10 {
            let (tag, id) = unacked.swap_remove(rng.range(0..unacked.len() as u64) as usize);
            facts.queue(queue).acked.insert(id);
            client.queue_ack(tag, false);
            client.flush()?;
        }
    }
}

fn pipeline(address: SocketAddr, queue: &'static str, publisher: u64, facts: &mut Facts, rng: &mut Rng) -> Answer<()> {
    const OUT: &str = "pipeline.out";
    let mut client = Client::connect(address)?;
    client.confirm_select()?;
    client.consume(queue, false, 50)?;
    let mut unacked: Vec<(u64, Id)> = Vec::new();
    let mut acks_before: HashMap<u64, Vec<Id>> = HashMap::new();
    let (mut count, mut confirmed) = (0, 0);
    loop {
        let mut wait = Duration::from_millis(20);
        while let Some(incoming) = client.receive(wait)? {
            wait = Duration::ZERO;
            match incoming {
                Incoming::Delivery(delivery) => {
                    if let Some(id) = note_received(facts, queue, &delivery) {
                        unacked.push((delivery.tag, id));
                    }
                }
                Incoming::Method(_, AMQPClass::Basic(B::Ack(ack))) => {
                    // Confirms of one queue's persistent messages come in order.
                    while confirmed < ack.delivery_tag {
                        confirmed += 1;
                        facts.queue(OUT).confirmed.insert(publisher << 32 | confirmed);
                        let done = acks_before.remove(&confirmed).unwrap_or_default();
                        facts.queue(queue).acked_for_good.extend(done);
                    }
                }
                other => panic!("a worker was told {other:?}"),
            }
        }
        let mut done = Vec::new();
        while unacked.len() > 5 {
            let (tag, id) = unacked.swap_remove(rng.range(0..unacked.len() as u64) as usize);
            facts.queue(queue).acked.insert(id);
            client.queue_ack(tag, false);
            done.push(id);
        }
        if !done.is_empty() {
            count += 1;
            let (id, len) = (publisher << 32 | count, rng.range(0..200) as usize);
            facts.queue(OUT).sent.insert(id);
            acks_before.insert(count, done);
            publish_frames(
                client.buffer(),
                1,
                "",
                OUT,
                false,
                &facts::properties(id, len, true),
                &facts::body(id, len),
            );
        }
        client.flush()?;
    }
}

/// Publishes to two queues in transactions, some of them large, some rolled back.
pub fn publish_in_transactions(address: SocketAddr, publisher: u64, max: u64, mut rng: Rng) -> Facts {
    run("transactional publisher", |facts| {
        let mut client = Client::connect(address)?;
        client.tx_select()?;
        let mut count = 0;
        while count < max {
            let mut published = Vec::new();
            for _ in 0..rng.range(2..12) {
                for queue in ["tx.a", "tx.b"] {
                    count += 1;
                    let (id, len) = (publisher << 32 | count, size(&mut rng, false).min(20_000));
                    published.push((queue, id));
                    publish_frames(
                        client.buffer(),
                        1,
                        "",
                        queue,
                        false,
                        &facts::properties(id, len, true),
                        &facts::body(id, len),
                    );
                }
            }
            let rolled_back = rng.one_in(6);
            facts.transactions.push(Transaction { published, acked: Vec::new(), outcome: Outcome::Open });
            client.flush()?;
            finish(&mut client, rolled_back, facts)?;
        }
        park(&mut client)
    })
}

/// Commits or rolls back the last transaction of `facts`.
fn finish(client: &mut Client, roll_back: bool, facts: &mut Facts) -> Answer<()> {
    if roll_back {
        return client.tx_rollback();
    }
    let set = |facts: &mut Facts, outcome| facts.transactions.last_mut().expect("begun").outcome = outcome;
    set(facts, Outcome::Sent);
    client.tx_commit()?;
    set(facts, Outcome::Committed);
    Ok(())
}

/// Waits for the end of the socket.
fn park(client: &mut Client) -> Answer<()> {
    loop {
        client.receive(Duration::from_millis(200))?;
    }
}

/// Moves messages from one queue to another in transactions: each is in one of the two, always.
pub fn move_in_transactions(address: SocketAddr, mut rng: Rng) -> Facts {
    run("mover", |facts| {
        let mut client = Client::connect(address)?;
        client.tx_select()?;
        loop {
            let mut transaction = Transaction { published: Vec::new(), acked: Vec::new(), outcome: Outcome::Open };
            for _ in 0..rng.range(1..10) {
                let Some(delivery) = client.get("move.from")? else { break };
                let Some(id) = note_received(facts, "move.from", &delivery) else { continue };
                transaction.published.push(("move.to", id));
                transaction.acked.push(("move.from", id));
                publish_frames(client.buffer(), 1, "", "move.to", false, &delivery.properties, &delivery.body);
                client.queue_ack(delivery.tag, false);
            }
            if transaction.acked.is_empty() {
                std::thread::sleep(Duration::from_millis(2));
                continue;
            }
            let roll_back = rng.one_in(5);
            // What was rolled back before and is moved again now is no longer that transaction's to answer for.
            for earlier in facts.transactions.iter_mut().filter(|earlier| earlier.outcome == Outcome::Open) {
                earlier.published.retain(|step| !transaction.published.contains(step));
                earlier.acked.retain(|step| !transaction.acked.contains(step));
            }
            facts.transactions.push(transaction);
            client.flush()?;
            finish(&mut client, roll_back, facts)?;
            if roll_back {
                client.recover()?;
            }
        }
    })
}

/// Publishes, waits for the confirms, purges: what was there is then gone for good.
pub fn publish_and_purge(address: SocketAddr, publisher: u64, base: Vec<Id>, mut rng: Rng) -> Facts {
    const QUEUE: &str = "purged";
    run("purger", |facts| {
        let mut client = Client::connect(address)?;
        client.confirm_select()?;
        let (mut count, mut confirmed) = (0, 0);
        let mut there = base;
        loop {
            for _ in 0..rng.range(1..60) {
                count += 1;
                let (id, len) = (publisher << 32 | count, size(&mut rng, true));
                facts.queue(QUEUE).sent.insert(id);
                there.push(id);
                publish_frames(
                    client.buffer(),
                    1,
                    "",
                    QUEUE,
                    false,
                    &facts::properties(id, len, true),
                    &facts::body(id, len),
                );
            }
            client.flush()?;
            let wait_for_confirms = rng.one_in(2);
            while wait_for_confirms && confirmed < count {
                if let Some(Incoming::Method(_, AMQPClass::Basic(B::Ack(ack)))) =
                    client.receive(Duration::from_secs(1))?
                {
                    while confirmed < ack.delivery_tag {
                        confirmed += 1;
                        facts.queue(QUEUE).confirmed.insert(publisher << 32 | confirmed);
                    }
                }
            }
            if rng.one_in(3) {
                facts.queue(QUEUE).acked.extend(there.iter().copied());
                let purged = client.purge_queue(QUEUE)?;
                if purged as usize != there.len() {
                    facts.errors.push(format!("{purged} messages purged of {}", there.len()));
                }
                facts.queue(QUEUE).acked_for_good.extend(there.drain(..));
            }
            std::thread::sleep(Duration::from_millis(rng.range(0..10)));
        }
    })
}

/// Declares, binds, publishes to, unbinds and deletes durable things.
pub fn define(address: SocketAddr, round: usize, mut definitions: HashMap<String, Definition>, mut rng: Rng) -> Facts {
    run("definer", |facts| {
        let outcome = define_until_the_end(address, round, &mut definitions, &mut rng);
        facts.definitions = definitions;
        outcome
    })
}

fn define_until_the_end(
    address: SocketAddr,
    round: usize,
    definitions: &mut HashMap<String, Definition>,
    rng: &mut Rng,
) -> Answer<()> {
    let mut client = Client::connect(address)?;
    client.confirm_select()?;
    let mut count = 0;
    loop {
        let name = if definitions.len() < 10 || rng.one_in(4) {
            count += 1;
            format!("def.{round}.{count}")
        } else {
            let mut names: Vec<_> = definitions.keys().cloned().collect();
            names.sort();
            names.swap_remove(rng.range(0..names.len() as u64) as usize)
        };
        let definition = definitions.entry(name.clone()).or_default();
        if definition.exchange == Presence::Unknown || definition.queue == Presence::Unknown {
            continue;
        }
        // Every call is noted as under way, then as done.
        if definition.exchange == Presence::Absent {
            definition.exchange = Presence::Unknown;
            client.declare_exchange(&name, "direct", false)?;
            definition.exchange = Presence::Present;
        } else if definition.queue == Presence::Absent {
            definition.queue = Presence::Unknown;
            client.declare_queue(&name, true, false)?;
            definition.queue = Presence::Present;
        } else if definition.binding == Presence::Absent {
            definition.binding = Presence::Unknown;
            client.bind(&name, &name, "key")?;
            definition.binding = Presence::Present;
        } else {
            match rng.range(0..6) {
                0 => {
                    definition.binding = Presence::Unknown;
                    client.unbind(&name, &name, "key")?;
                    definition.binding = Presence::Absent;
                }
                1 => {
                    (definition.queue, definition.binding) = (Presence::Unknown, Presence::Unknown);
                    definition.messages.0 = 0;
                    client.delete_queue(&name)?;
                    (definition.queue, definition.binding) = (Presence::Absent, Presence::Absent);
                    definition.messages = (0, 0);
                }
                2 => {
                    (definition.exchange, definition.binding) = (Presence::Unknown, Presence::Unknown);
                    client.delete_exchange(&name)?;
                    (definition.exchange, definition.binding) = (Presence::Absent, Presence::Absent);
                }
                _ if definition.binding == Presence::Present => {
                    definition.messages.1 += 1;
                    publish_frames(
                        client.buffer(),
                        1,
                        &name,
                        "key",
                        false,
                        &facts::properties(0, 10, true),
                        &facts::body(0, 10),
                    );
                    client.flush()?;
                    while !matches!(
                        client.receive(Duration::from_secs(1))?,
                        Some(Incoming::Method(_, AMQPClass::Basic(B::Ack(_))))
                    ) {}
                    definition.messages.0 += 1;
                }
                _ => {}
            }
        }
    }
}
