//! The guest side of a packed ring, with a naive device at the other side where one is needed.

mod naive_device;
mod rig;

use std::sync::Arc;

use naive_device::{NaiveDevice, PACKED, SIZE, addresses, driver, used};
use rig::{BUFFERS, END, TABLE, memory, segment, size};
use vm_memory::{Bytes, GuestAddress};
use vring::driver::{
    AddError, Driver, DriverError, EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE, F_AVAIL, F_INDIRECT,
    F_NEXT, F_USED, F_WRITE, Full, PackedDriver, PackedLayout, RawDescriptor,
};
use vring::{PackedPosition, RingArea, RingBase, RingFeatures, StartError};

#[test]
fn layout_is_aligned_and_does_not_overlap_for_every_size() {
    for shift in 0..=15 {
        let size = size(1 << shift);
        let entries = u64::from(size.get());
        for base in [0, 1, 0x1008, 0xffff_f000] {
            let layout = PackedLayout::new(GuestAddress(base), size).unwrap();
            let at = layout.addresses();
            let [ring, driver, device] = [at.descriptor_area.0, at.driver_area.0, at.device_area.0];
            assert!(base <= ring && ring % 16 == 0);
            assert!(ring + 16 * entries <= driver && driver % 4 == 0);
            assert!(driver + 4 <= device && device % 4 == 0);
            assert_eq!(base + layout.total_len(), device + 4);
        }
    }
    let base = u64::MAX - 0x100;
    assert_eq!(
        PackedLayout::new(GuestAddress(base), size(256)),
        Err(DriverError::LayoutOverflow { base })
    );
}

