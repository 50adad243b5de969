//! What a run came to: one structure, printed as JSON or as text.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::consumer::ConsumerOutcome;
use super::error::PerfError;
use super::meter::{Latencies, Total};
use super::options::Plan;
use super::process::ProcessSample;
use super::publisher::PublisherOutcome;

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
#[derive(Debug)]
pub(super) struct Observed {
    pub(super) published: Total,
    pub(super) delivered: Total,
    pub(super) delivered_while_publishing: Option<Total>,
    pub(super) ready_before: u64,
    pub(super) drain: DrainEnd,
    pub(super) own_cpu: Duration,
    pub(super) broker: Option<(ProcessSample, ProcessSample)>,
}

/// The figures of one run. Field names are the JSON's; times and sizes carry their unit.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    target: String,
    shape: Shape,
    published: Flow,
    delivered: Flow,
    /// Deliveries up to the moment the last publisher stopped.
    delivered_while_publishing: Option<Flow>,
    confirms: Option<Confirms>,
    redelivered: u64,
    wrong_size: u64,
    ready_before: u64,
    /// Published (and not nacked) or found, but never delivered; absent where that cannot be known.
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
    size_bytes: usize,
    persistent: bool,
    durable: bool,
    confirm_window: Option<u64>,
    ack_batch: u32,
    prefetch: u16,
    rate_per_second: Option<f64>,
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

#[derive(Debug, Clone, Copy, Serialize)]
struct Percentiles {
    samples: u64,
    p50_us: f64,
    p90_us: f64,
    p99_us: f64,
    p999_us: f64,
    max_us: f64,
}

#[derive(Debug, Serialize)]
struct Cost {
    cpu_seconds: f64,
    /// Per message delivered; without consumers, per message published.
    cpu_us_per_message: Option<f64>,
}

#[derive(Debug, Serialize)]
struct BrokerCost {
    pid: u32,
    #[serde(flatten)]
    cost: Cost,
    resident_bytes: u64,
    peak_resident_bytes: u64,
    written_bytes: Option<u64>,
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
        let messages = if plan.consumer_count == 0 { published.messages } else { delivered.messages };
        let knows_missing = plan.is_one_to_one() && plan.consumer_count > 0 && plan.publisher_count > 0;
        let expected = (published.messages + observed.ready_before).saturating_sub(sum.nacked);
        let report = Self {
            target: plan.uri.to_string(),
            shape: Shape::of(plan),
            published,
            delivered,
            delivered_while_publishing: observed.delivered_while_publishing.as_ref().map(Flow::of),
            confirms: plan.confirm_window.map(|_| sum.confirms(published.seconds)),
            redelivered: sum.redelivered,
            wrong_size: sum.wrong_size,
            ready_before: observed.ready_before,
            missing: knows_missing.then(|| expected.saturating_sub(delivered.messages)),
            drain: observed.drain,
            latency: sum.latencies.as_ref().and_then(Percentiles::of),
            blocked_count: sum.blocked_count,
            blocked_seconds: sum.blocked_ns as f64 / 1e9,
            generator: Cost::of(observed.own_cpu, messages),
            broker: plan.broker_pid.zip(observed.broker).map(|(pid, samples)| BrokerCost::of(pid, &samples, messages)),
            errors: sum.errors.iter().map(PerfError::to_string).collect(),
        };
        (report, sum.errors.into_iter().next())
    }
}

