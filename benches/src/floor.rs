//! The floors, each a process of its own that can be bound to a processor: bare loops of `io_submit`, of io_uring and
//! of memcpy. Told and telling in fio's words, with the fields of `blk-dataplane bench --output-format json`.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use hdrhistogram::Histogram;
use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

use crate::Error;
use crate::bare_aio::{BareAio, REAP_MAX, Reap};
use crate::bare_uring::BareUring;
use crate::fixture::Random;
use crate::transfer::Transfer;

/// Longest latency that is told from longer ones.
const LATENCY_MAX_NS: u64 = 60_000_000_000;

/// Digits of a latency that are kept.
const LATENCY_DIGITS: u8 = 3;

/// Percentiles printed.
const PERCENTILES: [f64; 5] = [1.0, 50.0, 99.0, 99.9, 99.99];

/// A bare loop over a file, to compare programs with: no retries, no checks, any error ends it. Prints JSON.
#[derive(Clone, Debug, Parser)]
pub struct Arguments {
    /// What moves the data.
    #[arg(long, value_enum)]
    pub ioengine: Engine,

    /// The file, opened with O_DIRECT; written to by a write! memcpy only takes its size.
    #[arg(long, value_name = "FILE")]
    pub filename: PathBuf,

    /// Reads or writes, one after another or at random.
    #[arg(long, value_enum, default_value_t = Direction::Randread)]
    pub rw: Direction,

    /// Bytes of each, like 4k.
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes, default_value = "4k")]
    pub bs: u64,

    /// Requests in flight; those that have completed are replaced together.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub iodepth: u16,

    /// Seconds to measure for.
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    pub runtime: f64,

    /// Seconds before that, which do not count.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0)]
    pub ramp_time: f64,
}

/// A way to move data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// `io_submit`, completions from the mapped ring, or where there are none `io_getevents`.
    Libaio,
    /// io_uring with a registered file.
    #[value(name = "io_uring")]
    IoUring,
    /// A copy between two places in memory: no system call at all.
    Memcpy,
}

/// fio's `rw`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Direction {
    /// Block after block.
    Read,
    /// Block after block.
    Write,
    /// Blocks at random.
    Randread,
    /// Blocks at random.
    Randwrite,
}

impl Direction {
    fn is_write(self) -> bool {
        matches!(self, Self::Write | Self::Randwrite)
    }

    fn is_random(self) -> bool {
        matches!(self, Self::Randread | Self::Randwrite)
    }
}

/// A number with an optional binary suffix, as fio has them by default.
fn parse_bytes(text: &str) -> Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    let (number, shift) = match lower.as_bytes().last() {
        Some(b'k') => (&lower[..lower.len() - 1], 10),
        Some(b'm') => (&lower[..lower.len() - 1], 20),
        _ => (lower.as_str(), 0),
    };
    let bytes = number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("{text:?} is no size; write one like 4k"))?;
    if (512..=1 << 24).contains(&bytes) {
        Ok(bytes)
    } else {
        Err(format!("{text} is not within 512 and 16m"))
    }
}

/// Runs the loop; returns what is to be printed.
///
/// # Errors
///
/// The file cannot be opened with `O_DIRECT` or is shorter than a block; the kernel refused something.
pub fn run(arguments: &Arguments) -> Result<Value, Error> {
    let write = arguments.rw.is_write();
    let file = OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(libc::O_DIRECT)
        .open(&arguments.filename)
        .map_err(|error| {
            let name = arguments.filename.display();
            format!("--filename {name}: {error} (it must take O_DIRECT)")
        })?;
    let size = file.metadata()?.len();
    let blocks = size / arguments.bs;
    if blocks == 0 {
        return Err("--filename: shorter than a block".into());
    }
    let mut mover = Mover::new(file, size, arguments)?;
    let mut blocks = Blocks {
        count: blocks,
        next: 0,
        random: arguments.rw.is_random().then(|| Random::new(42)),
    };
    let ramp = Duration::try_from_secs_f64(arguments.ramp_time)?;
    let runtime = Duration::try_from_secs_f64(arguments.runtime)?;
    go_on_for(ramp, &mut mover, &mut blocks, arguments.iodepth)?;
    let measured = go_on_for(runtime, &mut mover, &mut blocks, arguments.iodepth)?;
    Ok(measured.report(arguments))
}

/// Which block is next.
struct Blocks {
    count: u64,
    next: u64,
    random: Option<Random>,
}

impl Blocks {
    #[inline]
    fn next(&mut self) -> u64 {
        if let Some(random) = &mut self.random {
            return random.below(self.count);
        }
        let next = self.next;
        self.next = if next + 1 == self.count { 0 } else { next + 1 };
        next
    }
}

enum Mover {
    Aio(BareAio),
    Uring(Box<BareUring>),
    Memcpy(Memcpy),
}

