//! What a check, a repair or a start has to say about damage.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use super::{QueueId, QueueSeq};

/// Something wrong with a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Its name in the data directory.
    pub file: String,
    pub what: String,
    /// What is done about it.
    pub repair: String,
    /// Every start does that; nothing needs to be run.
    pub heals_at_start: bool,
}

impl Finding {
    pub(super) fn new(file: &str, what: &str, repair: &str) -> Finding {
        Finding { file: file.to_owned(), what: what.to_owned(), repair: repair.to_owned(), heals_at_start: false }
    }

    pub(super) fn healing(file: &str, what: &str, repair: &str) -> Finding {
        Finding { heals_at_start: true, ..Finding::new(file, what, repair) }
    }
}

/// A place where something is lost, as the files tell it. What of it was a message is in [`QueueLoss`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "lost")]
pub enum Loss {
    /// Of a write-ahead log: so many changes that were synced, whatever they were.
    LogEnd { entries: u64 },
    /// Of a write-ahead log: records of the run of a queue that begins with a position.
    Run {
        file: String,
        #[serde(serialize_with = "number")]
        queue: QueueId,
        first: QueueSeq,
    },
    /// Of a write-ahead log: a state, consumed set, note, definition or deletion.
    Entry { file: String, family: String, key: Vec<u8> },
    /// Of a write-ahead log.
    Bytes { file: String, bytes: u64 },
    /// Of a table: whatever its family had between two keys, if the table had the latest of it.
    Keys { file: String, family: String, after: Vec<u8>, until: Vec<u8> },
}

fn number<S: serde::Serializer>(queue: &QueueId, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(queue.0)
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Loss::LogEnd { entries } => write!(f, "the last {entries} changes that were synced"),
            Loss::Run { file, queue, first } => {
                write!(f, "{file}: one or more records of log {} from position {first} on", queue.0)
            }
            Loss::Entry { file, family, key } => write!(f, "{file}: an entry of '{family}' ({})", key.escape_ascii()),
            Loss::Bytes { file, bytes } => write!(f, "{file}: {bytes} bytes that nothing is known about"),
            Loss::Keys { file, family, after, until } => {
                write!(f, "{file}: entries of '{family}' from {} to {}", after.escape_ascii(), until.escape_ascii())
            }
        }
    }
}

/// Messages that a queue should have and does not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct QueueLoss {
    /// The log: of a queue with priorities, that of one level.
    #[serde(serialize_with = "number")]
    pub queue: QueueId,
    /// Durable messages it should have, and those it has.
    pub expected: u64,
    pub found: u64,
    /// Half-open ranges of positions that were not consumed and have no record. They may be more than are lost: a
    /// transient message leaves such a position, too.
    pub missing: Vec<(QueueSeq, QueueSeq)>,
}

/// The outcome of a check, a repair, or a start that healed something.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DamageReport {
    pub path: PathBuf,
    pub findings: Vec<Finding>,
    pub losses: Vec<Loss>,
    pub queues: Vec<QueueLoss>,
    /// Keys of definitions that neither copy has intact.
    pub definitions: Vec<Vec<u8>>,
    /// Owners and keys of notes that are damaged, or behind which something is.
    #[serde(skip)]
    pub unreadable_notes: Vec<(QueueId, Vec<u8>)>,
    /// Where the damaged files went.
    pub quarantine: Option<PathBuf>,
    /// Files and bytes that were verified.
    pub files: u64,
    pub bytes: u64,
    /// Logs of queues, and the records in them.
    pub logs: u64,
    pub records: u64,
    pub notes: u64,
    /// The definitions as they are (or would be after a repair), by which logs can be given names.
    #[serde(skip)]
    pub intact_definitions: Vec<(Vec<u8>, Vec<u8>)>,
}

impl DamageReport {
    /// Whether anything is wrong.
    pub fn is_clean(&self) -> bool {
        self.findings.is_empty()
            && self.queues.is_empty()
            && self.definitions.is_empty()
            && self.unreadable_notes.is_empty()
    }

    /// Messages that are lost.
    pub fn lost_messages(&self) -> u64 {
        self.queues.iter().map(|queue| queue.expected.saturating_sub(queue.found)).sum()
    }

    /// The report as text, with names for logs as `name` gives them.
    pub fn to_text(&self, name: &dyn Fn(QueueId) -> String) -> String {
        let mut text = String::new();
        let mut line = |line: String| {
            text.push_str(&line);
            text.push('\n');
        };
        for finding in &self.findings {
            line(format!("{}: {}", finding.file, finding.what));
            line(format!("    {}", finding.repair));
        }
        for loss in &self.losses {
            line(format!("lost of {loss}"));
        }
        for queue in &self.queues {
            let lost = queue.expected.saturating_sub(queue.found);
            let ranges: Vec<_> = queue.missing.iter().map(|(from, until)| range(*from, *until)).collect();
            let all: u64 = queue.missing.iter().map(|(from, until)| until - from).sum();
            let among = if all > lost { "among the positions" } else { "the positions" };
            line(format!(
                "{}: {lost} of {} messages are lost: {among} {}",
                name(queue.queue),
                queue.expected,
                ranges.join(", ")
            ));
        }
        for key in &self.definitions {
            line(format!("a definition is lost: {}", key.escape_ascii()));
        }
        for (owner, key) in &self.unreadable_notes {
            let owner = name(*owner);
            line(format!(
                "{owner}: a note (delayed message, count of attempts, known id) at or behind {} is lost",
                key.escape_ascii()
            ));
        }
        if let Some(quarantine) = &self.quarantine {
            line(format!("what was replaced is kept in {}", quarantine.display()));
        }
        line(format!(
            "{} files ({} bytes), {} messages in {} logs and {} notes verified: {}",
            self.files,
            self.bytes,
            self.records,
            self.logs,
            self.notes,
            match (self.is_clean(), self.lost_messages()) {
                (true, _) => "no damage".to_owned(),
                (false, 0) => format!("{} faults, no message lost", self.findings.len()),
                (false, lost) => format!("{} faults, {lost} messages lost", self.findings.len()),
            }
        ));
        text
    }
}

fn range(from: QueueSeq, until: QueueSeq) -> String {
    if until == from + 1 { from.to_string() } else { format!("{from} to {}", until - 1) }
}
