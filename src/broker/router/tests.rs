use std::collections::BTreeSet;

use amq_protocol::types::{AMQPValue, FieldTable};
use proptest::prelude::*;

use super::*;
use crate::broker::exchange::{Attributes, ExchangeKind, ExchangeOptions};

fn topology() -> Topology<&'static str> {
    Topology::with_predeclared("/".into())
}

fn exchange(name: &str, kind: ExchangeKind) -> Exchange {
    Exchange::new(name.into(), kind, ExchangeOptions::default(), FieldTable::default())
}

fn auto_delete(name: &str) -> Exchange {
    let options = ExchangeOptions { auto_delete: true, ..ExchangeOptions::default() };
    Exchange::new(name.into(), ExchangeKind::Fanout, options, FieldTable::default())
}

fn with_alternate(name: &str, alternate: &str) -> Exchange {
    let mut arguments = FieldTable::default();
    arguments.insert(ALTERNATE_EXCHANGE.into(), AMQPValue::LongString(alternate.into()));
    Exchange::new(name.into(), ExchangeKind::Direct, ExchangeOptions::default(), arguments)
}

fn binding(source: &str, destination: Destination, key: &str) -> Binding {
    Binding { source: source.into(), destination, key: key.into(), arguments: FieldTable::default() }
}

fn to_queue(source: &str, queue: &str, key: &str) -> Binding {
    binding(source, Destination::Queue(queue.into()), key)
}

fn to_exchange(source: &str, destination: &str, key: &str) -> Binding {
    binding(source, Destination::Exchange(destination.into()), key)
}

/// Routes and gives back the queues, sorted; fails if one is there twice.
fn route(topology: &Topology<&'static str>, exchange: &str, keys: &[&str]) -> Vec<&'static str> {
    let keys: Vec<&[u8]> = keys.iter().map(|key| key.as_bytes()).collect();
    let mut out = RouteResult::default();
    topology.route(exchange, &keys, &Attributes::none(), &mut out).unwrap();
    let unique: BTreeSet<_> = out.queues.iter().copied().collect();
    assert_eq!(unique.len(), out.queues.len(), "{:?}", out.queues);
    unique.into_iter().collect()
}

fn exchange_names(removed: &Removed) -> Vec<&str> {
    removed.exchanges.iter().map(|exchange| &*exchange.name).collect()
}

#[test]
fn a_new_vhost_has_the_predeclared_exchanges() {
    let topology = topology();
    let described: Vec<_> =
        topology.exchanges().map(|x| (&*x.name, x.kind.as_str(), x.internal, x.durable, x.auto_delete)).collect();
    assert_eq!(
        described,
        [
            ("", "direct", false, true, false),
            ("amq.direct", "direct", false, true, false),
            ("amq.fanout", "fanout", false, true, false),
            ("amq.topic", "topic", false, true, false),
            ("amq.headers", "headers", false, true, false),
            ("amq.match", "headers", false, true, false),
            ("amq.rabbitmq.trace", "topic", true, true, false),
        ]
    );
}

/// A topology with the queue `q` bound to the exchange `x`.
fn topology_in_use() -> Topology<&'static str> {
    let mut topology = topology();
    topology.declare_exchange(exchange("x", ExchangeKind::Direct)).unwrap();
    topology.add_queue("q".into(), "q");
    topology.bind(to_queue("x", "q", "")).unwrap();
    topology
}

/// Checks code and text of refusals, and that nothing has changed.
fn check_refusals<const N: usize>(topology: &Topology<&'static str>, cases: [(TopologyError, u16, &str); N]) {
    for (error, code, text) in cases {
        assert_eq!((error.code(), error.to_string().as_str()), (code, text));
    }
    assert_eq!((topology.exchanges().count(), topology.binding_count()), (8, 1));
}

