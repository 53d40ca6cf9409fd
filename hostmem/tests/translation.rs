//! Where addresses and ranges lead: PCI holes, neighbours, hostile values. The comparison with a linear
//! scan is in `translation_model`.

#[expect(dead_code, reason = "nothing here looks at mappings and descriptors")]
mod memfile;

use std::os::unix::fs::FileExt;

use hostmem::MemoryMap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use memfile::MemFile;

const PAGE: u64 = 0x1000;
const FRONTEND: u64 = 0x7f00_0000_0000;

const LOW_SIZE: u64 = 0xC000_0000;
const HIGH: u64 = 0x1_0000_0000;
const HIGH_SIZE: u64 = 0x8000_0000;

/// As QEMU lays out an x86 guest: one file, contiguous for the front-end, a hole for the guest.
fn pci_hole(file: &MemFile) -> MemoryMap {
    MemoryMap::new(vec![
        file.region(HIGH, HIGH_SIZE, FRONTEND + LOW_SIZE, LOW_SIZE),
        file.region(0, LOW_SIZE, FRONTEND, 0),
    ])
    .unwrap()
}

fn slice_lengths(map: &MemoryMap, addr: u64, count: usize) -> Vec<usize> {
    map.get_slices(GuestAddress(addr), count)
        .map(|slice| slice.unwrap().len())
        .collect()
}

#[test]
fn pci_hole_is_no_memory() {
    let file = MemFile::new("hm-hole", LOW_SIZE + HIGH_SIZE);
    let map = pci_hole(&file);
    assert_eq!(map.last_addr(), GuestAddress(HIGH + HIGH_SIZE - 1));
    let starts: Vec<_> = map.regions().map(|r| r.guest_addr().0).collect();
    assert_eq!(starts, [0, HIGH]);

    for addr in [LOW_SIZE, 0xFEE0_0000, HIGH - 1, HIGH + HIGH_SIZE, u64::MAX] {
        assert!(map.find_region(GuestAddress(addr)).is_none(), "{addr:#x}");
        assert!(!map.check_range(GuestAddress(addr), 1));
    }
    // Up to the hole, into it, across it.
    assert!(map.check_range(GuestAddress(LOW_SIZE - 0x1000), 0x1000));
    assert!(!map.check_range(GuestAddress(LOW_SIZE - 0x1000), 0x1001));
    assert!(!map.check_range(GuestAddress(LOW_SIZE - 0x1000), 0x8000_0000));
    assert!(!map.check_range(GuestAddress(HIGH - 1), 2));

    map.write_obj(7_u8, GuestAddress(HIGH)).unwrap();
    let mut byte = [0];
    file.file().read_exact_at(&mut byte, LOW_SIZE).unwrap();
    assert_eq!(byte, [7]);
}

#[test]
fn pci_hole_splits_what_is_contiguous_for_the_frontend() {
    let file = MemFile::new("hm-hole-fe", LOW_SIZE + HIGH_SIZE);
    let map = pci_hole(&file);
    let end_of_low = FRONTEND + LOW_SIZE;
    assert_eq!(
        map.frontend_to_guest(end_of_low - 1),
        Some(GuestAddress(LOW_SIZE - 1))
    );
    assert_eq!(map.frontend_to_guest(end_of_low), Some(GuestAddress(HIGH)));
    assert_eq!(
        map.frontend_range_to_guest(end_of_low - PAGE, PAGE),
        Some(GuestAddress(LOW_SIZE - PAGE))
    );
    assert_eq!(
        map.frontend_range_to_guest(end_of_low - PAGE, PAGE + 1),
        None
    );
}

#[test]
fn frontend_range_may_cross_into_a_neighbour_of_both_address_spaces() {
    let file = MemFile::new("hm-fe-cross", 3 * PAGE);
    let map = MemoryMap::new(vec![
        file.region(0x2000, PAGE, FRONTEND + PAGE, 0),
        file.region(0x1000, PAGE, FRONTEND, 2 * PAGE),
        file.region(0x3000, PAGE, FRONTEND + 2 * PAGE, PAGE),
    ])
    .unwrap();
    assert_eq!(
        map.frontend_range_to_guest(FRONTEND + 8, 3 * PAGE - 8),
        Some(GuestAddress(0x1008))
    );
    assert_eq!(
        map.frontend_range_to_guest(FRONTEND + 8, 3 * PAGE - 7),
        None
    );
}

