//! The loop of the crash tests: load, the end of the broker, its next start, and the comparison of what is there with what
//! its clients know.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    path::PathBuf,
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use super::{
    broker::{Broker, start_and_kill},
    client::{Answer, Client, ClientError, Incoming, PATIENCE, Rng, publish_frames},
    disk::Disk,
    facts::{self, Definition, Facts, Id, Presence, QueueFacts},
    load::{self, Publishing, Style},
};

const QUEUES: [&str; 13] = [
    "work.1",
    "work.2",
    "fan.1",
    "fan.2",
    "fan.3",
    "auto",
    "pipeline.in",
    "pipeline.out",
    "tx.a",
    "tx.b",
    "move.from",
    "move.to",
    "purged",
];

pub fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

pub fn seed() -> u64 {
    number("CRASH_SEED").unwrap_or_else(|| {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |since| since.as_nanos() as u64 % 1_000_000_007)
    })
}

/// A data directory that stays when the test fails.
pub struct DataDir(Option<tempfile::TempDir>);

impl DataDir {
    pub fn new() -> DataDir {
        let directory = tempfile::tempdir().expect("a temporary directory");
        std::fs::create_dir(directory.path().join("volume")).expect("a directory in it");
        DataDir(Some(directory))
    }

    pub fn path(&self) -> PathBuf {
        self.0.as_ref().expect("there until dropped").path().join("volume/data")
    }
}

impl Drop for DataDir {
    fn drop(&mut self) {
        if let (true, Some(directory)) = (std::thread::panicking(), self.0.take()) {
            println!("the data directory is kept: {}", directory.keep().display());
        }
    }
}

/// What is carried from round to round.
struct World {
    rng: Rng,
    directory: DataDir,
    disk: Box<dyn Disk>,
    /// What each queue holds, in order.
    base: HashMap<&'static str, Vec<Id>>,
    definitions: HashMap<String, Definition>,
    next_publisher: u64,
    errors: Vec<String>,
    confirmed: usize,
    slowest_start: Duration,
    starts: usize,
}

impl World {
    fn publisher(&mut self) -> u64 {
        self.next_publisher += 1;
        self.next_publisher
    }

    /// Starts the broker; now and then it is killed a few times while it recovers.
    fn start(&mut self, arguments: &[&str], early_kills: u64) -> Option<Broker> {
        let data_dir = self.directory.path();
        for _ in 0..early_kills {
            let environment = self.disk.before_start(&data_dir, &mut self.rng);
            let delay = Duration::from_micros(self.rng.range(0..120_000));
            start_and_kill(&data_dir, arguments, &environment, delay);
            self.disk.after_end(&data_dir, &mut self.rng);
        }
        let environment = self.disk.before_start(&data_dir, &mut self.rng);
        match Broker::start_in(&data_dir, arguments, &environment) {
            Ok(broker) => {
                self.starts += 1;
                self.slowest_start = self.slowest_start.max(broker.started_in);
                Some(broker)
            }
            Err(error) => {
                self.errors.push(format!("FAILED START: {error}"));
                None
            }
        }
    }

    fn start_load(&mut self, address: SocketAddr, round: usize) -> Vec<JoinHandle<Facts>> {
        let mut threads: Vec<JoinHandle<Facts>> = Vec::new();
        let small = self.rng.one_in(3);
        let publishers: [(&str, &str, &[&str], u64); 6] = [
            ("", "work.1", &["work.1"], 10),
            ("", "work.1", &["work.1"], 0),
            ("", "work.2", &["work.2"], 10),
            ("fan", "", &["fan.1", "fan.2", "fan.3"], 20),
            ("", "auto", &["auto"], 0),
            ("", "pipeline.in", &["pipeline.in"], 0),
        ];
        for (exchange, key, queues, transient_one_in) in publishers {
            let publishing = Publishing {
                address,
                publisher: self.publisher(),
                exchange,
                key,
                queues,
                window: [1, 10, 100, 1000][self.rng.range(0..4) as usize],
                transient_one_in,
                max_messages: if small { 20_000 } else { 1_500 },
                small,
            };
            let rng = self.rng.fork();
            threads.push(std::thread::spawn(move || publishing.run(rng)));
        }
        let publishing = Publishing {
            address,
            publisher: self.publisher(),
            exchange: "",
            key: "move.from",
            queues: &["move.from"],
            window: 50,
            transient_one_in: 0,
            max_messages: 1_000,
            small: true,
        };
        let rng = self.rng.fork();
        threads.push(std::thread::spawn(move || publishing.run(rng)));
        for (queue, style) in [
            ("work.1", Style::InOrder),
            ("work.1", Style::Shuffled),
            ("work.2", Style::Shuffled),
            ("fan.1", Style::InOrder),
            ("fan.2", Style::Get),
            ("auto", Style::Auto),
            ("pipeline.in", Style::Pipeline),
        ] {
            let (results, rng) = (self.publisher(), self.rng.fork());
            threads.push(std::thread::spawn(move || load::consume(address, queue, style, results, rng)));
        }
        let (publisher, rng) = (self.publisher(), self.rng.fork());
        threads.push(std::thread::spawn(move || load::publish_in_transactions(address, publisher, 1_500, rng)));
        let rng = self.rng.fork();
        threads.push(std::thread::spawn(move || load::move_in_transactions(address, rng)));
        let (publisher, rng, base) = (self.publisher(), self.rng.fork(), self.base["purged"].clone());
        threads.push(std::thread::spawn(move || load::publish_and_purge(address, publisher, base, rng)));
        let (definitions, rng) = (self.definitions.clone(), self.rng.fork());
        threads.push(std::thread::spawn(move || load::define(address, round, definitions, rng)));
        threads
    }

