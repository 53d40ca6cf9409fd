//! Rows A in a packed ring, where flags with wrap counters, positions and Buffer IDs take the place
//! of indices and heads, and rows P: what only a packed ring can express.

mod rig;

use rig::{BUFFERS, EVENT_IDX, INDIRECT, PLAIN, Rig, TABLE, base_after, ends, packed, segment};
use vm_memory::{Bytes, GuestAddress};
use vring::driver::{EVENT_DESC, EVENT_DISABLE, F_AVAIL, F_NEXT, F_USED, F_WRITE, RawDescriptor};
use vring::{RingFault, Segment};

const BUFFER: RawDescriptor = RawDescriptor {
    address: BUFFERS,
    len: 512,
    flags: 0,
};

fn buffers<const N: usize>() -> [Segment; N] {
    [segment(BUFFERS, 8); N]
}

#[test]
fn a1_more_descriptors_than_can_be_outstanding_are_a_ring_fault() {
    for start in [0, 5, 13] {
        let mut rig = Rig::starting_at(8, packed(PLAIN), start);
        let one = rig.guest.add_chain(&buffers::<1>(), &[]).unwrap();
        rig.guest.add_chain(&buffers::<7>(), &[]).unwrap();
        rig.guest.publish();
        let heads = rig.pop_all();
        assert_eq!(heads.len(), 2);
        // All eight are outstanding, and the guest writes over the first of them.
        rig.packed().add_raw_with_id(77, &[BUFFER]).unwrap();
        rig.guest.publish();
        assert!(rig.queue.has_available());
        assert_eq!(rig.ring_fault(), RingFault::ChainOverrun { limit: 0 });
        assert_eq!(rig.queue.in_flight(), 2);
        // What is in flight completes.
        for head in heads {
            rig.queue.push(head, 0);
        }
        assert_eq!(rig.queue.publish(), 2);
        assert!(rig.queue.should_notify());
        let used = rig.guest.poll_used().unwrap();
        assert_eq!((used.id, used.expected), (u32::from(one), true));
        assert_eq!((rig.pop(), rig.queue.in_flight()), (Ok(None), 0));
    }
}

#[test]
fn a1_a_chain_that_runs_into_those_outstanding_is_a_ring_fault() {
    let mut rig = Rig::new(8, packed(PLAIN));
    rig.guest.add_chain(&buffers::<6>(), &[]).unwrap();
    rig.guest.publish();
    let held = rig.pop_head();
    rig.offer_raw(&[(BUFFERS, 8, F_NEXT), (BUFFERS, 8, F_NEXT), (BUFFERS, 8, 0)]);
    assert_eq!(rig.ring_fault(), RingFault::ChainOverrun { limit: 2 });
    rig.complete(held, 0);
}

#[test]
fn a1_descriptors_pushed_and_not_published_are_outstanding_still() {
    let mut rig = Rig::new(4, packed(PLAIN));
    rig.guest.add_chain(&buffers::<4>(), &[]).unwrap();
    rig.guest.publish();
    let head = rig.pop_head();
    rig.queue.push(head, 0);
    rig.packed().add_raw_with_id(77, &[BUFFER]).unwrap();
    rig.guest.publish();
    assert_eq!(rig.ring_fault(), RingFault::ChainOverrun { limit: 0 });
    assert_eq!(rig.queue.publish(), 1);
}

#[test]
fn a1_descriptors_given_back_may_be_outstanding_again() {
    let mut rig = Rig::new(8, packed(PLAIN));
    for _ in 0..5 {
        for _ in 0..2 {
            rig.guest.add_chain(&buffers::<4>(), &[]).unwrap();
        }
        rig.guest.publish();
        let heads = rig.pop_all();
        assert_eq!(heads.len(), 2);
        for head in heads.into_iter().rev() {
            rig.complete(head, 0);
            assert!(rig.guest.poll_used().unwrap().expected);
        }
    }
    assert_eq!(rig.guest.free(), 8);
}

