//! Rows M: memory given, changed and taken away.

use std::collections::HashMap;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;

use event_poll::EventNotifier;
use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::VhostUserFrontend;
use vm_memory::GuestAddress;
use vring::Segment;

use super::{DISK, assert_serves, ready, refused, serve, table};
use crate::support::front_end::{Served, region_info};
use crate::support::queue::{FEATURES, GuestQueue};
use crate::support::ram::GuestRam;
use crate::support::request::{Framing, OK, Request};
use crate::support::scratch::{KINDS, Kind, SERIAL, Scratch, null_device};
use crate::support::wire::{ADD_MEM_REG, REM_MEM_REG, SET_MEM_TABLE};
use crate::support::{eventually, pattern};

#[test]
fn m4_m7_m8_m12_memory_tables_that_are_wrong_are_refused_and_the_old_one_stays() {
    let served = serve();
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    let mut queue = front.up();
    let mut wire = front.wire();
    let file = &ram.regions[0].file;
    let size = ram.regions[0].size;
    let wrong = [
        // M4: guest-physical and front-end addresses that overlap.
        vec![[0, 8192, 1 << 40, 0], [4096, 8192, 1 << 41, 8192]],
        vec![[0, 8192, 1 << 40, 0], [1 << 20, 8192, (1 << 40) + 4096, 0]],
        // M7, M8: more than the file holds.
        vec![[0, size * 2, 1 << 40, 0]],
        vec![[0, size, 1 << 40, 4096]],
        vec![[0, 1 << 62, 1 << 40, 0]],
        // M12: the second of two is wrong.
        vec![[0, 8192, 1 << 40, 0], [1 << 20, 8192, 1 << 41, size]],
    ];
    for regions in wrong {
        let fds = vec![file.as_fd(); regions.len()];
        assert!(
            !wire.acknowledged(SET_MEM_TABLE, &table(&regions), &fds),
            "{regions:x?}"
        );
        assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
    }
}

#[test]
fn m2_m3_m5_malformed_memory_tables_are_refused() {
    let served = serve();
    let ram = GuestRam::new();
    let file = &ram.regions[0].file;
    let wrong = [
        // M3: nothing in it.
        vec![[0, 0, 1 << 40, 0]],
        // M5: ends that wrap.
        vec![[u64::MAX - 4095, 8192, 1 << 40, 0]],
        vec![[0, 8192, u64::MAX - 4095, 0]],
        vec![[0, 8192, 1 << 40, u64::MAX - 4095]],
    ];
    for regions in wrong {
        let mut wire = served.wire();
        wire.negotiate(FEATURES);
        let fds = vec![file.as_fd(); regions.len()];
        assert!(refused(&mut wire, SET_MEM_TABLE, &table(&regions), &fds));
    }
    // A count that is not that of the regions.
    for count in [2, 33, u32::MAX] {
        let mut wire = served.wire();
        wire.negotiate(FEATURES);
        let mut body = table(&[[0, 4096, 1 << 40, 0]]);
        body[..4].copy_from_slice(&count.to_le_bytes());
        assert!(refused(&mut wire, SET_MEM_TABLE, &body, &[file.as_fd()]));
    }
    assert_serves(&served);
}

/// As older front-ends do; the descriptor is closed, unused.
#[test]
fn m16_descriptor_on_a_removed_region_is_closed_and_the_region_removed() {
    let served = Served::new(null_device(DISK as u64));
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    front.negotiate(FEATURES);
    front.set_memory(&[0, 1, 2]);
    let region = &ram.regions[1];
    let words = [0, region.guest, region.size, region.user(), region.offset];
    let body: Vec<u8> = words
        .iter()
        .flat_map(|word: &u64| word.to_le_bytes())
        .collect();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut wire = front.wire();
    assert!(wire.acknowledged(REM_MEM_REG, &body, &[writer.as_fd()]));
    drop(writer);
    // Ends only when the device's end is closed too.
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    assert!(!wire.acknowledged(REM_MEM_REG, &body, &[]), "there still");
    let mut queue = front.queue(0, 128);
    assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
}

