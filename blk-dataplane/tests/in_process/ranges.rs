//! Discard and write-zeroes.

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use blk_dataplane::{Backing, Device, DeviceOptions};

use crate::support::embedded::Embedded;
use crate::support::pattern;
use crate::support::queue::{
    BLK_DISCARD, BLK_LIFETIME, BLK_SECURE_ERASE, BLK_WRITE_ZEROES, CONFIG_WCE, FEATURES, GuestQueue,
};
use crate::support::request::{
    DISCARD, Framing, GET_LIFETIME, IOERR, OK, Request, SECURE_ERASE, Table, UNSUPP, WRITE_ZEROES,
};
use crate::support::scratch::{KINDS, Kind, Scratch, null_device, options};

const DISK: usize = 1 << 20;
const SECTORS: u64 = 2048;

/// What a driver accepts that knows both.
const BOTH: u64 = FEATURES | BLK_DISCARD | BLK_WRITE_ZEROES;

const UNMAP: u32 = 1;

fn up(device: &Device, features: u64) -> (Embedded, GuestQueue) {
    let mut vmm = Embedded::new(device);
    let queue = vmm.queue_with(0, 64, features);
    (vmm, queue)
}

fn field(device: &Device, offset: u32) -> u32 {
    let config = device.config_space();
    u32::from_le_bytes(config.read(offset, 4).unwrap().try_into().unwrap())
}

/// Blocks of storage that a scratch image takes.
fn blocks(scratch: &Scratch) -> u64 {
    std::fs::metadata(&scratch.path).unwrap().blocks()
}

#[test]
fn b22_b23_zeroed_ranges_read_as_zeroes_and_their_neighbours_do_not() {
    for kind in KINDS {
        for unmap in [0, UNMAP] {
            let mut content = pattern(23, DISK);
            let scratch = Scratch::new(kind, &content);
            let (_vmm, mut queue) = up(&scratch.device(), BOTH);
            // Off the file system's blocks, at both ends, twice the same, one in the other, and none.
            let segments = [
                (3, 5, unmap),
                (16, 64, unmap),
                (20, 8, unmap),
                (16, 64, unmap),
                (100, 0, unmap),
                (SECTORS - 9, 9, unmap),
                (0, 1, unmap),
            ];
            let request = Request::ranges(WRITE_ZEROES, &segments);
            assert_eq!(queue.answer(&request), (Some(OK), 1));
            for (sector, sectors, _) in segments {
                let start = usize::try_from(sector).unwrap() * 512;
                content[start..start + usize::try_from(sectors).unwrap() * 512].fill(0);
            }
            assert!(scratch.content() == content, "{kind:?}, flags {unmap}");
            let read = queue.run(&Request::read(0, 64 * 1024));
            assert!(read.data == content[..64 * 1024]);
        }
    }
}

#[test]
fn discarded_ranges_lose_their_storage_and_nothing_else_does() {
    for kind in KINDS {
        let content = pattern(24, DISK);
        let scratch = Scratch::new(kind, &content);
        let (_vmm, mut queue) = up(&scratch.device(), BOTH);
        let before = blocks(&scratch);
        let segments = [(512, 256, 0), (1024, 128, 0)];
        let request = Request::ranges(DISCARD, &segments);
        assert_eq!(queue.answer(&request), (Some(OK), 1));
        assert_eq!(blocks(&scratch), before - 384, "{kind:?}");
        let now = scratch.content();
        assert_eq!(now.len(), DISK);
        for (range, kept) in [
            (0..512, true),
            (768..1024, true),
            (1152..2048, true),
            // Undefined by the specification; a hole, here.
            (512..768, false),
            (1024..1152, false),
        ] {
            let bytes = range.start * 512..range.end * 512;
            let same = now[bytes.clone()] == content[bytes];
            assert_eq!(same, kept, "{range:?}");
        }
    }
}

#[test]
fn zeroed_ranges_keep_their_storage_unless_unmap_is_asked_for_and_allowed() {
    for (discard, flags, freed) in [(true, UNMAP, 256), (true, 0, 0), (false, UNMAP, 0)] {
        let scratch = Scratch::new(Kind::Disk, &pattern(25, DISK));
        let options = DeviceOptions {
            discard,
            ..options()
        };
        let device = Device::new(Backing::Image(scratch.image()), &options).unwrap();
        let (_vmm, mut queue) = up(&device, BOTH);
        let before = blocks(&scratch);
        let request = Request::ranges(WRITE_ZEROES, &[(512, 256, flags)]);
        assert_eq!(queue.answer(&request), (Some(OK), 1));
        assert_eq!(before - blocks(&scratch), freed);
        assert!(
            scratch.content()[512 * 512..768 * 512]
                .iter()
                .all(|&byte| byte == 0)
        );
    }
}

