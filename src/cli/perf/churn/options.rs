//! The command line of `leveret perf churn`, and the validated [`Plan`] made from it.

use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;

use super::super::error::PerfError;
use super::super::uri::Uri;

const DEFAULT_SECONDS: f64 = 5.0;
const MAX_SECONDS: f64 = 1e6;
/// Each has a thread.
const MAX_CONNECTIONS: usize = 2_000;
/// Of one connection; most brokers allow 2,047.
const MAX_CHANNELS: u16 = 60_000;

/// Opens and closes, or declares and deletes, as fast as the broker answers.
///
/// Each channel has one request outstanding: it waits for the answer before it sends the next one. Reported are
/// operations per second (one is both, opening and closing), how long each of the two requests takes, and with --pid
/// the broker's CPU time per operation.
///
/// Examples:
///   leveret perf churn --what connections --connections 8
///   leveret perf churn --what queues --durable --channels 50                50 channels of one connection
///   leveret perf churn --what queues --count 100000 --no-delete --connections 50
///   leveret perf churn --what bindings --time 10 --pid $(pidof leveret) --json
#[derive(Debug, Clone, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct ChurnArgs {
    /// Broker to load: amqp://user:pass@host:port/vhost, percent-encoded
    #[arg(long, value_name = "URI", default_value = "amqp://guest:guest@localhost:5672")]
    uri: String,
    /// What to make and take away
    #[arg(short, long)]
    what: What,
    /// Connections at work at the same time, each with a thread
    #[arg(short, long, value_name = "N", default_value_t = 1)]
    connections: usize,
    /// Channels of each connection, each with one request outstanding
    #[arg(long, value_name = "N", default_value_t = 1)]
    channels: u16,
    /// Begin no operation after so long [default: 5, or none with --count]
    #[arg(short, long, value_name = "SECONDS")]
    time: Option<f64>,
    /// Operations in all
    #[arg(short = 'n', long, value_name = "N")]
    count: Option<u64>,
    /// Declare durable queues and exchanges
    #[arg(long)]
    durable: bool,
    /// Queues only: declare without deleting; all are deleted afterwards, which is not measured
    #[arg(long)]
    no_delete: bool,
    /// Process id of the broker on this machine: adds its CPU time and memory to the report
    #[arg(long, value_name = "BROKER_PID")]
    pid: Option<u32>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What is made and taken away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub(super) enum What {
    /// A connection: TCP, login, virtual host; then the closing handshake
    Connections,
    /// A channel
    Channels,
    /// A queue of a new name each time
    Queues,
    /// A binding with a new key each time, of the channel's own queue to amq.direct
    Bindings,
    /// A direct exchange of a new name each time
    Exchanges,
    /// A consumer of the channel's own queue
    Consumers,
}

impl What {
    pub(super) fn plural(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::Channels => "channels",
            Self::Queues => "queues",
            Self::Bindings => "bindings",
            Self::Exchanges => "exchanges",
            Self::Consumers => "consumers",
        }
    }
}

/// A churn with everything checked.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) uri: Uri,
    pub(super) what: What,
    pub(super) connection_count: usize,
    pub(super) channel_count: u16,
    /// Whichever of the two comes first.
    pub(super) duration: Option<Duration>,
    pub(super) count: Option<u64>,
    pub(super) durable: bool,
    pub(super) keeps: bool,
    pub(super) broker_pid: Option<u32>,
    pub(super) json: bool,
}

impl ChurnArgs {
    /// Checks the options against each other and fills in the defaults.
    ///
    /// # Errors
    /// [`PerfError::Usage`] that names the option and what it would have to be.
    pub(super) fn into_plan(self) -> Result<Plan, PerfError> {
        let time = self.time.or(self.count.is_none().then_some(DEFAULT_SECONDS));
        let complaint = if !(1..=MAX_CONNECTIONS).contains(&self.connections) {
            format!("--connections must be 1 to {MAX_CONNECTIONS}")
        } else if !(1..=MAX_CHANNELS).contains(&self.channels) {
            format!("--channels must be 1 to {MAX_CHANNELS}")
        } else if self.what == What::Connections && self.channels > 1 {
            "--channels has no meaning for connections; use --connections".to_owned()
        } else if self.no_delete && self.what != What::Queues {
            "--no-delete is for queues only".to_owned()
        } else if self.count == Some(0) {
            "--count must be at least 1".to_owned()
        } else if time.is_some_and(|time| !(time > 0.0 && time <= MAX_SECONDS)) {
            format!("--time must be above 0, and at most {MAX_SECONDS} seconds")
        } else {
            return Ok(Plan {
                uri: Uri::parse(&self.uri)?,
                what: self.what,
                connection_count: self.connections,
                channel_count: self.channels,
                duration: time.map(Duration::from_secs_f64),
                count: self.count,
                durable: self.durable,
                keeps: self.no_delete,
                broker_pid: self.pid,
                json: self.json,
            });
        };
        Err(PerfError::Usage(complaint))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    #[command(no_binary_name = true)]
    struct CommandLine {
        #[command(flatten)]
        churn: ChurnArgs,
    }

    fn plan(options: &str) -> Result<Plan, PerfError> {
        CommandLine::try_parse_from(options.split_whitespace()).expect(options).churn.into_plan()
    }

    #[test]
    fn one_channel_works_for_five_seconds_unless_told_otherwise() {
        let plan = plan("--what queues").expect("valid");
        assert_eq!((plan.connection_count, plan.channel_count), (1, 1));
        assert_eq!((plan.duration, plan.count), (Some(Duration::from_secs(5)), None));
    }

    #[test]
    fn a_count_lifts_the_time_limit() {
        let counted = plan("--what channels --count 7").expect("valid");
        assert_eq!((counted.duration, counted.count), (None, Some(7)));
        assert_eq!(plan("-w channels -n 7 -t 0.5").expect("valid").duration, Some(Duration::from_millis(500)));
    }

    #[test]
    fn impossible_churns_are_refused_with_a_reason() {
        for (options, reason) in [
            ("--what queues --connections 0", "--connections"),
            ("--what queues --channels 0", "--channels"),
            ("--what connections --channels 2", "--connections"),
            ("--what exchanges --no-delete", "queues only"),
            ("--what queues --count 0", "--count"),
            ("--what queues --time 0", "--time"),
            ("--what queues --time NaN", "--time"),
            ("--what queues --uri h", "amqp://"),
        ] {
            let refusal = plan(options).expect_err(options).to_string();
            assert!(refusal.contains(reason), "{options}: {refusal}");
        }
    }
}