#[test]
fn m14_m15_regions_added_or_removed_wrongly_are_refused_and_all_others_stay() {
    const ADD_MEM_REG: u32 = 37;
    const REM_MEM_REG: u32 = 38;
    let served = Served::new(null_device(DISK as u64));
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    front.negotiate(FEATURES);
    front.set_memory(&[0, 1]);
    let body = |[guest, size, user, offset]: [u64; 4]| -> Vec<u8> {
        let words = [0, guest, size, user, offset];
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    };
    let numbers = |index: usize| {
        let region = &ram.regions[index];
        [region.guest, region.size, region.user(), region.offset]
    };
    let file = ram.regions[2].file.as_fd();
    let absent = numbers(2);
    let (there, [guest, size, user, offset]) = (numbers(1), absent);
    let mut wire = front.wire();

    for (wrong, fds) in [
        // Two descriptors, or none.
        (absent, vec![file, file]),
        (absent, vec![]),
        // Over a region that is there, in either address space.
        (there, vec![file]),
        ([there[0], size, user, offset], vec![file]),
        ([guest, size, there[2], offset], vec![file]),
        // Nothing, more than its file has, and ends that wrap.
        ([guest, 0, user, offset], vec![file]),
        ([guest, size, user, offset + (1 << 40)], vec![file]),
        ([u64::MAX - 4095, size, user, offset], vec![file]),
        ([guest, size, u64::MAX - 4095, offset], vec![file]),
    ] {
        let added = wire.acknowledged(ADD_MEM_REG, &body(wrong), &fds);
        assert!(!added, "{wrong:x?} with {} descriptors", fds.len());
    }
    for wrong in [
        absent,
        // Right in all but one of the three that tell a region.
        [there[0] + 4096, there[1], there[2], there[3]],
        [there[0], there[1] - 4096, there[2], there[3]],
        [there[0], there[1], there[2] + 4096, there[3]],
    ] {
        let removed = wire.acknowledged(REM_MEM_REG, &body(wrong), &[]);
        assert!(!removed, "{wrong:x?}");
    }
    // None of it was kept: what was refused for its form is taken in the right one, once.
    assert!(wire.acknowledged(ADD_MEM_REG, &body(absent), &[file]));
    assert!(!wire.acknowledged(ADD_MEM_REG, &body(absent), &[file]));
    let mut queue = front.queue(0, 128);
    assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
}

#[test]
fn m13_memory_table_replaced_while_requests_are_in_flight() {
    let content = pattern(13, DISK);
    let scratch = Scratch::new(Kind::Disk, &content);
    let served = Served::new(scratch.device());
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    let mut queue = front.up();
    for round in 0..30 {
        let mut expected = HashMap::new();
        for number in 0..40u64 {
            let request = Request::read(number * 16, 8192);
            let framing = Framing::classic(&request).skew(number % 2);
            expected.insert(queue.add(&request, &framing), number);
        }
        queue.publish();
        front.set_memory(if round % 2 == 0 { &[2, 1, 0] } else { &[0, 2] });
        for done in queue.finish() {
            assert_eq!((done.status, done.len), (Some(OK), 8193));
            let at = usize::try_from(expected[&done.head]).unwrap() * 8192;
            assert!(done.data == content[at..at + 8192]);
        }
        queue.arena.reset();
    }
}

#[test]
fn regions_in_any_order_serve_the_same_memory() {
    for kind in KINDS {
        let content = pattern(5, DISK);
        let scratch = Scratch::new(kind, &content);
        let served = Served::new(scratch.device());
        let orders = [
            [0, 1, 2],
            [0, 2, 1],
            [1, 0, 2],
            [1, 2, 0],
            [2, 0, 1],
            [2, 1, 0],
        ];
        for order in orders {
            let ram = GuestRam::new();
            let mut front = served.connect(&ram);
            front.negotiate(FEATURES);
            front.set_memory(&order);
            let mut queue = front.queue(0, 128);
            let read = queue.run(&Request::read(16, 65536));
            assert_eq!((read.status, read.len), (Some(OK), 65537));
            assert!(read.data == content[8192..][..65536]);
            assert_eq!(queue.run(&Request::get_id(20)).data, SERIAL.as_bytes());
        }
    }
}

