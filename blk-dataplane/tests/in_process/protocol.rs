//! The vhost-user server and a front-end that plays by the rules.

use std::collections::HashMap;
use std::io::Read;
use std::os::fd::AsFd;

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};

use crate::support::front_end::{Served, region_info};
use crate::support::queue::{CONFIG_WCE, EVENT_IDX, FEATURES, GuestQueue, RING_PACKED, VERSION_1};
use crate::support::ram::GuestRam;
use crate::support::request::{Framing, OK, Request, Table};
use crate::support::scratch::{KINDS, Kind, SERIAL, Scratch, null_device};
use crate::support::wire::{
    Answer, NEED_REPLY, PROTOCOL_FEATURES, SET_VRING_BASE, V1, vring_state,
};
use crate::support::{eventually, pattern};

const DISK: usize = 1 << 20;
const GET_CONFIG: u32 = 24;

#[test]
fn offers_what_the_device_does_and_no_more() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    for (device, read_only) in [
        (scratch.device(), false),
        (scratch.read_only_device(), true),
    ] {
        let served = Served::new(device);
        let mut wire = served.wire();
        let features = wire.ask(crate::support::wire::GET_FEATURES, &[]).value();
        // SEG_MAX, BLK_SIZE, FLUSH, TOPOLOGY, MQ, INDIRECT_DESC, EVENT_IDX, PROTOCOL_FEATURES, VERSION_1,
        // RING_PACKED.
        let bits = [2, 6, 9, 10, 12, 28, 29, 30, 32, 34];
        let expected = bits.iter().fold(0, |mask, bit| mask | 1 << bit);
        // RO, or else CONFIG_WCE, DISCARD, WRITE_ZEROES.
        let writes = 1 << 11 | 1 << 13 | 1 << 14;
        assert_eq!(features, expected | if read_only { 1 << 5 } else { writes });
        let protocol = wire
            .ask(crate::support::wire::GET_PROTOCOL_FEATURES, &[])
            .value();
        // MQ, REPLY_ACK, BACKEND_REQ, CONFIG, CONFIGURE_MEM_SLOTS.
        assert_eq!(protocol, 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 15);
        drop(wire);

        let ram = GuestRam::new();
        let mut front = served.connect(&ram);
        front.negotiate(FEATURES);
        assert_eq!(front.vhost.get_queue_num().unwrap(), 4);
        assert!(front.vhost.get_max_mem_slots().unwrap() >= 8);
        for len in [8, 60, 96] {
            let config = front.config(len).unwrap();
            assert_eq!(config[..8], 2048u64.to_le_bytes());
            if len >= 60 {
                assert_eq!(config[20..24], 512u32.to_le_bytes(), "blk_size");
                let exp = u32::from(config[24]);
                assert!(512 << exp <= 4096, "physical_block_exp");
                let words = [config[26], config[27], config[28], config[29]];
                assert!(
                    words[0] != 0 && words[2] != 0,
                    "min_io_size, opt_io_size: {words:?}"
                );
                assert_eq!(config[32], 1, "writeback");
                assert_eq!(config[34..36], 4u16.to_le_bytes(), "num_queues");
            }
        }
    }
}

#[test]
fn c11_config_beyond_the_structure_is_an_empty_reply() {
    let served = Served::new(null_device(1 << 20));
    let mut wire = served.wire();
    wire.negotiate(FEATURES);
    for (offset, len) in [(0u32, 97u32), (96, 1), (95, 2), (0, 256), (300, 8)] {
        let mut body = [offset, len, 0].map(u32::to_le_bytes).concat();
        body.resize(12 + usize::try_from(len).unwrap(), 0);
        let Answer::Message { code, body, .. } = wire.ask(GET_CONFIG, &body) else {
            panic!("closed at {offset}+{len}");
        };
        assert_eq!(code, GET_CONFIG);
        // The specification's "zero length payload": the header of the payload says 0 bytes.
        assert_eq!((body.len(), &body[4..8]), (12, &[0; 4][..]));
    }
    assert!(wire.is_alive());
}

