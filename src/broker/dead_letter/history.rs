//! The header `x-death`: an array of tables, one for each queue and reason, the latest first.

use super::NewDeath;
use crate::{
    broker::{extension::Extension, message::Message},
    model::{
        headers::{write_counted, write_long_string},
        properties::{Properties, raw_elements, raw_entries, raw_entry},
    },
};

/// Bytes of `x-death` (1 MiB, thousands of deaths), so that properties stay within what a record can hold however long a
/// message wanders.
pub const MAX_HISTORY_BYTES: usize = 1 << 20;

/// One entry of the history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeathRecord<'a> {
    pub queue: &'a [u8],
    pub reason: &'a [u8],
    /// How often the message died there for this reason.
    pub count: u64,
    /// The table's bytes, with its length.
    table: &'a [u8],
    /// Where the count stands in them.
    count_at: usize,
}

/// The deaths of a message, the latest first: those this broker recorded, not what a client says.
pub fn deaths<'a>(message: &Message<'a>) -> impl Iterator<Item = DeathRecord<'a>> + use<'a> {
    let died = Extension::parse(message.extension).died;
    let headers = Properties::parse(message.properties).ok().filter(|_| died).and_then(|view| view.raw_headers());
    let entry = headers.and_then(|table| raw_entry(table, b"x-death")).filter(|entry| entry.tag == b'A');
    let elements = entry.into_iter().flat_map(|entry| raw_elements(entry.value()));
    elements.filter(|element| element.0 == b'F').filter_map(|element| read(element.1))
}

fn read(table: &[u8]) -> Option<DeathRecord<'_>> {
    let (mut queue, mut reason, mut count_at) = (None, None, None);
    for entry in raw_entries(table) {
        match (entry.key, entry.tag) {
            (b"count", b'l') => count_at = Some(entry.value().as_ptr() as usize - table.as_ptr() as usize),
            (b"reason", b'S') => reason = entry.value().get(4..),
            (b"queue", b'S') => {
                queue = entry.value().get(4..);
                break; // written behind the others
            }
            _ => {}
        }
    }
    let count_at = count_at?;
    let count = u64::from_be_bytes(*table.get(count_at..)?.first_chunk()?);
    Some(DeathRecord { queue: queue?, reason: reason?, count, table, count_at })
}

/// Appends the value of `x-death` (with its tag) after a death: the entry of the same queue and reason, if there is one,
/// comes to the front and counts one more; its other fields keep what they were at the first such death.
pub(super) fn push_history(deaths: &[DeathRecord<'_>], new: &NewDeath<'_>, out: &mut Vec<u8>) {
    let (queue, reason) = (new.death.queue.as_bytes(), new.death.reason.as_str().as_bytes());
    let is_same = |record: &&DeathRecord<'_>| record.queue == queue && record.reason == reason;
    let same = deaths.iter().find(is_same);
    out.push(b'A');
    write_counted(out, |out| {
        match same {
            Some(record) => {
                let count_at = out.len() + 1 + record.count_at;
                push_table(record.table, out);
                out[count_at..count_at + 8].copy_from_slice(&record.count.saturating_add(1).to_be_bytes());
            }
            None => push_new(new, out),
        }
        for record in deaths.iter().filter(|record| !is_same(record)) {
            if out.len() + record.table.len() > MAX_HISTORY_BYTES {
                break;
            }
            push_table(record.table, out);
        }
    });
}

fn push_table(table: &[u8], out: &mut Vec<u8>) {
    out.push(b'F');
    out.extend_from_slice(table);
}

fn push_new(new: &NewDeath<'_>, out: &mut Vec<u8>) {
    out.push(b'F');
    write_counted(out, |out| {
        if let Some(expiration) = new.expiration {
            push_key(b"original-expiration", out);
            write_long_string(expiration, out);
        }
        push_key(b"count", out);
        out.push(b'l');
        out.extend_from_slice(&1u64.to_be_bytes());
        push_key(b"reason", out);
        write_long_string(new.death.reason.as_str().as_bytes(), out);
        push_key(b"queue", out);
        write_long_string(new.death.queue.as_bytes(), out);
        push_key(b"time", out);
        out.push(b'T');
        out.extend_from_slice(&(new.death.at_unix_ms / 1000).to_be_bytes());
        push_key(b"exchange", out);
        write_long_string(new.exchange, out);
        push_key(b"routing-keys", out);
        out.push(b'A');
        write_counted(out, |out| new.keys.iter().for_each(|key| write_long_string(key, out)));
    });
}

fn push_key(key: &[u8], out: &mut Vec<u8>) {
    out.push(key.len() as u8);
    out.extend_from_slice(key);
}
