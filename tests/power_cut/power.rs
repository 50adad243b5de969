//! A disk that forgets what was not synced: the shim's shadow is laid before a start, and takes its place after the end.

use std::{
    collections::HashMap,
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use super::{broker::Environment, client::Rng, disk::Disk};

/// Why there can be no power cuts here.
pub type Unavailable = String;

/// Compiles the shim, once.
///
/// # Errors
/// What keeps it from working on this machine.
pub fn shim() -> Result<&'static Path, Unavailable> {
    static SHIM: OnceLock<Result<PathBuf, Unavailable>> = OnceLock::new();
    SHIM.get_or_init(build_shim).as_deref().map_err(Clone::clone)
}

fn build_shim() -> Result<PathBuf, Unavailable> {
    if !cfg!(all(target_os = "linux", target_env = "gnu", target_pointer_width = "64")) {
        return Err("the shim is for 64-bit Linux with glibc".to_owned());
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/power_cut/shim.c");
    let library = Path::new(env!("CARGO_TARGET_TMPDIR")).join("power_cut_shim.so");
    let fresh = library.with_extension(format!("{}.so", std::process::id()));
    let compiler = std::env::var_os("CC").unwrap_or_else(|| "cc".into());
    let output = Command::new(&compiler)
        .args(["-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread", "-o"])
        .args([&fresh, &source])
        .output()
        .map_err(|error| format!("no C compiler '{}': {error}", compiler.display()))?;
    assert!(output.status.success(), "shim.c: {}", String::from_utf8_lossy(&output.stderr));
    fs::rename(&fresh, &library).expect("the shim is put in its place");
    Ok(library)
}

/// What survives a cut beside what was synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Luck {
    /// Nothing.
    None,
    /// Any pages of what was written.
    Pages,
    /// The same, and all names: the file system's journal was just written.
    PagesAndNames,
}

/// The disk, with its shadow in a directory of its own.
pub struct ForgetfulDisk {
    shim: &'static Path,
    /// Whether the sync of a new file makes its name survive; drawn for each start.
    journal: bool,
    /// How much longer a sync takes, in microseconds; drawn for each start.
    sync_us: u64,
}

impl ForgetfulDisk {
    /// # Errors
    /// Why there can be none.
    pub fn new() -> Result<ForgetfulDisk, Unavailable> {
        Ok(ForgetfulDisk { shim: shim()?, journal: false, sync_us: 0 })
    }

    /// What a process has to be started with for its volume to be shadowed.
    pub fn environment(&self, data_dir: &Path) -> Environment {
        let volume = volume_of(data_dir).canonicalize().expect("the volume is there");
        let mut environment: Environment = vec![
            ("LD_PRELOAD", self.shim.into()),
            ("POWER_CUT_VOLUME", volume.as_path().into()),
            ("POWER_CUT_SHADOW", shadow_of(&volume).into()),
            ("POWER_CUT_SYNC_US", self.sync_us.to_string().into()),
        ];
        if self.journal {
            environment.push(("POWER_CUT_JOURNAL", OsString::from("1")));
        }
        environment
    }

    /// Draws nothing: it goes by these rules, and a sync takes so many microseconds longer.
    pub fn be(&mut self, journal: bool, sync_us: u64) {
        (self.journal, self.sync_us) = (journal, sync_us);
    }
}

impl Disk for ForgetfulDisk {
    fn before_start(&mut self, data_dir: &Path, rng: &mut Rng) -> Environment {
        self.journal = rng.one_in(2);
        self.sync_us = [0, 0, 1_000, 10_000][rng.range(0..4) as usize];
        let volume = volume_of(data_dir);
        fs::create_dir_all(volume).expect("the volume");
        lay_shadow(volume).expect("its shadow");
        self.environment(data_dir)
    }

