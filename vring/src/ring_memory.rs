//! Ring words in guest memory, behind pointers translated once.
//!
//! # Why the pointers stay valid
//!
//! A ring keeps an `Arc` of the memory its pointers lead into. Holding it is holding a shared
//! borrow of the memory object for as long as the ring lives: nobody can move the object, drop it
//! or get `&mut` to it. [`GuestMemory::get_slices`] promises its slices for as long as such a
//! borrow lasts, so there is memory behind the pointers until then. With an IOMMU the slices
//! promise no more than that: a mapping that is revoked later leads a ring to memory that the guest
//! may have given another use, which is for its owner to end
//! ([`set_memory`](crate::Queue::set_memory)), and never to memory that is not there.
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

use vm_memory::bitmap::{BS, Bitmap, BitmapSlice};
use vm_memory::volatile_memory::PtrGuardMut;
use vm_memory::{
    Address, GuestAddress, GuestMemory, GuestMemoryBackend, Permissions, VolatileSlice,
};

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
    /// and in the host, lie in one region, and be the device's for `access`.
    pub(crate) fn translate<M: GuestMemory>(
        memory: &M,
        area: RingArea,
        address: GuestAddress,
        len: usize,
        alignment: usize,
        access: Permissions,
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
        let found = Self::find(memory, GuestAddress(address), len, access)
            .ok_or(StartError::NotMapped { area, address, len })?;
        if !found.base.addr().get().is_multiple_of(alignment) {
            return Err(StartError::HostMisaligned { area, address });
        }
        Ok(found)
    }

    /// `len` bytes at `address`, if they are in one piece.
    #[inline]
    fn find<M: GuestMemory>(
        memory: &M,
        address: GuestAddress,
        len: usize,
        access: Permissions,
    ) -> Option<Self> {
        // Without an IOMMU this is known when it is compiled, and the memory's own look-up is the
        // shortest way.
        match memory.physical_memory() {
            Some(backend) => Self::of(&backend.get_slice(address, len).ok()?, len),
            None => {
                // vm-memory's IOMMU adds the two without asking.
                address.checked_add(u64::try_from(len).ok()?)?;
                let mut slices = memory.get_slices(address, len, access).ok()?;
                Self::of(&slices.next()?.ok()?, len)
            }
        }
    }

    #[inline]
    fn of<B: BitmapSlice>(slice: &VolatileSlice<'_, B>, len: usize) -> Option<Self> {
        // Behind an IOMMU the first piece may not be all. And nobody's word for the length is taken
        // where a pointer depends on it.
        if slice.len() != len {
            return None;
        }
        let guard = slice.ptr_guard_mut();
        let base = NonNull::new(guard.as_ptr())?;
        Some(Self {
            base,
            len,
            _guard: guard,
        })
    }

    /// Its first byte, aligned as it was asked for.
    #[inline]
    pub(crate) const fn base(&self) -> NonNull<u8> {
        self.base
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

/// Whether the memory keeps a dirty bitmap. One of size zero (`()`, no tracking) cannot even know
/// which range it speaks of, so for it the marking compiles to nothing.
#[inline]
pub(crate) const fn tracks_writes<'a, M: GuestMemory + 'a>() -> bool {
    size_of::<BS<'a, M::Bitmap>>() != 0
}

/// Marks `len` bytes at `address`, part of a ring's area, in the memory's dirty bitmap, if it has one.
///
/// The bitmap's handle borrows the region, so it is looked up again: once per batch, and only while
/// there is a bitmap. The area was found at start, so the look-up finds it again, unless an IOMMU's
/// mapping was revoked since: then there is no address to mark.
#[inline]
pub(crate) fn mark_dirty<M: GuestMemory>(memory: &M, address: GuestAddress, len: usize) {
    if !tracks_writes::<M>() {
        return;
    }
    match memory.physical_memory() {
        Some(backend) => {
            if let Ok(slice) = backend.get_slice(address, len) {
                slice.bitmap().mark_dirty(0, len);
            }
        }
        None => {
            let slices = memory.get_slices(address, len, Permissions::Write);
            for slice in slices.into_iter().flatten().flatten() {
                slice.bitmap().mark_dirty(0, slice.len());
            }
        }
    }
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
    pub(crate) fn translate<M: GuestMemory>(
        memory: &'a M,
        address: u64,
        entries: u16,
    ) -> Option<Self> {
        let len = usize::from(entries) * DESCRIPTOR_LEN;
        let area = Area::find(memory, GuestAddress(address), len, Permissions::Read)?;
        area.base.addr().get().is_multiple_of(8).then_some(Self {
            area,
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
        let access = Permissions::ReadWrite;
        let area = Area::translate(
            &mem,
            RingArea::DeviceArea,
            GuestAddress(0x1ff0),
            16,
            4,
            access,
        )
        .unwrap();
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
