use std::sync::Arc;

use vm_memory::bitmap::MS;
use vm_memory::guest_memory::Result as AccessResult;
use vm_memory::{
    GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, MemoryRegionAddress,
    VolatileSlice,
};

use crate::dirty::{DirtyLog, LogError, LogSwitch};
use crate::index::Span;
use crate::region_set::{Placed, RegionSet};
use crate::{MAX_REGIONS, MapError, MemoryLost, Region, RegionConfig, SigbusGuard};

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
    set: RegionSet<Region>,
    /// The same in all maps made from one another, and in their regions.
    log: Arc<LogSwitch>,
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
        Self::empty().with_regions(regions)
    }

    /// A map without memory: every lookup fails.
    #[must_use]
    pub fn empty() -> Self {
        Self::default()
    }

    /// A map of `regions` and no others, all newly mapped, in the place of this one, which stays as
    /// it is. As [`new`](Self::new), but what is written to the regions goes into the same
    /// [log](Self::start_log).
    ///
    /// # Errors
    ///
    /// See [`MapError`].
    pub fn with_regions(&self, regions: Vec<RegionConfig>) -> Result<Self, MapError> {
        if regions.len() > MAX_REGIONS {
            return Err(MapError::TooManyRegions {
                count: regions.len(),
            });
        }
        for (index, region) in regions.iter().enumerate() {
            region.check(index)?;
        }
        check_overlaps(&regions)?;
        for (index, region) in regions.iter().enumerate() {
            self.check_log(index, region)?;
        }
        let regions = regions
            .into_iter()
            .enumerate()
            .map(|(index, region)| Region::map(index, region, &self.log).map(Arc::new))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(self.with_set(RegionSet::new(regions)))
    }

    /// The map with one more region. It shares the other regions, and the
    /// [log](Self::start_log), with this one, which stays as it is.
    ///
    /// # Errors
    ///
    /// See [`MapError`].
    pub fn with_region(&self, region: RegionConfig) -> Result<Self, MapError> {
        let count = self.set.regions().len() + 1;
        if count > MAX_REGIONS {
            return Err(MapError::TooManyRegions { count });
        }
        region.check(0)?;
        for other in self.set.regions() {
            check_overlap(
                0,
                [region.guest_span(), region.frontend_span()],
                [other.guest_span(), other.frontend_span()],
            )?;
        }
        self.check_log(0, &region)?;
        let added = Region::map(0, region, &self.log)?;
        Ok(self.with_set(self.set.with(added)))
    }

    /// The map without the region that has this guest address, this size and this front-end
    /// address. It shares the other regions, and the [log](Self::start_log), with this one, which
    /// stays as it is.
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
        let set = self.set.without(|region| {
            region.guest_addr() == guest_addr
                && region.size() == size
                && region.frontend_addr() == frontend_addr
        });
        let set = set.ok_or(MapError::UnknownRegion {
            guest_addr,
            size,
            frontend_addr,
        })?;
        Ok(self.with_set(set))
    }

    fn with_set(&self, set: RegionSet<Region>) -> Self {
        Self {
            set,
            log: Arc::clone(&self.log),
        }
    }

    /// The regions, by guest address.
    pub fn regions(&self) -> impl ExactSizeIterator<Item = &Region> + DoubleEndedIterator {
        self.set.regions().iter().map(Arc::as_ref)
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
        self.set.frontend_to_guest(addr, len).map(GuestAddress)
    }

    /// Fails if memory of this map has gone since it was mapped.
    ///
    /// To be asked after an access, and before its outcome is acted on: see
    /// [`SigbusGuard`](crate::SigbusGuard), without which this never fails. Costs a load as long as
    /// nothing was ever lost in this process.
    ///
    /// # Errors
    ///
    /// [`MemoryLost`]: names the first region that is lost.
    #[inline]
    pub fn check_intact(&self) -> Result<(), MemoryLost> {
        if SigbusGuard::losses() == 0 {
            return Ok(());
        }
        self.find_lost()
    }

    #[cold]
    fn find_lost(&self) -> Result<(), MemoryLost> {
        match self.regions().find(|region| region.is_lost()) {
            None => Ok(()),
            Some(region) => Err(MemoryLost {
                guest_addr: region.guest_addr(),
                size: region.size(),
            }),
        }
    }

    /// Records from now on in `log` which pages are written to, in this map and in all that were or
    /// will be made from one another with it. Returns the log that was in force until now, to which
    /// nothing is added any more.
    ///
    /// Lookups and requests go on meanwhile, on any thread. A write that goes on just now is either
    /// in memory when this returns, for whoever copies all of it from then on, or in the log.
    /// Waits for threads that are just setting bits in the old log; there is no other wait.
    ///
    /// A log must have a bit for each page of memory. With a log in force, memory is added only if
    /// the log has bits for it; so a larger one is put in force first.
    ///
    /// # Errors
    ///
    /// [`LogError::TooSmall`], [`LogError::Barrier`]; the old log stays in force.
    pub fn start_log(&self, log: Arc<DirtyLog>) -> Result<Option<Arc<DirtyLog>>, LogError> {
        let last = self.last_addr();
        if !self.set.regions().is_empty() && !log.covers(last) {
            let size = log.size();
            return Err(LogError::TooSmall { size, last });
        }
        self.log
            .replace(Some(log))
            .map_err(|source| LogError::Barrier { source })
    }

    /// Records no longer which pages are written to. Returns the log that was in force, to which
    /// nothing is added any more. Otherwise as [`start_log`](Self::start_log).
    pub fn stop_log(&self) -> Option<Arc<DirtyLog>> {
        // Fails for a log only.
        self.log.replace(None).ok().flatten()
    }

    /// The log in force.
    #[must_use]
    pub fn log(&self) -> Option<Arc<DirtyLog>> {
        self.log.current()
    }

    /// Marks the pages of `[addr, addr + len)` as written to, if there is a log.
    ///
    /// For what was written past vm-memory's own marking: by the kernel on behalf of a request, or
    /// through host addresses. To be called after the write, and before the guest is told of it.
    /// The range must be one that was written to; what of it is not memory may be marked as well.
    #[inline]
    pub fn mark_dirty(&self, addr: GuestAddress, len: usize) {
        self.log.with(|log| log.mark(addr.0, len));
    }

    /// Whether the log in force, if any, has bits for a new region.
    fn check_log(&self, index: usize, region: &RegionConfig) -> Result<(), MapError> {
        // Checked before: not empty, and the sum fits.
        let last = GuestAddress(region.guest_addr.0 + (region.size - 1));
        match self.log.with(|log| log.covers(last)) {
            Some(false) => Err(MapError::BeyondLog { index, last }),
            Some(true) | None => Ok(()),
        }
    }
}

impl GuestMemoryBackend for MemoryMap {
    type R = Region;

    fn num_regions(&self) -> usize {
        self.set.regions().len()
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
        self.set
            .regions()
            .last()
            .map_or(GuestAddress(0), |region| region.last_addr())
    }

    #[inline]
    fn to_region_addr(&self, addr: GuestAddress) -> Option<(&Region, MemoryRegionAddress)> {
        let (region, offset) = self.set.find(addr.0)?;
        Some((region, MemoryRegionAddress(offset)))
    }

    /// Whether all of `[base, base + len)` is memory; of nothing at all this is true.
    #[inline]
    fn check_range(&self, base: GuestAddress, len: usize) -> bool {
        // Nothing to look up, as in the trait's own definition.
        if len == 0 {
            return true;
        }
        self.set.covers(base.0, len as u64)
    }

    /// Fails if the range crosses into another region, even an adjacent one: that is elsewhere in
    /// host memory. [`get_slices`](GuestMemoryBackend::get_slices) splits it. Fails if the region is
    /// [lost](Region::is_lost).
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
