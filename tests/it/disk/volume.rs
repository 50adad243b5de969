//! Volumes that are small, and syncs that fail.

use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

/// A small volume of its own, unmounted at the end.
pub struct Volume {
    directory: TempDir,
}

impl Volume {
    /// `None`, with a word about it, where mounting is not permitted.
    pub fn mount(bytes: u64) -> Option<Volume> {
        let directory = tempfile::tempdir().unwrap();
        let options = format!("size={bytes}");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &options, "leveret"]).arg(directory.path()).output();
        match mounted {
            Ok(output) if output.status.success() => Some(Volume { directory }),
            other => {
                eprintln!("SKIPPED: a tmpfs cannot be mounted here, which takes root: {other:?}");
                None
            }
        }
    }

    /// Where a broker may keep its data.
    pub fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    pub fn free_bytes(&self) -> u64 {
        let volume = rustix::fs::statvfs(self.directory.path()).unwrap();
        volume.f_bavail * volume.f_frsize
    }

    /// Takes what is free but for so many bytes, until the answer is dropped.
    pub fn fill(&self, leave_bytes: u64) -> Ballast {
        let path = self.directory.path().join("ballast");
        let mut file = File::create(&path).unwrap();
        let block = vec![0; 64 << 10];
        while self.free_bytes() > leave_bytes && file.write_all(&block).is_ok() {}
        Ballast(path)
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        // A broker that is being killed may still have files open.
        let _ = Command::new("umount").arg("-l").arg(self.directory.path()).status();
    }
}

/// See [`Volume::fill`].
pub struct Ballast(PathBuf);

impl Drop for Ballast {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A library that fails syncs while it is told to.
pub struct Fault {
    directory: TempDir,
}

impl Fault {
    /// `None`, with a word about it, without a C compiler.
    pub fn build() -> Option<Fault> {
        let directory = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/disk/fail_sync.c");
        let library = directory.path().join("fail_sync.so");
        let mut compiler = Command::new("cc");
        match compiler.args(["-shared", "-fPIC", "-O1", "-o"]).arg(&library).arg(source).output() {
            Ok(output) if output.status.success() => Some(Fault { directory }),
            other => {
                eprintln!("SKIPPED: `cc` cannot compile the library that fails syncs: {other:?}");
                None
            }
        }
    }

    fn flag(&self) -> PathBuf {
        self.directory.path().join("failing")
    }

    pub fn preload(&self, command: &mut Command) {
        command.env("LD_PRELOAD", self.directory.path().join("fail_sync.so")).env("FAIL_SYNC_FLAG", self.flag());
    }

    /// From now on no sync succeeds.
    pub fn begin(&self) {
        File::create(self.flag()).unwrap();
    }

    pub fn end(&self) {
        std::fs::remove_file(self.flag()).unwrap();
    }
}
