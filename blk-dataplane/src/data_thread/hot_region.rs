//! Looking guest addresses up where most of them are: in the region of the address before.

// UNSAFETY: a prefetch is an intrinsic that takes a pointer, which it does not dereference.
#![expect(unsafe_code)]

use vm_memory::bitmap::MS;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, MemoryRegionAddress,
    VolatileSlice,
};

use super::buffers::MemoryRef;

/// A memory map and the region of it that was found last. Lives for all passes with one map: which regions there are
/// does not change within a map, and whether one has gone is for the region to say, each time.
#[derive(Debug)]
pub(super) struct HotRegion<'a, M: GuestMemoryBackend> {
    memory: &'a MemoryRef<M>,
    region: Option<&'a M::R>,
    /// Of the region; 0 and 0 while there is none.
    start: u64,
    len: u64,
}

impl<'a, M: GuestMemoryBackend> HotRegion<'a, M> {
    pub(super) fn new(memory: &'a MemoryRef<M>) -> Self {
        Self {
            memory,
            region: None,
            start: 0,
            len: 0,
        }
    }

    pub(super) fn memory(&self) -> &'a MemoryRef<M> {
        self.memory
    }

    pub(super) fn map(&self) -> &'a M {
        self.memory.map()
    }

    /// The host memory of `len` bytes from `addr` on. Fails if they are not in one region.
    #[inline]
    pub(super) fn slice(
        &mut self,
        addr: GuestAddress,
        len: usize,
    ) -> Result<VolatileSlice<'a, MS<'a, M>>, GuestMemoryError> {
        let offset = addr.0.wrapping_sub(self.start);
        if offset < self.len
            && let Some(region) = self.region
        {
            return region.get_slice(MemoryRegionAddress(offset), len);
        }
        self.look_up(addr, len)
    }

    /// Has the line at `addr` fetched, if it is in the region that was found last: the driver has written it on another
    /// processor, from where it takes as long as half a request. A hint; `addr` may be anything.
    #[inline]
    pub(super) fn prefetch(&self, addr: GuestAddress) {
        let offset = addr.0.wrapping_sub(self.start);
        if offset < self.len
            && let Some(region) = self.region
            && let Ok(slice) = region.get_slice(MemoryRegionAddress(offset), 1)
        {
            let line = slice.ptr_guard().as_ptr();
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a prefetch is defined for any address; nothing is dereferenced.
            unsafe {
                std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.cast());
            }
            // No stable intrinsic elsewhere.
            #[cfg(not(target_arch = "x86_64"))]
            let _ = line;
        }
    }

    #[inline(never)]
    fn look_up(
        &mut self,
        addr: GuestAddress,
        len: usize,
    ) -> Result<VolatileSlice<'a, MS<'a, M>>, GuestMemoryError> {
        let (region, offset) = self
            .memory
            .map()
            .to_region_addr(addr)
            .ok_or(GuestMemoryError::InvalidGuestAddress(addr))?;
        self.region = Some(region);
        self.start = region.start_addr().0;
        self.len = region.len();
        region.get_slice(offset, len)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use hostmem::MemoryMap;
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestMemoryMmap, VolatileMemory};

    use super::*;

    const PAGE: u64 = 0x1000;

    /// Two regions that touch, and one apart.
    fn map() -> MemoryRef<GuestMemoryMmap> {
        let at = |page: u64, pages: usize| (GuestAddress(page * PAGE), pages * 0x1000);
        let map = GuestMemoryMmap::from_ranges(&[at(1, 2), at(3, 1), at(8, 2)]);
        MemoryRef::new(Arc::new(map.unwrap()))
    }

    proptest! {
        #[test]
        fn slices_are_those_of_the_map_itself(
            asked in prop::collection::vec((0u64..12 * PAGE, 0usize..0x3000), 1..50)
        ) {
            let map = map();
            let mut hot = HotRegion::new(&map);
            for (addr, len) in asked {
                let addr = GuestAddress(addr);
                let whole = |slice: Result<VolatileSlice<_>, GuestMemoryError>| {
                    slice.ok().map(|slice| (slice.ptr_guard().as_ptr(), slice.len()))
                };
                prop_assert_eq!(whole(hot.slice(addr, len)), whole(map.map().get_slice(addr, len)));
            }
        }
    }

    #[test]
    fn what_is_written_through_a_slice_is_in_the_map() {
        let map = map();
        let mut hot = HotRegion::new(&map);
        for addr in [PAGE, 2 * PAGE, 9 * PAGE] {
            let slice = hot.slice(GuestAddress(addr), 1).unwrap();
            slice.get_ref::<u8>(0).unwrap().store(7);
            assert_eq!(map.map().read_obj::<u8>(GuestAddress(addr)).unwrap(), 7);
        }
    }

    #[test]
    fn empty_map_has_nothing() {
        let map = MemoryRef::new(Arc::new(MemoryMap::empty()));
        let mut hot = HotRegion::new(&map);
        assert!(hot.slice(GuestAddress(0), 0).is_err());
        assert!(hot.slice(GuestAddress(u64::MAX), 1).is_err());
    }
}
