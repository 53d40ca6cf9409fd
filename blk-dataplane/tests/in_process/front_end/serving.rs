//! A front-end that plays by the rules.

use vhost::VhostBackend;

use super::DISK;
use crate::support::front_end::Served;
use crate::support::queue::{EVENT_IDX, FEATURES, GuestQueue};
use crate::support::ram::GuestRam;
use crate::support::request::{Framing, OK, Request, Table};
use crate::support::scratch::{Kind, Scratch, null_device};
use crate::support::{eventually, pattern};

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
