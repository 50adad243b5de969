//! What the hot functions cost, from a frame in the read buffer to its acknowledgement, by the clock.
//!
//! `cargo bench --bench hot -- session` measures those whose name has "session" in it. The same functions counted in
//! instructions, for machines on which time says little: `make instructions`.

mod cases;

use std::time::{Duration, Instant};

use cases::{CASES, Fixture};
use criterion::{Criterion, Throughput};

/// Of all cases together a few minutes.
const WARM_UP: Duration = Duration::from_millis(500);
const MEASUREMENT: Duration = Duration::from_secs(2);

fn main() {
    let mut criterion = Criterion::default().warm_up_time(WARM_UP).measurement_time(MEASUREMENT).configure_from_args();
    let fixture = Fixture::default();
    for case in CASES {
        let (group, name) = case.name.split_once(": ").expect("a name with a group");
        let mut group = criterion.benchmark_group(group);
        group.throughput(Throughput::Elements(case.messages));
        group.bench_function(name, |bencher| {
            let mut work = (case.build)(&fixture);
            bencher.iter_custom(|runs| {
                let mut elapsed = Duration::ZERO;
                for _ in 0..runs {
                    work.prepare();
                    let start = Instant::now();
                    work.run();
                    elapsed += start.elapsed();
                }
                elapsed
            });
        });
        group.finish();
    }
    criterion.final_summary();
}
