//! `basic.ack`, `basic.nack` and `basic.reject`: runs of them are resolved under one lock of the outbox, then applied
//! queue by queue.

use super::{
    channel::{Channel, ChannelState, Mode},
    close::{Fault, undecodable},
    connection::Session,
    unacked::UnknownDeliveryTag,
};
use crate::{
    broker::{Round, Settlement},
    wire::{
        self, Scan, frame,
        hot::{BASIC_REJECT, SettleView, method_id},
    },
};

/// Settling methods handled under one lock.
const RUN_METHODS: usize = 1024;

fn settlement(view: &SettleView, method: u32) -> Settlement {
    match view.requeue {
        None => Settlement::Acked,
        // As in RabbitMQ: only a reject says that the delivery has failed.
        Some(false) if method == BASIC_REJECT => Settlement::Rejected,
        Some(false) => Settlement::Discarded,
        Some(true) if method == BASIC_REJECT => Settlement::Failed,
        Some(true) => Settlement::Returned,
    }
}

/// How many `basic.ack`s of one delivery each the input begins with, their tags rising by one: the one that `first` was read
/// from, and those after it which differ in nothing but the tag.
#[inline]
fn count_acks(input: &[u8], first: &SettleView) -> usize {
    const TAG: std::ops::Range<usize> = 11..19;
    const ACK_BYTES: usize = 21;
    let mut frames = input.chunks_exact(ACK_BYTES).take(RUN_METHODS);
    let Some(pattern) = frames.next() else { return 1 };
    let mut tag = first.delivery_tag;
    let follows = |frame: &&[u8]| {
        tag = tag.wrapping_add(1);
        frame[TAG] == tag.to_be_bytes()
            && frame[..TAG.start] == pattern[..TAG.start]
            && frame[TAG.end..] == pattern[TAG.end..]
    };
    1 + frames.take_while(follows).count()
}

impl Session {
    /// Handles the run of settling methods of one channel at the start of `input`; `used` is their length, that of a
    /// failing one included.
    ///
    /// Hot path: one lock of the outbox a run, one of each queue a stretch of its deliveries.
    #[inline]
    pub(super) fn settle_run(&mut self, number: u16, input: &[u8], used: &mut usize) -> Result<(), Fault> {
        let working = match self.channels.get(number) {
            None => false,
            Some(channel) if !channel.assembler.is_idle() => return Err(channel.assembler.interrupted()),
            Some(channel) => channel.state == ChannelState::Open,
        };
        let is_tx = matches!(self.channels.get(number), Some(Channel { mode: Mode::Tx(_), .. }));
        let exists = self.channels.get(number).is_some();
        let mut run_kind = None;
        let mut failure = None;
        let mut batch = std::mem::take(&mut self.settling);
        {
            let outbox = self.outbox.clone();
            let mut settler = (working && !is_tx).then(|| outbox.settler(number));
            let (mut methods, mut in_order) = (0, true);
            while methods < RUN_METHODS && failure.is_none() {
                let Scan::Frame(frame) = wire::scan(&input[*used..], self.frame_max) else { break };
                if frame.kind != frame::METHOD || frame.channel != number {
                    break;
                }
                let Some(view) = SettleView::read(frame.payload) else { break };
                let id = method_id(frame.payload).unwrap_or_default();
                let at = |fault: Fault| fault.at(60, id as u16);
                match view {
                    Err(_) => failure = Some(at(undecodable(frame.payload))),
                    Ok(_) if !exists => {
                        let text = if number == 0 {
                            "unexpected method in connection state running"
                        } else {
                            "expected 'channel.open'"
                        };
                        failure = Some(at(Fault::new(504, text)));
                    }
                    Ok(view) => {
                        let how = settlement(&view, id);
                        if *run_kind.get_or_insert(how) != how {
                            break;
                        }
                        if in_order
                            && how == Settlement::Acked
                            && !view.multiple
                            && let Some(settler) = &mut settler
                        {
                            let acks = count_acks(&input[*used..], &view);
                            in_order = settler.settle_each(view.delivery_tag, acks, &mut batch);
                            if in_order {
                                *used += acks * frame.wire_len();
                                methods += acks;
                                continue;
                            }
                        }
                        let settled = match &mut settler {
                            Some(settler) => settler.settle(view.delivery_tag, view.multiple, &mut batch),
                            None if is_tx && working => self.settle_in_tx(number, &view, how),
                            None => Ok(()),
                        };
                        if let Err(UnknownDeliveryTag(tag)) = settled {
                            failure = Some(at(Fault::new(406, format!("unknown delivery tag {tag}"))));
                        }
                    }
                }
                *used += frame.wire_len();
                methods += 1;
            }
        }
        self.settling = batch;
        self.apply_settlements(run_kind.unwrap_or(Settlement::Acked), false);
        failure.map_or(Ok(()), Err)
    }

    fn settle_in_tx(&mut self, number: u16, view: &SettleView, how: Settlement) -> Result<(), UnknownDeliveryTag> {
        let mut taken = Vec::new();
        self.outbox.settler(number).take(view.delivery_tag, view.multiple, &mut taken)?;
        if let Some(Channel { mode: Mode::Tx(transaction), .. }) = self.channels.get_mut(number) {
            transaction.settle(how, taken);
        }
        Ok(())
    }

    /// Applies what [`Session::settling`] holds. With `durably`, answers the round that makes it durable.
    pub(super) fn apply_settlements(&mut self, how: Settlement, durably: bool) -> Round {
        if self.settling.is_empty() {
            return 0;
        }
        let mut batch = std::mem::take(&mut self.settling);
        let (mut start, mut round) = (0, 0);
        for (queue, consumer, end) in batch.runs.drain(..) {
            let deliveries = &batch.deliveries[start..end];
            if how == Settlement::Acked && !durably && !self.confirms {
                queue.acknowledge(consumer, deliveries, &mut self.effects);
            } else {
                let settled = queue.settle(consumer, deliveries, how, &mut self.effects);
                self.settled = self.settled.max(settled);
            }
            start = end;
            if durably {
                round = round.max(queue.settle_round());
            }
        }
        for (queue, consumer) in batch.unblocked.drain(..) {
            queue.unblock(consumer, &mut self.effects);
        }
        batch.clear();
        self.settling = batch;
        round
    }
}
