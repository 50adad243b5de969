//! The validated [`Plan`] of a run: every number checked, every default filled in.

use std::time::Duration;

use super::super::error::PerfError;
use super::super::fields::Field;
use super::super::properties::Properties;
use super::super::uri::Uri;
use super::args::PerfArgs;
use super::queues::{ExchangePlan, QueuePlan, Reach};
use super::sizes::Sizes;

/// Prefetch of an acknowledging consumer whose ack batch does not ask for more.
const DEFAULT_PREFETCH: u32 = 1_000;
const DEFAULT_SECONDS: f64 = 10.0;
const MAX_SECONDS: f64 = 1e7;

/// How long one publisher publishes; whichever comes first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in super::super) struct Limit {
    /// The warm-up included.
    pub(in super::super) duration: Option<Duration>,
    /// Messages per publisher, or per consumer where there are no publishers.
    pub(in super::super) message_count: Option<u64>,
}

/// What is published.
#[derive(Debug, Clone)]
pub(in super::super) struct MessagePlan {
    pub(in super::super) sizes: Sizes,
    pub(in super::super) random_body: bool,
    pub(in super::super) persistent: bool,
    pub(in super::super) properties: Properties,
    pub(in super::super) mandatory: bool,
}

/// How messages are consumed.
#[derive(Debug, Clone)]
pub(in super::super) struct ConsumingPlan {
    /// 0: no-ack.
    pub(in super::super) ack_batch: u32,
    /// 0: unlimited.
    pub(in super::super) prefetch: u16,
    /// `None`: nothing is rejected. Never 0.
    pub(in super::super) nack_every: Option<u64>,
    pub(in super::super) requeue: bool,
    /// Work on each message.
    pub(in super::super) work: Duration,
    /// Ask for each message, and wait so long when there is none; `None`: subscribe.
    pub(in super::super) polling_interval: Option<Duration>,
    pub(in super::super) arguments: Vec<Field>,
}

/// A load run with every number checked and every default filled in.
#[derive(Debug, Clone)]
pub(in super::super) struct Plan {
    pub(in super::super) uri: Uri,
    pub(in super::super) publisher_count: usize,
    pub(in super::super) consumer_count: usize,
    pub(in super::super) messages: MessagePlan,
    /// `None`: no confirms. Never 0.
    pub(in super::super) confirm_window: Option<u64>,
    /// Messages per transaction; `None`: no transactions. Never 0, and never with confirms.
    pub(in super::super) tx: Option<u64>,
    /// Most messages per write; `None` leaves it to the block's size.
    pub(in super::super) batch: Option<u64>,
    pub(in super::super) consuming: ConsumingPlan,
    /// Of each publisher.
    pub(in super::super) rate_per_second: Option<f64>,
    pub(in super::super) limit: RunLimit,
    /// Whether the default time is taken, so that consumers alone may stop when the queues are empty.
    pub(in super::super) is_open_ended: bool,
    pub(in super::super) warmup: Duration,
    pub(in super::super) drain_limit: Duration,
    pub(in super::super) queues: QueuePlan,
    pub(in super::super) exchange: ExchangePlan,
    pub(in super::super) broker_pid: Option<u32>,
    pub(in super::super) json: bool,
}

/// How long a run publishes; whichever comes first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in super::super) struct RunLimit {
    /// The warm-up included.
    pub(in super::super) duration: Option<Duration>,
    count: Option<Count>,
}

/// How many messages a run has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Count {
    /// Per worker.
    Each(u64),
    /// Shared out among the workers.
    Total(u64),
}

impl Plan {
    /// The queue that publisher or consumer `index` uses.
    pub(in super::super) fn queue_of(&self, index: usize) -> &str {
        &self.queues.names[index % self.queues.names.len()]
    }

    /// How many queues each published message goes to; `None` where that cannot be known.
    pub(in super::super) fn copies(&self) -> Option<u64> {
        self.exchange.reach(&self.queues).map(|reach| match reach {
            Reach::Every => self.queues.names.len() as u64,
            Reach::Own | Reach::Only(_) | Reach::Any => 1,
        })
    }

    /// How many deliveries each published message makes, so that losses can be told; `None` where that is unknown.
    pub(in super::super) fn deliveries_per_message(&self) -> Option<u64> {
        let queues = self.queues.names.len();
        let consumed = queues.min(self.consumer_count);
        let once = |is_consumed: bool| is_consumed.then_some(1);
        let copies = match self.exchange.reach(&self.queues)? {
            Reach::Every => consumed as u64,
            Reach::Own => once(self.publisher_count.min(queues) <= consumed)?,
            Reach::Only(index) => once(index < consumed)?,
            Reach::Any => once(consumed == queues)?,
        };
        if !self.queues.are_streams() {
            return Some(copies);
        }
        let has_offset = self.consuming.arguments.iter().any(|field| field.key == "x-stream-offset");
        let readers = (self.consumer_count / queues) as u64;
        (!has_offset && self.consumer_count.is_multiple_of(queues)).then(|| copies.saturating_mul(readers))
    }

