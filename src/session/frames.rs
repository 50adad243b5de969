//! From frames to methods and contents: what each frame is, where it belongs, and what is wrong with it.

use super::{
    assembler::Assembler,
    channel::Channel,
    close::{CloseReason, Fault, describe_frame, undecodable},
    connection::{PartialBody, Phase, Session},
};
use crate::wire::{
    self, Frame, Scan, frame,
    hot::{self, HeaderView},
    method::{self, MethodError},
};

/// Body frames from this size on are taken in as they arrive, instead of once they are whole.
const STREAMED_BODY_BYTES: usize = 16 << 10;

impl Session {
    /// Handles one frame, a run of hot ones, or a piece of a body. `used` stays 0 when more bytes are needed.
    #[inline]
    pub(super) fn next(&mut self, input: &[u8], used: &mut usize) -> Result<(), (u16, Fault)> {
        if let Some(partial) = self.partial {
            return self.continue_body(partial, input, used);
        }
        match wire::scan(input, self.frame_max) {
            Scan::Frame(frame) => {
                if frame.kind == frame::METHOD && self.phase == Phase::Running {
                    let id = hot::method_id(frame.payload);
                    if id == Some(hot::BASIC_PUBLISH) {
                        if let Some(run) =
                            self.publish_run(frame.channel, input).map_err(|fault| (frame.channel, fault))?
                        {
                            *used = run;
                            return Ok(());
                        }
                    } else if matches!(id, Some(hot::BASIC_ACK | hot::BASIC_NACK | hot::BASIC_REJECT)) {
                        return self.settle_run(frame.channel, input, used).map_err(|fault| (frame.channel, fault));
                    }
                }
                *used = frame.wire_len();
                self.on_frame(&frame).map_err(|fault| (frame.channel, fault))
            }
            Scan::Partial(head) => {
                let have = input.len() - frame::HEAD_BYTES;
                let streamed = head.kind == frame::BODY
                    && head.size as usize >= STREAMED_BODY_BYTES
                    && have >= STREAMED_BODY_BYTES;
                if streamed && self.wants_body(head.channel) {
                    *used = frame::HEAD_BYTES;
                    self.partial = Some(PartialBody { channel: head.channel, remaining: head.size as usize });
                }
                Ok(())
            }
            Scan::Incomplete => Ok(()),
            Scan::TooLarge(head) => {
                let text = format!(
                    "type {}, all octets = <<>>: {{frame_too_large,{},{}}}",
                    head.kind,
                    head.size,
                    self.frame_max.saturating_sub(frame::OVERHEAD_BYTES as u32)
                );
                self.framing_lost = true;
                Err((0, Fault::Connection(CloseReason::new(501, &text))))
            }
            Scan::BadEnd(frame, end) => {
                let text = format!("{}: {{invalid_frame_end_marker,{end}}}", describe_frame(frame.kind, frame.payload));
                self.framing_lost = true;
                Err((0, Fault::Connection(CloseReason::new(501, &text))))
            }
        }
    }

    pub(super) fn wants_body(&self, channel: u16) -> bool {
        self.phase == Phase::Running && self.channels.get(channel).is_some_and(|channel| channel.assembler.wants_body())
    }

    /// Takes what is there of a body frame whose head was seen before.
    pub(super) fn continue_body(
        &mut self,
        partial: PartialBody,
        input: &[u8],
        used: &mut usize,
    ) -> Result<(), (u16, Fault)> {
        let at_channel = |fault| (partial.channel, fault);
        let take = partial.remaining.min(input.len());
        if take > 0 {
            *used = take;
            self.partial = Some(PartialBody { remaining: partial.remaining - take, ..partial });
            if let Some(channel) = self.channels.get_mut(partial.channel) {
                channel.assembler.on_body(&input[..take]).map_err(at_channel)?;
            }
        }
        if take < partial.remaining {
            return Ok(());
        }
        let Some(&end) = input.get(take) else { return Ok(()) };
        *used += 1;
        self.partial = None;
        if end != frame::FRAME_END {
            let text = format!("{}: {{invalid_frame_end_marker,{end}}}", describe_frame(frame::BODY, &input[..take]));
            self.framing_lost = true;
            return Err((0, Fault::Connection(CloseReason::new(501, &text))));
        }
        self.finish_content(partial.channel).map_err(at_channel)
    }

