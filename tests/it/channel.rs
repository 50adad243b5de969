//! Channels: opening, closing, and who is to blame for what.

use amq_protocol::{
    protocol::{AMQPClass, BasicProperties, basic, channel, connection, exchange, queue},
    types::FieldTable,
};

use crate::support::{
    TestBroker, code,
    frames::{self, METHOD},
    peer::{Declare, durable, transient},
};

fn open() -> AMQPClass {
    AMQPClass::Channel(channel::AMQPMethod::Open(channel::Open {}))
}

fn missing() -> AMQPClass {
    AMQPClass::Queue(queue::AMQPMethod::Declare(Declare { passive: true, ..transient("missing") }))
}

const MISSING: &str = "NOT_FOUND - no queue 'missing' in vhost '/'";

#[tokio::test]
async fn a_channel_error_leaves_the_connection_and_its_other_channels() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.open_channel(2).await;
    peer.send(1, missing()).await;
    peer.expect_channel_error(1, 404, MISSING).await;
    peer.nothing_more(2).await;
    peer.open_channel(1).await;
    peer.nothing_more(1).await;
    broker.stop().await;
}

#[tokio::test]
async fn the_stock_client_survives_a_channel_error() {
    let broker = TestBroker::start().await;
    let client = broker.client().await;
    assert_eq!(code(client.queue_purge("missing".into(), Default::default()).await), 404);
    let channel = client.connection.create_channel().await.unwrap();
    assert!(channel.basic_get("missing".into(), Default::default()).await.is_err());
    client.connection.create_channel().await.unwrap();
    broker.stop().await;
}

#[tokio::test]
async fn a_channel_close_names_the_method_that_failed() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    for (method, ids) in [
        (missing(), (50, 10)),
        (AMQPClass::Basic(basic::AMQPMethod::Get(basic::Get { queue: "missing".into(), no_ack: true })), (60, 70)),
        (AMQPClass::Basic(basic::AMQPMethod::Ack(basic::Ack { delivery_tag: 5, multiple: false })), (60, 80)),
        (
            AMQPClass::Exchange(exchange::AMQPMethod::Delete(exchange::Delete {
                exchange: "amq.direct".into(),
                ..Default::default()
            })),
            (40, 20),
        ),
    ] {
        match peer.call(1, method).await {
            AMQPClass::Channel(channel::AMQPMethod::Close(close)) => assert_eq!((close.class_id, close.method_id), ids),
            other => panic!("{other:?}"),
        }
        peer.send(1, AMQPClass::Channel(channel::AMQPMethod::CloseOk(channel::CloseOk {}))).await;
        peer.open_channel(1).await;
    }
    broker.stop().await;
}

#[tokio::test]
async fn while_a_channel_is_closing_everything_but_close_is_ignored() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare(1, transient("q")).await;
    peer.send(1, missing()).await;
    peer.publish(1, "q", "late").await; // content is read past
    peer.publish(1, "q", vec![0; 300_000]).await;
    peer.send(1, missing()).await;
    peer.ack(1, 77, false).await;
    peer.expect_channel_error(1, 404, MISSING).await;
    peer.open_channel(1).await;
    assert_eq!(peer.depth(1, "q").await, (0, 0));
    broker.stop().await;
}

#[tokio::test]
async fn closes_may_cross() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.send(1, missing()).await;
    let close = channel::Close { reply_code: 200, reply_text: "bye".into(), class_id: 0, method_id: 0 };
    peer.send(1, AMQPClass::Channel(channel::AMQPMethod::Close(close))).await;
    assert!(matches!(peer.method(1).await, AMQPClass::Channel(channel::AMQPMethod::Close(_))));
    assert!(matches!(peer.method(1).await, AMQPClass::Channel(channel::AMQPMethod::CloseOk(_))));
    peer.send(1, AMQPClass::Channel(channel::AMQPMethod::CloseOk(channel::CloseOk {}))).await;
    peer.open_channel(1).await;
    peer.nothing_more(1).await;
    broker.stop().await;
}

#[tokio::test]
async fn opening_a_channel_twice_is_504() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.send(1, open()).await;
    peer.expect_connection_error(504, "CHANNEL_ERROR - second 'channel.open' seen").await;
    let mut peer = broker.peer().await;
    peer.send(1, missing()).await;
    peer.method(1).await; // close, not answered
    peer.send(1, open()).await;
    peer.expect_connection_error(504, "CHANNEL_ERROR - second 'channel.open' seen").await;
    broker.stop().await;
}

#[tokio::test]
async fn a_channel_that_is_not_open_is_504() {
    let broker = TestBroker::start().await;
    let text = "CHANNEL_ERROR - expected 'channel.open'";
    let close = channel::Close { reply_code: 200, reply_text: "".into(), class_id: 0, method_id: 0 };
    let ack = basic::Ack { delivery_tag: 1, multiple: false };
    for method in [
        missing(),
        AMQPClass::Channel(channel::AMQPMethod::Close(close)),
        AMQPClass::Basic(basic::AMQPMethod::Ack(ack)),
    ] {
        let mut peer = broker.peer().await;
        peer.send(9, method).await;
        peer.expect_connection_error(504, text).await;
    }
    let mut peer = broker.peer().await;
    peer.write(&frames::content(9, "", "q", false, &BasicProperties::default(), b"x", 10)).await;
    peer.expect_connection_error(504, text).await;
    broker.stop().await;
}

#[tokio::test]
async fn methods_of_channels_on_channel_0_are_504() {
    let broker = TestBroker::start().await;
    let text = "CHANNEL_ERROR - unexpected method in connection state running";
    let ack = AMQPClass::Basic(basic::AMQPMethod::Ack(basic::Ack { delivery_tag: 1, multiple: false }));
    for method in [missing(), open(), ack] {
        let mut peer = broker.peer().await;
        peer.send(0, method).await;
        peer.expect_connection_error(504, text).await;
    }
    broker.stop().await;
}