#[test]
fn m14_m15_m17_memory_slots_added_and_removed_one_by_one() {
    // As libblkio does it: no SET_MEM_TABLE at all.
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let served = Served::new(scratch.device());
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    front.negotiate(FEATURES);
    let info: Vec<VhostUserMemoryRegionInfo> = ram.regions.iter().map(region_info).collect();
    front.vhost.add_mem_region(&info[2]).unwrap();
    front.vhost.add_mem_region(&info[0]).unwrap();
    // M15: there already.
    assert!(front.vhost.add_mem_region(&info[0]).is_err());
    let mut queue = front.queue(0, 128);
    let data = pattern(6, 4096);
    assert_eq!(queue.answer(&Request::write(0, &data)), (Some(OK), 1));

    // The buffers' region goes: what points there is a bad chain now, and nothing worse.
    front.vhost.remove_mem_region(&info[2]).unwrap();
    let request = Request::read(0, 4096);
    let gone = queue.run(&request);
    assert_eq!((gone.status, gone.len), (Some(0xee), 0));
    // M14: gone already; and one that was never there.
    assert!(front.vhost.remove_mem_region(&info[2]).is_err());
    assert!(front.vhost.remove_mem_region(&info[1]).is_err());
    let mut half = info[0];
    half.memory_size /= 2;
    assert!(front.vhost.remove_mem_region(&half).is_err());
    front.vhost.add_mem_region(&info[2]).unwrap();
    assert!(queue.run(&request).data == data);

    // M17: the ring's region goes. The ring stops, and says so.
    front.vhost.remove_mem_region(&info[0]).unwrap();
    eventually("the err notifier", || queue.err.test_and_clear().unwrap());
    queue.kick.notify().unwrap();
    assert_eq!(front.stop(&queue), 3);
    // Without its memory it cannot be started, and with it it can.
    let fresh = GuestQueue::new(&ram, 0, 128, FEATURES);
    assert!(front.set_kick(&fresh).is_err());
    front.vhost.add_mem_region(&info[0]).unwrap();
    let mut queue = front.queue(0, 128);
    assert!(queue.run(&request).data == data);
}

#[test]
fn m1_table_of_no_regions_takes_all_memory_away_until_there_is_another() {
    let served = serve();
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    let mut queue = front.up();
    assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
    let mut wire = front.wire();
    assert!(wire.acknowledged(SET_MEM_TABLE, &table(&[]), &[]));
    // M17: the ring's memory is gone.
    eventually("the err notifier", || queue.err.test_and_clear().unwrap());
    assert_eq!(front.stop(&queue), 1);
    assert!(front.set_kick(&queue).is_err(), "a ring without memory");
    front.set_memory(&[0, 1, 2]);
    let mut queue = front.queue(0, 128);
    assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
}

#[test]
fn m2_table_of_more_than_8_regions_is_refused_and_8_are_not() {
    let served = serve();
    let front = ready(&served);
    let mut wire = front.wire();
    let file = &front.ram.regions[0].file;
    let regions = |count: u64| -> Vec<[u64; 4]> {
        (0..count)
            .map(|at| [at << 20, 4096, 1 << 40 | at << 20, 4096 * at])
            .collect()
    };
    for (count, good) in [(8, true), (9, false), (32, false), (1, true)] {
        let fds = vec![file.as_fd(); usize::try_from(count).unwrap()];
        let body = table(&regions(count));
        assert_eq!(
            wire.acknowledged(SET_MEM_TABLE, &body, &fds),
            good,
            "{count}"
        );
        // One more and one fewer than there are regions (F2).
        assert!(!wire.acknowledged(SET_MEM_TABLE, &body, &fds[1..]));
    }
}

#[test]
fn m6_offset_that_is_no_multiple_of_a_page_is_mapped() {
    let served = serve();
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    front.negotiate(FEATURES);
    // A file with the rings' memory further on in it than the page that the region is said to begin in.
    let file = std::fs::File::from(
        nix::sys::memfd::memfd_create("unaligned", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap(),
    );
    let region = &ram.regions[0];
    file.set_len(region.size + 0x2000).unwrap();
    let mut wire = front.wire();
    for (offset, good) in [(0x1230, true), (0x10, true), (0x1234, false), (1, false)] {
        let body = table(&[[region.guest, region.size, region.user(), offset]]);
        let refused = !wire.acknowledged(SET_MEM_TABLE, &body, &[file.as_fd()]);
        assert_eq!(refused, !good, "{offset:#x}");
    }
    front.set_memory(&[0, 1, 2]);
    let mut queue = front.queue(0, 16);
    assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
}

#[test]
fn m9_files_that_cannot_be_guest_memory_are_refused_and_closed() {
    let served = serve();
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    let mut queue = front.up();
    let mut wire = front.wire();
    let memory = &ram.regions[0].file;
    let reopen = |options: &std::fs::OpenOptions| {
        options
            .open(format!("/proc/self/fd/{}", memory.as_raw_fd()))
            .unwrap()
    };
    let (reader, writer) = std::io::pipe().unwrap();
    let event = EventNotifier::new().unwrap();
    let (socket, _other) = UnixStream::pair().unwrap();
    let wrong: [OwnedFd; 8] = [
        reopen(std::fs::OpenOptions::new().read(true)).into(),
        reopen(std::fs::OpenOptions::new().write(true)).into(),
        reopen(
            std::fs::OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_PATH),
        )
        .into(),
        std::fs::File::open("/").unwrap().into(),
        std::fs::File::open("/dev/zero").unwrap().into(),
        writer.into(),
        event.into(),
        socket.into(),
    ];
    for fd in wrong {
        let region = [1 << 40, 8192, 1 << 41, 0];
        let body = table(&[region]);
        assert!(
            !wire.acknowledged(SET_MEM_TABLE, &body, &[fd.as_fd()]),
            "{fd:?}"
        );
        let mut body = vec![0; 8];
        body.extend(region.map(u64::to_le_bytes).concat());
        assert!(
            !wire.acknowledged(ADD_MEM_REG, &body, &[fd.as_fd()]),
            "{fd:?}"
        );
        assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
    }
    // The last writer has gone: the refused ones were closed.
    let mut reader = reader;
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
}

