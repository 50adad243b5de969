//! One consumer: a thread that reads deliveries in large blocks, checks, counts and acknowledges them.
//!
//! A consumer that works on each message, or asks for each one, takes them one by one instead.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::connection::{CHANNEL, Connection, PROGRESS_LIMIT};
use super::error::PerfError;
use super::fields;
use super::intake::Intake;
use super::latencies::Recorder;
use super::meter::{Control, Meter};
use super::options::Plan;
use super::posix::{self, monotonic_ns};
use super::topology;
use super::wire::{self, Arguments, method};

/// Short, as it comes back with every delivery.
const CONSUMER_TAG: &str = "c";
const CONSUME_NO_ACK: u8 = 1 << 1;
const GET_NO_ACK: u8 = 1;
/// A long work on a message is done in pieces, between which the consumer looks whether it is to stop.
const WORK_PIECE: Duration = Duration::from_millis(100);

/// A consumer whose connection is ready and whose deliveries may be on their way.
#[derive(Debug)]
pub(super) struct Consumer {
    connection: Connection,
    intake: Intake,
    queue: String,
    /// Stop by itself after so many.
    message_count: Option<u64>,
    delivered: u64,
    acknowledges: bool,
    work: Duration,
    polling_interval: Option<Duration>,
    meter: Arc<Meter>,
    control: Arc<Control>,
}

/// How a consumer ended.
#[derive(Debug)]
pub(super) struct ConsumerOutcome {
    pub(super) redelivered: u64,
    pub(super) wrong_size: u64,
    pub(super) rejected: u64,
    /// Gets that found the queue empty.
    pub(super) empty_gets: u64,
    pub(super) error: Option<PerfError>,
}

impl Consumer {
    /// Connects consumer `index` of the plan and, unless it polls, starts its deliveries.
    pub(super) fn open(
        plan: &Plan,
        index: usize,
        control: &Arc<Control>,
        latencies: Recorder,
    ) -> Result<Self, PerfError> {
        let mut connection = Connection::open(&plan.uri)?;
        let queue = plan.queue_of(index).to_owned();
        if plan.queues.exclusive {
            topology::declare(&mut connection, plan, std::slice::from_ref(&queue))?;
        }
        let consuming = &plan.consuming;
        if consuming.polling_interval.is_none() {
            subscribe(&mut connection, plan, &queue)?;
        }
        connection.set_patience(plan.worker_count())?;
        Ok(Self {
            connection,
            intake: Intake::new(plan, monotonic_ns(), latencies),
            queue,
            message_count: plan.limit_of(index).message_count.filter(|_| plan.publisher_count == 0),
            delivered: 0,
            acknowledges: consuming.ack_batch > 0,
            work: consuming.work,
            polling_interval: consuming.polling_interval,
            meter: Arc::default(),
            control: control.clone(),
        })
    }

    pub(super) fn meter(&self) -> Arc<Meter> {
        self.meter.clone()
    }

    /// Consumes until it is stopped or has its fill, acknowledges the rest, and takes leave.
    pub(super) fn run(mut self) -> ConsumerOutcome {
        if self.polling_interval.is_some() || !self.work.is_zero() {
            posix::use_precise_timers();
        }
        let consumed = match self.polling_interval {
            Some(interval) => self.poll(interval),
            None => self.consume(),
        };
        self.end(consumed)
    }

    /// Takes leave, unless the run was aborted, and hands in the accounts.
    pub(super) fn end(mut self, consumed: Result<(), PerfError>) -> ConsumerOutcome {
        self.intake.latencies.hand_over();
        self.meter.finish();
        let error = self.connection.finish_after(consumed, self.control.is_aborted());
        ConsumerOutcome {
            redelivered: self.intake.redelivered,
            wrong_size: self.intake.wrong_size,
            rejected: self.intake.acks.nacked,
            empty_gets: self.intake.empties,
            error,
        }
    }

    pub(super) fn connection(&self) -> &Connection {
        &self.connection
    }

    /// For one that shares its thread: reads once, and takes in all that is there.
    pub(super) fn take_in(&mut self) -> Result<(), PerfError> {
        self.connection.read("consuming")?;
        self.take_block()
    }

    fn is_over(&self) -> bool {
        self.control.consumers_stopped() || self.has_its_fill()
    }

    pub(super) fn has_its_fill(&self) -> bool {
        self.message_count.is_some_and(|count| self.delivered >= count)
    }

    fn consume(&mut self) -> Result<(), PerfError> {
        loop {
            if self.work.is_zero() {
                self.take_block()?;
            } else {
                self.work_through()?;
            }
            if self.is_over() {
                return self.send_last_acks();
            }
            if !self.connection.read("consuming")? {
                self.send_last_acks()?; // idle: the last, partial batch
            }
        }
    }

