//! Frames of the hot methods, written straight into an outbox.

use super::frame::{BODY, FRAME_END, HEADER, HEARTBEAT, METHOD, OVERHEAD_BYTES};

/// A heartbeat frame.
pub const HEARTBEAT_FRAME: [u8; 8] = [HEARTBEAT, 0, 0, 0, 0, 0, 0, FRAME_END];

const BASIC: [u8; 2] = [0, 60];

#[inline]
fn method_head(out: &mut Vec<u8>, channel: u16, arguments_len: usize, method: u16) {
    let mut head = [0; 11];
    head[0] = METHOD;
    head[1..3].copy_from_slice(&channel.to_be_bytes());
    head[3..7].copy_from_slice(&(arguments_len as u32 + 4).to_be_bytes());
    head[7..9].copy_from_slice(&BASIC);
    head[9..11].copy_from_slice(&method.to_be_bytes());
    out.extend_from_slice(&head);
}

/// `basic.deliver`. `consumer_tag` is a short string with its length octet; `names` as in
/// [`PublishView::names`](super::hot::PublishView::names).
#[inline]
pub fn basic_deliver(
    out: &mut Vec<u8>,
    channel: u16,
    consumer_tag: &[u8],
    delivery_tag: u64,
    redelivered: bool,
    names: &[u8],
) {
    method_head(out, channel, consumer_tag.len() + 9 + names.len(), 60);
    out.extend_from_slice(consumer_tag);
    out.extend_from_slice(&delivery_tag.to_be_bytes());
    out.push(u8::from(redelivered));
    out.extend_from_slice(names);
    out.push(FRAME_END);
}

/// `basic.get-ok`; `message_count` is what stays ready in the queue.
pub fn basic_get_ok(
    out: &mut Vec<u8>,
    channel: u16,
    delivery_tag: u64,
    redelivered: bool,
    names: &[u8],
    message_count: u32,
) {
    method_head(out, channel, 13 + names.len(), 71);
    out.extend_from_slice(&delivery_tag.to_be_bytes());
    out.push(u8::from(redelivered));
    out.extend_from_slice(names);
    out.extend_from_slice(&message_count.to_be_bytes());
    out.push(FRAME_END);
}

/// `basic.return` with 312 `NO_ROUTE`.
pub fn basic_return_no_route(out: &mut Vec<u8>, channel: u16, names: &[u8]) {
    const TEXT: &[u8; 9] = b"\x08NO_ROUTE";
    method_head(out, channel, 2 + TEXT.len() + names.len(), 50);
    out.extend_from_slice(&312u16.to_be_bytes());
    out.extend_from_slice(TEXT);
    out.extend_from_slice(names);
    out.push(FRAME_END);
}

/// `basic.ack` from the broker.
#[inline]
pub fn basic_ack(out: &mut Vec<u8>, channel: u16, delivery_tag: u64, multiple: bool) {
    method_head(out, channel, 9, 80);
    out.extend_from_slice(&delivery_tag.to_be_bytes());
    out.extend_from_slice(&[u8::from(multiple), FRAME_END]);
}

/// `basic.nack` from the broker; its requeue bit is 0, as RabbitMQ's.
#[inline]
pub fn basic_nack(out: &mut Vec<u8>, channel: u16, delivery_tag: u64, multiple: bool) {
    method_head(out, channel, 9, 120);
    out.extend_from_slice(&delivery_tag.to_be_bytes());
    // RabbitMQ sets the requeue bit, which means nothing here.
    out.extend_from_slice(&[u8::from(multiple) | 2, FRAME_END]);
}

/// A content header for class basic.
#[inline]
pub fn content_header(out: &mut Vec<u8>, channel: u16, body_size: u64, properties: &[u8]) {
    let mut head = [0; 19];
    head[0] = HEADER;
    head[1..3].copy_from_slice(&channel.to_be_bytes());
    head[3..7].copy_from_slice(&(properties.len() as u32 + 12).to_be_bytes());
    head[7..9].copy_from_slice(&BASIC);
    head[11..19].copy_from_slice(&body_size.to_be_bytes());
    out.extend_from_slice(&head);
    out.extend_from_slice(properties);
    out.push(FRAME_END);
}

