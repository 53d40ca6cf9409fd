//! A batch through the merger: 32 random requests, 32 that follow one another, and one. And reads of a
//! file with and without it.

// UNSAFETY: merged reads go into buffers that are not one piece of memory, for which `IoQueue` has only
// the call that takes addresses.
#![expect(unsafe_code)]

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use benches::Error;
use benches::fixture::{BLOCK, BlockFile, Random};
use benches::rounds::{Contender, Mode, compare_by_turns};
use criterion::{Criterion, Throughput};
use ioq::{AlignedBuf, Config, IoQueue};
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

/// What is read: blocks of the file, which of them, and how many at a time.
///
/// 4 MiB stay in the processor's caches, 64 MiB do not. What merging saves is the same time for each request;
/// copying the data, which it cannot save, takes longer from memory. Random reads of a small file would touch by
/// chance, so that there is something to merge.
const CASES: [(u64, Pattern, u32); 5] = [
    (1 << 10, Pattern::Sequential, 32),
    (1 << 14, Pattern::Sequential, 32),
    (1 << 12, Pattern::Random, 32),
    (1 << 14, Pattern::Random, 32),
    (1 << 14, Pattern::Sequential, 1),
];

/// Reads in turn with the other contender, a multiple of the depth.
const SLICE: u64 = 320;

/// Turns in a round.
const TURNS: u64 = 312;

/// Which blocks are read.
#[derive(Clone, Copy, Debug)]
enum Pattern {
    Sequential,
    Random,
}

/// Reads of single blocks, `depth` of them at a time: submitted together, as a guest's batch is, and then
/// waited for.
struct Reads {
    // Dropped first, and with it everything that is in flight to `buffers`.
    queue: IoQueue<Slots>,
    buffers: Vec<AlignedBuf>,
    /// `None`: each read is submitted as it is.
    merger: Option<Merger>,
    blocks: u64,
    pattern: Pattern,
    depth: u32,
    random: Random,
    next: u64,
    /// The buffers' numbers in the order of submission: an operation has some that follow one another.
    order: Vec<u32>,
}

/// The reads of one operation: where in [`Reads::order`], and how many.
struct Slots {
    first: usize,
    count: usize,
}

impl Reads {
    fn new(file: &BlockFile, pattern: Pattern, depth: u32, merging: bool) -> Result<Self, Error> {
        let config = Config {
            depth: u16::try_from(depth)?,
            max_segments: u16::try_from(LIMITS.max_segments)?,
        };
        // Twice as large as needed: buffers that touch would be joined, which a guest's seldom are.
        let buffers: Option<Vec<_>> = (0..depth)
            .map(|_| AlignedBuf::new(2 * BLOCK, BLOCK))
            .collect();
        Ok(Self {
            queue: IoQueue::linux_aio(Arc::new(file.open()?.0), &config)?,
            buffers: buffers.ok_or("no memory for buffers")?,
            merger: merging.then(|| Merger::new(depth as usize, LIMITS)),
            blocks: file.blocks(),
            pattern,
            depth,
            // Not the same blocks for both: the second would find them in the cache.
            random: Random::new(42 + 2 * u64::from(merging)),
            next: if merging { 0 } else { file.blocks() / 2 },
            order: Vec::with_capacity(depth as usize),
        })
    }

    /// Reads `count` blocks, rounded up to whole batches, and checks each.
    fn run(&mut self, count: u64) -> Result<Duration, Error> {
        let (mut asked, mut got) = (0u64, 0u64);
        let start = Instant::now();
        for _ in 0..count.div_ceil(u64::from(self.depth)) {
            asked = asked.wrapping_add(self.submit()?);
            let mut left = self.depth as usize;
            while left > 0 {
                left -= self.reap(&mut got)?;
            }
        }
        let time = start.elapsed();
        if got == asked {
            Ok(time)
        } else {
            Err("the blocks read are not those asked for".into())
        }
    }

