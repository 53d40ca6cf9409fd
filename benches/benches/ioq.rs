//! Random 4 KiB reads at depth 32: ioq beside bare loops of `io_submit` and io_uring over the same file.

use std::time::Duration;

use benches::Error;
use benches::fixture::BlockFile;
use benches::reads::{DEPTH, Reader, Reads};
use benches::rounds::{Contender, Mode, compare_by_turns};
use criterion::{Criterion, Throughput};

const BATCHES: [u16; 2] = [1, 32];

/// Turns of each contender within a round, a millisecond or two each.
const TURNS: u64 = 50;

/// 64 MiB when measuring: more than the caches, so that a read is a read of memory.
const BLOCKS: u64 = 16_384;

fn main() -> Result<(), Error> {
    let mode = Mode::from_args();
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    let file = BlockFile::new(mode.pick(BLOCKS, 64))?;

    let mut group = criterion.benchmark_group("ioq");
    for batch in BATCHES {
        for (name, reader) in [
            ("null", Reader::IoqNull),
            ("linux-aio", Reader::Ioq),
            ("io-uring", Reader::IoqUring),
        ] {
            let mut reads = Reads::new(&file, reader, batch, DEPTH)?;
            group.throughput(Throughput::Elements(u64::from(DEPTH)));
            group.bench_function(format!("{name}/batch-{batch}"), |b| {
                b.iter_custom(|n| reads.run(n * u64::from(DEPTH)).expect("readable"));
            });
        }
    }
    group.finish();

    for batch in BATCHES {
        let reads = |reader| Reads::new(&file, reader, batch, DEPTH);
        let mut ioq = reads(Reader::Ioq)?;
        let mut disarmed = reads(Reader::IoqDisarmed)?;
        let mut get_events = reads(Reader::BareGetEvents)?;
        let mut eventfd = reads(Reader::BareEventFd)?;
        let mut bare = reads(Reader::Bare)?;
        let direct = if bare.is_direct() {
            "O_DIRECT"
        } else {
            "buffered"
        };
        let mut contenders = [
            Contender::new("ioq, disarmed", |n| disarmed.run(n)),
            Contender::new("ioq", |n| ioq.run(n)),
            Contender::new("bare, io_getevents", |n| get_events.run(n)),
            Contender::new("bare, ring, eventfd", |n| eventfd.run(n)),
            Contender::new("bare, ring", |n| bare.run(n)),
        ];
        let title = format!("ioq/aio, batch-{batch}, {direct} reads");
        compare_by_turns(mode, &title, mode.pick(48_000, 320), TURNS, &mut contenders)?;

        let mut ioq = reads(Reader::IoqUring)?;
        let mut disarmed = reads(Reader::IoqUringDisarmed)?;
        let mut bare = reads(Reader::BareUring)?;
        let mut contenders = [
            Contender::new("ioq, disarmed", |n| disarmed.run(n)),
            Contender::new("ioq", |n| ioq.run(n)),
            Contender::new("bare", |n| bare.run(n)),
        ];
        let title = format!("ioq/io_uring, batch-{batch}, {direct} reads");
        compare_by_turns(mode, &title, mode.pick(48_000, 320), TURNS, &mut contenders)?;
    }
    criterion.final_summary();
    Ok(())
}
