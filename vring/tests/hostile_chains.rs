//! Rows D: descriptor chains no driver should build, and some that look wrong and are not, in rings
//! of either format. What only one of them can express is in `split_chains` and `packed_chains`.

mod rig;

use rig::{BUFFERS, END, INDIRECT, PLAIN, RING, Rig, SEAM, TABLE, both, segment, size};
use vm_memory::{Bytes, GuestAddress};
use vring::driver::{F_INDIRECT, F_NEXT, F_WRITE};
use vring::{Chain, ChainFault, MAX_INDIRECT_DESCRIPTORS, PopError, RingFeatures};

/// Offers the chain, expects the fault, and then a ring that goes on.
fn returned(features: RingFeatures, descriptors: &[(u64, u32, u16)], fault: ChainFault) {
    let mut rig = Rig::new(8, features);
    rig.offer_raw(descriptors);
    assert_eq!(rig.chain_fault(), fault, "{features:?}");
    let (readable, writable) = (rig.chain.readable(), rig.chain.writable());
    assert!(readable.is_empty() && writable.is_empty(), "{features:?}");
    assert_eq!(rig.guest.free(), 8);
    rig.assert_ring_goes_on();
}

#[test]
fn d3_chain_of_exactly_queue_size_is_served() {
    for features in both(PLAIN) {
        let mut rig = Rig::new(8, features);
        rig.guest
            .add_chain(&[segment(BUFFERS, 16); 8], &[])
            .unwrap();
        rig.guest.publish();
        let head = rig.pop_head();
        assert_eq!(rig.chain.readable().len(), 8);
        rig.complete(head, 0);
        assert!(rig.guest.poll_used().unwrap().expected);
        rig.assert_ring_goes_on();
    }
}

#[test]
fn d4_huge_length_is_left_to_whoever_translates_the_buffer() {
    for features in both(PLAIN) {
        let mut rig = Rig::new(8, features);
        rig.offer_raw(&[(BUFFERS, u32::MAX, 0)]);
        let head = rig.pop_head();
        assert_eq!(rig.chain.readable(), [segment(BUFFERS, u32::MAX)]);
        rig.queue.push(head, 0);
    }
}

#[test]
fn d5_copying_from_a_hole_is_an_error_and_address_zero_is_not() {
    for features in both(PLAIN) {
        let mut rig = Rig::new(8, features);
        rig.offer_raw(&[(0, 16, F_NEXT), (END, 16, 0)]);
        let head = rig.pop_head();
        let mut buf = [0; 32];
        let error = rig
            .chain
            .copy_from_readable(&*rig.memory, 0, &mut buf)
            .unwrap_err();
        assert_eq!((error.address, error.completed), (END, 16));
        rig.queue.push(head, 0);
    }
}

#[test]
fn d6_buffer_that_wraps_the_address_space_returns_the_chain() {
    for features in both(PLAIN) {
        for (address, len) in [(u64::MAX, 1), (u64::MAX - 15, 16), (u64::MAX - 5, u32::MAX)] {
            let fault = ChainFault::BufferOverflow { address, len };
            returned(features, &[(address, len, F_WRITE)], fault);
        }
    }
}

#[test]
fn d8_zero_length_descriptors_are_left_out() {
    for features in both(PLAIN) {
        let mut rig = Rig::new(8, features);
        rig.offer_raw(&[
            (u64::MAX, 0, F_NEXT | F_WRITE),
            (BUFFERS, 16, F_NEXT),
            (BUFFERS, 0, F_NEXT),
            (BUFFERS, 1, F_WRITE),
        ]);
        let head = rig.pop_head();
        assert_eq!(rig.chain.readable(), [segment(BUFFERS, 16)]);
        assert_eq!(rig.chain.writable(), [segment(BUFFERS, 1)]);
        rig.queue.push(head, 0);
    }
}

#[test]
fn d8_chain_of_nothing_but_empty_descriptors_is_an_empty_chain() {
    for features in both(PLAIN) {
        let mut rig = Rig::new(8, features);
        rig.offer_raw(&[(BUFFERS, 0, F_NEXT), (BUFFERS, 0, 0)]);
        let head = rig.pop_head();
        assert!(rig.chain.readable().is_empty() && rig.chain.writable().is_empty());
        rig.complete(head, 0);
        assert!(rig.guest.poll_used().unwrap().expected);
        rig.assert_ring_goes_on();
    }
}

