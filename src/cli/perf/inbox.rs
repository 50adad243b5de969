//! What the broker tells a publisher: confirms, commits, returns, and when to pause.

use super::confirms::ConfirmLedger;
use super::connection::{CHANNEL, Notice, notice};
use super::error::PerfError;
use super::wire::{self, Arguments, Frame, method};

/// What the broker told a publisher.
#[derive(Debug)]
pub(super) struct Inbox {
    pub(super) ledger: Option<ConfirmLedger>,
    blocked_since_ns: Option<u64>,
    pub(super) blocked_count: u64,
    pub(super) blocked_ns: u64,
    /// Why the broker blocked last.
    pub(super) blocked_reason: String,
    flow_stopped: bool,
    /// Mandatory messages that no queue took.
    pub(super) returned: u64,
    /// `tx.commit-ok`s.
    pub(super) commits: u64,
    /// Whether the answer came to what a publisher asked last of all: then it has been told of all returns.
    pub(super) has_last_answer: bool,
    /// Answers that are due.
    pub(super) replies: Vec<u8>,
}

impl Inbox {
    pub(super) fn new(ledger: Option<ConfirmLedger>) -> Self {
        Self {
            ledger,
            blocked_since_ns: None,
            blocked_count: 0,
            blocked_ns: 0,
            blocked_reason: String::new(),
            flow_stopped: false,
            returned: 0,
            commits: 0,
            has_last_answer: false,
            replies: Vec::new(),
        }
    }

    pub(super) fn is_paused(&self) -> bool {
        self.flow_stopped || self.blocked_since_ns.is_some()
    }

    /// Messages that will not arrive: the broker said so.
    pub(super) fn refused(&self) -> u64 {
        self.returned + self.ledger.as_ref().map_or(0, |ledger| ledger.nacked)
    }

    pub(super) fn on_frame(&mut self, frame: &Frame<'_>, now_ns: u64) -> Result<(), PerfError> {
        let Frame::Method { id, arguments, .. } = frame else { return Ok(()) };
        match *id {
            method::BASIC_RETURN => self.returned += 1,
            method::TX_COMMIT_OK => self.commits += 1,
            method::BASIC_QOS_OK => self.has_last_answer = true,
            id => self.on_notice(notice(id, arguments)?, now_ns),
        }
        Ok(())
    }

    fn on_notice(&mut self, notice: Notice<'_>, now_ns: u64) {
        match notice {
            Notice::Confirm { tag, multiple, acked } => {
                if let Some(ledger) = &mut self.ledger {
                    ledger.on_confirm(tag, multiple, acked, now_ns);
                }
            }
            Notice::Blocked { reason } => {
                self.blocked_reason = String::from_utf8_lossy(reason).into_owned();
                self.blocked_count += 1;
                self.blocked_since_ns.get_or_insert(now_ns);
            }
            Notice::Unblocked => self.on_unblocked(now_ns),
            Notice::Flow { active } => {
                self.flow_stopped = !active;
                let answer = Arguments::new().octet(u8::from(active));
                wire::append_method(&mut self.replies, CHANNEL, method::CHANNEL_FLOW_OK, &answer);
            }
            Notice::Cancelled | Notice::Other => {}
        }
    }

    pub(super) fn on_unblocked(&mut self, now_ns: u64) {
        if let Some(since) = self.blocked_since_ns.take() {
            self.blocked_ns += now_ns.saturating_sub(since);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::latencies::LatencyPool;
    use super::*;

    #[test]
    fn a_blocked_publisher_pauses_and_knows_for_how_long() {
        let mut inbox = Inbox::new(None);
        let frame = |id, arguments| Frame::Method { channel: 0, id, arguments };
        inbox.on_frame(&frame(method::CONNECTION_BLOCKED, b"\x03low"), 100).expect("valid");
        assert!(inbox.is_paused());
        inbox.on_frame(&frame(method::CONNECTION_UNBLOCKED, b""), 350).expect("valid");
        assert!(!inbox.is_paused());
        assert_eq!((inbox.blocked_count, inbox.blocked_ns, inbox.blocked_reason.as_str()), (1, 250, "low"));
    }

    #[test]
    fn flow_is_obeyed_and_answered() {
        let mut inbox = Inbox::new(None);
        let flow = |arguments| Frame::Method { channel: 1, id: method::CHANNEL_FLOW, arguments };
        inbox.on_frame(&flow(&[0]), 1).expect("valid");
        assert!(inbox.is_paused());
        assert_eq!(inbox.replies[7..12], [0, 20, 0, 21, 0]);
        inbox.on_frame(&flow(&[1]), 2).expect("valid");
        assert!(!inbox.is_paused());
    }

    #[test]
    fn returns_and_nacks_are_refusals_and_commits_are_counted() {
        let mut ledger = ConfirmLedger::new(10, LatencyPool::new(1).recorder(0));
        ledger.on_sent(1);
        let mut inbox = Inbox::new(Some(ledger));
        let frame = |id, arguments| Frame::Method { channel: 1, id, arguments };
        inbox.on_frame(&frame(method::BASIC_RETURN, &[]), 2).expect("valid");
        inbox.on_frame(&frame(method::BASIC_NACK, &[0, 0, 0, 0, 0, 0, 0, 1, 0]), 2).expect("valid");
        inbox.on_frame(&frame(method::TX_COMMIT_OK, &[]), 2).expect("valid");
        assert_eq!((inbox.refused(), inbox.returned, inbox.commits, inbox.has_last_answer), (2, 1, 1, false));
        inbox.on_frame(&frame(method::BASIC_QOS_OK, &[]), 2).expect("valid");
        assert!(inbox.has_last_answer);
    }
}
