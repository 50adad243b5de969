//! The table of settings: key, flag, default, help and parser of each, side by side.
//!
//! The environment variable follows from the flag: `--data-dir` is `LEVERET_DATA_DIR`.

use std::path::PathBuf;
use std::time::Duration;

use tracing_subscriber::EnvFilter;

use super::memory::{LEAST_BYTES, MemoryPlan};
use super::value::{Parsed, Value};
use super::{ConfigError, Draft, Durability, LogFormat, MAX_MESSAGE_SIZE_CAP_BYTES, Origin, available_cores};
use crate::broker::arguments::QueueType;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const MAX_NAME_BYTES: usize = 255;

/// One thing that can be set.
pub(super) struct Setting {
    /// The key in the file; `section.name` for a key in a table.
    pub(super) key: &'static str,
    pub(super) flag: &'static str,
    /// Whether it is a flag at all, or (secrets) only a key and an environment variable.
    pub(super) on_command_line: bool,
    pub(super) value_name: &'static str,
    /// As text; in parentheses where it depends on the machine.
    pub(super) default: &'static str,
    pub(super) help: &'static str,
    /// Over which group of flags `--help` lists it.
    pub(super) heading: &'static str,
    apply: fn(&mut Draft, &Value) -> Parsed<()>,
}

impl Setting {
    pub(super) fn env(&self) -> String {
        format!("LEVERET_{}", self.flag.to_ascii_uppercase().replace('-', "_"))
    }

    /// Puts a value into the draft.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] if this setting does not take it; the draft is then unchanged.
    pub(super) fn set(&self, draft: &mut Draft, value: &Value, origin: Origin) -> Result<(), ConfigError> {
        (self.apply)(draft, value).map_err(|reason| self.invalid(value, origin, reason))
    }

    pub(super) fn invalid(&self, value: &Value, origin: Origin, reason: String) -> ConfigError {
        ConfigError::Invalid {
            key: self.key.to_owned(),
            value: if self.on_command_line { value.to_string() } else { "***".to_owned() },
            origin,
            reason,
        }
    }
}

