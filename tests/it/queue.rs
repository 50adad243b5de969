//! Queues: declaring, purging, deleting, and whose they are.

use amq_protocol::{
    protocol::{AMQPClass, basic, queue},
    types::AMQPValue,
};

use crate::support::{
    Peer, TestBroker,
    peer::{Declare, auto_delete, durable, exclusive, transient},
    table, text,
};

const LOCKED: &str = "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'mine' in vhost '/'. It could be originally declared on another connection or the exclusive property value does not match that of the original declaration.";

/// Expects a method to be refused; the channel is open again afterwards.
async fn refused(peer: &mut Peer, method: queue::AMQPMethod, code: u16, text: &str) {
    peer.send(1, AMQPClass::Queue(method)).await;
    peer.expect_channel_error(1, code, text).await;
    peer.open_channel(1).await;
}

async fn delete(peer: &mut Peer, delete: queue::Delete) -> u32 {
    match peer.call(1, AMQPClass::Queue(queue::AMQPMethod::Delete(delete))).await {
        AMQPClass::Queue(queue::AMQPMethod::DeleteOk(ok)) => ok.message_count,
        other => panic!("no delete-ok: {other:?}"),
    }
}

fn inequivalent(property: &str, new: &str, old: &str) -> String {
    format!(
        "PRECONDITION_FAILED - inequivalent arg '{property}' for queue 'q' in vhost '/': received {new} but current is {old}"
    )
}

#[tokio::test]
async fn declare_ok_says_how_many_messages_and_consumers_there_are() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    assert_eq!(peer.declare(1, transient("q")).await, ("q".to_owned(), 0, 0));
    for _ in 0..3 {
        peer.publish(1, "q", "x").await;
    }
    assert_eq!(peer.declare(1, transient("q")).await, ("q".to_owned(), 3, 0));
    peer.qos(1, 1, false).await;
    peer.consume(1, "q", false).await;
    peer.delivery(1).await;
    assert_eq!(peer.depth(1, "q").await, (2, 1));
    broker.stop().await;
}

#[tokio::test]
async fn a_server_named_queue_can_be_redeclared_only_passively() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    let (name, ..) = peer.declare(1, exclusive("")).await;
    assert_eq!(peer.depth(1, &name).await, (0, 0));
    let text = format!("ACCESS_REFUSED - queue name '{name}' contains reserved prefix 'amq.*'");
    refused(&mut peer, queue::AMQPMethod::Declare(exclusive(&name)), 403, &text).await;
    broker.stop().await;
}

#[tokio::test]
async fn line_ends_are_taken_out_of_names() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    assert_eq!(peer.declare(1, transient("a\r\nb")).await.0, "ab");
    assert!(broker.has_queue("ab"));
    broker.stop().await;
}

#[tokio::test]
async fn the_longest_name_works_and_errors_about_it_are_cut() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    let name = "ü".repeat(127);
    assert_eq!(peer.declare(1, transient(&name)).await.0, name);
    peer.publish(1, &name, "x").await;
    assert_eq!(peer.get(1, &name, true).await.unwrap().key, name);
    peer.send(1, AMQPClass::Queue(queue::AMQPMethod::Declare(durable(&name)))).await;
    match peer.method(1).await {
        AMQPClass::Channel(amq_protocol::protocol::channel::AMQPMethod::Close(close)) => {
            assert!(
                close.reply_text.as_str().starts_with("PRECONDITION_FAILED - inequivalent arg 'durable' for queue 'üü")
            );
        }
        other => panic!("{other:?}"),
    }
    broker.stop().await;
}

#[tokio::test]
async fn redeclaring_with_other_properties_is_406() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    let ttl = |ms| table([("x-message-ttl", AMQPValue::LongInt(ms))]);
    peer.declare(1, Declare { arguments: ttl(5000), ..transient("q") }).await;
    // The same value in another width is the same; unknown arguments are not compared.
    let wide = table([("x-message-ttl", AMQPValue::LongLongInt(5000)), ("x-own", text("new"))]);
    peer.declare(1, Declare { arguments: wide, ..transient("q") }).await;
    let other = |declare| queue::AMQPMethod::Declare(declare);
    let durable = Declare { arguments: ttl(5000), ..durable("q") };
    refused(&mut peer, other(durable), 406, &inequivalent("durable", "'true'", "'false'")).await;
    let brief = Declare { arguments: ttl(5000), ..auto_delete("q") };
    refused(&mut peer, other(brief), 406, &inequivalent("auto_delete", "'true'", "'false'")).await;
    let shorter = Declare { arguments: ttl(1000), ..transient("q") };
    refused(&mut peer, other(shorter), 406, &inequivalent("x-message-ttl", "'1000'", "'5000'")).await;
    let none = "the value '5000' of type 'signedint'";
    refused(&mut peer, other(transient("q")), 406, &inequivalent("x-message-ttl", "none", none)).await;
    broker.stop().await;
}

