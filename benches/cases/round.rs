//! What the commit thread gathers, without the disk.

use std::hint::black_box;

use leveret::store::{QueueId, QueueStateRecord, RoundBuilder};

use super::Work;

struct Build {
    records: u64,
    record: Vec<u8>,
    round: RoundBuilder,
}

impl Work for Build {
    fn prepare(&mut self) {
        self.round.clear();
    }

    fn run(&mut self) {
        for seq in 0..self.records {
            self.round.append(QueueId(1), seq, black_box(&self.record));
        }
        let state = QueueStateRecord { tail: self.records, message_count: self.records, ..QueueStateRecord::default() };
        self.round.put_state(QueueId(1), &state);
    }
}

/// A round of one queue: its records and its state.
pub fn build(records: u64, record_bytes: usize) -> Box<dyn Work> {
    Box::new(Build { records, record: vec![7; record_bytes], round: RoundBuilder::new() })
}
