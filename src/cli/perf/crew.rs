//! Workers of the subcommands, each in a thread of its own.

use std::thread::{self, ScopedJoinHandle};

use super::error::PerfError;

/// Workers keep nothing large on their stacks.
const STACK_BYTES: usize = 256 << 10;

/// Lets every worker do its work at the same time, and waits for all. `on_failure` is to make the others end.
///
/// # Errors
/// The first worker's that failed.
pub(super) fn work_all<W: Send, T: Send>(
    workers: impl Iterator<Item = W>,
    on_failure: impl Fn() + Sync,
    work: impl Fn(W) -> Result<T, PerfError> + Sync,
) -> Result<Vec<T>, PerfError> {
    let (work, on_failure) = (&work, &on_failure);
    thread::scope(|scope| {
        let start = |worker| {
            let run = move || work(worker).inspect_err(|_| on_failure());
            thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, run).map_err(|source| {
                on_failure();
                PerfError::Local { what: "cannot start a thread", source }
            })
        };
        let started: Vec<_> = workers.map(start).collect();
        let ended: Vec<_> = started.into_iter().map(|worker| worker.and_then(join)).collect();
        ended.into_iter().collect()
    })
}

fn join<T>(worker: ScopedJoinHandle<'_, Result<T, PerfError>>) -> Result<T, PerfError> {
    worker.join().unwrap_or(Err(PerfError::WorkerPanicked))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn a_workers_failure_stops_the_others_and_is_what_is_told() {
        let stopped = AtomicBool::new(false);
        let stop = || stopped.store(true, Ordering::Relaxed);
        let failed = work_all(0..3, stop, |number| {
            while number != 1 && !stopped.load(Ordering::Relaxed) {
                thread::yield_now();
            }
            if number == 1 { Err(PerfError::Usage("one".to_owned())) } else { Ok(number) }
        });
        assert_eq!(failed.expect_err("one failed").to_string(), "one");
        assert_eq!(work_all(0..3, stop, Ok).expect("none failed"), [0, 1, 2]);
    }
}
