//! Rows D: descriptor chains no driver should build, and some that look wrong and are not.

mod rig;

use rig::{BUFFERS, END, Entry, INDIRECT, PLAIN, RING, Rig, SEAM, TABLE, ends, segment, size};
use vm_memory::{Bytes, GuestAddress};
use vring::driver::{F_INDIRECT, F_NEXT, F_WRITE};
use vring::{Chain, ChainFault, MAX_INDIRECT_DESCRIPTORS, PopError, SplitQueue};

#[test]
fn d1_next_beyond_the_table_returns_the_chain() {
    for next in [8, 9, u16::MAX] {
        let mut rig = Rig::new(8, PLAIN);
        rig.guest.write_desc(0, BUFFERS, 16, F_NEXT, next);
        rig.offer(0);
        assert_eq!(
            rig.chain_fault(),
            ChainFault::NextOutOfRange { next, limit: 8 }
        );
        rig.assert_ring_goes_on();
    }
}

#[test]
fn d2_self_loop_ends_after_queue_size_steps() {
    let fault = ends(|| {
        let mut rig = Rig::new(8, PLAIN);
        rig.guest.write_desc(3, BUFFERS, 16, F_NEXT, 3);
        rig.offer(3);
        let fault = rig.chain_fault();
        rig.assert_ring_goes_on();
        fault
    });
    assert_eq!(fault, ChainFault::TooManyDescriptors { limit: 8 });
}

#[test]
fn d2_loop_of_empty_descriptors_over_a_large_queue_ends() {
    let fault = ends(|| {
        let mut rig = Rig::new(8192, PLAIN);
        for i in 0..8192 {
            rig.guest.write_desc(i, BUFFERS, 0, F_NEXT, (i + 1) % 8192);
        }
        rig.offer(77);
        rig.chain_fault()
    });
    assert_eq!(fault, ChainFault::TooManyDescriptors { limit: 8192 });
}

#[test]
fn d3_chain_of_exactly_queue_size_is_served() {
    let mut rig = Rig::new(8, PLAIN);
    rig.guest
        .add_chain(&[segment(BUFFERS, 16); 8], &[])
        .unwrap();
    rig.guest.publish();
    let head = rig.pop_head();
    assert_eq!(rig.chain.readable().len(), 8);
    rig.queue.push(head, 0);
}

#[test]
fn d3_chain_longer_than_the_queue_is_returned() {
    let mut rig = Rig::new(8, PLAIN);
    for i in 0..8 {
        rig.guest.write_desc(i, BUFFERS, 16, F_NEXT, (i + 1) % 8);
    }
    rig.offer(0);
    assert_eq!(
        rig.chain_fault(),
        ChainFault::TooManyDescriptors { limit: 8 }
    );
    rig.assert_ring_goes_on();
}

#[test]
fn d4_huge_length_is_left_to_whoever_translates_the_buffer() {
    let mut rig = Rig::new(8, PLAIN);
    rig.guest.write_desc(0, BUFFERS, u32::MAX, 0, 0);
    rig.offer(0);
    let head = rig.pop_head();
    assert_eq!(rig.chain.readable(), [segment(BUFFERS, u32::MAX)]);
    rig.queue.push(head, 0);
}

#[test]
fn d5_copying_from_a_hole_is_an_error_and_address_zero_is_not() {
    let mut rig = Rig::new(8, PLAIN);
    rig.guest.write_desc(0, 0, 16, F_NEXT, 1);
    rig.guest.write_desc(1, END, 16, 0, 0);
    rig.offer(0);
    let head = rig.pop_head();
    let mut buf = [0; 32];
    let error = rig
        .chain
        .copy_from_readable(&*rig.memory, 0, &mut buf)
        .unwrap_err();
    assert_eq!((error.address, error.completed), (END, 16));
    rig.queue.push(head, 0);
}

#[test]
fn d6_buffer_that_wraps_the_address_space_returns_the_chain() {
    for (address, len) in [(u64::MAX, 1), (u64::MAX - 15, 16), (u64::MAX - 5, u32::MAX)] {
        let mut rig = Rig::new(8, PLAIN);
        rig.guest.write_desc(0, address, len, F_WRITE, 0);
        rig.offer(0);
        assert_eq!(
            rig.chain_fault(),
            ChainFault::BufferOverflow { address, len }
        );
        rig.assert_ring_goes_on();
    }
}

#[test]
fn d8_zero_length_descriptors_are_left_out() {
    let mut rig = Rig::new(8, PLAIN);
    rig.guest.write_desc(0, u64::MAX, 0, F_NEXT | F_WRITE, 1);
    rig.guest.write_desc(1, BUFFERS, 16, F_NEXT, 2);
    rig.guest.write_desc(2, BUFFERS, 0, F_NEXT, 3);
    rig.guest.write_desc(3, BUFFERS, 1, F_WRITE, 0);
    rig.offer(0);
    let head = rig.pop_head();
    assert_eq!(rig.chain.readable(), [segment(BUFFERS, 16)]);
    assert_eq!(rig.chain.writable(), [segment(BUFFERS, 1)]);
    rig.queue.push(head, 0);
}

