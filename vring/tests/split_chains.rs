//! Rows D that only a split ring can express: `next` is an index, and a table has links.

mod rig;

use rig::{BUFFERS, Entry, INDIRECT, PLAIN, Rig, TABLE, ends, segment};
use vm_memory::{Bytes, GuestAddress};
use vring::ChainFault;
use vring::driver::{F_INDIRECT, F_NEXT, F_WRITE};

#[test]
fn d1_next_beyond_the_table_returns_the_chain() {
    for next in [8, 9, u16::MAX] {
        let mut rig = Rig::new(8, PLAIN);
        rig.split().write_desc(0, BUFFERS, 16, F_NEXT, next);
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
        rig.split().write_desc(3, BUFFERS, 16, F_NEXT, 3);
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
            rig.split()
                .write_desc(i, BUFFERS, 0, F_NEXT, (i + 1) % 8192);
        }
        rig.offer(77);
        rig.chain_fault()
    });
    assert_eq!(fault, ChainFault::TooManyDescriptors { limit: 8192 });
}

#[test]
fn d3_chain_longer_than_the_queue_is_returned() {
    let mut rig = Rig::new(8, PLAIN);
    for i in 0..8 {
        rig.split().write_desc(i, BUFFERS, 16, F_NEXT, (i + 1) % 8);
    }
    rig.offer(0);
    assert_eq!(
        rig.chain_fault(),
        ChainFault::TooManyDescriptors { limit: 8 }
    );
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
fn d17_direct_descriptors_then_an_indirect_one_are_valid() {
    let mut rig = Rig::new(8, INDIRECT);
    rig.write_plain_table(TABLE, 2, 32);
    rig.split().write_desc(0, BUFFERS, 16, F_NEXT, 1);
    rig.split().write_desc(1, TABLE, 32, F_INDIRECT, 0);
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
    rig.write_plain_table(TABLE, 1, 16);
    rig.split().write_desc(0, BUFFERS, 16, F_NEXT | F_WRITE, 1);
    rig.split().write_desc(1, TABLE, 16, F_INDIRECT, 0);
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
            rig.write_plain_table(table, 4, 0);
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
fn d20_longest_chain_there_can_be_fits_the_storage() {
    let mut rig = Rig::new(8, INDIRECT);
    rig.write_plain_table(TABLE, 1024, 1);
    for i in 0..7 {
        rig.split().write_desc(i, BUFFERS, 1, F_NEXT, i + 1);
    }
    rig.split().write_desc(7, TABLE, 16 * 1024, F_INDIRECT, 0);
    rig.offer(0);
    let head = rig.pop_head();
    assert_eq!(rig.chain.readable().len(), 7 + 1024);
    rig.queue.push(head, 0);
}

#[test]
fn r15_chain_of_three_on_a_queue_of_one_is_returned() {
    let mut rig = Rig::new(1, INDIRECT);
    rig.split().write_desc(0, BUFFERS, 16, F_NEXT, 1);
    rig.offer(0);
    assert_eq!(
        rig.chain_fault(),
        ChainFault::NextOutOfRange { next: 1, limit: 1 }
    );
    rig.split().write_desc(0, BUFFERS, 16, F_NEXT, 0);
    rig.offer(0);
    assert_eq!(
        rig.chain_fault(),
        ChainFault::TooManyDescriptors { limit: 1 }
    );
}
