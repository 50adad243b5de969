//! Puts a consumer's deliveries together, checks, counts and measures them, and acknowledges or rejects.

use super::connection::{CHANNEL, Notice, notice};
use super::error::PerfError;
use super::latencies::Recorder;
use super::message_block::sending_ns;
use super::options::{Plan, Sizes};
use super::wire::{self, Arguments, Frame, MethodId, WireError, method};

/// Puts deliveries together and measures them.
#[derive(Debug)]
pub(super) struct Intake {
    pub(super) acks: Acks,
    /// `None`: bodies of any size, for they may be another program's.
    expected: Option<Sizes>,
    /// Older stamps are another run's.
    run_start_ns: u64,
    /// Measure every message instead of the first of each read, which is the oldest.
    measure_all: bool,
    /// The current read has its measured message.
    pub(super) sampled: bool,
    tag: u64,
    body_left: u64,
    stamp: Stamp,
    /// Complete messages since the caller last took the number, without those that were requeued.
    pub(super) delivered: u64,
    pub(super) redelivered: u64,
    pub(super) wrong_size: u64,
    /// `basic.get-empty`s.
    pub(super) empties: u64,
    pub(super) latencies: Recorder,
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
    pub(super) fn new(plan: &Plan, run_start_ns: u64, latencies: Recorder) -> Self {
        let consuming = &plan.consuming;
        let takes_one_by_one = consuming.polling_interval.is_some() || !consuming.work.is_zero();
        Self {
            acks: Acks::new(consuming.ack_batch, consuming.nack_every, consuming.requeue),
            expected: (plan.publisher_count > 0).then(|| plan.messages.sizes.clone()),
            run_start_ns,
            measure_all: plan.rate_per_second.is_some() || plan.publisher_count == 0 || takes_one_by_one,
            sampled: false,
            tag: 0,
            body_left: 0,
            stamp: Stamp::Absent,
            delivered: 0,
            redelivered: 0,
            wrong_size: 0,
            empties: 0,
            latencies,
        }
    }