#[test]
fn a1_a_queue_started_anew_has_forgotten_the_fault() {
    let mut rig = Rig::new(2, packed(PLAIN));
    rig.offer_raw(&[(BUFFERS, 8, F_NEXT); 2]);
    assert_eq!(rig.ring_fault(), RingFault::ChainOverrun { limit: 2 });
    rig.reset();
    rig.assert_ring_goes_on();
}

#[test]
fn a2_a_chain_taken_back_before_the_pop_was_never_there() {
    let mut rig = Rig::new(8, packed(PLAIN));
    rig.offer_buffer();
    assert!(rig.queue.has_available());
    rig.packed().write_desc(0, 0, 0, 0, 0);
    assert_eq!(rig.pop(), Ok(None));
    assert_eq!(rig.queue.base(), rig.config.base);
    assert_eq!(rig.queue.fault(), None);
}

#[test]
fn a3_any_buffer_id_is_valid_and_goes_back_as_it_came() {
    let mut rig = Rig::new(8, packed(PLAIN));
    let ids = [8, 0x7fff, 0x8000, u16::MAX, 0];
    for id in ids {
        rig.packed().add_raw_with_id(id, &[BUFFER]).unwrap();
    }
    rig.guest.publish();
    for (head, len) in rig.pop_all().into_iter().zip(1..) {
        assert!(head.index() < 8, "a slot of the queue's own");
        rig.queue.push(head, len);
    }
    rig.queue.publish();
    for (id, len) in ids.into_iter().zip(1..) {
        let used = rig.guest.poll_used().unwrap();
        assert_eq!((used.id, used.len), (u32::from(id), len));
    }
}

#[test]
fn a4_buffer_id_offered_twice_while_in_flight_is_a_ring_fault() {
    let mut rig = Rig::new(8, packed(PLAIN));
    rig.packed().add_raw_with_id(0xbeef, &[BUFFER]).unwrap();
    rig.packed().add_raw_with_id(0xbeef, &[BUFFER]).unwrap();
    rig.guest.publish();
    let popped = rig.pop_head();
    let fault = RingFault::BufferIdInFlight { id: 0xbeef };
    assert_eq!(rig.ring_fault(), fault);
    assert_eq!(rig.queue.in_flight(), 1);
    rig.complete(popped, 0);
    assert_eq!(rig.guest.poll_used().map(|used| used.id), Some(0xbeef));
}

#[test]
fn a4_buffer_id_offered_again_after_it_came_back_is_served() {
    let mut rig = Rig::new(8, packed(PLAIN));
    for _ in 0..20 {
        rig.packed().add_raw_with_id(0xbeef, &[BUFFER]).unwrap();
        rig.guest.publish();
        let popped = rig.pop_head();
        rig.complete(popped, 0);
        assert!(rig.guest.poll_used().unwrap().expected);
    }
}

#[test]
fn a4_in_flight_never_exceeds_the_queue_size() {
    let mut rig = Rig::new(8, packed(PLAIN));
    let mut heads = Vec::new();
    // The guest fills the ring over and over, and never takes anything back.
    for id in 0..24 {
        rig.packed().add_raw_with_id(id, &[BUFFER]).unwrap();
        rig.guest.publish();
        heads.extend(rig.pop_all_until_fault());
    }
    assert_eq!((heads.len(), rig.queue.in_flight()), (8, 8));
    for head in heads {
        rig.queue.push(head, 0);
    }
}

#[test]
fn a5_descriptors_in_the_middle_of_a_chain_are_not_looked_at_on_their_own() {
    let mut rig = Rig::new(8, packed(PLAIN));
    rig.guest.add_chain(&buffers::<3>(), &[]).unwrap();
    rig.guest.publish();
    let whole = rig.pop_head();
    // In flight: the guest makes the middle one a chain of this pass. The device is past it.
    rig.packed().write_desc(1, BUFFERS, 8, 5, F_AVAIL);
    assert_eq!(rig.pop(), Ok(None));
    rig.complete(whole, 0);
    assert!(rig.guest.poll_used().unwrap().expected);
    rig.assert_ring_goes_on();
}

