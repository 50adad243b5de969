//! `leveret ctl`: asks the broker that runs on a data directory of this machine.

use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::config::{Config, ConfigError, Flags};
use crate::control::{CheckpointMade, Request, Status, socket};

/// How long commands may take that do no work to speak of.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Args)]
pub(super) struct CtlArgs {
    /// The broker's data directory; found as the broker finds it [default: ./leveret-data] [env: LEVERET_DATA_DIR]
    #[arg(long, value_name = "DIRECTORY", global = true)]
    data_dir: Option<PathBuf>,
    /// The broker's TOML file, if that names the data directory [env: LEVERET_CONFIG]
    #[arg(short, long, value_name = "FILE", global = true)]
    config: Option<PathBuf>,
    /// Print the answer as one JSON object
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: CtlCommand,
}

#[derive(Subcommand)]
enum CtlCommand {
    /// How the broker is: memory, disk, alarms, connections, queues, messages
    Status,
    /// Copy everything durable, while the broker runs, into a directory that a broker can be started on
    ///
    /// The copy holds everything that was confirmed before, and of what comes later a first part of each queue's history.
    /// On the data directory's volume it is made of hard links and takes next to no time and space; elsewhere
    /// everything is copied. To restore, start a broker with it: leveret --data-dir DIRECTORY
    Checkpoint {
        /// Must not exist, or be empty; what it is in must exist
        directory: PathBuf,
    },
}

#[derive(Debug, thiserror::Error)]
pub(super) enum CtlError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("no broker runs on data directory '{}'; name the broker's own with --data-dir", path.display())]
    NoBroker { path: PathBuf },
    #[error("the broker on data directory '{}' is another user's; be that user, or root", path.display())]
    NotPermitted { path: PathBuf },
    #[error("cannot ask the broker on data directory '{}'", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("the broker on data directory '{}' ended before it answered; its log may say why", path.display())]
    NoAnswer { path: PathBuf },
    #[error("{0}")]
    Refused(String),
    #[error("the broker gives an answer that this version does not understand: {0}")]
    Answer(String),
}

/// Asks, and prints the answer.
pub(super) fn run(args: CtlArgs) -> Result<(), CtlError> {
    let data_dir = Config::load(&Flags::locating(args.config, args.data_dir))?.data_dir;
    let (request, patience) = match &args.command {
        CtlCommand::Status => (Request::Status, Some(PATIENCE)),
        CtlCommand::Checkpoint { directory } => {
            let absolute = std::path::absolute(directory);
            let directory = absolute.map_err(|source| CtlError::Io { path: data_dir.clone(), source })?;
            (Request::Checkpoint { directory }, None)
        }
    };
    let answer = ask(&data_dir, &request, patience)?;
    let shown = if args.json { answer.to_string() } else { show(&args.command, answer)? };
    // Who reads it may have seen enough.
    let _ = writeln!(io::stdout(), "{shown}");
    Ok(())
}

/// Sends a request; answers its result.
fn ask(data_dir: &Path, request: &Request, patience: Option<Duration>) -> Result<Value, CtlError> {
    let path = || data_dir.to_owned();
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => CtlError::NoBroker { path: path() },
        io::ErrorKind::PermissionDenied => CtlError::NotPermitted { path: path() },
        _ => CtlError::Io { path: path(), source },
    };
    let mut stream = socket::connect(data_dir).map_err(failed)?;
    stream.set_read_timeout(patience).map_err(failed)?;
    let mut line = serde_json::to_string(request).map_err(|error| CtlError::Refused(error.to_string()))?;
    line.push('\n');
    stream.write_all(line.as_bytes()).map_err(failed)?;
    let mut answer = String::new();
    if BufReader::new(stream).read_line(&mut answer).map_err(failed)? == 0 {
        return Err(CtlError::NoAnswer { path: path() });
    }
    let mut answer: Value = serde_json::from_str(&answer).map_err(|error| CtlError::Answer(error.to_string()))?;
    match answer["error"].as_str() {
        Some(text) => Err(CtlError::Refused(text.to_owned())),
        None => Ok(answer["result"].take()),
    }
}

