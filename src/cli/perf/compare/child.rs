//! One run: a process of this program, its report read back.

use std::io;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;

use super::super::error::PerfError;
use super::options::{Shape, Target};
use super::statistics::{Latency, Measurement, Run};

/// What of a report is compared; the rest of it is of no interest here.
#[derive(Debug, Deserialize)]
struct ChildReport {
    shape: ChildShape,
    published: ChildFlow,
    delivered: ChildFlow,
    confirms: Option<ChildConfirms>,
    #[serde(default)]
    wrong_size: u64,
    missing: Option<u64>,
    latency: Option<ChildLatency>,
    broker: Option<ChildBroker>,
}

#[derive(Debug, Deserialize)]
struct ChildShape {
    publishers: usize,
    consumers: usize,
    rate_per_second: Option<f64>,
}

#[derive(Debug, Deserialize)]
struct ChildFlow {
    messages: u64,
    per_second: f64,
}

#[derive(Debug, Deserialize)]
struct ChildConfirms {
    acked: u64,
    nacked: u64,
    outstanding: u64,
}

#[derive(Debug, Deserialize)]
struct ChildLatency {
    p50_us: f64,
    p99_us: f64,
    p999_us: f64,
}

#[derive(Debug, Deserialize)]
struct ChildBroker {
    cpu_us_per_message: Option<f64>,
}

/// Runs `shape` against `target`. That it failed, and why, is said on standard error.
///
/// # Errors
/// This machine cannot run it at all.
pub(super) fn measure(target: &Target, shape: &Shape, number: u32) -> Result<Run, PerfError> {
    let failed = |source| PerfError::Local { what: "cannot run this program once more", source };
    let program = std::env::current_exe().map_err(failed)?;
    let mut command = Command::new(program);
    command.args(["perf", "--json", "--uri", &target.uri]).args(&shape.words);
    if let Some(pid) = target.pid {
        command.args(["--pid", &pid.to_string()]);
    }
    if !shape.names_its_queue {
        // Of its own, so that what a run left behind does not reach the next one.
        command.args(["--queue", &format!("perf-compare-{}-{number}", std::process::id())]);
    }
    let result = match finish(&mut command, shape.limit).map_err(failed)? {
        Some(output) => read_report(&output),
        None => Err(format!("no end after {} s", shape.limit.as_secs())),
    };
    Ok(match result {
        Ok(measurement) => {
            if measurement.is_lacking {
                eprintln!("  {}, {}: messages were missing, damaged or unconfirmed", target.name, shape.title);
            }
            Run::Done(measurement)
        }
        Err(reason) => {
            eprintln!("  {}, {}: {reason}", target.name, shape.title);
            Run::Failed
        }
    })
}

/// Waits for the end of a process, and kills it if that does not come in time.
fn finish(command: &mut Command, limit: Duration) -> io::Result<Option<Output>> {
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let (sender, receiver) = mpsc::channel();
    thread::Builder::new().name("child".to_owned()).spawn(move || {
        let _ = sender.send(child.wait_with_output()); // nobody waits any more, if it fails
    })?;
    match receiver.recv_timeout(limit) {
        Ok(output) => output.map(Some),
        Err(RecvTimeoutError::Timeout) => {
            if let Some(pid) = pid {
                kill_process(pid, Signal::KILL)?;
            }
            Ok(None)
        }
        Err(RecvTimeoutError::Disconnected) => Err(io::Error::other("the thread that waits for it is gone")),
    }
}

fn read_report(output: &Output) -> Result<Measurement, String> {
    if !output.status.success() || output.stdout.is_empty() {
        let said = String::from_utf8_lossy(&output.stderr);
        let last = said.lines().next_back().unwrap_or("it said nothing");
        return Err(last.strip_prefix("leveret: ").unwrap_or(last).to_owned());
    }
    let report = serde_json::from_slice::<ChildReport>(&output.stdout)
        .map_err(|error| format!("its report cannot be read: {error}"))?;
    measurement(&report)
}

