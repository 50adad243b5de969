//! The command line of `leveret perf`, and the validated [`Plan`] made from it.

use std::time::Duration;

use super::error::PerfError;
use super::uri::Uri;

/// Prefetch of an acknowledging consumer whose ack batch does not ask for more.
const DEFAULT_PREFETCH: u32 = 1_000;
const DEFAULT_SECONDS: f64 = 10.0;
const MAX_SIZE_BYTES: usize = 512 << 20;
const MAX_SECONDS: f64 = 1e7;
const MAX_WORKERS: usize = 100_000;
const MAX_CONFIRM_WINDOW: u64 = 10_000_000;
const MAX_SHORT_STRING_BYTES: usize = 255;

/// Loads a broker with messages and says how fast, how late and at what cost they arrive.
///
/// Publishers and consumers have a connection and a thread each. Without --rate they publish as fast as
/// the broker takes it. The queues are declared at the start and deleted at the end.
///
/// Examples:
///   leveret perf                                                 16 bytes, auto-ack, 10 s
///   leveret perf --persistent --confirm 1000 --ack-batch 100     safe messages, many under way
///   leveret perf --persistent --confirm 1 --ack-batch 1          one message after the other
///   leveret perf --rate 10000 --pid $(pidof leveret)             latency at a fixed rate, broker's cost
///   leveret perf -x 4 -y 4 --queues 4 --json                     four pairs, one JSON object
///   leveret perf -y 0 --count 1000000 --durable --keep           fill a queue
///   leveret perf -x 0 --durable --time 30                        empty it
#[derive(Debug, Clone, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct PerfArgs {
    /// Broker to load: amqp://user:pass@host:port/vhost, percent-encoded
    #[arg(long, value_name = "URI", default_value = "amqp://guest:guest@localhost:5672")]
    pub uri: String,
    /// Publishers, each with its own connection; 0 only consumes
    #[arg(short = 'x', long, value_name = "N", default_value_t = 1)]
    pub publishers: usize,
    /// Consumers, each with its own connection; 0 only publishes
    #[arg(short = 'y', long, value_name = "N", default_value_t = 1)]
    pub consumers: usize,
    /// Body size; from 8 bytes on, end-to-end latency is measured
    #[arg(short, long, value_name = "BYTES", default_value_t = 16)]
    pub size: usize,
    /// Publish with delivery-mode 2, to a durable queue
    #[arg(short, long)]
    pub persistent: bool,
    /// Declare a durable queue
    #[arg(long)]
    pub durable: bool,
    /// With --persistent: keep the queue transient
    #[arg(long, requires = "persistent", conflicts_with = "durable")]
    pub transient_queue: bool,
    /// Use publisher confirms, with at most this many unconfirmed messages per publisher
    #[arg(short, long, value_name = "WINDOW")]
    pub confirm: Option<u64>,
    /// Acknowledge every N messages with one ack; 0 consumes with no-ack
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    pub ack_batch: u32,
    /// Unacknowledged messages per consumer [default: 10 times the ack batch, at least 1000; without acks unlimited]
    #[arg(short = 'P', long, value_name = "N")]
    pub prefetch: Option<u16>,
    /// Messages per second and publisher; latency counts from when a message was due, not from when it was sent
    #[arg(short, long, value_name = "MSGS/S")]
    pub rate: Option<f64>,
    /// Messages per write at most, to look like many small clients [default: as many as 64 KiB hold]
    #[arg(short, long, value_name = "N")]
    pub batch: Option<u64>,
    /// Stop publishing (without publishers: consuming) after so long [default: 10, or none with --count]
    #[arg(short, long, value_name = "SECONDS")]
    pub time: Option<f64>,
    /// Messages per publisher (without publishers: per consumer)
    #[arg(long, value_name = "N")]
    pub count: Option<u64>,
    /// Longest wait after publishing until everything is delivered
    #[arg(long, value_name = "SECONDS", default_value_t = 120.0)]
    pub drain: f64,
    /// Queue to use
    #[arg(short, long, value_name = "NAME", default_value = "perf-test")]
    pub queue: String,
    /// Use NAME-1 to NAME-N; publisher and consumer i use queue i modulo N
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub queues: usize,
    /// Publish to this exchange, which must exist, and bind the queues to it
    #[arg(short, long, value_name = "NAME", default_value = "")]
    pub exchange: String,
    /// Routing key and binding key [default: the queue's name]
    #[arg(short = 'k', long, value_name = "KEY")]
    pub routing_key: Option<String>,
    /// Declare exclusive queues, each on the connection of its one consumer
    #[arg(long)]
    pub exclusive: bool,
    /// Declare auto-delete queues
    #[arg(long)]
    pub auto_delete: bool,
    /// Leave the queues at the end
    #[arg(long)]
    pub keep: bool,
    /// Use queues that exist: declare, bind and delete nothing
    #[arg(long, conflicts_with_all = ["durable", "exclusive", "auto_delete", "transient_queue"])]
    pub predeclared: bool,
    /// Process id of the broker on this machine: adds its CPU time, memory and disk writes to the report
    #[arg(long, value_name = "BROKER_PID")]
    pub pid: Option<u32>,
    /// Print one JSON object at the end, and no progress
    #[arg(long)]
    pub json: bool,
}

