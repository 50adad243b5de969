//! The command line: which subcommand, its exit code, and one clear line when something is wrong.
//!
//! Exit codes: 0 done, 1 it failed while running, 2 the command line or the configuration is wrong. Of `check`: 0 no damage
//! (or repaired), 1 damage, 2 neither can be said.

mod check;
mod ctl;
pub mod perf;
mod ping;

use std::error::Error;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};

use crate::config::{Config, Flags};
use crate::{server, telemetry};

const ABOUT: &str = "An AMQP 0-9-1 message broker that RabbitMQ's clients use unchanged.";

const LONG_ABOUT: &str = "\
An AMQP 0-9-1 message broker that RabbitMQ's clients use unchanged.

Without a subcommand, leveret serves: it listens on port 5672, keeps its data in ./leveret-data, and knows the \
user guest with the password guest, who may log in from this machine only. A confirm means that the message is \
on disk.";

const EXAMPLES: &str = "\
Examples:
  leveret                                         serve with the defaults
  leveret --port 5673 --data-dir /var/lib/leveret
  leveret --config /etc/leveret/leveret.toml      settings and users from a file
  LEVERET_LOG=debug leveret                       every flag has a variable, too
  leveret check-config --config leveret.toml      is this file valid?
  leveret check --data-dir /var/lib/leveret       is anything in there damaged?
  leveret ping                                    does a broker answer on port 5672?
  leveret ctl status                              how is the broker on ./leveret-data?
  leveret ctl checkpoint /backup/leveret          copy it while it runs
  leveret perf --help                             measure a broker

A flag beats the environment, the environment beats the file, and the file beats the default.";

#[derive(Parser)]
#[command(
    name = "leveret",
    version,
    about = ABOUT,
    long_about = LONG_ABOUT,
    after_help = EXAMPLES,
    args_conflicts_with_subcommands = true,
    disable_help_subcommand = true
)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    flags: Flags,
}

#[derive(Subcommand)]
enum Command {
    /// Run the broker (this is what happens without a subcommand)
    #[command(after_help = EXAMPLES)]
    Serve(Flags),
    /// Say whether the configuration is valid, without running a broker
    CheckConfig(Flags),
    /// Verify a data directory that no broker uses, and repair it with --repair
    Check(check::CheckArgs),
    /// Say whether a broker answers: exit code 0 if it does, 1 if not
    Ping(ping::PingArgs),
    /// Ask a running broker on this machine how it is, or for a backup
    Ctl(ctl::CtlArgs),
    // The long text stands with the options.
    #[command(about = "Publish to and consume from a broker, and measure it")]
    Perf(Box<perf::PerfCommand>),
}

/// How long tasks that are still blocked after the server has stopped may hold up the exit.
const RUNTIME_SHUTDOWN: Duration = Duration::from_secs(1);

/// Runs the program: reads the command line, carries it out, and reports what failed.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse(); // leaves the program for --help, --version and usage errors (exit code 2)
    match run(cli) {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("leveret: {}", one_line(failure.error.as_ref()));
            ExitCode::from(failure.code)
        }
    }
}

/// An error on its way out of the program.
struct Failure {
    code: u8,
    error: Box<dyn Error>,
}

impl Failure {
    fn running(error: impl Into<Box<dyn Error>>) -> Self {
        Self { code: 1, error: error.into() }
    }

    fn usage(error: impl Into<Box<dyn Error>>) -> Self {
        Self { code: 2, error: error.into() }
    }
}

fn run(cli: Cli) -> Result<ExitCode, Failure> {
    let done = match cli.command {
        Some(Command::Check(args)) => return check::run(&args),
        None => serve(&cli.flags),
        Some(Command::Serve(flags)) => serve(&flags),
        Some(Command::CheckConfig(flags)) => check_config(&flags),
        Some(Command::Ping(args)) => ping::run(&args).map_err(Failure::running),
        Some(Command::Ctl(args)) => ctl::run(args).map_err(|error| match error {
            ctl::CtlError::Config(_) => Failure::usage(error),
            _ => Failure::running(error),
        }),
        Some(Command::Perf(args)) => perf::run(*args).map_err(Failure::running),
    };
    done.map(|()| ExitCode::SUCCESS)
}

fn serve(flags: &Flags) -> Result<(), Failure> {
    let config = Config::load(flags).map_err(Failure::usage)?;
    telemetry::init(&config.log).map_err(Failure::usage)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.worker_threads)
        .thread_name("leveret")
        .enable_all()
        .build()
        .map_err(Failure::running)?;
    let result = runtime.block_on(server::run(config));
    runtime.shutdown_timeout(RUNTIME_SHUTDOWN);
    result.map_err(Failure::running)
}

fn check_config(flags: &Flags) -> Result<(), Failure> {
    let config = Config::load(flags).map_err(Failure::usage)?;
    let source =
        config.config_file.map_or_else(|| "no file was read".to_owned(), |path| format!("{} was read", path.display()));
    let (vhosts, users) = (config.vhosts.len(), config.users.len());
    println!("the configuration is valid: {source}, virtual hosts: {vhosts}, users: {users}");
    Ok(())
}

/// The error and what caused it, leaving out causes that the text above them has quoted.
fn one_line(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let reason = error.to_string();
        if !text.contains(&reason) {
            text.push_str(": ");
            text.push_str(&reason);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_flags_of_serve_work_with_and_without_its_name() {
        for args in [&["leveret", "--port", "5673"][..], &["leveret", "serve", "--port", "5673"]] {
            let parsed = Cli::try_parse_from(args).map(|cli| (cli.command, cli.flags));
            let Ok((None, flags) | (Some(Command::Serve(flags)), _)) = parsed else {
                panic!("{args:?}");
            };
            assert_eq!(Config::load(&flags).unwrap().port, 5673);
        }
    }

    #[test]
    fn an_unknown_flag_is_a_usage_error() {
        let Err(error) = Cli::try_parse_from(["leveret", "--prot", "1"]) else {
            panic!("accepted");
        };
        assert_eq!(error.exit_code(), 2);
        assert!(error.to_string().contains("--port"), "{error}");
    }

    #[test]
    fn causes_are_shown_once() {
        let error =
            crate::config::ConfigError::ReadFile { path: "x".into(), source: std::io::Error::other("disk on fire") };
        assert_eq!(one_line(&error), "cannot read configuration file 'x': disk on fire");
    }
}