#[test]
fn d9_more_than_four_gib_in_total_returns_the_chain() {
    for features in both(PLAIN) {
        let chain = [
            (0, u32::MAX, F_NEXT),
            (0, 1, F_NEXT | F_WRITE),
            (0, 1, F_WRITE),
        ];
        returned(features, &chain, ChainFault::TooManyBytes);
    }
}

#[test]
fn d10_readable_after_writable_returns_the_chain() {
    for features in both(PLAIN) {
        let chain = [(BUFFERS, 16, F_NEXT | F_WRITE), (BUFFERS, 16, 0)];
        returned(features, &chain, ChainFault::ReadableAfterWritable);
    }
}

#[test]
fn d11_indirect_without_the_feature_returns_the_chain() {
    for features in both(PLAIN) {
        // Alone, after a direct descriptor, and with NEXT besides.
        let table = (TABLE, 32, F_INDIRECT);
        let direct = (BUFFERS, 16, F_NEXT);
        let fault = ChainFault::IndirectNotNegotiated;
        returned(features, &[table], fault);
        returned(features, &[direct, table], fault);
        let with_next = (TABLE, 32, F_INDIRECT | F_NEXT);
        returned(features, &[with_next, (BUFFERS, 16, 0)], fault);
    }
}

#[test]
fn d13_indirect_with_next_returns_the_chain() {
    for features in both(INDIRECT) {
        let mut rig = Rig::new(8, features);
        rig.write_plain_table(TABLE, 2, 16);
        rig.offer_raw(&[(TABLE, 32, F_INDIRECT | F_NEXT), (BUFFERS, 16, 0)]);
        assert_eq!(rig.chain_fault(), ChainFault::IndirectAndNext);
        assert_eq!(rig.guest.free(), 8);
        rig.assert_ring_goes_on();
    }
}

#[test]
fn d14_table_without_whole_descriptors_returns_the_chain() {
    for features in both(INDIRECT) {
        for len in [0, 1, 15, 17, u32::MAX] {
            let fault = ChainFault::IndirectTableLength { len };
            returned(features, &[(TABLE, len, F_INDIRECT)], fault);
        }
    }
}

#[test]
fn d15_table_outside_memory_returns_the_chain() {
    for features in both(INDIRECT) {
        for address in [END, END - 16, u64::MAX - 31, u64::MAX - 15, END - 24] {
            let fault = ChainFault::IndirectTableUnmapped { address, len: 32 };
            returned(features, &[(address, 32, F_INDIRECT)], fault);
        }
    }
}

#[test]
fn d15_huge_table_returns_the_chain() {
    for features in both(INDIRECT) {
        let fault = ChainFault::IndirectTableTooLong {
            entries: 0x0fff_ffff,
        };
        returned(features, &[(TABLE, 0xffff_fff0, F_INDIRECT)], fault);
    }
}

#[test]
fn d16_indirect_with_write_flag_is_valid() {
    for features in both(INDIRECT) {
        let mut rig = Rig::new(8, features);
        rig.write_plain_table(TABLE, 3, 16);
        rig.offer_table(TABLE, 48, F_WRITE);
        let head = rig.pop_head();
        assert_eq!(rig.chain.readable(), [segment(BUFFERS, 16); 3]);
        assert!(rig.chain.writable().is_empty());
        rig.queue.push(head, 0);
    }
}

#[test]
fn d19_table_at_any_address_across_pages_and_regions_is_valid() {
    for features in both(INDIRECT) {
        for table in [
            TABLE + 0xff8,
            TABLE + 0xffc,
            TABLE + 0xfff,
            SEAM - 16,
            SEAM - 24,
            SEAM - 1,
            END - 48,
        ] {
            let mut rig = Rig::new(8, features);
            rig.write_plain_table(table, 3, 16);
            rig.offer_table(table, 48, 0);
            let head = rig.pop_head();
            assert_eq!(
                rig.chain.readable(),
                [segment(BUFFERS, 16); 3],
                "table at {table:#x}"
            );
            rig.queue.push(head, 0);
        }
    }
}

