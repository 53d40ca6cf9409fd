//! The memory a ring is in: moving to a new map, losing it, odd backends, and the dirty bitmap.

mod rig;

use std::sync::Arc;

use rig::{
    END, EVENT_IDX, PLAIN, RING, Rig, SEAM, base_after, both, memory, packed, segment, size,
};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
    GuestMemoryRegionBytes, GuestRegionCollection, MemoryRegionAddress, MmapRegion, VolatileMemory,
    VolatileSlice,
};
use vring::driver::{Driver, SplitLayout};
use vring::{
    Chain, Queue, QueueConfig, RingAddresses, RingArea, RingBase, RingFault, RingFeatures,
    StartError,
};

/// A memory of one region with a copy of the ring's bytes, `shift` bytes further up.
fn moved(rig: &Rig, shift: u64) -> (Arc<rig::Memory>, RingAddresses) {
    let len = usize::try_from(SEAM).unwrap();
    let start = GuestAddress(shift);
    let new = Arc::new(rig::Memory::from_ranges(&[(start, len)]).unwrap());
    let mut bytes = vec![0; len];
    rig.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    new.write_slice(&bytes, start).unwrap();
    let old = rig.config.addresses;
    let addresses = RingAddresses {
        descriptor_area: GuestAddress(old.descriptor_area.0 + shift),
        driver_area: GuestAddress(old.driver_area.0 + shift),
        device_area: GuestAddress(old.device_area.0 + shift),
    };
    (new, addresses)
}

/// Three chains on a ring of 8: one staged, one in flight and one available when the ring moves to
/// a new map. Then all complete.
fn move_ring(features: RingFeatures) -> (Arc<rig::Memory>, RingAddresses) {
    let mut rig = Rig::new(8, features);
    for _ in 0..3 {
        rig.offer_buffer();
    }
    let first = rig.pop_head();
    let second = rig.pop_head();
    rig.queue.push(first, 1);

    let (memory, addresses) = moved(&rig, 0x10_0000);
    rig.queue
        .set_memory(Arc::clone(&memory), addresses)
        .unwrap();
    assert!(Arc::ptr_eq(rig.queue.memory(), &memory));
    rig.queue.push(second, 2);
    assert_eq!(rig.queue.publish(), 2);
    let third = rig.pop_head();
    rig.complete(third, 3);
    assert_eq!(rig.guest.poll_used(), None, "the old map is left alone");
    (memory, addresses)
}

#[test]
fn m13_split_ring_moves_to_a_new_map_with_work_in_flight_and_staged() {
    let (memory, addresses) = move_ring(PLAIN);
    let mut used = [0u8; 4 + 3 * 8];
    memory.read_slice(&mut used, addresses.device_area).unwrap();
    let expected = [
        0, 0, 3, 0, // flags, index
        0, 0, 0, 0, 1, 0, 0, 0, // staged before the move, in the ring's own bytes
        1, 0, 0, 0, 2, 0, 0, 0, //
        2, 0, 0, 0, 3, 0, 0, 0,
    ];
    assert_eq!(used, expected);
}

#[test]
fn m13_packed_ring_moves_to_a_new_map_with_work_in_flight_and_staged() {
    let (memory, addresses) = move_ring(packed(PLAIN));
    for (index, len) in (0..3).zip(1u8..) {
        let at = GuestAddress(addresses.descriptor_area.0 + 16 * u64::from(index) + 8);
        let mut used = [0u8; 8];
        memory.read_slice(&mut used, at).unwrap();
        // Length, id, and AVAIL, USED and WRITE.
        assert_eq!(used, [len, 0, 0, 0, index, 0, 0x82, 0x80]);
    }
}

