//! The report as a person reads it.

use std::fmt;

use super::{BrokerCost, Cost, DrainEnd, Flow, Percentiles, Report, Shape};

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}\n{}", self.target, self.shape)?;
        if self.shape.publishers > 0 {
            writeln!(f, "published    {}", self.published)?;
        }
        if let Some(confirms) = &self.confirms {
            writeln!(f, "confirmed    {:>13}  {:>12}/s", grouped_count(confirms.acked), grouped(confirms.per_second))?;
        }
        if let Some(transactions) = &self.transactions {
            let (messages, per_second) = (grouped_count(transactions.messages), grouped(transactions.per_second));
            writeln!(f, "committed    {messages:>13}  {per_second:>12}/s")?;
        }
        if self.shape.consumers > 0 {
            writeln!(f, "delivered    {}", self.delivered)?;
        }
        if let Some(flow) = self.delivered_while_publishing.filter(|_| self.shape.consumers > 0) {
            writeln!(f, "  by the end of publishing\n             {flow}")?;
        }
        if let Some(latency) = &self.latency {
            writeln!(f, "latency      {latency}")?;
        }
        if let Some(latency) = self.confirms.as_ref().and_then(|confirms| confirms.latency.as_ref()) {
            writeln!(f, "to confirm   {latency}")?;
        }
        if let Some(latency) = self.transactions.as_ref().and_then(|transactions| transactions.latency.as_ref()) {
            writeln!(f, "to commit    {latency}")?;
        }
        writeln!(f, "generator    {}", self.cost(&self.generator))?;
        if let Some(broker) = &self.broker {
            writeln!(f, "broker       {}, {broker}", self.cost(&broker.cost))?;
        }
        self.write_oddities(f)
    }
}

impl Report {
    /// CPU time in words; per copy and per message, where these differ.
    fn cost(&self, cost: &Cost) -> String {
        let is_fan_out = self.shape.consumers > 0 && self.shape.copies_per_message.is_some_and(|copies| copies > 1);
        match (cost.cpu_us_per_message, cost.cpu_us_per_published) {
            (Some(copy), Some(message)) if is_fan_out => format!(
                "{:.2} s CPU, {copy:.3} µs per copy delivered, {message:.3} µs per message published",
                cost.cpu_seconds
            ),
            (Some(message), _) => format!("{:.2} s CPU, {message:.3} µs per message", cost.cpu_seconds),
            (None, _) => format!("{:.2} s CPU", cost.cpu_seconds),
        }
    }

    /// What a good run has none of.
    fn write_oddities(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let confirms = self.confirms.as_ref();
        let missing = match (self.shape.publishers, self.shape.copies_per_message) {
            (0, _) => "found but not delivered",
            (_, Some(copies)) if copies > 1 => "copies not delivered of what was published",
            _ => "published but not delivered",
        };
        let oddities = [
            (self.missing.unwrap_or(0), missing),
            (confirms.map_or(0, |confirms| confirms.nacked), "nacked"),
            (confirms.map_or(0, |confirms| confirms.outstanding), "never confirmed"),
            (confirms.map_or(0, |confirms| confirms.unexpected), "confirms of nothing outstanding"),
            (self.returned, "returned, for no queue took them"),
            (self.redelivered, "marked as redelivered"),
            (self.rejected, "rejected by consumers"),
            (self.empty_gets, "gets that found the queue empty"),
            (self.wrong_size, "of another size than published"),
            (self.ready_before, "in the queues before the run"),
            (self.blocked_count, "times blocked by the broker"),
        ];
        for (count, what) in oddities.iter().filter(|(count, _)| *count > 0) {
            writeln!(f, "note         {:>13}  {what}", grouped_count(*count))?;
        }
        match self.drain {
            DrainEnd::NoProgress => writeln!(f, "note         gave up waiting: nothing was delivered for 10 s"),
            DrainEnd::TimeLimit => writeln!(f, "note         stopped waiting for deliveries at --drain"),
            DrainEnd::Aborted => writeln!(f, "note         the run was cut short"),
            DrainEnd::Complete | DrainEnd::NotNeeded => Ok(()),
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} publishers, {} consumers, {} queues, {} bytes",
            self.publishers, self.consumers, self.queues, self.sizes
        )?;
        if let Some(kind) = &self.exchange_type {
            write!(f, ", {kind} exchange")?;
        }
        if let Some(copies) = self.copies_per_message.filter(|copies| *copies > 1) {
            write!(f, ", {copies} copies each")?;
        }
        write!(f, ", {}", if self.persistent { "persistent" } else { "transient" })?;
        if let Some(window) = self.confirm_window {
            write!(f, ", {window} unconfirmed at most")?;
        }
        if let Some(size) = self.tx_size {
            write!(f, ", {size} per transaction")?;
        }
        match self.ack_batch {
            0 => write!(f, ", no acks")?,
            1 => write!(f, ", ack each")?,
            batch => write!(f, ", ack every {batch}")?,
        }
        if self.prefetch > 0 {
            write!(f, ", prefetch {}", self.prefetch)?;
        }
        if let Some(rate) = self.rate_per_second {
            write!(f, ", {rate}/s each")?;
        }
        if self.warmup_seconds > 0.0 {
            write!(f, ", measured after {} s", self.warmup_seconds)?;
        }
        Ok(())
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:>13}  {:>12}/s  over {:.2} s",
            grouped_count(self.messages),
            grouped(self.per_second),
            self.seconds
        )
    }
}

impl fmt::Display for Percentiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = [
            ("p50", self.p50_us),
            ("p75", self.p75_us),
            ("p95", self.p95_us),
            ("p99", self.p99_us),
            ("p99.9", self.p999_us),
            ("max", self.max_us),
        ];
        named.iter().try_for_each(|(name, us)| write!(f, "{name} {}   ", readable_us(*us)))?;
        write!(f, "({} samples)", grouped_count(self.samples))
    }
}

impl fmt::Display for BrokerCost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        write!(f, "{:.1} MiB resident (peak {:.1})", mib(self.resident_bytes), mib(self.peak_resident_bytes))?;
        match self.written_bytes {
            Some(written) => write!(f, ", {:.1} MiB written", mib(written))?,
            None => return Ok(()),
        }
        match self.written_per_accepted_byte {
            Some(ratio) => write!(f, " ({ratio:.2} bytes per byte accepted)"),
            None => Ok(()),
        }
    }
}

/// Microseconds, in the unit that suits them.
pub(in super::super) fn readable_us(us: f64) -> String {
    match us {
        us if us < 1e3 => format!("{us:.1} µs"),
        us if us < 1e6 => format!("{:.2} ms", us / 1e3),
        us => format!("{:.2} s", us / 1e6),
    }
}

/// A number rounded to an integer, with its thousands apart.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "never negative, and the cast saturates")]
pub(in super::super) fn grouped(number: f64) -> String {
    grouped_count(number.max(0.0).round() as u64)
}

fn grouped_count(number: u64) -> String {
    let digits = number.to_string();
    let mut grouped = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_readable() {
        assert_eq!([0, 999, 1_000, 1_234_567].map(grouped_count), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!(grouped(999.6), "1,000");
        assert_eq!([12.34, 1_234.0, 2_500_000.0].map(readable_us), ["12.3 µs", "1.23 ms", "2.50 s"]);
    }
}
