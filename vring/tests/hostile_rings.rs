//! Rows A that mean the same in a ring of either format. Those about a split ring's indices and
//! heads are in `split_rings`, what takes their place in a packed ring in `packed_rings`.

mod rig;

use std::sync::Arc;

use rig::{BUFFERS, END, INDIRECT, PLAIN, Rig, TABLE, all, base_after, both, ends, segment};
use vm_memory::{Bytes, GuestAddress};
use vring::driver::{Driver, F_NEXT};
use vring::{Chain, Queue, RingFault};

#[test]
fn a6_a_batch_across_the_wrap_is_published_as_one() {
    for features in both(PLAIN) {
        let mut rig = Rig::starting_at(8, features, 65533);
        for _ in 0..8 {
            rig.guest.add_chain(&[segment(BUFFERS, 8)], &[]).unwrap();
        }
        rig.guest.publish();
        let heads = rig.pop_all();
        assert_eq!(heads.len(), 8);
        for head in heads {
            rig.queue.push(head, 0);
        }
        assert_eq!(rig.guest.poll_used(), None);
        assert_eq!(rig.queue.publish(), 8);
        let used: Vec<_> = std::iter::from_fn(|| rig.guest.poll_used()).collect();
        assert!(used.iter().all(|used| used.expected));
        assert_eq!(used.len(), 8);
        let base = base_after(65533u16.wrapping_add(8), 8, features);
        assert_eq!(rig.queue.base(), base);
    }
}

#[test]
fn a6_rings_go_round_for_longer_than_any_index_counts() {
    for features in both(PLAIN) {
        for entries in [1, 2, 8] {
            let mut rig = Rig::starting_at(entries, features, 65530);
            for _ in 0..70_000 {
                rig.assert_ring_goes_on();
            }
            let count = u16::try_from((65530 + 70_000) % 65536).unwrap();
            let entries = u16::try_from(entries).unwrap();
            assert_eq!(rig.queue.base(), base_after(count, entries, features));
        }
    }
}

#[test]
fn a9_descriptors_changed_after_the_pop_do_not_change_the_chain() {
    for features in both(PLAIN) {
        let mut rig = Rig::new(8, features);
        let id = rig.offer_buffer();
        let popped = rig.pop_head();
        match &rig.guest {
            Driver::Split(guest) => guest.write_desc(id, END, u32::MAX, u16::MAX, u16::MAX),
            Driver::Packed(guest) => guest.write_desc(0, END, u32::MAX, u16::MAX, u16::MAX),
        }
        assert_eq!(rig.chain.readable(), [segment(BUFFERS, 512)]);
        rig.complete(popped, 0);
        let used = rig.guest.poll_used().unwrap();
        assert_eq!((used.id, used.expected), (u32::from(id), true));
    }
}

#[test]
fn a10_full_ring_is_served_whole() {
    for features in both(PLAIN) {
        for entries in [1, 2, 8, 4096] {
            let mut rig = Rig::new(entries, features);
            // Twice: in a packed ring the second pass has the other wrap counter.
            for _ in 0..2 {
                for _ in 0..entries {
                    rig.guest.add_chain(&[segment(BUFFERS, 8)], &[]).unwrap();
                }
                assert!(rig.guest.add_chain(&[segment(BUFFERS, 8)], &[]).is_err());
                rig.guest.publish();
                let heads = rig.pop_all();
                assert_eq!(u32::from(rig.queue.in_flight()), entries);
                let mut indices: Vec<_> = heads.iter().map(|head| head.index()).collect();
                indices.sort_unstable();
                let all = 0..rig.config.size.get();
                assert!(indices.into_iter().eq(all), "unique and below the size");
                for head in heads {
                    rig.queue.push(head, 0);
                }
                assert_eq!(rig.queue.publish(), usize::try_from(entries).unwrap());
                while let Some(used) = rig.guest.poll_used() {
                    assert!(used.expected);
                }
                assert_eq!(u32::from(rig.guest.free()), entries);
            }
        }
    }
}

#[test]
fn a11_each_pop_ends_while_the_guest_keeps_publishing() {
    for features in both(PLAIN) {
        let popped = ends(move || {
            let mut rig = Rig::new(8, features);
            let mut popped = 0u32;
            // The guest is always one ahead: nothing ever tells the device to stop but its own
            // bound, and each call returns.
            rig.offer_buffer();
            for _ in 0..100_000 {
                rig.offer_buffer();
                let head = rig.pop_head();
                rig.complete(head, 0);
                assert!(!rig.queue.enable_notification());
                rig.guest.poll_used().unwrap();
                popped += 1;
            }
            popped
        });
        assert_eq!(popped, 100_000);
    }
}

#[test]
fn a12_buffers_published_before_the_start_wait_for_it() {
    for features in both(PLAIN) {
        let mut rig = Rig::new(8, features);
        let id = rig.offer_buffer();
        assert_eq!(rig.guest.poll_used(), None);
        rig.restart(rig.config.base);
        let popped = rig.pop_head();
        rig.complete(popped, 0);
        let used = rig.guest.poll_used().unwrap();
        assert_eq!((used.id, used.expected), (u32::from(id), true));
    }
}

