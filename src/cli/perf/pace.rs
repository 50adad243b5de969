//! When a paced publisher's messages are due.

/// When each message of a paced publisher is due, whatever became of those before it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    start_ns: u64,
    interval_ns: f64,
}

impl Pace {
    /// `phase`, from 0 to 1, is where in the interval between two messages the publisher has its turn.
    pub(super) fn new(start_ns: u64, rate_per_second: f64, phase: f64) -> Self {
        let interval_ns = 1e9 / rate_per_second;
        Self { start_ns: start_ns.saturating_add(whole(interval_ns * phase)), interval_ns }
    }

    pub(super) fn sending_ns(&self, index: u64) -> u64 {
        self.start_ns.saturating_add(whole(index as f64 * self.interval_ns))
    }

    /// How many messages are due at `now_ns`, from the first one on.
    pub(super) fn due(&self, now_ns: u64) -> u64 {
        match now_ns.checked_sub(self.start_ns) {
            Some(elapsed) => whole(elapsed as f64 / self.interval_ns).saturating_add(1),
            None => 0,
        }
    }
}

/// Without the fraction; what is out of range becomes the nearest bound.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the cast saturates, which is what is wanted"
)]
fn whole(number: f64) -> u64 {
    number as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_is_due_at_its_times_and_never_catches_its_breath() {
        let pace = Pace::new(1_000, 1e6, 0.0);
        assert_eq!([999, 1_000, 1_999, 2_000, 1_001_000].map(|now| pace.due(now)), [0, 1, 1, 2, 1_001]);
        assert_eq!((pace.sending_ns(0), pace.sending_ns(7)), (1_000, 8_000));
        assert_eq!(Pace::new(1_000, 1e6, 0.5).sending_ns(0), 1_500);
    }
}
