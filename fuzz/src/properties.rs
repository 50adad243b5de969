//! Message properties.

use leveret::{
    model::properties::{Properties, plain_delivery_mode},
    wire::limits::check_table,
};

use super::{Choices, traffic::properties_of};

fn judge_properties(raw: &[u8]) {
    use amq_protocol::protocol::basic::parse_properties;
    let plain = plain_delivery_mode(raw);
    let _ = Properties::needs_attention(raw);
    let Ok(view) = Properties::parse(raw) else {
        assert!(plain.is_none());
        return;
    };
    assert!(plain.is_none_or(|persistent| persistent == view.is_persistent()));
    for changed in [
        view.with_reply_to(&[b'r'; 300]),
        view.with_expiration(b"1"),
        view.without_header(b"CC"),
        view.without_header(b""),
    ] {
        let changed = Properties::parse(&changed).expect("changed properties stay readable");
        assert_eq!(
            (changed.is_persistent(), changed.priority(), changed.user_id()),
            (view.is_persistent(), view.priority(), view.user_id())
        );
    }
    if view.raw_headers().is_none_or(|table| check_table(table).is_ok_and(<[u8]>::is_empty)) {
        let _ = view.headers();
        if let Ok((rest, read)) = parse_properties(raw) {
            assert!(rest.is_empty(), "two readers disagree on the length of properties");
            assert_eq!(read.delivery_mode().map(|mode| mode == 2).unwrap_or(false), view.is_persistent());
            assert_eq!(*read.priority(), view.priority());
            assert_eq!(read.expiration().as_ref().map(|text| text.as_str().as_bytes()), view.expiration());
            assert_eq!(read.user_id().as_ref().map(|text| text.as_str().as_bytes()), view.user_id());
        }
    }
}

/// Content properties, as they come and built to be nearly right.
pub fn properties(data: &[u8]) {
    judge_properties(data);
    let mut choices = Choices::new(data);
    let mut raw = properties_of(&mut choices, false);
    judge_properties(&raw);
    if !raw.is_empty() {
        let at = choices.below(raw.len());
        raw[at] ^= 1 << choices.below(8);
        judge_properties(&raw);
        raw.truncate(choices.below(raw.len() + 1));
        judge_properties(&raw);
    }
}
