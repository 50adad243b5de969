//! What a run came to: one structure, printed as JSON or as text.

mod text;

use std::time::Duration;

use serde::Serialize;

use super::consumer::ConsumerOutcome;
use super::error::PerfError;
use super::meter::{Latencies, Total};
use super::options::Plan;
use super::process::ProcessUse;
use super::publisher::PublisherOutcome;

pub(super) use text::{grouped, readable_us};

/// How the wait for the last deliveries ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum DrainEnd {
    /// Everything arrived (or, where that cannot be known, nothing more came).
    Complete,
    /// Nothing arrived for 10 s though something was missing.
    NoProgress,
    /// Deliveries still came when the drain's time was over.
    TimeLimit,
    /// There was nothing to wait for.
    NotNeeded,
    /// The run failed or was interrupted.
    Aborted,
}

/// What the supervisor measured, before the workers' own accounts are added.
///
/// All but the numbers "in all" begin when the warm-up is over.
#[derive(Debug)]
pub(super) struct Observed {
    pub(super) published: Total,
    pub(super) delivered: Total,
    pub(super) published_in_all: u64,
    pub(super) delivered_in_all: u64,
    pub(super) delivered_while_publishing: Option<Total>,
    pub(super) ready_before: u64,
    pub(super) setup: Duration,
    pub(super) drain: DrainEnd,
    pub(super) own_cpu: Duration,
    pub(super) broker: Option<ProcessUse>,
    pub(super) delivery_latencies: Latencies,
    pub(super) confirm_latencies: Latencies,
}

/// The figures of one run. Field names are the JSON's; times and sizes carry their unit.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    target: String,
    shape: Shape,
    /// Until everything was declared and connected.
    setup_seconds: f64,
    published: Flow,
    delivered: Flow,
    /// Deliveries up to the moment the last publisher stopped.
    delivered_while_publishing: Option<Flow>,
    confirms: Option<Confirms>,
    transactions: Option<Transactions>,
    redelivered: u64,
    /// Rejected by the consumers (`--nack-every`).
    rejected: u64,
    /// Gets that found the queue empty.
    empty_gets: u64,
    /// Mandatory messages that no queue took.
    returned: u64,
    wrong_size: u64,
    ready_before: u64,
    /// Copies of what was published (and not refused) or found that were never delivered; absent where that cannot
    /// be known.
    missing: Option<u64>,
    drain: DrainEnd,
    /// From sending (paced: from when it was due) to delivery.
    latency: Option<Percentiles>,
    blocked_count: u64,
    blocked_seconds: f64,
    generator: Cost,
    broker: Option<BrokerCost>,
    errors: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Shape {
    publishers: usize,
    consumers: usize,
    queues: usize,
    /// Where sizes differ, their mean.
    size_bytes: u64,
    sizes: String,
    persistent: bool,
    durable: bool,
    exchange_type: Option<String>,
    /// How many queues each message goes to, where that is known.
    copies_per_message: Option<u64>,
    confirm_window: Option<u64>,
    tx_size: Option<u64>,
    ack_batch: u32,
    prefetch: u16,
    /// Of each publisher.
    rate_per_second: Option<f64>,
    warmup_seconds: f64,
}

/// Messages over the active window, from the first one to the last one.
#[derive(Debug, Clone, Copy, Serialize)]
struct Flow {
    messages: u64,
    per_second: f64,
    seconds: f64,
}

#[derive(Debug, Serialize)]
struct Confirms {
    acked: u64,
    nacked: u64,
    /// Neither acked nor nacked at the end.
    outstanding: u64,
    /// Confirms of what was not outstanding.
    unexpected: u64,
    per_second: f64,
    latency: Option<Percentiles>,
}

