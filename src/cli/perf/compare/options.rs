//! The command line of `leveret perf compare`, and the validated [`Plan`] made from it.

use std::time::Duration;

use clap::Parser;

use super::super::error::PerfError;
use super::super::options::PerfArgs;
use super::super::uri::Uri;
use super::shapes::MATRIX;

const MAX_RUNS: u32 = 1_000;
/// What a run may take on top of publishing and draining: connecting, closing, deleting what is left.
const MARGIN: Duration = Duration::from_secs(60);
/// For a run that ends with a count of messages.
const COUNTED_RUN_LIMIT: Duration = Duration::from_secs(600);
/// Set for every run by the comparison itself.
const OWN_OPTIONS: [&str; 3] = ["--uri", "--pid", "--json"];

/// Runs the same loads against several brokers, in turns, and prints medians and ratios.
///
/// For each shape of load: messages per second, CPU time of the broker per message (with its process id), latency at a
/// fixed rate, what part arrived, and how that compares with the first broker. "-" is a run that failed, "!" marks
/// messages that were missing or unconfirmed; why is on standard error. It starts no broker.
///
/// Examples:
///   leveret perf compare --a amqp://localhost,$(pidof leveret) --b rabbitmq=amqp://localhost:5673,$(pidof beam.smp)
///   leveret perf compare --a old=amqp://127.0.0.1:5672 --b new=amqp://127.0.0.1:5673 --only 'ack' --runs 3 --time 2
///   leveret perf compare --a … --b … --shape '4 KiB, two queues: --size 4096 --queues 2 -x 2 -y 2' --json
///   leveret perf compare --a … --b … --add '--batch 1'     as many small writes as small clients make
#[derive(Debug, Clone, clap::Args)]
#[command(verbatim_doc_comment)]
pub struct CompareArgs {
    /// First broker; PID is its process on this machine (for RabbitMQ that of beam.smp), without it no CPU is shown
    #[arg(long, value_name = "[NAME=]URI[,PID]")]
    a: String,
    /// Second broker
    #[arg(long, value_name = "[NAME=]URI[,PID]")]
    b: Option<String>,
    /// Third broker
    #[arg(long, value_name = "[NAME=]URI[,PID]")]
    c: Option<String>,
    /// Fourth broker
    #[arg(long, value_name = "[NAME=]URI[,PID]")]
    d: Option<String>,
    /// Runs of each shape against each broker
    #[arg(short = 'n', long, value_name = "N", default_value_t = 5)]
    runs: u32,
    /// Seconds of publishing in each run
    #[arg(short, long, value_name = "SECONDS", default_value_t = 5.0)]
    time: f64,
    /// A shape of load instead of the built-in ones; the options are those of leveret perf. Repeatable
    #[arg(long, value_name = "TITLE: OPTIONS")]
    shape: Vec<String>,
    /// Only the shapes whose title contains this
    #[arg(long, value_name = "SUBSTRING")]
    only: Option<String>,
    /// Options of leveret perf for every shape
    #[arg(long, value_name = "OPTIONS", default_value = "", allow_hyphen_values = true)]
    add: String,
    /// Broker that the others are compared with [default: the first]
    #[arg(long, value_name = "NAME")]
    against: Option<String>,
    /// Print a Markdown table: a line for each shape, a column for each broker
    #[arg(long, conflicts_with = "json")]
    markdown: bool,
    /// Print one JSON object, with the figures of every run
    #[arg(long)]
    json: bool,
}

/// A broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) name: String,
    pub(super) uri: String,
    pub(super) pid: Option<u32>,
}

/// A shape of load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) title: String,
    /// For `leveret perf`, but for where, whose process, and into which queue.
    pub(super) words: Vec<String>,
    pub(super) names_its_queue: bool,
    /// After so long a run has failed.
    pub(super) limit: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    Text,
    Markdown,
    Json,
}

/// A comparison with everything checked.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// At least one.
    pub(super) targets: Vec<Target>,
    /// Index of the one that the others are compared with.
    pub(super) base: usize,
    /// At least one.
    pub(super) shapes: Vec<Shape>,
    pub(super) run_count: u32,
    pub(super) seconds: f64,
    pub(super) form: Form,
}