/// How long publishers publish; whichever comes first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Limit {
    pub(super) duration: Option<Duration>,
    /// Messages per publisher, or per consumer where there are no publishers.
    pub(super) message_count: Option<u64>,
}

/// What is to be declared, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct QueuePlan {
    /// At least one.
    pub(super) names: Vec<String>,
    pub(super) durable: bool,
    pub(super) exclusive: bool,
    pub(super) auto_delete: bool,
    pub(super) keep: bool,
    pub(super) predeclared: bool,
}

/// A load run with every number checked and every default filled in.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    pub(super) uri: Uri,
    pub(super) publisher_count: usize,
    pub(super) consumer_count: usize,
    pub(super) size_bytes: usize,
    pub(super) persistent: bool,
    /// `None`: no confirms. Never 0.
    pub(super) confirm_window: Option<u64>,
    /// Most messages per write; `None` leaves it to the block's size.
    pub(super) batch: Option<u64>,
    /// 0: no-ack.
    pub(super) ack_batch: u32,
    /// 0: unlimited.
    pub(super) prefetch: u16,
    pub(super) rate_per_second: Option<f64>,
    pub(super) limit: Limit,
    pub(super) drain_limit: Duration,
    pub(super) queues: QueuePlan,
    pub(super) exchange: String,
    pub(super) routing_key: Option<String>,
    pub(super) broker_pid: Option<u32>,
    pub(super) json: bool,
}

impl Plan {
    /// The queue that publisher or consumer `index` uses.
    pub(super) fn queue_of(&self, index: usize) -> &str {
        &self.queues.names[index % self.queues.names.len()]
    }

    /// The key that binds queue `name`, and with which it is published to.
    pub(super) fn routing_key_of<'a>(&'a self, name: &'a str) -> &'a str {
        self.routing_key.as_deref().unwrap_or(name)
    }

    /// Whether each message published arrives in exactly one of the queues, so that losses can be told.
    pub(super) fn is_one_to_one(&self) -> bool {
        self.exchange.is_empty() && self.routing_key.is_none()
    }
}

