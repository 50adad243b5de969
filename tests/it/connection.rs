//! From the protocol header to `connection.close-ok`: login, tuning, heartbeats, and both ways of saying goodbye.

use std::time::Duration;

use amq_protocol::protocol::{AMQPClass, channel, connection, parse_class};
use lapin::ConnectionProperties;

use crate::support::{
    LIMIT, Login, TestBroker, eventually,
    frames::{self, HEARTBEAT},
    within,
};

const REFUSED: &str =
    "ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN. For details see the broker logfile.";
/// RabbitMQ's pause before a silent drop.
const PAUSE: Duration = Duration::from_secs(3);

fn wrong_password() -> Login {
    Login { response: b"\0guest\0wrong".to_vec(), ..Default::default() }
}

async fn expect_pause_and_drop(peer: &mut crate::support::Peer) {
    let took = peer.expect_drop().await;
    assert!(took > PAUSE - Duration::from_millis(500) && took < PAUSE * 2, "{took:?}");
}

#[tokio::test]
async fn the_stock_client_connects_and_closes() {
    let broker = TestBroker::start().await;
    broker.client().await.close().await;
    broker.stop().await;
}

#[tokio::test]
async fn every_promised_capability_is_in_start() {
    let broker = TestBroker::start().await;
    let mut peer = broker.bare().await;
    peer.write(b"AMQP\x00\x00\x09\x01").await;
    let AMQPClass::Connection(connection::AMQPMethod::Start(start)) = peer.method(0).await else { panic!("no start") };
    assert_eq!((start.version_major, start.version_minor), (0, 9));
    let mechanisms = start.mechanisms.to_string();
    assert!(mechanisms.split(' ').any(|name| name == "PLAIN") && mechanisms.split(' ').any(|name| name == "AMQPLAIN"));
    let properties = start.server_properties.inner();
    for key in ["capabilities", "cluster_name", "copyright", "information", "platform", "product", "version"] {
        assert!(properties.contains_key(key), "{key}");
    }
    let amq_protocol::types::AMQPValue::FieldTable(capabilities) = &properties["capabilities"] else {
        panic!("no table")
    };
    for key in [
        "publisher_confirms",
        "exchange_exchange_bindings",
        "basic.nack",
        "consumer_cancel_notify",
        "connection.blocked",
        "consumer_priorities",
        "authentication_failure_close",
        "per_consumer_qos",
        "direct_reply_to",
    ] {
        assert_eq!(capabilities.inner()[key], amq_protocol::types::AMQPValue::Boolean(true), "{key}");
    }
    broker.stop().await;
}

#[tokio::test]
async fn amqplain_logs_in() {
    let broker = TestBroker::start().await;
    let mut response = Vec::new();
    for (key, value) in [("LOGIN", "guest"), ("PASSWORD", "guest")] {
        response.push(key.len() as u8);
        response.extend(key.bytes());
        response.push(b'S');
        response.extend((value.len() as u32).to_be_bytes());
        response.extend(value.bytes());
    }
    Login { mechanism: "AMQPLAIN", response, ..Default::default() }.open(broker.address()).await.close().await;
    broker.stop().await;
}

#[tokio::test]
async fn a_wrong_password_is_told_to_a_client_that_understands() {
    let broker = TestBroker::start().await;
    wrong_password().authenticate(broker.address()).await.expect_connection_error(403, REFUSED).await;
    let uri = format!("amqp://nobody:x@{}/%2f", broker.address());
    let refused = lapin::Connection::connect(&uri, ConnectionProperties::default()).await;
    assert_eq!(crate::support::code(refused), 403);
    broker.stop().await;
}

#[tokio::test]
async fn a_wrong_password_is_a_silent_drop_for_a_client_that_does_not() {
    let broker = TestBroker::start().await;
    let mut peer = Login { capabilities: &[], ..wrong_password() }.authenticate(broker.address()).await;
    expect_pause_and_drop(&mut peer).await;
    broker.stop().await;
}