#[test]
fn limits_are_told_and_none_is_zero() {
    for kind in KINDS {
        let scratch = Scratch::zeroed(kind, DISK);
        let device = scratch.device();
        assert_eq!(
            device.features() & (BLK_DISCARD | BLK_WRITE_ZEROES),
            BLK_DISCARD | BLK_WRITE_ZEROES
        );
        // max_discard_sectors, max_discard_seg, discard_sector_alignment, max_write_zeroes_sectors,
        // max_write_zeroes_seg.
        for offset in [36, 40, 44, 48, 52] {
            assert_ne!(field(&device, offset), 0, "at {offset}");
        }
        assert_eq!(field(&device, 36) % field(&device, 44), 0);
        assert_eq!(device.config_space().read(56, 1).unwrap(), [1], "may unmap");

        let options = DeviceOptions {
            discard: false,
            ..options()
        };
        let thick = Device::new(Backing::Image(scratch.image()), &options).unwrap();
        assert_eq!(
            thick.features() & (BLK_DISCARD | BLK_WRITE_ZEROES),
            BLK_WRITE_ZEROES
        );
        assert_eq!(thick.config_space().read(56, 1).unwrap(), [0], "may unmap");
        assert_eq!(field(&thick, 36), 0);

        let read_only = scratch.read_only_device();
        assert_eq!(
            read_only.features() & (BLK_DISCARD | BLK_WRITE_ZEROES | CONFIG_WCE),
            0
        );
    }
}

/// Asks, and checks that the disk is as it was.
fn refused(scratch: &Scratch, queue: &mut GuestQueue, request: &Request) -> Option<u8> {
    queue.arena.reset();
    let before = scratch.content();
    let storage = blocks(scratch);
    let (status, len) = queue.answer(request);
    assert!(scratch.content() == before);
    assert_eq!(blocks(scratch), storage);
    assert!(len <= 1);
    status
}

#[test]
fn b15_read_only_device_discards_and_zeroes_nothing() {
    let scratch = Scratch::new(Kind::Disk, &pattern(15, DISK));
    // What it does not offer is not to be accepted; a driver that did gets no further.
    let (_vmm, mut queue) = up(&scratch.read_only_device(), BOTH);
    for kind in [DISCARD, WRITE_ZEROES] {
        let request = Request::ranges(kind, &[(0, 8, 0)]);
        assert_eq!(refused(&scratch, &mut queue, &request), Some(IOERR));
    }
    assert_eq!(queue.answer(&Request::flush()), (Some(OK), 1));
}

#[test]
fn b17_data_that_are_no_segments_or_too_many_are_ioerr() {
    let scratch = Scratch::new(Kind::Disk, &pattern(17, DISK));
    let device = scratch.device();
    let (_vmm, mut queue) = up(&device, BOTH);
    for (kind, max_seg) in [
        (DISCARD, field(&device, 40)),
        (WRITE_ZEROES, field(&device, 52)),
    ] {
        let max_seg = usize::try_from(max_seg).unwrap();
        for len in [0, 1, 15, 17, 31, 16 * (max_seg + 1), 16 * max_seg + 1, 4096] {
            let mut request = Request::ranges(kind, &vec![(0, 8, 0); 4096 / 16]);
            request.readable.truncate(16 + len);
            assert_eq!(
                refused(&scratch, &mut queue, &request),
                Some(IOERR),
                "{len}"
            );
        }
        // Room for data that there are none of (B14).
        let request = Request::ranges(kind, &[(0, 8, 0)]);
        let request = Request {
            writable: 513,
            ..request
        };
        assert_eq!(refused(&scratch, &mut queue, &request), Some(IOERR));
        let most = Request::ranges(kind, &vec![(0, 8, 0); max_seg]);
        queue.arena.reset();
        assert_eq!(queue.answer(&most), (Some(OK), 1));
    }
}

#[test]
fn b18_types_whose_feature_was_not_accepted_are_unsupp() {
    let scratch = Scratch::new(Kind::Disk, &pattern(18, DISK));
    for (features, kind) in [
        (FEATURES, DISCARD),
        (FEATURES, WRITE_ZEROES),
        (FEATURES | BLK_WRITE_ZEROES, DISCARD),
        (FEATURES | BLK_DISCARD, WRITE_ZEROES),
    ] {
        let (_vmm, mut queue) = up(&scratch.device(), features);
        let request = Request::ranges(kind, &[(0, 8, 0)]);
        assert_eq!(refused(&scratch, &mut queue, &request), Some(UNSUPP));
    }
}