#[test]
fn ring_outside_memory_is_refused() {
    let layout = PackedLayout::new(GuestAddress(END), size(8)).unwrap();
    assert_eq!(
        PackedDriver::new(memory(), layout.addresses(), size(8), PACKED).unwrap_err(),
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
    let everything = usize::try_from(END).unwrap();
    memory
        .write_slice(&vec![0xff; everything], GuestAddress(0))
        .unwrap();
    let at = addresses();
    PackedDriver::new(Arc::clone(&memory), at, size(8), PACKED).unwrap();
    for (start, len) in [
        (at.descriptor_area, 128),
        (at.driver_area, 4),
        (at.device_area, 4),
    ] {
        let mut bytes = vec![0xff; len];
        memory.read_slice(&mut bytes, start).unwrap();
        assert_eq!(bytes, vec![0; len]);
    }
}

#[test]
fn an_idle_ring_at_any_position_has_nothing_available_and_nothing_used() {
    for index in 0..SIZE {
        for wrap in [false, true] {
            let (mut driver, mut device) = driver(PACKED, index, wrap);
            for _ in 0..3 * SIZE {
                assert_eq!(device.pop(), None);
                assert_eq!(driver.poll_used(), None);
                assert!(driver.enable_interrupts());
                let id = driver.add_chain(&[segment(BUFFERS, 4)], &[]).unwrap();
                assert_eq!(driver.publish(), 1);
                assert_eq!(driver.poll_used(), None);
                let chain = device.pop().unwrap();
                device.push(chain.id, 0, chain.descriptors);
                assert!(!driver.enable_interrupts(), "a completion raced in");
                assert_eq!(driver.poll_used(), Some(used(id, 0, true)));
            }
        }
    }
}

#[test]
fn starting_outside_the_ring_with_chains_in_flight_or_in_the_other_format_is_refused() {
    let start = |features, base| {
        let at = addresses();
        Driver::starting_at(memory(), at, size(8), features, base).map(drop)
    };
    let packed = |avail, used| RingBase::Packed {
        avail: PackedPosition::from_bits(avail),
        used: PackedPosition::from_bits(used),
    };
    let split = RingBase::Split { next_avail: 0 };
    let refused = |base| Err(DriverError::Base { base });
    for base in [packed(8, 8), packed(1, 0), packed(0x8000, 0), split] {
        assert_eq!(start(PACKED, base), refused(base));
    }
    assert_eq!(start(rig::PLAIN, packed(0, 0)), refused(packed(0, 0)));
    assert_eq!(start(PACKED, packed(0x8007, 0x8007)), Ok(()));
    assert_eq!(start(rig::PLAIN, split), Ok(()));
}

#[test]
fn a_batch_is_written_whole_before_its_first_flags_make_it_available() {
    let (mut driver, mut device) = driver(PACKED, 6, true);
    let two = [segment(BUFFERS, 8); 2];
    driver.add_chain(&two, &[]).unwrap();
    driver.add_chain(&two, &[]).unwrap();
    let (.., flags) = driver.desc(6);
    assert_eq!(flags, 0, "as the pass before left it");
    // The rest is there already, across the end of the ring.
    assert_eq!(driver.desc(7), (BUFFERS, 8, 0, F_AVAIL));
    assert_eq!(driver.desc(0), (BUFFERS, 8, !1, F_USED | F_NEXT));
    assert_eq!(driver.desc(1), (BUFFERS, 8, 1, F_USED));
    assert_eq!(device.pop(), None);
    assert!(!driver.needs_kick(), "nothing was published");
    assert_eq!(driver.publish(), 2);
    assert_eq!(driver.desc(6), (BUFFERS, 8, !0, F_AVAIL | F_NEXT));
    assert!(driver.needs_kick());
    assert!(device.pop().is_some() && device.pop().is_some());
    assert_eq!(device.pop(), None);
    assert_eq!(driver.publish(), 0);
}

#[test]
fn only_the_last_descriptor_has_the_id() {
    let (mut driver, _) = driver(PACKED, 0, true);
    let id = driver.add_chain(&[segment(BUFFERS, 8); 3], &[]).unwrap();
    driver.publish();
    let ids = [0, 1, 2].map(|index| driver.desc(index).2);
    assert_eq!(ids, [!id, !id, id]);
}

#[test]
fn a_chain_too_long_for_the_free_descriptors_leaves_them_alone() {
    let (mut driver, mut device) = driver(PACKED, 0, true);
    assert_eq!(
        driver.add_chain(&[segment(BUFFERS, 8); 9], &[]),
        Err(Full { needed: 9, free: 8 })
    );
    driver.add_chain(&[segment(BUFFERS, 8); 8], &[]).unwrap();
    assert_eq!(
        driver.add_indirect(GuestAddress(TABLE), &[segment(BUFFERS, 8)], &[]),
        Err(AddError::Full(Full { needed: 1, free: 0 }))
    );
    assert_eq!(driver.publish(), 1);
    assert_eq!(device.pop().unwrap().descriptors, 8);
}

#[test]
fn a_chain_of_nothing_is_one_empty_descriptor() {
    let (mut driver, mut device) = driver(PACKED, 0, true);
    driver.add_chain(&[], &[]).unwrap();
    driver.add_indirect(GuestAddress(TABLE), &[], &[]).unwrap();
    driver.publish();
    for _ in 0..2 {
        assert_eq!(device.pop().unwrap().buffers, [(0, 0, false)]);
    }
}

#[test]
fn an_indirect_table_outside_memory_is_refused() {
    let (mut driver, _) = driver(PACKED, 0, true);
    let two = [segment(BUFFERS, 16); 2];
    assert_eq!(
        driver.add_indirect(GuestAddress(END - 16), &two, &[]),
        Err(AddError::Table {
            address: END - 16,
            entries: 2
        })
    );
    assert_eq!((driver.free(), driver.publish()), (8, 0));
}

#[test]
fn a_device_that_returns_what_it_was_not_given_is_told_apart() {
    let (mut driver, mut device) = driver(PACKED, 0, true);
    driver.add_chain(&[segment(BUFFERS, 8)], &[]).unwrap();
    driver.publish();
    for id in [3, u16::MAX, 0, 0] {
        device.push(id, 1, 1);
    }
    let all: Vec<_> = std::iter::from_fn(|| driver.poll_used()).collect();
    let expected = [
        used(3, 1, false),
        used(u16::MAX, 1, false),
        used(0, 1, true),
        used(0, 1, false), // twice
    ];
    assert_eq!(all, expected);
    assert_eq!(driver.free(), 8);
}

#[test]
fn a_used_length_without_write_means_nothing() {
    let (mut driver, _) = driver(PACKED, 0, true);
    let id = driver.add_chain(&[], &[segment(BUFFERS, 8)]).unwrap();
    driver.publish();
    driver.write_used_desc(0, id, 77, F_AVAIL | F_USED);
    assert_eq!(driver.poll_used(), Some(used(id, 0, true)));
}

#[test]
fn raw_descriptors_are_offered_as_they_are_with_any_id() {
    let (mut driver, mut device) = driver(PACKED, 7, true);
    let raw = |address, len, flags| RawDescriptor {
        address,
        len,
        flags,
    };
    let id = driver
        .add_raw(&[
            raw(1, 2, F_NEXT | F_WRITE | F_AVAIL | F_USED),
            raw(3, 0, F_WRITE),
        ])
        .unwrap();
    driver
        .add_raw_with_id(0xbeef, &[raw(u64::MAX, u32::MAX, 0x7f70)])
        .unwrap();
    assert_eq!((driver.free(), driver.publish()), (5, 2));
    // Whatever was asked for, AVAIL and USED are those of the pass.
    assert_eq!(driver.desc(7).3, F_NEXT | F_WRITE | F_AVAIL);
    assert_eq!(driver.desc(0).3, F_WRITE | F_USED);
    let first = device.pop().unwrap();
    assert_eq!(first.buffers, [(1, 2, true), (3, 0, true)]);
    let second = device.pop().unwrap();
    assert_eq!(second.id, 0xbeef);
    assert_eq!(driver.desc(1), (u64::MAX, u32::MAX, 0xbeef, 0xff70));
    device.push(second.id, 9, 1);
    device.push(first.id, 8, 2);
    assert_eq!(driver.poll_used(), Some(used(0xbeef, 9, true)));
    assert_eq!(driver.poll_used(), Some(used(id, 8, true)));
    assert_eq!(driver.free(), 8);
}

#[test]
fn raw_chains_may_overrun_the_ring_and_come_back_without_more_free_than_it_has() {
    let (mut driver, mut device) = driver(PACKED, 0, true);
    let raw = [RawDescriptor {
        address: BUFFERS,
        len: 1,
        flags: 0,
    }];
    assert_eq!(
        driver.add_raw(&raw.repeat(9)),
        Err(Full { needed: 9, free: 8 })
    );
    let first = driver.add_chain(&[segment(BUFFERS, 8); 8], &[]).unwrap();
    driver.publish();
    device.pop().unwrap();
    let second = driver.add_raw(&raw).unwrap();
    driver.publish();
    assert_eq!(driver.free(), 0);
    assert_eq!(device.pop().map(|chain| chain.id), Some(second));
    device.push(first, 0, 8);
    assert_eq!(driver.poll_used(), Some(used(first, 0, true)));
    device.push(second, 0, 1);
    assert_eq!(driver.poll_used(), Some(used(second, 0, true)));
    assert_eq!(driver.free(), 8);
}

#[test]
fn raw_writers_stay_inside_the_ring() {
    let memory = memory();
    let everything = usize::try_from(END).unwrap();
    memory
        .write_slice(&vec![0x77; everything], GuestAddress(0))
        .unwrap();
    let layout = PackedLayout::new(GuestAddress(0x1000), size(8)).unwrap();
    let at = layout.addresses();
    let driver = PackedDriver::new(Arc::clone(&memory), at, size(8), PACKED).unwrap();
    for index in [8, 9, u16::MAX] {
        driver.write_desc(index, u64::MAX, u32::MAX, u16::MAX, u16::MAX);
        driver.write_used_desc(index, u16::MAX, u32::MAX, u16::MAX);
        driver.set_driver_event(u16::MAX, u16::MAX);
        driver.set_device_event(u16::MAX, u16::MAX);
    }
    let mut bytes = vec![0; everything];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    let written = |at: u64, len: usize| {
        let start = usize::try_from(at).unwrap();
        start..start + len
    };
    let areas = [
        written(at.descriptor_area.0, 128),
        written(at.driver_area.0, 4),
        written(at.device_area.0, 4),
    ];
    for (at, &byte) in bytes.iter().enumerate() {
        assert!(byte == 0x77 || areas.iter().any(|area| area.contains(&at)));
    }
    assert_eq!(driver.desc(6), (0, 0, 0, 0));
    assert_eq!(driver.device_event(), (u16::MAX, u16::MAX));
}

/// What the driver asks for: position and flags of its event suppression structure.
fn asked(device: &NaiveDevice) -> (u16, u16) {
    let at = addresses().driver_area;
    let word: u32 = device.memory.read_obj(at).unwrap();
    let [p0, p1, f0, f1] = word.to_ne_bytes();
    (u16::from_le_bytes([p0, p1]), u16::from_le_bytes([f0, f1]))
}

#[test]
fn interrupts_are_asked_for_at_the_next_completion() {
    let event_idx = RingFeatures {
        event_idx: true,
        ..PACKED
    };
    for (features, flags) in [(PACKED, EVENT_ENABLE), (event_idx, EVENT_DESC)] {
        let (mut driver, mut device) = driver(features, 7, true);
        driver.disable_interrupts();
        assert_eq!(asked(&device).1, EVENT_DISABLE);
        for position in [0x8007, 0, 1] {
            assert!(driver.enable_interrupts());
            let (asked, asked_flags) = asked(&device);
            assert_eq!(asked_flags, flags);
            if features.event_idx {
                assert_eq!(asked, position);
            }
            driver.add_chain(&[segment(BUFFERS, 8)], &[]).unwrap();
            driver.publish();
            let chain = device.pop().unwrap();
            device.push(chain.id, 0, 1);
            assert!(!driver.enable_interrupts());
            driver.poll_used().unwrap();
        }
    }
}

#[test]
fn kicks_follow_the_flags_without_event_idx() {
    let (mut driver, device) = driver(PACKED, 0, true);
    // The reserved value, and DESC without the feature, ask for every kick.
    for (flags, kick) in [
        (EVENT_ENABLE, true),
        (EVENT_DISABLE, false),
        (EVENT_DESC, true),
        (3, true),
    ] {
        device.ask(0x7fff, flags);
        driver.add_chain(&[segment(BUFFERS, 8)], &[]).unwrap();
        driver.publish();
        assert_eq!(driver.needs_kick(), kick, "flags {flags}");
        assert!(!driver.needs_kick(), "decided already");
    }
}

#[test]
fn with_in_order_a_used_descriptor_completes_all_up_to_its_chain() {
    let in_order = RingFeatures {
        in_order: true,
        ..PACKED
    };
    let (mut driver, mut device) = driver(in_order, 5, false);
    let two = [segment(BUFFERS, 8), segment(BUFFERS, 8)];
    let ids = [(); 3].map(|()| driver.add_chain(&[], &two).unwrap());
    driver.publish();
    device.push(ids[1], 3, 4);
    device.push(ids[2], 16, 2);
    for (id, len) in ids.into_iter().zip([16, 3, 16]) {
        assert_eq!(driver.poll_used(), Some(used(id, len, true)));
    }
    assert_eq!((driver.poll_used(), driver.free()), (None, 8));
    // An id that is not outstanding completes nothing.
    device.push(ids[0], 0, 1);
    assert_eq!(driver.poll_used(), Some(used(ids[0], 0, false)));
    assert_eq!(driver.free(), 8);
}

#[test]
fn flags_are_those_of_the_specification() {
    assert_eq!(
        [F_NEXT, F_WRITE, F_INDIRECT, F_AVAIL, F_USED],
        [1, 2, 4, 0x80, 0x8000]
    );
    assert_eq!([EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC], [0, 1, 2]);
}
