//! Who gets a published message: every exchange type, bindings between exchanges, alternates, CC and BCC, and the checks
//! a publish has to pass.

use amq_protocol::{
    protocol::{AMQPClass, BasicProperties, exchange, queue},
    types::{AMQPValue, FieldArray},
};

use crate::support::{Peer, TestBroker, peer::transient, table, text};

/// Declares queues and binds each to `exchange` with its keys.
async fn bound(peer: &mut Peer, exchange: &str, bindings: &[(&str, &[&str])]) {
    for (queue, keys) in bindings {
        peer.declare(1, transient(queue)).await;
        for key in *keys {
            peer.bind(1, queue, exchange, key, Default::default()).await;
        }
    }
}

/// Publishes and answers which of `queues` have it; they are empty afterwards.
async fn reached<'a>(
    peer: &mut Peer,
    exchange: &str,
    key: &str,
    properties: &BasicProperties,
    queues: &[&'a str],
) -> Vec<&'a str> {
    peer.publish_to(1, exchange, key, properties, "m").await;
    let mut reached = Vec::new();
    for queue in queues {
        if let Some(message) = peer.get(1, queue, true).await {
            assert_eq!((message.exchange.as_str(), message.key.as_str(), message.remaining), (exchange, key, 0));
            reached.push(*queue);
        }
    }
    reached
}

fn headers<'a>(entries: impl IntoIterator<Item = (&'a str, AMQPValue)>) -> BasicProperties {
    BasicProperties::default().with_headers(table(entries))
}

fn array(values: impl IntoIterator<Item = AMQPValue>) -> AMQPValue {
    AMQPValue::FieldArray(FieldArray::from(values.into_iter().collect::<Vec<_>>()))
}

async fn bind_exchange(peer: &mut Peer, destination: &str, source: &str, key: &str) {
    let bind = exchange::Bind {
        destination: destination.into(),
        source: source.into(),
        routing_key: key.into(),
        ..Default::default()
    };
    let answer = peer.call(1, AMQPClass::Exchange(exchange::AMQPMethod::Bind(bind))).await;
    assert!(matches!(answer, AMQPClass::Exchange(exchange::AMQPMethod::BindOk(_))), "{answer:?}");
}

async fn unbind(peer: &mut Peer, queue: &str, exchange: &str, key: &str) {
    let unbind =
        queue::Unbind { queue: queue.into(), exchange: exchange.into(), routing_key: key.into(), ..Default::default() };
    let answer = peer.call(1, AMQPClass::Queue(queue::AMQPMethod::Unbind(unbind))).await;
    assert!(matches!(answer, AMQPClass::Queue(queue::AMQPMethod::UnbindOk(_))), "{answer:?}");
}

#[tokio::test]
async fn a_direct_exchange_compares_keys() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    bound(&mut peer, "amq.direct", &[("a", &["x", "y"]), ("b", &["x"]), ("c", &[""]), ("d", &["*"])]).await;
    let (all, plain) = (["a", "b", "c", "d"], Default::default());
    assert_eq!(reached(&mut peer, "amq.direct", "x", &plain, &all).await, ["a", "b"]);
    assert_eq!(reached(&mut peer, "amq.direct", "y", &plain, &all).await, ["a"]);
    assert_eq!(reached(&mut peer, "amq.direct", "", &plain, &all).await, ["c"]);
    assert_eq!(reached(&mut peer, "amq.direct", "*", &plain, &all).await, ["d"]);
    assert!(reached(&mut peer, "amq.direct", "X", &plain, &all).await.is_empty());
    broker.stop().await;
}

#[tokio::test]
async fn a_fanout_exchange_ignores_the_key_and_delivers_once_a_queue() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    bound(&mut peer, "amq.fanout", &[("a", &["1", "2", "3"]), ("b", &[""])]).await;
    assert_eq!(reached(&mut peer, "amq.fanout", "any", &Default::default(), &["a", "b"]).await, ["a", "b"]);
    broker.stop().await;
}

