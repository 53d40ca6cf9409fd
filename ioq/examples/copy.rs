//! Copies a file with up to 64 reads in flight and a progress bar, then lets `cp` do the same and compares.
//!
//! `cargo run --release -p ioq --example copy -- FROM TO`
//!
//! Both read and write through the page cache and count the time until the copy is on the disk. FROM is read
//! once before, so that both find of it in the cache what fits. `cp` writes to `TO.cp`, which is removed.

// UNSAFETY: poll is a foreign call. Of ioq only safe ones are used.
#![expect(unsafe_code)]

use std::error::Error;
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ioq::{AlignedBuf, Armed, Config, Durability, Engine, IoError, IoQueue, RETRY_DELAY};

/// Bytes a read asks for.
const BLOCK: u64 = 128 * 1024;
/// Blocks in flight, and so buffers: 8 MiB.
const BLOCKS_IN_FLIGHT: u16 = 64;
/// Characters of the bar.
const BAR: usize = 40;
/// How often the bar is drawn anew.
const REDRAW: Duration = Duration::from_millis(100);

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// What an operation owns: a buffer, and which block of the file is in it.
struct Block {
    buf: AlignedBuf,
    offset: u64,
}

/// A file, and its blocks on their way.
struct Side {
    queue: IoQueue<(AlignedBuf, u64)>,
    /// Blocks that have completed.
    done: Vec<Block>,
    failed: Option<(u64, IoError)>,
}

impl Side {
    fn new(file: File) -> Result<Self> {
        let config = Config {
            depth: BLOCKS_IN_FLIGHT,
            max_segments: 1,
        };
        let queue = IoQueue::open(Arc::new(file), Engine::Auto, &config)?;
        if let Some(fallback) = queue.fallback() {
            eprintln!("warning: {fallback}");
        }
        Ok(Self {
            queue,
            done: Vec::new(),
            failed: None,
        })
    }

    /// Hands over what is queued, and takes what has completed.
    fn turn(&mut self, verb: &str) -> Result<()> {
        let Self {
            queue,
            done,
            failed,
        } = self;
        queue.submit();
        queue.reap(|(buf, offset), result| match result {
            Ok(_) => done.push(Block { buf, offset }),
            Err(error) => *failed = Some((offset, error)),
        });
        match *failed {
            Some((offset, error)) => Err(format!("{verb} at byte {offset}: {error}").into()),
            None => Ok(()),
        }
    }
}

/// Sleeps until an operation of either side completes, unless one has already or none is in flight.
fn sleep(sides: [&mut Side; 2]) -> io::Result<()> {
    let mut polls = [libc::pollfd {
        // Ignored by the kernel.
        fd: -1,
        events: libc::POLLIN,
        revents: 0,
    }; 2];
    let busy = sides.map(|side| (!side.queue.is_idle()).then_some(&mut side.queue));
    let mut busy: Vec<_> = busy.into_iter().flatten().collect();
    for (queue, poll) in busy.iter_mut().zip(&mut polls) {
        if queue.arm_completion_fd() != Armed::Sleep {
            return Ok(());
        }
        poll.fd = queue.completion_fd().map_or(-1, |fd| fd.as_raw_fd());
    }
    if busy.is_empty() {
        return Ok(());
    }
    let retry = busy.iter().any(|queue| queue.needs_retry());
    let timeout = match i32::try_from(RETRY_DELAY.as_millis()) {
        Ok(delay) if retry => delay,
        _ => -1,
    };
    // SAFETY: two elements that outlive the call.
    let rc = unsafe { libc::poll(polls.as_mut_ptr(), 2, timeout) };
    let error = io::Error::last_os_error();
    if rc < 0 && error.kind() != io::ErrorKind::Interrupted {
        return Err(error);
    }
    // Before the next look, which finds what has made them readable.
    for queue in busy {
        queue.clear_completion_fd();
    }
    Ok(())
}

/// Copies, and says how many bytes. `progress` learns how many have been written.
fn copy(from: &Path, to: &Path, mut progress: impl FnMut(u64, u64)) -> Result<u64> {
    let source = File::open(from)?;
    let size = source.metadata()?.len();
    let target = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .open(to)?;
    target.set_len(size)?;
    let (mut reads, mut writes) = (Side::new(source)?, Side::new(target)?);

    let (mut next, mut written) = (0, 0);
    let mut spare: Vec<AlignedBuf> = Vec::new();
    while written < size {
        // A block takes a slot of one queue at a time, so with this bound neither is ever full.
        while next < size
            && reads.queue.free_slots() + writes.queue.free_slots() > reads.queue.capacity()
        {
            let len = usize::try_from(BLOCK.min(size - next))?;
            // The last block is shorter.
            let buf = match spare.pop() {
                Some(buf) if buf.len() == len => buf,
                _ => AlignedBuf::new(len, 4096).ok_or("out of memory")?,
            };
            reads.queue.read(next, (buf, next))?;
            next += len as u64;
        }
        reads.turn("read")?;
        for Block { buf, offset } in reads.done.drain(..) {
            writes
                .queue
                .write(offset, (buf, offset), Durability::WriteBack)?;
        }
        writes.turn("write")?;
        if writes.done.is_empty() {
            sleep([&mut reads, &mut writes])?;
        }
        for Block { buf, .. } in writes.done.drain(..) {
            written += buf.len() as u64;
            spare.push(buf);
        }
        progress(written, size);
    }

    let nothing = AlignedBuf::new(1, 1).ok_or("out of memory")?;
    writes.queue.queue_fdatasync((nothing, 0))?;
    while !writes.queue.is_idle() {
        writes.turn("fdatasync")?;
        sleep([&mut reads, &mut writes])?;
    }
    Ok(size)
}

