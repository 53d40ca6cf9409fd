//! One mapping's place in the table that the signal handler reads.

use super::sync::{AtomicBool, AtomicUsize, Ordering, fence};

/// What is mapped where, in bytes. `len` is not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) start: usize,
    pub(crate) len: usize,
    /// Size of the pages it is mapped in. `start` and `len` are multiples of it.
    pub(crate) page_size: usize,
}

impl Extent {
    pub(crate) fn holds(&self, addr: usize) -> bool {
        // Below `start` this wraps to more than any length.
        addr.wrapping_sub(self.start) < self.len
    }

    /// Whether it shares an address with `[addr, addr + len)`.
    pub(crate) fn overlaps(&self, addr: usize, len: usize) -> bool {
        self.holds(addr) || self.start.wrapping_sub(addr) < len
    }
}

/// A sequence lock: one writer at a time, readers that never wait.
///
/// A reader that meets a writer takes the slot for empty. For the handler that is right: the memory
/// that was touched is borrowed by whoever touched it, so its slot is neither filled nor emptied
/// meanwhile, and a slot that changes is another's.
#[derive(Debug, Default)]
pub(crate) struct Slot {
    /// Odd while the rest is being written.
    version: AtomicUsize,
    start: AtomicUsize,
    /// 0 in an empty slot.
    len: AtomicUsize,
    page_size: AtomicUsize,
    lost: AtomicBool,
}

impl Slot {
    /// Fills or empties the slot. The caller sees to it that nobody else does.
    pub(crate) fn set(&self, extent: Option<Extent>) {
        let Extent {
            start,
            len,
            page_size,
        } = extent.unwrap_or(Extent {
            start: 0,
            len: 0,
            page_size: 0,
        });
        let version = self.version.load(Ordering::Relaxed);
        self.version
            .store(version.wrapping_add(1), Ordering::Relaxed);
        // Pairs with the fence in `get`: whoever sees a word stored below sees the odd version.
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
        self.page_size.store(page_size, Ordering::Relaxed);
        self.lost.store(false, Ordering::Relaxed);
        // Pairs with the first load in `get`.
        self.version
            .store(version.wrapping_add(2), Ordering::Release);
    }

    /// What is in the slot, all of it as of one moment. Async-signal-safe.
    pub(crate) fn get(&self) -> Option<Extent> {
        let version = self.version.load(Ordering::Acquire);
        let extent = Extent {
            start: self.start.load(Ordering::Relaxed),
            len: self.len.load(Ordering::Relaxed),
            page_size: self.page_size.load(Ordering::Relaxed),
        };
        // Pairs with the fence in `set`.
        fence(Ordering::Acquire);
        let unchanged = self.version.load(Ordering::Relaxed) == version;
        (version.is_multiple_of(2) && unchanged && extent.len > 0).then_some(extent)
    }

    /// True if it was not lost before. Async-signal-safe.
    pub(crate) fn lose(&self) -> bool {
        !self.lost.swap(true, Ordering::Relaxed)
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }
}
