//! Memory maps made from one another, compared with lists that are scanned from end to end.
//!
//! The files behind the regions hold a pattern, so each translation is checked by what it leads
//! to; and what is written through a map is compared with the whole of each file, so that a byte
//! beside a region is seen. No descriptor may be left open.

mod files;
mod input;
mod model;

use std::cell::RefCell;

use hostmem::{MapError, MemoryMap, RegionConfig};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use self::files::Files;
pub use self::input::Input;
use self::input::{Kind, Op, Region, Wrong};

/// Maps alive at a time: old ones must stay as they were.
const MAPS_MAX: usize = 8;

thread_local! {
    static FILES: RefCell<Files> = RefCell::new(Files::new());
}

/// Runs one input; panics where map and model differ.
pub fn run(input: Input) {
    FILES.with_borrow_mut(|files| {
        files.reset();
        let lowest_free = files.lowest_free();
        let mut world = World {
            files,
            maps: Vec::new(),
        };
        for op in input.ops {
            world.step(op);
        }
        let World { files, maps } = world;
        files.compare();
        drop(maps);
        assert_eq!(
            files.lowest_free(),
            lowest_free,
            "a descriptor was left open"
        );
    });
}

struct World<'a> {
    files: &'a mut Files,
    /// Newest first.
    maps: Vec<(MemoryMap, Vec<Region>)>,
}

fn addr(at: u64) -> GuestAddress {
    GuestAddress(at)
}