/// The head of a body frame.
#[inline]
pub fn body_head(channel: u16, payload_len: usize) -> [u8; 7] {
    let [c0, c1] = channel.to_be_bytes();
    let [s0, s1, s2, s3] = (payload_len as u32).to_be_bytes();
    [BODY, c0, c1, s0, s1, s2, s3]
}

/// Payload bytes a body frame of `frame_max` can take.
#[inline]
pub fn body_payload_max(frame_max: u32) -> usize {
    frame_max as usize - OVERHEAD_BYTES
}

/// The body frames of `body`, each at most `frame_max` long; none for an empty body.
#[inline]
pub fn body_frames(out: &mut Vec<u8>, channel: u16, body: &[u8], frame_max: u32) {
    for payload in body.chunks(body_payload_max(frame_max)) {
        out.extend_from_slice(&body_head(channel, payload.len()));
        out.extend_from_slice(payload);
        out.push(FRAME_END);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use amq_protocol::{
        frame::{AMQPFrame, parse_frame},
        protocol::{AMQPClass, basic},
    };
    use proptest::prelude::*;

    fn one(bytes: &[u8]) -> AMQPFrame {
        let (rest, frame) = parse_frame(bytes).unwrap();
        assert!(rest.is_empty());
        frame
    }

    proptest! {
        #[test]
        fn amq_protocol_reads_what_is_written(channel in 1u16.., delivery_tag: u64, redelivered: bool, multiple: bool, exchange in "[a-z]{0,40}", key in "[a-z.]{0,90}", tag in "[a-z]{1,30}") {
            let short = |text: &str| [&[text.len() as u8], text.as_bytes()].concat();
            let names = [short(&exchange), short(&key)].concat();
            let mut out = Vec::new();
            basic_deliver(&mut out, channel, &short(&tag), delivery_tag, redelivered, &names);
            let expected = basic::Deliver { consumer_tag: tag.as_str().into(), delivery_tag, redelivered, exchange: exchange.as_str().into(), routing_key: key.as_str().into() };
            prop_assert_eq!(one(&out), AMQPFrame::Method(channel, AMQPClass::Basic(basic::AMQPMethod::Deliver(expected))));
            out.clear();
            basic_get_ok(&mut out, channel, delivery_tag, redelivered, &names, 7);
            let expected = basic::GetOk { delivery_tag, redelivered, exchange: exchange.as_str().into(), routing_key: key.as_str().into(), message_count: 7 };
            prop_assert_eq!(one(&out), AMQPFrame::Method(channel, AMQPClass::Basic(basic::AMQPMethod::GetOk(expected))));
            out.clear();
            basic_ack(&mut out, channel, delivery_tag, multiple);
            prop_assert_eq!(one(&out), AMQPFrame::Method(channel, AMQPClass::Basic(basic::AMQPMethod::Ack(basic::Ack { delivery_tag, multiple }))));
            out.clear();
            basic_return_no_route(&mut out, channel, &names);
            let expected = basic::Return { reply_code: 312, reply_text: "NO_ROUTE".into(), exchange: exchange.as_str().into(), routing_key: key.as_str().into() };
            prop_assert_eq!(one(&out), AMQPFrame::Method(channel, AMQPClass::Basic(basic::AMQPMethod::Return(expected))));
        }

        #[test]
        fn bodies_are_split_to_the_frame_size(len in 0usize..40_000, frame_max in 4096u32..9000) {
            let body: Vec<u8> = (0..len).map(|at| at as u8).collect();
            let mut out = Vec::new();
            body_frames(&mut out, 3, &body, frame_max);
            let (mut rest, mut joined) = (out.as_slice(), Vec::new());
            while !rest.is_empty() {
                let (after, frame) = parse_frame(rest).unwrap();
                prop_assert!(rest.len() - after.len() <= frame_max as usize);
                let AMQPFrame::Body(_, payload) = frame else { panic!("not a body frame") };
                joined.extend(payload);
                rest = after;
            }
            prop_assert_eq!(joined, body);
        }
    }
}
