//! The image underneath: its size, its end, what flush and merging make of it.

use std::fs::File;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;

use blk_dataplane::{Backing, Caching, Device, DeviceOptions, Image, ImageError, ImageOptions};

use crate::support::embedded::{Embedded, single};
use crate::support::pattern;
use crate::support::queue::{
    BLK_DISCARD, BLK_FLUSH, BLK_LIFETIME, BLK_SECURE_ERASE, BLK_WRITE_ZEROES, FEATURES,
};
use crate::support::request::{DISCARD, Framing, IOERR, OK, Request, WRITE_ZEROES};
use crate::support::scratch::{KINDS, Kind, Scratch, on_threads, options};

const DISK: usize = 1 << 20;

#[test]
fn i7_reads_past_the_end_of_a_truncated_file_are_ioerr_and_capacity_stays() {
    for kind in KINDS {
        let content = pattern(7, DISK);
        let scratch = Scratch::new(kind, &content);
        let device = scratch.device();
        let (vmm, mut queue) = single(&device);
        scratch.truncate(512 * 1024);
        let end = 1024;
        assert_eq!(queue.answer(&Request::read(end, 4096)), (Some(IOERR), 0));
        // Half in, half out.
        assert_eq!(
            queue.answer(&Request::read(end - 4, 4096)),
            (Some(IOERR), 0)
        );
        assert!(
            queue.run(&Request::read(end - 8, 4096)).data == content[DISK / 2 - 4096..DISK / 2]
        );
        assert_eq!(vmm.plane.counters().io_errors, 2);
        let config = device.config_space();
        let capacity = config.read(0, 8).unwrap();
        assert_eq!(capacity, 2048u64.to_le_bytes());
    }
}

#[test]
fn i8_odd_tail_of_a_file_is_not_part_of_the_disk() {
    for kind in KINDS {
        let scratch = Scratch::new(kind, &pattern(8, 10 * 4096 + 4095));
        let image = scratch.image();
        let block = u64::from(image.block_size());
        assert_eq!(image.capacity(), (10 * 4096 + 4095) / block * block);
        let device = scratch.device();
        let sectors = image.capacity() / 512;
        let config = device.config_space();
        let bytes = config.read(0, 8).unwrap();
        assert_eq!(bytes, sectors.to_le_bytes());
        let (_vmm, mut queue) = single(&device);
        let len = usize::try_from(block).unwrap();
        let last = sectors - block / 512;
        assert_eq!(queue.answer(&Request::read(last, len)).0, Some(OK));
        assert_eq!(queue.answer(&Request::read(sectors, len)).0, Some(IOERR));
    }
}

#[test]
fn i8_file_without_a_whole_block_is_no_disk() {
    let scratch = Scratch::new(Kind::Disk, &[1; 511]);
    let refused = Image::open(&scratch.path, &ImageOptions::default());
    assert!(matches!(
        refused,
        Err(ImageError::TooSmall { size: 511, .. })
    ));
}

#[test]
fn merged_writes_land_where_they_belong() {
    for kind in KINDS {
        let mut model = pattern(1, DISK);
        let scratch = Scratch::new(kind, &model);
        let mut vmm = Embedded::new(&scratch.device());
        let mut queue = vmm.queue(0, 128);
        vmm.plane.pause().unwrap();
        for number in 0..40usize {
            let data = pattern(u64::try_from(number).unwrap() + 100, 4096);
            let request = Request::write(u64::try_from(64 + number * 8).unwrap(), &data);
            queue.add(&request, &Framing::classic(&request));
            model[(64 + number * 8) * 512..][..4096].copy_from_slice(&data);
        }
        queue.publish();
        // All in one batch.
        vmm.plane.resume().unwrap();
        for done in queue.finish() {
            assert_eq!((done.status, done.len), (Some(OK), 1));
        }
        let counters = vmm.plane.counters();
        assert_eq!((counters.operations, counters.merged), (1, 40), "{kind:?}");
        assert!(scratch.content() == model, "{kind:?}");
    }
}

#[test]
fn without_merging_each_request_is_an_operation_of_its_own() {
    for kind in KINDS {
        let mut model = pattern(3, DISK);
        let scratch = Scratch::new(kind, &model);
        let options = DeviceOptions {
            merge: false,
            ..options()
        };
        let device = Device::new(Backing::Image(scratch.image()), &options).unwrap();
        let mut vmm = Embedded::new(&device);
        let mut queue = vmm.queue(0, 128);
        vmm.plane.pause().unwrap();
        for number in 0..40usize {
            let data = pattern(u64::try_from(number).unwrap() + 100, 4096);
            let request = Request::write(u64::try_from(number * 8).unwrap(), &data);
            queue.add(&request, &Framing::classic(&request));
            model[number * 4096..][..4096].copy_from_slice(&data);
        }
        queue.publish();
        vmm.plane.resume().unwrap();
        for done in queue.finish() {
            assert_eq!((done.status, done.len), (Some(OK), 1));
        }
        let counters = vmm.plane.counters();
        assert_eq!((counters.operations, counters.merged), (40, 0), "{kind:?}");
        assert!(scratch.content() == model, "{kind:?}");
    }
}

