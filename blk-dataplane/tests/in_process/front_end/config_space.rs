//! Rows C11 to C13: the configuration space by messages.

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

use super::{DISK, serve};
use crate::support::front_end::Served;
use crate::support::queue::{CONFIG_WCE, FEATURES, VERSION_1};
use crate::support::ram::GuestRam;
use crate::support::scratch::{Kind, Scratch, null_device};
use crate::support::wire::{Answer, GET_CONFIG, NEED_REPLY, REPLY, V1, Wire};

/// Asks for configuration with the body given, which must be answered with no bytes: the specification's "zero
/// length payload", here the header of a configuration message that says so.
#[track_caller]
fn assert_no_config(wire: &mut Wire, body: &[u8]) {
    for flags in [V1, V1 | NEED_REPLY] {
        assert!(wire.send(GET_CONFIG, flags, body, &[]));
        let Answer::Message { code, flags, body } = wire.receive() else {
            panic!("closed");
        };
        assert_eq!((code, flags), (GET_CONFIG, V1 | REPLY));
        assert_eq!((body.len(), &body[4..8]), (12, &[0; 4][..]));
    }
}

#[test]
fn c11_config_beyond_the_structure_or_of_no_bytes_is_an_empty_reply() {
    let served = serve();
    let mut wire = served.wire();
    wire.negotiate(FEATURES);
    let wrong = [
        (0u32, 97u32),
        (96, 1),
        (95, 2),
        (0, 256),
        (255, 8),
        (0x100, 97),
        (0x100 + 95, 2),
        (8, 0),
        (u32::MAX, 8),
        (u32::MAX - 7, 8),
        (0, 257),
    ];
    for (offset, len) in wrong {
        let mut body = [offset, len, 0].map(u32::to_le_bytes).concat();
        body.resize(12 + usize::try_from(len).unwrap(), 0);
        assert_no_config(&mut wire, &body);
    }
    assert!(wire.is_alive());
}

#[test]
fn c11_config_is_told_to_a_front_end_that_counts_from_where_virtio_mmio_has_it() {
    let served = serve();
    let ram = GuestRam::new();
    let mut front = served.connect(&ram);
    front.negotiate(FEATURES);
    let expected = front.config(96).unwrap();
    let flags = VhostUserConfigFlags::WRITABLE;
    for part in [0usize..60, 0..96, 20..24, 95..96] {
        let offset = 0x100 + u32::try_from(part.start).unwrap();
        let len = u32::try_from(part.len()).unwrap();
        let room = vec![0; part.len()];
        let (head, bytes) = front.vhost.get_config(offset, len, flags, &room).unwrap();
        let said = head.offset;
        assert_eq!((said, &bytes[..]), (offset, &expected[part]));
    }
}

#[test]
fn c12_config_message_that_is_not_as_long_as_it_says_is_an_empty_reply() {
    let served = serve();
    let mut wire = served.wire();
    wire.negotiate(FEATURES);
    for (said, len) in [(8u32, 0), (8, 7), (8, 9), (0, 8), (u32::MAX, 8), (60, 59)] {
        let mut body = [0, said, 0].map(u32::to_le_bytes).concat();
        body.resize(12 + len, 0);
        assert_no_config(&mut wire, &body);
    }
    for len in 0..12 {
        assert_no_config(&mut wire, &vec![0; len]);
    }
    assert!(wire.is_alive());
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
