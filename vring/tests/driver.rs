//! The guest side as a correct driver: of a split ring, and what holds for both formats. That of a
//! packed ring has `packed_driver` to itself.

mod rig;

use std::sync::Arc;

use rig::{BUFFERS, END, EVENT_IDX, INDIRECT, PLAIN, Rig, TABLE, both, memory, segment, size};
use vm_memory::{Bytes, GuestAddress};
use vring::driver::{AddError, DriverError, Full, SplitDriver, SplitLayout, Used};
use vring::{Queue, RingArea, StartError};

#[test]
fn layout_is_aligned_and_does_not_overlap_for_every_size() {
    for shift in 0..=15 {
        let size = size(1 << shift);
        let entries = u64::from(size.get());
        for base in [0, 1, 0x1008, 0xffff_f000] {
            let layout = SplitLayout::new(GuestAddress(base), size).unwrap();
            let at = layout.addresses();
            let [table, available, used] =
                [at.descriptor_area.0, at.driver_area.0, at.device_area.0];
            assert!(base <= table && table % 16 == 0);
            assert!(table + 16 * entries <= available && available % 2 == 0);
            assert!(available + 6 + 2 * entries <= used && used % 4 == 0);
            assert_eq!(base + layout.total_len(), used + 6 + 8 * entries);
        }
    }
}

#[test]
fn layout_that_wraps_is_refused() {
    let base = u64::MAX - 0x100;
    assert_eq!(
        SplitLayout::new(GuestAddress(base), size(256)),
        Err(DriverError::LayoutOverflow { base })
    );
}

#[test]
fn ring_outside_memory_is_refused() {
    let layout = SplitLayout::new(GuestAddress(END), size(8)).unwrap();
    assert_eq!(
        SplitDriver::new(memory(), layout.addresses(), size(8), PLAIN).unwrap_err(),
        DriverError::Ring(StartError::NotMapped {
            area: RingArea::DescriptorArea,
            address: END,
            len: 128
        })
    );
}

#[test]
fn a_new_ring_is_all_zeroes_whatever_was_there() {
    let memory = memory();
    let layout = SplitLayout::new(GuestAddress(0x1000), size(8)).unwrap();
    let len = usize::try_from(layout.total_len()).unwrap();
    memory
        .write_slice(&vec![0xff; len], GuestAddress(0x1000))
        .unwrap();
    let at = layout.addresses();
    SplitDriver::new(Arc::clone(&memory), at, size(8), PLAIN).unwrap();
    for (start, len) in [
        (at.descriptor_area, 128),
        (at.driver_area, 22),
        (at.device_area, 70),
    ] {
        let mut bytes = vec![0xff; len];
        memory.read_slice(&mut bytes, start).unwrap();
        assert_eq!(bytes, vec![0; len]);
    }
}

#[test]
fn descriptors_come_back_in_whatever_order_chains_complete() {
    for features in both(PLAIN) {
        let mut rig = Rig::new(8, features);
        let one = [segment(BUFFERS, 8)];
        let three = [segment(BUFFERS, 8); 3];
        rig.guest.add_chain(&three, &[]).unwrap();
        rig.guest.add_chain(&one, &one).unwrap();
        rig.guest.add_chain(&[], &three).unwrap();
        assert_eq!(rig.guest.free(), 0);
        assert_eq!(
            rig.guest.add_chain(&one, &[]),
            Err(Full { needed: 1, free: 0 })
        );
        assert_eq!(rig.guest.publish(), 3);

        let mut heads: Vec<_> = std::iter::from_fn(|| rig.pop().unwrap()).collect();
        heads.swap(0, 2);
        for (head, expected_free) in heads.into_iter().zip([3, 5, 8]) {
            rig.queue.push(head, 0);
            rig.queue.publish();
            assert!(rig.guest.poll_used().unwrap().expected);
            assert_eq!(rig.guest.free(), expected_free);
        }
        // All eight make one chain again, whatever order they are linked in now.
        let eight = [segment(BUFFERS, 8); 8];
        rig.guest.add_chain(&eight, &[]).unwrap();
        rig.guest.publish();
        let head = rig.pop_head();
        assert_eq!(rig.chain.readable(), eight);
        rig.queue.push(head, 0);
    }
}

#[test]
fn a_chain_too_long_for_the_free_descriptors_leaves_them_alone() {
    for features in both(PLAIN) {
        let mut rig = Rig::new(8, features);
        assert_eq!(
            rig.guest.add_chain(&[segment(BUFFERS, 8); 9], &[]),
            Err(Full { needed: 9, free: 8 })
        );
        assert_eq!((rig.guest.free(), rig.guest.publish()), (8, 0));
    }
}

#[test]
fn a_chain_of_nothing_is_one_empty_descriptor() {
    for features in both(INDIRECT) {
        let mut rig = Rig::new(8, features);
        rig.guest.add_chain(&[], &[]).unwrap();
        rig.guest
            .add_indirect(GuestAddress(TABLE), &[], &[])
            .unwrap();
        rig.guest.publish();
        for _ in 0..2 {
            let head = rig.pop_head();
            assert!(rig.chain.readable().is_empty() && rig.chain.writable().is_empty());
            rig.queue.push(head, 0);
        }
    }
}

