//! What the commit thread does when a round cannot be written, and how it gets back to work.
//!
//! # While the store is failing
//! Nothing is drained and nothing is written. What the failed round holds is kept, and so is everything that is changed
//! meanwhile, where it was changed: sources stay on the list, operations stay queued. Every round that somebody waits for
//! fails at once.
//!
//! # Why nothing is tried again as if nothing had happened
//! After a failed sync nobody knows what the disk has: the kernel may have dropped what it could not write, and says that
//! all is well when it is asked again. So the database is closed and opened anew. That reads what the write-ahead log has
//! and writes it to table files with syncs of their own; then the failed round is written once more, whole, as is
//! everything since. Whoever waited for any of these rounds has been told that it failed, and stays told.
//!
//! To write the failed round once more does no harm if the log has it: all of a batch are puts and deletions, which end the
//! same however often the batch is written.
//!
//! RocksDB resumes from some errors (no space left) by itself. It then has what was written before the error, and the
//! above does not change: a round that failed is written again in a database that was opened anew.

use std::io::Write;
use std::time::{Duration, Instant};

use super::RoundBuilder;
use super::commit::{Committer, Cut};
use super::rocks::Rocks;

/// The longest time between two attempts.
const MAX_DELAY: Duration = Duration::from_secs(30);

/// Written to see whether the disk takes and keeps anything.
const PROBE: &str = "leveret.probe";
const PROBE_BYTES: usize = 64 * 1024;

/// A round that could not be written.
pub(super) struct Failure {
    pub cut: Cut,
    pub reason: String,
    /// What it holds is lost, so there is nothing to go on with.
    pub is_final: bool,
}

/// The state of a store in which rounds fail.
pub(super) struct Failing {
    /// The failed round, with its content in the builder, until it is written.
    kept: Option<Cut>,
    /// `None`: there will be no attempt.
    retry: Option<Retry>,
    since: Instant,
}

struct Retry {
    at: Instant,
    delay: Duration,
}

impl Failing {
    /// Whether it may end without a restart.
    pub fn may_resume(&self) -> bool {
        self.retry.is_some()
    }

    /// When the next attempt is due.
    pub fn retry_at(&self) -> Option<Instant> {
        self.retry.as_ref().map(|retry| retry.at)
    }
}

impl Committer {
    /// Begins to let rounds fail, the one at hand first.
    pub fn begin_failing(&self, failure: Failure) -> Failing {
        let Failure { cut, reason, is_final } = failure;
        let delay = self.options.retry;
        let path = self.rocks.path().display();
        self.watermark.fail(cut.round, &reason);
        match is_final {
            true => tracing::error!(
                round = cut.round,
                reason,
                "the store in '{path}' has failed and takes no more durable work until the broker is restarted"
            ),
            false => tracing::error!(
                round = cut.round,
                reason,
                retry_after = ?delay,
                "the store in '{path}' has failed: what was not confirmed is refused and publishers of persistent messages \
                 are blocked until the disk takes writes again; free space on it, or look for the cause in the kernel's log"
            ),
        }
        self.count_failed_round();
        self.tell_of_disk();
        let round = cut.round;
        if is_final {
            cut.tell(false);
        }
        self.watermark.advance(round);
        let retry = (!is_final).then(|| Retry { at: Instant::now() + delay, delay });
        Failing { kept: (!is_final).then_some(cut), retry, since: Instant::now() }
    }

    /// Tries to get the store back to work. Answers what still holds it back.
    pub fn resume(&self, mut failing: Failing, builder: &mut RoundBuilder) -> Option<Failing> {
        let path = self.rocks.path().display();
        let outcome = self.try_to_resume(&mut failing, builder);
        let Err((reason, is_final)) = outcome else {
            tracing::info!(
                failing_for = ?failing.since.elapsed(),
                "the store in '{path}' was opened anew and is back at work; what it had kept is written"
            );
            return None;
        };
        let retry = failing.retry.take().filter(|_| !is_final);
        failing.retry = retry.map(|Retry { delay, .. }| {
            let delay = (delay * 2).min(MAX_DELAY).max(self.options.retry);
            Retry { at: Instant::now() + delay, delay }
        });
        match &failing.retry {
            Some(retry) => {
                tracing::error!(reason, retry_after = ?retry.delay, "the store in '{path}' is still failing")
            }
            None => tracing::error!(
                reason,
                "the store in '{path}' takes no more durable work until the broker is restarted"
            ),
        }
        Some(failing)
    }

    fn try_to_resume(&self, failing: &mut Failing, builder: &mut RoundBuilder) -> Result<(), (String, bool)> {
        let passing = |reason| (reason, false);
        self.rocks.probe(self.space.needed_for(builder.byte_count())).map_err(passing)?;
        self.rocks.reopen().map_err(passing)?;
        self.rocks.open_bodies(0).map_err(|error| passing(error.to_string()))?;
        if let Some(kept) = &failing.kept {
            builder.require_sync();
            self.write_log(kept.round, builder).map_err(passing)?;
            builder.clear();
            kept.tell(true);
            failing.kept = None;
        }
        // All that was promised to rounds which failed meanwhile, and the first good round.
        builder.require_sync();
        match self.write_round(builder) {
            Ok(cut) => {
                self.watermark.recover(cut.round);
                self.finish(&cut, builder);
                Ok(())
            }
            Err(failure) => {
                self.count_failed_round();
                let (round, outcome) = (failure.cut.round, (failure.reason, failure.is_final));
                match failure.is_final {
                    true => failure.cut.tell(false),
                    false => failing.kept = Some(failure.cut),
                }
                self.watermark.advance(round);
                Err(outcome)
            }
        }
    }
}

impl Rocks {
    /// Whether the disk has room, and takes and keeps a file.
    ///
    /// # Errors
    /// What is wrong with it.
    fn probe(&self, needed_bytes: u64) -> Result<(), String> {
        if let Some(free) = self.free_bytes().filter(|free| *free < needed_bytes) {
            return Err(format!("{free} bytes are free on its volume, and {needed_bytes} are needed"));
        }
        let path = self.path().join(PROBE);
        let written = std::fs::File::create(&path).and_then(|mut file| {
            file.write_all(&[0xa5; PROBE_BYTES])?;
            file.sync_data()?;
            file.sync_all()
        });
        let removed = std::fs::remove_file(&path);
        written.and(removed).map_err(|error| format!("'{}' cannot be written and synced: {error}", path.display()))
    }
}
