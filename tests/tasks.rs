//! Task distribution, the broker's main job, with everything going wrong once: two connections are cut and the broker is
//! killed in the middle. Every confirmed task is worked on at least once, and what is worked on twice says so.
//!
//! `TASKS` sets how many (40,000), `TASKS_SEED` repeats the moments of the accidents.

#![allow(
    clippy::unwrap_used,
    clippy::too_many_lines,
    reason = "a test that cannot go on should say where, and tells its story in one piece"
)]

#[path = "crash/broker.rs"]
mod broker;
#[path = "crash/client.rs"]
mod client;

use std::{
    collections::{HashMap, VecDeque},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use amq_protocol::protocol::{AMQPClass, BasicProperties, basic::AMQPMethod as B};
use broker::Broker;
use client::{Answer, Client, ClientError, Incoming, Rng, cut, publish_frames};

const QUEUE: &str = "tasks";
const PUBLISHERS: u32 = 4;
const CONSUMERS: usize = 8;
const PREFETCH: u16 = 100;
const WINDOW: usize = 1000;
const TASK_BYTES: usize = 200;

/// A task as its body says: whose, which connection of theirs sent it, and its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Task {
    publisher: u32,
    session: u32,
    number: u32,
}

impl Task {
    fn body(self) -> Vec<u8> {
        let mut body = Vec::with_capacity(TASK_BYTES);
        for field in [self.publisher, self.session, self.number] {
            body.extend_from_slice(&field.to_le_bytes());
        }
        body.resize(TASK_BYTES - 4, self.number as u8);
        let sum = crc32c::crc32c(&body);
        body.extend_from_slice(&sum.to_le_bytes());
        body
    }

    fn read(body: &[u8]) -> Task {
        assert_eq!(body.len(), TASK_BYTES);
        let (content, sum) = body.split_at(TASK_BYTES - 4);
        assert_eq!(crc32c::crc32c(content).to_le_bytes(), sum, "a damaged task");
        let field = |at: usize| u32::from_le_bytes(content[at..at + 4].try_into().expect("4 bytes"));
        Task { publisher: field(0), session: field(4), number: field(8) }
    }
}

/// One delivery of a task.
#[derive(Clone, Copy)]
struct Worked {
    task: Task,
    /// Which run of the broker it was.
    run: u32,
    redelivered: bool,
}

/// What all threads share.
struct Office {
    address: Mutex<SocketAddr>,
    run: AtomicU32,
    worked: AtomicU64,
    confirmed: AtomicU64,
    done: AtomicBool,
    /// Open sockets, for the accidents.
    publishers: Mutex<HashMap<u32, TcpStream>>,
    consumers: Mutex<HashMap<usize, TcpStream>>,
}

impl Office {
    /// Connects, however long the broker is away.
    fn connect(&self) -> (Client, u32) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let (address, run) = {
                let address = self.address.lock().unwrap();
                (*address, self.run.load(Ordering::SeqCst))
            };
            match Client::connect(address) {
                Ok(client) => return (client, run),
                Err(error) if Instant::now() > deadline => panic!("no broker to connect to: {error:?}"),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }
}

/// Publishes `count` tasks until all are confirmed, on as many connections as it takes. Answers how many were sent again.
fn publish(office: &Office, publisher: u32, count: u32) -> u64 {
    let (mut next, mut session, mut again) = (0, 0, 0);
    // Sent and not confirmed, in order.
    let mut open: VecDeque<u32> = VecDeque::new();
    while next < count || !open.is_empty() {
        let (mut client, _) = office.connect();
        office.publishers.lock().unwrap().insert(publisher, client.socket().expect("a socket"));
        let outcome = publish_session(
            office,
            &mut client,
            Task { publisher, session, number: 0 },
            &mut next,
            count,
            &mut open,
            &mut again,
        );
        assert!(matches!(outcome, Ok(()) | Err(ClientError::Gone(_))), "publisher {publisher}: {outcome:?}");
        session += 1;
    }
    again
}

