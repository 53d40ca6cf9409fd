//! What a device takes of memory: a fixed amount when it starts, and nothing more, whatever the guest asks for.
//! On its own: the allocator is the whole process's, and so is its resident memory.

// UNSAFETY: an allocator is an unsafe trait; this one passes everything on.
#![expect(unsafe_code)]

#[expect(dead_code, reason = "what only the other tests need")]
mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use blk_dataplane::{Backing, DataPlane, Notifier, QueueSetup};
use event_poll::EventNotifier;
use vm_memory::GuestAddress;
use vring::Segment;

use support::embedded::setup;
use support::queue::{FEATURES, GuestQueue, RING_PACKED};
use support::ram::{GuestRam, SEAM};
use support::request::{IN, OK, OUT, POISON, Request};
use support::scratch::{Kind, Scratch, on_threads};

/// What the README promises, in bytes.
const PER_THREAD: usize = 4 << 20;
/// Of a queue with a ring of 1024.
const PER_QUEUE: usize = 128 << 10;

const THREADS: u16 = 4;
const QUEUES: u16 = 4;
const RING_SIZE: u32 = 1024;

/// Allocations on the data threads.
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// Bytes allocated now, by the whole process.
static LIVE: AtomicUsize = AtomicUsize::new(0);

/// The most there were.
static PEAK: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static WATCHED: Cell<bool> = const { Cell::new(false) };
}

struct Counting;

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if WATCHED.get() {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if WATCHED.get() {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: as the caller promises. Not by way of `alloc`, which would touch every page.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// An interrupt, after which the data thread that has sent it is a watched one.
struct Watch(EventNotifier);

impl Notifier for Watch {
    fn notify(&self) -> std::io::Result<()> {
        WATCHED.set(true);
        self.0.notify()
    }
}

/// Anonymous memory of this process in RAM, in bytes: not the guest's, which is shared.
fn resident() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .expect("Linux 4.5 tells");
    let kib: usize = line.trim().trim_end_matches(" kB").parse().unwrap();
    kib << 10
}

/// Buffers for requests of `count` segments of `len` bytes each: the same guest memory over and over.
struct Largest {
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    table: GuestAddress,
    status: GuestAddress,
    used_len: u32,
}

impl Largest {
    fn new(queue: &mut GuestQueue, kind: u32, count: usize, len: u32) -> Self {
        queue.arena.reset();
        let at = queue.arena.take(16, 16, 0);
        queue
            .ram
            .write(at, &Request::new(kind, 0, &[], 0).readable[..16]);
        let segment = |at, len| Segment {
            addr: GuestAddress(at),
            len,
        };
        let status = queue.arena.take(64, 64, 0);
        let data = vec![segment(SEAM, len); count];
        let (mut readable, mut writable) = (vec![segment(at, 16)], Vec::new());
        let used_len = if kind == IN {
            writable.extend(data);
            u32::try_from(count).unwrap() * len + 1
        } else {
            readable.extend(data);
            1
        };
        writable.push(segment(status, 1));
        Self {
            table: GuestAddress(queue.arena.take(16 * (count + 2), 16, 0)),
            readable,
            writable,
            status: GuestAddress(status),
            used_len,
        }
    }

    /// Fills the ring with `most` of them, or to its last entry. Returns how many there are.
    fn fill(&self, queue: &mut GuestQueue, most: usize) -> usize {
        queue.ram.write(self.status.0, &[POISON]);
        let mut filled = 0;
        while filled < most && queue.driver.free() > 0 {
            queue
                .driver
                .add_indirect(self.table, &self.readable, &self.writable);
            filled += 1;
        }
        queue.publish();
        filled
    }

    /// Waits for `filled` answers.
    fn finish(&self, queue: &mut GuestQueue, filled: usize) {
        for _ in 0..filled {
            let mut used = queue.driver.poll_used();
            support::eventually("an answer", || {
                used = used.or_else(|| queue.driver.poll_used());
                used.is_some()
            });
            assert_eq!(used.unwrap().len, self.used_len);
        }
        assert_eq!(queue.ram.read(self.status.0, 1), [OK]);
    }
}

/// Type, number of segments, length of each, and how many such requests.
type Shape = (u32, usize, u32, usize);

#[test]
fn z1_z2_full_queues_of_the_largest_requests_take_no_more_memory_than_the_device_at_its_start() {
    let _watchdog = support::Watchdog::start();
    let scratch = Scratch::zeroed(Kind::Shm, 64 << 20);
    // Writes to nothing are not looked at: rings full of 4032 MiB each. What is copied, bounced or read must be
    // less, for the test to end; each fills its thread's 64 MiB.
    let null: [Shape; 4] = [
        (OUT, 252, 16 << 20, usize::MAX),
        (OUT, 1000, 16 << 10, 10),
        (IN, 252, 4 << 10, 200),
        (IN, 1000, 16 << 10, 10),
    ];
    let image: [Shape; 4] = [
        (OUT, 252, 256 << 10, 3),
        (OUT, 1000, 64 << 10, 2),
        (IN, 252, 256 << 10, 3),
        (IN, 1000, 64 << 10, 2),
    ];
    for (backing, shapes) in [
        (Backing::null_zeroes(1 << 40), null),
        (Backing::Image(scratch.image()), image),
    ] {
        let device = on_threads(backing, THREADS);
        // What the test itself takes comes first.
        let ram = GuestRam::new();
        let mut queues: Vec<GuestQueue> = (0..QUEUES)
            .map(|index| {
                let format = if index % 2 == 0 { 0 } else { RING_PACKED };
                GuestQueue::new(&ram, index, RING_SIZE, FEATURES | format)
            })
            .collect();
        let setups = queues.iter().map(|queue| QueueSetup {
            call: Some(Box::new(Watch(queue.call.try_clone().unwrap()))),
            ..setup(queue, queue.fresh())
        });
        let setups: Vec<QueueSetup> = setups.collect();
        let (live, rss) = (LIVE.load(Ordering::Relaxed), resident());
        PEAK.store(live, Ordering::Relaxed);

        let mut plane = DataPlane::start(&device, Arc::clone(&ram.memory)).unwrap();
        for (index, setup) in (0..).zip(setups) {
            plane.start_queue(index, setup).unwrap();
        }
        let bound = usize::from(THREADS) * PER_THREAD + usize::from(QUEUES) * PER_QUEUE;
        let taken = PEAK.load(Ordering::Relaxed) - live;
        println!("{taken} bytes allocated at the start, of {bound}");
        assert!(taken <= bound);

        let mut most = 0;
        for round in 0..2 {
            for (kind, count, len, number) in shapes {
                let before = plane.counters();
                let mut asked = Vec::new();
                for queue in &mut queues {
                    let largest = Largest::new(queue, kind, count, len);
                    let filled = largest.fill(queue, number);
                    asked.push((largest, filled));
                }
                most = most.max(resident().saturating_sub(rss));
                for (queue, (largest, filled)) in queues.iter_mut().zip(&asked) {
                    largest.finish(queue, *filled);
                }
                most = most.max(resident().saturating_sub(rss));
                let after = plane.counters();
                let all: usize = asked.iter().map(|(_, filled)| filled).sum();
                assert_eq!(after.requests - before.requests, all as u64);
                assert_eq!(after.bounced > before.bounced, count > 252);
            }
            // What is made once, at the first sleep or so, has been made.
            if round == 0 {
                ALLOCATIONS.store(0, Ordering::Relaxed);
            }
        }
        assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), 0);
        println!("{most} bytes resident under load");
        assert!(most <= bound);
        plane.stop().unwrap();
    }
}