#[test]
fn a6_chains_across_the_end_of_the_ring_are_served_in_either_pass() {
    for start in 0..16 {
        let mut rig = Rig::starting_at(8, packed(PLAIN), start);
        for round in 0..8 {
            let readable = [segment(BUFFERS, 4), segment(BUFFERS + 64, 4)];
            let writable = [segment(BUFFERS + 128, 4)];
            let id = rig.guest.add_chain(&readable, &writable).unwrap();
            rig.guest.publish();
            let head = rig.pop_head();
            assert_eq!(rig.chain.readable(), readable);
            assert_eq!(rig.chain.writable(), writable);
            rig.complete(head, 4);
            let used = rig.guest.poll_used().unwrap();
            assert_eq!((used.id, used.len, used.expected), (u32::from(id), 4, true));
            let passed = start + 3 * (round + 1);
            assert_eq!(rig.queue.base(), base_after(passed, 8, packed(PLAIN)));
        }
    }
}

#[test]
fn a7_reserved_bits_of_the_event_flags_are_ignored() {
    for (flags, notify) in [
        (0xfffc, true),
        (0xfffd, false),
        (0x8001, false),
        (0x4000, true),
    ] {
        let mut rig = Rig::new(8, packed(PLAIN));
        rig.queue.should_notify();
        rig.packed().set_driver_event(0xffff, flags);
        rig.assert_ring_goes_on();
        assert_eq!(rig.queue.should_notify(), notify, "flags {flags:#x}");
    }
}

#[test]
fn a8_used_descriptors_and_events_rewritten_by_the_guest_are_not_believed() {
    let mut rig = Rig::new(8, packed(PLAIN));
    rig.assert_ring_goes_on();
    // What the device gave back is available again, says the guest; and rewrites the device's wish.
    rig.packed().write_used_desc(0, 0, 0, F_AVAIL);
    rig.packed().set_device_event(0x1234, 0xffff);
    assert_eq!(rig.pop(), Ok(None));
    let id = rig.offer_buffer();
    let head = rig.pop_head();
    rig.complete(head, 9);
    let (_, len, used_id, flags) = rig.packed().desc(1);
    assert_eq!((len, used_id), (9, id));
    assert_eq!(flags, F_AVAIL | F_USED | F_WRITE);
    assert_eq!(rig.queue.base(), base_after(2, 8, packed(PLAIN)));
    assert!(rig.queue.enable_notification());
    assert_eq!(rig.packed().device_event(), (0, 0));
}

#[test]
fn p1_flags_of_no_state_are_not_available() {
    // AVAIL and USED alike, or those of the other pass, whatever else is set.
    for (wrap, flags) in [
        (true, 0),
        (true, F_USED),
        (true, F_AVAIL | F_USED),
        (false, 0),
        (false, F_AVAIL),
        (false, F_AVAIL | F_USED),
    ] {
        let start = if wrap { 0 } else { 8 };
        for garbage in [0, !(F_AVAIL | F_USED)] {
            let mut rig = Rig::starting_at(8, packed(INDIRECT), start);
            for index in 0..8 {
                let guest = rig.packed();
                guest.write_desc(index, u64::MAX, u32::MAX, u16::MAX, flags | garbage);
            }
            assert!(!rig.queue.has_available());
            assert_eq!(rig.pop(), Ok(None));
            assert!(rig.queue.enable_notification());
            assert_eq!(rig.queue.fault(), None);
        }
    }
}

