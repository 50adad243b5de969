//! Everything that can be set, read once and handed down; never global.
//!
//! # Precedence
//! A flag beats the environment (`LEVERET_*`), which beats the TOML file, which beats the default. Every setting
//! is one row of [`settings::SETTINGS`], with its names, its default, its help and its parser side by side, so the
//! four ways cannot drift apart. Users and policies are lists of tables and live in the file only.
//!
//! # Invariants
//! - A [`Config`] that [`Config::load`] returned is valid: nobody behind it checks ranges again.
//! - No clear-text password is kept: a [`Config`] holds [`User`]s with hashes.
//! - An error names the key, the value, where it came from, and what would have been allowed.
//!
//! # Units
//! `_bytes` and `_secs` in names; [`Duration`] where the wire does not count in seconds.

mod error;
mod file;
mod flags;
mod memory;
mod policies;
mod settings;
mod value;

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use error::{ConfigError, Origin};
pub use flags::Flags;
pub use memory::MemoryPlan;
pub use policies::ConfiguredPolicy;

use crate::auth::{PasswordHash, Permission, User};
use crate::broker::arguments::QueueType;
use settings::SETTINGS;
use value::Value;

/// The largest body that can ever be allowed, as in RabbitMQ.
pub const MAX_MESSAGE_SIZE_CAP_BYTES: u64 = 536_870_912;

/// The environment variable that Docker-style service links set to `tcp://address:port` for a service called
/// "leveret"; a value of that form is theirs, not ours.
const PORT_ENV: &str = "LEVERET_PORT";

/// The whole configuration of one broker.
#[derive(Clone, Debug)]
pub struct Config {
    /// The file that was read, if any.
    pub config_file: Option<PathBuf>,
    /// Addresses to listen on; at least one.
    pub bind: Vec<IpAddr>,
    /// 0 lets the operating system choose.
    pub port: u16,
    pub max_connections: Option<u32>,
    pub data_dir: PathBuf,
    pub node_name: String,
    pub cluster_name: String,
    pub worker_threads: usize,
    /// What messages, writes under way and blocks read back may take in memory, all together.
    pub memory: MemoryPlan,
    /// 0 turns the disk alarm off.
    pub disk_free_limit_bytes: u64,
    pub amqp: AmqpConfig,
    pub store: StoreConfig,
    pub queues: QueueConfig,
    pub compatibility: CompatibilityConfig,
    pub log: LogConfig,
    /// Users that log in from this machine only.
    pub loopback_users: Vec<String>,
    /// At least one.
    pub vhosts: Vec<String>,
    /// The vhost that has the exchange of events; none if it is not among `vhosts`.
    pub event_vhost: String,
    /// Vhosts whose messages are traced; all of them among `vhosts`.
    pub traced_vhosts: Vec<String>,
    pub users: Vec<User>,
    /// Policies and operator policies; at most one of a kind and name in each vhost.
    pub policies: Vec<ConfiguredPolicy>,
}

/// What holds for queues where neither their arguments nor a policy say anything.
#[derive(Clone, Debug)]
pub struct QueueConfig {
    /// Of a queue declared without `x-queue-type` whose properties suit the type.
    pub default_type: QueueType,
    /// Of quorum-type queues; `None` is no timeout.
    pub consumer_timeout: Option<Duration>,
    /// Of quorum-type queues; `None` is unlimited.
    pub delivery_limit: Option<u32>,
    /// Whether a message that has failed too often, and has no dead-letter exchange, is parked instead of dropped.
    pub parking: bool,
}

/// What RabbitMQ calls deprecated features.
#[derive(Clone, Debug)]
pub struct CompatibilityConfig {
    pub permit_transient_nonexclusive_queues: bool,
    /// Whether `basic.qos` with `global` is a limit for the channel.
    pub permit_global_qos: bool,
}