pub(super) const SETTINGS: &[Setting] = &[
    Setting {
        key: "bind",
        flag: "bind",
        on_command_line: true,
        value_name: "ADDRESS",
        default: "0.0.0.0",
        help: "IP addresses to listen on, with commas between them. '::' takes IPv6 alone",
        heading: "Listening",
        apply: |draft, value| {
            let bind = value.list(|item| item.parse().ok(), "IP addresses, such as 127.0.0.1 or ::1")?;
            if bind.is_empty() {
                return Err("must name at least one IP address; 0.0.0.0 is all of IPv4, :: all of IPv6".to_owned());
            }
            draft.config.bind = bind;
            Ok(())
        },
    },
    Setting {
        key: "port",
        flag: "port",
        on_command_line: true,
        value_name: "PORT",
        default: "5672",
        help: "TCP port for AMQP; 0 takes a free one and logs it",
        heading: "Listening",
        apply: |draft, value| set(&mut draft.config.port, value.integer(0..=u16::MAX)),
    },
    Setting {
        key: "max_connections",
        flag: "max-connections",
        on_command_line: true,
        value_name: "COUNT",
        default: "unlimited",
        help: "Most connections that may be open at a time",
        heading: "Listening",
        apply: |draft, value| set(&mut draft.config.max_connections, value.integer_or("unlimited", 1..=u32::MAX)),
    },
    Setting {
        key: "data_dir",
        flag: "data-dir",
        on_command_line: true,
        value_name: "DIRECTORY",
        default: "./leveret-data",
        help: "Where messages and definitions are kept; made if it is missing. One broker per directory",
        heading: "Storage",
        apply: |draft, value| set(&mut draft.config.data_dir, value.text(4096).map(PathBuf::from)),
    },
    Setting {
        key: "store.durability",
        flag: "durability",
        on_command_line: true,
        value_name: "fsync|os",
        default: "fsync",
        help: "What a confirm waits for. fsync: the disk has the message. os: the operating system has it, and a \
               power failure may lose it",
        heading: "Storage",
        apply: |draft, value| {
            let choices = [("fsync", Durability::Fsync), ("os", Durability::Os)];
            set(&mut draft.config.store.durability, value.choice(&choices))
        },
    },
    Setting {
        key: "memory.budget",
        flag: "memory-budget",
        on_command_line: true,
        value_name: "SIZE",
        default: "40MiB",
        help: "What messages, writes under way and blocks read back may take in memory. What does not fit of long \
               queues is kept on disk only",
        heading: "Storage",
        apply: |draft, value| set(&mut draft.config.memory, value.size(LEAST_BYTES..=1024 * GIB).map(MemoryPlan::of)),
    },
    Setting {
        key: "disk_free_limit",
        flag: "disk-free-limit",
        on_command_line: true,
        value_name: "SIZE",
        default: "50MB",
        help: "Free space on the data directory's volume below which publishers are blocked; 0 turns that off",
        heading: "Storage",
        apply: |draft, value| set(&mut draft.config.disk_free_limit_bytes, value.size(0..=1024 * 1024 * GIB)),
    },
    Setting {
        key: "store.block_cache",
        flag: "store-block-cache",
        on_command_line: true,
        value_name: "SIZE",
        default: "(an eighth of the budget)",
        help: "Memory for blocks read back from disk, if not a share of memory.budget",
        heading: "Storage",
        apply: |draft, value| set(&mut draft.config.store.block_cache_bytes, memory_size(value, 64 * GIB).map(Some)),
    },
    Setting {
        key: "store.write_buffer",
        flag: "store-write-buffer",
        on_command_line: true,
        value_name: "SIZE",
        default: "(a quarter of the budget)",
        help: "Memory for writes that are in the write-ahead log but not yet in a table file, if not a share of \
               memory.budget",
        heading: "Storage",
        apply: |draft, value| set(&mut draft.config.store.write_buffer_bytes, memory_size(value, GIB).map(Some)),
    },
    Setting {
        key: "amqp.heartbeat",
        flag: "heartbeat",
        on_command_line: true,
        value_name: "SECONDS",
        default: "60",
        help: "Heartbeat offered to clients; 0 offers none",
        heading: "Protocol limits",
        apply: |draft, value| set(&mut draft.config.amqp.heartbeat_secs, value.integer(0..=u16::MAX)),
    },
    Setting {
        key: "amqp.channel_max",
        flag: "channel-max",
        on_command_line: true,
        value_name: "COUNT",
        default: "2047",
        help: "Most channels per connection",
        heading: "Protocol limits",
        apply: |draft, value| set(&mut draft.config.amqp.channel_max, value.integer(1..=u16::MAX)),
    },
    Setting {
        key: "amqp.frame_max",
        flag: "frame-max",
        on_command_line: true,
        value_name: "SIZE",
        default: "131072",
        help: "Largest frame, in bytes",
        heading: "Protocol limits",
        apply: |draft, value| set(&mut draft.config.amqp.frame_max_bytes, frame_size(value)),
    },
    Setting {
        key: "amqp.initial_frame_max",
        flag: "initial-frame-max",
        on_command_line: true,
        value_name: "SIZE",
        default: "8192",
        help: "Largest frame before a client has logged in; raise it for very long tokens",
        heading: "Protocol limits",
        apply: |draft, value| set(&mut draft.config.amqp.initial_frame_max_bytes, frame_size(value)),
    },
    Setting {
        key: "amqp.handshake_timeout",
        flag: "handshake-timeout",
        on_command_line: true,
        value_name: "TIME",
        default: "10s",
        help: "How long a client may take from connecting to an open connection",
        heading: "Protocol limits",
        apply: |draft, value| {
            let range = Duration::from_millis(100)..=Duration::from_secs(3600);
            set(&mut draft.config.amqp.handshake_timeout, value.duration(range))
        },
    },
    Setting {
        key: "amqp.max_message_size",
        flag: "max-message-size",
        on_command_line: true,
        value_name: "SIZE",
        default: "128MiB",
        help: "Largest message body; larger ones close the channel with 406",
        heading: "Protocol limits",
        apply: |draft, value| {
            set(&mut draft.config.amqp.max_message_size_bytes, value.size(1..=MAX_MESSAGE_SIZE_CAP_BYTES))
        },
    },
    Setting {
        key: "queues.default_type",
        flag: "default-queue-type",
        on_command_line: true,
        value_name: "classic|quorum",
        default: "classic",
        help: "Type of a queue declared without x-queue-type, if its properties suit that type",
        heading: "Queues",
        apply: |draft, value| {
            let choices = [QueueType::Classic, QueueType::Quorum].map(|queue_type| (queue_type.name(), queue_type));
            set(&mut draft.config.queues.default_type, value.choice(&choices))
        },
    },
    Setting {
        key: "queues.consumer_timeout",
        flag: "consumer-timeout",
        on_command_line: true,
        value_name: "TIME",
        default: "30m",
        help: "How long a delivery of a quorum queue may stay unacknowledged; off is for ever",
        heading: "Queues",
        apply: |draft, value| {
            let range = Duration::from_millis(1)..=Duration::from_secs(315_360_000);
            set(&mut draft.config.queues.consumer_timeout, value.duration_or("off", range))
        },
    },
    Setting {
        key: "queues.delivery_limit",
        flag: "delivery-limit",
        on_command_line: true,
        value_name: "COUNT",
        default: "20",
        help: "Failed deliveries a message of a quorum queue may have",
        heading: "Queues",
        apply: |draft, value| set(&mut draft.config.queues.delivery_limit, value.integer_or("unlimited", 0..=u32::MAX)),
    },
    Setting {
        key: "queues.parking",
        flag: "parking",
        on_command_line: true,
        value_name: "true|false",
        default: "true",
        help: "Whether a message that has failed too often, and has no dead-letter exchange, is parked in                <queue>.parked instead of dropped",
        heading: "Queues",
        apply: |draft, value| set(&mut draft.config.queues.parking, value.boolean()),
    },
    Setting {
        key: "compatibility.permit_transient_nonexclusive_queues",
        flag: "permit-transient-nonexclusive-queues",
        on_command_line: true,
        value_name: "true|false",
        default: "true",
        help: "Whether a queue may be neither durable nor exclusive; RabbitMQ 4.3 refuses those by default",
        heading: "Compatibility",
        apply: |draft, value| {
            set(&mut draft.config.compatibility.permit_transient_nonexclusive_queues, value.boolean())
        },
    },
    Setting {
        key: "compatibility.permit_global_qos",
        flag: "permit-global-qos",
        on_command_line: true,
        value_name: "true|false",
        default: "true",
        help: "Whether basic.qos with global is a limit for the channel; if not, it is taken as one for each consumer,                as in RabbitMQ 4.3",
        heading: "Compatibility",
        apply: |draft, value| set(&mut draft.config.compatibility.permit_global_qos, value.boolean()),
    },
    Setting {
        key: "vhosts",
        flag: "vhosts",
        on_command_line: true,
        value_name: "NAMES",
        default: "/",
        help: "Virtual hosts, with commas between them",
        heading: "Access",
        apply: |draft, value| {
            let vhosts = value.list(name, "names of 1 to 255 bytes")?;
            if vhosts.is_empty() || (1..vhosts.len()).any(|at| vhosts[..at].contains(&vhosts[at])) {
                return Err("must name at least one virtual host, and none of them twice".to_owned());
            }
            draft.config.vhosts = vhosts;
            Ok(())
        },
    },
    Setting {
        key: "event_exchange.vhost",
        flag: "event-exchange-vhost",
        on_command_line: true,
        value_name: "NAME",
        default: "/",
        help: "The virtual host that has the exchange amq.rabbitmq.event",
        heading: "Events and tracing",
        apply: |draft, value| set(&mut draft.config.event_vhost, value.text(MAX_NAME_BYTES)),
    },
    Setting {
        key: "tracing.vhosts",
        flag: "tracing-vhosts",
        on_command_line: true,
        value_name: "NAMES",
        default: "none",
        help: "Virtual hosts whose messages are copied to amq.rabbitmq.trace, with commas between them",
        heading: "Events and tracing",
        apply: |draft, value| set(&mut draft.config.traced_vhosts, value.list(name, "names of 1 to 255 bytes")),
    },
    Setting {
        key: "loopback_users",
        flag: "loopback-users",
        on_command_line: true,
        value_name: "NAMES",
        default: "guest",
        help: "Users that may log in from this machine only, with commas between them; 'none' lifts the rule",
        heading: "Access",
        apply: |draft, value| set(&mut draft.config.loopback_users, value.list(name, "user names of 1 to 255 bytes")),
    },
    Setting {
        key: "default_user",
        flag: "default-user",
        on_command_line: true,
        value_name: "NAME",
        default: "guest",
        help: "The administrator of a broker whose file lists no users",
        heading: "Access",
        apply: |draft, value| set(&mut draft.default_user, value.text(MAX_NAME_BYTES)),
    },
    Setting {
        key: "default_password",
        flag: "default-password",
        on_command_line: false, // everybody on the machine can read a command line
        value_name: "PASSWORD",
        default: "guest",
        help: "The default user's password",
        heading: "Access",
        apply: |draft, value| set(&mut draft.default_password, value.text(1024)),
    },
    Setting {
        key: "node_name",
        flag: "node-name",
        on_command_line: true,
        value_name: "NAME",
        default: "(leveret@ and the host's name)",
        help: "This broker's name, as clients and operators see it",
        heading: "Process",
        apply: |draft, value| set(&mut draft.config.node_name, value.text(MAX_NAME_BYTES)),
    },
    Setting {
        key: "cluster_name",
        flag: "cluster-name",
        on_command_line: true,
        value_name: "NAME",
        default: "(the node's name)",
        help: "The cluster_name that clients see among the server properties",
        heading: "Process",
        apply: |draft, value| set(&mut draft.cluster_name, value.text(MAX_NAME_BYTES).map(Some)),
    },
    Setting {
        key: "worker_threads",
        flag: "worker-threads",
        on_command_line: true,
        value_name: "COUNT",
        default: "auto",
        help: "Threads that serve connections; auto is one per core",
        heading: "Process",
        apply: |draft, value| {
            let count = value.integer_or("auto", 1..=1024)?;
            draft.config.worker_threads = count.unwrap_or_else(available_cores);
            Ok(())
        },
    },
    Setting {
        key: "log.level",
        flag: "log",
        on_command_line: true,
        value_name: "LEVEL",
        default: "info",
        help: "error, warn, info, debug, trace or off, or a filter such as info,leveret::net=debug",
        heading: "Process",
        apply: |draft, value| set(&mut draft.config.log.filter, log_filter(value)),
    },
    Setting {
        key: "log.format",
        flag: "log-format",
        on_command_line: true,
        value_name: "auto|pretty|json",
        default: "auto",
        help: "auto is pretty on a terminal and plain lines otherwise",
        heading: "Process",
        apply: |draft, value| {
            let choices = [("auto", LogFormat::Auto), ("pretty", LogFormat::Pretty), ("json", LogFormat::Json)];
            set(&mut draft.config.log.format, value.choice(&choices))
        },
    },
];

