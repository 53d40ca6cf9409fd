//! Rows X, and C16: rings that stop, front-ends that go, a server that ends.

use std::collections::HashMap;

use vhost::VhostBackend;

use super::{DISK, keep_busy};
use crate::support::front_end::Served;
use crate::support::queue::{FEATURES, GuestQueue, RING_PACKED};
use crate::support::ram::GuestRam;
use crate::support::request::{Framing, OK, Request};
use crate::support::scratch::{KINDS, Kind, Scratch, null_device};
use crate::support::wire::{SET_VRING_BASE, vring_state};
use crate::support::{eventually, pattern};

#[test]
fn x2_x6_disconnect_with_requests_in_flight_then_reconnect_again_and_again() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let served = Served::new(scratch.device());
    for round in 0..30u64 {
        let ram = GuestRam::new();
        let mut front = served.connect(&ram);
        let mut queue = front.up();
        // What the one before wrote is there.
        let read = queue.run(&Request::read(1999, 512));
        let expected = if round == 0 {
            vec![0; 512]
        } else {
            pattern(round, 512)
        };
        assert!(read.data == expected);
        let write = Request::write(1999, &pattern(round + 1, 512));
        assert_eq!(queue.run(&write).status, Some(OK));
        keep_busy(&mut queue, 40);
        if round % 2 == 0 {
            queue.next();
        }
        drop(front);
    }
    served.stop().unwrap();
}

#[test]
fn x2_nothing_is_written_to_guest_memory_once_the_next_front_end_is_served() {
    let scratch = Scratch::new(Kind::Disk, &pattern(3, DISK));
    let served = Served::new(scratch.device());
    for _ in 0..10 {
        let ram = GuestRam::new();
        let mut front = served.connect(&ram);
        let mut queue = front.up();
        keep_busy(&mut queue, 40);
        drop(front);
        let other = GuestRam::new();
        let mut front = served.connect(&other);
        let mut next = front.up();
        assert_eq!(next.answer(&Request::read(0, 512)).0, Some(OK));
        let then = queue.snapshot();
        assert_eq!(next.answer(&Request::read(0, 65536)).0, Some(OK));
        assert!(queue.snapshot() == then);
        // Everything that was popped was answered before the memory was let go.
        while queue.poll().is_some_and(|done| done.status == Some(OK)) {}
    }
}

#[test]
fn x1_get_vring_base_drains_first_and_nothing_is_written_afterwards() {
    let scratch = Scratch::new(Kind::Disk, &pattern(1, DISK));
    let served = Served::new(scratch.device());
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    front.negotiate(FEATURES);
    front.set_memory(&[0, 1, 2]);
    for round in 0..20 {
        let mut queue = front.queue(0, 256);
        keep_busy(&mut queue, 60);
        if round % 2 == 0 {
            queue.next();
        }
        let base = front.stop(&queue);
        assert_eq!(queue.driver.used_idx(), base, "popped, and so answered");
        queue.call.test_and_clear().unwrap();
        let then = queue.snapshot();
        // X4: nobody listens to it now.
        queue.kick.notify().unwrap();
        let mut other = front.queue(1, 16);
        for _ in 0..10 {
            other.answer(&Request::read(0, 4096));
        }
        front.stop(&other);
        assert!(queue.snapshot() == then);
        assert!(!queue.call.test_and_clear().unwrap());
        // C10: asked again, it says the same.
        assert_eq!(front.stop(&queue), base);
        // What was not popped is served after a restart from there.
        front.start(&queue, base);
        assert!(queue.finish().iter().all(|done| done.status == Some(OK)));
        assert_eq!(front.stop(&queue), 60);
    }
}

#[test]
fn x5_disabled_ring_completes_what_is_in_flight_and_fetches_nothing() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let served = Served::new(scratch.device());
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    let mut queue = front.up();
    for _ in 0..10 {
        keep_busy(&mut queue, 20);
        front.enable(&queue, false);
        // Neither lost nor served until it is enabled: at least what comes now.
        let request = Request::read(0, 512);
        let head = queue.add(&request, &Framing::classic(&request));
        queue.driver.publish();
        queue.kick.notify().unwrap();
        front.vhost.get_features().unwrap();
        front.enable(&queue, true);
        let done = queue.finish();
        assert_eq!(done.len(), 21);
        assert!(done.iter().any(|done| done.head == head));
        queue.arena.reset();
    }
}

#[test]
fn c16_restart_cycles_are_clean() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let served = Served::new(scratch.device());
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    let mut queue = front.up();
    for cycle in 0..100u64 {
        let data = pattern(cycle + 1, 512);
        assert_eq!(queue.answer(&Request::write(cycle, &data)).0, Some(OK));
        let base = front.stop(&queue);
        assert_eq!(u64::from(base), cycle + 1);
        front.start(&queue, base);
    }
    let content = scratch.content();
    for cycle in 0..100usize {
        let expected = pattern(u64::try_from(cycle).unwrap() + 1, 512);
        assert!(content[cycle * 512..][..512] == expected);
    }
}

