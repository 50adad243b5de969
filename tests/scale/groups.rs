//! Many message groups and many consumers that come and go, beside a queue without groups under the same consumers.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use amq_protocol::{
    protocol::BasicProperties,
    types::{AMQPValue, FieldTable},
};

use super::{
    client::{PATIENCE, Rng},
    figures::{Cost, Place, alone, best, demand, scaled, watch_resident},
    wire::{Event, Template, Wire, number},
};

const PUBLISHERS: u64 = 2;
const WINDOW: u64 = 20_000;
const PREFETCH: u16 = 100;

/// How far a group is.
#[derive(Clone, Copy, Default)]
struct Group {
    /// What is to come next.
    next: u64,
    /// Everything before it was acked.
    acked: u64,
}

/// What all consumers share.
struct Office<'a> {
    place: &'a Place,
    queue: &'a str,
    groups: Vec<Mutex<Group>>,
    /// Whether the order within groups is kept.
    ordered: bool,
    count: u64,
    acked: AtomicU64,
    redelivered: AtomicU64,
    sessions: AtomicU64,
    work: Vec<AtomicU64>,
}

impl Office<'_> {
    fn is_done(&self) -> bool {
        self.acked.load(Ordering::Relaxed) >= self.count
    }

    /// A message has come: the next of its group, or one again that nobody has acked.
    fn note(&self, group: u64, sequence: u64, redelivered: bool) {
        if redelivered {
            self.redelivered.fetch_add(1, Ordering::Relaxed);
        }
        if !self.ordered {
            return;
        }
        let mut state = self.groups[group as usize].lock().unwrap();
        let again = redelivered && (state.acked..state.next).contains(&sequence);
        assert!(
            sequence == state.next || again,
            "group {group}: message {sequence} came (redelivered: {redelivered}) where {} was next and those before {} are acked",
            state.next,
            state.acked
        );
        state.next = sequence + 1;
    }

    /// A consumer's life of many connections.
    fn consume(&self, me: usize, mut rng: Rng) {
        while !self.is_done() {
            self.session(me, &mut rng);
            self.sessions.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn session(&self, me: usize, rng: &mut Rng) {
        let mut client = self.place.client();
        client.consume(self.queue, false, PREFETCH).expect("consumes");
        let mut wire = Wire::new(client);
        let ends = Instant::now() + Duration::from_millis(rng.range(50..700));
        let mut open: Vec<(u64, u64, u64)> = Vec::new();
        while Instant::now() < ends && !self.is_done() {
            wire.fill(Duration::from_millis(20)).expect("the broker is there");
            self.take_in(&mut wire, &mut open);
            // A few stay open, and are settled with the next, or by the end of the connection.
            let done = open.len() - rng.range(0..4).min(open.len() as u64) as usize;
            self.work[me].fetch_add(done as u64, Ordering::Relaxed);
            if done > 0 {
                self.ack(&mut wire, &mut open, done);
            }
        }
        // What was acked is handled before the connection goes without a goodbye.
        wire.queue_qos();
        wire.flush().expect("goes out");
        while !self.take_in(&mut wire, &mut open) {
            assert!(wire.fill(PATIENCE).expect("an answer"), "basic.qos is not answered");
        }
    }

    /// Notes what has come; true if that was the answer to `basic.qos`.
    fn take_in(&self, wire: &mut Wire, open: &mut Vec<(u64, u64, u64)>) -> bool {
        while let Some(event) = wire.next() {
            match event {
                Event::Delivery { tag, redelivered, body } => {
                    let body = wire.bytes(body);
                    let (group, sequence) = (number(body, 0), number(body, 8));
                    self.note(group, sequence, redelivered);
                    open.push((tag, group, sequence));
                }
                Event::Method(60, 11) => return true,
                other => panic!("a consumer was told {other:?}"),
            }
        }
        false
    }

    fn ack(&self, wire: &mut Wire, open: &mut Vec<(u64, u64, u64)>, done: usize) {
        let mut last = 0;
        for (tag, group, sequence) in open.drain(..done) {
            last = tag;
            if self.ordered {
                let mut state = self.groups[group as usize].lock().unwrap();
                state.acked = state.acked.max(sequence + 1);
            }
        }
        wire.ack_up_to(last);
        wire.flush().expect("acks go out");
        self.acked.fetch_add(done as u64, Ordering::Relaxed);
    }
}

fn publish(place: &Place, queue: &str, publisher: u64, groups: u64, each: u64) {
    let mut client = place.client();
    client.confirm_select().expect("confirms");
    let mut headers = FieldTable::default();
    headers.insert("x-group-id".into(), AMQPValue::LongString("group---".into()));
    let properties = BasicProperties::default().with_delivery_mode(2).with_headers(headers);
    let mut template = Template::new(queue, &properties, 16);
    let group_at = template.position_of(b"group---");
    let mut rng = Rng(publisher);
    let mut sequences = vec![0; groups as usize];
    Wire::new(client).publish(each, WINDOW, |_, out| {
        // Each group has one publisher, so that its order is known.
        let group = rng.range(0..groups / PUBLISHERS) * PUBLISHERS + publisher;
        template.set(group_at, format!("g{group:07}").as_bytes());
        template.set_body(0, group);
        template.set_body(8, sequences[group as usize]);
        sequences[group as usize] += 1;
        template.append_to(out);
    });
}

/// One run; answers its cost and prints what is to be said beside it.
fn run(place: &Place, queue: &str, ordered: bool, consumers: usize, groups: u64, each: u64, preload: bool) -> Cost {
    let count = each * PUBLISHERS;
    let mut arguments = FieldTable::default();
    if ordered {
        arguments.insert("x-message-group".into(), true.into());
    }
    place.client().declare_queue_with(queue, arguments).expect("declares");
    let office = Office {
        place,
        queue,
        groups: (0..groups).map(|_| Mutex::default()).collect(),
        ordered,
        count,
        acked: AtomicU64::new(0),
        redelivered: AtomicU64::new(0),
        sessions: AtomicU64::new(0),
        work: (0..consumers).map(|_| AtomicU64::new(0)).collect(),
    };
    let publish_all = || {
        std::thread::scope(|scope| {
            for publisher in 0..PUBLISHERS {
                scope.spawn(move || publish(place, queue, publisher, groups, each));
            }
        });
    };
    if preload {
        publish_all();
    }
    let mut most = 0.0;
    let cost = Cost::of(place.broker.pid(), count, || {
        std::thread::scope(|scope| {
            for me in 0..consumers {
                let office = &office;
                scope.spawn(move || office.consume(me, Rng(me as u64)));
            }
            if !preload {
                scope.spawn(publish_all);
            }
            let began = Instant::now();
            most = watch_resident(place, || {
                assert!(began.elapsed() < Duration::from_secs(300), "nothing moves");
                !office.is_done()
            });
        });
    });
    let work: Vec<u64> = office.work.iter().map(|work| work.load(Ordering::Relaxed)).collect();
    let (least, greatest) = (work.iter().min().unwrap(), work.iter().max().unwrap());
    println!(
        "  {}, {}: {}; {} connections, {} redelivered, {least} to {greatest} messages a consumer, {most:.0} MiB resident at most",
        if ordered { "groups" } else { "plain" },
        if preload { "published before" } else { "published meanwhile" },
        cost.text(),
        office.sessions.load(Ordering::Relaxed),
        office.redelivered.load(Ordering::Relaxed),
    );
    assert!(*least > 0, "a consumer had nothing to do: {work:?}");
    assert_eq!(office.acked.load(Ordering::Relaxed), count, "something was acked twice");
    if ordered {
        let left = office
            .groups
            .iter()
            .filter(|group| {
                let group = group.lock().unwrap();
                group.next != group.acked
            })
            .count();
        assert_eq!(left, 0, "groups with messages that nobody acked");
    }
    assert_eq!(place.client().declare_queue(queue, true, true).expect("there"), 0);
    place.client().delete_queue(queue).expect("deleted");
    cost
}

#[test]
fn groups_keep_their_order_while_consumers_come_and_go() {
    let _alone = alone();
    let (groups, consumers, each) = scaled((10_000, 50, 500_000), (200, 10, 10_000));
    let place = Place::new();
    println!(
        "groups: {} persistent messages of {groups} groups, {consumers} consumers that come and go",
        each * PUBLISHERS
    );
    println!("  resident {:.0} MiB before", place.resident_mib());
    for preload in [true, false] {
        let (mut plain, mut grouped) = (Vec::new(), Vec::new());
        for turn in 0..scaled(2, 1) {
            plain.push(run(&place, &format!("plain-{turn}"), false, consumers, groups, each, preload));
            grouped.push(run(&place, &format!("groups-{turn}"), true, consumers, groups, each, preload));
        }
        let part = best(&grouped).rate() / best(&plain).rate();
        demand(&format!("{:.0} % of a plain queue's rate, of at least 50 %", part * 100.0), part >= 0.5);
    }
}
