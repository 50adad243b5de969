//! Column families and the keys in them. All numbers are big-endian, so that key order is number order.
//!
//! | family     | key                                   | value                                            |
//! |------------|---------------------------------------|--------------------------------------------------|
//! | `meta`     | 0x00 and a name                       | the store's own records: format, reserved ids    |
//! | `meta`     | 0x01 and the definition's key         | the definition, see [`recovery`](super::recovery) |
//! | `meta_copy`| as `meta`                             | as `meta`: it is written twice, always together  |
//! | `log`      | queue id, position of the first record| a run of records, see [`run`](super::run)        |
//! | `state`    | queue id                              | see [`recovery`](super::recovery)                |
//! | `consumed` | queue id, segment                     | the segment's consumed ranges, see [`recovery`](super::recovery) |
//! | `notes`    | owner id and the note's key           | the note, see [`notes`](super::notes)            |
//! | `bodies`   | body id                               | a body that records have in common               |
//! | `body_references` | 0x00 and body id               | how many records refer to it, see [`bodies`](super::bodies) |
//! | `body_references` | 0x01, queue id and position    | the body that a record refers to                 |
//! | `body_references` | 0x02 and queue id              | where its references are to go, up to            |
//!
//! Records that were paged out and need not survive have a database of their own, see [`pages`](super::pages); its keys
//! and values are those of `log`.

use super::{QueueId, QueueSeq};

/// The names of the column families. `default` exists because RocksDB wants it, and is empty.
pub(super) const META: &str = "meta";
pub(super) const META_COPY: &str = "meta_copy";
pub(super) const LOG: &str = "log";
pub(super) const STATE: &str = "state";
pub(super) const CONSUMED: &str = "consumed";
pub(super) const NOTES: &str = "notes";
pub(super) const BODIES: &str = "bodies";
pub(super) const BODY_REFERENCES: &str = "body_references";

/// `meta`: the version of the whole layout, as 8 bytes.
pub(super) const FORMAT_KEY: &[u8] = b"\x00format";
/// `meta`: every queue id below this number (8 bytes) may have been given out.
pub(super) const RESERVED_IDS_KEY: &[u8] = b"\x00reserved_queue_ids";
/// `meta`: no body has this id (8 bytes), or one beyond.
pub(super) const NEXT_BODY_ID_KEY: &[u8] = b"\x00next_body_id";
/// `meta`: what stands before a definition's own key.
pub(super) const DEFINITION_PREFIX: u8 = 1;

/// Key of a run (`log`, `pages`), or of a segment's consumed ranges (`consumed`, with the segment as `number`).
pub(super) fn numbered(queue: QueueId, number: u64) -> [u8; 16] {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&queue.0.to_be_bytes());
    key[8..].copy_from_slice(&number.to_be_bytes());
    key
}

/// The inverse of [`numbered`], or nothing if `key` was not made by it.
pub(super) fn parse_numbered(key: &[u8]) -> Option<(QueueId, u64)> {
    let (queue, number) = key.split_at_checked(8)?;
    Some((parse_queue(queue)?, u64::from_be_bytes(number.try_into().ok()?)))
}

/// Key of a queue's state record, and the first possible key of everything the queue has.
pub(super) fn queue(queue: QueueId) -> [u8; 8] {
    queue.0.to_be_bytes()
}

/// The inverse of [`queue`].
pub(super) fn parse_queue(key: &[u8]) -> Option<QueueId> {
    Some(QueueId(u64::from_be_bytes(key.try_into().ok()?)))
}

/// The first key that is past everything the queue has. Ids never get near `u64::MAX`.
pub(super) fn after_queue(queue: QueueId) -> [u8; 8] {
    queue.0.saturating_add(1).to_be_bytes()
}

/// What stands before a note's own key.
pub(super) const OWNER_BYTES: usize = 8;

/// Key of a note.
pub(super) fn note(owner: QueueId, key: &[u8]) -> Vec<u8> {
    let mut owned = Vec::with_capacity(OWNER_BYTES + key.len());
    owned.extend_from_slice(&owner.0.to_be_bytes());
    owned.extend_from_slice(key);
    owned
}

/// Key of a body.
pub(super) fn body(id: u64) -> [u8; 8] {
    id.to_be_bytes()
}

const BODY_COUNT_PREFIX: u8 = 0;
const BODY_REFERENCE_PREFIX: u8 = 1;
const BODY_RELEASE_PREFIX: u8 = 2;