impl CompareArgs {
    /// Checks everything that could make a run fail later, as far as that is known without the brokers.
    ///
    /// # Errors
    /// [`PerfError::Usage`] that names the option and what it would have to be.
    pub(super) fn into_plan(self) -> Result<Plan, PerfError> {
        if !(1..=MAX_RUNS).contains(&self.runs) {
            return usage(format!("--runs must be 1 to {MAX_RUNS}"));
        }
        let given = [("a", Some(&self.a)), ("b", self.b.as_ref()), ("c", self.c.as_ref()), ("d", self.d.as_ref())];
        let targets = given
            .into_iter()
            .filter_map(|(letter, text)| text.map(|text| Target::parse(letter, text)))
            .collect::<Result<Vec<_>, _>>()?;
        for (index, target) in targets.iter().enumerate() {
            if targets[..index].iter().any(|earlier| earlier.name == target.name) {
                return usage(format!("two brokers are named '{}'", target.name));
            }
        }
        Ok(Plan {
            base: base(&targets, self.against.as_deref())?,
            targets,
            shapes: self.shapes()?,
            run_count: self.runs,
            seconds: self.time,
            form: match (self.markdown, self.json) {
                (true, _) => Form::Markdown,
                (_, true) => Form::Json,
                _ => Form::Text,
            },
        })
    }

    fn shapes(&self) -> Result<Vec<Shape>, PerfError> {
        let mut all = MATRIX.to_vec();
        if !self.shape.is_empty() {
            all = self.shape.iter().map(|text| titled(text)).collect::<Result<_, _>>()?;
        }
        let wanted = |title: &str| self.only.as_ref().is_none_or(|part| title.contains(part.as_str()));
        let shapes = all
            .iter()
            .filter(|(title, _)| wanted(title))
            .map(|(title, options)| Shape::new(title, &format!("{options} {}", self.add), self.time))
            .collect::<Result<Vec<_>, _>>()?;
        if shapes.is_empty() {
            let titles = all.iter().map(|(title, _)| format!("\n  {title}")).collect::<String>();
            return usage(format!("--only fits none of the shapes:{titles}"));
        }
        Ok(shapes)
    }
}

impl Target {
    /// Reads `[NAME=]URI[,PID]`; without a name it is called by its option's letter.
    fn parse(letter: &str, text: &str) -> Result<Self, PerfError> {
        let (name, rest) = match text.split_once('=') {
            Some((name, rest)) if !name.contains("://") => (name, rest),
            _ => (letter, text),
        };
        let (uri, pid) = match rest.rsplit_once(',') {
            Some((uri, pid)) => match pid.trim().parse() {
                Ok(pid) => (uri, Some(pid)),
                Err(_) => return usage(format!("--{letter}: '{pid}' behind the comma is no process id")),
            },
            None => (rest, None),
        };
        if name.is_empty() {
            return usage(format!("--{letter}: the name before the '=' is empty"));
        }
        Uri::parse(uri)?;
        Ok(Self { name: name.to_owned(), uri: uri.to_owned(), pid })
    }
}

#[derive(Parser)]
#[command(no_binary_name = true, disable_help_flag = true)]
struct ShapeLine {
    #[command(flatten)]
    load: PerfArgs,
}

impl Shape {
    fn new(title: &str, options: &str, seconds: f64) -> Result<Self, PerfError> {
        let complain = |complaint: &str| PerfError::Usage(format!("shape '{title}': {complaint}"));
        let mut words: Vec<String> = options.split_whitespace().map(str::to_owned).collect();
        let own = |word: &&String| OWN_OPTIONS.contains(&word.split('=').next().unwrap_or_default());
        if let Some(word) = words.iter().find(own) {
            return Err(complain(&format!("leave out {word}, it is set for every run")));
        }
        let line = ShapeLine::try_parse_from(&words).map_err(|error| {
            let text = error.to_string();
            let first = text.lines().next().unwrap_or_default();
            complain(first.strip_prefix("error: ").unwrap_or(first))
        })?;
        let is_endless = line.load.time.is_none() && line.load.count.is_none() && line.load.total_count.is_none();
        if is_endless {
            words.push(format!("--time={seconds}"));
        }
        let timed = PerfArgs { time: line.load.time.or(is_endless.then_some(seconds)), ..line.load.clone() };
        let plan = timed.into_plan().map_err(|error| complain(&error.to_string()))?;
        let publishing = plan.limit.duration.unwrap_or(COUNTED_RUN_LIMIT);
        Ok(Self {
            title: title.to_owned(),
            names_its_queue: words
                .iter()
                .any(|word| word.starts_with("-q") || word.starts_with("--queue=") || word == "--queue"),
            words,
            limit: publishing + plan.drain_limit + MARGIN,
        })
    }
}

fn titled(text: &str) -> Result<(&str, &str), PerfError> {
    match text.split_once(": ") {
        Some((title, options)) if !title.trim().is_empty() => Ok((title.trim(), options)),
        _ => usage(format!("--shape '{text}' is not 'TITLE: OPTIONS'")),
    }
}

