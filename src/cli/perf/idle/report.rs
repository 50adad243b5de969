//! What idle connections came to: one structure, printed as JSON or as text.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::super::figures::{bytes, cpu_between, per_second};
use super::super::process::ProcessSample;
use super::super::report::grouped;
use super::options::Plan;

/// What was measured.
#[derive(Debug)]
pub(super) struct Observed {
    pub(super) opened: usize,
    pub(super) opening: Duration,
    pub(super) held: Duration,
    /// Not open any more when the time was over.
    pub(super) lost: usize,
    pub(super) closing: Duration,
    pub(super) samples: Option<Samples>,
}

/// The broker's accounts, one after the other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Samples {
    pub(super) before: ProcessSample,
    /// When all were open, at the beginning of the time in which nothing happens.
    pub(super) opened: ProcessSample,
    /// At the end of that time.
    pub(super) held: ProcessSample,
    pub(super) closed: ProcessSample,
}

/// The figures. Field names are the JSON's; times and sizes carry their unit.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    target: String,
    connections_wanted: usize,
    channels_per_connection: u16,
    consumers_per_connection: u16,
    opened: usize,
    opened_per_second: f64,
    /// Connections that the broker had ended by the end of the hold.
    lost: usize,
    held_seconds: f64,
    closed_per_second: f64,
    broker: Option<BrokerCost>,
}

#[derive(Debug, Serialize)]
struct BrokerCost {
    pid: u32,
    resident_bytes_before: u64,
    resident_bytes_open: u64,
    resident_bytes_closed: u64,
    /// What an open connection adds, with its channels and consumers.
    resident_bytes_per_connection: Option<f64>,
    /// For opening one, with its channels and consumers.
    cpu_us_per_opening: Option<f64>,
    /// Of one core, while nothing happened.
    idle_cpu_percent: f64,
}

impl Report {
    pub(super) fn new(plan: &Plan, observed: &Observed) -> Self {
        let count = u64::try_from(observed.opened).unwrap_or(u64::MAX);
        Self {
            target: plan.uri.to_string(),
            connections_wanted: plan.connection_count,
            channels_per_connection: plan.channel_count,
            consumers_per_connection: plan.consumer_count,
            opened: observed.opened,
            opened_per_second: per_second(count, observed.opening.as_secs_f64()),
            lost: observed.lost,
            held_seconds: observed.held.as_secs_f64(),
            closed_per_second: per_second(count, observed.closing.as_secs_f64()),
            broker: plan.broker_pid.zip(observed.samples).map(|(pid, samples)| BrokerCost::of(pid, &samples, observed)),
        }
    }
}

impl BrokerCost {
    fn of(pid: u32, samples: &Samples, observed: &Observed) -> Self {
        let Samples { before, opened, held, closed } = samples;
        let for_each = |sum: f64| (observed.opened > 0).then(|| sum / observed.opened as f64);
        Self {
            pid,
            resident_bytes_before: before.resident_bytes,
            resident_bytes_open: held.resident_bytes,
            resident_bytes_closed: closed.resident_bytes,
            resident_bytes_per_connection: for_each(held.resident_bytes as f64 - before.resident_bytes as f64),
            cpu_us_per_opening: for_each(cpu_between(before, opened).as_secs_f64() * 1e6),
            idle_cpu_percent: 100.0 * cpu_between(opened, held).as_secs_f64() / observed.held.as_secs_f64().max(1e-9),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.target)?;
        writeln!(
            f,
            "{} connections of {} channels and {} consumers, idle for {:.1} s",
            grouped(self.connections_wanted as f64),
            self.channels_per_connection,
            self.consumers_per_connection,
            self.held_seconds
        )?;
        let opened = grouped(self.opened as f64);
        writeln!(f, "opened       {opened:>13}  {:>12}/s", grouped(self.opened_per_second))?;
        writeln!(f, "closed       {opened:>13}  {:>12}/s", grouped(self.closed_per_second))?;
        if self.lost > 0 {
            writeln!(f, "note         {:>13}  closed by the broker meanwhile", grouped(self.lost as f64))?;
        }
        match &self.broker {
            Some(broker) => write!(f, "{broker}"),
            None => Ok(()),
        }
    }
}

impl fmt::Display for BrokerCost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [before, open, closed] = [self.resident_bytes_before, self.resident_bytes_open, self.resident_bytes_closed]
            .map(|size| bytes(size as f64));
        write!(f, "memory       {before} before, {open} while they were open, {closed} after")?;
        if let Some(each) = self.resident_bytes_per_connection {
            write!(f, "; {} per connection", bytes(each))?;
        }
        writeln!(f)?;
        write!(f, "CPU          {:.2} % of a core while idle", self.idle_cpu_percent)?;
        if let Some(us) = self.cpu_us_per_opening {
            write!(f, ", {us:.0} µs to open a connection")?;
        }
        writeln!(f)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::uri::Uri;
    use super::*;

    fn sample(cpu_ms: u64, resident_kib: u64) -> ProcessSample {
        let resident_bytes = resident_kib << 10;
        ProcessSample {
            cpu: Duration::from_millis(cpu_ms),
            resident_bytes,
            peak_resident_bytes: resident_bytes,
            written_bytes: None,
        }
    }

    fn report(opened: usize) -> Report {
        let plan = Plan {
            uri: Uri::parse("amqp://h").expect("valid"),
            connection_count: 1_000,
            channel_count: 1,
            consumer_count: 2,
            hold: Duration::from_secs(10),
            broker_pid: Some(7),
            json: false,
        };
        let samples = Samples {
            before: sample(0, 1_000),
            opened: sample(200, 6_000),
            held: sample(300, 5_000),
            closed: sample(400, 900),
        };
        Report::new(
            &plan,
            &Observed {
                opened,
                opening: Duration::from_secs(2),
                held: Duration::from_secs(10),
                lost: 3,
                closing: Duration::from_millis(500),
                samples: Some(samples),
            },
        )
    }

    #[test]
    fn each_connections_share_is_what_memory_grew_by_and_idle_time_is_counted_apart() {
        let report = report(1_000);
        let broker = report.broker.as_ref().expect("has a process");
        assert_eq!(broker.resident_bytes_per_connection, Some(4_096.0));
        assert_eq!((broker.cpu_us_per_opening, broker.idle_cpu_percent), (Some(200.0), 1.0));
        let text = report.to_string();
        for part in ["500/s", "2,000/s", "4.0 KiB per connection", "1.00 % of a core", "3  closed by the broker"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[test]
    fn nothing_opened_costs_nothing_each() {
        let broker = report(0).broker.expect("has a process");
        assert_eq!((broker.resident_bytes_per_connection, broker.cpu_us_per_opening), (None, None));
    }
}