    fn after_end(&mut self, data_dir: &Path, rng: &mut Rng) -> String {
        let luck = match rng.range(0..4) {
            0 | 1 => Luck::None,
            2 => Luck::Pages,
            _ => Luck::PagesAndNames,
        };
        let pages = cut(volume_of(data_dir), luck, rng).expect("the shadow takes the place of the volume");
        let rules = if self.journal { "journal" } else { "POSIX" };
        match luck {
            Luck::None => format!(" and power cut ({rules})"),
            Luck::Pages => format!(" and power cut ({rules}, {pages} unsynced pieces survive)"),
            Luck::PagesAndNames => format!(" and power cut ({rules}, {pages} unsynced pieces and all names survive)"),
        }
    }

    fn keeps_everything(&self) -> bool {
        false
    }
}

/// The directory that stands for the whole disk. The data directory is in it, so that its own creation has to last as well.
fn volume_of(data_dir: &Path) -> &Path {
    data_dir.parent().expect("an absolute path")
}

fn shadow_of(volume: &Path) -> PathBuf {
    volume.with_extension("shadow")
}

/// Everything that is there survives, to begin with.
fn lay_shadow(volume: &Path) -> io::Result<()> {
    let shadow = shadow_of(volume);
    if shadow.exists() {
        fs::remove_dir_all(&shadow)?;
    }
    fs::create_dir_all(shadow.join("files"))?;
    fs::create_dir_all(shadow.join("dirs"))?;
    lay_shadow_of(volume, &shadow)
}

fn lay_shadow_of(directory: &Path, shadow: &Path) -> io::Result<()> {
    let mut entries = String::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let id = format!("{}.0", entry.metadata()?.ino());
        let is_dir = entry.file_type()?.is_dir();
        if !is_dir && !entry.file_type()?.is_file() {
            continue; // a socket holds nothing
        }
        if is_dir {
            lay_shadow_of(&entry.path(), shadow)?;
        } else {
            fs::copy(entry.path(), shadow.join("files").join(&id))?;
        }
        entries += &entry_line(is_dir, &id, &name_of(&entry));
    }
    fs::write(shadow.join("dirs").join(format!("{}.0", fs::metadata(directory)?.ino())), entries)
}

fn entry_line(is_dir: bool, id: &str, name: &str) -> String {
    format!("{} {id} {name}\n", if is_dir { 'd' } else { 'f' })
}

fn name_of(entry: &fs::DirEntry) -> String {
    entry.file_name().into_string().expect("the broker's names are plain")
}

/// The ids that things in the volume have in its shadow now, by inode number.
fn newest_ids(kind: &Path) -> io::Result<HashMap<u64, u64>> {
    let mut newest = HashMap::new();
    for entry in fs::read_dir(kind)? {
        let name = name_of(&entry?);
        let parsed = name.split_once('.').and_then(|(inode, n)| Some((inode.parse().ok()?, n.parse().ok()?)));
        let Some((inode, n)) = parsed else { continue }; // entries whose writing was cut short
        let known: &mut u64 = newest.entry(inode).or_insert(n);
        *known = n.max(*known);
    }
    Ok(newest)
}

/// Puts what survives in the place of what was there.
pub fn cut_without_luck(data_dir: &Path) -> io::Result<()> {
    cut(volume_of(data_dir), Luck::None, &mut Rng(0)).map(drop)
}

/// The same, with some luck. Answers how many pieces survived that were not synced.
fn cut(volume: &Path, luck: Luck, rng: &mut Rng) -> io::Result<usize> {
    let shadow = shadow_of(volume);
    let root = fs::metadata(volume)?.ino();
    let mut pieces = 0;
    if luck != Luck::None {
        let (files, dirs) = (newest_ids(&shadow.join("files"))?, newest_ids(&shadow.join("dirs"))?);
        let mut fate = Fate {
            shadow: &shadow,
            files,
            dirs,
            names: luck == Luck::PagesAndNames,
            piece_bytes: if rng.one_in(2) { 512 } else { 4096 },
            percent: [5, 50, 95][rng.range(0..3) as usize],
            rng,
            pieces: 0,
        };
        fate.befall(volume)?;
        pieces = fate.pieces;
    }
    let next = volume.with_extension("next");
    if next.exists() {
        fs::remove_dir_all(&next)?;
    }
    restore(&shadow, &format!("{root}.0"), &next)?;
    fs::remove_dir_all(volume)?;
    fs::rename(&next, volume)?;
    fs::remove_dir_all(&shadow)?;
    Ok(pieces)
}

