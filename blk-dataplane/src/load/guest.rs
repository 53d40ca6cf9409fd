//! The memory of the guest that the load generator is: what lies in it is laid out once, before the first request.
//!
//! Per request a driver writes 16 bytes of header and reads a byte of status. They lie together in a cache line of
//! their own, as in Linux's driver, whose request structure has the one right after the other.

use std::fs::File;
use std::sync::Arc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{
    Address, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap,
};
use vring::driver::Layout;
use vring::{QueueSize, RingFeatures};

use super::error::LoadError;
use super::workload::Random;

/// Bytes of a request's header and status, and of whatever else is not to share a cache line.
pub(super) const LINE: u64 = 64;
/// Where in them the status is: after the header.
pub(super) const STATUS_OFFSET: u64 = 16;
/// Bytes of a virtio-blk header.
pub(super) const HEADER_LEN: u32 = 16;
/// Bytes of a descriptor, in a ring or a table.
pub(super) const DESCRIPTOR_LEN: u64 = 16;
/// Where buffers begin: as direct I/O wants them, whatever the file.
const BUFFER_ALIGNMENT: u64 = 4096;
/// Where regions begin, in the guest and in the file: what SPDK and huge pages want.
const REGION_ALIGNMENT: u64 = 2 << 20;
/// Most memory: more is a mistake in an option rather than a load.
const MEMORY_MAX: u64 = 64 << 30;

/// What the memory must have room for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Needs {
    pub(super) queues: u16,
    pub(super) depth: u16,
    pub(super) queue_size: QueueSize,
    pub(super) features: RingFeatures,
    /// Descriptors of a request's table; 0: it has none.
    pub(super) table_len: u16,
    /// Bytes of a request's data.
    pub(super) block: u64,
    pub(super) regions: u16,
}

/// Where the parts of a request are, in guest-physical addresses.
#[derive(Clone, Copy, Debug)]
pub(super) struct Places {
    /// Header, and [`STATUS_OFFSET`] on the status.
    pub(super) line: GuestAddress,
    pub(super) table: GuestAddress,
    pub(super) data: GuestAddress,
}

/// Memory in a file that a back-end maps as well.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) memory: Arc<GuestMemoryMmap>,
    /// Where each queue's ring is.
    pub(super) rings: Vec<Layout>,
    /// Of each queue, of each request in flight.
    pub(super) places: Vec<Vec<Places>>,
}

/// A region, as a back-end is told of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shared<'a> {
    pub(super) guest: u64,
    pub(super) size: u64,
    pub(super) user: u64,
    pub(super) offset: u64,
    pub(super) file: &'a File,
}

impl Guest {
    pub(super) fn new(needs: &Needs) -> Result<Self, LoadError> {
        let too_much = || {
            LoadError::option(
                "--bs",
                format!(
                    "{} queues of {} requests of {} bytes need more than {} GiB of memory; give less of one of them",
                    needs.queues,
                    needs.depth,
                    needs.block,
                    MEMORY_MAX >> 30
                ),
            )
        };
        let count = u64::from(needs.queues) * u64::from(needs.depth);
        let stride = needs.block.next_multiple_of(BUFFER_ALIGNMENT);
        let table_stride = (u64::from(needs.table_len) * DESCRIPTOR_LEN).next_multiple_of(LINE);
        let regions = u64::from(needs.regions);
        let per_region = count.div_ceil(regions);
        let sample = layout(GuestAddress(0), needs)?;
        let ring_len = sample.total_len().next_multiple_of(BUFFER_ALIGNMENT);
        // Rings, lines and tables are all in the first region; the buffers are dealt out over all of them.
        let control = (u64::from(needs.queues) * ring_len + count * (LINE + table_stride))
            .next_multiple_of(BUFFER_ALIGNMENT);
        let region_len = per_region
            .checked_mul(stride)
            .and_then(|buffers| buffers.checked_add(control))
            .map(|len| len.next_multiple_of(REGION_ALIGNMENT))
            .filter(|len| {
                len.checked_mul(regions)
                    .is_some_and(|all| all <= MEMORY_MAX)
            })
            .ok_or_else(too_much)?;
        // A hole after each, or they could be taken for one.
        let base_of = |region: u64| GuestAddress(region * 2 * region_len);
        let memory = map(regions, region_len, base_of)?;

        let mut at = 0;
        let mut take = |len: u64| {
            let place = base_of(0).unchecked_add(at);
            at += len;
            place
        };
        let rings = (0..needs.queues)
            .map(|_| layout(take(ring_len), needs))
            .collect::<Result<_, _>>()?;
        let mut index = 0;
        let mut place = || {
            let (region, nth) = (index % regions, index / regions);
            index += 1;
            let before = if region == 0 { control } else { 0 };
            Places {
                line: take(LINE),
                table: take(table_stride),
                data: base_of(region).unchecked_add(before + nth * stride),
            }
        };
        let places = (0..needs.queues)
            .map(|_| (0..needs.depth).map(|_| place()).collect())
            .collect();
        debug_assert!(at <= control);
        let guest = Self {
            memory: Arc::new(memory),
            rings,
            places,
        };
        guest.fill(needs.block);
        Ok(guest)
    }

