//! F8: descriptors in equal descriptors out, whatever the front-end does.

use std::os::fd::AsFd;
use std::process::Command;

use event_poll::EventNotifier;

use crate::support::front_end::Served;
use crate::support::queue::FEATURES;
use crate::support::ram::GuestRam;
use crate::support::request::{Framing, OK, Request};
use crate::support::scratch::{Kind, Scratch};
use crate::support::wire::{SET_OWNER, SET_VRING_KICK, V1, message};

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// In a process of its own: the tests of this one open and close descriptors all the time.
#[test]
fn f8_c16_no_front_end_leaves_descriptors_or_mappings_behind() {
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--ignored", "--test-threads=1"])
        .arg("descriptors::alone_no_descriptor_is_left_behind")
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
#[ignore = "counts the descriptors of the whole process: run by the test above"]
fn alone_no_descriptor_is_left_behind() {
    let scratch = Scratch::zeroed(Kind::Disk, 1 << 20);
    let served = Served::new(scratch.device());
    let ram = GuestRam::new();
    let event = EventNotifier::new().unwrap();
    let mut after_first = 0;
    let mut mappings = 0;
    for round in 0..8 {
        // One that is served and goes away with requests in flight.
        let mut front = served.connect(&ram);
        let mut queue = front.up();
        for number in 0..30 {
            let request = Request::read(number * 8, 4096);
            queue.add(&request, &Framing::classic(&request));
        }
        queue.publish();
        front.set_notifiers(&queue);
        front.set_memory(&[2, 0]);
        let base = front.stop(&queue);
        front.start(&queue, base);
        drop((front, queue));
        // Descriptors where none belong, too many, and in the middle of a message.
        let kick = message(SET_VRING_KICK, V1, &0u64.to_le_bytes());
        for (bytes, fds, more) in [
            (message(SET_OWNER, V1, &[]), 3, 0),
            (kick.clone(), 2, 0),
            (kick.clone(), 200, 0),
            (kick[..5].to_vec(), 1, 4),
            (kick[..12].to_vec(), 1, 4),
        ] {
            let mut wire = served.wire();
            wire.negotiate(FEATURES);
            wire.send_bytes(&bytes, &vec![event.as_fd(); fds]);
            if more > 0 {
                wire.send_bytes(&kick[bytes.len()..], &vec![event.as_fd(); more]);
            }
        }
        // The last to be served: all before it are gone.
        let mut front = served.connect(&ram);
        let mut queue = front.up();
        assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
        let count = open_descriptors();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let maps = maps
            .lines()
            .filter(|line| line.contains("memfd:guest"))
            .count();
        if round == 0 {
            (after_first, mappings) = (count, maps);
        }
        assert_eq!(count, after_first, "round {round}");
        assert_eq!(maps, mappings, "round {round}");
    }
}
