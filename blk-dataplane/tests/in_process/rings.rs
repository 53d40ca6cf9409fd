//! Rings that are broken, notifications, and the life of a queue.

use blk_dataplane::{Backing, QueueError, QueueSetup};
use event_poll::EventNotifier;
use vm_memory::GuestAddress;
use vring::driver::F_NEXT;

use crate::support::embedded::{Embedded, setup, single};
use crate::support::queue::{EVENT_IDX, FEATURES, GuestQueue, INDIRECT};
use crate::support::ram::GuestRam;
use crate::support::request::{Framing, OK, Request};
use crate::support::scratch::{Kind, Scratch, null_device, on_threads};
use crate::support::{eventually, pattern};

/// Stages some reads that are fine.
fn add_reads(queue: &mut GuestQueue, count: usize) {
    for _ in 0..count {
        let request = Request::read(0, 512);
        queue.add(&request, &Framing::classic(&request));
    }
}

/// Breaks the ring by `breakage` with requests in flight, and checks the RING answer.
fn check_ring_fault(breakage: impl Fn(&mut GuestQueue), lost: usize) {
    for features in [FEATURES, FEATURES & !EVENT_IDX] {
        let scratch = Scratch::zeroed(Kind::Disk, 1 << 20);
        let mut vmm = Embedded::new(&scratch.device());
        let mut queue = vmm.queue_with(0, 16, features);
        let mut other = vmm.queue_with(1, 16, features);
        add_reads(&mut queue, 3);
        queue.publish();
        breakage(&mut queue);
        queue.kick.notify().unwrap();

        eventually("the err notifier", || queue.err.test_and_clear().unwrap());
        // What was popped before completes; what came with the breakage does not.
        while queue.outstanding() > lost {
            assert_eq!(queue.next().status, Some(OK));
        }
        // The ring stays stopped, whatever the guest does, and says so once.
        for _ in 0..10 {
            queue.kick.notify().unwrap();
            assert_eq!(other.answer(&Request::read(0, 512)), (Some(OK), 513));
        }
        let used = queue.driver.used_idx();
        vmm.plane.drain().unwrap();
        assert_eq!(queue.driver.used_idx(), used);
        assert!(!queue.err.test_and_clear().unwrap(), "reported twice");
        assert_eq!(vmm.plane.counters().ring_faults, 1);

        // C16: stopped and set up anew it works.
        vmm.stop(0);
        let mut again = vmm.queue_with(0, 16, features);
        assert_eq!(again.answer(&Request::read(0, 512)), (Some(OK), 513));
        assert_eq!(other.answer(&Request::read(0, 512)), (Some(OK), 513));
        assert!(!again.err.test_and_clear().unwrap());
    }
}

#[test]
fn a1_avail_index_too_far_ahead_stops_the_ring_alone() {
    check_ring_fault(
        |queue| {
            // The three must be fetched first, or they would be part of the jump.
            while queue.outstanding() > 0 {
                queue.next();
            }
            let next = queue.driver.next_avail();
            queue.driver.set_avail_idx(next.wrapping_add(17));
        },
        0,
    );
}

#[test]
fn a2_avail_index_that_goes_backwards_stops_the_ring_alone() {
    check_ring_fault(
        |queue| {
            while queue.outstanding() > 0 {
                queue.next();
            }
            let next = queue.driver.next_avail();
            queue.driver.set_avail_idx(next.wrapping_sub(1));
        },
        0,
    );
}

#[test]
fn a3_head_out_of_range_stops_the_ring_and_what_is_in_flight_completes() {
    check_ring_fault(
        |queue| {
            queue.driver.offer(16);
            queue.driver.publish();
        },
        0,
    );
}

