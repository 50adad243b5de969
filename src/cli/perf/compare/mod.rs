//! `leveret perf compare`: the same loads against several brokers, in turns, as one table of medians.
//!
//! A machine is never quiet for long, so every shape of load runs against one broker right after the other, and all of
//! that again and again; what slows the machine down slows down all of them. Each run is a process of its own
//! (`leveret perf --json …`), so that no run inherits another one's memory or threads.
//!
//! [`options`] makes a checked plan of the command line, [`shapes`] is the built-in matrix, [`child`] carries out one
//! run, [`statistics`] makes one figure of several runs and compares it, [`table`] prints.

mod child;
mod options;
mod shapes;
mod statistics;
mod table;

use std::io::{self, Write};

pub use options::CompareArgs;

use super::error::PerfError;
use super::posix;
use options::Plan;
use statistics::{Comparison, Run};

/// Runs every shape against every broker, and prints what came of it to standard output.
///
/// A run that fails is told on standard error and leaves a gap in the table. After Ctrl-C the table shows what there
/// is.
///
/// # Errors
/// A command line that makes no sense, and output that cannot be written.
pub(super) fn run(args: CompareArgs) -> Result<(), PerfError> {
    let plan = args.into_plan()?;
    posix::catch_interrupt();
    let comparison = Comparison::of(&plan, &measure(&plan)?);
    let text = match plan.form {
        options::Form::Text => table::text(&comparison),
        options::Form::Markdown => table::markdown(&comparison),
        options::Form::Json => {
            serde_json::to_string(&comparison)
                .map_err(|error| PerfError::Local { what: "cannot write the report as JSON", source: error.into() })?
                + "\n"
        }
    };
    io::stdout()
        .write_all(text.as_bytes())
        .map_err(|source| PerfError::Local { what: "cannot print the report", source })
}

/// All runs, by shape and then by broker.
fn measure(plan: &Plan) -> Result<Vec<Vec<Vec<Run>>>, PerfError> {
    let mut runs = vec![vec![Vec::new(); plan.targets.len()]; plan.shapes.len()];
    for number in 1..=plan.run_count {
        for (shape, runs) in plan.shapes.iter().zip(&mut runs) {
            for (target, runs) in plan.targets.iter().zip(runs) {
                if posix::was_interrupted() {
                    break;
                }
                if matches!(runs.last(), Some(Run::Failed)) {
                    continue; // it would only cost the time again
                }
                let run = child::measure(target, shape, number)?;
                if !posix::was_interrupted() {
                    eprintln!("run {number}, {}: {} {}", shape.title, target.name, table::brief(&run));
                    runs.push(run);
                }
            }
        }
    }
    Ok(runs)
}
