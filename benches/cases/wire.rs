//! Frames in a read buffer, taken apart as a session does.

use std::hint::black_box;

use leveret::{
    broker::encode_names,
    model::properties::{Properties, plain_delivery_mode},
    wire::{
        self, Scan, encode,
        hot::{BASIC_PUBLISH, HeaderView, PublishView, SettleView, method_id},
    },
};

use super::{MESSAGES, Work};

/// The default of the setting, and so what most connections have.
pub const FRAME_MAX: u32 = 131_072;
pub const CHANNEL: u16 = 1;

/// The frames of `basic.publish` of a message to `exchange` with `routing_key`.
pub fn publish(out: &mut Vec<u8>, exchange: &str, routing_key: &str, properties: &[u8], body: &[u8]) {
    let names = encode_names(exchange.as_bytes(), routing_key.as_bytes());
    let payload = [&BASIC_PUBLISH.to_be_bytes()[..], &[0, 0], &names, &[0]].concat();
    wire::method::write_raw(out, CHANNEL, &payload);
    encode::content_header(out, CHANNEL, body.len() as u64, properties);
    encode::body_frames(out, CHANNEL, body, FRAME_MAX);
}

/// Properties of a message from a client that sets them: content type, three headers, delivery mode, correlation id,
/// message id, timestamp and type.
pub fn properties() -> Vec<u8> {
    let table =
        b"\x06tenantS\0\0\0\x05acme.\x07attemptI\0\0\0\x01\x08trace-idS\0\0\0\x200123456789abcdef0123456789abcdef";
    let flags = 1u16 << 15 | 1 << 13 | 1 << 12 | 1 << 10 | 1 << 7 | 1 << 6 | 1 << 5;
    [
        &flags.to_be_bytes()[..],
        b"\x10application/json",
        &(table.len() as u32).to_be_bytes(),
        table,
        b"\x02",
        b"\x0ccorrelation1",
        b"\x0amessage-01",
        &1_800_000_000u64.to_be_bytes(),
        b"\x07created",
    ]
    .concat()
}

/// The three frames of each message.
pub fn publishes(messages: u64, body_bytes: usize) -> Box<dyn Work> {
    let mut input = Vec::new();
    for _ in 0..messages {
        publish(&mut input, "orders", "orders.created", &[0x10, 0, 1], &vec![7; body_bytes]);
    }
    Box::new(move || {
        let (mut at, mut read) = (0, 0);
        while let Some((len, bytes)) = read_publish(black_box(&input[at..])) {
            (at, read) = (at + len, read + bytes);
        }
        assert_eq!((at, read as u64), (input.len(), messages * body_bytes as u64));
    })
}

/// The length of the message at the start of `input` on the wire, and that of its body.
fn read_publish(input: &[u8]) -> Option<(usize, usize)> {
    let Scan::Frame(method) = wire::scan(input, FRAME_MAX) else { return None };
    if method_id(method.payload) != Some(BASIC_PUBLISH) {
        return None;
    }
    black_box(PublishView::read(method.payload).ok()?);
    let header_at = method.wire_len();
    let Scan::Frame(header) = wire::scan(&input[header_at..], FRAME_MAX) else { return None };
    let body_at = header_at + header.wire_len();
    let header = HeaderView::read(header.payload).ok()?;
    black_box(plain_delivery_mode(header.properties)?);
    let Scan::Frame(body) = wire::scan(&input[body_at..], FRAME_MAX) else { return None };
    black_box(body.payload);
    Some((body_at + body.wire_len(), body.payload.len()))
}

/// A content header, and a look at every property.
pub fn headers() -> Box<dyn Work> {
    let mut frame = Vec::new();
    encode::content_header(&mut frame, CHANNEL, 16, &properties());
    Box::new(move || {
        for _ in 0..MESSAGES {
            let Scan::Frame(frame) = wire::scan(black_box(&frame), FRAME_MAX) else { panic!("no whole frame") };
            let header = HeaderView::read(frame.payload).expect("a content header");
            let properties = Properties::parse(header.properties).expect("good properties");
            assert!(black_box(properties).is_persistent());
        }
    })
}

/// `basic.ack` of one delivery each.
pub fn acks() -> Box<dyn Work> {
    let mut input = Vec::new();
    (1..=MESSAGES).for_each(|tag| encode::basic_ack(&mut input, CHANNEL, tag, false));
    Box::new(move || {
        let (mut at, mut sum) = (0, 0);
        while let Scan::Frame(frame) = wire::scan(black_box(&input[at..]), FRAME_MAX) {
            let Some(Ok(view)) = SettleView::read(frame.payload) else { panic!("no ack") };
            at += frame.wire_len();
            sum += view.delivery_tag;
        }
        assert_eq!(sum, MESSAGES * (MESSAGES + 1) / 2);
    })
}