#[tokio::test]
async fn malformed_responses_and_unknown_mechanisms_are_dropped() {
    let broker = TestBroker::start().await;
    let attempts = [("PLAIN", b"xx".to_vec()), ("SCRAM", b"\0guest\0guest".to_vec()), ("AMQPLAIN", vec![1, 2, 3])];
    let mut peers = Vec::new();
    for (mechanism, response) in attempts {
        peers.push(Login { mechanism, response, ..Default::default() }.authenticate(broker.address()).await);
    }
    for mut peer in peers {
        peer.expect_drop().await;
    }
    broker.stop().await;
}

#[tokio::test]
async fn tuning_out_of_bounds_is_a_silent_drop() {
    let broker = TestBroker::start().await;
    let login = Login::default();
    let violations = [
        Login { frame_max: 4096, ..login.clone() },
        Login { frame_max: 131_073, ..login.clone() },
        Login { frame_max: 0, ..login.clone() },
        Login { channel_max: 0, ..login.clone() },
        Login { channel_max: 2048, ..login },
    ];
    let mut peers = Vec::new();
    for violation in &violations {
        peers.push(violation.tune(broker.address()).await);
    }
    for mut peer in peers {
        peer.expect_drop().await;
    }
    broker.stop().await;
}

#[tokio::test]
async fn the_lowest_tuning_works() {
    let broker = TestBroker::start().await;
    let mut peer =
        Login { frame_max: 8192, channel_max: 1, heartbeat: 9999, ..Default::default() }.open(broker.address()).await;
    peer.open_channel(1).await;
    let body = vec![3; 50_000];
    peer.declare(1, crate::support::peer::transient("q")).await;
    peer.publish(1, "q", &body).await;
    assert!(peer.get(1, "q", true).await.unwrap().body == body); // in frames of 8192 bytes: `Peer` checks
    broker.stop().await;
}

#[tokio::test]
async fn channel_max_limits_the_count_and_not_the_number() {
    let broker = TestBroker::start().await;
    let mut peer = Login { channel_max: 3, ..Default::default() }.open(broker.address()).await;
    for number in [1, 500, 65_535] {
        peer.open_channel(number).await;
    }
    peer.close_channel(500).await;
    peer.open_channel(2).await;
    peer.send(3, AMQPClass::Channel(channel::AMQPMethod::Open(channel::Open {}))).await;
    let text = "NOT_ALLOWED - number of channels opened (3) has reached the negotiated channel_max (3)";
    peer.expect_connection_error(530, text).await;
    broker.stop().await;
}

#[tokio::test]
async fn an_unknown_vhost_is_refused_by_name() {
    let broker = TestBroker::start().await;
    let peer = Login { vhost: "nowhere", ..Default::default() }.ask_open(broker.address()).await;
    peer.expect_connection_error(530, "NOT_ALLOWED - vhost nowhere not found").await;
    let peer = Login { vhost: "", ..Default::default() }.ask_open(broker.address()).await;
    peer.expect_connection_error(530, "NOT_ALLOWED - vhost  not found").await;
    broker.stop().await;
}

