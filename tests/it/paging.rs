//! Backlogs beyond the memory budget: the middle leaves memory and comes back, in order and whole.

use crate::support::{
    Peer, TestBroker, eventually,
    peer::{durable, transient},
    within,
};

const BUDGET: usize = 4 << 20;
/// Messages of 8 KiB: 64 MiB in all.
const MESSAGES: u64 = 8192;

async fn tight() -> TestBroker {
    TestBroker::with(|config| config.memory.message_bytes = BUDGET).await
}

/// A body that says which message it is, all through.
fn body(number: u64) -> Vec<u8> {
    number.to_be_bytes().repeat(1024)
}

async fn publish(peer: &mut Peer, queue: &str, numbers: std::ops::Range<u64>, persistent: bool) {
    for number in numbers {
        match persistent {
            true => peer.publish_persistent(1, queue, body(number)).await,
            false => peer.publish(1, queue, body(number)).await,
        }
    }
}

async fn expect(peer: &mut Peer, queue: &str, numbers: std::ops::Range<u64>, redelivered: Option<bool>) {
    peer.consume(1, queue, true).await;
    for number in numbers {
        let delivery = peer.delivery(1).await;
        assert!(delivery.body == body(number), "expected {number}, got {:?}", delivery.body.get(..8));
        if let Some(redelivered) = redelivered {
            assert_eq!(delivery.redelivered, redelivered);
        }
    }
    peer.cancel(1, queue).await;
}

/// Bytes of messages in memory, from the inside.
fn in_memory(broker: &TestBroker) -> usize {
    broker.server().broker().memory().used_bytes()
}