#[test]
fn c11_config_of_no_bytes_or_an_overflow_is_closed() {
    let served = Served::new(null_device(1 << 20));
    for (offset, len) in [(u32::MAX, 8u32), (8, 0), (u32::MAX - 7, 8)] {
        let mut wire = served.wire();
        wire.negotiate(FEATURES);
        let mut body = [offset, len, 0].map(u32::to_le_bytes).concat();
        body.resize(12 + usize::try_from(len).unwrap(), 0);
        assert_eq!(wire.ask(GET_CONFIG, &body), Answer::Closed);
    }
}

#[test]
fn c13_only_writeback_can_be_written() {
    let served = Served::new(null_device(1 << 20));
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    front.negotiate(FEATURES);
    let before = front.config(96).unwrap();
    let wrong: [(u32, &[u8]); 6] = [
        (0, &[0; 8]),
        (20, &[0, 16, 0, 0]),
        (31, &[0, 0]),
        (32, &[0, 0]),
        (33, &[0]),
        (95, &[0]),
    ];
    for (offset, bytes) in wrong {
        let flags = VhostUserConfigFlags::WRITABLE;
        let refused = front.vhost.set_config(offset, flags, bytes);
        assert!(refused.is_err(), "{offset}+{}", bytes.len());
        assert_eq!(front.config(96).unwrap(), before);
    }
    for (value, reads) in [(0u8, 0u8), (0, 0), (1, 1), (0, 0), (0xff, 1)] {
        // The front-end's flags say who writes, and change nothing.
        let flags = VhostUserConfigFlags::empty();
        front.vhost.set_config(32, flags, &[value]).unwrap();
        let mut expected = before.clone();
        expected[32] = reads;
        assert_eq!(front.config(96).unwrap(), expected);
    }
}

#[test]
fn c13_read_only_device_has_no_cache_to_turn_off() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let served = Served::new(scratch.read_only_device());
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    front.negotiate(FEATURES);
    let flags = VhostUserConfigFlags::WRITABLE;
    assert!(front.vhost.set_config(32, flags, &[0]).is_err());
}

#[test]
fn cache_that_a_driver_cannot_flush_is_off_from_the_negotiation_on() {
    let served = Served::new(null_device(1 << 20));
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    front.negotiate(VERSION_1 | CONFIG_WCE);
    assert_eq!(front.config(60).unwrap()[32], 0);
    // The next front-end's device is a new one.
    drop(front);
    let mut front = served.connect(&ram);
    front.negotiate(FEATURES | CONFIG_WCE);
    assert_eq!(front.config(60).unwrap()[32], 1);
}

#[test]
fn front_end_reads_the_capacity_in_force() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let device = scratch.device();
    let served = Served::new(device.clone());
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    front.negotiate(FEATURES);
    scratch.truncate(2 * DISK as u64);
    device.resize().unwrap();
    assert_eq!(front.config(8).unwrap(), 4096u64.to_le_bytes());
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
fn kick_before_enable_is_not_lost() {
    for features in [FEATURES, FEATURES & !EVENT_IDX] {
        let served = Served::new(null_device(1 << 20));
        let ram = GuestRam::new();
        let mut front = served.connect(&ram);
        front.negotiate(features);
        front.set_memory(&[0, 1, 2]);
        let mut queue = GuestQueue::new(&ram, 0, 128, features);
        front.configure(&queue, 0);
        front.set_notifiers(&queue);
        let request = Request::read(0, 512);
        queue.add(&request, &Framing::classic(&request));
        queue.driver.publish();
        queue.kick.notify().unwrap();
        // It has been seen: C6, the ring starts disabled.
        front.vhost.get_features().unwrap();
        assert_eq!(queue.driver.used_idx(), 0);
        front.enable(&queue, true);
        assert_eq!(queue.next().status, Some(OK));
    }
}

#[test]
fn a12_buffers_published_before_the_start_are_found_without_a_kick() {
    let served = Served::new(null_device(1 << 20));
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    front.negotiate(FEATURES);
    front.set_memory(&[0, 1, 2]);
    let mut queue = GuestQueue::new(&ram, 0, 128, FEATURES);
    let request = Request::read(0, 512);
    for _ in 0..10 {
        queue.add(&request, &Framing::classic(&request));
    }
    queue.driver.publish();
    // Enabled first, then started: the other order than usual.
    front.enable(&queue, true);
    front.configure(&queue, 0);
    front.set_notifiers(&queue);
    assert_eq!(queue.finish().len(), 10);
}