impl Mover {
    fn new(file: File, size: u64, arguments: &Arguments) -> Result<Self, Error> {
        let transfer = Transfer {
            len: usize::try_from(arguments.bs)?,
            write: arguments.rw.is_write(),
        };
        let depth = arguments.iodepth;
        Ok(match arguments.ioengine {
            Engine::Libaio => Self::Aio(BareAio::new(
                file,
                transfer,
                depth,
                Reap::RingOrSleep,
                false,
            )?),
            Engine::IoUring => Self::Uring(Box::new(BareUring::new(file, transfer, depth)?)),
            Engine::Memcpy => Self::Memcpy(Memcpy::new(transfer, usize::try_from(size)?, depth)?),
        })
    }

    #[inline]
    fn queue(&mut self, block: u64) -> Option<usize> {
        match self {
            Self::Aio(aio) => aio.queue(block),
            Self::Uring(uring) => uring.queue(block),
            Self::Memcpy(memcpy) => memcpy.queue(block),
        }
    }

    #[inline]
    fn submit(&mut self) -> Result<(), Error> {
        match self {
            Self::Aio(aio) => aio.submit(),
            Self::Uring(uring) => uring.submit(),
            Self::Memcpy(_) => Ok(()),
        }
    }

    /// The slots of what has completed, one at least.
    #[inline]
    fn reap(&mut self, mut complete: impl FnMut(usize)) -> Result<(), Error> {
        match self {
            Self::Aio(aio) => {
                // All there is, or a deep queue would be served in batches of its own making.
                while aio.reap(|slot, _| complete(slot))? == REAP_MAX && !aio.is_quiet() {}
                Ok(())
            }
            Self::Uring(uring) => loop {
                if uring.reap(|slot, _| complete(slot))? > 0 {
                    return Ok(());
                }
                uring.wait()?;
            },
            Self::Memcpy(memcpy) => {
                memcpy.reap(complete);
                Ok(())
            }
        }
    }
}

/// The file's content is not looked at: memory of its size.
struct Memcpy {
    transfer: Transfer,
    image: Vec<u8>,
    buffers: Box<[ioq::AlignedBuf]>,
    free: Vec<usize>,
    done: Vec<usize>,
}

impl Memcpy {
    fn new(transfer: Transfer, size: usize, depth: u16) -> Result<Self, Error> {
        let depth = usize::from(depth);
        Ok(Self {
            transfer,
            // Not zero, or the kernel would map one page of zeroes for all of it.
            image: vec![0x5a; size],
            buffers: transfer.buffers(depth)?,
            free: (0..depth).collect(),
            done: Vec::with_capacity(depth),
        })
    }

    #[inline]
    fn queue(&mut self, block: u64) -> Option<usize> {
        let slot = self.free.pop()?;
        let start = usize::try_from(block).ok()? * self.transfer.len;
        let image = &mut self.image[start..start + self.transfer.len];
        let buffer = &mut self.buffers[slot][..];
        if self.transfer.write {
            image.copy_from_slice(buffer);
        } else {
            buffer.copy_from_slice(image);
        }
        std::hint::black_box(buffer);
        self.done.push(slot);
        Some(slot)
    }

    #[inline]
    fn reap(&mut self, mut complete: impl FnMut(usize)) {
        while let Some(slot) = self.done.pop() {
            complete(slot);
            self.free.push(slot);
        }
    }
}

/// What came of it.
struct Measured {
    time: Duration,
    cpu: Duration,
    ios: u64,
    latencies: Histogram<u64>,
}

/// Keeps `depth` requests in flight for as long as that, then waits for them.
fn go_on_for(
    time: Duration,
    mover: &mut Mover,
    blocks: &mut Blocks,
    depth: u16,
) -> Result<Measured, Error> {
    let mut latencies = Histogram::new_with_bounds(1, LATENCY_MAX_NS, LATENCY_DIGITS)?;
    let mut submitted = vec![Duration::ZERO; usize::from(depth)];
    let mut reaped = Vec::with_capacity(usize::from(depth));
    let (mut ios, mut in_flight) = (0, 0);
    let cpu = process_cpu_time()?;
    let start = Instant::now();
    // One reading of the clock for each batch: when it was reaped, and the next one submitted.
    let mut now = Duration::ZERO;
    while now < time || in_flight > 0 {
        if now < time {
            while in_flight < depth {
                let slot = mover.queue(blocks.next()).ok_or("no slot is free")?;
                submitted[slot] = now;
                in_flight += 1;
            }
            mover.submit()?;
        }
        mover.reap(|slot| reaped.push(slot))?;
        now = start.elapsed();
        in_flight -= u16::try_from(reaped.len())?;
        ios += reaped.len() as u64;
        // Requests of one batch took the same.
        let mut rest = &reaped[..];
        while let Some(&first) = rest.first() {
            let since = submitted[first];
            let same = rest.iter().take_while(|&&slot| submitted[slot] == since);
            let count = same.count();
            let latency = u64::try_from((now - since).as_nanos())?;
            latencies.saturating_record_n(latency.max(1), count as u64);
            rest = &rest[count..];
        }
        reaped.clear();
    }
    Ok(Measured {
        time: now,
        cpu: process_cpu_time()?.saturating_sub(cpu),
        ios,
        latencies,
    })
}

