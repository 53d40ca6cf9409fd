//! Undoing a pop, moving to a new memory map, resuming, and what a queue may be used for.

mod rig;

use std::sync::Arc;

use rig::{BUFFERS, END, EVENT_IDX, PLAIN, RING, Rig, SEAM, memory, segment, size};
use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap, GuestMemoryRegion,
    GuestMemoryRegionBytes, GuestRegionCollection, MemoryRegionAddress, MmapRegion, VolatileMemory,
    VolatileSlice,
};
use vring::driver::{SplitDriver, SplitLayout};
use vring::{
    Chain, PopError, QueueConfig, RingAddresses, RingArea, RingBase, RingFault, SplitQueue,
    StartError,
};

#[test]
fn unpop_gives_the_chain_back_to_the_next_pop() {
    let mut rig = Rig::new(8, PLAIN);
    let first = rig.offer_buffer();
    rig.offer_buffer();
    let head = rig.pop_head();
    assert_eq!(rig.queue.unpop(head), Ok(()));
    assert_eq!((rig.queue.in_flight(), rig.queue.next_avail()), (0, 0));
    assert!(rig.queue.has_available());
    let again = rig.pop_head();
    assert_eq!(again.index(), first);
    assert_eq!(rig.chain.readable(), [segment(BUFFERS, 512)]);
    rig.queue.push(again, 0);
}

#[test]
fn unpop_refuses_all_but_the_latest_pop() {
    let mut rig = Rig::new(8, PLAIN);
    rig.offer_buffer();
    rig.offer_buffer();
    let first = rig.pop_head();
    let second = rig.pop_head();
    let first = rig.queue.unpop(first).unwrap_err();
    rig.queue.unpop(second).unwrap();
    // The first is the latest now, but only one step can be undone.
    let first = rig.queue.unpop(first).unwrap_err();
    assert_eq!((rig.queue.in_flight(), rig.queue.next_avail()), (1, 1));
    rig.queue.push(first, 0);
    let second = rig.pop_head();
    assert_eq!(second.index(), 1);
    rig.queue.push(second, 0);
}

#[test]
fn unpop_after_a_ring_fault_fetches_nothing() {
    let mut rig = Rig::new(8, PLAIN);
    rig.offer_buffer();
    let head = rig.pop_head();
    rig.guest.set_avail_idx(100);
    rig.ring_fault();
    rig.queue.unpop(head).unwrap();
    assert_eq!(rig.pop(), Ok(None));
    assert_eq!((rig.queue.next_avail(), rig.queue.in_flight()), (0, 0));
}

#[test]
fn staged_elements_are_invisible_until_published() {
    let mut rig = Rig::new(8, PLAIN);
    rig.offer_buffer();
    let head = rig.pop_head();
    rig.queue.push(head, 5);
    assert_eq!(rig.guest.poll_used(), None);
    assert_eq!(rig.queue.publish(), 1);
    assert_eq!(rig.queue.publish(), 0);
    assert_eq!(rig.guest.poll_used().map(|used| used.len), Some(5));
}

#[test]
fn completions_in_any_order_are_reported_in_the_order_pushed() {
    let mut rig = Rig::new(8, PLAIN);
    for _ in 0..3 {
        rig.offer_buffer();
    }
    let mut heads: Vec<_> = std::iter::from_fn(|| rig.pop().unwrap()).collect();
    heads.rotate_left(1);
    for head in heads {
        rig.queue.push(head, 0);
    }
    rig.queue.publish();
    let ids: Vec<_> = std::iter::from_fn(|| rig.guest.poll_used())
        .map(|used| used.id)
        .collect();
    assert_eq!(ids, [1, 2, 0]);
}

#[test]
#[cfg_attr(debug_assertions, should_panic(expected = "is not from this queue"))]
fn a_head_of_another_queue_never_reaches_the_used_ring() {
    let mut rig = Rig::new(8, PLAIN);
    let mut other = Rig::new(8, PLAIN);
    other.offer_buffer();
    let foreign = other.pop_head();
    rig.queue.push(foreign, 1);
    assert_eq!(rig.queue.publish(), 0);
    assert_eq!(rig.guest.poll_used(), None);
    assert_eq!(rig.queue.in_flight(), 0);
}