fn set<T>(place: &mut T, parsed: Parsed<T>) -> Parsed<()> {
    *place = parsed?;
    Ok(())
}

fn name(item: &str) -> Option<String> {
    let valid = !item.is_empty() && item.len() <= MAX_NAME_BYTES;
    valid.then(|| item.to_owned())
}

/// RabbitMQ's least frame size; the most is ours, so that one frame is bounded in memory.
fn frame_size(value: &Value) -> Parsed<u32> {
    let bytes = value.size(8 * KIB..=16 * MIB)?;
    u32::try_from(bytes).map_err(|error| error.to_string())
}

fn memory_size(value: &Value, most: u64) -> Parsed<usize> {
    let bytes = value.size(MIB..=most)?;
    usize::try_from(bytes).map_err(|error| error.to_string())
}

fn log_filter(value: &Value) -> Parsed<String> {
    let allowed = "must be error, warn, info, debug, trace, off, or a filter such as info,leveret::net=debug";
    let text = value.text(1024).map_err(|_| allowed)?;
    // A filter takes any single word for a module's name; one that is not a level is a slip.
    let slip = text.parse::<tracing_subscriber::filter::LevelFilter>().is_err() && !text.contains(['=', ',', ':', '[']);
    match EnvFilter::try_new(&text) {
        Ok(_) if !slip => Ok(text),
        _ => Err(allowed.to_owned()),
    }
}
