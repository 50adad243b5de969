//! One consumer: a thread that reads deliveries in large blocks, checks, counts and acknowledges them.

use std::sync::Arc;

use super::connection::{CHANNEL, Connection, Notice, notice};
use super::error::PerfError;
use super::message_block::sending_ns;
use super::meter::{Control, Latencies, Meter};
use super::options::Plan;
use super::posix::monotonic_ns;
use super::topology;
use super::wire::{self, Arguments, Frame, WireError, method};

/// Short, as it comes back with every delivery.
const CONSUMER_TAG: &str = "c";
const CONSUME_NO_ACK: u8 = 1 << 1;

/// A consumer whose connection is ready and whose deliveries may be on their way.
#[derive(Debug)]
pub(super) struct Consumer {
    connection: Connection,
    intake: Intake,
    queue: String,
    /// Stop by itself after so many.
    message_count: Option<u64>,
    delivered: u64,
    meter: Arc<Meter>,
    control: Arc<Control>,
}

/// How a consumer ended.
#[derive(Debug)]
pub(super) struct ConsumerOutcome {
    pub(super) latencies: Latencies,
    pub(super) redelivered: u64,
    pub(super) wrong_size: u64,
    pub(super) error: Option<PerfError>,
}

impl Consumer {
    /// Connects consumer `index` of the plan and starts its deliveries.
    pub(super) fn open(plan: &Plan, index: usize, control: &Arc<Control>) -> Result<Self, PerfError> {
        let mut connection = Connection::open(&plan.uri)?;
        let queue = plan.queue_of(index);
        if plan.queues.exclusive {
            topology::declare(&mut connection, plan, queue)?;
        }
        if plan.prefetch > 0 {
            let qos = Arguments::new().long(0).short(plan.prefetch).octet(0);
            connection.call(method::BASIC_QOS, &qos, method::BASIC_QOS_OK)?;
        }
        let flags = if plan.ack_batch == 0 { CONSUME_NO_ACK } else { 0 };
        let consume =
            Arguments::new().short(0).short_string(queue).short_string(CONSUMER_TAG).octet(flags).empty_table();
        connection.call(method::BASIC_CONSUME, &consume, method::BASIC_CONSUME_OK)?;
        Ok(Self {
            connection,
            intake: Intake { run_start_ns: monotonic_ns(), ..Intake::new(plan) },
            queue: queue.to_owned(),
            message_count: plan.limit.message_count.filter(|_| plan.publisher_count == 0),
            delivered: 0,
            meter: Arc::default(),
            control: control.clone(),
        })
    }

    pub(super) fn meter(&self) -> Arc<Meter> {
        self.meter.clone()
    }

    /// Consumes until it is stopped or has its fill, acknowledges the rest, and takes leave.
    pub(super) fn run(mut self) -> ConsumerOutcome {
        let consumed = self.consume();
        self.meter.finish();
        let error = self.connection.finish_after(consumed, self.control.is_aborted());
        ConsumerOutcome {
            latencies: self.intake.latencies,
            redelivered: self.intake.redelivered,
            wrong_size: self.intake.wrong_size,
            error,
        }
    }

    fn consume(&mut self) -> Result<(), PerfError> {
        loop {
            self.take_block()?;
            if self.control.consumers_stopped() || self.message_count.is_some_and(|count| self.delivered >= count) {
                self.intake.acks.flush();
                return self.send_acks();
            }
            if !self.connection.read("consuming")? {
                self.intake.acks.flush(); // idle: the last, partial batch
                self.send_acks()?;
            }
        }
    }

    /// Takes in the deliveries of one read, and sends their acks in one write.
    fn take_block(&mut self) -> Result<(), PerfError> {
        let now = monotonic_ns();
        self.intake.sampled = false;
        while let Some(frame) = self.connection.reader.next_frame()? {
            match self.intake.on_frame(&frame, now) {
                Ok(()) => {}
                Err(PerfError::Cancelled { .. }) => return Err(PerfError::Cancelled { queue: self.queue.clone() }),
                Err(error) => return Err(error),
            }
        }
        let count = std::mem::take(&mut self.intake.delivered);
        if count > 0 {
            self.delivered += count;
            self.meter.on_messages(count, now, now);
        }
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

/// Puts deliveries together and measures them.
#[derive(Debug)]
struct Intake {
    acks: Acks,
    /// `None`: bodies of any size, for they may be another program's.
    expected_size: Option<u64>,
    /// Older stamps are another run's.
    run_start_ns: u64,
    /// Measure every message instead of the first of each read, which is the oldest.
    measure_all: bool,
    /// The current read has its measured message.
    sampled: bool,
    tag: u64,
    body_left: u64,
    stamp: Stamp,
    /// Since the caller last took the number.
    delivered: u64,
    redelivered: u64,
    wrong_size: u64,
    latencies: Latencies,
}

/// The time stamp of the message that is arriving.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stamp {
    /// Its first body frame is yet to come.
    Awaited,
    Absent,
    SentAt(u64),
}

impl Intake {
    fn new(plan: &Plan) -> Self {
        Self {
            acks: Acks { batch: plan.ack_batch, unacked: 0, last_tag: 0, frames: Vec::new() },
            expected_size: (plan.publisher_count > 0).then(|| u64::try_from(plan.size_bytes).unwrap_or(u64::MAX)),
            run_start_ns: 0,
            measure_all: plan.rate_per_second.is_some() || plan.publisher_count == 0,
            sampled: false,
            tag: 0,
            body_left: 0,
            stamp: Stamp::Absent,
            delivered: 0,
            redelivered: 0,
            wrong_size: 0,
            latencies: Latencies::new(),
        }
    }

