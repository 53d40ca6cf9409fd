//! Rows R: rings that are set up wrong.

use std::os::fd::AsFd;

use event_poll::EventNotifier;
use vhost::VhostBackend;

use super::{assert_serves, ready, serve};
use crate::support::queue::{FEATURES, GuestQueue};
use crate::support::ram::GuestRam;
use crate::support::request::{OK, Request};
use crate::support::wire::{
    Answer, GET_VRING_BASE, SET_VRING_ADDR, SET_VRING_BASE, SET_VRING_CALL, SET_VRING_ENABLE,
    SET_VRING_ERR, SET_VRING_KICK, SET_VRING_NUM, vring_state,
};

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

    // Misaligned, or over the end of a region: refused here or when the ring is to start.
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
fn r12_log_flag_means_nothing_without_a_log_and_unknown_flags_are_refused() {
    let served = serve();
    let mut front = ready(&served);
    let queue = GuestQueue::new(&front.ram, 0, 16, FEATURES);
    let good = front.ring_addresses(&queue);
    let mut wire = front.wire();
    for bit in 0..32 {
        let mut body = vring_state(0, 1 << bit);
        for part in [
            good.desc_table_addr,
            good.used_ring_addr,
            good.avail_ring_addr,
            u64::MAX,
        ] {
            body.extend(part.to_le_bytes());
        }
        let taken = wire.acknowledged(SET_VRING_ADDR, &body, &[]);
        assert_eq!(taken, bit == 0, "{bit}");
    }
    let mut queue = front.queue(0, 16);
    assert_eq!(queue.answer(&Request::read(0, 512)), (Some(OK), 513));
}