fn base(targets: &[Target], against: Option<&str>) -> Result<usize, PerfError> {
    let Some(wanted) = against else { return Ok(0) };
    targets.iter().position(|target| target.name == wanted).ok_or_else(|| {
        let names = targets.iter().map(|target| target.name.as_str()).collect::<Vec<_>>().join(", ");
        PerfError::Usage(format!("--against '{wanted}' is none of the brokers ({names})"))
    })
}

fn usage<T>(complaint: String) -> Result<T, PerfError> {
    Err(PerfError::Usage(complaint))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Parser)]
    #[command(no_binary_name = true)]
    struct CommandLine {
        #[command(flatten)]
        compare: CompareArgs,
    }

    fn plan(options: &[&str]) -> Result<Plan, PerfError> {
        CommandLine::try_parse_from(options).expect("well-formed").compare.into_plan()
    }

    fn refusal(options: &[&str]) -> String {
        plan(options).expect_err(&options.join(" ")).to_string()
    }

    fn target(name: &str, uri: &str, pid: Option<u32>) -> Target {
        Target { name: name.into(), uri: uri.into(), pid }
    }

    #[test]
    fn brokers_have_a_name_an_address_and_perhaps_a_process() {
        let plan = plan(&[
            "--a",
            "leveret=amqp://u:p@h:1/v?heartbeat=0,17",
            "--b",
            "amqp://h",
            "--d=x=amqp://h,18",
            "--against",
            "b",
        ])
        .expect("valid");
        assert_eq!(
            plan.targets,
            [
                target("leveret", "amqp://u:p@h:1/v?heartbeat=0", Some(17)),
                target("b", "amqp://h", None),
                target("x", "amqp://h", Some(18))
            ]
        );
        assert_eq!((plan.base, plan.run_count, plan.form), (1, 5, Form::Text));
    }

    #[test]
    fn the_built_in_matrix_is_made_of_valid_loads_that_last_as_long_as_wanted() {
        let plan = plan(&["--a", "amqp://h", "--time", "2.5"]).expect("valid");
        assert_eq!(plan.shapes.len(), MATRIX.len());
        assert!(plan.shapes.iter().all(|shape| shape.words.contains(&"--time=2.5".to_owned())));
        assert!(plan.shapes.iter().all(|shape| shape.limit == Duration::from_secs_f64(2.5 + 120.0 + 60.0)));
    }

    #[test]
    fn shapes_are_chosen_by_title_and_extended_by_add() {
        let chosen = plan(&["--a", "amqp://h", "--only", "ack each", "--add", "--batch 1"]).expect("valid").shapes;
        assert_eq!(chosen.len(), 2);
        assert_eq!(chosen[0].words, ["--size", "16", "--ack-batch", "1", "--batch", "1", "--time=5"]);
    }

    #[test]
    fn own_shapes_replace_the_matrix_and_may_say_how_long_and_where() {
        let given = [
            "--a",
            "amqp://h",
            "--shape",
            "big one: -s 99",
            "--shape",
            "counted: --count 7 --queue q",
            "--shape",
            "counted in all: --total-count 7",
        ];
        let shapes = plan(&given).expect("valid").shapes;
        assert_eq!(shapes[2].words, ["--total-count", "7"]);
        assert_eq!((shapes[0].title.as_str(), shapes[0].names_its_queue), ("big one", false));
        assert_eq!(shapes[0].words, ["-s", "99", "--time=5"]);
        assert_eq!(shapes[1].words, ["--count", "7", "--queue", "q"]);
        assert!(shapes[1].names_its_queue && shapes[1].limit > COUNTED_RUN_LIMIT);
    }

    #[test]
    fn what_cannot_work_is_refused_before_anything_runs() {
        for (options, reason) in [
            (&["--a", "localhost"][..], "amqp://"),
            (&["--a", "amqp://h,beam"], "no process id"),
            (&["--a", "=amqp://h"], "empty"),
            (&["--a", "x=amqp://h", "--b", "x=amqp://h:1"], "two brokers"),
            (&["--a", "x=amqp://h", "--against", "y"], "none of the brokers (x)"),
            (&["--a", "amqp://h", "--runs", "0"], "--runs"),
            (&["--a", "amqp://h", "--time", "0"], "--time"),
            (&["--a", "amqp://h", "--only", "2 GiB"], "16 B, auto-ack"),
            (&["--a", "amqp://h", "--shape", "no options"], "TITLE"),
            (&["--a", "amqp://h", "--shape", "t: --sise 1"], "--sise"),
            (&["--a", "amqp://h", "--shape", "t: --rate 0"], "shape 't': --rate"),
            (&["--a", "amqp://h", "--add", "--pid 4"], "leave out --pid"),
            (&["--a", "amqp://h", "--add", "--size 4", "--only", "16 KiB"], "--size"),
        ] {
            assert!(refusal(options).contains(reason), "{options:?}: {}", refusal(options));
        }
    }
}
