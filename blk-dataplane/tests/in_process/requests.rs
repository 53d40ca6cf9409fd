//! What each request does and what it answers: status, used length, content.

use blk_dataplane::{Backing, Device, SECTOR_SIZE};

use crate::support::embedded::single;
use crate::support::pattern;
use crate::support::queue::GuestQueue;
use crate::support::request::{
    DISCARD, FLUSH, Framing, GET_ID, IN, IOERR, OK, OUT, POISON, Request, Table, UNSUPP,
    WRITE_ZEROES,
};
use crate::support::scratch::{KINDS, Kind, SERIAL, Scratch, null_device, options};
use vm_memory::GuestAddress;
use vring::Segment;

pub(super) const DISK: usize = 1 << 20;

pub(super) fn segment(addr: u64, len: u32) -> Segment {
    Segment {
        addr: GuestAddress(addr),
        len,
    }
}

/// A header in the arena, and its segment.
pub(super) fn header(queue: &mut GuestQueue, kind: u32, sector: u64) -> Segment {
    let addr = queue.arena.take(64, 64, 0);
    let bytes = Request::new(kind, sector, &[], 0).readable;
    queue.ram.write(addr, &bytes);
    segment(addr, 16)
}

/// Room for a status byte.
pub(super) fn status(queue: &mut GuestQueue) -> Segment {
    segment(queue.arena.take(64, 64, 0), 1)
}

pub(super) fn run_segments(
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
pub(super) fn assert_goes_on(queue: &mut GuestQueue) {
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
    // As `null_zeroes` says.
    assert_eq!(read.data, vec![0; 512]);
    assert_eq!(queue.answer(&Request::flush()), (Some(OK), 1));
}

#[test]
fn null_device_that_reads_nothing_leaves_memory_as_it_is_and_says_so() {
    let device = Device::new(Backing::null(1 << 30), &options()).unwrap();
    let (_vmm, mut queue) = single(&device);
    let read = queue.run(&Request::read(9, 512));
    // Virtio 1.3 §2.7.8.2: no more than was written, and the status is not at the beginning.
    assert_eq!((read.status, read.len), (Some(OK), 0));
    assert_eq!(read.data, [POISON; 512]);
    assert_eq!(queue.answer(&Request::write(9, &[7; 512])), (Some(OK), 1));
    // What is read is wrong all the same.
    assert_eq!(
        queue.answer(&Request::read((1 << 30) / 512, 512)),
        (Some(IOERR), 0)
    );
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
fn b2_b6_neither_a_whole_header_nor_a_status_byte_is_a_bad_chain() {
    let (vmm, mut queue) = single(&null_device(1 << 20));
    let header = header(&mut queue, FLUSH, 0);
    let short = segment(header.addr.0, 15);
    let status = status(&mut queue);
    let nothing = segment(status.addr.0, 0);
    let chains: [(&[Segment], &[Segment]); 5] = [
        (&[short], &[]),
        (&[short], &[nothing]),
        // The status byte is the device's to read, or has no room, or both.
        (&[header, status], &[]),
        (&[header], &[nothing]),
        (&[header, status], &[nothing, nothing]),
    ];
    for (readable, writable) in chains {
        let answer = run_segments(&mut queue, readable, writable);
        assert_eq!(answer, (None, 0), "{readable:?} {writable:?}");
    }
    assert_eq!(vmm.plane.counters().bad_chains, 5);
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