#[test]
fn c6_without_protocol_features_rings_are_enabled_at_once() {
    let served = Served::new(null_device(1 << 20));
    let ram = GuestRam::new();
    let front = served.connect(&ram);
    front.vhost.set_owner().unwrap();
    front.vhost.get_features().unwrap();
    front.vhost.set_features(FEATURES).unwrap();
    front.set_memory(&[2, 0, 1]);
    let mut queue = GuestQueue::new(&ram, 0, 16, FEATURES);
    front.configure(&queue, 0);
    front.set_notifiers(&queue);
    assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
}

#[test]
fn several_queues_of_several_sizes() {
    let content = pattern(8, DISK);
    let scratch = Scratch::new(Kind::Disk, &content);
    let served = Served::new(scratch.device());
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    front.negotiate(FEATURES);
    front.set_memory(&[0, 1, 2]);
    let sizes = [(0, 2), (1, 4), (2, 128), (3, 1024)];
    let mut queues = sizes.map(|(index, size)| front.queue(index, size));
    for round in 0..50u64 {
        for queue in &mut queues {
            let request = Request::read(round * 8, 4096);
            let framing = Framing::classic(&request).table(Table::Indirect);
            for _ in 0..queue.size().min(100) {
                queue.add(&request, &framing);
            }
            queue.publish();
        }
        for queue in &mut queues {
            for done in queue.finish() {
                assert_eq!((done.status, done.len), (Some(OK), 4097));
                assert!(done.data == content[usize::try_from(round).unwrap() * 4096..][..4096]);
            }
            queue.arena.reset();
        }
    }
}

/// Publishes many reads on `queue`.
fn keep_busy(queue: &mut GuestQueue, count: u64) {
    for number in 0..count {
        let request = Request::read(number * 16 % 2000, 8192);
        queue.add(&request, &Framing::classic(&request));
    }
    queue.publish();
}

#[test]
fn x2_x6_disconnect_with_requests_in_flight_then_reconnect_again_and_again() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let served = Served::new(scratch.device());
    for round in 0..30u64 {
        let ram = GuestRam::new();
        let mut front = served.connect(&ram);
        let mut queue = front.up();
        // What the one before wrote is there.
        let read = queue.run(&Request::read(1999, 512));
        let expected = if round == 0 {
            vec![0; 512]
        } else {
            pattern(round, 512)
        };
        assert!(read.data == expected);
        let write = Request::write(1999, &pattern(round + 1, 512));
        assert_eq!(queue.run(&write).status, Some(OK));
        keep_busy(&mut queue, 40);
        if round % 2 == 0 {
            queue.next();
        }
        drop(front);
    }
    served.stop().unwrap();
}