#[test]
fn the_default_exchange_is_not_to_be_touched() {
    let mut topology = topology_in_use();
    let refusals = [
        topology.declare_exchange(exchange("", ExchangeKind::Direct)).unwrap_err(),
        topology.declare_passive("").unwrap_err(),
        topology.delete_exchange("", false).unwrap_err(),
        topology.bind(to_queue("", "q", "")).unwrap_err(),
        topology.bind(to_exchange("x", "", "")).unwrap_err(),
    ];
    check_refusals(&topology, refusals.map(|error| (error, 403, "operation not permitted on the default exchange")));
}

#[test]
fn what_is_missing_is_named_source_first() {
    let mut topology = topology_in_use();
    let mut out = RouteResult::default();
    let exchange = "no exchange 'n' in vhost '/'";
    let refusals = [
        (topology.declare_passive("n").unwrap_err(), 404, exchange),
        (topology.check_publish("n").unwrap_err(), 404, exchange),
        (topology.route("n", &[], &Attributes::none(), &mut out).unwrap_err(), 404, exchange),
        (topology.bind(to_queue("n", "m", "")).unwrap_err(), 404, exchange),
        (topology.bind(to_exchange("n", "m", "")).unwrap_err(), 404, exchange),
        (topology.bind(to_exchange("x", "n", "")).unwrap_err(), 404, exchange),
        (topology.bind(to_queue("x", "n", "")).unwrap_err(), 404, "no queue 'n' in vhost '/'"),
    ];
    check_refusals(&topology, refusals);
}

#[test]
fn refusals_have_rabbitmqs_codes_and_texts() {
    let mut topology = topology_in_use();
    let mut bad_alternate = exchange("new", ExchangeKind::Direct);
    bad_alternate.arguments.insert(ALTERNATE_EXCHANGE.into(), AMQPValue::Boolean(true));
    let mut bad_headers = to_queue("amq.headers", "q", "");
    bad_headers.arguments.insert("x-match".into(), AMQPValue::LongString("one".into()));
    let refusals = [
        (
            topology.declare_exchange(exchange("amq.new", ExchangeKind::Direct)).unwrap_err(),
            403,
            "exchange name 'amq.new' contains reserved prefix 'amq.*'",
        ),
        (
            topology.delete_exchange("amq.none", false).unwrap_err(),
            403,
            "deletion of system exchange 'amq.none' in vhost '/' not allowed",
        ),
        (
            topology.check_publish("amq.rabbitmq.trace").unwrap_err(),
            403,
            "cannot publish to internal exchange 'amq.rabbitmq.trace' in vhost '/'",
        ),
        (topology.delete_exchange("x", true).unwrap_err(), 406, "exchange 'x' in vhost '/' in use"),
        (
            topology.declare_exchange(exchange("x", ExchangeKind::Topic)).unwrap_err(),
            406,
            "inequivalent arg 'type' for exchange 'x' in vhost '/': received 'topic' but current is 'direct'",
        ),
        (
            topology.declare_exchange(bad_alternate).unwrap_err(),
            406,
            "invalid type 'bool' for arg 'alternate-exchange' in exchange 'new' in vhost '/'",
        ),
        (
            topology.bind(bad_headers).unwrap_err(),
            406,
            "Invalid x-match field value <<\"one\">>; expected all, any, all-with-x, or any-with-x",
        ),
    ];
    check_refusals(&topology, refusals);
}

#[test]
fn redeclaring_the_same_is_fine_even_for_system_exchanges() {
    let mut topology = topology();
    let mut direct = exchange("amq.direct", ExchangeKind::Direct);
    direct.durable = true;
    assert_eq!(topology.declare_exchange(direct), Ok(Declared::Existed));
    assert_eq!(topology.check_declare(&exchange("x", ExchangeKind::Topic)), Ok(Declared::Created));
    assert_eq!(topology.declare_exchange(exchange("x", ExchangeKind::Topic)), Ok(Declared::Created));
    assert_eq!(topology.declare_exchange(exchange("x", ExchangeKind::Topic)), Ok(Declared::Existed));
}

