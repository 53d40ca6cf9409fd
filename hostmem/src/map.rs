use std::sync::Arc;

use vm_memory::bitmap::MS;
use vm_memory::guest_memory::Result as AccessResult;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, MemoryRegionAddress,
    VolatileSlice,
};

use crate::index::{HintedIndex, Span, SpanIndex};
use crate::{MAX_REGIONS, MapError, Region, RegionConfig};

/// All of a guest's memory, as it was at one moment.
///
/// It never changes. A change of the guest's memory makes a new map, which shares the regions that
/// stay, and whoever uses the old one keeps it alive through its [`Arc`] until done with it.
///
/// It implements [`GuestMemoryBackend`], and with it `vm_memory`'s `GuestMemory` and
/// [`Bytes<GuestAddress>`](vm_memory::Bytes): what is written for these works with it as it does
/// with `GuestMemoryMmap`. All lookups are total: whatever the address and length, the answer is
/// `None` or an error, in time bounded by the number of regions.
///
/// ```
/// use std::sync::Arc;
///
/// use hostmem::{MemoryMap, RegionConfig};
/// use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let file = tempfile::tempfile()?;
/// file.set_len(0x20_0000)?;
/// let map = Arc::new(MemoryMap::new(vec![RegionConfig {
///     guest_addr: GuestAddress(0),
///     size: 0x20_0000,
///     frontend_addr: 0x7f00_0000_0000,
///     file,
///     mmap_offset: 0,
/// }])?);
///
/// let guest_addr = map.frontend_to_guest(0x7f00_0000_1000).ok_or("not mapped")?;
/// assert_eq!(guest_addr, GuestAddress(0x1000));
/// map.write_obj(0x1234_u32, guest_addr)?;
/// assert!(!map.check_range(guest_addr, 0x20_0000));
///
/// // The new map has no memory; the old one still does, for whoever holds it.
/// let without = map.without_region(GuestAddress(0), 0x20_0000, 0x7f00_0000_0000)?;
/// assert_eq!(without.num_regions(), 0);
/// assert_eq!(map.read_obj::<u32>(guest_addr)?, 0x1234);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Default)]
pub struct MemoryMap {
    /// By guest address.
    regions: Box<[Arc<Region>]>,
    /// Position for position the addresses of `regions`, side by side, so that a search does not
    /// follow a pointer at each step.
    guest: HintedIndex,
    frontend: FrontendIndex,
}

/// Where regions lie in the front-end's address space.
#[derive(Debug, Default)]
struct FrontendIndex {
    spans: SpanIndex,
    /// Position for position the guest address of each span.
    guest_addrs: Box<[u64]>,
}