impl PerfArgs {
    /// Checks the options against each other and fills in the defaults.
    ///
    /// # Errors
    /// [`PerfError::Usage`] that names the option and what it would have to be.
    pub(super) fn into_plan(self) -> Result<Plan, PerfError> {
        self.check_load()?;
        self.check_names()?;
        let limit = self.limit()?;
        Ok(Plan {
            uri: Uri::parse(&self.uri)?,
            publisher_count: self.publishers,
            consumer_count: self.consumers,
            size_bytes: self.size,
            persistent: self.persistent,
            confirm_window: self.confirm,
            batch: self.batch,
            ack_batch: self.ack_batch,
            prefetch: self.effective_prefetch()?,
            rate_per_second: self.rate,
            limit,
            drain_limit: seconds("--drain", self.drain)?,
            queues: QueuePlan {
                names: queue_names(&self.queue, self.queues),
                durable: self.durable || (self.persistent && !self.transient_queue),
                exclusive: self.exclusive,
                auto_delete: self.auto_delete,
                keep: self.keep,
                predeclared: self.predeclared,
            },
            exchange: self.exchange,
            routing_key: self.routing_key,
            broker_pid: self.pid,
            json: self.json,
        })
    }

    fn check_load(&self) -> Result<(), PerfError> {
        let complaint = if self.publishers == 0 && self.consumers == 0 {
            "nothing to do with 0 publishers and 0 consumers".to_owned()
        } else if self.publishers.max(self.consumers).max(self.queues) > MAX_WORKERS {
            format!("--publishers, --consumers and --queues go up to {MAX_WORKERS} each")
        } else if self.size > MAX_SIZE_BYTES {
            format!("--size goes up to {MAX_SIZE_BYTES} bytes")
        } else if self.confirm.is_some_and(|window| window == 0 || window > MAX_CONFIRM_WINDOW) {
            format!("--confirm needs a window of 1 to {MAX_CONFIRM_WINDOW}; leave it out for no confirms")
        } else if self.rate.is_some_and(|rate| !(rate > 0.0 && rate <= 1e9)) {
            "--rate must be above 0, and at most 1e9".to_owned()
        } else if self.batch == Some(0) {
            "--batch must be at least 1".to_owned()
        } else if self.exclusive && self.consumers != self.queues {
            "--exclusive needs one consumer per queue (as many --consumers as --queues)".to_owned()
        } else {
            return Ok(());
        };
        Err(PerfError::Usage(complaint))
    }

    fn check_names(&self) -> Result<(), PerfError> {
        let longest_suffix = if self.queues > 1 { 1 + self.queues.to_string().len() } else { 0 };
        let complaint = if self.queues == 0 {
            "--queues must be at least 1".to_owned()
        } else if self.queue.is_empty() {
            "--queue must not be empty".to_owned()
        } else if self.queue.len() + longest_suffix > MAX_SHORT_STRING_BYTES
            || self.exchange.len() > MAX_SHORT_STRING_BYTES
            || self.routing_key.as_ref().is_some_and(|key| key.len() > MAX_SHORT_STRING_BYTES)
        {
            format!("--queue, --exchange and --routing-key hold up to {MAX_SHORT_STRING_BYTES} bytes")
        } else {
            return Ok(());
        };
        Err(PerfError::Usage(complaint))
    }

    fn limit(&self) -> Result<Limit, PerfError> {
        if self.count == Some(0) {
            return Err(PerfError::Usage("--count must be at least 1".to_owned()));
        }
        let chosen = self.time.or(self.count.is_none().then_some(DEFAULT_SECONDS));
        let duration = chosen.map(|time| seconds("--time", time)).transpose()?;
        Ok(Limit { duration, message_count: self.count })
    }

    /// Room for ten batches, so that the broker need not wait for an ack; 0 (unlimited) without acks.
    fn effective_prefetch(&self) -> Result<u16, PerfError> {
        match self.prefetch {
            Some(prefetch) if prefetch > 0 && u32::from(prefetch) < self.ack_batch => Err(PerfError::Usage(format!(
                "--prefetch {prefetch} is below --ack-batch {}: the batch would never fill",
                self.ack_batch
            ))),
            Some(prefetch) => Ok(prefetch),
            None if self.ack_batch == 0 => Ok(0),
            // Above what 16 bits hold, unlimited is the nearest thing.
            None => Ok(u16::try_from(self.ack_batch.saturating_mul(10).max(DEFAULT_PREFETCH)).unwrap_or(0)),
        }
    }
}

