//! What a message offers for routing.

use std::cell::OnceCell;

use amq_protocol::types::FieldTable;

use crate::model::properties::Properties;

/// A message's properties as routing sees them: nothing is decoded before an exchange asks for it, and the header table
/// is decoded once, however many exchanges ask.
#[derive(Clone, Debug, Default)]
pub struct Attributes<'a> {
    properties: Option<Properties<'a>>,
    /// Headers that were decoded before.
    headers: Option<&'a FieldTable>,
    decoded: OnceCell<Option<FieldTable>>,
}

impl<'a> Attributes<'a> {
    /// Those of a message without properties.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// Those of a message. The caller has bounded the nesting of its header table.
    #[must_use]
    pub fn of(properties: Properties<'a>) -> Self {
        Self { properties: Some(properties), ..Self::default() }
    }

    /// Those of a message that has headers and no other property.
    #[must_use]
    pub fn with_headers(headers: &'a FieldTable) -> Self {
        Self { headers: Some(headers), ..Self::default() }
    }

    /// The header table, if there is one that can be decoded.
    pub fn headers(&self) -> Option<&FieldTable> {
        self.headers.or_else(|| self.decoded.get_or_init(|| self.properties?.headers()).as_ref())
    }

    /// The properties other than headers.
    pub fn properties(&self) -> Option<&Properties<'a>> {
        self.properties.as_ref()
    }
}

/// A message on its way: its routing key with those of CC and BCC behind it, and its properties.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    pub keys: &'a [&'a [u8]],
    pub attributes: &'a Attributes<'a>,
}

impl<'a> Subject<'a> {
    /// The routing key without those of CC and BCC.
    pub fn routing_key(&self) -> &'a [u8] {
        self.keys.first().copied().unwrap_or_default()
    }

    pub fn headers(&self) -> Option<&'a FieldTable> {
        self.attributes.headers()
    }
}

#[cfg(test)]
mod tests {
    use amq_protocol::{
        frame::WriteContext,
        protocol::{BasicProperties, basic::gen_properties},
        types::AMQPValue,
    };

    use super::*;

    #[test]
    fn headers_are_decoded_from_the_properties_or_given() {
        let mut table = FieldTable::default();
        table.insert("a".into(), AMQPValue::LongInt(1));
        let properties = BasicProperties::default().with_headers(table.clone()).with_message_id("m".into());
        let raw = gen_properties(&properties)(WriteContext::from(Vec::new())).unwrap().into_inner().0;
        let attributes = Attributes::of(Properties::parse(&raw).unwrap());
        assert_eq!(attributes.headers(), Some(&table));
        assert_eq!(attributes.headers(), Some(&table));
        assert_eq!(attributes.properties().and_then(Properties::message_id), Some(&b"m"[..]));
        assert_eq!(Attributes::with_headers(&table).headers(), Some(&table));
        assert_eq!(Attributes::none().headers(), None);
        assert_eq!(Attributes::of(Properties::parse(&[0, 0]).unwrap()).headers(), None);
    }
}
