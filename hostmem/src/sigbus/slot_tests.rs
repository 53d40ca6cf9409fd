//! Of `slot.rs`, which is compiled against loom as well and has none of its own for that reason.

use super::slot::{Extent, Slot};

const EXTENT: Extent = Extent {
    start: 0x4000,
    len: 0x2000,
    page_size: 0x1000,
};

#[test]
fn extent_holds_its_bytes_and_no_others() {
    for addr in [0x4000, 0x5FFF] {
        assert!(EXTENT.holds(addr));
    }
    for addr in [0, 0x3FFF, 0x6000, usize::MAX] {
        assert!(!EXTENT.holds(addr));
    }
}

#[test]
fn extent_overlaps_ranges_that_share_a_byte() {
    for (addr, len) in [(0x4000, 1), (0x3FFF, 2), (0x5FFF, 9), (0, usize::MAX)] {
        assert!(EXTENT.overlaps(addr, len), "{addr:#x} {len:#x}");
    }
    for (addr, len) in [(0x3FFF, 1), (0x6000, 9), (0, 0x4000), (usize::MAX, 1)] {
        assert!(!EXTENT.overlaps(addr, len), "{addr:#x} {len:#x}");
    }
}

#[test]
fn slot_filled_anew_is_not_lost() {
    let slot = Slot::default();
    assert_eq!(slot.get(), None);
    slot.set(Some(EXTENT));
    assert_eq!(slot.get(), Some(EXTENT));
    assert!(slot.lose());
    assert!(!slot.lose());
    slot.set(None);
    assert_eq!(slot.get(), None);
    slot.set(Some(EXTENT));
    assert!(!slot.is_lost());
}