impl MemoryMap {
    /// Maps `regions`, which may come in any order: all of them or, on an error, none.
    ///
    /// No regions make an empty map, which is what a front-end asks for when it takes all memory
    /// away.
    ///
    /// # Errors
    ///
    /// See [`MapError`]. The numbers of all regions are checked before the first file is looked at.
    pub fn new(regions: Vec<RegionConfig>) -> Result<Self, MapError> {
        if regions.len() > MAX_REGIONS {
            return Err(MapError::TooManyRegions {
                count: regions.len(),
            });
        }
        for (index, region) in regions.iter().enumerate() {
            region.check(index)?;
        }
        check_overlaps(&regions)?;
        let regions = regions
            .into_iter()
            .enumerate()
            .map(|(index, region)| Region::map(index, region).map(Arc::new))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self::from_regions(regions))
    }

    /// A map without memory: every lookup fails.
    #[must_use]
    pub fn empty() -> Self {
        Self::default()
    }

    /// The map with one more region. It shares the other regions with this one, which stays as it
    /// is.
    ///
    /// # Errors
    ///
    /// See [`MapError`].
    pub fn with_region(&self, region: RegionConfig) -> Result<Self, MapError> {
        let count = self.regions.len() + 1;
        if count > MAX_REGIONS {
            return Err(MapError::TooManyRegions { count });
        }
        region.check(0)?;
        for other in &self.regions {
            check_overlap(
                0,
                [region.guest_span(), region.frontend_span()],
                [other.guest_span(), other.frontend_span()],
            )?;
        }
        let added = Arc::new(Region::map(0, region)?);
        let regions = self.regions.iter().cloned().chain([added]).collect();
        Ok(Self::from_regions(regions))
    }

    /// The map without the region that has this guest address, this size and this front-end
    /// address. It shares the other regions with this one, which stays as it is.
    ///
    /// # Errors
    ///
    /// [`MapError::UnknownRegion`] if no region matches in all three.
    pub fn without_region(
        &self,
        guest_addr: GuestAddress,
        size: u64,
        frontend_addr: u64,
    ) -> Result<Self, MapError> {
        let is_meant = |region: &Region| {
            region.guest_addr() == guest_addr
                && region.size() == size
                && region.frontend_addr() == frontend_addr
        };
        if !self.regions.iter().any(|region| is_meant(region)) {
            return Err(MapError::UnknownRegion {
                guest_addr,
                size,
                frontend_addr,
            });
        }
        let regions = self
            .regions
            .iter()
            .filter(|region| !is_meant(region))
            .cloned()
            .collect();
        Ok(Self::from_regions(regions))
    }

    /// The regions, by guest address.
    pub fn regions(&self) -> impl ExactSizeIterator<Item = &Region> + DoubleEndedIterator {
        self.regions.iter().map(Arc::as_ref)
    }

    /// The guest address that the front-end has at address `addr`.
    ///
    /// This is what ring addresses take (vhost-user `SET_VRING_ADDR`). There is no hint here: it is
    /// done when a ring is set up, not for each request.
    #[must_use]
    pub fn frontend_to_guest(&self, addr: u64) -> Option<GuestAddress> {
        self.frontend_range_to_guest(addr, 1)
    }

    /// The guest address of `[addr, addr + len)` in the front-end's address space, if all of it is
    /// memory, and is one range for the guest as well.
    ///
    /// A range may cross from region to region, as long as they follow one another both in the
    /// front-end's and in the guest's address space; it says nothing about the host's. The answer
    /// for a `len` of 0 is that for `addr` alone.
    #[must_use]
    pub fn frontend_range_to_guest(&self, addr: u64, len: u64) -> Option<GuestAddress> {
        let (mut position, offset) = self.frontend.spans.find(addr)?;
        let mut span = self.frontend.spans.get(position)?;
        let mut guest_addr = *self.frontend.guest_addrs.get(position)?;
        // Cannot overflow: no region reaches past the end of the guest's address space.
        let found = GuestAddress(guest_addr + offset);

        // Of the range, in bytes, from `addr` to the end of `span`.
        let mut covered = span.size - offset;
        while covered < len {
            position += 1;
            let next = self.frontend.spans.get(position)?;
            let next_guest_addr = *self.frontend.guest_addrs.get(position)?;
            if next.start != span.end() || next_guest_addr != guest_addr + span.size {
                return None;
            }
            // Cannot overflow: spans do not overlap, and the last ends below 2^64.
            covered += next.size;
            (span, guest_addr) = (next, next_guest_addr);
        }
        Some(found)
    }

    /// `regions` are checked: neither too many nor overlapping.
    fn from_regions(mut regions: Vec<Arc<Region>>) -> Self {
        regions.sort_unstable_by_key(|region| region.frontend_addr());
        let frontend = FrontendIndex {
            spans: SpanIndex::new(regions.iter().map(|r| r.frontend_span()).collect()),
            guest_addrs: regions.iter().map(|r| r.guest_addr().0).collect(),
        };
        regions.sort_unstable_by_key(|region| region.guest_addr());
        let guest = SpanIndex::new(regions.iter().map(|r| r.guest_span()).collect());
        Self {
            regions: regions.into_boxed_slice(),
            guest: HintedIndex::new(guest),
            frontend,
        }
    }
}

impl GuestMemoryBackend for MemoryMap {
    type R = Region;

    fn num_regions(&self) -> usize {
        self.regions.len()
    }

    #[inline]
    fn find_region(&self, addr: GuestAddress) -> Option<&Region> {
        self.to_region_addr(addr).map(|(region, _)| region)
    }

    fn iter(&self) -> impl Iterator<Item = &Region> {
        self.regions()
    }