    /// When publisher (without publishers: consumer) `index` stops by itself.
    pub(in super::super) fn limit_of(&self, index: usize) -> Limit {
        let workers = if self.publisher_count > 0 { self.publisher_count } else { self.consumer_count };
        let message_count = self.limit.count.map(|count| match count {
            Count::Each(count) => count,
            Count::Total(total) => {
                let (workers, index) = (workers.max(1) as u64, index as u64);
                total / workers + u64::from(index < total % workers)
            }
        });
        Limit { duration: self.limit.duration, message_count }
    }

    /// Publishers and consumers.
    pub(in super::super) fn worker_count(&self) -> usize {
        self.publisher_count + self.consumer_count
    }
}

impl PerfArgs {
    /// Checks the options against each other and fills in the defaults.
    ///
    /// # Errors
    /// [`PerfError::Usage`] that names the option and what it would have to be.
    pub(in super::super) fn into_plan(self) -> Result<Plan, PerfError> {
        self.check()?;
        let queues = QueuePlan::of(&self)?;
        self.check_exclusive(queues.names.len())?;
        let count = self.count.map(Count::Each).or(self.total_count.map(Count::Total));
        let is_open_ended = self.time.is_none() && count.is_none();
        let time = self.time.or(is_open_ended.then_some(DEFAULT_SECONDS));
        let duration = time.map(|time| seconds("--time", time)).transpose()?;
        let warmup = self.warmup.map_or(Ok(Duration::ZERO), |warmup| seconds("--warmup", warmup))?;
        let shared_rate = self.total_rate.map(|rate| rate / self.publishers.max(1) as f64);
        Ok(Plan {
            uri: Uri::parse(&self.uri)?,
            publisher_count: self.publishers,
            consumer_count: self.consumers,
            confirm_window: self.confirm,
            tx: self.tx,
            batch: self.batch,
            rate_per_second: self.rate.or(shared_rate),
            limit: RunLimit { duration: duration.map(|duration| duration + warmup), count },
            is_open_ended,
            warmup,
            drain_limit: seconds("--drain", self.drain)?,
            exchange: ExchangePlan::of(&self)?,
            consuming: ConsumingPlan {
                ack_batch: self.ack_batch,
                prefetch: self.effective_prefetch(queues.are_streams())?,
                nack_every: self.nack_every,
                requeue: self.requeue,
                work: self.consumer_latency.unwrap_or(Duration::ZERO),
                polling_interval: self.get.then_some(self.polling_interval),
                arguments: self.consumer_arguments,
            },
            queues,
            messages: MessagePlan {
                properties: Properties::new(self.persistent, &self.properties, &self.headers),
                sizes: self.size,
                random_body: self.random_body,
                persistent: self.persistent,
                mandatory: self.mandatory,
            },
            broker_pid: self.pid,
            json: self.json,
        })
    }

    /// Room for ten batches, so that the broker need not wait for an ack; 0 (unlimited) without acks.
    fn effective_prefetch(&self, streams: bool) -> Result<u16, PerfError> {
        match self.prefetch {
            Some(0) if streams => Err(PerfError::Usage("consumers of streams need a --prefetch above 0".to_owned())),
            Some(prefetch) if prefetch > 0 && u32::from(prefetch) < self.ack_batch => Err(PerfError::Usage(format!(
                "--prefetch {prefetch} is below --ack-batch {}: the batch would never fill",
                self.ack_batch
            ))),
            Some(prefetch) => Ok(prefetch),
            None if self.ack_batch == 0 || self.get => Ok(0),
            None => {
                // Above what 16 bits hold, unlimited is the nearest thing, where it is allowed.
                let highest = if streams { u16::MAX } else { 0 };
                Ok(u16::try_from(self.ack_batch.saturating_mul(10).max(DEFAULT_PREFETCH)).unwrap_or(highest))
            }
        }
    }
}