#[test]
fn r8_guest_address_where_a_frontend_address_is_due_is_not_found() {
    let file = MemFile::new("hm-r8", LOW_SIZE + HIGH_SIZE);
    let map = pci_hole(&file);
    for addr in [
        0,
        0x1000,
        HIGH,
        FRONTEND - 1,
        FRONTEND + LOW_SIZE + HIGH_SIZE,
    ] {
        assert_eq!(map.frontend_to_guest(addr), None);
    }
}

#[test]
fn d4_huge_lengths_are_refused() {
    let file = MemFile::new("hm-d4", LOW_SIZE + HIGH_SIZE);
    let map = pci_hole(&file);
    for len in [0xFFFF_FFFF, 1 << 63, usize::MAX] {
        for addr in [0, 1, HIGH, HIGH + HIGH_SIZE - 1] {
            assert!(!map.check_range(GuestAddress(addr), len));
            assert!(map.get_slice(GuestAddress(addr), len).is_err());
            // A piece, then the error, then the end.
            let mut slices = map.get_slices(GuestAddress(addr), len);
            assert!(slices.next().unwrap().is_ok());
            assert!(slices.next().unwrap().is_err());
            assert!(slices.next().is_none());
        }
    }
}

#[test]
fn d5_address_0_is_legal_if_mapped() {
    let file = MemFile::new("hm-d5", 2 * PAGE);
    let at_0 = MemoryMap::new(vec![file.region(0, PAGE, FRONTEND, 0)]).unwrap();
    assert!(at_0.check_range(GuestAddress(0), 1));
    at_0.write_obj(1_u64, GuestAddress(0)).unwrap();

    let not_at_0 = MemoryMap::new(vec![file.region(PAGE, PAGE, FRONTEND, 0)]).unwrap();
    assert!(!not_at_0.check_range(GuestAddress(0), 1));
    assert!(not_at_0.write_obj(1_u64, GuestAddress(0)).is_err());
}

#[test]
fn d6_range_that_wraps_is_refused() {
    let file = MemFile::new("hm-d6", 2 * PAGE);
    // Memory at both ends of the address space, so that wrapping would find some.
    let top = u64::MAX - 15 - PAGE;
    let map = MemoryMap::new(vec![
        file.region(0, PAGE, 0, 0),
        file.region(top, PAGE, top, 0),
    ])
    .unwrap();
    for len in [0x1000 + 16, 0x1000 + 17, 0x2000, usize::MAX] {
        assert!(!map.check_range(GuestAddress(top), len));
        assert_eq!(map.frontend_range_to_guest(top, len as u64), None);
        assert!(map.get_slices(GuestAddress(top), len).any(|s| s.is_err()));
    }
}

#[test]
fn d7_range_over_two_adjacent_regions_is_split() {
    let (first, second) = (
        MemFile::new("hm-d7a", PAGE),
        // So that the regions are not adjacent in the host even by chance.
        MemFile::new("hm-d7b", 2 * PAGE),
    );
    let map = MemoryMap::new(vec![
        first.region(0x1000, PAGE, FRONTEND, 0),
        second.region(0x2000, PAGE, FRONTEND + PAGE, PAGE),
    ])
    .unwrap();

    assert!(map.check_range(GuestAddress(0x1FFD), 8));
    assert_eq!(slice_lengths(&map, 0x1FFD, 8), [3, 5]);
    assert!(map.get_slice(GuestAddress(0x1FFD), 8).is_err());
    assert_eq!(slice_lengths(&map, 0x1FFD, 3), [3]);
    assert_eq!(slice_lengths(&map, 0x2000, 8), [8]);

    map.write_slice(b"splitted", GuestAddress(0x1FFD)).unwrap();
    let (mut head, mut tail) = ([0; 3], [0; 5]);
    first.file().read_exact_at(&mut head, 0xFFD).unwrap();
    second.file().read_exact_at(&mut tail, PAGE).unwrap();
    assert_eq!((&head, &tail), (b"spl", b"itted"));
}

#[test]
fn range_of_no_bytes_has_no_slices() {
    let file = MemFile::new("hm-zero", PAGE);
    let map = MemoryMap::new(vec![file.region(0, PAGE, FRONTEND, 0)]).unwrap();
    for addr in [0, PAGE, u64::MAX] {
        assert!(slice_lengths(&map, addr, 0).is_empty());
        assert!(map.check_range(GuestAddress(addr), 0));
    }
    assert_eq!(
        map.frontend_range_to_guest(FRONTEND, 0),
        Some(GuestAddress(0))
    );
    assert_eq!(map.frontend_range_to_guest(FRONTEND + PAGE, 0), None);
}
