//! A second copy of what a start cannot do without: CURRENT and the MANIFEST, in a subdirectory.
//!
//! A thread of the store looks once a second whether they have changed. A MANIFEST only grows, so its copy is the beginning
//! of it at worst. Beside them stands how far the database was synced, by which a start can tell a write-ahead log that lost
//! its end from one that a crash has torn, and what it lost.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::damage::{Unverified, verify_later};
use super::rocks::Rocks;
use super::{QueueId, QueueSeq};

/// Its place in the data directory.
pub(super) const DIRECTORY: &str = "mirror";
const CURRENT: &str = "CURRENT";
/// [`Noted`]: a CRC-32C over the rest, the sequence number, and pairs of queue and tail; 4 and then 8 bytes each.
const NOTED: &str = "noted";

/// Between two looks.
const INTERVAL: Duration = Duration::from_secs(1);

/// Between two tables that are verified in the background: the disk has other things to do.
const BETWEEN_TABLES: Duration = Duration::from_millis(100);

/// With more queues than this written since the start, their tails are not noted: that would be a lot to write each second.
const MAX_TAILS: usize = 10_000;

/// How far a database was synced.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Noted {
    /// The number of the last entry.
    pub sequence: u64,
    /// Of queues that were written to.
    pub tails: BTreeMap<QueueId, QueueSeq>,
}

/// The mirror of an open database.
pub(super) struct Mirror {
    directory: PathBuf,
    copied: Mutex<Copied>,
    tails: Mutex<BTreeMap<QueueId, QueueSeq>>,
    stop: Mutex<bool>,
    wake: Condvar,
}

#[derive(Default)]
struct Copied {
    /// The MANIFEST's name and how much of it.
    manifest: String,
    bytes: u64,
    noted: u64,
}

impl Mirror {
    /// The mirror of the database in `data_directory`, as yet without anything that this start knows.
    pub fn new(data_directory: &Path) -> Mirror {
        let directory = data_directory.to_owned();
        Mirror {
            directory,
            copied: Mutex::default(),
            tails: Mutex::default(),
            stop: Mutex::new(false),
            wake: Condvar::new(),
        }
    }