fn queue_names(name: &str, count: usize) -> Vec<String> {
    match count {
        1 => vec![name.to_owned()],
        _ => (1..=count).map(|number| format!("{name}-{number}")).collect(),
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
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct CommandLine {
        #[command(flatten)]
        perf: PerfArgs,
    }

    fn plan(options: &str) -> Result<Plan, PerfError> {
        let words = std::iter::once("perf").chain(options.split_whitespace());
        CommandLine::try_parse_from(words).expect(options).perf.into_plan()
    }

    fn refusal(options: &str) -> String {
        plan(options).expect_err(options).to_string()
    }

    #[test]
    fn without_options_a_pair_sends_small_transient_messages_for_ten_seconds() {
        let plan = plan("").expect("defaults");
        assert_eq!((plan.publisher_count, plan.consumer_count, plan.size_bytes), (1, 1, 16));
        assert_eq!(plan.limit, Limit { duration: Some(Duration::from_secs(10)), message_count: None });
        assert_eq!((plan.prefetch, plan.ack_batch, plan.confirm_window), (0, 0, None));
        assert_eq!(plan.queues.names, ["perf-test"]);
        assert!(!plan.queues.durable && !plan.persistent && plan.is_one_to_one());
    }

    #[test]
    fn persistent_implies_a_durable_queue_unless_told_otherwise() {
        assert!(plan("--persistent").expect("valid").queues.durable);
        assert!(!plan("--persistent --transient-queue").expect("valid").queues.durable);
        assert!(plan("--durable").expect("valid").queues.durable);
    }

    #[test]
    fn the_default_prefetch_leaves_room_for_ten_batches() {
        let prefetch = |options| plan(options).expect(options).prefetch;
        assert_eq!(prefetch("--ack-batch 1"), 1_000);
        assert_eq!(prefetch("--ack-batch 1000"), 10_000);
        assert_eq!(prefetch("--ack-batch 10000"), 0);
        assert_eq!(prefetch("--ack-batch 100 --prefetch 100"), 100);
        assert_eq!(prefetch("--ack-batch 100 --prefetch 0"), 0);
        assert!(refusal("--ack-batch 100 --prefetch 99").contains("never fill"));
    }

    #[test]
    fn a_count_lifts_the_time_limit() {
        assert_eq!(plan("--count 5").expect("valid").limit, Limit { duration: None, message_count: Some(5) });
        assert_eq!(plan("--count 5 --time 0.5").expect("valid").limit.duration, Some(Duration::from_millis(500)));
    }

    #[test]
    fn several_queues_are_numbered_and_shared_out_in_turn() {
        let plan = plan("--queue q --queues 3 -x 4").expect("valid");
        assert_eq!(plan.queues.names, ["q-1", "q-2", "q-3"]);
        assert_eq!(plan.queue_of(3), "q-1");
        assert_eq!(plan.routing_key_of("q-2"), "q-2");
    }

    #[test]
    fn impossible_loads_are_refused_with_a_reason() {
        for (options, reason) in [
            ("-x 0 -y 0", "nothing to do"),
            ("--confirm 0", "--confirm"),
            ("--rate 0", "--rate"),
            ("--rate NaN", "--rate"),
            ("--time 0", "--time"),
            ("--time inf", "--time"),
            ("--drain 0", "--drain"),
            ("--count 0", "--count"),
            ("--batch 0", "--batch"),
            ("--queues 0", "--queues"),
            ("--size 999999999999", "--size"),
            ("--exclusive -y 2", "--exclusive"),
            ("--uri localhost:5672", "amqp://"),
        ] {
            assert!(refusal(options).contains(reason), "{options}: {}", refusal(options));
        }
        assert!(refusal(&format!("--queue {}", "q".repeat(256))).contains("255"));
        assert!(refusal(&format!("--queues 10 --queue {}", "q".repeat(253))).contains("255"));
    }
}
