//! What a churn came to: one structure, printed as JSON or as text.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::super::figures::{Percentiles, bytes, cpu_between, per_second, significant};
use super::super::process::ProcessSample;
use super::super::report::grouped;
use super::options::{Plan, What};
use super::tally::Tally;

/// What was measured around the workers.
#[derive(Debug)]
pub(super) struct Observed {
    pub(super) start_ns: u64,
    pub(super) broker: Option<(ProcessSample, ProcessSample)>,
    /// How long it took to delete what had been kept.
    pub(super) cleaning: Option<Duration>,
}

/// The figures of one churn. Field names are the JSON's; times and sizes carry their unit.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    target: String,
    what: What,
    connections: usize,
    channels_per_connection: u16,
    durable: bool,
    operations: u64,
    /// From the start to the end of the last operation.
    seconds: f64,
    per_second: f64,
    /// Of the request that opens or declares; for connections, until the virtual host is open.
    make: Option<Percentiles>,
    /// Of the request that closes or deletes.
    undo: Option<Percentiles>,
    /// Where deleting was left out: how long it took afterwards.
    cleaning_seconds: Option<f64>,
    broker: Option<BrokerCost>,
}

#[derive(Debug, Serialize)]
struct BrokerCost {
    pid: u32,
    cpu_seconds: f64,
    cpu_us_per_operation: Option<f64>,
    resident_bytes_before: u64,
    /// After the last operation, before anything kept is deleted.
    resident_bytes_after: u64,
}

impl Report {
    pub(super) fn new(plan: &Plan, observed: &Observed, tally: &Tally) -> Self {
        let seconds = tally.last_ns.saturating_sub(observed.start_ns) as f64 / 1e9;
        let broker = plan.broker_pid.zip(observed.broker.as_ref());
        Self {
            target: plan.uri.to_string(),
            what: plan.what,
            connections: plan.connection_count,
            channels_per_connection: plan.channel_count,
            durable: plan.durable,
            operations: tally.operations,
            seconds,
            per_second: per_second(tally.operations, seconds),
            make: Percentiles::of(&tally.make),
            undo: Percentiles::of(&tally.undo),
            cleaning_seconds: observed.cleaning.map(|cleaning| cleaning.as_secs_f64()),
            broker: broker.map(|(pid, (before, after))| {
                let cpu_seconds = cpu_between(before, after).as_secs_f64();
                let operations = tally.operations as f64;
                BrokerCost {
                    pid,
                    cpu_seconds,
                    cpu_us_per_operation: (tally.operations > 0).then(|| cpu_seconds * 1e6 / operations),
                    resident_bytes_before: before.resident_bytes,
                    resident_bytes_after: after.resident_bytes,
                }
            }),
        }
    }
}

/// What the two requests are called.
fn names(what: What) -> (&'static str, &'static str) {
    match what {
        What::Connections | What::Channels => ("open", "close"),
        What::Queues | What::Exchanges => ("declare", "delete"),
        What::Bindings => ("bind", "unbind"),
        What::Consumers => ("consume", "cancel"),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (make, undo) = names(self.what);
        writeln!(f, "{}", self.target)?;
        let both = if self.cleaning_seconds.is_none() { format!("{make} and {undo}") } else { make.to_owned() };
        write!(f, "{both} {}, {} connections", self.what.plural(), self.connections)?;
        if self.what != What::Connections {
            write!(f, " of {} channels", self.channels_per_connection)?;
        }
        writeln!(f, "{}", if self.durable { ", durable" } else { "" })?;
        let (count, rate) = (grouped(self.operations as f64), grouped(self.per_second));
        writeln!(f, "operations   {count:>13}  {rate:>12}/s  over {:.2} s", self.seconds)?;
        for (name, latency) in [(make, &self.make), (undo, &self.undo)] {
            if let Some(latency) = latency {
                writeln!(f, "{name:<12} {}", latency.text())?;
            }
        }
        if let Some(seconds) = self.cleaning_seconds {
            writeln!(f, "{undo:<12} {seconds:.2} s for all of them afterwards")?;
        }
        if let Some(broker) = &self.broker {
            writeln!(f, "broker       {broker}")?;
        }
        Ok(())
    }
}

impl fmt::Display for BrokerCost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.2} s CPU", self.cpu_seconds)?;
        if let Some(us) = self.cpu_us_per_operation {
            write!(f, ", {} µs per operation", significant(us))?;
        }
        let grown = self.resident_bytes_after as f64 - self.resident_bytes_before as f64;
        write!(f, ", {} resident, grown by {}", bytes(self.resident_bytes_after as f64), bytes(grown))
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::uri::Uri;
    use super::super::operation::Request;
    use super::*;

    fn sample(cpu_ms: u64, resident_bytes: u64) -> ProcessSample {
        ProcessSample {
            cpu: Duration::from_millis(cpu_ms),
            resident_bytes,
            peak_resident_bytes: resident_bytes,
            written_bytes: None,
        }
    }

    fn report(keeps: bool) -> Report {
        let plan = Plan {
            uri: Uri::parse("amqp://h").expect("valid"),
            what: What::Queues,
            connection_count: 2,
            channel_count: 50,
            duration: None,
            count: Some(100),
            durable: true,
            keeps,
            broker_pid: Some(7),
            json: false,
        };
        let mut tally = Tally::new();
        for _ in 0..100 {
            tally.record(Request::Make, 1_000_000);
            if !keeps {
                tally.record(Request::Undo, 2_000_000);
            }
            tally.complete(3_000_000_000);
        }
        let observed = Observed {
            start_ns: 1_000_000_000,
            broker: Some((sample(100, 1 << 20), sample(150, 3 << 20))),
            cleaning: keeps.then(|| Duration::from_secs(4)),
        };
        Report::new(&plan, &observed, &tally)
    }

    #[test]
    fn an_operation_is_both_requests_and_costs_what_the_process_used() {
        let report = report(false);
        assert_eq!((report.operations, report.seconds, report.per_second), (100, 2.0, 50.0));
        assert_eq!(report.broker.as_ref().and_then(|broker| broker.cpu_us_per_operation), Some(500.0));
        let text = report.to_string();
        for part in ["declare and delete", "2 connections of 50 channels, durable", "50/s", "500 µs per operation"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(text.contains("grown by 2.0 MiB"), "{text}");
    }

    #[test]
    fn what_is_kept_is_deleted_outside_of_the_figures() {
        let report = report(true);
        assert!(report.undo.is_none());
        let text = report.to_string();
        assert!(text.contains("delete       4.00 s for all of them afterwards"), "{text}");
        assert!(!text.contains("and delete"), "{text}");
    }
}
