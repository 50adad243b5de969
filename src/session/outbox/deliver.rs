//! Writing deliveries: the inside of a locked outbox, as queues see it.

use super::{BEHIND_BYTES, HIGH_WATER_BYTES, Inner, REPLY_LIMIT_BYTES};
use crate::{
    broker::{Address, Body, Delivery, DeliveryWriter, Message, Offer, OwnedMessage, TracedDelivery, is_traced},
    session::{unacked::Unacked, write_buffer::WriteBuffer},
    wire::{encode, frame::FRAME_END},
};

/// The frames of the last delivery up to its body: the next one mostly differs in nothing but its tag.
#[derive(Default)]
pub(super) struct Template {
    pub(super) to: Option<Address>,
    pub(super) names_len: usize,
    pub(super) properties_len: usize,
    pub(super) body_len: usize,
    pub(super) redelivered: bool,
    pub(super) tag_at: usize,
    pub(super) names_at: usize,
    pub(super) properties_at: usize,
    pub(super) bytes: Vec<u8>,
}

impl Template {
    #[inline]
    fn fits(&self, delivery: &Delivery<'_>) -> bool {
        let message = &delivery.message;
        self.to == Some(delivery.to)
            && self.body_len == message.body.len()
            && self.redelivered == delivery.redelivered
            && self.bytes[self.names_at..self.names_at + self.names_len] == *message.names
            && self.bytes[self.properties_at..self.properties_at + self.properties_len] == *message.properties
    }

    /// Takes over the frames just written: `written` begins with the method frame and ends before the body's bytes.
    fn remember(&mut self, delivery: &Delivery<'_>, written: &[u8], consumer_tag_len: usize) {
        let message = &delivery.message;
        self.to = Some(delivery.to);
        self.body_len = message.body.len();
        self.redelivered = delivery.redelivered;
        self.names_len = message.names.len();
        self.properties_len = message.properties.len();
        self.tag_at = 11 + consumer_tag_len;
        self.names_at = self.tag_at + 9;
        // Method frame end, header frame head, class, weight and body size stand between.
        self.properties_at = self.names_at + self.names_len + 1 + 7 + 12;
        self.bytes.clear();
        self.bytes.extend_from_slice(written);
    }
}

/// Content header and body.
#[inline]
pub(super) fn content(out: &mut WriteBuffer, channel: u16, message: &Message<'_>, frame_max: u32) {
    encode::content_header(&mut out.bytes, channel, message.body.len() as u64, message.properties);
    match message.body {
        Body::Inline(body) => encode::body_frames(&mut out.bytes, channel, body, frame_max),
        Body::Shared(body) => out.body_frames(channel, body, frame_max),
    }
}

impl Inner {
    #[inline]
    fn offer(&mut self, delivery: &Delivery<'_>, get_remaining: Option<u64>) -> Offer {
        let is_full = self.out.len() >= HIGH_WATER_BYTES;
        let Address { channel: number, slot: index } = delivery.to;
        let Some(channel) = self.channels.get_mut(number) else { return Offer::Gone };
        if self.closed {
            return Offer::Gone;
        }
        let Some(Some(slot)) = channel.slots.get_mut(index as usize) else { return Offer::Gone };
        let message = &delivery.message;
        let limited = !slot.no_ack && channel.prefetch > 0 && channel.unacked.len() >= usize::from(channel.prefetch);
        if slot.queue.is_none() {
            // A direct reply: there is no queue to hold it back in, so only a requester that does not read loses some.
            if self.out.len() >= REPLY_LIMIT_BYTES {
                return Offer::Gone;
            }
        } else if get_remaining.is_none() && (is_full || limited || !slot.started) {
            self.full |= is_full;
            channel.blocked.push(index);
            return Offer::Blocked;
        }
        channel.last_tag += 1;
        let tag = channel.last_tag;
        if !slot.no_ack {
            slot.unacked += 1;
            channel.unacked.push(Unacked::new(tag, delivery.seq, index, message.body.len(), message.persistent));
        }
        let start = self.out.bytes.len();
        match (get_remaining, message.body) {
            (None, Body::Inline(body))
                if !body.is_empty() && body.len() <= encode::body_payload_max(self.frame_max) =>
            {
                if self.template.fits(delivery) {
                    self.out.bytes.extend_from_slice(&self.template.bytes);
                    let tag_at = start + self.template.tag_at;
                    self.out.bytes[tag_at..tag_at + 8].copy_from_slice(&tag.to_be_bytes());
                } else {
                    encode::basic_deliver(
                        &mut self.out.bytes,
                        number,
                        &slot.tag,
                        tag,
                        delivery.redelivered,
                        message.names,
                    );
                    encode::content_header(&mut self.out.bytes, number, body.len() as u64, message.properties);
                    self.out.bytes.extend_from_slice(&encode::body_head(number, body.len()));
                    self.template.remember(delivery, &self.out.bytes[start..], slot.tag.len());
                }
                self.out.bytes.extend_from_slice(body);
                self.out.bytes.push(FRAME_END);
                return Offer::Taken;
            }
            (None, _) => {
                encode::basic_deliver(&mut self.out.bytes, number, &slot.tag, tag, delivery.redelivered, message.names)
            }
            (Some(remaining), _) => {
                let remaining = u32::try_from(remaining).unwrap_or(u32::MAX);
                encode::basic_get_ok(&mut self.out.bytes, number, tag, delivery.redelivered, message.names, remaining);
            }
        }
        content(&mut self.out, number, message, self.frame_max);
        Offer::Taken
    }
}

