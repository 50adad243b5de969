//! One publisher: a thread that keeps its connection full, in step with its pace and its confirm window.
//!
//! A single thread writes and reads: writes are blocks of many messages, and the broker's confirms are
//! read in large blocks in between, or waited for when the window is full. A second thread
//! would cost two wake-ups per round trip, which is most of the latency at a window of 1.

use std::sync::Arc;
use std::time::Duration;

use super::confirms::ConfirmLedger;
use super::connection::{CHANNEL, Connection, PROGRESS_LIMIT};
use super::error::PerfError;
use super::inbox::Inbox;
use super::latencies::Recorder;
use super::message_block::{self, Filling, MessageBlock, MessageShape};
use super::meter::{Control, Meter};
use super::options::{Limit, Plan};
use super::pace::Pace;
use super::posix::{self, monotonic_ns};
use super::wire::{self, Arguments, method};

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
    /// When messages are due; `None` for as fast as it goes. Set when publishing begins, as is the next one.
    pace: Option<Pace>,
    deadline_ns: u64,
    transactions: Option<Transactions>,
    /// Messages may be returned, and no confirm or commit tells when all are.
    awaits_returns: bool,
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
    pub(super) commits: u64,
    pub(super) returned: u64,
    pub(super) blocked_count: u64,
    pub(super) blocked_ns: u64,
    pub(super) error: Option<PerfError>,
}

/// A publisher that commits every so many messages.
#[derive(Debug)]
struct Transactions {
    /// Messages per transaction.
    size: u64,
    /// Messages of the current one.
    open: u64,
    committed: u64,
    latencies: Recorder,
}

/// What a publisher that shares its thread waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    /// This moment, or input.
    Until(u64),
    Input,
    /// It has published everything.
    End,
}

/// What to do next.
enum Turn {
    Send(u64),
    /// Nothing may be sent yet; the broker's words may change that.
    Listen,
    /// The transaction is full.
    Commit,
    /// Nothing is due for so long.
    Rest(Duration),
    Finished,
}

