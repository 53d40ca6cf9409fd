//! Undoing a pop, staging, resuming, and what a queue may be used for.

mod rig;

use std::sync::Arc;

use rig::{BUFFERS, PLAIN, Rig, base_after, both, packed, segment};
use vring::{PopError, RingFeatures};

#[test]
fn unpop_gives_the_chain_back_to_the_next_pop() {
    for features in both(PLAIN) {
        let mut rig = Rig::starting_at(8, features, 7);
        let three = [segment(BUFFERS, 512); 3];
        let first = rig.guest.add_chain(&three, &[]).unwrap();
        rig.guest.publish();
        rig.offer_buffer();
        let head = rig.pop_head();
        assert_eq!(rig.queue.unpop(head), Ok(()));
        assert_eq!(rig.queue.in_flight(), 0);
        assert_eq!(rig.queue.base(), rig.config.base);
        assert!(rig.queue.has_available());
        let again = rig.pop_head();
        assert_eq!(rig.chain.readable(), three);
        rig.complete(again, 0);
        let used = rig.guest.poll_used().unwrap();
        assert_eq!((used.id, used.expected), (u32::from(first), true));
    }
}

#[test]
fn unpop_refuses_all_but_the_latest_pop() {
    for features in both(PLAIN) {
        let mut rig = Rig::new(8, features);
        rig.offer_buffer();
        let second_id = rig.offer_buffer();
        let first = rig.pop_head();
        let second = rig.pop_head();
        let first = rig.queue.unpop(first).unwrap_err();
        rig.queue.unpop(second).unwrap();
        // The first is the latest now, but only one step can be undone.
        let first = rig.queue.unpop(first).unwrap_err();
        assert_eq!(rig.queue.in_flight(), 1);
        rig.queue.push(first, 0);
        let second = rig.pop_head();
        rig.queue.push(second, 0);
        assert_eq!(rig.queue.publish(), 2);
        rig.guest.poll_used().unwrap();
        let used = rig.guest.poll_used().unwrap();
        assert_eq!((used.id, used.expected), (u32::from(second_id), true));
    }
}

#[test]
fn unpop_of_a_broken_chain_finds_it_broken_again() {
    for features in both(PLAIN) {
        let mut rig = Rig::new(8, features);
        rig.offer_raw(&[(u64::MAX, 1, 0)]);
        let Err(PopError::Chain { head, .. }) = rig.pop() else {
            panic!("a buffer that wraps");
        };
        rig.queue.unpop(head).unwrap();
        rig.chain_fault();
        rig.assert_ring_goes_on();
    }
}

#[test]
fn unpop_after_a_ring_fault_fetches_nothing() {
    for features in both(PLAIN) {
        let mut rig = Rig::new(8, features);
        rig.offer_buffer();
        let head = rig.pop_head();
        rig.break_ring();
        rig.ring_fault();
        rig.queue.unpop(head).unwrap();
        assert_eq!(rig.pop(), Ok(None));
        assert_eq!(rig.queue.in_flight(), 0);
        assert_eq!(rig.queue.base(), rig.config.base);
    }
}

#[test]
fn what_is_staged_is_invisible_until_published() {
    for features in both(PLAIN) {
        let mut rig = Rig::new(8, features);
        for _ in 0..3 {
            rig.guest.add_chain(&[], &[segment(BUFFERS, 8)]).unwrap();
        }
        rig.guest.publish();
        for (head, len) in rig.pop_all().into_iter().zip(5..) {
            rig.queue.push(head, len);
            assert_eq!(rig.guest.poll_used(), None);
        }
        assert_eq!(rig.queue.publish(), 3);
        assert_eq!(rig.queue.publish(), 0);
        for len in 5..8 {
            assert_eq!(rig.guest.poll_used().map(|used| used.len), Some(len));
        }
    }
}

#[test]
fn completions_in_any_order_are_reported_in_the_order_pushed() {
    for features in both(PLAIN) {
        let mut rig = Rig::new(8, features);
        let mut ids: Vec<_> = (0..3).map(|_| u32::from(rig.offer_buffer())).collect();
        let mut heads = rig.pop_all();
        heads.rotate_left(1);
        ids.rotate_left(1);
        for head in heads {
            rig.queue.push(head, 0);
        }
        rig.queue.publish();
        let used: Vec<_> = std::iter::from_fn(|| rig.guest.poll_used())
            .map(|used| used.id)
            .collect();
        assert_eq!(used, ids);
    }
}

/// Pushes a head of another queue, and looks whether anything came of it.
fn push_foreign(features: RingFeatures) {
    let mut rig = Rig::new(8, features);
    let mut other = Rig::new(8, features);
    other.offer_buffer();
    let foreign = other.pop_head();
    rig.queue.push(foreign, 1);
    assert_eq!(rig.queue.publish(), 0);
    assert_eq!(rig.guest.poll_used(), None);
    assert_eq!(rig.queue.in_flight(), 0);
}

#[test]
#[cfg_attr(debug_assertions, should_panic(expected = "is not from this queue"))]
fn a_head_of_another_split_queue_never_reaches_the_ring() {
    push_foreign(PLAIN);
}

#[test]
#[cfg_attr(debug_assertions, should_panic(expected = "is not from this queue"))]
fn a_head_of_another_packed_queue_never_reaches_the_ring() {
    push_foreign(packed(PLAIN));
}

#[test]
fn resuming_goes_on_where_the_predecessor_stopped_and_asks_for_kicks() {
    for features in both(PLAIN) {
        let mut rig = Rig::starting_at(8, features, 65535);
        rig.queue.disable_notification();
        rig.assert_ring_goes_on();
        let base = rig.queue.base();
        assert_eq!(base, base_after(0, 8, features));
        rig.restart(base);
        rig.offer_buffer();
        assert!(rig.guest.needs_kick());
        let head = rig.pop_head();
        rig.complete(head, 0);
        assert!(rig.guest.poll_used().unwrap().expected);
        rig.assert_ring_goes_on();
        assert_eq!(rig.queue.base(), base_after(2, 8, features));
    }
}

#[test]
fn a_queue_goes_to_another_thread() {
    for features in both(PLAIN) {
        let mut rig = Rig::new(8, features);
        rig.guest.add_chain(&[], &[segment(BUFFERS, 8)]).unwrap();
        rig.guest.publish();
        let Rig {
            mut queue,
            mut chain,
            mut guest,
            ..
        } = rig;
        std::thread::spawn(move || {
            let head = queue.pop(&mut chain).unwrap().unwrap();
            queue.push(head, 1);
            queue.publish();
        })
        .join()
        .unwrap();
        assert_eq!(guest.poll_used().map(|used| used.len), Some(1));
    }
}

#[test]
fn a_ring_keeps_its_memory_mapped() {
    for features in both(PLAIN) {
        let mut rig = Rig::new(8, features);
        rig.offer_buffer();
        let Rig {
            mut queue,
            mut chain,
            memory,
            guest,
            ..
        } = rig;
        let weak = Arc::downgrade(&memory);
        drop((memory, guest));
        let head = queue.pop(&mut chain).unwrap().unwrap();
        queue.push(head, 0);
        queue.publish();
        assert!(weak.upgrade().is_some());
        drop(queue);
        assert!(weak.upgrade().is_none());
    }
}