impl World<'_> {
    fn config(&self, region: &Region) -> RegionConfig {
        RegionConfig {
            guest_addr: addr(region.guest),
            size: region.size,
            frontend_addr: region.frontend,
            file: self.files.give(region.file),
            mmap_offset: region.offset,
        }
    }

    fn pick(&self, map: u8) -> Option<&(MemoryMap, Vec<Region>)> {
        self.maps.get(usize::from(map) % self.maps.len().max(1))
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::New(regions) => self.new_map(regions),
            Op::NewMany(count) => {
                // Every other one out of order, with a hole after every third.
                let region = |index: u64| Region {
                    guest: 0x1000 * ((index ^ 1) + index / 3),
                    size: 0x1000,
                    frontend: 0x1000 * (1000 - index),
                    file: Kind::Large,
                    offset: 0x1000 * (index % 8),
                };
                self.new_map((0..u64::from(count)).map(region).collect());
            }
            Op::With { map, region } => {
                let Some((map, old)) = self.pick(map) else {
                    return;
                };
                let result = map.with_region(self.config(&region));
                let new = old.iter().copied().chain([region]).collect();
                let rules = model::broken_rules(old, &[region]);
                self.judge(result, new, &rules);
            }
            Op::Without { map, which, wrong } => self.without(map, which, wrong),
            Op::Guest { map, at, len } => {
                if let Some((map, regions)) = self.pick(map) {
                    self.guest_range(map, regions, at, len);
                }
            }
            Op::Frontend { map, at, len } => {
                let Some((map, regions)) = self.pick(map) else {
                    return;
                };
                let expected = model::frontend_range(regions, at, len.max(1)).map(addr);
                assert_eq!(map.frontend_range_to_guest(at, len), expected);
                let expected = model::frontend_range(regions, at, 1).map(addr);
                assert_eq!(map.frontend_to_guest(at), expected);
            }
            Op::Write { map, at, len } => self.write(map, at, len),
            Op::Drop { map } => {
                if !self.maps.is_empty() {
                    self.maps.remove(usize::from(map) % self.maps.len());
                }
            }
        }
    }

    fn new_map(&mut self, regions: Vec<Region>) {
        let configs = regions.iter().map(|region| self.config(region)).collect();
        let rules = model::broken_rules(&[], &regions);
        self.judge(MemoryMap::new(configs), regions, &rules);
    }

    /// A map is made if no rule is broken; if not, the error names one that is.
    fn judge(
        &mut self,
        result: Result<MemoryMap, MapError>,
        mut regions: Vec<Region>,
        rules: &std::collections::BTreeSet<model::Rule>,
    ) {
        match result {
            Ok(map) => {
                assert!(rules.is_empty(), "accepted in spite of {rules:?}");
                regions.sort_by_key(|region| region.guest);
                check_whole(&map, &regions);
                self.maps.insert(0, (map, regions));
                self.maps.truncate(MAPS_MAX);
            }
            Err(error) => {
                assert!(
                    rules.contains(&model::rule(&error)),
                    "{error:?} is none of {rules:?}"
                );
            }
        }
    }

    fn without(&mut self, map: u8, which: u8, wrong: Option<Wrong>) {
        let Some((map, old)) = self.pick(map) else {
            return;
        };
        let mut meant = match old.get(usize::from(which) % old.len().max(1)) {
            Some(region) => *region,
            None => return,
        };
        match wrong {
            Some(Wrong::Guest) => meant.guest ^= 0x1000,
            Some(Wrong::Size) => meant.size ^= 1,
            Some(Wrong::Frontend) => meant.frontend ^= 0x1000,
            None => {}
        }
        let names = |region: &Region| (region.guest, region.size, region.frontend);
        let rest: Vec<_> = old
            .iter()
            .copied()
            .filter(|region| names(region) != names(&meant))
            .collect();
        let result = map.without_region(addr(meant.guest), meant.size, meant.frontend);
        if rest.len() == old.len() {
            assert!(matches!(result, Err(MapError::UnknownRegion { .. })));
        } else {
            assert_eq!(rest.len() + 1, old.len());
            self.judge(result, rest, &Default::default());
        }
    }

    fn guest_range(&self, map: &MemoryMap, regions: &[Region], at: u64, len: u64) {
        let found = map.to_region_addr(addr(at)).map(|(region, offset)| {
            assert_eq!(
                map.find_region(addr(at)).map(|r| r.guest_addr()),
                Some(region.guest_addr())
            );
            (region.guest_addr().0, offset.0)
        });
        let expected = model::find(regions, at).map(|(region, offset)| (region.guest, offset));
        assert_eq!(found, expected);
        assert_eq!(map.find_region(addr(at)).is_some(), expected.is_some());

        let (pieces, whole) = model::pieces(regions, at, len);
        let count = usize::try_from(len).expect("64 bits");
        assert_eq!(GuestMemoryBackend::check_range(map, addr(at), count), whole);
        let in_one = match pieces.as_slice() {
            [] => len == 0 && expected.is_some(),
            [_] => whole,
            _ => false,
        };
        // Nothing at all is allowed where memory is.
        assert_eq!(map.get_slice(addr(at), count).is_ok(), in_one);

        let mut expected = pieces.iter();
        let mut slices = GuestMemoryBackend::get_slices(map, addr(at), count);
        for slice in &mut slices {
            let Some(&(region, offset, piece)) = expected.next() else {
                assert!(slice.is_err() && !whole, "a slice too many");
                break;
            };
            let slice = slice.expect("all of the piece is memory");
            assert_eq!(slice.len() as u64, piece);
            let start = usize::try_from(region.offset + offset).expect("within the file");
            // First bytes and the last.
            let mut bytes = [0; 33];
            let few = slice.len().min(32);
            slice.read_slice(&mut bytes[..few], 0).unwrap();
            slice.read_slice(&mut bytes[32..], slice.len() - 1).unwrap();
            let content = &self.files.content(region.file)[start..start + slice.len()];
            assert_eq!(bytes[..few], content[..few]);
            assert_eq!(bytes[32], content[slice.len() - 1]);
            let host = slice.ptr_guard().as_ptr().addr() as u64;
            assert_eq!(
                host % 16,
                (region.guest + offset) % 16,
                "the host is aligned otherwise"
            );
        }
        assert_eq!(expected.next(), None, "a slice too few");
    }

    fn write(&mut self, map: u8, at: u64, len: u16) {
        let Some((map, regions)) = self.pick(map) else {
            return;
        };
        let data: Vec<u8> = (0..=250).cycle().take(usize::from(len)).collect();
        let (pieces, _) = model::pieces(regions, at, u64::from(len));
        let written: u64 = pieces.iter().map(|&(_, _, piece)| piece).sum();
        match map.write(&data, addr(at)) {
            Ok(count) => assert_eq!(count as u64, written),
            Err(_) => assert!(written == 0 && len > 0),
        }
        let mut data = data.into_iter();
        let places: Vec<_> = pieces
            .iter()
            .flat_map(|&(region, offset, piece)| {
                let start = region.offset + offset;
                (start..start + piece).map(|place| (region.file, place))
            })
            .collect();
        for (file, place) in places {
            self.files
                .set(file, place, data.next().expect("as long as the pieces"));
        }
    }
}

impl PartialEq for Region {
    fn eq(&self, other: &Self) -> bool {
        (self.guest, self.size, self.frontend) == (other.guest, other.size, other.frontend)
    }
}

/// The list of regions, in order.
fn check_whole(map: &MemoryMap, regions: &[Region]) {
    assert_eq!(map.num_regions(), regions.len());
    assert_eq!(map.regions().len(), regions.len());
    for (found, expected) in map.regions().zip(regions) {
        assert_eq!(found.guest_addr(), addr(expected.guest));
        assert_eq!(found.start_addr(), addr(expected.guest));
        assert_eq!((found.size(), found.len()), (expected.size, expected.size));
        assert_eq!(found.frontend_addr(), expected.frontend);
        assert_eq!(
            found.file_offset().map(|file| file.start()),
            Some(expected.offset)
        );
    }
    let last = regions
        .last()
        .map_or(0, |region| region.guest + region.size - 1);
    assert_eq!(map.last_addr(), addr(last));
}
