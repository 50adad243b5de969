//! Logs: one subscriber for the whole process, on standard error.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{self, IsTerminal};
use std::panic;

use tracing_subscriber::EnvFilter;

use crate::config::{LogConfig, LogFormat};

/// Why logging could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("log.level is not a valid filter: {0}")]
    Filter(#[from] tracing_subscriber::filter::ParseError),
    #[error("logging is already set up: {0}")]
    AlreadySet(Box<dyn std::error::Error + Send + Sync>),
}

/// Starts logging, and sends panics to the log as errors.
///
/// # Errors
/// [`TelemetryError`] if the filter is not valid, or if this process has a subscriber already.
pub fn init(config: &LogConfig) -> Result<(), TelemetryError> {
    let terminal = io::stderr().is_terminal();
    let builder =
        tracing_subscriber::fmt().with_env_filter(EnvFilter::try_new(&config.filter)?).with_writer(io::stderr);
    match config.format {
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
        LogFormat::Pretty => builder.with_target(false).with_ansi(terminal).compact().try_init(),
        LogFormat::Auto if terminal => builder.with_target(false).with_ansi(true).compact().try_init(),
        LogFormat::Auto => builder.with_ansi(false).try_init(),
    }
    .map_err(TelemetryError::AlreadySet)?;
    log_panics();
    Ok(())
}

/// Sends panics to the log, where an operator looks; to the default hook if the filter would drop them.
fn log_panics() {
    let default_hook = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        if !tracing::enabled!(tracing::Level::ERROR) {
            return default_hook(panic);
        }
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("unnamed");
        let backtrace = Backtrace::capture();
        if backtrace.status() == BacktraceStatus::Captured {
            tracing::error!(thread, %backtrace, "{panic}");
        } else {
            tracing::error!(thread, "{panic}");
        }
    }));
}