#[test]
fn deleting_a_missing_exchange_and_unbinding_a_missing_binding_are_fine() {
    let mut topology = topology();
    assert!(topology.delete_exchange("none", true).unwrap().is_empty());
    assert!(topology.unbind(&to_queue("none", "none", "")).is_empty());
    assert!(topology.unbind(&to_queue("amq.direct", "none", "")).is_empty());
    assert!(topology.remove_queue("none").is_empty());
}

#[test]
fn the_default_exchange_routes_to_each_queue_a_key_names() {
    let mut topology = topology();
    topology.add_queue("a".into(), "a");
    topology.add_queue("b".into(), "b");
    assert_eq!(route(&topology, "", &["a"]), ["a"]);
    assert_eq!(route(&topology, "", &["b", "a", "b", "none"]), ["a", "b"]);
    assert_eq!(route(&topology, "", &["*"]), [""; 0]);
    assert_eq!(topology.add_queue("a".into(), "again"), Some("a"));
    assert_eq!(route(&topology, "", &["a"]), ["again"]);
    topology.remove_queue("a");
    assert_eq!(topology.queue("a"), None);
    assert_eq!(route(&topology, "", &["a"]), [""; 0]);
    let mut out = RouteResult::default();
    topology.route("", &[b"\xff"], &Attributes::none(), &mut out).unwrap();
    assert!(out.queues.is_empty());
}

#[test]
fn keys_are_united_and_a_queue_gets_one_copy() {
    let mut topology = topology();
    for queue in ["a", "b", "c"] {
        topology.add_queue(queue.into(), queue);
        topology.bind(to_queue("amq.direct", queue, queue)).unwrap();
        topology.bind(to_queue("amq.direct", queue, "all")).unwrap();
        topology.bind(to_queue("amq.topic", queue, "#")).unwrap();
        topology.bind(to_queue("amq.topic", queue, "*.x")).unwrap();
        topology.bind(to_queue("amq.fanout", queue, "1")).unwrap();
        topology.bind(to_queue("amq.fanout", queue, "2")).unwrap();
    }
    assert_eq!(route(&topology, "amq.direct", &["a", "b"]), ["a", "b"]);
    assert_eq!(route(&topology, "amq.direct", &["a", "all", "b"]), ["a", "b", "c"]);
    assert_eq!(route(&topology, "amq.topic", &["y.x", "z"]), ["a", "b", "c"]);
    assert_eq!(route(&topology, "amq.fanout", &["y.x", "z"]), ["a", "b", "c"]);
    topology.unbind(&to_queue("amq.fanout", "a", "1"));
    assert_eq!(route(&topology, "amq.fanout", &[""]), ["a", "b", "c"]);
    topology.unbind(&to_queue("amq.fanout", "a", "2"));
    assert_eq!(route(&topology, "amq.fanout", &[""]), ["b", "c"]);
}

#[test]
fn binding_twice_is_one_binding() {
    let mut topology = topology();
    topology.add_queue("q".into(), "q");
    assert_eq!(topology.bind(to_queue("amq.direct", "q", "k")), Ok(true));
    assert_eq!(topology.bind(to_queue("amq.direct", "q", "k")), Ok(false));
    let mut other = to_queue("amq.direct", "q", "k");
    other.arguments.insert("a".into(), AMQPValue::Void);
    assert_eq!(topology.bind(other), Ok(true));
    assert_eq!(topology.unbind(&to_queue("amq.direct", "q", "k")).bindings.len(), 1);
    assert_eq!(route(&topology, "amq.direct", &["k"]), ["q"]);
    assert_eq!(topology.bindings_from("amq.direct").count(), 1);
    assert_eq!(topology.bindings_to(&Destination::Queue("q".into())).count(), 1);
    assert_eq!(topology.remove_queue("q").bindings.len(), 1);
    assert_eq!(topology.binding_count(), 0);
}

