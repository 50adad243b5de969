//! The TOML file: settings by key, tables as sections, users and policies as lists of tables.

use std::path::Path;

use serde::Deserialize;
use toml::{Table, Value as Toml};

use super::settings::SETTINGS;
use super::value::Value;
use super::{ConfigError, Draft, Origin, policies};
use crate::auth::{HashAlgorithm, InvalidPattern, PasswordHash, Pattern, Permission, User};

const USERS: &str = "users";
const USER_KEYS: &[&str] = &["name", "password", "password_hash", "hash_algorithm", "tags", "permissions"];
const PERMISSION_KEYS: &[&str] = &["vhost", "configure", "write", "read"];
/// How many letters a key may be off and still be guessed.
const MAX_SLIPS: usize = 3;

/// Reads the file into the draft.
pub(super) fn read(path: &Path, draft: &mut Draft) -> Result<(), ConfigError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| ConfigError::ReadFile { path: path.to_path_buf(), source })?;
    let table: Table = text.parse().map_err(|error| syntax(path, &text, &error))?;
    for (key, value) in &table {
        match value {
            Toml::Table(section) if is_section(key) => {
                for (name, value) in section {
                    apply(path, draft, &format!("{key}.{name}"), value)?;
                }
            }
            value if key == USERS => draft.config.users = users(path, value)?,
            value => match policies::kind_of(key) {
                Some(kind) => draft.config.policies.extend(policies::read(path, kind, value)?),
                None => apply(path, draft, key, value)?,
            },
        }
    }
    Ok(())
}

fn is_section(name: &str) -> bool {
    SETTINGS.iter().any(|setting| setting.key.split_once('.').is_some_and(|(section, _)| section == name))
}

fn apply(path: &Path, draft: &mut Draft, key: &str, value: &Toml) -> Result<(), ConfigError> {
    let Some(setting) = SETTINGS.iter().find(|setting| setting.key == key) else {
        let known = SETTINGS.iter().map(|setting| setting.key).chain([USERS]).chain(policies::LISTS);
        return Err(unknown_key(path, key, key, known));
    };
    match Value::from_toml(value) {
        Some(value) => setting.set(draft, &value, Origin::File(path.to_path_buf())),
        None => Err(invalid(path, key, value, "must be a single value or a list of them".to_owned())),
    }
}

/// A user as the file has it.
#[derive(Deserialize)]
struct UserEntry {
    name: String,
    password: Option<String>,
    password_hash: Option<String>,
    hash_algorithm: Option<String>,
    #[serde(default)]
    tags: Vec<String>,
    #[serde(default)]
    permissions: Vec<PermissionEntry>,
}

#[derive(Deserialize)]
struct PermissionEntry {
    #[serde(default = "default_vhost")]
    vhost: String,
    configure: String,
    write: String,
    read: String,
}

fn default_vhost() -> String {
    "/".to_owned()
}

fn users(path: &Path, value: &Toml) -> Result<Vec<User>, ConfigError> {
    let entries = value
        .as_array()
        .ok_or_else(|| invalid(path, USERS, value, "must be a list of tables, each under [[users]]".to_owned()))?;
    let mut users: Vec<User> = Vec::with_capacity(entries.len());
    for (index, entry) in entries.iter().enumerate() {
        let at = format!("{USERS}[{index}]");
        check_user_keys(path, &at, entry)?;
        let user = entry.clone().try_into().map_err(|error| error.message().trim().to_owned()).and_then(user).map_err(
            |reason| ConfigError::Invalid {
                key: at.clone(),
                value: entry.get("name").and_then(Toml::as_str).unwrap_or("without a name").to_owned(),
                origin: Origin::File(path.to_path_buf()),
                reason,
            },
        )?;
        if users.iter().any(|earlier| earlier.name == user.name) {
            let name = Toml::String(user.name);
            return Err(invalid(path, &format!("{at}.name"), &name, "must not be listed twice".to_owned()));
        }
        users.push(user);
    }
    Ok(users)
}