#[tokio::test]
async fn other_protocols_are_answered_with_a_header() {
    let broker = TestBroker::start().await;
    for (sent, answer) in [
        (b"AMQP\x00\x00\x09\x00", b"AMQP\x00\x00\x09\x01"),
        (b"AMQP\x00\x00\x0A\x00", b"AMQP\x00\x00\x09\x01"),
        (b"AMQP\x01\x01\x08\x00", b"AMQP\x03\x01\x00\x00"),
        (b"AMQP\x00\x01\x00\x00", b"AMQP\x03\x01\x00\x00"),
        (b"GET / HT", b"AMQP\x03\x01\x00\x00"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01", b"AMQP\x03\x01\x00\x00"),
    ] {
        let mut peer = broker.bare().await;
        peer.write(sent).await;
        assert_eq!(peer.rest().await, answer, "{}", sent.escape_ascii());
    }
    let mut peer = broker.bare().await;
    peer.write(b"AMQP\x01\x01\x00\x09").await;
    assert!(matches!(peer.method(0).await, AMQPClass::Connection(connection::AMQPMethod::Start(_))));
    broker.stop().await;
}

#[tokio::test]
async fn a_handshake_that_takes_too_long_is_dropped() {
    let broker = TestBroker::with(|config| config.amqp.handshake_timeout = Duration::from_millis(300)).await;
    let mut silent = broker.bare().await;
    silent.expect_drop().await;
    let mut bare = broker.bare().await;
    bare.write(b"AMQP\x00\x00\x09\x01").await;
    bare.method(0).await;
    bare.expect_drop_after(Duration::from_secs(4)).await;
    let mut tuned = Login::default().tune(broker.address()).await;
    tuned.expect_drop_after(Duration::from_secs(4)).await;
    // Who is in stays in.
    let mut peer = broker.peer().await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    peer.nothing_more(1).await;
    broker.stop().await;
}

#[tokio::test]
async fn methods_out_of_place_in_the_handshake_end_it() {
    let broker = TestBroker::start().await;
    let mut early = broker.bare().await;
    early.write(b"AMQP\x00\x00\x09\x01").await;
    early.method(0).await;
    early.send(0, crate::support::peer::close_method()).await;
    let mut channel = Login::default().tune(broker.address()).await;
    channel.send(1, AMQPClass::Channel(channel::AMQPMethod::Open(channel::Open {}))).await;
    early.expect_drop().await;
    // After tuning RabbitMQ talks: a channel's frame is then one too early.
    channel.expect_connection_error(505, "UNEXPECTED_FRAME - type 1, all octets = <<0,20,0,10,0>>").await;
    broker.stop().await;
}

#[tokio::test]
async fn the_broker_beats_before_its_peer_gives_up() {
    let broker = TestBroker::start().await;
    let mut peer = Login { heartbeat: 1, ..Default::default() }.open(broker.address()).await;
    for _ in 0..3 {
        let begun = std::time::Instant::now();
        let frame = peer.frame_or_end().await.unwrap();
        assert_eq!((frame.kind, frame.channel, frame.payload.len()), (HEARTBEAT, 0, 0));
        // Every half interval in which nothing else went out, as in RabbitMQ, so every interval; peers wait for two.
        assert!(begun.elapsed() < Duration::from_millis(1900), "{:?}", begun.elapsed());
        peer.write(&frames::frame(HEARTBEAT, 0, &[])).await;
    }
    broker.stop().await;
}

#[tokio::test]
async fn a_peer_silent_for_two_intervals_is_dropped_with_everything_it_had() {
    let broker = TestBroker::start().await;
    let mut peer = Login { heartbeat: 1, ..Default::default() }.open(broker.address()).await;
    peer.open_channel(1).await;
    peer.declare(1, crate::support::peer::exclusive("mine")).await;
    let begun = std::time::Instant::now();
    while let Some(frame) = peer.frame_or_end().await {
        assert_eq!(frame.kind, HEARTBEAT, "dropped without a word");
    }
    let took = begun.elapsed();
    assert!(took > Duration::from_millis(1500) && took < Duration::from_secs(5), "{took:?}");
    eventually("the queue is gone", async || (!broker.has_queue("mine")).then_some(())).await;
    broker.stop().await;
}

#[tokio::test]
async fn anything_received_counts_as_a_heartbeat() {
    let broker = TestBroker::start().await;
    let mut peer = Login { heartbeat: 1, ..Default::default() }.open(broker.address()).await;
    peer.open_channel(1).await;
    let begun = std::time::Instant::now();
    while begun.elapsed() < Duration::from_secs(4) {
        peer.nothing_more(1).await;
        tokio::time::sleep(Duration::from_millis(400)).await;
    }
    peer.close().await;
    broker.stop().await;
}

#[tokio::test]
async fn a_shutdown_closes_connections_with_320() {
    let mut broker = TestBroker::start().await;
    let peers = [broker.peer().await, broker.login().await];
    let waiting = tokio::spawn(async move {
        for peer in peers {
            let text = "CONNECTION_FORCED - broker forced connection closure with reason 'shutdown'";
            peer.expect_connection_error(320, text).await;
        }
    });
    let begun = std::time::Instant::now();
    broker.shut_down_politely().await;
    within("goodbye", waiting).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(2), "everybody answered: {:?}", begun.elapsed());
    broker.stop().await;
}

