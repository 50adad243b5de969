//! One publisher: a thread that keeps its connection full, in step with its pace and its confirm window.
//!
//! A single thread writes and reads: writes are blocks of many messages, and the broker's confirms are
//! read in large blocks in between, or waited for when the window is full. A second thread
//! would cost two wake-ups per round trip, which is most of the latency at a window of 1.

use std::sync::Arc;
use std::time::Duration;

use super::confirms::ConfirmLedger;
use super::connection::{CHANNEL, Connection, Notice, POLL_INTERVAL, PROGRESS_LIMIT, notice};
use super::error::PerfError;
use super::message_block::{MessageBlock, MessageShape};
use super::meter::{Control, Meter};
use super::options::{Limit, Plan};
use super::posix::{self, monotonic_ns};
use super::wire::{self, Arguments, Frame, method};

/// A broker that said it is blocked may keep a publisher waiting for longer.
const BLOCKED_LIMIT: Duration = Duration::from_secs(60);
/// An unpaced publisher waits until this part of its window is free, so as to send more than crumbs.
const WINDOW_PARTS: u64 = 8;

/// A publisher whose connection is ready.
#[derive(Debug)]
pub(super) struct Publisher {
    connection: Connection,
    block: MessageBlock,
    inbox: Inbox,
    limit: Limit,
    rate_per_second: Option<f64>,
    /// Where in the interval between two messages this publisher has its turn, from 0 to 1.
    phase: f64,
    sent: u64,
    last_write_ns: u64,
    /// The last time that anything went out or came in, or nothing had to.
    last_progress_ns: u64,
    meter: Arc<Meter>,
    control: Arc<Control>,
}

/// How a publisher ended.
#[derive(Debug)]
pub(super) struct PublisherOutcome {
    pub(super) confirms: Option<ConfirmLedger>,
    pub(super) blocked_count: u64,
    pub(super) blocked_ns: u64,
    pub(super) error: Option<PerfError>,
}

/// What to do next.
enum Turn {
    Send(u64),
    /// Nothing may be sent yet; the broker's words may change that.
    Listen,
    /// Nothing is due for so long.
    Rest(Duration),
    Finished,
}

impl Publisher {
    /// Connects publisher `index` of the plan.
    pub(super) fn open(plan: &Plan, index: usize, control: &Arc<Control>) -> Result<Self, PerfError> {
        let mut connection = Connection::open(&plan.uri)?;
        if plan.confirm_window.is_some() {
            connection.call(method::CONFIRM_SELECT, &Arguments::new().octet(0), method::CONFIRM_SELECT_OK)?;
        }
        connection.bound_send_buffer()?;
        let shape = MessageShape {
            channel: CHANNEL,
            exchange: &plan.exchange,
            routing_key: plan.routing_key_of(plan.queue_of(index)),
            size_bytes: plan.size_bytes,
            persistent: plan.persistent,
            frame_max: connection.frame_max,
        };
        let bounds = [plan.confirm_window, plan.limit.message_count, plan.batch];
        let most = bounds.into_iter().flatten().min().unwrap_or(u64::MAX);
        Ok(Self {
            block: MessageBlock::new(&shape, most),
            connection,
            inbox: Inbox::new(plan.confirm_window),
            limit: plan.limit,
            rate_per_second: plan.rate_per_second,
            phase: index as f64 / plan.publisher_count as f64,
            sent: 0,
            last_write_ns: 0,
            last_progress_ns: 0,
            meter: Arc::default(),
            control: control.clone(),
        })
    }

    pub(super) fn meter(&self) -> Arc<Meter> {
        self.meter.clone()
    }

    /// Publishes until its limit, waits for the confirms, and takes leave.
    pub(super) fn run(mut self) -> PublisherOutcome {
        let published = self.publish();
        self.meter.finish();
        let settled = published.and_then(|()| self.settle());
        let now = monotonic_ns();
        self.inbox.on_unblocked(now);
        let error = self.connection.finish_after(settled, self.control.is_aborted());
        PublisherOutcome {
            confirms: self.inbox.ledger,
            blocked_count: self.inbox.blocked_count,
            blocked_ns: self.inbox.blocked_ns,
            error,
        }
    }