#[test]
fn b19_b20_b21_segments_that_are_wrong_leave_the_good_ones_undone() {
    let scratch = Scratch::new(Kind::Disk, &pattern(19, DISK));
    let device = scratch.device();
    let (_vmm, mut queue) = up(&device, BOTH);
    let good = (0, 8, 0);
    for (kind, max) in [
        (DISCARD, field(&device, 36)),
        (WRITE_ZEROES, field(&device, 48)),
    ] {
        for (bad, status) in [
            ((0, 8, 2), UNSUPP),
            ((0, 8, 1 << 31), UNSUPP),
            ((0, 0, 4), UNSUPP),
            ((SECTORS, 1, 0), IOERR),
            ((SECTORS - 1, 2, 0), IOERR),
            ((0, u32::MAX, 0), IOERR),
            ((0, max + 1, 0), IOERR),
            ((u64::MAX, 1, 0), IOERR),
            ((1 << 55, 8, 0), IOERR),
        ] {
            for segments in [[good, bad], [bad, good]] {
                let request = Request::ranges(kind, &segments);
                let answer = refused(&scratch, &mut queue, &request);
                assert_eq!(answer, Some(status), "{bad:?}");
            }
        }
        let nothing = Request::ranges(kind, &[(5, 0, 0), (SECTORS, 0, 0)]);
        assert_eq!(refused(&scratch, &mut queue, &nothing), Some(OK));
    }
    let unmap = Request::ranges(DISCARD, &[(0, 8, UNMAP)]);
    assert_eq!(refused(&scratch, &mut queue, &unmap), Some(UNSUPP));
}

#[test]
fn b3_segments_are_found_however_the_request_is_cut() {
    for table in [Table::Direct, Table::Indirect, Table::Mixed(1)] {
        for cuts in [&[16][..], &[8, 8, 3], &[16, 5, 16], &[20, 1, 1, 1], &[]] {
            let mut content = pattern(3, DISK);
            let scratch = Scratch::new(Kind::Disk, &content);
            let (_vmm, mut queue) = up(&scratch.device(), BOTH);
            let request = Request::ranges(WRITE_ZEROES, &[(1, 2, 0), (9, 1, 0)]);
            let framing = Framing::cut(cuts, &[]).table(table);
            queue.add(&request, &framing);
            queue.publish();
            assert_eq!(queue.next().status, Some(OK));
            content[512..1536].fill(0);
            content[9 * 512..10 * 512].fill(0);
            assert!(scratch.content() == content, "{table:?} {cuts:?}");
        }
    }
}

#[test]
fn more_ranges_than_may_be_in_flight_are_all_done() {
    let scratch = Scratch::new(Kind::Disk, &pattern(5, DISK));
    let mut vmm = Embedded::new(&scratch.device());
    let mut queue = vmm.queue_with(0, 1024, BOTH);
    // 300 requests of 3 segments each, beside writes and flushes.
    for number in 0..300u64 {
        let first = number * 6;
        let segments = [(first, 1, 0), (first + 2, 1, 0), (first + 4, 1, 0)];
        let request = Request::ranges(WRITE_ZEROES, &segments);
        queue.add(&request, &Framing::joined());
        if number % 50 == 0 {
            queue.add(&Request::write(SECTORS - 8, &[7; 4096]), &Framing::joined());
            queue.add(&Request::flush(), &Framing::joined());
        }
    }
    queue.publish();
    let done = queue.finish();
    assert_eq!(done.len(), 312);
    assert!(
        done.iter()
            .all(|done| (done.status, done.len) == (Some(OK), 1))
    );
    let content = scratch.content();
    for sector in 0..1800 {
        let zero = content[sector * 512..][..512].iter().all(|&byte| byte == 0);
        assert_eq!(zero, sector % 2 == 0, "{sector}");
    }
}