#[test]
fn a4_head_that_is_in_flight_stops_the_ring_or_is_a_request_of_its_own() {
    // Whether the first of the two has completed when the second is popped is a race; in neither
    // case may there be more completions than chains.
    for _ in 0..50 {
        let scratch = Scratch::zeroed(Kind::Disk, 1 << 20);
        let mut vmm = Embedded::new(&scratch.device());
        let mut queue = vmm.queue(0, 16);
        let request = Request::read(0, 64 * 1024);
        let head = queue.add(&request, &Framing::classic(&request));
        queue.driver.offer(u16::try_from(head).unwrap());
        queue.publish();
        assert_eq!(queue.next().status, Some(OK));
        vmm.plane.drain().unwrap();
        let faults = vmm.plane.counters().ring_faults;
        let base = vmm.stop(0);
        let completions = queue.driver.used_idx();
        assert_eq!(queue.err.test_and_clear().unwrap(), faults == 1);
        assert_eq!(u64::from(completions), 2 - faults);
        assert_eq!(base, completions);
    }
}

#[test]
fn a6_indices_wrap_from_65535_to_0() {
    for features in [FEATURES, FEATURES & !EVENT_IDX] {
        let mut vmm = Embedded::new(&null_device(1 << 20));
        let mut queue = GuestQueue::starting_at(&vmm.ram, 0, 16, features, 65530);
        vmm.start(&queue, 65530);
        for _ in 0..20 {
            assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
        }
        assert_eq!(vmm.stop(0), 14);
    }
}

#[test]
fn a8_guest_writes_to_the_used_ring_change_nothing() {
    let (_vmm, mut queue) = single(&null_device(1 << 20));
    for _ in 0..20 {
        queue.driver.set_used_flags(0xffff);
        queue.driver.set_used_idx(0x7777);
        let request = Request::read(0, 512);
        queue.add(&request, &Framing::classic(&request));
        queue.driver.publish();
        queue.kick.notify().unwrap();
        let expected = queue.driver.next_used().wrapping_add(1);
        eventually("the device's own index", || {
            queue.driver.used_idx() == expected
        });
        assert_eq!(queue.next().status, Some(OK));
    }
}

#[test]
fn a10_a_full_ring_is_served_whole_at_every_size() {
    for size in [2, 4, 16, 128, 256, 1024] {
        for features in [FEATURES, FEATURES & !EVENT_IDX] {
            let mut vmm = Embedded::new(&null_device(1 << 20));
            let mut queue = vmm.queue_with(0, size, features);
            for _ in 0..3 {
                let request = Request::read(0, 512);
                let framing = Framing::joined().table(crate::support::request::Table::Indirect);
                for _ in 0..size {
                    queue.add(&request, &framing);
                }
                queue.publish();
                let done = queue.finish();
                assert_eq!(done.len(), usize::try_from(size).unwrap());
                assert!(done.iter().all(|done| done.status == Some(OK)));
                queue.arena.reset();
            }
        }
    }
}

#[test]
fn a12_buffers_published_before_the_start_are_found_without_a_kick() {
    for features in [FEATURES, FEATURES & !EVENT_IDX] {
        let mut vmm = Embedded::new(&null_device(1 << 20));
        let mut queue = vmm.prepare(0, 16, features);
        add_reads(&mut queue, 4);
        queue.driver.publish();
        vmm.start(&queue, 0);
        assert_eq!(queue.finish().len(), 4);
    }
}

#[test]
fn a12_disabled_queue_consumes_nothing_until_enabled() {
    let mut vmm = Embedded::new(&null_device(1 << 20));
    let mut queue = vmm.prepare(0, 16, FEATURES);
    let disabled = QueueSetup {
        enabled: false,
        ..setup(&queue, 0)
    };
    vmm.plane.start_queue(0, disabled).unwrap();
    add_reads(&mut queue, 4);
    queue.publish();
    // A kick while it is disabled, seen and not repeated.
    queue.kick.notify().unwrap();
    vmm.plane.drain().unwrap();
    assert_eq!(queue.driver.used_idx(), 0);
    vmm.plane.enable_queue(0, true).unwrap();
    assert_eq!(queue.finish().len(), 4);

    vmm.plane.enable_queue(0, false).unwrap();
    add_reads(&mut queue, 2);
    queue.publish();
    vmm.plane.drain().unwrap();
    assert_eq!(queue.driver.used_idx(), 4);
    assert_eq!(vmm.stop(0), 4);
}

