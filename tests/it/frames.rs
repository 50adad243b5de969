//! Framing, byte by byte: what is an error, which one, and that nothing depends on where a read happens to end.

use amq_protocol::protocol::{AMQPClass, BasicProperties, basic, exchange};

use crate::support::{
    Login, Peer, TestBroker,
    frames::{self, BODY, END, HEADER, HEARTBEAT, METHOD},
    peer::transient,
    persistent, table, text,
};

/// Sends bytes to a connection with channel 1 open and expects the connection to be closed with that.
async fn refused(broker: &TestBroker, bytes: &[u8], code: u16, text: &str) {
    let mut peer = broker.peer().await;
    peer.write(bytes).await;
    peer.expect_connection_error(code, text).await;
}

/// Sends bytes to a connection with channel 1 open and expects the socket to end without a word.
async fn dropped(broker: &TestBroker, bytes: &[u8]) {
    let mut peer = broker.peer().await;
    peer.write(bytes).await;
    peer.expect_drop_after(std::time::Duration::from_secs(1)).await;
}

fn publish() -> Vec<u8> {
    frames::publish_method(1, "", "q", false)
}

fn plain_header(body_size: u64) -> Vec<u8> {
    frames::header(1, body_size, &BasicProperties::default())
}

async fn with_queue(broker: &TestBroker) -> Peer {
    let mut peer = broker.peer().await;
    peer.declare(1, transient("q")).await;
    peer
}

#[tokio::test]
async fn a_wrong_frame_end_is_501() {
    let broker = TestBroker::start().await;
    let mut bytes = frames::frame(METHOD, 1, &[1, 2, 3]);
    *bytes.last_mut().unwrap() = 0;
    refused(&broker, &bytes, 501, "FRAME_ERROR - type 1, all octets = <<1,2,3>>: {invalid_frame_end_marker,0}").await;
    let mut bytes = frames::frame(METHOD, 1, &(0..20).collect::<Vec<u8>>());
    *bytes.last_mut().unwrap() = 7;
    let text = "FRAME_ERROR - type 1, first 16 octets = <<0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15>>: {invalid_frame_end_marker,7}";
    refused(&broker, &bytes, 501, text).await;
    broker.stop().await;
}

#[tokio::test]
async fn a_frame_over_frame_max_is_501_at_once() {
    let broker = TestBroker::start().await;
    let mut peer = Login { frame_max: 8192, ..Default::default() }.open(broker.address()).await;
    peer.open_channel(1).await;
    let mut head = vec![BODY];
    head.extend(1u16.to_be_bytes());
    head.extend(8193u32.to_be_bytes());
    peer.write(&head).await; // the payload need not come
    let text = "FRAME_ERROR - type 3, all octets = <<>>: {frame_too_large,8193,8184}";
    peer.expect_connection_error(501, text).await;
    broker.stop().await;
}

#[tokio::test]
async fn a_payload_of_exactly_frame_max_passes() {
    let broker = TestBroker::start().await;
    let mut peer = Login { frame_max: 8192, ..Default::default() }.open(broker.address()).await;
    peer.open_channel(1).await;
    peer.declare(1, transient("q")).await;
    let bytes = frames::content(1, "", "q", false, &BasicProperties::default(), &[5; 8192], 8192);
    peer.write(&bytes).await;
    assert_eq!(peer.get(1, "q", true).await.unwrap().body, [5; 8192]);
    broker.stop().await;
}

#[tokio::test]
async fn a_frame_too_large_before_tuning_is_a_silent_drop() {
    let broker = TestBroker::start().await;
    let mut peer = broker.bare().await;
    peer.write(b"AMQP\x00\x00\x09\x01").await;
    peer.method(0).await;
    let mut head = vec![METHOD];
    head.extend(0u16.to_be_bytes());
    head.extend(0x7fff_ffffu32.to_be_bytes());
    peer.write(&head).await;
    peer.expect_drop_after(std::time::Duration::from_secs(5)).await; // without a word, and without the bytes
    broker.stop().await;
}

#[tokio::test]
async fn unknown_frames_and_heartbeats_with_a_payload_are_501() {
    let broker = TestBroker::start().await;
    refused(&broker, &frames::frame(9, 0, b"ab"), 501, "FRAME_ERROR - type 9, all octets = <<\"ab\">>: unknown_frame")
        .await;
    refused(&broker, &frames::frame(4, 1, &[]), 501, "FRAME_ERROR - type 4, all octets = <<>>: unknown_frame").await;
    refused(
        &broker,
        &frames::frame(HEARTBEAT, 0, &[1]),
        501,
        "FRAME_ERROR - type 8, all octets = <<1>>: unknown_frame",
    )
    .await;
    broker.stop().await;
}

