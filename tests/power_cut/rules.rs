//! What the shim itself promises, tried with files of this program's own: it runs itself again with the shim preloaded.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
};

use super::{
    client::Rng,
    disk::Disk,
    power::{ForgetfulDisk, cut_without_luck},
};

const DIRECTORY: &str = "POWER_CUT_RULES";

/// Does nothing by itself: [`after_a_cut`] runs it under the shim.
#[test]
#[ignore = "a part of other tests"]
fn writes_files_and_syncs_some() {
    let Some(directory) = std::env::var_os(DIRECTORY) else { return };
    write_files(Path::new(&directory)).expect("the files are written");
}

fn write_files(at: &Path) -> std::io::Result<()> {
    let sync_names = || File::open(at)?.sync_all();
    // Contents, with and without their names.
    fs::write(at.join("written"), "gone")?;
    let mut synced = File::create(at.join("synced"))?;
    synced.write_all(b"kept")?;
    synced.sync_data()?;
    let mut old = OpenOptions::new().append(true).open(at.join("old"))?;
    old.write_all(b", and more")?;
    old.sync_data()?;
    old.write_all(b", and what is gone")?;
    let overwritten = OpenOptions::new().write(true).open(at.join("overwritten"))?;
    overwritten.write_all_at(b"NEW", 0)?;
    overwritten.write_all_at(b"END", 6)?;
    overwritten.sync_all()?;
    overwritten.set_len(4)?;
    let shortened = OpenOptions::new().write(true).open(at.join("shortened"))?;
    shortened.set_len(2)?;
    shortened.set_len(4)?;
    shortened.write_all_at(b"z", 3)?;
    shortened.sync_data()?;
    if std::env::var_os("POWER_CUT_RULES_STOP").is_some() {
        return Ok(());
    }
    // Names.
    fs::rename(at.join("replacement"), at.join("replaced"))?;
    fs::remove_file(at.join("removed"))?;
    fs::create_dir(at.join("directory"))?;
    fs::rename(at.join("moved"), at.join("directory/moved"))?;
    fs::write(at.join("directory/empty"), "gone")?;
    File::open(at.join("directory"))?.sync_all()?;
    sync_names()?;
    fs::rename(at.join("old"), at.join("renamed"))?;
    fs::remove_file(at.join("shortened"))?;
    // The number of the removed file may be used again.
    fs::write(at.join("shortened"), "another")
}

/// Names and contents, with directories' in front.
fn contents(at: &Path) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(at).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            found.extend(contents(&path).into_iter().map(|(inner, text)| (format!("{name}/{inner}"), text)));
        } else {
            found.push((name, String::from_utf8(fs::read(&path).unwrap()).unwrap()));
        }
    }
    found.sort();
    found
}

/// What is left of the files, or nothing where there is no shim.
fn after_a_cut(journal: bool, stop_before_names: bool) -> Option<Vec<(String, String)>> {
    let mut disk = match ForgetfulDisk::new() {
        Ok(disk) => disk,
        Err(why) => {
            println!("SKIPPED: {why}");
            return None;
        }
    };
    let home = tempfile::tempdir().unwrap();
    let data: PathBuf = home.path().canonicalize().unwrap().join("volume/data");
    fs::create_dir_all(&data).unwrap();
    for (name, text) in [
        ("old", "old"),
        ("overwritten", "overwritten"),
        ("shortened", "abcd"),
        ("replaced", "replaced"),
        ("replacement", "replacement"),
        ("removed", "removed"),
        ("moved", "moved"),
    ] {
        fs::write(data.join(name), text).unwrap();
    }
    disk.before_start(&data, &mut Rng(1));
    disk.be(journal, 0);
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "rules::writes_files_and_syncs_some", "--ignored", "--test-threads", "1"]);
    command.envs(disk.environment(&data)).env(DIRECTORY, &data);
    if stop_before_names {
        command.env("POWER_CUT_RULES_STOP", "1");
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(data.join("written").exists(), "the files were not written: {output:?}");
    cut_without_luck(&data).unwrap();
    Some(contents(&data))
}

fn named(found: &[(String, String)]) -> Vec<(&str, &str)> {
    found.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect()
}

#[test]
fn contents_survive_when_they_were_synced_and_names_when_their_directory_was() {
    let Some(found) = after_a_cut(false, false) else { return };
    let expected = [
        ("directory/empty", ""),
        ("directory/moved", "moved"),
        ("old", "old, and more"),
        ("overwritten", "NEWrwrENDen"),
        ("replaced", "replacement"),
        ("shortened", "ab\0z"),
        ("synced", "kept"),
        ("written", ""),
    ];
    assert_eq!(named(&found), expected);
}

#[test]
fn a_new_files_name_survives_its_own_sync_on_a_file_system_with_a_journal_only() {
    let names = |found: Vec<(String, String)>| -> Vec<String> { found.into_iter().map(|(name, _)| name).collect() };
    let Some(strict) = after_a_cut(false, true) else { return };
    let old = ["moved", "old", "overwritten", "removed", "replaced", "replacement", "shortened"];
    assert_eq!(names(strict), old);
    let Some(journal) = after_a_cut(true, true) else { return };
    let with_new =
        ["moved", "old", "overwritten", "removed", "replaced", "replacement", "shortened", "synced", "written"];
    assert_eq!(names(journal), with_new);
}