#[test]
fn merging_takes_no_more_than_a_megabyte_or_512_segments_at_once() {
    let mut model = pattern(2, 4 * DISK);
    let scratch = Scratch::new(Kind::Disk, &model);
    let mut vmm = Embedded::new(&scratch.device());
    let mut queue = vmm.queue(0, 1024);
    vmm.plane.pause().unwrap();
    for number in 0..100usize {
        let data = pattern(u64::try_from(number).unwrap() + 100, 16384);
        let request = Request::write(u64::try_from(number * 32).unwrap(), &data);
        // 8 segments each.
        let framing = Framing::cut(&[16, 2048, 2048, 2048, 2048, 2048, 2048, 2048], &[]);
        queue.add(&request, &framing);
        model[number * 16384..][..16384].copy_from_slice(&data);
    }
    queue.publish();
    vmm.plane.resume().unwrap();
    assert!(queue.finish().iter().all(|done| done.status == Some(OK)));
    // 100 x 16 KiB in pieces of at most 1 MiB (64) and 512 segments (64): two.
    assert_eq!(vmm.plane.counters().operations, 2);
    assert!(scratch.content() == model);
}

#[test]
fn i3_bad_part_of_a_merged_read_fails_alone() {
    for kind in KINDS {
        let content = pattern(3, DISK);
        let scratch = Scratch::new(kind, &content);
        let mut vmm = Embedded::new(&scratch.device());
        let mut queue = vmm.queue(0, 128);
        vmm.plane.pause().unwrap();
        scratch.truncate(512 * 1024);
        let mut heads = std::collections::HashMap::new();
        for number in 0..20u64 {
            // 4 KiB each, 512 KiB in the middle of the twenty.
            let request = Request::read(1024 - 80 + number * 8, 4096);
            heads.insert(queue.add(&request, &Framing::classic(&request)), number);
        }
        queue.publish();
        vmm.plane.resume().unwrap();
        for done in queue.finish() {
            let number = heads[&done.head];
            if number < 10 {
                assert_eq!(
                    (done.status, done.len),
                    (Some(OK), 4097),
                    "{kind:?} {number}"
                );
                let at = 512 * 1024 - 40960 + usize::try_from(number).unwrap() * 4096;
                assert!(done.data == content[at..at + 4096]);
            } else {
                assert_eq!(
                    (done.status, done.len),
                    (Some(IOERR), 0),
                    "{kind:?} {number}"
                );
            }
        }
        let counters = vmm.plane.counters();
        assert_eq!((counters.merged, counters.io_errors), (20, 10));
        // Merged again afterwards: no link of the failed operation is left over.
        vmm.plane.pause().unwrap();
        for number in 0..10u64 {
            let request = Request::read(number * 8, 4096);
            queue.add(&request, &Framing::classic(&request));
        }
        queue.publish();
        vmm.plane.resume().unwrap();
        assert!(queue.finish().iter().all(|done| done.status == Some(OK)));
    }
}

#[test]
fn requests_of_two_queues_are_merged_and_answered_on_their_own() {
    let content = pattern(4, DISK);
    let scratch = Scratch::new(Kind::Disk, &content);
    let mut vmm = Embedded::new(&scratch.device());
    let mut queues = [vmm.queue(0, 64), vmm.queue(1, 64)];
    vmm.plane.pause().unwrap();
    let mut heads = [const { Vec::new() }; 2];
    for number in 0..20usize {
        let request = Request::read(u64::try_from(number * 8).unwrap(), 4096);
        let queue = &mut queues[number % 2];
        let head = queue.add(&request, &Framing::classic(&request));
        heads[number % 2].push((head, number));
    }
    queues.iter_mut().for_each(|queue| queue.publish());
    vmm.plane.resume().unwrap();
    for (queue, heads) in queues.iter_mut().zip(heads) {
        for done in queue.finish() {
            let (_, number) = heads.iter().find(|(head, _)| *head == done.head).unwrap();
            assert!(done.data == content[number * 4096..][..4096]);
        }
    }
}

