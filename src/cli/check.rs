//! `leveret check`: what is wrong with a data directory, and with `--repair`, putting it right.

use std::process::ExitCode;

use clap::Args;

use super::Failure;
use crate::broker::log_names;
use crate::config::{Config, Flags};
use crate::store::{self, QueueId};
use crate::telemetry;

const LONG_ABOUT: &str = "\
Verify every file of a data directory that no broker uses, and say what is damaged and which messages are lost.

Nothing in the directory is changed, unless --repair is given: that replaces what is damaged by what can be read of it, \
so that a broker can run on it. The originals of damaged files are kept in the subdirectory quarantine-<number>.

Exit codes: 0 nothing is damaged, or it was repaired; 1 something is damaged; 2 the directory cannot be read, or is in use.";

#[derive(Args)]
#[command(long_about = LONG_ABOUT)]
pub(super) struct CheckArgs {
    /// Make the directory one that a broker can start on, with all that can be read
    #[arg(long)]
    repair: bool,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    flags: Flags,
}

const DAMAGED: u8 = 1;

pub(super) fn run(args: &CheckArgs) -> Result<ExitCode, Failure> {
    let config = Config::load(&args.flags).map_err(Failure::usage)?;
    telemetry::init(&config.log).map_err(Failure::usage)?;
    let path = &config.data_dir;
    let report = if args.repair { store::repair(path) } else { store::check(path) }.map_err(Failure::usage)?;
    let names = log_names(&report.intact_definitions);
    let name =
        |queue: QueueId| names.get(&queue).cloned().unwrap_or_else(|| format!("log {} of no known queue", queue.0));
    if args.json {
        let mut json = serde_json::to_value(&report).map_err(Failure::usage)?;
        for (entry, loss) in json["queues"].as_array_mut().into_iter().flatten().zip(&report.queues) {
            entry["name"] = name(loss.queue).into();
        }
        println!("{json:#}");
    } else {
        print!("{}", report.to_text(&name));
        if !args.repair && !report.is_clean() {
            println!("'leveret check --repair --data-dir {}' repairs it", path.display());
        }
    }
    let is_fine = args.repair || report.is_clean();
    Ok(if is_fine { ExitCode::SUCCESS } else { ExitCode::from(DAMAGED) })
}