#[tokio::test]
async fn a_shutdown_does_not_wait_for_those_who_do_not_answer() {
    let mut broker = TestBroker::start().await;
    let _silent = broker.peer().await;
    let begun = std::time::Instant::now();
    broker.shut_down_politely().await;
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    broker.stop().await;
}

#[tokio::test]
async fn a_client_close_ends_everything_it_had() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare(1, crate::support::peer::transient("q")).await;
    peer.consume(1, "q", false).await;
    peer.publish(1, "q", "x").await;
    peer.delivery(1).await;
    peer.close().await;
    let counts = broker.counts("q");
    assert_eq!((counts.ready, counts.unacked, counts.consumers), (1, 0, 0), "before close-ok");
    broker.stop().await;
}

#[tokio::test]
async fn a_secret_can_be_updated() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    let update = connection::UpdateSecret { new_secret: "new".into(), reason: "expiry".into() };
    let answer = peer.call(0, AMQPClass::Connection(connection::AMQPMethod::UpdateSecret(update))).await;
    assert!(matches!(answer, AMQPClass::Connection(connection::AMQPMethod::UpdateSecretOk(_))), "{answer:?}");
    peer.nothing_more(1).await;
    broker.stop().await;
}

#[tokio::test]
async fn only_close_and_close_ok_are_read_after_a_server_close() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare(1, crate::support::peer::transient("q")).await;
    peer.write(&frames::frame(9, 0, b"?")).await;
    peer.publish(1, "q", "too late").await;
    assert!(matches!(peer.method(0).await, AMQPClass::Connection(connection::AMQPMethod::Close(_))));
    peer.publish(1, "q", "far too late").await;
    peer.send(0, crate::support::peer::close_method()).await; // crossed on the wire
    assert!(matches!(peer.method(0).await, AMQPClass::Connection(connection::AMQPMethod::CloseOk(_))));
    assert_eq!(peer.frame_or_end().await, None);
    assert_eq!(broker.counts("q").ready, 0);
    broker.stop().await;
}

#[tokio::test]
async fn a_blocked_publisher_is_told_and_goes_on_when_the_alarm_is_over() {
    use leveret::broker::Alarm;
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    let mut consumer = broker.peer().await;
    peer.declare(1, crate::support::peer::transient("q")).await;
    consumer.consume(1, "q", true).await;
    let alarms = broker.server().broker().clone();
    let alarm = tokio::spawn({
        let broker = alarms.clone();
        // The broker looks at memory itself a few times a second, so the alarm is kept up.
        async move {
            loop {
                broker.alarms().set(Alarm::Memory, true);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    });
    eventually("the alarm is on", async || alarms.alarms().is_active().then_some(())).await;
    peer.publish(1, "q", "in flight").await;
    let frame = tokio::time::timeout(LIMIT, peer.frame()).await.unwrap();
    match parse_class(frame.payload.as_slice()).unwrap().1 {
        AMQPClass::Connection(connection::AMQPMethod::Blocked(blocked)) => {
            assert_eq!(blocked.reason.as_str(), "low on memory")
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(consumer.delivery(1).await.text(), "in flight", "consumers go on");
    consumer.nothing_more(1).await;
    alarm.abort();
    let _ = alarm.await;
    alarms.alarms().set(Alarm::Memory, false);
    let frame = tokio::time::timeout(LIMIT, peer.frame()).await.unwrap();
    let class = parse_class(frame.payload.as_slice()).unwrap().1;
    assert!(matches!(class, AMQPClass::Connection(connection::AMQPMethod::Unblocked(_))), "{class:?}");
    peer.publish(1, "q", "later").await;
    assert_eq!(consumer.delivery(1).await.text(), "later");
    broker.stop().await;
}
