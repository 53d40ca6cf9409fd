//! Random 4 KiB reads of a file, a fixed number in flight: through ioq, and with bare system calls.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ioq::{AlignedBuf, Config, Engine as IoqEngine, IoQueue};

use crate::Error;
use crate::bare_aio::{BareAio, Reap};
use crate::bare_uring::BareUring;
use crate::fixture::{BLOCK, BlockFile, Random};
use crate::transfer::Transfer;

/// Who reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// `ioq::IoQueue` on the file, through Linux AIO; each completion signals an eventfd.
    Ioq,
    /// The same, with completions not to signal (`IoQueue::disarm_completion_fd`).
    IoqDisarmed,
    /// `ioq::IoQueue` on the file, through io_uring.
    IoqUring,
    /// The same, with completions not to signal.
    IoqUringDisarmed,
    /// `ioq::IoQueue` with the null engine: what the queue itself costs. Reads leave the zeroes that are there.
    IoqNull,
    /// Raw `io_submit`, completions from the mapped ring: the floor.
    Bare,
    /// As `Bare`, and each completion signals an eventfd, as ioq's do: the floor of a program that
    /// can also sleep in epoll.
    BareEventFd,
    /// Raw `io_submit` and `io_getevents`: what most programs do.
    BareGetEvents,
    /// A bare loop over io_uring: the floor of the other engine.
    BareUring,
}

impl Reader {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Ioq,
        Self::IoqDisarmed,
        Self::IoqUring,
        Self::IoqUringDisarmed,
        Self::IoqNull,
        Self::Bare,
        Self::BareEventFd,
        Self::BareGetEvents,
        Self::BareUring,
    ];
}

/// What the bare loops do.
const BLOCKS: Transfer = Transfer {
    len: BLOCK,
    write: false,
};

/// Reads in flight at a time, completed but not yet taken ones included.
pub const DEPTH: u16 = 32;

/// A file being read.
#[derive(Debug)]
pub struct Reads {
    engine: Engine,
    random: Random,
    blocks: u64,
    batch: u64,
    depth: u64,
    direct: bool,
}

#[derive(Debug)]
enum Engine {
    Ioq {
        queue: IoQueue<AlignedBuf>,
        buffers: Vec<AlignedBuf>,
    },
    Bare(BareAio),
    BareUring(BareUring),
}

impl Reads {
    /// Opens `file` for `reader`, to read up to `depth` blocks at a time and submit `batch` at once.
    ///
    /// # Errors
    ///
    /// The host has no AIO context or no memory; `batch` is 0 or above `depth`.
    pub fn new(file: &BlockFile, reader: Reader, batch: u16, depth: u16) -> Result<Self, Error> {
        if batch == 0 || batch > depth {
            return Err(format!("batches of {batch} at depth {depth}").into());
        }
        let (handle, direct) = file.open()?;
        let config = Config {
            depth,
            max_segments: 1,
        };
        let engine = match reader {
            Reader::Ioq
            | Reader::IoqDisarmed
            | Reader::IoqUring
            | Reader::IoqUringDisarmed
            | Reader::IoqNull => {
                let buffers: Option<Vec<_>> =
                    (0..depth).map(|_| AlignedBuf::new(BLOCK, BLOCK)).collect();
                let engine = match reader {
                    Reader::IoqNull => IoqEngine::Null,
                    Reader::IoqUring | Reader::IoqUringDisarmed => IoqEngine::IoUring,
                    _ => IoqEngine::LinuxAio,
                };
                let mut queue = IoQueue::open(Arc::new(handle), engine, &config)?;
                if matches!(reader, Reader::IoqDisarmed | Reader::IoqUringDisarmed) {
                    queue.disarm_completion_fd();
                }
                Engine::Ioq {
                    queue,
                    buffers: buffers.ok_or("no memory for buffers")?,
                }
            }
            Reader::BareUring => Engine::BareUring(BareUring::new(handle, BLOCKS, depth)?),
            Reader::Bare => Engine::Bare(BareAio::new(handle, BLOCKS, depth, Reap::Ring, false)?),
            Reader::BareEventFd => {
                Engine::Bare(BareAio::new(handle, BLOCKS, depth, Reap::Ring, true)?)
            }
            Reader::BareGetEvents => {
                Engine::Bare(BareAio::new(handle, BLOCKS, depth, Reap::GetEvents, false)?)
            }
        };
        Ok(Self {
            engine,
            random: Random::new(42),
            blocks: file.blocks(),
            batch: u64::from(batch),
            depth: u64::from(depth),
            direct,
        })
    }

