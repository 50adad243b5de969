//! Resource alarms: while one is in force, publishing connections are not read, and are told so.

use std::sync::atomic::{AtomicU8, Ordering};

/// A resource that can run out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alarm {
    Memory = 1,
    Disk = 2,
}

impl Alarm {
    pub(super) fn name(self) -> &'static str {
        match self {
            Alarm::Memory => "memory",
            Alarm::Disk => "disk",
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

    /// The reason as RabbitMQ words it: `low on memory`, `low on disk`, `low on disk & memory`.
    pub fn reason(&self) -> Option<String> {
        let bits = self.0.load(Ordering::Relaxed);
        let names: Vec<&str> = [Alarm::Disk, Alarm::Memory]
            .iter()
            .filter(|alarm| bits & **alarm as u8 != 0)
            .map(|alarm| alarm.name())
            .collect();
        (!names.is_empty()).then(|| format!("low on {}", names.join(" & ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_worded_like_rabbitmq() {
        let alarms = Alarms::default();
        assert_eq!(alarms.reason(), None);
        alarms.set(Alarm::Memory, true);
        assert_eq!(alarms.reason().as_deref(), Some("low on memory"));
        alarms.set(Alarm::Disk, true);
        assert_eq!(alarms.reason().as_deref(), Some("low on disk & memory"));
        alarms.set(Alarm::Memory, false);
        assert!(alarms.is_active());
        assert_eq!(alarms.reason().as_deref(), Some("low on disk"));
    }
}