#[test]
fn d1_d2_broken_chains_cost_their_heads_and_no_more() {
    let (vmm, mut queue) = single(&null_device(1 << 20));
    // Far from where the driver takes its descriptors.
    queue.driver.write_desc(100, 0x1000, 16, F_NEXT, 100);
    queue.driver.write_desc(101, 0x1000, 16, F_NEXT, 999);
    queue.driver.offer(100);
    queue.driver.offer(101);
    queue.publish();
    for expected in [100, 101] {
        let mut used = None;
        eventually("the bad head", || {
            used = queue.driver.poll_used();
            used.is_some()
        });
        assert_eq!(used.map(|used| (used.id, used.len)), Some((expected, 0)));
    }
    assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
    let counters = vmm.plane.counters();
    assert_eq!((counters.bad_chains, counters.requests), (2, 3));
}

#[test]
fn n1_kicks_of_an_empty_ring_do_nothing() {
    let (vmm, mut queue) = single(&null_device(1 << 20));
    for _ in 0..100 {
        queue.kick.notify().unwrap();
    }
    assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
    assert_eq!(vmm.plane.counters().requests, 1);
    assert_eq!(queue.driver.used_idx(), 1);
}

/// An eventfd whose counter is as full as it gets.
fn saturated() -> EventNotifier {
    use std::os::fd::OwnedFd;
    let fd = nix::sys::eventfd::EventFd::from_value_and_flags(
        0,
        nix::sys::eventfd::EfdFlags::EFD_NONBLOCK,
    )
    .unwrap();
    fd.write(u64::MAX - 1).unwrap();
    EventNotifier::from_fd(OwnedFd::from(fd)).unwrap()
}

#[test]
fn n2_saturated_kick_counter_is_one_kick() {
    let mut vmm = Embedded::new(&null_device(1 << 20));
    let mut queue = vmm.prepare(0, 16, FEATURES);
    queue.kick = saturated();
    vmm.start(&queue, 0);
    for _ in 0..10 {
        assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
    }
    // Level triggered: a counter that one read did not clear would keep the thread awake.
    let before = vmm.plane.counters().sleeps;
    std::thread::sleep(std::time::Duration::from_millis(50));
    let sleeps = vmm.plane.counters().sleeps - before;
    assert!(sleeps <= 2, "{sleeps} sleeps that lasted not long");
}

#[test]
fn n3_full_call_counter_does_not_stop_completions() {
    let mut vmm = Embedded::new(&null_device(1 << 20));
    let mut queue = vmm.prepare(0, 16, FEATURES & !EVENT_IDX);
    queue.call = saturated();
    vmm.start(&queue, 0);
    for expected in 1..=20 {
        add_reads(&mut queue, 1);
        queue.publish();
        eventually("a completion", || queue.driver.used_idx() == expected);
        queue.poll().unwrap();
    }
}

#[test]
fn n4_completions_go_on_without_a_call_notifier_and_with_one_nobody_holds() {
    let mut vmm = Embedded::new(&null_device(1 << 20));
    let mut polled = vmm.prepare(0, 16, FEATURES);
    let none = QueueSetup {
        call: None,
        err: None,
        ..setup(&polled, 0)
    };
    vmm.plane.start_queue(0, none).unwrap();
    let mut deserted = vmm.prepare(1, 16, FEATURES);
    vmm.start(&deserted, 0);
    deserted.call = EventNotifier::new().unwrap();
    for queue in [&mut polled, &mut deserted] {
        for expected in 1..=20 {
            add_reads(queue, 1);
            queue.publish();
            eventually("a completion", || queue.driver.used_idx() == expected);
            assert_eq!(queue.poll().unwrap().status, Some(OK));
        }
    }
}

