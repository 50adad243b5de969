//! The operator's socket, `leveret ctl`, and copies of a broker at work.

use std::{
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use leveret::control::socket;
use serde_json::Value;

use crate::support::{Peer, TestBroker, eventually, peer::durable};

/// Sends lines as they are; answers the answers.
async fn ask(broker: &TestBroker, requests: impl Into<String>) -> Vec<Value> {
    let (directory, requests) = (broker.data_dir().to_owned(), requests.into());
    let asked = tokio::task::spawn_blocking(move || {
        let mut stream = socket::connect(&directory).unwrap();
        stream.write_all(requests.as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        BufReader::new(stream).lines().map_while(Result::ok).collect::<Vec<_>>()
    });
    asked.await.unwrap().iter().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Runs `leveret ctl` on a broker's data directory.
async fn ctl(data_dir: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_leveret"));
    command.args(["ctl", "--data-dir"]).arg(data_dir).args(arguments);
    for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("LEVERET_")) {
        command.env_remove(name);
    }
    tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap()
}

fn printed(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_are_answered_in_order_and_errors_are_answers() {
    let broker = TestBroker::start().await;
    let requests = "{\"command\":\"status\"}\n{\"command\":\"dance\"}\n[]\n{\"command\":\"status\"}\n";
    let answers = ask(&broker, requests).await;
    assert_eq!(answers.len(), 4);
    assert_eq!(answers[0]["result"]["pid"], std::process::id());
    assert!(answers[1]["error"].as_str().unwrap().contains("dance"), "{}", answers[1]);
    assert!(answers[2]["error"].is_string() && answers[3]["result"]["queues"] == 0);
    for request in ["{\"command\":\"status\"}".to_owned(), "x".repeat(64 << 10)] {
        let answers = ask(&broker, request).await;
        assert!(answers.len() == 1 && answers[0]["error"].is_string(), "a request without its end: {answers:?}");
    }
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_tells_what_there_is() {
    let broker = TestBroker::start().await;
    let mut peer = broker.peer().await;
    peer.declare(1, durable("q")).await;
    for _ in 0..3 {
        peer.publish_persistent(1, "q", "twelve bytes").await;
    }
    peer.get(1, "q", false).await.unwrap();
    let status: Value = serde_json::from_str(&printed(&ctl(broker.data_dir(), &["status", "--json"]).await)).unwrap();
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!((&status["queues"], &status["connections"], &status["vhosts"]), (&1.into(), &1.into(), &1.into()));
    let messages = &status["messages"];
    assert_eq!(
        (&messages["ready"], &messages["ready_bytes"], &messages["unacked"]),
        (&2.into(), &24.into(), &1.into())
    );
    assert!(status["resident_bytes"].as_u64().unwrap() > 1 << 20 && status["free_disk_bytes"].is_u64());
    assert!(status["store"]["rounds"].as_u64().unwrap() > 0 && status["alarms"].as_array().unwrap().is_empty());
    let text = printed(&ctl(broker.data_dir(), &["status"]).await);
    assert!(text.contains("2 ready") && text.contains("1 in 1 virtual host"), "{text}");
    let data_dir = broker.data_dir().to_owned();
    broker.stop().await;
    let nobody = ctl(&data_dir, &["status"]).await;
    assert_eq!(nobody.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nobody.stderr).contains("no broker runs on data directory"), "{nobody:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checkpoint_refuses_directories_it_cannot_have_and_leaves_nothing() {
    let broker = TestBroker::start().await;
    let place = tempfile::tempdir().unwrap();
    std::fs::create_dir(place.path().join("full")).unwrap();
    std::fs::write(place.path().join("full/file"), b"x").unwrap();
    std::fs::write(place.path().join("file"), b"x").unwrap();
    let refused = [
        (place.path().join("full"), "not empty"),
        (place.path().join("file"), "directory"),
        (place.path().join("missing/below"), "No such file"),
        (broker.data_dir().join("within"), "in the data directory"),
        (PathBuf::from("relative"), "absolute"),
        (PathBuf::from("/"), "no name"),
    ];
    for (directory, reason) in refused {
        let request = serde_json::json!({ "command": "checkpoint", "directory": directory });
        let answers = ask(&broker, format!("{request}\n")).await;
        let error = answers[0]["error"].as_str().unwrap_or_else(|| panic!("{directory:?}: {answers:?}"));
        assert!(error.contains(reason), "{directory:?}: {error}");
    }
    let mut left: Vec<_> = std::fs::read_dir(place.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["file", "full"]);
    broker.stop().await;
}

/// What a publisher and a consumer of a queue have been told.
#[derive(Default)]
struct Progress {
    confirmed: AtomicU64,
    /// Acks that the broker has worked on.
    acked: AtomicU64,
    /// Acks that were sent.
    acking: AtomicU64,
}

/// Publishes numbers, some of them in large bodies, until told to stop.
async fn publish(mut peer: Peer, queue: String, progress: Arc<Progress>, stop: Arc<AtomicBool>) {
    const BATCH: u64 = 20;
    peer.select_confirms(1).await;
    let mut next = 1;
    while !stop.load(Ordering::SeqCst) {
        for number in next..next + BATCH {
            let bytes = [20, 300, 3_000, 40_000][(number % 97 % 4) as usize];
            peer.publish_persistent(1, &queue, format!("{number:0bytes$}")).await;
        }
        peer.confirms(1, next..next + BATCH).await;
        next += BATCH;
        progress.confirmed.store(next - 1, Ordering::SeqCst);
    }
}

/// Takes messages in order, and acks them a few at a time, until told to stop.
async fn consume(mut peer: Peer, queue: String, progress: Arc<Progress>, stop: Arc<AtomicBool>) {
    const BATCH: u64 = 7;
    let mut taken = 0;
    while !stop.load(Ordering::SeqCst) {
        let Some(message) = peer.get(1, &queue, false).await else {
            tokio::time::sleep(Duration::from_millis(2)).await;
            continue;
        };
        taken += 1;
        assert_eq!(number_of(message.text()), taken);
        if taken % BATCH == 0 {
            progress.acking.store(taken, Ordering::SeqCst);
            peer.ack(1, message.tag, true).await;
            peer.nothing_more(1).await;
            progress.acked.store(taken, Ordering::SeqCst);
        }
    }
    peer.close().await; // what was not acked goes back
}

fn number_of(body: &str) -> u64 {
    body.trim_start_matches('0').parse().unwrap()
}

/// Takes out all that is in a queue, which must be numbers without a gap. Answers the first and the one behind the last.
async fn numbers_in(broker: &TestBroker, queue: &str) -> (u64, u64) {
    let mut peer = broker.peer().await;
    let (mut first, mut end) = (0, 0);
    while let Some(message) = peer.get(1, queue, true).await {
        let number = number_of(message.text());
        if first == 0 {
            (first, end) = (number, number);
        }
        assert_eq!(number, end, "queue {queue} has a gap");
        end += 1;
    }
    assert_eq!(peer.depth(1, queue).await, (0, 0));
    (first, end)
}

/// Pairs of messages in one transaction, until told to stop.
async fn publish_pairs(mut peer: Peer, stop: Arc<AtomicBool>) {
    peer.select_tx(1).await;
    let mut number = 0;
    while !stop.load(Ordering::SeqCst) {
        number += 1;
        peer.publish_persistent(1, "left", number.to_string()).await;
        peer.publish_persistent(1, "right", number.to_string()).await;
        peer.commit(1).await;
    }
}

const QUEUES: usize = 4;

/// A broker under load, several copies of it, and each of them examined.
async fn examine_copies_in(place: &Path, is_linked: bool) {
    // Small, so that all kinds of files come and go.
    let broker = TestBroker::with(|config| config.store.write_buffer_bytes = Some(1 << 20)).await;
    let mut peer = broker.peer().await;
    let stop = Arc::<AtomicBool>::default();
    let mut tasks = Vec::new();
    let mut queues = Vec::new();
    for at in 0..QUEUES {
        let (queue, progress) = (format!("q{at}"), Arc::<Progress>::default());
        peer.declare(1, durable(&queue)).await;
        let (publisher, consumer) = (broker.peer().await, broker.peer().await);
        tasks.push(tokio::spawn(publish(publisher, queue.clone(), progress.clone(), stop.clone())));
        if at % 2 == 0 {
            tasks.push(tokio::spawn(consume(consumer, queue.clone(), progress.clone(), stop.clone())));
        }
        queues.push((queue, progress));
    }
    peer.declare(1, durable("left")).await;
    peer.declare(1, durable("right")).await;
    tasks.push(tokio::spawn(publish_pairs(broker.peer().await, stop.clone())));
    let mut copies = Vec::new();
    for at in 0..3_u64 {
        eventually("some load", async || (queues[1].1.confirmed.load(Ordering::SeqCst) > 200 * at).then_some(())).await;
        let directory = place.join(format!("copy-{at}"));
        if at == 1 {
            std::fs::create_dir(&directory).unwrap(); // it may be there, if it is empty
        }
        let read = |what: fn(&Progress) -> &AtomicU64| -> Vec<u64> {
            queues.iter().map(|(_, progress)| what(progress).load(Ordering::SeqCst)).collect()
        };
        let (confirmed, acked) = (read(|progress| &progress.confirmed), read(|progress| &progress.acked));
        let made = ctl(broker.data_dir(), &["checkpoint", directory.to_str().unwrap(), "--json"]).await;
        let made: Value = serde_json::from_str(&printed(&made)).unwrap();
        assert_eq!((&made["linked"], made["bytes"].as_u64().unwrap() > 0), (&is_linked.into(), true));
        let acking = read(|progress| &progress.acking);
        copies.push((directory, confirmed, acked, acking));
    }
    stop.store(true, Ordering::SeqCst);
    for task in tasks {
        task.await.unwrap();
    }
    for (directory, confirmed, acked, acking) in copies {
        let mut copy = TestBroker::with(|config| config.data_dir = directory).await;
        for at in 0..QUEUES {
            let (first, end) = numbers_in(&copy, &queues[at].0).await;
            let what = format!("{} has {first}..{end}; {} were confirmed before", queues[at].0, confirmed[at]);
            if first > 0 {
                assert!(end > confirmed[at], "{what}");
                assert!((acked[at] + 1..=acking[at] + 1).contains(&first), "{what}; {} acked", acked[at]);
            } else {
                assert!(acking[at] >= confirmed[at], "{what}");
            }
        }
        assert_eq!(numbers_in(&copy, "left").await, numbers_in(&copy, "right").await, "half a transaction");
        goes_on(&mut copy).await;
        copy.stop().await;
    }
    for (queue, progress) in &queues {
        let (first, end) = numbers_in(&broker, queue).await;
        let confirmed = progress.confirmed.load(Ordering::SeqCst);
        assert!(first == 0 || end == confirmed + 1, "{queue} has {first}..{end} of {confirmed}");
    }
    let mut broker = broker;
    goes_on(&mut broker).await;
    assert!(!broker.data_dir().join("checkpoint.links").exists());
    broker.stop().await;
}

async fn goes_on(broker: &mut TestBroker) {
    let mut peer = broker.peer().await;
    peer.select_confirms(1).await;
    peer.publish_persistent(1, "q0", "1").await;
    peer.confirms(1, 1..=1).await;
    broker.restart().await;
    assert_eq!(numbers_in(broker, "q0").await, (1, 2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_under_load_has_a_first_part_of_every_queues_history_with_all_that_was_confirmed() {
    examine_copies_in(tempfile::tempdir().unwrap().path(), true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn so_has_one_on_another_volume() {
    use std::os::unix::fs::MetadataExt;
    let volume = |path: &Path| path.metadata().ok().map(|metadata| metadata.dev());
    let memory = Path::new("/dev/shm");
    if volume(memory).is_none() || volume(memory) == volume(&std::env::temp_dir()) {
        return; // there is no other volume to be sure of
    }
    examine_copies_in(tempfile::tempdir_in(memory).unwrap().path(), false).await;
}