/// The answer to a command for people.
fn show(command: &CtlCommand, answer: Value) -> Result<String, CtlError> {
    match command {
        CtlCommand::Status => decode(answer).map(|status| show_status(&status)),
        CtlCommand::Checkpoint { .. } => decode(answer).map(|made| show_checkpoint(&made)),
    }
}

fn decode<T: DeserializeOwned>(answer: Value) -> Result<T, CtlError> {
    serde_json::from_value(answer).map_err(|error| CtlError::Answer(error.to_string()))
}

fn show_status(status: &Status) -> String {
    let Status { messages, store, .. } = status;
    let or_unknown = |bytes: Option<u64>| bytes.map_or_else(|| "unknown".to_owned(), size);
    let alarms = if status.alarms.is_empty() { "none".to_owned() } else { status.alarms.join(", ") };
    let failure = status.store_failure.as_ref().map(|reason| format!("\nstore FAILED    {reason}")).unwrap_or_default();
    format!(
        "broker          leveret {}, process {}, up {}\n\
         data directory  {}, {} free\n\
         memory          {} resident, {} of {} for messages\n\
         alarms          {alarms}\n\
         connections     {}, with {}\n\
         queues          {} in {}\n\
         messages        {} ready ({}), {} unacked ({}), {} delayed, {} waiting for a retry\n\
         store           {} in {}, {} records, {} failed, {} damaged{failure}",
        status.version,
        status.pid,
        duration(status.uptime_secs),
        status.data_directory.display(),
        or_unknown(status.free_disk_bytes),
        or_unknown(status.resident_bytes),
        size(status.memory_used_bytes),
        size(status.memory_budget_bytes),
        status.connections,
        counted(status.consumers, "consumer"),
        status.queues,
        counted(status.vhosts, "virtual host"),
        messages.ready,
        size(messages.ready_bytes),
        messages.unacked,
        size(messages.unacked_bytes),
        messages.delayed,
        messages.waiting,
        size(store.bytes_written),
        counted(store.rounds, "round"),
        store.records_written,
        store.failed_rounds,
        store.damaged_records,
    )
}

fn show_checkpoint(made: &CheckpointMade) -> String {
    let how = if made.linked {
        "hard links; they take up space once the broker has deleted its own"
    } else {
        "copies: it is on another volume than the data directory"
    };
    format!(
        "{}: {} in {} ({how}), in {:.1} s",
        made.directory.display(),
        size(made.bytes),
        counted(made.files, "file"),
        made.took_ms as f64 / 1000.0
    )
}

fn counted(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

fn size(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

fn duration(secs: u64) -> String {
    let (days, hours, minutes) = (secs / 86_400, secs / 3_600 % 24, secs / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{secs} s"),
        (0, 0, _) => format!("{minutes} min {} s", secs % 60),
        (0, ..) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_for_people() {
        assert_eq!(
            [0, 999, 1_000, 10_240_000, 9_999_000_000].map(size),
            ["0 B", "999 B", "1.0 kB", "10.2 MB", "10.0 GB"]
        );
        assert_eq!([5, 65, 3_700, 90_000].map(duration), ["5 s", "1 min 5 s", "1 h 1 min", "1 d 1 h"]);
        assert_eq!((counted(1, "file"), counted(0, "file")), ("1 file".to_owned(), "0 files".to_owned()));
    }

    #[test]
    fn nobody_to_ask_is_said_with_the_directory() {
        let directory = tempfile::tempdir().unwrap();
        let error = ask(directory.path(), &Request::Status, None).unwrap_err().to_string();
        assert!(error.contains(&directory.path().display().to_string()) && error.contains("--data-dir"), "{error}");
    }
}
