//! `leveret perf`: a load generator for any AMQP 0-9-1 broker.
//!
//! It publishes and consumes as fast as the broker lets it (or at a fixed rate), and reports rates, end-to-end
//! and confirm latencies, losses, and what the run cost the broker's process. It must never be the bottleneck:
//! plain blocking threads, one per connection up to hundreds; a message's frames encoded once and written many
//! at a time; deliveries walked in the read buffer. It has its own tiny wire module, for it measures the broker's.
//!
//! # Map
//! [`options`] makes a checked plan of the command line, [`load`] carries it out: [`topology`] declares exchange
//! and queues, [`workers`] opens the workers' connections and starts their threads (which hundreds share, as a
//! [`crowd`]), [`watch`] looks after them, [`report`] adds up. Each [`publisher`] (what it hears: [`inbox`]; when it
//! sends: [`pace`]) and [`consumer`] (what it takes in: [`intake`]) runs on a [`connection`] of its own, counts on
//! a [`meter`] and records [`latencies`]. Below: [`wire`] (frames), [`fields`] and [`properties`] (what goes into
//! them), [`message_block`] (many messages to a write), [`confirms`] (what is unconfirmed), [`process`] (the
//! broker's accounts), [`posix`] (system calls).
//!
//! Beside it stand the subcommands: [`compare`] runs loads against several brokers, of which one may be the [`floor`],
//! a program that only rewrites frames; [`churn`] makes and deletes things, [`idle`] holds connections that do nothing.
//! They share [`bare`] (connections by the thousand), [`crew`] (threads) and [`figures`].
//!
//! # Measuring
//! Bodies of 8 bytes or more begin with the sender's `CLOCK_MONOTONIC` in nanoseconds, so latency is
//! end to end on one machine. A paced message carries the time it was due, so a stall shows in every message
//! it delayed. Unpaced, only the first message of each read is measured, which is the one that waited longest.

mod bare;
mod churn;
mod compare;
mod confirms;
mod connection;
mod consumer;
mod crew;
mod crowd;
mod error;
mod fields;
mod figures;
mod floor;
mod idle;
mod inbox;
mod intake;
mod latencies;
mod load;
mod message_block;
mod meter;
mod options;
mod pace;
mod posix;
mod process;
mod progress;
mod properties;
mod publisher;
mod report;
mod topology;
mod uri;
mod watch;
mod wire;
mod workers;

use std::io::{self, Write};

pub use error::PerfError;
pub use options::PerfArgs;

const EXAMPLES: &str = "\
Subcommands (leveret perf COMMAND --help says more):
  leveret perf compare --a URI,PID --b URI,PID                 the same loads against several brokers, in turns
  leveret perf churn --what queues --channels 50               declare and delete as fast as the broker answers
  leveret perf idle --connections 10000 --pid BROKER_PID       what connections cost that do nothing
  leveret perf floor                                           what no broker can beat, to measure against";

// No doc comment here: the help text is that of the load's options.
#[derive(Debug, Clone, clap::Args)]
#[command(args_conflicts_with_subcommands = true, disable_help_subcommand = true, after_help = EXAMPLES)]
pub struct PerfCommand {
    #[command(subcommand)]
    measurement: Option<Measurement>,
    #[command(flatten)]
    load: PerfArgs,
}

/// What is measured other than a load of messages.
#[derive(Debug, Clone, clap::Subcommand)]
enum Measurement {
    Compare(Box<compare::CompareArgs>),
    Churn(churn::ChurnArgs),
    Idle(idle::IdleArgs),
    Floor(floor::FloorArgs),
}

/// Carries out what the command line asks for, and prints the result to standard output.
///
/// # Errors
/// Whatever kept it from starting or cut it short.
pub fn run(command: PerfCommand) -> Result<(), PerfError> {
    match command.measurement {
        None => load(command.load),
        Some(Measurement::Compare(args)) => compare::run(*args),
        Some(Measurement::Churn(args)) => churn::run(args),
        Some(Measurement::Idle(args)) => idle::run(args),
        Some(Measurement::Floor(args)) => floor::run(&args),
    }
}

/// Runs the load that `args` describe, and prints its report.
///
/// # Errors
/// Whatever kept the run from starting or cut it short. In the second case the report is printed all the same.
fn load(args: PerfArgs) -> Result<(), PerfError> {
    let plan = args.into_plan()?;
    posix::catch_interrupt();
    let (report, error) = load::execute(&plan)?;
    let text = if plan.json {
        serde_json::to_string(&report)
            .map_err(|error| PerfError::Local { what: "cannot write the report as JSON", source: error.into() })?
            + "\n"
    } else {
        report.to_string()
    };
    io::stdout()
        .write_all(text.as_bytes())
        .map_err(|source| PerfError::Local { what: "cannot print the report", source })?;
    error.map_or(Ok(()), Err)
}
