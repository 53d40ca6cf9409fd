//! Messages that must be refused: NACK leaves everything as it was, CLOSE ends the connection and no
//! more than that.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::time::Duration;

use event_poll::EventNotifier;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::eventfd::{EfdFlags, EventFd};
use vhost::VhostBackend;

use crate::support::eventually;
use crate::support::front_end::{FrontEnd, Served};
use crate::support::queue::{BLK_FLUSH, FEATURES, GuestQueue, VERSION_1};
use crate::support::ram::GuestRam;
use crate::support::request::{Framing, OK, Request};
use crate::support::scratch::null_device;
use crate::support::wire::{
    Answer, GET_FEATURES, GET_VRING_BASE, NEED_REPLY, PROTOCOL_FEATURES, REPLY, SET_FEATURES,
    SET_MEM_TABLE, SET_OWNER, SET_PROTOCOL_FEATURES, SET_VRING_ADDR, SET_VRING_BASE,
    SET_VRING_CALL, SET_VRING_ENABLE, SET_VRING_ERR, SET_VRING_KICK, SET_VRING_NUM, V1, Wire,
    header, message, vring_state,
};

fn serve() -> Served {
    Served::new(null_device(1 << 20))
}

/// The server goes on with the next front-end.
fn assert_serves(served: &Served) {
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    let mut queue = front.up();
    assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
}

/// Negotiated, memory set, no ring.
fn ready(served: &Served) -> FrontEnd {
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    front.negotiate(FEATURES);
    front.set_memory(&[0, 1, 2]);
    front
}

#[test]
fn r1_r2_r3_wrong_ring_sizes_are_refused_and_the_old_one_stays() {
    let served = serve();
    let mut front = ready(&served);
    let mut queue = GuestQueue::new(&front.ram, 0, 16, FEATURES);
    front.configure(&queue, 0);
    for size in [0, 3, 12, 1023, 2048, 32768, 65535] {
        assert!(front.vhost.set_vring_num(0, size).is_err(), "{size}");
    }
    let mut wire = front.wire();
    for size in [0x1_0010, 1 << 31, u32::MAX] {
        assert!(!wire.acknowledged(SET_VRING_NUM, &vring_state(0, size), &[]));
    }
    front.set_notifiers(&queue);
    front.enable(&queue, true);
    // The size is still 16.
    for _ in 0..40 {
        assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
    }
}

#[test]
fn r4_r5_r6_r8_ring_addresses_that_lead_nowhere_are_refused() {
    let served = serve();
    let mut front = ready(&served);
    let queue = GuestQueue::new(&front.ram, 0, 16, FEATURES);
    front.configure(&queue, 0);
    let good = front.ring_addresses(&queue);
    // Guest-physical where the front-end's is due; nowhere; the last byte there is.
    for bad in [queue.addresses.descriptor_area.0, 0, u64::MAX - 15] {
        let mut all = [good; 3];
        all[0].desc_table_addr = bad;
        all[1].avail_ring_addr = bad;
        all[2].used_ring_addr = bad;
        for config in all {
            assert!(front.vhost.set_vring_addr(0, &config).is_err(), "{bad:#x}");
        }
    }
    front.configure(&queue, 0);
    let mut running = front.queue(0, 16);
    assert_eq!(running.answer(&Request::read(0, 512)).0, Some(OK));
    drop(front);

    // Misaligned, or over the end of a region: refused here or when the ring is to start. (The
    // message layer ends the connection over a misaligned address.)
    let region = &queue.ram.regions[0];
    let end = region.user() + region.size;
    for (bad, field) in [
        (good.desc_table_addr + 8, 0),
        (good.avail_ring_addr + 1, 1),
        (good.used_ring_addr + 2, 2),
        (end - 16, 0),
        (end - 4, 1),
        (end - 4, 2),
    ] {
        let front = ready(&served);
        front.configure(&queue, 0);
        let mut config = good;
        match field {
            0 => config.desc_table_addr = bad,
            1 => config.avail_ring_addr = bad,
            _ => config.used_ring_addr = bad,
        }
        let set = front.vhost.set_vring_addr(0, &config);
        assert!(set.is_err() || front.set_kick(&queue).is_err(), "{bad:#x}");
    }
    assert_serves(&served);
}

