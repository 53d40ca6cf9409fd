use std::fs::File;
use std::io;
use std::sync::Arc;

use vm_memory::bitmap::{BS, Bitmap};
use vm_memory::guest_memory::Result as AccessResult;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestUsize, MemoryRegionAddress, MmapRegion, VolatileMemory, VolatileSlice,
};

use crate::backing::Backing;
use crate::dirty::DirtyLog;
use crate::index::Span;
use crate::{HOST_ALIGNMENT, MapError};

/// One region of guest memory, as the front-end describes it. Nothing in it is checked yet.
///
/// The fields are those of a vhost-user memory region description, in its order and units.
#[derive(Debug)]
pub struct RegionConfig {
    /// Where the region starts in guest-physical memory.
    pub guest_addr: GuestAddress,
    /// In bytes.
    pub size: u64,
    /// Where the region starts in the front-end's own virtual address space ("user address").
    pub frontend_addr: u64,
    /// What to map. It is closed if the region is refused, and else when the region is dropped.
    pub file: File,
    /// Where in `file` the region starts, in bytes. Need not be a multiple of the page size.
    pub mmap_offset: u64,
}

impl RegionConfig {
    /// The checks that look at this region's numbers only (rows M3, M5).
    pub(crate) fn check(&self, index: usize) -> Result<(), MapError> {
        let Self {
            guest_addr,
            size,
            frontend_addr,
            mmap_offset,
            ..
        } = *self;
        if size == 0 {
            return Err(MapError::ZeroSize { index, guest_addr });
        }
        for (field, addr) in [
            ("guest_addr", guest_addr.0),
            ("frontend_addr", frontend_addr),
            ("mmap_offset", mmap_offset),
        ] {
            // A region that ends exactly at 2^64 is refused too. It would hold address 2^64 - 1,
            // and its end could not be told from 0.
            if addr.checked_add(size).is_none() {
                return Err(MapError::AddressOverflow {
                    index,
                    field,
                    addr,
                    size,
                });
            }
        }
        // Powers of two divide 2^64, so the difference may wrap.
        if !guest_addr
            .0
            .wrapping_sub(mmap_offset)
            .is_multiple_of(HOST_ALIGNMENT)
        {
            return Err(MapError::OffsetAlignment {
                index,
                guest_addr,
                mmap_offset,
            });
        }
        Ok(())
    }

    pub(crate) fn guest_span(&self) -> Span {
        Span {
            start: self.guest_addr.0,
            size: self.size,
        }
    }

    pub(crate) fn frontend_span(&self) -> Span {
        Span {
            start: self.frontend_addr,
            size: self.size,
        }
    }
}

/// One mapped region of guest memory.
///
/// It is unmapped, and its file closed, when it is dropped. Memory maps made from one another
/// share their regions, so that is when the last map that has it goes.
///
/// Access is through [`GuestMemoryRegion`] and [`Bytes`](vm_memory::Bytes), never as `&[u8]`: the
/// guest writes to it at any time.
#[derive(Debug)]
pub struct Region {
    /// Starts at `slack` bytes before the region, on a page boundary, and may end after it.
    mapping: MmapRegion<DirtyLog>,
    /// What the mapping holds before the region, in bytes. Less than a page.
    slack: usize,
    /// In bytes: `size` as the address space of this process counts.
    len: usize,
    guest_addr: GuestAddress,
    frontend_addr: u64,
    /// The file, and where in it the region starts; the mapping starts `slack` bytes before.
    file: FileOffset,
}

impl Region {
    /// Maps a region that has passed [`RegionConfig::check`].
    pub(crate) fn map(index: usize, config: RegionConfig) -> Result<Self, MapError> {
        let RegionConfig {
            guest_addr,
            size,
            frontend_addr,
            file,
            mmap_offset,
        } = config;
        let backing = Backing::examine(index, &file)?;
        if mmap_offset
            .checked_add(size)
            .is_none_or(|end| end > backing.file_size)
        {
            return Err(MapError::FileTooShort {
                index,
                mmap_offset,
                size,
                file_size: backing.file_size,
            });
        }

        let failed = |source| MapError::Mmap {
            index,
            mmap_offset,
            size,
            source,
        };
        let window = Window::new(mmap_offset, size, &backing)
            .ok_or_else(|| failed(io::Error::from_raw_os_error(libc::ENOMEM)))?;

        let file = Arc::new(file);
        let builder = MmapRegionBuilder::new_with_bitmap(window.map_len, DirtyLog::disabled())
            .with_file_offset(FileOffset::from_arc(Arc::clone(&file), window.base))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            // No reservation: whose memory it is, the front-end, has made that already.
            .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
            .with_hugetlbfs(backing.hugetlbfs);
        let mapping = builder.build().map_err(|error| {
            failed(match error {
                MmapRegionError::Mmap(source) => source,
                other => io::Error::other(other),
            })
        })?;

        Ok(Self {
            mapping,
            slack: window.slack,
            len: window.len,
            guest_addr,
            frontend_addr,
            file: FileOffset::from_arc(file, mmap_offset),
        })
    }