#[derive(Debug, Serialize)]
struct Transactions {
    commits: u64,
    messages: u64,
    per_second: f64,
    /// From `tx.commit` to its answer.
    latency: Option<Percentiles>,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Percentiles {
    samples: u64,
    p50_us: f64,
    p75_us: f64,
    p90_us: f64,
    p95_us: f64,
    p99_us: f64,
    p999_us: f64,
    max_us: f64,
}

#[derive(Debug, Serialize)]
struct Cost {
    cpu_seconds: f64,
    /// Per message delivered; without consumers, per message published.
    cpu_us_per_message: Option<f64>,
    /// The same per message published, which differs where a message makes several copies.
    cpu_us_per_published: Option<f64>,
}

#[derive(Debug, Serialize)]
struct BrokerCost {
    pid: u32,
    #[serde(flatten)]
    cost: Cost,
    resident_bytes: u64,
    /// Highest during the run.
    peak_resident_bytes: u64,
    written_bytes: Option<u64>,
    /// Bytes written to disk for each byte of a body that was accepted (confirmed, if there are confirms).
    written_per_accepted_byte: Option<f64>,
}

impl Report {
    /// Adds up; the second part is the first worker's error, the rest is in the report as text.
    pub(super) fn new(
        plan: &Plan,
        observed: &Observed,
        publishers: Vec<Result<PublisherOutcome, PerfError>>,
        consumers: Vec<Result<ConsumerOutcome, PerfError>>,
        broker_gone: Option<PerfError>,
    ) -> (Self, Option<PerfError>) {
        let mut sum = Sum::default();
        publishers.into_iter().for_each(|outcome| sum.add_publisher(outcome));
        consumers.into_iter().for_each(|outcome| sum.add_consumer(outcome));
        sum.errors.extend(broker_gone);
        let (published, delivered) = (Flow::of(&observed.published), Flow::of(&observed.delivered));
        let cost = |cpu| {
            let messages = if plan.consumer_count == 0 { published.messages } else { delivered.messages };
            Cost::of(cpu, messages, published.messages)
        };
        let report = Self {
            target: plan.uri.to_string(),
            shape: Shape::of(plan),
            setup_seconds: observed.setup.as_secs_f64(),
            published,
            delivered,
            delivered_while_publishing: observed.delivered_while_publishing.as_ref().map(Flow::of),
            confirms: plan.confirm_window.map(|_| sum.confirms(observed, published.seconds)),
            transactions: plan.tx.map(|_| sum.transactions(observed, published.seconds)),
            redelivered: sum.redelivered,
            rejected: sum.rejected,
            empty_gets: sum.empty_gets,
            returned: sum.returned,
            wrong_size: sum.wrong_size,
            ready_before: observed.ready_before,
            missing: missing(plan, observed, sum.nacked + sum.returned),
            drain: observed.drain,
            latency: Percentiles::of(&observed.delivery_latencies),
            blocked_count: sum.blocked_count,
            blocked_seconds: sum.blocked_ns as f64 / 1e9,
            generator: cost(observed.own_cpu),
            broker: plan.broker_pid.zip(observed.broker).map(|(pid, used)| {
                let accepted = if plan.confirm_window.or(plan.tx).is_some() {
                    observed.published.confirmed
                } else {
                    published.messages
                };
                BrokerCost::of(pid, &used, cost(used.cpu), accepted as f64 * plan.messages.sizes.mean_bytes())
            }),
            errors: told_once(sum.errors.iter().map(PerfError::to_string)),
        };
        (report, sum.errors.into_iter().next())
    }
}

/// Each error once, in the order of appearance, with how many workers had it: a broker that goes away fails them all.
fn told_once(errors: impl Iterator<Item = String>) -> Vec<String> {
    let mut counted: Vec<(String, u64)> = Vec::new();
    for error in errors {
        match counted.iter_mut().find(|(known, _)| *known == error) {
            Some((_, count)) => *count += 1,
            None => counted.push((error, 1)),
        }
    }
    let told = |(error, count)| if count > 1 { format!("{error} ({count} workers)") } else { error };
    counted.into_iter().map(told).collect()
}

/// Deliveries that were due and did not come; `None` where it cannot be known how many were due.
fn missing(plan: &Plan, observed: &Observed, refused: u64) -> Option<u64> {
    let due = match (plan.publisher_count, plan.consumer_count) {
        (_, 0) => return None,
        (0, _) if plan.is_open_ended && observed.ready_before > 0 => observed.ready_before,
        (0, _) => return None,
        _ => {
            let accepted = observed.published_in_all.saturating_sub(refused);
            accepted.saturating_mul(plan.deliveries_per_message()?).saturating_add(observed.ready_before)
        }
    };
    Some(due.saturating_sub(observed.delivered_in_all))
}

/// The workers' accounts, added up.
#[derive(Debug, Default)]
struct Sum {
    commits: u64,
    nacked: u64,
    returned: u64,
    rejected: u64,
    empty_gets: u64,
    outstanding: u64,
    unexpected: u64,
    redelivered: u64,
    wrong_size: u64,
    blocked_count: u64,
    blocked_ns: u64,
    errors: Vec<PerfError>,
}

impl Sum {
    fn add_publisher(&mut self, outcome: Result<PublisherOutcome, PerfError>) {
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => return self.errors.push(error),
        };
        if let Some(confirms) = outcome.confirms {
            self.nacked += confirms.nacked;
            self.outstanding += confirms.outstanding();
            self.unexpected += confirms.unexpected;
        }
        self.commits += outcome.commits;
        self.returned += outcome.returned;
        self.blocked_count += outcome.blocked_count;
        self.blocked_ns += outcome.blocked_ns;
        self.errors.extend(outcome.error);
    }