/// A line that says how far it has come.
fn bar(done: u64, size: u64, time: Duration) -> String {
    let part = if size == 0 {
        1.0
    } else {
        done as f64 / size as f64
    };
    let filled = (0..BAR).filter(|&at| (at as f64) < part * BAR as f64);
    let filled = filled.count();
    format!(
        "[{:#<filled$}{:.<rest$}] {:3.0} % of {} MiB, {}",
        "",
        "",
        part * 100.0,
        size >> 20,
        rate(done, time),
        rest = BAR - filled,
    )
}

fn rate(bytes: u64, time: Duration) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    format!(
        "{:.0} MiB/s",
        mib / time.as_secs_f64().max(f64::MIN_POSITIVE)
    )
}

/// Runs `cp`, and waits for the disk as [`copy`] does.
fn cp(from: &Path, to: &Path) -> Result<()> {
    // All of it, as `copy` does: no hole found, no block shared.
    let status = Command::new("cp")
        .args(["--reflink=never", "--sparse=never", "--"])
        .args([from, to])
        .status()
        .map_err(|error| format!("cp does not start: {error}"))?;
    if !status.success() {
        return Err(format!("cp failed: {status}").into());
    }
    File::open(to)?.sync_data()?;
    Ok(())
}

fn same(one: &Path, other: &Path) -> io::Result<bool> {
    let (mut one, mut other) = (File::open(one)?, File::open(other)?);
    let (mut ours, mut theirs) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    loop {
        let count = one.read(&mut ours)?;
        if count == 0 {
            return Ok(other.read(&mut theirs)? == 0);
        }
        if other.read_exact(&mut theirs[..count]).is_err() || ours[..count] != theirs[..count] {
            return Ok(false);
        }
    }
}

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(from), Some(to), None) = (arguments.next(), arguments.next(), arguments.next())
    else {
        return Err("usage: copy FROM TO".into());
    };
    let (from, to) = (PathBuf::from(from), PathBuf::from(to));
    let mut theirs = to.clone().into_os_string();
    theirs.push(".cp");
    let theirs = PathBuf::from(theirs);

    io::copy(&mut File::open(&from)?, &mut io::sink())?;
    let (start, mut drawn) = (Instant::now(), None::<Instant>);
    let mut stderr = io::stderr();
    let terminal = stderr.is_terminal();
    let bytes = copy(&from, &to, |done, size| {
        let due = drawn.is_none_or(|drawn| drawn.elapsed() >= REDRAW) || done == size;
        if terminal && due {
            drawn = Some(Instant::now());
            // A bar that cannot be drawn is no reason not to copy.
            let _ = write!(stderr, "\r{}", bar(done, size, start.elapsed()));
        }
    })?;
    let ours = start.elapsed();
    if terminal {
        eprintln!();
    }

    let start = Instant::now();
    cp(&from, &theirs)?;
    let cp = start.elapsed();
    let same = same(&to, &theirs)?;
    std::fs::remove_file(&theirs)?;
    if !same {
        return Err("the two copies differ".into());
    }
    println!("{bytes} bytes, on the disk after");
    println!("  copy {ours:>10.2?}  {}", rate(bytes, ours));
    println!(
        "  cp   {cp:>10.2?}  {}  copy takes {:.2} of cp's time; the copies are the same",
        rate(bytes, cp),
        ours.as_secs_f64() / cp.as_secs_f64(),
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copy_is_the_original_and_what_cp_makes_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name| dir.path().join(name);
        let (from, to, theirs) = (path("from"), path("to"), path("to.cp"));
        // More than 64 blocks, and a last one that is neither whole nor a multiple of anything.
        let bytes: Vec<u8> = (0u32..5_000_000)
            .flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes())
            .collect();
        for len in [0, 1, bytes.len() - 7] {
            std::fs::write(&from, &bytes[..len]).unwrap();
            let mut before = 0;
            let copied = copy(&from, &to, |done, size| {
                assert!(done >= before && done <= size && size == len as u64);
                before = done;
            });
            assert_eq!(copied.unwrap(), len as u64);
            assert_eq!(before, len as u64, "the bar ends full");
            assert!(std::fs::read(&to).unwrap() == bytes[..len]);
            cp(&from, &theirs).unwrap();
            assert!(same(&to, &theirs).unwrap());
        }
        std::fs::write(&theirs, &bytes[..5]).unwrap();
        assert!(!same(&to, &theirs).unwrap());
    }

    #[test]
    fn a_file_that_is_not_there_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        assert!(copy(&from, &to, |_, _| {}).is_err());
        assert!(cp(&from, &to).is_err());
    }

    #[test]
    fn the_bar_is_as_long_when_empty_as_when_full() {
        let second = Duration::from_secs(1);
        let empty = bar(0, 4 << 20, second);
        assert_eq!(
            empty,
            format!("[{}]   0 % of 4 MiB, 0 MiB/s", ".".repeat(BAR))
        );
        let half = bar(2 << 20, 4 << 20, second);
        assert!(half.contains(&format!("[{}{}]", "#".repeat(20), ".".repeat(20))));
        assert!(bar(4 << 20, 4 << 20, second).contains(&"#".repeat(BAR)));
        assert!(bar(0, 0, second).contains("100 %"));
    }
}
