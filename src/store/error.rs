//! What can go wrong with the store, as facts. The broker and the program word them for their own readers.

use std::path::PathBuf;

use super::Round;

/// Why the store did not do what it was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Another process, or another [`Store`](super::Store) of this one, has the directory open.
    #[error(
        "data directory '{}' is in use by another broker; stop that one first, or give this one a data directory \
         of its own (--data-dir)",
        path.display()
    )]
    InUse { path: PathBuf },

    /// The directory was written by a later version of Leveret, and this one knows nothing of its format. Nothing was
    /// changed.
    #[error(
        "data directory '{}' has store format {found}, and this version of Leveret reads formats up to {known}; \
         start it with the version that wrote it, or choose another data directory (--data-dir)",
        path.display()
    )]
    UnknownFormat { path: PathBuf, found: u64, known: u64 },

    /// Files of it are damaged in a way that a repair has to deal with before anything is written. Nothing was changed.
    #[error(
        "data directory '{0}' is damaged: {reason}. 'leveret check --data-dir {0}' says what that means, \
         'leveret check --repair --data-dir {0}' repairs it",
        path.display()
    )]
    Damaged { path: PathBuf, reason: String },

    /// The directory cannot be opened, for want of permission or space or because it is damaged.
    #[error("data directory '{}' cannot be opened: {reason}", path.display())]
    Open { path: PathBuf, reason: String },

    /// A read failed for a reason that may pass (no file descriptors, say). Damage is never reported this way.
    #[error("cannot read {what}: {reason}")]
    Read { what: &'static str, reason: String },

    /// The copy was not made, and nothing is left of it.
    #[error("cannot make a checkpoint in '{}': {reason}", path.display())]
    Checkpoint { path: PathBuf, reason: String },

    /// The round is not on disk, and never will be.
    #[error("round {round} is not on disk: {reason}")]
    RoundFailed { round: Round, reason: String },

    /// [`Store::shutdown`](super::Store::shutdown) was called.
    #[error("the store is closed")]
    Closed,
}