#[tokio::test]
async fn heartbeats_on_channels_and_content_on_channel_0_are_505() {
    let broker = TestBroker::start().await;
    refused(&broker, &frames::frame(HEARTBEAT, 1, &[]), 505, "UNEXPECTED_FRAME - type 8, all octets = <<>>").await;
    refused(&broker, &frames::frame(BODY, 0, &[1]), 505, "UNEXPECTED_FRAME - type 3, all octets = <<1>>").await;
    refused(&broker, &frames::frame(HEADER, 0, &[1]), 505, "UNEXPECTED_FRAME - type 2, all octets = <<1>>").await;
    broker.stop().await;
}

#[tokio::test]
async fn undecodable_arguments_are_501() {
    let broker = TestBroker::start().await;
    // basic.cancel with a consumer tag longer than the frame
    refused(&broker, &frames::frame(METHOD, 1, &[0, 60, 0, 30, 5, b'a']), 501, "FRAME_ERROR - cannot decode <<5,97>>")
        .await;
    // basic.ack without its tag: hot methods take another path
    refused(&broker, &frames::frame(METHOD, 1, &[0, 60, 0, 80, 1]), 501, "FRAME_ERROR - cannot decode <<1>>").await;
    refused(&broker, &frames::frame(METHOD, 1, &[0, 60, 0, 40, 0, 0, 9]), 501, "FRAME_ERROR - cannot decode <<0,0,9>>")
        .await;
    broker.stop().await;
}

#[tokio::test]
async fn names_that_are_not_utf8_are_501() {
    let broker = TestBroker::start().await;
    let text = "FRAME_ERROR - Malformed UTF-8 in shortstr";
    refused(&broker, &frames::frame(METHOD, 1, &[0, 60, 0, 30, 1, 0xFF, 0]), 501, text).await;
    let mut bytes = frames::frame(METHOD, 1, &[0, 60, 0, 40, 0, 0, 0, 1, 0xFF, 0]);
    bytes.extend(plain_header(0));
    refused(&broker, &bytes, 501, text).await;
    broker.stop().await;
}

#[tokio::test]
async fn unknown_methods_and_malformed_tables_are_dropped_at_once() {
    let broker = TestBroker::start().await;
    dropped(&broker, &frames::frame(METHOD, 1, &[0, 60, 0, 99])).await;
    dropped(&broker, &frames::frame(METHOD, 1, &[0, 77, 0, 10])).await;
    // queue.declare "q" with a table that holds an unknown type; one that is merely cut off is 501, as in RabbitMQ
    dropped(&broker, &frames::frame(METHOD, 1, &[0, 50, 0, 10, 0, 0, 1, b'q', 0, 0, 0, 0, 3, 1, b'a', b'?'])).await;
    let cut_off = frames::frame(METHOD, 1, &[0, 50, 0, 10, 0, 0, 1, b'q', 0, 0, 0, 0, 9, 1, b'a']);
    refused(&broker, &cut_off, 501, "FRAME_ERROR - cannot decode <<0,0,1,113,0,0,0,0,9,1,97>>").await;
    broker.stop().await;
}

#[tokio::test]
async fn content_without_a_publish_is_505() {
    let broker = TestBroker::start().await;
    let text = "UNEXPECTED_FRAME - expected method frame, got non method frame instead";
    refused(&broker, &plain_header(1), 505, text).await;
    refused(&broker, &frames::frame(BODY, 1, b"x"), 505, text).await;
    broker.stop().await;
}