    /// Forgets what earlier starts noted: this one may have begun anew before that.
    pub fn begin(&self) -> io::Result<()> {
        fs::create_dir_all(self.directory.join(DIRECTORY))?;
        match fs::remove_file(self.directory.join(DIRECTORY).join(NOTED)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Remembers what was written and synced.
    pub fn wrote(&self, written: &[(QueueId, QueueSeq)]) {
        if !written.is_empty() {
            let mut tails = self.tails.lock();
            if tails.len() < MAX_TAILS {
                tails.extend(written.iter().copied());
            }
        }
    }

    /// Takes in what has changed. `synced` is the number of the last entry that is known to be synced, or 0.
    pub fn renew(&self, synced: u64) -> io::Result<()> {
        let mut copied = self.copied.lock();
        let current = fs::read(self.directory.join(CURRENT))?;
        let name = String::from_utf8_lossy(&current).trim_end().to_owned();
        let bytes = fs::metadata(self.directory.join(&name))?.len();
        let mirror = self.directory.join(DIRECTORY);
        if copied.manifest != name {
            copied.bytes = write_whole(&mirror.join(&name), &fs::read(self.directory.join(&name))?)?;
            write_whole(&mirror.join(CURRENT), &current)?;
            remove_others(&mirror, &name)?;
            copied.manifest = name;
        } else if bytes > copied.bytes {
            let mut file = File::open(self.directory.join(&name))?;
            file.seek(SeekFrom::Start(copied.bytes))?;
            let mut news = Vec::new();
            file.read_to_end(&mut news)?;
            let mut copy = OpenOptions::new().write(true).open(mirror.join(&name))?;
            copy.set_len(copied.bytes)?; // without what a failed attempt has left
            copy.seek(SeekFrom::Start(copied.bytes))?;
            copy.write_all(&news)?;
            copy.sync_data()?;
            copied.bytes += news.len() as u64;
        }
        if synced > copied.noted {
            let noted = Noted { sequence: synced, tails: self.noted_tails() }.encode();
            // Without a sync: an older note, or none, costs a warning at worst.
            let new = mirror.join("noted.new");
            fs::write(&new, &noted)?;
            fs::rename(new, mirror.join(NOTED))?;
            copied.noted = synced;
        }
        Ok(())
    }

    fn noted_tails(&self) -> BTreeMap<QueueId, QueueSeq> {
        let tails = self.tails.lock();
        if tails.len() < MAX_TAILS { tails.clone() } else { BTreeMap::new() }
    }

    /// Waits before the next look. False: there will be none.
    fn wait(&self, interval: Duration) -> bool {
        let mut stop = self.stop.lock();
        self.wake.wait_while_for(&mut stop, |stop| !*stop, interval);
        !*stop
    }

    /// Lets [`Rocks::keep_mirror`] end.
    pub fn stop(&self) {
        *self.stop.lock() = true;
        self.wake.notify_all();
    }
}

impl Rocks {
    /// Begins the mirror of a database that was just opened. A disk that does not take it must not hold up a start.
    pub fn begin_mirror(&self) {
        if let Err(error) = self.mirror().begin().and_then(|()| self.mirror().renew(0)) {
            tracing::warn!(%error, "there is no mirror of CURRENT and MANIFEST");
        }
    }

    /// The mirror's thread, which first verifies what a start has left for later.
    pub fn keep_mirror(&self, unverified: &Unverified) {
        let mut failed = false;
        let goes_on = || {
            self.renew_mirror(&mut false);
            self.mirror().wait(BETWEEN_TABLES)
        };
        if let Some((file, what)) = verify_later(self.path(), unverified, &goes_on) {
            self.count_damage();
            let path = self.path().display();
            tracing::error!(file, "{what}; stop the broker and run 'leveret check --repair --data-dir {path}'");
        }
        while self.mirror().wait(INTERVAL) {
            self.renew_mirror(&mut failed);
        }
    }

    /// Renews the mirror; a failure is logged once, as `failed` remembers.
    pub fn renew_mirror(&self, failed: &mut bool) {
        match self.mirror().renew(self.synced()) {
            Ok(()) => *failed = false,
            // A new MANIFEST has taken the old one's place meanwhile: the next look finds it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                if !std::mem::replace(failed, true) {
                    tracing::warn!(%error, "the mirror of CURRENT and MANIFEST is not up to date");
                }
            }
        }
    }
}

impl Noted {
    fn encode(&self) -> Vec<u8> {
        let tails = self.tails.iter().flat_map(|(queue, tail)| [queue.0, *tail]);
        let numbers: Vec<u8> = std::iter::once(self.sequence).chain(tails).flat_map(u64::to_be_bytes).collect();
        [&crc32c::crc32c(&numbers).to_be_bytes()[..], &numbers].concat()
    }

    fn decode(noted: &[u8]) -> Option<Noted> {
        let (crc, numbers) = noted.split_first_chunk::<4>()?;
        if crc32c::crc32c(numbers) != u32::from_be_bytes(*crc) {
            return None;
        }
        let mut numbers = numbers.as_chunks::<8>().0.iter().map(|number| u64::from_be_bytes(*number));
        let sequence = numbers.next()?;
        let tails = std::iter::from_fn(|| Some((QueueId(numbers.next()?), numbers.next()?))).collect();
        Some(Noted { sequence, tails })
    }
}

/// What was noted last, if that can be read.
pub(super) fn noted(data_directory: &Path) -> Option<Noted> {
    Noted::decode(&fs::read(data_directory.join(DIRECTORY).join(NOTED)).ok()?)
}

/// Writes a file so that it is there as a whole or not at all, synced. Answers its bytes.
pub(super) fn write_whole(path: &Path, contents: &[u8]) -> io::Result<u64> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let mut file = File::create(&new)?;
    file.write_all(contents)?;
    file.sync_all()?;
    fs::rename(&new, path)?;
    if let Some(directory) = path.parent() {
        File::open(directory)?.sync_all()?;
    }
    Ok(contents.len() as u64)
}

/// Removes MANIFESTs other than `name`.
fn remove_others(mirror: &Path, name: &str) -> io::Result<()> {
    for entry in fs::read_dir(mirror)? {
        let entry = entry?;
        let other = entry.file_name();
        if other.to_string_lossy().starts_with("MANIFEST-") && other.to_string_lossy() != name {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}
