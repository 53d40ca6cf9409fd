//! What a guest cannot make a running device do: allocate, or fill the log. On its own: the allocator and the
//! subscriber are the whole process's.

// UNSAFETY: an allocator is an unsafe trait; this one passes everything on.
#![expect(unsafe_code)]

#[expect(dead_code, reason = "what only the other tests need")]
mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use blk_dataplane::{Backing, Notifier, QueueSetup};
use event_poll::EventNotifier;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use support::embedded::{Embedded, setup, single};
use support::queue::{BLK_DISCARD, BLK_WRITE_ZEROES, CONFIG_WCE, FEATURES, GuestQueue};
use support::request::{DISCARD, Framing, Request, WRITE_ZEROES};
use support::scratch::{KINDS, Scratch, null_device, on_threads};

/// Allocations on threads that are watched.
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

/// Whether interrupts allocate: the test's own test.
static ALLOCATE: AtomicBool = AtomicBool::new(false);

thread_local! {
    static WATCHED: Cell<bool> = const { Cell::new(false) };
}

struct Watching;

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if WATCHED.get() {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

/// An interrupt, before which the data thread that sends it becomes a watched one.
struct Watch(EventNotifier);

impl Notifier for Watch {
    fn notify(&self) -> std::io::Result<()> {
        WATCHED.set(true);
        if ALLOCATE.load(Ordering::Relaxed) {
            std::hint::black_box(Box::new(1));
        }
        self.0.notify()
    }
}

/// As many requests as the ring takes, of every type and size, aligned or not, sound or not.
fn fill(queue: &mut GuestQueue, round: u64) {
    queue.arena.reset();
    let data = support::pattern(round + 1, 3 * 4096);
    for number in 0..20u64 {
        let sector = number * 32;
        for request in [
            Request::read(sector, 4096),
            Request::write(sector, &data),
            Request::flush(),
            Request::get_id(20),
            Request::ranges(DISCARD, &[(sector, 8, 0), (sector + 16, 8, 0)]),
            Request::ranges(WRITE_ZEROES, &[(sector, 8, 1)]),
            // Wrong in one way or another.
            Request::read(1 << 50, 512),
            Request::new(99, 0, &[], 8),
            Request::ranges(DISCARD, &[(0, 8, 0); 17]),
        ] {
            let framing = Framing::classic(&request).skew(number % 3);
            queue.add(&request, &framing);
        }
    }
    // Through a bounce buffer in rounds.
    let large = Request::read(0, 600 * 1024);
    queue.add(&large, &Framing::classic(&large).skew(1));
}

#[test]
fn z1_z2_no_request_makes_a_running_device_allocate() {
    for kind in KINDS {
        let scratch = Scratch::zeroed(kind, 1 << 20);
        let mut vmm = Embedded::new(&on_threads(Backing::Image(scratch.image()), 2));
        let features = FEATURES | BLK_DISCARD | BLK_WRITE_ZEROES | CONFIG_WCE;
        let mut queues = [0, 1].map(|index| {
            let queue = vmm.prepare(index, 1024, features);
            let setup = QueueSetup {
                call: Some(Box::new(Watch(queue.call.try_clone().unwrap()))),
                ..setup(&queue, 0)
            };
            vmm.plane.start_queue(index, setup).unwrap();
            queue
        });
        // The first round may make what is made once, such as the I/O queue's worker threads.
        for round in 0..6u64 {
            if round == 3 {
                vmm.plane.write_config(32, &[0]).unwrap();
            }
            if round == 1 {
                ALLOCATIONS.store(0, Ordering::Relaxed);
            }
            for queue in &mut queues {
                fill(queue, round);
                queue.publish();
            }
            for queue in &mut queues {
                queue.finish();
            }
        }
        assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), 0, "{kind:?}");
        ALLOCATE.store(true, Ordering::Relaxed);
        // Not every answer has an interrupt: the guest asks for one only if it must wait.
        support::eventually("an allocation to be seen", || {
            for queue in &mut queues {
                queue.arena.reset();
                queue.answer(&Request::read(0, 512));
            }
            ALLOCATIONS.load(Ordering::Relaxed) != 0
        });
        ALLOCATE.store(false, Ordering::Relaxed);
    }
}

/// Counts what an operator sees unless he asks for more.
struct Log(Arc<AtomicU64>);

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::INFO
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[test]
fn z3_malformed_requests_and_rings_do_not_fill_the_log() {
    let lines = Arc::new(AtomicU64::new(0));
    tracing::subscriber::set_global_default(Log(Arc::clone(&lines))).unwrap();
    let (vmm, mut queue) = single(&null_device(1 << 20));
    for _ in 0..100 {
        queue.arena.reset();
        for _ in 0..10 {
            queue.add(&Request::read(1 << 50, 512), &Framing::joined());
            queue.add(&Request::new(99, 0, &[], 0), &Framing::joined());
            let chain = Request {
                readable: vec![0; 16],
                writable: 0,
            };
            queue.add(&chain, &Framing::joined());
        }
        queue.publish();
        queue.finish();
    }
    let counters = vmm.plane.counters();
    assert_eq!(
        (
            counters.io_errors,
            counters.unsupported,
            counters.bad_chains
        ),
        (1000, 1000, 1000)
    );
    assert_eq!(lines.load(Ordering::Relaxed), 0);
    // A broken ring is worth a line, and one only.
    // 3000 were published.
    queue.driver.set_avail_idx(8000);
    for _ in 0..1000 {
        queue.kick.notify().unwrap();
    }
    support::eventually("the fault", || vmm.plane.counters().ring_faults == 1);
    vmm.plane.stop().unwrap();
    assert_eq!(lines.load(Ordering::Relaxed), 1);
}