#[test]
fn x2_nothing_is_written_to_guest_memory_once_the_next_front_end_is_served() {
    let scratch = Scratch::new(Kind::Disk, &pattern(3, DISK));
    let served = Served::new(scratch.device());
    for _ in 0..10 {
        let ram = GuestRam::new();
        let mut front = served.connect(&ram);
        let mut queue = front.up();
        keep_busy(&mut queue, 40);
        drop(front);
        let other = GuestRam::new();
        let mut front = served.connect(&other);
        let mut next = front.up();
        assert_eq!(next.answer(&Request::read(0, 512)).0, Some(OK));
        let then = queue.snapshot();
        assert_eq!(next.answer(&Request::read(0, 65536)).0, Some(OK));
        assert!(queue.snapshot() == then);
        // Everything that was popped was answered before the memory was let go.
        while queue.poll().is_some_and(|done| done.status == Some(OK)) {}
    }
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
fn x1_get_vring_base_drains_first_and_nothing_is_written_afterwards() {
    let scratch = Scratch::new(Kind::Disk, &pattern(1, DISK));
    let served = Served::new(scratch.device());
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    front.negotiate(FEATURES);
    front.set_memory(&[0, 1, 2]);
    for round in 0..20 {
        let mut queue = front.queue(0, 256);
        keep_busy(&mut queue, 60);
        if round % 2 == 0 {
            queue.next();
        }
        let base = front.stop(&queue);
        assert_eq!(queue.driver.used_idx(), base, "popped, and so answered");
        queue.call.test_and_clear().unwrap();
        let then = queue.snapshot();
        // X4: nobody listens to it now.
        queue.kick.notify().unwrap();
        let mut other = front.queue(1, 16);
        for _ in 0..10 {
            other.answer(&Request::read(0, 4096));
        }
        front.stop(&other);
        assert!(queue.snapshot() == then);
        assert!(!queue.call.test_and_clear().unwrap());
        // C10: asked again, it says the same.
        assert_eq!(front.stop(&queue), base);
        // What was not popped is served after a restart from there.
        front.start(&queue, base);
        assert!(queue.finish().iter().all(|done| done.status == Some(OK)));
        assert_eq!(front.stop(&queue), 60);
    }
}

#[test]
fn x5_disabled_ring_completes_what_is_in_flight_and_fetches_nothing() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let served = Served::new(scratch.device());
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    let mut queue = front.up();
    for _ in 0..10 {
        keep_busy(&mut queue, 20);
        front.enable(&queue, false);
        // Neither lost nor served until it is enabled: at least what comes now.
        let request = Request::read(0, 512);
        let head = queue.add(&request, &Framing::classic(&request));
        queue.driver.publish();
        queue.kick.notify().unwrap();
        front.vhost.get_features().unwrap();
        front.enable(&queue, true);
        let done = queue.finish();
        assert_eq!(done.len(), 21);
        assert!(done.iter().any(|done| done.head == head));
        queue.arena.reset();
    }
}

#[test]
fn c16_restart_cycles_are_clean() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let served = Served::new(scratch.device());
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    let mut queue = front.up();
    for cycle in 0..100u64 {
        let data = pattern(cycle + 1, 512);
        assert_eq!(queue.answer(&Request::write(cycle, &data)).0, Some(OK));
        let base = front.stop(&queue);
        assert_eq!(u64::from(base), cycle + 1);
        front.start(&queue, base);
    }
    let content = scratch.content();
    for cycle in 0..100usize {
        let expected = pattern(u64::try_from(cycle).unwrap() + 1, 512);
        assert!(content[cycle * 512..][..512] == expected);
    }
}

#[test]
fn c16_broken_ring_works_again_after_a_restart() {
    let served = Served::new(null_device(1 << 20));
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    let mut queue = front.up();
    for _ in 0..5 {
        assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
        let wrong = queue.driver.next_avail().wrapping_add(1000);
        queue.driver.set_avail_idx(wrong);
        queue.kick.notify().unwrap();
        eventually("the err notifier", || queue.err.test_and_clear().unwrap());
        assert_eq!(front.stop(&queue), 1);
        queue = front.queue(0, 128);
    }
}

#[test]
fn call_and_kick_replaced_while_running() {
    // QEMU does this whenever the guest masks and unmasks a vector.
    let served = Served::new(null_device(1 << 20));
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    let mut queue = front.up();
    for _ in 0..50 {
        let request = Request::read(0, 512);
        queue.add(&request, &Framing::classic(&request));
        queue.publish();
        queue.kick = event_poll::EventNotifier::new().unwrap();
        queue.call = event_poll::EventNotifier::new().unwrap();
        front.set_notifiers(&queue);
        // The interrupt of the first may have gone to the old notifier.
        eventually("a completion", || queue.poll().is_some());
        assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
    }
}

#[test]
fn s11_second_front_end_waits_until_the_first_has_gone() {
    let served = Served::new(null_device(1 << 20));
    let (ram, other) = (GuestRam::new(), GuestRam::new());
    let mut first = served.connect(&ram);
    let mut queue = first.up();
    let mut second = served.connect(&other);
    // It may speak, and is not answered yet.
    let wire = second.wire();
    assert!(wire.send(crate::support::wire::SET_OWNER, V1, &[], &[]));
    for _ in 0..20 {
        assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
    }
    drop(first);
    let mut queue = second.up();
    assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
}