#[test]
fn n4_call_notifier_can_be_taken_away_and_given_back() {
    let (mut vmm, mut queue) = single(&null_device(1 << 20));
    queue.answer(&Request::read(0, 512));
    // The interrupt comes after the index that ended the wait.
    vmm.plane.drain().unwrap();
    queue.call.test_and_clear().unwrap();
    vmm.plane.set_call(0, None).unwrap();
    add_reads(&mut queue, 1);
    queue.publish();
    eventually("a completion", || queue.driver.used_idx() == 2);
    queue.poll().unwrap();
    vmm.plane.drain().unwrap();
    assert!(!queue.call.test_and_clear().unwrap());
    let call = Box::new(queue.call.try_clone().unwrap());
    vmm.plane.set_call(0, Some(call)).unwrap();
    for _ in 0..10 {
        assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
    }
}

#[test]
fn n5_used_event_anywhere_costs_at_most_interrupts() {
    let (vmm, mut queue) = single(&null_device(1 << 20));
    for distance in [0u16, 1, 2, 1000, 0x7fff, 0x8000, 0xffff] {
        let event = queue.driver.next_used().wrapping_add(distance);
        queue.driver.set_used_event(event);
        let before = vmm.plane.counters().notifications;
        let first = queue.driver.next_used();
        add_reads(&mut queue, 1);
        queue.publish();
        eventually("a completion", || {
            queue.driver.used_idx() == first.wrapping_add(1)
        });
        let counters = vmm.plane.counters();
        if distance == 0 {
            eventually("the interrupt that MUST be sent", || {
                queue.call.test_and_clear().unwrap()
            });
        } else if first > 0 {
            assert_eq!(counters.notifications, before, "not asked for: {distance}");
        }
        queue.poll().unwrap();
    }
}

#[test]
fn n7_no_kick_is_lost_however_the_guest_times_it() {
    // A single request at a time, published the moment the last one completes: the device is then
    // just about to arm. A kick lost in that window hangs the wait.
    for features in [FEATURES, FEATURES & !EVENT_IDX, FEATURES & !INDIRECT] {
        let mut vmm = Embedded::new(&null_device(1 << 20));
        let mut queue = vmm.queue_with(0, 4, features);
        let request = Request::read(0, 512);
        for round in 0..3000 {
            queue.add(&request, &Framing::joined());
            queue.publish();
            if round % 3 == 0 {
                // Busy: as near to the arming as it gets.
                let start = std::time::Instant::now();
                while queue.poll().is_none() {
                    assert!(
                        start.elapsed() < crate::support::DEADLINE,
                        "a kick was lost"
                    );
                    std::hint::spin_loop();
                }
            } else {
                queue.next();
            }
            queue.arena.reset();
        }
    }
}

#[test]
fn n8_no_interrupt_flag_is_heeded_and_its_absence_too() {
    let mut vmm = Embedded::new(&null_device(1 << 20));
    let mut queue = vmm.queue_with(0, 16, FEATURES & !EVENT_IDX);
    queue.driver.set_avail_flags(1);
    for expected in 1..=8 {
        add_reads(&mut queue, 1);
        queue.publish();
        eventually("a completion", || queue.driver.used_idx() == expected);
        queue.poll().unwrap();
    }
    vmm.plane.drain().unwrap();
    assert!(!queue.call.test_and_clear().unwrap(), "SHOULD NOT notify");
    assert_eq!(vmm.plane.counters().notifications, 0);
    // A7: the other bits mean nothing.
    queue.driver.set_avail_flags(0xfffe);
    add_reads(&mut queue, 1);
    queue.publish();
    eventually("the interrupt that MUST be sent", || {
        queue.call.test_and_clear().unwrap()
    });
}

