//! The words of one queue region, in memory that others may write to and take away.
//!
//! Soundness in one paragraph: the pointer was translated through the map that is kept beside it, which is immutable, so
//! the memory stays mapped for as long as the words live; each access checks its bounds and its alignment, and is one
//! atomic of the word's width, so that a front-end which writes there too gives an ordinary value and not a torn one.

// UNSAFETY: a lookup for each word would cost more than all else that a record does for a request (55 instructions
// for each store, measured).
#![expect(unsafe_code)]

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use hostmem::MemoryMap;
use vm_memory::{AtomicInteger, GuestAddress, GuestMemoryBackend};

/// Part of a mapped region. If the memory is taken away, `SigbusGuard` puts other memory in its place: what is stored
/// from then on goes nowhere, and what is loaded is 0. The front-end has thrown its record away.
#[derive(Clone, Debug)]
pub(super) struct Words {
    base: NonNull<u8>,
    len: usize,
    /// Keeps the memory mapped.
    _map: Arc<MemoryMap>,
}

// SAFETY: the pointer leads into memory that the map beside it keeps mapped, whichever thread holds it; accesses are
// atomic, and nothing is tied to a thread.
unsafe impl Send for Words {}

impl Words {
    /// `len` bytes from `start` of `map` on, which one region of it must hold. `None` if it does not, or if its memory
    /// has gone.
    pub(super) fn new(map: Arc<MemoryMap>, start: GuestAddress, len: usize) -> Option<Self> {
        let slice = map.get_slice(start, len).ok()?;
        // A length that a pointer depends on is not taken on trust.
        let base = NonNull::new(slice.ptr_guard_mut().as_ptr()).filter(|_| slice.len() == len)?;
        Some(Self {
            base,
            len,
            _map: map,
        })
    }

    /// The word at `offset`, in bytes from the queue region's start. `None` outside it.
    #[inline]
    fn word<T: AtomicInteger>(&self, offset: usize) -> Option<&T> {
        let inside = offset.checked_add(size_of::<T>())? <= self.len;
        let word = self.base.as_ptr().wrapping_add(offset).cast::<T>();
        debug_assert!(inside && word.is_aligned(), "no word at {offset}");
        if !inside || !word.is_aligned() {
            return None;
        }
        // SAFETY: within the bytes that were translated, which `_map` keeps mapped, and aligned, as was just checked.
        // Atomic integers are valid whatever the bytes; the host side uses nothing else there.
        Some(unsafe { &*word })
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
