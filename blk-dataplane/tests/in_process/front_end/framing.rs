//! Rows S: what comes over the socket, however it is cut up.

use std::io::Write;
use std::os::fd::AsFd;
use std::time::Duration;

use event_poll::EventNotifier;

use super::{assert_serves, serve};
use crate::support::front_end::Served;
use crate::support::queue::FEATURES;
use crate::support::ram::GuestRam;
use crate::support::request::{OK, Request};
use crate::support::scratch::null_device;
use crate::support::wire::{
    Answer, GET_FEATURES, GET_PROTOCOL_FEATURES, GET_VRING_BASE, NEED_REPLY, PROTOCOL_FEATURES,
    REPLY, SET_FEATURES, SET_MEM_TABLE, SET_OWNER, SET_PROTOCOL_FEATURES, SET_VRING_ADDR,
    SET_VRING_BASE, SET_VRING_CALL, SET_VRING_ENABLE, SET_VRING_ERR, SET_VRING_KICK, SET_VRING_NUM,
    V1, header, message, vring_state,
};

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
fn s3_message_byte_by_byte_with_its_descriptors_on_any_of_them_is_accepted() {
    let served = serve();
    let event = EventNotifier::new().unwrap();
    let mut wire = served.wire();
    wire.negotiate(FEATURES);
    let bytes = message(SET_VRING_CALL, V1 | NEED_REPLY, &0u64.to_le_bytes());
    for with in 0..bytes.len() {
        for (at, byte) in bytes.iter().enumerate() {
            let fds = [event.as_fd()];
            assert!(wire.send_bytes(&[*byte], if at == with { &fds } else { &[] }));
            std::thread::yield_now();
        }
        assert_eq!(wire.receive().value(), 0, "descriptor with byte {with}");
    }
    // One is all that it takes.
    for byte in bytes {
        assert!(wire.send_bytes(&[byte], &[event.as_fd()]));
    }
    assert_ne!(wire.receive().value(), 0);
    assert!(wire.is_alive());
}

/// Whatever is cut in two comes together again.
#[test]
fn s1_s3_message_in_two_pieces_is_waited_for() {
    let served = serve();
    let mut wire = served.wire();
    wire.negotiate(FEATURES);
    let bytes = message(SET_VRING_NUM, V1 | NEED_REPLY, &vring_state(0, 16));
    for cut in 1..bytes.len() {
        assert!(wire.send_bytes(&bytes[..cut], &[]));
        std::thread::sleep(Duration::from_millis(2));
        assert!(wire.send_bytes(&bytes[cut..], &[]));
        assert_eq!(wire.receive().value(), 0, "cut at {cut}");
    }
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
        // S8, and nobody waits for an acknowledgement: perhaps for a reply, and for ever.
        header(0, V1, 0),
        header(1000, V1, 0),
        header(u32::MAX, V1, 0),
        // Without REPLY_ACK there is none (S9).
        header(1000, V1 | NEED_REPLY, 0),
    ];
    for bytes in bad {
        let mut wire = served.wire();
        wire.send_bytes(&bytes, &[]);
        assert_eq!(wire.receive(), Answer::Closed, "{bytes:?}");
    }
    assert_serves(&served);
}

#[test]
fn s5_body_of_another_size_is_read_to_its_end_and_refused() {
    let served = serve();
    let mut wire = served.wire();
    wire.negotiate(FEATURES);
    // Whatever has no reply of its own; SET_MEM_TABLE's and SET_CONFIG's sizes are what they say.
    let sizes: [(u32, usize); 18] = [
        (SET_OWNER, 0),
        (4, 0),
        (SET_FEATURES, 8),
        (SET_VRING_NUM, 8),
        (SET_VRING_ADDR, 40),
        (SET_VRING_BASE, 8),
        (SET_VRING_KICK, 8),
        (SET_VRING_CALL, 8),
        (SET_VRING_ERR, 8),
        (SET_PROTOCOL_FEATURES, 8),
        (SET_VRING_ENABLE, 8),
        (21, 0),
        (25, 13),
        (34, 0),
        (37, 40),
        (38, 40),
        (39, 8),
        (SET_MEM_TABLE, 40),
    ];
    for (code, size) in sizes {
        for wrong in [0, 1, size.wrapping_sub(1), size + 1, size + 8, 4096] {
            if wrong == size || wrong > 4096 {
                continue;
            }
            // Junk that would be a header, were it taken for one.
            let body: Vec<u8> = header(code, V1, 0)
                .into_iter()
                .cycle()
                .take(wrong)
                .collect();
            assert!(!wire.acknowledged(code, &body, &[]), "{code} {wrong}");
            // Unasked, it is not answered, and the next message is.
            assert!(wire.send(code, V1, &body, &[]));
            assert!(wire.is_alive(), "{code} {wrong}");
        }
    }
    drop(wire);
    // A question that is none cannot be answered.
    for code in [GET_FEATURES, GET_VRING_BASE] {
        let mut wire = served.wire();
        wire.negotiate(FEATURES);
        assert!(wire.send(code, V1 | NEED_REPLY, &[0; 5], &[]));
        assert_eq!(wire.receive(), Answer::Closed, "{code}");
    }
    assert_serves(&served);
}

#[test]
fn s8_requests_that_are_not_known_are_refused_where_that_can_be_said() {
    let served = serve();
    let mut wire = served.wire();
    wire.negotiate(FEATURES);
    let event = EventNotifier::new().unwrap();
    for code in [
        0,
        19,
        20,
        22,
        23,
        26,
        27,
        28,
        30,
        33,
        41,
        44,
        45,
        1000,
        u32::MAX,
    ] {
        assert!(
            !wire.acknowledged(code, &[1; 77], &[event.as_fd()]),
            "{code}"
        );
    }
    assert!(wire.is_alive());
}

#[test]
fn s10_several_messages_in_one_segment_are_answered_in_order() {
    let served = serve();
    let mut wire = served.wire();
    let mut bytes = header(GET_FEATURES, V1, 0);
    bytes.extend(header(GET_PROTOCOL_FEATURES, V1, 0));
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

#[test]
fn s11_second_front_end_waits_until_the_first_has_gone() {
    let served = Served::new(null_device(1 << 20));
    let (ram, other) = (GuestRam::new(), GuestRam::new());
    let mut first = served.connect(&ram);
    let mut queue = first.up();
    let mut second = served.connect(&other);
    // It may speak, and is not answered yet.
    let wire = second.wire();
    assert!(wire.send(SET_OWNER, V1, &[], &[]));
    for _ in 0..20 {
        assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
    }
    drop(first);
    let mut queue = second.up();
    assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
}

#[test]
fn s9_front_end_that_never_asked_for_acknowledgements_gets_none() {
    let served = Served::new(null_device(1 << 20));
    let mut wire = served.wire();
    // S9: need_reply before REPLY_ACK is negotiated.
    let set_owner = SET_OWNER;
    assert!(wire.send(set_owner, V1 | NEED_REPLY, &[], &[]));
    let features = wire.ask(GET_FEATURES, &[]);
    assert!(features.value() & PROTOCOL_FEATURES != 0);
}
