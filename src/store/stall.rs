//! Writes to a database that may take none for a while.
//!
//! RocksDB takes no write while its memtables are full. A writer that waits for that inside of RocksDB keeps it from getting out
//! of a failed flush: the writer waits for the recovery, and the recovery for the writer's place. With a full disk both wait
//! for good. So writes wait outside.

use std::time::{Duration, Instant};

use rocksdb::{DB, ErrorKind, WriteBatch, WriteOptions};

/// How often a write that was refused is tried.
const STEP: Duration = Duration::from_millis(2);
/// How long it is tried if a flush has failed: nobody knows how long that lasts, and whoever publishes has to be told.
const PATIENCE: Duration = Duration::from_secs(1);

/// Writes a batch as soon as the database takes it.
///
/// # Errors
/// What RocksDB says, and `Incomplete` if nothing was written since a flush has failed.
pub fn write(db: &DB, batch: &WriteBatch, options: &mut WriteOptions) -> Result<(), rocksdb::Error> {
    options.set_no_slowdown(true);
    let began = Instant::now();
    // RocksDB consumes the batch, and there may be another attempt.
    while let Err(error) = db.write_opt(WriteBatch::from_data(batch.data()), options) {
        let is_refused = error.kind() == ErrorKind::Incomplete;
        if !is_refused || (began.elapsed() >= PATIENCE && has_failed_flush(db)) {
            return Err(error);
        }
        std::thread::sleep(STEP);
    }
    Ok(())
}

fn has_failed_flush(db: &DB) -> bool {
    db.property_int_value("rocksdb.background-errors").ok().flatten().is_some_and(|count| count > 0)
}
