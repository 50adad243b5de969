//! Counts of failed deliveries over restarts and changes of the rules.

use super::*;
use crate::broker::rules::Retry;

fn retrying(initial_ms: u64) -> QueueRules {
    let retry = Retry { max: 5, initial_ms, multiplier: 1.0, max_delay_ms: initial_ms, jitter: 0.0 };
    QueueRules { retry: Some(retry), ..QueueRules::default() }
}

fn commit(store: &Store, queue: &Arc<Queue>) {
    let round = queue.mark_dirty(&mut queue.open());
    futures_lite::future::block_on(store.durable(round)).expect("a committed round");
}

/// Gets the next message.
fn get(queue: &Arc<Queue>, events: &EventLog) -> Option<SettledRun> {
    let port: Arc<dyn Port> = FakePort::new(events);
    events.lock().clear();
    queue.get(&port, Address { channel: 1, slot: 0 }, false, &mut Effects::default());
    match events.lock().first() {
        Some(Event::Got { given, .. }) => {
            Some(Settled { seq: given.seq, body_bytes: given.body_bytes, persistent: true }.into())
        }
        _ => None,
    }
}

#[test]
fn counts_and_waits_survive_a_restart_without_retry_and_hold_when_it_comes_back() {
    let (directory, events) = (tempfile::tempdir().expect("a temporary directory"), EventLog::default());
    let (failing, budget) = (Arc::<Failing>::default(), Arc::new(MemoryBudget::new(1 << 20)));
    let (store, _) = open(directory.path(), Duration::ZERO, &failing);
    let id = store.allocate_queue_id();
    let queue = queue_with(retrying(0), true, id, &store, &budget, None);
    let (mut effects, names) = (Effects::default(), encode_names(b"", b"q"));
    for id in 0..4 {
        let body = body_of(id, 20);
        let body = Body::Inline(&body);
        let message = Message { names: &names, properties: &[0, 0], body, persistent: true, extension: &[] };
        queue.publish(&[message], &mut effects);
    }
    // Three failures: the first message is ready again, the second will be in an hour, the third is acked later.
    let held: Vec<SettledRun> = (0..3).map(|_| get(&queue, &events).expect("a message")).collect();
    queue.settle(None, &held[..1], Settlement::Failed, &mut effects);
    queue.settle(None, &held[2..], Settlement::Failed, &mut effects);
    queue.apply_rules(retrying(3_600_000), &mut effects);
    queue.settle(None, &held[1..2], Settlement::Failed, &mut effects);
    commit(&store, &queue);
    drop(queue);
    store.shutdown().expect("a clean end");

    let (store, recovered) = open(directory.path(), Duration::ZERO, &failing);
    let record = recovered.states.iter().find(|(queue, _)| *queue == id).map(|(_, record)| *record);
    let queue = queue_with(QueueRules::default(), true, id, &store, &budget, record);
    assert_eq!(get(&queue, &events).map(|got| got.seq), Some(0));
    assert_eq!(queue.counts().waiting, 1, "who waits goes on waiting");
    let third = get(&queue, &events).expect("the one after it");
    assert_eq!(third.seq, 2);
    queue.settle(None, &[third], Settlement::Acked, &mut effects);
    queue.apply_rules(retrying(3_600_000), &mut effects);
    let failures: Vec<u32> = (0..4).map(|seq| queue.open().attempts.failures(seq)).collect();
    assert_eq!(failures, [1, 1, 0, 0]);
    commit(&store, &queue);
    let stored = crate::broker::queue::attempts::Attempts::recover(id, &store).expect("readable");
    assert_eq!((0..4).map(|seq| stored.failures(seq)).collect::<Vec<_>>(), [1, 1, 0, 0]);
    store.shutdown().expect("a clean end");
}