#[test]
fn messages_follow_exchanges_with_the_same_keys_and_survive_cycles() {
    let mut topology = topology();
    for name in ["x", "y", "z"] {
        topology.declare_exchange(exchange(name, ExchangeKind::Topic)).unwrap();
        topology.add_queue(name.into(), name);
        topology.bind(to_queue(name, name, "a.*")).unwrap();
    }
    for (source, destination) in [("x", "y"), ("y", "z"), ("z", "x"), ("x", "x")] {
        topology.bind(to_exchange(source, destination, "#")).unwrap();
    }
    assert_eq!(route(&topology, "x", &["a.b"]), ["x", "y", "z"]);
    assert_eq!(route(&topology, "y", &["a.b"]), ["x", "y", "z"]);
    assert_eq!(route(&topology, "y", &["b"]), [""; 0]);
    topology.delete_exchange("z", false).unwrap();
    assert_eq!(route(&topology, "x", &["a.b"]), ["x", "y"]);
}

#[test]
fn a_chain_of_many_exchanges_is_followed_without_recursion() {
    let mut topology = topology();
    topology.add_queue("q".into(), "q");
    for step in 0..20_000 {
        topology.declare_exchange(auto_delete(&format!("x{step}"))).unwrap();
        if step > 0 {
            topology.bind(to_exchange(&format!("x{}", step - 1), &format!("x{step}"), "")).unwrap();
        }
    }
    topology.bind(to_queue("x19999", "q", "")).unwrap();
    assert_eq!(route(&topology, "x0", &[""]), ["q"]);
    let removed = topology.remove_queue("q");
    assert_eq!((removed.exchanges.len(), removed.bindings.len()), (20_000, 20_000));
}

#[test]
fn an_alternate_exchange_takes_what_matches_nothing() {
    let mut topology = topology();
    for name in ["main", "rest"] {
        topology.add_queue(name.into(), name);
    }
    topology.declare_exchange(with_alternate("x", "y")).unwrap();
    topology.bind(to_queue("x", "main", "k")).unwrap();
    assert_eq!(route(&topology, "x", &["other"]), [""; 0]); // y does not exist yet
    topology.declare_exchange(with_alternate("y", "z")).unwrap();
    topology.declare_exchange(exchange("z", ExchangeKind::Fanout)).unwrap();
    topology.bind(to_queue("z", "rest", "")).unwrap();
    assert_eq!(route(&topology, "x", &["other"]), ["rest"]);
    assert_eq!(route(&topology, "x", &["k"]), ["main"]);
    assert_eq!(route(&topology, "x", &["k", "other"]), ["main"]);
    // A binding to an exchange that leads nowhere is a match, too.
    topology.declare_exchange(exchange("empty", ExchangeKind::Fanout)).unwrap();
    topology.bind(to_exchange("x", "empty", "other")).unwrap();
    assert_eq!(route(&topology, "x", &["other"]), [""; 0]);
    assert!(topology.set_policy_alternate("empty", Some("z".into())));
    assert_eq!(route(&topology, "x", &["other"]), ["rest"]);
}

#[test]
fn alternate_exchanges_may_form_a_ring_or_be_the_default_exchange() {
    let mut topology = topology();
    topology.add_queue("k".into(), "k");
    topology.declare_exchange(with_alternate("x", "y")).unwrap();
    topology.declare_exchange(with_alternate("y", "x")).unwrap();
    topology.declare_exchange(with_alternate("self", "self")).unwrap();
    topology.declare_exchange(with_alternate("d", "")).unwrap();
    for name in ["x", "y", "self", "d"] {
        assert_eq!(route(&topology, name, &["k"]), [""; 0], "{name}");
    }
    topology.bind(to_queue("y", "k", "k")).unwrap();
    assert_eq!(route(&topology, "x", &["k"]), ["k"]);
}

