use std::fs::File;
use std::io;
use std::sync::Arc;

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::Result as AccessResult;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestUsize, MemoryRegionAddress, VolatileSlice,
};

use crate::backing::FileError;
use crate::dirty::{LogSwitch, RegionBitmap};
use crate::index::Span;
use crate::mapping::Mapping;
use crate::region_set::Placed;
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
    mapping: Mapping<RegionBitmap>,
    guest_addr: GuestAddress,
    frontend_addr: u64,
    /// The file, and where in it the region starts.
    file: FileOffset,
}

impl Region {
    /// Maps a region that has passed [`RegionConfig::check`]. Writes to it are recorded where `log`
    /// says.
    pub(crate) fn map(
        index: usize,
        config: RegionConfig,
        log: &Arc<LogSwitch>,
    ) -> Result<Self, MapError> {
        let RegionConfig {
            guest_addr,
            size,
            frontend_addr,
            file,
            mmap_offset,
        } = config;
        let file = Arc::new(file);
        let mapping = Mapping::of_file(&file, mmap_offset, size, |slack| {
            RegionBitmap::new(Arc::clone(log), guest_addr.0.wrapping_sub(slack as u64))
        })
        .map_err(|error| match error {
            FileError::Access { flags } => MapError::FileAccess { index, flags },
            FileError::Examine(source) => MapError::FileExamine { index, source },
            FileError::Mmap(source) => MapError::Mmap {
                index,
                mmap_offset,
                size,
                source,
            },
            FileError::TooShort { file_size } => MapError::FileTooShort {
                index,
                mmap_offset,
                size,
                file_size,
            },
            FileError::Type { mode } => MapError::FileType { index, mode },
        })?;
        Ok(Self {
            mapping,
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
        self.mapping.len() as u64
    }

    /// Where the region starts in the front-end's own virtual address space.
    #[must_use]
    pub fn frontend_addr(&self) -> u64 {
        self.frontend_addr
    }

    /// Whether the memory has gone, so that every lookup in it fails: its file was truncated, or
    /// had no room for a page that was touched. Only with [`SigbusGuard`](crate::SigbusGuard);
    /// without, nobody lives to ask.
    #[inline]
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.mapping.is_lost()
    }

    /// Refuses access to memory that has gone, in the kernel's words.
    #[inline]
    fn check_intact(&self) -> AccessResult<()> {
        if self.is_lost() {
            return Err(lost());
        }
        Ok(())
    }
}

#[cold]
fn lost() -> GuestMemoryError {
    GuestMemoryError::IOError(io::Error::from_raw_os_error(libc::EFAULT))
}

impl Placed for Region {
    fn guest_span(&self) -> Span {
        Span {
            start: self.guest_addr.0,
            size: self.size(),
        }
    }

    fn frontend_span(&self) -> Span {
        Span {
            start: self.frontend_addr,
            size: self.size(),
        }
    }
}

impl GuestMemoryRegion for Region {
    type B = RegionBitmap;

    #[inline]
    fn len(&self) -> GuestUsize {
        self.size()
    }

    #[inline]
    fn start_addr(&self) -> GuestAddress {
        self.guest_addr
    }

    fn bitmap(&self) -> BS<'_, Self::B> {
        self.mapping.bitmap()
    }

    /// Fails with `EFAULT` if the memory has gone ([`is_lost`](Self::is_lost)).
    #[inline]
    fn get_host_address(&self, addr: MemoryRegionAddress) -> AccessResult<*mut u8> {
        self.check_intact()?;
        self.mapping
            .host_address(addr.0)
            .ok_or(GuestMemoryError::InvalidBackendAddress)
    }

    /// The file, and where in it the region starts (not the page that this is in).
    fn file_offset(&self) -> Option<&FileOffset> {
        Some(&self.file)
    }

    /// Fails with `EFAULT` if the memory has gone ([`is_lost`](Self::is_lost)).
    #[inline]
    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> AccessResult<VolatileSlice<'_, BS<'_, Self::B>>> {
        self.check_intact()?;
        self.mapping
            .slice(offset.0, count)
            .ok_or(GuestMemoryError::InvalidBackendAddress)
    }

    fn is_hugetlbfs(&self) -> Option<bool> {
        self.mapping.is_hugetlbfs()
    }
}

impl GuestMemoryRegionBytes for Region {}
