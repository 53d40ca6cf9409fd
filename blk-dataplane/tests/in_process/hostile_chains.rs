//! Chains that are no sound request's, and memory that changes while it is looked at.

use super::requests::{DISK, assert_goes_on, header, run_segments, segment, status};
use crate::support::embedded::{Embedded, single};
use crate::support::pattern;
use crate::support::queue::{FEATURES, GuestQueue, INDIRECT};
use crate::support::ram::{HIGH_END, HOLE, LOW_END, SEAM};
use crate::support::request::{Framing, IN, IOERR, OK, OUT, Request, Table, UNSUPP};
use crate::support::scratch::{KINDS, Kind, Scratch, null_device};

#[test]
fn d4_d9_huge_length_is_refused_and_moves_nothing() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let (vmm, mut queue) = single(&scratch.device());
    let header = header(&mut queue, OUT, 0);
    let status = status(&mut queue);
    let start = queue.arena.take(4096, 512, 0);
    // More than four GiB in all (D9): vring's to refuse.
    let answer = run_segments(&mut queue, &[header, segment(start, u32::MAX)], &[status]);
    assert_eq!(answer, (Some(0xee), 0));
    // Just below that.
    for len in [0xffff_fe00, 0xffff_ff01, 0x8000_0000] {
        let before = vmm.plane.counters();
        let answer = run_segments(&mut queue, &[header, segment(start, len)], &[status]);
        let after = vmm.plane.counters();
        // Past the end of the disk: refused for that before the memory is looked at.
        assert_eq!(answer, (Some(IOERR), 1));
        assert_eq!(after.io_errors, before.io_errors + 1);
    }
    assert_eq!(scratch.content(), vec![0; DISK]);
    assert_goes_on(&mut queue);
}

#[test]
fn d4_huge_length_is_a_bad_chain_on_a_disk_that_is_large_enough() {
    let (vmm, mut queue) = single(&null_device(1 << 40));
    let header = header(&mut queue, OUT, 0);
    let status = status(&mut queue);
    let start = queue.arena.take(4096, 512, 0);
    for len in [0xffff_fe00, 0x8000_0000] {
        let answer = run_segments(&mut queue, &[header, segment(start, len)], &[status]);
        assert_eq!(answer, (Some(0xee), 0));
    }
    assert_eq!(vmm.plane.counters().bad_chains, 2);
    assert_goes_on(&mut queue);
}

#[test]
fn d5_addresses_outside_memory_make_a_bad_chain() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let (vmm, mut queue) = single(&scratch.device());
    let status = status(&mut queue);
    let bad = [
        segment(HOLE, 512),
        segment(LOW_END - 256, 512),
        segment(LOW_END, 512),
        segment(HIGH_END - 256, 512),
        segment(HIGH_END, 512),
        segment(u64::MAX - 1024, 512),
        // Wraps: vring's to find.
        segment(u64::MAX - 256, 512),
    ];
    let mut count = 0;
    for bad in bad {
        let write = header(&mut queue, OUT, 0);
        let read = header(&mut queue, IN, 0);
        // As data, first, last, or among good buffers.
        let good = segment(queue.arena.take(1024, 512, 0), 512);
        for readable in [
            vec![write, bad],
            vec![write, good, bad],
            vec![write, bad, good],
        ] {
            assert_eq!(
                run_segments(&mut queue, &readable, &[status]),
                (Some(0xee), 0)
            );
            count += 1;
        }
        queue.driver.add_chain(&[read], &[bad, status]).unwrap();
        // As header and as status byte.
        let end = bad.addr.0.saturating_add(511);
        queue
            .driver
            .add_chain(&[segment(end, 16)], &[status])
            .unwrap();
        let beyond = segment(end, 1);
        queue.driver.add_chain(&[write, good], &[beyond]).unwrap();
        queue.publish();
        for _ in 0..3 {
            assert_eq!(wait_raw(&mut queue), 0, "{bad:?}");
            count += 1;
        }
    }
    assert_eq!(vmm.plane.counters().bad_chains, count);
    assert_eq!(scratch.content(), vec![0; DISK]);
    assert_goes_on(&mut queue);
}

/// The used length of a chain that was added behind the queue's back.
fn wait_raw(queue: &mut GuestQueue) -> u32 {
    let mut used = None;
    crate::support::eventually("a used element", || {
        used = queue.driver.poll_used();
        used.is_some()
    });
    used.unwrap().len
}

#[test]
fn d5_address_zero_is_memory_like_any_other() {
    let (_vmm, mut queue) = single(&null_device(1 << 20));
    queue.ram.write(0, &Request::read(0, 0).readable);
    let status = status(&mut queue);
    let data = segment(0x200, 512);
    assert_eq!(
        run_segments(&mut queue, &[segment(0, 16)], &[data, status]),
        (Some(OK), 513)
    );
}

