//! What an operator can ask: a variant of [`Request`], a function, and a struct for the answer.

use std::{fs, path::PathBuf, sync::Arc, time::Instant};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Context;

/// A command with its arguments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case")]
pub enum Request {
    /// Answered with a [`Status`].
    Status,
    /// Answered with a [`CheckpointMade`] once that is on disk, however long it takes.
    Checkpoint { directory: PathBuf },
}

/// Carries a command out.
///
/// # Errors
/// A text for people.
pub(super) async fn answer(request: Request, context: Arc<Context>) -> Result<Value, String> {
    match request {
        Request::Status => blocking(move || status(&context)).await,
        Request::Checkpoint { directory } => checkpoint(&context, directory).await.and_then(encode),
    }
}

/// Runs what takes locks or reads files where it holds nobody up.
async fn blocking<T: Serialize + Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<Value, String> {
    encode(tokio::task::spawn_blocking(work).await.map_err(|error| error.to_string())?)
}

fn encode(answer: impl Serialize) -> Result<Value, String> {
    serde_json::to_value(answer).map_err(|error| error.to_string())
}

/// How the broker is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub pid: u32,
    pub uptime_secs: u64,
    pub resident_bytes: Option<u64>,
    pub data_directory: PathBuf,
    pub free_disk_bytes: Option<u64>,
    /// What has run out, or fails.
    pub alarms: Vec<String>,
    /// Why no durable work is done any more, if that is so.
    pub store_failure: Option<String>,
    /// Open AMQP connections, those that have not logged in included.
    pub connections: u64,
    pub consumers: u64,
    pub vhosts: u64,
    pub queues: u64,
    pub messages: Messages,
    /// Messages in memory.
    pub memory_used_bytes: u64,
    pub memory_budget_bytes: u64,
    pub store: StoreCounters,
}

/// Messages of all queues.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Messages {
    pub ready: u64,
    pub ready_bytes: u64,
    pub unacked: u64,
    pub unacked_bytes: u64,
    /// Returned, and waiting for their next attempt.
    pub waiting: u64,
    /// Of queues; those of exchanges are not counted.
    pub delayed: u64,
}

/// Since the broker's start.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreCounters {
    pub rounds: u64,
    pub failed_rounds: u64,
    pub records_written: u64,
    pub bytes_written: u64,
    pub damaged_records: u64,
}

fn status(context: &Context) -> Status {
    let broker = &context.broker;
    let (overview, store) = (broker.overview(), broker.store_stats());
    let counts = overview.counts;
    Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        uptime_secs: context.started.elapsed().as_secs(),
        resident_bytes: resident_bytes(),
        data_directory: broker.data_directory(),
        free_disk_bytes: broker.free_disk_bytes(),
        alarms: broker.active_alarms().into_iter().map(str::to_owned).collect(),
        store_failure: broker.store_failure(),
        connections: context.registry.sockets() as u64,
        consumers: counts.consumers,
        vhosts: overview.vhosts,
        queues: overview.queues,
        messages: Messages {
            ready: counts.ready,
            ready_bytes: counts.ready_bytes,
            unacked: counts.unacked,
            unacked_bytes: counts.unacked_bytes,
            waiting: counts.waiting,
            delayed: counts.delayed,
        },
        memory_used_bytes: broker.memory().used_bytes() as u64,
        memory_budget_bytes: broker.memory().limit_bytes() as u64,
        store: StoreCounters {
            rounds: store.rounds,
            failed_rounds: store.failed_rounds,
            records_written: store.records_written,
            bytes_written: store.bytes_written,
            damaged_records: store.damaged_records,
        },
    }
}

/// The second number of `statm` is the resident size in pages.
fn resident_bytes() -> Option<u64> {
    let statm = fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as u64)
}

/// A checkpoint that is on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointMade {
    pub directory: PathBuf,
    pub files: u64,
    pub bytes: u64,
    /// Whether the files are hard links into the data directory, as far as they never change; copies otherwise.
    pub linked: bool,
    pub took_ms: u64,
}

async fn checkpoint(context: &Context, directory: PathBuf) -> Result<CheckpointMade, String> {
    let (began, shown) = (Instant::now(), directory.display().to_string());
    tracing::info!(directory = shown, "a checkpoint begins");
    match context.broker.clone().checkpoint(directory.clone()).await {
        Ok(made) => {
            let took_ms = u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX);
            let (files, bytes, linked) = (made.files, made.bytes, made.linked);
            tracing::info!(directory = shown, files, bytes, linked, took_ms, "the checkpoint is there");
            Ok(CheckpointMade { directory, files, bytes, linked, took_ms })
        }
        Err(error) => {
            tracing::warn!(directory = shown, %error, "there is no checkpoint");
            Err(error.to_string())
        }
    }
}
