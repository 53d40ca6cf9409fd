//! Every description of memory that must be refused, and that refusing it leaves nothing behind.

mod memfile;

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;

use hostmem::{HOST_ALIGNMENT, MAX_REGIONS, MapError, MemoryMap, RegionConfig};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use memfile::MemFile;

const PAGE: u64 = 0x1000;
/// Where the front-end has the guest's address 0.
const FRONTEND: u64 = 0x7f00_0000_0000;

fn region_of(file: File) -> RegionConfig {
    RegionConfig {
        guest_addr: GuestAddress(0),
        size: PAGE,
        frontend_addr: FRONTEND,
        file,
        mmap_offset: 0,
    }
}

fn refusal(file: File) -> MapError {
    MemoryMap::new(vec![region_of(file)]).unwrap_err()
}

#[test]
fn m1_no_regions_make_an_empty_map() {
    for map in [MemoryMap::new(Vec::new()).unwrap(), MemoryMap::empty()] {
        assert_eq!(map.num_regions(), 0);
        assert_eq!(map.regions().len(), 0);
        assert_eq!(map.last_addr(), GuestAddress(0));
        for addr in [0, 1, u64::MAX] {
            assert!(map.find_region(GuestAddress(addr)).is_none());
            assert!(!map.check_range(GuestAddress(addr), 1));
            assert!(map.get_slice(GuestAddress(addr), 0).is_err());
            assert!(map.read_obj::<u8>(GuestAddress(addr)).is_err());
            assert_eq!(map.frontend_to_guest(addr), None);
            assert_eq!(map.frontend_range_to_guest(addr, 0), None);
        }
    }
}

#[test]
fn m1_empty_map_takes_a_region() {
    let file = MemFile::new("hm-m1", PAGE);
    let map = MemoryMap::empty()
        .with_region(file.region(0, PAGE, FRONTEND, 0))
        .unwrap();
    assert!(map.check_range(GuestAddress(0), 0x1000));
}

// One test, as there are not descriptors for two of this kind at a time.
#[test]
fn m2_one_region_too_many_is_refused_and_the_limit_itself_is_not() {
    let file = MemFile::new("hm-m2", PAGE);
    let region = |n: usize| {
        let addr = n as u64 * PAGE;
        file.region(addr, PAGE, FRONTEND + addr, 0)
    };

    let too_many = MemoryMap::new((0..=MAX_REGIONS).map(region).collect());
    assert!(matches!(
        too_many,
        Err(MapError::TooManyRegions { count }) if count == MAX_REGIONS + 1
    ));
    assert_eq!(file.mapped_bytes(), 0);
    assert_eq!(file.other_descriptors(), 0);

    let full = MemoryMap::new((0..MAX_REGIONS).map(region).collect()).unwrap();
    assert_eq!(full.num_regions(), MAX_REGIONS);
    assert!(full.check_range(GuestAddress(0), MAX_REGIONS * 0x1000));
    assert!(!full.check_range(GuestAddress(0), MAX_REGIONS * 0x1000 + 1));

    // m15: past the slots.
    assert!(matches!(
        full.with_region(region(MAX_REGIONS)),
        Err(MapError::TooManyRegions { count }) if count == MAX_REGIONS + 1
    ));
    assert_eq!(file.other_descriptors(), MAX_REGIONS);
}

#[test]
fn m3_size_zero_is_refused() {
    let file = MemFile::new("hm-m3", PAGE);
    let regions = vec![
        file.region(0, PAGE, FRONTEND, 0),
        file.region(PAGE, 0, FRONTEND + PAGE, 0),
    ];
    assert!(matches!(
        MemoryMap::new(regions),
        Err(MapError::ZeroSize { index: 1, guest_addr }) if guest_addr == GuestAddress(PAGE)
    ));
}

