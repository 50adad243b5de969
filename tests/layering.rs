//! Which module may know which: compares every `crate::` in `src/` with the table below.
//!
//! A line that is missing here is a decision to take, not a formality: the table is what lets the protocol be
//! tested without sockets, the broker without frames, and the store without either.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should say where")]

use std::fs;
use std::path::{Path, PathBuf};

const EVERYTHING: &[&str] = &["*"];

/// Module, what it may import (a module, or a path into one), and what it must not touch all the same.
const TABLE: &[(&str, &[&str], &[&str])] = &[
    ("model", &[], &[]),
    ("wire", &[], &[]),
    ("store", &[], &[]),
    ("clock", &[], &[]),
    ("metrics", &[], &[]),
    ("broker", &["model", "store", "clock", "metrics"], &["tokio::net"]),
    ("auth", &["model", "store"], &[]),
    ("config", &["auth", "broker::policy", "broker::arguments::QueueType"], &[]),
    ("telemetry", &["config"], &[]),
    ("session", &["model", "wire", "broker", "auth", "clock", "metrics"], &["tokio::net", "tokio::spawn"]),
    ("net", &["session", "wire", "config", "metrics", "clock", "broker::Broker"], &[]),
    ("http", &["model", "auth", "broker", "config", "metrics"], &["crate::broker::queue"]),
    ("control", &["broker", "net::Registry"], &["crate::broker::queue"]),
    ("cli", EVERYTHING, &[]),
    ("server", EVERYTHING, &[]),
    ("lib", EVERYTHING, &[]),
    ("main", EVERYTHING, &[]),
];

#[test]
fn modules_import_only_what_the_table_allows() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut faults = Vec::new();
    for file in rust_files(&root) {
        let shown = file.strip_prefix(&root).unwrap().display().to_string();
        let module = shown.split('/').next().unwrap().trim_end_matches(".rs");
        let Some((_, may, never)) = TABLE.iter().find(|(name, ..)| *name == module) else {
            faults.push(format!("src/{shown}: module '{module}' is not in the table"));
            continue;
        };
        let code = without_comments(&fs::read_to_string(&file).unwrap());
        for path in crate_paths(&code) {
            let within = |prefix: &str| path == prefix || path.starts_with(&format!("{prefix}::"));
            if !within(module) && *may != EVERYTHING && !may.iter().any(|prefix| within(prefix)) {
                let may = if may.is_empty() { "nothing".to_owned() } else { may.join(", ") };
                faults.push(format!("src/{shown}: imports crate::{path}, but '{module}' may import {may}"));
            }
        }
        for path in never.iter().filter(|path| code.contains(**path)) {
            faults.push(format!("src/{shown}: mentions {path}, which '{module}' must not"));
        }
    }
    assert!(faults.is_empty(), "\n{}\n(the table is in tests/layering.rs)\n", faults.join("\n"));
}

/// A link in a comment is a pointer for the reader, not an import.
fn without_comments(text: &str) -> String {
    text.lines().filter(|line| !line.trim_start().starts_with("//")).collect::<Vec<_>>().join("\n")
}

/// Every path after `crate::`, with `crate::{a, b::C}` taken apart at its first level.
fn crate_paths(code: &str) -> Vec<String> {
    let path_at = |text: &str| {
        let end = text.find(|c: char| !c.is_alphanumeric() && !"_:".contains(c));
        text[..end.unwrap_or(text.len())].trim_end_matches(':').to_owned()
    };
    let mut paths = Vec::new();
    for (at, start) in code.match_indices("crate::") {
        let before = code[..at].chars().next_back();
        let rest = &code[at + start.len()..];
        if before.is_some_and(|c| c.is_alphanumeric() || "_$:".contains(c)) {
            continue; // another word that ends in `crate`, or a macro's `$crate`
        }
        let Some(group) = rest.strip_prefix('{') else {
            paths.push(path_at(rest));
            continue;
        };
        let (mut depth, mut item) = (0, String::new());
        for c in group.chars() {
            match c {
                '}' if depth == 0 => break,
                ',' if depth == 0 => paths.push(path_at(std::mem::take(&mut item).trim())),
                '{' => depth += 1,
                '}' => depth -= 1,
                _ if depth == 0 => item.push(c),
                _ => {}
            }
        }
        paths.push(path_at(item.trim()));
    }
    paths.retain(|path| !path.is_empty());
    paths
}

fn rust_files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

#[test]
fn grouped_and_nested_imports_are_found() {
    let code = "use crate::{model::{A, B}, wire}; fn f(x: crate::store::Key) { $crate::m!(); other_crate::x() }";
    assert_eq!(crate_paths(code), ["model", "wire", "store::Key"]);
}