impl Publisher {
    /// Connects publisher `index` of the plan. `latencies` are those of its confirms or commits.
    pub(super) fn open(
        plan: &Plan,
        index: usize,
        control: &Arc<Control>,
        latencies: Recorder,
    ) -> Result<Self, PerfError> {
        let mut connection = Connection::open(&plan.uri)?;
        let (mut ledger, mut transactions) = (None, None);
        if let Some(window) = plan.confirm_window {
            connection.call(method::CONFIRM_SELECT, &Arguments::new().octet(0), method::CONFIRM_SELECT_OK)?;
            ledger = Some(ConfirmLedger::new(window, latencies));
        } else if let Some(size) = plan.tx {
            connection.call(method::TX_SELECT, &Arguments::new(), method::TX_SELECT_OK)?;
            transactions = Some(Transactions { size, open: 0, committed: 0, latencies });
        }
        connection.bound_send_buffer(plan.publisher_count)?;
        connection.set_patience(plan.worker_count())?;
        let limit = plan.limit_of(index);
        Ok(Self {
            block: block(plan, index, limit, connection.frame_max),
            connection,
            limit,
            rate_per_second: plan.rate_per_second,
            phase: index as f64 / plan.publisher_count as f64,
            pace: None,
            deadline_ns: u64::MAX,
            awaits_returns: plan.messages.mandatory && ledger.is_none() && transactions.is_none(),
            inbox: Inbox::new(ledger),
            transactions,
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

    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }

    /// Publishes until its limit, waits for the confirms, and takes leave.
    pub(super) fn run(mut self) -> PublisherOutcome {
        let published = self.publish().and_then(|()| self.round_off());
        self.meter.finish();
        let settled = published.and_then(|()| self.settle());
        self.end(settled)
    }

    /// Takes leave, unless the run was aborted, and hands in the accounts.
    pub(super) fn end(mut self, work: Result<(), PerfError>) -> PublisherOutcome {
        self.meter.finish();
        self.inbox.on_unblocked(monotonic_ns());
        let error = self.connection.finish_after(work, self.control.is_aborted());
        self.meter.set_blocked(false);
        PublisherOutcome {
            confirms: self.inbox.ledger,
            commits: self.inbox.commits,
            returned: self.inbox.returned,
            blocked_count: self.inbox.blocked_count,
            blocked_ns: self.inbox.blocked_ns,
            error,
        }
    }

    /// Lets time and pace begin.
    pub(super) fn begin(&mut self) {
        let start_ns = monotonic_ns();
        self.pace = self.rate_per_second.map(|rate| Pace::new(start_ns, rate, self.phase));
        if self.pace.is_some() {
            posix::use_precise_timers();
        }
        self.deadline_ns = self.limit.duration.map_or(u64::MAX, |duration| start_ns.saturating_add(nanos(duration)));
        self.last_progress_ns = start_ns;
    }

    fn publish(&mut self) -> Result<(), PerfError> {
        self.begin();
        loop {
            let now = monotonic_ns();
            match self.turn(now) {
                Turn::Send(count) => {
                    self.send(count, now)?;
                    if !self.window_is_full() {
                        self.listen(Duration::ZERO)?;
                    }
                }
                Turn::Listen => {
                    self.listen(self.connection.patience())?;
                    self.check_progress("publishing")?;
                }
                Turn::Commit => self.commit()?,
                Turn::Rest(duration) => {
                    self.last_progress_ns = now;
                    self.listen(duration)?;
                }
                Turn::Finished => return Ok(()),
            }
        }
    }

    /// For one that shares its thread: sends what may be sent, and says what to wait for then.
    ///
    /// It waits itself only as long as the socket takes nothing.
    pub(super) fn step(&mut self) -> Result<Wait, PerfError> {
        loop {
            let now = monotonic_ns();
            match self.turn(now) {
                Turn::Send(count) => self.send(count, now)?,
                Turn::Commit => self.commit()?,
                Turn::Listen => {
                    self.check_progress("publishing")?;
                    return Ok(Wait::Input);
                }
                Turn::Rest(duration) => {
                    self.last_progress_ns = now;
                    return Ok(Wait::Until(now.saturating_add(nanos(duration))));
                }
                Turn::Finished => {
                    self.round_off()?;
                    self.meter.finish();
                    return Ok(Wait::End);
                }
            }
        }
    }

    /// Takes in what the broker has said so far.
    pub(super) fn take_in(&mut self) -> Result<(), PerfError> {
        self.listen(Duration::ZERO)
    }

    /// Whether nothing is to be waited for after publishing.
    pub(super) fn is_settled(&self) -> bool {
        let outstanding = self.inbox.ledger.as_ref().map_or(0, ConfirmLedger::outstanding);
        outstanding == 0 && (!self.awaits_returns || self.inbox.has_last_answer)
    }

    fn turn(&self, now_ns: u64) -> Turn {
        let left = self.limit.message_count.unwrap_or(u64::MAX).saturating_sub(self.sent);
        if left == 0 || now_ns >= self.deadline_ns || self.control.is_aborted() {
            return Turn::Finished;
        }
        if self.inbox.is_paused() {
            return Turn::Listen;
        }
        let mut count = self.block.capacity().min(left);
        if let Some(transactions) = &self.transactions {
            if transactions.open >= transactions.size {
                return Turn::Commit;
            }
            count = count.min(transactions.size - transactions.open);
        }
        if let Some(ledger) = &self.inbox.ledger {
            let worthwhile = if self.pace.is_some() { 1 } else { (ledger.window() / WINDOW_PARTS).min(left).max(1) };
            if ledger.free() < worthwhile {
                return Turn::Listen;
            }
            count = count.min(ledger.free());
        }
        if let Some(pace) = &self.pace {
            let due = pace.due(now_ns).saturating_sub(self.sent);
            if due == 0 {
                let next_ns = pace.sending_ns(self.sent).min(self.deadline_ns);
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
    fn send(&mut self, count: u64, now_ns: u64) -> Result<(), PerfError> {
        let (sent, pace) = (self.sent, self.pace);
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
        self.block.advance(complete);
        if let Some(transactions) = &mut self.transactions {
            transactions.open += complete;
        }
        if complete > 0 {
            self.meter.on_messages(complete, now_ns, self.last_write_ns);
        }
        result
    }

    /// Commits what is published, and waits for the answer.
    fn commit(&mut self) -> Result<(), PerfError> {
        let (sent_ns, commits_before) = (monotonic_ns(), self.inbox.commits);
        let mut frame = Vec::new();
        wire::append_method(&mut frame, CHANNEL, method::TX_COMMIT, &Arguments::new());
        self.connection.send_all(&frame, "committing")?;
        self.last_progress_ns = sent_ns;
        while self.inbox.commits == commits_before {
            self.listen(self.connection.patience())?;
            self.check_progress("waiting for a commit")?;
        }
        if let Some(transactions) = &mut self.transactions {
            transactions.committed += std::mem::take(&mut transactions.open);
            transactions.latencies.note(monotonic_ns().saturating_sub(sent_ns), 1);
            transactions.latencies.hand_over();
            self.meter.set_confirmed(transactions.committed);
        }
        Ok(())
    }

    /// After the last message: commits the last transaction, though it is not full, or asks something whose answer
    /// comes behind the last return.
    fn round_off(&mut self) -> Result<(), PerfError> {
        let has_open = self.transactions.as_ref().is_some_and(|transactions| transactions.open > 0);
        if has_open && !self.control.is_aborted() {
            self.commit()?;
        }
        if self.awaits_returns {
            let mut frame = Vec::new();
            let unlimited = Arguments::new().long(0).short(0).octet(0);
            wire::append_method(&mut frame, CHANNEL, method::BASIC_QOS, &unlimited);
            self.connection.send_all(&frame, "asking for returns")?;
        }
        Ok(())
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

    /// Waits for the outstanding confirms and returns, as long as they keep coming. What is still out is in the ledger.
    fn settle(&mut self) -> Result<(), PerfError> {
        self.last_progress_ns = monotonic_ns();
        while !self.is_settled()
            && !self.control.is_aborted()
            && monotonic_ns().saturating_sub(self.last_progress_ns) < nanos(PROGRESS_LIMIT)
        {
            self.listen(self.connection.patience())?;
        }
        Ok(())
    }

    /// Takes in what the broker says, waiting up to `timeout` for its first word.
    fn listen(&mut self, timeout: Duration) -> Result<(), PerfError> {
        let anything = if timeout == self.connection.patience() {
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
        if let Some(ledger) = &mut self.inbox.ledger {
            ledger.latencies.hand_over();
            self.meter.set_confirmed(ledger.acked);
        }
        self.meter.set_refused(self.inbox.refused());
        self.tell_of_blocking();
        self.last_progress_ns = now;
        Ok(())
    }

    /// Shows the supervisor, and once per run the user, that the broker takes nothing.
    fn tell_of_blocking(&mut self) {
        self.meter.set_blocked(self.inbox.is_paused());
        if !self.inbox.blocked_reason.is_empty() {
            let reason = std::mem::take(&mut self.inbox.blocked_reason);
            if self.control.is_first_to_tell() {
                eprintln!("the broker blocks publishers: {reason}");
            }
        }
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

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

fn block(plan: &Plan, index: usize, limit: Limit, frame_max: usize) -> MessageBlock {
    let messages = &plan.messages;
    let shape = MessageShape {
        channel: CHANNEL,
        exchange: &plan.exchange.name,
        routing_key: plan.exchange.routing_key_of(plan.queue_of(index)),
        sizes: &messages.sizes,
        random_body: messages.random_body,
        properties: &messages.properties,
        mandatory: messages.mandatory,
        frame_max,
    };
    let bounds = [plan.confirm_window, plan.tx, limit.message_count, plan.batch];
    MessageBlock::new(
        &shape,
        Filling {
            block_bytes: message_block::block_bytes(plan.publisher_count),
            max_messages: bounds.into_iter().flatten().min().unwrap_or(u64::MAX),
            seed: index as u64,
        },
    )
}
