//! A bounded pass over a queue of either format: it ends, publishes once, and loses no wake-up (rows
//! N5 to N7, A11).

mod rig;

use std::sync::mpsc;

use rig::{PLAIN, Rig, all, both, ends, offer_buffer};
use vring::driver::{Driver, F_NEXT, RawDescriptor};
use vring::{Finished, PopError, Queue, RingFault, RingFeatures};

/// Entries of the rings here.
const SIZE: u16 = 8;

fn fresh(features: RingFeatures) -> Rig {
    Rig::new(u32::from(SIZE), features)
}

#[test]
fn a11_a_driver_that_publishes_at_every_pop_does_not_hold_the_device() {
    for features in all() {
        ends(move || {
            let Rig {
                mut guest,
                mut queue,
                mut chain,
                ..
            } = fresh(features);
            offer_buffer(&mut guest);
            let mut served = 0;
            for _ in 0..3 {
                let mut batch = queue.batch(5);
                while let Some(head) = batch.pop(&mut chain).unwrap() {
                    // One more for each that is taken: without a limit there is no end.
                    offer_buffer(&mut guest);
                    batch.push(head, 0);
                    served += 1;
                }
                assert!(!batch.finish().sleep, "there is always one more");
                while guest.poll_used().is_some() {}
            }
            assert_eq!(served, 3 * 5);
        });
    }
}

#[test]
fn n6_a_driver_that_publishes_when_kicks_are_enabled_does_not_hold_finish() {
    for features in all() {
        let mut rig = fresh(features);
        let mut batch = rig.queue.batch(5);
        assert_eq!(batch.pop(&mut rig.chain), Ok(None));
        offer_buffer(&mut rig.guest);
        assert!(!batch.finish().sleep, "it raced in after the last pop");
        let head = rig.pop_head();
        rig.queue.push(head, 0);
    }
}

#[test]
fn one_publication_and_one_decision_for_a_whole_pass() {
    for features in all() {
        let mut rig = fresh(features);
        for _ in 0..4 {
            rig.offer_buffer();
        }
        let mut batch = rig.queue.batch(SIZE);
        while let Some(head) = batch.pop(&mut rig.chain).unwrap() {
            batch.push(head, 0);
            assert_eq!(rig.guest.poll_used(), None);
        }
        assert_eq!(batch.queue().in_flight(), 0);
        let told = Finished {
            notify: true,
            sleep: true,
        };
        assert_eq!(batch.finish(), told);
        for _ in 0..4 {
            assert!(rig.guest.poll_used().is_some());
        }
        rig.guest.needs_kick(); // the decision on those four
        rig.offer_buffer();
        assert!(rig.guest.needs_kick(), "asked for by the pass");
        let head = rig.pop_head();
        rig.queue.unpop(head).unwrap();

        let mut batch = rig.queue.batch(SIZE);
        let head = batch.pop(&mut rig.chain).unwrap().unwrap();
        rig.guest.needs_kick();
        offer_buffer(&mut rig.guest);
        assert!(!rig.guest.needs_kick(), "it is being looked for anyway");
        let other = batch.pop(&mut rig.chain).unwrap().unwrap();
        assert_eq!(batch.pop(&mut rig.chain), Ok(None));
        let nothing_to_tell = Finished {
            notify: false,
            sleep: true,
        };
        assert_eq!(batch.finish(), nothing_to_tell);
        for head in [head, other] {
            rig.queue.push(head, 0);
        }
    }
}

#[test]
fn chains_of_an_earlier_pass_are_given_back_in_a_later_one() {
    for features in all() {
        let mut rig = fresh(features);
        rig.offer_buffer();
        let mut batch = rig.queue.batch(SIZE);
        let head = batch.pop(&mut rig.chain).unwrap().unwrap();
        assert_eq!(batch.pop(&mut rig.chain), Ok(None));
        assert!(batch.finish().sleep, "its I/O is under way");
        let mut batch = rig.queue.batch(SIZE);
        batch.push(head, 0);
        assert!(batch.finish().notify);
        assert!(rig.guest.poll_used().is_some());
    }
}

#[test]
fn a_pass_that_was_dropped_leaves_the_interrupt_to_the_next() {
    for features in all() {
        let mut rig = fresh(features);
        rig.guest.enable_interrupts();
        // The first decision is always yes.
        rig.queue.should_notify();
        rig.offer_buffer();
        let mut batch = rig.queue.batch(SIZE);
        let head = batch.pop(&mut rig.chain).unwrap().unwrap();
        batch.push(head, 0);
        drop(batch);
        assert!(rig.guest.poll_used().is_some(), "published");
        assert!(rig.queue.batch(0).finish().notify, "{features:?}");
        assert!(!rig.queue.batch(0).finish().notify, "told already");
    }
}