async fn expect_paged_out(broker: &TestBroker) {
    eventually("the backlog leaves memory", async || (in_memory(broker) < 2 * BUDGET).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transient_backlog_pages_out_and_comes_back_in_order() {
    let broker = tight().await;
    let mut peer = broker.peer().await;
    peer.declare(1, transient("q")).await;
    publish(&mut peer, "q", 0..MESSAGES, false).await;
    peer.nothing_more(1).await;
    expect_paged_out(&broker).await;
    assert_eq!(broker.counts("q").ready, MESSAGES);
    expect(&mut peer, "q", 0..MESSAGES, Some(false)).await;
    assert_eq!(broker.counts("q").ready, 0);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_persistent_backlog_pages_out_and_comes_back_in_order() {
    let broker = tight().await;
    let mut peer = broker.peer().await;
    peer.declare(1, durable("q")).await;
    publish(&mut peer, "q", 0..MESSAGES, true).await;
    peer.nothing_more(1).await;
    expect_paged_out(&broker).await;
    expect(&mut peer, "q", 0..MESSAGES, Some(false)).await;
    assert_eq!(broker.counts("q").ready, 0);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mixed_backlog_comes_back_in_order_while_more_is_published() {
    let broker = tight().await;
    let mut peer = broker.peer().await;
    peer.declare(1, durable("q")).await;
    for number in 0..2048 {
        publish(&mut peer, "q", number..number + 1, number % 2 == 0).await;
    }
    peer.nothing_more(1).await;
    let mut publisher = broker.peer().await;
    let publishing = tokio::spawn(async move {
        for number in 2048..4096 {
            publish(&mut publisher, "q", number..number + 1, number % 2 == 0).await;
        }
        publisher
    });
    expect(&mut peer, "q", 0..4096, None).await;
    publishing.await.unwrap();
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requeued_messages_whose_chunks_were_evicted_are_read_back() {
    let broker = tight().await;
    let mut peer = broker.peer().await;
    for (queue, persistent) in [("kept", true), ("brief", false)] {
        peer.declare(1, durable(queue)).await;
        let mut holder = broker.peer().await;
        publish(&mut peer, queue, 0..2048, persistent).await;
        // Everything is handed out, then comes back while newer messages need the memory.
        holder.consume(1, queue, false).await;
        for number in 0..2048 {
            let delivery = holder.delivery(1).await;
            assert!(delivery.body == body(number), "{queue}: expected {number}, got {:?}", delivery.body.get(..8));
        }
        holder.cancel(1, queue).await;
        publish(&mut peer, queue, 2048..4096, persistent).await;
        peer.nothing_more(1).await;
        // Every second one stays acked, so the rest comes back with gaps.
        for tag in (2..=2048).step_by(2) {
            holder.ack(1, tag, false).await;
        }
        holder.nothing_more(1).await;
        drop(holder);
        eventually("requeued", async || (broker.counts(queue).unacked == 0).then_some(())).await;
        peer.consume(1, queue, true).await;
        for number in (0..2048).step_by(2).chain(2048..4096) {
            let delivery = peer.delivery(1).await;
            assert!(delivery.body == body(number), "{queue}: expected {number}, got {:?}", delivery.body.get(..8));
            assert_eq!(delivery.redelivered, number < 2048, "{number}");
        }
        peer.cancel(1, queue).await;
        assert_eq!(broker.counts(queue).ready, 0);
    }
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_get_reads_what_has_left_memory() {
    let broker = tight().await;
    let mut peer = broker.peer().await;
    for (queue, persistent) in [("kept", true), ("brief", false)] {
        peer.declare(1, durable(queue)).await;
        publish(&mut peer, queue, 0..2048, persistent).await;
        peer.nothing_more(1).await;
        expect_paged_out(&broker).await;
        for number in 0..2048 {
            let message = peer.get(1, queue, number % 2 == 0).await.unwrap();
            assert!(message.body == body(number), "{queue} {number}");
            assert_eq!(u64::from(message.remaining), 2047 - number);
            if number % 2 == 1 {
                peer.ack(1, message.tag, false).await;
            }
        }
        assert_eq!(peer.get(1, queue, true).await, None);
    }
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paged_backlog_survives_a_restart_without_its_transient_half() {
    let mut broker = tight().await;
    let mut peer = broker.peer().await;
    peer.declare(1, durable("q")).await;
    for number in 0..4096 {
        publish(&mut peer, "q", number..number + 1, number % 2 == 0).await;
    }
    peer.nothing_more(1).await;
    broker.restart().await;
    assert_eq!(broker.counts("q").ready, 2048);
    let mut peer = broker.peer().await;
    publish(&mut peer, "q", 4096..4100, true).await;
    peer.consume(1, "q", true).await;
    for number in (0..4096).step_by(2).chain(4096..4100) {
        assert!(peer.delivery(1).await.body == body(number), "{number}");
    }
    peer.nothing_more(1).await;
    assert_eq!(broker.counts("q").ready, 0);
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paged_backlog_can_be_purged_and_deleted() {
    let mut broker = tight().await;
    let mut peer = broker.peer().await;
    for (queue, persistent) in [("kept", true), ("brief", false)] {
        peer.declare(1, durable(queue)).await;
        publish(&mut peer, queue, 0..2048, persistent).await;
        peer.nothing_more(1).await;
        expect_paged_out(&broker).await;
        let client = broker.client().await;
        assert_eq!(client.queue_purge(queue.into(), Default::default()).await.unwrap(), 2048);
        publish(&mut peer, queue, 0..4, persistent).await;
        assert_eq!(peer.get(1, queue, true).await.unwrap().body, body(0));
        publish(&mut peer, queue, 4..2048, persistent).await;
        peer.nothing_more(1).await;
        assert_eq!(client.queue_delete(queue.into(), Default::default()).await.unwrap(), 2047);
    }
    eventually("no memory is held", async || (in_memory(&broker) < 1 << 20).then_some(())).await;
    broker.restart().await;
    assert!(!broker.has_queue("kept") && !broker.has_queue("brief"));
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_queues_share_one_budget() {
    let broker = tight().await;
    let mut peer = broker.peer().await;
    let names: Vec<String> = (0..8).map(|number| format!("q{number}")).collect();
    for name in &names {
        peer.declare(1, transient(name)).await;
    }
    for number in 0..512 {
        for name in &names {
            publish(&mut peer, name, number..number + 1, false).await;
        }
    }
    peer.nothing_more(1).await;
    expect_paged_out(&broker).await;
    for name in &names {
        expect(&mut peer, name, 0..512, Some(false)).await;
    }
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_bodies_page_out_too() {
    let broker = tight().await;
    let mut peer = broker.peer().await;
    let large = |number: u64| number.to_be_bytes().repeat(64 << 10); // 512 KiB
    for (queue, persistent) in [("kept", true), ("brief", false)] {
        peer.declare(1, durable(queue)).await;
        for number in 0..64 {
            match persistent {
                true => peer.publish_persistent(1, queue, large(number)).await,
                false => peer.publish(1, queue, large(number)).await,
            }
        }
        peer.nothing_more(1).await;
        expect_paged_out(&broker).await;
        peer.consume(1, queue, true).await;
        for number in 0..64 {
            assert!(peer.delivery(1).await.body == large(number), "{queue} {number}");
        }
        peer.cancel(1, queue).await;
    }
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn consumers_with_prefetch_and_acks_drain_a_paged_backlog_once() {
    let broker = tight().await;
    let mut peer = broker.peer().await;
    peer.declare(1, durable("q")).await;
    publish(&mut peer, "q", 0..4096, true).await;
    peer.nothing_more(1).await;
    let (told, mut seen) = tokio::sync::mpsc::unbounded_channel();
    for _ in 0..3 {
        let (mut consumer, told) = (broker.peer().await, told.clone());
        tokio::spawn(async move {
            consumer.qos(1, 50, false).await;
            consumer.consume(1, "q", false).await;
            loop {
                let delivery = consumer.delivery(1).await;
                told.send(u64::from_be_bytes(delivery.body[..8].try_into().unwrap())).unwrap();
                consumer.ack(1, delivery.tag, false).await;
            }
        });
    }
    let mut numbers = Vec::new();
    while numbers.len() < 4096 {
        numbers.push(within("delivery", seen.recv()).await.unwrap());
    }
    numbers.sort_unstable();
    assert!(numbers.into_iter().eq(0..4096));
    eventually("all acked", async || (broker.counts("q").unacked == 0).then_some(())).await;
    assert_eq!(broker.counts("q").ready, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unacked_deliveries_beyond_the_budget_do_not_block_the_connection_that_holds_them() {
    let broker = tight().await;
    let mut peer = broker.peer().await;
    for (queue, persistent) in [("kept", true), ("brief", false)] {
        peer.declare(1, durable(queue)).await;
        peer.consume(1, queue, false).await;
        let mut last = 0;
        for round in 0..8 {
            let numbers = round * 512..(round + 1) * 512;
            publish(&mut peer, queue, numbers.clone(), persistent).await;
            for number in numbers {
                let delivery = peer.delivery(1).await;
                assert!(delivery.body == body(number));
                last = delivery.tag;
            }
        }
        // 32 MiB are unacked. Half of it comes back, from the store, and in order.
        peer.cancel(1, queue).await;
        peer.ack(1, last - 2048, true).await;
        peer.nack(1, 0, true, true).await;
        expect(&mut peer, queue, 2048..4096, Some(true)).await;
        assert_eq!((broker.counts(queue).ready, broker.counts(queue).unacked), (0, 0));
    }
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_disk_space_of_a_consumed_transient_backlog_comes_back() {
    let broker = tight().await;
    let mut peer = broker.peer().await;
    peer.declare(1, transient("q")).await;
    let mut largest = 0;
    for _ in 0..4 {
        publish(&mut peer, "q", 0..MESSAGES, false).await;
        peer.nothing_more(1).await;
        expect_paged_out(&broker).await;
        expect(&mut peer, "q", 0..MESSAGES, Some(false)).await;
        largest = largest.max(broker.data_bytes());
    }
    // 256 MiB went through; what is kept is at most what compaction has not reached yet.
    assert!(largest < 200 << 20, "{} MiB", largest >> 20);
    broker.stop().await;
}
