//! The part of the plan about queues and the exchange: their names, what they are declared with, and how many
//! copies of a message they make.

use super::super::error::PerfError;
use super::super::fields::{Field, Value};
use super::args::PerfArgs;

/// Most queues, publishers or consumers of a run.
pub(super) const MAX_WORKERS: usize = 100_000;
const MAX_SHORT_STRING_BYTES: usize = 255;
const QUEUE_TYPE: &str = "x-queue-type";

/// What is to be declared, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct QueuePlan {
    /// At least one.
    pub(in super::super) names: Vec<String>,
    pub(in super::super) durable: bool,
    pub(in super::super) exclusive: bool,
    pub(in super::super) auto_delete: bool,
    pub(in super::super) keep: bool,
    pub(in super::super) predeclared: bool,
    pub(in super::super) arguments: Vec<Field>,
}

/// Where messages are published to, and how queues are bound there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct ExchangePlan {
    /// Empty: the default exchange.
    pub(in super::super) name: String,
    /// The type to declare it with; `None` if it must exist.
    pub(in super::super) declared_type: Option<String>,
    pub(in super::super) arguments: Vec<Field>,
    /// For all queues; `None`: each queue's own name.
    pub(in super::super) routing_key: Option<String>,
    /// What queues are bound to a headers exchange with.
    headers: Vec<Field>,
}

/// Which queues get a copy of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// The one that its publisher uses.
    Own,
    /// The one of this index, whoever publishes.
    Only(usize),
    /// One of them, chosen by the exchange.
    Any,
    Every,
}

impl QueuePlan {
    pub(super) fn of(args: &PerfArgs) -> Result<Self, PerfError> {
        let mut arguments = args.queue_arguments.clone();
        if let Some(queue_type) = &args.queue_type {
            arguments.push(Field::text(QUEUE_TYPE, queue_type));
        }
        let mut plan = Self {
            names: names(args)?,
            durable: args.durable || (args.persistent && !args.transient_queue),
            exclusive: args.exclusive,
            auto_delete: args.auto_delete,
            keep: args.keep,
            predeclared: args.predeclared,
            arguments,
        };
        plan.check_type(args)?;
        plan.durable |= plan.is_replicated();
        Ok(plan)
    }

    fn queue_type(&self) -> Option<&str> {
        self.arguments.iter().find_map(|field| match &field.value {
            Value::Text(value) if field.key == QUEUE_TYPE => Some(value.as_str()),
            _ => None,
        })
    }

    /// Whether consuming leaves the messages where they are.
    pub(in super::super) fn are_streams(&self) -> bool {
        self.queue_type() == Some("stream")
    }

    fn is_replicated(&self) -> bool {
        matches!(self.queue_type(), Some("quorum" | "stream"))
    }

    fn check_type(&self, args: &PerfArgs) -> Result<(), PerfError> {
        let complaint = if self.arguments.iter().filter(|field| field.key == QUEUE_TYPE).count() > 1 {
            "--queue-type and --queue-argument x-queue-type=… say the same: leave one out"
        } else if self.is_replicated() && (self.exclusive || self.auto_delete || args.transient_queue) {
            "quorum queues and streams cannot be --exclusive, --auto-delete or --transient-queue"
        } else if self.are_streams() && args.consumers > 0 && args.ack_batch == 0 {
            "consumers of streams have to acknowledge: add --ack-batch 100"
        } else if self.are_streams() && args.get {
            "streams cannot be read by --get"
        } else {
            return Ok(());
        };
        Err(PerfError::Usage(complaint.to_owned()))
    }
}

impl ExchangePlan {
    pub(super) fn of(args: &PerfArgs) -> Result<Self, PerfError> {
        let too_long = |text: &str| text.len() > MAX_SHORT_STRING_BYTES;
        let kind = args.exchange_type.as_deref();
        let complaint = if too_long(&args.exchange) || args.routing_key.as_deref().is_some_and(too_long) {
            format!("--exchange and --routing-key hold up to {MAX_SHORT_STRING_BYTES} bytes")
        } else if kind.is_some_and(|kind| {
            too_long(kind) || !(matches!(kind, "direct" | "fanout" | "topic" | "headers") || kind.starts_with("x-"))
        }) {
            "--exchange-type is direct, fanout, topic, headers, or begins with x-".to_owned()
        } else if kind.is_some() && args.exchange.is_empty() {
            "--exchange-type needs the exchange's name: --exchange NAME".to_owned()
        } else if kind.is_some() && args.exchange.starts_with("amq.") {
            "--exchange-type cannot declare an exchange whose name begins with amq.; leave it out".to_owned()
        } else {
            return Ok(Self {
                name: args.exchange.clone(),
                declared_type: args.exchange_type.clone(),
                arguments: args.exchange_arguments.clone(),
                routing_key: args.routing_key.clone(),
                headers: args.headers.clone(),
            });
        };
        Err(PerfError::Usage(complaint))
    }

    pub(in super::super) fn is_default(&self) -> bool {
        self.name.is_empty()
    }

