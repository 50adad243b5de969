//! The operator's way in from the same machine: a Unix socket in the data directory that only the broker's own user (and
//! root) can open, on which `leveret ctl` asks and the broker answers.
//!
//! # Protocol
//! A line of JSON each way. A request is an object with the key `command` and what the command needs:
//! `{"command":"status"}`. An answer is `{"result":…}`, or `{"error":"…"}` with a text for people. One connection may ask
//! as often as it likes, one request after the other.
//!
//! # Limits
//! A request has at most 64 KiB and arrives within 30 seconds; 16 connections are served at a time. Nothing asked here
//! ends the broker: a request that panics is answered with an error.
//!
//! # Elsewhere
//! What can be asked: [`Request`] and its functions in `commands`. Where the socket is: [`socket`].

mod commands;
pub mod socket;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    task::{JoinHandle, JoinSet},
    time::timeout,
};

pub use commands::{CheckpointMade, Request, Status};

use crate::{broker::Broker, net::Registry};

const MAX_REQUEST_BYTES: u64 = 64 << 10;
const REQUEST_PATIENCE: Duration = Duration::from_secs(30);
const MAX_CONNECTIONS: usize = 16;

/// What commands work on.
pub struct Context {
    pub broker: Arc<Broker>,
    pub registry: Arc<Registry>,
    pub started: Instant,
}

/// The open socket. Dropping it closes it, and with it what is being asked.
pub struct Control {
    task: JoinHandle<()>,
    directory: PathBuf,
}

impl Control {
    /// Opens the socket in the data directory, which no other broker may have open: a socket that is there already is one
    /// that a killed broker has left.
    ///
    /// # Errors
    /// When the file system does not have sockets, or something else has the name.
    pub fn start(directory: &Path, context: Context) -> io::Result<Self> {
        let listener = UnixListener::from_std(socket::bind(directory)?)?;
        let task = tokio::spawn(accept(listener, Arc::new(context)));
        Ok(Control { task, directory: directory.to_owned() })
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.task.abort();
        socket::remove(&self.directory);
    }
}

async fn accept(listener: UnixListener, context: Arc<Context>) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        if connections.len() >= MAX_CONNECTIONS {
            connections.join_next().await;
            continue;
        }
        match listener.accept().await {
            Ok((stream, _)) => {
                connections.spawn(serve(stream, context.clone()));
            }
            Err(error) => {
                // Out of file descriptors, most likely: that passes.
                tracing::warn!(%error, "a connection of leveret ctl cannot be accepted");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

/// Answers requests until the other end has no more, or says something that is none.
async fn serve(mut stream: UnixStream, context: Arc<Context>) {
    let (input, mut output) = stream.split();
    let mut input = BufReader::new(input);
    loop {
        let mut line = Vec::new();
        let mut limited = (&mut input).take(MAX_REQUEST_BYTES);
        let read = timeout(REQUEST_PATIENCE, limited.read_until(b'\n', &mut line)).await;
        let Ok(Ok(1..)) = read else { return };
        let is_whole = line.ends_with(b"\n");
        let answer = if is_whole { answer(&line, &context).await } else { error("a request ends with a line feed") };
        let mut text = answer.to_string();
        text.push('\n');
        if output.write_all(text.as_bytes()).await.is_err() || !is_whole {
            return;
        }
    }
}

async fn answer(line: &[u8], context: &Arc<Context>) -> Value {
    let request: Request = match serde_json::from_slice(line) {
        Ok(request) => request,
        Err(reason) => return error(&format!("not a request that this version knows: {reason}")),
    };
    // In a task of its own, where a panic is caught.
    let answered = tokio::spawn(commands::answer(request, context.clone())).await;
    match answered {
        Ok(Ok(result)) => json!({ "result": result }),
        Ok(Err(reason)) => error(&reason),
        Err(_) => error("an error in the broker, which its log has"),
    }
}

fn error(text: &str) -> Value {
    json!({ "error": text })
}