#[test]
fn p2_flags_of_later_descriptors_do_not_decide_whether_a_chain_is_available() {
    // The driver must set them (§2.8.6); a device that waited for them could wait for ever.
    for flags in [0, F_AVAIL, F_USED, F_AVAIL | F_USED] {
        let mut rig = Rig::new(8, packed(PLAIN));
        let guest = rig.packed();
        guest.write_desc(1, BUFFERS + 64, 1, 6, F_WRITE | flags);
        guest.write_desc(0, BUFFERS, 16, 5, F_NEXT | F_AVAIL);
        let head = rig.pop_head();
        assert_eq!(rig.chain.readable(), [segment(BUFFERS, 16)]);
        assert_eq!(rig.chain.writable(), [segment(BUFFERS + 64, 1)]);
        rig.complete(head, 1);
        assert_eq!(rig.packed().desc(0).2, 6, "the id of the last");
    }
}

#[test]
fn p3_ids_of_all_but_the_last_descriptor_mean_nothing() {
    let mut rig = Rig::new(8, packed(PLAIN));
    // Two chains in flight, each with the other's id in front.
    for (index, id, flags) in [(3, 11, 0), (2, 10, F_NEXT), (1, 10, 0), (0, 11, F_NEXT)] {
        rig.packed()
            .write_desc(index, BUFFERS, 1, id, flags | F_AVAIL);
    }
    for head in rig.pop_all() {
        rig.queue.push(head, 0);
    }
    assert_eq!(rig.queue.publish(), 2);
    assert_eq!([0, 2].map(|index| rig.packed().desc(index).2), [10, 11]);
}

#[test]
fn p4_used_descriptors_say_by_write_whether_anything_was_written() {
    for start in [0, 8] {
        let mut rig = Rig::starting_at(8, packed(PLAIN), start);
        for len in [7, 0] {
            let (readable, writable) = (buffers::<1>(), buffers::<1>());
            rig.guest.add_chain(&readable, &writable).unwrap();
            rig.guest.publish();
            let head = rig.pop_head();
            rig.complete(head, len);
        }
        // Nothing of NEXT and WRITE as the driver set them.
        let state = if start == 0 { F_AVAIL | F_USED } else { 0 };
        assert_eq!(rig.packed().desc(0).3, state | F_WRITE);
        assert_eq!(rig.packed().desc(2).3, state);
    }
}

#[test]
fn p5_descriptors_in_flight_made_available_again_wait_for_their_turn() {
    let mut rig = Rig::new(4, packed(PLAIN));
    rig.offer_buffer();
    let held = rig.pop_head();
    // For this pass and for the next.
    for flags in [F_AVAIL, F_USED] {
        rig.packed().write_desc(0, BUFFERS, 8, 9, flags);
        assert_eq!(rig.pop(), Ok(None));
    }
    // The turn comes with the ring full: then it is one too many.
    for _ in 0..3 {
        rig.offer_buffer();
    }
    let heads = rig.pop_all_until_fault();
    assert_eq!(heads.len(), 3);
    let fault = RingFault::ChainOverrun { limit: 0 };
    assert_eq!(rig.queue.fault(), Some(fault));
    rig.queue.push(held, 0);
    for head in heads {
        rig.queue.push(head, 0);
    }
    assert_eq!(rig.queue.publish(), 4);
}

#[test]
fn p6_a_ring_of_next_without_an_end_is_a_ring_fault() {
    for entries in [1u16, 8, 4096] {
        let fault = ends(move || {
            let mut rig = Rig::new(u32::from(entries), packed(PLAIN));
            rig.offer_raw(&vec![(BUFFERS, 0, F_NEXT); usize::from(entries)]);
            rig.ring_fault()
        });
        assert_eq!(fault, RingFault::ChainOverrun { limit: entries });
    }
}

#[test]
fn p7_a_reserved_event_asks_for_every_interrupt() {
    // DESC without EVENT_IDX, and the value with no meaning.
    for (features, flags) in [(PLAIN, EVENT_DESC), (PLAIN, 3), (EVENT_IDX, 3)] {
        let mut rig = Rig::new(8, packed(features));
        rig.packed().set_driver_event(0x7fff, flags);
        for _ in 0..3 {
            rig.assert_ring_goes_on();
            assert!(rig.queue.should_notify());
        }
    }
}

