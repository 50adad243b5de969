//! Borrowed views of the methods and headers that make up the load.

use nom::{
    IResult,
    bytes::complete::take,
    number::complete::{be_u8, be_u32},
};

/// Class and method numbers packed as `class << 16 | method`.
pub const BASIC_PUBLISH: u32 = 60 << 16 | 40;
pub const BASIC_GET: u32 = 60 << 16 | 70;
pub const BASIC_ACK: u32 = 60 << 16 | 80;
pub const BASIC_REJECT: u32 = 60 << 16 | 90;
pub const BASIC_NACK: u32 = 60 << 16 | 120;

/// A payload whose arguments do not fit its method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Undecodable;

/// The packed class and method number of a method payload.
#[inline]
pub fn method_id(payload: &[u8]) -> Option<u32> {
    payload.first_chunk::<4>().map(|id| u32::from_be_bytes(*id))
}

fn short_string(input: &[u8]) -> IResult<&[u8], &[u8]> {
    let (input, len) = be_u8(input)?;
    take(len)(input)
}

/// `basic.publish`. `names` are the exchange and routing key as the wire has them, two short strings end to end, which
/// is also how `basic.deliver` wants them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublishView<'a> {
    pub names: &'a [u8],
    pub mandatory: bool,
    pub immediate: bool,
}

/// Splits what [`PublishView::names`] holds into exchange and routing key.
///
/// Names that are not two whole short strings read as empty; a decoded view never holds such.
#[inline]
pub fn split_names(names: &[u8]) -> (&[u8], &[u8]) {
    let cut = 1 + names.first().map_or(0, |&len| len as usize);
    (names.get(1..cut).unwrap_or_default(), names.get(cut + 1..).unwrap_or_default())
}

impl<'a> PublishView<'a> {
    /// Reads the arguments of `basic.publish` (payload with its four id bytes).
    #[inline]
    pub fn read(payload: &'a [u8]) -> Result<Self, Undecodable> {
        let arguments = payload.get(6..).ok_or(Undecodable)?; // class, method, ticket
        let exchange_len = 1 + usize::from(*arguments.first().ok_or(Undecodable)?);
        let names_len = exchange_len + 1 + usize::from(*arguments.get(exchange_len).ok_or(Undecodable)?);
        let Some((names, [bits])) = arguments.split_at_checked(names_len) else { return Err(Undecodable) };
        Ok(PublishView { names, mandatory: bits & 1 != 0, immediate: bits & 2 != 0 })
    }
}

/// `basic.ack`, `basic.nack` or `basic.reject`: one delivery or all up to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SettleView {
    pub delivery_tag: u64,
    pub multiple: bool,
    /// `None` for an ack, otherwise whether the message returns to its queue.
    pub requeue: Option<bool>,
}

impl SettleView {
    /// Reads a settling method; `None` when `payload` is another method.
    #[inline]
    pub fn read(payload: &[u8]) -> Option<Result<Self, Undecodable>> {
        let id = method_id(payload)?;
        if !matches!(id, BASIC_ACK | BASIC_NACK | BASIC_REJECT) {
            return None;
        }
        let (Some(tag), [bits], 13) =
            (payload[4..].first_chunk::<8>(), &payload[12.min(payload.len())..], payload.len())
        else {
            return Some(Err(Undecodable));
        };
        let delivery_tag = u64::from_be_bytes(*tag);
        Some(Ok(match id {
            BASIC_ACK => SettleView { delivery_tag, multiple: bits & 1 != 0, requeue: None },
            BASIC_REJECT => SettleView { delivery_tag, multiple: false, requeue: Some(bits & 1 != 0) },
            _ => SettleView { delivery_tag, multiple: bits & 1 != 0, requeue: Some(bits & 2 != 0) },
        }))
    }
}

/// `basic.get`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GetView<'a> {
    pub queue: &'a [u8],
    pub no_ack: bool,
}

