//! Rows D where the packed format has an answer of its own: no links, one kind of descriptor in a
//! list, and a chain's end is where the next one starts.

mod rig;

use rig::{BUFFERS, INDIRECT, PLAIN, Rig, TABLE, ends, packed, segment};
use vm_memory::GuestAddress;
use vring::driver::{F_INDIRECT, F_NEXT, F_WRITE};
use vring::{ChainFault, MAX_INDIRECT_DESCRIPTORS, RingFault};

#[test]
fn d1_there_is_no_next_to_be_out_of_range() {
    // The field that is `next` in a split ring is the flags here, and the id where flags were.
    let mut rig = Rig::new(8, packed(INDIRECT));
    rig.write_table(TABLE, &[(BUFFERS, 16, F_NEXT), (BUFFERS, 16, F_NEXT)]);
    rig.offer_table(TABLE, 32, 0);
    let head = rig.pop_head();
    assert_eq!(rig.chain.readable(), [segment(BUFFERS, 16); 2]);
    rig.queue.push(head, 0);
}

#[test]
fn d2_a_chain_without_an_end_stops_the_ring_after_queue_size_steps() {
    let fault = ends(|| {
        let mut rig = Rig::starting_at(8192, packed(PLAIN), 8190);
        rig.offer_raw(&vec![(BUFFERS, 0, F_NEXT); 8192]);
        rig.ring_fault()
    });
    assert_eq!(fault, RingFault::ChainOverrun { limit: 8192 });
}

#[test]
fn d3_a_chain_longer_than_the_queue_stops_the_ring() {
    // A list cannot be longer than the ring: its ninth descriptor is the first once more.
    let mut rig = Rig::new(8, packed(PLAIN));
    rig.offer_raw(&[(BUFFERS, 16, F_NEXT); 8]);
    assert_eq!(rig.ring_fault(), RingFault::ChainOverrun { limit: 8 });
    assert_eq!((rig.queue.in_flight(), rig.queue.publish()), (0, 0));
    assert_eq!(rig.guest.poll_used(), None);
}

#[test]
fn d12_indirect_in_a_table_is_a_reserved_bit_and_ignored() {
    let mut rig = Rig::new(8, packed(INDIRECT));
    rig.write_table(
        TABLE,
        &[(TABLE, 16, F_INDIRECT), (TABLE, 16, F_INDIRECT | F_WRITE)],
    );
    rig.offer_table(TABLE, 32, 0);
    let head = rig.pop_head();
    assert_eq!(rig.chain.readable(), [segment(TABLE, 16)]);
    assert_eq!(rig.chain.writable(), [segment(TABLE, 16)]);
    rig.queue.push(head, 0);
}

#[test]
fn d17_direct_descriptors_then_an_indirect_one_return_the_chain() {
    // Unlike in a split ring a list has descriptors of one kind (§2.8.5, §2.8.19).
    let mut rig = Rig::new(8, packed(INDIRECT));
    rig.write_plain_table(TABLE, 2, 32);
    rig.offer_raw(&[(BUFFERS, 16, F_NEXT), (TABLE, 32, F_INDIRECT)]);
    assert_eq!(rig.chain_fault(), ChainFault::IndirectAmongDirect);
    assert_eq!(rig.guest.free(), 8);
    rig.assert_ring_goes_on();
}

#[test]
fn d18_links_of_a_table_are_not_followed() {
    let fault = ends(|| {
        let mut rig = Rig::new(8, packed(INDIRECT));
        rig.write_table(TABLE, &[(BUFFERS, 0, F_NEXT); 4]);
        rig.offer_table(TABLE, 64, 0);
        let head = rig.pop_head();
        assert!(rig.chain.readable().is_empty());
        rig.complete(head, 0);
        rig.queue.fault()
    });
    assert_eq!(fault, None);
}

#[test]
fn d20_longest_chain_there_can_be_fits_the_storage() {
    let mut rig = Rig::new(1, packed(INDIRECT));
    rig.write_plain_table(TABLE, MAX_INDIRECT_DESCRIPTORS, 1);
    rig.offer_table(TABLE, 16 * u32::from(MAX_INDIRECT_DESCRIPTORS), 0);
    let head = rig.pop_head();
    let longest = usize::from(MAX_INDIRECT_DESCRIPTORS);
    assert_eq!(rig.chain.readable().len(), longest);
    rig.queue.push(head, 0);

    let mut rig = Rig::new(4096, packed(PLAIN));
    let longest = vec![segment(BUFFERS, 1); 4096];
    rig.guest.add_chain(&longest, &[]).unwrap();
    rig.guest.publish();
    let head = rig.pop_head();
    assert_eq!(rig.chain.readable(), longest);
    rig.queue.push(head, 0);
}

#[test]
fn r15_chain_of_three_on_a_queue_of_one_stops_the_ring() {
    let mut rig = Rig::new(1, packed(INDIRECT));
    rig.offer_raw(&[(BUFFERS, 16, F_NEXT)]);
    assert_eq!(rig.ring_fault(), RingFault::ChainOverrun { limit: 1 });
    rig.reset();
    let three = [segment(BUFFERS, 16); 3];
    let table = GuestAddress(TABLE);
    rig.guest.add_indirect(table, &three, &[]).unwrap();
    rig.guest.publish();
    let head = rig.pop_head();
    assert_eq!(rig.chain.readable(), three);
    rig.queue.push(head, 0);
}