#[test]
fn a13_a_chain_held_for_ever_does_not_hold_up_the_rest() {
    // The ring goes round beneath it: the guest gets the others back, and the one at last.
    for features in both(INDIRECT) {
        let mut rig = Rig::new(4, features);
        let two = [segment(BUFFERS, 4), segment(BUFFERS, 4)];
        let held_id = rig.guest.add_chain(&two, &[]).unwrap();
        rig.guest.publish();
        let held = rig.pop_head();
        for _ in 0..1000 {
            rig.guest
                .add_indirect(GuestAddress(TABLE), &two, &[segment(BUFFERS, 1)])
                .unwrap();
            rig.guest.publish();
            let head = rig.pop_head();
            assert_ne!(head.index(), held.index());
            rig.complete(head, 1);
            assert!(rig.guest.poll_used().unwrap().expected);
        }
        rig.complete(held, 0);
        let used = rig.guest.poll_used().unwrap();
        assert_eq!((used.id, used.expected), (u32::from(held_id), true));
        assert_eq!(rig.guest.free(), 4);
    }
}

#[test]
fn a14_a_chain_pushed_and_not_published_is_not_the_guests_yet() {
    for features in both(PLAIN) {
        let mut rig = Rig::new(2, features);
        rig.offer_buffer();
        rig.offer_buffer();
        let (first, second) = (rig.pop_head(), rig.pop_head());
        rig.queue.push(second, 0);
        assert_eq!((rig.guest.poll_used(), rig.guest.free()), (None, 0));
        assert_eq!(rig.pop(), Ok(None));
        rig.queue.push(first, 0);
        assert_eq!(rig.queue.publish(), 2);
        let ids: Vec<_> = std::iter::from_fn(|| rig.guest.poll_used())
            .map(|used| used.id)
            .collect();
        assert_eq!(ids.len(), 2);
        assert_ne!(ids[0], ids[1]);
        rig.assert_ring_goes_on();
    }
}

#[test]
fn a15_broken_chains_for_ever_cost_one_pop_each_and_never_the_ring() {
    for features in both(PLAIN) {
        let mut rig = Rig::new(8, features);
        for _ in 0..100 {
            rig.offer_raw(&[(u64::MAX, 1, F_NEXT), (0, 1, 0)]);
            rig.chain_fault();
            rig.assert_ring_goes_on();
        }
        assert_eq!((rig.queue.fault(), rig.guest.free()), (None, 8));
    }
}

#[test]
fn a16_a_ring_wiped_while_it_runs_completes_what_is_in_flight() {
    // A guest that reboots without a word to the device, in either pass of a packed ring.
    for (features, count) in all().into_iter().flat_map(|f| [(f, 3), (f, 11)]) {
        let mut rig = Rig::starting_at(8, features, count);
        for _ in 0..2 {
            rig.offer_buffer();
        }
        let heads = rig.pop_all();
        let start = rig.config.addresses.descriptor_area;
        let zeroes = vec![0; usize::try_from(BUFFERS - start.0).unwrap()];
        rig.memory.write_slice(&zeroes, start).unwrap();
        if features.packed {
            assert_eq!(rig.pop(), Ok(None), "zeroes are available in neither pass");
        } else {
            let jump = RingFault::AvailIndexJump {
                avail_idx: 0,
                next_avail: count + 2,
                size: 8,
            };
            assert_eq!(rig.ring_fault(), jump);
        }
        for head in heads {
            rig.queue.push(head, 1);
        }
        assert_eq!(rig.queue.publish(), 2);
        assert_eq!(rig.queue.in_flight(), 0);
    }
}

#[test]
fn r16_two_queues_on_one_ring_garble_only_the_ring() {
    // The front-end gives two queues the same addresses.
    for features in all() {
        let mut rig = Rig::new(8, features);
        let mut other = Queue::start(Arc::clone(&rig.memory), &rig.config).unwrap();
        let mut chain = Chain::for_queue(rig.config.size);
        let beyond = GuestAddress(BUFFERS);
        let mut before = vec![0; usize::try_from(END - BUFFERS).unwrap()];
        rig.memory.read_slice(&mut before, beyond).unwrap();
        for round in 0..40u16 {
            for _ in 0..=round % 3 {
                let _ = rig.guest.add_chain(&[], &[segment(BUFFERS, 8)]);
            }
            rig.guest.publish();
            // Each takes what it finds, and gives it back before or after the other.
            let mine: Vec<_> = rig.pop_all_until_fault();
            let theirs: Vec<_> =
                std::iter::from_fn(|| other.pop(&mut chain).ok().flatten()).collect();
            assert!(mine.len() <= 8 && theirs.len() <= 8);
            for head in mine {
                rig.queue.push(head, 1);
            }
            if round % 2 == 0 {
                rig.queue.publish();
            }
            for head in theirs {
                other.push(head, 2);
            }
            other.publish();
            rig.queue.publish();
            for queue in [&mut rig.queue, &mut other] {
                queue.should_notify();
                queue.disable_notification();
                queue.enable_notification();
                assert_eq!(queue.in_flight(), 0);
            }
            while rig.guest.poll_used().is_some() {}
        }
        let mut after = vec![0; before.len()];
        rig.memory.read_slice(&mut after, beyond).unwrap();
        assert!(after == before, "written beside the ring");
    }
}