#[test]
fn what_a_headers_exchange_decides_is_not_cacheable() {
    let mut topology = topology();
    topology.add_queue("q".into(), "q");
    let mut rule = to_queue("amq.headers", "q", "");
    rule.arguments.insert("a".into(), AMQPValue::LongInt(1));
    topology.bind(rule).unwrap();
    topology.bind(to_exchange("amq.topic", "amq.headers", "h")).unwrap();
    let mut headers = FieldTable::default();
    headers.insert("a".into(), AMQPValue::LongLongInt(1));
    let mut out = RouteResult::default();
    let mut result = |exchange: &str, key: &[u8], headers: Option<&FieldTable>| {
        let attributes = headers.map_or_else(Attributes::none, Attributes::with_headers);
        topology.route(exchange, &[key], &attributes, &mut out).unwrap();
        (out.queues.to_vec(), out.cacheable)
    };
    assert_eq!(result("amq.headers", b"", Some(&headers)), (vec!["q"], false));
    assert_eq!(result("amq.headers", b"", None), (vec![], false));
    assert_eq!(result("amq.topic", b"h", Some(&headers)), (vec!["q"], false));
    assert_eq!(result("amq.topic", b"i", Some(&headers)), (vec![], true));
    assert_eq!(result("", b"q", None), (vec!["q"], true));
}

fn with_arguments(name: &str, kind: ExchangeKind, arguments: &[(&str, &str)]) -> Exchange {
    let mut table = FieldTable::default();
    for (key, value) in arguments {
        table.insert((*key).into(), AMQPValue::LongString((*value).into()));
    }
    Exchange::new(name.into(), kind, ExchangeOptions::default(), table)
}

#[test]
fn only_what_depends_on_nothing_but_keys_is_cacheable() {
    use ExchangeKind::{
        ConsistentHash, Delayed, Direct, Fanout, JmsTopic, LocalRandom, ModulusHash, Random, RecentHistory,
    };
    let mut by_argument = exchange("delayed", Fanout);
    by_argument.arguments.insert("x-delayed-exchange".into(), AMQPValue::Boolean(true));
    let cases = [
        (exchange("direct", Direct), "1", true),
        (exchange("hash", ConsistentHash), "1", true),
        (with_arguments("by-header", ConsistentHash, &[("hash-header", "h")]), "1", false),
        (with_arguments("by-property", ConsistentHash, &[("hash-property", "message_id")]), "1", false),
        (exchange("modulus", ModulusHash), "1", true),
        (exchange("random", Random), "1", false),
        (exchange("local", LocalRandom), "", false),
        (exchange("history", RecentHistory), "1", false),
        (exchange("jms", JmsTopic), "1", false),
        (with_arguments("delayed-direct", Delayed, &[("x-delayed-type", "direct")]), "1", false),
        (by_argument, "1", false),
    ];
    let mut topology = topology();
    topology.add_queue("q".into(), "q");
    topology.declare_exchange(exchange("before", Fanout)).unwrap();
    let mut out = RouteResult::default();
    for (new, key, expected) in cases {
        let name = new.name.clone();
        topology.declare_exchange(new).unwrap();
        let mut to = to_queue(&name, "q", key);
        to.arguments.insert("rjms_erlang_selector".into(), AMQPValue::LongString("true.".into()));
        topology.bind(to).unwrap();
        topology.bind(to_exchange("before", &name, "")).unwrap();
        for from in [&*name, "before"] {
            topology.route(from, &[b"1"], &Attributes::none(), &mut out).unwrap();
            assert_eq!((out.queues.as_slice(), out.cacheable), (&["q"][..], expected), "{name} from {from}");
        }
        topology.unbind(&to_exchange("before", &name, ""));
    }
}