#[tokio::test]
async fn anything_but_a_header_after_a_publish_is_505() {
    let broker = TestBroker::start().await;
    let text = "UNEXPECTED_FRAME - expected content header for class 60, got non content header frame instead";
    refused(&broker, &[publish(), frames::frame(BODY, 1, b"x")].concat(), 505, text).await;
    refused(&broker, &[publish(), publish()].concat(), 505, text).await;
    let ack =
        frames::method(1, &AMQPClass::Basic(basic::AMQPMethod::Ack(basic::Ack { delivery_tag: 1, multiple: false })));
    refused(&broker, &[publish(), ack].concat(), 505, text).await;
    let weighty = frames::frame(HEADER, 1, &frames::header_payload(60, 1, 0, &BasicProperties::default()));
    refused(&broker, &[publish(), weighty].concat(), 505, text).await;
    let other_class = frames::frame(HEADER, 1, &frames::header_payload(61, 0, 0, &BasicProperties::default()));
    let text = "UNEXPECTED_FRAME - expected content header for class 60, got one for class 61 instead";
    refused(&broker, &[publish(), other_class].concat(), 505, text).await;
    broker.stop().await;
}

#[tokio::test]
async fn anything_but_a_body_after_a_header_is_505() {
    let broker = TestBroker::start().await;
    let text = "UNEXPECTED_FRAME - expected content body, got non content body frame instead";
    refused(&broker, &[publish(), plain_header(5), publish()].concat(), 505, text).await;
    refused(&broker, &[publish(), plain_header(5), plain_header(5)].concat(), 505, text).await;
    broker.stop().await;
}

#[tokio::test]
async fn bodies_larger_than_announced_or_allowed_are_501() {
    let broker = TestBroker::start().await;
    let text = "FRAME_ERROR - content body frame exceeds remaining content size";
    refused(&broker, &[publish(), plain_header(2), frames::frame(BODY, 1, b"abc")].concat(), 501, text).await;
    let large = [publish(), plain_header(20_000), frames::frame(BODY, 1, &[0; 30_000])].concat();
    refused(&broker, &large, 501, text).await;
    let text = "FRAME_ERROR - content body size 536870913 exceeds maximum allowed size 536870912";
    refused(&broker, &[publish(), plain_header(536_870_913)].concat(), 501, text).await;
    broker.stop().await;
}

#[tokio::test]
async fn left_over_property_bytes_are_541() {
    let broker = TestBroker::start().await;
    let mut peer = with_queue(&broker).await;
    let mut payload = frames::header_payload(60, 0, 0, &BasicProperties::default());
    payload.extend([1, 2, 3]);
    peer.write(&[publish(), frames::frame(HEADER, 1, &payload)].concat()).await;
    peer.expect_connection_error(541, "INTERNAL_ERROR").await;
    assert_eq!(broker.counts("q").ready, 0);
    broker.stop().await;
}

#[tokio::test]
async fn a_publish_may_arrive_in_any_two_pieces() {
    let broker = TestBroker::start().await;
    let mut peer = with_queue(&broker).await;
    peer.select_confirms(1).await;
    let properties = persistent().with_headers(table([("k", text("v"))]));
    let bytes = frames::content(1, "", "q", false, &properties, b"some body", 4);
    for cut in 1..bytes.len() {
        peer.write(&bytes[..cut]).await;
        tokio::task::yield_now().await;
        peer.write(&bytes[cut..]).await;
        assert_eq!(peer.confirm(1).await, (cut as u64, true));
        let message = peer.get(1, "q", true).await.unwrap();
        assert_eq!((message.text(), &message.properties), ("some body", &properties), "cut at {cut}");
    }
    broker.stop().await;
}

#[tokio::test]
async fn a_publish_may_arrive_byte_by_byte() {
    let broker = TestBroker::start().await;
    let mut peer = with_queue(&broker).await;
    for byte in frames::content(1, "", "q", false, &persistent(), b"drop by drop", 5) {
        peer.write(&[byte]).await;
    }
    assert_eq!(peer.get(1, "q", true).await.unwrap().text(), "drop by drop");
    broker.stop().await;
}

#[tokio::test]
async fn many_publishes_cut_anywhere_arrive_whole_and_in_order() {
    let broker = TestBroker::start().await;
    let mut peer = with_queue(&broker).await;
    let body = |number: usize| vec![number as u8; number * 37 % 3000];
    let bytes: Vec<u8> = (0..300)
        .flat_map(|number| frames::content(1, "", "q", false, &BasicProperties::default(), &body(number), 1000))
        .collect();
    let mut rest = bytes.as_slice();
    let mut step = 1;
    while !rest.is_empty() {
        step = step * 7919 % 6007; // pieces from 1 byte to 6 KB
        let (piece, after) = rest.split_at(step.min(rest.len()));
        peer.write(piece).await;
        rest = after;
    }
    for number in 0..300 {
        assert_eq!(peer.get(1, "q", true).await.unwrap().body, body(number));
    }
    broker.stop().await;
}