    fn add_consumer(&mut self, outcome: Result<ConsumerOutcome, PerfError>) {
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => return self.errors.push(error),
        };
        self.rejected += outcome.rejected;
        self.empty_gets += outcome.empty_gets;
        self.redelivered += outcome.redelivered;
        self.wrong_size += outcome.wrong_size;
        self.errors.extend(outcome.error);
    }

    fn confirms(&self, observed: &Observed, seconds: f64) -> Confirms {
        let acked = observed.published.confirmed;
        Confirms {
            acked,
            nacked: self.nacked,
            outstanding: self.outstanding,
            unexpected: self.unexpected,
            per_second: per(acked, seconds),
            latency: Percentiles::of(&observed.confirm_latencies),
        }
    }

    fn transactions(&self, observed: &Observed, seconds: f64) -> Transactions {
        let messages = observed.published.confirmed;
        Transactions {
            commits: self.commits,
            messages,
            per_second: per(messages, seconds),
            latency: Percentiles::of(&observed.confirm_latencies),
        }
    }
}

impl Shape {
    fn of(plan: &Plan) -> Self {
        Self {
            publishers: plan.publisher_count,
            consumers: plan.consumer_count,
            queues: plan.queues.names.len(),
            size_bytes: mean_size_bytes(plan),
            sizes: plan.messages.sizes.to_string(),
            persistent: plan.messages.persistent,
            durable: plan.queues.durable,
            exchange_type: plan.exchange.declared_type.clone(),
            copies_per_message: plan.copies(),
            confirm_window: plan.confirm_window,
            tx_size: plan.tx,
            ack_batch: plan.consuming.ack_batch,
            prefetch: plan.consuming.prefetch,
            rate_per_second: plan.rate_per_second,
            warmup_seconds: plan.warmup.as_secs_f64(),
        }
    }
}

impl Flow {
    fn of(total: &Total) -> Self {
        let seconds = total.active_seconds();
        Self { messages: total.messages, per_second: per(total.messages, seconds), seconds }
    }
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "sizes are positive and far below 2^53")]
fn mean_size_bytes(plan: &Plan) -> u64 {
    plan.messages.sizes.mean_bytes().round() as u64
}

fn per(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { count as f64 / seconds } else { 0.0 }
}

impl Percentiles {
    fn of(latencies: &Latencies) -> Option<Self> {
        let us = |ns: u64| ns as f64 / 1e3;
        let at = |quantile| us(latencies.at_quantile_ns(quantile));
        (latencies.count() > 0).then(|| Self {
            samples: latencies.count(),
            p50_us: at(0.5),
            p75_us: at(0.75),
            p90_us: at(0.9),
            p95_us: at(0.95),
            p99_us: at(0.99),
            p999_us: at(0.999),
            max_us: us(latencies.max_ns()),
        })
    }
}

