//! Guest addresses looked up in turn, in memory of so many regions.

use std::hint::black_box;

use hostmem::{MAX_REGIONS, MemoryMap, RegionConfig};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::Error;
use crate::fixture::Random;

/// Addresses looked up in turn: 32 KiB of them, less than the first-level cache with the map's spans.
pub const ADDRESSES: u64 = 4096;

const PAGE: u64 = 4096;

/// Where regions are: `(start, size)`.
#[derive(Clone, Debug)]
pub struct Regions(Vec<(u64, u64)>);

impl Regions {
    /// So many of 128 KiB, and as large a hole after each.
    pub fn even(count: usize) -> Self {
        const SIZE: u64 = 0x2_0000;
        Self((0..count as u64).map(|i| (i * 2 * SIZE, SIZE)).collect())
    }

    /// As on a PC with all slots taken: low memory in pieces, a hole for PCI, DIMMs of two sizes, and
    /// device memory far above, so that the DIMMs are crowded in a corner of the range. Less than
    /// 100 GiB in all, which is what valgrind lets a program map.
    pub fn pc() -> Self {
        const MIB: u64 = 1 << 20;
        const GIB: u64 = 1 << 30;
        let mut regions = vec![
            (0, 0xA_0000),
            (0xC_0000, 0x4_0000),
            (MIB, 3 * GIB - MIB),
            (1 << 45, GIB),
        ];
        let mut start = 4 * GIB;
        for i in regions.len()..MAX_REGIONS {
            let size = if i < 400 { 128 * MIB } else { 256 * MIB };
            regions.push((start, size));
            start += size;
        }
        Self(regions)
    }

    /// How many.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// hostmem's map of them. The memory is never touched.
    ///
    /// # Errors
    ///
    /// No file to map, or the map is refused.
    pub fn hostmem(&self) -> Result<MemoryMap, Error> {
        let file = tempfile::tempfile()?;
        file.set_len(self.0.iter().map(|(_, size)| *size).max().unwrap_or(0))?;
        let mut frontend_addr = 0x1000_0000_0000;
        let regions = self
            .0
            .iter()
            .map(|&(start, size)| {
                frontend_addr += size;
                Ok(RegionConfig {
                    guest_addr: GuestAddress(start),
                    size,
                    frontend_addr: frontend_addr - size,
                    file: file.try_clone()?,
                    // Over one another in the file: only addresses matter here.
                    mmap_offset: 0,
                })
            })
            .collect::<Result<_, Error>>()?;
        Ok(MemoryMap::new(regions)?)
    }

    /// vm-memory's map of them.
    ///
    /// # Errors
    ///
    /// The map is refused.
    pub fn vm_memory(&self) -> Result<GuestMemoryMmap, Error> {
        let mut ranges = self
            .0
            .iter()
            .map(|&(start, size)| Ok((GuestAddress(start), usize::try_from(size)?)))
            .collect::<Result<Vec<_>, Error>>()?;
        ranges.sort_unstable();
        Ok(GuestMemoryMmap::from_ranges(&ranges)?)
    }

    /// The `page`th page: of the first region its first page, then of the second, and so on until the
    /// largest has had all.
    fn page(&self, region: u64, page: u64) -> Result<GuestAddress, Error> {
        let (start, size) = self.0[usize::try_from(region)?];
        Ok(GuestAddress(start + page % (size / PAGE) * PAGE))
    }
}

/// In which order addresses come.
#[derive(Clone, Copy, Debug)]
pub enum Order {
    /// Page by page through all regions, 32 pages of each.
    Sequential,
    /// Any page of any region.
    Random,
    /// Any page, then the seven after it: a request's buffers.
    Runs8,
}

impl Order {
    /// The addresses, the same in each run.
    ///
    /// # Errors
    ///
    /// None on a host of 64 bits.
    pub fn addresses(self, regions: &Regions) -> Result<Vec<GuestAddress>, Error> {
        const RUN: u64 = 8;
        const IN_SEQUENCE: u64 = 32;
        let count = regions.count() as u64;
        let mut random = Random::new(42);
        let (mut region, mut page) = (0, 0);
        (0..ADDRESSES)
            .map(|i| {
                match self {
                    Self::Sequential => (region, page) = (i / IN_SEQUENCE % count, i % IN_SEQUENCE),
                    Self::Random => {
                        (region, page) = (random.below(count), random.below(1 << 20));
                    }
                    // A multiple of eight pages, so that a run stays in its region.
                    Self::Runs8 if i % RUN == 0 => {
                        (region, page) = (random.below(count), random.below(1 << 17) * RUN);
                    }
                    Self::Runs8 => page += 1,
                }
                regions.page(region, page)
            })
            .collect()
    }
}

/// Looks none of `addresses` up: what [`look_up`] costs beside the lookups.
#[inline]
pub fn look_at(addresses: &[GuestAddress]) -> u64 {
    let mut sum = 0u64;
    for &address in addresses {
        let address = black_box(address);
        black_box(&address);
        sum = sum.wrapping_add(address.0);
    }
    sum
}

/// Looks all of `addresses` up. Returns the sum of the offsets into the regions, so that no lookup can
/// be left out.
#[inline]
pub fn look_up<M: GuestMemoryBackend>(map: &M, addresses: &[GuestAddress]) -> u64 {
    let mut sum = 0u64;
    for &address in addresses {
        if let Some((region, offset)) = map.to_region_addr(black_box(address)) {
            black_box(region);
            sum = sum.wrapping_add(offset.0);
        }
    }
    sum
}