#[test]
fn arguments_of_the_type_are_checked_last_and_only_for_new_exchanges() {
    let mut topology = topology_in_use();
    let hash = |name| with_arguments(name, ExchangeKind::ConsistentHash, &[("hash-property", "nonsense")]);
    let mut bad_alternate = hash("new");
    bad_alternate.arguments.insert(ALTERNATE_EXCHANGE.into(), AMQPValue::LongInt(1));
    assert_eq!(topology.check_declare(&hash("new")), Ok(Declared::Created), "the session checks permissions first");
    let refusals = [
        (
            topology.declare_exchange(bad_alternate).unwrap_err(),
            406,
            "invalid type 'signedint' for arg 'alternate-exchange' in exchange 'new' in vhost '/'",
        ),
        (topology.declare_exchange(hash("new")).unwrap_err(), 406, "Unsupported property: nonsense"),
    ];
    check_refusals(&topology, refusals);
    topology.declare_exchange(exchange("y", ExchangeKind::ConsistentHash)).unwrap();
    assert_eq!(topology.declare_exchange(hash("y")), Ok(Declared::Existed));
}

#[test]
fn bindings_are_checked_by_the_type_that_routes() {
    let mut topology = topology_in_use();
    topology
        .declare_exchange(with_arguments("d", ExchangeKind::Delayed, &[("x-delayed-type", "x-consistent-hash")]))
        .unwrap();
    let text = topology.bind(to_queue("d", "q", "k")).unwrap_err().to_string();
    assert_eq!(text, "The binding key must be an integer: <<\"k\">>");
    topology.bind(to_queue("d", "q", "1")).unwrap();
    topology.declare_exchange(exchange("l", ExchangeKind::LocalRandom)).unwrap();
    assert_eq!(topology.check_queue_type("l", QueueType::Classic), Ok(()));
    let error = topology.check_queue_type("l", QueueType::Quorum).unwrap_err();
    let text = "Queue type rabbit_quorum_queue not valid for this exchange type";
    assert_eq!((error.code(), error.to_string().as_str()), (406, text));
    assert_eq!(topology.check_queue_type("x", QueueType::Quorum), Ok(()));
    assert_eq!(topology.check_queue_type("missing", QueueType::Quorum), Ok(()));
}

#[test]
fn an_auto_delete_exchange_goes_with_its_last_source_binding() {
    let mut topology = topology();
    topology.add_queue("q".into(), "q");
    for name in ["a", "b", "unbound"] {
        topology.declare_exchange(auto_delete(name)).unwrap();
    }
    topology.bind(to_queue("a", "q", "1")).unwrap();
    topology.bind(to_queue("a", "q", "2")).unwrap();
    topology.bind(to_exchange("b", "a", "")).unwrap();
    topology.bind(to_exchange("amq.fanout", "unbound", "")).unwrap();
    assert!(topology.unbind(&to_queue("a", "q", "1")).exchanges.is_empty());
    let removed = topology.unbind(&to_queue("a", "q", "2"));
    assert_eq!(exchange_names(&removed), ["a", "b"]);
    assert_eq!(removed.bindings.len(), 2);
    assert!(topology.exchange("a").is_none() && topology.exchange("b").is_none());
    // Being a destination does not count, neither as use nor as its loss.
    assert!(topology.unbind(&to_exchange("amq.fanout", "unbound", "")).exchanges.is_empty());
    assert!(topology.exchange("unbound").is_some());
}

#[test]
fn deleting_a_destination_exchange_may_delete_its_auto_delete_sources() {
    let mut topology = topology();
    topology.declare_exchange(exchange("end", ExchangeKind::Fanout)).unwrap();
    topology.declare_exchange(auto_delete("a")).unwrap();
    topology.bind(to_exchange("a", "end", "")).unwrap();
    topology.bind(to_exchange("a", "a", "")).unwrap();
    // Not in use: it is only a destination.
    assert!(topology.delete_exchange("end", true).is_ok());
    assert!(topology.exchange("a").is_some(), "bound to itself");
    let removed = topology.unbind(&to_exchange("a", "a", ""));
    assert_eq!(exchange_names(&removed), ["a"]);
    assert_eq!(topology.binding_count(), 0);
}