    /// Fills the buffers with what no file system or disk can make less of; and so their pages are there before
    /// anything is measured.
    fn fill(&self, block: u64) {
        let block = usize::try_from(block).unwrap_or(0);
        let mut random = Random::new(0);
        let mut page = [0; 4096];
        for places in self.places.iter().flatten() {
            for start in (0..block).step_by(page.len()) {
                for word in page.as_chunks_mut::<8>().0 {
                    *word = random.next().to_le_bytes();
                }
                let len = page.len().min(block - start);
                let at = places.data.unchecked_add(start as u64);
                // The layout has put it inside.
                let filled = self.memory.write_slice(&page[..len], at);
                debug_assert!(filled.is_ok());
            }
        }
    }

    /// The regions, as a back-end is told of them.
    pub(super) fn regions(&self) -> impl Iterator<Item = Shared<'_>> {
        self.memory.iter().filter_map(|region| {
            let offset = region.file_offset()?;
            Some(Shared {
                guest: region.start_addr().0,
                size: region.len(),
                user: u64::try_from(region.as_ptr().addr()).ok()?,
                offset: offset.start(),
                file: offset.file(),
            })
        })
    }

    /// Where in this process an address of the guest is mapped: how vhost-user tells of rings.
    pub(super) fn user(&self, address: GuestAddress) -> u64 {
        let host = self.memory.get_host_address(address);
        // The layout has put nothing outside.
        host.map_or(0, |host| u64::try_from(host.addr()).unwrap_or(0))
    }
}

fn layout(base: GuestAddress, needs: &Needs) -> Result<Layout, LoadError> {
    let layout = Layout::new(base, needs.queue_size, needs.features);
    layout.map_err(|error| LoadError::option("--queue-size", error.to_string()))
}

fn map(
    regions: u64,
    len: u64,
    base_of: impl Fn(u64) -> GuestAddress,
) -> Result<GuestMemoryMmap, LoadError> {
    let refused = |source: std::io::Error| {
        LoadError::host(
            format!("cannot have {} MiB of shared memory", (regions * len) >> 20),
            source,
        )
    };
    let file = memfd_create(c"blk-dataplane-bench", MFdFlags::MFD_CLOEXEC)
        .map(File::from)
        .map_err(|errno| refused(errno.into()))?;
    file.set_len(regions * len).map_err(refused)?;
    let file = Arc::new(file);
    let mapped = (0..regions).map(|region| {
        let offset = FileOffset::from_arc(Arc::clone(&file), region * len);
        let size = usize::try_from(len).map_err(std::io::Error::other)?;
        GuestRegionMmap::from_range(base_of(region), size, Some(offset))
            .map_err(std::io::Error::other)
    });
    let mapped = mapped.collect::<Result<Vec<_>, _>>().map_err(refused)?;
    GuestMemoryMmap::from_regions(mapped).map_err(|error| refused(std::io::Error::other(error)))
}