#[test]
fn d19_table_over_the_rings_is_read_like_any_other() {
    for features in both(INDIRECT) {
        let mut rig = Rig::new(8, features);
        let areas = rig.config.addresses;
        // Whatever it means, it ends and the ring goes on.
        for (address, len) in [
            (areas.descriptor_area, 16 * 8),
            (areas.driver_area, 16),
            (areas.device_area, 16),
        ] {
            rig.offer_table(address.0, len, 0);
            match rig.pop() {
                Ok(Some(head)) | Err(PopError::Chain { head, .. }) => rig.complete(head, 0),
                other => panic!("{other:?}"),
            }
            let used = rig.guest.poll_used().unwrap();
            assert!(used.expected && used.len == 0);
            rig.assert_ring_goes_on();
        }
    }
}

#[test]
fn d20_table_longer_than_the_queue_is_served_up_to_the_named_limit() {
    for features in both(INDIRECT) {
        let mut rig = Rig::new(8, features);
        let entries = MAX_INDIRECT_DESCRIPTORS;
        rig.write_plain_table(TABLE, entries, 1);
        rig.offer_table(TABLE, 16 * u32::from(entries), 0);
        let head = rig.pop_head();
        assert_eq!(rig.chain.readable().len(), usize::from(entries));
        rig.complete(head, 0);

        let entries = u32::from(entries) + 1;
        let fault = ChainFault::IndirectTableTooLong { entries };
        returned(features, &[(TABLE, 16 * entries, F_INDIRECT)], fault);
    }
}

#[test]
fn d21_unknown_flag_bits_are_ignored() {
    for features in both(PLAIN) {
        let mut rig = Rig::new(8, features);
        let unknown = !(F_NEXT | F_WRITE | F_INDIRECT);
        rig.offer_raw(&[
            (BUFFERS, 16, F_NEXT | unknown),
            (BUFFERS, 1, F_WRITE | unknown),
        ]);
        let head = rig.pop_head();
        assert_eq!(rig.chain.readable(), [segment(BUFFERS, 16)]);
        assert_eq!(rig.chain.writable(), [segment(BUFFERS, 1)]);
        rig.queue.push(head, 0);
    }
}

#[test]
fn d22_buffer_on_top_of_the_rings_harms_only_the_guest() {
    for features in both(PLAIN) {
        let mut rig = Rig::new(8, features);
        let end = rig.config.addresses.device_area.0 + 4;
        let len = u32::try_from(end - RING).unwrap();
        rig.guest.add_chain(&[], &[segment(RING, len)]).unwrap();
        rig.guest.publish();
        let head = rig.pop_head();
        let before = outside_ring(&rig);
        let junk = vec![0xff; usize::try_from(len).unwrap()];
        rig.chain.copy_to_writable(&*rig.memory, 0, &junk).unwrap();
        rig.complete(head, len);
        // The next descriptors or the index are nonsense now: no matter what the device makes of
        // them, it ends and stays inside the ring.
        for _ in 0..20 {
            match rig.pop() {
                Ok(Some(head)) | Err(PopError::Chain { head, .. }) => rig.queue.push(head, 0),
                Ok(None) | Err(_) => {}
            }
            rig.queue.publish();
            rig.queue.should_notify();
            rig.queue.enable_notification();
            rig.queue.disable_notification();
        }
        assert!(outside_ring(&rig) == before);
    }
}

/// All bytes of memory that are in no area of a ring of 8, of either format.
fn outside_ring(rig: &Rig) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(END).unwrap()];
    rig.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    let start = usize::try_from(RING).unwrap();
    bytes.drain(start..start + 0x200);
    bytes
}

#[test]
fn d23_buffers_that_alias_one_another_are_copied_in_order() {
    for features in both(PLAIN) {
        let mut rig = Rig::new(8, features);
        let buffer = segment(BUFFERS, 4);
        rig.guest.add_chain(&[buffer], &[buffer, buffer]).unwrap();
        rig.guest.publish();
        let head = rig.pop_head();
        rig.chain
            .copy_to_writable(&*rig.memory, 0, &[1, 2, 3, 4, 5, 6, 7, 8])
            .unwrap();
        let mut back = [0; 4];
        rig.chain
            .copy_from_readable(&*rig.memory, 0, &mut back)
            .unwrap();
        assert_eq!(back, [5, 6, 7, 8]);
        rig.queue.push(head, 8);
    }
}

