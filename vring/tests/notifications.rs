//! Rows N: who wakes whom, and when nobody need.

mod rig;

use proptest::prelude::*;
use rig::{EVENT_IDX, PLAIN, Rig, TABLE, all, base_after, both, ends};
use vm_memory::GuestAddress;
use vring::driver::{Driver, EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE};
use vring::{RingBase, RingFeatures};

/// Entries of the rings here, so that batches of up to as many fit.
const SIZE: u16 = 32;

/// Completes `count` chains of one descriptor and publishes them as one batch.
fn complete(rig: &mut Rig, count: u16) {
    for _ in 0..count {
        rig.offer_buffer();
        let head = rig.pop_head();
        rig.queue.push(head, 0);
    }
    assert_eq!(rig.queue.publish(), usize::from(count));
    while rig.guest.poll_used().is_some() {}
}

/// A rig after `count` chains of one descriptor each, whose first decision, which is always yes,
/// has been made.
fn decided(features: RingFeatures, count: u16) -> Rig {
    let mut rig = Rig::starting_at(u32::from(SIZE), features, count);
    assert!(rig.queue.should_notify());
    rig
}

/// The guest asks for an interrupt when chain `count` completes, all having one descriptor.
fn ask_at(rig: &Rig, count: u16) {
    match (&rig.guest, base_after(count, SIZE, rig.config.features)) {
        (Driver::Split(guest), _) => guest.set_used_event(count),
        (Driver::Packed(guest), RingBase::Packed { used, .. }) => {
            guest.set_driver_event(used.to_bits(), EVENT_DESC);
        }
        (Driver::Packed(_), RingBase::Split { .. }) => panic!("the formats differ"),
    }
}

/// The guest asks for every interrupt, or for none, by flag.
fn ask(rig: &Rig, every: bool) {
    match &rig.guest {
        Driver::Split(guest) => guest.set_avail_flags(u16::from(!every)),
        Driver::Packed(guest) => {
            guest.set_driver_event(0, if every { EVENT_ENABLE } else { EVENT_DISABLE });
        }
    }
}

#[test]
fn n1_looking_at_an_empty_ring_changes_nothing() {
    for features in all() {
        let mut rig = decided(features, 0);
        for _ in 0..3 {
            assert_eq!(rig.pop(), Ok(None));
            assert_eq!(rig.queue.publish(), 0);
            assert!(!rig.queue.has_available());
            assert!(!rig.queue.should_notify(), "nothing was published");
        }
        assert_eq!(rig.guest.poll_used(), None);
        assert_eq!(rig.queue.base(), rig.config.base);
    }
}

#[test]
fn n5_crossing_the_event_notifies_and_stopping_short_does_not() {
    for features in both(EVENT_IDX) {
        let mut rig = decided(features, 0);
        ask_at(&rig, 2);
        complete(&mut rig, 2);
        assert!(!rig.queue.should_notify());
        complete(&mut rig, 1);
        assert!(rig.queue.should_notify());
        complete(&mut rig, 1);
        assert!(!rig.queue.should_notify(), "told already");
    }
}

#[test]
fn n5_a_batch_that_jumps_over_the_event_notifies_once() {
    for features in both(EVENT_IDX) {
        let mut rig = decided(features, 65533);
        ask_at(&rig, 0);
        complete(&mut rig, 7);
        assert!(rig.queue.should_notify());
        assert!(!rig.queue.should_notify());
    }
}

#[test]
fn n5_one_decision_covers_everything_published_since_the_last() {
    for features in both(EVENT_IDX) {
        let mut rig = decided(features, 0);
        ask_at(&rig, 0);
        complete(&mut rig, 1);
        complete(&mut rig, 1);
        complete(&mut rig, 1);
        assert!(rig.queue.should_notify());
    }
}

#[test]
fn n5_the_first_decision_after_a_start_notifies_wherever_the_event_is() {
    for features in both(EVENT_IDX) {
        let mut rig = Rig::new(u32::from(SIZE), features);
        ask_at(&rig, 40);
        complete(&mut rig, 1);
        assert!(rig.queue.should_notify());
        complete(&mut rig, 1);
        assert!(!rig.queue.should_notify());
    }
}

#[test]
fn n5_more_publications_than_an_index_can_count_notify() {
    // 65536 completions later a split ring's index is where it was, and a packed ring's position
    // long since, which must not look like nothing.
    for features in both(EVENT_IDX) {
        for extra in [0, 1, 7] {
            let mut rig = decided(features, 0);
            ask_at(&rig, 0x4000);
            for _ in 0..8192 {
                complete(&mut rig, 8);
            }
            complete(&mut rig, extra);
            assert!(rig.queue.should_notify());
        }
    }
}

#[test]
fn n5_a_packed_event_inside_a_chain_is_reached_with_the_chain() {
    // The used position passes all descriptors of a chain at once.
    let mut rig = decided(rig::packed(EVENT_IDX), 0);
    for event in [0, 2] {
        ask_at(&rig, 3 + event);
        complete(&mut rig, 3);
        assert!(!rig.queue.should_notify());
        let three = [rig::segment(rig::BUFFERS, 1); 3];
        rig.guest.add_chain(&three, &[]).unwrap();
        rig.guest.publish();
        let head = rig.pop_head();
        rig.complete(head, 0);
        assert!(rig.queue.should_notify());
        rig = decided(rig::packed(EVENT_IDX), 0);
    }
}