/// What is offered in `connection.tune`, and the limits around it.
#[derive(Clone, Debug)]
pub struct AmqpConfig {
    /// 0 turns heartbeats off.
    pub heartbeat_secs: u16,
    pub channel_max: u16,
    pub frame_max_bytes: u32,
    /// The frame limit until the client has answered `connection.tune`.
    pub initial_frame_max_bytes: u32,
    /// From accept to `connection.open-ok`.
    pub handshake_timeout: Duration,
    /// Body bytes.
    pub max_message_size_bytes: u64,
}

/// How the store writes, and what it may hold in memory where that is not what [`MemoryPlan`] says.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    pub durability: Durability,
    pub block_cache_bytes: Option<usize>,
    pub write_buffer_bytes: Option<usize>,
}

/// What a confirm waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Written and synced: survives a power failure.
    Fsync,
    /// Written: survives the end of the process, not of the machine.
    Os,
}

impl Durability {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Fsync => "fsync",
            Self::Os => "os",
        }
    }
}

#[derive(Clone, Debug)]
pub struct LogConfig {
    /// A level, or a filter in the form of `tracing`'s `EnvFilter`; known to be valid.
    pub filter: String,
    pub format: LogFormat,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// `Pretty` on a terminal, plain lines otherwise.
    Auto,
    Pretty,
    Json,
}

impl Config {
    /// Reads the flags, the environment and the file that one of them names.
    ///
    /// # Errors
    /// [`ConfigError`], always about one key or one file.
    pub fn load(flags: &Flags) -> Result<Self, ConfigError> {
        Self::load_with(flags, |name| std::env::var_os(name))
    }

    /// [`load`](Self::load) with an environment of the caller's choice.
    fn load_with(flags: &Flags, env: impl Fn(&str) -> Option<OsString>) -> Result<Self, ConfigError> {
        // An empty variable is an unset one: that is how compose files and unit files leave things out.
        let env = |name: &str| env(name).filter(|value| !value.is_empty());
        let mut draft = Draft::default();
        let config_file = flags.config.clone().or_else(|| env("LEVERET_CONFIG").map(PathBuf::from));
        if let Some(path) = config_file {
            file::read(&path, &mut draft)?;
            draft.config.config_file = Some(path);
        }
        for setting in SETTINGS {
            let name = setting.env();
            let Some(text) = env(&name) else { continue };
            let value = Value::One(text.to_string_lossy().into_owned());
            if text.to_str().is_none() {
                let reason = "must be valid UTF-8".to_owned();
                return Err(setting.invalid(&value, Origin::Env(name), reason));
            }
            if name != PORT_ENV || !value.to_string().starts_with("tcp://") {
                setting.set(&mut draft, &value, Origin::Env(name))?;
            }
        }
        for (setting, value) in flags.values() {
            setting.set(&mut draft, value, Origin::Flag(setting.flag))?;
        }
        draft.finish()
    }

    /// For tests: an ephemeral port on loopback, user `guest`, nothing read from the environment.
    #[must_use]
    pub fn for_tests(data_dir: impl AsRef<Path>) -> Self {
        let mut config = Self {
            bind: vec![IpAddr::V4(Ipv4Addr::LOCALHOST)],
            port: 0,
            data_dir: data_dir.as_ref().to_path_buf(),
            worker_threads: 2,
            ..Draft::default().config
        };
        config.users = vec![default_user("guest", PasswordHash::new("guest"), &config.vhosts)];
        config
    }
}

/// A configuration in the making: the defaults, and over them what each source says.
#[derive(Debug)]
struct Draft {
    config: Config,
    cluster_name: Option<String>,
    default_user: String,
    default_password: String,
}