    /// The last address of the last region; 0 if there is none.
    fn last_addr(&self) -> GuestAddress {
        self.regions
            .last()
            .map_or(GuestAddress(0), |region| region.last_addr())
    }

    #[inline]
    fn to_region_addr(&self, addr: GuestAddress) -> Option<(&Region, MemoryRegionAddress)> {
        let (position, offset) = self.guest.find(addr.0)?;
        let region = self.regions.get(position)?;
        Some((region, MemoryRegionAddress(offset)))
    }

    /// Whether all of `[base, base + len)` is memory; of nothing at all this is true.
    #[inline]
    fn check_range(&self, base: GuestAddress, len: usize) -> bool {
        // Nothing to look up, as in the trait's own definition.
        if len == 0 {
            return true;
        }
        let Some((mut position, offset)) = self.guest.find(base.0) else {
            return false;
        };
        let Some(mut span) = self.guest.get(position) else {
            return false;
        };
        let len = len as u64;
        // Almost always the range lies in one region, and the loop is not entered.
        let mut covered = span.size - offset;
        while covered < len {
            position += 1;
            match self.guest.get(position) {
                Some(next) if next.start == span.end() => {
                    // Cannot overflow: spans do not overlap, and the last ends below 2^64.
                    covered += next.size;
                    span = next;
                }
                _ => return false,
            }
        }
        true
    }

    /// Fails if the range crosses into another region, even an adjacent one: that is elsewhere in
    /// host memory. [`get_slices`](GuestMemoryBackend::get_slices) splits it.
    #[inline]
    fn get_slice(
        &self,
        addr: GuestAddress,
        count: usize,
    ) -> AccessResult<VolatileSlice<'_, MS<'_, Self>>> {
        let (region, offset) = self
            .to_region_addr(addr)
            .ok_or(GuestMemoryError::InvalidGuestAddress(addr))?;
        region.get_slice(offset, count)
    }
}

/// Every pair of regions (row M4).
fn check_overlaps(regions: &[RegionConfig]) -> Result<(), MapError> {
    // Pairs, not neighbours in a sorted list: it names the first region of the list that is in
    // conflict, and there are few enough (MAX_REGIONS^2 / 2 comparisons, once).
    for (index, region) in regions.iter().enumerate() {
        for other in &regions[..index] {
            check_overlap(
                index,
                [region.guest_span(), region.frontend_span()],
                [other.guest_span(), other.frontend_span()],
            )?;
        }
    }
    Ok(())
}

/// `[guest, frontend]` of region `index`, against those of another.
fn check_overlap(
    index: usize,
    [guest, frontend]: [Span; 2],
    [other_guest, other_frontend]: [Span; 2],
) -> Result<(), MapError> {
    if overlap(&guest, &other_guest) {
        return Err(MapError::GuestOverlap {
            index,
            guest_addr: GuestAddress(guest.start),
            size: guest.size,
            other_guest_addr: GuestAddress(other_guest.start),
            other_size: other_guest.size,
        });
    }
    if overlap(&frontend, &other_frontend) {
        return Err(MapError::FrontendOverlap {
            index,
            frontend_addr: frontend.start,
            size: frontend.size,
            other_frontend_addr: other_frontend.start,
            other_size: other_frontend.size,
        });
    }
    Ok(())
}

fn overlap(a: &Span, b: &Span) -> bool {
    a.start < b.end() && b.start < a.end()
}

#[cfg(test)]
mod tests {
    use vm_memory::{GuestAddressSpace, GuestMemory};

    use super::*;

    #[test]
    fn map_can_be_shared_by_threads_and_serves_generic_users() {
        fn is_shared<T: Send + Sync + 'static>(_: &T) {}
        fn is_guest_memory<M: GuestMemory<PhysicalMemory = MemoryMap>>(_: &M) {}
        fn is_address_space<S: GuestAddressSpace<M = MemoryMap>>(space: &S) -> usize {
            space.memory().num_regions()
        }
        let map = Arc::new(MemoryMap::empty());
        is_shared(&map);
        is_guest_memory(map.as_ref());
        assert_eq!(is_address_space(&map), 0);
    }
}