#[test]
fn m13_m15_509_slots_are_added_and_removed_while_requests_are_in_flight() {
    let content = pattern(15, DISK);
    let scratch = Scratch::new(Kind::Disk, &content);
    let served = Served::new(scratch.device());
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    let mut queue = front.up();
    let mut wire = front.wire();
    let file = &ram.regions[0].file;
    let slot = |number: u64| {
        let at = 1 << 40 | number << 16;
        [0, at, 4096, at + (1 << 42), 4096 * number]
            .map(u64::to_le_bytes)
            .concat()
    };
    let mut outstanding = HashMap::new();
    let mut turn = |queue: &mut GuestQueue, number: u64| {
        let request = Request::read(number % 100 * 16, 8192);
        outstanding.insert(
            queue.add(&request, &Framing::classic(&request)),
            number % 100,
        );
        queue.publish();
        while let Some(done) = queue.poll() {
            let at = usize::try_from(outstanding.remove(&done.head).unwrap()).unwrap() * 8192;
            assert_eq!((done.status, done.len), (Some(OK), 8193));
            assert!(done.data == content[at..at + 8192]);
        }
        if number % 40 == 39 {
            for done in queue.finish() {
                outstanding.remove(&done.head);
            }
            queue.arena.reset();
        }
    };
    for number in 0..506 {
        assert!(wire.acknowledged(ADD_MEM_REG, &slot(number), &[file.as_fd()]));
        turn(&mut queue, number);
    }
    // Three were there already.
    assert!(!wire.acknowledged(ADD_MEM_REG, &slot(506), &[file.as_fd()]));
    for number in (0..506).rev() {
        assert!(wire.acknowledged(REM_MEM_REG, &slot(number), &[]));
        turn(&mut queue, number);
    }
    assert!(!wire.acknowledged(REM_MEM_REG, &slot(0), &[]));
    // M15: none, or two descriptors; the same region again.
    assert!(!wire.acknowledged(ADD_MEM_REG, &slot(0), &[]));
    assert!(!wire.acknowledged(ADD_MEM_REG, &slot(0), &[file.as_fd(); 2]));
    assert!(wire.acknowledged(ADD_MEM_REG, &slot(0), &[file.as_fd()]));
    assert!(!wire.acknowledged(ADD_MEM_REG, &slot(0), &[file.as_fd()]));
    queue.finish();
}

/// The front-end may do to its own image and memory what it likes; it is the process that must not suffer.
#[test]
fn m18_memory_that_is_the_image_itself_or_this_process_does_no_harm() {
    let scratch = Scratch::new(Kind::Disk, &pattern(18, DISK));
    let served = Served::new(scratch.device());
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    let mut queue = front.up();
    let mut wire = front.wire();
    let body = |size: u64| {
        [0, 1 << 40, size, 1 << 41, 0]
            .map(u64::to_le_bytes)
            .concat()
    };
    let itself = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/proc/self/mem")
        .unwrap();
    assert!(!wire.acknowledged(ADD_MEM_REG, &body(4096), &[itself.as_fd()]));
    let image = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&scratch.path)
        .unwrap();
    assert!(wire.acknowledged(ADD_MEM_REG, &body(DISK as u64), &[image.as_fd()]));
    // Buffers in the image: a read of itself onto itself, and a write.
    let header = queue.arena.take(16, 16, 0);
    let status = queue.arena.take(64, 16, 0);
    for (kind, sector) in [(0u32, 8u64), (1, 16), (0, 0)] {
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&sector.to_le_bytes());
        ram.write(header, &bytes);
        let segment = |addr, len| Segment {
            addr: GuestAddress(addr),
            len,
        };
        let data = segment(1 << 40, 4096);
        let head = segment(header, 16);
        let end = segment(status, 1);
        let added = if kind == 0 {
            queue.driver.add_chain(&[head], &[data, end])
        } else {
            queue.driver.add_chain(&[head, data], &[end])
        };
        added.unwrap();
        queue.publish();
        eventually("an answer", || queue.driver.poll_used().is_some());
    }
    assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
}
