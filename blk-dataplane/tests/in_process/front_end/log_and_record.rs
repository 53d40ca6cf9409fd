//! Rows C18 and K, as a hostile front-end would have them: the log of written pages, and the record of requests in
//! flight. What a migration and a restart make of both is in `recovery.rs`.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;

use event_poll::EventNotifier;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;

use super::{DISK, assert_serves, keep_busy, ready, ready_with, serve};
use crate::support::front_end::Served;
use crate::support::queue::{FEATURES, GuestQueue, RING_PACKED, VERSION_1};
use crate::support::ram::{GuestRam, HIGH_END};
use crate::support::request::{Framing, OK, Request};
use crate::support::scratch::{Kind, Scratch};
use crate::support::wire::{
    ADD_MEM_REG, Answer, GET_INFLIGHT_FD, LOG_ALL, NEED_REPLY, PROTOCOL_FEATURES, SET_FEATURES,
    SET_INFLIGHT_FD, SET_LOG_BASE, SET_LOG_FD, SET_VRING_ADDR, V1, Wire, vring_state,
};
use crate::support::{eventually, pattern};

/// Bytes of a page, and pages to a byte of the log.
const PAGE: u64 = 4096;
const PAGES_PER_BYTE: u64 = 8;

fn memory_file(name: &str, len: u64) -> File {
    let file = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

fn log_area(size: u64, offset: u64) -> Vec<u8> {
    [size, offset].map(u64::to_le_bytes).concat()
}

/// Whether the page of `addr` is marked; the mark is taken off.
fn take_mark(log: &File, addr: u64) -> bool {
    let page = addr / PAGE;
    let mut byte = [0];
    log.read_exact_at(&mut byte, page / PAGES_PER_BYTE).unwrap();
    let bit = 1 << (page % PAGES_PER_BYTE);
    let marked = byte[0] & bit != 0;
    log.write_all_at(&[byte[0] & !bit], page / PAGES_PER_BYTE)
        .unwrap();
    marked
}

/// Hands a log over; whether it was taken.
fn set_log(wire: &mut Wire, log: &File, size: u64, offset: u64) -> bool {
    assert!(wire.send(
        SET_LOG_BASE,
        V1 | NEED_REPLY,
        &log_area(size, offset),
        &[log.as_fd()]
    ));
    match wire.receive() {
        // What came, as it came.
        Answer::Message { body, .. } if body.len() == 16 => {
            assert_eq!(body, log_area(size, offset));
            true
        }
        answer => {
            assert_ne!(answer.value(), 0);
            false
        }
    }
}

/// Bytes of a log for all of the tests' guest memory.
const LOG_LEN: u64 = HIGH_END / PAGE / PAGES_PER_BYTE;

#[test]
fn c18_pages_that_the_device_writes_are_marked_while_logging_is_on_and_only_then() {
    let scratch = Scratch::new(Kind::Disk, &pattern(18, DISK));
    let served = Served::new(scratch.device());
    for features in [FEATURES, FEATURES | RING_PACKED] {
        let ram = GuestRam::new();
        let mut front = served.connect(&ram);
        front.negotiate_all(features);
        front.set_memory(&[0, 1, 2]);
        let mut queue = GuestQueue::new(&ram, 0, 16, features);
        front.configure_only(&queue);
        front.set_notifiers(&queue);
        front.enable(&queue, true);
        let mut wire = front.wire();
        let log = memory_file("log", LOG_LEN);
        assert!(set_log(&mut wire, &log, LOG_LEN, 0));
        let used_ring = if features & RING_PACKED == 0 {
            queue.addresses.device_area.0
        } else {
            queue.addresses.descriptor_area.0
        };
        for round in 0..20 {
            let on = round % 2 == 1;
            let now = features | PROTOCOL_FEATURES | if on { LOG_ALL } else { 0 };
            // With requests in flight.
            keep_busy(&mut queue, 4);
            assert!(wire.acknowledged(SET_FEATURES, &now.to_le_bytes(), &[]));
            if on && round % 4 == 1 && features & RING_PACKED == 0 {
                // QEMU repeats the addresses of running rings, to set the flag.
                let addresses = front.ring_addresses(&queue);
                let mut body = vring_state(0, 1);
                for addr in [
                    addresses.desc_table_addr,
                    addresses.used_ring_addr,
                    addresses.avail_ring_addr,
                    used_ring,
                ] {
                    body.extend(addr.to_le_bytes());
                }
                assert!(wire.acknowledged(SET_VRING_ADDR, &body, &[]));
            }
            queue.finish();
            queue.arena.reset();
            log.write_all_at(&vec![0; usize::try_from(LOG_LEN).unwrap()], 0)
                .unwrap();
            let start = queue.arena.start();
            assert_eq!(queue.answer(&Request::read(8, 8192)), (Some(OK), 8193));
            let data = (start..start + 16384)
                .step_by(4096)
                .filter(|&page| take_mark(&log, page))
                .count();
            assert_eq!(data >= 2, on, "{round}: {data} pages of data");
            assert_eq!(take_mark(&log, used_ring), on, "{round}: the used ring");
            queue.arena.reset();
        }
    }
}

#[test]
fn c18_log_that_is_too_small_or_no_memory_is_refused_and_the_old_one_stays() {
    let served = serve();
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    front.negotiate_all(FEATURES);
    front.set_memory(&[0, 1, 2]);
    let mut queue = front.queue(0, 16);
    let mut wire = front.wire();
    let log = memory_file("log", LOG_LEN);
    assert!(set_log(&mut wire, &log, LOG_LEN, 0));
    let on = FEATURES | PROTOCOL_FEATURES | LOG_ALL;
    assert!(wire.acknowledged(SET_FEATURES, &on.to_le_bytes(), &[]));
    let large = memory_file("large", 2 * LOG_LEN);
    for (file, size, offset) in [
        // Not a bit for each page of memory.
        (&large, LOG_LEN - 1, 0),
        (&large, 1, 0),
        (&large, 0, 0),
        // Beyond its file, or beyond all.
        (&log, LOG_LEN, 1),
        (&log, LOG_LEN + 1, 0),
        (&log, u64::MAX, 0),
        (&log, LOG_LEN, u64::MAX - 8),
        (&log, 1 << 63, 1 << 63),
    ] {
        assert!(
            !set_log(&mut wire, file, size, offset),
            "{size:#x} {offset:#x}"
        );
    }
    let null = File::open("/dev/null").unwrap();
    assert!(!set_log(&mut wire, &null, LOG_LEN, 0));
    let start = queue.arena.start();
    assert_eq!(queue.answer(&Request::read(0, 4096)).0, Some(OK));
    assert!(
        (start..start + 16384)
            .step_by(4096)
            .any(|page| take_mark(&log, page))
    );
    // A larger one takes its place.
    assert!(set_log(&mut wire, &large, LOG_LEN, 8));
    // Nor is a small one taken while nothing is logged, unless there is no memory yet.
    let off = FEATURES | PROTOCOL_FEATURES;
    assert!(wire.acknowledged(SET_FEATURES, &off.to_le_bytes(), &[]));
    assert!(!set_log(&mut wire, &large, 1, 0));
    assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
    // Memory that the log has no bits for cannot be added.
    assert!(set_log(&mut wire, &large, LOG_LEN, 0));
    assert!(wire.acknowledged(SET_FEATURES, &on.to_le_bytes(), &[]));
    let beyond = [0, HIGH_END + (1 << 30), 4096, 1, 0]
        .map(u64::to_le_bytes)
        .concat();
    assert!(!wire.acknowledged(ADD_MEM_REG, &beyond, &[large.as_fd()]));
}

#[test]
fn c18_log_descriptor_is_signalled_when_something_was_logged() {
    let served = serve();
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    front.negotiate_all(FEATURES);
    front.set_memory(&[0, 1, 2]);
    let mut queue = front.queue(0, 16);
    let mut wire = front.wire();
    let signal = EventNotifier::new().unwrap();
    assert!(wire.acknowledged(SET_LOG_FD, &[], &[signal.as_fd()]));
    assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
    assert!(!signal.test_and_clear().unwrap(), "nothing is logged yet");
    let log = memory_file("log", LOG_LEN);
    assert!(set_log(&mut wire, &log, LOG_LEN, 0));
    let on = FEATURES | PROTOCOL_FEATURES | LOG_ALL;
    assert!(wire.acknowledged(SET_FEATURES, &on.to_le_bytes(), &[]));
    assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
    eventually("the signal", || signal.test_and_clear().unwrap());
    // F6, and F2.
    assert!(!wire.acknowledged(SET_LOG_FD, &[], &[log.as_fd()]));
    assert!(!wire.acknowledged(SET_LOG_FD, &[], &[]));
    let off = FEATURES | PROTOCOL_FEATURES;
    assert!(wire.acknowledged(SET_FEATURES, &off.to_le_bytes(), &[]));
    signal.test_and_clear().unwrap();
    assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
    front.stop(&queue);
    assert!(!signal.test_and_clear().unwrap());
}

/// The body of SET_INFLIGHT_FD.
fn inflight(size: u64, offset: u64, num_queues: u16, queue_size: u16) -> Vec<u8> {
    let mut body = log_area(size, offset);
    body.extend([num_queues, queue_size].map(u16::to_le_bytes).concat());
    body
}

#[test]
fn k1_memory_for_requests_in_flight_is_made_as_asked() {
    let served = serve();
    let mut front = ready(&served);
    front.negotiate_all(FEATURES);
    for (num_queues, queue_size) in [(1, 1), (4, 128), (2, 1024)] {
        let asked = VhostUserInflight::new(0, 0, num_queues, queue_size);
        let (given, file) = front.vhost.get_inflight_fd(&asked).unwrap();
        assert_eq!(
            (given.num_queues, given.queue_size),
            (num_queues, queue_size)
        );
        assert!(given.mmap_offset + given.mmap_size <= file.metadata().unwrap().len());
        // A queue's region has a header of 16 bytes and 16 for each entry, at least.
        assert!(given.mmap_size >= u64::from(num_queues) * (16 + 16 * u64::from(queue_size)));
        front
            .vhost
            .set_inflight_fd(&given, file.as_raw_fd())
            .unwrap();
    }
    let mut wire = front.wire();
    // Of 20 bytes, as the specification lists the fields.
    let Answer::Message { body, .. } = wire.ask(GET_INFLIGHT_FD, &inflight(0, 0, 2, 64)) else {
        panic!("closed");
    };
    assert_eq!((body.len(), &body[16..]), (20, &[2, 0, 64, 0][..]));
    drop((front, wire));
    // It cannot say no.
    for (num_queues, queue_size) in [
        (0, 64),
        (5, 64),
        (u16::MAX, 64),
        (2, 0),
        (2, 63),
        (2, 0xffff),
    ] {
        let ram = GuestRam::new();
        let front = ready_with(&served, &ram);
        let body = inflight(0, 0, num_queues, queue_size);
        assert_eq!(front.wire().ask(GET_INFLIGHT_FD, &body), Answer::Closed);
    }
}

#[test]
fn k1_memory_for_requests_in_flight_that_cannot_be_is_refused() {
    let served = serve();
    let mut front = ready(&served);
    front.negotiate_all(FEATURES);
    let mut wire = front.wire();
    let asked = VhostUserInflight::new(0, 0, 2, 128);
    let (given, file) = front.vhost.get_inflight_fd(&asked).unwrap();
    let size = given.mmap_size;
    let event = EventNotifier::new().unwrap();
    let wrong = [
        inflight(0, 0, 2, 128),
        inflight(16, 0, 2, 128),
        inflight(size, size, 2, 128),
        inflight(size, 3, 2, 128),
        inflight(size, u64::MAX, 2, 128),
        inflight(u64::MAX, 8, 2, 128),
        inflight(size, 0, 0, 128),
        inflight(size, 0, 5, 128),
        inflight(size, 0, u16::MAX, 128),
        inflight(size, 0, 2, 0),
        inflight(size, 0, 2, 100),
        inflight(size, 0, 2, 0x8000),
        inflight(size, 0, 1, 2048),
    ];
    for body in wrong {
        assert!(
            !wire.acknowledged(SET_INFLIGHT_FD, &body, &[file.as_fd()]),
            "{body:?}"
        );
    }
    let good = inflight(size, 0, 2, 128);
    assert!(!wire.acknowledged(SET_INFLIGHT_FD, &good, &[event.as_fd()]));
    assert!(!wire.acknowledged(SET_INFLIGHT_FD, &good, &[]));
    let short = memory_file("short", 64);
    assert!(!wire.acknowledged(SET_INFLIGHT_FD, &good, &[short.as_fd()]));
    assert!(wire.acknowledged(SET_INFLIGHT_FD, &good, &[file.as_fd()]));
    // Rings that it has no place for do not start.
    let large = GuestQueue::new(&front.ram, 0, 256, FEATURES);
    front.configure(&large, 0);
    front.set_call_and_err(&large);
    assert!(front.set_kick(&large).is_err());
    let third = GuestQueue::new(&front.ram, 2, 16, FEATURES);
    front.configure(&third, 0);
    assert!(front.set_kick(&third).is_err());
    let mut queue = front.queue(1, 128);
    assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
    // Not while it is written to.
    assert!(!wire.acknowledged(SET_INFLIGHT_FD, &good, &[file.as_fd()]));
    assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
}

/// A front-end that goes in the middle of requests and returns with the record: each is answered once.
#[test]
fn x6_k2_front_end_that_returns_with_its_record_finds_every_request_answered_once() {
    let scratch = Scratch::new(Kind::Disk, &pattern(6, DISK));
    let served = Served::new(scratch.device());
    for features in [FEATURES, FEATURES | RING_PACKED] {
        let ram = GuestRam::new();
        let mut front = served.connect(&ram);
        front.negotiate_all(features);
        let asked = VhostUserInflight::new(0, 0, 1, 128);
        let (given, file) = front.vhost.get_inflight_fd(&asked).unwrap();
        let mut queue = GuestQueue::new(&ram, 0, 128, features);
        let mut answered = 0;
        for round in 0..10 {
            front.set_memory(&[0, 1, 2]);
            front
                .vhost
                .set_inflight_fd(&given, file.as_raw_fd())
                .unwrap();
            // What base it says does not matter: the record knows.
            front.configure_only(&queue);
            front.set_notifiers(&queue);
            front.enable(&queue, true);
            keep_busy(&mut queue, 12);
            if round % 2 == 0 {
                assert_eq!(queue.next().status, Some(OK));
                answered += 1;
            }
            drop(front);
            front = served.connect(&ram);
            front.negotiate_all(features);
            while let Some(done) = queue.poll() {
                assert_eq!(done.status, Some(OK));
                answered += 1;
            }
            if queue.outstanding() > 20 || round == 9 {
                front.set_memory(&[0, 1, 2]);
                front
                    .vhost
                    .set_inflight_fd(&given, file.as_raw_fd())
                    .unwrap();
                front.configure_only(&queue);
                front.set_notifiers(&queue);
                front.enable(&queue, true);
                for done in queue.finish() {
                    assert_eq!(done.status, Some(OK));
                    answered += 1;
                }
                drop(front);
                front = served.connect(&ram);
                front.negotiate_all(features);
                queue.arena.reset();
            }
        }
        assert_eq!(answered, 120);
    }
}

/// As a process that was killed would have left it, written by hand from the specification's "queue region of split
/// virtqueue": features, version, number of entries, last batch, used index; then in-flight, padding, next, counter.
#[test]
fn k2_k3_requests_that_a_predecessor_left_are_served_once_more_and_broken_ones_given_back() {
    let scratch = Scratch::new(Kind::Disk, &pattern(7, DISK));
    let served = Served::new(scratch.device());
    let ram = GuestRam::new();
    let mut front = ready_with(&served, &ram);
    let asked = VhostUserInflight::new(0, 0, 1, 16);
    let (given, file) = front.vhost.get_inflight_fd(&asked).unwrap();
    let mut queue = GuestQueue::new(&ram, 0, 16, VERSION_1);
    // Three requests; the predecessor had popped the first two, in this order.
    let request = Request::read(8, 4096);
    let heads: Vec<u32> = (0..3)
        .map(|_| queue.add(&request, &Framing::classic(&request)))
        .collect();
    queue.driver.publish();
    let mut region = vec![0; 16 + 16 * 16];
    region[8..10].copy_from_slice(&1u16.to_le_bytes());
    region[10..12].copy_from_slice(&16u16.to_le_bytes());
    for (counter, head) in (1u64..).zip(&heads[..2]) {
        let entry = 16 + 16 * usize::try_from(*head).unwrap();
        region[entry] = 1;
        region[entry + 8..entry + 16].copy_from_slice(&counter.to_le_bytes());
    }
    file.write_all_at(&region, given.mmap_offset).unwrap();
    // The second is broken by now: its first descriptor leads nowhere.
    let broken = u16::try_from(heads[1]).unwrap();
    queue.driver.write_desc(broken, 0, 16, 1, 99);
    front
        .vhost
        .set_features(VERSION_1 | PROTOCOL_FEATURES)
        .unwrap();
    front
        .vhost
        .set_inflight_fd(&given, file.as_raw_fd())
        .unwrap();
    // The front-end takes the used ring's index for the base, as QEMU does after a crash.
    front.start(&queue, 0);
    let mut answers: Vec<_> = queue
        .finish()
        .into_iter()
        .map(|done| (done.head, done.status, done.len))
        .collect();
    answers.sort_unstable();
    let mut expected = vec![
        (heads[0], Some(OK), 4097),
        (heads[1], Some(0xee), 0),
        (heads[2], Some(OK), 4097),
    ];
    expected.sort_unstable();
    assert_eq!(answers, expected);
    assert_eq!(front.stop(&queue), 3);
    assert_eq!(queue.driver.used_idx(), 3);
}

#[test]
fn k2_record_of_another_version_is_refused_and_garbage_is_survived() {
    let scratch = Scratch::new(Kind::Disk, &pattern(7, DISK));
    let served = Served::new(scratch.device());
    let len = 16 + 16 * 16;
    for seed in 0..30u64 {
        let ram = GuestRam::new();
        let mut front = ready_with(&served, &ram);
        let file = memory_file("record", 4096);
        let mut region = pattern(seed + 1, len);
        // A version that is known, in two of three.
        let known = !seed.is_multiple_of(3);
        region[8..10].copy_from_slice(
            &u16::from(known)
                .wrapping_add(7 * u16::from(!known))
                .to_le_bytes(),
        );
        region[10..12].copy_from_slice(&16u16.to_le_bytes());
        file.write_all_at(&region, 0).unwrap();
        let mut wire = front.wire();
        let features = VERSION_1 | PROTOCOL_FEATURES;
        front.vhost.set_features(features).unwrap();
        assert!(wire.acknowledged(SET_INFLIGHT_FD, &inflight(4096, 0, 1, 16), &[file.as_fd()]));
        let queue = GuestQueue::new(&ram, 0, 16, VERSION_1);
        front.configure(&queue, 0);
        front.set_call_and_err(&queue);
        let started = front.set_kick(&queue).is_ok();
        assert!(known || !started, "another version");
        if started {
            front.enable(&queue, true);
            // At most each head once; a ring that is broken by it stops.
            front.stop(&queue);
        }
        drop(front);
    }
    assert_serves(&served);
}
