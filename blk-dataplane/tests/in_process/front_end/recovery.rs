//! The log of written pages (row C18) and the record of requests in flight (rows K), over the socket.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;

use blk_dataplane::{Backing, Device, Image, ImageError, ImageOptions};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::VhostUserInflight;
use vhost::vhost_user::{VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserDirtyLogRegion};

use super::{DISK, keep_busy, serve};
use crate::support::front_end::{FrontEnd, Served};
use crate::support::pattern;
use crate::support::queue::{FEATURES, GuestQueue};
use crate::support::ram::{GuestRam, HIGH_END};
use crate::support::request::{Framing, OK, Request};
use crate::support::scratch::{KINDS, Kind, Scratch, options};
use crate::support::wire::{PROTOCOL_FEATURES, SET_FEATURES, SET_PROTOCOL_FEATURES};

const SET_LOG_BASE: u32 = 6;

const LOG_ALL: u64 = 1 << 26;
const PAGE: u64 = 4096;
/// A bit for every page up to the end of the guest's memory.
const LOG_LEN: u64 = HIGH_END / PAGE / 8;

/// Negotiated with everything that these tests need, memory set, no ring.
fn ready(served: &Served) -> FrontEnd {
    let mut front = super::ready(served);
    let features = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::LOG_SHMFD
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD;
    front.vhost.set_protocol_features(features).unwrap();
    front
}

/// A log as a front-end has it: taken page by page.
struct Log(File);

