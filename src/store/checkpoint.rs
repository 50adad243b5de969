//! Copies of a store in use, as of one instant, in a directory of their own: [`Store::checkpoint`].
//!
//! # How
//! RocksDB links its table and blob files, which never change, into the new directory, and copies its manifest and its WAL,
//! which do. A round is one batch of the WAL, so a copy of the WAL ends between two rounds, as after a power failure; and
//! what is confirmed is in the WAL, so it is in the copy. What is paged out is not: it does not survive a restart anyway.
//!
//! RocksDB notes the length of every file, links what can be linked, and copies the WAL last, which must then be as long
//! as it was. A recycled WAL file is not: it is cut to what is in it when it is closed, and it is closed when the memtable
//! is full, which under load happens while the links are made. So the recycled ones are used up before. A new file only
//! grows.
//!
//! # Another volume
//! Links do not reach there. The links are then made in the data directory, and copied from there a little at a time;
//! the database takes no notice of how long that lasts.
//!
//! # All or nothing
//! The directory gets its name when everything in it is synced. Until then it has one that begins with a dot, under which
//! a failure removes it, or the next checkpoint of the same name, should the process have been killed.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, MutexGuard};
use rocksdb::DB;
use rustix::fs::{Advice, fadvise, statvfs};

use super::rocks::{RECYCLED_WALS, Rocks};
use super::{Store, StoreError};

/// Where links wait to be copied to another volume, in the data directory.
const LINKS: &str = "checkpoint.links";

/// What is copied between two syncs, so that none of them takes long.
const COPY_BYTES: usize = 4 << 20;

/// A copy that was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    pub files: u64,
    /// Of all files; of those that are linked, the space is shared with the store until that deletes them.
    pub bytes: u64,
    /// Whether table and blob files are hard links; copies otherwise.
    pub linked: bool,
}

/// What all checkpoints of a store have to know.
#[derive(Default)]
pub(super) struct Checkpoints {
    /// There is one at a time.
    running: Mutex<()>,
    /// The store is closing: those that copy give up.
    stopped: AtomicBool,
}

impl Checkpoints {
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
    }

    fn begin(&self) -> io::Result<MutexGuard<'_, ()>> {
        self.running.try_lock().ok_or_else(|| io::Error::other("another checkpoint is being made"))
    }

    fn check(&self) -> io::Result<()> {
        match self.stopped.load(Ordering::Relaxed) {
            true => Err(io::Error::other("the broker stops")),
            false => Ok(()),
        }
    }
}

impl Store {
    /// Copies everything durable into `directory`, from which another broker can be started: every round that had ended
    /// when the call began, perhaps some later ones, and nothing of those after them. Rounds go on meanwhile.
    ///
    /// The directory must not exist, or be empty; what it is in must exist. The path must be absolute.
    ///
    /// Takes as long as the disk needs: call it where that holds nobody up.
    ///
    /// # Errors
    /// [`StoreError::Checkpoint`]; nothing is left behind then.
    pub fn checkpoint(&self, directory: &Path) -> Result<Checkpoint, StoreError> {
        let made = self.try_checkpoint(directory);
        made.map_err(|error| StoreError::Checkpoint { path: directory.to_owned(), reason: error.to_string() })
    }

    fn try_checkpoint(&self, directory: &Path) -> io::Result<Checkpoint> {
        let _running = self.checkpoints.begin()?;
        if let Some(reason) = self.has_failed() {
            return Err(io::Error::other(format!("the store has failed: {reason}")));
        }
        let data_directory = self.rocks.path().canonicalize()?;
        let (directory, parent, partial) = target(directory, &data_directory)?;
        let partial = Scratch::new(partial)?;
        let linked = can_link(&data_directory.join("CURRENT"), &partial.0)?;
        if linked {
            self.rocks.link_to(&partial.0)?;
        } else {
            let links = Scratch::new(data_directory.join(LINKS))?;
            self.rocks.link_to(&links.0)?;
            self.copy(&links.0, &partial.0)?;
        }
        fs::set_permissions(&partial.0, fs::metadata(&data_directory)?.permissions())?;
        sync_directory(&partial.0)?;
        let (files, bytes) = size_of(&partial.0)?;
        self.checkpoints.check()?;
        fs::rename(&partial.0, &directory).map_err(|error| match error.kind() {
            io::ErrorKind::ResourceBusy => io::Error::other("it is where a volume is mounted; name a directory within"),
            _ => error,
        })?;
        sync_directory(&parent)?;
        Ok(Checkpoint { files, bytes, linked })
    }