/// `(start, size)` of ranges that overlap `[4 pages, 8 pages)` in every way there is.
const OVERLAPS: [(u64, u64); 6] = [
    (4 * PAGE, 4 * PAGE),
    (3 * PAGE, PAGE + 16),
    (8 * PAGE - 16, PAGE),
    (5 * PAGE, PAGE),
    (2 * PAGE, 8 * PAGE),
    (4 * PAGE, 16),
];

#[test]
fn m4_overlap_of_guest_addresses_is_refused() {
    let file = MemFile::new("hm-m4g", 8 * PAGE);
    for (addr, size) in OVERLAPS {
        let first = || file.region(4 * PAGE, 4 * PAGE, FRONTEND, 0);
        let second = || file.region(addr, size, 2 * FRONTEND, 0);
        for regions in [vec![first(), second()], vec![second(), first()]] {
            let error = MemoryMap::new(regions).unwrap_err();
            assert!(
                matches!(error, MapError::GuestOverlap { index: 1, .. }),
                "{error}"
            );
        }
    }
    assert_eq!(file.mapped_bytes(), 0);
}

#[test]
fn m4_overlap_of_frontend_addresses_is_refused() {
    let file = MemFile::new("hm-m4u", 8 * PAGE);
    for (addr, size) in OVERLAPS {
        let first = || file.region(0, 4 * PAGE, 4 * PAGE, 0);
        let second = || file.region(FRONTEND, size, addr, 0);
        for regions in [vec![first(), second()], vec![second(), first()]] {
            let error = MemoryMap::new(regions).unwrap_err();
            assert!(
                matches!(error, MapError::FrontendOverlap { index: 1, .. }),
                "{error}"
            );
        }
    }
}

#[test]
fn m4_neighbours_do_not_overlap() {
    let file = MemFile::new("hm-m4n", PAGE);
    // Neighbours of [4 pages, 8 pages) on both sides, in both address spaces.
    let map = MemoryMap::new(vec![
        file.region(4 * PAGE, PAGE, 4 * PAGE, 0),
        file.region(3 * PAGE, PAGE, 5 * PAGE, 0),
        file.region(5 * PAGE, PAGE, 3 * PAGE, 0),
    ])
    .unwrap();
    assert!(map.check_range(GuestAddress(3 * PAGE), 3 * 0x1000));
}

#[test]
fn m5_sums_that_do_not_fit_64_bits_are_refused() {
    let file = MemFile::new("hm-m5", PAGE);
    let top = u64::MAX - PAGE + 1;
    let cases = [
        ("guest_addr", file.region(top, PAGE, FRONTEND, 0)),
        ("guest_addr", file.region(u64::MAX - 15, PAGE, FRONTEND, 0)),
        ("guest_addr", file.region(16, u64::MAX - 8, FRONTEND, 0)),
        ("frontend_addr", file.region(0, PAGE, top, 0)),
        ("frontend_addr", file.region(0, PAGE, u64::MAX, 0)),
        ("mmap_offset", file.region(0, PAGE, FRONTEND, top)),
        ("mmap_offset", file.region(0, PAGE, FRONTEND, u64::MAX - 15)),
    ];
    for (expected, region) in cases {
        let error = MemoryMap::new(vec![region]).unwrap_err();
        assert!(
            matches!(error, MapError::AddressOverflow { field, .. } if field == expected),
            "{error}"
        );
    }
}

#[test]
fn m5_region_right_below_the_end_of_the_address_space_is_accepted() {
    let file = MemFile::new("hm-m5e", PAGE);
    let start = u64::MAX - 15 - PAGE;
    let map = MemoryMap::new(vec![file.region(start, PAGE, start, 0)]).unwrap();
    assert!(map.check_range(GuestAddress(start), 0x1000));
    assert!(!map.check_range(GuestAddress(start), 0x1001));
    assert!(!map.check_range(GuestAddress(start + 1), usize::MAX));
    assert_eq!(
        map.frontend_to_guest(start + PAGE - 1),
        Some(GuestAddress(start + PAGE - 1))
    );
    assert_eq!(map.frontend_range_to_guest(start + 1, u64::MAX), None);
}

