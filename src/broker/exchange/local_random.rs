//! The type `x-local-random`: as `x-random`, for classic queues on the node that the publisher is connected to, which
//! here is every queue. Bindings have no key.

use crate::broker::arguments::QueueType;
use crate::broker::binding::{Binding, Destination};

/// Checks a binding, except for the type of its queue; the error is the text of the 406.
pub fn check_binding(binding: &Binding) -> Result<(), String> {
    if !binding.key.is_empty() {
        // RabbitMQ shows each byte as a character here.
        let key: String = binding.key.iter().copied().map(char::from).collect();
        return Err(format!("Non empty binding '{key}' key not permitted"));
    }
    match binding.destination {
        Destination::Queue(_) => Ok(()),
        Destination::Exchange(_) => Err("Destination not found".to_owned()),
    }
}

/// Checks the type of a queue that is to be bound; the error is the text of the 406.
pub fn check_queue_type(queue_type: QueueType) -> Result<(), String> {
    match queue_type {
        QueueType::Classic => Ok(()),
        other => Err(format!("Queue type {} not valid for this exchange type", other.module())),
    }
}

#[cfg(test)]
mod tests {
    use amq_protocol::types::FieldTable;

    use super::*;

    #[test]
    fn bindings_have_no_key_and_lead_to_classic_queues() {
        let binding = |destination, key: &str| Binding {
            source: "x".into(),
            destination,
            key: key.into(),
            arguments: FieldTable::default(),
        };
        let queue = || Destination::Queue("q".into());
        let exchange = || Destination::Exchange("y".into());
        let error = |text: &str| Err(text.to_owned());
        assert_eq!(check_binding(&binding(queue(), "")), Ok(()));
        let text = "Non empty binding 'k\u{c3}\u{bc}' key not permitted";
        assert_eq!(check_binding(&binding(queue(), "kü")), error(text));
        assert_eq!(check_binding(&binding(exchange(), "k")), error("Non empty binding 'k' key not permitted"));
        assert_eq!(check_binding(&binding(exchange(), "")), error("Destination not found"));
        assert_eq!(check_queue_type(QueueType::Classic), Ok(()));
        let text = "Queue type rabbit_quorum_queue not valid for this exchange type";
        assert_eq!(check_queue_type(QueueType::Quorum), error(text));
    }
}
