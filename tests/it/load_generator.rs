//! `leveret perf` against a broker: every way to publish and to consume it knows ends with nothing missing.

use std::process::Command;

use serde_json::Value;

use crate::support::program::Program;

/// The load generator and the broker it loads.
struct Bench {
    broker: Program,
    _data: tempfile::TempDir,
}

impl Bench {
    fn start() -> Self {
        let data = tempfile::tempdir().unwrap();
        Self { broker: Program::start(data.path(), None), _data: data }
    }

    /// The report of a run with `options`, which has to succeed.
    fn report(&self, options: &str) -> Value {
        let output = self.run(options);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{options}: {errors}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn run(&self, options: &str) -> std::process::Output {
        let uri = format!("amqp://{}", self.broker.address);
        let pid = self.broker.child.id().to_string();
        Command::new(env!("CARGO_BIN_EXE_leveret"))
            .args(["perf", "--json", "--uri", &uri, "--pid", &pid])
            .args(options.split_whitespace())
            .output()
            .unwrap()
    }
}

/// Published and delivered messages, and what is missing.
fn counts(report: &Value) -> (u64, u64, Option<u64>) {
    let messages = |flow: &str| report[flow]["messages"].as_u64().unwrap();
    (messages("published"), messages("delivered"), report["missing"].as_u64())
}

#[test]
fn each_way_to_publish_and_to_consume_ends_with_every_copy_delivered() {
    let bench = Bench::start();
    for (options, copies) in [
        ("", 1),
        ("--persistent --confirm 100 --ack-batch 10", 1),
        ("--persistent --tx 300 --ack-batch 10", 1),
        ("--size 16,1024,65536 --random-body", 1),
        ("--size 7-3000 --confirm 50", 1),
        ("--get", 1),
        ("--get --ack-batch 3", 1),
        ("--ack-batch 5 --nack-every 7 --requeue", 1),
        ("--ack-batch 5 --nack-every 7", 1),
        ("--consumer-latency 10us --ack-batch 1", 1),
        ("--queue-type quorum --ack-batch 10 --confirm 100", 1),
        ("--queue-type stream --ack-batch 10 --confirm 100 -y 2", 2),
        ("--queues 3 -y 3 -e load-fanout --exchange-type fanout", 3),
        ("--queues 3 -y 3 -e load-topic --exchange-type topic -k a.b", 3),
        ("--queues 3 -y 3 -e load-headers --exchange-type headers --header a=1 --header b=x", 3),
        ("--queues 3 -y 3 -e load-hash --exchange-type x-consistent-hash", 1),
        ("--queues 3 -y 3 -e amq.fanout", 3),
        ("--queue-argument x-max-priority=5 --property priority=3 --consumer-argument x-priority=2", 1),
    ] {
        let report = bench.report(&format!("--count 2000 {options}"));
        assert_eq!(counts(&report), (2_000, 2_000 * copies, Some(0)), "{options}: {report}");
        assert_eq!(report["wrong_size"], 0, "{options}");
        assert_eq!(report["errors"], Value::Array(Vec::new()), "{options}");
        assert!(report["broker"]["peak_resident_bytes"].as_u64() >= report["broker"]["resident_bytes"].as_u64());
    }
}

#[test]
fn a_crowd_of_connections_is_served_and_paced_as_a_whole() {
    let bench = Bench::start();
    let queues = "-x 300 -y 300 --queue-pattern load-%03d --queue-pattern-from 1 --queue-pattern-to 300";
    let paced = bench.report(&format!("{queues} --total-rate 3000 --total-count 3000 --confirm 2 --ack-batch 2"));
    assert_eq!(counts(&paced), (3_000, 3_000, Some(0)), "{paced}");
    assert_eq!(paced["confirms"]["acked"], 3_000);
    assert!(paced["published"]["per_second"].as_f64().unwrap() < 3_600.0, "{paced}");
    let unpaced = bench.report(&format!("{queues} --count 20"));
    assert_eq!(counts(&unpaced), (6_000, 6_000, Some(0)), "{unpaced}");
}

#[test]
fn what_was_left_in_a_queue_is_drained_without_a_time_being_given() {
    let bench = Bench::start();
    let filled = bench.report("-y 0 --count 3000 --durable --keep");
    assert_eq!(counts(&filled), (3_000, 0, None));
    let drained = bench.report("-x 0 --durable");
    assert_eq!(counts(&drained), (0, 3_000, Some(0)));
    assert_eq!((&drained["ready_before"], &drained["drain"]), (&3_000.into(), &"complete".into()));
}

#[test]
fn what_the_broker_refuses_is_told_and_not_waited_for() {
    let bench = Bench::start();
    let returned = bench.report("--count 500 --mandatory -k nowhere -y 0");
    assert_eq!(returned["returned"], 500);
    let full = "--queue-argument x-max-length=10 --queue-argument x-overflow=reject-publish";
    let nacked = bench.report(&format!("--count 500 --confirm 10 {full} -y 0"));
    assert_eq!((&nacked["confirms"]["acked"], &nacked["confirms"]["nacked"]), (&10.into(), &490.into()));
    let absent = bench.run("--count 1 --predeclared --queue absent");
    assert!(!absent.status.success());
    assert!(String::from_utf8_lossy(&absent.stderr).contains("NOT_FOUND - no queue 'absent'"));
}

#[test]
fn the_warm_up_counts_for_losses_only() {
    let bench = Bench::start();
    let report = bench.report("--rate 1000 --warmup 1 --time 1");
    let (published, delivered, missing) = counts(&report);
    assert!((500..=1_500).contains(&published) && published.abs_diff(delivered) < 100, "{report}");
    assert_eq!(missing, Some(0));
    assert!(report["latency"]["samples"].as_u64().unwrap() < 1_600, "{report}");
}