#[test]
fn m17_map_without_the_ring_stops_it_and_leaves_the_old_one_alone() {
    let in_order = RingFeatures {
        in_order: true,
        ..PLAIN
    };
    for features in [PLAIN, EVENT_IDX, in_order].into_iter().flat_map(both) {
        let mut rig = Rig::new(8, features);
        for _ in 0..4 {
            rig.offer_buffer();
        }
        let first = rig.pop_head();
        let second = rig.pop_head();
        rig.queue.push(first, 1);
        let mut before = vec![0; usize::try_from(END).unwrap()];
        rig.memory.read_slice(&mut before, GuestAddress(0)).unwrap();

        let elsewhere = Arc::new(rig::Memory::from_ranges(&[(GuestAddress(END), 0x1000)]).unwrap());
        let addresses = rig.config.addresses;
        assert_eq!(
            rig.queue.set_memory(elsewhere, addresses),
            Err(StartError::NotMapped {
                area: RingArea::DescriptorArea,
                address: RING,
                len: 128
            })
        );
        assert_eq!(rig.ring_fault(), RingFault::MemoryLost);
        assert!(Arc::ptr_eq(rig.queue.memory(), &rig.memory));
        rig.queue.push(second, 1);
        assert_eq!(rig.queue.in_flight(), 0);
        assert_eq!(rig.queue.publish(), 0);
        assert!(!rig.queue.should_notify());
        rig.queue.disable_notification();
        assert!(rig.queue.enable_notification());
        assert_eq!(
            rig.queue.set_memory(memory(), addresses),
            Err(StartError::RingLost)
        );
        let mut after = vec![0; before.len()];
        rig.memory.read_slice(&mut after, GuestAddress(0)).unwrap();
        assert!(after == before, "the lost ring was written to");
    }
}

#[test]
fn m17_ring_that_had_faulted_already_keeps_its_first_fault() {
    for features in both(PLAIN) {
        let mut rig = Rig::new(8, features);
        rig.break_ring();
        let first = rig.ring_fault();
        let elsewhere = Arc::new(rig::Memory::from_ranges(&[(GuestAddress(END), 0x1000)]).unwrap());
        rig.queue
            .set_memory(elsewhere, rig.config.addresses)
            .unwrap_err();
        assert_eq!(rig.queue.fault(), Some(first));
        assert_eq!(rig.pop(), Ok(None), "reported once");
    }
}

/// A region whose host mapping is `skew` bytes off the guest's alignment, and whose slices are
/// `missing` bytes short of what was asked: what a VMM's own memory may do by mistake.
#[derive(Debug)]
struct OddRegion {
    mapping: MmapRegion<()>,
    skew: usize,
    missing: usize,
}

impl GuestMemoryRegion for OddRegion {
    type B = ();

    fn len(&self) -> u64 {
        0x3000
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(RING)
    }

    fn bitmap(&self) {}

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, ()>, GuestMemoryError> {
        let offset = usize::try_from(offset.0).unwrap() + self.skew;
        Ok(self.mapping.get_slice(offset, count - self.missing)?)
    }
}

impl GuestMemoryRegionBytes for OddRegion {}

fn start_in_odd_memory(
    skew: usize,
    missing: usize,
    features: RingFeatures,
) -> Result<(), StartError> {
    let region = OddRegion {
        mapping: MmapRegion::new(0x4000).unwrap(),
        skew,
        missing,
    };
    let memory = GuestRegionCollection::from_regions(vec![region]).unwrap();
    let config = QueueConfig {
        size: size(8),
        addresses: rig::addresses(8, features),
        features,
        base: RingBase::fresh(features),
    };
    Queue::start(Arc::new(memory), &config).map(drop)
}

#[test]
fn a_memory_that_is_not_aligned_in_the_host_is_refused() {
    for features in both(PLAIN) {
        assert_eq!(start_in_odd_memory(16, 0, features), Ok(()));
        for skew in [1, 2, 4, 8] {
            assert_eq!(
                start_in_odd_memory(skew, 0, features),
                Err(StartError::HostMisaligned {
                    area: RingArea::DescriptorArea,
                    address: RING
                })
            );
        }
    }
}

#[test]
fn a_memory_that_returns_less_than_asked_is_refused() {
    for features in both(PLAIN) {
        assert_eq!(
            start_in_odd_memory(0, 1, features),
            Err(StartError::NotMapped {
                area: RingArea::DescriptorArea,
                address: RING,
                len: 128
            })
        );
    }
}

/// A ring of 4096 after `count` chains of one descriptor, with what the device writes alone in a
/// region, in memory with a dirty bitmap.
struct Tracked {
    memory: Arc<GuestMemoryMmap<AtomicBitmap>>,
    guest: Driver<GuestMemoryMmap<AtomicBitmap>>,
    queue: Queue<GuestMemoryMmap<AtomicBitmap>>,
    chain: Chain,
}

/// Where the device writes: the used ring, or the descriptor ring and its event structure.
const WRITTEN: u64 = 0x20000;
/// Bytes of that region.
const WRITTEN_LEN: usize = 0x18000;

