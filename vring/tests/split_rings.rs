//! Rows A in a split ring: the available ring and the indices.

mod rig;

use rig::{BUFFERS, EVENT_IDX, PLAIN, Rig, ends, segment};
use vring::driver::{F_NEXT, F_WRITE};
use vring::{RingBase, RingFault};

#[test]
fn a1_available_index_too_far_ahead_is_a_ring_fault() {
    for avail_idx in [9, 10, 0x8000, 65535] {
        let mut rig = Rig::new(8, PLAIN);
        rig.split().set_avail_idx(avail_idx);
        assert!(rig.queue.has_available());
        assert_eq!(
            rig.ring_fault(),
            RingFault::AvailIndexJump {
                avail_idx,
                next_avail: 0,
                size: 8
            }
        );
    }
}

#[test]
fn a1_in_flight_work_completes_after_a_ring_fault() {
    let mut rig = Rig::new(8, PLAIN);
    let head = rig.offer_buffer();
    let popped = rig.pop_head();
    rig.split().set_avail_idx(100);
    rig.ring_fault();
    rig.queue.push(popped, 3);
    assert_eq!(rig.queue.publish(), 1);
    assert!(rig.queue.should_notify());
    let used = rig.guest.poll_used().unwrap();
    assert_eq!((used.id, used.len), (u32::from(head), 3));
    assert_eq!(rig.queue.in_flight(), 0);
    assert_eq!(rig.pop(), Ok(None));
}

#[test]
fn a1_a_queue_started_anew_has_forgotten_the_fault() {
    let mut rig = Rig::new(8, PLAIN);
    rig.split().set_avail_idx(100);
    rig.ring_fault();
    rig.split().set_avail_idx(0);
    rig.restart(rig.config.base);
    rig.assert_ring_goes_on();
}

#[test]
fn a2_available_index_going_backwards_is_a_ring_fault() {
    let mut rig = Rig::new(8, PLAIN);
    for _ in 0..3 {
        rig.assert_ring_goes_on();
    }
    rig.split().set_avail_idx(2);
    assert_eq!(
        rig.ring_fault(),
        RingFault::AvailIndexJump {
            avail_idx: 2,
            next_avail: 3,
            size: 8
        }
    );
}

#[test]
fn a2_index_taken_back_after_it_was_read_changes_nothing_until_read_again() {
    let mut rig = Rig::new(8, PLAIN);
    rig.offer_buffer();
    rig.offer_buffer();
    let first = rig.pop_head();
    rig.split().set_avail_idx(0);
    let second = rig.pop_head();
    assert!(matches!(
        rig.ring_fault(),
        RingFault::AvailIndexJump {
            avail_idx: 0,
            next_avail: 2,
            ..
        }
    ));
    rig.queue.push(first, 0);
    rig.queue.push(second, 0);
}

#[test]
fn a3_head_out_of_range_is_a_ring_fault_and_never_reaches_the_used_ring() {
    for head in [8, 9, 0x8000, u16::MAX] {
        let mut rig = Rig::new(8, PLAIN);
        rig.offer(head);
        assert_eq!(
            rig.ring_fault(),
            RingFault::HeadOutOfRange { head, size: 8 }
        );
        assert_eq!(rig.queue.publish(), 0);
        assert_eq!(rig.guest.poll_used(), None);
        assert_eq!(rig.queue.in_flight(), 0);
    }
}

#[test]
fn a4_head_offered_twice_while_in_flight_is_a_ring_fault() {
    let mut rig = Rig::new(8, PLAIN);
    let head = rig.offer_buffer();
    rig.offer(head);
    let popped = rig.pop_head();
    assert_eq!(rig.ring_fault(), RingFault::HeadInFlight { head });
    assert_eq!(rig.queue.in_flight(), 1);
    rig.queue.push(popped, 0);
}

#[test]
fn a4_head_offered_again_after_it_was_pushed_is_served() {
    let mut rig = Rig::new(8, PLAIN);
    let head = rig.offer_buffer();
    let popped = rig.pop_head();
    rig.queue.push(popped, 0);
    rig.offer(head);
    let again = rig.pop_head();
    assert_eq!(again.index(), head);
    rig.queue.push(again, 0);
}