#[test]
fn r9_ring_cannot_be_changed_while_it_runs() {
    let served = serve();
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    let mut queue = front.up();
    let elsewhere = GuestQueue::new(&ram, 3, 64, FEATURES);
    for _ in 0..3 {
        assert!(front.vhost.set_vring_num(0, 64).is_err());
        let addresses = front.ring_addresses(&elsewhere);
        assert!(front.vhost.set_vring_addr(0, &addresses).is_err());
        assert!(front.vhost.set_vring_base(0, 7).is_err());
        assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
    }
    // A disabled ring is still a running one.
    front.enable(&queue, false);
    assert!(front.vhost.set_vring_num(0, 64).is_err());
    front.enable(&queue, true);
    assert_eq!(front.stop(&queue), 3);
    front.vhost.set_vring_num(0, 64).unwrap();
}

#[test]
fn r10_base_of_more_than_16_bits_is_refused() {
    let served = serve();
    let front = ready(&served);
    let mut wire = front.wire();
    for base in [0x1_0000, 0x1_0005, u32::MAX] {
        assert!(!wire.acknowledged(SET_VRING_BASE, &vring_state(0, base), &[]));
    }
    assert!(wire.acknowledged(SET_VRING_BASE, &vring_state(0, 0xffff), &[]));
    // C10: of a ring that never ran.
    assert_eq!(front.vhost.get_vring_base(0).unwrap(), 0xffff);
    assert_eq!(front.vhost.get_vring_base(1).unwrap(), 0);
}

#[test]
fn r11_start_with_anything_missing_is_refused() {
    let served = serve();
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    front.negotiate(FEATURES);
    let queue = GuestQueue::new(&ram, 0, 16, FEATURES);
    assert!(front.set_kick(&queue).is_err(), "no memory");
    // No memory: no addresses either.
    let addresses = front.ring_addresses(&queue);
    assert!(front.vhost.set_vring_addr(0, &addresses).is_err());
    front.set_memory(&[0, 1, 2]);
    front.vhost.set_vring_num(0, 16).unwrap();
    assert!(front.set_kick(&queue).is_err(), "no addresses");
    let spare = GuestQueue::new(&ram, 1, 16, FEATURES);
    let addresses = front.ring_addresses(&spare);
    front.vhost.set_vring_addr(1, &addresses).unwrap();
    assert!(front.set_kick(&spare).is_err(), "no size");
    let mut queue = front.queue(0, 16);
    assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
}

#[test]
fn r13_ring_index_out_of_range_is_refused() {
    let served = serve();
    let front = ready(&served);
    let mut wire = front.wire();
    let event = EventNotifier::new().unwrap();
    for index in [4u32, 255, 256, 0x1_0000, 0x1_0001, u32::MAX] {
        for code in [SET_VRING_NUM, SET_VRING_BASE] {
            assert!(!wire.acknowledged(code, &vring_state(index, 16), &[]));
        }
        assert!(!wire.acknowledged(SET_VRING_ENABLE, &vring_state(index, 1), &[]));
        let mut addresses = vring_state(index, 0);
        addresses.resize(40, 0);
        assert!(!wire.acknowledged(SET_VRING_ADDR, &addresses, &[]));
    }
    for index in [4u64, 5, 255] {
        for code in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
            assert!(!wire.acknowledged(code, &index.to_le_bytes(), &[event.as_fd()]));
        }
    }
    assert!(wire.is_alive());
    // GET_VRING_BASE has no way to say no.
    assert_eq!(wire.ask(GET_VRING_BASE, &vring_state(4, 0)), Answer::Closed);
    assert_serves(&served);
}

#[test]
fn r12_dirty_logging_is_refused_unless_offered() {
    let served = serve();
    let front = ready(&served);
    let queue = GuestQueue::new(&front.ram, 0, 16, FEATURES);
    let mut config = front.ring_addresses(&queue);
    config.flags = 1;
    config.log_addr = Some(0);
    assert!(front.vhost.set_vring_addr(0, &config).is_err());
}

#[test]
fn c1_messages_before_any_negotiation_do_no_harm() {
    let served = serve();
    for code in 0..48u32 {
        for body in [0, 8, 12, 20, 40] {
            let mut wire = served.wire();
            wire.send(code, V1, &vec![0; body], &[]);
            // Whatever is made of it: closed, answered or taken.
            wire.send(GET_FEATURES, V1, &[], &[]);
            let _ = wire.receive();
        }
    }
    assert_serves(&served);
}

#[test]
fn c2_set_owner_twice_is_harmless() {
    let served = serve();
    let front = ready(&served);
    front.vhost.set_owner().unwrap();
    front.vhost.set_owner().unwrap();
}