#[test]
fn d7_buffers_that_span_adjacent_regions_are_whole() {
    for kind in KINDS {
        let scratch = Scratch::zeroed(kind, DISK);
        let (_vmm, mut queue) = single(&scratch.device());
        // 511 and 1: no part of it is aligned.
        for (seed, before) in [(1, 512), (2, 4096), (3, 1), (4, 511), (5, 8191)] {
            let data = pattern(seed, 8192);
            let buffer = segment(SEAM - before, 8192);
            queue.ram.write(buffer.addr.0, &data);
            let (write, done) = (header(&mut queue, OUT, 16), status(&mut queue));
            assert_eq!(
                run_segments(&mut queue, &[write, buffer], &[done]),
                (Some(OK), 1)
            );
            assert!(scratch.content()[16 * 512..][..8192] == data, "{kind:?}");
            queue.ram.write(buffer.addr.0, &[0xaa; 8192]);
            let read = header(&mut queue, IN, 16);
            assert_eq!(
                run_segments(&mut queue, &[read], &[buffer, done]),
                (Some(OK), 8193)
            );
            assert!(
                queue.ram.read(buffer.addr.0, 8192) == data,
                "{kind:?} -{before}"
            );
        }
        // The header and the status byte over the seam.
        queue.ram.write(SEAM - 5, &Request::read(16, 0).readable);
        let room = segment(SEAM - 512, 513);
        queue.ram.write(0x100, &Request::read(16, 0).readable);
        assert_eq!(
            run_segments(&mut queue, &[segment(0x100, 16)], &[room]),
            (Some(OK), 513)
        );
        assert!(queue.ram.read(SEAM - 512, 512) == pattern(5, 8192)[..512]);
    }
}

#[test]
fn d7_header_over_the_seam_is_read_whole() {
    let (_vmm, mut queue) = single(&null_device(1 << 20));
    let status = status(&mut queue);
    for before in 1..16 {
        let addr = SEAM - before;
        queue.ram.write(addr, &Request::flush().readable);
        assert_eq!(
            run_segments(&mut queue, &[segment(addr, 16)], &[status]),
            (Some(OK), 1)
        );
    }
}

#[test]
fn d8_zero_length_buffers_anywhere_change_nothing() {
    let (_vmm, mut queue) = single(&null_device(1 << 20));
    let header = header(&mut queue, IN, 0);
    let nothing = segment(HOLE, 0);
    let data = segment(queue.arena.take(1024, 512, 0), 512);
    let status = status(&mut queue);
    assert_eq!(
        run_segments(
            &mut queue,
            &[nothing, header, nothing],
            &[nothing, data, nothing, status, nothing]
        )
        .1,
        513
    );
    assert_eq!(queue.ram.read(status.addr.0, 1), [OK]);
}

#[test]
fn d22_buffers_over_the_ring_harm_the_guest_alone() {
    let scratch = Scratch::new(Kind::Disk, &pattern(22, DISK));
    let mut vmm = Embedded::new(&scratch.device());
    let mut victim = vmm.queue(0, 16);
    let mut other = vmm.queue(1, 16);
    let areas = [
        victim.addresses.descriptor_area.0,
        victim.addresses.driver_area.0 & !511,
        victim.addresses.device_area.0 & !511,
    ];
    for area in areas {
        // Reads land on the ring itself. What the guest sees then is its own affair.
        let header = header(&mut victim, IN, 0);
        let status = status(&mut victim);
        let ring = segment(area, 4096);
        if victim.driver.add_chain(&[header], &[ring, status]).is_ok() {
            victim.publish();
            victim.kick.notify().unwrap();
        }
    }
    // Whatever became of the ring, the rest of the device works and the queue can be stopped ...
    for _ in 0..64 {
        assert_eq!(other.answer(&Request::read(0, 4096)), (Some(OK), 4097));
    }
    vmm.plane.stop_queue(0).unwrap();
    // ... and set up anew.
    let mut again = vmm.queue(0, 16);
    assert_goes_on(&mut again);
}