/// Turns an entry into a user; the error says which of its keys is wrong and why.
fn user(entry: UserEntry) -> Result<User, String> {
    if entry.name.is_empty() || entry.name.len() > 255 {
        return Err("name must have 1 to 255 bytes".to_owned());
    }
    let hash = match (&entry.password, &entry.password_hash) {
        (Some(password), None) if password.is_empty() => {
            return Err("password must not be blank".to_owned());
        }
        (Some(_), None) if entry.hash_algorithm.is_some() => {
            return Err("hash_algorithm goes with password_hash, not with password".to_owned());
        }
        (Some(password), None) => PasswordHash::new(password),
        (None, Some(hash)) => stored_hash(hash, entry.hash_algorithm.as_deref())?,
        _ => return Err("must have exactly one of password and password_hash".to_owned()),
    };
    let mut user = User::new(entry.name, hash);
    user.tags = entry.tags;
    for entry in entry.permissions {
        if user.permissions.contains_key(&entry.vhost) {
            return Err(format!("permissions must not name vhost '{}' twice", entry.vhost));
        }
        let pattern = |key, source: &str| {
            Pattern::parse(source).map_err(|error: InvalidPattern| {
                format!("{key} = '{source}' in permissions for vhost '{}' is {error}", entry.vhost)
            })
        };
        let permission = Permission {
            configure: pattern("configure", &entry.configure)?,
            write: pattern("write", &entry.write)?,
            read: pattern("read", &entry.read)?,
        };
        user = user.with_permission(entry.vhost, permission);
    }
    Ok(user)
}

fn stored_hash(hash: &str, algorithm: Option<&str>) -> Result<PasswordHash, String> {
    let algorithm = match algorithm {
        None => HashAlgorithm::default(),
        Some(name) => name.parse().map_err(|error| format!("hash_algorithm = '{name}' is {error}"))?,
    };
    PasswordHash::decode(algorithm, hash).map_err(|error| format!("password_hash: {error}"))
}

/// A misspelt key would silently be a permission or a password less.
fn check_user_keys(path: &Path, at: &str, entry: &Toml) -> Result<(), ConfigError> {
    let keys_of = |value: &Toml| value.as_table().map(|table| table.keys().cloned().collect()).unwrap_or_default();
    let check = |at: &str, keys: Vec<String>, known: &[&'static str]| match keys
        .into_iter()
        .find(|key| !known.contains(&key.as_str()))
    {
        Some(key) => Err(unknown_key(path, &format!("{at}.{key}"), &key, known.iter().copied())),
        None => Ok(()),
    };
    check(at, keys_of(entry), USER_KEYS)?;
    let permissions = entry.get("permissions").and_then(Toml::as_array);
    for (index, permission) in permissions.into_iter().flatten().enumerate() {
        check(&format!("{at}.permissions[{index}]"), keys_of(permission), PERMISSION_KEYS)?;
    }
    Ok(())
}

pub(super) fn invalid(path: &Path, key: &str, value: &Toml, reason: String) -> ConfigError {
    ConfigError::Invalid {
        key: key.to_owned(),
        value: value.as_str().map_or_else(|| value.to_string().replace('\n', " "), str::to_owned),
        origin: Origin::File(path.to_path_buf()),
        reason,
    }
}

fn syntax(path: &Path, text: &str, error: &toml::de::Error) -> ConfigError {
    let at = error.span().map_or(0, |span| span.start.min(text.len()));
    let before = text.get(..at).unwrap_or_default();
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    ConfigError::Syntax {
        path: path.to_path_buf(),
        line: before.matches('\n').count() + 1,
        column: before[line_start..].chars().count() + 1,
        message: error.message().replace('\n', "; "),
    }
}

/// Names the key that was most likely meant, or else all that there are.
pub(super) fn unknown_key(
    path: &Path,
    shown: &str,
    key: &str,
    known: impl Iterator<Item = &'static str>,
) -> ConfigError {
    let known: Vec<_> = known.collect();
    let nearest = known
        .iter()
        .map(|candidate| {
            // A key in the wrong section is recognised by its last part.
            let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
            let slips = distance(key, candidate).min(distance(&last(key), &last(candidate)));
            (slips, *candidate)
        })
        .min();
    let hint = match nearest {
        Some((slips, candidate)) if slips <= MAX_SLIPS && slips < key.len() => {
            format!("did you mean '{candidate}'?")
        }
        _ => format!("known keys are {}", known.join(", ")),
    };
    ConfigError::UnknownKey { path: path.to_path_buf(), key: shown.to_owned(), hint }
}

/// Letters to add, drop or change to get from one word to the other (Levenshtein).
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, b) in to.iter().enumerate() {
            let changed = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::distance;

    #[test]
    fn distance_counts_single_letter_slips() {
        for (from, to, slips) in
            [("port", "port", 0), ("prot", "port", 2), ("por", "port", 1), ("", "abc", 3), ("kitten", "sitting", 3)]
        {
            assert_eq!(distance(from, to), slips, "{from} {to}");
        }
    }
}
