//! A queue with ten priorities beside one without.

use std::time::Duration;

use amq_protocol::{protocol::BasicProperties, types::FieldTable};

use super::{
    client::{Client, PATIENCE, Rng},
    figures::{Cost, Place, alone, best, demand, scaled},
    wire::{Event, Template, Wire, number},
};

const LEVELS: u64 = 10;
const PUBLISHERS: u64 = 2;
const WINDOW: u64 = 20_000;

fn publish(place: &Place, queue: &str, each: u64) {
    std::thread::scope(|scope| {
        for publisher in 0..PUBLISHERS {
            scope.spawn(move || {
                let mut client = place.client();
                client.confirm_select().expect("confirms");
                let properties = BasicProperties::default().with_delivery_mode(2).with_priority(0xAB);
                let mut template = Template::new(queue, &properties, 24);
                let priority_at = template.position_of(&[2, 0xAB]) + 1;
                let mut rng = Rng(publisher);
                let mut sequences = [0; LEVELS as usize];
                Wire::new(client).publish(each, WINDOW, |_, out| {
                    let level = rng.range(0..LEVELS);
                    template.set(priority_at, &[level as u8]);
                    template.set_body(0, publisher);
                    template.set_body(8, level);
                    template.set_body(16, sequences[level as usize]);
                    sequences[level as usize] += 1;
                    template.append_to(out);
                });
            });
        }
    });
}

/// Takes everything, and checks that it comes in order.
fn consume(mut client: Client, queue: &str, count: u64, by_priority: bool) {
    client.consume(queue, false, 10_000).expect("consumes");
    let mut wire = Wire::new(client);
    let mut next = [[0; LEVELS as usize]; PUBLISHERS as usize];
    let (mut taken, mut level_before) = (0, LEVELS);
    while taken < count {
        assert!(wire.fill(PATIENCE).expect("messages come"), "{taken} messages came of {count}");
        let mut last_tag = 0;
        while let Some(event) = wire.next() {
            let Event::Delivery { tag, body, .. } = event else { panic!("a consumer was told {event:?}") };
            let body = wire.bytes(body);
            let (publisher, level, sequence) = (number(body, 0), number(body, 8), number(body, 16));
            let expected = &mut next[publisher as usize][level as usize];
            assert_eq!(sequence, *expected, "out of order, publisher {publisher}, priority {level}");
            *expected += 1;
            assert!(!by_priority || level <= level_before, "priority {level} after {level_before}");
            (level_before, last_tag) = (level, tag);
            taken += 1;
        }
        if last_tag > 0 {
            wire.ack_up_to(last_tag);
            wire.flush().expect("acks go out");
        }
    }
    wire.queue_qos();
    wire.flush().expect("goes out");
    while !matches!(wire.next(), Some(Event::Method(60, 11))) {
        wire.fill(PATIENCE).expect("an answer");
    }
}

#[test]
fn ten_priorities_are_strict_and_cost_little() {
    let _alone = alone();
    let each = scaled(500_000, 5_000);
    let count = each * PUBLISHERS;
    let place = Place::new();
    let before = place.resident_mib();
    let (mut published, mut consumed) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for run in 0..scaled(6, 2) {
        let kind = run % 2;
        let queue = format!("queue-{run}");
        let mut arguments = FieldTable::default();
        if kind == 1 {
            arguments.insert("x-max-priority".into(), (LEVELS as i32 - 1).into());
        }
        place.client().declare_queue_with(&queue, arguments).expect("declares");
        let pid = place.broker.pid();
        published[kind].push(Cost::of(pid, count, || publish(&place, &queue, each)));
        assert_eq!(place.client().declare_queue(&queue, true, true).expect("there"), count as u32);
        consumed[kind].push(Cost::of(pid, count, || consume(place.client(), &queue, count, kind == 1)));
        place.client().delete_queue(&queue).expect("deleted");
        std::thread::sleep(Duration::from_millis(100));
    }
    println!("priorities: {count} persistent messages of {LEVELS} priorities, in strict order");
    println!("  resident {before:.0} MiB before, {:.0} MiB after", place.resident_mib());
    for (what, costs) in [("published", &published), ("consumed", &consumed)] {
        let (plain, prioritized) = (best(&costs[0]), best(&costs[1]));
        println!("  {what}: plain {}, priorities {}", plain.text(), prioritized.text());
        let part = prioritized.rate() / plain.rate();
        demand(&format!("{what} at {:.0} % of a plain queue's rate, of at least 70 %", part * 100.0), part >= 0.7);
    }
}
