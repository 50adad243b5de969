//! The store without a broker: what building a round costs, and what committing one costs on this disk.
//!
//! `cargo bench --bench store`. The rounds go to a directory under the target directory of the build, so that it is a
//! disk that is measured and not a tmpfs.

use std::hint::black_box;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use leveret::store::{
    Durability, QueueId, QueueSeq, QueueStateRecord, Round, RoundBuilder, RoundSource, Store, StoreOptions,
    WatermarkListener,
};

/// Records a round, and bytes a record.
const ROUNDS: [(u64, usize); 4] = [(1, 200), (100, 200), (1_000, 200), (1_000, 16)];

/// A queue whose every round holds the same number of the same record, and that consumes what it wrote.
struct SteadyQueue {
    id: QueueId,
    tail: Mutex<QueueSeq>,
    records: u64,
    record: Vec<u8>,
}

impl RoundSource for SteadyQueue {
    fn drain(&self, round: &mut RoundBuilder) {
        let mut tail = self.tail.lock().expect("not poisoned");
        for seq in *tail..*tail + self.records {
            round.append(self.id, seq, &self.record);
        }
        *tail += self.records;
        let state = QueueStateRecord { tail: *tail, ..QueueStateRecord::default() };
        round.put_state(self.id, &state);
    }

    fn round_ended(&self, committed: bool) {
        assert!(committed);
    }
}

/// What a connection's writer does with a confirm: sleeps until it is told.
#[derive(Default)]
struct Confirms {
    watermark: Mutex<Round>,
    moved: Condvar,
}

impl WatermarkListener for Confirms {
    fn on_watermark(&self, watermark: Round, _: bool) {
        *self.watermark.lock().expect("not poisoned") = watermark;
        self.moved.notify_one();
    }
}

fn build_rounds(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("build_round");
    for (records, size) in ROUNDS {
        let record = vec![7u8; size];
        group.throughput(Throughput::Elements(records));
        group.bench_function(BenchmarkId::from_parameter(format!("{records} x {size} B")), |bencher| {
            bencher.iter_with_large_drop(|| {
                let mut round = RoundBuilder::new();
                for seq in 0..records {
                    round.append(QueueId(1), seq, black_box(&record));
                }
                round
            });
        });
    }
    group.finish();
}

fn commit_rounds(criterion: &mut Criterion) {
    let directory = tempfile::tempdir_in(Path::new(env!("CARGO_TARGET_TMPDIR"))).expect("a directory to write to");
    let options = StoreOptions { path: directory.path().to_owned(), ..StoreOptions::default() };
    let (store, _) = Store::open(options).expect("a fresh store");
    let confirms = Arc::new(Confirms::default());
    let listener: Arc<dyn WatermarkListener> = Arc::clone(&confirms) as _;
    let mut group = criterion.benchmark_group("commit_round");
    group.measurement_time(Duration::from_secs(4)).sample_size(20);
    for (records, size) in ROUNDS {
        let id = store.allocate_queue_id();
        let queue = Arc::new(SteadyQueue { id, tail: Mutex::new(0), records, record: vec![7; size] });
        group.throughput(Throughput::Elements(records));
        group.bench_function(BenchmarkId::from_parameter(format!("{records} x {size} B")), |bencher| {
            bencher.iter_custom(|rounds| {
                let start = Instant::now();
                for _ in 0..rounds {
                    let round = store.mark_dirty(Arc::clone(&queue) as _);
                    if store.when_durable(round, &listener) {
                        let watermark = confirms.watermark.lock().expect("not poisoned");
                        drop(confirms.moved.wait_while(watermark, |reached| *reached < round));
                    }
                }
                start.elapsed()
            });
        });
        store.delete_queue(id);
    }
    group.finish();
    store.shutdown().expect("a clean end");
}

/// The floor under `commit_round`: the same bytes appended to a file whose blocks are there already.
fn append_and_sync(criterion: &mut Criterion) {
    use std::os::unix::fs::FileExt;
    const FILE_BYTES: u64 = 64 * 1024 * 1024;
    let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).expect("a file to write to");
    let zeros = vec![0u8; 1024 * 1024];
    for at in (0..FILE_BYTES).step_by(zeros.len()) {
        file.write_all_at(&zeros, at).expect("room on the disk");
    }
    file.sync_all().expect("a disk that syncs");
    let mut group = criterion.benchmark_group("append_and_fdatasync");
    group.measurement_time(Duration::from_secs(4)).sample_size(20);
    for (records, size) in ROUNDS {
        let bytes = vec![7u8; records as usize * (size + 7)];
        let mut at = 0;
        group.throughput(Throughput::Elements(records));
        group.bench_function(BenchmarkId::from_parameter(format!("{records} x {size} B")), |bencher| {
            bencher.iter(|| {
                at = if at + bytes.len() as u64 > FILE_BYTES { 0 } else { at };
                file.write_all_at(&bytes, at).expect("room on the disk");
                file.sync_data().expect("a disk that syncs");
                at += bytes.len() as u64;
            });
        });
    }
    group.finish();
}

fn read_back(criterion: &mut Criterion) {
    const RECORDS: u64 = 100_000;
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory to write to");
    let options =
        StoreOptions { path: directory.path().to_owned(), durability: Durability::Os, ..StoreOptions::default() };
    let (store, _) = Store::open(options).expect("a fresh store");
    let queue = Arc::new(SteadyQueue {
        id: store.allocate_queue_id(),
        tail: Mutex::new(0),
        records: 1_000,
        record: vec![7; 200],
    });
    for _ in 0..RECORDS / queue.records {
        let round = store.mark_dirty(Arc::clone(&queue) as _);
        while store.watermark() < round {
            std::thread::yield_now();
        }
    }
    let mut group = criterion.benchmark_group("read_records");
    group.throughput(Throughput::Elements(RECORDS));
    group.bench_function("200 B", |bencher| {
        bencher.iter(|| {
            let mut bytes = 0;
            let each = &mut |_, record: &[u8]| bytes += record.len();
            store.read_records(queue.id, 0, RECORDS, usize::MAX, each).expect("a store that reads");
            bytes
        });
    });
    group.finish();
}

criterion_group!(benches, build_rounds, commit_rounds, append_and_sync, read_back);
criterion_main!(benches);