#[test]
fn d23_buffers_that_alias_header_and_status_are_safe() {
    let content = pattern(23, DISK);
    let scratch = Scratch::new(Kind::Disk, &content);
    let (_vmm, mut queue) = single(&scratch.device());
    // The data goes over the header: read already.
    let addr = queue.arena.take(1024, 512, 0);
    queue.ram.write(addr, &Request::read(2, 0).readable);
    let status = status(&mut queue);
    queue
        .driver
        .add_chain(&[segment(addr, 16)], &[segment(addr, 512), status])
        .unwrap();
    queue.publish();
    assert_eq!(wait_raw(&mut queue), 513);
    assert!(queue.ram.read(addr, 512) == content[1024..1536]);
    assert_eq!(queue.ram.read(status.addr.0, 1), [OK]);
    // The status byte is inside the data: written last, so it stands.
    let header = header(&mut queue, IN, 2);
    queue
        .driver
        .add_chain(&[header], &[segment(addr, 512), segment(addr + 100, 1)])
        .unwrap();
    // The status byte is inside the header of the same request.
    let mut own = header;
    own.addr.0 += 3;
    own.len = 1;
    queue
        .driver
        .add_chain(&[header], &[segment(addr + 512, 512), own])
        .unwrap();
    queue.publish();
    assert_eq!(wait_raw(&mut queue), 513);
    assert_eq!(wait_raw(&mut queue), 513);
    assert_eq!(queue.ram.read(addr + 100, 1), [OK]);
    assert_goes_on(&mut queue);
}

#[test]
fn d23_requests_that_share_one_buffer_all_complete() {
    let content = pattern(24, DISK);
    let scratch = Scratch::new(Kind::Disk, &content);
    let (_vmm, mut queue) = single(&scratch.device());
    let shared = segment(queue.arena.take(4096, 512, 0), 4096);
    let status = status(&mut queue);
    for sector in 0..32 {
        let header = header(&mut queue, IN, sector * 8);
        queue
            .driver
            .add_chain(&[header], &[shared, status])
            .unwrap();
    }
    queue.publish();
    for _ in 0..32 {
        assert_eq!(wait_raw(&mut queue), 4097);
    }
}

#[test]
fn t1_header_changed_while_requests_run_is_never_half_believed() {
    // One header, flipped between a good read and a write to a sector out of range by another
    // thread. Each request sees one or the other, whole or torn, but a torn one must not write.
    let content = pattern(31, DISK);
    let scratch = Scratch::new(Kind::Shm, &content);
    let (_vmm, mut queue) = single(&scratch.device());
    let header = header(&mut queue, IN, 0);
    let ram = std::sync::Arc::clone(&queue.ram);
    let stop = std::sync::atomic::AtomicBool::new(false);
    let read = Request::read(0, 0).readable;
    let write = Request::new(OUT, u64::MAX, &[], 0).readable;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                ram.write(header.addr.0, &read);
                ram.write(header.addr.0, &write);
            }
        });
        for _ in 0..500 {
            let data = segment(queue.arena.take(1024, 512, 0), 512);
            let status = status(&mut queue);
            let (status, _) = run_segments(&mut queue, &[header], &[data, status]);
            assert!(matches!(status, Some(OK | IOERR | UNSUPP)), "{status:?}");
            queue.arena.reset();
            // Past the header, which stays.
            queue.arena.take(4096, 4096, 0);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    assert!(scratch.content() == content);
}

#[test]
fn t2_data_changed_during_the_write_is_some_mix_of_what_the_guest_wrote() {
    for skew in [0, 1] {
        let scratch = Scratch::zeroed(Kind::Disk, DISK);
        let (_vmm, mut queue) = single(&scratch.device());
        let request = Request::write(0, &vec![0x11; 64 * 1024]);
        let ram = std::sync::Arc::clone(&queue.ram);
        let stop = std::sync::atomic::AtomicBool::new(false);
        let start = queue.arena.start();
        std::thread::scope(|scope| {
            let framing = Framing::classic(&request).skew(skew);
            queue.add(&request, &framing);
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    // The data buffer, one byte of every sector of it.
                    for sector in 2..100 {
                        ram.write(start + sector * 512 + 37, &[0x22]);
                    }
                }
            });
            queue.publish();
            assert_eq!(queue.next().status, Some(OK));
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        let content = scratch.content();
        assert!(
            content[..64 * 1024]
                .iter()
                .all(|byte| [0x11, 0x22].contains(byte))
        );
        assert!(content[64 * 1024..].iter().all(|&byte| byte == 0));
    }
}

#[test]
fn d11_indirect_without_the_feature_is_a_bad_chain() {
    let mut vmm = Embedded::new(&null_device(1 << 20));
    let mut queue = vmm.queue_with(0, 16, FEATURES & !INDIRECT);
    let request = Request::read(0, 512);
    let framing = Framing::classic(&request).table(Table::Indirect);
    let done = queue.run_framed(&request, &framing);
    assert_eq!((done.status, done.len), (Some(0xee), 0));
    assert_goes_on(&mut queue);
}