#[test]
fn m6_offset_not_aligned_like_the_guest_address_is_refused() {
    let file = MemFile::new("hm-m6", 2 * PAGE);
    for shift in 1..HOST_ALIGNMENT {
        assert!(matches!(
            MemoryMap::new(vec![file.region(0, PAGE, FRONTEND, shift)]),
            Err(MapError::OffsetAlignment { mmap_offset, .. }) if mmap_offset == shift
        ));
        let alike = file.region(shift, PAGE, FRONTEND, shift);
        assert!(MemoryMap::new(vec![alike]).is_ok());
    }
}

#[test]
fn m7_absurd_size_is_refused_and_earlier_regions_are_unmapped() {
    let small = MemFile::new("hm-m7s", PAGE);
    // Sparse: the file system accepts it, the address space does not.
    let huge = MemFile::new("hm-m7h", 1 << 62);
    let regions = vec![
        small.region(0, PAGE, 0, 0),
        huge.region(1 << 62, 1 << 62, 1 << 62, 0),
    ];
    let error = MemoryMap::new(regions).unwrap_err();
    assert!(
        matches!(&error, MapError::Mmap { index: 1, source, .. }
            if source.raw_os_error() == Some(libc::ENOMEM)),
        "{error}"
    );
    for file in [small, huge] {
        assert_eq!(file.mapped_bytes(), 0);
        assert_eq!(file.other_descriptors(), 0);
    }
}

#[test]
fn m7_size_of_2_to_the_63_is_refused() {
    let file = MemFile::new("hm-m7x", (1 << 63) - PAGE);
    for size in [1 << 63, u64::MAX - PAGE, (1 << 63) - PAGE] {
        assert!(MemoryMap::new(vec![file.region(0, size, 0, 0)]).is_err());
    }
}

#[test]
fn m8_region_past_the_end_of_its_file_is_refused() {
    let file = MemFile::new("hm-m8", 2 * PAGE);
    for (offset, size) in [
        (0, 2 * PAGE + 1),
        (PAGE, PAGE + 1),
        (2 * PAGE, 1),
        (64 * PAGE, PAGE),
        (16, 2 * PAGE - 15),
    ] {
        let error = MemoryMap::new(vec![file.region(0, size, FRONTEND, offset)]).unwrap_err();
        assert!(
            matches!(error, MapError::FileTooShort { file_size, .. } if file_size == 2 * PAGE),
            "{error}"
        );
    }
    for (offset, size) in [(0, 2 * PAGE), (PAGE, PAGE), (16, 2 * PAGE - 16)] {
        assert!(MemoryMap::new(vec![file.region(0, size, FRONTEND, offset)]).is_ok());
    }
}

#[test]
fn m8_empty_file_is_refused() {
    let file = MemFile::new("hm-m8e", 0);
    let error = MemoryMap::new(vec![file.region(0, 1, FRONTEND, 0)]).unwrap_err();
    assert!(matches!(error, MapError::FileTooShort { file_size: 0, .. }));
}

#[test]
fn m9_read_only_and_write_only_files_are_refused() {
    let path = tempfile::NamedTempFile::new().unwrap();
    path.as_file().set_len(PAGE).unwrap();
    let read_only = File::open(&path).unwrap();
    let write_only = OpenOptions::new().write(true).open(&path).unwrap();
    for file in [read_only, write_only] {
        assert!(matches!(refusal(file), MapError::FileAccess { .. }));
    }
    let read_write = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    assert!(MemoryMap::new(vec![region_of(read_write)]).is_ok());
}

#[test]
fn m9_o_path_descriptor_is_refused() {
    let path = tempfile::NamedTempFile::new().unwrap();
    path.as_file().set_len(PAGE).unwrap();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_PATH)
        .open(&path)
        .unwrap();
    assert!(matches!(refusal(file), MapError::FileAccess { .. }));
}

#[test]
fn m9_directory_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let error = refusal(File::open(directory.path()).unwrap());
    assert!(matches!(error, MapError::FileType { mode, .. }
        if mode & libc::S_IFMT == libc::S_IFDIR));
}

