//! The words of one queue region, in memory that others may write to and take away.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use hostmem::{MemoryMap, RegionBitmap};
use vm_memory::bitmap::BS;
use vm_memory::{AtomicInteger, GuestAddress, GuestMemoryBackend, VolatileMemory, VolatileSlice};

/// Part of a mapped region. What is stored after the memory has gone goes nowhere, and what is loaded is
/// 0: the front-end has thrown its record away.
#[derive(Clone, Debug)]
pub(super) struct Words {
    map: Arc<MemoryMap>,
    start: GuestAddress,
    len: usize,
}

impl Words {
    /// `len` bytes from `start` of `map` on, which one region of it holds, and which are 8-aligned in the
    /// host if the region is.
    pub(super) fn new(map: Arc<MemoryMap>, start: GuestAddress, len: usize) -> Self {
        Self { map, start, len }
    }

    /// Looks the words up, for a few accesses. `None` if the memory has gone.
    #[inline]
    pub(super) fn view(&self) -> Option<View<'_>> {
        let slice = self.map.get_slice(self.start, self.len).ok()?;
        Some(View { slice })
    }
}

/// The words, looked up. Offsets are in bytes from the queue region's start; one outside it does nothing.
#[derive(Debug)]
pub(super) struct View<'a> {
    slice: VolatileSlice<'a, BS<'a, RegionBitmap>>,
}

impl View<'_> {
    #[inline]
    fn word<T: AtomicInteger>(&self, offset: usize) -> Option<&T> {
        let word = self.slice.get_atomic_ref(offset);
        debug_assert!(word.is_ok(), "no word at {offset}");
        word.ok()
    }

    #[inline]
    fn store<T: AtomicInteger>(&self, offset: usize, value: T::V) {
        if let Some(word) = self.word::<T>(offset) {
            // Release: what was stored before is there if this is, in this memory and in the ring's.
            word.store(value, Ordering::Release);
            #[cfg(test)]
            super::tests::stored();
        }
    }

    #[inline]
    pub(super) fn store_u8(&self, offset: usize, value: u8) {
        self.store::<AtomicU8>(offset, value);
    }

    #[inline]
    pub(super) fn store_u16(&self, offset: usize, value: u16) {
        self.store::<AtomicU16>(offset, value);
    }

    #[inline]
    pub(super) fn store_u32(&self, offset: usize, value: u32) {
        self.store::<AtomicU32>(offset, value);
    }

    #[inline]
    pub(super) fn store_u64(&self, offset: usize, value: u64) {
        self.store::<AtomicU64>(offset, value);
    }

    fn load<T: AtomicInteger>(&self, offset: usize) -> T::V
    where
        T::V: Default,
    {
        // Relaxed: whoever has written it is dead, or lies.
        self.word::<T>(offset)
            .map_or_else(T::V::default, |word| word.load(Ordering::Relaxed))
    }

    pub(super) fn load_u8(&self, offset: usize) -> u8 {
        self.load::<AtomicU8>(offset)
    }

    pub(super) fn load_u16(&self, offset: usize) -> u16 {
        self.load::<AtomicU16>(offset)
    }

    pub(super) fn load_u64(&self, offset: usize) -> u64 {
        self.load::<AtomicU64>(offset)
    }
}