#[tokio::test]
async fn content_of_different_channels_may_interleave() {
    let broker = TestBroker::start().await;
    let mut peer = with_queue(&broker).await;
    peer.open_channel(2).await;
    let plain = BasicProperties::default();
    let parts = |channel: u16, body: &str| {
        let mut parts =
            vec![frames::publish_method(channel, "", "q", false), frames::header(channel, body.len() as u64, &plain)];
        parts.extend(body.as_bytes().chunks(2).map(|piece| frames::frame(BODY, channel, piece)));
        parts
    };
    let (one, two) = (parts(1, "first."), parts(2, "second"));
    let mixed: Vec<u8> = one.into_iter().zip(two).flat_map(|(one, two)| [one, two].concat()).collect();
    peer.write(&mixed).await;
    assert_eq!(peer.get(1, "q", true).await.unwrap().text(), "first.");
    assert_eq!(peer.get(1, "q", true).await.unwrap().text(), "second");
    broker.stop().await;
}

#[tokio::test]
async fn heartbeats_may_stand_anywhere_between_frames() {
    let broker = TestBroker::start().await;
    let mut peer = with_queue(&broker).await;
    let beat = frames::frame(HEARTBEAT, 0, &[]);
    let pieces = [publish(), plain_header(4), frames::frame(BODY, 1, b"be"), frames::frame(BODY, 1, b"at")];
    peer.write(&pieces.join(beat.as_slice())).await;
    assert_eq!(peer.get(1, "q", true).await.unwrap().text(), "beat");
    broker.stop().await;
}

#[tokio::test]
async fn a_body_may_come_in_many_frames_and_empty_ones() {
    let broker = TestBroker::start().await;
    let mut peer = with_queue(&broker).await;
    let body: Vec<u8> = (0..5000).map(|at| at as u8).collect();
    let mut bytes = [publish(), plain_header(5000)].concat();
    for byte in body.chunks(1) {
        bytes.extend(frames::frame(BODY, 1, &[]));
        bytes.extend(frames::frame(BODY, 1, byte));
    }
    peer.write(&bytes).await;
    assert_eq!(peer.get(1, "q", true).await.unwrap().body, body);
    broker.stop().await;
}

#[tokio::test]
async fn bodies_around_every_threshold_arrive_whole() {
    let broker = TestBroker::start().await;
    let mut peer = with_queue(&broker).await;
    for base in [1024, 4096, 8192, 16 << 10, 64 << 10, 131_064, 131_072, 262_144] {
        for size in base - 1..=base + 1 {
            let body: Vec<u8> = (0..size).map(|at| (at * 7 + size) as u8).collect();
            peer.publish(1, "q", &body).await;
            let message = peer.get(1, "q", true).await.unwrap();
            assert!(message.body == body, "{size}");
        }
    }
    let body: Vec<u8> = (0..5 << 20).map(|at| ((at * 13) >> 3) as u8).collect();
    peer.publish(1, "q", &body).await;
    assert!(peer.get(1, "q", true).await.unwrap().body == body);
    broker.stop().await;
}

#[tokio::test]
async fn a_message_over_the_limit_is_406_and_the_connection_goes_on() {
    let broker = TestBroker::with(|config| config.amqp.max_message_size_bytes = 100_000).await;
    let mut peer = with_queue(&broker).await;
    peer.publish(1, "q", vec![1; 100_000]).await;
    peer.publish(1, "q", vec![1; 100_001]).await;
    let text = "PRECONDITION_FAILED - message size 100001 is larger than configured max size 100000";
    peer.expect_channel_error(1, 406, text).await;
    peer.open_channel(1).await;
    assert_eq!(peer.depth(1, "q").await, (1, 0));
    broker.stop().await;
}

