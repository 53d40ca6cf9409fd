//! Measures both engines on files, so that one can see whether `Engine::Auto` chooses well here.
//!
//! `cargo run --release -p ioq --example engines -- DIRECTORY-OR-DEVICE...`
//!
//! In each directory a file of 256 MiB is made, and removed afterwards. A device is only read. For each way
//! to open it, 4 KiB at random: requests per second and CPU time per request, kernel threads of io_uring
//! included, first slept for as a program does that has nothing else to do, then polled for.

// UNSAFETY: poll and getrusage are foreign calls.
#![expect(unsafe_code)]

use std::error::Error;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ioq::{AlignedBuf, Armed, Config, Durability, Engine, IoQueue};

/// Bytes of a file that is made.
const SIZE: u64 = 256 << 20;
/// Bytes of a request.
const BLOCK: u64 = 4096;
/// How long each engine runs at a time.
const ROUND: Duration = Duration::from_millis(150);
/// How often they take turns. The median counts.
const ROUNDS: usize = 7;
/// Requests in flight.
const DEPTHS: [u16; 3] = [1, 32, 64];

type Result<T> = std::result::Result<T, Box<dyn Error>>;

#[derive(Clone, Copy, PartialEq)]
enum Wait {
    Sleep,
    Poll,
}

/// Requests a second, and microseconds of CPU for each.
#[derive(Clone, Copy)]
struct Speed {
    rate: f64,
    cpu: f64,
}

fn cpu_time() -> Duration {
    // SAFETY: plain integers, for which zero is a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is writable.
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) };
    let part = |time: libc::timeval| {
        Duration::from_secs(time.tv_sec.unsigned_abs())
            + Duration::from_micros(time.tv_usec.unsigned_abs())
    };
    part(usage.ru_utime) + part(usage.ru_stime)
}

struct Load {
    queue: IoQueue<AlignedBuf>,
    spare: Vec<AlignedBuf>,
    blocks: u64,
    random: u64,
    write: bool,
    wait: Wait,
}

impl Load {
    fn new(
        file: &Arc<File>,
        engine: Engine,
        depth: u16,
        blocks: u64,
        write: bool,
        wait: Wait,
    ) -> Result<Self> {
        let config = Config {
            depth,
            max_segments: 1,
        };
        let spare: Option<Vec<_>> = (0..depth).map(|_| AlignedBuf::new(4096, 4096)).collect();
        Ok(Self {
            queue: IoQueue::open(Arc::clone(file), engine, &config)?,
            spare: spare.ok_or("out of memory")?,
            blocks,
            random: 42,
            write,
            wait,
        })
    }

    fn run(&mut self) -> Result<Speed> {
        let (start, cpu) = (Instant::now(), cpu_time());
        let mut done = 0u32;
        let mut failed = None;
        while start.elapsed() < ROUND || !self.queue.is_idle() {
            if start.elapsed() < ROUND {
                while let Some(buf) = self.spare.pop() {
                    self.random ^= self.random << 13;
                    self.random ^= self.random >> 7;
                    self.random ^= self.random << 17;
                    let offset = self.random % self.blocks * BLOCK;
                    if self.write {
                        self.queue.write(offset, buf, Durability::WriteBack)?;
                    } else {
                        self.queue.read(offset, buf)?;
                    }
                }
                self.queue.disarm_completion_fd();
                self.queue.submit();
            }
            let spare = &mut self.spare;
            let count = self.queue.reap(|buf, result| {
                if let Err(error) = result {
                    failed = Some(error);
                }
                spare.push(buf);
            });
            done += u32::try_from(count)?;
            if let Some(error) = failed {
                return Err(error.into());
            }
            if count == 0
                && self.wait == Wait::Sleep
                && self.queue.arm_completion_fd() == Armed::Sleep
                && let Some(fd) = self.queue.completion_fd()
            {
                let mut poll = libc::pollfd {
                    fd: fd.as_raw_fd(),
                    events: libc::POLLIN,
                    revents: 0,
                };
                // SAFETY: one pollfd that outlives the call.
                unsafe { libc::poll(&raw mut poll, 1, 1000) };
                self.queue.clear_completion_fd();
            }
        }
        let requests = f64::from(done.max(1));
        Ok(Speed {
            rate: requests / start.elapsed().as_secs_f64(),
            cpu: (cpu_time() - cpu).as_secs_f64() * 1e6 / requests,
        })
    }
}

fn median(mut speeds: Vec<Speed>) -> Speed {
    speeds.sort_by(|a, b| a.rate.total_cmp(&b.rate));
    speeds[speeds.len() / 2]
}

fn measure(path: &Path, name: &str, flags: libc::c_int, write: bool) -> Result<()> {
    let opened = File::options()
        .read(true)
        .write(write)
        .custom_flags(flags)
        .open(path);
    let how = if flags == 0 { "buffered" } else { "direct" };
    let file = match opened {
        Ok(file) => Arc::new(file),
        Err(error) => {
            println!("{name}: {how}: {error}");
            return Ok(());
        }
    };
    let size = match fs::metadata(path)?.len() {
        0 => SIZE, // A device: its first part.
        size => size,
    };
    let auto = IoQueue::<()>::open(Arc::clone(&file), Engine::Auto, &Config::default())?.engine();
    for wait in [Wait::Sleep, Wait::Poll] {
        for depth in DEPTHS {
            let mut loads = Vec::new();
            for engine in [Engine::LinuxAio, Engine::IoUring] {
                loads.push(Load::new(&file, engine, depth, size / BLOCK, write, wait)?);
            }
            let mut speeds = vec![Vec::new(); loads.len()];
            for _ in 0..ROUNDS {
                for (load, speeds) in loads.iter_mut().zip(&mut speeds) {
                    speeds.push(load.run()?);
                }
            }
            let speeds: Vec<_> = speeds.into_iter().map(median).collect();
            let [aio, uring] = speeds[..] else {
                return Err("two engines".into());
            };
            println!(
                "| {name} | {how} | {} | {} | {depth} | {:.0} | {:.0} | {:.2} | {:.2} | {:.2} | {auto} |",
                if write { "write" } else { "read" },
                if wait == Wait::Sleep { "sleep" } else { "poll" },
                aio.rate,
                uring.rate,
                uring.rate / aio.rate,
                aio.cpu,
                uring.cpu,
            );
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    println!(
        "| where | opened | 4 KiB | wait | depth | aio/s | io_uring/s | ratio | aio CPU us | io_uring CPU us | auto |"
    );
    println!("|---|---|---|---|---:|---:|---:|---:|---:|---:|---|");
    for argument in std::env::args_os().skip(1) {
        let place = PathBuf::from(argument);
        let name = place.display().to_string();
        if fs::metadata(&place)?.file_type().is_block_device() {
            for flags in [libc::O_DIRECT, 0] {
                measure(&place, &name, flags, false)?;
            }
            continue;
        }
        let mut file = tempfile::NamedTempFile::new_in(&place)?;
        for _ in 0..SIZE >> 20 {
            file.write_all(&[0x5a; 1 << 20])?;
        }
        file.as_file().sync_all()?;
        for flags in [libc::O_DIRECT, 0] {
            for write in [false, true] {
                measure(file.path(), &name, flags, write)?;
            }
        }
    }
    Ok(())
}
