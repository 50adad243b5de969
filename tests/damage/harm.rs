//! What is done to one file.

use std::{fmt, fs, path::Path};

use super::client::Rng;

enum Deed {
    Truncated { to: usize, of: usize },
    Flipped(Vec<(usize, u8)>),
    Filled(usize),
}

/// See the module.
pub struct Harm {
    pub kind: &'static str,
    file: String,
    deed: Deed,
}

/// Copies a data directory. Files that nobody writes to are linked.
pub fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (name, target) = (entry.file_name(), to.join(entry.file_name()));
        let name = name.to_string_lossy();
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else if name.ends_with(".sst") || name.ends_with(".blob") {
            fs::hard_link(entry.path(), target).unwrap();
        } else if entry.file_type().unwrap().is_file() {
            fs::copy(entry.path(), target).unwrap(); // not a killed broker's socket
        }
    }
}

fn kind_of(file: &str) -> &'static str {
    match file {
        _ if file.starts_with("mirror/") => "mirror",
        _ if file.ends_with(".log") => "log",
        _ if file.ends_with(".sst") => "table",
        _ if file.ends_with(".blob") => "blob",
        _ if file.starts_with("MANIFEST") => "MANIFEST",
        _ if file.starts_with("OPTIONS") => "OPTIONS",
        "CURRENT" => "CURRENT",
        "IDENTITY" => "IDENTITY",
        "LOCK" => "LOCK",
        _ => "other",
    }
}

fn files(directory: &Path, prefix: &str) -> Vec<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        match entry.file_type().unwrap().is_dir() {
            true => names.extend(files(&entry.path(), &format!("{name}/"))),
            false => names.push(name),
        }
    }
    names.sort();
    names
}

impl Harm {
    /// Damages one file of a directory: in even rounds any, in odd ones one of a kind, so that all kinds get their turn.
    pub fn do_some(directory: &Path, rng: &mut Rng, round: u64) -> Harm {
        let all = files(directory, "");
        let mut choice: Vec<&String> = all.iter().collect();
        if round % 2 == 1 {
            let mut kinds: Vec<_> = all.iter().map(|file| kind_of(file)).collect();
            kinds.sort_unstable();
            kinds.dedup();
            let kind = kinds[rng.range(0..kinds.len() as u64) as usize];
            choice.retain(|file| kind_of(file) == kind);
        }
        let file = choice[rng.range(0..choice.len() as u64) as usize].clone();
        let path = directory.join(&file);
        let mut bytes = fs::read(&path).unwrap();
        let len = bytes.len();
        let deed = if len == 0 {
            bytes = vec![rng.next() as u8; 100];
            Deed::Filled(100)
        } else if rng.one_in(2) {
            bytes.truncate(rng.range(0..len as u64) as usize);
            Deed::Truncated { to: bytes.len(), of: len }
        } else {
            let flips: Vec<_> =
                (0..rng.range(1..9)).map(|_| (rng.range(0..len as u64) as usize, rng.range(0..8) as u8)).collect();
            flips.iter().for_each(|(at, bit)| bytes[*at] ^= 1 << bit);
            Deed::Flipped(flips)
        };
        fs::remove_file(&path).unwrap(); // which may be a link
        fs::write(&path, bytes).unwrap();
        Harm { kind: kind_of(&file), file, deed }
    }

    /// How many bits were flipped, if that is what was done.
    pub fn flips(&self) -> Option<usize> {
        match &self.deed {
            Deed::Flipped(flips) => Some(flips.len()),
            _ => None,
        }
    }

    /// Nothing may be lost by damage to such a file.
    pub fn is_harmless(&self) -> bool {
        !matches!(self.kind, "log" | "table" | "blob")
    }
}

impl fmt::Display for Harm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.deed {
            Deed::Truncated { to, of } => write!(f, "{} truncated to {to} of {of} bytes", self.file),
            Deed::Flipped(flips) => write!(f, "{} with bits flipped at {flips:?}", self.file),
            Deed::Filled(bytes) => write!(f, "{} with {bytes} bytes in it", self.file),
        }
    }
}
