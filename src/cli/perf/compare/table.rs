//! A comparison as text for a terminal, and as a Markdown table for a page.

use super::super::figures::{duration, percent, significant};
use super::super::report::grouped;
use super::statistics::{Cell, Comparison, Latency, Line, Measurement, Ratios, Run};

const HEADINGS: [&str; 11] =
    ["shape", "broker", "msg/s", "spread", "CPU/msg", "p50", "p99", "p99.9", "delivered", "rate ratio", "CPU ratio"];
/// Columns of words; the others are numbers, and stand to the right.
const WORD_COLUMNS: usize = 2;
const GAP: &str = "-";
const LACKING: &str = " !";

/// One run, for the line that shows how far things are.
pub(super) fn brief(run: &Run) -> String {
    match run {
        Run::Failed => GAP.to_owned(),
        Run::Done(measurement) => figures(measurement),
    }
}

/// A line for each shape and broker, in columns; below it what the marks mean.
pub(super) fn text(comparison: &Comparison) -> String {
    let mut rows = vec![HEADINGS.map(str::to_owned)];
    for line in &comparison.lines {
        rows.extend(line.cells.iter().enumerate().map(|(index, cell)| {
            let title = if index == 0 { line.shape.clone() } else { String::new() };
            row(title, cell)
        }));
    }
    let mut text = format!(
        "medians of {} runs of {} s; ratios to {}\n\n",
        comparison.run_count, comparison.seconds, comparison.against
    );
    text += &aligned(&rows);
    let any = |applies: &dyn Fn(&Cell) -> bool| comparison.lines.iter().flat_map(|line| &line.cells).any(applies);
    if any(&|cell| cell.median.is_none()) {
        text += "\n- in place of a rate: a run failed";
    }
    if any(&is_lacking) {
        text += "\n! behind a rate: messages were missing, damaged or unconfirmed";
    }
    if any(&|cell| cell.median.is_some() && cell.runs.len() < comparison.run_count as usize) {
        text += "\ncut short: not every figure has all its runs";
    }
    text.trim_end().to_owned() + "\n"
}

/// A line for each shape, a column for each broker; ratios stand behind the figures they belong to.
pub(super) fn markdown(comparison: &Comparison) -> String {
    let mut text = format!(
        "| shape (median of {} x {} s; CPU is the broker's per message; in brackets: ratio to {}) | {} |\n",
        comparison.run_count,
        comparison.seconds,
        escaped(&comparison.against),
        comparison.brokers.iter().map(|name| escaped(name)).collect::<Vec<_>>().join(" | ")
    );
    text += &"|---".repeat(comparison.brokers.len() + 1);
    text += "|\n";
    for line in &comparison.lines {
        text += &markdown_line(line, &comparison.against);
    }
    text
}

fn markdown_line(line: &Line, against: &str) -> String {
    let cells = line.cells.iter().map(|cell| match &cell.median {
        None => GAP.to_owned(),
        Some(median) if cell.broker == against => figures(median),
        Some(median) => with_ratios(median, &cell.ratios),
    });
    format!("| {} | {} |\n", escaped(&line.shape), cells.collect::<Vec<_>>().join(" | "))
}

fn escaped(text: &str) -> String {
    text.replace('|', "\\|")
}

fn figures(measurement: &Measurement) -> String {
    with_ratios(measurement, &Ratios::default())
}

/// Of a paced run the latency says more than the rate, which is given.
fn with_ratios(measurement: &Measurement, ratios: &Ratios) -> String {
    let mut parts = vec![match measurement.latency {
        Some(Latency { p50_us, p99_us, p999_us }) => format!(
            "p50 {}, p99 {}{}, p99.9 {}",
            duration(p50_us),
            duration(p99_us),
            bracketed(ratios.p99_us),
            duration(p999_us)
        ),
        None => format!("{}/s{}", grouped(measurement.per_second), bracketed(ratios.per_second)),
    }];
    if let Some(cpu) = measurement.cpu_us_per_message {
        parts.push(format!("CPU {} µs{}", significant(cpu), bracketed(ratios.cpu_us_per_message)));
    }
    if let Some(share) = measurement.delivered_share.filter(|share| *share != 1.0) {
        parts.push(format!("{} delivered", percent(share)));
    }
    parts.join("; ") + if measurement.is_lacking { LACKING } else { "" }
}

fn bracketed(ratio: Option<f64>) -> String {
    ratio.map(|ratio| format!(" (x{})", significant(ratio))).unwrap_or_default()
}

