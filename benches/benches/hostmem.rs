//! Looking guest addresses up: hostmem's `MemoryMap` beside vm-memory's `GuestMemoryMmap`.

use std::hint::black_box;
use std::time::{Duration, Instant};

use benches::Error;
use benches::fixture::Random;
use benches::rounds::{Contender, Mode, compare};
use criterion::{Criterion, Throughput};
use hostmem::{MAX_REGIONS, MemoryMap, RegionConfig};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Bytes per region, and between the starts of two: the other half is a hole.
const REGION: u64 = 0x2_0000;
const STRIDE: u64 = 2 * REGION;

const REGIONS: [usize; 3] = [1, 8, MAX_REGIONS];

/// Addresses looked up in turn: 32 KiB of them, less than the first-level cache with the map's spans.
const ADDRESSES: u64 = 4096;

const PAGE: u64 = 4096;

#[derive(Clone, Copy, Debug)]
enum Order {
    /// Page by page through all regions.
    Sequential,
    /// Any page of any region.
    Random,
    /// Any page, then the seven after it: a request's buffers.
    Runs8,
}

impl Order {
    fn addresses(self, regions: u64) -> Vec<GuestAddress> {
        let pages = REGION / PAGE;
        let page = |page: u64| {
            let page = page % (regions * pages);
            GuestAddress(page / pages * STRIDE + page % pages * PAGE)
        };
        let mut random = Random::new(42);
        let mut start = 0;
        (0..ADDRESSES)
            .map(|i| match self {
                Self::Sequential => page(i),
                Self::Random => page(random.below(regions * pages)),
                Self::Runs8 => {
                    if i % 8 == 0 {
                        // A multiple of eight pages, so that a run stays in its region.
                        start = random.below(regions * pages / 8) * 8;
                    }
                    page(start + i % 8)
                }
            })
            .collect()
    }
}

/// The sum of the offsets into the regions, so that no lookup can be left out.
#[inline]
fn look_up<M: GuestMemoryBackend>(map: &M, addresses: &[GuestAddress]) -> u64 {
    let mut sum = 0u64;
    for &address in addresses {
        if let Some((region, offset)) = map.to_region_addr(black_box(address)) {
            black_box(region);
            sum = sum.wrapping_add(offset.0);
        }
    }
    sum
}

fn ours(regions: u64) -> Result<MemoryMap, Error> {
    let file = tempfile::tempfile()?;
    file.set_len(regions * REGION)?;
    let regions = (0..regions)
        .map(|i| {
            Ok(RegionConfig {
                guest_addr: GuestAddress(i * STRIDE),
                size: REGION,
                frontend_addr: 0x7f00_0000_0000 + i * REGION,
                file: file.try_clone()?,
                mmap_offset: i * REGION,
            })
        })
        .collect::<Result<_, Error>>()?;
    Ok(MemoryMap::new(regions)?)
}

fn peer(regions: u64) -> Result<GuestMemoryMmap, Error> {
    let ranges: Vec<_> = (0..regions)
        .map(|i| Ok((GuestAddress(i * STRIDE), usize::try_from(REGION)?)))
        .collect::<Result<_, Error>>()?;
    Ok(GuestMemoryMmap::from_ranges(&ranges)?)
}

fn timed<M: GuestMemoryBackend>(
    map: &M,
    addresses: &[GuestAddress],
    lookups: u64,
) -> Result<Duration, Error> {
    let expected = look_up(map, addresses);
    let start = Instant::now();
    for _ in 0..lookups.div_ceil(ADDRESSES) {
        if look_up(map, black_box(addresses)) != expected {
            return Err("two lookups differ".into());
        }
    }
    Ok(start.elapsed())
}

fn main() -> Result<(), Error> {
    let mode = Mode::from_args();
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args();
    for regions in REGIONS {
        let (ours, peer) = (ours(regions as u64)?, peer(regions as u64)?);
        for order in [Order::Sequential, Order::Random, Order::Runs8] {
            let addresses = order.addresses(regions as u64);
            if look_up(&ours, &addresses) != look_up(&peer, &addresses) {
                return Err("the two maps differ".into());
            }
            let name = format!("hostmem/regions-{regions}/{order:?}").to_lowercase();
            let mut group = criterion.benchmark_group(&name);
            group.throughput(Throughput::Elements(ADDRESSES));
            group.bench_function("hostmem", |b| b.iter(|| look_up(&ours, &addresses)));
            group.bench_function("GuestMemoryMmap", |b| b.iter(|| look_up(&peer, &addresses)));
            group.finish();

            let mut contenders = [
                Contender::new("hostmem", |n| timed(&ours, &addresses, n)),
                Contender::new("GuestMemoryMmap", |n| timed(&peer, &addresses, n)),
            ];
            let lookups = mode.pick(ADDRESSES * 100, ADDRESSES);
            compare(mode, &format!("{name}, lookups"), lookups, &mut contenders)?;
        }
    }
    criterion.final_summary();
    Ok(())
}