    /// Where the region starts in guest-physical memory.
    #[must_use]
    pub fn guest_addr(&self) -> GuestAddress {
        self.guest_addr
    }

    /// In bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.len as u64
    }

    /// Where the region starts in the front-end's own virtual address space.
    #[must_use]
    pub fn frontend_addr(&self) -> u64 {
        self.frontend_addr
    }

    pub(crate) fn guest_span(&self) -> Span {
        Span {
            start: self.guest_addr.0,
            size: self.size(),
        }
    }

    pub(crate) fn frontend_span(&self) -> Span {
        Span {
            start: self.frontend_addr,
            size: self.size(),
        }
    }

    /// Where `[offset, offset + count)` of the region starts in the mapping. `None` if it is not
    /// all in the region. A `count` of 0 may start right at the end.
    #[inline]
    fn mapping_offset(&self, offset: u64, count: usize) -> Option<usize> {
        let offset = usize::try_from(offset).ok()?;
        let end = offset.checked_add(count)?;
        // `slack + len` is at most the length of the mapping, so this cannot overflow.
        (end <= self.len).then(|| self.slack + offset)
    }
}

impl GuestMemoryRegion for Region {
    type B = DirtyLog;

    #[inline]
    fn len(&self) -> GuestUsize {
        self.size()
    }

    #[inline]
    fn start_addr(&self) -> GuestAddress {
        self.guest_addr
    }

    fn bitmap(&self) -> BS<'_, Self::B> {
        self.mapping.bitmap().slice_at(self.slack)
    }

    #[inline]
    fn get_host_address(&self, addr: MemoryRegionAddress) -> AccessResult<*mut u8> {
        let offset = self
            .mapping_offset(addr.0, 1)
            .ok_or(GuestMemoryError::InvalidBackendAddress)?;
        Ok(self.mapping.as_ptr().wrapping_add(offset))
    }

    /// The file, and where in it the region starts (not the page that this is in).
    fn file_offset(&self) -> Option<&FileOffset> {
        Some(&self.file)
    }

    #[inline]
    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> AccessResult<VolatileSlice<'_, BS<'_, Self::B>>> {
        let offset = self
            .mapping_offset(offset.0, count)
            .ok_or(GuestMemoryError::InvalidBackendAddress)?;
        Ok(self.mapping.get_slice(offset, count)?)
    }

    fn is_hugetlbfs(&self) -> Option<bool> {
        self.mapping.is_hugetlbfs()
    }
}

impl GuestMemoryRegionBytes for Region {}

/// The whole pages of a file that hold a region.
#[derive(Debug, PartialEq, Eq)]
struct Window {
    /// Where in the file the first page starts.
    base: u64,
    /// What of that page lies before the region, in bytes.
    slack: usize,
    /// Of the region, in bytes.
    len: usize,
    /// Of the mapping, in bytes.
    map_len: usize,
}

impl Window {
    /// `None` if it could not be mapped anywhere, as it is larger than the address space.
    fn new(mmap_offset: u64, size: u64, backing: &Backing) -> Option<Self> {
        // The page size is a power of two.
        let slack = mmap_offset & (backing.page_size - 1);
        // Up to whole pages: munmap() rounds an odd length up for ordinary pages, but refuses it
        // for huge pages, which would leave the region mapped for ever.
        let map_len = slack
            .checked_add(size)?
            .checked_next_multiple_of(backing.page_size)?;
        // Objects larger than isize::MAX cannot exist, and offsets into them cannot be computed.
        isize::try_from(map_len).ok()?;
        Some(Self {
            base: mmap_offset - slack,
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
