//! Rows C: what is negotiated, and what may be said when.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use event_poll::EventNotifier;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

use super::{DISK, assert_serves, ready, serve};
use crate::support::front_end::Served;
use crate::support::queue::{BLK_FLUSH, CONFIG_WCE, FEATURES, GuestQueue, VERSION_1};
use crate::support::ram::GuestRam;
use crate::support::request::{Framing, OK, Request};
use crate::support::scratch::{Kind, Scratch, null_device};
use crate::support::wire::{
    ADD_MEM_REG, Answer, GET_CONFIG, GET_FEATURES, GET_MAX_MEM_SLOTS, GET_PROTOCOL_FEATURES,
    GET_QUEUE_NUM, GET_STATUS, GET_VRING_BASE, P_ALL, P_REPLY_ACK, PROTOCOL_FEATURES, REM_MEM_REG,
    RESET_DEVICE, SET_BACKEND_REQ_FD, SET_CONFIG, SET_FEATURES, SET_INFLIGHT_FD, SET_LOG_BASE,
    SET_LOG_FD, SET_PROTOCOL_FEATURES, SET_STATUS, SET_VRING_BASE, SET_VRING_ENABLE, V1, Wire,
    vring_state,
};

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
    for bit in (0..64).filter(|bit| P_ALL & 1 << bit == 0) {
        // REPLY_ACK stays, or the refusal could not be heard.
        let features = P_REPLY_ACK | 1 << bit;
        assert!(!wire.acknowledged(SET_PROTOCOL_FEATURES, &features.to_le_bytes(), &[]));
    }
    assert!(wire.is_alive());
}