#[test]
fn c3_reset_owner_stops_the_rings() {
    let served = serve();
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    let mut queue = front.up();
    assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
    front.vhost.reset_owner().unwrap();
    let then = queue.snapshot();
    queue.kick.notify().unwrap();
    front.vhost.get_features().unwrap();
    assert!(queue.snapshot() == then);
    let mut queue = front.queue(0, 128);
    assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
}

#[test]
fn c4_features_that_were_not_offered_are_refused() {
    let served = serve();
    let mut front = ready(&served);
    let offered = front.vhost.get_features().unwrap();
    for bit in (0..64).filter(|bit| offered & (1 << bit) == 0) {
        let features = FEATURES | PROTOCOL_FEATURES | 1 << bit;
        assert!(front.vhost.set_features(features).is_err(), "bit {bit}");
    }
    let mut queue = front.queue(0, 16);
    assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
}

#[test]
fn c5_features_cannot_change_while_rings_run() {
    let served = serve();
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    let mut queue = front.up();
    let now = FEATURES | PROTOCOL_FEATURES;
    for features in [now & !BLK_FLUSH, VERSION_1 | PROTOCOL_FEATURES] {
        assert!(front.vhost.set_features(features).is_err());
    }
    front.vhost.set_features(now).unwrap();
    assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
    front.stop(&queue);
    front
        .vhost
        .set_features(VERSION_1 | PROTOCOL_FEATURES)
        .unwrap();
    let mut queue = GuestQueue::new(&ram, 0, 16, VERSION_1);
    front.start(&queue, 0);
    assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
}

#[test]
fn c7_protocol_features_that_were_not_offered_are_refused() {
    let served = serve();
    let front = ready(&served);
    let mut wire = front.wire();
    for bit in [2u64, 4, 6, 8, 10, 12, 20, 63] {
        // REPLY_ACK stays, or the refusal could not be heard.
        let features: u64 = 1 << 3 | 1 << bit;
        assert!(!wire.acknowledged(SET_PROTOCOL_FEATURES, &features.to_le_bytes(), &[]));
    }
    assert!(wire.is_alive());
}

#[test]
fn c9_enable_of_neither_0_nor_1_ends_the_connection_and_no_more() {
    let served = serve();
    let front = ready(&served);
    let mut wire = front.wire();
    assert!(wire.send(SET_VRING_ENABLE, V1 | NEED_REPLY, &vring_state(0, 2), &[]));
    assert!(!matches!(wire.receive(), answer if answer != Answer::Closed && answer.value() == 0));
    drop((front, wire));
    assert_serves(&served);
}

#[test]
fn s1_front_end_that_stalls_in_a_message_neither_stops_the_data_path_nor_the_server() {
    let bytes = message(SET_VRING_NUM, V1, &vring_state(0, 16));
    for sent in [1, 11, 12] {
        let served = serve();
        let ram = GuestRam::new();
        let mut front = served.connect(&ram);
        let mut queue = front.up();
        assert!(front.wire().send_bytes(&bytes[..sent], &[]));
        for _ in 0..20 {
            assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
        }
        served.stop().unwrap();
    }
}

#[test]
fn s1_body_that_does_not_come_in_one_piece_ends_the_connection_and_no_more() {
    // The message layer's doing; waiting for the rest would be better.
    let bytes = message(SET_VRING_NUM, V1 | NEED_REPLY, &vring_state(0, 16));
    let served = serve();
    let mut wire = served.wire();
    wire.negotiate(FEATURES);
    assert!(wire.send_bytes(&bytes[..15], &[]));
    assert_eq!(wire.receive(), Answer::Closed);
    assert_serves(&served);
}

#[test]
fn s2_disconnect_in_the_middle_of_a_message_is_a_disconnect() {
    let served = serve();
    let event = EventNotifier::new().unwrap();
    let bytes = message(SET_VRING_KICK, V1, &0u64.to_le_bytes());
    for sent in 1..bytes.len() {
        let mut wire = served.wire();
        wire.negotiate(FEATURES);
        assert!(wire.send_bytes(&bytes[..sent], &[event.as_fd()]));
    }
    assert_serves(&served);
}