#[tokio::test]
async fn invalid_arguments_are_406_with_the_reason() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    for (key, value, error) in [
        ("x-message-ttl", AMQPValue::LongInt(-1), "{value_negative,-1}"),
        ("x-message-ttl", text("1"), "\"expected integer, got longstr\""),
        ("x-expires", AMQPValue::LongInt(0), "{value_zero,0}"),
        ("x-max-length", AMQPValue::LongInt(-1), "{value_negative,-1}"),
        ("x-max-priority", AMQPValue::LongInt(256), "{max_value_exceeded,256}"),
        ("x-overflow", text("explode"), "invalid_overflow"),
        ("x-dead-letter-routing-key", text("k"), "routing_key_but_no_dlx_defined"),
    ] {
        let declare = Declare { arguments: table([(key, value)]), ..durable("q") };
        let text = format!("PRECONDITION_FAILED - invalid arg '{key}' for queue 'q' in vhost '/': {error}");
        refused(&mut peer, queue::AMQPMethod::Declare(declare), 406, &text).await;
    }
    assert!(!broker.has_queue("q"));
    broker.stop().await;
}

#[tokio::test]
async fn a_missing_queue_is_404_except_for_delete_and_unbind() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    let text = "NOT_FOUND - no queue 'q' in vhost '/'";
    refused(&mut peer, queue::AMQPMethod::Declare(Declare { passive: true, ..transient("q") }), 404, text).await;
    refused(&mut peer, queue::AMQPMethod::Purge(queue::Purge { queue: "q".into(), nowait: false }), 404, text).await;
    let bind = queue::Bind { queue: "q".into(), exchange: "amq.direct".into(), ..Default::default() };
    refused(&mut peer, queue::AMQPMethod::Bind(bind), 404, text).await;
    peer.send(1, AMQPClass::Basic(basic::AMQPMethod::Get(basic::Get { queue: "q".into(), no_ack: true }))).await;
    peer.expect_channel_error(1, 404, text).await;
    peer.open_channel(1).await;
    assert_eq!(delete(&mut peer, queue::Delete { queue: "q".into(), ..Default::default() }).await, 0);
    let unbind = queue::Unbind { queue: "q".into(), exchange: "amq.direct".into(), ..Default::default() };
    let answer = peer.call(1, AMQPClass::Queue(queue::AMQPMethod::Unbind(unbind))).await;
    assert!(matches!(answer, AMQPClass::Queue(queue::AMQPMethod::UnbindOk(_))), "{answer:?}");
    broker.stop().await;
}

#[tokio::test]
async fn delete_with_conditions_looks_before_it_acts() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare(1, transient("q")).await;
    peer.open_channel(2).await;
    peer.publish(1, "q", "x").await;
    let conditional = |if_unused, if_empty| queue::Delete { queue: "q".into(), if_unused, if_empty, nowait: false };
    let text = "PRECONDITION_FAILED - queue 'q' in vhost '/' not empty";
    refused(&mut peer, queue::AMQPMethod::Delete(conditional(true, true)), 406, text).await;
    peer.consume(2, "q", false).await;
    peer.delivery(2).await;
    let text = "PRECONDITION_FAILED - queue 'q' in vhost '/' in use";
    refused(&mut peer, queue::AMQPMethod::Delete(conditional(true, true)), 406, text).await;
    peer.cancel(2, "q").await;
    assert_eq!(delete(&mut peer, conditional(true, true)).await, 0, "only ready messages count");
    broker.stop().await;
}

#[tokio::test]
async fn a_purge_takes_ready_messages_only() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare(1, transient("q")).await;
    for number in 0..5 {
        peer.publish(1, "q", number.to_string()).await;
    }
    let held = peer.get(1, "q", false).await.unwrap();
    let purge = queue::AMQPMethod::Purge(queue::Purge { queue: "q".into(), nowait: false });
    match peer.call(1, AMQPClass::Queue(purge)).await {
        AMQPClass::Queue(queue::AMQPMethod::PurgeOk(ok)) => assert_eq!(ok.message_count, 4),
        other => panic!("{other:?}"),
    }
    peer.reject(1, held.tag, true).await;
    assert_eq!(peer.get(1, "q", true).await.unwrap().text(), "0");
    assert_eq!(peer.get(1, "q", true).await, None);
    broker.stop().await;
}

