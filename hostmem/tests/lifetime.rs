//! How long memory stays mapped, and what of a file is.

mod memfile;

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

use hostmem::MemoryMap;
use nix::sys::memfd::MFdFlags;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use memfile::MemFile;

const PAGE: u64 = 0x1000;
const FRONTEND: u64 = 0x7f00_0000_0000;
const HUGE_PAGE: u64 = 0x20_0000;

#[test]
fn dropped_map_is_unmapped_and_its_files_are_closed() {
    let file = MemFile::new("hm-drop", 4 * PAGE);
    let map = MemoryMap::new(vec![
        file.region(0, PAGE, FRONTEND, 0),
        file.region(PAGE, 2 * PAGE, FRONTEND + PAGE, 2 * PAGE),
    ])
    .unwrap();
    assert_eq!(file.mapped_bytes(), 3 * PAGE);
    assert_eq!(file.other_descriptors(), 2);
    drop(map);
    assert_eq!(file.mapped_bytes(), 0);
    assert_eq!(file.other_descriptors(), 0);
}

#[test]
fn maps_made_from_one_another_share_regions() {
    let (kept, added) = (
        MemFile::new("hm-share-k", PAGE),
        MemFile::new("hm-share-a", PAGE),
    );
    let first = MemoryMap::new(vec![kept.region(0, PAGE, FRONTEND, 0)]).unwrap();
    let second = first
        .with_region(added.region(PAGE, PAGE, FRONTEND + PAGE, 0))
        .unwrap();
    let third = second
        .without_region(GuestAddress(0), PAGE, FRONTEND)
        .unwrap();
    assert_eq!(kept.mapped_bytes(), PAGE);
    assert_eq!(added.mapped_bytes(), PAGE);
    assert_eq!(
        first.get_host_address(GuestAddress(0)).unwrap(),
        second.get_host_address(GuestAddress(0)).unwrap()
    );
    assert_eq!(
        [
            first.num_regions(),
            second.num_regions(),
            third.num_regions()
        ],
        [1, 2, 1]
    );

    drop(second);
    assert_eq!(kept.mapped_bytes(), PAGE);
    drop(first);
    assert_eq!(kept.mapped_bytes(), 0);
    assert_eq!(added.mapped_bytes(), PAGE);
    drop(third);
    assert_eq!(added.mapped_bytes(), 0);
}

#[test]
fn m13_replaced_map_serves_until_its_last_user_is_done() {
    let (old_file, new_file) = (MemFile::new("hm-m13o", PAGE), MemFile::new("hm-m13n", PAGE));
    let region = |file: &MemFile| vec![file.region(0, PAGE, FRONTEND, 0)];
    let mut current = Arc::new(MemoryMap::new(region(&old_file)).unwrap());

    let in_flight = Arc::clone(&current);
    let buffer = in_flight.get_slice(GuestAddress(0x10), 4).unwrap();
    current = Arc::new(MemoryMap::new(region(&new_file)).unwrap());
    buffer.write_obj(0xfeed_u32, 0).unwrap();

    let mut bytes = [0; 4];
    old_file.file().read_exact_at(&mut bytes, 0x10).unwrap();
    assert_eq!(u32::from_ne_bytes(bytes), 0xfeed);
    assert_eq!(current.read_obj::<u32>(GuestAddress(0x10)).unwrap(), 0);

    assert_eq!(old_file.mapped_bytes(), PAGE);
    drop(in_flight);
    assert_eq!(old_file.mapped_bytes(), 0);
}

/// Each generation of the map has its number in both of its regions, and lies elsewhere in the
/// front-end's address space. A user must see one generation, whole.
#[test]
fn m13_whole_table_is_replaced_while_threads_translate_and_hold_old_maps() {
    const GENERATIONS: u64 = 200;
    const HIGH: u64 = 0x1_0000_0000;

    let file = MemFile::new("hm-replace", (GENERATIONS + 1) * 2 * PAGE);
    let frontend = |generation: u64| FRONTEND + generation * 16 * PAGE;
    let generation_map = |generation: u64| {
        let (low, high) = (generation * 2 * PAGE, (generation * 2 + 1) * PAGE);
        for offset in [low, high] {
            file.file()
                .write_all_at(&generation.to_ne_bytes(), offset)
                .unwrap();
        }
        Arc::new(
            MemoryMap::new(vec![
                file.region(HIGH, PAGE, frontend(generation), high),
                file.region(0, PAGE, frontend(generation) + 8 * PAGE, low),
            ])
            .unwrap(),
        )
    };

    let current = RwLock::new(generation_map(0));
    let check = |map: &MemoryMap| {
        let generation: u64 = map.read_obj(GuestAddress(0)).unwrap();
        assert_eq!(map.read_obj::<u64>(GuestAddress(HIGH)).unwrap(), generation);
        assert_eq!(
            map.frontend_to_guest(frontend(generation)),
            Some(GuestAddress(HIGH))
        );
        assert_eq!(map.frontend_to_guest(frontend(generation + 1)), None);
        assert!(map.find_region(GuestAddress(PAGE)).is_none());
        generation
    };

    // How often each thread has looked.
    let looks = [const { AtomicU64::new(0) }; 3];
    let all_looks = || looks.each_ref().map(|looks| looks.load(Ordering::Relaxed));
    std::thread::scope(|scope| {
        let threads = looks.each_ref().map(|looks| {
            let (current, check) = (&current, &check);
            scope.spawn(move || {
                let mut held = Vec::new();
                loop {
                    let map = Arc::clone(&current.read().unwrap());
                    let generation = check(&map);
                    looks.fetch_add(1, Ordering::Relaxed);
                    held.push((generation, map));
                    if held.len() == 8 {
                        for (generation, map) in held.drain(..4) {
                            assert_eq!(check(&map), generation);
                        }
                    }
                    if generation == GENERATIONS {
                        return;
                    }
                }
            })
        });
        for generation in 1..=GENERATIONS {
            let map = generation_map(generation);
            let before = all_looks();
            *current.write().unwrap() = map;
            // Until every thread has looked again; one that is done early has failed.
            while generation < GENERATIONS
                && all_looks()
                    .iter()
                    .zip(before)
                    .any(|(now, then)| *now == then)
                && !threads.iter().any(|thread| thread.is_finished())
            {
                std::thread::yield_now();
            }
        }
    });

    assert_eq!(file.mapped_bytes(), 2 * PAGE);
    drop(current);
    assert_eq!(file.mapped_bytes(), 0);
}

