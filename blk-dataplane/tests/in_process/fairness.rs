//! One queue must not take the device from another, nor from control.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use blk_dataplane::{
    Backing, Device, DeviceError, DeviceOptions, Notifier, POLL_MAX_LIMIT, QueueSetup,
    ThreadOptions,
};

use vring::driver::{F_INDIRECT, F_NEXT, F_WRITE};

use crate::support::embedded::{Embedded, setup, single};
use crate::support::queue::{EVENT_IDX, FEATURES, GuestQueue};
use crate::support::ram::HIGH;
use crate::support::request::{Framing, OK, Request, Table};
use crate::support::scratch::{Kind, Scratch, on_threads, options};
use crate::support::{DEADLINE, eventually};

/// A device whose queues all share one thread, and so have to share it fairly.
fn null_device(capacity: u64) -> Device {
    on_threads(Backing::null_zeroes(capacity), 1)
}

/// `VIRTQ_USED_F_NO_NOTIFY`
const NO_NOTIFY: u16 = 1;

/// A guest that answers each interrupt, on the data thread itself, by publishing again what has
/// completed: its ring is never empty when the device looks.
struct Refill {
    queue: Arc<Mutex<GuestQueue>>,
    served: Arc<AtomicU64>,
    /// Interrupts at which the device still asked for kicks.
    unsuppressed: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Notifier for Refill {
    fn notify(&self) -> std::io::Result<()> {
        let mut queue = self.queue.lock().unwrap();
        if queue.driver.used_flags() & NO_NOTIFY == 0 {
            self.unsuppressed.fetch_add(1, Ordering::Relaxed);
        }
        let mut count = 0;
        while queue.poll().is_some() {
            count += 1;
        }
        self.served.fetch_add(count, Ordering::Relaxed);
        if !self.stop.load(Ordering::Relaxed) {
            queue.arena.reset();
            for _ in 0..count {
                let request = Request::read(0, 512);
                queue.add(&request, &Framing::joined());
            }
            queue.driver.publish();
        }
        Ok(())
    }
}

struct Flood {
    queue: Arc<Mutex<GuestQueue>>,
    served: Arc<AtomicU64>,
    unsuppressed: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Starts queue `index` with `depth` requests that never end.
fn flood(vmm: &mut Embedded, index: u16, depth: usize) -> Flood {
    // Without EVENT_IDX, so that every batch is announced.
    let mut queue = vmm.prepare(index, 1024, FEATURES & !EVENT_IDX);
    for _ in 0..depth {
        queue.add(&Request::read(0, 512), &Framing::joined());
    }
    queue.driver.publish();
    let setup = setup(&queue, 0);
    let served = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let queue = Arc::new(Mutex::new(queue));
    let unsuppressed = Arc::new(AtomicU64::new(0));
    let call = Refill {
        queue: Arc::clone(&queue),
        served: Arc::clone(&served),
        unsuppressed: Arc::clone(&unsuppressed),
        stop: Arc::clone(&stop),
    };
    let setup = QueueSetup {
        call: Some(Box::new(call)),
        ..setup
    };
    vmm.plane.start_queue(index, setup).unwrap();
    Flood {
        queue,
        served,
        unsuppressed,
        stop,
    }
}

#[test]
fn z4_idle_queue_is_served_when_it_wakes_while_another_floods() {
    let mut vmm = Embedded::new(&null_device(1 << 20));
    let mut quiet = vmm.queue(1, 16);
    // It has been served and armed, and the device is asleep.
    assert_eq!(quiet.answer(&Request::read(0, 512)), (Some(OK), 513));
    let flood = flood(&mut vmm, 0, 64);
    eventually("the flood", || flood.served.load(Ordering::Relaxed) > 1000);
    for _ in 0..20 {
        assert_eq!(quiet.answer(&Request::read(0, 512)), (Some(OK), 513));
    }
}

#[test]
fn z4_queues_that_take_every_slot_leave_some_to_the_others() {
    // 2 x 400 outstanding against 256 requests in flight.
    let mut vmm = Embedded::new(&null_device(1 << 20));
    let floods = [flood(&mut vmm, 0, 400), flood(&mut vmm, 1, 400)];
    eventually("the floods", || {
        floods
            .iter()
            .all(|flood| flood.served.load(Ordering::Relaxed) > 1000)
    });
    for index in [2, 3] {
        let mut quiet = vmm.queue(index, 16);
        for _ in 0..20 {
            assert_eq!(quiet.answer(&Request::read(0, 512)), (Some(OK), 513));
        }
    }
}

#[test]
fn z4_share_of_a_queue_does_not_depend_on_its_number() {
    // As QEMU has it by default: more queues offered than set up.
    let threads = ThreadOptions {
        count: Some(1),
        ..ThreadOptions::default()
    };
    let options = DeviceOptions {
        threads,
        ..DeviceOptions::default()
    };
    let device = Device::new(Backing::null_zeroes(1 << 20), &options).unwrap();
    let mut vmm = Embedded::new(&device);
    vmm.plane.pause().unwrap();
    // Two of them fill what may be in flight, so that in every turn one comes too late.
    let floods: Vec<Flood> = (0..3).map(|index| flood(&mut vmm, index, 400)).collect();
    vmm.plane.resume().unwrap();
    let served = |flood: &Flood| flood.served.load(Ordering::Relaxed);
    eventually("the floods", || {
        floods.iter().map(served).sum::<u64>() > 20_000
    });
    vmm.plane.pause().unwrap();
    let shares: Vec<u64> = floods.iter().map(served).collect();
    // Counted in requests, not in time: between the luckiest and the unluckiest lie some batches.
    let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
    assert!(least * 2 > *most, "{shares:?}");
}

#[test]
fn z4_bounced_requests_of_one_queue_do_not_starve_those_of_another() {
    // Four lanes, and a ring full of requests that need one each.
    let scratch = Scratch::zeroed(Kind::Disk, 1 << 20);
    let mut vmm = Embedded::new(&on_threads(Backing::Image(scratch.image()), 1));
    let mut greedy = vmm.queue(0, 1024);
    let mut modest = vmm.queue(1, 16);
    let request = Request::read(0, 512);
    let framing = Framing::classic(&request).skew(1).table(Table::Indirect);
    for _ in 0..1024 {
        greedy.add(&request, &framing);
    }
    greedy.publish();
    assert_eq!(modest.run_framed(&request, &framing).status, Some(OK));
    assert!(greedy.finish().iter().all(|done| done.status == Some(OK)));
}

#[test]
fn a11_commands_are_carried_out_while_a_guest_never_stops_publishing() {
    let mut vmm = Embedded::new(&null_device(1 << 20));
    let flood = flood(&mut vmm, 0, 512);
    let mut last = 0;
    for round in 0..20 {
        // Each of these waits for the data thread; a thread that only fetched would hang them.
        vmm.plane.drain().unwrap();
        vmm.plane.enable_queue(0, false).unwrap();
        vmm.plane.drain().unwrap();
        let served = flood.served.load(Ordering::Relaxed);
        vmm.plane.drain().unwrap();
        assert_eq!(flood.served.load(Ordering::Relaxed), served);
        vmm.plane.enable_queue(0, true).unwrap();
        eventually("the flood to go on", || {
            flood.served.load(Ordering::Relaxed) > last
        });
        last = flood.served.load(Ordering::Relaxed);
        let queue = vmm.queue(1, 16);
        drop(queue);
        vmm.plane.stop_queue(1).unwrap();
        assert!(round < 20);
    }
    vmm.plane.stop_queue(0).unwrap();
}

#[test]
fn a11_device_stops_under_a_guest_that_never_stops_publishing() {
    let mut vmm = Embedded::new(&null_device(1 << 20));
    let flood = flood(&mut vmm, 0, 512);
    eventually("the flood", || flood.served.load(Ordering::Relaxed) > 1000);
    let (done, stopped) = std::sync::mpsc::channel();
    let plane = vmm.plane;
    std::thread::spawn(move || done.send(plane.stop().is_ok()));
    assert_eq!(stopped.recv_timeout(DEADLINE), Ok(true));
}

#[test]
fn z1_full_queues_of_large_requests_are_held_back_and_all_served() {
    let scratch = Scratch::zeroed(Kind::Disk, 4 << 20);
    let mut vmm = Embedded::new(&scratch.device());
    let mut queues: Vec<GuestQueue> = (0..4).map(|index| vmm.queue(index, 1024)).collect();
    for queue in &mut queues {
        // 1024 each, 4096 in all, against 256 in flight; every third must bounce.
        for number in 0..1024u64 {
            let request = Request::read(number % 1000, 8192);
            let framing = Framing::classic(&request)
                .table(Table::Indirect)
                .skew(u64::from(number % 3 == 0));
            queue.add(&request, &framing);
        }
        queue.publish();
    }
    for queue in &mut queues {
        let done = queue.finish();
        assert_eq!(done.len(), 1024);
        assert!(done.iter().all(|done| done.status == Some(OK)));
    }
}

#[test]
fn idle_device_sleeps() {
    let (vmm, mut queue) = single(&null_device(1 << 20));
    queue.answer(&Request::read(0, 512));
    // However long it takes to come to rest on a busy machine.
    eventually("the device to sleep and not to wake", || {
        let before = vmm.plane.counters().sleeps;
        std::thread::sleep(Duration::from_millis(50));
        before > 0 && vmm.plane.counters().sleeps == before
    });
}

fn polling_device(poll_max: Duration) -> Device {
    let options = DeviceOptions {
        poll_max,
        ..options()
    };
    Device::new(Backing::null_zeroes(1 << 20), &options).unwrap()
}

#[test]
fn polling_catches_a_guest_that_waits_for_each_request_without_a_sleep() {
    let (vmm, mut queue) = single(&polling_device(POLL_MAX_LIMIT));
    // A machine under load may take the processor away for longer than the limit, but not each time.
    eventually("20 requests without a sleep", || {
        let before = vmm.plane.counters();
        for _ in 0..20 {
            queue.arena.reset();
            queue.answer(&Request::read(0, 512));
        }
        let after = vmm.plane.counters();
        after.sleeps == before.sleeps && after.polls_paid - before.polls_paid >= 18
    });
}

#[test]
fn polling_that_does_not_pay_is_given_up_and_an_idle_device_sleeps() {
    let (vmm, mut queue) = single(&polling_device(Duration::from_micros(32)));
    for _ in 0..200 {
        let before = vmm.plane.counters().sleeps;
        queue.arena.reset();
        queue.answer(&Request::read(0, 512));
        eventually("a sleep", || vmm.plane.counters().sleeps > before);
        // Far beyond the limit.
        std::thread::sleep(Duration::from_millis(1));
    }
    let counters = vmm.plane.counters();
    // Until given up, and then one in 16, in 32, in 64, in 128 requests.
    assert!(counters.polls_in_vain <= 20, "{counters:?}");
    let before = vmm.plane.counters();
    std::thread::sleep(Duration::from_millis(50));
    let after = vmm.plane.counters();
    assert!(after.sleeps <= before.sleeps + 1, "it wakes for nothing");
    assert_eq!(after.polls_in_vain, before.polls_in_vain);
}

#[test]
fn with_polling_off_nothing_is_polled() {
    let (vmm, mut queue) = single(&polling_device(Duration::ZERO));
    for _ in 0..100 {
        queue.arena.reset();
        queue.answer(&Request::read(0, 512));
    }
    let counters = vmm.plane.counters();
    assert_eq!((counters.polls_paid, counters.polls_in_vain), (0, 0));
}

#[test]
fn polling_beyond_the_limit_is_refused() {
    let options = DeviceOptions {
        poll_max: POLL_MAX_LIMIT + Duration::from_micros(1),
        ..options()
    };
    let refused = Device::new(Backing::null_zeroes(1 << 20), &options);
    assert!(matches!(refused, Err(DeviceError::PollMax(_))));
}

#[test]
fn kicks_are_suppressed_while_work_keeps_coming_and_wanted_again_before_the_sleep() {
    let mut vmm = Embedded::new(&null_device(1 << 20));
    let flood = flood(&mut vmm, 0, 64);
    eventually("the flood", || flood.served.load(Ordering::Relaxed) > 1000);
    assert_eq!(flood.unsuppressed.load(Ordering::Relaxed), 0);
    flood.stop.store(true, Ordering::Relaxed);
    eventually("the device to want kicks", || {
        flood.queue.lock().unwrap().driver.used_flags() & NO_NOTIFY == 0
    });
}

/// A guest points long requests at the same few MiB: what they cost has nothing to do with its memory.
#[test]
fn z4_huge_requests_of_one_queue_come_one_a_turn() {
    const HUGE: u16 = 8;
    /// Parts of 16 MiB, all at the same place: 96 MiB a request, past the budget of 64.
    const PARTS: u16 = 6;
    let mut vmm = Embedded::new(&null_device(8 << 30));
    let mut flood = vmm.queue(0, 128);
    let mut other = vmm.queue(1, 16);
    vmm.plane.pause().unwrap();

    let header = flood.arena.take(48, 16, 0);
    flood.ram.write(header, &[0; 16]);
    let mut table = Vec::new();
    let mut entry = |addr: u64, len: u32, flags: u16| {
        let next = u16::try_from(table.len() / 16 + 1).unwrap();
        table.extend_from_slice(&addr.to_le_bytes());
        table.extend_from_slice(&len.to_le_bytes());
        table.extend_from_slice(&flags.to_le_bytes());
        table.extend_from_slice(&next.to_le_bytes());
    };
    entry(header, 16, F_NEXT);
    for _ in 0..PARTS {
        entry(HIGH + (32 << 20), 16 << 20, F_NEXT | F_WRITE);
    }
    entry(header + 32, 1, F_WRITE);
    let at = flood.arena.take(table.len(), 16, 0);
    flood.ram.write(at, &table);
    for head in 0..HUGE {
        let len = u32::try_from(table.len()).unwrap();
        flood.driver.write_desc(head, at, len, F_INDIRECT, 0);
        flood.driver.offer(head);
    }
    flood.publish();
    other.add(&Request::read(0, 512), &Framing::joined());
    other.publish();

    vmm.plane.resume().unwrap();
    eventually("the small request", || other.driver.used_idx() == 1);
    let served = flood.driver.used_idx();
    assert!(served < HUGE, "it waited for all {served} of them");
    eventually("the huge ones", || flood.driver.used_idx() == HUGE);
    assert_eq!(flood.driver.used_entry(0).1, (96 << 20) + 1);
}