#[tokio::test]
async fn an_announced_body_costs_nothing_until_it_comes() {
    let broker = TestBroker::start().await;
    let before = resident_kib();
    let mut peer = with_queue(&broker).await;
    for number in 2..40 {
        peer.open_channel(number).await;
        let header = frames::header(number, 100 << 20, &BasicProperties::default());
        peer.write(&[frames::publish_method(number, "", "q", false), header].concat()).await;
    }
    peer.nothing_more(1).await;
    // Other tests run in this process, so the bound is wide; 38 bodies would be 3.8 GB.
    assert!(resident_kib() < before + (1 << 20));
    broker.stop().await;
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// A table with `depth` tables inside one another.
fn nested(depth: usize, tag: u8) -> Vec<u8> {
    let mut inner = Vec::new();
    for _ in 0..depth {
        let mut outer = if tag == b'F' { vec![1, b'a', b'F'] } else { vec![b'A'] };
        outer.extend((inner.len() as u32).to_be_bytes());
        outer.extend(&inner);
        inner = outer;
    }
    if tag == b'A' {
        inner = [&[1, b'a'], inner.as_slice()].concat();
    }
    [&(inner.len() as u32).to_be_bytes(), inner.as_slice()].concat()
}

#[tokio::test]
async fn tables_nested_too_deep_end_the_connection_and_nothing_else() {
    let broker = TestBroker::start().await;
    for tag in [b'F', b'A'] {
        // Before login, in the client's properties, within the small frame limit.
        let mut bomb = vec![0, 10, 0, 11];
        bomb.extend(nested(1000, tag));
        bomb.extend(b"\x05PLAIN\x00\x00\x00\x0c\0guest\0guest\x05en_US");
        let mut peer = broker.bare().await;
        peer.write(b"AMQP\x00\x00\x09\x01").await;
        peer.method(0).await;
        peer.write(&frames::frame(METHOD, 0, &bomb)).await;
        peer.expect_drop().await;
        // After it, in arguments and in message headers.
        let mut declare = vec![0, 50, 0, 10, 0, 0, 1, b'q', 0];
        declare.extend(nested(12_000, tag));
        dropped(&broker, &frames::frame(METHOD, 1, &declare)).await;
        let mut header = frames::header_payload(60, 0, 0, &BasicProperties::default());
        header.truncate(12);
        header.extend([0x20, 0]);
        header.extend(nested(12_000, tag));
        let mut peer = broker.peer().await;
        peer.write(&[publish(), frames::frame(HEADER, 1, &header)].concat()).await;
        peer.publish(1, "q", "x").await;
        // Refused, or carried as the opaque bytes they are; never a crash.
        let _ = peer.frame_or_end_within(std::time::Duration::from_millis(200)).await;
    }
    broker.peer().await.nothing_more(1).await;
    broker.stop().await;
}

#[tokio::test]
async fn deep_but_sane_headers_pass_through_a_headers_exchange() {
    let broker = TestBroker::start().await;
    let mut peer = with_queue(&broker).await;
    let mut headers = table([("leaf", text("x"))]);
    for _ in 0..10 {
        headers = table([("a", amq_protocol::types::AMQPValue::FieldTable(headers)), ("k", text("v"))]);
    }
    peer.bind(1, "q", "amq.headers", "", table([("k", text("v"))])).await;
    let properties = BasicProperties::default().with_headers(headers);
    peer.publish_to(1, "amq.headers", "", &properties, "deep").await;
    assert_eq!(peer.get(1, "q", true).await.unwrap().properties, properties);
    broker.stop().await;
}

#[tokio::test]
async fn methods_may_be_pipelined() {
    let broker = TestBroker::start().await;
    let mut peer = broker.login().await;
    let declare = exchange::Declare { exchange: "x".into(), kind: "fanout".into(), ..Default::default() };
    let mut bytes = frames::frame(METHOD, 1, &[0, 20, 0, 10, 0]);
    bytes.extend(frames::method(1, &AMQPClass::Exchange(exchange::AMQPMethod::Declare(declare))));
    bytes.extend(frames::method(
        1,
        &AMQPClass::Queue(amq_protocol::protocol::queue::AMQPMethod::Declare(transient("q"))),
    ));
    bytes.extend(frames::content(1, "", "q", false, &BasicProperties::default(), b"x", 100));
    bytes.extend(frames::method(
        1,
        &AMQPClass::Basic(basic::AMQPMethod::Get(basic::Get { queue: "q".into(), no_ack: true })),
    ));
    peer.write(&bytes).await;
    for expected in [[0, 20, 0, 11], [0, 40, 0, 11], [0, 50, 0, 11], [0, 60, 0, 71]] {
        assert_eq!(peer.frame().await.payload[..4], expected);
    }
    assert_eq!((peer.frame().await.kind, peer.frame().await.payload), (HEADER, b"x".to_vec()));
    assert_eq!(END, 0xCE);
    broker.stop().await;
}
