//! Types of queues, and the switches for what RabbitMQ 4.3 calls deprecated.

use amq_protocol::{
    protocol::{AMQPClass, queue},
    types::AMQPValue,
};
use lapin::{options::*, types::FieldTable};
use leveret::broker::arguments::QueueType;

use crate::support::{
    Peer, TestBroker, code, depth,
    peer::{exclusive, transient},
    publish_confirmed, table, text,
};

async fn send(peer: &mut Peer, declare: queue::Declare) {
    peer.send(1, AMQPClass::Queue(queue::AMQPMethod::Declare(declare))).await;
}

/// Expects a declaration to be refused; the channel is open again afterwards.
async fn refused(peer: &mut Peer, declare: queue::Declare, text: &str) {
    send(peer, declare).await;
    peer.expect_channel_error(1, 406, &format!("PRECONDITION_FAILED - {text}")).await;
    peer.open_channel(1).await;
}

async fn declared(peer: &mut Peer, declare: queue::Declare) {
    send(peer, declare).await;
    let answer = peer.method(1).await;
    assert!(matches!(answer, AMQPClass::Queue(queue::AMQPMethod::DeclareOk(_))), "{answer:?}");
}

fn durable(name: &str) -> queue::Declare {
    queue::Declare { durable: true, ..transient(name) }
}

fn of_type(queue_type: &str, declare: queue::Declare) -> queue::Declare {
    queue::Declare { arguments: table([("x-queue-type", text(queue_type))]), ..declare }
}

fn stored_type(broker: &TestBroker, queue: &str) -> Option<AMQPValue> {
    let vhost = broker.server().broker().vhost("/").unwrap();
    vhost.queue(queue).unwrap().options.arguments.inner().get("x-queue-type").cloned()
}

#[tokio::test]
async fn quorum_queues_are_durable_shared_and_named_by_their_clients() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    let property = |name: &str| format!("invalid property '{name}' for queue 'q' in vhost '/'");
    let auto_delete = queue::Declare { auto_delete: true, ..exclusive("q") };
    refused(&mut peer, of_type("quorum", auto_delete), &property("auto-delete")).await;
    refused(&mut peer, of_type("quorum", exclusive("q")), &property("exclusive-owner")).await;
    refused(&mut peer, of_type("quorum", transient("q")), &property("non-durable")).await;
    let unnamed = "Cannot declare a server-named queue for type rabbit_quorum_queue";
    refused(&mut peer, of_type("quorum", durable("")), unnamed).await;
    let foreign = queue::Declare { arguments: table([("x-max-age", text("1h"))]), ..durable("q") };
    let text = "invalid arg 'x-max-age' for queue 'q' in vhost '/' of queue type rabbit_classic_queue";
    refused(&mut peer, foreign, text).await;
    declared(&mut peer, of_type("quorum", durable("q"))).await;
    let text = "inequivalent arg 'x-queue-type' for queue 'q' in vhost '/': received 'classic' but current is 'quorum'";
    refused(&mut peer, durable("q"), text).await;
    broker.stop().await;
}

#[tokio::test]
async fn a_queue_without_a_type_has_the_default_one_where_that_suits_it() {
    let mut broker = TestBroker::with(|config| config.queues.default_type = QueueType::Quorum).await;
    let mut peer = broker.peer().await;
    declared(&mut peer, durable("plain")).await;
    declared(&mut peer, of_type("", durable("empty"))).await;
    declared(&mut peer, transient("transient")).await;
    declared(&mut peer, exclusive("")).await;
    assert_eq!(stored_type(&broker, "plain"), Some(text("quorum")));
    assert_eq!(stored_type(&broker, "empty"), Some(text("quorum")));
    assert_eq!(stored_type(&broker, "transient"), Some(text("classic")));
    declared(&mut peer, of_type("quorum", durable("plain"))).await;
    declared(&mut peer, durable("plain")).await;
    refused(&mut peer, durable(""), "Cannot declare a server-named queue for type rabbit_quorum_queue").await;
    drop(peer);

    broker.restart_with(|config| config.queues.default_type = QueueType::Classic).await;
    assert_eq!(stored_type(&broker, "plain"), Some(text("quorum")), "it was stored");
    broker.stop().await;
}

#[tokio::test]
async fn transient_queues_that_are_not_exclusive_can_be_forbidden() {
    let broker = TestBroker::with(|config| config.compatibility.permit_transient_nonexclusive_queues = false).await;
    let mut peer = broker.peer().await;
    declared(&mut peer, exclusive("mine")).await;
    declared(&mut peer, durable("ours")).await;
    send(&mut peer, transient("q")).await;
    // As RabbitMQ 4.3.6 says it, and as far as it fits.
    let text = "INTERNAL_ERROR - Feature `transient_nonexcl_queues` is deprecated.\n\
                By default, this feature is not permitted anymore.\n\
                The feature will be removed from a future major RabbitMQ version, regardless of the configuration; \
                actual version to be determined.\nTo...";
    peer.expect_connection_error(541, text).await;
    broker.stop().await;
}

/// Two queues of two messages, each with a consumer on the same channel; answers how many deliveries are unacked.
async fn unacked_with_global_prefetch_of_one(broker: &TestBroker) -> u64 {
    let client = broker.publisher().await;
    for queue in ["a", "b"] {
        client.queue_declare(queue.into(), QueueDeclareOptions::default(), FieldTable::default()).await.unwrap();
        publish_confirmed(&client, queue, b"1").await;
        publish_confirmed(&client, queue, b"2").await;
    }
    client.basic_qos(1, BasicQosOptions { global: true }).await.unwrap();
    let mut consumers = Vec::new();
    for queue in ["a", "b"] {
        let options = BasicConsumeOptions::default();
        consumers.push(client.basic_consume(queue.into(), queue.into(), options, FieldTable::default()).await.unwrap());
    }
    depth(&client, "a").await; // what can be delivered was, before this is answered
    let unacked = broker.counts("a").unacked + broker.counts("b").unacked;
    client.close().await;
    unacked
}

#[tokio::test]
async fn a_global_prefetch_is_for_the_channel_unless_that_is_forbidden() {
    let broker = TestBroker::start().await;
    assert_eq!(unacked_with_global_prefetch_of_one(&broker).await, 1);
    broker.stop().await;
    let broker = TestBroker::with(|config| config.compatibility.permit_global_qos = false).await;
    assert_eq!(unacked_with_global_prefetch_of_one(&broker).await, 2);
    broker.stop().await;
}

#[tokio::test]
async fn a_stock_client_hears_of_wrong_arguments_as_a_channel_error() {
    let broker = TestBroker::start().await;
    let client = broker.client().await;
    let arguments = table([("x-retry", text("max=many"))]);
    let refused = client.queue_declare("q".into(), QueueDeclareOptions::default(), arguments).await;
    assert_eq!(code(refused), 406);
    client.close().await;
    broker.stop().await;
}
