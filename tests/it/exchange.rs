//! Exchanges: declaring, deleting, and what is refused about them.

use amq_protocol::{
    protocol::{AMQPClass, exchange, queue},
    types::AMQPValue,
};
use lapin::{ExchangeKind, options::*, types::FieldTable};

use crate::support::{Peer, TestBroker, code, peer::transient, table, text};

fn declare(name: &str, kind: &str) -> exchange::Declare {
    exchange::Declare { exchange: name.into(), kind: kind.into(), ..Default::default() }
}

async fn send(peer: &mut Peer, declare: exchange::Declare) {
    peer.send(1, AMQPClass::Exchange(exchange::AMQPMethod::Declare(declare))).await;
}

/// Expects a declaration to be refused; the channel is open again afterwards.
async fn refused(peer: &mut Peer, declare: exchange::Declare, code: u16, text: &str) {
    send(peer, declare).await;
    peer.expect_channel_error(1, code, text).await;
    peer.open_channel(1).await;
}

async fn delete(peer: &mut Peer, name: &str, if_unused: bool) {
    let delete = exchange::Delete { exchange: name.into(), if_unused, nowait: false };
    peer.send(1, AMQPClass::Exchange(exchange::AMQPMethod::Delete(delete))).await;
}

async fn deleted(peer: &mut Peer, name: &str) {
    delete(peer, name, false).await;
    let answer = peer.method(1).await;
    assert!(matches!(answer, AMQPClass::Exchange(exchange::AMQPMethod::DeleteOk(_))), "{answer:?}");
}

async fn exists(peer: &mut Peer, name: &str) -> bool {
    send(peer, exchange::Declare { passive: true, ..declare(name, "") }).await;
    match peer.method(1).await {
        AMQPClass::Exchange(exchange::AMQPMethod::DeclareOk(_)) => true,
        _ => {
            peer.send(1, AMQPClass::Channel(amq_protocol::protocol::channel::AMQPMethod::CloseOk(Default::default())))
                .await;
            peer.open_channel(1).await;
            false
        }
    }
}

#[tokio::test]
async fn the_predeclared_exchanges_are_there_and_cannot_be_deleted() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    for name in ["amq.direct", "amq.fanout", "amq.topic", "amq.headers", "amq.match", "amq.rabbitmq.trace"] {
        assert!(exists(&mut peer, name).await, "{name}");
        delete(&mut peer, name, false).await;
        let text = format!("ACCESS_REFUSED - deletion of system exchange '{name}' in vhost '/' not allowed");
        peer.expect_channel_error(1, 403, &text).await;
        peer.open_channel(1).await;
    }
    broker.stop().await;
}

#[tokio::test]
async fn the_default_exchange_is_out_of_reach() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    let text = "ACCESS_REFUSED - operation not permitted on the default exchange";
    refused(&mut peer, declare("", "direct"), 403, text).await;
    refused(&mut peer, exchange::Declare { passive: true, ..declare("", "direct") }, 403, text).await;
    delete(&mut peer, "", false).await;
    peer.expect_channel_error(1, 403, text).await;
    peer.open_channel(1).await;
    peer.declare(1, transient("q")).await;
    let bind = queue::Bind { queue: "q".into(), ..Default::default() };
    peer.send(1, AMQPClass::Queue(queue::AMQPMethod::Bind(bind))).await;
    peer.expect_channel_error(1, 403, text).await;
    broker.stop().await;
}

#[tokio::test]
async fn declaring_the_same_again_is_fine_and_declaring_something_else_is_406() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    for _ in 0..2 {
        peer.declare_exchange(1, "x", "direct", FieldTable::default()).await;
    }
    // Arguments other than the alternate exchange are not compared.
    peer.declare_exchange(1, "x", "direct", table([("own", text("x"))])).await;
    let inequivalent = |property: &str, new: &str, old: &str| {
        format!(
            "PRECONDITION_FAILED - inequivalent arg '{property}' for exchange 'x' in vhost '/': received '{new}' but current is '{old}'"
        )
    };
    refused(&mut peer, declare("x", "topic"), 406, &inequivalent("type", "topic", "direct")).await;
    let durable = exchange::Declare { durable: true, ..declare("x", "direct") };
    refused(&mut peer, durable, 406, &inequivalent("durable", "true", "false")).await;
    let auto_delete = exchange::Declare { auto_delete: true, ..declare("x", "direct") };
    refused(&mut peer, auto_delete, 406, &inequivalent("auto_delete", "true", "false")).await;
    let internal = exchange::Declare { internal: true, ..declare("x", "direct") };
    refused(&mut peer, internal, 406, &inequivalent("internal", "true", "false")).await;
    let alternate =
        exchange::Declare { arguments: table([("alternate-exchange", text("a"))]), ..declare("x", "direct") };
    let text = "PRECONDITION_FAILED - inequivalent arg 'alternate-exchange' for exchange 'x' in vhost '/': received the value 'a' of type 'longstr' but current is none";
    refused(&mut peer, alternate, 406, text).await;
    broker.stop().await;
}

