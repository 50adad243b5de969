//! Publisher confirms of one channel: which publishes wait for which round.

use std::collections::VecDeque;

use crate::{broker::Round, wire::encode};

/// Publishes not yet answered. Entries are in publish order; one entry stands for all publishes after the one before.
#[derive(Debug, Default)]
pub struct ConfirmLedger {
    waiting: VecDeque<(u64, Round)>,
    /// The last publish that an entry, or an answer, covers.
    covered: u64,
}

impl ConfirmLedger {
    /// The round the oldest waiting publish needs.
    pub fn first_round(&self) -> Option<Round> {
        self.waiting.front().map(|(_, round)| *round)
    }

    /// Notes the publishes after the last noted one, up to `last`, which are durable with `round`. Those that wait for
    /// nothing (round 0) are answered at once, into `out`.
    #[inline]
    pub fn published(&mut self, last: u64, round: Round, channel: u16, out: &mut Vec<u8>) {
        let first = self.covered + 1;
        self.covered = last;
        if round == 0 {
            if self.waiting.is_empty() {
                encode::basic_ack(out, channel, last, last > first);
            } else {
                // An ack of several would answer those that still wait.
                (first..=last).for_each(|seq| encode::basic_ack(out, channel, seq, false));
            }
            return;
        }
        match self.waiting.back_mut() {
            // Only an unbroken stretch may share an entry: answers of a stretch are given with `multiple`.
            Some((until, waits_for)) if *waits_for == round => *until = last,
            _ => self.waiting.push_back((last, round)),
        }
    }

    /// Refuses the publishes after the last noted one, up to `last`: nacked at once, one by one if others wait.
    pub fn refused(&mut self, last: u64, channel: u16, out: &mut Vec<u8>) {
        let first = self.covered + 1;
        self.covered = last;
        if self.waiting.is_empty() {
            encode::basic_nack(out, channel, last, last > first);
        } else {
            (first..=last).for_each(|seq| encode::basic_nack(out, channel, seq, false));
        }
    }

    /// Answers everything that `watermark` makes durable, or that was in a failed round.
    pub fn settle(&mut self, watermark: Round, is_failed: impl Fn(Round) -> bool, channel: u16, out: &mut Vec<u8>) {
        let mut durable = None;
        while let Some(&(until, round)) = self.waiting.front() {
            if round > watermark {
                break;
            }
            self.waiting.pop_front();
            if is_failed(round) {
                if let Some(until) = durable.take() {
                    encode::basic_ack(out, channel, until, true);
                }
                encode::basic_nack(out, channel, until, true);
            } else {
                durable = Some(until);
            }
        }
        if let Some(until) = durable {
            encode::basic_ack(out, channel, until, true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use amq_protocol::{
        frame::{AMQPFrame, parse_frame},
        protocol::{AMQPClass, basic::AMQPMethod},
    };
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// What a client believes after reading the frames: publish number to acked or nacked.
    fn read(mut bytes: &[u8], outstanding: &mut BTreeMap<u64, Round>) -> Vec<(u64, bool)> {
        let mut answers = Vec::new();
        while !bytes.is_empty() {
            let (rest, frame) = parse_frame(bytes).unwrap();
            bytes = rest;
            let (tag, multiple, acked) = match frame {
                AMQPFrame::Method(_, AMQPClass::Basic(AMQPMethod::Ack(ack))) => (ack.delivery_tag, ack.multiple, true),
                AMQPFrame::Method(_, AMQPClass::Basic(AMQPMethod::Nack(nack))) => {
                    (nack.delivery_tag, nack.multiple, false)
                }
                other => panic!("unexpected {other:?}"),
            };
            let covered: Vec<u64> =
                outstanding.keys().copied().filter(|&seq| seq == tag || (multiple && seq < tag)).collect();
            assert!(!covered.is_empty(), "{tag} was answered before");
            for seq in covered {
                outstanding.remove(&seq);
                answers.push((seq, acked));
            }
        }
        answers
    }

    proptest! {
        #[test]
        fn no_confirm_leaves_before_its_round(steps in proptest::collection::vec((0u8..5, 1u64..4), 1..100)) {
            let (mut ledger, mut published, mut watermark, mut open) = (ConfirmLedger::default(), 0, 0, 1);
            let mut outstanding = BTreeMap::new();
            let failed = |round: Round| round % 7 == 3;
            for (step, count) in steps {
                let mut out = Vec::new();
                match step {
                    0..=2 => {
                        let round = if step == 2 { 0 } else { open };
                        (1..=count).for_each(|step| { outstanding.insert(published + step, round); });
                        published += count;
                        ledger.published(published, round, 1, &mut out);
                    }
                    3 => open += 1,
                    _ => {
                        watermark = open;
                        open += 1;
                        ledger.settle(watermark, failed, 1, &mut out);
                    }
                }
                let rounds = outstanding.clone();
                for (seq, acked) in read(&out, &mut outstanding) {
                    let round = rounds[&seq];
                    prop_assert!(round <= watermark);
                    prop_assert_eq!(acked, !failed(round));
                }
            }
            let mut out = Vec::new();
            ledger.settle(open, failed, 1, &mut out);
            read(&out, &mut outstanding);
            prop_assert!(outstanding.is_empty());
        }
    }
}
