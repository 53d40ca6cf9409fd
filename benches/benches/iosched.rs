//! A batch through the merger: 32 random requests, 32 that follow one another, and one.

use std::hint::black_box;
use std::time::Duration;

use benches::Error;
use benches::fixture::Random;
use criterion::{Criterion, Throughput};
use iosched::{Limits, Merger, Op, Request};

/// What blk-dataplane gives it.
const LIMITS: Limits = Limits {
    max_segments: 512,
    max_bytes: 1 << 20,
};

fn batch(len: u32, mut offset: impl FnMut(u32) -> u64) -> Vec<Request> {
    (0..len)
        .map(|tag| Request {
            op: Op::Read,
            offset: offset(tag) * 4096,
            len: 4096,
            segments: 1,
            tag,
        })
        .collect()
}

fn main() -> Result<(), Error> {
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    let mut random = Random::new(42);
    // The requests of each, and how many come out.
    let cases = [
        ("random-32", batch(32, |_| random.below(1 << 20)), 32),
        ("sequential-32", batch(32, u64::from), 1),
        ("depth-1", batch(1, |_| 7), 1),
    ];
    let mut group = criterion.benchmark_group("iosched");
    for (name, requests, out) in cases {
        let mut merger = Merger::new(256, LIMITS);
        let mut pass = || {
            for request in black_box(&requests) {
                let plugged = merger.plug(*request);
                debug_assert!(plugged.is_ok());
            }
            let mut merged = 0;
            merger.unplug(|request| {
                black_box(request.parts);
                merged += 1;
            });
            merged
        };
        if pass() != out {
            return Err(format!("{name} does not come out as {out}").into());
        }
        group.throughput(Throughput::Elements(requests.len() as u64));
        group.bench_function(name, |b| b.iter(&mut pass));
    }
    group.finish();
    criterion.final_summary();
    Ok(())
}