impl Log {
    fn new(len: u64) -> Self {
        let file = File::from(memfd_create("log", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(len).unwrap();
        Self(file)
    }

    fn region(&self, offset: u64, size: u64) -> Option<VhostUserDirtyLogRegion> {
        Some(VhostUserDirtyLogRegion {
            mmap_size: size,
            mmap_offset: offset,
            mmap_handle: self.0.as_raw_fd(),
        })
    }

    fn is_marked(&self, addr: u64) -> bool {
        let mut byte = [0];
        self.0.read_exact_at(&mut byte, addr / PAGE / 8).unwrap();
        byte[0] & (1 << (addr / PAGE % 8)) != 0
    }

    fn is_empty(&self) -> bool {
        let mut bytes = vec![0; usize::try_from(self.0.metadata().unwrap().len()).unwrap()];
        self.0.read_exact_at(&mut bytes, 0).unwrap();
        bytes.iter().all(|&byte| byte == 0)
    }

    fn clear(&self) {
        let len = self.0.metadata().unwrap().len();
        self.0
            .write_all_at(&vec![0; usize::try_from(len).unwrap()], 0)
            .unwrap();
    }
}

#[test]
fn c18_what_is_written_is_in_the_log_and_only_while_it_is_in_force() {
    for kind in KINDS {
        let scratch = Scratch::new(kind, &pattern(9, DISK));
        let served = Served::new(scratch.device());
        let mut front = ready(&served);
        let mut queue = front.queue(0, 128);
        let (log, other) = (Log::new(LOG_LEN), Log::new(LOG_LEN));
        // A read of four pages: its data is written by the kernel, status and used ring by the device.
        let read = Request::read(8, 4 * 4096);
        let pages_of = |queue: &mut GuestQueue| {
            // Header, data and status come behind each other from here on.
            let start = queue.arena.take(0, PAGE, 0);
            assert_eq!(queue.run(&read).status, Some(OK));
            start
        };
        front.vhost.set_log_base(0, log.region(0, LOG_LEN)).unwrap();
        pages_of(&mut queue);
        assert!(log.is_empty(), "{kind:?}: without the feature");

        let features = FEATURES | PROTOCOL_FEATURES;
        front.vhost.set_features(features | LOG_ALL).unwrap();
        // As QEMU does: the same addresses, and the flag, of a ring that runs.
        let mut addresses = front.ring_addresses(&queue);
        addresses.flags = 1;
        addresses.log_addr = Some(queue.addresses.device_area.0);
        front.vhost.set_vring_addr(0, &addresses).unwrap();
        let start = pages_of(&mut queue);
        for page in 0..4 {
            let addr = start + 512 + page * PAGE;
            assert!(log.is_marked(addr), "{kind:?}: page {page} of the data");
        }
        assert!(
            log.is_marked(queue.addresses.device_area.0),
            "the used ring"
        );
        // Memory that nothing was written to.
        assert!(!log.is_marked(GuestRam::arena(3).start()));
        assert!(!log.is_marked(0));

        // Replaced while requests are in flight.
        keep_busy(&mut queue, 20);
        front
            .vhost
            .set_log_base(0, other.region(0, LOG_LEN))
            .unwrap();
        queue.finish();
        log.clear();
        let start = pages_of(&mut queue);
        assert!(log.is_empty(), "{kind:?}: the old log is out of use");
        assert!(other.is_marked(start + 512));

        front.vhost.set_features(features).unwrap();
        other.clear();
        pages_of(&mut queue);
        assert!(other.is_empty(), "{kind:?}: switched off");
        // And on again, over and over, under load.
        for _ in 0..20 {
            keep_busy(&mut queue, 10);
            front.vhost.set_features(features | LOG_ALL).unwrap();
            queue.finish();
            let start = pages_of(&mut queue);
            assert!(other.is_marked(start + 512));
            keep_busy(&mut queue, 10);
            front.vhost.set_features(features).unwrap();
            queue.finish();
            other.clear();
            queue.arena.reset();
        }
        assert!(other.is_empty());
    }
}

#[test]
fn c18_a_log_that_has_no_bit_for_some_memory_is_refused() {
    let served = serve();
    let mut front = ready(&served);
    let log = Log::new(LOG_LEN);
    let mut wire = front.wire();
    // A refusal is an acknowledgement, which `Frontend` does not take for a reply.
    let mut refused = |offset: u64, size: u64| {
        let body = [size, offset].map(u64::to_le_bytes).concat();
        !wire.acknowledged(SET_LOG_BASE, &body, &[log.0.as_fd()])
    };
    assert!(refused(0, LOG_LEN - 1));
    assert!(refused(0, 0));
    assert!(refused(0, LOG_LEN + 1), "past the end of its file");
    assert!(refused(8, LOG_LEN));
    assert!(refused(u64::MAX - 7, LOG_LEN));
    assert!(refused(0, u64::MAX));
    front.vhost.set_log_base(0, log.region(0, LOG_LEN)).unwrap();
    // Features change only in that bit while rings run.
    let mut queue = front.queue(0, 16);
    let other = FEATURES & !(1 << 28) | PROTOCOL_FEATURES | LOG_ALL;
    assert!(!wire.acknowledged(SET_FEATURES, &other.to_le_bytes(), &[]));
    assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
    assert!(wire.is_alive());
}

#[test]
fn k1_descriptions_beyond_the_device_are_refused() {
    let served = serve();
    let mut front = ready(&served);
    let asked = |num_queues, queue_size| VhostUserInflight {
        mmap_size: 0,
        mmap_offset: 0,
        num_queues,
        queue_size,
    };
    let (good, file) = front.vhost.get_inflight_fd(&asked(4, 128)).unwrap();
    assert_eq!(
        (good.num_queues, good.queue_size, good.mmap_offset),
        (4, 128, 0)
    );
    assert_eq!(file.metadata().unwrap().len(), good.mmap_size);
    let fd = file.as_raw_fd();
    for (change, what) in [
        (
            VhostUserInflight {
                num_queues: 5,
                ..good
            },
            "queues",
        ),
        (
            VhostUserInflight {
                num_queues: u16::MAX,
                ..good
            },
            "queues",
        ),
        (
            VhostUserInflight {
                queue_size: 2048,
                ..good
            },
            "entries",
        ),
        (
            VhostUserInflight {
                queue_size: 127,
                ..good
            },
            "entries",
        ),
        (
            VhostUserInflight {
                mmap_size: 64,
                ..good
            },
            "size",
        ),
        (
            VhostUserInflight {
                mmap_offset: good.mmap_size,
                ..good
            },
            "offset",
        ),
        (
            VhostUserInflight {
                mmap_offset: 4,
                ..good
            },
            "offset",
        ),
        (
            VhostUserInflight {
                mmap_offset: u64::MAX,
                ..good
            },
            "offset",
        ),
    ] {
        assert!(front.vhost.set_inflight_fd(&change, fd).is_err(), "{what}");
    }
    front.vhost.set_inflight_fd(&good, fd).unwrap();
    let mut queue = front.queue(0, 128);
    assert!(
        front.vhost.set_inflight_fd(&good, fd).is_err(),
        "a ring runs"
    );
    assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
    drop(front);
    // There is no way to say no to who asks for one.
    let mut front = ready(&served);
    assert!(front.vhost.get_inflight_fd(&asked(5, 128)).is_err());
}

#[test]
fn requests_in_flight_at_the_end_of_a_predecessor_are_served_once_and_before_all_others() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let served = Served::new(scratch.device());
    let mut front = ready(&served);
    let (area, file) = front
        .vhost
        .get_inflight_fd(&VhostUserInflight {
            mmap_size: 0,
            mmap_offset: 0,
            num_queues: 1,
            queue_size: 64,
        })
        .unwrap();
    front
        .vhost
        .set_inflight_fd(&area, file.as_raw_fd())
        .unwrap();
    let mut queue = front.queue(0, 64);
    for number in 0..10u64 {
        let write = Request::write(number, &pattern(number, 512));
        assert_eq!(queue.run(&write).status, Some(OK));
    }
    drop(front);
    let u16_at = |at| {
        let mut bytes = [0; 2];
        file.read_exact_at(&mut bytes, at).unwrap();
        u16::from_ne_bytes(bytes)
    };
    assert_eq!(
        [8, 10, 14].map(u16_at),
        [1, 64, 10],
        "version, desc_num, used_idx"
    );

    // What one that was killed would have left: four popped, of which none was given back, and two that it had not
    // seen yet.
    let mut heads = Vec::new();
    for number in 0..6u64 {
        let write = Request::write(100 + number, &pattern(100 + number, 512));
        heads.push(queue.add(&write, &Framing::classic(&write)));
    }
    queue.publish();
    for (counter, &head) in (50u64..).zip(&heads[..4]) {
        let entry = 16 + 16 * u64::from(head);
        file.write_all_at(&counter.to_ne_bytes(), entry + 8)
            .unwrap();
        file.write_all_at(&[1], entry).unwrap();
    }
    let mut front = served.connect(&queue.ram);
    front.negotiate(FEATURES);
    let features = VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::INFLIGHT_SHMFD;
    let mut wire = front.wire();
    assert!(wire.acknowledged(SET_PROTOCOL_FEATURES, &features.bits().to_le_bytes(), &[]));
    front.vhost.get_protocol_features().unwrap();
    front.vhost.set_protocol_features(features).unwrap();
    front.set_memory(&[0, 1, 2]);
    front
        .vhost
        .set_inflight_fd(&area, file.as_raw_fd())
        .unwrap();
    // As QEMU has it after a back-end is gone: the base is the used index.
    front.start(&queue, 10);
    let mut completed: Vec<_> = queue.finish().iter().map(|c| (c.head, c.status)).collect();
    completed.sort_unstable();
    let mut expected: Vec<_> = heads.iter().map(|&head| (head, Some(OK))).collect();
    expected.sort_unstable();
    assert_eq!(completed, expected);
    assert_eq!(front.stop(&queue), 16);
    assert!((0..64).all(|head| {
        let mut inflight = [0];
        file.read_exact_at(&mut inflight, 16 + 16 * head).unwrap();
        inflight == [0]
    }));
    drop(front);
    served.stop().unwrap();
    let image = scratch.content();
    for number in (0..10).chain(100..106) {
        let at = usize::try_from(512 * number).unwrap();
        assert!(image[at..at + 512] == pattern(number, 512), "{number}");
    }
}

#[test]
fn interrupt_that_a_predecessor_did_not_come_to_is_made_up_for_whatever_comes_first() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let served = Served::new(scratch.device());
    let mut front = ready(&served);
    let mut queue = front.queue(0, 64);
    assert_eq!(queue.run(&Request::read(0, 512)).status, Some(OK));
    for call_first in [true, false] {
        drop(front);
        front = served.connect(&queue.ram);
        front.negotiate(FEATURES);
        front.set_memory(&[0, 1, 2]);
        // As if the predecessor, which has ended by now, had been killed after it had given the request back and
        // before the interrupt: nothing is in flight, and the guest waits.
        queue.call.test_and_clear().unwrap();
        front.configure(&queue, 1);
        if call_first {
            front.set_notifiers(&queue);
        } else {
            front.set_kick(&queue).unwrap();
            front.set_call_and_err(&queue);
        }
        front.enable(&queue, true);
        assert!(queue.call.test_and_clear().unwrap(), "{call_first}");
    }
}

