//! Rows M: memory given, changed and taken away.

use std::collections::HashMap;
use std::io::Read;
use std::os::fd::AsFd;

use vhost::VhostUserMemoryRegionInfo;
use vhost::vhost_user::VhostUserFrontend;

use super::{DISK, assert_serves, refused, serve, table};
use crate::support::front_end::{Served, region_info};
use crate::support::queue::{FEATURES, GuestQueue};
use crate::support::ram::GuestRam;
use crate::support::request::{Framing, OK, Request};
use crate::support::scratch::{KINDS, Kind, SERIAL, Scratch, null_device};
use crate::support::wire::SET_MEM_TABLE;
use crate::support::{eventually, pattern};

#[test]
fn m2_m8_memory_tables_that_are_wrong_are_refused_and_the_old_one_stays() {
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
fn m3_m5_malformed_memory_tables_are_refused() {
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
    const REM_MEM_REG: u32 = 38;
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
fn memory_slots_added_and_removed_one_by_one() {
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