#[test]
fn m9_devices_pipes_and_sockets_are_refused() {
    let device = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/zero")
        .unwrap();
    let (reader, _writer) = std::io::pipe().unwrap();
    let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
    for file in [
        device,
        File::from(OwnedFd::from(reader)),
        File::from(OwnedFd::from(socket)),
    ] {
        assert!(matches!(refusal(file), MapError::FileType { .. }));
    }
}

#[test]
fn m9_file_sealed_against_writing_is_refused() {
    let file = MemFile::new("hm-m9", PAGE);
    fcntl(file.file(), FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)).unwrap();
    let error = MemoryMap::new(vec![file.region(0, PAGE, FRONTEND, 0)]).unwrap_err();
    assert!(
        matches!(&error, MapError::Mmap { source, .. }
            if source.raw_os_error() == Some(libc::EPERM)),
        "{error}"
    );
}

#[test]
fn m12_new_table_that_fails_half_way_leaves_the_old_one_in_force() {
    let old_file = MemFile::new("hm-m12o", 2 * PAGE);
    let old = MemoryMap::new(vec![old_file.region(0, 2 * PAGE, FRONTEND, 0)]).unwrap();
    old.write_obj(0x5eed_u32, GuestAddress(PAGE)).unwrap();

    let good = MemFile::new("hm-m12g", PAGE);
    let short = MemFile::new("hm-m12s", PAGE);
    let regions = vec![
        good.region(0, PAGE, FRONTEND, 0),
        old_file.region(PAGE, PAGE, FRONTEND + PAGE, 0),
        short.region(2 * PAGE, 2 * PAGE, FRONTEND + 2 * PAGE, 0),
    ];
    let error = MemoryMap::new(regions).unwrap_err();
    assert!(
        matches!(error, MapError::FileTooShort { index: 2, .. }),
        "{error}"
    );

    for file in [&good, &short] {
        assert_eq!(file.mapped_bytes(), 0);
        assert_eq!(file.other_descriptors(), 0);
    }
    assert_eq!(old_file.mapped_bytes(), 2 * PAGE);
    assert_eq!(old_file.other_descriptors(), 1);
    assert_eq!(old.read_obj::<u32>(GuestAddress(PAGE)).unwrap(), 0x5eed);
}

#[test]
fn m14_region_is_removed_only_if_guest_address_size_and_frontend_address_match() {
    let file = MemFile::new("hm-m14", 4 * PAGE);
    let map = MemoryMap::new(vec![
        file.region(0, PAGE, FRONTEND, 0),
        file.region(2 * PAGE, 2 * PAGE, FRONTEND + PAGE, PAGE),
    ])
    .unwrap();
    for (guest_addr, size, frontend_addr) in [
        (0, PAGE, 0),
        (0, PAGE, FRONTEND + PAGE),
        (0, 2 * PAGE, FRONTEND),
        (0, PAGE - 1, FRONTEND),
        (0, 0, FRONTEND),
        (PAGE, PAGE, FRONTEND),
        (2 * PAGE, PAGE, FRONTEND + PAGE),
        (2 * PAGE, 2 * PAGE, FRONTEND),
        (u64::MAX, u64::MAX, u64::MAX),
    ] {
        let error = map
            .without_region(GuestAddress(guest_addr), size, frontend_addr)
            .unwrap_err();
        assert!(matches!(error, MapError::UnknownRegion { .. }), "{error}");
    }

    let fewer = map.without_region(GuestAddress(0), PAGE, FRONTEND).unwrap();
    assert_eq!(fewer.num_regions(), 1);
    assert_eq!(fewer.frontend_to_guest(FRONTEND), None);
    assert!(!fewer.address_in_range(GuestAddress(0)));
    assert!(fewer.check_range(GuestAddress(2 * PAGE), 0x2000));
    // And once more: it is not there any longer.
    assert!(matches!(
        fewer.without_region(GuestAddress(0), PAGE, FRONTEND),
        Err(MapError::UnknownRegion { .. })
    ));
}