impl Inner {
    /// Writes the deliveries at the front of `messages`, `first` being the position of the first, that differ from the one just
    /// written in nothing but tag, position and body. Answers how many.
    ///
    /// Hot path: a copy of the frames, with the tag and the body put into it.
    fn repeat(&mut self, to: Address, written: &Message<'_>, first: u64, messages: &[Message<'_>]) -> usize {
        let template = &mut self.template;
        if template.to != Some(to) || template.redelivered || template.body_len != written.body.len() || self.tracing {
            return 0;
        }
        let Some(channel) = self.channels.get_mut(to.channel) else { return 0 };
        let Some(Some(slot)) = channel.slots.get_mut(to.slot as usize) else { return 0 };
        let bytes_each = template.bytes.len() + template.body_len + 1;
        let mut room = HIGH_WATER_BYTES.saturating_sub(self.out.len()).div_ceil(bytes_each);
        if !slot.no_ack && channel.prefetch > 0 {
            room = room.min(usize::from(channel.prefetch).saturating_sub(channel.unacked.len()));
        }
        let count = messages.iter().take(room).take_while(|message| message.is_like(written)).count();
        let messages = &messages[..count];
        if !slot.no_ack {
            let unacked = Unacked::new(channel.last_tag + 1, first, to.slot, template.body_len, written.persistent);
            channel.unacked.push(Unacked { count: count as u32, ..unacked });
            slot.unacked += count as u32;
        }
        let bytes = &mut self.out.bytes;
        bytes.reserve(count * bytes_each);
        for message in messages {
            channel.last_tag += 1;
            template.bytes[template.tag_at..template.tag_at + 8].copy_from_slice(&channel.last_tag.to_be_bytes());
            bytes.extend_from_slice(&template.bytes);
            bytes.extend_from_slice(message.body.as_slice());
            bytes.push(FRAME_END);
        }
        count
    }

    /// Keeps a copy of a delivery, to be traced once its queue is unlocked.
    #[cold]
    fn note_trace(&mut self, delivery: &Delivery<'_>) {
        let Address { channel, slot } = delivery.to;
        if !is_traced(&delivery.message) {
            return;
        }
        let slots = self.channels.get_mut(channel).map(|channel| &channel.slots);
        let Some(Some(slot)) = slots.and_then(|slots| slots.get(slot as usize)) else { return };
        let queue = match &slot.queue {
            Some(queue) => queue.options.name.clone(),
            // A direct reply: the name it was sent to.
            None => String::from_utf8_lossy(delivery.message.exchange_and_key().1).into(),
        };
        let (redelivered, message) = (delivery.redelivered, OwnedMessage::from(&delivery.message));
        self.traces.push(TracedDelivery { channel, queue, redelivered, message });
    }
}

impl DeliveryWriter for Inner {
    #[inline]
    fn deliver(&mut self, delivery: &Delivery<'_>) -> Offer {
        let offer = self.offer(delivery, None);
        if self.tracing && offer == Offer::Taken {
            self.note_trace(delivery);
        }
        offer
    }

    #[inline]
    fn deliver_run(&mut self, to: Address, first: u64, messages: &[Message<'_>]) -> (usize, Offer) {
        let mut taken = 0;
        while let Some(&message) = messages.get(taken) {
            let offer = self.deliver(&Delivery { to, seq: first + taken as u64, redelivered: false, message });
            if offer != Offer::Taken {
                return (taken, offer);
            }
            taken += 1;
            taken += self.repeat(to, &message, first + taken as u64, &messages[taken..]);
        }
        (taken, Offer::Taken)
    }

    fn is_behind(&self) -> bool {
        self.out.len() >= BEHIND_BYTES
    }

    fn answer_get(&mut self, delivery: &Delivery<'_>, remaining: u64) -> Offer {
        let offer = self.offer(delivery, Some(remaining));
        if self.tracing && offer == Offer::Taken {
            self.note_trace(delivery);
        }
        offer
    }
}
