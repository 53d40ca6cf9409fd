//! Rows X, and C16: rings that stop, front-ends that go, a server that ends.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use vhost::VhostBackend;

use super::{DISK, assert_serves, keep_busy, table};
use crate::support::front_end::{FrontEnd, Served};
use crate::support::queue::{FEATURES, GuestQueue, RING_PACKED};
use crate::support::ram::GuestRam;
use crate::support::request::{Framing, OK, Request};
use crate::support::scratch::{KINDS, Kind, Scratch, null_device};
use crate::support::wire::{
    ADD_MEM_REG, GET_CONFIG, GET_FEATURES, GET_MAX_MEM_SLOTS, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM,
    GET_STATUS, GET_VRING_BASE, P_ALL, PROTOCOL_FEATURES, REM_MEM_REG, RESET_DEVICE, SET_FEATURES,
    SET_MEM_TABLE, SET_OWNER, SET_PROTOCOL_FEATURES, SET_STATUS, SET_VRING_ADDR, SET_VRING_BASE,
    SET_VRING_CALL, SET_VRING_ENABLE, SET_VRING_ERR, SET_VRING_KICK, SET_VRING_NUM, V1, Wire,
    message, vring_state,
};
use crate::support::{DEADLINE, eventually, pattern};

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

/// One message of a session, with its descriptors.
type Recorded<'a> = (Vec<u8>, Vec<BorrowedFd<'a>>);

/// What a front-end sends from its first word to its last, with `queue` running in between.
fn session<'a>(front: &FrontEnd, queue: &'a GuestQueue) -> Vec<Recorded<'a>> {
    let number = |value: u64| value.to_le_bytes().to_vec();
    let regions: Vec<[u64; 4]> = queue
        .ram
        .regions
        .iter()
        .map(|region| [region.guest, region.size, region.user(), region.offset])
        .collect();
    let files = queue.ram.regions.iter().map(|region| region.file.as_fd());
    let addresses = front.ring_addresses(queue);
    let mut address = vring_state(0, 0);
    for part in [
        addresses.desc_table_addr,
        addresses.used_ring_addr,
        addresses.avail_ring_addr,
        0,
    ] {
        address.extend(number(part));
    }
    let config = [[0u32, 60, 0].map(u32::to_le_bytes).concat(), vec![0; 60]].concat();
    let last = &regions[2];
    let mut one = number(0);
    one.extend(last.map(u64::to_le_bytes).concat());
    let features = FEATURES | PROTOCOL_FEATURES;
    let plain: [(u32, Vec<u8>, Vec<BorrowedFd<'a>>); 22] = [
        (GET_FEATURES, vec![], vec![]),
        (GET_PROTOCOL_FEATURES, vec![], vec![]),
        (SET_PROTOCOL_FEATURES, number(P_ALL), vec![]),
        (SET_OWNER, vec![], vec![]),
        (GET_QUEUE_NUM, vec![], vec![]),
        (GET_MAX_MEM_SLOTS, vec![], vec![]),
        (SET_FEATURES, number(features), vec![]),
        (GET_CONFIG, config, vec![]),
        (SET_MEM_TABLE, table(&regions), files.collect()),
        (SET_VRING_NUM, vring_state(0, 128), vec![]),
        (SET_VRING_BASE, vring_state(0, 0), vec![]),
        (SET_VRING_ADDR, address, vec![]),
        (SET_VRING_CALL, number(0), vec![queue.call.as_fd()]),
        (SET_VRING_ERR, number(0), vec![queue.err.as_fd()]),
        (SET_VRING_KICK, number(0), vec![queue.kick.as_fd()]),
        (SET_VRING_ENABLE, vring_state(0, 1), vec![]),
        (SET_STATUS, number(15), vec![]),
        (GET_STATUS, vec![], vec![]),
        (REM_MEM_REG, one.clone(), vec![]),
        (ADD_MEM_REG, one, vec![queue.ram.regions[2].file.as_fd()]),
        (GET_VRING_BASE, vring_state(0, 0), vec![]),
        (RESET_DEVICE, vec![], vec![]),
    ];
    plain
        .into_iter()
        .map(|(code, body, fds)| (message(code, V1, &body), fds))
        .collect()
}

/// Plays the first `whole` messages and `part` bytes of the next, and goes without reading a reply.
fn play(wire: &Wire, session: &[Recorded<'_>], whole: usize, part: usize) {
    for (bytes, fds) in &session[..whole] {
        assert!(wire.send_bytes(bytes, fds));
    }
    if let Some((bytes, fds)) = session.get(whole)
        && part > 0
    {
        assert!(wire.send_bytes(&bytes[..part], fds));
    }
}

#[test]
fn s2_x2_connection_closed_at_every_boundary_and_within_every_message_of_a_session() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let served = Served::new(scratch.device());
    let mut rounds = 0;
    for whole in 0..=22 {
        // At the boundary, in the header, at its end, and in the body.
        for part in [0, 1, 11, 12, 13] {
            let ram = GuestRam::new();
            let front = served.connect(&ram);
            let mut queue = GuestQueue::new(&ram, 0, 128, FEATURES);
            // Requests are in flight when it goes, if the rings run by then.
            keep_busy(&mut queue, 40);
            let session = session(&front, &queue);
            assert_eq!(session.len(), 22);
            if session
                .get(whole)
                .is_none_or(|(bytes, _)| part >= bytes.len())
                && part > 0
            {
                continue;
            }
            play(&front.wire(), &session, whole, part);
            drop(session);
            drop(front);
            rounds += 1;
            if rounds % 10 == 0 {
                assert_serves(&served);
            }
        }
    }
    assert!(rounds > 80, "{rounds}");
    assert_serves(&served);
    served.stop().unwrap();
}

/// A front-end in a process of its own, which is then killed: the kernel closes what it had.
#[test]
fn x2_x6_front_end_that_is_killed_under_load_costs_nobody_anything() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    let served = Served::new(scratch.device());
    for round in 0..5 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--ignored", "--test-threads=1", "--nocapture"])
            .arg("front_end::lifecycle::alone_front_end_under_load")
            .env("FRONT_END_SOCKET", &served.path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let started = lines.any(|line| line.unwrap().contains("under load"));
        assert!(started, "the child has ended");
        std::thread::sleep(Duration::from_millis(3 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_serves(&served);
    }
    // What it wrote is whole blocks of what it meant to write.
    for block in scratch.content().chunks(4096) {
        assert!(block.iter().all(|byte| *byte == block[0]));
    }
    served.stop().unwrap();
}

#[test]
#[ignore = "a front-end to be killed: run by the test above"]
fn alone_front_end_under_load() {
    let path = std::env::var_os("FRONT_END_SOCKET").expect("FRONT_END_SOCKET: where the server is");
    let ram = GuestRam::new();
    let mut front = FrontEnd::connect(path.as_ref(), &ram);
    let mut queue = front.up();
    let start = Instant::now();
    let mut number = 0;
    // Killed long before.
    while start.elapsed() < DEADLINE {
        while queue.outstanding() < 30 {
            let byte = u8::try_from(number % 251 + 1).unwrap();
            let write = Request::write(number * 8 % 2048, &[byte; 4096]);
            queue.add(&write, &Framing::classic(&write));
            number += 1;
        }
        queue.publish();
        for done in queue.finish() {
            assert_eq!(done.status, Some(OK));
        }
        queue.arena.reset();
        if number == 60 {
            println!("under load");
        }
    }
}