#[test]
fn d8_chain_of_nothing_but_empty_descriptors_is_an_empty_chain() {
    let mut rig = Rig::new(8, PLAIN);
    rig.guest.write_desc(0, BUFFERS, 0, F_NEXT, 1);
    rig.guest.write_desc(1, BUFFERS, 0, 0, 0);
    rig.offer(0);
    let head = rig.pop_head();
    assert!(rig.chain.readable().is_empty() && rig.chain.writable().is_empty());
    rig.queue.push(head, 0);
}

#[test]
fn d9_more_than_four_gib_in_total_returns_the_chain() {
    let mut rig = Rig::new(8, PLAIN);
    rig.guest.write_desc(0, 0, u32::MAX, F_NEXT, 1);
    rig.guest.write_desc(1, 0, 1, F_NEXT | F_WRITE, 2);
    rig.guest.write_desc(2, 0, 1, F_WRITE, 0);
    rig.offer(0);
    assert_eq!(rig.chain_fault(), ChainFault::TooManyBytes);
    rig.assert_ring_goes_on();
}

#[test]
fn d10_readable_after_writable_returns_the_chain() {
    let mut rig = Rig::new(8, PLAIN);
    rig.guest.write_desc(0, BUFFERS, 16, F_NEXT | F_WRITE, 1);
    rig.guest.write_desc(1, BUFFERS, 16, 0, 0);
    rig.offer(0);
    assert_eq!(rig.chain_fault(), ChainFault::ReadableAfterWritable);
    rig.assert_ring_goes_on();
}

#[test]
fn d11_indirect_without_the_feature_returns_the_chain() {
    let mut rig = Rig::new(8, PLAIN);
    rig::write_linked_table(&rig.memory, TABLE, 2, 16);
    rig.offer_table(TABLE, 32, 0);
    assert_eq!(rig.chain_fault(), ChainFault::IndirectNotNegotiated);
    rig.assert_ring_goes_on();
}

#[test]
fn d12_nested_indirect_returns_the_chain() {
    let mut rig = Rig::new(8, INDIRECT);
    let nested = Entry {
        address: TABLE,
        len: 16,
        flags: F_INDIRECT,
        next: 0,
    };
    rig.memory
        .write_slice(&nested.bytes(), GuestAddress(TABLE))
        .unwrap();
    rig.offer_table(TABLE, 16, 0);
    assert_eq!(rig.chain_fault(), ChainFault::IndirectNested);
    rig.assert_ring_goes_on();
}

#[test]
fn d13_indirect_with_next_returns_the_chain() {
    let mut rig = Rig::new(8, INDIRECT);
    rig::write_linked_table(&rig.memory, TABLE, 2, 16);
    rig.offer_table(TABLE, 32, F_NEXT);
    assert_eq!(rig.chain_fault(), ChainFault::IndirectAndNext);
    rig.assert_ring_goes_on();
}

#[test]
fn d14_table_without_whole_descriptors_returns_the_chain() {
    for len in [0, 1, 15, 17, u32::MAX] {
        let mut rig = Rig::new(8, INDIRECT);
        rig.offer_table(TABLE, len, 0);
        assert_eq!(rig.chain_fault(), ChainFault::IndirectTableLength { len });
        rig.assert_ring_goes_on();
    }
}

#[test]
fn d15_table_outside_memory_returns_the_chain() {
    for address in [END, END - 16, u64::MAX - 31, u64::MAX - 15, END - 24] {
        let mut rig = Rig::new(8, INDIRECT);
        rig.offer_table(address, 32, 0);
        assert_eq!(
            rig.chain_fault(),
            ChainFault::IndirectTableUnmapped { address, len: 32 },
            "table at {address:#x}"
        );
        rig.assert_ring_goes_on();
    }
}

#[test]
fn d15_huge_table_returns_the_chain() {
    let mut rig = Rig::new(8, INDIRECT);
    rig.offer_table(TABLE, 0xffff_fff0, 0);
    assert_eq!(
        rig.chain_fault(),
        ChainFault::IndirectTableTooLong {
            entries: 0x0fff_ffff
        }
    );
    rig.assert_ring_goes_on();
}

#[test]
fn d16_indirect_with_write_flag_is_valid() {
    let mut rig = Rig::new(8, INDIRECT);
    rig::write_linked_table(&rig.memory, TABLE, 3, 16);
    rig.offer_table(TABLE, 48, F_WRITE);
    let head = rig.pop_head();
    assert_eq!(rig.chain.readable(), [segment(BUFFERS, 16); 3]);
    assert!(rig.chain.writable().is_empty());
    rig.queue.push(head, 0);
}

