//! Bounds on what a peer's bytes may cost, checked before `amq-protocol` (which recurses per nested table) sees them.

use super::hot::{Undecodable, long_bytes};

/// Tables and arrays inside one another; RabbitMQ's clients use two or three.
pub const MAX_TABLE_DEPTH: usize = 32;

/// Why a field table is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableError {
    /// The table ends after the input.
    Truncated,
    Malformed,
    TooDeep,
}

impl From<Undecodable> for TableError {
    fn from(_: Undecodable) -> Self {
        TableError::Malformed
    }
}

/// Checks a field table (with its `u32` length) at the start of `input`; returns what follows it.
///
/// Iterative: the work is linear in the bytes, the stack constant. A table passes when all its keys and values are
/// whole, every type tag is known, and nesting stays within [`MAX_TABLE_DEPTH`].
pub fn check_table(input: &[u8]) -> Result<&[u8], TableError> {
    let (rest, table) = long_bytes(input).map_err(|_| TableError::Truncated)?;
    let mut open: [(&[u8], bool); MAX_TABLE_DEPTH] = [(&[], false); MAX_TABLE_DEPTH];
    open[0] = (table, true);
    let mut depth = 1;
    while depth > 0 {
        let (bytes, keyed) = open[depth - 1];
        if bytes.is_empty() {
            depth -= 1;
            continue;
        }
        let value = if keyed { skip_short_string(bytes)? } else { bytes };
        let (&tag, value) = value.split_first().ok_or(TableError::Malformed)?;
        if matches!(tag, b'F' | b'A') {
            let (after, nested) = long_bytes(value)?;
            open[depth - 1].0 = after;
            if depth == MAX_TABLE_DEPTH {
                return Err(TableError::TooDeep);
            }
            open[depth] = (nested, tag == b'F');
            depth += 1;
        } else {
            open[depth - 1].0 = skip_scalar(tag, value)?;
        }
    }
    Ok(rest)
}

/// Skips one short string.
pub fn skip_short_string(bytes: &[u8]) -> Result<&[u8], TableError> {
    let (&len, rest) = bytes.split_first().ok_or(TableError::Malformed)?;
    rest.get(len as usize..).ok_or(TableError::Malformed)
}

fn skip_scalar(tag: u8, value: &[u8]) -> Result<&[u8], TableError> {
    let width = match tag {
        b't' | b'b' | b'B' => 1,
        b's' | b'u' | b'U' => 2,
        b'I' | b'i' | b'f' => 4,
        b'l' | b'L' | b'd' | b'T' => 8,
        b'D' => 5,
        b'V' => 0,
        b'S' | b'x' => return Ok(long_bytes(value)?.0),
        _ => return Err(TableError::Malformed),
    };
    value.get(width..).ok_or(TableError::Malformed)
}

/// Where the field tables stand in the arguments of a method: short strings, fixed bytes and long strings before it.
enum Skip {
    Fixed(usize),
    Short,
    Table,
}

fn table_layout(id: u32) -> &'static [Skip] {
    use Skip::{Fixed, Short, Table};
    const fn method(class: u32, method: u32) -> u32 {
        class << 16 | method
    }
    const CONNECTION_START_OK: u32 = method(10, 11);
    const EXCHANGE_DECLARE: u32 = method(40, 10);
    const EXCHANGE_BIND: u32 = method(40, 30);
    const EXCHANGE_UNBIND: u32 = method(40, 40);
    const QUEUE_DECLARE: u32 = method(50, 10);
    const QUEUE_BIND: u32 = method(50, 20);
    const QUEUE_UNBIND: u32 = method(50, 50);
    const BASIC_CONSUME: u32 = method(60, 20);
    match id {
        CONNECTION_START_OK => &[Table],
        EXCHANGE_DECLARE => &[Fixed(2), Short, Short, Fixed(1), Table],
        EXCHANGE_BIND | EXCHANGE_UNBIND | QUEUE_BIND => &[Fixed(2), Short, Short, Short, Fixed(1), Table],
        QUEUE_UNBIND => &[Fixed(2), Short, Short, Short, Table],
        QUEUE_DECLARE => &[Fixed(2), Short, Fixed(1), Table],
        BASIC_CONSUME => &[Fixed(2), Short, Short, Fixed(1), Table],
        _ => &[],
    }
}

/// Checks the field table a method payload carries, if it carries one.
///
/// # Errors
/// [`TableError`] when the table is malformed or nested too deeply. Arguments too short to reach the table pass: the
/// parser refuses them itself.
pub fn check_method_table(payload: &[u8]) -> Result<(), TableError> {
    let Some(id) = super::hot::method_id(payload) else { return Ok(()) };
    let mut rest = &payload[4..];
    for step in table_layout(id) {
        rest = match step {
            Skip::Fixed(bytes) => match rest.get(*bytes..) {
                Some(rest) => rest,
                None => return Ok(()),
            },
            Skip::Short => match skip_short_string(rest) {
                Ok(rest) => rest,
                Err(_) => return Ok(()),
            },
            Skip::Table => check_table(rest)?,
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use amq_protocol::types::{AMQPValue, FieldTable, generation::gen_field_table};
    use proptest::prelude::*;

    fn nested(depth: usize) -> Vec<u8> {
        let mut table = Vec::new();
        for level in 0..depth {
            let mut outer = Vec::new();
            if level > 0 {
                outer.extend([1, b'k', b'F']);
            }
            outer.extend(&table);
            table = (outer.len() as u32).to_be_bytes().into_iter().chain(outer).collect();
        }
        table
    }

    #[test]
    fn nesting_is_bounded_without_recursion() {
        assert!(check_table(&nested(MAX_TABLE_DEPTH)).unwrap().is_empty());
        assert_eq!(check_table(&nested(MAX_TABLE_DEPTH + 1)), Err(TableError::TooDeep));
        assert_eq!(check_table(&nested(20_000)), Err(TableError::TooDeep));
    }

    fn value() -> impl Strategy<Value = AMQPValue> {
        let leaf = prop_oneof![
            any::<bool>().prop_map(AMQPValue::Boolean),
            any::<i8>().prop_map(AMQPValue::ShortShortInt),
            any::<i64>().prop_map(AMQPValue::LongLongInt),
            any::<u32>().prop_map(AMQPValue::LongUInt),
            any::<f64>().prop_map(AMQPValue::Double),
            "[ -~]{0,20}".prop_map(|text| AMQPValue::LongString(text.as_str().into())),
            any::<u64>().prop_map(AMQPValue::Timestamp),
            Just(AMQPValue::Void),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(|items| AMQPValue::FieldArray(items.into())),
                proptest::collection::btree_map("[a-z]{1,8}", inner, 0..4)
                    .prop_map(|map| AMQPValue::FieldTable(table(map))),
            ]
        })
    }

    fn table(map: std::collections::BTreeMap<String, AMQPValue>) -> FieldTable {
        map.into_iter().map(|(key, value)| (key.into(), value)).collect::<std::collections::BTreeMap<_, _>>().into()
    }

    proptest! {
        #[test]
        fn what_amq_protocol_writes_passes_and_every_cut_fails(map in proptest::collection::btree_map("[a-z]{1,8}", value(), 0..5)) {
            let table = table(map);
            let written = gen_field_table(&table)(Vec::new().into()).unwrap().into_inner().0;
            prop_assert_eq!(check_table(&written).map(<[u8]>::len), Ok(0));
            for cut in 0..written.len() {
                prop_assert_eq!(check_table(&written[..cut]), Err(TableError::Truncated));
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = check_table(&bytes);
            let _ = check_method_table(&bytes);
        }
    }
}
