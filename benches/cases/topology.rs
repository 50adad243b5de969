//! Vhosts with many bindings.

use std::sync::Arc;

use amq_protocol::types::{AMQPValue, FieldTable};
use leveret::broker::{
    binding::{Binding, Destination},
    router::Topology,
};

pub type Queues = Topology<Arc<usize>>;

/// A vhost with `count` queues, each bound to `exchange` with the key and arguments that `rule` gives it.
pub fn bound(exchange: &str, count: usize, rule: impl Fn(usize) -> (String, FieldTable)) -> Queues {
    let mut topology = Topology::with_predeclared("/".into());
    bind_all(&mut topology, exchange, count, rule);
    topology
}

/// Adds `count` queues, each bound to `exchange`.
pub fn bind_all(topology: &mut Queues, exchange: &str, count: usize, rule: impl Fn(usize) -> (String, FieldTable)) {
    for number in 0..count {
        let name = format!("q{number}");
        topology.add_queue(name.as_str().into(), Arc::new(number));
        let (key, arguments) = rule(number);
        let binding = Binding {
            source: exchange.into(),
            destination: Destination::Queue(name.as_str().into()),
            key: key.into(),
            arguments,
        };
        assert_eq!(topology.bind(binding), Ok(true));
    }
}

/// [`bound`] by keys alone.
pub fn by_key(exchange: &str, count: usize, key: impl Fn(usize) -> String) -> Queues {
    bound(exchange, count, |number| (key(number), FieldTable::default()))
}

/// Bindings of a topic exchange of four kinds, a quarter each.
pub fn mixed_pattern(number: usize) -> String {
    match number % 4 {
        0 => format!("eu.site{}.sensor.{number}", number % 100),
        1 => format!("eu.*.sensor.{number}"),
        2 => format!("eu.site{}.#.{number}", number % 100),
        _ => format!("#.{number}"),
    }
}

/// Two headers; the second tells the queues apart.
pub fn sensor(number: usize) -> FieldTable {
    let mut table = FieldTable::default();
    table.insert("kind".into(), AMQPValue::LongString("sensor".into()));
    table.insert("number".into(), AMQPValue::LongLongInt(i64::try_from(number).expect("small")));
    table
}