    /// Takes in the deliveries of one read, and sends their acks in one write.
    pub(super) fn take_block(&mut self) -> Result<(), PerfError> {
        let now = monotonic_ns();
        self.intake.sampled = false;
        while let Some(frame) = self.connection.reader.next_frame()? {
            self.intake.on_frame(&frame, now).map_err(|error| name_queue(error, &self.queue))?;
        }
        self.count_delivered(now);
        self.send_acks()
    }

    /// Works on the deliveries of one read, and acknowledges each batch when it is done.
    fn work_through(&mut self) -> Result<(), PerfError> {
        while !self.is_over()
            && let Some(frame) = self.connection.reader.next_frame()?
        {
            let (now, had_nacked) = (monotonic_ns(), self.intake.acks.nacked);
            self.intake.on_frame(&frame, now).map_err(|error| name_queue(error, &self.queue))?;
            let is_complete = self.count_delivered(now) > 0 || self.intake.acks.nacked > had_nacked;
            if is_complete {
                self.work();
                self.send_acks()?;
            }
        }
        self.send_acks()
    }

    /// Tells meter and recorder of the messages that are complete; returns how many there were.
    fn count_delivered(&mut self, now_ns: u64) -> u64 {
        let count = std::mem::take(&mut self.intake.delivered);
        if count > 0 {
            self.delivered += count;
            self.meter.on_messages(count, now_ns, now_ns);
        }
        self.intake.latencies.hand_over();
        count
    }

    fn work(&self) {
        let done = Instant::now() + self.work;
        while !self.control.is_aborted() {
            let left = done.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            thread::sleep(left.min(WORK_PIECE));
        }
    }

    /// Asks for one message after the other.
    fn poll(&mut self, interval: Duration) -> Result<(), PerfError> {
        let flags = if self.acknowledges { 0 } else { GET_NO_ACK };
        let get = Arguments::new().short(0).short_string(&self.queue).octet(flags);
        while !self.is_over() {
            // Acks travel in front of the next request, in the same write.
            wire::append_method(&mut self.intake.acks.frames, CHANNEL, method::BASIC_GET, &get);
            self.send_acks()?;
            if self.await_message()? {
                self.work();
            } else {
                self.send_last_acks()?;
                thread::sleep(interval);
            }
        }
        self.send_last_acks()
    }

    /// Waits for the answer to a get; says whether it was a message.
    fn await_message(&mut self) -> Result<bool, PerfError> {
        let (empties, nacked) = (self.intake.empties, self.intake.acks.nacked);
        let asked = Instant::now();
        loop {
            while let Some(frame) = self.connection.reader.next_frame()? {
                let now = monotonic_ns();
                self.intake.on_frame(&frame, now)?;
                if self.count_delivered(now) > 0 || self.intake.acks.nacked > nacked {
                    return Ok(true);
                }
                if self.intake.empties > empties {
                    return Ok(false);
                }
            }
            if !self.connection.read("polling")? && (asked.elapsed() > PROGRESS_LIMIT || self.control.is_aborted()) {
                return Err(PerfError::Stalled { during: "polling", seconds: asked.elapsed().as_secs() });
            }
        }
    }

    /// Acknowledges what is not yet, full batch or not.
    pub(super) fn send_last_acks(&mut self) -> Result<(), PerfError> {
        self.intake.acks.flush();
        self.send_acks()
    }

    fn send_acks(&mut self) -> Result<(), PerfError> {
        let frames = &mut self.intake.acks.frames;
        if !frames.is_empty() {
            self.connection.send_all(frames, "acknowledging")?;
            frames.clear();
        }
        Ok(())
    }
}

fn subscribe(connection: &mut Connection, plan: &Plan, queue: &str) -> Result<(), PerfError> {
    let consuming = &plan.consuming;
    if consuming.prefetch > 0 {
        let qos = Arguments::new().long(0).short(consuming.prefetch).octet(0);
        connection.call(method::BASIC_QOS, &qos, method::BASIC_QOS_OK)?;
    }
    let flags = if consuming.ack_batch == 0 { CONSUME_NO_ACK } else { 0 };
    let consume = Arguments::new().short(0).short_string(queue).short_string(CONSUMER_TAG).octet(flags);
    let consume = fields::table(consume, &consuming.arguments);
    connection.call(method::BASIC_CONSUME, &consume, method::BASIC_CONSUME_OK).map(drop)
}

fn name_queue(error: PerfError, queue: &str) -> PerfError {
    match error {
        PerfError::Cancelled { .. } => PerfError::Cancelled { queue: queue.to_owned() },
        error => error,
    }
}