impl Measured {
    fn report(&self, arguments: &Arguments) -> Value {
        let seconds = self.time.as_secs_f64();
        let iops = self.ios as f64 / seconds;
        let bandwidth = iops * arguments.bs as f64;
        let percentiles: serde_json::Map<_, _> = PERCENTILES
            .iter()
            .map(|&percent| {
                let value = self.latencies.value_at_percentile(percent);
                (format!("{percent:.6}"), Value::from(value))
            })
            .collect();
        let side = json!({
            "total_ios": self.ios,
            "io_bytes": self.ios * arguments.bs,
            "iops": iops,
            "bw_bytes": bandwidth,
            "errors": 0,
            "lat_ns": {
                "min": self.latencies.min(),
                "max": self.latencies.max(),
                "mean": self.latencies.mean(),
                "stddev": self.latencies.stdev(),
                "percentile": percentiles,
            },
        });
        let name = if arguments.rw.is_write() {
            "write"
        } else {
            "read"
        };
        json!({
            "runtime_ms": seconds * 1e3,
            "total_ios": self.ios,
            "iops": iops,
            "bw_bytes": bandwidth,
            name: side,
            "errors": 0,
            "backend_cpu_ns_per_io": self.cpu.as_nanos() as f64 / self.ios.max(1) as f64,
        })
    }
}

/// Of all threads, those the kernel runs for io_uring included.
fn process_cpu_time() -> Result<Duration, Error> {
    Ok(clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::BlockFile;

    #[test]
    fn sizes_have_fios_suffixes() {
        assert_eq!(parse_bytes("4k"), Ok(4096));
        assert_eq!(parse_bytes("64K"), Ok(65536));
        assert_eq!(parse_bytes("1m"), Ok(1 << 20));
        assert_eq!(parse_bytes("512"), Ok(512));
        for text in ["", "k", "-4k", "4g", "511", "17m", "99999999999999999999m"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sequential_blocks_go_round_and_random_ones_stay_within() {
        let mut blocks = Blocks {
            count: 3,
            next: 0,
            random: None,
        };
        let numbers: Vec<_> = (0..5).map(|_| blocks.next()).collect();
        assert_eq!(numbers, [0, 1, 2, 0, 1]);
        blocks.random = Some(Random::new(1));
        assert!((0..100).all(|_| blocks.next() < 3));
    }

    #[test]
    fn every_engine_moves_every_kind_of_block_and_counts_it() {
        let file = BlockFile::new(256).unwrap();
        for ioengine in [Engine::Libaio, Engine::IoUring, Engine::Memcpy] {
            for rw in [
                Direction::Read,
                Direction::Write,
                Direction::Randread,
                Direction::Randwrite,
            ] {
                for (bs, iodepth) in [(4096, 1), (4096, 64), (65536, 16)] {
                    let arguments = Arguments {
                        ioengine,
                        filename: file.path().to_owned(),
                        rw,
                        bs,
                        iodepth,
                        runtime: 0.01,
                        ramp_time: 0.001,
                    };
                    let report = run(&arguments).unwrap();
                    let side = if rw.is_write() { "write" } else { "read" };
                    let ios = report["total_ios"].as_u64().unwrap();
                    assert!(ios >= u64::from(iodepth), "{report}");
                    assert_eq!(report[side]["total_ios"], ios);
                    assert_eq!(report[side]["io_bytes"], ios * bs);
                    let median = &report[side]["lat_ns"]["percentile"]["50.000000"];
                    assert!(median.as_u64().unwrap() > 0, "{report}");
                    assert!(report["backend_cpu_ns_per_io"].as_f64().unwrap() > 0.0);
                }
            }
        }
    }

    #[test]
    fn a_file_that_is_not_there_or_too_short_is_named() {
        let mut arguments = Arguments::parse_from([
            "floor",
            "--ioengine=libaio",
            "--filename=/nonexistent",
            "--bs=64k",
        ]);
        assert!(
            run(&arguments)
                .unwrap_err()
                .to_string()
                .contains("/nonexistent")
        );
        let file = BlockFile::new(15).unwrap();
        arguments.filename = file.path().to_owned();
        assert!(run(&arguments).unwrap_err().to_string().contains("shorter"));
    }
}
