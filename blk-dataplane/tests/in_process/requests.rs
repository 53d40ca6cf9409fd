//! What each request does and what it answers: status, used length, content.

use blk_dataplane::SECTOR_SIZE;

use crate::support::embedded::{Embedded, single};
use crate::support::pattern;
use crate::support::queue::{FEATURES, GuestQueue, INDIRECT};
use crate::support::ram::{HIGH_END, HOLE, LOW_END, SEAM};
use crate::support::request::{
    DISCARD, FLUSH, Framing, GET_ID, IN, IOERR, OK, OUT, Request, Table, UNSUPP, WRITE_ZEROES,
};
use crate::support::scratch::{KINDS, Kind, SERIAL, Scratch, null_device};
use vm_memory::GuestAddress;
use vring::Segment;

const DISK: usize = 1 << 20;

fn segment(addr: u64, len: u32) -> Segment {
    Segment {
        addr: GuestAddress(addr),
        len,
    }
}

/// A header in the arena, and its segment.
fn header(queue: &mut GuestQueue, kind: u32, sector: u64) -> Segment {
    let addr = queue.arena.take(64, 64, 0);
    let bytes = Request::new(kind, sector, &[], 0).readable;
    queue.ram.write(addr, &bytes);
    segment(addr, 16)
}

/// Room for a status byte.
fn status(queue: &mut GuestQueue) -> Segment {
    segment(queue.arena.take(64, 64, 0), 1)
}

fn run_segments(
    queue: &mut GuestQueue,
    readable: &[Segment],
    writable: &[Segment],
) -> (Option<u8>, u32) {
    queue.add_segments(readable, writable, Table::Direct);
    queue.publish();
    let completed = queue.next();
    (completed.status, completed.len)
}

/// The queue still serves a read of the whole first page.
fn assert_goes_on(queue: &mut GuestQueue) {
    assert_eq!(queue.answer(&Request::read(0, 4096)), (Some(OK), 4097));
}

#[test]
fn written_data_is_read_back_and_is_in_the_image() {
    for kind in KINDS {
        let scratch = Scratch::zeroed(kind, DISK);
        let (_vmm, mut queue) = single(&scratch.device());
        let data = pattern(1, 64 * 1024);
        assert_eq!(queue.answer(&Request::write(64, &data)), (Some(OK), 1));
        assert_eq!(queue.answer(&Request::flush()), (Some(OK), 1));
        let read = queue.run(&Request::read(64, data.len()));
        assert_eq!((read.status, read.len), (Some(OK), 65537));
        assert!(read.data == data, "{kind:?}");
        let mut expected = vec![0; DISK];
        expected[64 * 512..][..data.len()].copy_from_slice(&data);
        assert!(scratch.content() == expected, "{kind:?}");
    }
}

#[test]
fn null_device_reads_zeroes_and_takes_writes() {
    let (_vmm, mut queue) = single(&null_device(1 << 30));
    assert_eq!(queue.answer(&Request::write(9, &[7; 512])), (Some(OK), 1));
    let read = queue.run(&Request::read(9, 512));
    assert_eq!((read.status, read.len), (Some(OK), 513));
    // Documented: it "reads zeroes".
    assert_eq!(read.data, vec![0; 512]);
    assert_eq!(queue.answer(&Request::flush()), (Some(OK), 1));
}

#[test]
fn b1_chain_without_a_status_byte_comes_back_with_length_0() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let (vmm, mut queue) = single(&scratch.device());
    for kind in [IN, OUT, FLUSH, GET_ID, 99] {
        let mut request = Request::new(kind, 0, &pattern(3, 512), 0);
        request.writable = 0;
        for framing in [Framing::joined(), Framing::cut(&[16], &[])] {
            let completed = queue.run_framed(&request, &framing);
            assert_eq!((completed.len, completed.status), (0, None));
        }
    }
    assert_eq!(vmm.plane.counters().bad_chains, 10);
    assert_eq!(scratch.content(), vec![0; DISK], "nothing was written");
    assert_goes_on(&mut queue);
}

#[test]
fn b2_short_header_is_ioerr_if_there_is_a_status_byte() {
    let (_vmm, mut queue) = single(&null_device(1 << 20));
    for len in [0, 1, 8, 15] {
        let mut request = Request::read(0, 512);
        request.readable.truncate(len);
        let completed = queue.run(&request);
        // Nothing was written before the status byte, so no prefix of the buffer was (len 0).
        assert_eq!((completed.status, completed.len), (Some(IOERR), 0));
    }
    // Without a data buffer the status byte is that prefix.
    let mut request = Request::flush();
    request.readable.truncate(15);
    assert_eq!(queue.answer(&request), (Some(IOERR), 1));
    assert_goes_on(&mut queue);
}

