//! Chains there and back, and what a broken one costs.

use super::*;

#[test]
fn a_chain_goes_round_with_the_id_of_its_last_descriptor() {
    let mut rig = Rig::new(8, PACKED);
    assert!(rig.nothing() && !rig.queue.has_available());
    rig.guest.add_chain(0xabcd, 3);
    assert!(rig.queue.has_available());
    let head = rig.pop();
    assert!(head.index() < 8);
    let segment = |i: u64| Segment {
        addr: GuestAddress(BUFFERS + 16 * i),
        len: 16,
    };
    assert_eq!(rig.chain.readable(), [segment(0)]);
    assert_eq!(rig.chain.writable(), [segment(1), segment(2)]);
    assert!(rig.nothing());
    rig.queue.push(head, 20);
    assert_eq!(rig.guest.take(3), None, "staged only");
    assert_eq!(rig.queue.publish(), 1);
    assert_eq!(rig.queue.publish(), 0);
    assert_eq!(rig.guest.take(3), Some((0xabcd, 20, true)));
    let expected = RingBase::Packed {
        avail: at(3, true),
        used: at(3, true),
    };
    assert_eq!(rig.queue.base(), expected);
}

#[test]
fn nothing_written_is_a_used_descriptor_without_the_write_flag() {
    let mut rig = Rig::new(4, PACKED);
    rig.guest.add_chain(1, 1);
    let head = rig.pop();
    rig.queue.push(head, 0);
    rig.queue.publish();
    assert_eq!(rig.guest.take(1), Some((1, 0, false)));
}

#[test]
fn a_batch_is_handed_over_with_its_first_descriptor() {
    let mut rig = Rig::at(8, PACKED, at(6, false));
    for id in [5, 6, 7] {
        rig.guest.add_chain(id, 2);
    }
    let heads: Vec<_> = (0..3).map(|_| rig.pop()).collect();
    for (head, len) in heads.into_iter().rev().zip(1..) {
        rig.queue.push(head, len);
    }
    assert_eq!(rig.guest.take(2), None);
    assert_eq!(rig.queue.publish(), 3);
    let taken: Vec<_> = std::iter::from_fn(|| rig.guest.take(2)).collect();
    assert_eq!(taken, [(7, 1, true), (6, 2, true), (5, 3, true)]);
    let expected = RingBase::Packed {
        avail: at(4, true),
        used: at(4, true),
    };
    assert_eq!(rig.queue.base(), expected);
}

#[test]
fn a6_rings_of_every_size_are_served_over_many_passes() {
    for size in [1, 2, 4, 256, 32768u16] {
        for wrap in [true, false] {
            let mut rig = Rig::at(size, PACKED, at(size - 1, wrap));
            let lens = [1, size, size.div_ceil(2), 1, 3.min(size)];
            for round in 0..40u16 {
                let len = lens[usize::from(round % 5)];
                rig.guest.add_chain(round, len);
                let head = rig.pop();
                let segments = rig.chain.readable().len() + rig.chain.writable().len();
                assert_eq!(segments, usize::from(len));
                assert!(rig.nothing());
                rig.queue.push(head, 1);
                rig.queue.publish();
                assert_eq!(rig.guest.take(len), Some((round, 1, true)));
                assert_eq!(rig.guest.take(1), None, "size {size}, round {round}");
            }
        }
    }
}

#[test]
fn a10_a_full_ring_is_served_whole() {
    let mut rig = Rig::at(8, PACKED, at(3, false));
    for id in 0..8 {
        rig.guest.add_chain(id + 100, 1);
    }
    let heads: Vec<_> = (0..8).map(|_| rig.pop()).collect();
    assert!(rig.nothing());
    assert_eq!(rig.queue.in_flight(), 8);
    let mut slots: Vec<_> = heads.iter().map(Head::index).collect();
    slots.sort_unstable();
    assert_eq!(slots, (0..8).collect::<Vec<_>>());
    for head in heads {
        rig.queue.push(head, 0);
    }
    assert_eq!(rig.queue.publish(), 8);
    assert_eq!(std::iter::from_fn(|| rig.guest.take(1)).count(), 8);
}