#[test]
fn n6_re_arming_looks_once_however_fast_the_index_moves() {
    let rounds = ends(|| {
        let mut rig = Rig::new(8, EVENT_IDX);
        let mut rounds = 0;
        for idx in 1..=8 {
            rig.split().set_avail_idx(idx);
            assert!(!rig.queue.enable_notification());
            rounds += 1;
        }
        // Even an index that is out of bounds only says "look again", and pop says what it is.
        rig.split().set_avail_idx(1000);
        assert!(!rig.queue.enable_notification());
        rig.ring_fault();
        rounds
    });
    assert_eq!(rounds, 8);
}

#[test]
fn n6_re_arming_looks_once_however_fast_the_guest_publishes() {
    for features in all() {
        let rounds = ends(move || {
            let mut rig = Rig::new(8, features);
            (0..8)
                .map(|_| {
                    rig.offer_buffer();
                    assert!(!rig.queue.enable_notification());
                })
                .count()
        });
        assert_eq!(rounds, 8);
    }
}

#[test]
fn n7_buffers_that_race_with_re_arming_are_seen_by_the_last_look() {
    for features in all() {
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
    for features in all() {
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
fn n8_asking_for_no_interrupts_is_obeyed() {
    for features in both(PLAIN) {
        let mut rig = Rig::new(8, features);
        ask(&rig, false);
        complete(&mut rig, 1);
        assert!(!rig.queue.should_notify());
        ask(&rig, true);
        complete(&mut rig, 1);
        assert!(rig.queue.should_notify());
    }
}

#[test]
fn n8_with_event_idx_a_packed_ring_has_the_flags_too() {
    let mut rig = decided(rig::packed(EVENT_IDX), 0);
    for every in [false, true, false] {
        ask(&rig, every);
        complete(&mut rig, 1);
        assert_eq!(rig.queue.should_notify(), every);
    }
}

#[test]
fn kicks_are_suppressed_until_asked_for() {
    for features in all() {
        let mut rig = Rig::new(8, features);
        assert!(rig.queue.enable_notification());
        rig.offer_buffer();
        assert!(rig.guest.needs_kick());
        rig.queue.disable_notification();
        for _ in 0..5 {
            rig.offer_buffer();
            assert!(!rig.guest.needs_kick());
        }
        let heads = rig.pop_all();
        assert_eq!(heads.len(), 6);
        assert!(rig.queue.enable_notification());
        rig.offer_buffer();
        assert!(rig.guest.needs_kick());
        for head in heads {
            rig.queue.push(head, 0);
        }
    }
}

#[test]
fn kicks_are_asked_for_in_the_words_of_the_format() {
    let mut rig = Rig::new(8, PLAIN);
    rig.queue.disable_notification();
    assert_eq!(rig.split().used_flags(), 1);
    assert!(rig.queue.enable_notification());
    assert_eq!(rig.split().used_flags(), 0);

    let mut rig = Rig::new(8, EVENT_IDX);
    rig.queue.disable_notification();
    assert_eq!(rig.split().used_flags(), 0, "must stay 0 with EVENT_IDX");
    rig.offer_buffer();
    drop(rig.pop_all());
    assert!(rig.queue.enable_notification());
    assert_eq!(rig.split().avail_event(), 1);

    for (features, enabled) in [(PLAIN, EVENT_ENABLE), (EVENT_IDX, EVENT_DESC)] {
        let mut rig = Rig::starting_at(8, rig::packed(features), 7);
        rig.queue.disable_notification();
        assert_eq!(rig.packed().device_event().1, EVENT_DISABLE);
        rig.offer_buffer();
        drop(rig.pop_all());
        assert!(rig.queue.enable_notification());
        let (position, flags) = rig.packed().device_event();
        assert_eq!(flags, enabled);
        if features.event_idx {
            assert_eq!(position, 0, "past the end: wrap counter 0");
        }
    }
}

#[test]
fn n10_a_start_asks_for_kicks_whatever_was_left_behind() {
    for features in all() {
        let mut rig = Rig::new(8, features);
        rig.queue.disable_notification();
        rig.restart(rig.config.base);
        rig.offer_buffer();
        assert!(rig.guest.needs_kick());
    }
}

#[test]
fn n11_interrupts_asked_for_by_indirect_chains_are_those_of_their_one_descriptor() {
    let features = RingFeatures {
        indirect_desc: true,
        ..EVENT_IDX
    };
    for features in both(features) {
        let mut rig = decided(features, 30);
        ask_at(&rig, 33);
        for expected in [false, false, false, true, false] {
            let three = [rig::segment(rig::BUFFERS, 1); 3];
            rig.guest
                .add_indirect(GuestAddress(TABLE), &three, &[])
                .unwrap();
            rig.guest.publish();
            let head = rig.pop_head();
            rig.complete(head, 0);
            rig.guest.poll_used().unwrap();
            assert_eq!(rig.queue.should_notify(), expected);
        }
    }
}

proptest! {
    /// The decision of a queue, over any history, against the specification's sentence: notify
    /// if the driver's event is among what was published since the last decision.
    #[test]
    fn decisions_agree_with_the_specification(
        start: u16,
        packed: bool,
        steps in proptest::collection::vec((0u16..20, -12i32..12), 1..20),
    ) {
        let features = RingFeatures { packed, ..EVENT_IDX };
        // A packed ring's positions repeat every two passes.
        let start = if packed { start % (2 * SIZE) } else { start };
        let mut rig = decided(features, start);
        let mut count = start;
        for (batch, offset) in steps {
            let event = u16::try_from((i32::from(count) + offset).rem_euclid(65536)).unwrap();
            ask_at(&rig, event);
            let published = (0..batch).map(|i| count.wrapping_add(i));
            let expected = published.into_iter().any(|index| index == event);
            complete(&mut rig, batch);
            count = count.wrapping_add(batch);
            prop_assert_eq!(rig.queue.should_notify(), expected);
        }
    }
}
