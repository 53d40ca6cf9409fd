//! Rows C: what is negotiated, and what may be said when.

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;

use super::{DISK, assert_serves, ready, serve};
use crate::support::front_end::Served;
use crate::support::queue::{BLK_FLUSH, FEATURES, GuestQueue, VERSION_1};
use crate::support::ram::GuestRam;
use crate::support::request::{OK, Request};
use crate::support::scratch::{Kind, Scratch, null_device};
use crate::support::wire::{
    GET_FEATURES, GET_PROTOCOL_FEATURES, NEED_REPLY, P_REPLY_ACK, PROTOCOL_FEATURES, SET_FEATURES,
    SET_OWNER, SET_PROTOCOL_FEATURES, SET_VRING_ENABLE, V1, vring_state,
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
    for bit in [2u64, 4, 6, 8, 10, 11, 20, 63] {
        // REPLY_ACK stays, or the refusal could not be heard.
        let features: u64 = 1 << 3 | 1 << bit;
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
fn front_end_that_never_asked_for_acknowledgements_gets_none() {
    let served = Served::new(null_device(1 << 20));
    let mut wire = served.wire();
    // S9: need_reply before REPLY_ACK is negotiated.
    let set_owner = SET_OWNER;
    assert!(wire.send(set_owner, V1 | NEED_REPLY, &[], &[]));
    let features = wire.ask(GET_FEATURES, &[]);
    assert!(features.value() & PROTOCOL_FEATURES != 0);
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
        // SEG_MAX, BLK_SIZE, FLUSH, TOPOLOGY, MQ, LOG_ALL, INDIRECT_DESC, EVENT_IDX, PROTOCOL_FEATURES,
        // VERSION_1, RING_PACKED.
        let bits = [2, 6, 9, 10, 12, 26, 28, 29, 30, 32, 34];
        let expected = bits.iter().fold(0, |mask, bit| mask | 1 << bit);
        // RO, or else CONFIG_WCE, DISCARD, WRITE_ZEROES.
        let writes = 1 << 11 | 1 << 13 | 1 << 14;
        assert_eq!(features, expected | if read_only { 1 << 5 } else { writes });
        let protocol = wire.ask(GET_PROTOCOL_FEATURES, &[]).value();
        // MQ, LOG_SHMFD, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE, CONFIGURE_MEM_SLOTS,
        // STATUS.
        let bits = [0, 1, 3, 5, 9, 12, 13, 15, 16];
        assert_eq!(protocol, bits.iter().fold(0, |mask, bit| mask | 1 << bit));
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