fn measurement(report: &ChildReport) -> Result<Measurement, String> {
    let confirms = report.confirms.as_ref();
    if confirms.is_some_and(|confirms| confirms.acked == 0) {
        return Err("no confirm ever came".to_owned());
    }
    let flow = if report.shape.consumers > 0 { &report.delivered } else { &report.published };
    let both = report.shape.consumers > 0 && report.shape.publishers > 0 && report.published.messages > 0;
    let paced = report.latency.as_ref().filter(|_| report.shape.rate_per_second.is_some());
    Ok(Measurement {
        per_second: flow.per_second,
        cpu_us_per_message: report.broker.as_ref().and_then(|broker| broker.cpu_us_per_message),
        latency: paced.map(|latency| Latency {
            p50_us: latency.p50_us,
            p99_us: latency.p99_us,
            p999_us: latency.p999_us,
        }),
        delivered_share: both.then(|| report.delivered.messages as f64 / report.published.messages as f64),
        is_lacking: report.missing.unwrap_or(0) > 0
            || report.wrong_size > 0
            || confirms.is_some_and(|confirms| confirms.outstanding > 0 || confirms.nacked > 0),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    use super::*;

    fn output(code: i32, stdout: &str, stderr: &str) -> Output {
        Output { status: ExitStatus::from_raw(code << 8), stdout: stdout.into(), stderr: stderr.into() }
    }

    fn report(consumers: u32, rate: &str, confirms: &str, missing: &str) -> String {
        format!(
            r#"{{"shape":{{"publishers":1,"consumers":{consumers},"rate_per_second":{rate},"new":0}},
            "published":{{"messages":200,"per_second":20.0,"seconds":10}},
            "delivered":{{"messages":100,"per_second":10.0,"seconds":10}},
            "confirms":{confirms},"wrong_size":0,"missing":{missing},
            "latency":{{"samples":1,"p50_us":1.0,"p90_us":2.0,"p99_us":3.0,"p999_us":4.0,"max_us":5.0}},
            "broker":{{"pid":1,"cpu_us_per_message":0.5}},"errors":[]}}"#
        )
    }

    fn read(text: &str) -> Result<Measurement, String> {
        read_report(&output(0, text, ""))
    }

    #[test]
    fn a_run_with_consumers_counts_what_was_delivered_and_latency_only_when_paced() {
        let unpaced = read(&report(1, "null", "null", "100")).expect("valid");
        assert_eq!((unpaced.per_second, unpaced.delivered_share), (10.0, Some(0.5)));
        assert_eq!((unpaced.latency, unpaced.cpu_us_per_message), (None, Some(0.5)));
        assert!(unpaced.is_lacking);
        let paced = read(&report(1, "5.0", "null", "null")).expect("valid");
        assert_eq!(paced.latency, Some(Latency { p50_us: 1.0, p99_us: 3.0, p999_us: 4.0 }));
        assert!(!paced.is_lacking);
    }

    #[test]
    fn without_consumers_what_was_published_counts() {
        let published = read(&report(0, "null", "null", "null")).expect("valid");
        assert_eq!((published.per_second, published.delivered_share), (20.0, None));
    }

    #[test]
    fn unconfirmed_messages_are_marked_and_a_broker_without_confirms_cannot_run_the_shape() {
        let lacking = read(&report(1, "null", r#"{"acked":9,"nacked":0,"outstanding":1}"#, "0")).expect("valid");
        assert!(lacking.is_lacking);
        let never = read(&report(1, "null", r#"{"acked":0,"nacked":0,"outstanding":9}"#, "0")).expect_err("none");
        assert!(never.contains("no confirm"), "{never}");
    }

    #[test]
    fn a_failed_run_gives_its_last_words_as_the_reason() {
        let refused = read_report(&output(1, "{}", "1 s\nleveret: cannot connect\n")).expect_err("failed");
        assert_eq!(refused, "cannot connect");
        assert!(read("{}").expect_err("no report").contains("cannot be read"));
    }

    #[test]
    fn a_process_that_does_not_end_is_killed() {
        let ended = finish(Command::new("sleep").arg("60"), Duration::from_millis(50)).expect("runs");
        assert!(ended.is_none());
    }
}