/// The workers' accounts, added up.
#[derive(Debug, Default)]
struct Sum {
    latencies: Option<Latencies>,
    confirm_latencies: Option<Latencies>,
    acked: u64,
    nacked: u64,
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
            self.acked += confirms.acked;
            self.nacked += confirms.nacked;
            self.outstanding += confirms.outstanding();
            self.unexpected += confirms.unexpected;
            self.confirm_latencies.get_or_insert_with(Latencies::new).add(&confirms.latencies);
        }
        self.blocked_count += outcome.blocked_count;
        self.blocked_ns += outcome.blocked_ns;
        self.errors.extend(outcome.error);
    }

    fn add_consumer(&mut self, outcome: Result<ConsumerOutcome, PerfError>) {
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => return self.errors.push(error),
        };
        self.latencies.get_or_insert_with(Latencies::new).add(&outcome.latencies);
        self.redelivered += outcome.redelivered;
        self.wrong_size += outcome.wrong_size;
        self.errors.extend(outcome.error);
    }

    fn confirms(&self, seconds: f64) -> Confirms {
        Confirms {
            acked: self.acked,
            nacked: self.nacked,
            outstanding: self.outstanding,
            unexpected: self.unexpected,
            per_second: per(self.acked, seconds),
            latency: self.confirm_latencies.as_ref().and_then(Percentiles::of),
        }
    }
}

impl Shape {
    fn of(plan: &Plan) -> Self {
        Self {
            publishers: plan.publisher_count,
            consumers: plan.consumer_count,
            queues: plan.queues.names.len(),
            size_bytes: plan.size_bytes,
            persistent: plan.persistent,
            durable: plan.queues.durable,
            confirm_window: plan.confirm_window,
            ack_batch: plan.ack_batch,
            prefetch: plan.prefetch,
            rate_per_second: plan.rate_per_second,
        }
    }
}

impl Flow {
    fn of(total: &Total) -> Self {
        let seconds = total.active_seconds();
        Self { messages: total.messages, per_second: per(total.messages, seconds), seconds }
    }
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
            p90_us: at(0.9),
            p99_us: at(0.99),
            p999_us: at(0.999),
            max_us: us(latencies.max_ns()),
        })
    }
}

impl Cost {
    fn of(cpu: Duration, messages: u64) -> Self {
        let cpu_seconds = cpu.as_secs_f64();
        Self { cpu_seconds, cpu_us_per_message: (messages > 0).then(|| cpu_seconds * 1e6 / messages as f64) }
    }
}

impl BrokerCost {
    fn of(pid: u32, (before, after): &(ProcessSample, ProcessSample), messages: u64) -> Self {
        Self {
            pid,
            cost: Cost::of(after.cpu.saturating_sub(before.cpu), messages),
            resident_bytes: after.resident_bytes,
            peak_resident_bytes: after.peak_resident_bytes,
            written_bytes: after
                .written_bytes
                .zip(before.written_bytes)
                .map(|(after, before)| after.saturating_sub(before)),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n{}", self.target, self.shape)?;
        if self.shape.publishers > 0 {
            writeln!(f, "published    {}", self.published)?;
        }
        if let Some(confirms) = &self.confirms {
            writeln!(f, "confirmed    {:>13}  {:>12}/s", grouped_count(confirms.acked), grouped(confirms.per_second))?;
        }
        if self.shape.consumers > 0 {
            writeln!(f, "delivered    {}", self.delivered)?;
        }
        if let Some(flow) = self.delivered_while_publishing.filter(|_| self.shape.consumers > 0) {
            writeln!(f, "  by the end of publishing\n             {flow}")?;
        }
        if let Some(latency) = &self.latency {
            writeln!(f, "latency      {latency}")?;
        }
        if let Some(latency) = self.confirms.as_ref().and_then(|confirms| confirms.latency.as_ref()) {
            writeln!(f, "to confirm   {latency}")?;
        }
        writeln!(f, "generator    {}", self.generator)?;
        if let Some(broker) = &self.broker {
            writeln!(f, "broker       {broker}")?;
        }
        self.write_oddities(f)
    }
}

impl Report {
    /// What a good run has none of.
    fn write_oddities(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let confirms = self.confirms.as_ref();
        let oddities = [
            (self.missing.unwrap_or(0), "published but not delivered"),
            (confirms.map_or(0, |confirms| confirms.nacked), "nacked"),
            (confirms.map_or(0, |confirms| confirms.outstanding), "never confirmed"),
            (confirms.map_or(0, |confirms| confirms.unexpected), "confirms of nothing outstanding"),
            (self.redelivered, "marked as redelivered"),
            (self.wrong_size, "of another size than published"),
            (self.ready_before, "in the queues before the run"),
            (self.blocked_count, "times blocked by the broker"),
        ];
        for (count, what) in oddities.iter().filter(|(count, _)| *count > 0) {
            writeln!(f, "note         {:>13}  {what}", grouped_count(*count))?;
        }
        match self.drain {
            DrainEnd::NoProgress => writeln!(f, "note         gave up waiting: nothing was delivered for 10 s"),
            DrainEnd::TimeLimit => writeln!(f, "note         stopped waiting for deliveries at --drain"),
            DrainEnd::Aborted => writeln!(f, "note         the run was cut short"),
            DrainEnd::Complete | DrainEnd::NotNeeded => Ok(()),
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} publishers, {} consumers, {} queues, {} bytes",
            self.publishers, self.consumers, self.queues, self.size_bytes
        )?;
        write!(f, ", {}", if self.persistent { "persistent" } else { "transient" })?;
        if let Some(window) = self.confirm_window {
            write!(f, ", {window} unconfirmed at most")?;
        }
        match self.ack_batch {
            0 => write!(f, ", no acks")?,
            1 => write!(f, ", ack each")?,
            batch => write!(f, ", ack every {batch}")?,
        }
        if self.prefetch > 0 {
            write!(f, ", prefetch {}", self.prefetch)?;
        }
        match self.rate_per_second {
            Some(rate) => write!(f, ", {rate}/s each"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:>13}  {:>12}/s  over {:.2} s",
            grouped_count(self.messages),
            grouped(self.per_second),
            self.seconds
        )
    }
}