#[test]
fn a4_in_flight_never_exceeds_the_queue_size() {
    let mut rig = Rig::new(8, PLAIN);
    let mut heads = Vec::new();
    // The guest offers all heads over and over.
    for round in 0..3u16 {
        for head in 0..8 {
            rig.split().write_desc(head, BUFFERS, 1, 0, 0);
            rig.split().write_avail_entry(round * 8 + head, head);
        }
        rig.split().set_avail_idx((round + 1) * 8);
        while let Ok(Some(head)) = rig.pop() {
            heads.push(head);
        }
    }
    assert_eq!(heads.len(), 8);
    assert_eq!(rig.queue.in_flight(), 8);
    for head in heads {
        rig.queue.push(head, 0);
    }
}

#[test]
fn a5_head_in_the_middle_of_another_live_chain_is_served_as_its_own() {
    let mut rig = Rig::new(8, PLAIN);
    rig.split().write_desc(0, BUFFERS, 16, F_NEXT, 1);
    rig.split().write_desc(1, BUFFERS + 16, 32, F_NEXT, 2);
    rig.split().write_desc(2, BUFFERS + 64, 1, F_WRITE, 0);
    rig.offer(0);
    rig.offer(1);
    let whole = rig.pop_head();
    let middle = rig.pop_head();
    assert_eq!(rig.chain.readable(), [segment(BUFFERS + 16, 32)]);
    rig.queue.push(middle, 1);
    rig.queue.push(whole, 1);
    assert_eq!(rig.queue.publish(), 2);
    assert_eq!(rig.split().used_entry(0), (1, 1));
    assert_eq!(rig.split().used_entry(1), (0, 1));
}

#[test]
fn a6_indices_wrap_from_65535_to_0() {
    for features in [PLAIN, EVENT_IDX] {
        let mut rig = Rig::starting_at(8, features, 65530);
        for _ in 0..20 {
            rig.assert_ring_goes_on();
        }
        let next_avail = 65530u16.wrapping_add(20);
        assert_eq!(rig.queue.base(), RingBase::Split { next_avail });
        assert_eq!(rig.split().used_idx(), 65530u16.wrapping_add(20));
    }
}

#[test]
fn a7_only_bit_0_of_the_available_flags_counts() {
    for (flags, notify) in [(0xfffe, true), (0xffff, false), (0x8001, false)] {
        let mut rig = Rig::new(8, PLAIN);
        rig.split().set_avail_flags(flags);
        rig.assert_ring_goes_on();
        assert_eq!(rig.queue.should_notify(), notify, "flags {flags:#x}");
    }
}

#[test]
fn a7_available_flags_are_ignored_with_event_idx() {
    let mut rig = Rig::new(8, EVENT_IDX);
    rig.split().set_avail_flags(0xffff);
    rig.split().set_used_event(0);
    rig.assert_ring_goes_on();
    assert!(rig.queue.should_notify());
    rig.split().set_used_event(1);
    rig.assert_ring_goes_on();
    assert!(rig.queue.should_notify());
}

#[test]
fn a8_used_index_and_flags_rewritten_by_the_guest_are_not_believed() {
    let mut rig = Rig::new(8, PLAIN);
    rig.assert_ring_goes_on();
    rig.split().set_used_idx(0x1234);
    rig.split().set_used_flags(0xffff);
    rig.offer_buffer();
    let head = rig.pop_head();
    let index = head.index();
    rig.queue.push(head, 9);
    rig.queue.publish();
    assert_eq!(rig.split().used_idx(), 2);
    assert_eq!(rig.split().used_entry(1), (u32::from(index), 9));
}

#[test]
fn a11_each_pop_ends_while_the_available_index_keeps_moving() {
    let popped = ends(|| {
        let mut rig = Rig::new(8, PLAIN);
        for head in 0..8 {
            rig.split().write_desc(head, BUFFERS, 1, 0, 0);
            rig.split().write_avail_entry(head, head);
        }
        let mut avail_idx = 0u16;
        let mut popped = 0u32;
        // The guest is always one ahead: nothing ever tells the device to stop but its own
        // bound, and each call returns.
        for _ in 0..200_000 {
            avail_idx = avail_idx.wrapping_add(1);
            rig.split().set_avail_idx(avail_idx);
            let head = rig.pop_head();
            rig.queue.push(head, 0);
            rig.queue.publish();
            popped += 1;
        }
        popped
    });
    assert_eq!(popped, 200_000);
}