fn seconds(option: &str, value: f64) -> Result<Duration, PerfError> {
    if value > 0.0 && value <= MAX_SECONDS {
        Ok(Duration::from_secs_f64(value))
    } else {
        Err(PerfError::Usage(format!("{option} must be above 0, and at most {MAX_SECONDS} seconds")))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct CommandLine {
        #[command(flatten)]
        perf: PerfArgs,
    }

    pub(in super::super) fn plan(options: &str) -> Result<Plan, PerfError> {
        let words = std::iter::once("perf").chain(options.split_whitespace());
        CommandLine::try_parse_from(words).expect(options).perf.into_plan()
    }

    pub(in super::super) fn refusal(options: &str) -> String {
        plan(options).expect_err(options).to_string()
    }

    #[test]
    fn without_options_a_pair_sends_small_transient_messages_for_ten_seconds() {
        let plan = plan("").expect("defaults");
        assert_eq!((plan.publisher_count, plan.consumer_count), (1, 1));
        assert_eq!(plan.messages.sizes, Sizes::Each(16));
        assert_eq!(plan.limit_of(0), Limit { duration: Some(Duration::from_secs(10)), message_count: None });
        assert_eq!((plan.consuming.prefetch, plan.consuming.ack_batch, plan.confirm_window), (0, 0, None));
        assert_eq!(plan.queues.names, ["perf-test"]);
        assert!(!plan.queues.durable && !plan.messages.persistent);
        assert_eq!(plan.copies(), Some(1));
    }

    #[test]
    fn persistent_implies_a_durable_queue_unless_told_otherwise() {
        assert!(plan("--persistent").expect("valid").queues.durable);
        assert!(!plan("--persistent --transient-queue").expect("valid").queues.durable);
        assert!(plan("--durable").expect("valid").queues.durable);
    }

    #[test]
    fn the_default_prefetch_leaves_room_for_ten_batches() {
        let prefetch = |options| plan(options).expect(options).consuming.prefetch;
        assert_eq!(prefetch("--ack-batch 1"), 1_000);
        assert_eq!(prefetch("--multi-ack-every 1000"), 10_000);
        assert_eq!(prefetch("--ack-batch 10000"), 0);
        assert_eq!(prefetch("--ack-batch 10000 --queue-type stream"), 65_535);
        assert_eq!(prefetch("--ack-batch 100 --prefetch 100"), 100);
        assert_eq!(prefetch("--ack-batch 100 --prefetch 0"), 0);
        assert!(refusal("--ack-batch 100 --prefetch 99").contains("never fill"));
    }

    #[test]
    fn a_count_lifts_the_time_limit() {
        let limit = |options| plan(options).expect(options).limit_of(0);
        assert_eq!(limit("--count 5"), Limit { duration: None, message_count: Some(5) });
        assert_eq!(limit("--count 5 --time 0.5").duration, Some(Duration::from_millis(500)));
    }

    #[test]
    fn a_total_count_and_a_total_rate_are_shared_out() {
        let plan = plan("-x 3 --total-count 11 --total-rate 30").expect("valid");
        assert_eq!([0, 1, 2].map(|index| plan.limit_of(index).message_count), [Some(4), Some(4), Some(3)]);
        assert_eq!(plan.rate_per_second, Some(10.0));
    }

    #[test]
    fn the_warm_up_comes_on_top_of_the_time() {
        let plan = plan("--warmup 2 --time 3").expect("valid");
        assert_eq!((plan.warmup.as_secs(), plan.limit_of(0).duration), (2, Some(Duration::from_secs(5))));
    }

    #[test]
    fn workers_use_the_queues_in_turn() {
        let plan = plan("--queue q --queues 3 -x 4").expect("valid");
        assert_eq!([0, 1, 2, 3].map(|index| plan.queue_of(index)), ["q-1", "q-2", "q-3", "q-1"]);
        assert_eq!(plan.exchange.routing_key_of("q-2"), "q-2");
    }

    #[test]
    fn impossible_loads_are_refused_with_a_reason() {
        for (options, reason) in [
            ("-x 0 -y 0", "nothing to do"),
            ("-x 100001", "--publishers"),
            ("--confirm 0", "--confirm"),
            ("--rate 0", "--rate"),
            ("--rate NaN", "--rate"),
            ("--total-rate -1", "--total-rate"),
            ("--tx 0", "--tx"),
            ("--time 0", "--time"),
            ("--time inf", "--time"),
            ("--warmup 0", "--warmup"),
            ("--drain 0", "--drain"),
            ("--count 0", "--count"),
            ("--total-count 0", "--count"),
            ("--batch 0", "--batch"),
            ("--exclusive -y 2", "--exclusive"),
            ("--nack-every 2", "--ack-batch"),
            ("--nack-every 1 --requeue --ack-batch 1", "--requeue"),
            ("--nack-every 0 --ack-batch 1", "--nack-every"),
            ("--property app_id=a --property app_id=b", "--property"),
            ("--uri localhost:5672", "amqp://"),
        ] {
            let refusal = refusal(&options.replace("-rate -1", "-rate=-1"));
            assert!(refusal.contains(reason), "{options}: {refusal}");
        }
    }
}
