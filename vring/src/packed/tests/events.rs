//! Who is notified of what.

use super::*;

#[test]
fn notification_is_decided_once_for_all_that_was_published() {
    for (features, event, first, later) in [
        (PACKED, (at(0, true), 0), true, true),
        (PACKED, (at(0, true), 1), false, false),
        (PACKED, (at(0, true), 2), true, true),
        (EVENT_IDX, (at(0, true), 0), true, true),
        (EVENT_IDX, (at(0, true), 1), false, false),
        (EVENT_IDX, (at(4, true), 2), true, true),
        (EVENT_IDX, (at(3, true), 2), true, false),
        (EVENT_IDX, (at(5, true), 2), true, false),
        (EVENT_IDX, (at(4, false), 2), true, false),
        (EVENT_IDX, (at(0, true), 3), true, true),
    ] {
        let mut rig = Rig::new(8, features);
        let (position, flags) = event;
        rig.guest.set_event(position, flags);
        for (id, expected) in [(0, first), (1, later)] {
            rig.guest.add_chain(id, id + 3);
            let head = rig.pop();
            rig.queue.push(head, 0);
            rig.queue.publish();
            // After the second: descriptors 3 to 6 were passed since the last decision.
            let passed_four = position == at(3, true) && flags == 2 && id == 1;
            let passed_five = position == at(5, true) && flags == 2 && id == 1;
            let expected = expected || (features.event_idx && (passed_four || passed_five));
            assert_eq!(
                rig.queue.should_notify(),
                expected,
                "{features:?} {event:?}"
            );
            assert!(!rig.queue.should_notify());
        }
    }
}

#[test]
fn a_position_asked_for_is_notified_when_passed_and_only_then() {
    // Chains of one descriptor, over two passes, against each position.
    let size = 4;
    for asked in 0..8 {
        let position = to_position(asked, size);
        let mut rig = Rig::new(size, EVENT_IDX);
        rig.queue.should_notify();
        rig.guest.set_event(position, 2);
        for index in 0..8 {
            rig.guest.add_chain(index, 1);
            let head = rig.pop();
            rig.queue.push(head, 0);
            rig.queue.publish();
            assert_eq!(rig.queue.should_notify(), index == asked, "{index} {asked}");
        }
    }
}

#[test]
fn kicks_are_asked_for_at_the_position_looked_at_next() {
    let mut rig = Rig::at(4, EVENT_IDX, at(3, true));
    assert_eq!(rig.guest.device_event().1, 0);
    rig.queue.disable_notification();
    assert_eq!(rig.guest.device_event().1, 1);
    assert!(rig.queue.enable_notification());
    assert_eq!(rig.guest.device_event(), (at(3, true), 2));
    rig.guest.add_chain(0, 2);
    assert!(!rig.queue.enable_notification());
    let head = rig.pop();
    rig.queue.push(head, 0);
    assert!(rig.queue.enable_notification());
    assert_eq!(rig.guest.device_event(), (at(1, false), 2));
}

#[test]
fn kicks_are_asked_for_plainly_without_event_idx() {
    let mut rig = Rig::new(4, PACKED);
    for _ in 0..2 {
        rig.queue.disable_notification();
        rig.queue.disable_notification();
        assert_eq!(rig.guest.device_event().1, 1);
        assert!(rig.queue.enable_notification());
        assert_eq!(rig.guest.device_event().1, 0);
    }
}

#[test]
fn p13_events_at_the_end_of_the_smallest_and_the_largest_ring() {
    for size in [1, 2, 32768] {
        for wrap in [true, false] {
            // The next descriptor used is the last of a pass.
            let last = at(size - 1, wrap);
            let mut rig = Rig::at(size, EVENT_IDX, last);
            rig.queue.should_notify();
            // Named again after it was passed, the last comes two passes later: in a ring of one that is
            // what the third step passes.
            let asked = [(last, true), (at(0, !wrap), true), (last, size == 1)];
            for (id, (position, notified)) in (0..).zip(asked) {
                rig.guest.set_event(position, 2);
                rig.guest.add_chain(id, 1);
                let head = rig.pop();
                rig.queue.push(head, 0);
                rig.queue.publish();
                assert_eq!(
                    rig.queue.should_notify(),
                    notified,
                    "size {size}, {wrap}, step {id}"
                );
            }
        }
    }
}
