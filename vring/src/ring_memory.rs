//! Ring words in guest memory, behind pointers translated once.
//!
//! # Why the pointers stay valid
//!
//! A ring keeps an `Arc` of the memory its pointers lead into. Holding it is holding a shared
//! borrow of the memory object for as long as the ring lives: nobody can move the object, drop it
//! or get `&mut` to it. [`GuestMemoryBackend::get_slice`] promises its slice for as long as
//! such a borrow lasts, and the trait forbids interior mutability besides, so the translation
//! cannot change underneath. (vm-memory's `GuestMemory`, the trait that may sit on an IOMMU,
//! promises neither, since a mapping may be revoked at any time; so a ring asks for the backend.)
//!
//! # Why the accesses are sound
//!
//! The guest writes these words whenever it likes, so none is ever borrowed as plain data. Each
//! access is one atomic of the word's exact width, which makes a concurrent write by a guest an
//! ordinary value rather than a torn one, and the value is owned from then on.

// UNSAFETY: ring words are dereferenced through pointers cached at start, because looking up the
// memory region again for each word costs more than the rest of a pop.
#![expect(unsafe_code)]

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

use vm_memory::volatile_memory::PtrGuardMut;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::config::{RingArea, StartError};

/// Bytes of a descriptor, in a split ring's table and in an indirect one (virtio 1.3 §2.7.5).
pub(crate) const DESCRIPTOR_LEN: usize = DESCRIPTOR_BYTES as usize;
/// [`DESCRIPTOR_LEN`] in the width of a descriptor's `len`.
pub(crate) const DESCRIPTOR_BYTES: u32 = 16;

/// A range of guest memory that is contiguous in the host, aligned, and big enough.
///
/// Whoever dereferences it vouches that the memory it was translated from is still borrowed.
#[derive(Debug)]
pub(crate) struct Area {
    base: NonNull<u8>,
    len: usize,
    /// Keeps memory that is mapped on demand (vm-memory's `xen` feature) mapped.
    _guard: PtrGuardMut,
}

impl Area {
    /// Translates `len` bytes at `address`, which must be `alignment`-aligned both in the guest
    /// and in the host, and lie in one region.
    pub(crate) fn translate<M: GuestMemoryBackend>(
        memory: &M,
        area: RingArea,
        address: GuestAddress,
        len: usize,
        alignment: usize,
    ) -> Result<Self, StartError> {
        let address = address.0;
        let aligned = usize::try_from(address).is_ok_and(|a| a.is_multiple_of(alignment));
        if !aligned {
            return Err(StartError::Misaligned {
                area,
                address,
                alignment,
            });
        }
        let overflows = u64::try_from(len).map_or(true, |len| address.checked_add(len).is_none());
        if overflows {
            return Err(StartError::AddressOverflow { area, address, len });
        }
        let not_mapped = StartError::NotMapped { area, address, len };
        let slice = memory
            .get_slice(GuestAddress(address), len)
            .map_err(|_| not_mapped)?;
        // A backend's word for the length is not taken where a pointer depends on it.
        if slice.len() != len {
            return Err(not_mapped);
        }
        let guard = slice.ptr_guard_mut();
        let base = NonNull::new(guard.as_ptr()).ok_or(not_mapped)?;
        if !base.addr().get().is_multiple_of(alignment) {
            return Err(StartError::HostMisaligned { area, address });
        }
        Ok(Self {
            base,
            len,
            _guard: guard,
        })
    }

    #[cfg(test)]
    fn word_fits(&self, offset: usize, width: usize) -> bool {
        fits(self.base, self.len, offset, width)
    }

    /// The 16-bit word at `offset`.
    ///
    /// # Safety
    ///
    /// - `offset + 2` is at most the area's length;
    /// - `offset` is a multiple of 2;
    /// - the memory the area was translated from is still borrowed.
    #[inline]
    pub(crate) unsafe fn word16(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(fits(self.base, self.len, offset, 2));
        // SAFETY: in bounds and aligned by the caller's promise, and mapped by the third one. The
        // host side accesses the word through atomics only.
        unsafe { self.base.add(offset).cast().as_ref() }
    }

    /// The 32-bit word at `offset`.
    ///
    /// # Safety
    ///
    /// - `offset + 4` is at most the area's length;
    /// - `offset` is a multiple of 4;
    /// - the memory the area was translated from is still borrowed.
    #[inline]
    pub(crate) unsafe fn word32(&self, offset: usize) -> &AtomicU32 {
        debug_assert!(fits(self.base, self.len, offset, 4));
        // SAFETY: as for `word16`.
        unsafe { self.base.add(offset).cast().as_ref() }
    }