    /// Hot path: three calls per message. No clock, no allocation except for acks.
    #[inline(always)] // for the same reason as `FrameReader::next_frame`
    pub(super) fn on_frame(&mut self, frame: &Frame<'_>, now_ns: u64) -> Result<(), PerfError> {
        match frame {
            Frame::Method { id: method::BASIC_DELIVER, arguments, .. } => {
                let (tag, redelivered) = delivery(arguments).ok_or(WireError::Truncated("basic.deliver"))?;
                self.tag = tag;
                self.redelivered += u64::from(redelivered);
            }
            Frame::Header { body_size } => {
                self.wrong_size += u64::from(self.expected.as_ref().is_some_and(|sizes| !sizes.admit(*body_size)));
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
            Frame::Method { id, arguments, .. } => self.on_method(*id, arguments)?,
            Frame::Heartbeat => {}
        }
        Ok(())
    }

    /// A message is complete.
    #[inline]
    fn on_message(&mut self, now_ns: u64) {
        if let Stamp::SentAt(sent_ns) = self.stamp
            && (self.measure_all || !self.sampled)
            && (self.run_start_ns..=now_ns).contains(&sent_ns)
        {
            self.sampled = true;
            self.latencies.note(now_ns - sent_ns, 1);
        }
        self.delivered += u64::from(self.acks.on_delivery(self.tag));
    }

    /// Any method but a delivery.
    fn on_method(&mut self, id: MethodId, arguments: &[u8]) -> Result<(), PerfError> {
        match id {
            method::BASIC_GET_OK => {
                let (tag, redelivered) = delivered(arguments).ok_or(WireError::Truncated("basic.get-ok"))?;
                self.tag = tag;
                self.redelivered += u64::from(redelivered);
                Ok(())
            }
            method::BASIC_GET_EMPTY => {
                self.empties += 1;
                Ok(())
            }
            _ => self.on_notice(&notice(id, arguments)?),
        }
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
    delivered(rest.get(usize::from(tag_length)..)?)
}

/// The same, of a `basic.get-ok`, which has no consumer tag before them.
#[inline]
fn delivered(arguments: &[u8]) -> Option<(u64, bool)> {
    let (tag, rest) = arguments.split_first_chunk()?;
    Some((u64::from_be_bytes(*tag), rest.first()? & 1 != 0))
}

/// Acknowledgements and rejections on their way out.
#[derive(Debug)]
pub(super) struct Acks {
    /// 0: none are owed.
    batch: u32,
    unacked: u32,
    last_tag: u64,
    /// `None`: nothing is rejected. Never 0.
    nack_every: Option<u64>,
    requeue: bool,
    until_nack: u64,
    pub(super) nacked: u64,
    pub(super) frames: Vec<u8>,
}

impl Acks {
    fn new(batch: u32, nack_every: Option<u64>, requeue: bool) -> Self {
        Self {
            batch,
            unacked: 0,
            last_tag: 0,
            nack_every,
            requeue,
            until_nack: nack_every.unwrap_or(0),
            nacked: 0,
            frames: Vec::new(),
        }
    }

    /// Says whether the message is done with; the others come again.
    #[inline]
    fn on_delivery(&mut self, tag: u64) -> bool {
        if self.batch == 0 {
            return true;
        }
        if let Some(every) = self.nack_every {
            self.until_nack -= 1;
            if self.until_nack == 0 {
                self.until_nack = every;
                return self.reject(tag);
            }
        }
        self.last_tag = tag;
        self.unacked += 1;
        if self.unacked >= self.batch {
            self.flush();
        }
        true
    }

    /// Acknowledges those before it first, for an ack of many would cover it too.
    #[cold]
    fn reject(&mut self, tag: u64) -> bool {
        self.flush();
        wire::append_nack(&mut self.frames, CHANNEL, tag, self.requeue);
        self.nacked += 1;
        !self.requeue
    }

    /// Acknowledges what is not yet, full batch or not.
    #[inline]
    pub(super) fn flush(&mut self) {
        if self.unacked > 0 {
            wire::append_ack(&mut self.frames, CHANNEL, self.last_tag, self.unacked > 1);
            self.unacked = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::latencies::LatencyPool;
    use super::super::options::test_plan;
    use super::super::wire::FrameReader;
    use super::*;

    const CONSUMER_TAG: &str = "c";

    fn intake(options: &str) -> Intake {
        Intake::new(&test_plan(options), 0, LatencyPool::new(1).recorder(0))
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
        assert_eq!(intake.latencies.noted(), [(500, 1), (400, 1)]);
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
        assert_eq!((intake.delivered, intake.latencies.noted()), (4, &[(600, 1)][..]));
    }

    #[test]
    fn acks_cover_full_batches_and_the_rest_when_flushed() {
        let mut acks = Acks::new(2, None, false);
        (1..=5).for_each(|tag| assert!(acks.on_delivery(tag)));
        acks.flush();
        acks.flush();
        let mut expected = Vec::new();
        wire::append_ack(&mut expected, CHANNEL, 2, true);
        wire::append_ack(&mut expected, CHANNEL, 4, true);
        wire::append_ack(&mut expected, CHANNEL, 5, false);
        assert_eq!(acks.frames, expected);
        let mut none = Acks::new(0, None, false);
        assert!(none.on_delivery(1));
        none.flush();
        assert!(none.frames.is_empty());
    }

    #[test]
    fn every_so_many_are_rejected_and_no_ack_covers_them() {
        let mut acks = Acks::new(10, Some(3), true);
        let done: Vec<_> = (1..=7).map(|tag| acks.on_delivery(tag)).collect();
        assert_eq!(done, [true, true, false, true, true, false, true]);
        acks.flush();
        let mut expected = Vec::new();
        wire::append_ack(&mut expected, CHANNEL, 2, true);
        wire::append_nack(&mut expected, CHANNEL, 3, true);
        wire::append_ack(&mut expected, CHANNEL, 5, true);
        wire::append_nack(&mut expected, CHANNEL, 6, true);
        wire::append_ack(&mut expected, CHANNEL, 7, false);
        assert_eq!((acks.frames, acks.nacked), (expected, 2));
        let mut dropped = Acks::new(1, Some(1), false);
        assert!(dropped.on_delivery(1));
        assert_eq!(dropped.frames[19], 0);
    }

    #[test]
    fn an_answer_to_a_get_is_a_message_or_that_there_is_none() {
        let mut intake = intake("--get --ack-batch 1");
        let on = |intake: &mut Intake, frame: &Frame<'_>| intake.on_frame(frame, 9).expect("valid");
        let get_ok = [0, 0, 0, 0, 0, 0, 0, 5, 1, 0, 1, b'q', 0, 0, 0, 0];
        on(&mut intake, &Frame::Method { channel: 1, id: method::BASIC_GET_OK, arguments: &get_ok });
        on(&mut intake, &Frame::Header { body_size: 16 });
        on(&mut intake, &Frame::Body { payload: &[0; 16] });
        on(&mut intake, &Frame::Method { channel: 1, id: method::BASIC_GET_EMPTY, arguments: &[0] });
        assert_eq!((intake.delivered, intake.redelivered, intake.empties), (1, 1, 1));
        let mut ack = Vec::new();
        wire::append_ack(&mut ack, CHANNEL, 5, false);
        assert_eq!(intake.acks.frames, ack);
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