#[test]
fn m6_unaligned_offset_is_mapped_from_the_page_it_is_in() {
    let file = MemFile::new("hm-m6", 4 * PAGE);
    let offset = PAGE + 0x230;
    let size = PAGE + 0x40;
    file.file().write_all_at(b"before", offset - 6).unwrap();
    file.file().write_all_at(b"first", offset).unwrap();
    file.file()
        .write_all_at(b"last", offset + size - 4)
        .unwrap();
    file.file().write_all_at(b"after", offset + size).unwrap();

    let map = MemoryMap::new(vec![file.region(0x5000, size, FRONTEND, offset)]).unwrap();
    assert_eq!(file.mapped_bytes(), 2 * PAGE);

    let mut first = [0; 5];
    map.read_slice(&mut first, GuestAddress(0x5000)).unwrap();
    assert_eq!(&first, b"first");
    let mut last = [0; 4];
    let last_addr = GuestAddress(0x5000 + size - 4);
    map.read_slice(&mut last, last_addr).unwrap();
    assert_eq!(&last, b"last");

    // What else the pages hold is out of reach: by guest address and through the region.
    for addr in [0x4FFF, 0x5000 + size] {
        assert!(map.find_region(GuestAddress(addr)).is_none());
        assert!(map.get_host_address(GuestAddress(addr)).is_err());
    }
    let region = map.find_region(GuestAddress(0x5000)).unwrap();
    assert_eq!(region.as_volatile_slice().unwrap().len() as u64, size);
    assert_eq!(region.file_offset().unwrap().start(), offset);
    for (start, count) in [
        (size, 1),
        (size - 4, 5),
        (u64::MAX, 1),
        (u64::MAX, usize::MAX),
    ] {
        assert!(region.get_slice(MemoryRegionAddress(start), count).is_err());
    }
    assert!(region.get_host_address(MemoryRegionAddress(size)).is_err());
    assert!(region.get_slice(MemoryRegionAddress(size), 0).is_ok());

    drop(map);
    assert_eq!(file.mapped_bytes(), 0);
}

#[test]
fn region_reports_what_it_was_made_from() {
    let file = MemFile::new("hm-accessors", 4 * PAGE);
    let map = MemoryMap::new(vec![file.region(0x8000, 2 * PAGE, FRONTEND, PAGE)]).unwrap();
    let region = map.regions().next().unwrap();
    assert_eq!(region.guest_addr(), GuestAddress(0x8000));
    assert_eq!(region.size(), 2 * PAGE);
    assert_eq!(region.frontend_addr(), FRONTEND);
    assert_eq!(region.last_addr(), GuestAddress(0x9FFF));
    assert_eq!(region.is_hugetlbfs(), Some(false));
}

// The mapping is made but not touched: the test takes no huge pages from the machine's pool,
// which may be empty.
#[test]
fn huge_pages_are_mapped_and_unmapped_whole() {
    let file = MemFile::with_flags(
        "hm-huge",
        4 * HUGE_PAGE,
        MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB,
    );
    let map = MemoryMap::new(vec![
        // As QEMU has it where the PCI hole does not start at a huge page's boundary.
        file.region(0, 0xC_0000, FRONTEND, 0),
        file.region(
            0x10_0000,
            HUGE_PAGE,
            FRONTEND + HUGE_PAGE,
            HUGE_PAGE + 0xC_0000,
        ),
    ])
    .unwrap();
    assert_eq!(file.mapped_bytes(), 3 * HUGE_PAGE);
    assert!(map.regions().all(|r| r.is_hugetlbfs() == Some(true)));

    let host = |addr| map.get_host_address(GuestAddress(addr)).unwrap().addr() as u64;
    assert_eq!(host(0) % HUGE_PAGE, 0);
    assert_eq!(host(0x10_0000) % HUGE_PAGE, 0xC_0000);

    drop(map);
    assert_eq!(file.mapped_bytes(), 0);
}

#[test]
fn m8_region_past_the_end_of_a_huge_page_file_is_refused() {
    let file = MemFile::with_flags(
        "hm-huge-m8",
        HUGE_PAGE,
        MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB,
    );
    for (offset, size) in [(0, HUGE_PAGE + 1), (PAGE, HUGE_PAGE), (HUGE_PAGE, PAGE)] {
        assert!(MemoryMap::new(vec![file.region(0, size, FRONTEND, offset)]).is_err());
    }
    assert_eq!(file.mapped_bytes(), 0);
}
