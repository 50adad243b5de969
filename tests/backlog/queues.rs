//! Many queues with a few messages each.

use std::time::{Duration, Instant};

use amq_protocol::{
    protocol::{AMQPClass, BasicProperties, queue},
    types::FieldTable,
};

use super::{
    broker::Broker,
    client::{PATIENCE, publish_frames},
    figures::{alone, demand, scaled},
    support::{connect, mb, settle},
    wire::Wire,
};

const MESSAGES: usize = 10;

fn name(index: usize) -> String {
    format!("queue-{index:06}")
}

#[test]
fn many_small_queues_are_there_at_once_after_a_kill() {
    let _alone = alone();
    let count = scaled(100_000, 1_000);
    let directory = tempfile::tempdir().unwrap();
    let data = directory.path().join("data");
    let quiet = ["--log", "warn,leveret::server=info"];
    let broker = Broker::start(&data, &quiet).expect("starts");
    let mut client = connect(&broker);
    let began = Instant::now();
    for index in 0..count {
        let declare = queue::Declare {
            queue: name(index).into(),
            durable: true,
            nowait: true,
            arguments: FieldTable::default(),
            ..queue::Declare::default()
        };
        client.queue_method(1, AMQPClass::Queue(queue::AMQPMethod::Declare(declare)));
        if index % 1000 == 999 {
            client.flush().expect("goes out");
        }
    }
    client.declare_queue(&name(0), true, true).expect("all are declared");
    let declared = count as f64 / began.elapsed().as_secs_f64();
    client.confirm_select().expect("confirms");
    let mut wire = Wire::new(client);
    let properties = BasicProperties::default().with_delivery_mode(2);
    let began = Instant::now();
    for message in 0..MESSAGES {
        for index in 0..count {
            publish_frames(
                &mut wire.out,
                1,
                "",
                &name(index),
                false,
                &properties,
                format!("{index}/{message}").as_bytes(),
            );
            if wire.out.len() > 64 << 10 {
                wire.flush().expect("goes out");
                while wire.fill(Duration::ZERO).expect("the broker confirms") {
                    while wire.next().is_some() {}
                }
            }
        }
    }
    wire.flush().expect("goes out");
    settle(&mut wire);
    let published = (count * MESSAGES) as f64 / began.elapsed().as_secs_f64();
    // Whatever is on its way to disk.
    while wire.fill(Duration::from_millis(500)).expect("the broker confirms") {
        while wire.next().is_some() {}
    }
    println!(
        "queues: {count} durable ones declared at {declared:.0}/s, {MESSAGES} messages in each at {published:.0}/s"
    );
    println!("  resident {:.1} MB", mb(broker.resident_kib() * 1024));
    broker.kill();
    let began = Instant::now();
    let broker = Broker::start(&data, &quiet).expect("starts");
    let mut client = connect(&broker);
    let delivery = client.get(&name(count / 2)).expect("answers").expect("a message");
    let took = began.elapsed();
    assert_eq!(delivery.body, format!("{}/0", count / 2).as_bytes());
    std::thread::sleep(Duration::from_secs(1));
    let resident = broker.resident_kib() * 1024;
    demand(&format!("had a message {took:?} after the start, of 2 s"), took < Duration::from_secs(2));
    demand(&format!("resident {:.1} MB, of 300 MB", mb(resident)), resident < 300_000_000);
    for index in [0, 1, count / 3, count - 1] {
        let waiting = client.declare_queue(&name(index), true, true).expect("there");
        assert_eq!(waiting as usize, MESSAGES, "all messages of {}", name(index));
    }
    assert!(PATIENCE > took);
}
