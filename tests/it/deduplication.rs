//! Duplicates, by queues and by exchanges. What tells them and what the cache forgets: the unit tests.

use amq_protocol::types::AMQPValue;
use lapin::{Confirmation, options::*, types::FieldTable};

use crate::support::{
    TestBroker, bind, code, declare_exchange, declare_with, drain, get, headed, publish_with, table, text,
};

const ID: &str = "x-deduplication-header";

fn by_id() -> FieldTable {
    table([("x-message-deduplication", AMQPValue::Boolean(true))])
}

fn id(value: &str) -> lapin::BasicProperties {
    headed([(ID, text(value))])
}

#[tokio::test]
async fn a_queue_confirms_and_drops_duplicates() {
    let broker = TestBroker::start().await;
    let client = broker.publisher().await;
    declare_with(&client, "q", by_id()).await;
    for (value, body) in [("a", "1"), ("a", "2"), ("b", "3"), ("a", "4"), ("b", "5")] {
        let answer = publish_with(&client, ("", "q"), id(value), body).await;
        assert!(matches!(answer, Confirmation::Ack(None)), "{answer:?}");
    }
    publish_with(&client, ("", "q"), headed([("other", text("a"))]), "6").await;
    publish_with(&client, ("", "q"), headed([("other", text("a"))]), "7").await;
    assert_eq!(drain(&client, "q").await, ["1", "3", "6", "7"]);
    // Though the message is gone.
    publish_with(&client, ("", "q"), id("a"), "8").await;
    assert_eq!(drain(&client, "q").await, [""; 0]);
    broker.stop().await;
}

#[tokio::test]
async fn duplicates_do_not_pass_by_to_waiting_consumers() {
    let broker = TestBroker::start().await;
    let client = broker.publisher().await;
    declare_with(&client, "q", by_id()).await;
    let mut peer = broker.peer().await;
    peer.consume(1, "q", true).await;
    for (value, body) in [("a", "1"), ("a", "2"), ("b", "3")] {
        publish_with(&client, ("", "q"), id(value), body).await;
    }
    assert_eq!([peer.delivery(1).await.text(), peer.delivery(1).await.text()], ["1", "3"]);
    peer.nothing_more(1).await;
    broker.stop().await;
}

#[tokio::test]
async fn an_exchange_confirms_and_drops_duplicates() {
    let broker = TestBroker::start().await;
    let client = broker.publisher().await;
    let arguments = table([
        ("x-message-deduplication", AMQPValue::Boolean(true)),
        ("x-deduplication-header", text("id")),
        ("x-cache-size", AMQPValue::LongInt(2)),
    ]);
    declare_exchange(&client, "x", "direct", arguments).await;
    let unroutable = publish_with(&client, ("x", "k"), headed([("id", text("a"))]), "0").await;
    assert!(matches!(unroutable, Confirmation::Ack(Some(_))), "{unroutable:?}");
    declare_with(&client, "q", FieldTable::default()).await;
    bind(&client, "q", "x", "k").await;
    for (value, body) in [("a", "1"), ("a", "2"), ("b", "3"), ("a", "4"), ("c", "5"), ("a", "6")] {
        let answer = publish_with(&client, ("x", "k"), headed([("id", text(value))]), body).await;
        assert!(matches!(answer, Confirmation::Ack(None)), "{answer:?}");
    }
    // The third value drove the first out.
    assert_eq!(drain(&client, "q").await, ["1", "3", "5", "6"]);
    broker.stop().await;
}

#[tokio::test]
async fn values_survive_a_restart() {
    let mut broker = TestBroker::start().await;
    let client = broker.publisher().await;
    declare_with(&client, "q", by_id()).await;
    declare_with(&client, "plain", FieldTable::default()).await;
    declare_exchange(&client, "x", "fanout", by_id()).await;
    bind(&client, "plain", "x", "").await;
    for target in [("", "q"), ("x", "")] {
        publish_with(&client, target, id("a"), "1").await;
    }
    broker.restart().await;
    let client = broker.publisher().await;
    for target in [("", "q"), ("x", "")] {
        for (value, body) in [("a", "2"), ("b", "3"), ("b", "4")] {
            let answer = publish_with(&client, target, id(value), body).await;
            assert!(matches!(answer, Confirmation::Ack(None)), "{answer:?}");
        }
    }
    for queue in ["q", "plain"] {
        assert_eq!(drain(&client, queue).await, ["1", "3"]);
    }
    broker.stop().await;
}

