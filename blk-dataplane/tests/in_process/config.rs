//! What the configuration space says, what a driver may write to it, and a size that changes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use blk_dataplane::{Backing, ConfigError, Device, DeviceError, DeviceOptions, Notifier};

use crate::support::embedded::{Embedded, single};
use crate::support::pattern;
use crate::support::queue::{BLK_FLUSH, CONFIG_WCE, FEATURES};
use crate::support::request::{Framing, IOERR, OK, Request};
use crate::support::scratch::{KINDS, Kind, Scratch, null_device, on_threads, options};

const DISK: usize = 1 << 20;

/// Offset of `writeback`.
const WRITEBACK: u32 = 32;

#[test]
fn b30_cache_turned_off_and_on_mid_stream() {
    for kind in KINDS {
        let scratch = Scratch::zeroed(kind, DISK);
        let mut vmm = Embedded::new(&on_threads(Backing::Image(scratch.image()), 2));
        let mut queues = [0, 1].map(|index| vmm.queue_with(index, 128, FEATURES | CONFIG_WCE));
        for round in 0..30u64 {
            let data = pattern(round + 1, 4096);
            for (number, queue) in queues.iter_mut().enumerate() {
                queue.arena.reset();
                for write in 0..10 {
                    let sector = number as u64 * 1000 + write * 16;
                    let request = Request::write(sector, &data);
                    queue.add(&request, &Framing::classic(&request));
                }
                queue.publish();
            }
            // 0 is off; anything else is on.
            let value = [0, 1, 0, 0x80][usize::try_from(round % 4).unwrap()];
            vmm.plane.write_config(WRITEBACK, &[value]).unwrap();
            let told = vmm.plane.config_space();
            assert_eq!(told.read(WRITEBACK, 1).unwrap(), [u8::from(value != 0)]);
            for queue in &mut queues {
                assert!(queue.finish().iter().all(|done| done.status == Some(OK)));
                queue.arena.reset();
            }
            let before = vmm.plane.counters().syncs;
            let alone = queues[0].answer(&Request::write(0, &data));
            assert_eq!(alone, (Some(OK), 1));
            let synced = vmm.plane.counters().syncs - before;
            assert_eq!(synced, u64::from(value == 0), "with {value:#x}");
        }
    }
}

#[test]
fn b30_thread_that_starts_later_knows_that_the_cache_is_off() {
    let mut vmm = Embedded::new(&on_threads(Backing::null(1 << 20), 2));
    vmm.plane.write_config(WRITEBACK, &[0]).unwrap();
    let mut queue = vmm.queue_with(1, 16, FEATURES | CONFIG_WCE);
    assert_eq!(queue.answer(&Request::write(0, &[0; 512])), (Some(OK), 1));
    assert_eq!(vmm.plane.counters().syncs, 1);
}

#[test]
fn cache_that_a_driver_cannot_flush_is_off() {
    let mut vmm = Embedded::new(&null_device(1 << 20));
    let mut queue = vmm.queue_with(0, 16, FEATURES & !BLK_FLUSH | CONFIG_WCE);
    let told = vmm.plane.config_space();
    assert_eq!(told.read(WRITEBACK, 1).unwrap(), [0]);
    assert_eq!(queue.answer(&Request::write(0, &[0; 512])), (Some(OK), 1));
    assert_eq!(vmm.plane.counters().syncs, 1);
}

#[test]
fn c13_writes_to_anything_but_writeback_are_refused_and_change_nothing() {
    let mut vmm = Embedded::new(&null_device(1 << 20));
    let before = vmm.plane.config_space();
    for (offset, len) in [
        (0, 1),
        (31, 1),
        (31, 2),
        (32, 0),
        (32, 2),
        (33, 1),
        (u32::MAX, 1),
    ] {
        let refused = vmm.plane.write_config(offset, &vec![0; len]);
        assert!(matches!(refused, Err(ConfigError::ReadOnly { .. })));
        assert_eq!(vmm.plane.config_space(), before);
    }
}

#[test]
fn any_prefix_of_the_configuration_space_can_be_read() {
    let config = null_device(1 << 20).config_space();
    let whole = config.read(0, 96).unwrap();
    for offset in 0..=96u32 {
        for len in 0..=(96 - offset) {
            let start = usize::try_from(offset).unwrap();
            let end = start + usize::try_from(len).unwrap();
            assert_eq!(config.read(offset, len).unwrap(), &whole[start..end]);
        }
        assert!(config.read(offset, 97 - offset).is_none());
    }
}