#[test]
fn b6_status_in_a_zero_length_buffer_is_the_last_byte_before_it() {
    let (_vmm, mut queue) = single(&null_device(1 << 20));
    let header = header(&mut queue, IN, 0);
    let data = segment(queue.arena.take(1024, 512, 0), 513);
    let nothing = segment(queue.arena.take(64, 64, 0), 0);
    assert_eq!(
        run_segments(&mut queue, &[header], &[data, nothing]),
        (Some(OK), 513)
    );
}

#[test]
fn b7_writable_header_gets_an_answer_and_no_transfer() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let (_vmm, mut queue) = single(&scratch.device());
    let header = header(&mut queue, OUT, 0);
    let data = segment(queue.arena.take(1024, 512, 0), 512);
    let status = status(&mut queue);
    let answer = run_segments(&mut queue, &[], &[header, data, status]);
    assert_eq!(answer, (Some(IOERR), 0));
    assert_eq!(scratch.content(), vec![0; DISK]);
    assert_goes_on(&mut queue);
}

#[test]
fn b8_b9_odd_and_empty_transfers_are_ioerr_and_move_nothing() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let (_vmm, mut queue) = single(&scratch.device());
    for len in [0, 1, 511, 513, 1023] {
        let read = queue.run(&Request::read(0, len));
        let expected = if len == 0 { 1 } else { 0 };
        assert_eq!((read.status, read.len), (Some(IOERR), expected), "{len}");
        assert!(read.data.iter().all(|&byte| byte == 0xee));
        let write = Request::write(0, &vec![1; len]);
        assert_eq!(queue.answer(&write), (Some(IOERR), 1), "{len}");
    }
    assert_eq!(scratch.content(), vec![0; DISK]);
}

#[test]
fn b10_b11_flush_flushes_whatever_comes_with_it() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let (vmm, mut queue) = single(&scratch.device());
    assert_eq!(queue.answer(&Request::flush()), (Some(OK), 1));
    assert_eq!(vmm.plane.counters().syncs, 1);
    assert_eq!(
        queue.answer(&Request::new(FLUSH, 77, &[5; 512], 0)),
        (Some(OK), 1)
    );
    // The data buffer is not touched, so no prefix of it was written.
    let with_room = queue.run(&Request::new(FLUSH, 0, &[], 512));
    assert_eq!((with_room.status, with_room.len), (Some(OK), 0));
    assert!(with_room.data.iter().all(|&byte| byte == 0xee));
    assert_eq!(vmm.plane.counters().syncs, 3);
}

#[test]
fn b12_b13_transfers_past_the_end_are_ioerr_and_move_nothing() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let (_vmm, mut queue) = single(&scratch.device());
    let sectors = u64::try_from(DISK).unwrap() / SECTOR_SIZE;
    let far = [
        sectors,
        sectors - 1,
        u64::MAX,
        u64::MAX - 1,
        u64::MAX / 512,
        u64::MAX / 512 + 1,
        (1 << 55) - 1,
        1 << 63,
    ];
    for sector in far {
        let read = queue.run(&Request::read(sector, 1024));
        assert_eq!((read.status, read.len), (Some(IOERR), 0), "{sector:#x}");
        assert!(read.data.iter().all(|&byte| byte == 0xee));
        let write = Request::write(sector, &[9; 1024]);
        assert_eq!(queue.answer(&write), (Some(IOERR), 1), "{sector:#x}");
    }
    assert_eq!(
        queue.answer(&Request::write(sectors - 1, &[0; 512])),
        (Some(OK), 1)
    );
    assert_eq!(scratch.content(), vec![0; DISK]);
}

#[test]
fn b14_data_in_the_wrong_direction_is_ioerr_and_moves_nothing() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let (_vmm, mut queue) = single(&scratch.device());
    let wrong = [
        Request::new(IN, 0, &[1; 512], 0),
        Request::new(IN, 0, &[1; 512], 512),
        Request::new(OUT, 0, &[], 512),
        Request::new(OUT, 0, &[1; 512], 512),
    ];
    for request in wrong {
        let completed = queue.run(&request);
        assert_eq!(completed.status, Some(IOERR));
        assert!(completed.data.iter().all(|&byte| byte == 0xee));
    }
    assert_eq!(scratch.content(), vec![0; DISK]);
}

