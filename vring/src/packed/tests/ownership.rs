//! What is in flight: whose descriptors and Buffer IDs are, pops undone, and giving back in order.

use super::*;

#[test]
fn d3_a_chain_without_end_is_a_ring_fault() {
    for (size, in_flight) in [(1, 0), (8, 0), (8, 3), (8, 7), (32768, 5)] {
        let mut rig = Rig::at(size, PACKED, at(size - 1, true));
        for id in 0..in_flight {
            rig.guest.add_chain(id, 1);
        }
        let heads: Vec<_> = (0..in_flight).map(|_| rig.pop()).collect();
        let limit = size - in_flight;
        for _ in 0..limit {
            rig.guest.add(BUFFERS, 16, 9, NEXT);
        }
        assert_eq!(rig.ring_fault(), RingFault::ChainOverrun { limit });
        // What is in flight completes.
        assert_eq!(rig.queue.in_flight(), in_flight);
        for head in heads {
            rig.queue.push(head, 0);
        }
        assert_eq!(rig.queue.publish(), usize::from(in_flight));
        let taken = std::iter::from_fn(|| rig.guest.take(1)).count();
        assert_eq!(taken, usize::from(in_flight));
    }
}

#[test]
fn d3_a_chain_into_descriptors_still_outstanding_is_a_ring_fault() {
    let mut rig = Rig::new(4, PACKED);
    rig.guest.add_chain(0, 2);
    let head = rig.pop();
    rig.queue.push(head, 0);
    // Pushed, but the driver cannot know, so two descriptors are all it has.
    rig.guest.add_chain(1, 3);
    assert_eq!(rig.ring_fault(), RingFault::ChainOverrun { limit: 2 });
    assert_eq!(rig.queue.publish(), 1);
}

#[test]
fn a_descriptor_made_available_in_a_full_ring_is_a_ring_fault() {
    let mut rig = Rig::new(2, PACKED);
    rig.guest.add_chain(0, 1);
    rig.guest.add_chain(1, 1);
    let heads = [rig.pop(), rig.pop()];
    assert!(rig.nothing());
    rig.guest.add_chain(2, 1);
    assert_eq!(rig.ring_fault(), RingFault::ChainOverrun { limit: 0 });
    for head in heads {
        rig.queue.push(head, 0);
    }
    assert_eq!(rig.queue.publish(), 2);
}

#[test]
fn a4_a_buffer_id_in_flight_twice_is_a_ring_fault() {
    for features in [PACKED, IN_ORDER] {
        let mut rig = Rig::new(4, features);
        rig.guest.add_chain(u16::MAX, 1);
        let head = rig.pop();
        rig.guest.add_chain(u16::MAX, 2);
        let id = u16::MAX;
        assert_eq!(rig.ring_fault(), RingFault::BufferIdInFlight { id });
        rig.queue.push(head, 0);
        assert_eq!(rig.queue.publish(), 1);
        assert_eq!(rig.guest.take(1), Some((id, 0, false)));
    }
}

#[test]
fn garbage_in_the_availability_bits_is_a_descriptor_not_available() {
    for wrap in [true, false] {
        let mut rig = Rig::at(4, PACKED, at(1, wrap));
        for bits in [0, 0x8080, if wrap { 0x8000 } else { 0x80 }] {
            rig.guest.write(1, BUFFERS, 16, 0, bits | 0x7f7f);
            assert!(rig.nothing() && !rig.queue.has_available());
        }
        // All other unknown flags are ignored (row D21).
        let bits = if wrap { 0x80 } else { 0x8000 };
        rig.guest.write(1, BUFFERS, 16, 0, bits | 0x7f78);
        let head = rig.pop();
        rig.queue.push(head, 0);
    }
}

#[test]
fn a9_descriptors_rewritten_in_flight_change_nothing() {
    let mut rig = Rig::new(4, PACKED);
    rig.guest.add_chain(5, 3);
    let head = rig.pop();
    for index in 0..4 {
        rig.guest.write(index, u64::MAX, u32::MAX, 77, 0xffff);
    }
    rig.queue.push(head, 1);
    rig.queue.publish();
    assert_eq!(rig.guest.take(3), Some((5, 1, true)));
}

