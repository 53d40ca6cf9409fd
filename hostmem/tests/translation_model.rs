//! Where addresses and ranges lead, compared with a linear scan of plain numbers.

mod memfile;

use std::ops::Range;
use std::os::unix::fs::FileExt;

use hostmem::{MemoryMap, RegionConfig};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use memfile::MemFile;

const PAGE: u64 = 0x1000;

/// A region in the model: plain numbers.
#[derive(Clone, Debug)]
struct ModelRegion {
    guest: u64,
    frontend: u64,
    size: u64,
    offset: u64,
}

impl ModelRegion {
    fn guest_range(&self) -> Range<u64> {
        self.guest..self.guest + self.size
    }

    fn frontend_range(&self) -> Range<u64> {
        self.frontend..self.frontend + self.size
    }
}

/// Looks at every region for each byte.
#[derive(Clone, Debug)]
struct Model(Vec<ModelRegion>);

impl Model {
    fn region(&self, guest: u64) -> Option<usize> {
        self.0.iter().position(|r| r.guest_range().contains(&guest))
    }

    fn guest_of(&self, frontend: u64) -> Option<u64> {
        let region = self
            .0
            .iter()
            .find(|r| r.frontend_range().contains(&frontend))?;
        Some(frontend - region.frontend + region.guest)
    }

    fn offset_of(&self, guest: u64) -> Option<u64> {
        let region = &self.0[self.region(guest)?];
        Some(guest - region.guest + region.offset)
    }

    fn file_size(&self) -> u64 {
        self.0.iter().map(|r| r.offset + r.size).max().unwrap_or(0)
    }
}

/// The bytes of a range, up to the end of the address space; `None` beyond it.
fn bytes(addr: u64, len: usize) -> impl Iterator<Item = Option<u64>> {
    (0..len as u64).map(move |i| addr.checked_add(i))
}

fn content(offset: u64) -> u8 {
    // 251 is prime, so that equal distances do not look alike.
    u8::try_from(offset * 31 % 251).unwrap()
}

/// Lays ranges of `sizes` out from `base`, each after a gap, and returns where they start.
fn lay_out(base: u64, gaps_and_sizes: impl IntoIterator<Item = (u64, u64)>) -> Vec<u64> {
    let mut end = base;
    gaps_and_sizes
        .into_iter()
        .map(|(gap, size)| {
            let start = end + gap;
            end = start + size;
            start
        })
        .collect()
}

/// All numbers are multiples of this, as small as it may be: ranges of a few bytes then cross
/// several regions.
const UNIT: u64 = 16;

/// Low, or such that the last region can end right below the end of the address space.
fn base() -> impl Strategy<Value = u64> {
    prop_oneof![
        (0..3_u64).prop_map(|n| n * UNIT),
        Just(u64::MAX - UNIT + 1 - 40 * UNIT),
    ]
}

/// Up to eight regions of one to three units. Gaps are mostly none.
fn model() -> impl Strategy<Value = Model> {
    let gap = || prop_oneof![3 => Just(0), 1 => 1..3_u64];
    let regions = prop::collection::vec((1..3_u64, gap(), gap(), gap()), 0..8);
    let order = Just((0..8_usize).collect::<Vec<_>>());
    (
        regions,
        base(),
        base(),
        prop_oneof![2 => order.clone().boxed(), 1 => order.clone().prop_shuffle().boxed()],
        order.prop_shuffle(),
    )
        .prop_map(|(regions, guest, frontend, frontend_order, file_order)| {
            let n = regions.len();
            let within = |order: Vec<usize>| order.into_iter().filter(move |&i| i < n);
            let mut model: Vec<ModelRegion> = regions
                .iter()
                .map(|&(size, ..)| ModelRegion {
                    guest: 0,
                    frontend: 0,
                    size: size * UNIT,
                    offset: 0,
                })
                .collect();
            let starts = lay_out(guest, regions.iter().map(|r| (r.1 * UNIT, r.0 * UNIT)));
            for (region, start) in model.iter_mut().zip(starts) {
                region.guest = start;
            }
            let order: Vec<_> = within(frontend_order).collect();
            let starts = lay_out(
                frontend,
                order
                    .iter()
                    .map(|&i| (regions[i].2 * UNIT, regions[i].0 * UNIT)),
            );
            for (i, start) in order.into_iter().zip(starts) {
                model[i].frontend = start;
            }
            let order: Vec<_> = within(file_order).collect();
            let starts = lay_out(
                0,
                order
                    .iter()
                    .map(|&i| (regions[i].3 * UNIT, regions[i].0 * UNIT)),
            );
            for (&i, start) in order.iter().zip(starts) {
                model[i].offset = start;
            }
            // In any order: that of the file will do.
            Model(order.into_iter().map(|i| model[i].clone()).collect())
        })
}