#[tokio::test]
async fn a_topic_exchange_matches_words() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    let bindings: [(&str, &[&str]); 8] = [
        ("all", &["#"]),
        ("one", &["*"]),
        ("two", &["*.*"]),
        ("middle", &["a.#.z"]),
        ("start", &["a.*"]),
        ("literal", &["a*"]),
        ("empty", &[""]),
        ("many", &["#.b", "a.#", "a.b"]),
    ];
    bound(&mut peer, "amq.topic", &bindings).await;
    let all = bindings.map(|(queue, _)| queue);
    for (key, expected) in [
        ("", &["all", "empty"][..]),
        ("a", &["all", "one", "many"]),
        ("a.b", &["all", "two", "start", "many"]),
        ("a.z", &["all", "two", "middle", "start", "many"]),
        ("a.b.c.z", &["all", "middle", "many"]),
        ("a*", &["all", "one", "literal"]),
        (".", &["all", "two"]),
        ("x.y.b", &["all", "many"]),
    ] {
        assert_eq!(reached(&mut peer, "amq.topic", key, &Default::default(), &all).await, expected, "{key}");
    }
    unbind(&mut peer, "many", "amq.topic", "a.#").await;
    assert_eq!(reached(&mut peer, "amq.topic", "a", &Default::default(), &all).await, ["all", "one"]);
    broker.stop().await;
}

#[tokio::test]
async fn a_headers_exchange_matches_all_or_any() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    let int = AMQPValue::LongInt;
    for (queue, arguments) in [
        ("all", table([("a", int(1)), ("b", text("x"))])),
        ("any", table([("x-match", text("any")), ("a", int(1)), ("b", text("x"))])),
        ("there", table([("x-match", text("any")), ("c", AMQPValue::Void)])),
        ("skip-x", table([("x-match", text("all")), ("x-own", int(5)), ("a", int(1))])),
        ("with-x", table([("x-match", text("all-with-x")), ("x-own", int(5)), ("a", int(1))])),
        ("none", table([("x-match", text("any"))])),
        ("everything", table([])),
    ] {
        peer.declare(1, transient(queue)).await;
        peer.bind(1, queue, "amq.headers", "ignored", arguments).await;
    }
    let all = ["all", "any", "there", "skip-x", "with-x", "none", "everything"];
    let both = headers([("a", AMQPValue::LongLongInt(1)), ("b", text("x")), ("other", int(0))]);
    assert_eq!(reached(&mut peer, "amq.headers", "k", &both, &all).await, ["all", "any", "skip-x", "everything"]);
    let wrong = headers([("a", int(2)), ("b", text("x"))]);
    assert_eq!(reached(&mut peer, "amq.headers", "k", &wrong, &all).await, ["any", "everything"]);
    let own = headers([("a", int(1)), ("x-own", int(5))]);
    assert_eq!(reached(&mut peer, "amq.headers", "k", &own, &all).await, ["any", "skip-x", "with-x", "everything"]);
    let there = headers([("c", AMQPValue::Boolean(false))]);
    assert_eq!(reached(&mut peer, "amq.headers", "k", &there, &all).await, ["there", "everything"]);
    assert_eq!(reached(&mut peer, "amq.headers", "k", &Default::default(), &all).await, ["everything"]);
    let float = headers([("a", AMQPValue::Double(1.0)), ("b", text("y"))]);
    assert_eq!(reached(&mut peer, "amq.headers", "k", &float, &all).await, ["everything"], "1 is not 1.0");
    broker.stop().await;
}

#[tokio::test]
async fn a_wrong_x_match_is_refused() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare(1, transient("q")).await;
    let bind = queue::Bind {
        queue: "q".into(),
        exchange: "amq.headers".into(),
        arguments: table([("x-match", text("some"))]),
        ..Default::default()
    };
    peer.send(1, AMQPClass::Queue(queue::AMQPMethod::Bind(bind))).await;
    let text =
        "PRECONDITION_FAILED - Invalid x-match field value <<\"some\">>; expected all, any, all-with-x, or any-with-x";
    peer.expect_channel_error(1, 406, text).await;
    broker.stop().await;
}