#[test]
fn c16_broken_ring_works_again_after_a_restart() {
    let served = Served::new(null_device(1 << 20));
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    let mut queue = front.up();
    for _ in 0..5 {
        assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
        let wrong = queue.driver.next_avail().wrapping_add(1000);
        queue.driver.set_avail_idx(wrong);
        queue.kick.notify().unwrap();
        eventually("the err notifier", || queue.err.test_and_clear().unwrap());
        assert_eq!(front.stop(&queue), 1);
        queue = front.queue(0, 128);
    }
}

#[test]
fn x3_stop_under_load_keeps_every_acknowledged_write() {
    for kind in KINDS {
        let scratch = Scratch::zeroed(kind, DISK);
        let served = Served::new(scratch.device());
        let ram = GuestRam::new();
        let mut front = served.connect(&ram);
        let mut queue = front.up();
        let mut written: HashMap<u32, (usize, Vec<u8>)> = HashMap::new();
        let mut model = vec![0; DISK];
        let publish = |queue: &mut GuestQueue, written: &mut HashMap<_, _>, number: usize| {
            let data = pattern(u64::try_from(number).unwrap() + 1, 4096);
            let sector = number * 8;
            let request = Request::write(u64::try_from(sector).unwrap(), &data);
            let framing = Framing::classic(&request).skew(u64::from(number.is_multiple_of(7)));
            written.insert(queue.add(&request, &framing), (sector, data));
        };
        let mut next = 0;
        for _ in 0..40 {
            publish(&mut queue, &mut written, next);
            next += 1;
        }
        queue.publish();
        let land = |done: crate::support::queue::Completed,
                    written: &mut HashMap<_, _>,
                    model: &mut [u8]| {
            assert_eq!((done.status, done.len), (Some(OK), 1));
            let (sector, data): (usize, Vec<u8>) = written.remove(&done.head).unwrap();
            model[sector * 512..][..data.len()].copy_from_slice(&data);
        };
        for _ in 0..60 {
            let done = queue.next();
            land(done, &mut written, &mut model);
            publish(&mut queue, &mut written, next);
            next += 1;
            queue.publish();
        }
        served.stop().unwrap();
        while let Some(done) = queue.poll() {
            land(done, &mut written, &mut model);
        }
        let content = scratch.content();
        // A write that was never popped may not be there, but then it is not acknowledged.
        for number in 0..next {
            let range = number * 4096..(number + 1) * 4096;
            let pending = written.values().any(|(sector, _)| *sector == number * 8);
            if !pending {
                assert!(content[range.clone()] == model[range], "{kind:?} {number}");
            } else {
                assert!(content[range].iter().all(|&byte| byte == 0), "never popped");
            }
        }
        assert!(queue.outstanding() == written.len());
        drop(front);
    }
}

#[test]
fn stop_with_nobody_connected_and_before_anyone_came() {
    Served::new(null_device(1 << 20)).stop().unwrap();
    let served = Served::new(null_device(1 << 20));
    drop(served.connect(&GuestRam::new()));
    served.stop().unwrap();
}

/// The base of a packed ring has 32 bits, which `Frontend` cannot send.
#[test]
fn c16_packed_ring_goes_on_at_the_base_that_its_stop_replied() {
    let scratch = Scratch::new(Kind::Disk, &pattern(1, DISK));
    let served = Served::new(scratch.device());
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    let features = FEATURES | RING_PACKED;
    front.negotiate(features);
    front.set_memory(&[0, 1, 2]);
    let mut queue = GuestQueue::new(&ram, 0, 32, features);
    let mut base = queue.fresh().to_vhost_user();
    assert_eq!(base, 0x8000_8000);
    for round in 0..30 {
        front.vhost.set_vring_num(0, 32).unwrap();
        front
            .vhost
            .set_vring_addr(0, &front.ring_addresses(&queue))
            .unwrap();
        assert!(
            front
                .wire()
                .acknowledged(SET_VRING_BASE, &vring_state(0, base), &[])
        );
        front.set_notifiers(&queue);
        front.enable(&queue, true);
        let done = queue.run(&Request::read(round, 512));
        assert_eq!((done.status, done.len), (Some(OK), 513));
        assert_eq!(
            done.data[..],
            scratch.content()[usize::try_from(round).unwrap() * 512..][..512]
        );
        queue.arena.reset();
        base = front.vhost.get_vring_base(0).unwrap();
    }
}