    pub(super) fn on_frame(&mut self, frame: &Frame<'_>) -> Result<(), Fault> {
        let describe = || describe_frame(frame.kind, frame.payload);
        let unknown = || Err(Fault::Connection(CloseReason::new(501, &format!("{}: unknown_frame", describe()))));
        if self.phase == Phase::AwaitOpen && frame.channel != 0 {
            return Err(Fault::Connection(CloseReason::new(505, &describe())));
        }
        match (frame.kind, frame.channel) {
            (frame::HEARTBEAT, _) if !frame.payload.is_empty() => unknown(),
            (frame::METHOD, _) if frame.payload.len() < 4 => unknown(),
            (frame::HEARTBEAT, 0) => Ok(()),
            (frame::HEARTBEAT, _) | (frame::HEADER | frame::BODY, 0) => {
                Err(Fault::Connection(CloseReason::new(505, &describe())))
            }
            (frame::METHOD, _) => self.on_method_frame(frame),
            (frame::HEADER, _) => self.on_header_frame(frame),
            (frame::BODY, _) => self.on_body_frame(frame),
            _ => unknown(),
        }
    }

    pub(super) fn on_method_frame(&mut self, frame: &Frame<'_>) -> Result<(), Fault> {
        if let Some(channel) = self.channels.get(frame.channel)
            && !channel.assembler.is_idle()
            && self.phase == Phase::Running
        {
            return Err(channel.assembler.interrupted());
        }
        let class = match method::parse(frame.payload) {
            Ok(class) => class,
            Err(error) => return self.on_undecodable(frame, error),
        };
        match self.phase {
            Phase::Running => self.on_method(frame.channel, frame.payload, class),
            Phase::Closing => {
                self.on_method_while_closing(&class);
                Ok(())
            }
            Phase::Closed => Ok(()),
            _ if frame.channel == 0 => self.on_handshake_method(class),
            _ => Err(Fault::DropLater("method on a channel during the handshake".into())),
        }
    }

    pub(super) fn on_undecodable(&self, frame: &Frame<'_>, error: MethodError) -> Result<(), Fault> {
        if self.phase == Phase::Closing {
            return Ok(());
        }
        if self.phase != Phase::Running {
            return Err(Fault::DropLater("undecodable method during the handshake".into()));
        }
        let reason = match error {
            MethodError::Unknown => return Err(Fault::Drop("unknown class or method".into())),
            MethodError::Table(_) => return Err(Fault::Drop("malformed field table".into())),
            MethodError::NotUtf8 => CloseReason::new(501, "Malformed UTF-8 in shortstr"),
            MethodError::Undecodable => return Err(undecodable(frame.payload)),
        };
        Err(Fault::Connection(reason))
    }

    pub(super) fn on_header_frame(&mut self, frame: &Frame<'_>) -> Result<(), Fault> {
        let max_body_bytes = self.limits.max_message_bytes;
        let Some(channel) = self.content_channel(frame)? else { return Ok(()) };
        let header = HeaderView::read(frame.payload).map_err(|_| {
            Fault::Connection(CloseReason::new(
                501,
                &format!("{}: unknown_frame", describe_frame(frame.kind, frame.payload)),
            ))
        })?;
        match channel.assembler.on_header(&header, max_body_bytes)? {
            Some(message) => self.on_message(frame.channel, &message),
            None => Ok(()),
        }
    }

    pub(super) fn on_body_frame(&mut self, frame: &Frame<'_>) -> Result<(), Fault> {
        let Some(channel) = self.content_channel(frame)? else { return Ok(()) };
        channel.assembler.on_body(frame.payload)?;
        self.finish_content(frame.channel)
    }

    pub(super) fn finish_content(&mut self, number: u16) -> Result<(), Fault> {
        let Some(channel) = self.channels.get_mut(number) else { return Ok(()) };
        match channel.assembler.finish() {
            Some(message) => self.on_message(number, &message),
            None => Ok(()),
        }
    }

    /// The channel a content frame is for; `None` when it is to be ignored.
    pub(super) fn content_channel(&mut self, frame: &Frame<'_>) -> Result<Option<&mut Channel>, Fault> {
        match self.phase {
            Phase::Running => {}
            Phase::Closing | Phase::Closed => return Ok(None),
            _ => return Err(Fault::DropLater("content during the handshake".into())),
        }
        match self.channels.get_mut(frame.channel) {
            Some(channel) => Ok(Some(channel)),
            None => Err(Assembler::Method.interrupted()),
        }
    }
}