#[test]
fn p8_an_event_outside_the_ring_is_never_reached() {
    let mut rig = Rig::new(8, packed(EVENT_IDX));
    rig.assert_ring_goes_on();
    assert!(rig.queue.should_notify(), "the first decision");
    for position in [8, 9, 0x7fff, 0x8008, 0xffff] {
        rig.packed().set_driver_event(position, EVENT_DESC);
        for _ in 0..17 {
            rig.assert_ring_goes_on();
            assert!(!rig.queue.should_notify());
        }
    }
}

#[test]
fn p9_the_devices_event_is_one_word_and_nothing_beside_it_is_written() {
    let mut rig = Rig::new(8, packed(EVENT_IDX));
    let area = rig.config.addresses.device_area;
    let around = GuestAddress(area.0 - 8);
    rig.memory.write_slice(&[0x5a; 20], around).unwrap();
    rig.restart(rig.config.base);
    rig.queue.disable_notification();
    assert_eq!(rig.packed().device_event().1, EVENT_DISABLE);
    assert!(rig.queue.enable_notification());
    rig.assert_ring_goes_on();
    rig.queue.should_notify();
    let mut bytes = [0; 20];
    rig.memory.read_slice(&mut bytes, around).unwrap();
    assert_eq!(
        (&bytes[..8], &bytes[12..]),
        (&[0x5a; 8][..], &[0x5a; 8][..])
    );
}

#[test]
fn p10_entries_of_a_table_are_all_taken_and_their_ids_and_links_ignored() {
    let mut rig = Rig::new(8, packed(INDIRECT));
    // AVAIL, USED, NEXT and INDIRECT are reserved in a table (§2.8.7).
    rig.write_table(
        TABLE,
        &[
            (BUFFERS, 1, !F_WRITE),
            (BUFFERS, 2, 0),
            (BUFFERS, 3, 0xffff),
        ],
    );
    rig.offer_table(TABLE, 48, 0);
    let head = rig.pop_head();
    let readable = [segment(BUFFERS, 1), segment(BUFFERS, 2)];
    assert_eq!(rig.chain.readable(), readable);
    assert_eq!(rig.chain.writable(), [segment(BUFFERS, 3)]);
    rig.queue.push(head, 0);
}

#[test]
fn p11_a_broken_chain_is_followed_to_its_end_where_its_id_is() {
    // The fault is in the first descriptor; the next chain starts behind the last.
    for start in [0, 6] {
        let mut rig = Rig::starting_at(8, packed(PLAIN), start);
        let id = rig.offer_raw(&[
            (u64::MAX, 1, F_NEXT),
            (BUFFERS, 16, F_NEXT | F_WRITE),
            (BUFFERS, 16, 0),
        ]);
        rig.chain_fault();
        assert_eq!(rig.packed().desc(start).2, id);
        let base = base_after(start + 3, 8, packed(PLAIN));
        assert_eq!(rig.queue.base(), base);
        rig.assert_ring_goes_on();
    }
}

#[test]
fn p12_the_guest_writes_over_what_is_staged_and_gets_what_it_deserves() {
    // Used descriptors behind the first are written before they are published. A guest that
    // changes them meanwhile sees its own nonsense, and the device goes on counting.
    let mut rig = Rig::new(8, packed(PLAIN));
    for _ in 0..3 {
        rig.offer_buffer();
    }
    for head in rig.pop_all() {
        rig.queue.push(head, 0);
    }
    for index in 0..3 {
        rig.packed()
            .write_desc(index, u64::MAX, u32::MAX, u16::MAX, u16::MAX);
    }
    assert_eq!(rig.queue.publish(), 3);
    assert_eq!(rig.queue.base(), base_after(3, 8, packed(PLAIN)));
    assert_eq!(rig.queue.in_flight(), 0);
    assert_eq!(
        rig.packed().desc(0).3,
        F_AVAIL | F_USED,
        "the first is the device's"
    );
}
