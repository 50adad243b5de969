//! Tables and methods.

use amq_protocol::types::parsing::parse_field_table;
use leveret::{
    model::properties::raw_entries,
    wire::{
        hot::{GetView, HeaderView, PublishView, SettleView, split_names},
        limits::{check_method_table, check_table},
        method,
    },
};

use super::{Choices, traffic::class};

/// A raw table whose lengths, tags and nesting need not be right.
fn push_raw_table(out: &mut Vec<u8>, choices: &mut Choices<'_>, depth: usize, keyed: bool) {
    let start = out.len();
    out.extend_from_slice(&[0; 4]);
    let entries = if depth == 0 { choices.below(3) } else { 1 + choices.below(2) };
    for _ in 0..entries {
        if keyed {
            let key = choices.bytes(6);
            out.push(key.len() as u8);
            out.extend_from_slice(key);
        }
        match choices.below(8) {
            0..3 if depth > 0 => {
                out.push(b'F');
                push_raw_table(out, choices, depth - 1, true);
            }
            3 if depth > 0 => {
                out.push(b'A');
                push_raw_table(out, choices, depth - 1, false);
            }
            4 => {
                out.push(choices.byte());
                out.extend_from_slice(choices.bytes(12));
            }
            _ => {
                let text = choices.bytes(8);
                out.push(b'S');
                out.extend_from_slice(&(text.len() as u32).to_be_bytes());
                out.extend_from_slice(text);
            }
        }
    }
    let mut len = (out.len() - start - 4) as u32;
    if choices.one_in(40) {
        len = len.wrapping_add(choices.number() as u32 >> choices.below(32));
    }
    out[start..start + 4].copy_from_slice(&len.to_be_bytes());
}

fn judge_table(bytes: &[u8]) {
    if let Ok(rest) = check_table(bytes) {
        // What passes the bounds is safe to hand on, whatever comes of it.
        if let Ok((left, _)) = parse_field_table(bytes) {
            assert_eq!(left.len(), rest.len(), "two readers disagree on the length of a table");
        }
    }
    let _ = raw_entries(bytes).count();
}

fn judge_method(payload: &[u8]) {
    let _ = check_method_table(payload);
    if let Ok(class) = method::parse(payload) {
        let written = method::payload(&class);
        assert_eq!(
            method::parse(&written).as_ref().map(method::payload),
            Ok(written),
            "a method changes when it is written"
        );
    }
    let _ = (SettleView::read(payload), GetView::read(payload), HeaderView::read(payload));
    if let Ok(publish) = PublishView::read(payload) {
        let (exchange, key) = split_names(publish.names);
        assert_eq!(publish.names.len(), exchange.len() + key.len() + 2);
    }
}

/// Field tables and method payloads: as they come, and built to be nearly right.
pub fn tables(data: &[u8]) {
    judge_table(data);
    judge_method(data);
    let mut choices = Choices::new(data);
    let mut bytes = Vec::new();
    let depth = choices.below(48);
    push_raw_table(&mut bytes, &mut choices, depth, true);
    judge_table(&bytes);
    for prefix in [
        &[0, 10, 0, 11][..],
        &[0, 50, 0, 10, 0, 0, 1, b'q', 0],
        &[0, 60, 0, 20, 0, 0, 0, 0, 0],
        &[0, 40, 0, 10, 0, 0, 1, b'x', 1, b'y', 0],
    ] {
        judge_method(&[prefix, &bytes].concat());
        judge_method(&[prefix, &bytes, &[0, 0, 0]].concat());
    }
    let mut payload = method::payload(&class(&mut choices, false));
    judge_method(&payload);
    if !payload.is_empty() {
        let at = choices.below(payload.len());
        payload[at] ^= 1 << choices.below(8);
        judge_method(&payload);
        payload.truncate(choices.below(payload.len() + 1));
        judge_method(&payload);
    }
}
