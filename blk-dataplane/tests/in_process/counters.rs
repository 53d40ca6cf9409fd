//! What is counted for each queue.

use blk_dataplane::{Backing, Device, DeviceOptions};

use crate::support::embedded::Embedded;
use crate::support::queue::{BLK_DISCARD, BLK_WRITE_ZEROES, FEATURES, GuestQueue};
use crate::support::request::{DISCARD, Framing, IOERR, OK, Request, UNSUPP, WRITE_ZEROES};
use crate::support::scratch::{Kind, Scratch, on_threads, options};

const BOTH: u64 = FEATURES | BLK_DISCARD | BLK_WRITE_ZEROES;

fn times(queue: &mut GuestQueue, count: usize, request: &Request, status: u8) {
    for _ in 0..count {
        queue.arena.reset();
        assert_eq!(queue.answer(request).0, Some(status));
    }
}

#[test]
fn requests_are_counted_by_queue_type_and_outcome() {
    let scratch = Scratch::zeroed(Kind::Disk, 1 << 20);
    let mut vmm = Embedded::new(&on_threads(Backing::Image(scratch.image()), 2));
    let mut queues = [0, 1].map(|index| vmm.queue_with(index, 16, BOTH));
    let [first, second] = &mut queues;
    times(first, 1, &Request::read(0, 4096), OK);
    times(first, 2, &Request::write(0, &[1; 8192]), OK);
    times(first, 3, &Request::flush(), OK);
    times(first, 4, &Request::ranges(DISCARD, &[(0, 8, 0)]), OK);
    times(second, 5, &Request::ranges(WRITE_ZEROES, &[(0, 8, 0)]), OK);
    times(second, 6, &Request::get_id(20), OK);
    times(second, 7, &Request::new(99, 0, &[], 0), UNSUPP);
    times(second, 8, &Request::read(4096, 512), IOERR);
    times(second, 9, &Request::ranges(DISCARD, &[(0, 8, 1)]), UNSUPP);
    // A chain without a byte to write the answer to.
    second.arena.reset();
    second.add(
        &Request {
            readable: vec![0; 16],
            writable: 0,
        },
        &Framing::joined(),
    );
    second.publish();
    assert_eq!(second.next().len, 0);

    let [first, second] = [0, 1].map(|index| vmm.plane.queue_counters(index).unwrap());
    let counts = &first.requests;
    assert_eq!(
        (counts.reads, counts.writes, counts.flushes, counts.discards),
        (1, 2, 3, 4)
    );
    assert_eq!((counts.bytes_read, counts.bytes_written), (4096, 16384));
    assert_eq!(
        (counts.refused, counts.failed, counts.unsupported),
        (0, 0, 0)
    );
    let counts = &second.requests;
    assert_eq!(
        (
            counts.write_zeroes,
            counts.get_ids,
            counts.others,
            counts.reads,
            counts.discards
        ),
        (5, 6, 7, 8, 9)
    );
    assert_eq!((counts.bytes_read, counts.bytes_written), (0, 0));
    assert_eq!((counts.refused, counts.unsupported), (8, 16));
    assert_eq!((counts.bad_chains, counts.ring_faults), (1, 0));
    assert_eq!(vmm.plane.queue_counters(2).unwrap(), Default::default());
    assert_eq!(vmm.plane.queue_counters(4), None);

    // Whatever was tried has a latency, and what was answered on the spot has none.
    assert_eq!(first.read_latency.count(), 1);
    assert_eq!(first.write_latency.count(), 2);
    assert_eq!(first.other_latency.count(), 7);
    assert_eq!(second.read_latency.count(), 0);
    assert_eq!(second.other_latency.count(), 5);
    assert_eq!(first.read_latency.buckets[0], 0, "nothing takes no time");
}

#[test]
fn host_failures_are_told_from_refusals() {
    let scratch = Scratch::zeroed(Kind::Disk, 1 << 20);
    let mut vmm = Embedded::new(&scratch.device());
    let mut queue = vmm.queue(0, 16);
    scratch.truncate(0);
    times(&mut queue, 3, &Request::read(0, 4096), IOERR);
    let counts = vmm.plane.queue_counters(0).unwrap().requests;
    assert_eq!(
        (counts.failed, counts.refused, counts.bytes_read),
        (3, 0, 0)
    );
    let counts = vmm.plane.counters();
    assert_eq!(counts.failed_file_ended, 3);
    assert_eq!(
        counts.failed_no_space + counts.failed_storage + counts.failed_otherwise,
        0
    );
}

#[test]
fn counters_outlive_a_queues_runs_and_broken_rings_are_counted() {
    let mut vmm = Embedded::new(&on_threads(Backing::null(1 << 20), 1));
    let mut queue = vmm.queue(0, 16);
    times(&mut queue, 2, &Request::read(0, 512), OK);
    vmm.plane.stop_queue(0).unwrap();
    let mut queue = vmm.queue(0, 16);
    times(&mut queue, 2, &Request::read(0, 512), OK);
    queue.driver.write_avail_entry(2, 99);
    queue.driver.set_avail_idx(3);
    queue.kick.notify().unwrap();
    crate::support::eventually("the fault", || {
        vmm.plane.queue_counters(0).unwrap().requests.ring_faults == 1
    });
    assert_eq!(vmm.plane.queue_counters(0).unwrap().requests.reads, 4);
}

#[test]
fn latencies_that_are_switched_off_are_not_measured() {
    let options = DeviceOptions {
        latencies: false,
        ..options()
    };
    let device = Device::new(Backing::null(1 << 20), &options).unwrap();
    let mut vmm = Embedded::new(&device);
    let mut queue = vmm.queue(0, 16);
    times(&mut queue, 10, &Request::read(0, 512), OK);
    let counters = vmm.plane.queue_counters(0).unwrap();
    assert_eq!(counters.requests.reads, 10);
    assert_eq!(counters.read_latency.count(), 0);
}

#[test]
fn device_counts_over_all_that_have_run_it() {
    let scratch = Scratch::zeroed(Kind::Disk, 1 << 20);
    let device = on_threads(Backing::Image(scratch.image()), 2);
    for round in 1..=3 {
        let mut vmm = Embedded::new(&device);
        for index in 0..2 {
            let mut queue = vmm.queue_with(index, 16, BOTH);
            times(&mut queue, 2, &Request::write(0, &[1; 4096]), OK);
        }
        let counted = || {
            let queues = [0, 1].map(|index| device.queue_counters(index).unwrap().requests);
            (
                device.counters().requests,
                queues.map(|queue| (queue.writes, queue.bytes_written)),
            )
        };
        let expected = (4 * round, [(2 * round, 2 * 4096 * round); 2]);
        assert_eq!(counted(), expected, "while it runs");
        vmm.plane.stop().unwrap();
        assert_eq!(counted(), expected, "when it has ended");
    }
    assert!(device.queue_counters(device.num_queues()).is_none());
    let by_name = device
        .counters()
        .iter()
        .find(|(name, _)| *name == "requests");
    assert_eq!(by_name, Some(("requests", 12)));
}
