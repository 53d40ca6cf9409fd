//! Several queues on several data threads.

use std::sync::{Arc, Mutex};

use blk_dataplane::{
    Backing, DataPlane, Device, DeviceError, DeviceOptions, MAX_THREADS, Notifier, QueueSetup,
    StartError, ThreadOptions,
};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

use crate::support::embedded::{Embedded, setup};
use crate::support::queue::{FEATURES, GuestQueue};
use crate::support::ram::GuestRam;
use crate::support::request::{Framing, OK, Request};
use crate::support::scratch::{KINDS, Kind, Scratch, on_threads, options};
use crate::support::{eventually, pattern};

const BLOCK: usize = 4096;

fn with_threads(threads: ThreadOptions) -> Result<Device, DeviceError> {
    let options = DeviceOptions {
        threads,
        ..options()
    };
    Device::new(Backing::null(1 << 20), &options)
}

#[test]
fn every_queue_is_served_however_queues_and_threads_are_paired() {
    for kind in KINDS {
        for threads in 1..=4 {
            let scratch = Scratch::zeroed(kind, 4 * 40 * BLOCK);
            let device = on_threads(Backing::Image(scratch.image()), threads);
            let mut vmm = Embedded::new(&device);
            let mut queues: Vec<GuestQueue> = (0..4).map(|index| vmm.queue(index, 128)).collect();
            let content = pattern(u64::from(threads), 4 * 40 * BLOCK);
            for (number, block) in content.chunks(BLOCK).enumerate() {
                // Neighbours on the disk come by different queues, at once.
                let request = Request::write((number * BLOCK / 512).try_into().unwrap(), block);
                let framing = Framing::classic(&request);
                queues[number % 4].add(&request, &framing);
            }
            queues.iter_mut().for_each(|queue| queue.publish());
            for queue in &mut queues {
                let done = queue.finish();
                assert_eq!(done.len(), 40);
                assert!(done.iter().all(|done| done.status == Some(OK)));
            }
            assert!(scratch.content() == content);
            assert_eq!(vmm.plane.counters().requests, 160);
        }
    }
}

#[test]
fn i10_writes_and_flushes_on_four_threads_at_once_all_complete() {
    let scratch = Scratch::zeroed(Kind::Disk, 4 * 64 * BLOCK);
    let device = on_threads(Backing::Image(scratch.image()), 4);
    let mut vmm = Embedded::new(&device);
    let queues: Vec<GuestQueue> = (0..4).map(|index| vmm.queue(index, 128)).collect();
    std::thread::scope(|scope| {
        for (number, mut queue) in queues.into_iter().enumerate() {
            scope.spawn(move || {
                let data = pattern(number as u64 + 1, BLOCK);
                for round in 0..200usize {
                    queue.arena.reset();
                    // Now and then nothing but flushes, so that threads sleep while others ask.
                    for write in 0..round % 5 {
                        let block = number * 64 + (round + write) % 64;
                        let sector = (block * BLOCK / 512).try_into().unwrap();
                        let request = Request::write(sector, &data);
                        queue.add(&request, &Framing::classic(&request));
                    }
                    let flush = queue.add(&Request::flush(), &Framing::joined());
                    queue.publish();
                    let done = queue.finish();
                    assert!(done.iter().all(|done| done.status == Some(OK)));
                    assert_eq!(done.last().map(|done| done.head), Some(flush));
                }
            });
        }
    });
    vmm.plane.stop().unwrap();
}

#[test]
fn pause_holds_on_every_thread_and_no_request_is_lost() {
    let mut vmm = Embedded::new(&on_threads(Backing::null(1 << 20), 4));
    let mut queues: Vec<GuestQueue> = (0..3).map(|index| vmm.queue(index, 16)).collect();
    for round in 0..50 {
        vmm.plane.pause().unwrap();
        let before = vmm.plane.counters().requests;
        for queue in &mut queues {
            queue.arena.reset();
            queue.add(&Request::read(0, 512), &Framing::joined());
            queue.publish();
        }
        if round == 25 {
            // On a thread that starts now.
            let mut late = vmm.prepare(3, 16, FEATURES);
            late.add(&Request::read(0, 512), &Framing::joined());
            late.publish();
            vmm.start(&late, 0);
            queues.push(late);
        }
        // A drain must not end the pause.
        vmm.plane.drain().unwrap();
        assert_eq!(vmm.plane.counters().requests, before);
        assert!(queues.iter_mut().all(|queue| queue.poll().is_none()));
        vmm.plane.resume().unwrap();
        for queue in &mut queues {
            let done = queue.finish();
            assert_eq!((done.len(), done[0].status), (1, Some(OK)));
        }
    }
    vmm.plane.stop().unwrap();
}

#[test]
fn drain_waits_for_every_thread_and_goes_on() {
    let scratch = Scratch::zeroed(Kind::Disk, 1 << 20);
    let mut vmm = Embedded::new(&on_threads(Backing::Image(scratch.image()), 2));
    let mut queues = [vmm.queue(0, 128), vmm.queue(1, 128)];
    for round in 0..20u64 {
        let data = pattern(round + 1, BLOCK);
        for (number, queue) in queues.iter_mut().enumerate() {
            queue.arena.reset();
            for write in 0..30 {
                let sector = (number as u64 * 100 + write) * 8;
                let request = Request::write(sector, &data);
                queue.add(&request, &Framing::classic(&request));
            }
            queue.publish();
        }
        vmm.plane.drain().unwrap();
        for queue in &mut queues {
            assert!(queue.finish().iter().all(|done| done.status == Some(OK)));
        }
    }
}

