//! What the kernel says of a file before it is mapped.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};
use nix::unistd::{SysconfVar, sysconf};

use crate::MapError;

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
    /// `index` is the region that `file` is for, and goes into the error.
    pub(crate) fn examine(index: usize, file: &File) -> Result<Self, MapError> {
        let failed = |source| MapError::FileExamine { index, source };

        // Both work on an O_PATH descriptor, where little else does.
        let metadata = file.metadata().map_err(failed)?;
        if !metadata.is_file() {
            return Err(MapError::FileType {
                index,
                mode: metadata.mode(),
            });
        }
        let flags = fcntl(file, FcntlArg::F_GETFL).map_err(|e| failed(e.into()))?;
        // An O_PATH descriptor has no access mode, whatever it was opened with.
        if OFlag::from_bits_retain(flags) & OFlag::O_ACCMODE != OFlag::O_RDWR {
            return Err(MapError::FileAccess { index, flags });
        }

        let statfs = fstatfs(file).map_err(|e| failed(e.into()))?;
        let hugetlbfs = statfs.filesystem_type() == HUGETLBFS_MAGIC;
        let page_size = if hugetlbfs {
            // On hugetlbfs, and only there, the block size is that of the huge page.
            u64::try_from(statfs.block_size()).ok()
        } else {
            system_page_size()
        }
        .filter(|size| size.is_power_of_two())
        .ok_or_else(|| failed(io::Error::other("unusable page size")))?;

        Ok(Self {
            file_size: metadata.len(),
            page_size,
            hugetlbfs,
        })
    }
}

fn system_page_size() -> Option<u64> {
    let size = sysconf(SysconfVar::PAGE_SIZE).ok().flatten()?;
    u64::try_from(size).ok()
}
