//! Mapped memory: whole pages around what was asked for, watched for the loss of any.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicU8;

use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use crate::backing::{Backing, FileError, system_page_size};
use crate::sigbus::{Watched, nothing_lost};

/// Bytes of memory, on whole pages. Unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Mapping<B> {
    /// Before `pages`, and so dropped before them: what is not mapped any more must not be in the
    /// table. `None` for memory that nobody else can take away.
    watched: Option<Watched>,
    /// Start `slack` bytes before, on a page boundary, and may end after.
    pages: MmapRegion<B>,
    /// Less than a page.
    slack: usize,
    len: usize,
}

impl<B: Bitmap> Mapping<B> {
    /// Maps `size` bytes of `file` from `offset` on, shared, readable and writable. `bitmap` is told
    /// how many bytes the mapping starts before `offset`.
    pub(crate) fn of_file(
        file: &Arc<File>,
        offset: u64,
        size: u64,
        bitmap: impl FnOnce(usize) -> B,
    ) -> Result<Self, FileError> {
        let backing = Backing::examine(file)?;
        if offset
            .checked_add(size)
            .is_none_or(|end| end > backing.file_size)
        {
            return Err(FileError::TooShort {
                file_size: backing.file_size,
            });
        }
        let window = Window::new(offset, size, &backing).ok_or_else(out_of_address_space)?;
        let pages = MmapRegionBuilder::new_with_bitmap(window.map_len, bitmap(window.slack))
            .with_file_offset(FileOffset::from_arc(Arc::clone(file), window.base))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            // No reservation: whose memory it is, the front-end, has made that already.
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_hugetlbfs(backing.hugetlbfs)
            .build()
            .map_err(refused)?;
        // No larger than the mapping, whose length fits.
        let page_size = usize::try_from(backing.page_size).map_err(|_| out_of_address_space())?;
        Ok(Self {
            watched: Some(Watched::new(
                pages.as_ptr().addr(),
                window.map_len,
                page_size,
            )),
            pages,
            slack: window.slack,
            len: window.len,
        })
    }

    /// Maps `size` bytes of zeroed memory of this process's own, of which pages that are not written
    /// to take no memory.
    pub(crate) fn private(size: u64, bitmap: B) -> Result<Self, FileError> {
        let backing = Backing {
            file_size: u64::MAX,
            page_size: system_page_size().ok_or_else(out_of_address_space)?,
            hugetlbfs: false,
        };
        let window = Window::new(0, size, &backing).ok_or_else(out_of_address_space)?;
        let pages = MmapRegionBuilder::new_with_bitmap(window.map_len, bitmap)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()
            .map_err(refused)?;
        Ok(Self {
            watched: None,
            pages,
            slack: window.slack,
            len: window.len,
        })
    }

    /// In bytes.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn is_hugetlbfs(&self) -> Option<bool> {
        self.pages.is_hugetlbfs()
    }

    pub(crate) fn bitmap(&self) -> BS<'_, B> {
        self.pages.bitmap().slice_at(self.slack)
    }

    /// Whether other memory has taken the place of this.
    #[inline]
    pub(crate) fn is_lost(&self) -> bool {
        // The first is a word that all mappings share; the second is seldom looked at.
        !nothing_lost() && self.watched.as_ref().is_some_and(Watched::is_lost)
    }

    /// Where `[offset, offset + count)` starts in the pages. `None` if it is not all there. A
    /// `count` of 0 may start right at the end.
    #[inline]
    fn offset_in_pages(&self, offset: u64, count: usize) -> Option<usize> {
        let offset = usize::try_from(offset).ok()?;
        let end = offset.checked_add(count)?;
        // `slack + len` is at most the length of the pages, so this cannot overflow.
        (end <= self.len).then(|| self.slack + offset)
    }

    /// The address of the byte at `offset`.
    #[inline]
    pub(crate) fn host_address(&self, offset: u64) -> Option<*mut u8> {
        let offset = self.offset_in_pages(offset, 1)?;
        Some(self.pages.as_ptr().wrapping_add(offset))
    }

    /// The byte at `offset`, as one that others read and write at the same time.
    #[inline]
    pub(crate) fn atomic_u8(&self, offset: u64) -> Option<&AtomicU8> {
        let offset = self.offset_in_pages(offset, 1)?;
        self.pages.get_atomic_ref(offset).ok()
    }

    #[inline]
    pub(crate) fn slice(&self, offset: u64, count: usize) -> Option<VolatileSlice<'_, BS<'_, B>>> {
        let offset = self.offset_in_pages(offset, count)?;
        self.pages.get_slice(offset, count).ok()
    }
}

fn refused(error: MmapRegionError) -> FileError {
    FileError::Mmap(match error {
        MmapRegionError::Mmap(source) => source,
        other => io::Error::other(other),
    })
}

fn out_of_address_space() -> FileError {
    FileError::Mmap(io::Error::from_raw_os_error(libc::ENOMEM))
}

/// The whole pages of a file that hold what is to be mapped.
#[derive(Debug, PartialEq, Eq)]
struct Window {
    /// Where in the file the first page starts.
    base: u64,
    /// What of that page lies before it, in bytes.
    slack: usize,
    /// Of what is asked for, in bytes.
    len: usize,
    /// Of the mapping, in bytes.
    map_len: usize,
}

impl Window {
    /// `None` if it could not be mapped anywhere, as it is larger than the address space.
    fn new(offset: u64, size: u64, backing: &Backing) -> Option<Self> {
        // The page size is a power of two.
        let slack = offset & (backing.page_size - 1);
        // Up to whole pages: munmap() rounds an odd length up for ordinary pages, but refuses it
        // for huge pages, which would leave it mapped for ever.
        let map_len = slack
            .checked_add(size)?
            .checked_next_multiple_of(backing.page_size)?;
        // Objects larger than isize::MAX cannot exist, and offsets into them cannot be computed.
        isize::try_from(map_len).ok()?;
        Some(Self {
            base: offset - slack,
            slack: usize::try_from(slack).ok()?,
            len: usize::try_from(size).ok()?,
            map_len: usize::try_from(map_len).ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backing(page_size: u64) -> Backing {
        Backing {
            file_size: u64::MAX,
            page_size,
            hugetlbfs: page_size > 4096,
        }
    }

    #[test]
    fn window_of_aligned_region_has_no_slack() {
        let window = Window::new(0x3000, 0x5000, &backing(0x1000)).unwrap();
        let expected = Window {
            base: 0x3000,
            slack: 0,
            len: 0x5000,
            map_len: 0x5000,
        };
        assert_eq!(window, expected);
    }

    #[test]
    fn window_of_unaligned_region_is_whole_pages_around_it() {
        let window = Window::new(0x2F_0010, 0x20_0000, &backing(0x20_0000)).unwrap();
        let expected = Window {
            base: 0x20_0000,
            slack: 0xF_0010,
            len: 0x20_0000,
            map_len: 0x40_0000,
        };
        assert_eq!(window, expected);
    }

    #[test]
    fn window_larger_than_the_address_space_is_none() {
        for (offset, size) in [
            (0, u64::MAX),
            (0xFFF, u64::MAX),
            (0, 1 << 63),
            (0x10, (1 << 63) - 1),
        ] {
            assert_eq!(Window::new(offset, size, &backing(0x1000)), None);
        }
    }
}
