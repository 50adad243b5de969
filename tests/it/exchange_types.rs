//! Exchange types beyond AMQP's own over a restart. How they route: `interop/test_exchange_types.py` and the unit tests.

use std::collections::BTreeMap;

use amq_protocol::{
    protocol::{AMQPClass, exchange},
    types::FieldTable,
};

use crate::support::{Peer, TestBroker, peer::durable, persistent, table, text};

const QUEUES: [&str; 3] = ["a", "b", "c"];

async fn declare(peer: &mut Peer, name: &str, kind: &str, arguments: FieldTable) {
    let declare =
        exchange::Declare { exchange: name.into(), kind: kind.into(), durable: true, arguments, ..Default::default() };
    let answer = peer.call(1, AMQPClass::Exchange(exchange::AMQPMethod::Declare(declare))).await;
    assert!(matches!(answer, AMQPClass::Exchange(exchange::AMQPMethod::DeclareOk(_))), "{answer:?}");
}

/// Publishes with many keys, and tells which queues each message was in.
async fn spread(peer: &mut Peer, exchange: &str) -> BTreeMap<String, Vec<&'static str>> {
    for number in 0..60 {
        peer.publish_to(1, exchange, &format!("key-{number}"), &persistent(), number.to_string()).await;
    }
    let mut found = BTreeMap::<_, Vec<_>>::new();
    for queue in QUEUES {
        while let Some(message) = peer.get(1, queue, true).await {
            found.entry(message.text().to_owned()).or_default().push(queue);
        }
    }
    found
}

#[tokio::test]
async fn every_type_routes_after_a_restart_as_before() {
    let mut broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    for queue in QUEUES {
        peer.declare(1, durable(queue)).await;
    }
    let delayed = || table([("x-delayed-type", text("x-consistent-hash"))]);
    let selector = || table([("rjms_erlang_selector", text("{'is_null',{'ident',<<\"h\">>}}."))]);
    // With the number of queues that each message goes to, and whether its key alone decides.
    let types = [
        ("x-consistent-hash", FieldTable::default(), "2", FieldTable::default(), 1, true),
        ("x-modulus-hash", FieldTable::default(), "", FieldTable::default(), 1, true),
        ("x-random", FieldTable::default(), "", FieldTable::default(), 1, false),
        ("x-local-random", FieldTable::default(), "", FieldTable::default(), 1, false),
        ("x-recent-history", FieldTable::default(), "", FieldTable::default(), 3, true),
        ("x-jms-topic", FieldTable::default(), "", selector(), 3, true),
        ("x-delayed-message", delayed(), "3", FieldTable::default(), 1, true),
    ];
    let mut before = Vec::new();
    for (kind, arguments, key, binding, ..) in &types {
        declare(&mut peer, kind, kind, arguments.clone()).await;
        for queue in QUEUES {
            peer.bind(1, queue, kind, key, binding.clone()).await;
        }
        before.push(spread(&mut peer, kind).await);
    }
    broker.restart().await;
    let mut peer = broker.peer().await;
    for ((kind, arguments, _, _, copies, by_key), before) in types.into_iter().zip(before) {
        declare(&mut peer, kind, kind, arguments).await;
        let after = spread(&mut peer, kind).await;
        assert!(after.len() == 60 && after.values().all(|queues| queues.len() == copies), "{kind}: {after:?}");
        assert!(!by_key || after == before, "{kind}: {before:?} became {after:?}");
    }
    broker.stop().await;
}
