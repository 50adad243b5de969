//! The command line of `leveret perf idle`, and the validated [`Plan`] made from it.

use std::time::Duration;

use super::super::error::PerfError;
use super::super::uri::Uri;

const MAX_CONNECTIONS: usize = 400_000;
const MAX_PER_CONNECTION: u16 = 2_000;
const MAX_SECONDS: f64 = 1e6;

/// Opens connections, lets them do nothing, and closes them.
///
/// Reported are connections opened and closed per second, and with --pid what each one adds to the broker's resident
/// memory and how much CPU time the broker uses while nothing happens. Heartbeats are negotiated away. The limit of
/// open files is raised as far as the system allows; the broker's own has to suffice, too.
///
/// Examples:
///   leveret perf idle --connections 10000 --pid $(pidof leveret)
///   leveret perf idle --connections 1000 --channels 10 --consumers 0 --hold 60 --pid BROKER_PID
#[derive(Debug, Clone, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct IdleArgs {
    /// Broker to connect to: amqp://user:pass@host:port/vhost, percent-encoded
    #[arg(long, value_name = "URI", default_value = "amqp://guest:guest@localhost:5672")]
    uri: String,
    /// Connections in all
    #[arg(short, long, value_name = "N", default_value_t = 1_000)]
    connections: usize,
    /// Channels of each connection
    #[arg(long, value_name = "N", default_value_t = 1)]
    channels: u16,
    /// Consumers of each connection, on its channels in turn, all of the same empty queue
    #[arg(long, value_name = "N", default_value_t = 1)]
    consumers: u16,
    /// How long to hold them when all are open
    #[arg(long, value_name = "SECONDS", default_value_t = 10.0)]
    hold: f64,
    /// Process id of the broker on this machine: adds its memory and CPU time to the report
    #[arg(long, value_name = "BROKER_PID")]
    pid: Option<u32>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Idle connections with everything checked.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) uri: Uri,
    pub(super) connection_count: usize,
    pub(super) channel_count: u16,
    /// More than 0 only if there are channels.
    pub(super) consumer_count: u16,
    pub(super) hold: Duration,
    pub(super) broker_pid: Option<u32>,
    pub(super) json: bool,
}

impl IdleArgs {
    /// Checks the options against each other.
    ///
    /// # Errors
    /// [`PerfError::Usage`] that names the option and what it would have to be.
    pub(super) fn into_plan(self) -> Result<Plan, PerfError> {
        let complaint = if !(1..=MAX_CONNECTIONS).contains(&self.connections) {
            format!("--connections must be 1 to {MAX_CONNECTIONS}")
        } else if self.channels.max(self.consumers) > MAX_PER_CONNECTION {
            format!("--channels and --consumers go up to {MAX_PER_CONNECTION} each")
        } else if self.consumers > 0 && self.channels == 0 {
            "--consumers need at least one of --channels; without channels, say --consumers 0".to_owned()
        } else if !(self.hold > 0.0 && self.hold <= MAX_SECONDS) {
            format!("--hold must be above 0, and at most {MAX_SECONDS} seconds")
        } else {
            return Ok(Plan {
                uri: Uri::parse(&self.uri)?,
                connection_count: self.connections,
                channel_count: self.channels,
                consumer_count: self.consumers,
                hold: Duration::from_secs_f64(self.hold),
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
        idle: IdleArgs,
    }

    fn plan(options: &str) -> Result<Plan, PerfError> {
        CommandLine::try_parse_from(options.split_whitespace()).expect(options).idle.into_plan()
    }

    #[test]
    fn a_connection_has_one_channel_and_one_consumer_unless_told_otherwise() {
        let plan = plan("").expect("defaults");
        assert_eq!((plan.connection_count, plan.channel_count, plan.consumer_count), (1_000, 1, 1));
        assert_eq!(plan.hold, Duration::from_secs(10));
    }

    #[test]
    fn impossible_plans_are_refused_with_a_reason() {
        for (options, reason) in [
            ("--connections 0", "--connections"),
            ("--channels 0", "--consumers 0"),
            ("--channels 3000", "--channels"),
            ("--hold 0", "--hold"),
            ("--hold inf", "--hold"),
            ("--uri h", "amqp://"),
        ] {
            let refusal = plan(options).expect_err(options).to_string();
            assert!(refusal.contains(reason), "{options}: {refusal}");
        }
        assert!(plan("--channels 0 --consumers 0").is_ok());
    }
}
