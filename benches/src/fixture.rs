//! Files of known content, and random numbers that are the same in each run.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::Error;

/// Bytes per request in all benches of reads.
pub const BLOCK: usize = 4096;

/// A file of numbered blocks, removed when dropped.
#[derive(Debug)]
pub struct BlockFile {
    _directory: TempDir,
    path: PathBuf,
    blocks: u64,
}

impl BlockFile {
    /// Writes `blocks` blocks of [`BLOCK`] bytes, each beginning with its number. In `/dev/shm`,
    /// a tmpfs, so that no disk is measured; `BENCH_DIR` names another directory.
    ///
    /// # Errors
    ///
    /// The directory is missing or full.
    pub fn new(blocks: u64) -> Result<Self, Error> {
        let parent = std::env::var_os("BENCH_DIR").unwrap_or_else(|| "/dev/shm".into());
        let directory = tempfile::Builder::new()
            .prefix("benches-")
            .tempdir_in(&parent)
            .map_err(|e| format!("{}: {e} (set BENCH_DIR)", Path::new(&parent).display()))?;
        let path = directory.path().join("blocks");
        let mut file = std::io::BufWriter::with_capacity(1 << 20, File::create(&path)?);
        let mut block = [0x5a; BLOCK];
        for number in 0..blocks {
            block[..8].copy_from_slice(&number.to_le_bytes());
            file.write_all(&block)?;
        }
        file.into_inner()?.sync_all()?;
        Ok(Self {
            _directory: directory,
            path,
            blocks,
        })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length in blocks.
    pub fn blocks(&self) -> u64 {
        self.blocks
    }

    /// Opens it for reading with `O_DIRECT`, or without where the file system refuses. True: direct.
    ///
    /// # Errors
    ///
    /// What `open` returned.
    pub fn open(&self) -> Result<(File, bool), Error> {
        let direct = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(&self.path);
        match direct {
            Ok(file) => Ok((file, true)),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                Ok((File::open(&self.path)?, false))
            }
            Err(e) => Err(e.into()),
        }
    }
}

/// Xorshift64: random enough to defeat locality, cheap enough not to be measured.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The same sequence for the same seed.
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// The next number below `bound`, which must not be 0 nor beyond 2³².
    #[inline]
    pub fn below(&mut self, bound: u64) -> u64 {
        debug_assert!((1..=1 << 32).contains(&bound));
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 32) * bound) >> 32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_numbers_stay_below_their_bound_and_reach_all_of_it() {
        let mut random = Random::new(7);
        let mut seen = [0u32; 5];
        for _ in 0..1000 {
            seen[usize::try_from(random.below(5)).unwrap()] += 1;
        }
        assert!(seen.iter().all(|&count| count > 100), "{seen:?}");
    }
}