    /// The exchange's type where it is known; `None` for one that exists and might be anything.
    fn known_type(&self) -> Option<&str> {
        match self.name.as_str() {
            "amq.headers" | "amq.match" => Some("headers"),
            name => self
                .declared_type
                .as_deref()
                .or(name.strip_prefix("amq.").filter(|kind| matches!(*kind, "direct" | "fanout" | "topic"))),
        }
    }

    /// The key with which queue `name` is published to.
    pub(in super::super) fn routing_key_of<'a>(&'a self, name: &'a str) -> &'a str {
        self.routing_key.as_deref().unwrap_or(name)
    }

    /// The key with which queue `name` is bound. A consistent hash takes a weight in its place.
    pub(in super::super) fn binding_key_of<'a>(&'a self, name: &'a str) -> &'a str {
        match self.known_type() {
            Some("x-consistent-hash") => "1",
            _ => self.routing_key_of(name),
        }
    }

    /// What queues are bound with besides the key.
    pub(in super::super) fn binding_arguments(&self) -> Vec<Field> {
        match self.known_type() {
            Some("headers") => [Field::text("x-match", "all")].into_iter().chain(self.headers.clone()).collect(),
            _ => Vec::new(),
        }
    }

    /// Which of the plan's queues get a message; `None` where the exchange's rules are not known.
    pub(super) fn reach(&self, queues: &QueuePlan) -> Option<Reach> {
        let by_key = if self.routing_key.is_some() { Reach::Every } else { Reach::Own };
        if self.is_default() {
            return match &self.routing_key {
                None => Some(Reach::Own),
                Some(key) => queues.names.iter().position(|name| name == key).map(Reach::Only),
            };
        }
        match self.known_type()? {
            _ if queues.predeclared => None, // others bound them
            "fanout" | "headers" => Some(Reach::Every),
            "direct" => Some(by_key),
            "topic" => {
                let has_wildcard = |name: &String| name.contains(['#', '*']);
                (by_key == Reach::Every || !queues.names.iter().any(has_wildcard)).then_some(by_key)
            }
            "x-consistent-hash" | "x-modulus-hash" | "x-random" | "x-local-random" => Some(Reach::Any),
            _ => None,
        }
    }
}

fn names(args: &PerfArgs) -> Result<Vec<String>, PerfError> {
    let names = match &args.queue_pattern {
        Some(pattern) => pattern_names(pattern, args.queue_pattern_from, args.queue_pattern_to.unwrap_or(0))?,
        None => queue_names(&args.queue, args.queues)?,
    };
    if names.iter().any(|name| name.len() > MAX_SHORT_STRING_BYTES) {
        return Err(PerfError::Usage(format!("queue names hold up to {MAX_SHORT_STRING_BYTES} bytes")));
    }
    Ok(names)
}

fn queue_names(name: &str, count: usize) -> Result<Vec<String>, PerfError> {
    match count {
        _ if name.is_empty() => Err(PerfError::Usage("--queue must not be empty".to_owned())),
        0 => Err(PerfError::Usage("--queues must be at least 1".to_owned())),
        1 => Ok(vec![name.to_owned()]),
        _ if count > MAX_WORKERS => Err(PerfError::Usage(format!("--queues goes up to {MAX_WORKERS}"))),
        _ => Ok((1..=count).map(|number| format!("{name}-{number}")).collect()),
    }
}

/// The names that `pattern` makes of the numbers; `%d` is the number, `%03d` has at least three digits.
fn pattern_names(pattern: &str, from: usize, to: usize) -> Result<Vec<String>, PerfError> {
    let placeholder = pattern.split_once('%').and_then(|(before, rest)| {
        let (width, after) = rest.split_once('d')?;
        let width = if width.is_empty() { Some(0) } else { width.strip_prefix('0')?.parse::<usize>().ok() };
        Some((before, width.filter(|width| *width <= MAX_SHORT_STRING_BYTES)?, after))
    });
    let Some((before, width, after)) = placeholder else {
        return Err(PerfError::Usage(format!("--queue-pattern '{pattern}' needs %d where the number goes")));
    };
    if to < from || to - from >= MAX_WORKERS {
        return Err(PerfError::Usage(format!(
            "--queue-pattern-to must be --queue-pattern-from or more, for up to {MAX_WORKERS} queues"
        )));
    }
    Ok((from..=to).map(|number| format!("{before}{number:0width$}{after}")).collect())
}

#[cfg(test)]
mod tests {
    use super::super::plan::tests::{plan, refusal};
    use super::*;

    fn names_of(options: &str) -> Vec<String> {
        plan(options).expect(options).queues.names
    }

    #[test]
    fn several_queues_are_numbered_or_follow_a_pattern() {
        assert_eq!(names_of("--queue q --queues 3"), ["q-1", "q-2", "q-3"]);
        assert_eq!(names_of("--queue-pattern a%d.b --queue-pattern-to 2"), ["a1.b", "a2.b"]);
        assert_eq!(names_of("--queue-pattern a-%03d --queue-pattern-from 9 --queue-pattern-to 10"), ["a-009", "a-010"]);
        assert_eq!(names_of("--queue-pattern %d --queue-pattern-from 0 --queue-pattern-to 999").len(), 1_000);
    }