    /// Tells the processor that the entry at `offset` is about to be read. No more than a hint: reads
    /// nothing, and cannot fault.
    #[inline]
    pub(crate) fn prefetch(&self, offset: usize) {
        let entry = self.base.as_ptr().wrapping_add(offset);
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch is defined for any address; this one is not dereferenced.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(entry.cast());
        }
        // No stable intrinsic elsewhere.
        #[cfg(not(target_arch = "x86_64"))]
        let _ = entry;
    }

    /// The 16-byte entry at `offset` as its two halves.
    ///
    /// # Safety
    ///
    /// - `offset + 16` is at most the area's length;
    /// - `offset` is a multiple of 8;
    /// - the memory the area was translated from is still borrowed.
    #[inline]
    pub(crate) unsafe fn entry(&self, offset: usize) -> &[AtomicU64; 2] {
        debug_assert!(fits(self.base, self.len, offset, DESCRIPTOR_LEN));
        // SAFETY: as for `word16`; an array of two atomics has the alignment of one.
        unsafe { self.base.add(offset).cast().as_ref() }
    }
}

/// Whether a word of `width` bytes at `offset` lies in `len` bytes at `base`, aligned as an
/// atomic of at most 8 bytes.
fn fits(base: NonNull<u8>, len: usize, offset: usize, width: usize) -> bool {
    let end = offset.checked_add(width);
    let start = base.addr().get().checked_add(offset);
    end.is_some_and(|end| end <= len) && start.is_some_and(|s| s.is_multiple_of(width.min(8)))
}

/// An indirect table that lies in one region, 8-aligned in the host: what nearly every driver
/// sends.
pub(crate) struct AlignedTable<'a> {
    area: Area,
    entries: u16,
    /// The borrow that keeps `area` valid.
    _memory: std::marker::PhantomData<&'a ()>,
}

impl<'a> AlignedTable<'a> {
    /// Translates the table, or `None` if it takes the slow way: it spans regions, is not
    /// aligned, or is not there at all.
    #[inline]
    pub(crate) fn translate<M: GuestMemoryBackend>(
        memory: &'a M,
        address: u64,
        entries: u16,
    ) -> Option<Self> {
        let len = usize::from(entries) * DESCRIPTOR_LEN;
        let slice = memory.get_slice(GuestAddress(address), len).ok()?;
        if slice.len() != len {
            return None;
        }
        let guard = slice.ptr_guard_mut();
        let base = NonNull::new(guard.as_ptr())?;
        base.addr().get().is_multiple_of(8).then_some(Self {
            area: Area {
                base,
                len,
                _guard: guard,
            },
            entries,
            _memory: std::marker::PhantomData,
        })
    }

    /// The number of entries.
    #[inline]
    pub(crate) const fn entries(&self) -> u16 {
        self.entries
    }

    /// Reads entry `index` once, or `None` past the end.
    #[inline]
    pub(crate) fn read(&self, index: u16) -> Option<[u64; 2]> {
        if index >= self.entries {
            return None;
        }
        // SAFETY: `index` is below the entries the area was translated for; 16 times anything is
        // a multiple of 8, and `translate` checked the base; `'a` borrows the memory.
        let [low, high] = unsafe { self.area.entry(usize::from(index) * DESCRIPTOR_LEN) };
        Some([low.load(Ordering::Relaxed), high.load(Ordering::Relaxed)])
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemoryMmap;

    use super::*;

    fn memory() -> GuestMemoryMmap<()> {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0x1000), 0x1000)]).unwrap()
    }

    #[test]
    fn an_area_ending_with_its_region_is_whole() {
        let mem = memory();
        let area =
            Area::translate(&mem, RingArea::DeviceArea, GuestAddress(0x1ff0), 16, 4).unwrap();
        assert!(area.word_fits(12, 4));
        assert!(!area.word_fits(14, 4));
        assert!(!area.word_fits(16, 2));
        assert!(!area.word_fits(usize::MAX, 2));
    }

    #[test]
    fn a_table_gives_no_entry_past_its_end() {
        let mem = memory();
        let table = AlignedTable::translate(&mem, 0x1fe0, 2).unwrap();
        assert_eq!(table.read(1), Some([0, 0]));
        assert_eq!(table.read(2), None);
        assert!(AlignedTable::translate(&mem, 0x1fe0, 3).is_none());
        assert!(AlignedTable::translate(&mem, 0x1f04, 2).is_none());
    }
}