#[test]
fn f7_kick_replaced_while_running_loses_no_kick() {
    let (mut vmm, mut queue) = single(&null_device(1 << 20));
    for _ in 0..50 {
        add_reads(&mut queue, 1);
        // To the old one, right before it is replaced.
        queue.publish();
        let new = EventNotifier::new().unwrap();
        vmm.plane
            .set_kick(0, Some(new.try_clone().unwrap()))
            .unwrap();
        queue.kick = new;
        assert_eq!(queue.next().status, Some(OK));
        assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
    }
}

#[test]
fn f7_one_kick_for_two_queues_of_a_thread_reaches_both() {
    let mut vmm = Embedded::new(&on_threads(Backing::null_zeroes(1 << 20), 1));
    let mut first = vmm.prepare(0, 16, FEATURES);
    let mut second = vmm.prepare(1, 16, FEATURES);
    second.kick = first.kick.try_clone().unwrap();
    vmm.start(&first, 0);
    vmm.start(&second, 0);
    for _ in 0..100 {
        for queue in [&mut first, &mut second] {
            assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
        }
    }
}

#[test]
fn c16_x4_restarted_queue_goes_on_where_it_stopped() {
    let scratch = Scratch::zeroed(Kind::Disk, 1 << 20);
    let (mut vmm, mut queue) = single(&scratch.device());
    for cycle in 0..100u64 {
        let data = pattern(cycle, 512);
        assert_eq!(queue.answer(&Request::write(cycle, &data)), (Some(OK), 1));
        add_reads(&mut queue, 5);
        queue.publish();
        let base = vmm.stop(0);
        let stopped = queue.snapshot();
        // X4: nobody listens any more.
        queue.kick.notify().unwrap();
        add_reads(&mut queue, 2);
        queue.driver.publish();
        let popped = queue.driver.used_idx();
        assert_eq!(base, popped, "everything popped is in the used ring");
        vmm.plane.drain().unwrap();
        drop(stopped);
        assert_eq!(queue.driver.used_idx(), popped);
        vmm.start(&queue, base);
        assert_eq!(queue.finish().len(), 7);
        queue.arena.reset();
    }
}

#[test]
fn x1_after_a_stop_nothing_is_written_to_the_guest_any_more() {
    let scratch = Scratch::new(Kind::Disk, &pattern(1, 1 << 20));
    let mut vmm = Embedded::new(&scratch.device());
    for round in 0..20 {
        let mut queue = vmm.queue(0, 256);
        for sector in 0..60 {
            let request = Request::read(sector * 16, 8192);
            queue.add(&request, &Framing::classic(&request));
        }
        queue.publish();
        if round % 2 == 0 {
            queue.next();
        }
        let base = vmm.stop(0);
        assert_eq!(queue.driver.used_idx(), base);
        queue.call.test_and_clear().unwrap();
        let then = queue.snapshot();
        // Something else for the device to do.
        let mut other = vmm.queue(1, 16);
        for _ in 0..10 {
            other.answer(&Request::read(0, 4096));
        }
        vmm.stop(1);
        assert!(queue.snapshot() == then, "written after the stop");
        assert!(
            !queue.call.test_and_clear().unwrap(),
            "called after the stop"
        );
        while queue.poll().is_some_and(|done| done.status == Some(OK)) {}
        assert_eq!(queue.outstanding(), 60 - usize::from(base));
    }
}

#[test]
fn x5_disabling_completes_what_is_in_flight_and_fetches_nothing() {
    let scratch = Scratch::zeroed(Kind::Disk, 1 << 20);
    let (mut vmm, mut queue) = single(&scratch.device());
    for _ in 0..20 {
        add_reads(&mut queue, 30);
        queue.publish();
        vmm.plane.enable_queue(0, false).unwrap();
        vmm.plane.drain().unwrap();
        let used = queue.driver.used_idx();
        add_reads(&mut queue, 1);
        queue.publish();
        queue.kick.notify().unwrap();
        vmm.plane.drain().unwrap();
        assert_eq!(queue.driver.used_idx(), used);
        vmm.plane.enable_queue(0, true).unwrap();
        assert_eq!(queue.finish().last().unwrap().status, Some(OK));
        queue.arena.reset();
    }
}

