//! What the loops share: a broker that is killed and started again, publishers, draining, and what is known of messages.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    net::SocketAddr,
    path::PathBuf,
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use amq_protocol::{
    protocol::{AMQPClass, BasicProperties, basic::AMQPMethod as B},
    types::{AMQPValue, FieldTable},
};

use super::{
    broker::{Broker, start_and_kill},
    client::{Answer, Client, ClientError, Delivery, Incoming, Rng, publish_frames},
    disk::Disk,
    facts::{self, Id},
    new_disk, rounds_wanted,
};

/// How long the broker has to bring everything to its place after a restart.
const DRAIN_PATIENCE: Duration = Duration::from_secs(30);

pub fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

pub fn rounds() -> usize {
    rounds_wanted()
}

pub fn now_unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// What clients know of the messages that were published for one purpose.
#[derive(Debug, Default)]
pub struct Ledger {
    /// A publish was begun.
    pub sent: HashSet<Id>,
    pub confirmed: HashSet<Id>,
    /// A settlement that ends the message was begun.
    pub acked: HashSet<Id>,
    /// And is known to be on disk.
    pub gone: HashSet<Id>,
    /// A settlement that makes a dead letter of it is known to be on disk.
    pub dead: HashSet<Id>,
    pub received: HashSet<Id>,
    pub errors: Vec<String>,
}

impl Ledger {
    pub fn merge(&mut self, other: Ledger) {
        self.sent.extend(other.sent);
        self.confirmed.extend(other.confirmed);
        self.acked.extend(other.acked);
        self.gone.extend(other.gone);
        self.dead.extend(other.dead);
        self.received.extend(other.received);
        self.errors.extend(other.errors);
    }

    /// What must be somewhere.
    pub fn wanted(&self) -> HashSet<Id> {
        self.confirmed.difference(&self.acked).copied().collect()
    }

    /// Takes note of what was found: it is on disk, whatever its publisher was told.
    pub fn carry(&mut self, found: &HashSet<Id>) {
        self.sent = found.clone();
        self.confirmed = found.clone();
        self.acked.clear();
    }
}

/// A few ids, for a complaint.
pub fn some<'a>(ids: impl IntoIterator<Item = &'a Id>) -> String {
    let mut ids: Vec<Id> = ids.into_iter().copied().collect();
    ids.sort_unstable();
    let first: Vec<String> = ids.iter().take(8).map(|id| format!("{id:x}")).collect();
    format!("{} ({})", ids.len(), first.join(" "))
}

/// Runs a client to its end; only a dying socket (or a broker that says goodbye) is a good one.
pub fn until_killed(who: &str, work: impl FnOnce(&mut Ledger) -> Answer<()>) -> Ledger {
    let mut ledger = Ledger::default();
    match work(&mut ledger) {
        Ok(()) | Err(ClientError::Gone(_)) | Err(ClientError::Closed { code: 320, .. }) => {}
        Err(error) => ledger.errors.push(format!("{who}: {error:?}")),
    }
    ledger
}

/// The broker, and what is carried from round to round.
pub struct Arena {
    name: &'static str,
    pub rng: Rng,
    seed: u64,
    directory: Option<tempfile::TempDir>,
    disk: Box<dyn Disk>,
    broker: Option<Broker>,
    pub address: SocketAddr,
    pub errors: Vec<String>,
    pub kills: u32,
    next_publisher: u64,
    began: Instant,
}

impl Arena {
    pub fn new(name: &'static str, declare: impl FnOnce(&mut Client) -> Answer<()>) -> Arena {
        let seed = number("CRASH_SEED").unwrap_or_else(|| now_unix_ms() % 1_000_000_007);
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (mut disk, mut rng) = (new_disk(), Rng(seed));
        let data_dir = directory.path().join("volume/data");
        std::fs::create_dir(directory.path().join("volume")).expect("a directory in it");
        let environment = disk.before_start(&data_dir, &mut rng);
        let broker = Broker::start_in(&data_dir, &[], &environment).expect("a first start");
        let mut client = Client::connect(broker.address).expect("connects");
        declare(&mut client).expect("the queues are declared");
        client.close().expect("a goodbye");
        Arena {
            name,
            rng,
            seed,
            directory: Some(directory),
            disk,
            address: broker.address,
            broker: Some(broker),
            errors: Vec::new(),
            kills: 0,
            next_publisher: 0,
            began: Instant::now(),
        }
    }

    /// A number for a publisher, which no other has.
    pub fn publisher(&mut self) -> u64 {
        self.next_publisher += 1;
        self.next_publisher
    }

