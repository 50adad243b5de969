//! A publisher's unconfirmed messages.

use std::collections::VecDeque;

use super::latencies::Recorder;

/// Which publish sequence numbers are still unconfirmed, and since when.
///
/// # Invariants
/// - `oldest` is the sequence number of `sent_ns[0]`, which is not settled.
/// - Entries are sending times; [`SETTLED`] stands for one confirmed out of order.
#[derive(Debug)]
pub(super) struct ConfirmLedger {
    window: u64,
    oldest: u64,
    sent_ns: VecDeque<u64>,
    outstanding: u64,
    pub(super) acked: u64,
    pub(super) nacked: u64,
    /// Confirms for something that was not outstanding: a fault of the broker.
    pub(super) unexpected: u64,
    pub(super) latencies: Recorder,
}

const SETTLED: u64 = 0;

impl ConfirmLedger {
    pub(super) fn new(window: u64, latencies: Recorder) -> Self {
        Self {
            window,
            oldest: 1,
            sent_ns: VecDeque::new(),
            outstanding: 0,
            acked: 0,
            nacked: 0,
            unexpected: 0,
            latencies,
        }
    }

    /// How many more messages may be sent now.
    pub(super) fn free(&self) -> u64 {
        self.window.saturating_sub(self.outstanding)
    }

    pub(super) fn window(&self) -> u64 {
        self.window
    }

    pub(super) fn outstanding(&self) -> u64 {
        self.outstanding
    }

    /// Notes one more message as sent.
    pub(super) fn on_sent(&mut self, sending_ns: u64) {
        self.sent_ns.push_back(sending_ns.max(SETTLED + 1));
        self.outstanding += 1;
    }

    /// Settles what an ack or a nack of the broker names. Tag 0 with `multiple` means all.
    ///
    /// # Cost
    /// One step per message settled, one histogram entry per run of equal sending times.
    pub(super) fn on_confirm(&mut self, tag: u64, multiple: bool, acked: bool, now_ns: u64) {
        let newest = self.oldest + self.sent_ns.len() as u64 - 1;
        let tag = if tag == 0 && multiple { newest } else { tag };
        if tag < self.oldest || tag > newest {
            // An ack of many may repeat what was settled one by one before it.
            self.unexpected += u64::from(!(multiple && tag < self.oldest && tag > 0));
            return;
        }
        let settled = if multiple { self.settle_through(tag, now_ns) } else { self.settle_one(tag, now_ns) };
        self.outstanding -= settled;
        if acked {
            self.acked += settled;
        } else {
            self.nacked += settled;
        }
    }

    fn settle_through(&mut self, tag: u64, now_ns: u64) -> u64 {
        let (mut settled, mut run, mut run_ns) = (0, 0, SETTLED);
        while self.oldest <= tag
            && let Some(sent_ns) = self.sent_ns.pop_front()
        {
            self.oldest += 1;
            if sent_ns == SETTLED {
                continue;
            }
            if sent_ns != run_ns {
                self.latencies.note(now_ns.saturating_sub(run_ns), run);
                (run, run_ns) = (0, sent_ns);
            }
            run += 1;
            settled += 1;
        }
        self.latencies.note(now_ns.saturating_sub(run_ns), run);
        self.drop_settled();
        settled
    }

    fn settle_one(&mut self, tag: u64, now_ns: u64) -> u64 {
        let index = usize::try_from(tag - self.oldest).unwrap_or(usize::MAX);
        match self.sent_ns.get_mut(index) {
            Some(sent_ns) if *sent_ns != SETTLED => {
                self.latencies.note(now_ns.saturating_sub(*sent_ns), 1);
                *sent_ns = SETTLED;
                self.drop_settled();
                1
            }
            _ => {
                self.unexpected += 1;
                0
            }
        }
    }

    fn drop_settled(&mut self) {
        while self.sent_ns.front() == Some(&SETTLED) {
            self.sent_ns.pop_front();
            self.oldest += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::latencies::LatencyPool;
    use super::*;

    fn measured(ledger: &ConfirmLedger) -> u64 {
        ledger.latencies.noted().iter().map(|(_, count)| count).sum()
    }

    fn ledger(sent: u64) -> ConfirmLedger {
        let mut ledger = ConfirmLedger::new(10, LatencyPool::new(1).recorder(0));
        (0..sent).for_each(|index| ledger.on_sent(1_000 + index));
        ledger
    }

    #[test]
    fn an_ack_of_many_frees_the_window_up_to_its_tag() {
        let mut ledger = ledger(10);
        assert_eq!(ledger.free(), 0);
        ledger.on_confirm(4, true, true, 5_000);
        assert_eq!((ledger.free(), ledger.acked, measured(&ledger)), (4, 4, 4));
        ledger.on_confirm(0, true, false, 5_000);
        assert_eq!((ledger.outstanding(), ledger.acked, ledger.nacked), (0, 4, 6));
        ledger.on_sent(6_000);
        ledger.on_confirm(11, false, true, 7_000);
        assert_eq!((ledger.outstanding(), ledger.acked, ledger.unexpected), (0, 5, 0));
    }

    #[test]
    fn single_confirms_may_come_in_any_order() {
        let mut ledger = ledger(5);
        for tag in [3, 1, 5] {
            ledger.on_confirm(tag, false, true, 5_000);
        }
        assert_eq!(ledger.outstanding(), 2);
        ledger.on_confirm(4, true, true, 5_000);
        assert_eq!((ledger.outstanding(), ledger.acked, ledger.unexpected), (0, 5, 0));
        assert_eq!(measured(&ledger), 5);
    }

    #[test]
    fn confirms_of_nothing_outstanding_are_counted_and_change_nothing() {
        let mut ledger = ledger(3);
        ledger.on_confirm(2, false, true, 5_000);
        for (tag, multiple) in [(2, false), (4, false), (4, true), (0, false)] {
            ledger.on_confirm(tag, multiple, true, 5_000);
        }
        assert_eq!((ledger.outstanding(), ledger.acked, ledger.unexpected), (2, 1, 4));
    }
}