#[test]
fn paused_device_fetches_nothing_until_resumed() {
    let (mut vmm, mut queue) = single(&null_device(1 << 20));
    vmm.plane.pause().unwrap();
    add_reads(&mut queue, 3);
    queue.publish();
    queue.kick.notify().unwrap();
    // A drain ends where it began: paused.
    vmm.plane.drain().unwrap();
    vmm.plane.drain().unwrap();
    assert_eq!(queue.driver.used_idx(), 0);
    assert_eq!(vmm.plane.counters().requests, 0);
    vmm.plane.resume().unwrap();
    assert_eq!(queue.finish().len(), 3);
    vmm.plane.drain().unwrap();
    assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
}

#[test]
fn paused_device_can_be_stopped() {
    let (mut vmm, mut queue) = single(&null_device(1 << 20));
    vmm.plane.pause().unwrap();
    add_reads(&mut queue, 3);
    queue.publish();
    vmm.plane.stop().unwrap();
    assert_eq!(queue.driver.used_idx(), 0);
}

#[test]
fn r2_r3_r9_r13_wrong_set_ups_are_refused_and_change_nothing() {
    let (mut vmm, mut queue) = single(&null_device(1 << 20));
    let spare = vmm.prepare(1, 16, FEATURES);
    for size in [0, 3, 12, 2048, 65536, u32::MAX] {
        let wrong = QueueSetup {
            size,
            ..setup(&spare, 0)
        };
        let refused = vmm.plane.start_queue(1, wrong);
        assert!(matches!(refused, Err(QueueError::Size { .. })), "{size}");
    }
    for index in [4, 255, u16::MAX] {
        let refused = vmm.plane.start_queue(index, setup(&spare, 0));
        assert!(matches!(refused, Err(QueueError::NoSuchQueue { .. })));
        assert!(vmm.plane.stop_queue(index).is_err());
        assert!(vmm.plane.enable_queue(index, true).is_err());
    }
    let refused = vmm.plane.start_queue(0, setup(&spare, 0));
    assert!(matches!(refused, Err(QueueError::Running(0))));
    assert!(matches!(
        vmm.plane.stop_queue(1),
        Err(QueueError::NotRunning(1))
    ));
    assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
}

#[test]
fn r4_r5_r6_rings_that_do_not_lie_in_memory_are_refused() {
    let mut vmm = Embedded::new(&null_device(1 << 20));
    let queue = vmm.prepare(0, 16, FEATURES);
    let good = queue.addresses;
    let bad = [
        crate::support::ram::HOLE,
        crate::support::ram::LOW_END - 16,
        crate::support::ram::SEAM - 16,
        u64::MAX - 63,
        u64::MAX,
        good.descriptor_area.0 + 1,
    ];
    for bad in bad {
        let bad = GuestAddress(bad);
        let mut areas = [good; 3];
        areas[0].descriptor_area = bad;
        areas[1].driver_area = bad;
        areas[2].device_area = bad;
        for addresses in areas {
            let wrong = QueueSetup {
                addresses,
                ..setup(&queue, 0)
            };
            let refused = vmm.plane.start_queue(0, wrong);
            assert!(matches!(refused, Err(QueueError::Ring(_))), "{addresses:?}");
        }
    }
    let mut queue = vmm.queue(0, 16);
    assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
}