#[test]
fn a_binding_is_durable_iff_both_ends_are() {
    let mut topology = topology();
    topology.declare_exchange(exchange("transient", ExchangeKind::Direct)).unwrap();
    let durable = |binding, queue| topology.is_durable_binding(&binding, queue);
    assert!(durable(to_queue("amq.direct", "q", ""), true));
    assert!(!durable(to_queue("amq.direct", "q", ""), false));
    assert!(!durable(to_queue("transient", "q", ""), true));
    assert!(durable(to_exchange("amq.direct", "amq.topic", ""), false));
    assert!(!durable(to_exchange("amq.direct", "transient", ""), true));
}

/// One change of a topology with three queues and four exchanges.
#[derive(Clone, Debug)]
enum Step {
    Declare(usize, bool, Option<usize>),
    Delete(usize),
    AddQueue(usize),
    RemoveQueue(usize),
    Bind(usize, bool, usize, usize),
    Unbind(usize, bool, usize, usize),
}

const EXCHANGES: [&str; 4] = ["x0", "x1", "x2", "x3"];
const QUEUES: [&str; 3] = ["q0", "q1", "q2"];
const KEYS: [&str; 3] = ["a", "a.b", "b"];
const PATTERNS: [&str; 4] = ["a", "a.#", "*", "#"];

fn step() -> impl Strategy<Value = Step> {
    let exchange = 0..EXCHANGES.len();
    let queue = 0..QUEUES.len();
    let bind = (exchange.clone(), any::<bool>(), 0..3usize, 0..PATTERNS.len());
    prop_oneof![
        2 => (exchange.clone(), any::<bool>(), prop::option::of(exchange.clone()))
            .prop_map(|(x, auto, alternate)| Step::Declare(x, auto, alternate)),
        1 => exchange.prop_map(Step::Delete),
        2 => queue.clone().prop_map(Step::AddQueue),
        1 => queue.prop_map(Step::RemoveQueue),
        6 => bind.clone().prop_map(|(s, e, d, p)| Step::Bind(s, e, d, p)),
        2 => bind.prop_map(|(s, e, d, p)| Step::Unbind(s, e, d, p)),
    ]
}

fn step_binding(source: usize, exchange: bool, destination: usize, pattern: usize) -> Binding {
    let (source, pattern) = (EXCHANGES[source], PATTERNS[pattern]);
    if exchange {
        to_exchange(source, EXCHANGES[destination], pattern)
    } else {
        to_queue(source, QUEUES[destination], pattern)
    }
}

/// The same, as lists and by the book: odd exchanges are fanouts, even ones topics.
#[derive(Default)]
struct Model {
    exchanges: Vec<(usize, bool, Option<usize>)>,
    queues: BTreeSet<usize>,
    bindings: Vec<(usize, bool, usize, usize)>,
}

impl Model {
    fn has(&self, exchange: bool, number: usize) -> bool {
        if exchange { self.exchanges.iter().any(|entry| entry.0 == number) } else { self.queues.contains(&number) }
    }

    /// Drops bindings whose ends are gone, and auto-delete exchanges that lost their last one, until all is quiet.
    fn settle(&mut self, mut before: Vec<(usize, bool, usize, usize)>) {
        loop {
            let mut bindings = std::mem::take(&mut self.bindings);
            bindings.retain(|b| self.has(true, b.0) && self.has(b.1, b.2));
            self.bindings = bindings;
            let lost = |x: usize| before.iter().any(|b| b.0 == x) && !self.bindings.iter().any(|b| b.0 == x);
            let gone: Vec<_> = self.exchanges.iter().filter(|e| e.1 && lost(e.0)).map(|e| e.0).collect();
            if gone.is_empty() {
                return;
            }
            before.clone_from(&self.bindings);
            self.exchanges.retain(|e| !gone.contains(&e.0));
        }
    }