#[tokio::test]
async fn methods_of_the_connection_on_a_channel_are_503() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.send(1, AMQPClass::Connection(connection::AMQPMethod::CloseOk(connection::CloseOk {}))).await;
    peer.expect_connection_error(503, "COMMAND_INVALID - unimplemented method").await;
    broker.stop().await;
}

#[tokio::test]
async fn methods_only_a_server_sends_are_503() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.send(1, AMQPClass::Basic(basic::AMQPMethod::GetEmpty(basic::GetEmpty {}))).await;
    peer.expect_connection_error(503, "COMMAND_INVALID - unimplemented method").await;
    broker.stop().await;
}

#[tokio::test]
async fn flow_can_be_turned_on_but_not_off() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.nothing_more(1).await; // channel.flow(true)
    peer.send(1, AMQPClass::Channel(channel::AMQPMethod::Flow(channel::Flow { active: false }))).await;
    peer.expect_connection_error(540, "NOT_IMPLEMENTED - active=false").await;
    broker.stop().await;
}

#[tokio::test]
async fn an_access_request_is_granted_with_a_ticket() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.write(&frames::frame(METHOD, 1, &[0, 30, 0, 10, 5, b'/', b'd', b'a', b't', b'a', 0x1F])).await;
    assert_eq!(peer.frame().await.payload, [0, 30, 0, 11, 0, 1]);
    broker.stop().await;
}

#[tokio::test]
async fn a_closed_channel_answers_no_confirms_and_its_consumers_are_gone() {
    let (broker, gate) = TestBroker::gated().await;
    let mut peer = broker.peer().await;
    peer.declare(1, durable("q")).await;
    peer.open_channel(2).await;
    peer.select_confirms(2).await;
    peer.consume_as(2, basic::Consume { queue: "q".into(), ..Default::default() }).await;
    gate.close();
    peer.publish_persistent(2, "q", "x").await;
    peer.delivery(2).await;
    peer.close_channel(2).await;
    assert_eq!((broker.counts("q").consumers, broker.counts("q").ready), (0, 1));
    gate.open();
    peer.open_channel(2).await;
    peer.nothing_more(2).await;
    broker.stop().await;
}

#[tokio::test]
async fn a_thousand_channels_open_and_close() {
    let broker = TestBroker::start().await;
    let mut peer = broker.login().await;
    for _ in 0..2 {
        for number in 1..=1000 {
            peer.send(number, open()).await;
        }
        for number in 1..=1000 {
            assert!(matches!(peer.method(number).await, AMQPClass::Channel(channel::AMQPMethod::OpenOk(_))));
        }
        for number in 1..=1000 {
            peer.close_channel(number).await;
        }
    }
    broker.stop().await;
}

#[tokio::test]
async fn definitions_on_several_channels_share_a_sync_and_faults_between_them_are_answered() {
    const CHANNELS: u16 = 20;
    let (broker, gate) = TestBroker::gated().await;
    let mut peer = broker.peer().await;
    for number in 2..=CHANNELS {
        peer.open_channel(number).await;
    }
    gate.take_written();
    gate.close();
    let declare = |number: u16, passive| {
        let declare = Declare { passive, ..durable(&format!("q{number}")) };
        frames::method(number, &AMQPClass::Queue(queue::AMQPMethod::Declare(declare)))
    };
    // The last but one declares nothing; the first one goes on after its answer.
    let mut bytes: Vec<u8> = (1..=CHANNELS).flat_map(|number| declare(number, number == CHANNELS - 1)).collect();
    bytes.extend(frames::method(
        1,
        &AMQPClass::Queue(queue::AMQPMethod::Purge(queue::Purge { queue: "q1".into(), nowait: false })),
    ));
    peer.write(&bytes).await;
    peer.expect_channel_error(CHANNELS - 1, 404, "NOT_FOUND - no queue 'q19' in vhost '/'").await;
    gate.open();
    for number in (1..=CHANNELS).filter(|number| *number != CHANNELS - 1) {
        let answer = peer.method(number).await;
        assert!(matches!(answer, AMQPClass::Queue(queue::AMQPMethod::DeclareOk(_))), "{number}: {answer:?}");
    }
    let answer = peer.method(1).await;
    assert!(matches!(answer, AMQPClass::Queue(queue::AMQPMethod::PurgeOk(_))), "{answer:?}");
    let rounds = gate.take_written().len();
    assert!(rounds <= 3, "{rounds} rounds for {CHANNELS} declarations");
    broker.stop().await;
}

#[tokio::test]
async fn a_binding_with_a_transient_end_goes_without_a_sync() {
    let (broker, gate) = TestBroker::gated().await;
    let mut peer = broker.peer().await;
    peer.declare(1, transient("q")).await;
    peer.declare(1, durable("d")).await;
    let unbind = |queue: &str| {
        AMQPClass::Queue(queue::AMQPMethod::Unbind(queue::Unbind {
            queue: queue.into(),
            exchange: "amq.direct".into(),
            routing_key: "k".into(),
            ..Default::default()
        }))
    };
    for (name, rounds) in [("q", 0), ("d", 1)] {
        peer.bind(1, name, "amq.direct", "k", FieldTable::default()).await;
        gate.take_written();
        let answer = peer.call(1, unbind(name)).await;
        assert!(matches!(answer, AMQPClass::Queue(queue::AMQPMethod::UnbindOk(_))), "{answer:?}");
        assert_eq!(gate.take_written().len(), rounds, "{name}");
    }
    broker.stop().await;
}