#[tokio::test]
async fn an_exclusive_queue_is_locked_for_other_connections() {
    let broker = TestBroker::start().await;
    let (mut owner, mut peer) = (broker.peer().await, broker.peer().await);
    owner.declare(1, exclusive("mine")).await;
    refused(&mut peer, queue::AMQPMethod::Declare(exclusive("mine")), 405, LOCKED).await;
    refused(&mut peer, queue::AMQPMethod::Declare(Declare { passive: true, ..transient("mine") }), 405, LOCKED).await;
    refused(&mut peer, queue::AMQPMethod::Purge(queue::Purge { queue: "mine".into(), nowait: false }), 405, LOCKED)
        .await;
    refused(
        &mut peer,
        queue::AMQPMethod::Delete(queue::Delete { queue: "mine".into(), ..Default::default() }),
        405,
        LOCKED,
    )
    .await;
    let bind = queue::Bind { queue: "mine".into(), exchange: "amq.direct".into(), ..Default::default() };
    refused(&mut peer, queue::AMQPMethod::Bind(bind), 405, LOCKED).await;
    for method in [
        basic::AMQPMethod::Get(basic::Get { queue: "mine".into(), no_ack: true }),
        basic::AMQPMethod::Consume(basic::Consume { queue: "mine".into(), ..Default::default() }),
    ] {
        peer.send(1, AMQPClass::Basic(method)).await;
        peer.expect_channel_error(1, 405, LOCKED).await;
        peer.open_channel(1).await;
    }
    peer.publish(1, "mine", "anyone may publish").await;
    peer.nothing_more(1).await;
    owner.open_channel(2).await; // another channel of the same connection may do all of it
    assert_eq!(owner.get(2, "mine", true).await.unwrap().text(), "anyone may publish");
    refused(&mut owner, queue::AMQPMethod::Declare(transient("mine")), 405, LOCKED).await;
    broker.stop().await;
}

#[tokio::test]
async fn an_exclusive_queue_is_free_for_the_next_connection_after_close_ok() {
    let broker = TestBroker::start().await;
    for _ in 0..10 {
        let mut owner = broker.peer().await;
        assert_eq!(owner.declare(1, exclusive("mine")).await.1, 0);
        owner.publish(1, "mine", "x").await;
        owner.close().await;
    }
    broker.stop().await;
}

#[tokio::test]
async fn no_wait_answers_nothing_but_errors() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    let silent = |declare| AMQPClass::Queue(queue::AMQPMethod::Declare(Declare { nowait: true, ..declare }));
    peer.send(1, silent(durable("q"))).await;
    let bind = queue::Bind { queue: "q".into(), exchange: "amq.fanout".into(), nowait: true, ..Default::default() };
    peer.send(1, AMQPClass::Queue(queue::AMQPMethod::Bind(bind))).await;
    peer.publish_to(1, "amq.fanout", "", &Default::default(), "x").await;
    assert_eq!(peer.get(1, "q", false).await.unwrap().text(), "x");
    peer.send(1, AMQPClass::Queue(queue::AMQPMethod::Purge(queue::Purge { queue: "q".into(), nowait: true }))).await;
    peer.nothing_more(1).await;
    peer.send(1, silent(transient("q"))).await;
    peer.expect_channel_error(1, 406, &inequivalent("durable", "'false'", "'true'")).await;
    broker.stop().await;
}

#[tokio::test]
async fn a_thousand_queues_come_and_go() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    let declare = |number: u32| Declare { nowait: true, ..durable(&format!("q{number}")) };
    for number in 0..1000 {
        peer.send(1, AMQPClass::Queue(queue::AMQPMethod::Declare(declare(number)))).await;
        peer.publish_persistent(1, &format!("q{number}"), "x").await;
    }
    for number in 0..1000 {
        let delete = queue::Delete { queue: format!("q{number}").into(), nowait: true, ..Default::default() };
        peer.send(1, AMQPClass::Queue(queue::AMQPMethod::Delete(delete))).await;
    }
    peer.nothing_more(1).await;
    assert!(!broker.has_queue("q0") && !broker.has_queue("q999"));
    broker.stop().await;
}