    fn publish(&mut self) -> Result<(), PerfError> {
        let start_ns = monotonic_ns();
        let pace = self.rate_per_second.map(|rate| Pace::new(start_ns, rate, self.phase));
        if pace.is_some() {
            posix::use_precise_timers();
        }
        let deadline_ns = self.limit.duration.map_or(u64::MAX, |duration| start_ns.saturating_add(nanos(duration)));
        self.last_progress_ns = start_ns;
        loop {
            let now = monotonic_ns();
            match self.turn(now, deadline_ns, pace.as_ref()) {
                Turn::Send(count) => {
                    self.send(count, now, pace.as_ref())?;
                    if !self.window_is_full() {
                        self.listen(Duration::ZERO)?;
                    }
                }
                Turn::Listen => {
                    self.listen(POLL_INTERVAL)?;
                    self.check_progress("publishing")?;
                }
                Turn::Rest(duration) => {
                    self.last_progress_ns = now;
                    self.listen(duration)?;
                }
                Turn::Finished => return Ok(()),
            }
        }
    }

    fn turn(&self, now_ns: u64, deadline_ns: u64, pace: Option<&Pace>) -> Turn {
        let left = self.limit.message_count.unwrap_or(u64::MAX).saturating_sub(self.sent);
        if left == 0 || now_ns >= deadline_ns || self.control.is_aborted() {
            return Turn::Finished;
        }
        if self.inbox.is_paused() {
            return Turn::Listen;
        }
        let mut count = self.block.capacity().min(left);
        if let Some(ledger) = &self.inbox.ledger {
            let worthwhile = if pace.is_some() { 1 } else { (ledger.window() / WINDOW_PARTS).min(left).max(1) };
            if ledger.free() < worthwhile {
                return Turn::Listen;
            }
            count = count.min(ledger.free());
        }
        if let Some(pace) = pace {
            let due = pace.due(now_ns).saturating_sub(self.sent);
            if due == 0 {
                let next_ns = pace.sending_ns(self.sent).min(deadline_ns);
                return Turn::Rest(Duration::from_nanos(next_ns.saturating_sub(now_ns)));
            }
            count = count.min(due);
        }
        Turn::Send(count)
    }

    fn window_is_full(&self) -> bool {
        self.inbox.ledger.as_ref().is_some_and(|ledger| ledger.free() == 0)
    }

    /// Sends `count` messages in one block, stamped with the time they are sent, or were due.
    fn send(&mut self, count: u64, now_ns: u64, pace: Option<&Pace>) -> Result<(), PerfError> {
        let sent = self.sent;
        let sending_ns = |index| pace.map_or(now_ns, |pace| pace.sending_ns(sent + index));
        self.block.stamp(count, sending_ns);
        if let Some(ledger) = &mut self.inbox.ledger {
            (0..count).for_each(|index| ledger.on_sent(sending_ns(index)));
        }
        let wanted = self.block.messages(count).len();
        let mut written = 0;
        let mut result = Ok(());
        while written < wanted && result.is_ok() {
            result = self.write_from(written, count).map(|more| written += more);
        }
        let complete = self.block.complete_messages(written);
        self.sent += complete;
        if complete > 0 {
            self.meter.on_messages(complete, now_ns, self.last_write_ns);
        }
        result
    }

    /// One write of what is left of a block. A full socket is no reason not to listen.
    fn write_from(&mut self, written: usize, count: u64) -> Result<usize, PerfError> {
        let more = self.connection.write(&self.block.messages(count)[written..], "publishing")?;
        if more > 0 {
            self.last_write_ns = monotonic_ns();
            self.last_progress_ns = self.last_write_ns;
        } else {
            self.listen(Duration::ZERO)?;
            self.check_progress("publishing")?;
        }
        Ok(more)
    }

    /// Waits for the outstanding confirms, as long as they keep coming. What is still out is in the ledger.
    fn settle(&mut self) -> Result<(), PerfError> {
        self.last_progress_ns = monotonic_ns();
        while self.inbox.ledger.as_ref().is_some_and(|ledger| ledger.outstanding() > 0)
            && !self.control.is_aborted()
            && monotonic_ns().saturating_sub(self.last_progress_ns) < nanos(PROGRESS_LIMIT)
        {
            self.listen(POLL_INTERVAL)?;
        }
        Ok(())
    }

    /// Takes in what the broker says, waiting up to `timeout` for its first word.
    fn listen(&mut self, timeout: Duration) -> Result<(), PerfError> {
        let anything = if timeout == POLL_INTERVAL {
            self.connection.read("publishing")? // which waits just so long by itself
        } else {
            self.connection.read_within(timeout, "publishing")?
        };
        if !anything {
            return Ok(());
        }
        let now = monotonic_ns();
        while let Some(frame) = self.connection.reader.next_frame()? {
            self.inbox.on_frame(&frame, now)?;
        }
        if !self.inbox.replies.is_empty() {
            self.connection.send_all(&self.inbox.replies, "answering channel.flow")?;
            self.inbox.replies.clear();
        }
        if let Some(ledger) = &self.inbox.ledger {
            self.meter.set_confirmed(ledger.acked);
        }
        self.last_progress_ns = now;
        Ok(())
    }