#[test]
fn resuming_goes_on_from_the_rings_used_index_and_clears_its_flags() {
    let mut rig = Rig::starting_at(8, PLAIN, 65535);
    rig.queue.disable_notification();
    rig.assert_ring_goes_on();
    let config = QueueConfig {
        base: rig.queue.base(),
        ..rig.config
    };
    assert_eq!(config.base, RingBase::Split { next_avail: 0 });
    assert_eq!(rig.guest.used_flags(), 1);
    rig.queue = SplitQueue::start(Arc::clone(&rig.memory), &config).unwrap();
    assert_eq!(rig.guest.used_flags(), 0);
    rig.assert_ring_goes_on();
    assert_eq!(rig.guest.used_idx(), 1);
}

#[test]
fn a_queue_goes_to_another_thread() {
    let mut rig = Rig::new(8, PLAIN);
    rig.offer_buffer();
    let Rig {
        mut queue,
        mut chain,
        mut guest,
        ..
    } = rig;
    std::thread::spawn(move || {
        let head = queue.pop(&mut chain).unwrap().unwrap();
        queue.push(head, 1);
        queue.publish();
    })
    .join()
    .unwrap();
    assert_eq!(guest.poll_used().map(|used| used.len), Some(1));
}

#[test]
fn a_ring_keeps_its_memory_mapped() {
    let mut rig = Rig::new(8, PLAIN);
    rig.offer_buffer();
    let Rig {
        mut queue,
        mut chain,
        memory,
        guest,
        ..
    } = rig;
    let weak = Arc::downgrade(&memory);
    drop((memory, guest));
    let head = queue.pop(&mut chain).unwrap().unwrap();
    queue.push(head, 0);
    queue.publish();
    assert!(weak.upgrade().is_some());
    drop(queue);
    assert!(weak.upgrade().is_none());
}

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