#[test]
fn d24_descriptor_of_all_ones_returns_the_chain() {
    for (features, fault) in [
        (PLAIN, ChainFault::IndirectNotNegotiated),
        (INDIRECT, ChainFault::IndirectAndNext),
    ] {
        for features in both(features) {
            let ones = (u64::MAX, u32::MAX, u16::MAX);
            returned(features, &[ones, (BUFFERS, 16, 0)], fault);
        }
    }
}

#[test]
fn d25_order_and_total_hold_across_the_entries_of_a_table() {
    for features in both(INDIRECT) {
        for (entries, fault) in [
            (
                [(BUFFERS, 16, F_WRITE), (BUFFERS, 16, 0)],
                ChainFault::ReadableAfterWritable,
            ),
            (
                [(0, u32::MAX, 0), (0, 2, F_WRITE)],
                ChainFault::TooManyBytes,
            ),
            (
                [(BUFFERS, 16, 0), (u64::MAX, 1, F_WRITE)],
                ChainFault::BufferOverflow {
                    address: u64::MAX,
                    len: 1,
                },
            ),
        ] {
            let mut rig = Rig::new(8, features);
            rig.write_table(TABLE, &entries);
            rig.offer_table(TABLE, 32, 0);
            assert_eq!(rig.chain_fault(), fault);
            rig.assert_ring_goes_on();
        }
    }
}

#[test]
fn d26_table_that_the_request_overwrites_has_been_read_before() {
    for features in both(INDIRECT) {
        let mut rig = Rig::new(8, features);
        let entries = [(BUFFERS, 16, 0), (TABLE, 32, F_WRITE)];
        rig.write_table(TABLE, &entries);
        rig.offer_table(TABLE, 32, 0);
        let head = rig.pop_head();
        let written = rig
            .chain
            .copy_to_writable(&*rig.memory, 0, &[0xff; 64])
            .unwrap();
        assert_eq!(written, 32);
        assert_eq!(rig.chain.readable(), [segment(BUFFERS, 16)]);
        assert_eq!(rig.chain.writable(), [segment(TABLE, 32)]);
        rig.complete(head, 32);
        assert!(rig.guest.poll_used().unwrap().expected);
    }
}

#[test]
fn d27_the_same_table_for_every_chain_is_read_for_each() {
    for features in both(INDIRECT) {
        let mut rig = Rig::new(8, features);
        rig.write_plain_table(TABLE, MAX_INDIRECT_DESCRIPTORS, 1);
        for _ in 0..8 {
            rig.offer_table(TABLE, 16 * u32::from(MAX_INDIRECT_DESCRIPTORS), 0);
        }
        let heads = rig.pop_all();
        assert_eq!(heads.len(), 8);
        for head in heads {
            rig.queue.push(head, 0);
        }
        assert_eq!(rig.queue.publish(), 8);
    }
}

#[test]
fn r15_chain_on_a_queue_of_one_is_served_if_indirect() {
    for features in both(INDIRECT) {
        let mut rig = Rig::new(1, features);
        for _ in 0..3 {
            let id = rig
                .guest
                .add_indirect(
                    GuestAddress(TABLE),
                    &[segment(BUFFERS, 16), segment(BUFFERS, 512)],
                    &[segment(BUFFERS, 1)],
                )
                .unwrap();
            rig.guest.publish();
            let popped = rig.pop_head();
            assert_eq!(popped.index(), 0);
            assert_eq!(
                (rig.chain.readable().len(), rig.chain.writable().len()),
                (2, 1)
            );
            rig.complete(popped, 1);
            let used = rig.guest.poll_used().unwrap();
            assert_eq!((used.id, used.len), (u32::from(id), 1));
        }
    }
}

#[test]
fn storage_for_a_smaller_queue_faults_instead_of_growing() {
    for features in both(INDIRECT) {
        let mut small = Chain::for_queue(size(1));
        let mut rig = Rig::new(2048, features);
        rig.guest
            .add_chain(&vec![segment(BUFFERS, 1); 1025], &[])
            .unwrap();
        rig.guest.publish();
        match rig.queue.pop(&mut small) {
            Err(PopError::Chain { head, fault }) => {
                assert_eq!(fault, ChainFault::StorageTooSmall);
                rig.complete(head, 0);
            }
            other => panic!("{other:?}"),
        }
        assert!(rig.guest.poll_used().unwrap().expected);
        rig.assert_ring_goes_on();
    }
}