#[test]
fn an_indirect_chain_takes_one_descriptor() {
    for features in both(INDIRECT) {
        let mut rig = Rig::new(8, features);
        let readable = [segment(BUFFERS, 16), segment(BUFFERS + 64, 512)];
        let writable = [segment(BUFFERS + 1024, 1)];
        rig.guest
            .add_indirect(GuestAddress(TABLE), &readable, &writable)
            .unwrap();
        assert_eq!(rig.guest.free(), 7);
        rig.guest.publish();
        let head = rig.pop_head();
        assert_eq!(rig.chain.readable(), readable);
        assert_eq!(rig.chain.writable(), writable);
        rig.queue.push(head, 1);
        rig.queue.publish();
        assert!(rig.guest.poll_used().unwrap().expected);
        assert_eq!(rig.guest.free(), 8);
    }
}

#[test]
fn an_indirect_table_outside_memory_is_refused() {
    for features in both(INDIRECT) {
        let mut rig = Rig::new(8, features);
        assert_eq!(
            rig.guest
                .add_indirect(GuestAddress(END - 16), &[segment(BUFFERS, 16); 2], &[]),
            Err(AddError::Table {
                address: END - 16,
                entries: 2
            })
        );
        assert_eq!((rig.guest.free(), rig.guest.publish()), (8, 0));
    }
}

#[test]
fn a_device_that_returns_what_it_was_not_given_is_told_apart() {
    let mut rig = Rig::new(8, PLAIN);
    rig.guest.add_chain(&[segment(BUFFERS, 8)], &[]).unwrap();
    rig.guest.publish();
    for (position, id) in [(0, 3), (1, 8), (2, u32::MAX), (3, 0), (4, 0)] {
        rig.split().write_used_entry(position, id, 1);
    }
    rig.split().set_used_idx(5);
    let used: Vec<_> = std::iter::from_fn(|| rig.guest.poll_used()).collect();
    let entry = |id, expected| Used {
        id,
        len: 1,
        expected,
    };
    assert_eq!(
        used,
        [
            entry(3, false),
            entry(8, false),
            entry(u32::MAX, false),
            entry(0, true),
            entry(0, false), // twice
        ]
    );
    assert_eq!(rig.guest.free(), 8);
}

#[test]
fn interrupts_are_disabled_until_enabled() {
    for features in [PLAIN, EVENT_IDX].into_iter().flat_map(both) {
        let mut rig = Rig::new(8, features);
        rig.queue.should_notify();
        rig.guest.disable_interrupts();
        for _ in 0..20 {
            rig.assert_ring_goes_on();
            assert!(!rig.queue.should_notify());
            rig.guest.disable_interrupts();
        }
        assert!(rig.guest.enable_interrupts(), "nothing to take");
        rig.assert_ring_goes_on();
        assert!(rig.queue.should_notify());
        // A completion that raced in is seen by the last look.
        rig.offer_buffer();
        let head = rig.pop_head();
        rig.queue.push(head, 0);
        rig.queue.publish();
        assert!(!rig.guest.enable_interrupts());
    }
}

#[test]
fn one_kick_decision_covers_everything_published_since_the_last() {
    let mut rig = Rig::new(8, EVENT_IDX);
    assert!(!rig.guest.needs_kick(), "nothing was published");
    rig.split().set_avail_event(1);
    rig.offer_buffer();
    assert!(!rig.guest.needs_kick());
    rig.offer_buffer();
    rig.offer_buffer();
    assert!(rig.guest.needs_kick());
    assert!(!rig.guest.needs_kick());
}

#[test]
fn raw_writers_stay_inside_the_ring() {
    let memory = memory();
    let everything = usize::try_from(END).unwrap();
    memory
        .write_slice(&vec![0x77; everything], GuestAddress(0))
        .unwrap();
    let layout = SplitLayout::new(GuestAddress(0x1000), size(8)).unwrap();
    let guest = SplitDriver::new(Arc::clone(&memory), layout.addresses(), size(8), PLAIN).unwrap();
    for index in [8, 9, u16::MAX] {
        guest.write_desc(index, u64::MAX, u32::MAX, u16::MAX, u16::MAX);
        guest.write_avail_entry(index, u16::MAX);
        guest.write_used_entry(index, u32::MAX, u32::MAX);
    }
    let mut bytes = vec![0; everything];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    let end = 0x1000 + usize::try_from(layout.total_len()).unwrap();
    assert!(
        bytes[..0x1000]
            .iter()
            .chain(&bytes[end..])
            .all(|&b| b == 0x77)
    );
}

#[test]
fn a_device_started_over_a_driven_ring_sees_what_is_published() {
    for features in both(PLAIN) {
        let mut rig = Rig::new(8, features);
        rig.guest.add_chain(&[segment(BUFFERS, 8)], &[]).unwrap();
        let mut other = Queue::start(Arc::clone(&rig.memory), &rig.config).unwrap();
        assert!(!other.has_available(), "staged is not published");
        rig.guest.publish();
        assert!(other.has_available());
        let head = other.pop(&mut rig.chain).unwrap().unwrap();
        other.push(head, 0);
    }
}
