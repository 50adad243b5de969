//! One figure of several runs, and how it compares with another broker's.

use serde::Serialize;

use super::options::Plan;

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Run {
    Done(Measurement),
    /// Why is on standard error.
    Failed,
}

/// The figures of one run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Measurement {
    /// Delivered; without consumers, published.
    pub(super) per_second: f64,
    pub(super) cpu_us_per_message: Option<f64>,
    /// Of paced runs.
    pub(super) latency: Option<Latency>,
    /// Delivered messages for each one published.
    pub(super) delivered_share: Option<f64>,
    /// Messages were missing, damaged, unconfirmed or refused.
    pub(super) is_lacking: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Latency {
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    pub(super) p999_us: f64,
}

/// Medians of the runs of one shape against one broker; each figure on its own.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Cell {
    pub(super) broker: String,
    /// `None`: a run failed, or there was none.
    pub(super) median: Option<Measurement>,
    /// From the slowest run's rate to the fastest one's, as a part of the median.
    pub(super) spread: Option<f64>,
    pub(super) ratios: Ratios,
    pub(super) runs: Vec<Measurement>,
}

/// Shares of the figures of the broker that is compared with; `None` where one of the two is missing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(super) struct Ratios {
    pub(super) per_second: Option<f64>,
    pub(super) cpu_us_per_message: Option<f64>,
    pub(super) p99_us: Option<f64>,
}

/// One line: a shape and its figures, in the order of the brokers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Line {
    pub(super) shape: String,
    pub(super) options: String,
    pub(super) cells: Vec<Cell>,
}

/// Everything that was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Comparison {
    pub(super) run_count: u32,
    pub(super) seconds: f64,
    pub(super) against: String,
    pub(super) brokers: Vec<String>,
    pub(super) lines: Vec<Line>,
}

impl Comparison {
    /// Adds up `runs`, which are by shape and then by broker.
    pub(super) fn of(plan: &Plan, runs: &[Vec<Vec<Run>>]) -> Self {
        let names: Vec<String> = plan.targets.iter().map(|target| target.name.clone()).collect();
        let lines = plan.shapes.iter().zip(runs).map(|(shape, runs)| Line {
            shape: shape.title.clone(),
            options: shape.words.join(" "),
            cells: cells(&names, plan.base, runs),
        });
        Self {
            run_count: plan.run_count,
            seconds: plan.seconds,
            against: names[plan.base].clone(),
            lines: lines.collect(),
            brokers: names,
        }
    }
}

fn cells(names: &[String], base: usize, runs: &[Vec<Run>]) -> Vec<Cell> {
    let mut cells: Vec<Cell> = names.iter().zip(runs).map(|(name, runs)| Cell::of(name, runs)).collect();
    if let Some(base) = cells.get(base).and_then(|cell| cell.median) {
        for cell in &mut cells {
            cell.ratios = cell.median.map(|median| Ratios::of(&median, &base)).unwrap_or_default();
        }
    }
    cells
}

impl Cell {
    fn of(broker: &str, runs: &[Run]) -> Self {
        let done: Vec<Measurement> = runs
            .iter()
            .filter_map(|run| match run {
                Run::Done(measurement) => Some(*measurement),
                Run::Failed => None,
            })
            .collect();
        let complete = if done.len() == runs.len() { median_of(&done) } else { None };
        Self {
            broker: broker.to_owned(),
            median: complete,
            spread: complete.and_then(|median| spread(&done, median.per_second)),
            ratios: Ratios::default(),
            runs: done,
        }
    }
}

impl Ratios {
    fn of(cell: &Measurement, base: &Measurement) -> Self {
        let ratio = |value: Option<f64>, base: Option<f64>| {
            value.zip(base).filter(|(_, base)| *base > 0.0).map(|(value, base)| value / base)
        };
        let p99 = |measurement: &Measurement| measurement.latency.map(|latency| latency.p99_us);
        Self {
            per_second: ratio(Some(cell.per_second), Some(base.per_second)),
            cpu_us_per_message: ratio(cell.cpu_us_per_message, base.cpu_us_per_message),
            p99_us: ratio(p99(cell), p99(base)),
        }
    }
}