    /// Compares the broker with what the clients know, and takes over what is there.
    fn check(&mut self, address: SocketAddr, mut facts: Facts) -> Answer<usize> {
        facts.settle_transactions();
        self.errors.append(&mut facts.errors);
        let mut found: HashMap<&'static str, HashSet<Id>> = HashMap::new();
        let mut durable: HashMap<&'static str, HashSet<Id>> = HashMap::new();
        let mut total = 0;
        for queue in QUEUES {
            let drained = self.drain(address, queue)?;
            let known = facts.queues.remove(queue).unwrap_or_default();
            self.confirmed += known.confirmed.len();
            durable.insert(queue, self.base[queue].iter().chain(&known.confirmed).copied().collect());
            facts::check_queue(queue, &self.base[queue], &known, &drained, &mut self.errors);
            check_received(queue, &self.base[queue], &known, &mut self.errors);
            found.insert(queue, drained.iter().copied().collect());
            total += drained.len();
            let kept = self.take_away(address, queue, &drained)?;
            self.base.insert(queue, kept);
        }
        for transaction in &facts.transactions {
            facts::check_transaction(transaction, &found, &durable, &mut self.errors);
        }
        self.definitions = facts.definitions;
        self.check_definitions(address)?;
        Ok(total)
    }

    /// Reads a whole queue without settling anything: its contents are as they were afterwards.
    fn drain(&mut self, address: SocketAddr, queue: &'static str) -> Answer<Vec<Id>> {
        let mut client = Client::connect(address)?;
        let count = client.declare_queue(queue, true, true)? as usize;
        if self.rng.one_in(4) {
            // The same through basic.get, the first part of it.
            let mut other = Client::connect(address)?;
            for left in (0..count.min(20)).map(|got| count - got - 1) {
                let remaining = other.get(queue)?.map(|delivery| delivery.remaining.unwrap_or(0) as usize);
                if remaining != Some(left) {
                    self.errors
                        .push(format!("queue {queue}: basic.get says that {remaining:?} messages remain, not {left}"));
                    break;
                }
            }
            other.close()?;
        }
        client.consume(queue, false, 0)?;
        let mut ids = Vec::new();
        while ids.len() < count {
            match client.receive(Duration::from_secs(10))? {
                Some(Incoming::Delivery(delivery)) => match facts::read(&delivery) {
                    Ok((id, _)) => ids.push(id),
                    Err(error) => {
                        self.errors.push(format!("queue {queue}: {error}"));
                        ids.push(u64::MAX);
                    }
                },
                Some(other) => panic!("a drain was told {other:?}"),
                None => {
                    self.errors.push(format!(
                        "queue {queue}: declare-ok says {count} messages, a drain delivers {}",
                        ids.len()
                    ));
                    break;
                }
            }
        }
        client.cancel()?;
        if let Some(Incoming::Delivery(_)) = client.receive(Duration::ZERO)? {
            self.errors.push(format!("queue {queue}: declare-ok says {count} messages, a drain delivers more"));
        }
        let left = client.declare_queue(queue, true, true)?;
        if left != 0 {
            self.errors.push(format!("queue {queue}: {left} messages are ready after a full drain"));
        }
        client.close()?;
        let back = Client::connect(address)?.declare_queue(queue, true, true)? as usize;
        if back != ids.len() {
            self.errors.push(format!("queue {queue}: {back} messages after {} unacked ones went back", ids.len()));
        }
        Ok(ids)
    }