    /// Lets clients work for up to `longest_ms`, kills the broker, and starts it again; answers what the clients know.
    pub fn kill_under<T>(&mut self, threads: Vec<JoinHandle<T>>, longest_ms: u64) -> Vec<T> {
        std::thread::sleep(Duration::from_millis(self.rng.range(30..longest_ms)));
        let mut broker = self.broker.take().expect("a broker");
        if broker.has_ended() {
            self.errors.push("the broker has ended by itself".to_owned());
        }
        self.errors.extend(broker.kill().into_iter().map(|line| format!("logged: {line}")));
        self.kills += 1;
        let known = threads.into_iter().map(|thread| thread.join().expect("no client panics")).collect();
        let mut arguments = Vec::new();
        if self.rng.one_in(2) {
            arguments.extend(["--memory-budget", "12MiB"]);
        }
        if self.rng.one_in(2) {
            arguments.extend(["--store-write-buffer", "1MiB"]);
        }
        let data_dir = self.data();
        self.disk.after_end(&data_dir, &mut self.rng);
        if self.rng.one_in(4) {
            let environment = self.disk.before_start(&data_dir, &mut self.rng);
            let delay = Duration::from_micros(self.rng.range(0..120_000));
            start_and_kill(&data_dir, &arguments, &environment, delay);
            self.disk.after_end(&data_dir, &mut self.rng);
        }
        let environment = self.disk.before_start(&data_dir, &mut self.rng);
        let broker = Broker::start_in(&data_dir, &arguments, &environment).expect("the broker starts again");
        self.address = broker.address;
        self.broker = Some(broker);
        known
    }

    fn data(&self) -> PathBuf {
        self.directory.as_ref().expect("there until dropped").path().join("volume/data")
    }

    /// Says what came of a round.
    pub fn report(&mut self, round: usize, text: &str) {
        println!("{} round {round}: {text}", self.name);
        assert!(self.errors.is_empty(), "{} in round {round}, CRASH_SEED={}: {:#?}", self.name, self.seed, self.errors);
    }

    pub fn finish(mut self, text: &str) {
        let complaints = self.broker.take().expect("a broker").kill();
        assert_eq!(complaints, Vec::<String>::new());
        println!("{}: {} kills, {text}, {:?}; CRASH_SEED={}", self.name, self.kills, self.began.elapsed(), self.seed);
    }

    /// Everything that `queues` hold, in their order. Waits until all of `wanted` is there and nothing more comes. With
    /// `settle` it is acked for good, otherwise it stays.
    pub fn drain(
        &mut self,
        queues: &[&'static str],
        wanted: &HashSet<Id>,
        settle: bool,
    ) -> HashMap<&'static str, Vec<(Id, Delivery)>> {
        match drain(self.address, queues, wanted, settle, &mut self.errors) {
            Ok(found) => found,
            Err(error) => {
                self.errors.push(format!("the queues could not be drained: {error:?}"));
                HashMap::new()
            }
        }
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        if let (true, Some(directory)) = (std::thread::panicking(), self.directory.take()) {
            println!("the data directory is kept: {}", directory.keep().display());
        }
    }
}

fn drain(
    address: SocketAddr,
    queues: &[&'static str],
    wanted: &HashSet<Id>,
    settle: bool,
    errors: &mut Vec<String>,
) -> Answer<HashMap<&'static str, Vec<(Id, Delivery)>>> {
    let deadline = Instant::now() + DRAIN_PATIENCE;
    let mut control = Client::connect(address)?;
    let mut clients = Vec::new();
    for &queue in queues {
        let mut client = Client::connect(address)?;
        if settle {
            client.tx_select()?;
        }
        client.consume(queue, false, 0)?;
        clients.push((queue, client, Vec::new()));
    }
    let mut missing = wanted.clone();
    loop {
        let mut came = false;
        for (queue, client, found) in &mut clients {
            let mut wait = Duration::from_millis(40);
            while let Some(incoming) = client.receive(wait)? {
                (wait, came) = (Duration::ZERO, true);
                let Incoming::Delivery(delivery) = incoming else { panic!("a drain was told {incoming:?}") };
                match facts::read(&delivery) {
                    Ok((id, _)) => {
                        missing.remove(&id);
                        found.push((id, delivery));
                    }
                    Err(error) => errors.push(format!("queue {queue}: {error}")),
                }
            }
        }
        let mut ready = 0;
        for queue in queues {
            ready += control.declare_queue(queue, true, true)?;
        }
        if (!came && ready == 0 && missing.is_empty()) || Instant::now() > deadline {
            break;
        }
    }
    let mut all = HashMap::new();
    for (queue, mut client, found) in clients {
        if let (true, Some((_, last))) = (settle, found.last()) {
            client.queue_ack(last.tag, true);
            client.flush()?;
            client.tx_commit()?;
        }
        client.close()?;
        all.insert(queue, found);
    }
    Ok(all)
}

