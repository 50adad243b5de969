//! `leveret perf churn`: makes things and takes them away, as fast as the broker answers.
//!
//! Messages are the cheap part of a broker's work for clients that come and go. Here every channel (for connections:
//! every thread) has one request outstanding, waits for its answer, and sends the next: declare, delete, declare, …
//! Nothing is pipelined, so more speed comes from more connections and channels only.
//!
//! [`options`] makes a checked plan of the command line, [`operation`] knows the requests, [`lanes`] sends them on the
//! channels of one connection, [`sockets`] opens and closes connections themselves; [`tally`] counts, [`report`]
//! prints.

mod lanes;
mod operation;
mod options;
mod report;
mod sockets;
mod tally;

use std::io::{self, Write};

pub use options::ChurnArgs;

use super::error::PerfError;
use super::posix;
use super::process::ProcessSample;
use options::What;
use report::Report;

/// Carries the churn out, and prints what came of it to standard output.
///
/// # Errors
/// Whatever kept it from starting or cut it short.
pub(super) fn run(args: ChurnArgs) -> Result<(), PerfError> {
    let plan = args.into_plan()?;
    let sample = || plan.broker_pid.map(ProcessSample::take).transpose();
    sample()?; // before anything is declared: the process must exist
    posix::catch_interrupt();
    let (observed, tally) = match plan.what {
        What::Connections => sockets::run(&plan, &sample)?,
        _ => lanes::run(&plan, &sample)?,
    };
    let report = Report::new(&plan, &observed, &tally);
    let text = if plan.json {
        serde_json::to_string(&report)
            .map_err(|error| PerfError::Local { what: "cannot write the report as JSON", source: error.into() })?
            + "\n"
    } else {
        report.to_string()
    };
    io::stdout()
        .write_all(text.as_bytes())
        .map_err(|source| PerfError::Local { what: "cannot print the report", source })
}

/// Reads the broker's accounts, if they are wanted.
type Sampler<'a> = &'a dyn Fn() -> Result<Option<ProcessSample>, PerfError>;