/// Key of the number of references to a body.
pub(super) fn body_count(id: u64) -> [u8; 9] {
    let mut key = [BODY_COUNT_PREFIX; 9];
    key[1..].copy_from_slice(&id.to_be_bytes());
    key
}

/// The inverse of [`body`], or nothing if `key` was not made by it.
pub(super) fn parse_body(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.try_into().ok()?))
}

/// The inverse of [`body_count`], or nothing if `key` was not made by it.
pub(super) fn parse_body_count(key: &[u8]) -> Option<u64> {
    match key.split_first()? {
        (&BODY_COUNT_PREFIX, id) => parse_body(id),
        _ => None,
    }
}

/// Key of the reference that a record has to a body.
pub(super) fn body_reference(queue: QueueId, seq: QueueSeq) -> [u8; 17] {
    let mut key = [BODY_REFERENCE_PREFIX; 17];
    key[1..].copy_from_slice(&numbered(queue, seq));
    key
}

/// The inverse of [`body_reference`], or nothing if `key` was not made by it.
pub(super) fn parse_body_reference(key: &[u8]) -> Option<(QueueId, QueueSeq)> {
    match key.split_first()? {
        (&BODY_REFERENCE_PREFIX, key) if key.len() == 16 => parse_numbered(key),
        _ => None,
    }
}

/// The first key that is past all references of a queue.
pub(super) fn after_body_references(queue: QueueId) -> [u8; 9] {
    let mut key = [BODY_REFERENCE_PREFIX; 9];
    key[1..].copy_from_slice(&after_queue(queue));
    key
}

/// Key of what is left to do of letting go of a queue's references.
pub(super) fn body_release(queue: QueueId) -> [u8; 9] {
    let mut key = [BODY_RELEASE_PREFIX; 9];
    key[1..].copy_from_slice(&queue.0.to_be_bytes());
    key
}

/// The inverse of [`body_release`], or nothing if `key` was not made by it.
pub(super) fn parse_body_release(key: &[u8]) -> Option<QueueId> {
    match key.split_first()? {
        (&BODY_RELEASE_PREFIX, queue) => parse_queue(queue),
        _ => None,
    }
}

/// Key of a definition.
pub(super) fn definition(key: &[u8]) -> Vec<u8> {
    let mut prefixed = Vec::with_capacity(key.len() + 1);
    prefixed.push(DEFINITION_PREFIX);
    prefixed.extend_from_slice(key);
    prefixed
}

/// The first position of the segment that holds `seq`.
pub(super) fn segment_start(seq: QueueSeq) -> QueueSeq {
    seq - seq % super::SEGMENT_RECORDS
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_sort_by_queue_then_position_and_stay_within_their_queue() {
        let keys: Vec<_> =
            [(1, 0), (1, 255), (1, 256), (2, 0), (256, 1)].map(|(id, seq)| numbered(QueueId(id), seq)).into();
        assert!(keys.is_sorted());
        assert!(queue(QueueId(1)).as_slice() <= keys[0].as_slice());
        assert!(after_queue(QueueId(1)).as_slice() <= keys[3].as_slice());
        assert!(keys[2].as_slice() < after_queue(QueueId(1)).as_slice());
        assert!(note(QueueId(1), b"").as_slice() >= queue(QueueId(1)).as_slice());
        assert!(note(QueueId(1), &[0xff; 20]).as_slice() < after_queue(QueueId(1)).as_slice());
        assert_eq!(parse_numbered(&keys[4]), Some((QueueId(256), 1)));
        let references = [(1, 0), (1, u64::MAX), (2, 0)].map(|(id, seq)| body_reference(QueueId(id), seq));
        assert!(references.is_sorted() && body_count(u64::MAX).as_slice() < references[0].as_slice());
        assert!(
            (references[1].as_slice()..=references[2].as_slice())
                .contains(&after_body_references(QueueId(1)).as_slice())
        );
        assert_eq!(parse_body_reference(&references[1]), Some((QueueId(1), u64::MAX)));
        assert_eq!((parse_body_reference(&body_count(1)), parse_body_count(&body_count(1))), (None, Some(1)));
        assert_eq!((parse_body_count(&references[0]), parse_body(&body(9))), (None, Some(9)));
        assert!(after_body_references(QueueId(u64::MAX)).as_slice() < body_release(QueueId(0)).as_slice());
        assert_eq!(parse_body_release(&body_release(QueueId(3))), Some(QueueId(3)));
        assert_eq!(parse_numbered(b"short"), None);
        assert_eq!(parse_numbered(&[0; 17]), None);
    }
}