#[test]
fn chains_of_a_table_are_read_in_its_order_and_its_flags_but_write_are_ignored() {
    let mut rig = Rig::new(2, PACKED);
    let table = 0x8_0000;
    let flags = [NEXT | INDIRECT, 0x8080, WRITE, WRITE | NEXT | INDIRECT];
    for (i, flags) in (0..).zip(flags) {
        let mut bytes = Vec::new();
        bytes.extend((BUFFERS + 64 * i).to_le_bytes());
        bytes.extend(8u32.to_le_bytes());
        bytes.extend([0xff, 0xff]);
        bytes.extend(flags.to_le_bytes());
        let at = GuestAddress(table + 16 * i);
        rig.guest.memory.write_slice(&bytes, at).unwrap();
    }
    // WRITE on the indirect descriptor is ignored (row D16).
    rig.guest.add(table, 64, 9, INDIRECT | WRITE);
    let head = rig.pop();
    let addresses = |segments: &[Segment]| -> Vec<u64> {
        segments
            .iter()
            .map(|segment| segment.addr.0 - BUFFERS)
            .collect()
    };
    assert_eq!(addresses(rig.chain.readable()), [0, 64]);
    assert_eq!(addresses(rig.chain.writable()), [128, 192]);
    rig.queue.push(head, 0);
    rig.queue.publish();
    assert_eq!(rig.guest.take(1), Some((9, 0, false)));
}

#[test]
fn a_broken_chain_is_passed_whole_and_the_ring_goes_on() {
    for (flags, fault) in [
        (WRITE, ChainFault::ReadableAfterWritable),
        (INDIRECT, ChainFault::IndirectAndNext),
    ] {
        let mut rig = Rig::at(8, PACKED, at(7, true));
        rig.guest.add(BUFFERS, 16, 0, NEXT | flags);
        rig.guest.add(BUFFERS, 16, 0, NEXT);
        rig.guest.add(BUFFERS, 16, 3, 0);
        rig.guest.add_chain(4, 1);
        match rig.queue.pop(&mut rig.chain) {
            Err(PopError::Chain { head, fault: found }) => {
                assert_eq!(found, fault);
                rig.queue.push(head, 0);
            }
            other => panic!("{other:?}"),
        }
        let head = rig.pop();
        rig.queue.push(head, 0);
        rig.queue.publish();
        assert_eq!(rig.guest.take(3), Some((3, 0, false)));
        assert_eq!(rig.guest.take(1), Some((4, 0, false)));
    }
}

#[test]
fn d11_an_indirect_descriptor_without_the_feature_costs_its_chain() {
    let mut rig = Rig::new(
        4,
        RingFeatures {
            indirect_desc: false,
            ..PACKED
        },
    );
    for (flags, descriptors) in [(INDIRECT, 1), (INDIRECT | NEXT, 2)] {
        rig.guest.add(BUFFERS, 16, 0, flags);
        if descriptors == 2 {
            rig.guest.add(BUFFERS, 16, 0, 0);
        }
        match rig.queue.pop(&mut rig.chain) {
            Err(PopError::Chain { head, fault }) => {
                assert_eq!(fault, ChainFault::IndirectNotNegotiated);
                rig.queue.push(head, 0);
            }
            other => panic!("{other:?}"),
        }
        rig.queue.publish();
        assert_eq!(rig.guest.take(descriptors), Some((0, 0, false)));
    }
}

#[test]
fn d17_an_indirect_descriptor_after_direct_ones_costs_its_chain() {
    let mut rig = Rig::new(4, PACKED);
    rig.guest.add(BUFFERS, 16, 0, NEXT);
    rig.guest.add(BUFFERS, 16, 7, INDIRECT);
    match rig.queue.pop(&mut rig.chain) {
        Err(PopError::Chain { head, fault }) => {
            assert_eq!(fault, ChainFault::IndirectAmongDirect);
            rig.queue.push(head, 0);
        }
        other => panic!("{other:?}"),
    }
    rig.queue.publish();
    assert_eq!(rig.guest.take(2), Some((7, 0, false)));
}