    /// Settles a part of what was drained, for good; answers what stays. Long queues do not grow for ever.
    fn take_away(&mut self, address: SocketAddr, queue: &'static str, ids: &[Id]) -> Answer<Vec<Id>> {
        let all = ids.len() > 3_000 || self.rng.one_in(5);
        if ids.is_empty() || (!all && self.rng.one_in(2)) {
            return Ok(ids.to_vec());
        }
        let mut client = Client::connect(address)?;
        client.tx_select()?;
        client.consume(queue, false, 0)?;
        let mut kept = Vec::new();
        let until = if all { ids.len() } else { self.rng.range(1..ids.len() as u64 + 1) as usize };
        for (at, &id) in ids.iter().enumerate().take(until) {
            let Some(Incoming::Delivery(delivery)) = client.receive(PATIENCE)? else {
                panic!("a message that was there a moment ago is not")
            };
            if facts::read(&delivery).ok().map(|(id, _)| id) != Some(id) {
                self.errors.push(format!("queue {queue}: message {at} is another one on the second look"));
            }
            if !delivery.redelivered {
                self.errors
                    .push(format!("queue {queue}: message {at} is not marked as redelivered on the second look"));
            }
            if all || self.rng.one_in(2) {
                client.queue_ack(delivery.tag, false);
            } else {
                kept.push(id);
            }
        }
        kept.extend_from_slice(&ids[until..]);
        client.flush()?;
        client.tx_commit()?;
        client.close()?;
        Ok(kept)
    }

    fn check_definitions(&mut self, address: SocketAddr) -> Answer<()> {
        let mut definitions = std::mem::take(&mut self.definitions);
        for (name, definition) in &mut definitions {
            let exchange = look(Client::connect(address)?.declare_exchange(name, "direct", true).map(|()| 0))?;
            let queue = look(Client::connect(address)?.declare_queue(name, true, true))?;
            let errors = &mut self.errors;
            judge(&format!("exchange {name}"), &mut definition.exchange, exchange.is_some(), errors);
            judge(&format!("queue {name}"), &mut definition.queue, queue.is_some(), errors);
            let (at_least, at_most) = definition.messages;
            match queue {
                Some(count) if (at_least..=at_most).contains(&count) => definition.messages = (count, count),
                Some(count) => {
                    self.errors.push(format!("queue {name} has {count} messages, not {at_least} to {at_most}"))
                }
                None => definition.messages = (0, 0),
            }
            let bound = exchange.is_some() && queue.is_some() && {
                let mut client = Client::connect(address)?;
                publish_frames(
                    client.buffer(),
                    1,
                    name,
                    "key",
                    true,
                    &facts::properties(0, 1, true),
                    &facts::body(0, 1),
                );
                client.flush()?;
                let before = definition.messages.0;
                let after = client.declare_queue(name, true, true)?;
                definition.messages = (after, after);
                after > before
            };
            judge(&format!("binding {name}"), &mut definition.binding, bound, &mut self.errors);
        }
        // Some go on into the next round, absent ones among them.
        let mut client = Client::connect(address)?;
        let mut kept = HashMap::new();
        for (name, definition) in definitions {
            if kept.len() < 12 && self.rng.one_in(2) {
                kept.insert(name, definition);
            } else {
                client.delete_queue(&name)?;
                client.delete_exchange(&name)?;
                if self.rng.one_in(3) {
                    kept.insert(name, Definition::default());
                }
            }
        }
        self.definitions = kept;
        client.close()
    }
}

