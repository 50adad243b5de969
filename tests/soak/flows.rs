//! Steady flows: paced publishers with confirms, and consumers that acknowledge, send back and reject, over connections that
//! end with a goodbye, or are cut.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use amq_protocol::{
    protocol::{AMQPClass, BasicProperties, basic::AMQPMethod as B},
    types::{AMQPValue, FieldTable, ShortString},
};

use super::{
    client::{Answer, Client, Delivery, Incoming, Rng, cut, publish_frames},
    facts::{self, Id},
    ledger::Ledger,
};

/// How much of the load goes on.
pub const ALL: u8 = 0;
/// What publishes has ended, what consumes goes on.
pub const DRAINING: u8 = 1;
pub const OVER: u8 = 2;

/// What all clients share.
pub struct Site {
    pub address: std::net::SocketAddr,
    pub ledger: Ledger,
    pub phase: AtomicU8,
    pub connections: AtomicU64,
    pub cuts: AtomicU64,
    publishers: AtomicU64,
}

impl Site {
    pub fn new(address: std::net::SocketAddr) -> Arc<Site> {
        Arc::new(Site {
            address,
            ledger: Ledger::default(),
            phase: AtomicU8::new(ALL),
            connections: AtomicU64::new(0),
            cuts: AtomicU64::new(0),
            publishers: AtomicU64::new(0),
        })
    }

    pub fn connect(&self) -> Answer<Client> {
        self.connections.fetch_add(1, Ordering::Relaxed);
        Client::connect(self.address)
    }

    pub fn cut(&self, client: &Client) {
        self.cuts.fetch_add(1, Ordering::Relaxed);
        cut(&client.socket().expect("another handle"));
    }

    pub fn is(&self, phase: u8) -> bool {
        self.phase.load(Ordering::Relaxed) == phase
    }

    /// Runs a client until its work is over; whatever goes wrong is a fault.
    pub fn run(&self, who: &str, work: impl FnOnce() -> Answer<()>) {
        if let Err(error) = work() {
            self.ledger.complain(format!("{who}: {error:?}"));
        }
    }

    /// Ids of messages, one after the other, that no other publisher has.
    pub fn ids(&self) -> impl FnMut() -> Id + use<> {
        let mut last = (self.publishers.fetch_add(1, Ordering::Relaxed) + 1) << 32;
        move || {
            last += 1;
            last
        }
    }
}

/// 16 B to 64 KiB, mostly small.
pub fn mixed_size(rng: &mut Rng) -> usize {
    let upper = match rng.range(0..100) {
        0..60 => 300,
        60..90 => 2_000,
        90..99 => 10_000,
        _ => 65_536,
    };
    rng.range(16..upper + 1) as usize
}

/// Where and how messages are published.
#[derive(Clone, Copy)]
pub struct Flow {
    pub exchange: &'static str,
    pub key: &'static str,
    pub per_second: u64,
    pub persistent: bool,
    /// Adds what this kind of message has beside its id.
    pub add: fn(BasicProperties, &mut Rng) -> BasicProperties,
}

impl Flow {
    pub fn to(key: &'static str, per_second: u64) -> Flow {
        Flow { exchange: "", key, per_second, persistent: true, add: |properties, _| properties }
    }

    /// Publishes until the load ends.
    pub fn publish(self, site: &Site, mut rng: Rng) {
        let mut next_id = site.ids();
        site.run(&format!("publisher to '{}'", self.key), || {
            while site.is(ALL) {
                self.publish_over_one_connection(site, &mut next_id, &mut rng)?;
            }
            Ok(())
        });
    }