impl Cost {
    fn of(cpu: Duration, messages: u64, published: u64) -> Self {
        let cpu_seconds = cpu.as_secs_f64();
        let us_per = |count: u64| (count > 0).then(|| cpu_seconds * 1e6 / count as f64);
        Self { cpu_seconds, cpu_us_per_message: us_per(messages), cpu_us_per_published: us_per(published) }
    }
}

impl BrokerCost {
    fn of(pid: u32, used: &ProcessUse, cost: Cost, accepted_bytes: f64) -> Self {
        Self {
            pid,
            cost,
            resident_bytes: used.resident_bytes,
            peak_resident_bytes: used.peak_resident_bytes,
            written_bytes: used.written_bytes,
            written_per_accepted_byte: used
                .written_bytes
                .filter(|_| accepted_bytes > 0.0)
                .map(|written| written as f64 / accepted_bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::options::test_plan;
    use super::*;

    #[test]
    fn a_rate_needs_a_window() {
        assert_eq!(Flow::of(&Total { messages: 1, active_ns: Some((5, 5)), ..Total::default() }).per_second, 0.0);
        let flow = Flow::of(&Total { messages: 10, active_ns: Some((0, 2_000_000_000)), ..Total::default() });
        assert_eq!((flow.per_second, flow.seconds), (5.0, 2.0));
    }

    fn observed(published: u64, delivered: u64, ready_before: u64) -> Observed {
        Observed {
            published: Total { messages: published, ..Total::default() },
            delivered: Total { messages: delivered, ..Total::default() },
            published_in_all: published,
            delivered_in_all: delivered,
            delivered_while_publishing: None,
            ready_before,
            setup: Duration::ZERO,
            drain: DrainEnd::Complete,
            own_cpu: Duration::from_millis(1),
            broker: None,
            delivery_latencies: Latencies::new(),
            confirm_latencies: Latencies::new(),
        }
    }

    #[test]
    fn losses_count_every_copy_that_was_due() {
        let lost = |options, published, delivered| missing(&test_plan(options), &observed(published, delivered, 5), 10);
        assert_eq!(lost("", 100, 90), Some(5));
        assert_eq!(lost("--queues 3 -y 3 -e x --exchange-type fanout", 100, 270), Some(5));
        assert_eq!(lost("--queues 3 -y 3 -e x", 100, 270), None);
        assert_eq!(lost("-y 0", 100, 0), None);
        assert_eq!(lost("-x 0", 0, 3), Some(2));
        assert_eq!(lost("-x 0 --time 1", 0, 3), None);
    }

    #[test]
    fn costs_are_told_per_copy_and_per_message() {
        let plan = test_plan("--queues 4 -y 4 -e x --exchange-type fanout");
        let (report, error) = Report::new(&plan, &observed(100, 400, 0), Vec::new(), Vec::new(), None);
        assert!(error.is_none());
        assert_eq!(
            (report.generator.cpu_us_per_message, report.generator.cpu_us_per_published),
            (Some(2.5), Some(10.0))
        );
        assert_eq!(report.shape.copies_per_message, Some(4));
        assert!(report.to_string().contains("2.500 µs per copy delivered, 10.000 µs per message published"));
    }

    #[test]
    fn what_many_workers_complain_of_is_told_once() {
        let errors = ["a", "b", "a", "a"].map(str::to_owned);
        assert_eq!(told_once(errors.into_iter()), ["a (3 workers)", "b"]);
    }

    #[test]
    fn bytes_written_are_told_per_byte_accepted() {
        let used =
            ProcessUse { cpu: Duration::ZERO, resident_bytes: 1, peak_resident_bytes: 2, written_bytes: Some(3_000) };
        let cost = |accepted| BrokerCost::of(1, &used, Cost::of(Duration::ZERO, 0, 0), accepted);
        assert_eq!(cost(1_000.0).written_per_accepted_byte, Some(3.0));
        assert_eq!(cost(0.0).written_per_accepted_byte, None);
    }
}