#[test]
fn unpop_at_the_end_of_the_ring_gives_the_chain_back_to_the_next_pop() {
    for features in [PACKED, IN_ORDER] {
        for start in [at(7, true), at(7, false)] {
            let mut rig = Rig::at(8, features, start);
            rig.guest.add_chain(1, 1);
            rig.guest.add_chain(2, 3);
            let first = rig.pop();
            let base = rig.queue.base();
            let second = rig.pop();
            let first = rig.queue.unpop(first).unwrap_err();
            rig.queue.unpop(second).unwrap();
            assert_eq!(rig.queue.base(), base);
            let first = rig.queue.unpop(first).unwrap_err();
            rig.queue.push(first, 0);
            assert_eq!(rig.queue.in_flight(), 0);
            let second = rig.pop();
            rig.queue.push(second, 0);
            assert_eq!(rig.queue.publish(), 2);
            if features.in_order {
                // The first has nothing to write, so it is written in full.
                assert_eq!(rig.guest.take(4), Some((2, 0, false)));
            } else {
                assert_eq!(rig.guest.take(1), Some((1, 0, false)));
                assert_eq!(rig.guest.take(3), Some((2, 0, false)));
            }
        }
    }
}

#[test]
fn unpop_over_the_wrap_undoes_the_flip() {
    let mut rig = Rig::at(4, PACKED, at(3, true));
    rig.guest.add_chain(1, 3);
    let before = rig.queue.base();
    let head = rig.pop();
    rig.queue.unpop(head).unwrap();
    assert_eq!(rig.queue.base(), before);
    assert_eq!(
        (rig.queue.in_flight(), rig.queue.has_available()),
        (0, true)
    );
    let head = rig.pop();
    rig.queue.push(head, 0);
    rig.queue.publish();
    assert_eq!(rig.guest.take(3), Some((1, 0, false)));
}

#[test]
fn in_order_a_run_is_one_descriptor_at_its_start_with_the_id_of_its_end() {
    let mut rig = Rig::at(8, IN_ORDER, at(5, true));
    for id in [10, 11, 12] {
        rig.guest.add_chain(id, 2);
    }
    let mut heads: Vec<_> = (0..3).map(|_| rig.pop()).collect();
    rig.queue.push(heads.remove(1), 16);
    rig.queue.push(heads.remove(1), 4);
    assert_eq!((rig.queue.publish(), rig.queue.in_flight()), (0, 1));
    assert_eq!(rig.guest.take(2), None);
    rig.queue.push(heads.remove(0), 16);
    assert_eq!(rig.queue.publish(), 3);
    // One for all three: the first two are written in full.
    assert_eq!(rig.guest.take(6), Some((12, 4, true)));
    assert_eq!(rig.guest.take(1), None);
    let expected = RingBase::Packed {
        avail: at(3, false),
        used: at(3, false),
    };
    assert_eq!(rig.queue.base(), expected);
}

#[test]
fn in_order_a_chain_written_short_ends_its_run() {
    let mut rig = Rig::new(8, IN_ORDER);
    for id in [10, 11, 12] {
        rig.guest.add_chain(id, 2);
    }
    let heads: Vec<_> = (0..3).map(|_| rig.pop()).collect();
    for (head, len) in heads.into_iter().zip([16, 15, 16]) {
        rig.queue.push(head, len);
    }
    assert_eq!(rig.queue.publish(), 3);
    assert_eq!(rig.guest.take(4), Some((11, 15, true)));
    assert_eq!(rig.guest.take(2), Some((12, 16, true)));
}

#[test]
fn in_order_an_id_is_in_flight_until_the_driver_has_it_back() {
    let mut rig = Rig::new(8, IN_ORDER);
    rig.guest.add_chain(1, 1);
    rig.guest.add_chain(2, 1);
    let first = rig.pop();
    let second = rig.pop();
    rig.queue.push(second, 0);
    assert_eq!(rig.queue.publish(), 0);
    rig.guest.add_chain(2, 1);
    let fault = rig.ring_fault();
    assert_eq!(fault, RingFault::BufferIdInFlight { id: 2 });
    rig.queue.push(first, 0);
    assert_eq!(rig.queue.publish(), 2);
}