    /// Returns the sum of the blocks' first words.
    fn submit(&mut self) -> Result<u64, Error> {
        let Self {
            queue,
            buffers,
            merger,
            order,
            ..
        } = self;
        order.clear();
        let mut failed = None;
        let mut read = |offset: u64, order: &[u32], slots: Slots| {
            let segments = order[slots.first..].iter().map(|&slot| libc::iovec {
                iov_base: buffers[slot as usize].as_mut_ptr().cast(),
                iov_len: BLOCK,
            });
            // SAFETY: the buffers are dropped after the queue, and nobody touches one before `reap` has
            // brought its operation back: the next batch begins when all have come.
            if let Err(error) = unsafe { queue.queue_readv(offset, segments, slots) } {
                failed = Some(error.to_string());
            }
        };
        let mut sum = 0u64;
        for slot in 0..self.depth {
            let number = match self.pattern {
                Pattern::Sequential => self.next % self.blocks,
                Pattern::Random => self.random.below(self.blocks),
            };
            self.next += 1;
            sum = sum.wrapping_add(number);
            let offset = number * BLOCK as u64;
            match merger {
                Some(merger) => merger.plug(Request {
                    op: Op::Read,
                    offset,
                    len: BLOCK as u64,
                    segments: 1,
                    tag: slot,
                })?,
                None => {
                    let first = order.len();
                    order.push(slot);
                    read(offset, order, Slots { first, count: 1 });
                }
            }
        }
        if let Some(merger) = merger {
            merger.unplug(|merged| {
                let first = order.len();
                order.extend(merged.parts.iter().map(|part| part.tag));
                let count = merged.parts.len();
                read(merged.offset, order, Slots { first, count });
            });
        }
        if let Some(failed) = failed {
            return Err(failed.into());
        }
        let report = queue.submit();
        if report.refused + report.parked > 0 {
            return Err(format!("the kernel did not take all: {report:?}").into());
        }
        Ok(sum)
    }

    /// Adds the first word of each block that has come to `sum`; returns how many blocks came.
    fn reap(&mut self, sum: &mut u64) -> Result<usize, Error> {
        let Self {
            queue,
            buffers,
            order,
            ..
        } = self;
        let mut failed = None;
        let mut blocks = 0;
        queue.reap(|Slots { first, count }, result| {
            if result != Ok((count * BLOCK) as u64) {
                failed = Some(result);
            }
            blocks += count;
            for &slot in &order[first..first + count] {
                let mut word = [0; 8];
                word.copy_from_slice(&buffers[slot as usize][..8]);
                *sum = sum.wrapping_add(u64::from_le_bytes(word));
            }
        });
        match failed {
            Some(result) => Err(format!("a read gave {result:?}").into()),
            None => Ok(blocks),
        }
    }
}

/// Merging beside not merging, in turn.
fn compare_reads(mode: Mode) -> Result<(), Error> {
    for (blocks, pattern, depth) in CASES {
        let file = BlockFile::new(blocks)?;
        let direct = if file.open()?.1 { "O_DIRECT" } else { "cached" };
        let size = (blocks * BLOCK as u64) >> 20;
        let mut merging = Reads::new(&file, pattern, depth, true)?;
        let mut plain = Reads::new(&file, pattern, depth, false)?;
        let turns = mode.pick(TURNS, 1);
        let title =
            format!("iosched/{pattern:?} 4 KiB reads of {size} MiB, depth {depth}, {direct}");
        let mut contenders = [
            Contender::new("ioq and iosched", |n| merging.run(n)),
            Contender::new("ioq alone", |n| plain.run(n)),
        ];
        compare_by_turns(mode, &title, turns * SLICE, turns, &mut contenders)?;
    }
    Ok(())
}

fn main() -> Result<(), Error> {
    let mode = Mode::from_args();
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
    compare_reads(mode)?;
    criterion.final_summary();
    Ok(())
}