impl fmt::Display for Percentiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = [
            ("p50", self.p50_us),
            ("p90", self.p90_us),
            ("p99", self.p99_us),
            ("p99.9", self.p999_us),
            ("max", self.max_us),
        ];
        named.iter().try_for_each(|(name, us)| write!(f, "{name} {}   ", readable_us(*us)))?;
        write!(f, "({} samples)", grouped_count(self.samples))
    }
}

impl fmt::Display for Cost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} s CPU", self.cpu_seconds)?;
        match self.cpu_us_per_message {
            Some(us) => write!(f, ", {us:.3} µs per message"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for BrokerCost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        write!(
            f,
            "{}, {:.1} MiB resident (peak {:.1})",
            self.cost,
            mib(self.resident_bytes),
            mib(self.peak_resident_bytes)
        )?;
        match self.written_bytes {
            Some(written) => write!(f, ", {:.1} MiB written", mib(written)),
            None => Ok(()),
        }
    }
}

fn readable_us(us: f64) -> String {
    match us {
        us if us < 1e3 => format!("{us:.1} µs"),
        us if us < 1e6 => format!("{:.2} ms", us / 1e3),
        us => format!("{:.2} s", us / 1e6),
    }
}

/// A number rounded to an integer, with its thousands apart.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "never negative, and the cast saturates")]
pub(super) fn grouped(number: f64) -> String {
    grouped_count(number.max(0.0).round() as u64)
}

fn grouped_count(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!([0, 999, 1_000, 1_234_567].map(grouped_count), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!(grouped(999.6), "1,000");
        assert_eq!([12.34, 1_234.0, 2_500_000.0].map(readable_us), ["12.3 µs", "1.23 ms", "2.50 s"]);
    }

    #[test]
    fn a_rate_needs_a_window() {
        assert_eq!(Flow::of(&Total { messages: 1, confirmed: 0, active_ns: Some((5, 5)) }).per_second, 0.0);
        let flow = Flow::of(&Total { messages: 10, confirmed: 0, active_ns: Some((0, 2_000_000_000)) });
        assert_eq!((flow.per_second, flow.seconds), (5.0, 2.0));
    }
}
