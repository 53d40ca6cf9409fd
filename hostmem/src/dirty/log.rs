use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use vm_memory::GuestAddress;

use crate::backing::FileError;
use crate::mapping::Mapping;

/// Pages to a byte of the log.
const PAGES_PER_BYTE: u64 = 8;

/// One bit for each page of guest-physical memory, set when the page is written to.
///
/// Page 0 of the guest's address space is bit 0 of byte 0, whatever memory there is, page 8 is
/// bit 0 of byte 1, and so on: the layout of vhost's log, in which it is shared with the front-end
/// ([`shared`](Self::shared), vhost-user `SET_LOG_BASE`). A VMM that copies the memory itself
/// makes one of its own ([`private`](Self::private)) and empties it with
/// [`harvest`](Self::harvest). Put in force and taken out of it by
/// [`MemoryMap::start_log`](crate::MemoryMap::start_log) and
/// [`stop_log`](crate::MemoryMap::stop_log), while requests go on.
///
/// # Order
///
/// A bit is set after the page was written. The device marks before it completes the request; so
/// when the guest has been told of the write, the page is dirty. Whoever clears the bit and then
/// reads the page sees what was written before the bit was set; what is written later sets it anew.
#[derive(Debug)]
pub struct DirtyLog {
    bits: Mapping<()>,
}

impl DirtyLog {
    /// Bytes of guest memory to a bit. Fixed by vhost (`VHOST_LOG_PAGE`), whatever pages the guest
    /// or the host use.
    pub const PAGE_SIZE: u64 = 0x1000;

    /// Maps `size` bytes of `file` from `offset` on, which need not be a multiple of the page size.
    /// Bits that are set stay set.
    ///
    /// If `file` is truncated later, [`SigbusGuard`](crate::SigbusGuard) covers this mapping too:
    /// marks then go nowhere, and [`is_lost`](Self::is_lost) says so.
    ///
    /// # Errors
    ///
    /// See [`LogError`].
    pub fn shared(file: File, offset: u64, size: u64) -> Result<Self, LogError> {
        if size == 0 {
            return Err(LogError::ZeroSize);
        }
        if offset.checked_add(size).is_none() {
            return Err(LogError::Overflow { offset, size });
        }
        let bits =
            Mapping::of_file(&Arc::new(file), offset, size, |_| ()).map_err(
                |error| match error {
                    FileError::Access { flags } => LogError::FileAccess { flags },
                    FileError::Examine(source) => LogError::FileExamine { source },
                    FileError::Mmap(source) => LogError::Mmap { size, source },
                    FileError::TooShort { file_size } => LogError::FileTooShort {
                        offset,
                        size,
                        file_size,
                    },
                    FileError::Type { mode } => LogError::FileType { mode },
                },
            )?;
        Ok(Self { bits })
    }

    /// A log of this process's own for memory up to `last`, with no bit set. Pages of it that are
    /// never marked take no memory.
    ///
    /// # Errors
    ///
    /// [`LogError::Mmap`]: the address space has no room for a bit per page up to `last`.
    pub fn private(last: GuestAddress) -> Result<Self, LogError> {
        let size = last.0 / (Self::PAGE_SIZE * PAGES_PER_BYTE) + 1;
        let bits = Mapping::private(size, ()).map_err(|error| {
            let source = match error {
                FileError::Mmap(source) | FileError::Examine(source) => source,
                other => io::Error::other(format!("{other:?}")),
            };
            LogError::Mmap { size, source }
        })?;
        Ok(Self { bits })
    }