/// Where regions may be, and everywhere else.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0..45 * UNIT,
        4 => u64::MAX - 45 * UNIT..=u64::MAX,
        1 => any::<u64>(),
    ]
}

fn build(model: &Model) -> (MemFile, MemoryMap) {
    let file = MemFile::new("hm-model", model.file_size());
    let bytes: Vec<u8> = (0..model.file_size()).map(content).collect();
    file.file().write_all_at(&bytes, 0).unwrap();
    let regions: Vec<RegionConfig> = model
        .0
        .iter()
        .map(|r| file.region(r.guest, r.size, r.frontend, r.offset))
        .collect();
    let map = MemoryMap::new(regions).unwrap();
    (file, map)
}

proptest! {
    #[test]
    fn guest_addresses_lead_where_a_linear_scan_finds_them(
        model in model(),
        addrs in prop::collection::vec(address(), 1..64),
    ) {
        let (_file, map) = build(&model);
        for addr in addrs {
            let region = model.region(addr).map(|i| &model.0[i]);
            prop_assert_eq!(
                map.find_region(GuestAddress(addr)).map(|r| r.guest_addr().0),
                region.map(|r| r.guest)
            );
            prop_assert_eq!(
                map.to_region_addr(GuestAddress(addr)).map(|(_, offset)| offset.0),
                region.map(|r| addr - r.guest)
            );
            prop_assert_eq!(
                map.read_obj::<u8>(GuestAddress(addr)).ok(),
                model.offset_of(addr).map(content)
            );
        }
    }

    #[test]
    fn frontend_ranges_lead_where_a_linear_scan_finds_them(
        model in model(),
        ranges in prop::collection::vec((address(), 0..100_usize), 1..64),
    ) {
        let (_file, map) = build(&model);
        for (addr, len) in ranges {
            let first = model.guest_of(addr);
            prop_assert_eq!(map.frontend_to_guest(addr), first.map(GuestAddress));
            let contiguous = bytes(addr, len).enumerate().all(|(i, byte)| {
                let expected = first.and_then(|first| first.checked_add(i as u64));
                byte.and_then(|byte| model.guest_of(byte)) == expected
            });
            prop_assert_eq!(
                map.frontend_range_to_guest(addr, len as u64),
                first.filter(|_| contiguous).map(GuestAddress)
            );
        }
    }

    #[test]
    fn guest_ranges_are_split_where_a_linear_scan_changes_region(
        model in model(),
        ranges in prop::collection::vec((address(), 0..100_usize), 1..64),
    ) {
        let (_file, map) = build(&model);
        for (addr, len) in ranges {
            let guest = GuestAddress(addr);
            // Per byte of the range: the region it is in.
            let regions: Vec<Option<usize>> = bytes(addr, len)
                .map(|byte| byte.and_then(|byte| model.region(byte)))
                .collect();
            let mapped = regions.iter().take_while(|region| region.is_some()).count();
            let pieces: Vec<usize> = regions[..mapped]
                .chunk_by(|a, b| a == b)
                .map(<[_]>::len)
                .collect();

            prop_assert_eq!(map.check_range(guest, len), mapped == len);
            let slices: Vec<_> = map.get_slices(guest, len).collect();
            prop_assert_eq!(slices.iter().any(|s| s.is_err()), mapped < len);
            let found: Vec<_> = slices.into_iter().filter_map(Result::ok).collect();
            prop_assert_eq!(found.iter().map(|s| s.len()).collect::<Vec<_>>(), pieces.clone());
            if len > 0 {
                let whole = mapped == len && pieces.len() == 1;
                prop_assert_eq!(map.get_slice(guest, len).is_ok(), whole);
            }

            let mut read = Vec::new();
            for slice in found {
                let mut piece = vec![0; slice.len()];
                slice.copy_to(&mut piece);
                read.extend(piece);
            }
            let expected: Vec<u8> = bytes(addr, mapped)
                .map(|byte| content(model.offset_of(byte.unwrap()).unwrap()))
                .collect();
            prop_assert_eq!(read, expected);
        }
    }

    /// Regions one by one, in any order, make the same map as all at once.
    #[test]
    fn adding_and_removing_regions_agrees_with_the_whole_table(model in model()) {
        let (file, whole) = build(&model);
        let mut map = MemoryMap::empty();
        for r in &model.0 {
            map = map.with_region(file.region(r.guest, r.size, r.frontend, r.offset)).unwrap();
        }
        let layout = |map: &MemoryMap| -> Vec<_> {
            map.regions().map(|r| (r.guest_addr().0, r.size(), r.frontend_addr())).collect()
        };
        prop_assert_eq!(layout(&map), layout(&whole));
        prop_assert_eq!(map.last_addr(), whole.last_addr());
        for (i, r) in model.0.iter().enumerate() {
            map = map.without_region(GuestAddress(r.guest), r.size, r.frontend).unwrap();
            prop_assert_eq!(map.num_regions(), model.0.len() - 1 - i);
            prop_assert_eq!(map.frontend_to_guest(r.frontend), None);
            prop_assert!(map.find_region(GuestAddress(r.guest)).is_none());
        }
    }

    /// Any description at all is answered, and one that is accepted can be used in full.
    #[test]
    fn any_description_is_refused_or_usable_to_its_last_byte(
        numbers in prop::collection::vec(description(), 0..3),
    ) {
        let file = MemFile::new("hm-any", PAGE);
        let regions = numbers
            .iter()
            .map(|&(guest, size, frontend, offset)| file.region(guest, size, frontend, offset))
            .collect();
        let Ok(map) = MemoryMap::new(regions) else {
            prop_assert_eq!(file.other_descriptors(), 0);
            prop_assert_eq!(file.mapped_bytes(), 0);
            return Ok(());
        };
        prop_assert_eq!(map.num_regions(), numbers.len());
        for (guest, size, frontend, offset) in numbers {
            let last = guest + (size - 1);
            let value = u8::try_from(last % 255).unwrap() + 1;
            map.write_obj(value, GuestAddress(last)).unwrap();
            let mut byte = [0];
            file.file().read_exact_at(&mut byte, offset + (size - 1)).unwrap();
            prop_assert_eq!(byte, [value]);
            prop_assert!(map.frontend_range_to_guest(frontend, size) == Some(GuestAddress(guest)));
        }
    }
}

/// `(guest address, size, front-end address, file offset)`: mostly valid for a file of one page,
/// or one number away from it.
fn description() -> impl Strategy<Value = (u64, u64, u64, u64)> {
    let size = prop_oneof![8 => 1..200_u64, 1 => Just(0), 1 => any::<u64>()];
    let offset = prop_oneof![8 => 0..PAGE / UNIT - 13, 1 => PAGE / UNIT - 13..PAGE / UNIT + 1];
    let odd_offset = prop_oneof![9 => Just(None), 1 => any::<u64>().prop_map(Some)];
    (address(), size, address(), offset, odd_offset).prop_map(
        |(guest, size, frontend, offset, odd_offset)| {
            // Aligned like the guest address.
            let offset = odd_offset.unwrap_or(offset * UNIT + guest % UNIT);
            (guest, size, frontend, offset)
        },
    )
}