fn publish_session(
    office: &Office,
    client: &mut Client,
    task: Task,
    next: &mut u32,
    count: u32,
    open: &mut VecDeque<u32>,
    again: &mut u64,
) -> Answer<()> {
    client.confirm_select()?;
    let properties = BasicProperties::default().with_delivery_mode(2);
    let mut resend: VecDeque<u32> = std::mem::take(open);
    // Not confirmed yet, whatever becomes of this connection.
    let restore = |open: &mut VecDeque<u32>, resend: &mut VecDeque<u32>| open.append(resend);
    let mut confirmed = 0;
    loop {
        let mut sent = 0;
        while open.len() < WINDOW && sent < 200 {
            let number = match resend.pop_front() {
                Some(number) => {
                    *again += 1;
                    number
                }
                None if *next < count => {
                    *next += 1;
                    *next - 1
                }
                None => break,
            };
            open.push_back(number);
            publish_frames(client.buffer(), 1, "", QUEUE, false, &properties, &Task { number, ..task }.body());
            sent += 1;
        }
        if open.is_empty() && resend.is_empty() {
            return Ok(());
        }
        let flushed = client.flush();
        let mut wait = if sent == 0 { Duration::from_millis(100) } else { Duration::ZERO };
        let received = flushed.and_then(|()| {
            while let Some(incoming) = client.receive(wait)? {
                wait = Duration::ZERO;
                let Incoming::Method(_, AMQPClass::Basic(B::Ack(ack))) = incoming else {
                    panic!("a publisher was told {incoming:?}")
                };
                assert!(ack.delivery_tag > confirmed, "confirmed twice");
                // Persistent messages to one queue are confirmed in order.
                for _ in confirmed..ack.delivery_tag {
                    open.pop_front().expect("confirmed what was not sent");
                    office.confirmed.fetch_add(1, Ordering::Relaxed);
                }
                confirmed = ack.delivery_tag;
            }
            Ok(())
        });
        if let Err(error) = received {
            restore(open, &mut resend);
            return Err(error);
        }
    }
}

/// Works until told to stop, on as many connections as it takes.
fn work(office: &Office, me: usize) -> Vec<Worked> {
    let mut all = Vec::new();
    while !office.done.load(Ordering::Relaxed) {
        let (mut client, run) = office.connect();
        office.consumers.lock().unwrap().insert(me, client.socket().expect("a socket"));
        let outcome = work_session(office, &mut client, run, &mut all);
        assert!(matches!(outcome, Ok(()) | Err(ClientError::Gone(_))), "consumer {me}: {outcome:?}");
        if outcome.is_ok() {
            client.close().expect("a goodbye");
        }
    }
    all
}