#[test]
fn b29_i10_flush_completes_after_the_writes_of_all_queues_popped_before_it() {
    flush_behind_writes(1);
}

#[test]
fn b29_i10_flush_completes_after_the_writes_of_all_queues_popped_before_it_on_two_threads() {
    flush_behind_writes(2);
}

fn flush_behind_writes(threads: u16) {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let mut vmm = Embedded::new(&on_threads(Backing::Image(scratch.image()), threads));
    let mut writer = vmm.queue(0, 128);
    let mut flusher = vmm.queue(1, 16);
    for round in 0..20u64 {
        vmm.plane.pause().unwrap();
        // Apart from each other, so that each is an operation; some must bounce.
        for number in 0..30u64 {
            let request = Request::write(number * 40, &pattern(round * 100 + number + 1, 4096));
            let framing = Framing::classic(&request).skew(u64::from(number % 5 == 0));
            writer.add(&request, &framing);
        }
        // One flush behind them on their own queue, one on the other.
        let own = writer.add(&Request::flush(), &Framing::joined());
        flusher.add(&Request::flush(), &Framing::joined());
        let before = vmm.plane.counters().syncs;
        writer.publish();
        flusher.publish();
        vmm.plane.resume().unwrap();
        let order = writer.finish();
        assert_eq!(order.len(), 31);
        // Those behind a bounced one may have been popped later than the flush of the other queue,
        // but never later than the flush behind them.
        assert_eq!(
            order.last().map(|done| (done.head, done.status)),
            Some((own, Some(OK)))
        );
        assert_eq!(flusher.next().status, Some(OK));
        let syncs = vmm.plane.counters().syncs - before;
        assert!(
            (1..=2).contains(&syncs),
            "{syncs} fdatasync for two flushes"
        );
        writer.arena.reset();
        flusher.arena.reset();
    }
}

#[test]
fn b29_flushes_in_one_batch_share_one_fdatasync() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let (mut vmm, mut queue) = single(&scratch.device());
    vmm.plane.pause().unwrap();
    for _ in 0..50 {
        queue.add(&Request::flush(), &Framing::joined());
    }
    queue.publish();
    vmm.plane.resume().unwrap();
    let done = queue.finish();
    assert!(
        done.iter()
            .all(|done| (done.status, done.len) == (Some(OK), 1))
    );
    assert_eq!(vmm.plane.counters().syncs, 1);
}

#[test]
fn driver_without_flush_gets_its_writes_written_through() {
    // That no write completes before its fdatasync is tested beside the code.
    for kind in KINDS {
        let scratch = Scratch::zeroed(kind, DISK);
        let mut vmm = Embedded::new(&scratch.device());
        let mut plain = vmm.queue_with(0, 16, FEATURES & !BLK_FLUSH);
        let data = pattern(1, 8192);
        for _ in 0..3 {
            let before = vmm.plane.counters().syncs;
            assert_eq!(plain.answer(&Request::write(16, &data)), (Some(OK), 1));
            assert_eq!(vmm.plane.counters().syncs, before + 1);
        }
        let mut other = vmm.queue(1, 16);
        assert_eq!(other.answer(&Request::write(0, &data)), (Some(OK), 1));
        assert!(scratch.content()[8192..16384] == data);
        assert!(scratch.content()[..8192] == data);
    }
}

#[test]
fn stop_completes_everything_and_the_image_has_it() {
    for kind in KINDS {
        let scratch = Scratch::zeroed(kind, DISK);
        let (vmm, mut queue) = single(&scratch.device());
        for number in 0..40u64 {
            let request = Request::write(number * 16, &pattern(number + 1, 4096));
            queue.add(&request, &Framing::classic(&request).skew(number % 2));
        }
        queue.publish();
        vmm.plane.stop().unwrap();
        let content = scratch.content();
        let mut acknowledged = 0;
        // In the order of the heads, which is that of the numbers only for the driver's first lap.
        while let Some(done) = queue.poll() {
            assert_eq!(done.status, Some(OK));
            acknowledged += 1;
        }
        let landed = (0..40usize)
            .filter(|number| {
                let expected = pattern(u64::try_from(*number).unwrap() + 1, 4096);
                content[number * 8192..][..4096] == expected
            })
            .count();
        assert_eq!(landed, acknowledged);
    }
}

#[test]
fn device_of_a_cloned_description_serves_the_same_image() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let image = scratch.image();
    let device = Device::new(Backing::Image(image), &options()).unwrap();
    let data = pattern(9, 4096);
    {
        let (_vmm, mut queue) = single(&device.clone());
        assert_eq!(queue.answer(&Request::write(0, &data)).0, Some(OK));
    }
    let (_vmm, mut queue) = single(&device);
    assert!(queue.run(&Request::read(0, 4096)).data == data);
}