#[test]
fn b15_read_only_image_refuses_writes_and_serves_the_rest() {
    let content = pattern(15, DISK);
    let scratch = Scratch::new(Kind::Disk, &content);
    let device = scratch.read_only_device();
    assert_ne!(device.features() & (1 << 5), 0, "VIRTIO_BLK_F_RO");
    let (_vmm, mut queue) = single(&device);
    assert_eq!(
        queue.answer(&Request::write(0, &[0; 512])),
        (Some(IOERR), 1)
    );
    for kind in [DISCARD, WRITE_ZEROES] {
        let request = Request::new(kind, 0, &[0; 16], 0);
        assert_eq!(queue.answer(&request), (Some(UNSUPP), 1));
    }
    assert_eq!(queue.answer(&Request::flush()), (Some(OK), 1));
    assert_eq!(queue.run(&Request::get_id(20)).data, SERIAL.as_bytes());
    assert!(queue.run(&Request::read(8, 4096)).data == content[4096..8192]);
    assert!(scratch.content() == content);
}

#[test]
fn b16_b18_b27_unknown_and_unoffered_types_are_unsupp() {
    let (vmm, mut queue) = single(&null_device(1 << 20));
    let types = [
        2,
        3,
        5,
        6,
        7,
        9,
        10,
        11,
        12,
        13,
        14,
        15,
        16,
        24,
        0x8000_0000,
        0x8000_0001,
        u32::MAX,
    ];
    let mut count = 0;
    for kind in types {
        let plain = Request::new(kind, 0, &[], 0);
        assert_eq!(queue.answer(&plain), (Some(UNSUPP), 1), "type {kind:#x}");
        let data = Request::new(kind, 0, &[0xff; 32], 0);
        assert_eq!(queue.answer(&data), (Some(UNSUPP), 1), "type {kind:#x}");
        count += 2;
    }
    assert_eq!(vmm.plane.counters().unsupported, count);
    assert_goes_on(&mut queue);
}

#[test]
fn b24_get_id_writes_what_fits_and_says_how_much() {
    let (_vmm, mut queue) = single(&null_device(1 << 20));
    for room in [0, 1, 19, 20, 21, 32, 512] {
        let request = Request::get_id(room);
        let framings = [
            Framing::classic(&request),
            Framing::joined(),
            Framing::cut(&[16], &[1, 2, 3, 4, 5]),
            Framing::cut(&[16], &[1; 24]).skew(3),
        ];
        for framing in framings {
            let done = queue.run_framed(&request, &framing);
            let written = room.min(20);
            assert_eq!(done.status, Some(OK));
            // The status byte joins the prefix only if the data before it is complete.
            let prefix = if room <= 20 { room + 1 } else { 20 };
            assert_eq!(usize::try_from(done.len).unwrap(), prefix, "{framing:?}");
            assert_eq!(done.data[..written], SERIAL.as_bytes()[..written]);
            assert!(done.data[written..].iter().all(|&byte| byte == 0xee));
        }
    }
}

#[test]
fn b26_more_segments_than_seg_max_are_served() {
    // 1 KiB of readable parts over 513 and 1020 segments: beyond seg_max (126), beyond what a
    // request may submit in place, and near the most an indirect table may have.
    for kind in KINDS {
        let scratch = Scratch::zeroed(kind, DISK);
        let (_vmm, mut queue) = single(&scratch.device());
        for (seed, segments) in [(1, 127), (2, 252), (3, 253), (4, 513), (5, 1000)] {
            let len = segments * 512;
            let data = pattern(seed, len);
            let write = Request::write(8, &data);
            let mut readable = vec![16];
            readable.extend(std::iter::repeat_n(512, segments));
            let framing = Framing::cut(&readable, &[]).table(Table::Indirect);
            let done = queue.run_framed(&write, &framing);
            assert_eq!((done.status, done.len), (Some(OK), 1), "{segments}");
            let framing = Framing::cut(&[16], &vec![512; segments]).table(Table::Indirect);
            let done = queue.run_framed(&Request::read(8, len), &framing);
            assert_eq!(done.status, Some(OK));
            assert_eq!(usize::try_from(done.len).unwrap(), len + 1);
            assert!(done.data == data, "{kind:?}, {segments} segments");
            queue.arena.reset();
        }
    }
}

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

#[test]
fn b25_ioprio_is_ignored_whatever_it_is() {
    let content = pattern(25, 1 << 16);
    let scratch = Scratch::new(Kind::Disk, &content);
    let (_vmm, mut queue) = single(&scratch.device());
    let requests = [
        Request::read(8, 4096),
        Request::write(8, &content[4096..8192]),
        Request::flush(),
        Request::get_id(20),
    ];
    for ioprio in [0, 1, 0xffff, 1 << 31, u32::MAX] {
        for request in &requests {
            queue.arena.reset();
            let mut request = request.clone();
            request.readable[4..8].copy_from_slice(&u32::to_le_bytes(ioprio));
            assert_eq!(queue.answer(&request).0, Some(OK), "{ioprio:#x}");
        }
    }
    assert!(scratch.content() == content);
}
