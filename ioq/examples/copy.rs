//! Copies a file with up to 64 reads in flight, using only safe calls.
//!
//! `cargo run -p ioq --example copy -- FROM TO`

use std::error::Error;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use ioq::{AlignedBuf, Config, Durability, IoQueue};

/// Bytes a read asks for.
const BLOCK: u64 = 128 * 1024;
/// Blocks in flight, and so buffers: 8 MiB.
const BLOCKS_IN_FLIGHT: u16 = 64;

/// Which block a buffer holds.
#[derive(Clone, Copy)]
struct Place {
    offset: u64,
    len: u64,
}

fn copy(from: &Path, to: &Path) -> Result<u64, Box<dyn Error>> {
    let source = Arc::new(File::open(from)?);
    let size = source.metadata()?.len();
    let target = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .open(to)?;
    target.set_len(size)?;

    let config = Config {
        depth: BLOCKS_IN_FLIGHT,
        max_segments: 1,
    };
    let mut reads = IoQueue::linux_aio(source, &config)?;
    let mut writes = IoQueue::linux_aio(Arc::new(target), &config)?;

    let mut next = 0;
    let mut spare: Vec<(AlignedBuf, Place)> = Vec::new();
    let mut filled: Vec<(AlignedBuf, Place)> = Vec::new();
    let mut failure = None;
    loop {
        // A block takes a slot of one queue at a time, so with this bound neither is ever full.
        while next < size && reads.free_slots() + writes.free_slots() > reads.capacity() {
            let place = Place {
                offset: next,
                len: BLOCK.min(size - next),
            };
            let len = usize::try_from(place.len)?;
            let buf = match spare.pop() {
                Some((buf, _)) if buf.len() == len => buf,
                _ => AlignedBuf::new(len, 4096).ok_or("out of memory")?,
            };
            reads.read(place.offset, (buf, place))?;
            reads.submit();
            next += place.len;
        }

        reads.reap(|block, result| match result {
            Ok(_) => filled.push(block),
            Err(error) => failure = Some(format!("read at {}: {error}", block.1.offset)),
        });
        for (buf, place) in filled.drain(..) {
            writes.write(place.offset, (buf, place), Durability::WriteBack)?;
        }
        writes.submit();
        writes.reap(|block, result| match result {
            Ok(_) => spare.push(block),
            Err(error) => failure = Some(format!("write at {}: {error}", block.1.offset)),
        });

        if let Some(failure) = failure {
            return Err(failure.into());
        }
        if next == size && reads.is_idle() && writes.is_idle() {
            break;
        }
        if !reads.completions_pending() && !writes.completions_pending() {
            // A program with more to do would wait for both queues' `completion_fd` with epoll.
            std::thread::yield_now();
        }
    }

    let empty = AlignedBuf::new(1, 1).ok_or("out of memory")?;
    writes.queue_fdatasync((empty, Place { offset: 0, len: 0 }))?;
    writes.submit();
    let mut synced = Ok(0);
    while !writes.is_idle() {
        writes.reap(|_, result| synced = result);
        std::thread::yield_now();
    }
    synced?;
    Ok(size)
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(from), Some(to), None) = (arguments.next(), arguments.next(), arguments.next())
    else {
        return Err("usage: copy FROM TO".into());
    };
    let bytes = copy(Path::new(&from), Path::new(&to))?;
    println!("{bytes} bytes copied");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copy_is_the_original() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        // More than 64 blocks, and a last one that is neither whole nor a multiple of anything.
        let bytes: Vec<u8> = (0u32..5_000_000)
            .flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes())
            .collect();
        std::fs::write(&from, &bytes[..bytes.len() - 7]).unwrap();
        assert_eq!(copy(&from, &to).unwrap(), bytes.len() as u64 - 7);
        assert!(std::fs::read(&to).unwrap() == bytes[..bytes.len() - 7]);
    }
}