#[tokio::test]
async fn a_new_queue_or_exchange_of_the_same_name_knows_nothing() {
    let mut broker = TestBroker::start().await;
    for round in 0..2 {
        let client = broker.publisher().await;
        declare_with(&client, "q", by_id()).await;
        declare_with(&client, "plain", FieldTable::default()).await;
        declare_exchange(&client, "x", "fanout", by_id()).await;
        bind(&client, "plain", "x", "").await;
        for target in [("", "q"), ("x", "")] {
            publish_with(&client, target, id("a"), "1").await;
            publish_with(&client, target, id("a"), "2").await;
        }
        for queue in ["q", "plain"] {
            assert_eq!(drain(&client, queue).await, ["1"], "round {round}");
            client.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
        }
        client.exchange_delete("x".into(), ExchangeDeleteOptions::default()).await.unwrap();
        broker.restart().await;
    }
    broker.stop().await;
}

#[tokio::test]
async fn a_refused_message_may_be_published_again() {
    let broker = TestBroker::start().await;
    let client = broker.publisher().await;
    let mut full = by_id();
    full.insert("x-max-length".into(), AMQPValue::LongInt(1));
    full.insert("x-overflow".into(), text("reject-publish"));
    declare_with(&client, "q", full).await;
    declare_exchange(&client, "x", "fanout", by_id()).await;
    bind(&client, "q", "x", "").await;
    publish_with(&client, ("x", ""), id("a"), "1").await;
    let refused = publish_with(&client, ("x", ""), id("b"), "2").await;
    assert!(matches!(refused, Confirmation::Nack(_)), "{refused:?}");
    assert_eq!(drain(&client, "q").await, ["1"]);
    publish_with(&client, ("x", ""), id("b"), "3").await;
    assert_eq!(drain(&client, "q").await, ["3"]);
    broker.stop().await;
}

#[tokio::test]
async fn transactions_drop_duplicates_with_the_commit() {
    let broker = TestBroker::start().await;
    let client = broker.client().await;
    declare_with(&client, "q", FieldTable::default()).await;
    declare_exchange(&client, "x", "fanout", by_id()).await;
    bind(&client, "q", "x", "").await;
    client.tx_select().await.unwrap();
    let publish = async |body: &str| {
        client.basic_publish("x".into(), "".into(), Default::default(), body.as_bytes(), id("a")).await.unwrap();
    };
    publish("undone").await;
    client.tx_rollback().await.unwrap();
    publish("1").await;
    publish("2").await;
    client.tx_commit().await.unwrap();
    publish("3").await;
    client.tx_commit().await.unwrap();
    assert_eq!(drain(&client, "q").await, ["1"]);
    broker.stop().await;
}

#[tokio::test]
async fn a_dead_letter_that_comes_back_is_no_duplicate() {
    let broker = TestBroker::start().await;
    let client = broker.publisher().await;
    let mut arguments = by_id();
    arguments.insert("x-dead-letter-exchange".into(), text("x"));
    declare_with(&client, "q", arguments).await;
    declare_exchange(&client, "x", "fanout", by_id()).await;
    bind(&client, "q", "x", "").await;
    publish_with(&client, ("x", ""), id("a"), "1").await;
    get(&client, "q").await.reject(BasicRejectOptions { requeue: false }).await.unwrap();
    let again = crate::support::take(&client, "q").await;
    assert_eq!(again.data, b"1");
    broker.stop().await;
}

#[tokio::test]
async fn arguments_are_checked_where_deduplication_is_asked_for() {
    let broker = TestBroker::start().await;
    let yes = ("x-message-deduplication", AMQPValue::Boolean(true));
    for bad in [
        vec![("x-message-deduplication", text("true"))],
        vec![yes.clone(), ("x-cache-size", AMQPValue::LongInt(0))],
        vec![yes.clone(), ("x-cache-ttl", text("5"))],
        vec![yes.clone(), ("x-deduplication-header", text(""))],
    ] {
        let client = broker.client().await;
        let kind = lapin::ExchangeKind::Fanout;
        let declared = client.exchange_declare("x".into(), kind, Default::default(), table(bad)).await;
        assert_eq!(code(declared), 406);
    }
    // Without it they mean nothing.
    let client = broker.client().await;
    declare_exchange(&client, "x", "fanout", table([("x-cache-ttl", text("5"))])).await;
    broker.stop().await;
}