/// A loop device with blocks of `block_size`, detached when dropped. Needs root and losetup.
struct Loop(String);

impl Loop {
    fn new(file: &Path, block_size: u32) -> Self {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &block_size.to_string()])
            .arg(file)
            .output()
            .expect("this test needs losetup (Debian: mount)");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.success(),
            "this test needs root for losetup: {said}"
        );
        Self(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

/// Opened for itself alone, as mount(8) and all who build upon block devices do.
fn claimed(disk: &Path) -> std::io::Result<File> {
    File::options()
        .read(true)
        .custom_flags(libc::O_EXCL)
        .open(disk)
}

#[test]
fn block_device_has_one_user_whatever_node_it_is_opened_by() {
    let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let disk = Loop::new(file.path(), 512);
    let disk = disk.0.as_ref();
    let open = |read_only, force_share| {
        let options = ImageOptions {
            read_only,
            force_share,
            ..ImageOptions::default()
        };
        Image::open(disk, &options)
    };
    {
        let _mounted = claimed(disk).unwrap();
        let refused = open(false, false).unwrap_err();
        assert!(
            matches!(refused, ImageError::InUseByHost { .. }),
            "{refused}"
        );
        open(true, false).unwrap();
        open(false, true).unwrap();
    }
    let image = open(false, false).unwrap();
    let busy = claimed(disk).unwrap_err();
    assert_eq!(busy.raw_os_error(), Some(libc::EBUSY));
    // Of the same node the lock says who.
    let refused = open(false, false).unwrap_err();
    assert!(matches!(refused, ImageError::InUse { .. }), "{refused}");
    drop(image);
    claimed(disk).unwrap();
    // Readers claim nothing.
    let _readers = [open(true, false).unwrap(), open(true, false).unwrap()];
    claimed(disk).unwrap();
}

#[test]
fn block_device_is_served_in_its_own_blocks() {
    for block_size in [512u32, 4096] {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        file.as_file().set_len(4 << 20).unwrap();
        let disk = Loop::new(file.path(), block_size);
        let image = Image::open(disk.0.as_ref(), &ImageOptions::default()).unwrap();
        assert_eq!(image.capacity(), 4 << 20, "from BLKGETSIZE64");
        assert_eq!(image.block_size(), block_size);
        assert_eq!(image.caching(), &Caching::Direct);
        let device = Device::new(Backing::Image(image), &DeviceOptions::default()).unwrap();
        let config = device.config_space();
        let told = config.read(20, 4).unwrap();
        assert_eq!(told, block_size.to_le_bytes(), "blk_size");

        let (mut vmm, mut queue) = single(&device);
        let data = pattern(7, 8192);
        assert_eq!(queue.answer(&Request::write(16, &data)), (Some(OK), 1));
        assert_eq!(queue.answer(&Request::flush()), (Some(OK), 1));
        assert_eq!(
            &std::fs::read(file.path()).unwrap()[16 * 512..][..8192],
            data
        );
        // Half a block of 4096 would be a read-modify-write.
        let half = queue.answer(&Request::write(1, &data[..512])).0;
        assert_eq!(half == Some(OK), block_size == 512);

        // Linux's loop driver can do neither.
        assert_eq!(device.features() & (BLK_SECURE_ERASE | BLK_LIFETIME), 0);
        // It punches holes.
        let both = BLK_DISCARD | BLK_WRITE_ZEROES;
        assert_eq!(device.features() & both, both);
        let mut ranges = vmm.queue_with(1, 16, FEATURES | both);
        let blocks = || file.as_file().metadata().unwrap().blocks();
        let filled = ranges.answer(&Request::write(1024, &pattern(8, 64 * 1024)));
        assert_eq!(filled, (Some(OK), 1));
        let zeroes = Request::ranges(WRITE_ZEROES, &[(1024, 64, 0)]);
        assert_eq!(ranges.answer(&zeroes), (Some(OK), 1));
        assert_eq!(ranges.answer(&Request::flush()), (Some(OK), 1));
        let before = blocks();
        let content = std::fs::read(file.path()).unwrap();
        assert!(
            content[1024 * 512..1088 * 512]
                .iter()
                .all(|&byte| byte == 0)
        );
        assert!(content[1088 * 512..1152 * 512] == pattern(8, 64 * 1024)[32 * 1024..]);
        let discard = Request::ranges(DISCARD, &[(1088, 64, 0)]);
        assert_eq!(ranges.answer(&discard), (Some(OK), 1));
        assert_eq!(before - blocks(), 64);
    }
}
