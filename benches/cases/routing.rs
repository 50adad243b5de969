//! Finding the queues of a message: through the exchange, and in the channel's cache.

use std::hint::black_box;

use amq_protocol::types::FieldTable;
use leveret::{
    broker::{encode_names, exchange::Attributes, router::RouteResult},
    session::RouteCache,
};

use super::{
    BATCH, Fixture, MESSAGES, Work,
    topology::{Queues, bound, by_key, mixed_pattern, sensor},
};

const BINDINGS: usize = 10_000;

/// The channel's cache, when messages take `keys` routing keys in turn.
pub fn cached(fixture: &Fixture, keys: usize) -> Box<dyn Work> {
    let queue = fixture.queue("routed");
    let names: Vec<Vec<u8>> =
        (0..keys).map(|key| encode_names(b"orders", format!("orders.created.{key}").as_bytes())).collect();
    let (mut cache, epoch) = (RouteCache::default(), (7, 1));
    for names in &names {
        cache.remember(names, epoch, [queue.clone()].into_iter().collect::<smallvec::SmallVec<_>>().into());
    }
    Box::new(move || {
        for names in names.iter().cycle().take(MESSAGES as usize) {
            let route = cache.find(black_box(names), black_box(epoch)).expect("remembered");
            black_box(route);
        }
    })
}

/// One look-up by an exchange each.
struct Routes {
    topology: Queues,
    exchange: &'static str,
    keys: Vec<String>,
    headers: Option<FieldTable>,
    expected: usize,
    found: RouteResult<std::sync::Arc<usize>>,
}

impl Routes {
    fn boxed(topology: Queues, exchange: &'static str, keys: Vec<String>, expected: usize) -> Box<dyn Work> {
        Box::new(Routes { topology, exchange, keys, headers: None, expected, found: RouteResult::default() })
    }
}

impl Work for Routes {
    fn run(&mut self) {
        for key in &self.keys {
            let attributes = self.headers.as_ref().map_or_else(Attributes::none, Attributes::with_headers);
            let keys = [black_box(key.as_bytes())];
            self.topology.route(black_box(self.exchange), &keys, &attributes, &mut self.found).expect("exists");
            assert_eq!(self.found.queues.len(), self.expected);
        }
    }
}

/// Numbers of bindings, spread over all of them.
fn numbers() -> impl Iterator<Item = usize> {
    (0..MESSAGES as usize).map(|at| at * 7_919 % BINDINGS)
}

pub fn direct() -> Box<dyn Work> {
    let topology = by_key("amq.direct", BINDINGS, |number| format!("key.{number}"));
    Routes::boxed(topology, "amq.direct", numbers().map(|number| format!("key.{number}")).collect(), 1)
}

pub fn topic_literal() -> Box<dyn Work> {
    let key = |number: usize| format!("eu.site{}.sensor.{number}", number % 100);
    Routes::boxed(by_key("amq.topic", BINDINGS, key), "amq.topic", numbers().map(key).collect(), 1)
}

/// Each key matches the one binding that ends with its number, of whichever kind that is.
pub fn topic_mixed() -> Box<dyn Work> {
    let key = |number: usize| format!("eu.site{}.sensor.{number}", number % 100);
    Routes::boxed(by_key("amq.topic", BINDINGS, mixed_pattern), "amq.topic", numbers().map(key).collect(), 1)
}

pub fn topic_mixed_unmatched() -> Box<dyn Work> {
    let key = |number: usize| format!("eu.site{}.sensor.x", number % 100);
    Routes::boxed(by_key("amq.topic", BINDINGS, mixed_pattern), "amq.topic", numbers().map(key).collect(), 0)
}

/// 100 bindings of two headers each, of which one matches.
pub fn headers() -> Box<dyn Work> {
    let topology = bound("amq.headers", 100, |number| (String::new(), sensor(number)));
    let keys = (0..BATCH).map(|_| String::new()).collect();
    Box::new(Routes {
        topology,
        exchange: "amq.headers",
        keys,
        headers: Some(sensor(77)),
        expected: 1,
        found: RouteResult::default(),
    })
}