#[test]
fn d17_direct_descriptors_then_an_indirect_one_are_valid() {
    let mut rig = Rig::new(8, INDIRECT);
    rig::write_linked_table(&rig.memory, TABLE, 2, 32);
    rig.guest.write_desc(0, BUFFERS, 16, F_NEXT, 1);
    rig.guest.write_desc(1, TABLE, 32, F_INDIRECT, 0);
    rig.offer(0);
    let head = rig.pop_head();
    assert_eq!(
        rig.chain.readable(),
        [
            segment(BUFFERS, 16),
            segment(BUFFERS, 32),
            segment(BUFFERS, 32)
        ]
    );
    rig.queue.push(head, 0);
}

#[test]
fn d17_order_and_total_are_checked_across_the_table() {
    let mut rig = Rig::new(8, INDIRECT);
    rig::write_linked_table(&rig.memory, TABLE, 1, 16);
    rig.guest.write_desc(0, BUFFERS, 16, F_NEXT | F_WRITE, 1);
    rig.guest.write_desc(1, TABLE, 16, F_INDIRECT, 0);
    rig.offer(0);
    assert_eq!(rig.chain_fault(), ChainFault::ReadableAfterWritable);
}

#[test]
fn d18_next_beyond_the_indirect_table_returns_the_chain() {
    // Both ways through a table: aligned, and at an odd address.
    for table in [TABLE, TABLE + 1] {
        let mut rig = Rig::new(8, INDIRECT);
        let entry = Entry {
            address: BUFFERS,
            len: 16,
            flags: F_NEXT,
            next: 2,
        };
        rig.memory
            .write_slice(&entry.bytes(), GuestAddress(table))
            .unwrap();
        rig.offer_table(table, 32, 0);
        assert_eq!(
            rig.chain_fault(),
            ChainFault::NextOutOfRange { next: 2, limit: 2 }
        );
        rig.assert_ring_goes_on();
    }
}

#[test]
fn d18_loop_in_an_indirect_table_ends_after_its_length() {
    for table in [TABLE, TABLE + 1] {
        let fault = ends(move || {
            let mut rig = Rig::new(8, INDIRECT);
            rig::write_linked_table(&rig.memory, table, 4, 0);
            let entry = Entry {
                address: BUFFERS,
                len: 0,
                flags: F_NEXT,
                next: 1,
            };
            rig.memory
                .write_slice(&entry.bytes(), GuestAddress(table + 48))
                .unwrap();
            rig.offer_table(table, 64, 0);
            rig.chain_fault()
        });
        assert_eq!(fault, ChainFault::TooManyDescriptors { limit: 4 });
    }
}

