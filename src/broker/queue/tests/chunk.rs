//! Chunks on their own.

use super::*;
use crate::broker::queue::chunk::Chunk;

#[test]
fn a_chunk_knows_which_of_its_positions_are_absent() {
    let budget = Arc::new(MemoryBudget::new(0));
    let record = |body: &[u8], persistent| {
        let mut bytes = Vec::new();
        record::encode(
            &mut bytes,
            &Message { names: &[0, 0], properties: &[0, 0], body: Body::Inline(body), persistent, extension: &[] },
            0,
        );
        bytes
    };
    let mut chunk = Chunk::new(100, 0, budget.clone());
    assert_eq!((chunk.first(), chunk.end()), (100, 100));
    chunk.append_record(103, &record(b"three", true), None);
    chunk.append_record(104, &record(b"four", false), None);
    chunk.append_record(109, &record(&[7; 20_000], true), None);
    chunk.append_record(110, &record(b"cut", true)[..9], None);
    chunk.cover(115);
    chunk.cover(112);
    assert_eq!((chunk.first(), chunk.end(), chunk.live, chunk.transient), (100, 115, 3, 1));
    for seq in (90..120).filter(|seq| ![103, 104, 109].contains(seq)) {
        assert!(chunk.record(seq).is_none() && chunk.message(seq).is_none() && !chunk.forget(seq), "position {seq}");
    }
    for (seq, body) in [(103, &b"three"[..]), (104, b"four"), (109, &[7; 20_000])] {
        assert_eq!(chunk.message(seq).expect("there").body.as_slice(), body);
    }
    assert_eq!(budget.used_bytes(), chunk.resident_bytes());
    assert!(matches!(chunk.message(109).expect("there").body, Body::Shared(_)), "a large body is shared");
    let before = chunk.resident_bytes();
    assert!(chunk.forget(109) && chunk.forget(104));
    assert_eq!((chunk.live, chunk.transient), (1, 0));
    assert!(chunk.resident_bytes() + 20_000 <= before, "a consumed large body is let go");
    drop(chunk);
    assert_eq!(budget.used_bytes(), 0);
}
