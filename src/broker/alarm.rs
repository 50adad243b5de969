//! Resource alarms: while one is in force, publishing connections are not read, and are told so.

use std::sync::atomic::{AtomicU8, Ordering};

/// A resource that can run out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alarm {
    Memory = 1,
    Disk = 2,
    /// The disk does not take writes, or does not keep them. Only those who publish persistent messages are stopped by it.
    DiskFailure = 4,
}

impl Alarm {
    pub(super) fn name(self) -> &'static str {
        match self {
            Alarm::Memory => "memory",
            Alarm::Disk => "disk",
            Alarm::DiskFailure => "disk failure",
        }
    }
}

/// The alarms in force.
#[derive(Debug, Default)]
pub struct Alarms(AtomicU8);

impl Alarms {
    /// Sets or clears an alarm; a change is logged. Answers whether it is one.
    pub fn set(&self, alarm: Alarm, active: bool) -> bool {
        let bit = alarm as u8;
        let before =
            if active { self.0.fetch_or(bit, Ordering::Relaxed) } else { self.0.fetch_and(!bit, Ordering::Relaxed) };
        match (before & bit != 0, active) {
            (false, true) => tracing::warn!(resource = alarm.name(), "alarm: publishing connections are blocked"),
            (true, false) => tracing::info!(resource = alarm.name(), "alarm cleared"),
            _ => return false,
        }
        true
    }

    /// Whether any alarm is in force.
    #[inline]
    pub fn is_active(&self) -> bool {
        self.0.load(Ordering::Relaxed) != 0
    }

    /// Whether this one is.
    pub fn is_set(&self, alarm: Alarm) -> bool {
        self.0.load(Ordering::Relaxed) & alarm as u8 != 0
    }

    /// The reason as RabbitMQ words it: `low on memory`, `low on disk`, `low on disk & memory`; and `disk failure`, which
    /// RabbitMQ does not have. `None` for a connection that need not be stopped: `is_durable` says that it has published
    /// messages that are to survive a restart.
    pub fn reason(&self, is_durable: bool) -> Option<String> {
        let bits = self.0.load(Ordering::Relaxed);
        if bits == 0 {
            return None;
        }
        let low = [Alarm::Disk, Alarm::Memory].iter().filter(|alarm| bits & **alarm as u8 != 0);
        let low: Vec<&str> = low.map(|alarm| alarm.name()).collect();
        let failure =
            (is_durable && bits & Alarm::DiskFailure as u8 != 0).then(|| Alarm::DiskFailure.name().to_owned());
        let low = (!low.is_empty()).then(|| format!("low on {}", low.join(" & ")));
        match (failure, low) {
            (Some(failure), Some(low)) => Some(format!("{failure}, {low}")),
            (failure, low) => failure.or(low),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_worded_like_rabbitmq() {
        let alarms = Alarms::default();
        assert_eq!(alarms.reason(true), None);
        alarms.set(Alarm::Memory, true);
        assert_eq!(alarms.reason(false).as_deref(), Some("low on memory"));
        alarms.set(Alarm::Disk, true);
        assert_eq!(alarms.reason(true).as_deref(), Some("low on disk & memory"));
        alarms.set(Alarm::Memory, false);
        assert!(alarms.is_active());
        assert_eq!(alarms.reason(false).as_deref(), Some("low on disk"));
    }

    #[test]
    fn a_failing_disk_stops_only_those_who_need_it() {
        let alarms = Alarms::default();
        alarms.set(Alarm::DiskFailure, true);
        assert_eq!(alarms.reason(false), None);
        assert_eq!(alarms.reason(true).as_deref(), Some("disk failure"));
        alarms.set(Alarm::Disk, true);
        assert_eq!(alarms.reason(false).as_deref(), Some("low on disk"));
        assert_eq!(alarms.reason(true).as_deref(), Some("disk failure, low on disk"));
    }
}