/// Tells where the data thread may run that it is called on.
struct Where(Arc<Mutex<Option<CpuSet>>>);

impl Notifier for Where {
    fn notify(&self) -> std::io::Result<()> {
        *self.0.lock().unwrap() = Some(sched_getaffinity(Pid::from_raw(0))?);
        Ok(())
    }
}

#[test]
fn each_thread_runs_on_the_processor_it_is_bound_to() {
    let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
    let cpus: Vec<usize> = (0..CpuSet::count())
        .filter(|&cpu| allowed.is_set(cpu).unwrap())
        .collect();
    // As many as there may be, the last one first; fewer than threads on a small machine.
    let cpus: Vec<usize> = cpus.into_iter().rev().take(4).collect();
    let threads = ThreadOptions {
        count: Some(4),
        queues: vec![3, 2, 1, 0],
        cpus: cpus
            .iter()
            .map(|&cpu| u16::try_from(cpu).unwrap())
            .collect(),
    };
    let mut vmm = Embedded::new(&with_threads(threads).unwrap());
    for index in 0..4 {
        let mut queue = vmm.prepare(index, 16, FEATURES);
        let told = Arc::new(Mutex::new(None));
        let setup = QueueSetup {
            call: Some(Box::new(Where(Arc::clone(&told)))),
            ..setup(&queue, 0)
        };
        vmm.plane.start_queue(index, setup).unwrap();
        queue.add(&Request::read(0, 512), &Framing::joined());
        queue.publish();
        eventually("an interrupt", || told.lock().unwrap().is_some());
        let mut expected = CpuSet::new();
        let thread = 3 - usize::from(index);
        expected.set(cpus[thread % cpus.len()]).unwrap();
        assert_eq!(*told.lock().unwrap(), Some(expected));
    }
}

#[test]
fn processor_that_is_not_there_is_an_error_that_names_it() {
    let threads = ThreadOptions {
        cpus: vec![1023],
        ..ThreadOptions::default()
    };
    let device = with_threads(threads).unwrap();
    let ram = GuestRam::new();
    let refused = DataPlane::start(&device, Arc::clone(&ram.memory));
    match refused {
        Err(error @ StartError::Affinity { cpu: 1023, .. }) => {
            assert!(error.to_string().contains("CPU 1023"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn thread_choices_that_make_no_sense_are_refused() {
    let count = |count| ThreadOptions {
        count: Some(count),
        ..ThreadOptions::default()
    };
    for wrong in [0, 5, MAX_THREADS + 1] {
        let refused = with_threads(count(wrong));
        assert!(matches!(refused, Err(DeviceError::Threads { .. })));
    }
    let queues = |queues: &[u16]| ThreadOptions {
        queues: queues.to_vec(),
        ..count(2)
    };
    for wrong in [&[2][..], &[0, 1, 0, 7], &[0, 1, 0, 1, 0]] {
        let refused = with_threads(queues(wrong));
        assert!(matches!(refused, Err(DeviceError::QueueThread { .. })));
    }
    let cpus = ThreadOptions {
        cpus: vec![0, 1024],
        ..ThreadOptions::default()
    };
    assert!(matches!(with_threads(cpus), Err(DeviceError::Cpu(1024))));
}

#[test]
fn queues_are_dealt_out_in_turn_unless_the_caller_says_otherwise() {
    let of = |threads| {
        let device = with_threads(threads).unwrap();
        (0..4)
            .map(|queue| device.thread_of(queue).unwrap())
            .collect::<Vec<_>>()
    };
    let two = ThreadOptions {
        count: Some(2),
        ..ThreadOptions::default()
    };
    assert_eq!(of(two.clone()), [0, 1, 0, 1]);
    let chosen = ThreadOptions {
        queues: vec![1, 1, 1],
        ..two
    };
    assert_eq!(of(chosen), [1, 1, 1, 1]);
    let device = with_threads(ThreadOptions::default()).unwrap();
    let cpus = std::thread::available_parallelism().unwrap().get();
    assert_eq!(usize::from(device.num_threads()), cpus.min(4));
    assert_eq!(device.thread_of(4), None);
}

#[test]
fn b28_overlapping_writes_from_two_queues_end_as_one_or_the_other_sector_by_sector() {
    for (kind, threads) in [(Kind::Disk, 1), (Kind::Disk, 2), (Kind::Buffered, 2)] {
        let scratch = Scratch::zeroed(kind, 64 * BLOCK);
        let mut vmm = Embedded::new(&on_threads(Backing::Image(scratch.image()), threads));
        let mut queues = [0, 1].map(|index| vmm.queue(index, 128));
        for round in 0..30u8 {
            // Each block by one request of either queue, and beside its neighbours, with which it could be
            // merged; some requests cover two.
            for (queue, mark) in queues.iter_mut().zip([0, 100]) {
                queue.arena.reset();
                for block in 0..32u64 {
                    let blocks = if block % 5 == 4 { 2 } else { 1 };
                    let data = vec![mark + round; blocks * BLOCK];
                    let request = Request::write(block * 8, &data);
                    queue.add(&request, &Framing::classic(&request));
                }
                queue.publish();
            }
            for queue in &mut queues {
                let done = queue.finish();
                assert_eq!(done.len(), 32);
                assert!(done.iter().all(|done| done.status == Some(OK)));
            }
            for sector in scratch.content()[..32 * BLOCK].chunks(512) {
                // Nothing of an earlier round is left, and what a disk writes whole is one or the other.
                assert!([round, 100 + round].contains(&sector[0]));
                assert!(sector.iter().all(|&byte| byte == sector[0]));
            }
        }
    }
}
