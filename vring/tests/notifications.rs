//! Rows N: who wakes whom, and when nobody need.

mod rig;

use proptest::prelude::*;
use rig::{EVENT_IDX, PLAIN, Rig, ends};
use vring::RingFeatures;

/// Completes `count` chains, the same head over and over, and publishes them as one batch.
fn complete(rig: &mut Rig, count: u16) {
    for _ in 0..count {
        rig.offer(0);
        let head = rig.pop_head();
        rig.queue.push(head, 0);
    }
    assert_eq!(rig.queue.publish(), usize::from(count));
}

/// A rig whose first decision, which is always yes, has been made.
fn decided(features: RingFeatures, index: u16) -> Rig {
    let mut rig = Rig::starting_at(8, features, index);
    assert!(rig.queue.should_notify());
    rig
}

#[test]
fn n1_looking_at_an_empty_ring_changes_nothing() {
    let mut rig = decided(PLAIN, 0);
    for _ in 0..3 {
        assert_eq!(rig.pop(), Ok(None));
        assert_eq!(rig.queue.publish(), 0);
        assert!(!rig.queue.has_available());
        assert!(!rig.queue.should_notify(), "nothing was published");
    }
    assert_eq!(rig.guest.used_idx(), 0);
}

#[test]
fn n5_crossing_used_event_notifies_and_stopping_short_does_not() {
    let mut rig = decided(EVENT_IDX, 0);
    rig.guest.set_used_event(2);
    complete(&mut rig, 2);
    assert!(!rig.queue.should_notify());
    complete(&mut rig, 1);
    assert!(rig.queue.should_notify());
    complete(&mut rig, 1);
    assert!(!rig.queue.should_notify(), "told already");
}

#[test]
fn n5_a_batch_that_jumps_over_used_event_notifies_once() {
    let mut rig = decided(EVENT_IDX, 65533);
    rig.guest.set_used_event(0);
    complete(&mut rig, 7);
    assert!(rig.queue.should_notify());
    assert!(!rig.queue.should_notify());
}

#[test]
fn n5_one_decision_covers_everything_published_since_the_last() {
    let mut rig = decided(EVENT_IDX, 0);
    rig.guest.set_used_event(0);
    complete(&mut rig, 1);
    complete(&mut rig, 1);
    complete(&mut rig, 1);
    assert!(rig.queue.should_notify());
}

#[test]
fn n5_the_first_decision_after_a_start_notifies_wherever_used_event_is() {
    let mut rig = Rig::new(8, EVENT_IDX);
    rig.guest.set_used_event(0x4000);
    complete(&mut rig, 1);
    assert!(rig.queue.should_notify());
    complete(&mut rig, 1);
    assert!(!rig.queue.should_notify());
}

#[test]
fn n5_more_publications_than_the_index_can_count_notify() {
    // 65536 completions later the index is where it was, which must not look like nothing.
    for extra in [0, 1, 7] {
        let mut rig = decided(EVENT_IDX, 0);
        rig.guest.set_used_event(0x4000);
        for _ in 0..8192 {
            complete(&mut rig, 8);
        }
        complete(&mut rig, extra);
        assert!(rig.queue.should_notify());
    }
}

#[test]
fn n6_re_arming_looks_once_however_fast_the_index_moves() {
    let rounds = ends(|| {
        let mut rig = Rig::new(8, EVENT_IDX);
        let mut rounds = 0;
        for idx in 1..=8 {
            rig.guest.set_avail_idx(idx);
            assert!(!rig.queue.enable_notification());
            rounds += 1;
        }
        // Even an index that is out of bounds only says "look again", and pop says what it is.
        rig.guest.set_avail_idx(1000);
        assert!(!rig.queue.enable_notification());
        rig.ring_fault();
        rounds
    });
    assert_eq!(rounds, 8);
}

#[test]
fn n7_buffers_that_race_with_re_arming_are_seen_by_the_last_look() {
    for features in [PLAIN, EVENT_IDX] {
        let mut rig = Rig::new(8, features);
        rig.queue.disable_notification();
        assert_eq!(rig.pop(), Ok(None));
        rig.offer_buffer(); // after the last pop, before re-arming: no kick will come
        assert!(!rig.queue.enable_notification());
        let head = rig.pop_head();
        rig.queue.push(head, 0);
        assert!(rig.queue.enable_notification());
    }
}

