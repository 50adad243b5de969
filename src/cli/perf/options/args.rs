//! The command line of `leveret perf`.

use std::time::Duration;

use super::super::fields::Field;
use super::super::properties::Property;
use super::sizes::Sizes;

const LOAD: &str = "Load";
const MESSAGES: &str = "Messages";
const QUEUES: &str = "Queues and exchanges";
const CONSUMERS: &str = "Consumers";

/// Loads a broker with messages and says how fast, how late and at what cost they arrive.
///
/// Publishers and consumers have a connection each, and a thread each as long as they are no hundreds. Without
/// --rate they publish as fast as the broker takes it. The queues (and the exchange, with --exchange-type) are
/// declared at the start and deleted at the end.
///
/// Examples:
///   leveret perf                                                 16 bytes, auto-ack, 10 s
///   leveret perf --persistent --confirm 1000 --ack-batch 100     safe messages, many under way
///   leveret perf --persistent --confirm 1 --ack-batch 1          one message after the other
///   leveret perf --rate 10000 --pid $(pidof leveret)             latency at a fixed rate, broker's cost
///   leveret perf -x 4 -y 4 --queues 4 --json                     four pairs, one JSON object
///   leveret perf -y 5 --queues 5 -e fan --exchange-type fanout   five copies of each message
///   leveret perf -x 1000 -y 1000 --queue-pattern 'q-%d' --queue-pattern-to 1000 --total-rate 20000
///   leveret perf --queue-type quorum --size 100-5000 --warmup 5  sizes at random, the first 5 s not counted
///   leveret perf -y 0 --count 1000000 --durable --keep           fill a queue
///   leveret perf -x 0 --durable                                  empty it
#[derive(Debug, Clone, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct PerfArgs {
    /// Broker to load: amqp://user:pass@host:port/vhost, percent-encoded
    #[arg(long, value_name = "URI", default_value = "amqp://guest:guest@localhost:5672")]
    pub uri: String,
    /// Process id of the broker on this machine: adds its CPU time, memory and disk writes to the report
    #[arg(long, value_name = "BROKER_PID")]
    pub pid: Option<u32>,
    /// Print one JSON object at the end, and no progress
    #[arg(long)]
    pub json: bool,

    /// Publishers, each with its own connection; 0 only consumes
    #[arg(short = 'x', long, value_name = "N", default_value_t = 1, help_heading = LOAD)]
    pub publishers: usize,
    /// Consumers, each with its own connection; 0 only publishes
    #[arg(short = 'y', long, value_name = "N", default_value_t = 1, help_heading = LOAD)]
    pub consumers: usize,
    /// Use publisher confirms, with at most this many unconfirmed messages per publisher
    #[arg(short, long, value_name = "WINDOW", help_heading = LOAD)]
    pub confirm: Option<u64>,
    /// Publish in transactions: commit every N messages, and wait for the answer
    #[arg(long, value_name = "N", conflicts_with = "confirm", help_heading = LOAD)]
    pub tx: Option<u64>,
    /// Messages per second and publisher; latency counts from when a message was due, not from when it was sent
    #[arg(short, long, value_name = "MSGS/S", help_heading = LOAD)]
    pub rate: Option<f64>,
    /// Messages per second of all publishers together
    #[arg(long, value_name = "MSGS/S", conflicts_with = "rate", help_heading = LOAD)]
    pub total_rate: Option<f64>,
    /// Messages per write at most, to look like many small clients [default: as many as 64 KiB hold]
    #[arg(short, long, value_name = "N", help_heading = LOAD)]
    pub batch: Option<u64>,
    /// Stop publishing (without publishers: consuming) after so long [default: 10, or none with --count;
    /// without publishers: when what was in the queues is consumed]
    #[arg(short, long, value_name = "SECONDS", help_heading = LOAD)]
    pub time: Option<f64>,
    /// Messages per publisher (without publishers: per consumer)
    #[arg(long, value_name = "N", help_heading = LOAD)]
    pub count: Option<u64>,
    /// Messages of all publishers together (without publishers: of all consumers)
    #[arg(long, value_name = "N", conflicts_with = "count", help_heading = LOAD)]
    pub total_count: Option<u64>,
    /// Run for so long before --time begins; rates, latencies and costs count from then on, losses from the start
    #[arg(long, value_name = "SECONDS", conflicts_with_all = ["count", "total_count"], help_heading = LOAD)]
    pub warmup: Option<f64>,
    /// Longest wait after publishing until everything is delivered
    #[arg(long, value_name = "SECONDS", default_value_t = 120.0, help_heading = LOAD)]
    pub drain: f64,

    /// Body size: one, several in turn (16,1024,65536), or a range at random (100-5000). From 8 bytes on,
    /// end-to-end latency is measured
    #[arg(short, long, visible_alias = "sizes", value_name = "BYTES", default_value = "16", value_parser = Sizes::parse,
        help_heading = MESSAGES)]
    pub size: Sizes,
    /// Fill bodies with bytes that do not compress, instead of zeros
    #[arg(long, help_heading = MESSAGES)]
    pub random_body: bool,
    /// Publish with delivery-mode 2, to a durable queue
    #[arg(short, long, help_heading = MESSAGES)]
    pub persistent: bool,
    /// Set a property: content_type, content_encoding, priority, correlation_id, reply_to, expiration, message_id,
    /// timestamp, type, user_id or app_id; may be repeated
    #[arg(long = "property", value_name = "NAME=VALUE", value_parser = Property::parse, help_heading = MESSAGES)]
    pub properties: Vec<Property>,
    /// Set a header; integers, true and false are recognised, "5" in double quotes is text; may be repeated
    #[arg(long = "header", value_name = "KEY=VALUE", value_parser = Field::parse, help_heading = MESSAGES)]
    pub headers: Vec<Field>,
    /// Publish as mandatory, and count what comes back
    #[arg(long, help_heading = MESSAGES)]
    pub mandatory: bool,

    /// Queue to use
    #[arg(short, long, value_name = "NAME", default_value = "perf-test", help_heading = QUEUES)]
    pub queue: String,
    /// Use NAME-1 to NAME-N; publisher and consumer i use queue i modulo N
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = QUEUES)]
    pub queues: usize,
    /// Use the queues of this pattern, in which %d (or %03d) is a number; publisher and consumer i use them in turn
    #[arg(long, value_name = "PATTERN", conflicts_with_all = ["queue", "queues"],
        requires = "queue_pattern_to", help_heading = QUEUES)]
    pub queue_pattern: Option<String>,
    /// First number of --queue-pattern
    #[arg(long, value_name = "N", default_value_t = 1, requires = "queue_pattern", help_heading = QUEUES)]
    pub queue_pattern_from: usize,
    /// Last number of --queue-pattern
    #[arg(long, value_name = "N", requires = "queue_pattern", help_heading = QUEUES)]
    pub queue_pattern_to: Option<usize>,
    /// Declare a durable queue
    #[arg(long, help_heading = QUEUES)]
    pub durable: bool,
    /// With --persistent: keep the queue transient
    #[arg(long, requires = "persistent", conflicts_with = "durable", help_heading = QUEUES)]
    pub transient_queue: bool,
    /// Declare exclusive queues, each on the connection of its one consumer
    #[arg(long, help_heading = QUEUES)]
    pub exclusive: bool,
    /// Declare auto-delete queues
    #[arg(long, help_heading = QUEUES)]
    pub auto_delete: bool,
    /// Type of the queues (x-queue-type); quorum queues and streams are durable
    #[arg(long, value_name = "TYPE", value_parser = ["classic", "quorum", "stream"], help_heading = QUEUES)]
    pub queue_type: Option<String>,
    /// Declare the queues with this argument, x-max-length=1000 for example; may be repeated
    #[arg(long = "queue-argument", value_name = "KEY=VALUE", value_parser = Field::parse, help_heading = QUEUES)]
    pub queue_arguments: Vec<Field>,
    /// Publish to this exchange, which must exist unless its type is given, and bind the queues to it
    #[arg(short, long, value_name = "NAME", default_value = "", help_heading = QUEUES)]
    pub exchange: String,
    /// Declare the exchange, and delete it at the end: direct, fanout, topic, headers or x-…. Queues are bound to a
    /// headers exchange with the values of --header
    #[arg(long, value_name = "TYPE", requires = "exchange", help_heading = QUEUES)]
    pub exchange_type: Option<String>,
    /// Declare the exchange with this argument; may be repeated
    #[arg(long = "exchange-argument", value_name = "KEY=VALUE", value_parser = Field::parse,
        requires = "exchange_type", help_heading = QUEUES)]
    pub exchange_arguments: Vec<Field>,
    /// Routing key and binding key [default: the queue's name]
    #[arg(short = 'k', long, value_name = "KEY", help_heading = QUEUES)]
    pub routing_key: Option<String>,
    /// Leave the queues, and the exchange, at the end
    #[arg(long, help_heading = QUEUES)]
    pub keep: bool,
    /// Use queues that exist: declare, bind and delete nothing
    #[arg(long, conflicts_with_all = ["durable", "exclusive", "auto_delete", "transient_queue", "queue_type",
        "queue_arguments", "exchange_type"], help_heading = QUEUES)]
    pub predeclared: bool,

    /// Acknowledge every N messages with one ack; 0 consumes with no-ack
    #[arg(short, long, visible_aliases = ["multi-ack", "multi-ack-every"], value_name = "N", default_value_t = 0,
        help_heading = CONSUMERS)]
    pub ack_batch: u32,
    /// Unacknowledged messages per consumer [default: 10 times the ack batch, at least 1000; without acks unlimited]
    #[arg(short = 'P', long, value_name = "N", help_heading = CONSUMERS)]
    pub prefetch: Option<u16>,
    /// Reject every Nth message, which is then dropped or dead-lettered
    #[arg(long, value_name = "N", help_heading = CONSUMERS)]
    pub nack_every: Option<u64>,
    /// Put what --nack-every rejects back into its queue; it counts as delivered when it was not rejected
    #[arg(long, requires = "nack_every", help_heading = CONSUMERS)]
    pub requeue: bool,
    /// Work for so long on each message before it is acknowledged: 1ms, 0.5s; a bare number is microseconds
    #[arg(short = 'L', long, value_name = "DURATION", value_parser = duration, help_heading = CONSUMERS)]
    pub consumer_latency: Option<Duration>,
    /// Ask for messages one by one (basic.get) instead of subscribing
    #[arg(long, visible_alias = "polling", conflicts_with_all = ["prefetch", "consumer_arguments"],
        help_heading = CONSUMERS)]
    pub get: bool,
    /// With --get: wait so long after the queue was empty
    #[arg(long, value_name = "DURATION", default_value = "1ms", value_parser = duration, requires = "get",
        help_heading = CONSUMERS)]
    pub polling_interval: Duration,
    /// Consume with this argument, x-priority=5 for example; may be repeated
    #[arg(long = "consumer-argument", value_name = "KEY=VALUE", value_parser = Field::parse, help_heading = CONSUMERS)]
    pub consumer_arguments: Vec<Field>,
}

/// Reads `1ms`, `20us`, `0.5s`, or a bare number of microseconds.
fn duration(text: &str) -> Result<Duration, String> {
    const LONGEST_SECONDS: f64 = 3_600.0;
    let text = text.trim();
    let (number, unit_seconds) = [("us", 1e-6), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0)]
        .iter()
        .find_map(|(unit, seconds)| Some((text.strip_suffix(unit)?, *seconds)))
        .unwrap_or((text, 1e-6));
    match number.trim().parse::<f64>() {
        Ok(number) if (0.0..=LONGEST_SECONDS).contains(&(number * unit_seconds)) => {
            Ok(Duration::from_secs_f64(number * unit_seconds))
        }
        Ok(_) => Err("it must be 0 to 1 hour".to_owned()),
        Err(_) => Err("it needs a number and a unit: 500us, 1ms, 0.5s".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_units_and_bare_numbers_are_microseconds() {
        assert_eq!(
            ["1ms", "250us", "0.5s", "1000"].map(|text| duration(text).expect(text).as_micros()),
            [1_000, 250, 500_000, 1_000]
        );
        for text in ["", "ms", "1h", "-1ms", "NaN", "1e9s"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