    fn publish_over_one_connection(self, site: &Site, next_id: &mut impl FnMut() -> Id, rng: &mut Rng) -> Answer<()> {
        const TICK: Duration = Duration::from_millis(20);
        let mut client = site.connect()?;
        client.confirm_select()?;
        let (mut open, mut sent) = (VecDeque::new(), 0u64);
        let began = Instant::now();
        let lifetime = Duration::from_millis(rng.range(1_000..15_000));
        while site.is(ALL) && began.elapsed() < lifetime {
            // Late or not, a publisher never makes up for more than half a second.
            let due = (began.elapsed().as_millis() as u64 * self.per_second / 1000).min(sent + self.per_second / 2);
            while sent < due {
                sent += 1;
                open.push_back((sent, self.queue_one(site, &mut client, next_id(), rng)));
            }
            client.flush()?;
            take_confirms(site, &mut client, &mut open, TICK)?;
        }
        if rng.one_in(3) {
            // With a few on their way.
            for _ in 0..rng.range(1..50) {
                sent += 1;
                open.push_back((sent, self.queue_one(site, &mut client, next_id(), rng)));
            }
            client.flush()?;
            site.cut(&client);
            open.iter().for_each(|&(_, id)| site.ledger.in_doubt(id));
            return Ok(());
        }
        let deadline = Instant::now() + super::client::PATIENCE;
        while !open.is_empty() {
            take_confirms(site, &mut client, &mut open, TICK)?;
            if Instant::now() > deadline {
                site.ledger.complain(format!("{} publishes to '{}' are not confirmed", open.len(), self.key));
                break;
            }
        }
        client.close()
    }

    fn queue_one(self, site: &Site, client: &mut Client, id: Id, rng: &mut Rng) -> Id {
        let len = mixed_size(rng);
        site.ledger.sending(id);
        let properties = (self.add)(facts::properties(id, len, self.persistent), rng);
        publish_frames(client.buffer(), 1, self.exchange, self.key, true, &properties, &facts::body(id, len));
        id
    }
}

/// Takes the confirms that come within `wait`.
fn take_confirms(site: &Site, client: &mut Client, open: &mut VecDeque<(u64, Id)>, mut wait: Duration) -> Answer<()> {
    while let Some(incoming) = client.receive(wait)? {
        wait = Duration::ZERO;
        match incoming {
            Incoming::Method(_, AMQPClass::Basic(B::Ack(ack))) => {
                let answered = |number: u64| number == ack.delivery_tag || (ack.multiple && number < ack.delivery_tag);
                open.retain(|&(number, id)| {
                    if answered(number) {
                        site.ledger.confirmed(id);
                    }
                    !answered(number)
                });
            }
            other => site.ledger.complain(format!("a publisher was told {other:?}")),
        }
    }
    Ok(())
}

/// What a consumer does with a hundred messages; the rest it acknowledges.
#[derive(Clone, Copy)]
pub struct Habit {
    pub prefetch: u16,
    pub sent_back: u64,
    pub rejected: u64,
    /// Whether each message must have died somewhere.
    pub dead: bool,
}

impl Habit {
    pub const ACKS: Habit = Habit { prefetch: 100, sent_back: 0, rejected: 0, dead: false };
}

/// Consumes until everything is over.
pub fn consume(site: &Site, queue: &'static str, habit: Habit, mut rng: Rng) {
    site.run(&format!("consumer of '{queue}'"), || {
        while !site.is(OVER) {
            consume_over_one_connection(site, queue, habit, &mut rng)?;
        }
        Ok(())
    });
}