#[test]
fn block_size_is_the_callers_choice_if_the_image_allows_it() {
    let sized = |backing, block_size| {
        let options = DeviceOptions {
            block_size: Some(block_size),
            ..options()
        };
        Device::new(backing, &options)
    };
    for block_size in [0, 1, 511, 513, 1024, 2048, 8192] {
        let refused = sized(Backing::null(1 << 20), block_size);
        assert_eq!(refused.unwrap_err(), DeviceError::BlockSize(block_size));
    }
    assert_eq!(
        sized(Backing::null(2048), 4096).unwrap_err(),
        DeviceError::Empty
    );
    for kind in KINDS {
        // With an odd tail: 8 blocks of 4096 and 3 sectors.
        let scratch = Scratch::zeroed(kind, 8 * 4096 + 3 * 512);
        let device = sized(Backing::Image(scratch.image()), 4096).unwrap();
        assert_eq!((device.block_size(), device.capacity()), (4096, 8 * 4096));
        let config = device.config_space();
        assert_eq!(config.read(20, 4).unwrap(), 4096u32.to_le_bytes());
        let (_vmm, mut queue) = single(&device);
        let data = pattern(1, 4096);
        assert_eq!(queue.answer(&Request::write(56, &data)), (Some(OK), 1));
        assert!(scratch.content()[7 * 4096..][..4096] == data);
        // Parts of a block, a block that does not begin as one does, and the tail.
        for (sector, len) in [(0, 512), (1, 4096), (64, 512)] {
            let request = Request::write(sector, &data[..len]);
            assert_eq!(queue.answer(&request), (Some(IOERR), 1));
        }
    }
}

/// Counts the calls.
#[derive(Clone, Default)]
struct Told(Arc<AtomicU64>);

impl Notifier for Told {
    fn notify(&self) -> std::io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

#[test]
fn device_that_grows_and_shrinks_serves_what_it_has_at_the_time() {
    for kind in KINDS {
        let scratch = Scratch::zeroed(kind, DISK);
        let device = scratch.device();
        let told = Told::default();
        let _subscription = device.on_config_change(Box::new(told.clone()));
        let mut vmm = Embedded::new(&device);
        let mut queues = [vmm.queue(0, 16), vmm.queue(1, 16)];
        let mut changes = 0;
        for round in 1..=10u64 {
            // 2, 4, 2, 4 ... MiB and an odd tail.
            let size = (1 + round % 2) * 2 * DISK as u64;
            scratch.truncate(size + 100);
            let resized = vmm.plane.resize().unwrap();
            changes += 1;
            assert_eq!(resized.new, size);
            assert_eq!(told.0.load(Ordering::Relaxed), changes);
            // The same again is no change.
            let again = device.resize().unwrap();
            assert_eq!((again.old, again.new), (size, size));
            assert_eq!(told.0.load(Ordering::Relaxed), changes);

            let config = vmm.plane.config_space();
            assert_eq!(config.read(0, 8).unwrap(), (size / 512).to_le_bytes());
            let data = pattern(round, 4096);
            for queue in &mut queues {
                queue.arena.reset();
                let end = size / 512;
                let last = Request::write(end - 8, &data);
                assert_eq!(queue.answer(&last), (Some(OK), 1));
                let beyond = Request::write(end - 4, &data);
                assert_eq!(queue.answer(&beyond), (Some(IOERR), 1));
                assert_eq!(queue.answer(&Request::read(end, 4096)), (Some(IOERR), 0));
            }
            let content = scratch.content();
            assert_eq!(
                content.len() as u64,
                size + 100,
                "nothing written past the end"
            );
            assert!(content[content.len() - 100 - 4096..][..4096] == data);
        }
    }
}

#[test]
fn device_that_changed_while_nothing_ran_it_starts_with_the_size_it_has() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let device = scratch.device();
    for size in [2 * DISK, DISK / 2] {
        scratch.truncate(size as u64);
        let (vmm, mut queue) = single(&device);
        let config = vmm.plane.config_space();
        let sectors = size as u64 / 512;
        assert_eq!(config.read(0, 8).unwrap(), sectors.to_le_bytes());
        assert_eq!(queue.answer(&Request::read(sectors, 512)), (Some(IOERR), 0));
        let last = Request::write(sectors - 1, &[1; 512]);
        assert_eq!(queue.answer(&last), (Some(OK), 1));
    }
}

#[test]
fn subscription_ends_when_it_is_dropped() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let device = scratch.device();
    let (first, second) = (Told::default(), Told::default());
    let subscription = device.on_config_change(Box::new(first.clone()));
    let _other = device.on_config_change(Box::new(second.clone()));
    drop(subscription);
    scratch.truncate(2 * DISK as u64);
    // Of any clone.
    device.clone().resize().unwrap();
    assert_eq!(first.0.load(Ordering::Relaxed), 0);
    assert_eq!(second.0.load(Ordering::Relaxed), 1);
    assert_eq!(device.capacity(), 2 * DISK as u64);
}

#[test]
fn image_emptied_under_the_device_has_nothing_to_serve() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let (vmm, mut queue) = single(&scratch.device());
    scratch.truncate(0);
    assert_eq!(vmm.plane.resize().unwrap().new, 0);
    assert_eq!(queue.answer(&Request::read(0, 512)), (Some(IOERR), 0));
    assert_eq!(
        queue.answer(&Request::write(0, &[1; 512])),
        (Some(IOERR), 1)
    );
    assert_eq!(scratch.content().len(), 0);
    assert_eq!(queue.answer(&Request::flush()), (Some(OK), 1));
}