    /// Copies the files of one directory into a new one, synced.
    fn copy(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::create_dir(to)?;
        let (_, bytes) = size_of(from)?;
        let volume = statvfs(to)?;
        let free = volume.f_bavail.saturating_mul(volume.f_frsize);
        if free < bytes {
            return Err(io::Error::other(format!("it needs {bytes} bytes, and its volume has {free} left")));
        }
        let mut buffer = vec![0; COPY_BYTES];
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            let mut source = File::open(entry.path())?;
            let mut copy = File::create_new(to.join(entry.file_name()))?;
            loop {
                self.checkpoints.check()?;
                let read = source.read(&mut buffer)?;
                if read == 0 {
                    break;
                }
                copy.write_all(&buffer[..read])?;
                copy.sync_data()?;
            }
            copy.sync_all()?;
            // Nobody reads this again; what the broker reads should stay cached instead. Only a hint, so it may fail.
            let _ = fadvise(&copy, 0, None, Advice::DontNeed);
        }
        Ok(())
    }
}

impl Rocks {
    /// Has RocksDB make `directory`, which does not exist: of links, on the volume of the data directory.
    fn link_to(&self, directory: &Path) -> io::Result<()> {
        let made = self.with(|db| {
            // While nothing is deleted, nothing is put aside to be recycled either.
            let mut made = db.disable_file_deletions();
            if made.is_ok() {
                made = (0..=RECYCLED_WALS).try_for_each(|_| begin_wal(db)).and_then(|()| {
                    // Flushes, so that the WAL to be copied is short.
                    rocksdb::checkpoint::Checkpoint::new(db)?.create_checkpoint(directory)
                });
                made = made.and(db.enable_file_deletions());
            }
            made.map_err(|error| self.open_error(error))
        });
        made.map_err(|error| match error {
            StoreError::Open { reason, .. } => io::Error::other(reason),
            error => io::Error::other(error),
        })
    }
}

/// Has RocksDB go on with another WAL file: by a flush of the default family, which nothing else is written to. It needs
/// something to flush.
fn begin_wal(db: &DB) -> Result<(), rocksdb::Error> {
    db.delete(b"")?;
    db.flush()
}

/// Removes what a checkpoint has left in a data directory whose broker was killed meanwhile.
pub(super) fn remove_leftovers(data_directory: &Path) {
    if let Err(error) = Scratch::remove(&data_directory.join(LINKS)) {
        tracing::warn!(%error, "what is left of an unfinished checkpoint stays in the data directory");
    }
}

/// Checks the directory that is asked for. Answers its path without links, that of the directory it is in, and that of
/// the one beside it that gets its name in the end.
fn target(asked: &Path, data_directory: &Path) -> io::Result<(PathBuf, PathBuf, PathBuf)> {
    let invalid = |text: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    if !asked.is_absolute() {
        return invalid("the path must be absolute");
    }
    let (Some(parent), Some(name)) = (asked.parent(), asked.file_name()) else {
        return invalid("it has no name");
    };
    let parent = parent
        .canonicalize()
        .map_err(|error| io::Error::new(error.kind(), format!("the directory it is to be in: {error}")))?;
    let directory = parent.join(name);
    if directory.starts_with(data_directory) {
        return invalid("it is in the data directory");
    }
    match fs::read_dir(&directory).map(|mut entries| entries.next()) {
        Ok(None) => {}
        Ok(Some(_)) => return invalid("it is not empty"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let mut hidden = OsString::from(".");
    hidden.push(name);
    hidden.push(".checkpoint");
    let partial = parent.join(hidden);
    Ok((directory, parent, partial))
}

/// Whether a hard link of the file can be made at `link`; none stays there.
fn can_link(file: &Path, link: &Path) -> io::Result<bool> {
    match fs::hard_link(file, link) {
        Ok(()) => fs::remove_file(link).map(|()| true),
        // Another volume, or a file system without links.
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            // Not to be told from a directory that may not be written to, which the copy will find out.
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// The number of files in a directory, and their bytes.
fn size_of(directory: &Path) -> io::Result<(u64, u64)> {
    fs::read_dir(directory)?.try_fold((0, 0), |(files, bytes), entry| Ok((files + 1, bytes + entry?.metadata()?.len())))
}

fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

/// A directory that is removed in the end, unless it was renamed.
struct Scratch(PathBuf);

impl Scratch {
    fn new(path: PathBuf) -> io::Result<Self> {
        Self::remove(&path)?;
        Ok(Scratch(path))
    }

    /// Removes the directory, and the one that RocksDB makes it from.
    fn remove(path: &Path) -> io::Result<()> {
        let mut made_from = path.as_os_str().to_owned();
        made_from.push(".tmp");
        for path in [path, Path::new(&made_from)] {
            match fs::remove_dir_all(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = Self::remove(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "what is left of a checkpoint cannot be removed");
        }
    }
}
