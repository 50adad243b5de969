//! The history of an `x-recent-history` exchange over restarts and transactions. What it keeps and who gets it otherwise:
//! `interop/test_recent_history.py`.

use amq_protocol::types::AMQPValue;
use lapin::types::FieldTable;

use crate::support::{
    TestBroker, bind, declare_exchange, declare_with, drain, headed, persistent, publish_with, table, text,
};

const KIND: &str = "x-recent-history";

fn length(length: i32) -> FieldTable {
    table([("x-recent-history-length", AMQPValue::LongInt(length))])
}

#[tokio::test]
async fn a_restart_keeps_the_history_of_a_durable_exchange() {
    let mut broker = TestBroker::start().await;
    let client = broker.publisher().await;
    declare_exchange(&client, "x", KIND, length(3)).await;
    for number in 0..5 {
        publish_with(&client, ("x", "k"), persistent(), &number.to_string()).await;
    }
    broker.restart().await;
    let client = broker.publisher().await;
    declare_with(&client, "q", FieldTable::default()).await;
    bind(&client, "q", "x", "").await;
    assert_eq!(drain(&client, "q").await, ["2", "3", "4"]);
    publish_with(&client, ("x", "k"), persistent(), "5").await;
    broker.restart().await;
    let client = broker.publisher().await;
    assert_eq!(drain(&client, "q").await, ["5"]);
    declare_with(&client, "late", FieldTable::default()).await;
    bind(&client, "late", "x", "").await;
    assert_eq!(drain(&client, "late").await, ["3", "4", "5"]);
    // A binding that was there before the restart is not new.
    bind(&client, "q", "x", "").await;
    assert_eq!(drain(&client, "q").await, [""; 0]);
    broker.stop().await;
}

#[tokio::test]
async fn the_history_goes_with_its_exchange_for_good() {
    let mut broker = TestBroker::start().await;
    let client = broker.publisher().await;
    declare_exchange(&client, "x", KIND, FieldTable::default()).await;
    publish_with(&client, ("x", "k"), persistent(), "gone").await;
    client.exchange_delete("x".into(), Default::default()).await.unwrap();
    declare_exchange(&client, "x", KIND, FieldTable::default()).await;
    broker.restart().await;
    let client = broker.publisher().await;
    declare_with(&client, "q", FieldTable::default()).await;
    bind(&client, "q", "x", "").await;
    assert_eq!(drain(&client, "q").await, [""; 0]);
    broker.stop().await;
}

#[tokio::test]
async fn a_transaction_is_remembered_with_its_commit() {
    let broker = TestBroker::start().await;
    let client = broker.client().await;
    declare_exchange(&client, "x", KIND, FieldTable::default()).await;
    client.tx_select().await.unwrap();
    let publish = async |body: &str| {
        client.basic_publish("x".into(), "".into(), Default::default(), body.as_bytes(), persistent()).await.unwrap();
    };
    publish("undone").await;
    client.tx_rollback().await.unwrap();
    publish("1").await;
    publish("2").await;
    client.tx_commit().await.unwrap();
    declare_with(&client, "q", FieldTable::default()).await;
    bind(&client, "q", "x", "").await;
    assert_eq!(drain(&client, "q").await, ["1", "2"]);
    broker.stop().await;
}

#[tokio::test]
async fn dead_letters_are_remembered() {
    let broker = TestBroker::start().await;
    let client = broker.publisher().await;
    declare_exchange(&client, "x", KIND, FieldTable::default()).await;
    let arguments = table([("x-max-length", AMQPValue::LongInt(0)), ("x-dead-letter-exchange", text("x"))]);
    declare_with(&client, "dying", arguments).await;
    publish_with(&client, ("", "dying"), persistent(), "1").await;
    declare_with(&client, "q", FieldTable::default()).await;
    bind(&client, "q", "x", "").await;
    assert_eq!(drain(&client, "q").await, ["1"]);
    broker.stop().await;
}

#[tokio::test]
async fn a_delayed_message_is_remembered_when_it_is_due() {
    let broker = TestBroker::start().await;
    let client = broker.publisher().await;
    declare_exchange(&client, "x", "x-delayed-message", table([("x-delayed-type", text(KIND))])).await;
    declare_with(&client, "q", FieldTable::default()).await;
    bind(&client, "q", "x", "").await;
    let delay = |ms| headed([("x-delay", AMQPValue::LongInt(ms))]);
    publish_with(&client, ("x", ""), delay(600_000), "later").await;
    publish_with(&client, ("x", ""), delay(50), "soon").await;
    assert_eq!(crate::support::take(&client, "q").await.data, b"soon");
    declare_with(&client, "late", FieldTable::default()).await;
    bind(&client, "late", "x", "").await;
    assert_eq!(drain(&client, "late").await, ["soon"]);
    broker.stop().await;
}