    /// Whether the file is read with `O_DIRECT`.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// Reads `count` random blocks, rounded up to whole batches, and checks each one.
    ///
    /// # Errors
    ///
    /// A read failed, or gave what is not in the file.
    pub fn run(&mut self, count: u64) -> Result<Duration, Error> {
        let batches = count.div_ceil(self.batch);
        let start = Instant::now();
        // Sums instead of a table: a block read twice for one not read at all shows.
        let (mut asked, mut got, mut in_flight) = (0u64, 0u64, 0);
        for _ in 0..batches {
            while in_flight + self.batch > self.depth {
                in_flight -= self.engine.reap(&mut got)?;
            }
            for _ in 0..self.batch {
                let number = self.random.below(self.blocks);
                asked = asked.wrapping_add(number);
                self.engine.queue(number)?;
            }
            self.engine.submit()?;
            in_flight += self.batch;
        }
        while in_flight > 0 {
            in_flight -= self.engine.reap(&mut got)?;
        }
        let time = start.elapsed();
        let expected = if self.engine.gives_zeroes() { 0 } else { asked };
        if got == expected {
            Ok(time)
        } else {
            Err("the blocks read are not those asked for".into())
        }
    }
}

impl Engine {
    fn gives_zeroes(&self) -> bool {
        match self {
            Self::Ioq { queue, .. } => queue.completion_fd().is_none(),
            Self::Bare(_) | Self::BareUring(_) => false,
        }
    }

    #[inline]
    fn queue(&mut self, number: u64) -> Result<(), Error> {
        match self {
            Self::Ioq { queue, buffers } => {
                let buffer = buffers.pop().ok_or("no buffer is free")?;
                queue
                    .read(number * BLOCK as u64, buffer)
                    .map_err(|e| e.to_string().into())
            }
            Self::Bare(bare) => bare
                .queue(number)
                .map(|_| ())
                .ok_or_else(|| "no slot is free".into()),
            Self::BareUring(bare) => bare
                .queue(number)
                .map(|_| ())
                .ok_or_else(|| "no slot is free".into()),
        }
    }

    #[inline]
    fn submit(&mut self) -> Result<(), Error> {
        match self {
            Self::Ioq { queue, .. } => {
                let report = queue.submit();
                if report.refused + report.parked > 0 {
                    return Err(format!("the kernel did not take all: {report:?}").into());
                }
                Ok(())
            }
            Self::Bare(bare) => bare.submit(),
            Self::BareUring(bare) => bare.submit(),
        }
    }

    /// Adds the first word of each block that has come to `sum`.
    #[inline]
    fn reap(&mut self, sum: &mut u64) -> Result<u64, Error> {
        let count = match self {
            Self::Ioq { queue, buffers } => {
                let mut failed = None;
                let count = queue.reap(|buffer, result| {
                    if result != Ok(BLOCK as u64) {
                        failed = Some(result);
                    }
                    let mut word = [0; 8];
                    word.copy_from_slice(&buffer[..8]);
                    *sum = sum.wrapping_add(u64::from_le_bytes(word));
                    buffers.push(buffer);
                });
                if let Some(result) = failed {
                    return Err(format!("a read gave {result:?}").into());
                }
                count
            }
            Self::Bare(bare) => bare.reap(|_, word| *sum = sum.wrapping_add(word))?,
            Self::BareUring(bare) => bare.reap(|_, word| *sum = sum.wrapping_add(word))?,
        };
        Ok(count as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reader_reads_what_is_in_the_file() {
        let file = BlockFile::new(64).unwrap();
        for reader in Reader::ALL {
            for batch in [1, 5, 32] {
                let mut reads = Reads::new(&file, reader, batch, DEPTH).unwrap();
                reads.run(300).unwrap();
            }
        }
    }
}