impl Default for Draft {
    fn default() -> Self {
        let node_name = format!("leveret@{}", host_name());
        let config = Config {
            config_file: None,
            bind: vec![IpAddr::V4(Ipv4Addr::UNSPECIFIED)],
            port: 5672,
            max_connections: None,
            data_dir: PathBuf::from("./leveret-data"),
            cluster_name: node_name.clone(),
            node_name,
            worker_threads: available_cores(),
            memory: MemoryPlan::of(memory::DEFAULT_BYTES),
            disk_free_limit_bytes: 50_000_000,
            amqp: AmqpConfig {
                heartbeat_secs: 60,
                channel_max: 2047,
                frame_max_bytes: 131_072,
                initial_frame_max_bytes: 8192,
                handshake_timeout: Duration::from_secs(10),
                max_message_size_bytes: 128 << 20,
            },
            store: StoreConfig { durability: Durability::Fsync, block_cache_bytes: None, write_buffer_bytes: None },
            queues: QueueConfig {
                default_type: QueueType::Classic,
                consumer_timeout: Some(Duration::from_secs(1800)),
                delivery_limit: Some(20),
                parking: true,
            },
            compatibility: CompatibilityConfig { permit_transient_nonexclusive_queues: true, permit_global_qos: true },
            log: LogConfig { filter: "info".to_owned(), format: LogFormat::Auto },
            loopback_users: vec!["guest".to_owned()],
            vhosts: vec!["/".to_owned()],
            event_vhost: "/".to_owned(),
            traced_vhosts: Vec::new(),
            users: Vec::new(),
            policies: Vec::new(),
        };
        Self { config, cluster_name: None, default_user: "guest".to_owned(), default_password: "guest".to_owned() }
    }
}

impl Draft {
    /// Checks what no single setting can check, and fills in what depends on others.
    fn finish(self) -> Result<Config, ConfigError> {
        let mut config = self.config;
        config.cluster_name = self.cluster_name.unwrap_or_else(|| config.node_name.clone());
        if config.amqp.initial_frame_max_bytes > config.amqp.frame_max_bytes {
            return Err(ConfigError::Conflict {
                key: "amqp.initial_frame_max",
                value: config.amqp.initial_frame_max_bytes.to_string(),
                reason: format!("must not exceed amqp.frame_max ({})", config.amqp.frame_max_bytes),
            });
        }
        if config.users.is_empty() {
            let hash = PasswordHash::new(&self.default_password);
            config.users = vec![default_user(&self.default_user, hash, &config.vhosts)];
        }
        if let Some(vhost) = config.traced_vhosts.iter().find(|vhost| !config.vhosts.contains(vhost)) {
            return Err(ConfigError::Conflict {
                key: "tracing.vhosts",
                value: vhost.clone(),
                reason: format!("must be one of vhosts ({})", config.vhosts.join(", ")),
            });
        }
        for ConfiguredPolicy { vhost, policy } in &config.policies {
            if !config.vhosts.contains(vhost) {
                return Err(ConfigError::Conflict {
                    key: "policies.vhost",
                    value: vhost.clone(),
                    reason: format!(
                        "(of {} '{}') must be one of vhosts ({})",
                        policy.kind,
                        policy.name,
                        config.vhosts.join(", ")
                    ),
                });
            }
        }
        for user in &config.users {
            for vhost in user.permissions.keys() {
                if !config.vhosts.contains(vhost) {
                    return Err(ConfigError::Conflict {
                        key: "users.permissions.vhost",
                        value: vhost.clone(),
                        reason: format!(
                            "(of user '{}') must be one of vhosts ({})",
                            user.name,
                            config.vhosts.join(", ")
                        ),
                    });
                }
            }
        }
        Ok(config)
    }
}

/// The user of a broker whose file lists none: an administrator who may do everything in every vhost.
fn default_user(name: &str, password: PasswordHash, vhosts: &[String]) -> User {
    let user = User::new(name, password).with_tag("administrator");
    vhosts.iter().fold(user, |user, vhost| user.with_permission(vhost, Permission::full()))
}

fn available_cores() -> usize {
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// This machine's name up to the first dot, as in RabbitMQ's node names.
fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .ok()
        .and_then(|name| name.trim().split('.').next().map(str::to_owned))
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "localhost".to_owned())
}

#[cfg(test)]
mod tests;
