//! `[[policies]]` and `[[operator_policies]]` of the file: lists of tables, checked as the HTTP API would check them.

use std::path::Path;

use toml::Value as Toml;

use super::file::{invalid, unknown_key};
use super::{ConfigError, Origin};
use crate::broker::policy::{Policy, PolicyKind};

/// The keys of the lists.
pub(super) const LISTS: [&str; 2] = ["policies", "operator_policies"];
const KEYS: [&str; 6] = ["vhost", "name", "pattern", "apply_to", "priority", "definition"];
const MAX_NAME_BYTES: usize = 255;

/// A policy and the virtual host it is for.
#[derive(Clone, Debug)]
pub struct ConfiguredPolicy {
    pub vhost: String,
    pub policy: Policy,
}

/// The kind of policies that a key of the file lists.
pub(super) fn kind_of(key: &str) -> Option<PolicyKind> {
    match key {
        "policies" => Some(PolicyKind::User),
        "operator_policies" => Some(PolicyKind::Operator),
        _ => None,
    }
}

/// Reads the list of one kind.
///
/// # Errors
/// [`ConfigError`], naming the entry and what is wrong with it.
pub(super) fn read(path: &Path, kind: PolicyKind, value: &Toml) -> Result<Vec<ConfiguredPolicy>, ConfigError> {
    let list = match kind {
        PolicyKind::User => LISTS[0],
        PolicyKind::Operator => LISTS[1],
    };
    let entries = value
        .as_array()
        .ok_or_else(|| invalid(path, list, value, format!("must be a list of tables, each under [[{list}]]")))?;
    let mut policies: Vec<ConfiguredPolicy> = Vec::with_capacity(entries.len());
    for (index, entry) in entries.iter().enumerate() {
        let at = format!("{list}[{index}]");
        if let Some(key) =
            entry.as_table().into_iter().flat_map(toml::Table::keys).find(|key| !KEYS.contains(&key.as_str()))
        {
            return Err(unknown_key(path, &format!("{at}.{key}"), key, KEYS.into_iter()));
        }
        let configured = policy(kind, entry).map_err(|reason| ConfigError::Invalid {
            key: at.clone(),
            value: entry.get("name").and_then(Toml::as_str).unwrap_or("without a name").to_owned(),
            origin: Origin::File(path.to_path_buf()),
            reason,
        })?;
        let same = |earlier: &ConfiguredPolicy| {
            earlier.vhost == configured.vhost && earlier.policy.name == configured.policy.name
        };
        if policies.iter().any(same) {
            let name = Toml::String(configured.policy.name.to_string());
            let reason = format!("must not be listed twice for virtual host '{}'", configured.vhost);
            return Err(invalid(path, &format!("{at}.name"), &name, reason));
        }
        policies.push(configured);
    }
    Ok(policies)
}

/// Turns an entry into a policy; the error says which of its keys is wrong and why.
fn policy(kind: PolicyKind, entry: &Toml) -> Result<ConfiguredPolicy, String> {
    let text = |key: &str| match entry.get(key) {
        None => Ok(None),
        Some(value) => value.as_str().map(Some).ok_or_else(|| format!("{key} must be text")),
    };
    let required = |key: &str| text(key)?.ok_or_else(|| format!("must have a {key}"));
    let name = required("name")?;
    if name.is_empty() || name.len() > MAX_NAME_BYTES {
        return Err(format!("name must have 1 to {MAX_NAME_BYTES} bytes"));
    }
    let Some(definition) = entry.get("definition").filter(|definition| definition.is_table()) else {
        return Err("must have a definition, which is a table".to_owned());
    };
    let priority = match entry.get("priority") {
        None => 0,
        Some(value) => value.as_integer().ok_or("priority must be a whole number")?,
    };
    let object = serde_json::json!({
        "pattern": required("pattern")?,
        "definition": json(definition),
        "priority": priority,
        "apply-to": text("apply_to")?.unwrap_or("all"),
    });
    let policy = Policy::from_json(kind, name, &object).map_err(|error| error.reasons().join("; "))?;
    Ok(ConfiguredPolicy { vhost: text("vhost")?.unwrap_or("/").to_owned(), policy })
}

fn json(value: &Toml) -> serde_json::Value {
    match value {
        Toml::String(text) => text.as_str().into(),
        Toml::Integer(number) => (*number).into(),
        Toml::Float(number) => (*number).into(),
        Toml::Boolean(flag) => (*flag).into(),
        Toml::Datetime(time) => time.to_string().into(),
        Toml::Array(items) => items.iter().map(json).collect(),
        Toml::Table(table) => table.iter().map(|(key, value)| (key.clone(), json(value))).collect(),
    }
}
