//! The memory table. Mapping and unmapping are done here, on the connection's thread; a data thread only takes the
//! new map between two batches.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use hostmem::{MemoryMap, RegionConfig};
use vm_memory::GuestAddress;

use super::{Backend, Refused, Result};
use crate::vhost_user::request::Region;

fn region_config(region: Region, fd: OwnedFd) -> RegionConfig {
    RegionConfig {
        guest_addr: GuestAddress(region.guest_addr),
        size: region.size,
        frontend_addr: region.frontend_addr,
        file: File::from(fd),
        mmap_offset: region.mmap_offset,
    }
}

impl Backend {
    /// No regions are none (row M1): rings can then not start, and those that run have lost their memory.
    pub(super) fn set_mem_table(&mut self, regions: Vec<(Region, OwnedFd)>) -> Result<()> {
        let regions = regions
            .into_iter()
            .map(|(region, fd)| region_config(region, fd))
            .collect();
        let memory = self.memory.with_regions(regions);
        self.replace_memory(memory.map_err(Refused::because)?)
    }

    pub(super) fn add_mem_region(&mut self, region: Region, fd: OwnedFd) -> Result<()> {
        let memory = self.memory.with_region(region_config(region, fd));
        self.replace_memory(memory.map_err(Refused::because)?)
    }

    /// By all three of its numbers (row M14); where it lies in its file is not asked.
    pub(super) fn remove_mem_region(&mut self, region: Region) -> Result<()> {
        let memory = self.memory.without_region(
            GuestAddress(region.guest_addr),
            region.size,
            region.frontend_addr,
        );
        self.replace_memory(memory.map_err(Refused::because)?)
    }

    /// Requests in flight go on in the old map (row M13); rings are looked up in the new one.
    fn replace_memory(&mut self, memory: MemoryMap) -> Result<()> {
        let memory = Arc::new(memory);
        let vrings = &self.vrings;
        self.plane.update_memory(Arc::clone(&memory), |index| {
            vrings.get(usize::from(index))?.addresses?.to_guest(&memory)
        })?;
        self.retired
            .push(std::mem::replace(&mut self.memory, memory));
        self.drop_retired_memory();
        Ok(())
    }

    /// Whether a map that was replaced is still there.
    pub(in super::super) fn holds_retired_memory(&self) -> bool {
        !self.retired.is_empty()
    }

    /// Lets go of the maps that no request in flight is in any more. Those that stay are no more than the requests
    /// in flight.
    pub(in super::super) fn drop_retired_memory(&mut self) {
        self.retired.retain(|map| Arc::strong_count(map) > 1);
    }
}