    fn apply(&mut self, step: &Step) {
        let before = self.bindings.clone();
        match *step {
            Step::Declare(x, auto, alternate) => {
                if !self.has(true, x) {
                    self.exchanges.push((x, auto, alternate));
                }
            }
            Step::Delete(x) => self.exchanges.retain(|e| e.0 != x),
            Step::AddQueue(q) => drop(self.queues.insert(q)),
            Step::RemoveQueue(q) => drop(self.queues.remove(&q)),
            Step::Bind(s, e, d, p) => {
                if self.has(true, s) && self.has(e, d) && !self.bindings.contains(&(s, e, d, p)) {
                    self.bindings.push((s, e, d, p));
                }
            }
            Step::Unbind(s, e, d, p) => self.bindings.retain(|b| *b != (s, e, d, p)),
        }
        self.settle(before);
    }

    fn route(&self, start: usize, keys: &[&str]) -> BTreeSet<&'static str> {
        let matches = |exchange: usize, pattern: usize| {
            exchange % 2 == 1
                || keys.iter().any(|key| match PATTERNS[pattern] {
                    "#" => true,
                    "*" => !key.contains('.'),
                    "a.#" => key.starts_with('a'),
                    literal => *key == literal,
                })
        };
        let (mut seen, mut work) = (BTreeSet::from([start]), vec![start]);
        let mut queues = BTreeSet::new();
        while let Some(x) = work.pop() {
            let mut found: Vec<_> =
                self.bindings.iter().filter(|b| b.0 == x && matches(x, b.3)).map(|b| (b.1, b.2)).collect();
            let entry = self.exchanges.iter().find(|e| e.0 == x);
            if found.is_empty()
                && let Some(&(_, _, Some(alternate))) = entry
                && self.has(true, alternate)
            {
                found.push((true, alternate));
            }
            for (exchange, number) in found {
                if !exchange {
                    queues.insert(QUEUES[number]);
                } else if seen.insert(number) {
                    work.push(number);
                }
            }
        }
        queues
    }
}

fn apply(topology: &mut Topology<&'static str>, step: &Step) {
    match *step {
        Step::Declare(x, auto_delete, alternate) => {
            let kind = if x % 2 == 1 { ExchangeKind::Fanout } else { ExchangeKind::Topic };
            let options = ExchangeOptions { auto_delete, ..ExchangeOptions::default() };
            let mut arguments = FieldTable::default();
            if let Some(alternate) = alternate {
                let name = AMQPValue::LongString(EXCHANGES[alternate].into());
                arguments.insert(ALTERNATE_EXCHANGE.into(), name);
            }
            // Not equivalent to what exists: refused, nothing changes.
            let _ = topology.declare_exchange(Exchange::new(EXCHANGES[x].into(), kind, options, arguments));
        }
        Step::Delete(x) => drop(topology.delete_exchange(EXCHANGES[x], false).unwrap()),
        Step::AddQueue(q) => drop(topology.add_queue(QUEUES[q].into(), QUEUES[q])),
        Step::RemoveQueue(q) => drop(topology.remove_queue(QUEUES[q])),
        Step::Bind(s, e, d, p) => drop(topology.bind(step_binding(s, e, d, p))),
        Step::Unbind(s, e, d, p) => drop(topology.unbind(&step_binding(s, e, d, p))),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_changes_routes_as_the_model_does(steps in prop::collection::vec(step(), 1..60)) {
        let mut topology = topology();
        let mut model = Model::default();
        for step in &steps {
            apply(&mut topology, step);
            model.apply(step);
            prop_assert_eq!(topology.binding_count(), model.bindings.len());
            prop_assert_eq!(topology.bindings().count(), model.bindings.len());
            prop_assert_eq!(topology.exchanges().count(), 7 + model.exchanges.len());
            for &(x, _, _) in &model.exchanges {
                for keys in [&KEYS[..1], &KEYS[1..2], &KEYS[2..], &KEYS[..2]] {
                    let found: BTreeSet<_> = route(&topology, EXCHANGES[x], keys).into_iter().collect();
                    prop_assert_eq!(found, model.route(x, keys), "{} {:?}", EXCHANGES[x], keys);
                }
            }
        }
    }
}
