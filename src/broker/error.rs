//! What the broker refuses, in RabbitMQ's words. The session adds the code's name and closes what has to be closed.

use super::router::TopologyError;
use crate::model::Name;

/// A refused operation. `Display` is RabbitMQ's explanation without the leading code name.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    #[error(transparent)]
    Topology(#[from] TopologyError),
    #[error("no queue '{queue}' in vhost '{vhost}'")]
    QueueNotFound { queue: Name, vhost: Name },
    #[error(
        "cannot obtain exclusive access to locked queue '{queue}' in vhost '{vhost}'. It could be originally declared on another connection or the exclusive property value does not match that of the original declaration."
    )]
    QueueLocked { queue: Name, vhost: Name },
    #[error("queue '{queue}' in vhost '{vhost}' in exclusive use")]
    QueueInExclusiveUse { queue: Name, vhost: Name },
    #[error("queue '{queue}' in vhost '{vhost}' in use")]
    QueueInUse { queue: Name, vhost: Name },
    #[error("queue '{queue}' in vhost '{vhost}' not empty")]
    QueueNotEmpty { queue: Name, vhost: Name },
    #[error("queue name '{queue}' contains reserved prefix 'amq.*'")]
    ReservedQueueName { queue: Name },
    #[error("{0}")]
    InvalidArgument(String),
    /// RabbitMQ calls the whole connection off for what it does not permit any more. The text begins with its, of which
    /// clients never see more.
    #[error(
        "Feature `{feature}` is deprecated.\nBy default, this feature is not permitted anymore.\nThe feature will be removed from a future major RabbitMQ version, regardless of the configuration; actual version to be determined.\nTo continue using this feature, set `{setting} = true` in the configuration."
    )]
    NotPermitted { feature: &'static str, setting: &'static str },
    /// The store refuses durable work.
    #[error("the message store has failed: {reason}")]
    Store { reason: String },
}

impl BrokerError {
    /// The AMQP reply code.
    pub fn code(&self) -> u16 {
        match self {
            BrokerError::Topology(error) => error.code(),
            BrokerError::QueueNotFound { .. } => 404,
            BrokerError::QueueLocked { .. } => 405,
            BrokerError::QueueInExclusiveUse { .. } | BrokerError::ReservedQueueName { .. } => 403,
            BrokerError::QueueInUse { .. } | BrokerError::QueueNotEmpty { .. } | BrokerError::InvalidArgument(_) => 406,
            BrokerError::NotPermitted { .. } | BrokerError::Store { .. } => 541,
        }
    }
}
