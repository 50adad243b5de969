//! Direct reply-to: requests and answers without a queue.

use amq_protocol::protocol::{AMQPClass, BasicProperties, basic, queue};

use crate::support::{
    Peer, TestBroker,
    peer::{Declare, transient},
};

const REPLY_TO: &str = "amq.rabbitmq.reply-to";

fn reply_consumer() -> basic::Consume {
    basic::Consume { queue: REPLY_TO.into(), consumer_tag: "replies".into(), no_ack: true, ..Default::default() }
}

fn request() -> BasicProperties {
    BasicProperties::default().with_reply_to(REPLY_TO.into()).with_correlation_id("c1".into())
}

/// A requester whose request has arrived at the responder, with the generated reply name.
async fn requested(broker: &TestBroker) -> (Peer, Peer, String) {
    let (mut requester, mut responder) = (broker.peer().await, broker.peer().await);
    responder.declare(1, transient("rpc")).await;
    requester.consume_as(1, reply_consumer()).await;
    requester.publish_to(1, "", "rpc", &request(), "question").await;
    requester.nothing_more(1).await;
    let question = responder.get(1, "rpc", true).await.unwrap();
    let name = question.properties.reply_to().clone().unwrap().to_string();
    assert!(name.starts_with("amq.rabbitmq.reply-to.") && name.len() > 30, "{name}");
    assert_eq!(question.properties.correlation_id().as_ref().unwrap().as_str(), "c1");
    (requester, responder, name)
}

async fn refused(peer: &mut Peer, method: AMQPClass, code: u16, text: &str) {
    peer.send(1, method).await;
    peer.expect_channel_error(1, code, text).await;
    peer.open_channel(1).await;
}

#[tokio::test]
async fn an_answer_comes_straight_to_the_requester() {
    let broker = TestBroker::start().await;
    let (mut requester, mut responder, name) = requested(&broker).await;
    for number in 0..3 {
        let properties = BasicProperties::default().with_correlation_id("c1".into());
        responder.publish_to(1, "", &name, &properties, format!("answer {number}")).await;
        let answer = requester.delivery(1).await;
        assert_eq!(
            (answer.consumer.as_str(), answer.exchange.as_str(), answer.key.as_str()),
            ("replies", "", name.as_str())
        );
        assert_eq!((answer.text(), answer.redelivered), (format!("answer {number}").as_str(), false));
        assert_eq!(answer.properties, properties);
    }
    broker.stop().await;
}

#[tokio::test]
async fn a_large_answer_arrives_whole() {
    let broker = TestBroker::start().await;
    let (mut requester, mut responder, name) = requested(&broker).await;
    let body = vec![7; 3 << 20];
    responder.publish_to(1, "", &name, &Default::default(), &body).await;
    assert!(requester.delivery(1).await.body == body);
    broker.stop().await;
}

#[tokio::test]
async fn an_answer_to_nobody_is_dropped_and_confirmed() {
    let broker = TestBroker::start().await;
    let (requester, mut responder, name) = requested(&broker).await;
    requester.close().await;
    responder.select_confirms(1).await;
    responder.publish_mandatory(1, "", &name, &Default::default(), "too late").await;
    assert_eq!(responder.confirm(1).await, (1, true), "counts as routed");
    responder.publish_mandatory(1, "", "amq.rabbitmq.reply-to.nonsense", &Default::default(), "x").await;
    assert_eq!(responder.returned(1).await.0, 312);
    assert_eq!(responder.confirm(1).await, (2, true));
    broker.stop().await;
}

#[tokio::test]
async fn a_responder_can_see_whether_the_requester_lives() {
    let broker = TestBroker::start().await;
    let (requester, mut responder, name) = requested(&broker).await;
    assert_eq!(responder.depth(1, &name).await, (0, 1));
    assert_eq!(responder.declare(1, transient(REPLY_TO)).await, (REPLY_TO.to_owned(), 0, 1));
    requester.close().await;
    let passive = queue::AMQPMethod::Declare(Declare { passive: true, ..transient(&name) });
    let text = format!("NOT_FOUND - no queue '{name}' in vhost '/'");
    refused(&mut responder, AMQPClass::Queue(passive), 404, &text).await;
    broker.stop().await;
}

#[tokio::test]
async fn a_request_without_a_reply_consumer_is_refused() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare(1, transient("rpc")).await;
    peer.publish_to(1, "", "rpc", &request(), "x").await;
    let text = "PRECONDITION_FAILED - fast reply consumer does not exist";
    peer.expect_channel_error(1, 406, text).await;
    peer.open_channel(1).await;
    peer.consume_as(1, reply_consumer()).await;
    peer.publish_to(1, "", "rpc", &request(), "x").await;
    peer.cancel(1, "replies").await;
    peer.publish_to(1, "", "rpc", &request(), "x").await;
    peer.expect_channel_error(1, 406, text).await;
    assert_eq!(broker.counts("rpc").ready, 1);
    broker.stop().await;
}

#[tokio::test]
async fn the_reply_consumer_has_its_rules() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    let acking = basic::AMQPMethod::Consume(basic::Consume { no_ack: false, ..reply_consumer() });
    refused(&mut peer, AMQPClass::Basic(acking), 406, "PRECONDITION_FAILED - reply consumer cannot acknowledge").await;
    peer.consume_as(1, reply_consumer()).await;
    let second = basic::AMQPMethod::Consume(basic::Consume { consumer_tag: "second".into(), ..reply_consumer() });
    refused(&mut peer, AMQPClass::Basic(second), 406, "PRECONDITION_FAILED - reply consumer already set").await;
    let bind = queue::Bind { queue: REPLY_TO.into(), exchange: "amq.fanout".into(), ..Default::default() };
    let text = "ACCESS_REFUSED - cannot bind or unbind to a volatile (direct reply-to) queue";
    refused(&mut peer, AMQPClass::Queue(queue::AMQPMethod::Bind(bind)), 403, text).await;
    broker.stop().await;
}

#[tokio::test]
async fn a_generated_name_is_no_queue_to_consume_or_get_from() {
    let broker = TestBroker::start().await;
    let (_requester, mut responder, name) = requested(&broker).await;
    let consume = basic::AMQPMethod::Consume(basic::Consume { queue: name.as_str().into(), ..Default::default() });
    let text = format!("PRECONDITION_FAILED - only creator channel may consume from queue '{name}' in vhost '/'");
    refused(&mut responder, AMQPClass::Basic(consume), 406, &text).await;
    let get = basic::Get { queue: name.as_str().into(), no_ack: true };
    responder.send(1, AMQPClass::Basic(basic::AMQPMethod::Get(get))).await;
    let text = format!("NOT_IMPLEMENTED - basic.get not supported by volatile queue '{name}' in vhost '/'");
    responder.expect_connection_error(540, &text).await;
    broker.stop().await;
}

#[tokio::test]
async fn a_pending_requester_does_not_hold_up_a_responder() {
    let broker = TestBroker::start().await;
    let (_requester, mut responder, name) = requested(&broker).await; // which does not read
    for _ in 0..200 {
        responder.publish_to(1, "", &name, &Default::default(), vec![1; 50_000]).await;
    }
    responder.nothing_more(1).await;
    broker.stop().await;
}