    #[test]
    fn patterns_that_make_no_names_are_refused() {
        for (options, reason) in [
            ("--queue-pattern a --queue-pattern-to 2", "%d"),
            ("--queue-pattern a%xd --queue-pattern-to 2", "%d"),
            ("--queue-pattern a%5d --queue-pattern-to 2", "%d"),
            ("--queue-pattern a%d --queue-pattern-from 3 --queue-pattern-to 2", "--queue-pattern-to"),
            ("--queue-pattern a%d --queue-pattern-to 100001", "100000"),
            ("--queues 0", "--queues"),
            ("--queues 100001", "--queues"),
        ] {
            assert!(refusal(options).contains(reason), "{options}: {}", refusal(options));
        }
        assert!(refusal(&format!("--queue {}", "q".repeat(256))).contains("255"));
        assert!(refusal(&format!("--queues 10 --queue {}", "q".repeat(253))).contains("255"));
    }

    #[test]
    fn the_number_of_copies_follows_from_the_exchanges_type() {
        for (options, copies) in [
            ("", Some(1)),
            ("-k other", None),
            ("-k perf-test", Some(1)),
            ("--queues 5 -e x", None),
            ("--queues 5 -e amq.fanout", Some(5)),
            ("--queues 5 -e amq.fanout --predeclared", None),
            ("--queues 5 -e x --exchange-type fanout", Some(5)),
            ("--queues 5 -e x --exchange-type headers --header a=1", Some(5)),
            ("--queues 5 -e x --exchange-type direct", Some(1)),
            ("--queues 5 -e x --exchange-type direct -k k", Some(5)),
            ("--queues 5 -e x --exchange-type topic", Some(1)),
            ("--queues 5 -e x --exchange-type topic -k k.#", Some(5)),
            ("--queue q.# --queues 5 -e x --exchange-type topic", None),
            ("--queues 5 -e x --exchange-type x-consistent-hash", Some(1)),
            ("--queues 5 -e x --exchange-type x-other", None),
        ] {
            assert_eq!(plan(options).expect(options).copies(), copies, "{options}");
        }
    }

    #[test]
    fn only_copies_in_queues_that_somebody_consumes_are_expected() {
        for (options, deliveries) in [
            ("", Some(1)),
            ("--queues 5", Some(1)),
            ("--queues 5 -x 3 -y 2", None),
            ("--queues 5 -x 3 -y 3", Some(1)),
            ("--queues 2 -k perf-test-2", None),
            ("--queues 2 -k perf-test-2 -y 2", Some(1)),
            ("--queues 5 -y 3 -e x --exchange-type fanout", Some(3)),
            ("--queues 5 -y 7 -e x --exchange-type fanout", Some(5)),
            ("--queues 5 -y 4 -e x --exchange-type x-random", None),
            ("--queues 5 -y 5 -e x --exchange-type x-random", Some(1)),
        ] {
            assert_eq!(plan(options).expect(options).deliveries_per_message(), deliveries, "{options}");
        }
    }

    #[test]
    fn each_consumer_of_a_stream_gets_a_copy() {
        let deliveries = |options: &str| {
            plan(&format!("--queue-type stream --ack-batch 10 {options}")).expect(options).deliveries_per_message()
        };
        assert_eq!(deliveries("-y 3"), Some(3));
        assert_eq!(deliveries("--queues 2 -y 4"), Some(2));
        assert_eq!(deliveries("--queues 2 -y 3"), None);
        assert_eq!(deliveries("--consumer-argument x-stream-offset=first"), None);
    }

    #[test]
    fn queue_types_that_cannot_be_are_refused() {
        for (options, reason) in [
            ("--queue-type stream", "--ack-batch"),
            ("--queue-type stream --ack-batch 1 --get", "--get"),
            ("--queue-type quorum --exclusive", "--exclusive"),
            ("--queue-type quorum --queue-argument x-queue-type=stream", "leave one out"),
            ("-e x --exchange-type round", "--exchange-type"),
            ("-e amq.direct --exchange-type direct", "amq."),
        ] {
            assert!(refusal(options).contains(reason), "{options}: {}", refusal(options));
        }
        assert!(plan("--queue-type quorum").expect("valid").queues.durable);
    }

    #[test]
    fn a_headers_exchange_is_bound_with_the_headers_and_a_hash_with_a_weight() {
        let headers = plan("-e x --exchange-type headers --header a=1").expect("valid");
        let expected = ["x-match=all", "a=1"].map(|text| Field::parse(text).expect(text));
        assert_eq!(headers.exchange.binding_arguments(), expected);
        let hash = plan("-e x --exchange-type x-consistent-hash -k k").expect("valid");
        assert_eq!((hash.exchange.binding_key_of("q"), hash.exchange.routing_key_of("q")), ("1", "k"));
        assert!(hash.exchange.binding_arguments().is_empty());
    }
}