#[test]
fn d19_table_at_any_address_across_pages_and_regions_is_valid() {
    for table in [
        TABLE + 0xff8,
        TABLE + 0xffc,
        TABLE + 0xfff,
        SEAM - 16,
        SEAM - 24,
        SEAM - 1,
        END - 48,
    ] {
        let mut rig = Rig::new(8, INDIRECT);
        rig::write_linked_table(&rig.memory, table, 3, 16);
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

#[test]
fn d19_table_over_the_rings_is_read_like_any_other() {
    let mut rig = Rig::new(8, INDIRECT);
    // The table is the descriptor table itself, whose entry 0 is the indirect descriptor.
    rig.offer_table(RING, 16 * 8, 0);
    assert_eq!(rig.chain_fault(), ChainFault::IndirectNested);
    // And one over the available ring: whatever it means, it ends and the ring goes on.
    let available = rig.config.addresses.driver_area.0;
    rig.offer_table(available, 16, 0);
    match rig.pop() {
        Ok(Some(head)) | Err(PopError::Chain { head, .. }) => rig.queue.push(head, 0),
        other => panic!("{other:?}"),
    }
    rig.queue.publish();
    assert_eq!(rig.guest.poll_used().map(|used| used.len), Some(0));
    rig.assert_ring_goes_on();
}

#[test]
fn d20_table_longer_than_the_queue_is_served_up_to_the_named_limit() {
    let mut rig = Rig::new(8, INDIRECT);
    let entries = MAX_INDIRECT_DESCRIPTORS;
    rig::write_linked_table(&rig.memory, TABLE, entries, 1);
    rig.offer_table(TABLE, 16 * u32::from(entries), 0);
    let head = rig.pop_head();
    assert_eq!(rig.chain.readable().len(), usize::from(entries));
    rig.queue.push(head, 0);
    rig.queue.publish();
    rig.guest.poll_used();

    let entries = u32::from(entries) + 1;
    rig.offer_table(TABLE, 16 * entries, 0);
    assert_eq!(
        rig.chain_fault(),
        ChainFault::IndirectTableTooLong { entries }
    );
    rig.assert_ring_goes_on();
}

#[test]
fn d20_longest_chain_there_can_be_fits_the_storage() {
    let mut rig = Rig::new(8, INDIRECT);
    rig::write_linked_table(&rig.memory, TABLE, 1024, 1);
    for i in 0..7 {
        rig.guest.write_desc(i, BUFFERS, 1, F_NEXT, i + 1);
    }
    rig.guest.write_desc(7, TABLE, 16 * 1024, F_INDIRECT, 0);
    rig.offer(0);
    let head = rig.pop_head();
    assert_eq!(rig.chain.readable().len(), 7 + 1024);
    rig.queue.push(head, 0);
}

#[test]
fn d21_unknown_flag_bits_are_ignored() {
    let mut rig = Rig::new(8, PLAIN);
    let unknown = !(F_NEXT | F_WRITE | F_INDIRECT);
    rig.guest.write_desc(0, BUFFERS, 16, F_NEXT | unknown, 1);
    rig.guest.write_desc(1, BUFFERS, 1, F_WRITE | unknown, 0);
    rig.offer(0);
    let head = rig.pop_head();
    assert_eq!(rig.chain.readable(), [segment(BUFFERS, 16)]);
    assert_eq!(rig.chain.writable(), [segment(BUFFERS, 1)]);
    rig.queue.push(head, 0);
}

#[test]
fn d22_buffer_on_top_of_the_rings_harms_only_the_guest() {
    let mut rig = Rig::new(8, PLAIN);
    let end = rig.config.addresses.device_area.0 + 6 + 8 * 8;
    let len = u32::try_from(end - RING).unwrap();
    let head = rig.guest.add_chain(&[], &[segment(RING, len)]).unwrap();
    rig.guest.publish();
    let token = rig.pop_head();
    let junk = vec![0xff; usize::try_from(len).unwrap()];
    rig.chain.copy_to_writable(&*rig.memory, 0, &junk).unwrap();
    rig.queue.push(token, len);
    rig.queue.publish();
    // The used ring is the device's own count again; the available index is now nonsense.
    assert_eq!(rig.guest.used_idx(), 1);
    assert_eq!(rig.guest.used_entry(0), (u32::from(head), len));
    rig.ring_fault();
}

#[test]
fn d23_buffers_that_alias_one_another_are_copied_in_order() {
    let mut rig = Rig::new(8, PLAIN);
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

#[test]
fn d24_descriptor_of_all_ones_returns_the_chain() {
    for (features, fault) in [
        (PLAIN, ChainFault::IndirectNotNegotiated),
        (INDIRECT, ChainFault::IndirectAndNext),
    ] {
        let mut rig = Rig::new(8, features);
        rig.guest
            .write_desc(0, u64::MAX, u32::MAX, u16::MAX, u16::MAX);
        rig.offer(0);
        assert_eq!(rig.chain_fault(), fault);
        rig.assert_ring_goes_on();
    }
}

#[test]
fn r15_chain_of_three_on_a_queue_of_one_is_returned_and_indirect_is_served() {
    let mut rig = Rig::new(1, INDIRECT);
    rig.guest.write_desc(0, BUFFERS, 16, F_NEXT, 1);
    rig.offer(0);
    assert_eq!(
        rig.chain_fault(),
        ChainFault::NextOutOfRange { next: 1, limit: 1 }
    );
    rig.guest.write_desc(0, BUFFERS, 16, F_NEXT, 0);
    rig.offer(0);
    assert_eq!(
        rig.chain_fault(),
        ChainFault::TooManyDescriptors { limit: 1 }
    );
    let head = rig
        .guest
        .add_indirect(
            GuestAddress(TABLE),
            &[segment(BUFFERS, 16), segment(BUFFERS, 512)],
            &[segment(BUFFERS, 1)],
        )
        .unwrap();
    rig.guest.publish();
    let popped = rig.pop_head();
    assert_eq!(popped.index(), head);
    assert_eq!(
        (rig.chain.readable().len(), rig.chain.writable().len()),
        (2, 1)
    );
    rig.queue.push(popped, 1);
}

#[test]
fn storage_for_a_smaller_queue_faults_instead_of_growing() {
    let mut small = Chain::for_queue(size(1));
    let mut rig = Rig::new(2048, INDIRECT);
    rig.guest
        .add_chain(&vec![segment(BUFFERS, 1); 1025], &[])
        .unwrap();
    rig.guest.publish();
    let queue: &mut SplitQueue<_> = &mut rig.queue;
    match queue.pop(&mut small) {
        Err(PopError::Chain { head, fault }) => {
            assert_eq!(fault, ChainFault::StorageTooSmall);
            queue.push(head, 0);
        }
        other => panic!("{other:?}"),
    }
}
