//! The line per second that shows a person that something is going on.

use std::time::{Duration, Instant};

use super::meter::Total;
use super::options::Plan;
use super::report::grouped;

const INTERVAL: Duration = Duration::from_secs(1);

/// Prints to standard error, once a second however often it is asked.
#[derive(Debug)]
pub(super) struct ProgressLine {
    enabled: bool,
    publishes: bool,
    consumes: bool,
    start: Instant,
    last: Instant,
    published: u64,
    delivered: u64,
    confirmed: u64,
}

impl ProgressLine {
    pub(super) fn new(plan: &Plan) -> Self {
        let now = Instant::now();
        Self {
            enabled: !plan.json,
            publishes: plan.publisher_count > 0,
            consumes: plan.consumer_count > 0,
            start: now,
            last: now,
            published: 0,
            delivered: 0,
            confirmed: 0,
        }
    }

    /// Shows the rates since the last line, if it is time for one.
    pub(super) fn show(&mut self, published: &Total, delivered: &Total) {
        let interval = self.last.elapsed();
        if !self.enabled || interval < INTERVAL {
            return;
        }
        let rate = |now: u64, before: u64| grouped(now.saturating_sub(before) as f64 / interval.as_secs_f64());
        let mut line = format!("{:4.0} s", self.start.elapsed().as_secs_f64());
        if self.publishes {
            line += &format!("  published {:>11}/s", rate(published.messages, self.published));
        }
        if published.confirmed > 0 {
            line += &format!("  confirmed {:>11}/s", rate(published.confirmed, self.confirmed));
        }
        if self.consumes {
            line += &format!("  delivered {:>11}/s", rate(delivered.messages, self.delivered));
        }
        if self.consumes && published.messages > delivered.messages {
            line += &format!("  under way {:>11}", grouped((published.messages - delivered.messages) as f64));
        }
        eprintln!("{line}");
        self.last = Instant::now();
        (self.published, self.delivered, self.confirmed) =
            (published.messages, delivered.messages, published.confirmed);
    }
}