#[test]
fn n7_no_kick_is_lost_between_two_threads() {
    // Guest and device race for real: the device sleeps only when told it may, and wakes only by
    // the guest's kick. A lost kick or interrupt hangs, and the deadline fails the test.
    const REQUESTS: u32 = 20_000;
    for features in [PLAIN, EVENT_IDX] {
        let served = ends(move || {
            let Rig {
                mut guest,
                mut queue,
                mut chain,
                ..
            } = Rig::new(8, features);
            let (kick, kicked) = std::sync::mpsc::channel();
            let (interrupt, interrupted) = std::sync::mpsc::channel();
            let device = std::thread::spawn(move || {
                let mut served = 0;
                while served < REQUESTS {
                    queue.disable_notification();
                    while let Some(head) = queue.pop(&mut chain).unwrap() {
                        queue.push(head, 0);
                        served += 1;
                    }
                    queue.publish();
                    if queue.should_notify() {
                        interrupt.send(()).unwrap();
                    }
                    if queue.enable_notification() && served < REQUESTS {
                        kicked.recv().unwrap();
                    }
                }
                served
            });
            let (mut sent, mut done) = (0, 0);
            while done < REQUESTS {
                while sent < REQUESTS && guest.free() > 0 {
                    guest
                        .add_chain(&[rig::segment(rig::BUFFERS, 1)], &[])
                        .unwrap();
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
            device.join().unwrap()
        });
        assert_eq!(served, REQUESTS);
    }
}

#[test]
fn n8_no_interrupt_flag_is_obeyed_without_event_idx() {
    let mut rig = Rig::new(8, PLAIN);
    rig.guest.set_avail_flags(1);
    complete(&mut rig, 1);
    assert!(!rig.queue.should_notify());
    rig.guest.set_avail_flags(0);
    complete(&mut rig, 1);
    assert!(rig.queue.should_notify());
}

#[test]
fn kicks_are_suppressed_by_flag_without_event_idx() {
    let mut rig = Rig::new(8, PLAIN);
    rig.queue.disable_notification();
    assert_eq!(rig.guest.used_flags(), 1);
    rig.offer_buffer();
    assert!(!rig.guest.needs_kick());
    assert!(!rig.queue.enable_notification());
    assert_eq!(rig.guest.used_flags(), 0);
    rig.offer_buffer();
    assert!(rig.guest.needs_kick());
    rig.queue.disable_notification();
    assert_eq!(rig.guest.used_flags(), 1, "and disabled again");
}

#[test]
fn kicks_are_suppressed_by_a_stale_event_with_event_idx() {
    let mut rig = Rig::new(8, EVENT_IDX);
    assert!(rig.queue.enable_notification());
    rig.offer_buffer();
    assert!(rig.guest.needs_kick());
    rig.queue.disable_notification();
    assert_eq!(rig.guest.used_flags(), 0, "must stay 0 with EVENT_IDX");
    for _ in 0..5 {
        rig.offer_buffer();
        assert!(!rig.guest.needs_kick());
    }
    let heads: Vec<_> = std::iter::from_fn(|| rig.pop().unwrap()).collect();
    assert_eq!(heads.len(), 6);
    assert!(rig.queue.enable_notification());
    assert_eq!(rig.guest.avail_event(), 6);
    rig.offer_buffer();
    assert!(rig.guest.needs_kick());
    for head in heads {
        rig.queue.push(head, 0);
    }
}

proptest! {
    /// The decision of a queue, over any history, against the specification's sentence: notify
    /// if the driver's event is among the indices published since the last decision.
    #[test]
    fn decisions_agree_with_the_specification(
        start: u16,
        steps in proptest::collection::vec((0u16..20, -12i32..12), 1..20),
    ) {
        let mut rig = decided(EVENT_IDX, start);
        let mut used_idx = start;
        for (count, offset) in steps {
            let event = u16::try_from((i32::from(used_idx) + offset).rem_euclid(65536)).unwrap();
            rig.guest.set_used_event(event);
            let published = (0..count).map(|i| used_idx.wrapping_add(i));
            let expected = published.into_iter().any(|index| index == event);
            complete(&mut rig, count);
            used_idx = used_idx.wrapping_add(count);
            prop_assert_eq!(rig.queue.should_notify(), expected);
        }
    }
}
