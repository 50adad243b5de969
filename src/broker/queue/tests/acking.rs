//! Acknowledgements from one thread while another publishes.

use super::*;

const RUNS: u64 = 3_000;
const RUN: u64 = 24;

/// A consumer that keeps what it gets until it is acknowledged.
#[derive(Default)]
struct Holder(Mutex<Vec<SettledRun>>);

impl TestPort for Holder {
    fn deliver(&self, delivery: &Delivery<'_>) -> Offer {
        let (body_bytes, persistent) = (delivery.message.body.len() as u32, delivery.message.persistent);
        let one = SettledRun::from(Settled { seq: delivery.seq, body_bytes, persistent });
        let mut held = self.0.lock();
        match held.last_mut() {
            Some(last) if last.joins(&one) => last.count += 1,
            _ => held.push(one),
        }
        Offer::Taken
    }
}

/// Publishes and acknowledges at the same time; every other acknowledgement leaves a gap that the next one closes.
fn publish_and_acknowledge(prefetch: u16, persistent: bool) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let budget = Arc::new(MemoryBudget::new(64 << 20));
    let (store, _) = open(directory.path(), Duration::ZERO, &Arc::default());
    let queue = queue_with(QueueRules::default(), true, store.allocate_queue_id(), &store, &budget, None);
    let holder = Arc::new(Holder::default());
    let to = Address { channel: 1, slot: 0 };
    let consumer = queue.consume(Consumer::new(holder.clone(), to, false, false, 0, prefetch)).expect("nobody else");
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut effects, names) = (Effects::default(), encode_names(b"", b"q"));
            let body = body_of(1, 20);
            let message =
                Message { names: &names, properties: &[0, 0], body: Body::Inline(&body), persistent, extension: &[] };
            for _ in 0..RUNS {
                queue.publish(&[message; RUN as usize], &mut effects);
                effects.deliver_and_wake();
            }
        });
        scope.spawn(|| {
            let (mut effects, mut acknowledged, mut late) = (Effects::default(), 0, Vec::new());
            let started = std::time::Instant::now();
            while acknowledged < RUNS * RUN {
                let mut runs = std::mem::take(&mut *holder.0.lock());
                acknowledged += runs.iter().map(|run| u64::from(run.count)).sum::<u64>();
                runs.append(&mut late);
                if let Some(first) = runs.first_mut().filter(|first| first.count > 2) {
                    late.push(SettledRun { count: 1, ..*first });
                    *first = SettledRun { seq: first.seq + 1, count: first.count - 1, ..*first };
                }
                queue.acknowledge(Some(consumer), &runs, &mut effects);
                effects.deliver_and_wake();
                assert!(started.elapsed() < Duration::from_secs(60), "{acknowledged} delivered: {:?}", queue.counts());
            }
            queue.acknowledge(Some(consumer), &late, &mut effects);
        });
    });
    let expected = Counts { consumers: 1, ..Counts::default() };
    assert_eq!(queue.counts(), expected, "prefetch {prefetch}");
    assert!(!queue.postbox.lock().is_open && queue.postbox.lock().runs.is_empty());
    assert_eq!(
        queue.state.lock().lanes.only().map(|lane| (lane.log.head(), lane.log.next())),
        Some((RUNS * RUN, RUNS * RUN))
    );
    drop(queue);
    store.shutdown().expect("a clean end");
}

#[test]
fn acknowledgements_that_meet_a_publisher_are_not_lost() {
    for prefetch in [0, 10, 500] {
        publish_and_acknowledge(prefetch, false);
    }
    publish_and_acknowledge(100, true);
}