fn is_lacking(cell: &Cell) -> bool {
    cell.median.is_some_and(|median| median.is_lacking)
}

fn row(title: String, cell: &Cell) -> [String; HEADINGS.len()] {
    let or_gap = |text: Option<String>| text.unwrap_or_else(|| GAP.to_owned());
    let median = cell.median.as_ref();
    let latency = |figure: fn(&Latency) -> f64| {
        or_gap(median.and_then(|median| median.latency).map(|latency| duration(figure(&latency))))
    };
    let rate = median.map(|median| grouped(median.per_second) + if median.is_lacking { LACKING } else { "" });
    [
        title,
        cell.broker.clone(),
        or_gap(rate),
        or_gap(cell.spread.map(percent)),
        or_gap(median.and_then(|median| median.cpu_us_per_message).map(|cpu| significant(cpu) + " µs")),
        latency(|latency| latency.p50_us),
        latency(|latency| latency.p99_us),
        latency(|latency| latency.p999_us),
        or_gap(median.and_then(|median| median.delivered_share).map(percent)),
        or_gap(cell.ratios.per_second.map(significant)),
        or_gap(cell.ratios.cpu_us_per_message.map(significant)),
    ]
}

/// Columns as wide as their widest entry, two spaces apart.
fn aligned<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(widths).enumerate().map(|(column, (cell, width))| {
            if column < WORD_COLUMNS { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
        });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measurement(per_second: f64, cpu: Option<f64>) -> Measurement {
        Measurement {
            per_second,
            cpu_us_per_message: cpu,
            latency: None,
            delivered_share: Some(1.0),
            is_lacking: false,
        }
    }

    fn cell(broker: &str, median: Option<Measurement>, ratios: Ratios) -> Cell {
        Cell { broker: broker.into(), median, spread: median.map(|_| 0.25), ratios, runs: Vec::new() }
    }

    fn sample() -> Comparison {
        let twice = Ratios { per_second: Some(2.0), cpu_us_per_message: Some(0.5), p99_us: None };
        let latency = Some(Latency { p50_us: 12.34, p99_us: 1_500.0, p999_us: 2_000_000.0 });
        let late = Measurement { latency, is_lacking: true, delivered_share: Some(0.9999), ..measurement(10.0, None) };
        let slower = Ratios { per_second: Some(1.0), cpu_us_per_message: None, p99_us: Some(12.0) };
        Comparison {
            run_count: 3,
            seconds: 2.5,
            against: "a".into(),
            brokers: vec!["a".into(), "b|c".into()],
            lines: vec![
                Line {
                    shape: "16 B".into(),
                    options: String::new(),
                    cells: vec![
                        cell("a", Some(measurement(1_234_567.0, Some(0.0598))), Ratios::default()),
                        cell("b|c", Some(measurement(2_469_134.0, Some(0.0299))), twice),
                    ],
                },
                Line {
                    shape: "paced".into(),
                    options: String::new(),
                    cells: vec![cell("a", None, Ratios::default()), cell("b|c", Some(late), slower)],
                },
            ],
        }
    }

    #[test]
    fn the_text_table_is_aligned_and_explains_its_marks() {
        let shown = text(&sample());
        let lines: Vec<&str> = shown.lines().collect();
        assert_eq!(lines[0], "medians of 3 runs of 2.5 s; ratios to a");
        assert_eq!(
            lines[2],
            "shape  broker      msg/s  spread    CPU/msg      p50      p99   p99.9  delivered  rate ratio  CPU ratio"
        );
        assert_eq!(
            lines[4],
            "       b|c     2,469,134    25 %  0.0299 µs        -        -       -      100 %        2.00      0.500"
        );
        assert_eq!(
            lines[6],
            "       b|c          10 !    25 %          -  12.3 µs  1.50 ms  2.00 s     99.9 %        1.00          -"
        );
        assert!(shown.contains("- in place") && shown.contains("! behind"));
    }

    #[test]
    fn the_markdown_table_keeps_losing_lines_and_puts_ratios_behind_their_figures() {
        assert_eq!(
            markdown(&sample()),
            "| shape (median of 3 x 2.5 s; CPU is the broker's per message; in brackets: ratio to a) | a | b\\|c |\n\
             |---|---|---|\n\
             | 16 B | 1,234,567/s; CPU 0.0598 µs | 2,469,134/s (x2.00); CPU 0.0299 µs (x0.500) |\n\
             | paced | - | p50 12.3 µs, p99 1.50 ms (x12.0), p99.9 2.00 s; 99.9 % delivered ! |\n"
        );
    }
}