#[test]
fn x3_stop_under_load_keeps_every_acknowledged_write() {
    for kind in KINDS {
        let scratch = Scratch::zeroed(kind, DISK);
        let served = Served::new(scratch.device());
        let ram = GuestRam::new();
        let mut front = served.connect(&ram);
        let mut queue = front.up();
        let mut written: HashMap<u32, (usize, Vec<u8>)> = HashMap::new();
        let mut model = vec![0; DISK];
        let publish = |queue: &mut GuestQueue, written: &mut HashMap<_, _>, number: usize| {
            let data = pattern(u64::try_from(number).unwrap() + 1, 4096);
            let sector = number * 8;
            let request = Request::write(u64::try_from(sector).unwrap(), &data);
            let framing = Framing::classic(&request).skew(u64::from(number.is_multiple_of(7)));
            written.insert(queue.add(&request, &framing), (sector, data));
        };
        let mut next = 0;
        for _ in 0..40 {
            publish(&mut queue, &mut written, next);
            next += 1;
        }
        queue.publish();
        let land = |done: crate::support::queue::Completed,
                    written: &mut HashMap<_, _>,
                    model: &mut [u8]| {
            assert_eq!((done.status, done.len), (Some(OK), 1));
            let (sector, data): (usize, Vec<u8>) = written.remove(&done.head).unwrap();
            model[sector * 512..][..data.len()].copy_from_slice(&data);
        };
        for _ in 0..60 {
            let done = queue.next();
            land(done, &mut written, &mut model);
            publish(&mut queue, &mut written, next);
            next += 1;
            queue.publish();
        }
        served.stop().unwrap();
        while let Some(done) = queue.poll() {
            land(done, &mut written, &mut model);
        }
        let content = scratch.content();
        // A write that was never popped may not be there, but then it is not acknowledged.
        for number in 0..next {
            let range = number * 4096..(number + 1) * 4096;
            let pending = written.values().any(|(sector, _)| *sector == number * 8);
            if !pending {
                assert!(content[range.clone()] == model[range], "{kind:?} {number}");
            } else {
                assert!(content[range].iter().all(|&byte| byte == 0), "never popped");
            }
        }
        assert!(queue.outstanding() == written.len());
        drop(front);
    }
}

#[test]
fn stop_with_nobody_connected_and_before_anyone_came() {
    Served::new(null_device(1 << 20)).stop().unwrap();
    let served = Served::new(null_device(1 << 20));
    drop(served.connect(&GuestRam::new()));
    served.stop().unwrap();
}

#[test]
fn front_end_that_never_asked_for_acknowledgements_gets_none() {
    let served = Served::new(null_device(1 << 20));
    let mut wire = served.wire();
    // S9: need_reply before REPLY_ACK is negotiated.
    let set_owner = crate::support::wire::SET_OWNER;
    assert!(wire.send(set_owner, V1 | NEED_REPLY, &[], &[]));
    let features = wire.ask(crate::support::wire::GET_FEATURES, &[]);
    assert!(features.value() & PROTOCOL_FEATURES != 0);
}

/// The base of a packed ring has 32 bits, which `Frontend` cannot send.
#[test]
fn c16_packed_ring_goes_on_at_the_base_that_its_stop_replied() {
    let scratch = Scratch::new(Kind::Disk, &pattern(1, DISK));
    let served = Served::new(scratch.device());
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    let features = FEATURES | RING_PACKED;
    front.negotiate(features);
    front.set_memory(&[0, 1, 2]);
    let mut queue = GuestQueue::new(&ram, 0, 32, features);
    let mut base = queue.fresh().to_vhost_user();
    assert_eq!(base, 0x8000_8000);
    for round in 0..30 {
        front.vhost.set_vring_num(0, 32).unwrap();
        front
            .vhost
            .set_vring_addr(0, &front.ring_addresses(&queue))
            .unwrap();
        assert!(
            front
                .wire()
                .acknowledged(SET_VRING_BASE, &vring_state(0, base), &[])
        );
        front.set_notifiers(&queue);
        front.enable(&queue, true);
        let done = queue.run(&Request::read(round, 512));
        assert_eq!((done.status, done.len), (Some(OK), 513));
        assert_eq!(
            done.data[..],
            scratch.content()[usize::try_from(round).unwrap() * 512..][..512]
        );
        queue.arena.reset();
        base = front.vhost.get_vring_base(0).unwrap();
    }
}