/// What a publisher does.
pub struct Publishing {
    pub address: SocketAddr,
    /// Upper half of its messages' ids.
    pub publisher: u64,
    pub exchange: &'static str,
    pub key: &'static str,
    pub window: usize,
    pub max: u64,
}

impl Publishing {
    /// Publishes persistent messages with confirms until `max` of them, then waits for the end of the socket. `add` may add
    /// headers.
    pub fn run(self, mut rng: Rng, mut add: impl FnMut(&mut FieldTable, &mut Rng)) -> Ledger {
        until_killed("publisher", |ledger| {
            let mut client = Client::connect(self.address)?;
            client.confirm_select()?;
            let mut open: VecDeque<(u64, Id)> = VecDeque::new();
            let mut count = 0;
            loop {
                let room = (self.window - open.len()).min((self.max - count) as usize);
                for _ in 0..if room == 0 { 0 } else { rng.range(1..room.min(64) as u64 + 1) } {
                    count += 1;
                    let (id, len) = (self.publisher << 32 | count, rng.range(0..400) as usize);
                    ledger.sent.insert(id);
                    open.push_back((count, id));
                    let mut headers = FieldTable::default();
                    add(&mut headers, &mut rng);
                    let properties = facts::properties(id, len, true).with_headers(headers);
                    publish(&mut client, self.exchange, self.key, id, len, &properties);
                }
                client.flush()?;
                if rng.one_in(4) {
                    std::thread::sleep(Duration::from_millis(rng.range(0..6)));
                }
                let mut wait = Duration::from_millis(20);
                while let Some(incoming) = client.receive(wait)? {
                    wait = Duration::ZERO;
                    take_confirm(&incoming, &mut open, ledger);
                }
            }
        })
    }
}

pub fn publish(client: &mut Client, exchange: &str, key: &str, id: Id, len: usize, properties: &BasicProperties) {
    publish_frames(client.buffer(), 1, exchange, key, false, properties, &facts::body(id, len));
}

/// Applies a confirm to what is open, by confirm number.
pub fn take_confirm(incoming: &Incoming, open: &mut VecDeque<(u64, Id)>, ledger: &mut Ledger) {
    let (up_to, multiple, acked) = match incoming {
        Incoming::Method(_, AMQPClass::Basic(B::Ack(ack))) => (ack.delivery_tag, ack.multiple, true),
        Incoming::Method(_, AMQPClass::Basic(B::Nack(nack))) => (nack.delivery_tag, nack.multiple, false),
        other => panic!("a publisher was told {other:?}"),
    };
    open.retain(|&(number, id)| {
        let answered = number == up_to || (multiple && number < up_to);
        if answered && acked {
            ledger.confirmed.insert(id);
        }
        !answered
    });
    if !acked {
        ledger.errors.push(format!("publish {up_to} was refused"));
    }
}

/// Arguments of a declaration.
pub fn table<const N: usize>(entries: [(&str, AMQPValue); N]) -> FieldTable {
    let mut table = FieldTable::default();
    for (key, value) in entries {
        table.insert(key.into(), value);
    }
    table
}

pub fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

pub fn header<'a>(delivery: &'a Delivery, key: &str) -> Option<&'a AMQPValue> {
    delivery.properties.headers().as_ref()?.inner().get(key)
}

/// A whole number in a header, whatever its width.
pub fn integer(delivery: &Delivery, key: &str) -> Option<i64> {
    match header(delivery, key)? {
        AMQPValue::ShortShortInt(n) => Some((*n).into()),
        AMQPValue::ShortInt(n) => Some((*n).into()),
        AMQPValue::LongInt(n) => Some((*n).into()),
        AMQPValue::LongLongInt(n) => Some(*n),
        AMQPValue::LongUInt(n) => Some((*n).into()),
        _ => None,
    }
}

/// Queue, reason and count of each death in `x-death`, the latest first.
pub fn deaths(delivery: &Delivery) -> Vec<(String, String, i64)> {
    let Some(AMQPValue::FieldArray(array)) = header(delivery, "x-death") else { return Vec::new() };
    let entry = |value: &AMQPValue| {
        let AMQPValue::FieldTable(table) = value else { panic!("x-death holds {value:?}") };
        let word = |key: &str| match table.inner().get(key) {
            Some(AMQPValue::LongString(text)) => text.to_string(),
            other => panic!("x-death has {key} = {other:?}"),
        };
        let Some(AMQPValue::LongLongInt(count)) = table.inner().get("count") else { panic!("x-death without a count") };
        (word("queue"), word("reason"), *count)
    };
    array.as_slice().iter().map(entry).collect()
}
