//! What finding the queues of one message costs, without the channel's cache of routes.

#[path = "cases/topology.rs"]
mod topology;

use std::hint::black_box;

use amq_protocol::types::{AMQPValue, FieldTable};
use criterion::{Criterion, criterion_group, criterion_main};
use leveret::broker::exchange::{Attributes, Exchange, ExchangeKind, ExchangeOptions};
use leveret::broker::router::{RouteResult, Topology};

use topology::{Queues, bind_all, bound, by_key, mixed_pattern, sensor};

/// Measures one route; `expected` queues must come out.
fn measure(
    c: &mut Criterion,
    name: &str,
    (topology, exchange): (&Queues, &str),
    (keys, headers): (&[&str], Option<&FieldTable>),
    expected: usize,
) {
    let keys: Vec<&[u8]> = keys.iter().map(|key| key.as_bytes()).collect();
    let attributes = headers.map_or_else(Attributes::none, Attributes::with_headers);
    let mut out = RouteResult::default();
    c.bench_function(name, |bencher| {
        bencher.iter(|| {
            topology.route(black_box(exchange), black_box(&keys), &attributes, &mut out).expect("exists");
            black_box(out.queues.len())
        });
    });
    assert_eq!(out.queues.len(), expected, "{name}");
}

fn by_name(c: &mut Criterion) {
    let topology = by_key("amq.direct", 10_000, |number| format!("key.{number}"));
    measure(c, "default, 10k queues", (&topology, ""), (&["q7777"], None), 1);
    measure(c, "direct, 10k bindings", (&topology, "amq.direct"), (&["key.7777"], None), 1);
    let copies = ["key.1", "key.2", "key.3", "key.4"];
    measure(c, "direct, 10k bindings, 4 keys", (&topology, "amq.direct"), (&copies, None), 4);
    for count in [1, 10, 1000] {
        let topology = by_key("amq.fanout", count, |_| String::new());
        let name = format!("fanout, {count} queues");
        measure(c, &name, (&topology, "amq.fanout"), (&[""], None), count);
    }
}

fn topic_bindings(c: &mut Criterion) {
    let exchange = "amq.topic";
    let literal = by_key(exchange, 10_000, |n| format!("eu.site{}.sensor.{n}", n % 100));
    measure(c, "topic, 10k literal", (&literal, exchange), (&["eu.site77.sensor.7777"], None), 1);
    measure(c, "topic, 10k literal, none", (&literal, exchange), (&["us.site77.x.7777"], None), 0);
    let star = by_key(exchange, 10_000, |n| format!("eu.*.sensor{}.{n}", n % 100));
    measure(c, "topic, 10k with *", (&star, exchange), (&["eu.site9.sensor77.7777"], None), 1);
    let hash = by_key(exchange, 10_000, |n| format!("eu.site{}.{n}.#", n % 100));
    measure(c, "topic, 10k with # at the end", (&hash, exchange), (&["eu.site77.7777.a.b"], None), 1);
    let mixed = by_key(exchange, 10_000, mixed_pattern);
    measure(c, "topic, 10k mixed", (&mixed, exchange), (&["eu.site77.sensor.7777"], None), 1);
    measure(c, "topic, 10k mixed, none", (&mixed, exchange), (&["eu.site77.sensor.x"], None), 0);
}

fn headers(c: &mut Criterion) {
    let topology = bound("amq.headers", 100, |number| (String::new(), sensor(number)));
    let (message, exchange) = (sensor(77), "amq.headers");
    measure(c, "headers, 100 bindings", (&topology, exchange), (&[""], Some(&message)), 1);
}

fn consistent_hash(c: &mut Criterion) {
    for count in [10, 1000] {
        for (name, weight) in [("equal weights", None), ("different weights", Some(7))] {
            let mut topology = Topology::with_predeclared("/".into());
            let kind = ExchangeKind::ConsistentHash;
            let exchange = Exchange::new("hash".into(), kind, ExchangeOptions::default(), FieldTable::default());
            topology.declare_exchange(exchange).expect("new");
            bind_all(&mut topology, "hash", count, |number| {
                (weight.map_or(1, |count| 1 + number % count).to_string(), FieldTable::default())
            });
            let name = format!("consistent hash, {count} queues, {name}");
            measure(c, &name, (&topology, "hash"), (&["key.7777"], None), 1);
        }
    }
}

fn jms(c: &mut Criterion) {
    let mut topology = Topology::with_predeclared("/".into());
    let exchange =
        Exchange::new("jms".into(), ExchangeKind::JmsTopic, ExchangeOptions::default(), FieldTable::default());
    topology.declare_exchange(exchange).expect("new");
    bind_all(&mut topology, "jms", 100, |number| {
        let mut arguments = FieldTable::default();
        let selector = format!(
            "{{'and',{{'like',{{'ident',<<\"kind\">>}},<<\"sen%\">>,'no_escape'}},{{'=',{{'ident',<<\"number\">>}},{number}}}}}."
        );
        arguments.insert("rjms_erlang_selector".into(), AMQPValue::LongString(selector.into()));
        (String::new(), arguments)
    });
    measure(c, "JMS, 100 selectors", (&topology, "jms"), (&[""], Some(&sensor(77))), 1);
}

criterion_group!(benches, by_name, topic_bindings, headers, consistent_hash, jms);
criterion_main!(benches);