#[tokio::test]
async fn bindings_between_exchanges_route_on_and_cycles_end() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    for name in ["one", "two", "three"] {
        peer.declare_exchange(1, name, "topic", Default::default()).await;
        bound(&mut peer, name, &[(name, &["k.#"])]).await;
    }
    bind_exchange(&mut peer, "two", "one", "k.*").await;
    bind_exchange(&mut peer, "three", "two", "#").await;
    bind_exchange(&mut peer, "one", "three", "#").await; // a ring
    bind_exchange(&mut peer, "one", "one", "#").await;
    let all = ["one", "two", "three"];
    assert_eq!(reached(&mut peer, "one", "k.x", &Default::default(), &all).await, all);
    assert_eq!(reached(&mut peer, "one", "k.x.y", &Default::default(), &all).await, ["one"]);
    assert_eq!(reached(&mut peer, "two", "k.x.y", &Default::default(), &all).await, all);
    let unbind = exchange::Unbind {
        destination: "two".into(),
        source: "one".into(),
        routing_key: "k.*".into(),
        ..Default::default()
    };
    let answer = peer.call(1, AMQPClass::Exchange(exchange::AMQPMethod::Unbind(unbind))).await;
    assert!(matches!(answer, AMQPClass::Exchange(exchange::AMQPMethod::UnbindOk(_))), "{answer:?}");
    assert_eq!(reached(&mut peer, "one", "k.x", &Default::default(), &all).await, ["one"]);
    broker.stop().await;
}

#[tokio::test]
async fn an_alternate_exchange_takes_what_has_no_other_way() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare_exchange(1, "last", "fanout", Default::default()).await;
    peer.declare_exchange(1, "middle", "direct", table([("alternate-exchange", text("last"))])).await;
    peer.declare_exchange(1, "first", "direct", table([("alternate-exchange", text("middle"))])).await;
    peer.declare_exchange(1, "broken", "direct", table([("alternate-exchange", text("missing"))])).await;
    bound(&mut peer, "first", &[("a", &["x"])]).await;
    bound(&mut peer, "middle", &[("b", &["y"])]).await;
    bound(&mut peer, "last", &[("c", &[""])]).await;
    let (all, plain) = (["a", "b", "c"], Default::default());
    assert_eq!(reached(&mut peer, "first", "x", &plain, &all).await, ["a"]);
    assert_eq!(reached(&mut peer, "first", "y", &plain, &all).await, ["b"]);
    assert_eq!(reached(&mut peer, "first", "z", &plain, &all).await, ["c"]);
    peer.publish_mandatory(1, "first", "z", &plain, "m").await;
    peer.nothing_more(1).await; // routed after all, so not returned
    peer.publish_mandatory(1, "broken", "z", &plain, "m").await;
    assert_eq!(peer.returned(1).await.0, 312);
    broker.stop().await;
}

#[tokio::test]
async fn cc_and_bcc_are_further_keys_and_bcc_is_not_delivered() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    for queue in ["to", "cc", "bcc", "other"] {
        peer.declare(1, transient(queue)).await;
    }
    let properties = headers([
        ("CC", array([text("cc"), text("to"), AMQPValue::LongInt(1)])),
        ("BCC", array([text("bcc"), text("nowhere")])),
        ("own", text("kept")),
    ]);
    peer.publish_to(1, "", "to", &properties, "m").await;
    for queue in ["to", "cc", "bcc"] {
        let message = peer.get(1, queue, true).await.unwrap();
        assert_eq!((message.key.as_str(), message.remaining), ("to", 0), "{queue}");
        let headers = message.properties.headers().clone().unwrap();
        assert!(headers.inner().contains_key("CC") && headers.inner().contains_key("own"));
        assert!(!headers.inner().contains_key("BCC"));
    }
    assert_eq!(peer.get(1, "other", true).await, None);
    for (key, kind) in [("CC", "longstr"), ("BCC", "longstr")] {
        peer.publish_to(1, "", "to", &headers([(key, text("cc"))]), "m").await;
        let text = format!("PRECONDITION_FAILED - invalid message: {{unacceptable_type_in_header,\"{key}\",{kind}}}");
        peer.expect_channel_error(1, 406, &text).await;
        peer.open_channel(1).await;
    }
    broker.stop().await;
}

