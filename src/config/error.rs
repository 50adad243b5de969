//! What can be wrong with a configuration, in one line each.

use std::fmt;
use std::path::PathBuf;

/// Where a value was set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    Flag(&'static str),
    Env(String),
    File(PathBuf),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(flag) => write!(f, "flag --{flag}"),
            Self::Env(name) => write!(f, "environment variable {name}"),
            Self::File(path) => write!(f, "file {}", path.display()),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read configuration file '{}': {source}", path.display())]
    ReadFile { path: PathBuf, source: std::io::Error },
    #[error("{}, line {line}, column {column}: {message}", path.display())]
    Syntax { path: PathBuf, line: usize, column: usize, message: String },
    #[error("unknown key '{key}' in {}; {hint}", path.display())]
    UnknownKey { path: PathBuf, key: String, hint: String },
    #[error("{key} = '{value}' ({origin}): {reason}")]
    Invalid { key: String, value: String, origin: Origin, reason: String },
    /// Each value is allowed on its own, but not together with another one.
    #[error("{key} = '{value}': {reason}")]
    Conflict { key: &'static str, value: String, reason: String },
}