#[test]
fn m13_ring_moves_to_a_new_map_with_work_in_flight_and_staged() {
    let mut rig = Rig::new(8, PLAIN);
    rig.offer_buffer();
    rig.offer_buffer();
    rig.offer_buffer();
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
    assert_eq!(third.index(), 2);
    rig.queue.push(third, 3);
    rig.queue.publish();

    assert_eq!(rig.guest.used_idx(), 0, "the old map is left alone");
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
fn m17_map_without_the_ring_stops_it_and_leaves_the_old_one_alone() {
    for features in [PLAIN, EVENT_IDX] {
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
    let mut rig = Rig::new(8, PLAIN);
    rig.guest.set_avail_idx(100);
    let first = rig.ring_fault();
    let elsewhere = Arc::new(rig::Memory::from_ranges(&[(GuestAddress(END), 0x1000)]).unwrap());
    rig.queue
        .set_memory(elsewhere, rig.config.addresses)
        .unwrap_err();
    assert_eq!(rig.queue.fault(), Some(first));
    assert_eq!(rig.pop(), Ok(None), "reported once");
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

fn start_in_odd_memory(skew: usize, missing: usize) -> Result<(), StartError> {
    let region = OddRegion {
        mapping: MmapRegion::new(0x4000).unwrap(),
        skew,
        missing,
    };
    let memory = GuestRegionCollection::from_regions(vec![region]).unwrap();
    let config = QueueConfig {
        size: size(8),
        addresses: rig::addresses(8),
        features: PLAIN,
        base: RingBase::Split { next_avail: 0 },
    };
    SplitQueue::start(Arc::new(memory), &config).map(drop)
}

#[test]
fn a_memory_that_is_not_aligned_in_the_host_is_refused() {
    assert_eq!(start_in_odd_memory(16, 0), Ok(()));
    for skew in [1, 2, 4, 8] {
        assert_eq!(
            start_in_odd_memory(skew, 0),
            Err(StartError::HostMisaligned {
                area: RingArea::DescriptorArea,
                address: RING
            })
        );
    }
}

#[test]
fn a_memory_that_returns_less_than_asked_is_refused() {
    assert_eq!(
        start_in_odd_memory(0, 1),
        Err(StartError::NotMapped {
            area: RingArea::DescriptorArea,
            address: RING,
            len: 128
        })
    );
}

/// A ring of 4096, its used ring alone in a region, in memory with a dirty bitmap.
fn tracked(next_avail: u16) -> (Arc<GuestMemoryMmap<AtomicBitmap>>, QueueConfig) {
    let ranges = [(GuestAddress(0), 0x20000), (GuestAddress(0x20000), 0x10000)];
    let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    let size = size(4096);
    let addresses = RingAddresses {
        device_area: GuestAddress(0x20000),
        ..SplitLayout::new(GuestAddress(0), size).unwrap().addresses()
    };
    let config = QueueConfig {
        size,
        addresses,
        features: EVENT_IDX,
        base: RingBase::Split { next_avail },
    };
    (Arc::new(memory), config)
}

/// Pages of the used ring's region that are dirty; forgets them.
fn dirty_pages(memory: &GuestMemoryMmap<AtomicBitmap>) -> Vec<usize> {
    let region = memory.find_region(GuestAddress(0x20000)).unwrap();
    let pages = (0..0x10)
        .filter(|page| region.bitmap().dirty_at(page * 0x1000))
        .collect();
    (**region).bitmap().reset();
    pages
}

#[test]
fn used_ring_writes_are_marked_in_the_dirty_bitmap() {
    let (memory, config) = tracked(4094);
    let mut guest = SplitDriver::starting_at(
        Arc::clone(&memory),
        config.addresses,
        config.size,
        config.features,
        4094,
    )
    .unwrap();
    let mut queue = SplitQueue::start(Arc::clone(&memory), &config).unwrap();
    let mut chain = Chain::for_queue(config.size);
    dirty_pages(&memory);

    // Four elements around the end of the ring: its last page (byte 4 + 8 * 4094 is on page 7),
    // and its first, where the index is too.
    for _ in 0..4 {
        guest.add_chain(&[segment(0x1f000, 8)], &[]).unwrap();
    }
    guest.publish();
    while let Some(head) = queue.pop(&mut chain).unwrap() {
        queue.push(head, 0);
    }
    assert!(dirty_pages(&memory).is_empty(), "staged is not published");
    queue.publish();
    // Element 4095 ends at byte 32772, on page 8.
    assert_eq!(dirty_pages(&memory), [0, 7, 8]);
    queue.publish();
    assert!(dirty_pages(&memory).is_empty());
    // avail_event follows the last element.
    queue.enable_notification();
    assert_eq!(dirty_pages(&memory), [8]);
    queue.should_notify();
    assert!(dirty_pages(&memory).is_empty());
}

#[test]
fn dirty_marks_cover_exactly_the_elements_of_a_batch_in_the_middle() {
    let (memory, config) = tracked(600);
    let mut guest = SplitDriver::starting_at(
        Arc::clone(&memory),
        config.addresses,
        config.size,
        config.features,
        600,
    )
    .unwrap();
    let mut queue = SplitQueue::start(Arc::clone(&memory), &config).unwrap();
    let mut chain = Chain::for_queue(config.size);
    dirty_pages(&memory);
    guest.add_chain(&[segment(0x1f000, 8)], &[]).unwrap();
    guest.publish();
    match queue.pop(&mut chain) {
        Ok(Some(head)) => queue.push(head, 0),
        Err(PopError::Chain { .. }) | Ok(None) | Err(_) => panic!("one valid chain"),
    }
    queue.publish();
    // Element 600 is at byte 4804, on page 1; the index on page 0.
    assert_eq!(dirty_pages(&memory), [0, 1]);
}