fn work_session(office: &Office, client: &mut Client, run: u32, all: &mut Vec<Worked>) -> Answer<()> {
    client.consume(QUEUE, false, PREFETCH)?;
    let mut newest: HashMap<u32, Task> = HashMap::new();
    while !office.done.load(Ordering::Relaxed) {
        let mut wait = Duration::from_millis(50);
        let (mut last_tag, mut taken) = (0, 0);
        while let Some(incoming) = client.receive(wait)? {
            wait = Duration::ZERO;
            let Incoming::Delivery(delivery) = incoming else { panic!("a consumer was told {incoming:?}") };
            let task = Task::read(&delivery.body);
            if !delivery.redelivered {
                let before = newest.insert(task.publisher, task);
                assert!(before.is_none_or(|before| before < task), "{task:?} came after {before:?}");
            }
            all.push(Worked { task, run, redelivered: delivery.redelivered });
            (last_tag, taken) = (delivery.tag, taken + 1);
            if taken == u64::from(PREFETCH) / 2 {
                break;
            }
        }
        if taken > 0 {
            client.queue_ack(last_tag, true);
            client.flush()?;
            office.worked.fetch_add(taken, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// Waits for one of the two counts to reach `goal`, as long as work goes on.
fn wait_until(office: &Office, count: &AtomicU64, goal: u64, patience: Duration) {
    let (mut seen, mut since) = (0, Instant::now());
    while count.load(Ordering::Relaxed) < goal {
        let (worked, confirmed) = (office.worked.load(Ordering::Relaxed), office.confirmed.load(Ordering::Relaxed));
        if worked + confirmed > seen {
            (seen, since) = (worked + confirmed, Instant::now());
        }
        assert!(
            since.elapsed() < patience,
            "nothing moves: {worked} tasks worked on, {confirmed} confirmed, waiting for {goal}"
        );
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn every_confirmed_task_is_worked_on_though_connections_and_the_broker_die() {
    let tasks = number("TASKS").unwrap_or(40_000);
    let seed = number("TASKS_SEED").unwrap_or_else(|| u64::from(std::process::id()));
    let mut rng = Rng(seed);
    let directory = tempfile::tempdir().expect("a temporary directory");
    let data_dir = directory.path().join("data");
    let mut broker = Broker::start(&data_dir, &[]).expect("starts");
    let mut client = Client::connect(broker.address).expect("connects");
    client.declare_queue(QUEUE, true, false).expect("declares");
    client.close().expect("a goodbye");
    let office = Arc::new(Office {
        address: Mutex::new(broker.address),
        run: AtomicU32::new(0),
        worked: AtomicU64::new(0),
        confirmed: AtomicU64::new(0),
        done: AtomicBool::new(false),
        publishers: Mutex::default(),
        consumers: Mutex::default(),
    });
    let began = Instant::now();
    let each = u32::try_from(tasks / u64::from(PUBLISHERS)).expect("a sane number of tasks");
    let publishers: Vec<_> = (0..PUBLISHERS)
        .map(|publisher| {
            let office = office.clone();
            std::thread::spawn(move || publish(&office, publisher, each))
        })
        .collect();
    let consumers: Vec<_> = (0..CONSUMERS)
        .map(|me| {
            let office = office.clone();
            std::thread::spawn(move || work(&office, me))
        })
        .collect();

    // The accidents, at random points of the work.
    let patience = Duration::from_secs(60);
    let part = |from: u64, to: u64, rng: &mut Rng| tasks * rng.range(from..to) / 100;
    let (consumer, consumer_at) = (rng.range(0..CONSUMERS as u64) as usize, part(5, 90, &mut rng));
    let (publisher, publisher_at) = (rng.range(0..u64::from(PUBLISHERS)) as u32, part(5, 70, &mut rng));
    let killed_at = part(30, 70, &mut rng);
    let cutters = [
        std::thread::spawn({
            let office = office.clone();
            move || {
                wait_until(&office, &office.worked, consumer_at, patience);
                cut(&office.consumers.lock().unwrap()[&consumer]);
            }
        }),
        std::thread::spawn({
            let office = office.clone();
            move || {
                wait_until(&office, &office.confirmed, publisher_at, patience);
                cut(&office.publishers.lock().unwrap()[&publisher]);
            }
        }),
    ];
    wait_until(&office, &office.confirmed, killed_at, patience);
    let confirmed_at_kill = office.confirmed.load(Ordering::Relaxed);
    {
        let mut address = office.address.lock().unwrap();
        assert_eq!(broker.kill(), Vec::<String>::new());
        broker = Broker::start(&data_dir, &[]).expect("starts again");
        *address = broker.address;
        office.run.fetch_add(1, Ordering::SeqCst);
    }
    let restarted_in = broker.started_in;

    let sent_again: u64 = publishers.into_iter().map(|thread| thread.join().expect("no publisher fails")).sum();
    let published_in = began.elapsed();
    let tasks = u64::from(each) * u64::from(PUBLISHERS);
    assert_eq!(office.confirmed.load(Ordering::Relaxed), tasks);
    wait_until(&office, &office.worked, tasks, patience);
    cutters.into_iter().for_each(|thread| thread.join().expect("no accident fails"));
    let mut control = Client::connect(broker.address).expect("connects");
    let deadline = Instant::now() + patience;
    // More was worked on than there were tasks, so the count alone does not say that all is done.
    while control.declare_queue(QUEUE, true, true).expect("there") > 0 {
        assert!(Instant::now() < deadline, "the queue is not empty in the end");
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(100));
    office.done.store(true, Ordering::Relaxed);
    let took = began.elapsed();
    let mut worked: Vec<Worked> =
        consumers.into_iter().flat_map(|thread| thread.join().expect("no consumer fails")).collect();

    // Everyone is gone, so nothing is unacked: what is not ready is settled.
    assert_eq!(control.declare_queue(QUEUE, true, true).expect("there"), 0);
    let resident_mib = broker.resident_kib() >> 10;
    let (status, _, complaints) = broker.terminate();
    assert!(status.is_some_and(|status| status.success()));
    assert_eq!(complaints, Vec::<String>::new());
    let broker = Broker::start(&data_dir, &[]).expect("starts");
    let mut control = Client::connect(broker.address).expect("connects");
    assert_eq!(control.declare_queue(QUEUE, true, true).expect("there"), 0, "something came back after all was done");

    let mut seen: Vec<(u32, u32)> = worked.iter().map(|worked| (worked.task.publisher, worked.task.number)).collect();
    let deliveries = seen.len();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len() as u64, tasks, "confirmed tasks that nobody worked on");
    let redelivered = worked.iter().filter(|worked| worked.redelivered).count();
    worked.sort_unstable_by_key(|worked| (worked.task, worked.run, worked.redelivered));
    let silent = worked
        .windows(2)
        .filter(|two| two[0].task == two[1].task && two[0].run == two[1].run && !two[1].redelivered)
        .count();
    assert_eq!(silent, 0, "deliveries that came twice in one run of the broker without saying so");
    let unmarked = worked
        .windows(2)
        .filter(|two| two[0].task == two[1].task && two[0].run != two[1].run && !two[1].redelivered)
        .count();
    println!(
        "{tasks} tasks in {took:.2?} ({:.0} a second), published in {published_in:.2?} ({:.0} a second); {deliveries} deliveries, {redelivered} of them redelivered; \
         {sent_again} published again; the broker was killed after {confirmed_at_kill} confirms, was ready again in {restarted_in:?}, and delivered {unmarked} tasks \
         a second time without the redelivered flag after that; {resident_mib} MiB resident at the end; TASKS_SEED={seed}",
        tasks as f64 / took.as_secs_f64(),
        tasks as f64 / published_in.as_secs_f64(),
    );
}
