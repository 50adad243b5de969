//! The line per second that shows a person that something is going on.

use std::time::{Duration, Instant};

use super::meter::Total;
use super::options::Plan;
use super::report::{grouped, readable_us};
use super::workers::Pools;

const INTERVAL: Duration = Duration::from_secs(1);

/// Prints to standard error, once a second however often it is asked.
#[derive(Debug)]
pub(super) struct ProgressLine {
    enabled: bool,
    publishes: bool,
    consumes: bool,
    /// What [`Total::confirmed`] counts, if anything.
    confirmed_as: Option<&'static str>,
    /// Deliveries per message published, where known.
    deliveries: Option<u64>,
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
            confirmed_as: plan.confirm_window.map(|_| "confirmed").or(plan.tx.map(|_| "committed")),
            deliveries: plan.deliveries_per_message(),
            start: now,
            last: now,
            published: 0,
            delivered: 0,
            confirmed: 0,
        }
    }

    /// Shows rates and latencies since the last line, if it is time for one.
    pub(super) fn show(&mut self, published: &Total, delivered: &Total, pools: &mut Pools) {
        let interval = self.last.elapsed();
        if !self.enabled || interval < INTERVAL {
            return;
        }
        let p99_us = pools.delivery.collect();
        let p99_us = (p99_us.count() > 0).then(|| p99_us.at_quantile_ns(0.99) as f64 / 1e3);
        eprintln!("{}", self.line(interval, published, delivered, p99_us));
        self.last = Instant::now();
        (self.published, self.delivered, self.confirmed) =
            (published.messages, delivered.messages, published.confirmed);
    }

    fn line(&self, interval: Duration, published: &Total, delivered: &Total, p99_us: Option<f64>) -> String {
        let rate = |now: u64, before: u64| grouped(now.saturating_sub(before) as f64 / interval.as_secs_f64());
        let mut line = format!("{:4.0} s", self.start.elapsed().as_secs_f64());
        if self.publishes {
            line += &format!("  published {:>11}/s", rate(published.messages, self.published));
        }
        if let Some(what) = self.confirmed_as {
            line += &format!("  {what} {:>11}/s", rate(published.confirmed, self.confirmed));
        }
        if self.consumes {
            line += &format!("  delivered {:>11}/s", rate(delivered.messages, self.delivered));
            line += &format!("  p99 {:>9}", p99_us.map_or("-".to_owned(), readable_us));
        }
        if let Some(deliveries) = self.deliveries.filter(|_| self.publishes && self.consumes) {
            let under_way = published.messages.saturating_mul(deliveries).saturating_sub(delivered.messages);
            line += &format!("  under way {:>11}", grouped(under_way as f64));
        }
        if published.blocked > 0 {
            line += &format!("  BLOCKED {}", published.blocked);
        }
        line
    }

    /// Prints a remark between the lines.
    pub(super) fn say(&self, remark: &str) {
        if self.enabled {
            eprintln!("{:4.0} s  {remark}", self.start.elapsed().as_secs_f64());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::options::test_plan;
    use super::*;

    #[test]
    fn a_line_tells_rates_latency_and_who_is_blocked() {
        let line = ProgressLine::new(&test_plan("--confirm 10")).line(
            Duration::from_secs(2),
            &Total { messages: 2_000, confirmed: 1_000, blocked: 1, ..Total::default() },
            &Total { messages: 1_500, ..Total::default() },
            Some(1_234.0),
        );
        let expected = "   0 s  published       1,000/s  confirmed         500/s  delivered         750/s  \
                        p99   1.23 ms  under way         500  BLOCKED 1";
        assert_eq!(line, expected);
    }

    #[test]
    fn what_has_no_part_in_the_run_is_not_in_the_line() {
        let nothing = Total::default();
        let line =
            |options| ProgressLine::new(&test_plan(options)).line(Duration::from_secs(1), &nothing, &nothing, None);
        assert_eq!(line("-y 0"), "   0 s  published           0/s");
        assert_eq!(line("-x 0"), "   0 s  delivered           0/s  p99         -");
    }
}