fn consume_over_one_connection(site: &Site, queue: &'static str, habit: Habit, rng: &mut Rng) -> Answer<()> {
    let mut client = site.connect()?;
    client.consume(queue, false, habit.prefetch)?;
    let mut unacked: Vec<(u64, Id, bool)> = Vec::new();
    // Acknowledged, and not known to be heard.
    let mut unsure: Vec<Id> = Vec::new();
    let ends = Instant::now() + Duration::from_millis(rng.range(1_000..12_000));
    while Instant::now() < ends && !site.is(OVER) {
        let mut wait = Duration::from_millis(50);
        while let Some(incoming) = client.receive(wait)? {
            wait = Duration::ZERO;
            let Incoming::Delivery(delivery) = incoming else {
                site.ledger.complain(format!("a consumer of '{queue}' was told {incoming:?}"));
                continue;
            };
            match facts::read(&delivery) {
                Ok((id, _)) => unacked.push((delivery.tag, id, delivery.redelivered)),
                Err(error) => site.ledger.complain(format!("queue {queue}: {error}")),
            }
            if habit.dead && header(&delivery, "x-death").is_none() {
                site.ledger.complain(format!("queue {queue}: {} has no x-death", delivery.message_id()));
            }
        }
        // A few stay open for a while, but not for ever.
        let keep = if rng.one_in(4) { 0 } else { habit.prefetch as usize / 3 };
        while unacked.len() > keep {
            let (tag, id, redelivered) = unacked.swap_remove(rng.range(0..unacked.len() as u64) as usize);
            match rng.range(0..100) {
                n if n < habit.sent_back => client.queue_requeue(tag),
                n if n < habit.sent_back + habit.rejected => client.queue_reject(tag, false),
                _ => {
                    client.queue_ack(tag, false);
                    site.ledger.done(id, redelivered);
                    unsure.push(id);
                }
            }
        }
        client.flush()?;
        if unsure.len() > 200 {
            client.qos(habit.prefetch)?; // when this is answered, everything before it was heard
            unsure.clear();
        }
    }
    if !site.is(OVER) && rng.one_in(3) {
        site.cut(&client);
        site.ledger.may_repeat(unsure);
        return Ok(());
    }
    client.close()
}

/// Consumes without acknowledgements, over one connection.
pub fn consume_without_acks(site: &Site, queue: &'static str) {
    site.run(&format!("consumer of '{queue}'"), || {
        let mut client = site.connect()?;
        client.consume(queue, true, 0)?;
        while !site.is(OVER) {
            if let Some(Incoming::Delivery(delivery)) = client.receive(Duration::from_millis(50))? {
                match facts::read(&delivery) {
                    Ok((id, _)) => site.ledger.done(id, delivery.redelivered),
                    Err(error) => site.ledger.complain(format!("queue {queue}: {error}")),
                }
            }
        }
        client.close()
    });
}

/// Reads a stream from its beginning, each message once, over many connections.
pub fn read_stream(site: &Site, queue: &'static str, mut rng: Rng) {
    site.run("reader of the stream", || {
        let mut next = 0;
        while !site.is(OVER) {
            let mut client = site.connect()?;
            let mut arguments = FieldTable::default();
            arguments.insert("x-stream-offset".into(), AMQPValue::LongLongInt(next));
            client.consume_with(queue, false, 200, arguments)?;
            let ends = Instant::now() + Duration::from_millis(rng.range(1_000..20_000));
            while Instant::now() < ends && !site.is(OVER) {
                let Some(incoming) = client.receive(Duration::from_millis(50))? else { continue };
                let Incoming::Delivery(delivery) = incoming else {
                    site.ledger.complain(format!("the stream's reader was told {incoming:?}"));
                    continue;
                };
                let offset = header(&delivery, "x-stream-offset").cloned();
                if offset != Some(AMQPValue::LongLongInt(next)) {
                    site.ledger.complain(format!("the stream goes on with {offset:?} instead of {next}"));
                }
                next += 1;
                match facts::read(&delivery) {
                    Ok((id, _)) => site.ledger.done(id, false),
                    Err(error) => site.ledger.complain(format!("queue {queue}: {error}")),
                }
                client.queue_ack(delivery.tag, false);
                client.flush()?;
            }
            match rng.one_in(3) {
                true => site.cut(&client),
                false => client.close()?,
            }
        }
        Ok(())
    });
}

fn header<'a>(delivery: &'a Delivery, key: &str) -> Option<&'a AMQPValue> {
    delivery.properties.headers().as_ref()?.inner().get(&ShortString::from(key))
}