fn tracked(features: RingFeatures, count: u16) -> Tracked {
    let ranges = [
        (GuestAddress(0), usize::try_from(WRITTEN).unwrap()),
        (GuestAddress(WRITTEN), WRITTEN_LEN),
    ];
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
    let size = size(4096);
    let addresses = if features.packed {
        RingAddresses {
            descriptor_area: GuestAddress(WRITTEN),
            driver_area: GuestAddress(0),
            device_area: GuestAddress(WRITTEN + 0x17000),
        }
    } else {
        RingAddresses {
            device_area: GuestAddress(WRITTEN),
            ..SplitLayout::new(GuestAddress(0), size).unwrap().addresses()
        }
    };
    let base = base_after(count, size.get(), features);
    let config = QueueConfig {
        size,
        addresses,
        features,
        base,
    };
    let guest = Driver::starting_at(Arc::clone(&memory), addresses, size, features, base).unwrap();
    let queue = Queue::start(Arc::clone(&memory), &config).unwrap();
    dirty_pages(&memory);
    Tracked {
        memory,
        guest,
        queue,
        chain: Chain::for_queue(size),
    }
}

impl Tracked {
    /// Pops and pushes `count` chains of one descriptor.
    fn stage(&mut self, count: usize) {
        for _ in 0..count {
            let buffer = [segment(0x1f000, 8)];
            self.guest.add_chain(&buffer, &[]).unwrap();
        }
        self.guest.publish();
        while let Some(head) = self.queue.pop(&mut self.chain).unwrap() {
            self.queue.push(head, 0);
        }
    }
}

/// Pages of the region the device writes to that are dirty; forgets them.
fn dirty_pages(memory: &GuestMemoryMmap<AtomicBitmap>) -> Vec<usize> {
    let region = memory.find_region(GuestAddress(WRITTEN)).unwrap();
    let pages = (0..WRITTEN_LEN / 0x1000)
        .filter(|page| region.bitmap().dirty_at(page * 0x1000))
        .collect();
    (**region).bitmap().reset();
    pages
}

#[test]
fn used_ring_writes_are_marked_in_the_dirty_bitmap() {
    let mut rig = tracked(EVENT_IDX, 4094);
    // Four elements around the end of the ring: its last page (byte 4 + 8 * 4094 is on page 7),
    // and its first, where the index is too.
    rig.stage(4);
    assert!(
        dirty_pages(&rig.memory).is_empty(),
        "staged is not published"
    );
    rig.queue.publish();
    // Element 4095 ends at byte 32772, on page 8.
    assert_eq!(dirty_pages(&rig.memory), [0, 7, 8]);
    rig.queue.publish();
    assert!(dirty_pages(&rig.memory).is_empty());
    // avail_event follows the last element.
    rig.queue.enable_notification();
    assert_eq!(dirty_pages(&rig.memory), [8]);
    rig.queue.should_notify();
    assert!(dirty_pages(&rig.memory).is_empty());
}

#[test]
fn used_descriptors_are_marked_in_the_dirty_bitmap() {
    let mut rig = tracked(packed(EVENT_IDX), 4094);
    // Two descriptors at the end of the ring, which is 16 pages long, and two at its start.
    rig.stage(4);
    rig.queue.publish();
    assert_eq!(dirty_pages(&rig.memory), [0, 15]);
    rig.queue.publish();
    assert!(dirty_pages(&rig.memory).is_empty());
    // The event structure has a page of its own.
    rig.queue.enable_notification();
    assert_eq!(dirty_pages(&rig.memory), [0x17]);
    rig.queue.disable_notification();
    assert_eq!(dirty_pages(&rig.memory), [0x17]);
    rig.queue.should_notify();
    assert!(dirty_pages(&rig.memory).is_empty());
}

#[test]
fn dirty_marks_cover_exactly_a_batch_in_the_middle() {
    // Element 600 is at byte 4804, on page 1; the index on page 0.
    let mut rig = tracked(EVENT_IDX, 600);
    rig.stage(1);
    rig.queue.publish();
    assert_eq!(dirty_pages(&rig.memory), [0, 1]);
    // Descriptors 600 to 899 are bytes 9600 to 14400.
    let mut rig = tracked(packed(EVENT_IDX), 600);
    rig.stage(300);
    rig.queue.publish();
    assert_eq!(dirty_pages(&rig.memory), [2, 3]);
}