/// The median of each figure over the runs that have it; lacking if any run was.
fn median_of(runs: &[Measurement]) -> Option<Measurement> {
    let of = |figure: fn(&Measurement) -> Option<f64>| median(runs.iter().filter_map(figure).collect());
    let p50 = of(|run| run.latency.map(|latency| latency.p50_us));
    let p99 = of(|run| run.latency.map(|latency| latency.p99_us));
    let p999 = of(|run| run.latency.map(|latency| latency.p999_us));
    Some(Measurement {
        per_second: of(|run| Some(run.per_second))?,
        cpu_us_per_message: of(|run| run.cpu_us_per_message),
        latency: p50.zip(p99).zip(p999).map(|((p50_us, p99_us), p999_us)| Latency { p50_us, p99_us, p999_us }),
        delivered_share: of(|run| run.delivered_share),
        is_lacking: runs.iter().any(|run| run.is_lacking),
    })
}

/// The middle one; of an even number the mean of the middle two.
pub(super) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let upper = *values.get(middle)?;
    Some(if values.len().is_multiple_of(2) { f64::midpoint(values[middle - 1], upper) } else { upper })
}

fn spread(runs: &[Measurement], median: f64) -> Option<f64> {
    let rates = || runs.iter().map(|run| run.per_second);
    (median > 0.0).then(|| (rates().fold(0.0, f64::max) - rates().fold(f64::INFINITY, f64::min)) / median)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(per_second: f64, cpu: Option<f64>) -> Measurement {
        Measurement {
            per_second,
            cpu_us_per_message: cpu,
            latency: None,
            delivered_share: Some(1.0),
            is_lacking: false,
        }
    }

    fn paced(p99_us: f64) -> Measurement {
        Measurement { latency: Some(Latency { p50_us: 1.0, p99_us, p999_us: 100.0 }), ..run(1_000.0, None) }
    }

    #[test]
    fn the_median_is_the_middle_or_between_the_middle_two() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn each_figure_has_its_own_median_and_one_lacking_run_marks_the_cell() {
        let lacking = Measurement { is_lacking: true, ..run(30.0, Some(0.1)) };
        let cell = Cell::of("x", &[run(10.0, Some(0.3)), run(20.0, Some(0.2)), lacking].map(Run::Done));
        let median = cell.median.expect("three runs");
        assert_eq!((median.per_second, median.cpu_us_per_message, median.is_lacking), (20.0, Some(0.2), true));
        assert_eq!((cell.spread, cell.runs.len()), (Some(1.0), 3));
    }

    #[test]
    fn a_failed_run_makes_the_whole_cell_a_gap() {
        let cell = Cell::of("x", &[Run::Done(run(10.0, None)), Run::Failed]);
        assert_eq!((cell.median, cell.spread, cell.runs.len()), (None, None, 1));
        assert_eq!(Cell::of("x", &[]).median, None);
    }

    #[test]
    fn ratios_are_to_the_chosen_broker_and_only_of_what_both_have() {
        let names = ["a", "b"].map(str::to_owned);
        let runs = [vec![Run::Done(run(10.0, None))], vec![Run::Done(run(40.0, Some(2.0)))]];
        let compared = cells(&names, 1, &runs);
        assert_eq!(compared[0].ratios.per_second, Some(0.25));
        assert_eq!(compared[0].ratios.cpu_us_per_message, None);
        assert_eq!(compared[1].ratios.cpu_us_per_message, Some(1.0));
        let gap = cells(&names, 0, &[vec![Run::Failed], vec![Run::Done(run(40.0, Some(2.0)))]]);
        assert_eq!(gap[1].ratios, Ratios::default());
    }

    #[test]
    fn latencies_are_compared_at_the_99th_percentile() {
        let names = ["a", "b"].map(str::to_owned);
        let runs = [[10.0, 20.0, 90.0], [40.0, 60.0, 50.0]].map(|p99s| p99s.map(|p99| Run::Done(paced(p99))).to_vec());
        assert_eq!(cells(&names, 0, &runs)[1].ratios.p99_us, Some(2.5));
    }
}
