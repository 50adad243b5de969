//! The subcommands of `leveret perf`, run as a person would. What their figures mean is unit-tested beside them.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use serde_json::Value;

use crate::support::program::Program;

fn perf(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_leveret"));
    command.arg("perf").args(arguments);
    command
}

/// Runs `leveret perf` to its end; answers its JSON.
fn report(arguments: &[&str]) -> Value {
    let output = perf(arguments).arg("--json").output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A floor on a port of the system's choice; killed on drop.
struct Floor {
    child: Child,
    uri: String,
}

impl Floor {
    fn start(options: &[&str]) -> Self {
        let mut command = perf(&[&["floor", "--listen", "127.0.0.1:0"], options].concat());
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.split([',', ' ']).find(|word| word.starts_with("127.")).expect("says where it listens");
        Self { child, uri: format!("amqp://{address}") }
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn churn_counts_every_operation_and_leaves_nothing_behind() {
    let data = tempfile::tempdir().unwrap();
    let program = Program::start(data.path(), None);
    let (uri, pid) = (format!("amqp://{}", program.address), program.child.id().to_string());
    for what in ["connections", "channels", "queues", "bindings", "exchanges", "consumers"] {
        let channels = if what == "connections" { "1" } else { "3" };
        let options = ["churn", "--uri", &uri, "--what", what, "--count", "20", "--channels", channels, "--pid", &pid];
        let report = report(&[&options[..], &["--connections", "2", "--durable"]].concat());
        assert_eq!(report["operations"], 20, "{report}");
        assert_eq!((&report["make"]["samples"], &report["undo"]["samples"]), (&20.into(), &20.into()), "{report}");
    }
    let kept = report(&["churn", "--uri", &uri, "--what", "queues", "--count", "20", "--no-delete"]);
    assert_eq!((&kept["operations"], &kept["undo"]), (&20.into(), &Value::Null));
    assert!(kept["cleaning_seconds"].as_f64().is_some(), "{kept}");
    let mut ctl = Command::new(env!("CARGO_BIN_EXE_leveret"));
    let status = ctl.args(["ctl", "status", "--json", "--data-dir"]).arg(data.path()).output().unwrap();
    let status: Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!((&status["queues"], &status["consumers"]), (&0.into(), &0.into()), "{status}");
}

#[test]
fn idle_connections_are_all_opened_kept_and_closed() {
    let data = tempfile::tempdir().unwrap();
    let program = Program::start(data.path(), None);
    let (uri, pid) = (format!("amqp://{}", program.address), program.child.id().to_string());
    let options = ["--connections", "50", "--channels", "2", "--consumers", "3", "--hold", "0.2", "--pid", &pid];
    let report = report(&[&["idle", "--uri", &uri], &options[..]].concat());
    assert_eq!((&report["opened"], &report["lost"]), (&50.into(), &0.into()), "{report}");
    assert!(report["broker"]["resident_bytes_open"].as_u64() > Some(0), "{report}");
}

#[test]
fn compare_shows_a_broker_beside_the_floor_and_a_gap_where_nobody_answers() {
    let data = tempfile::tempdir().unwrap();
    let (program, floor) = (Program::start(data.path(), None), Floor::start(&[]));
    let leveret = format!("leveret=amqp://{},{}", program.address, program.child.id());
    let beside = format!("floor={},{}", floor.uri, floor.child.id());
    let options = ["--runs", "2", "--time", "0.2", "--shape", "pair: -s 16", "--against", "floor"];
    let targets = ["compare", "--a", &leveret, "--b", &beside, "--c", "nobody=amqp://127.0.0.1:1"];
    let comparison = report(&[&targets[..], &options].concat());
    let cells = &comparison["lines"][0]["cells"];
    for cell in [&cells[0], &cells[1]] {
        assert_eq!(cell["runs"].as_array().map(Vec::len), Some(2), "{cell}");
        assert_eq!(cell["median"]["delivered_share"], 1.0, "{cell}");
        assert!(cell["median"]["per_second"].as_f64() > Some(1_000.0), "{cell}");
    }
    assert_eq!(cells[1]["ratios"]["per_second"], 1.0);
    assert_eq!(cells[2]["median"], Value::Null);
}

#[test]
fn the_floor_gives_every_consumer_a_copy_if_asked_to() {
    let floor = Floor::start(&["--fan-out"]);
    let options = ["--uri", &floor.uri, "--count", "5000", "--consumers", "3", "--exchange", "amq.fanout"];
    let report = report(&options);
    assert_eq!((&report["published"]["messages"], &report["delivered"]["messages"]), (&5_000.into(), &15_000.into()));
}
