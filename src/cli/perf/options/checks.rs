//! Options that are out of range, or contradict each other.

use super::super::error::PerfError;
use super::args::PerfArgs;
use super::queues::MAX_WORKERS;

const MAX_WINDOW: u64 = 10_000_000;
const MAX_RATE_PER_SECOND: f64 = 1e9;

impl PerfArgs {
    /// Checks each number by itself, and against the others where queues have no part in it.
    pub(super) fn check(&self) -> Result<(), PerfError> {
        self.load_complaint().or_else(|| self.consumer_complaint()).map_or(Ok(()), |text| Err(PerfError::Usage(text)))
    }

    fn load_complaint(&self) -> Option<String> {
        let bad_rate = |rate: Option<f64>| rate.is_some_and(|rate| !(rate > 0.0 && rate <= MAX_RATE_PER_SECOND));
        let bad_window = |window: Option<u64>| window.is_some_and(|window| window == 0 || window > MAX_WINDOW);
        let complaint = if self.publishers == 0 && self.consumers == 0 {
            "nothing to do with 0 publishers and 0 consumers".to_owned()
        } else if self.publishers.max(self.consumers) > MAX_WORKERS {
            format!("--publishers and --consumers go up to {MAX_WORKERS} each")
        } else if bad_window(self.confirm) {
            format!("--confirm needs a window of 1 to {MAX_WINDOW}; leave it out for no confirms")
        } else if bad_window(self.tx) {
            format!("--tx needs 1 to {MAX_WINDOW} messages; leave it out for no transactions")
        } else if bad_rate(self.rate) || bad_rate(self.total_rate) {
            format!("--rate and --total-rate must be above 0, and at most {MAX_RATE_PER_SECOND:e}")
        } else if self.batch == Some(0) {
            "--batch must be at least 1".to_owned()
        } else if self.count == Some(0) || self.total_count == Some(0) {
            "--count and --total-count must be at least 1".to_owned()
        } else if self
            .properties
            .iter()
            .enumerate()
            .any(|(index, property)| self.properties[..index].iter().any(|earlier| earlier.same_name(property)))
        {
            "a --property is set twice".to_owned()
        } else {
            return None;
        };
        Some(complaint)
    }

    fn consumer_complaint(&self) -> Option<String> {
        let complaint = match self.nack_every {
            Some(0) => "--nack-every must be at least 1",
            Some(_) if self.ack_batch == 0 => "--nack-every needs acknowledgements: add --ack-batch 1",
            Some(1) if self.requeue => "--requeue of every message (--nack-every 1) would never end",
            _ => return None,
        };
        Some(complaint.to_owned())
    }

    pub(super) fn check_exclusive(&self, queues: usize) -> Result<(), PerfError> {
        if self.exclusive && self.consumers != queues {
            return Err(PerfError::Usage(format!(
                "--exclusive needs one consumer per queue: {queues} and not {}",
                self.consumers
            )));
        }
        Ok(())
    }
}