#[tokio::test]
async fn bad_declarations_are_refused_with_the_reason() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    refused(&mut peer, declare("x", "nonsense"), 406, "PRECONDITION_FAILED - unknown exchange type 'nonsense'").await;
    let text = "ACCESS_REFUSED - exchange name 'amq.mine' contains reserved prefix 'amq.*'";
    refused(&mut peer, declare("amq.mine", "direct"), 403, text).await;
    let alternate = table([("alternate-exchange", AMQPValue::LongInt(1))]);
    let text =
        "PRECONDITION_FAILED - invalid type 'signedint' for arg 'alternate-exchange' in exchange 'x' in vhost '/'";
    refused(&mut peer, exchange::Declare { arguments: alternate, ..declare("x", "direct") }, 406, text).await;
    let passive = exchange::Declare { passive: true, ..declare("x", "direct") };
    refused(&mut peer, passive, 404, "NOT_FOUND - no exchange 'x' in vhost '/'").await;
    broker.stop().await;
}

#[tokio::test]
async fn a_passive_declaration_compares_nothing() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare_exchange(1, "x", "fanout", FieldTable::default()).await;
    send(&mut peer, exchange::Declare { passive: true, durable: true, ..declare("x", "topic") }).await;
    assert!(matches!(peer.method(1).await, AMQPClass::Exchange(exchange::AMQPMethod::DeclareOk(_))));
    broker.stop().await;
}

#[tokio::test]
async fn a_deleted_exchange_takes_its_bindings_along() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare(1, transient("q")).await;
    for _ in 0..2 {
        peer.declare_exchange(1, "x", "fanout", FieldTable::default()).await;
        peer.publish_mandatory(1, "x", "", &Default::default(), "unbound").await;
        assert_eq!(peer.returned(1).await.0, 312);
        peer.bind(1, "q", "x", "", FieldTable::default()).await;
        peer.publish_to(1, "x", "", &Default::default(), "bound").await;
        deleted(&mut peer, "x").await;
    }
    deleted(&mut peer, "x").await; // missing is fine
    assert_eq!(peer.depth(1, "q").await, (2, 0));
    peer.publish_to(1, "x", "", &Default::default(), "gone").await;
    peer.expect_channel_error(1, 404, "NOT_FOUND - no exchange 'x' in vhost '/'").await;
    broker.stop().await;
}

#[tokio::test]
async fn if_unused_looks_at_bindings_from_the_exchange_only() {
    let broker = TestBroker::start().await;
    let client = broker.client().await;
    for name in ["from", "to"] {
        client
            .exchange_declare(name.into(), ExchangeKind::Fanout, Default::default(), FieldTable::default())
            .await
            .unwrap();
    }
    client
        .exchange_bind("to".into(), "from".into(), "".into(), Default::default(), FieldTable::default())
        .await
        .unwrap();
    let unused = ExchangeDeleteOptions { if_unused: true, nowait: false };
    let other = client.connection.create_channel().await.unwrap();
    assert_eq!(code(other.exchange_delete("from".into(), unused).await), 406);
    client.exchange_delete("to".into(), unused).await.unwrap();
    client.exchange_delete("from".into(), unused).await.unwrap(); // its binding went with its destination
    broker.stop().await;
}

#[tokio::test]
async fn an_auto_delete_exchange_goes_with_its_last_binding() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare(1, transient("q")).await;
    for name in ["one", "two"] {
        send(&mut peer, exchange::Declare { auto_delete: true, ..declare(name, "fanout") }).await;
        peer.method(1).await;
        assert!(exists(&mut peer, name).await, "never bound, so it stays");
    }
    peer.bind(1, "q", "two", "", FieldTable::default()).await;
    let bind = exchange::Bind { destination: "two".into(), source: "one".into(), ..Default::default() };
    peer.call(1, AMQPClass::Exchange(exchange::AMQPMethod::Bind(bind))).await;
    let unbind = queue::Unbind { queue: "q".into(), exchange: "two".into(), ..Default::default() };
    peer.call(1, AMQPClass::Queue(queue::AMQPMethod::Unbind(unbind))).await;
    assert!(!exists(&mut peer, "two").await);
    assert!(!exists(&mut peer, "one").await, "its only binding led to the other");
    broker.stop().await;
}

#[tokio::test]
async fn an_internal_exchange_takes_no_publishes_but_routes() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    send(&mut peer, exchange::Declare { internal: true, ..declare("inner", "fanout") }).await;
    peer.method(1).await;
    peer.declare(1, transient("q")).await;
    peer.bind(1, "q", "inner", "", FieldTable::default()).await;
    let bind = exchange::Bind { destination: "inner".into(), source: "amq.fanout".into(), ..Default::default() };
    peer.call(1, AMQPClass::Exchange(exchange::AMQPMethod::Bind(bind))).await;
    peer.publish_to(1, "amq.fanout", "", &Default::default(), "through").await;
    assert_eq!(peer.get(1, "q", true).await.unwrap().text(), "through");
    peer.publish_to(1, "inner", "", &Default::default(), "direct").await;
    let text = "ACCESS_REFUSED - cannot publish to internal exchange 'inner' in vhost '/'";
    peer.expect_channel_error(1, 403, text).await;
    broker.stop().await;
}