    fn check_progress(&self, during: &'static str) -> Result<(), PerfError> {
        let limit = if self.inbox.is_paused() { BLOCKED_LIMIT } else { PROGRESS_LIMIT };
        let idle = Duration::from_nanos(monotonic_ns().saturating_sub(self.last_progress_ns));
        if idle < limit && !self.control.is_aborted() {
            return Ok(());
        }
        let during = match &self.inbox.ledger {
            Some(ledger) if ledger.free() == 0 => "waiting for confirms",
            _ if self.inbox.is_paused() => "waiting for the broker to unblock",
            _ => during,
        };
        Err(PerfError::Stalled { during, seconds: idle.as_secs() })
    }
}

/// What the broker told a publisher.
#[derive(Debug)]
struct Inbox {
    ledger: Option<ConfirmLedger>,
    blocked_since_ns: Option<u64>,
    blocked_count: u64,
    blocked_ns: u64,
    flow_stopped: bool,
    /// Answers that are due.
    replies: Vec<u8>,
}

impl Inbox {
    fn new(confirm_window: Option<u64>) -> Self {
        Self {
            ledger: confirm_window.map(ConfirmLedger::new),
            blocked_since_ns: None,
            blocked_count: 0,
            blocked_ns: 0,
            flow_stopped: false,
            replies: Vec::new(),
        }
    }

    fn is_paused(&self) -> bool {
        self.flow_stopped || self.blocked_since_ns.is_some()
    }

    fn on_frame(&mut self, frame: &Frame<'_>, now_ns: u64) -> Result<(), PerfError> {
        let Frame::Method { id, arguments, .. } = frame else { return Ok(()) };
        match notice(*id, arguments)? {
            Notice::Confirm { tag, multiple, acked } => {
                if let Some(ledger) = &mut self.ledger {
                    ledger.on_confirm(tag, multiple, acked, now_ns);
                }
            }
            Notice::Blocked { reason } => {
                eprintln!("the broker blocks this publisher: {}", String::from_utf8_lossy(reason));
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
        Ok(())
    }

    fn on_unblocked(&mut self, now_ns: u64) {
        if let Some(since) = self.blocked_since_ns.take() {
            self.blocked_ns += now_ns.saturating_sub(since);
        }
    }
}

/// When each message of a paced publisher is due, whatever became of those before it.
#[derive(Debug, Clone, Copy)]
struct Pace {
    start_ns: u64,
    interval_ns: f64,
}

impl Pace {
    fn new(start_ns: u64, rate_per_second: f64, phase: f64) -> Self {
        let interval_ns = 1e9 / rate_per_second;
        Self { start_ns: start_ns.saturating_add(whole(interval_ns * phase)), interval_ns }
    }

    fn sending_ns(&self, index: u64) -> u64 {
        self.start_ns.saturating_add(whole(index as f64 * self.interval_ns))
    }

    /// How many messages are due at `now_ns`, from the first one on.
    fn due(&self, now_ns: u64) -> u64 {
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

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
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

    #[test]
    fn a_blocked_publisher_pauses_and_knows_for_how_long() {
        let mut inbox = Inbox::new(None);
        let frame = |id, arguments| Frame::Method { channel: 0, id, arguments };
        inbox.on_frame(&frame(method::CONNECTION_BLOCKED, b"\x03low"), 100).expect("valid");
        assert!(inbox.is_paused());
        inbox.on_frame(&frame(method::CONNECTION_UNBLOCKED, b""), 350).expect("valid");
        assert!(!inbox.is_paused());
        assert_eq!((inbox.blocked_count, inbox.blocked_ns), (1, 250));
    }

    #[test]
    fn flow_is_obeyed_and_answered() {
        let mut inbox = Inbox::new(Some(1));
        let flow = |arguments| Frame::Method { channel: 1, id: method::CHANNEL_FLOW, arguments };
        inbox.on_frame(&flow(&[0]), 1).expect("valid");
        assert!(inbox.is_paused());
        assert_eq!(inbox.replies[7..12], [0, 20, 0, 21, 0]);
        inbox.on_frame(&flow(&[1]), 2).expect("valid");
        assert!(!inbox.is_paused());
    }
}
