//! The program at the edges of what the system gives it: file descriptors, the data directory, signals.

use std::{net::TcpStream, time::Duration};

use crate::support::{
    Login, eventually,
    peer::{durable, transient},
    program::{Program, command},
};

#[tokio::test]
async fn accepting_pauses_without_file_descriptors_and_resumes_by_itself() {
    let data = tempfile::tempdir().unwrap();
    let program = Program::start(data.path(), Some(256));
    let mut peer = Login::default().open(program.address).await;
    peer.open_channel(1).await;
    peer.declare(1, durable("q")).await;
    // More sockets than the limit has room for; the kernel completes what the broker does not accept.
    let sockets: Vec<TcpStream> = (0..400).map(|_| TcpStream::connect(program.address).unwrap()).collect();
    eventually("accepting pauses", async || program.log().contains("accepting connections is paused").then_some(()))
        .await;
    // Who is in works on, with the disk.
    peer.select_confirms(1).await;
    for seq in 1..=50 {
        peer.publish_persistent(1, "q", "x").await;
        assert_eq!(peer.confirm(1).await, (seq, true));
    }
    let pauses = program.log().matches("accepting connections is paused").count();
    assert!(pauses <= 3, "{pauses} warnings");
    drop(sockets);
    eventually("accepting resumes", async || program.log().contains("accepting connections again").then_some(())).await;
    let mut late = Login::default().open(program.address).await;
    late.open_channel(1).await;
    assert_eq!(late.depth(1, "q").await, (50, 0));
    let (code, _) = program.terminate().await;
    assert_eq!(code, Some(0));
}

#[tokio::test]
async fn a_second_instance_on_the_same_data_is_refused() {
    let data = tempfile::tempdir().unwrap();
    let program = Program::start(data.path(), None);
    let second = tokio::task::spawn_blocking({
        let path = data.path().to_owned();
        move || command(&path, 0, None).output().unwrap()
    });
    let output = second.await.unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr);
    let directory = data.path().display().to_string();
    assert!(error.contains(&directory) && error.to_lowercase().contains("another"), "{error}");
    Login::default().open(program.address).await.close().await; // the first one does not mind
}

#[tokio::test]
async fn a_port_in_use_is_refused_by_name() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let program = Program::start(one.path(), None);
    let port = program.address.port();
    let output = tokio::task::spawn_blocking(move || command(two.path(), port, None).output().unwrap()).await.unwrap();
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains(&format!("127.0.0.1:{port}")), "{error}");
}

#[tokio::test]
async fn sigterm_ends_the_program_with_and_without_listening_clients() {
    let data = tempfile::tempdir().unwrap();
    let program = Program::start(data.path(), None);
    let mut deaf = Login::default().open(program.address).await;
    deaf.open_channel(1).await;
    deaf.declare(1, transient("q")).await;
    deaf.consume(1, "q", true).await;
    let mut publisher = Login::default().open(program.address).await;
    publisher.open_channel(1).await;
    publisher.declare(1, durable("kept")).await;
    publisher.select_confirms(1).await;
    publisher.publish_persistent(1, "kept", "x").await;
    publisher.confirm(1).await;
    publisher.open_channel(2).await;
    for _ in 0..200 {
        publisher.publish(2, "q", vec![1; 100_000]).await; // more than the deaf one's buffers hold
    }
    publisher.nothing_more(2).await;
    let polite = tokio::spawn(async move {
        let text = "CONNECTION_FORCED - broker forced connection closure with reason 'shutdown'";
        publisher.expect_connection_error(320, text).await;
    });
    let (code, took) = program.terminate().await;
    assert_eq!(code, Some(0));
    assert!(took < Duration::from_secs(5), "{took:?}");
    polite.await.unwrap();
    let again = Program::start(data.path(), None);
    let mut peer = Login::default().open(again.address).await;
    peer.open_channel(1).await;
    assert_eq!(peer.depth(1, "kept").await, (1, 0));
}

#[tokio::test]
async fn sigterm_without_clients_is_immediate() {
    let data = tempfile::tempdir().unwrap();
    let program = Program::start(data.path(), None);
    Login::default().open(program.address).await.close().await;
    let (code, took) = program.terminate().await;
    assert_eq!(code, Some(0));
    assert!(took < Duration::from_secs(2), "{took:?}");
}

#[tokio::test]
async fn the_start_is_announced_in_one_line() {
    let data = tempfile::tempdir().unwrap();
    let program = Program::start(data.path(), None);
    eventually("the line", async || program.log().contains("leveret is ready").then_some(())).await;
    let log = program.log();
    let line = log.lines().find(|line| line.contains("leveret is ready")).unwrap();
    for part in [
        program.address.to_string(),
        data.path().display().to_string(),
        "fsync".into(),
        env!("CARGO_PKG_VERSION").into(),
    ] {
        assert!(line.contains(&part), "{part} is not in {line}");
    }
}
