//! Frames by hand, right and wrong.

use amq_protocol::{
    frame::WriteContext,
    protocol::{AMQPClass, BasicProperties, basic, basic::gen_properties, gen_class},
};

pub const METHOD: u8 = 1;
pub const HEADER: u8 = 2;
pub const BODY: u8 = 3;
pub const HEARTBEAT: u8 = 8;
pub const END: u8 = 0xCE;

/// A frame as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: u8,
    pub channel: u16,
    pub payload: Vec<u8>,
}

pub fn frame(kind: u8, channel: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind];
    bytes.extend(channel.to_be_bytes());
    bytes.extend((payload.len() as u32).to_be_bytes());
    bytes.extend(payload);
    bytes.push(END);
    bytes
}

pub fn payload(class: &AMQPClass) -> Vec<u8> {
    gen_class(class)(WriteContext::from(Vec::new())).unwrap().into_inner().0
}

pub fn method(channel: u16, class: &AMQPClass) -> Vec<u8> {
    frame(METHOD, channel, &payload(class))
}

pub fn publish_method(channel: u16, exchange: &str, key: &str, mandatory: bool) -> Vec<u8> {
    let publish = basic::Publish { exchange: exchange.into(), routing_key: key.into(), mandatory, immediate: false };
    method(channel, &AMQPClass::Basic(basic::AMQPMethod::Publish(publish)))
}

pub fn header(channel: u16, body_size: u64, properties: &BasicProperties) -> Vec<u8> {
    frame(HEADER, channel, &header_payload(60, 0, body_size, properties))
}

pub fn header_payload(class: u16, weight: u16, body_size: u64, properties: &BasicProperties) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(class.to_be_bytes());
    bytes.extend(weight.to_be_bytes());
    bytes.extend(body_size.to_be_bytes());
    bytes.extend(gen_properties(properties)(WriteContext::from(Vec::new())).unwrap().into_inner().0);
    bytes
}

/// Method, header and body frames of `max` bytes each.
pub fn content(
    channel: u16,
    exchange: &str,
    key: &str,
    mandatory: bool,
    properties: &BasicProperties,
    body: &[u8],
    max: usize,
) -> Vec<u8> {
    let mut bytes = publish_method(channel, exchange, key, mandatory);
    bytes.extend(header(channel, body.len() as u64, properties));
    for piece in body.chunks(max) {
        bytes.extend(frame(BODY, channel, piece));
    }
    bytes
}
