//! Packed rings through the whole device. What only the ring has is tested in `vring`, and random requests over both
//! formats in `model.rs`.

use std::time::Duration;

use blk_dataplane::{Backing, Device, DeviceOptions};
use vring::{PackedPosition, RingBase};

use crate::support::embedded::{Embedded, setup};
use crate::support::pattern;
use crate::support::queue::{EVENT_IDX, FEATURES, GuestQueue, RING_PACKED};
use crate::support::request::{Framing, OK, Request};
use crate::support::scratch::{Kind, Scratch, null_device};

const PACKED: u64 = FEATURES | RING_PACKED;

#[test]
fn device_offers_packed_rings() {
    assert_eq!(null_device(1 << 20).features() & RING_PACKED, RING_PACKED);
}

#[test]
fn c16_restarted_packed_queue_goes_on_where_it_stopped() {
    let scratch = Scratch::zeroed(Kind::Disk, 1 << 20);
    let mut vmm = Embedded::new(&scratch.device());
    // Of a size that the requests of a cycle are no divisor of: stops are everywhere in the ring, on either pass.
    let mut queue = vmm.queue_with(0, 32, PACKED);
    for cycle in 0..100u64 {
        let data = pattern(cycle, 512);
        assert_eq!(queue.answer(&Request::write(cycle, &data)), (Some(OK), 1));
        for sector in 0..4 {
            let request = Request::read(sector, 512);
            queue.add(&request, &Framing::classic(&request));
        }
        queue.publish();
        let base = vmm.plane.stop_queue(0).unwrap();
        let RingBase::Packed { avail, used } = base else {
            panic!("{base:?}");
        };
        assert_eq!(avail, used, "everything popped has been given back");
        vmm.start(&queue, base);
        assert_eq!(queue.finish().len(), 4);
        assert_eq!(
            queue.run(&Request::read(cycle, 512)).data,
            data,
            "cycle {cycle}"
        );
        queue.arena.reset();
    }
}

#[test]
fn x1_after_the_stop_of_a_packed_queue_nothing_is_written_to_the_guest_any_more() {
    let scratch = Scratch::new(Kind::Disk, &pattern(1, 1 << 20));
    let mut vmm = Embedded::new(&scratch.device());
    for _ in 0..20 {
        let mut queue = vmm.queue_with(0, 256, PACKED);
        for sector in 0..60 {
            let request = Request::read(sector * 16, 8192);
            queue.add(&request, &Framing::classic(&request));
        }
        queue.publish();
        vmm.plane.stop_queue(0).unwrap();
        queue.call.test_and_clear().unwrap();
        let then = queue.snapshot();
        let mut other = vmm.queue_with(1, 16, PACKED);
        for _ in 0..10 {
            other.answer(&Request::read(0, 4096));
        }
        vmm.plane.stop_queue(1).unwrap();
        assert!(queue.snapshot() == then, "written after the stop");
        assert!(
            !queue.call.test_and_clear().unwrap(),
            "called after the stop"
        );
    }
}

#[test]
fn r10_base_of_the_other_format_starts_no_queue() {
    let mut vmm = Embedded::new(&null_device(1 << 20));
    let packed = RingBase::Packed {
        avail: PackedPosition::FIRST,
        used: PackedPosition::FIRST,
    };
    for (features, base) in [
        (PACKED, RingBase::Split { next_avail: 0 }),
        (FEATURES, packed),
    ] {
        let mut queue = vmm.prepare(0, 16, features);
        assert!(vmm.plane.start_queue(0, setup(&queue, base)).is_err());
        let fresh = queue.fresh();
        vmm.start(&queue, fresh);
        assert_eq!(queue.answer(&Request::read(0, 512)).0, Some(OK));
        vmm.plane.stop_queue(0).unwrap();
    }
}

/// Split and packed side by side, asleep between any two requests: no kick and no interrupt gets lost.
#[test]
fn queues_of_both_formats_run_beside_each_other() {
    let scratch = Scratch::new(Kind::Disk, &pattern(3, 1 << 20));
    let options = DeviceOptions {
        poll_max: Duration::ZERO,
        ..DeviceOptions::default()
    };
    let device = Device::new(Backing::Image(scratch.image()), &options).unwrap();
    let mut vmm = Embedded::new(&device);
    let features = [FEATURES, PACKED, PACKED & !EVENT_IDX];
    let mut queues: Vec<GuestQueue> = (0..)
        .zip(features)
        .map(|(index, features)| vmm.queue_with(index, 64, features))
        .collect();
    for round in 0..100 {
        for queue in &mut queues {
            let done = queue.run(&Request::read(round, 1024));
            assert_eq!((done.status, done.len), (Some(OK), 1025));
            queue.arena.reset();
        }
    }
    assert!(vmm.plane.counters().sleeps > 0);
    vmm.plane.stop().unwrap();
}