/// What a passive declaration found.
pub fn look(answer: Answer<u32>) -> Answer<Option<u32>> {
    match answer {
        Ok(count) => Ok(Some(count)),
        Err(ClientError::Closed { code: 404, .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

fn judge(what: &str, known: &mut Presence, is_there: bool, errors: &mut Vec<String>) {
    let found = if is_there { Presence::Present } else { Presence::Absent };
    if *known != Presence::Unknown && *known != found {
        errors.push(format!("{what} should be {known:?} and is {found:?}"));
    }
    *known = found;
}

/// Nobody was given what was never published.
fn check_received(queue: &str, base: &[Id], facts: &QueueFacts, errors: &mut Vec<String>) {
    let known = |id: &Id| facts.sent.contains(id) || facts.transient.contains(id) || base.contains(id);
    let strangers = facts.received.iter().filter(|id| !known(id)).count();
    if strangers > 0 {
        errors.push(format!("queue {queue}: consumers were given {strangers} messages that were gone, or never there"));
    }
}

fn declare_all(address: SocketAddr) -> Answer<()> {
    let mut client = Client::connect(address)?;
    client.declare_exchange("fan", "fanout", false)?;
    for queue in QUEUES {
        client.declare_queue(queue, true, false)?;
        if queue.starts_with("fan.") {
            client.bind(queue, "fan", "")?;
        }
    }
    client.close()
}

fn arguments(rng: &mut Rng, process_alone: bool) -> Vec<&'static str> {
    let mut arguments = Vec::new();
    if rng.one_in(2) {
        arguments.extend(["--memory-budget", "12MiB"]);
    }
    if rng.one_in(2) {
        arguments.extend(["--store-write-buffer", "1MiB"]);
    }
    if process_alone && rng.one_in(8) {
        arguments.extend(["--durability", "os"]); // a kill of the process alone loses nothing either
    }
    arguments
}

/// Ends the broker under load `rounds` times, each time in one of the ways of `disk`, and once in `early_kill_one_in` a few
/// times more while it starts.
///
/// # Panics
/// If a start fails, or if what is there is not what the clients were promised.
pub fn crash_loop(rounds: usize, seed: u64, early_kill_one_in: u64, disk: Box<dyn Disk>) {
    let mut world = World {
        rng: Rng(seed),
        directory: DataDir::new(),
        disk,
        base: QUEUES.iter().map(|&queue| (queue, Vec::new())).collect(),
        definitions: HashMap::new(),
        next_publisher: 0,
        errors: Vec::new(),
        confirmed: 0,
        slowest_start: Duration::ZERO,
        starts: 0,
    };
    let began = Instant::now();
    let mut broker = world.start(&[], 0).expect("a first start");
    declare_all(broker.address).expect("queues are declared");
    for round in 1..=rounds {
        let threads = world.start_load(broker.address, round);
        let load_ms = world.rng.range(50..1500);
        std::thread::sleep(Duration::from_millis(load_ms));
        if broker.has_ended() {
            world.errors.push("the broker has ended by itself".to_owned());
        }
        let clean = world.rng.one_in(8);
        let resident_mib = broker.resident_kib() >> 10;
        let complaints = if clean {
            let (status, took, complaints) = broker.terminate();
            if !status.is_some_and(|status| status.success()) {
                world.errors.push(format!("SIGTERM: {status:?} after {took:?}"));
            }
            complaints
        } else {
            broker.kill()
        };
        world.errors.extend(complaints.into_iter().map(|line| format!("logged: {line}")));
        let mut facts = Facts::default();
        threads.into_iter().for_each(|thread| facts.merge(thread.join().expect("no client panics")));
        let lost = world.disk.after_end(&world.directory.path(), &mut world.rng);
        let arguments = arguments(&mut world.rng, world.disk.keeps_everything());
        let early_kills = if world.rng.one_in(early_kill_one_in) { world.rng.range(1..4) } else { 0 };
        let confirmed_before = world.confirmed;
        let Some(started) = world.start(&arguments, early_kills) else { break };
        broker = started;
        let total = world.check(broker.address, facts);
        println!(
            "round {round}: {}{lost} after {load_ms} ms at {resident_mib} MiB, {early_kills} kills in recovery, start {:?} {arguments:?}, {} confirmed, {} messages found",
            if clean { "SIGTERM" } else { "kill -9" },
            broker.started_in,
            world.confirmed - confirmed_before,
            total.as_ref().map_or_else(|error| format!("{error:?}"), usize::to_string),
        );
        if let Err(error) = total {
            world.errors.push(format!("the check could not be made: {error:?}"));
        }
        if !world.errors.is_empty() {
            println!("in round {round}:\n  {}", world.errors.join("\n  "));
            break;
        }
    }
    println!(
        "{rounds} rounds, {} starts (slowest {:?}), {} messages confirmed, {} errors, {:?} in all; CRASH_SEED={seed}",
        world.starts,
        world.slowest_start,
        world.confirmed,
        world.errors.len(),
        began.elapsed()
    );
    assert!(world.errors.is_empty(), "CRASH_SEED={seed}: {:#?}", world.errors);
}