    /// In bytes: a bit for each page that it can tell of.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.bits.len() as u64
    }

    /// Whether all of the guest memory up to `last` has its bit in this log.
    #[must_use]
    pub fn covers(&self, last: GuestAddress) -> bool {
        last.0 / (Self::PAGE_SIZE * PAGES_PER_BYTE) < self.size()
    }

    /// Whether the log's memory has gone, so that nothing is recorded any more. Only with
    /// [`SigbusGuard`](crate::SigbusGuard), and only of a shared log. The front-end's fault, and its
    /// own loss: it cannot rely on its copy of the guest any more.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.bits.is_lost()
    }

    /// Whether the page that `addr` is in is marked. False beyond the log's end.
    #[must_use]
    pub fn is_dirty(&self, addr: GuestAddress) -> bool {
        self.is_marked(addr.0)
    }

    /// Takes the marks off all pages of `range`, even where it holds only part of one, and gives
    /// each run of pages that were marked to `dirty`, in ascending order.
    ///
    /// The pages are read after that, and hold at least what was written before their marks were
    /// set. Takes time in proportion to the range: meant for one region after the other. A log
    /// that is shared is the front-end's to clear.
    pub fn harvest(&self, range: Range<GuestAddress>, mut dirty: impl FnMut(Range<GuestAddress>)) {
        let first = range.start.0 / Self::PAGE_SIZE;
        let end = range.end.0.div_ceil(Self::PAGE_SIZE).min(self.pages());
        let mut run: Option<Range<u64>> = None;
        let mut page = first;
        while page < end {
            let byte_end = (page / PAGES_PER_BYTE + 1) * PAGES_PER_BYTE;
            let stop = end.min(byte_end);
            let found = self.take(page / PAGES_PER_BYTE, mask(page, stop - 1));
            for page in page..stop {
                if found & mask(page, page) == 0 {
                    continue;
                }
                match &mut run {
                    Some(run) if run.end == page => run.end += 1,
                    _ => {
                        if let Some(run) = run.replace(page..page + 1) {
                            dirty(addresses(&run));
                        }
                    }
                }
            }
            page = stop;
        }
        if let Some(run) = run {
            dirty(addresses(&run));
        }
    }

    /// Marks the pages of `[addr, addr + len)`, as far as the log reaches.
    pub(crate) fn mark(&self, addr: u64, len: usize) {
        let Some(more) = len.checked_sub(1) else {
            return;
        };
        let last = addr.saturating_add(more as u64) / Self::PAGE_SIZE;
        let last = last.min(self.pages() - 1);
        let mut page = addr / Self::PAGE_SIZE;
        while page <= last {
            let byte = page / PAGES_PER_BYTE;
            let stop = last.min(byte * PAGES_PER_BYTE + (PAGES_PER_BYTE - 1));
            if let Some(bits) = self.byte(byte) {
                // Even if they are set already: only a read-modify-write is sure to come after the
                // front-end's clearing them or, if before, to let it see the data. Release: the data
                // written before. Pairs with whatever the front-end clears the bits with.
                bits.fetch_or(mask(page, stop), Ordering::Release);
            }
            page = stop + 1;
        }
    }

    pub(crate) fn is_marked(&self, addr: u64) -> bool {
        let page = addr / Self::PAGE_SIZE;
        self.byte(page / PAGES_PER_BYTE)
            .is_some_and(|bits| bits.load(Ordering::Acquire) & mask(page, page) != 0)
    }

    /// Clears `bits` of a byte and returns which of them were set.
    fn take(&self, byte: u64, bits: u8) -> u8 {
        let Some(cell) = self.byte(byte) else {
            return 0;
        };
        // Looking first leaves pages of the log that were never marked without memory.
        if cell.load(Ordering::Relaxed) & bits == 0 {
            return 0;
        }
        // Acquire: pairs with the release in `mark`; the pages are read after this.
        cell.fetch_and(!bits, Ordering::AcqRel) & bits
    }

    fn pages(&self) -> u64 {
        // At most 2^63 bytes could be mapped, so that pages beyond 2^64 / PAGE_SIZE have bits; they
        // are never asked for.
        self.size().saturating_mul(PAGES_PER_BYTE)
    }

    fn byte(&self, byte: u64) -> Option<&AtomicU8> {
        self.bits.atomic_u8(byte)
    }
}

/// Why a dirty log was refused. Nothing has changed when one of these is returned: a log that was in
/// force is in force still, and every file handed in is closed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// The kernel does not let this process order its threads (`membarrier`).
    ///
    /// The host's fault: Linux before 4.14, or a seccomp filter. Without it a write that goes on
    /// while the log is switched on could be in neither the log nor the copy.
    #[error("the kernel gives no expedited membarrier")]
    Barrier {
        /// What the kernel answered.
        source: io::Error,
    },

    /// The file is not open for both reading and writing.
    ///
    /// The front-end's fault.
    #[error("the log's file is not open for reading and writing (flags {flags:#o})")]
    FileAccess {
        /// The file's status flags, as `fcntl(F_GETFL)` gives them.
        flags: i32,
    },

    /// The kernel would not say what the file is.
    ///
    /// The host's fault.
    #[error("cannot examine the log's file")]
    FileExamine {
        /// What the kernel answered.
        source: io::Error,
    },

    /// The file ends before `offset + size`.
    ///
    /// The front-end's fault.
    #[error(
        "the log at offset {offset:#x} + size {size:#x} is past the end of its file of \
         {file_size:#x} bytes"
    )]
    FileTooShort {
        /// Where in the file the log was to start, in bytes.
        offset: u64,
        /// Size of the log, in bytes.
        size: u64,
        /// Size of the file, in bytes.
        file_size: u64,
    },

    /// The file is not a regular file.
    ///
    /// The front-end's fault.
    #[error("the log is not in a regular file (mode {mode:#o})")]
    FileType {
        /// The file's mode, as `fstat` gives it.
        mode: u32,
    },

    /// The kernel refused the mapping.
    ///
    /// The front-end's fault if the size is absurd, else the host's.
    #[error("cannot map a log of {size:#x} bytes")]
    Mmap {
        /// Size of the log, in bytes.
        size: u64,
        /// What the kernel answered.
        source: io::Error,
    },

    /// `offset + size` does not fit 64 bits.
    ///
    /// The front-end's fault.
    #[error("the log's offset {offset:#x} + size {size:#x} does not fit 64 bits")]
    Overflow {
        /// Where in the file the log was to start, in bytes.
        offset: u64,
        /// Size of the log, in bytes.
        size: u64,
    },

    /// There is guest memory that has no bit in the log.
    ///
    /// The front-end's fault. A write to that memory would be lost on the way.
    #[error("a log of {size:#x} bytes has no bit for guest address {:#x}", .last.0)]
    TooSmall {
        /// Size of the log, in bytes.
        size: u64,
        /// The last address of guest memory.
        last: GuestAddress,
    },

    /// A log of no bytes.
    ///
    /// The front-end's fault.
    #[error("a log of size 0")]
    ZeroSize,
}

/// The bits of pages `first..=last`, which are in one byte.
fn mask(first: u64, last: u64) -> u8 {
    let (first, last) = (first % PAGES_PER_BYTE, last % PAGES_PER_BYTE);
    (0xFF << first) & (0xFF >> (PAGES_PER_BYTE - 1 - last))
}

fn addresses(pages: &Range<u64>) -> Range<GuestAddress> {
    // The end of the very last page does not fit 64 bits.
    let address = |page: u64| GuestAddress(page.saturating_mul(DirtyLog::PAGE_SIZE));
    address(pages.start)..address(pages.end)
}