#[tokio::test]
async fn a_new_binding_counts_for_the_next_message() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    let mut other = broker.peer().await;
    bound(&mut peer, "amq.direct", &[("a", &["k"])]).await;
    let plain = Default::default();
    for _ in 0..20 {
        assert_eq!(reached(&mut peer, "amq.direct", "k", &plain, &["a"]).await, ["a"]);
        bound(&mut other, "amq.direct", &[("b", &["k"])]).await;
        assert_eq!(reached(&mut peer, "amq.direct", "k", &plain, &["a", "b"]).await, ["a", "b"]);
        unbind(&mut other, "b", "amq.direct", "k").await;
    }
    broker.stop().await;
}

#[tokio::test]
async fn a_queue_declared_later_gets_what_is_published_to_its_name() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    for _ in 0..5 {
        peer.publish(1, "late", "lost").await;
        peer.declare(1, transient("late")).await;
        peer.publish(1, "late", "found").await;
        assert_eq!(peer.get(1, "late", true).await.unwrap().text(), "found");
        peer.call(
            1,
            AMQPClass::Queue(queue::AMQPMethod::Delete(queue::Delete { queue: "late".into(), ..Default::default() })),
        )
        .await;
    }
    broker.stop().await;
}

#[tokio::test]
async fn mandatory_returns_only_what_reaches_no_queue() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare(1, transient("q")).await;
    let plain = BasicProperties::default();
    peer.publish_mandatory(1, "", "q", &plain, "routed").await;
    peer.nothing_more(1).await;
    let large = vec![1; 300_000];
    peer.publish_mandatory(1, "", "nowhere", &plain, &large).await;
    let (code, text, message) = peer.returned(1).await;
    assert_eq!((code, text.as_str(), message.key.as_str()), (312, "NO_ROUTE", "nowhere"));
    assert!(message.body == large);
    peer.publish(1, "nowhere", "silently dropped").await;
    peer.nothing_more(1).await;
    broker.stop().await;
}

#[tokio::test]
async fn publishing_is_checked_before_it_is_routed() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare(1, transient("q")).await;
    for (properties, text) in [
        (
            BasicProperties::default().with_user_id("somebody".into()),
            "PRECONDITION_FAILED - user_id property set to 'somebody' but authenticated user was 'guest'",
        ),
        (
            BasicProperties::default().with_expiration("soon".into()),
            "PRECONDITION_FAILED - invalid expiration 'soon': no_integer",
        ),
        (
            BasicProperties::default().with_expiration("5ms".into()),
            "PRECONDITION_FAILED - invalid expiration '5ms': {leftover_string,\"ms\"}",
        ),
    ] {
        peer.publish_to(1, "", "q", &properties, "m").await;
        peer.expect_channel_error(1, 406, text).await;
        peer.open_channel(1).await;
    }
    let fine = BasicProperties::default().with_user_id("guest".into()).with_expiration("+60000".into());
    peer.publish_to(1, "", "q", &fine, "m").await;
    let message = peer.get(1, "q", true).await.unwrap();
    assert_eq!(message.properties.expiration().as_ref().unwrap().as_str(), "60000");
    assert_eq!(peer.get(1, "q", true).await, None, "nothing refused was enqueued");
    broker.stop().await;
}

#[tokio::test]
async fn immediate_is_not_implemented() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    let mut bytes = crate::support::frames::frame(1, 1, &[0, 60, 0, 40, 0, 0, 0, 1, b'q', 2]);
    bytes.extend(crate::support::frames::header(1, 0, &BasicProperties::default()));
    peer.write(&bytes).await;
    peer.expect_connection_error(540, "NOT_IMPLEMENTED - immediate=true").await;
    broker.stop().await;
}