#[test]
fn c9_enable_of_neither_0_nor_1_or_without_protocol_features_is_refused() {
    let served = serve();
    let mut front = ready(&served);
    let mut queue = front.queue(0, 16);
    let mut wire = front.wire();
    for num in [2, 0x100, 0x1_0001, u32::MAX] {
        assert!(!wire.acknowledged(SET_VRING_ENABLE, &vring_state(0, num), &[]));
        assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
    }
    drop((front, wire));
    // REPLY_ACK is the protocol's, and may be had without the feature that rings start disabled by.
    let mut wire = served.wire();
    let features = P_REPLY_ACK.to_le_bytes();
    assert!(wire.send(SET_PROTOCOL_FEATURES, V1, &features, &[]));
    assert!(wire.acknowledged(SET_FEATURES, &FEATURES.to_le_bytes(), &[]));
    for num in [0, 1] {
        assert!(!wire.acknowledged(SET_VRING_ENABLE, &vring_state(0, num), &[]));
    }
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
fn offers_what_the_device_does_and_no_more() {
    let scratch = Scratch::zeroed(Kind::Disk, DISK);
    for (device, read_only) in [
        (scratch.device(), false),
        (scratch.read_only_device(), true),
    ] {
        let served = Served::new(device);
        let mut wire = served.wire();
        let features = wire.ask(GET_FEATURES, &[]).value();
        // SEG_MAX, BLK_SIZE, FLUSH, TOPOLOGY, MQ, LOG_ALL, INDIRECT_DESC, EVENT_IDX, PROTOCOL_FEATURES, VERSION_1,
        // RING_PACKED.
        let bits = [2, 6, 9, 10, 12, 26, 28, 29, 30, 32, 34];
        let expected = bits.iter().fold(0, |mask, bit| mask | 1 << bit);
        // RO, or else CONFIG_WCE, DISCARD, WRITE_ZEROES.
        let writes = 1 << 11 | 1 << 13 | 1 << 14;
        assert_eq!(features, expected | if read_only { 1 << 5 } else { writes });
        let protocol = wire.ask(GET_PROTOCOL_FEATURES, &[]).value();
        assert_eq!(protocol, P_ALL);
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
fn c8_inband_notifications_are_not_offered_and_so_refused() {
    const INBAND_NOTIFICATIONS: u64 = 1 << 14;
    let served = serve();
    let front = ready(&served);
    let mut wire = front.wire();
    let offered = wire.ask(GET_PROTOCOL_FEATURES, &[]).value();
    assert_eq!(offered & INBAND_NOTIFICATIONS, 0);
    for with in [0, P_REPLY_ACK, P_ALL] {
        let features = INBAND_NOTIFICATIONS | with;
        assert!(!wire.acknowledged(SET_PROTOCOL_FEATURES, &features.to_le_bytes(), &[]));
    }
    // VRING_KICK, which would take the place of a descriptor.
    assert!(!wire.acknowledged(35, &vring_state(0, 0), &[]));
    assert!(wire.is_alive());
}

#[test]
fn c10_base_of_a_ring_that_does_not_run_is_the_one_that_was_set() {
    let served = serve();
    let front = ready(&served);
    let mut wire = front.wire();
    let base = |wire: &mut Wire, index, num| {
        let Answer::Message { body, .. } = wire.ask(GET_VRING_BASE, &vring_state(index, num))
        else {
            panic!("closed");
        };
        assert_eq!(body[..4], index.to_le_bytes());
        u32::from_le_bytes(body[4..].try_into().unwrap())
    };
    // The number in the question means nothing.
    for num in [0, 1, u32::MAX] {
        assert_eq!(base(&mut wire, 1, num), 0);
    }
    assert!(wire.acknowledged(SET_VRING_BASE, &vring_state(1, 77), &[]));
    assert_eq!(base(&mut wire, 1, 5), 77);
    assert_eq!(base(&mut wire, 0, 0), 0);
    // It has no way to say no: the connection ends, and nothing else does.
    assert_eq!(
        wire.ask(GET_VRING_BASE, &vring_state(u32::MAX, 0)),
        Answer::Closed
    );
    drop((front, wire));
    assert_serves(&served);
}

#[test]
fn c14_questions_are_answered_at_any_time() {
    let served = serve();
    let mut wire = served.wire();
    // Before anything is negotiated, and with rings running.
    for up in [false, true] {
        let ram = GuestRam::new();
        let mut queue = None;
        if up {
            drop(wire);
            let mut front = served.connect(&ram);
            queue = Some(front.up());
            wire = front.wire();
        }
        assert_eq!(wire.ask(GET_QUEUE_NUM, &[]).value(), 4);
        assert_eq!(wire.ask(GET_MAX_MEM_SLOTS, &[]).value(), 509);
        assert_eq!(wire.ask(GET_STATUS, &[]).value(), 0);
        assert_ne!(wire.ask(GET_PROTOCOL_FEATURES, &[]).value(), 0);
        assert!(matches!(
            wire.ask(GET_CONFIG, &[[0u32, 8, 0].map(u32::to_le_bytes).concat(), vec![0; 8]].concat()),
            Answer::Message { body, .. } if body.len() == 20
        ));
        drop(queue);
    }
}

#[test]
fn c1_what_needs_a_protocol_feature_is_refused_without_it() {
    let served = serve();
    let mut wire = served.wire();
    assert!(wire.send(SET_PROTOCOL_FEATURES, V1, &P_REPLY_ACK.to_le_bytes(), &[]));
    let ram = GuestRam::new();
    let file = ram.regions[0].file.as_fd();
    let event = EventNotifier::new().unwrap();
    let (one, _other) = UnixStream::pair().unwrap();
    let region = [0, 0, 4096, 1 << 40, 0].map(u64::to_le_bytes).concat();
    let config = [[32u32, 1, 0].map(u32::to_le_bytes).concat(), vec![1]].concat();
    let log = [4096u64, 0].map(u64::to_le_bytes).concat();
    let cases: [(u32, &[u8], &[BorrowedFd<'_>]); 9] = [
        (SET_LOG_BASE, &log, &[file]),
        (SET_LOG_FD, &[], &[event.as_fd()]),
        (SET_BACKEND_REQ_FD, &[], &[one.as_fd()]),
        (SET_CONFIG, &config, &[]),
        (SET_INFLIGHT_FD, &[0; 20], &[file]),
        (RESET_DEVICE, &[], &[]),
        (ADD_MEM_REG, &region, &[file]),
        (REM_MEM_REG, &region, &[]),
        (SET_STATUS, &[1, 0, 0, 0, 0, 0, 0, 0], &[]),
    ];
    for (code, body, fds) in cases {
        assert!(!wire.acknowledged(code, body, fds), "{code}");
    }
    assert_eq!(wire.ask(GET_STATUS, &[]).value(), 0);
}

/// What QEMU 7.2 does when a guest stops: status 0 first, and then it asks where the rings stand.
#[test]
fn c17_status_0_resets_the_device_and_any_other_is_kept() {
    let served = serve();
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    front.negotiate_all(FEATURES | CONFIG_WCE);
    front.set_memory(&[0, 1, 2]);
    let mut wire = front.wire();
    for status in [1u64, 3, 11, 15, 0x80] {
        assert!(wire.acknowledged(SET_STATUS, &status.to_le_bytes(), &[]));
        assert_eq!(wire.ask(GET_STATUS, &[]).value(), status);
    }
    for junk in [0x100u64, 1 << 32, u64::MAX] {
        assert!(!wire.acknowledged(SET_STATUS, &junk.to_le_bytes(), &[]));
        assert_eq!(wire.ask(GET_STATUS, &[]).value(), 0x80);
    }
    for code in [SET_STATUS, RESET_DEVICE] {
        front
            .vhost
            .set_features(FEATURES | CONFIG_WCE | PROTOCOL_FEATURES)
            .unwrap();
        let mut queue = GuestQueue::new(&ram, 0, 16, FEATURES | CONFIG_WCE);
        front.start(&queue, 0);
        assert!(wire.acknowledged(SET_STATUS, &15u64.to_le_bytes(), &[]));
        let off = [[32u32, 1, 0].map(u32::to_le_bytes).concat(), vec![0]].concat();
        assert!(wire.acknowledged(SET_CONFIG, &off, &[]));
        for _ in 0..3 {
            assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
        }
        let body: &[u8] = if code == SET_STATUS { &[0; 8] } else { &[] };
        assert!(wire.acknowledged(code, body, &[]));
        assert_eq!(wire.ask(GET_STATUS, &[]).value(), 0);
        // Stopped: nothing is served, and where it stood can still be asked.
        let request = Request::read(0, 512);
        queue.add(&request, &Framing::classic(&request));
        queue.driver.publish();
        queue.kick.notify().unwrap();
        assert!(wire.is_alive());
        assert!(queue.poll().is_none());
        assert_eq!(front.stop(&queue), 3);
        // As it was at first: write cache on, no size, no addresses, no base.
        assert_eq!(front.config(60).unwrap()[32], 1);
        assert!(front.set_kick(&queue).is_err());
        front
            .vhost
            .set_features(FEATURES | CONFIG_WCE | PROTOCOL_FEATURES)
            .unwrap();
        assert!(front.set_kick(&queue).is_err(), "no size yet");
        // Memory, call and err are what they were: QEMU hands those over once.
        let mut fresh = GuestQueue::new(&ram, 0, 16, FEATURES | CONFIG_WCE);
        fresh.call = queue.call;
        fresh.err = queue.err;
        front.vhost.set_vring_num(0, 16).unwrap();
        front
            .vhost
            .set_vring_addr(0, &front.ring_addresses(&fresh))
            .unwrap();
        front.set_kick(&fresh).unwrap();
        front.enable(&fresh, true);
        assert_eq!(fresh.answer(&Request::read(0, 512)), (Some(OK), 513));
        assert_eq!(front.stop(&fresh), 1);
    }
}

#[test]
fn c17_features_ok_does_not_stay_on_when_the_features_were_refused() {
    let served = serve();
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    front.negotiate_all(FEATURES);
    let mut wire = front.wire();
    let bad = 1u64 << 60;
    assert!(!wire.acknowledged(SET_FEATURES, &bad.to_le_bytes(), &[]));
    assert!(wire.acknowledged(SET_STATUS, &11u64.to_le_bytes(), &[]));
    assert_eq!(wire.ask(GET_STATUS, &[]).value(), 3);
    let good = FEATURES | PROTOCOL_FEATURES;
    assert!(wire.acknowledged(SET_FEATURES, &good.to_le_bytes(), &[]));
    assert!(wire.acknowledged(SET_STATUS, &11u64.to_le_bytes(), &[]));
    assert_eq!(wire.ask(GET_STATUS, &[]).value(), 11);
}
