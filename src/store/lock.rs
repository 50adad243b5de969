//! One broker, or one check, a data directory.
//!
//! RocksDB has a lock of its own, but takes it when it opens the directory; what is done to the files before that needs
//! one too. It is on the directory itself, so it also holds against others in the same process.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

use rustix::fs::{FlockOperation, fcntl_lock, flock};

use super::StoreError;

/// A data directory that nobody else uses, for as long as this lives.
pub(super) struct DirectoryLock {
    _directory: File,
}

impl DirectoryLock {
    /// # Errors
    /// [`StoreError::InUse`], or [`StoreError::Open`] if there is no such directory that may be read.
    pub fn take(path: &Path) -> Result<DirectoryLock, StoreError> {
        let failed = |error: io::Error| StoreError::Open { path: path.to_owned(), reason: error.to_string() };
        let directory = File::open(path).map_err(failed)?;
        let in_use = || StoreError::InUse { path: path.to_owned() };
        // Any other error is that of a file system without such locks: RocksDB's has to do.
        if flock(&directory, FlockOperation::NonBlockingLockExclusive) == Err(rustix::io::Errno::WOULDBLOCK) {
            return Err(in_use());
        }
        // Versions that do not lock the directory. Closing the file gives up this process's locks on it, of which there
        // are none: the directory is ours.
        if let Ok(file) = OpenOptions::new().read(true).write(true).open(path.join("LOCK")) {
            let held = fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive);
            if matches!(held, Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::ACCESS)) {
                return Err(in_use());
            }
        }
        Ok(DirectoryLock { _directory: directory })
    }
}