#[test]
fn m13_memory_replaced_while_requests_are_in_flight() {
    let scratch = Scratch::new(Kind::Disk, &pattern(13, 1 << 20));
    let (mut vmm, mut queue) = single(&scratch.device());
    let content = scratch.content();
    for _ in 0..50 {
        for sector in 0..40u64 {
            let request = Request::read(sector * 16, 4096);
            queue.add(&request, &Framing::classic(&request));
        }
        queue.publish();
        // The same files, mapped anew: what completes through the old map is seen through this.
        let fresh = vmm.ram.map_again();
        let addresses = queue.addresses;
        vmm.plane.update_memory(fresh, |_| Some(addresses)).unwrap();
        for done in queue.finish() {
            assert_eq!((done.status, done.len), (Some(OK), 4097));
            assert!(
                content
                    .chunks(512)
                    .any(|sector| done.data[..512] == *sector)
            );
        }
        queue.arena.reset();
    }
}

#[test]
fn m17_ring_that_the_new_memory_does_not_hold_stops_and_is_reported() {
    let mut vmm = Embedded::new(&null_device(1 << 20));
    let mut queue = vmm.queue(0, 16);
    let mut other = vmm.queue(1, 16);
    assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
    let addresses = other.addresses;
    vmm.plane
        .update_memory(vmm.ram.memory.clone(), |index| {
            (index == 1).then_some(addresses)
        })
        .unwrap();
    eventually("the err notifier", || queue.err.test_and_clear().unwrap());
    let then = queue.ram.read(GuestRam::ring_base(0).0, 4096);
    add_reads(&mut queue, 1);
    let published = queue.ram.read(GuestRam::ring_base(0).0, 4096);
    queue.kick.notify().unwrap();
    assert_eq!(other.answer(&Request::read(0, 512)).0, Some(OK));
    vmm.plane.drain().unwrap();
    assert_eq!(queue.ram.read(GuestRam::ring_base(0).0, 4096), published);
    drop(then);
    assert_eq!(vmm.stop(0), 1);
    let mut again = vmm.queue(0, 16);
    assert_eq!(again.answer(&Request::read(0, 512)).0, Some(OK));
}

/// A front-end stops listening at the old descriptor before the device stops writing to it.
#[test]
fn n4_new_call_notifier_hears_of_what_completed_before_it_came() {
    let (mut vmm, mut queue) = single(&null_device(1 << 20));
    queue.answer(&Request::read(0, 512));
    vmm.plane.drain().unwrap();
    queue.call.test_and_clear().unwrap();
    vmm.plane.set_call(0, None).unwrap();
    queue.driver.enable_interrupts();
    let request = Request::read(0, 512);
    queue.add(&request, &Framing::joined());
    queue.publish();
    eventually("a completion", || queue.driver.used_idx() == 2);
    vmm.plane.drain().unwrap();
    let call = Box::new(queue.call.try_clone().unwrap());
    vmm.plane.set_call(0, Some(call)).unwrap();
    vmm.plane.drain().unwrap();
    // The guest sleeps until an interrupt: not even later completions bring one, as used_event
    // has been passed already.
    queue.add(&request, &Framing::joined());
    queue.publish();
    eventually("a completion", || queue.driver.used_idx() == 3);
    vmm.plane.drain().unwrap();
    assert!(
        queue.call.test_and_clear().unwrap(),
        "guest sleeps for ever"
    );
}

#[test]
fn x4_kick_after_the_stop_is_ignored() {
    for threads in [1, 2] {
        let mut vmm = Embedded::new(&on_threads(Backing::null_zeroes(1 << 20), threads));
        let (mut stopped, mut other) = (vmm.queue(0, 16), vmm.queue(1, 16));
        for _ in 0..20 {
            let base = vmm.stop(0);
            add_reads(&mut stopped, 1);
            stopped.driver.publish();
            let before = stopped.snapshot();
            for _ in 0..100 {
                stopped.kick.notify().unwrap();
            }
            // The thread has been awake since.
            assert_eq!(other.answer(&Request::read(0, 512)), (Some(OK), 513));
            vmm.plane.drain().unwrap();
            assert_eq!(stopped.snapshot(), before);
            vmm.start(&stopped, base);
            assert_eq!(stopped.finish().len(), 1);
            stopped.arena.reset();
            other.arena.reset();
        }
    }
}
