//! The properties in a message's content header.

use super::fields::{self, Field};
use super::wire::Arguments;

const FLAG_HEADERS: u16 = 1 << 13;
const FLAG_DELIVERY_MODE: u16 = 1 << 12;
const DELIVERY_MODE_PERSISTENT: u8 = 2;
const MAX_SHORT_STRING_BYTES: usize = 255;

/// How a property is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    ShortString,
    Octet,
    /// Seconds since 1970.
    Timestamp,
}

/// What `--property` takes; the two others, headers and delivery mode, have options of their own.
const KNOWN: [(&str, u16, Form); 11] = [
    ("content_type", 1 << 15, Form::ShortString),
    ("content_encoding", 1 << 14, Form::ShortString),
    ("priority", 1 << 11, Form::Octet),
    ("correlation_id", 1 << 10, Form::ShortString),
    ("reply_to", 1 << 9, Form::ShortString),
    ("expiration", 1 << 8, Form::ShortString),
    ("message_id", 1 << 7, Form::ShortString),
    ("timestamp", 1 << 6, Form::Timestamp),
    ("type", 1 << 5, Form::ShortString),
    ("user_id", 1 << 4, Form::ShortString),
    ("app_id", 1 << 3, Form::ShortString),
];

/// One property but for headers and delivery mode, encoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Property {
    flag: u16,
    encoded: Vec<u8>,
}

impl Property {
    /// Reads `name=value`; `content_type`, `content-type` and `contentType` are the same name.
    ///
    /// # Errors
    /// What is wrong with it, for clap to show beside the option's name.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let (name, value) = fields::split(text)?;
        let plain = |name: &str| name.replace(['_', '-'], "").to_ascii_lowercase();
        match plain(name).as_str() {
            "deliverymode" => return Err("delivery_mode is set by --persistent".to_owned()),
            "headers" => return Err("headers are set by --header key=value".to_owned()),
            _ => {}
        }
        let (_, flag, form) = KNOWN.iter().find(|(known, ..)| plain(known) == plain(name)).ok_or_else(|| {
            let names = KNOWN.map(|(name, ..)| name).join(", ");
            format!("'{name}' is none of {names}; other keys are headers, set by --header")
        })?;
        let encoded = match form {
            Form::ShortString if value.len() > MAX_SHORT_STRING_BYTES => {
                return Err(format!("{name} holds up to {MAX_SHORT_STRING_BYTES} bytes"));
            }
            Form::ShortString => Arguments::new().short_string(value),
            Form::Octet => Arguments::new().octet(value.parse().map_err(|_| format!("{name} is 0 to 255"))?),
            Form::Timestamp => {
                Arguments::new().long_long(value.parse().map_err(|_| format!("{name} is seconds since 1970"))?)
            }
        };
        Ok(Self { flag: *flag, encoded: encoded.as_bytes().to_vec() })
    }

    /// Whether both set the same property.
    pub(super) fn same_name(&self, other: &Self) -> bool {
        self.flag == other.flag
    }
}

/// All properties of a message, as they stand in its content header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Properties {
    /// Flags and values.
    encoded: Vec<u8>,
}

impl Properties {
    /// Puts them in the protocol's order, whatever the order given.
    pub(super) fn new(persistent: bool, properties: &[Property], headers: &[Field]) -> Self {
        let mut all: Vec<(u16, Vec<u8>)> =
            properties.iter().map(|property| (property.flag, property.encoded.clone())).collect();
        if persistent {
            all.push((FLAG_DELIVERY_MODE, vec![DELIVERY_MODE_PERSISTENT]));
        }
        if !headers.is_empty() {
            let table = fields::table(Arguments::new(), headers);
            all.push((FLAG_HEADERS, table.as_bytes().to_vec()));
        }
        all.sort_by_key(|(flag, _)| std::cmp::Reverse(*flag));
        let flags = all.iter().fold(0, |flags: u16, (flag, _)| flags | flag);
        let values = all.into_iter().flat_map(|(_, value)| value);
        Self { encoded: flags.to_be_bytes().into_iter().chain(values).collect() }
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.encoded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn property(text: &str) -> Property {
        Property::parse(text).expect(text)
    }

    #[test]
    fn properties_are_in_the_protocols_order_behind_their_flags() {
        let given = [property("expiration=60000"), property("priority=5"), property("contentType=a/b")];
        let headers = [Field::parse("k=true").expect("a pair")];
        let expected = [
            &[0b1011_1001, 0][..],
            &[3, b'a', b'/', b'b'],
            &[0, 0, 0, 4, 1, b'k', b't', 1],
            &[2],
            &[5],
            &[5, b'6', b'0', b'0', b'0', b'0'],
        ];
        assert_eq!(Properties::new(true, &given, &headers).as_bytes(), expected.concat());
        assert_eq!(Properties::new(false, &[], &[]).as_bytes(), [0, 0]);
    }

    #[test]
    fn names_may_be_written_as_other_tools_write_them() {
        assert_eq!(property("content-type=x"), property("content_type=x"));
        assert_eq!(property("messageId=x"), property("message_id=x"));
        assert!(property("app_id=x").same_name(&property("appId=y")));
    }

    #[test]
    fn what_cannot_be_a_property_is_refused_with_a_way_out() {
        for (text, reason) in [
            ("colour=red", "--header"),
            ("delivery_mode=2", "--persistent"),
            ("headers=x", "--header"),
            ("priority=300", "0 to 255"),
            ("timestamp=now", "seconds"),
            ("priority", "key=value"),
        ] {
            let refusal = Property::parse(text).expect_err(text);
            assert!(refusal.contains(reason), "{text}: {refusal}");
        }
    }
}
