//! What the kernel says of a file before it is mapped.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use nix::unistd::{SysconfVar, sysconf};

/// Why a file cannot be mapped.
#[derive(Debug)]
pub(crate) enum FileError {
    /// Not open for reading and writing.
    Access { flags: i32 },
    /// The kernel would not say what it is.
    Examine(io::Error),
    /// The kernel would not map it.
    Mmap(io::Error),
    /// Ends before what is to be mapped.
    TooShort { file_size: u64 },
    /// Not a regular file.
    Type { mode: u32 },
}

/// A regular file, open for reading and writing.
#[derive(Debug)]
pub(crate) struct Backing {
    /// In bytes.
    pub(crate) file_size: u64,
    /// Size of the pages that the kernel maps it in: offset and length of a mapping are multiples
    /// of it. A power of two.
    pub(crate) page_size: u64,
    pub(crate) hugetlbfs: bool,
}

impl Backing {
    pub(crate) fn examine(file: &File) -> Result<Self, FileError> {
        // Both work on an O_PATH descriptor, where little else does.
        let metadata = file.metadata().map_err(FileError::Examine)?;
        if !metadata.is_file() {
            return Err(FileError::Type {
                mode: metadata.mode(),
            });
        }
        let flags = fcntl(file, FcntlArg::F_GETFL).map_err(|e| FileError::Examine(e.into()))?;
        // An O_PATH descriptor has no access mode, whatever it was opened with.
        if OFlag::from_bits_retain(flags) & OFlag::O_ACCMODE != OFlag::O_RDWR {
            return Err(FileError::Access { flags });
        }

        let statfs = fstatfs(file).map_err(|e| FileError::Examine(e.into()))?;
        let hugetlbfs = statfs.filesystem_type() == HUGETLBFS_MAGIC;
        let page_size = if hugetlbfs {
            // On hugetlbfs, and only there, the block size is that of the huge page.
            u64::try_from(statfs.block_size()).ok()
        } else {
            system_page_size()
        }
        .filter(|size| size.is_power_of_two())
        .ok_or_else(|| FileError::Examine(io::Error::other("unusable page size")))?;

        Ok(Self {
            file_size: metadata.len(),
            page_size,
            hugetlbfs,
        })
    }
}

pub(crate) fn system_page_size() -> Option<u64> {
    let size = sysconf(SysconfVar::PAGE_SIZE).ok().flatten()?;
    u64::try_from(size).ok()
}