    /// Hot path: three calls per message. No clock, no allocation except for acks.
    #[inline]
    fn on_frame(&mut self, frame: &Frame<'_>, now_ns: u64) -> Result<(), PerfError> {
        match frame {
            Frame::Method { id: method::BASIC_DELIVER, arguments, .. } => {
                let (tag, redelivered) = delivery(arguments).ok_or(WireError::Truncated("basic.deliver"))?;
                self.tag = tag;
                self.redelivered += u64::from(redelivered);
            }
            Frame::Header { body_size } => {
                self.wrong_size += u64::from(self.expected_size.is_some_and(|expected| expected != *body_size));
                self.body_left = *body_size;
                self.stamp = Stamp::Awaited;
                if *body_size == 0 {
                    self.on_message(now_ns);
                }
            }
            Frame::Body { payload } => {
                if self.stamp == Stamp::Awaited {
                    self.stamp = sending_ns(payload).map_or(Stamp::Absent, Stamp::SentAt);
                }
                let length = payload.len() as u64;
                self.body_left = self.body_left.checked_sub(length).ok_or(WireError::Unexpected("body bytes"))?;
                if self.body_left == 0 {
                    self.on_message(now_ns);
                }
            }
            Frame::Method { id, arguments, .. } => self.on_notice(&notice(*id, arguments)?)?,
            Frame::Heartbeat => {}
        }
        Ok(())
    }

    /// A message is complete.
    #[inline]
    fn on_message(&mut self, now_ns: u64) {
        self.delivered += 1;
        if let Stamp::SentAt(sent_ns) = self.stamp
            && (self.measure_all || !self.sampled)
            && (self.run_start_ns..=now_ns).contains(&sent_ns)
        {
            self.sampled = true;
            self.latencies.record(now_ns - sent_ns, 1);
        }
        self.acks.on_delivery(self.tag);
    }

    fn on_notice(&mut self, notice: &Notice<'_>) -> Result<(), PerfError> {
        match notice {
            Notice::Cancelled => Err(PerfError::Cancelled { queue: String::new() }),
            Notice::Flow { active } => {
                let answer = Arguments::new().octet(u8::from(*active));
                wire::append_method(&mut self.acks.frames, CHANNEL, method::CHANNEL_FLOW_OK, &answer);
                Ok(())
            }
            Notice::Blocked { .. } | Notice::Unblocked | Notice::Confirm { .. } | Notice::Other => Ok(()),
        }
    }
}

/// Delivery tag and redelivered flag of a `basic.deliver`.
#[inline]
fn delivery(arguments: &[u8]) -> Option<(u64, bool)> {
    let (&tag_length, rest) = arguments.split_first()?;
    let (tag, rest) = rest.get(usize::from(tag_length)..)?.split_first_chunk()?;
    Some((u64::from_be_bytes(*tag), rest.first()? & 1 != 0))
}

/// Acknowledgements on their way out.
#[derive(Debug)]
struct Acks {
    /// 0: none are owed.
    batch: u32,
    unacked: u32,
    last_tag: u64,
    frames: Vec<u8>,
}

impl Acks {
    #[inline]
    fn on_delivery(&mut self, tag: u64) {
        if self.batch == 0 {
            return;
        }
        self.last_tag = tag;
        self.unacked += 1;
        if self.unacked >= self.batch {
            self.flush();
        }
    }

