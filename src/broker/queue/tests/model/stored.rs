//! Backlogs that are mostly in the store, acks in any order, deletion.

use super::*;

#[test]
fn a_long_backlog_is_mostly_on_disk_and_comes_back_in_order() {
    for persistent in [2, 1, 0] {
        let mut subject = Subject::new(256 << 10, Duration::ZERO, true);
        for _ in 0..60 {
            subject.run(Step::Publish { count: 40, bytes: 3_000, persistent });
            subject.run(Step::Flush);
        }
        let resident = subject.queue.resident_bytes();
        assert!(resident <= 8 * CHUNK_BYTES, "{resident} bytes of 7 MB are in memory");
        assert_eq!(subject.budget.used_bytes(), resident);
        // Half of it through a small prefetch, so that it is read bit by bit.
        subject.run(Step::Consume { prefetch: 7, no_ack: false, priority: 0 });
        for _ in 0..200 {
            subject.run(Step::Settle { which: 0, from: 0, count: 6, requeue: false });
        }
        assert!(subject.queue.resident_bytes() <= 10 * CHUNK_BYTES);
        subject.drain();
        assert!(subject.budget.used_bytes() <= 4 << 10);
    }
}

#[test]
fn acks_in_any_order_over_many_segments_survive_restarts_and_free_the_disk() {
    const SEGMENT: usize = crate::store::SEGMENT_RECORDS as usize;
    let ack = |subject: &mut Subject, from, count| subject.run(Step::Settle { which: 0, from, count, requeue: false });
    let consume = |subject: &mut Subject| subject.run(Step::Consume { prefetch: 0, no_ack: false, priority: 0 });
    let stored = |subject: &Subject| {
        let mut count = 0;
        subject
            .store
            .read_records(subject.queue.id, 0, u64::MAX, usize::MAX, &mut |_, _| count += 1)
            .expect("readable");
        count
    };
    let mut subject = Subject::new(300 << 10, Duration::ZERO, true);
    for _ in 0..20 {
        subject.run(Step::Publish { count: 1_000, bytes: 20, persistent: 2 });
    }
    consume(&mut subject);
    // The second segment as a whole, holes in the first, the end, and a stretch over a border.
    ack(&mut subject, SEGMENT, SEGMENT);
    (0..200).for_each(|at| ack(&mut subject, 3 * at, 1 + at % 3));
    let end = subject.consumers[0].held.len();
    ack(&mut subject, end - 500, 500);
    ack(&mut subject, SEGMENT + 3_000, 2_000);
    subject.run(Step::Restart);
    assert!(stored(&subject) <= 20_000 - SEGMENT, "a segment without a message left keeps its records");
    consume(&mut subject);
    // All but the very first one: it must not hold the disk space of the others.
    ack(&mut subject, 1, 10_000);
    subject.run(Step::Restart);
    consume(&mut subject);
    ack(&mut subject, 1, 20_000);
    subject.run(Step::Crash { then: vec![Step::Settle { which: 0, from: 0, count: 1, requeue: false }] });
    assert_eq!(subject.ready.len(), 1);
    assert!(stored(&subject) <= 2 * SEGMENT, "one message holds {} records on disk", stored(&subject));
    subject.drain();
    subject.run(Step::Restart);
    assert!(stored(&subject) < SEGMENT);
    assert_eq!(subject.queue.counts(), Counts::default());
}

#[test]
fn a_deleted_queue_takes_nothing_hands_out_nothing_and_frees_its_memory() {
    let mut subject = Subject::new(1 << 30, Duration::ZERO, true);
    subject.run(Step::Publish { count: 30, bytes: 1_000, persistent: 2 });
    subject.run(Step::Consume { prefetch: 5, no_ack: false, priority: 0 });
    let DeletedQueue { consumers, ready, .. } = subject
        .queue
        .delete(|counts| {
            assert_eq!((counts.ready, counts.unacked, counts.consumers), (25, 5, 1));
            Ok(())
        })
        .expect("nobody objects")
        .expect("it was there");
    assert_eq!((consumers.len(), ready), (1, 25));
    assert_eq!((subject.queue.counts(), subject.budget.used_bytes()), (Counts::default(), 0));
    let mut effects = Effects::default();
    let held = std::mem::take(&mut subject.consumers[0].held);
    let settled: Vec<SettledRun> = held
        .iter()
        .map(|(given, _)| Settled { seq: given.seq, body_bytes: given.body_bytes, persistent: true }.into())
        .collect();
    subject.queue.settle(Some(subject.consumers[0].id), &settled, Settlement::Failed, &mut effects);
    let names = encode_names(b"", b"q");
    let message =
        Message { names: &names, properties: &[0, 0], body: Body::Inline(b"late"), persistent: true, extension: &[] };
    assert_eq!(subject.queue.publish(&[message], &mut effects), 0);
    assert!(!subject.queue.get(
        &(subject.getter.clone() as Arc<dyn Port>),
        Address { channel: 1, slot: 0 },
        true,
        &mut effects
    ));
    assert_eq!((subject.queue.purge(), subject.queue.counts()), (0, Counts::default()));
    let late = Consumer::new(subject.getter.clone(), Address { channel: 1, slot: 0 }, true, false, 0, 0);
    assert!(matches!(subject.queue.consume(late), Err(BrokerError::QueueNotFound { .. })));
    assert!(subject.queue.delete(|_| Ok(())).expect("nobody objects").is_none());
}
