//! Rows F: descriptors where none belong, too many, too few, of the wrong kind.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::Duration;

use event_poll::EventNotifier;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::VhostBackend;

use super::{assert_serves, ready, refused, serve, table};
use crate::support::eventually;
use crate::support::front_end::Served;
use crate::support::queue::{EVENT_IDX, FEATURES, GuestQueue};
use crate::support::ram::GuestRam;
use crate::support::request::{Framing, OK, Request};
use crate::support::scratch::null_device;
use crate::support::wire::{
    ADD_MEM_REG, Answer, NEED_REPLY, NOFD, PROTOCOL_FEATURES, SET_FEATURES, SET_MEM_TABLE,
    SET_OWNER, SET_VRING_CALL, SET_VRING_ERR, SET_VRING_KICK, SET_VRING_NUM, V1, message,
    vring_state,
};

#[test]
fn f1_f2_descriptors_where_none_or_fewer_belong_are_refused() {
    let served = serve();
    let event = EventNotifier::new().unwrap();
    let fd = event.as_fd();
    let ram = GuestRam::new();
    let file = ram.regions[0].file.as_fd();
    let region = [0, 1 << 20, 1 << 40, 0];
    let index = 0u64.to_le_bytes();
    let cases: [(u32, Vec<u8>, Vec<std::os::fd::BorrowedFd<'_>>); 8] = [
        (SET_OWNER, vec![], vec![fd]),
        (SET_FEATURES, FEATURES.to_le_bytes().to_vec(), vec![fd]),
        (SET_VRING_NUM, vring_state(0, 16), vec![fd, fd]),
        (SET_VRING_KICK, index.to_vec(), vec![]),
        (SET_VRING_KICK, index.to_vec(), vec![fd, fd]),
        (SET_MEM_TABLE, table(&[region]), vec![]),
        (SET_MEM_TABLE, table(&[region]), vec![file, file]),
        // F4: "no descriptor" with one.
        (SET_VRING_CALL, 0x100u64.to_le_bytes().to_vec(), vec![fd]),
    ];
    for (code, body, fds) in cases {
        let mut wire = served.wire();
        wire.negotiate(FEATURES);
        assert!(refused(&mut wire, code, &body, &fds), "{code} {fds:?}");
    }
    assert_serves(&served);
}

#[test]
fn f3_more_descriptors_than_can_be_taken_end_the_connection() {
    let served = serve();
    let event = EventNotifier::new().unwrap();
    let fds = vec![event.as_fd(); 40];
    let bytes = message(SET_VRING_KICK, V1 | NEED_REPLY, &0u64.to_le_bytes());
    // With the header, with the body, or some with each byte.
    for cut in [0, 12] {
        let mut wire = served.wire();
        wire.negotiate(FEATURES);
        if cut > 0 {
            assert!(wire.send_bytes(&bytes[..cut], &[]));
        }
        wire.send_bytes(&bytes[cut..], &fds);
        assert_eq!(wire.receive(), Answer::Closed);
    }
    let mut wire = served.wire();
    wire.negotiate(FEATURES);
    for byte in &bytes {
        wire.send_bytes(&[*byte], &fds[..2]);
    }
    assert_eq!(wire.receive(), Answer::Closed);
    assert_serves(&served);
}

#[test]
fn f4_call_without_a_descriptor_is_a_polling_guest() {
    let served = serve();
    let mut front = ready(&served);
    let mut queue = front.queue(0, 16);
    let mut wire = front.wire();
    assert!(wire.acknowledged(SET_VRING_CALL, &NOFD.to_le_bytes(), &[]));
    let request = Request::read(0, 512);
    queue.add(&request, &Framing::joined());
    queue.publish();
    eventually("a completion", || queue.poll().is_some());
    // With one again, it is told at once.
    assert!(wire.acknowledged(SET_VRING_CALL, &0u64.to_le_bytes(), &[queue.call.as_fd()]));
    assert_eq!(queue.answer(&request), (Some(OK), 513));
}

#[test]
fn f4_kick_without_a_descriptor_is_a_ring_that_is_looked_at_unasked() {
    let served = serve();
    let mut front = ready(&served);
    let mut wire = front.wire();
    for features in [FEATURES, FEATURES & !EVENT_IDX] {
        front
            .vhost
            .set_features(features | PROTOCOL_FEATURES)
            .unwrap();
        let mut queue = GuestQueue::new(&front.ram, 0, 16, features);
        front.configure(&queue, 0);
        front.set_call_and_err(&queue);
        assert!(wire.acknowledged(SET_VRING_KICK, &NOFD.to_le_bytes(), &[]));
        front.enable(&queue, true);
        let request = Request::read(0, 512);
        for round in 0..10 {
            queue.add(&request, &Framing::joined());
            queue.driver.publish();
            assert!(
                !queue.driver.needs_kick() || round == 0,
                "nobody is to kick"
            );
            assert_eq!(queue.next().status, Some(OK));
            if round % 3 == 0 {
                // Long enough for the device to sleep.
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        // Kicked from now on, and then no more.
        front.set_kick(&queue).unwrap();
        assert_eq!(queue.answer(&request), (Some(OK), 513));
        std::thread::sleep(Duration::from_millis(10));
        assert_eq!(queue.answer(&request), (Some(OK), 513));
        assert!(wire.acknowledged(SET_VRING_KICK, &NOFD.to_le_bytes(), &[]));
        queue.add(&request, &Framing::joined());
        queue.driver.publish();
        assert_eq!(queue.next().status, Some(OK));
        // Disabled, it is not looked at.
        front.enable(&queue, false);
        queue.add(&request, &Framing::joined());
        queue.driver.publish();
        std::thread::sleep(Duration::from_millis(10));
        assert!(queue.poll().is_none());
        front.enable(&queue, true);
        assert_eq!(queue.next().status, Some(OK));
        assert_eq!(front.stop(&queue), 14);
    }
}

#[test]
fn f4_f5_ring_word_with_reserved_bits_or_a_descriptor_too_many_or_few_is_refused() {
    let served = serve();
    let mut front = ready(&served);
    let mut queue = front.queue(0, 16);
    let mut wire = front.wire();
    let event = EventNotifier::new().unwrap();
    for code in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
        for bit in 9..64 {
            for word in [1u64 << bit, 1 << bit | NOFD] {
                let with_fd = [event.as_fd()];
                let fds = if word & NOFD == 0 { &with_fd[..] } else { &[] };
                assert!(!wire.acknowledged(code, &word.to_le_bytes(), fds), "{bit}");
            }
        }
        assert!(!wire.acknowledged(code, &NOFD.to_le_bytes(), &[event.as_fd()]));
        assert!(!wire.acknowledged(code, &0u64.to_le_bytes(), &[]));
        assert!(!wire.acknowledged(code, &0u64.to_le_bytes(), &[event.as_fd(); 2]));
    }
    // Kick, call and err are what they were.
    assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
}

#[test]
fn f6_n9_descriptors_of_the_wrong_kind_are_refused_and_nothing_spins() {
    let served = serve();
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    let mut queue = front.up();
    let mut wire = front.wire();
    let (reader, writer) = nix::unistd::pipe().unwrap();
    drop(writer);
    let (one, other) = std::os::unix::net::UnixStream::pair().unwrap();
    drop(other);
    let zero = File::open("/dev/zero").unwrap();
    let regular = File::open("/proc/self/exe").unwrap();
    let directory = File::open("/").unwrap();
    let memory = &ram.regions[0].file;
    let wrong = [
        reader.as_fd(),
        one.as_fd(),
        zero.as_fd(),
        regular.as_fd(),
        directory.as_fd(),
        memory.as_fd(),
    ];
    for fd in wrong {
        // On the running ring, and on one that is to start.
        for index in [0u64, 1] {
            for code in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
                assert!(
                    !wire.acknowledged(code, &index.to_le_bytes(), &[fd]),
                    "{fd:?}"
                );
            }
        }
        assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
    }
    let event = EventNotifier::new().unwrap();
    for fd in [
        event.as_fd(),
        reader.as_fd(),
        zero.as_fd(),
        directory.as_fd(),
    ] {
        let body = table(&[[0, 1 << 20, 1 << 40, 0]]);
        assert!(!wire.acknowledged(SET_MEM_TABLE, &body, &[fd]), "{fd:?}");
        // M12: the old table stays in force.
        assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
    }
}

/// The open file description of a call descriptor is shared: the front-end makes it blocking and full
/// after it was handed over, and the data thread sleeps in its write.
#[test]
fn n3_x3_blocking_full_call_descriptor_holds_up_neither_the_next_front_end_nor_the_end() {
    let served = Served::new(null_device(1 << 20));
    for last in [false, true] {
        let ram = GuestRam::new();
        let mut front = served.connect(&ram);
        front.negotiate(FEATURES);
        front.set_memory(&[0, 1, 2]);
        let flags = EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC;
        let call = EventFd::from_value_and_flags(0, flags).unwrap();
        let mut queue = GuestQueue::new(&ram, 0, 16, FEATURES);
        queue.call = EventNotifier::from_fd(call.as_fd().try_clone_to_owned().unwrap()).unwrap();
        front.start(&queue, 0);
        // Emptied first, and that fails if it is empty.
        let _ = call.read();
        call.write(u64::MAX - 1).unwrap();
        fcntl(&call, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
        queue.add(&Request::read(0, 512), &Framing::joined());
        queue.publish();
        eventually("a completion", || queue.driver.used_idx() == 1);
        if last {
            // The end comes while it is connected.
            served.until.notify().unwrap();
            break;
        }
    }
    let stopped = std::thread::spawn(move || served.stop());
    eventually("the end", || stopped.is_finished());
    stopped.join().unwrap().unwrap();
}

#[test]
fn f7_one_descriptor_for_all_roles_and_replaced_while_running_loses_no_kick() {
    let served = serve();
    let mut front = ready(&served);
    let mut queue = front.queue(0, 16);
    let mut wire = front.wire();
    for _ in 0..20 {
        let event = EventNotifier::new().unwrap();
        for code in [SET_VRING_CALL, SET_VRING_ERR, SET_VRING_KICK] {
            let request = Request::read(0, 512);
            queue.add(&request, &Framing::joined());
            queue.driver.publish();
            // It may be seen before the descriptor is replaced, or not.
            queue.kick.notify().unwrap();
            assert!(wire.acknowledged(code, &0u64.to_le_bytes(), &[event.as_fd()]));
            eventually("a completion", || queue.poll().is_some());
        }
        queue.kick = event;
        queue.arena.reset();
    }
}

/// `O_NONBLOCK` belongs to both ends: it is left as the front-end has it, and yet nothing blocks.
#[test]
fn f9_received_descriptors_are_close_on_exec_and_may_block() {
    let served = serve();
    let name = format!("f9-{}", std::process::id());
    let file = File::from(memfd_create(&*name, MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(1 << 20).unwrap();
    let mut front = ready(&served);
    let mut queue = front.queue(0, 16);
    let mut wire = front.wire();
    let mut body = vec![0; 8];
    body.extend([1 << 40, 4096, 1 << 41, 0].map(u64::to_le_bytes).concat());
    assert!(wire.acknowledged(ADD_MEM_REG, &body, &[file.as_fd()]));
    let mut seen = 0;
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        let entry = entry.unwrap();
        let Ok(target) = std::fs::read_link(entry.path()) else {
            continue;
        };
        if !target.to_string_lossy().contains(&name) {
            continue;
        }
        let number = entry.file_name().into_string().unwrap();
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = u32::from_str_radix(flags.unwrap().trim(), 8).unwrap();
        assert_ne!(flags & 0o2_000_000, 0, "fd {number} is not close-on-exec");
        seen += 1;
    }
    // The one that was sent and the one that was received, kept for as long as it is mapped.
    assert!(seen >= 2, "{seen}");
    // Blocking ones for every role.
    let blocking = || EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC).unwrap();
    let events = [blocking(), blocking(), blocking()];
    for (code, event) in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR]
        .into_iter()
        .zip(&events)
    {
        assert!(wire.acknowledged(code, &0u64.to_le_bytes(), &[event.as_fd()]));
    }
    let request = Request::read(0, 512);
    for _ in 0..10 {
        queue.add(&request, &Framing::joined());
        queue.driver.publish();
        events[0].write(1).unwrap();
        eventually("a completion", || queue.poll().is_some());
    }
    for event in &events {
        let flags = fcntl(event, FcntlArg::F_GETFL).unwrap();
        assert!(!OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK));
    }
    assert_eq!(front.stop(&queue), 10);
}