#[test]
fn b30_zeroes_are_stable_before_they_complete_with_the_cache_off() {
    let scratch = Scratch::new(Kind::Disk, &pattern(6, DISK));
    let (mut vmm, mut queue) = up(&scratch.device(), BOTH | CONFIG_WCE);
    for (writeback, syncs) in [(1, 0), (0, 1)] {
        vmm.plane.write_config(32, &[writeback]).unwrap();
        let before = vmm.plane.counters().syncs;
        let request = Request::ranges(WRITE_ZEROES, &[(0, 8, 0), (64, 8, 0)]);
        assert_eq!(queue.answer(&request), (Some(OK), 1));
        assert_eq!(vmm.plane.counters().syncs - before, syncs);
    }
}

#[test]
fn t1_segment_changed_while_requests_run_is_never_half_believed() {
    let content = pattern(1, DISK);
    let scratch = Scratch::new(Kind::Shm, &content);
    let (_vmm, mut queue) = up(&scratch.device(), BOTH);
    let stop = Arc::new(AtomicBool::new(false));
    let address = queue.arena.start();
    let changer = std::thread::spawn({
        let (stop, ram) = (Arc::clone(&stop), Arc::clone(&queue.ram));
        move || {
            // The request lies where the arena begins: 16 bytes of header, then the segment.
            let mut far = false;
            while !stop.load(Ordering::Relaxed) {
                far = !far;
                let sector = if far { SECTORS } else { 8u64 };
                ram.write(address.next_multiple_of(512) + 16, &sector.to_le_bytes());
            }
        }
    });
    let mut seen = [0, 0];
    for _ in 0..2000 {
        queue.arena.reset();
        let request = Request::ranges(WRITE_ZEROES, &[(8, 8, 0)]);
        match queue.run_framed(&request, &Framing::joined()).status {
            Some(OK) => seen[0] += 1,
            Some(IOERR) => seen[1] += 1,
            other => panic!("{other:?}"),
        }
    }
    stop.store(true, Ordering::Relaxed);
    changer.join().unwrap();
    assert!(seen[0] > 0, "{seen:?}");
    let now = scratch.content();
    assert_eq!(now.len(), DISK);
    assert!(now[..8 * 512] == content[..8 * 512] && now[16 * 512..] == content[16 * 512..]);
}

#[test]
fn null_device_does_all_at_once() {
    let device = null_device(1 << 30);
    let (_vmm, mut queue) = up(&device, BOTH | BLK_SECURE_ERASE);
    for kind in [DISCARD, WRITE_ZEROES, SECURE_ERASE] {
        let request = Request::ranges(kind, &[(0, 1024, 0); 16]);
        assert_eq!(queue.answer(&request), (Some(OK), 1));
    }
    // max_secure_erase_sectors, max_secure_erase_seg, secure_erase_sector_alignment.
    let [max_sectors, max_seg, alignment] = [60, 64, 68].map(|offset| field(&device, offset));
    assert_eq!((max_seg, alignment), (16, 1));
    assert_eq!(max_sectors % alignment, 0);
    let most = Request::ranges(SECURE_ERASE, &[(0, max_sectors, 0)]);
    assert_eq!(queue.answer(&most), (Some(OK), 1));
    for (segment, status) in [
        ((0, max_sectors + 1, 0), IOERR),
        ((0, 8, UNMAP), UNSUPP),
        (((1 << 30) / 512, 1, 0), IOERR),
    ] {
        queue.arena.reset();
        let wrong = Request::ranges(SECURE_ERASE, &[segment]);
        assert_eq!(queue.answer(&wrong), (Some(status), 1));
    }
}

#[test]
fn b27_what_a_file_cannot_do_is_neither_offered_nor_done() {
    const FLASH: u64 = BLK_SECURE_ERASE | BLK_LIFETIME;
    for kind in KINDS {
        let scratch = Scratch::new(kind, &pattern(27, DISK));
        let device = scratch.device();
        assert_eq!(device.features() & FLASH, 0);
        for offset in [60, 64, 68] {
            assert_eq!(field(&device, offset), 0, "at {offset}");
        }
        // A driver that accepts it all the same.
        let (_vmm, mut queue) = up(&device, BOTH | FLASH);
        let erase = Request::ranges(SECURE_ERASE, &[(0, 8, 0)]);
        assert_eq!(refused(&scratch, &mut queue, &erase), Some(UNSUPP));
        let lifetime = Request::new(GET_LIFETIME, 0, &[], 6);
        assert_eq!(refused(&scratch, &mut queue, &lifetime), Some(UNSUPP));
    }
    let options = DeviceOptions {
        discard: false,
        ..options()
    };
    let thick = Device::new(Backing::null(1 << 20), &options).unwrap();
    assert_eq!(thick.features() & BLK_SECURE_ERASE, 0, "keeps its storage");
}