impl<'a> GetView<'a> {
    /// Reads the arguments of `basic.get`.
    pub fn read(payload: &'a [u8]) -> Result<Self, Undecodable> {
        let arguments = payload.get(6..).ok_or(Undecodable)?;
        let (rest, queue) = short_string(arguments).map_err(|_| Undecodable)?;
        let [bits] = rest else { return Err(Undecodable) };
        Ok(GetView { queue, no_ack: bits & 1 != 0 })
    }
}

/// A content header. `properties` are the flag word and the property list, as the wire has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeaderView<'a> {
    pub class: u16,
    pub weight: u16,
    pub body_size: u64,
    pub properties: &'a [u8],
}

impl<'a> HeaderView<'a> {
    /// Reads the payload of a header frame.
    #[inline]
    pub fn read(payload: &'a [u8]) -> Result<Self, Undecodable> {
        let (&[c0, c1, w0, w1, ref size @ ..], properties) = payload.split_first_chunk::<12>().ok_or(Undecodable)?;
        if properties.len() < 2 {
            return Err(Undecodable);
        }
        Ok(HeaderView {
            class: u16::from_be_bytes([c0, c1]),
            weight: u16::from_be_bytes([w0, w1]),
            body_size: u64::from_be_bytes(*size),
            properties,
        })
    }
}

/// Reads a `u32` length and that many bytes; used by the raw table walks.
#[inline]
pub fn long_bytes(input: &[u8]) -> Result<(&[u8], &[u8]), Undecodable> {
    let read: IResult<&[u8], u32> = be_u32(input);
    let (rest, len) = read.map_err(|_| Undecodable)?;
    rest.split_at_checked(len as usize).map(|(bytes, rest)| (rest, bytes)).ok_or(Undecodable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use amq_protocol::protocol::{AMQPClass, basic};
    use proptest::prelude::*;

    fn encode(class: AMQPClass) -> Vec<u8> {
        super::super::method::payload(&class)
    }

    proptest! {
        #[test]
        fn publish_view_agrees_with_amq_protocol(exchange in "[a-z.é]{0,60}", key in "[a-z#*.]{0,120}", mandatory: bool, immediate: bool) {
            let payload = encode(AMQPClass::Basic(basic::AMQPMethod::Publish(basic::Publish {
                exchange: exchange.as_str().into(), routing_key: key.as_str().into(), mandatory, immediate,
            })));
            let view = PublishView::read(&payload).unwrap();
            prop_assert_eq!(split_names(view.names), (exchange.as_bytes(), key.as_bytes()));
            prop_assert_eq!((view.mandatory, view.immediate), (mandatory, immediate));
            for cut in 4..payload.len() {
                prop_assert_eq!(PublishView::read(&payload[..cut]), Err(Undecodable));
            }
        }

        #[test]
        fn settle_view_agrees_with_amq_protocol(delivery_tag: u64, multiple: bool, requeue: bool) {
            let ack = encode(AMQPClass::Basic(basic::AMQPMethod::Ack(basic::Ack { delivery_tag, multiple })));
            prop_assert_eq!(SettleView::read(&ack), Some(Ok(SettleView { delivery_tag, multiple, requeue: None })));
            let nack = encode(AMQPClass::Basic(basic::AMQPMethod::Nack(basic::Nack { delivery_tag, multiple, requeue })));
            prop_assert_eq!(SettleView::read(&nack), Some(Ok(SettleView { delivery_tag, multiple, requeue: Some(requeue) })));
            let reject = encode(AMQPClass::Basic(basic::AMQPMethod::Reject(basic::Reject { delivery_tag, requeue })));
            prop_assert_eq!(SettleView::read(&reject), Some(Ok(SettleView { delivery_tag, multiple: false, requeue: Some(requeue) })));
            prop_assert_eq!(SettleView::read(&ack[..12]), Some(Err(Undecodable)));
        }

        #[test]
        fn views_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = (PublishView::read(&bytes), SettleView::read(&bytes), GetView::read(&bytes), HeaderView::read(&bytes));
            let _ = split_names(&bytes);
        }
    }
}
