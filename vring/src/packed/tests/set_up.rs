//! Starting a queue, and moving it to another memory map.

use super::*;

#[test]
fn r10_a_base_outside_the_ring_is_refused() {
    let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
    for size in [1, 8, 32768u16] {
        let starts = |avail, used| {
            let mut config = config(size, PACKED, PackedPosition::FIRST);
            config.base = RingBase::Packed { avail, used };
            PackedQueue::start(Arc::clone(&memory), &config).map(|queue| queue.base())
        };
        for (avail, used) in [
            (at(0, true), at(0, true)),
            (at(0, false), at(0, true)),
            (at(size - 1, false), at(size - 1, true)),
            (at(0, false), at(size - 1, true)),
        ] {
            assert_eq!(starts(avail, used), Ok(RingBase::Packed { avail, used }));
        }
        if size < 32768 {
            let refused = Err(StartError::BaseOutOfRange { index: size, size });
            assert_eq!(starts(at(size, true), at(0, true)), refused);
            assert_eq!(starts(at(0, true), at(size, true)), refused);
        }
        if size > 1 {
            let outstanding = size + 1;
            let refused = Err(StartError::BaseTooFarAhead { outstanding, size });
            assert_eq!(starts(at(1, false), at(0, true)), refused);
        }
    }
}

#[test]
fn the_format_of_features_and_base_is_checked() {
    let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
    let mut config = config(8, PACKED, PackedPosition::FIRST);
    config.features.packed = false;
    let started = PackedQueue::start(Arc::clone(&memory), &config).map(|_| ());
    assert_eq!(started, Err(StartError::FormatMismatch));
    config.features.packed = true;
    config.base = RingBase::Split { next_avail: 0 };
    let started = PackedQueue::start(memory, &config).map(|_| ());
    assert_eq!(started, Err(StartError::FormatMismatch));
}

#[test]
fn m17_a_map_without_the_ring_stops_it_for_good() {
    let mut rig = Rig::new(8, PACKED);
    rig.guest.add_chain(1, 1);
    rig.guest.add_chain(2, 1);
    rig.guest.add_chain(3, 1);
    let (first, second) = (rig.pop(), rig.pop());
    rig.queue.push(first, 8);
    let addresses = config(8, PACKED, PackedPosition::FIRST).addresses;
    let elsewhere = [(GuestAddress(0x40_0000), 0x1000)];
    let elsewhere = Arc::new(Memory::from_ranges(&elsewhere).unwrap());
    assert!(rig.queue.set_memory(elsewhere, addresses).is_err());
    assert_eq!(rig.ring_fault(), RingFault::MemoryLost);
    rig.queue.push(second, 8);
    assert_eq!((rig.queue.in_flight(), rig.queue.publish()), (0, 0));
    assert!(!rig.queue.should_notify());
    rig.queue.disable_notification();
    assert_eq!(rig.guest.device_event().1, 0);
    assert_eq!(rig.guest.take(1), None);
    let again = Arc::clone(&rig.guest.memory);
    let refused = rig.queue.set_memory(again, addresses);
    assert_eq!(refused, Err(StartError::RingLost));
}

#[test]
fn a_ring_moved_to_another_map_goes_on_there_with_what_was_staged() {
    let mut rig = Rig::new(8, PACKED);
    rig.guest.add_chain(1, 1);
    rig.guest.add_chain(2, 2);
    let (first, second) = (rig.pop(), rig.pop());
    rig.queue.push(first, 8);
    let addresses = config(8, PACKED, PackedPosition::FIRST).addresses;
    let same = Arc::clone(&rig.guest.memory);
    rig.queue.set_memory(same, addresses).unwrap();
    rig.queue.push(second, 9);
    assert_eq!(rig.queue.publish(), 2);
    assert_eq!(rig.guest.take(1), Some((1, 8, true)));
    assert_eq!(rig.guest.take(2), Some((2, 9, true)));
}