#[test]
fn m15_added_region_that_overlaps_is_refused() {
    let file = MemFile::new("hm-m15", 8 * PAGE);
    let map = MemoryMap::new(vec![file.region(4 * PAGE, 4 * PAGE, 4 * PAGE, 0)]).unwrap();
    for (addr, size) in OVERLAPS {
        assert!(matches!(
            map.with_region(file.region(addr, size, FRONTEND, 0)),
            Err(MapError::GuestOverlap { index: 0, other_guest_addr, .. })
                if other_guest_addr == GuestAddress(4 * PAGE)
        ));
        assert!(matches!(
            map.with_region(file.region(FRONTEND, size, addr, 0)),
            Err(MapError::FrontendOverlap { index: 0, other_frontend_addr, .. })
                if other_frontend_addr == 4 * PAGE
        ));
    }
    assert_eq!(file.mapped_bytes(), 4 * PAGE);
    assert_eq!(file.other_descriptors(), 1);
}

#[test]
fn m15_added_region_is_checked_like_any_other() {
    let file = MemFile::new("hm-m15c", PAGE);
    let map = MemoryMap::empty();
    assert!(matches!(
        map.with_region(file.region(0, 0, FRONTEND, 0)),
        Err(MapError::ZeroSize { .. })
    ));
    assert!(matches!(
        map.with_region(file.region(u64::MAX - 15, PAGE, FRONTEND, 0)),
        Err(MapError::AddressOverflow { .. })
    ));
    assert!(matches!(
        map.with_region(file.region(0, PAGE, FRONTEND, PAGE)),
        Err(MapError::FileTooShort { .. })
    ));
}

#[test]
fn m18_memory_of_this_process_is_refused() {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/proc/self/mem")
        .unwrap();
    assert!(matches!(
        refusal(file),
        MapError::FileTooShort { file_size: 0, .. }
    ));
}

/// The same pages of the same file, three times over, once shifted: what is written to one is read from
/// all, and nothing worse.
#[test]
fn m18_regions_may_be_the_same_memory() {
    let file = MemFile::new("hm-m18", 2 * PAGE);
    let map = MemoryMap::new(vec![
        file.region(0, 2 * PAGE, FRONTEND, 0),
        file.region(0x10_0000, 2 * PAGE, FRONTEND + 0x10_0000, 0),
        file.region(0x20_0000, PAGE, FRONTEND + 0x20_0000, PAGE),
    ])
    .unwrap();
    map.write_obj(0xfeed_u32, GuestAddress(0x20_0010)).unwrap();
    for addr in [PAGE + 0x10, 0x10_0000 + PAGE + 0x10] {
        assert_eq!(map.read_obj::<u32>(GuestAddress(addr)).unwrap(), 0xfeed);
    }
    // Out of one into the other.
    let from = map.get_slice(GuestAddress(0), 0x2000).unwrap();
    let to = map.get_slice(GuestAddress(0x10_0008), 0x1000).unwrap();
    from.subslice(0, 0x1000).unwrap().copy_to_volatile_slice(to);
    assert!(map.check_intact().is_ok());
}

#[test]
fn regions_given_in_any_order_make_the_same_map() {
    let file = MemFile::new("hm-unsorted", 8 * PAGE);
    let region = |i: u64| file.region(i * 3 * PAGE, PAGE, FRONTEND + (7 - i) * PAGE, i * PAGE);
    for order in [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]] {
        let map = MemoryMap::new(order.into_iter().map(region).collect()).unwrap();
        let starts: Vec<_> = map.regions().map(|r| r.guest_addr().0 / PAGE).collect();
        assert_eq!(starts, [0, 3, 6, 9]);
        for i in 0..4 {
            assert_eq!(
                map.frontend_to_guest(FRONTEND + (7 - i) * PAGE),
                Some(GuestAddress(i * 3 * PAGE))
            );
        }
    }
}