#[test]
fn s3_header_byte_by_byte_is_accepted() {
    let served = serve();
    let mut wire = served.wire();
    for byte in header(GET_FEATURES, V1, 0) {
        assert!(wire.send_bytes(&[byte], &[]));
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_ne!(wire.receive().value() & VERSION_1, 0);
}

#[test]
fn s4_s6_s7_s8_streams_that_cannot_be_trusted_are_closed() {
    let served = serve();
    let bad = [
        // S4: larger than any message.
        header(SET_OWNER, V1, 0x1001),
        header(SET_OWNER, V1, u32::MAX),
        // S6: version, reserved bits.
        header(GET_FEATURES, 0, 0),
        header(GET_FEATURES, 2, 0),
        header(GET_FEATURES, 3, 0),
        header(GET_FEATURES, V1 | 16, 0),
        header(GET_FEATURES, V1 | 0x8000_0000, 0),
        // S7
        header(GET_FEATURES, V1 | REPLY, 0),
        // S8
        header(0, V1, 0),
        header(1000, V1, 0),
        header(u32::MAX, V1, 0),
        // S5: sizes that are not the request's.
        message(SET_OWNER, V1, &[0; 8]),
        message(SET_FEATURES, V1, &[0; 4]),
        message(SET_FEATURES, V1, &[0; 16]),
        message(SET_VRING_NUM, V1, &[0; 4]),
        message(SET_MEM_TABLE, V1, &[0; 4]),
    ];
    for bytes in bad {
        let mut wire = served.wire();
        wire.send_bytes(&bytes, &[]);
        assert_eq!(wire.receive(), Answer::Closed, "{bytes:?}");
    }
    assert_serves(&served);
}

#[test]
fn s10_several_messages_in_one_segment_are_answered_in_order() {
    let served = serve();
    let mut wire = served.wire();
    let mut bytes = header(GET_FEATURES, V1, 0);
    bytes.extend(header(crate::support::wire::GET_PROTOCOL_FEATURES, V1, 0));
    bytes.extend(header(GET_FEATURES, V1, 0));
    assert!(wire.send_bytes(&bytes, &[]));
    for expected in [GET_FEATURES, 15, GET_FEATURES] {
        let answer = wire.receive();
        assert!(matches!(answer, Answer::Message { code, .. } if code == expected));
    }
}

#[test]
fn s13_front_end_that_reads_no_replies_does_not_stop_the_server_or_the_data_path() {
    let served = serve();
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    let mut queue = front.up();
    let wire = front.wire();
    wire.stream
        .set_write_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    // Until the server is stuck with its replies, and the socket is full the other way too.
    let mut stream = &wire.stream;
    let request = header(GET_FEATURES, V1, 0);
    while stream.write_all(&request).is_ok() {}
    assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
    served.stop().unwrap();
}

/// The body of SET_MEM_TABLE for regions (guest, size, user, offset).
fn table(regions: &[[u64; 4]]) -> Vec<u8> {
    let mut body = vring_state(u32::try_from(regions.len()).unwrap(), 0);
    body.extend(regions.iter().flatten().flat_map(|word| word.to_le_bytes()));
    body
}

/// Whether the server refused, by acknowledgement or by closing.
fn refused(wire: &mut Wire, code: u32, body: &[u8], fds: &[std::os::fd::BorrowedFd<'_>]) -> bool {
    !wire.send(code, V1 | NEED_REPLY, body, fds)
        || match wire.receive() {
            Answer::Closed => true,
            answer => answer.value() != 0,
        }
}

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
    // With the header: the message layer drops it, and takes what follows for one.
    let mut wire = served.wire();
    wire.negotiate(FEATURES);
    assert!(wire.send_bytes(&bytes, &fds));
    assert!(!wire.is_alive());
    // With the body, where there should be none at all.
    for fds in [&fds[..1], &fds] {
        let mut wire = served.wire();
        wire.negotiate(FEATURES);
        assert!(wire.send_bytes(&bytes[..12], &[]));
        assert!(wire.send_bytes(&bytes[12..], fds));
        assert_eq!(wire.receive(), Answer::Closed);
    }
    assert_serves(&served);
}

#[test]
fn f4_call_without_a_descriptor_is_a_polling_guest_and_kick_without_one_is_refused() {
    let served = serve();
    let mut front = ready(&served);
    let mut queue = front.queue(0, 16);
    let mut wire = front.wire();
    assert!(wire.acknowledged(SET_VRING_CALL, &0x100u64.to_le_bytes(), &[]));
    assert!(!wire.acknowledged(SET_VRING_KICK, &0x100u64.to_le_bytes(), &[]));
    let request = Request::read(0, 512);
    queue.add(&request, &Framing::joined());
    queue.publish();
    eventually("a completion", || queue.poll().is_some());
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
fn m1_m3_m5_malformed_memory_tables_are_refused() {
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
        // M1
        vec![],
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