/// Builds a directory as it survives. A file whose name survives twice is the same file.
fn restore(shadow: &Path, id: &str, to: &Path) -> io::Result<()> {
    fs::create_dir(to)?;
    for line in fs::read_to_string(shadow.join("dirs").join(id))?.lines() {
        let mut words = line.splitn(3, ' ');
        let (Some(kind), Some(id), Some(name)) = (words.next(), words.next(), words.next()) else {
            panic!("the shim wrote the entry '{line}'")
        };
        match kind {
            "d" => restore(shadow, id, &to.join(name))?,
            _ => fs::hard_link(shadow.join("files").join(id), to.join(name))?,
        }
    }
    Ok(())
}

/// What becomes of what was not synced.
struct Fate<'a> {
    shadow: &'a Path,
    files: HashMap<u64, u64>,
    dirs: HashMap<u64, u64>,
    names: bool,
    piece_bytes: usize,
    percent: u64,
    rng: &'a mut Rng,
    pieces: usize,
}

impl Fate<'_> {
    fn befall(&mut self, directory: &Path) -> io::Result<()> {
        let mut entries = String::new();
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let inode = entry.metadata()?.ino();
            let is_dir = entry.file_type()?.is_dir();
            if !is_dir && !entry.file_type()?.is_file() {
                continue; // a socket, on an inode that was a file's before
            }
            // A creation that the kill came between is one that never was.
            let Some(n) = (if is_dir { &self.dirs } else { &self.files }).get(&inode) else { continue };
            let id = format!("{inode}.{n}");
            if is_dir {
                self.befall(&entry.path())?;
            } else {
                self.befall_file(&entry.path(), &id)?;
            }
            entries += &entry_line(is_dir, &id, &name_of(&entry));
        }
        if self.names {
            let inode = fs::metadata(directory)?.ino();
            fs::write(self.shadow.join("dirs").join(format!("{inode}.{}", self.dirs[&inode])), entries)?;
        }
        Ok(())
    }

    /// Lets some of the pieces through in which a file differs from what was synced of it.
    fn befall_file(&mut self, path: &Path, id: &str) -> io::Result<()> {
        const AT_ONCE: usize = 1 << 20;
        let synced = OpenOptions::new().read(true).write(true).open(self.shadow.join("files").join(id))?;
        let written = File::open(path)?;
        let size = written.metadata()?.len();
        if size < synced.metadata()?.len() && self.rng.one_in(2) {
            synced.set_len(size)?;
        }
        let (mut here, mut there) = (vec![0; AT_ONCE], vec![0; AT_ONCE]);
        for at in (0..size).step_by(AT_ONCE) {
            let got = read_at_most(&written, &mut here, at)?;
            let had = read_at_most(&synced, &mut there, at)?;
            for (piece, bytes) in here[..got].chunks(self.piece_bytes).enumerate() {
                let from = piece * self.piece_bytes;
                let same = from + bytes.len() <= had && bytes == &there[from..from + bytes.len()];
                if !same && self.rng.range(0..100) < self.percent {
                    synced.write_all_at(bytes, at + from as u64)?;
                    self.pieces += 1;
                }
            }
        }
        Ok(())
    }
}

/// Fills as much of `buffer` as the file has from `at` on.
fn read_at_most(mut file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    file.seek(SeekFrom::Start(at))?;
    let mut got = 0;
    while got < buffer.len() {
        match file.read(&mut buffer[got..])? {
            0 => break,
            more => got += more,
        }
    }
    Ok(got)
}