    /// Acknowledges what is not yet, full batch or not.
    fn flush(&mut self) {
        if self.unacked > 0 {
            wire::append_ack(&mut self.frames, CHANNEL, self.last_tag, self.unacked > 1);
            self.unacked = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::super::options::PerfArgs;
    use super::super::wire::FrameReader;
    use super::*;

    #[derive(Parser)]
    struct CommandLine {
        #[command(flatten)]
        perf: PerfArgs,
    }

    fn intake(options: &str) -> Intake {
        let words = std::iter::once("perf").chain(options.split_whitespace());
        let plan = CommandLine::try_parse_from(words).expect(options).perf.into_plan().expect(options);
        Intake::new(&plan)
    }

    fn append_delivery(out: &mut Vec<u8>, tag: u64, redelivered: bool, body: &[u8]) {
        let deliver =
            [Arguments::new().short_string(CONSUMER_TAG).as_bytes(), &tag.to_be_bytes(), &[redelivered.into()]]
                .concat();
        let mut frame = vec![1, 0, 1];
        let names = Arguments::new().short_string("").short_string("q");
        frame.extend((4 + u32::try_from(deliver.len() + names.as_bytes().len()).expect("small")).to_be_bytes());
        frame.extend([0, 60, 0, 60]);
        frame.extend(deliver);
        frame.extend(names.as_bytes());
        frame.push(0xCE);
        out.extend(frame);
        wire::append_content(out, CHANNEL, body, false, 20);
    }

    fn feed(intake: &mut Intake, mut bytes: &[u8], now_ns: u64) -> Result<(), PerfError> {
        let mut reader = FrameReader::new();
        reader.fill(&mut bytes).expect("slice");
        while let Some(frame) = reader.next_frame().expect("valid") {
            intake.on_frame(&frame, now_ns)?;
        }
        Ok(())
    }

    fn body(stamp: u64, length: usize) -> Vec<u8> {
        let mut body = stamp.to_le_bytes().to_vec();
        body.resize(length, 0);
        body
    }

    #[test]
    fn a_message_counts_when_its_last_body_frame_is_in() {
        let mut intake = intake("--size 30 --rate 1");
        let mut bytes = Vec::new();
        append_delivery(&mut bytes, 1, true, &body(500, 30));
        append_delivery(&mut bytes, 2, false, &body(600, 16));
        append_delivery(&mut bytes, 3, false, &[]);
        feed(&mut intake, &bytes, 1_000).expect("valid");
        assert_eq!((intake.delivered, intake.redelivered, intake.wrong_size), (3, 1, 2));
        assert_eq!(intake.latencies.count(), 2);
    }

    #[test]
    fn unpaced_only_the_first_of_a_read_is_measured_and_no_stamp_of_another_run() {
        let mut intake = intake("");
        intake.run_start_ns = 100;
        let mut bytes = Vec::new();
        for (tag, stamp) in [(1, 99), (2, 2_000), (3, 400), (4, 500)] {
            append_delivery(&mut bytes, tag, false, &body(stamp, 16));
        }
        feed(&mut intake, &bytes, 1_000).expect("valid");
        assert_eq!((intake.delivered, intake.latencies.count()), (4, 1));
        assert!(intake.latencies.max_ns().abs_diff(600) < 64);
    }

    #[test]
    fn acks_cover_full_batches_and_the_rest_when_flushed() {
        let mut acks = Acks { batch: 2, unacked: 0, last_tag: 0, frames: Vec::new() };
        (1..=5).for_each(|tag| acks.on_delivery(tag));
        acks.flush();
        acks.flush();
        let mut expected = Vec::new();
        wire::append_ack(&mut expected, CHANNEL, 2, true);
        wire::append_ack(&mut expected, CHANNEL, 4, true);
        wire::append_ack(&mut expected, CHANNEL, 5, false);
        assert_eq!(acks.frames, expected);
        let mut none = Acks { batch: 0, unacked: 0, last_tag: 0, frames: Vec::new() };
        none.on_delivery(1);
        none.flush();
        assert!(none.frames.is_empty());
    }

    #[test]
    fn nonsense_is_an_error_and_not_a_panic() {
        let on = |frame: Frame<'_>| intake("").on_frame(&frame, 1).expect_err("refused");
        let deliver = |arguments| Frame::Method { channel: 1, id: method::BASIC_DELIVER, arguments };
        assert!(matches!(on(deliver(&[])), PerfError::Wire(_)));
        assert!(matches!(on(deliver(&[200, 0, 0])), PerfError::Wire(_)));
        assert!(matches!(on(Frame::Body { payload: b"x" }), PerfError::Wire(_)));
        let cancel = Frame::Method { channel: 1, id: method::BASIC_CANCEL, arguments: &[1, b'c', 0] };
        assert!(matches!(on(cancel), PerfError::Cancelled { .. }));
    }
}
