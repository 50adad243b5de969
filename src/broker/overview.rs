//! The broker as its operator sees it: sums over everything, and copies of the store.

use std::{path::PathBuf, sync::Arc};

use super::{Alarm, Broker, BrokerError, Counts};
use crate::store::{Checkpoint, StoreError};

/// Sums over all queues of all vhosts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Overview {
    pub vhosts: u64,
    pub queues: u64,
    pub counts: Counts,
}

impl Broker {
    /// What there is. Takes each queue's lock once.
    pub fn overview(&self) -> Overview {
        let mut all = Overview::default();
        for vhost in self.vhosts() {
            all.vhosts += 1;
            for queue in vhost.queues() {
                all.queues += 1;
                let (sum, counts) = (&mut all.counts, queue.counts());
                sum.ready += counts.ready;
                sum.ready_bytes += counts.ready_bytes;
                sum.unacked += counts.unacked;
                sum.unacked_bytes += counts.unacked_bytes;
                sum.waiting += counts.waiting;
                sum.delayed += counts.delayed;
                sum.consumers += counts.consumers;
            }
        }
        all
    }

    /// The names of the alarms in force.
    pub fn active_alarms(&self) -> Vec<&'static str> {
        let alarms = [Alarm::DiskFailure, Alarm::Disk, Alarm::Memory].into_iter();
        alarms.filter(|&alarm| self.alarms.is_set(alarm)).map(Alarm::name).collect()
    }

    /// Where the broker keeps everything.
    pub fn data_directory(&self) -> PathBuf {
        self.store.path().to_owned()
    }

    /// Free bytes on the volume of the data directory; `None` when the system does not say.
    pub fn free_disk_bytes(&self) -> Option<u64> {
        self.store.disk_condition().free_bytes
    }

    /// Copies everything durable into a directory that another broker can be started on: all that had happened when the
    /// call began, and of each queue's later history a first part, perhaps none.
    ///
    /// # Errors
    /// When that fails, or what has happened before does not get to disk; nothing is left behind then.
    pub async fn checkpoint(self: Arc<Self>, directory: PathBuf) -> Result<Checkpoint, CheckpointError> {
        self.durable(self.open_round()).await?;
        let copy = move || self.store.checkpoint(&directory);
        Ok(tokio::task::spawn_blocking(copy).await.map_err(|_| CheckpointError::Panicked)??)
    }
}

/// Why there is no checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error(transparent)]
    Broker(#[from] BrokerError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("an error in the broker, which its log has")]
    Panicked,
}