#[test]
fn a_ring_fault_ends_the_pass_and_what_was_pushed_is_published() {
    for features in both(PLAIN) {
        let mut rig = fresh(features);
        rig.offer_buffer();
        let mut batch = rig.queue.batch(SIZE);
        let head = batch.pop(&mut rig.chain).unwrap().unwrap();
        batch.push(head, 0);
        // An index that jumped, or a chain without an end.
        let fault = match &mut rig.guest {
            Driver::Split(guest) => {
                guest.set_avail_idx(100);
                RingFault::AvailIndexJump {
                    avail_idx: 100,
                    next_avail: 1,
                    size: SIZE,
                }
            }
            Driver::Packed(guest) => {
                let endless = RawDescriptor {
                    address: 0x1000,
                    len: 1,
                    flags: F_NEXT,
                };
                guest.add_raw(&[endless; SIZE as usize - 1]).unwrap();
                guest.publish();
                RingFault::ChainOverrun { limit: SIZE - 1 }
            }
        };
        assert_eq!(batch.pop(&mut rig.chain), Err(PopError::Ring(fault)));
        assert_eq!(batch.pop(&mut rig.chain), Ok(None));
        let finished = batch.finish();
        assert!(finished.notify && finished.sleep);
        assert!(rig.guest.poll_used().is_some());
        assert_eq!(rig.queue.fault(), Some(fault));
    }
}

#[test]
fn a_broken_chain_counts_towards_the_limit() {
    for features in both(PLAIN) {
        let mut rig = fresh(features);
        let buffer = vring::Segment {
            addr: vm_memory::GuestAddress(u64::MAX),
            len: 2,
        };
        for _ in 0..3 {
            rig.guest.add_chain(&[buffer], &[]).unwrap();
        }
        rig.guest.publish();
        let mut batch = rig.queue.batch(2);
        let mut broken = 0;
        while let Err(PopError::Chain { head, .. }) = batch.pop(&mut rig.chain) {
            broken += 1;
            batch.push(head, 0);
        }
        assert_eq!(broken, 2);
        assert!(!batch.finish().sleep);
    }
}

#[test]
fn a_queue_of_known_format_has_passes_too() {
    for features in all() {
        let mut rig = fresh(features);
        rig.offer_buffer();
        let finished = match &mut rig.queue {
            Queue::Packed(queue) => {
                let mut batch = queue.batch(1);
                let head = batch.pop(&mut rig.chain).unwrap().unwrap();
                batch.push(head, 0);
                batch.finish()
            }
            Queue::Split(queue) => {
                let mut batch = queue.batch(1);
                let head = batch.pop(&mut rig.chain).unwrap().unwrap();
                batch.push(head, 0);
                batch.finish()
            }
        };
        assert!(finished.notify && !finished.sleep);
    }
}

#[test]
fn n7_no_wake_up_is_lost_between_two_threads_by_passes() {
    // As the test of the same name in tests/notifications.rs, through passes of every limit: the
    // device sleeps only when a pass says so, and wakes only by the guest's kick.
    const REQUESTS: u32 = 20_000;
    for features in all() {
        ends(move || {
            let Rig {
                mut guest,
                mut queue,
                mut chain,
                ..
            } = fresh(features);
            let (kick, kicked) = mpsc::channel();
            let (interrupt, interrupted) = mpsc::channel();
            let device = std::thread::spawn(move || {
                let mut served = 0;
                let mut limit = 0;
                while served < REQUESTS {
                    limit = limit % (SIZE + 1) + 1;
                    let mut batch = queue.batch(limit);
                    while let Some(head) = batch.pop(&mut chain).unwrap() {
                        batch.push(head, 0);
                        served += 1;
                    }
                    let finished = batch.finish();
                    if finished.notify {
                        interrupt.send(()).unwrap();
                    }
                    if finished.sleep && served < REQUESTS {
                        kicked.recv().unwrap();
                    }
                }
            });
            let (mut sent, mut done) = (0, 0);
            while done < REQUESTS {
                while sent < REQUESTS && guest.free() > 0 {
                    guest.add_chain(&[], &[]).unwrap();
                    sent += 1;
                }
                guest.publish();
                if guest.needs_kick() {
                    // The device is gone once it has served everything.
                    let _ = kick.send(());
                }
                guest.disable_interrupts();
                while let Some(used) = guest.poll_used() {
                    assert!(used.expected);
                    done += 1;
                }
                if done < REQUESTS && (sent == REQUESTS || guest.free() == 0) {
                    while guest.enable_interrupts() {
                        interrupted.recv().unwrap();
                    }
                }
            }
            device.join().unwrap();
        });
    }
}

#[test]
fn a_pass_that_finds_the_ring_broken_ends_asleep_with_what_was_pushed_published() {
    for features in both(PLAIN) {
        let mut rig = Rig::new(8, features);
        rig.offer_buffer();
        let head = rig.pop_head();
        rig.break_ring();
        let mut batch = rig.queue.batch(4);
        assert!(matches!(batch.pop(&mut rig.chain), Err(PopError::Ring(_))));
        batch.push(head, 0);
        // Nothing more is fetched, so there is nothing to come back for.
        let finished = batch.finish();
        assert!(finished.sleep && finished.notify);
        assert!(rig.guest.poll_used().is_some());
    }
}
