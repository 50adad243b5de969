//! What it costs to write a message's properties anew: for a dead letter, and for a delivery with the broker's headers.

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use leveret::broker::{
    Body, Message,
    dead_letter::{DeadLetter, DeadLetterTarget, Death, DeathReason, is_cycle},
    deduplication::DedupCache,
    delay_headers::due_unix_ms,
    delivery_headers::{ACQUIRED_COUNT, DELIVERY_COUNT, add_counts},
    encode_names,
    rules::Deduplication,
};
use leveret::model::properties::Properties;

const NOW: u64 = 1_800_000_000_000;

/// Properties with delivery mode 2 and three headers, not in order.
fn properties() -> Vec<u8> {
    let table =
        b"\x08tenant-aS\0\0\0\x05acme.\x07attemptI\0\0\0\x01\x08trace-idS\0\0\0\x200123456789abcdef0123456789abcdef";
    [&b"\x30\0"[..], &(table.len() as u32).to_be_bytes(), table, b"\x02"].concat()
}

fn dead_letters(c: &mut Criterion) {
    let names = encode_names(b"orders", b"orders.created");
    let target = DeadLetterTarget { exchange: "dead", routing_key: Some("orders.dead") };
    let death = |queue| Death { queue, reason: DeathReason::Rejected, at_unix_ms: NOW, deliveries: 1 };
    let message = |properties, extension| Message {
        names: &names,
        properties,
        body: Body::Inline(b""),
        persistent: true,
        extension,
    };
    let published = properties();
    for (name, properties) in [("without headers", &b"\x10\0\x02"[..]), ("with three headers", &published)] {
        let message = message(properties, &[]);
        c.bench_function(&format!("dead letter {name}"), |b| {
            b.iter(|| DeadLetter::new(black_box(&message), &death("orders"), &target));
        });
    }
    let mut letter = DeadLetter::new(&message(&published, &[]), &death("orders"), &target);
    for queue in ["retry-1", "retry-2", "retry-3"] {
        letter = DeadLetter::new(&letter.message(Body::Inline(b""), true), &death(queue), &target);
    }
    let fourth = letter.message(Body::Inline(b""), true);
    c.bench_function("dead letter with four deaths behind it", |b| {
        b.iter(|| DeadLetter::new(black_box(&fourth), &death("orders"), &target));
    });
    c.bench_function("cycle check with four deaths", |b| b.iter(|| is_cycle(black_box(&fourth), "elsewhere")));
    let mut out = Vec::new();
    c.bench_function("delivery counts to a dead letter", |b| {
        b.iter(|| add_counts(black_box(fourth.properties), &[(ACQUIRED_COUNT, 2), (DELIVERY_COUNT, 2)], &mut out));
    });
}

fn deliveries(c: &mut Criterion) {
    let published = properties();
    let mut out = Vec::new();
    for (name, properties) in [("without headers", &b"\x10\0\x02"[..]), ("with three headers", &published)] {
        c.bench_function(&format!("delivery counts {name}"), |b| {
            b.iter(|| add_counts(black_box(properties), &[(ACQUIRED_COUNT, 2), (DELIVERY_COUNT, 2)], &mut out));
        });
    }
    let view = Properties::parse(&published).expect("whole properties");
    c.bench_function("due time with three headers", |b| b.iter(|| due_unix_ms(black_box(&view), NOW)));
}

fn deduplication(c: &mut Criterion) {
    let rules = Deduplication { header: "id".into(), cache_size: 100_000, cache_ttl_ms: None };
    let mut cache = DedupCache::new(&rules, false);
    let mut id = 0u64;
    c.bench_function("deduplication of a new value", |b| {
        b.iter(|| {
            id += 1;
            let table = [&b"\0\0\0\x0c\x02idl"[..], &id.to_be_bytes()].concat();
            cache.check_and_insert(NOW, Some(&table), true)
        });
    });
}

criterion_group!(benches, dead_letters, deliveries, deduplication);
criterion_main!(benches);