#[test]
fn image_is_let_go_of_when_a_guest_that_is_logged_stops_and_taken_back_when_it_starts_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    std::fs::write(&path, vec![0; DISK]).unwrap();
    let open = |incoming| {
        let options = ImageOptions {
            incoming,
            ..ImageOptions::default()
        };
        Image::open(&path, &options)
    };
    let device = |image| Device::new(Backing::Image(image), &options()).unwrap();
    let source = Served::new(device(open(false).unwrap()));
    assert!(matches!(open(false), Err(ImageError::InUse { .. })));
    let target = Served::new(device(open(true).unwrap()));
    let set_up = |served: &Served| {
        let front = ready(served);
        let queue = GuestQueue::new(&front.ram, 0, 16, FEATURES);
        front.configure(&queue, 0);
        (front, queue)
    };
    let (mut from, mut queue) = set_up(&source);
    from.start(&queue, 0);
    assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
    let (to, arriving) = set_up(&target);
    assert!(
        to.set_kick(&arriving).is_err(),
        "the other end still has it"
    );
    // A stop alone is no reason: a guest that reboots does that.
    from.stop(&queue);
    assert!(to.set_kick(&arriving).is_err());
    from.set_kick(&queue).unwrap();

    let log = Log::new(LOG_LEN);
    from.vhost.set_log_base(0, log.region(0, LOG_LEN)).unwrap();
    from.vhost
        .set_features(FEATURES | PROTOCOL_FEATURES | LOG_ALL)
        .unwrap();
    from.stop(&queue);
    let mut arriving = arriving;
    let mut to = to;
    to.set_notifiers(&arriving);
    to.enable(&arriving, true);
    assert_eq!(arriving.answer(&Request::read(0, 512)), (Some(OK), 513));
    // A migration that is called off too late: the guest cannot be in two places.
    assert!(from.set_kick(&queue).is_err());
    to.stop(&arriving);
    assert!(from.set_kick(&queue).is_err(), "it is served there");
    drop(to);
    target.stop().unwrap();
    from.set_kick(&queue).unwrap();
    from.stop(&queue);
    drop(from);
    source.stop().unwrap();
}
