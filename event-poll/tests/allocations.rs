//! After start, nothing allocates.

// UNSAFETY: a counting global allocator.
#![expect(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ops::ControlFlow;
use std::time::Duration;

use event_poll::{BusyPoll, EventNotifier, EventPoll, PollSettings, Poller, Timer, Token};

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: passes everything on to the system's allocator; the counter is a constant-initialised
// thread local without a destructor, which allocates nothing itself.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promises are those of the system's allocator.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `alloc` above, with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Has work every other time.
struct Queue(bool);

impl Poller for Queue {
    fn poll(&mut self) -> bool {
        self.0 = !self.0;
        self.0
    }

    fn arm(&mut self) -> bool {
        true
    }

    fn disarm(&mut self) {}
}

#[test]
fn polling_and_timers_do_not_allocate() {
    let kick = EventNotifier::new().unwrap();
    let timer = Timer::new().unwrap();
    let mut poll = EventPoll::new(4).unwrap();
    poll.add_polled(&kick, Token(0)).unwrap();
    poll.add(&timer, Token(1)).unwrap();
    let mut busy = BusyPoll::new(PollSettings::default());
    let mut queue = Queue(false);

    let before = ALLOCATIONS.get();
    assert!(before > 0, "the counter counts");
    for _ in 0..100 {
        kick.notify().unwrap();
        timer.set_once(Duration::ZERO).unwrap();
        poll.run_polling(&mut busy, &mut [&mut queue], |event| match event.token {
            Token(0) => {
                kick.test_and_clear().unwrap();
                ControlFlow::Continue(())
            }
            _ => {
                timer.test_and_clear().unwrap();
                ControlFlow::Break(())
            }
        })
        .unwrap();
    }
    assert_eq!(ALLOCATIONS.get(), before);
}

#[test]
fn waiting_notifying_and_clearing_do_not_allocate() {
    let own = EventNotifier::new().unwrap();
    let received = EventNotifier::from_fd(own.try_clone().unwrap().into()).unwrap();
    let mut poll = EventPoll::new(4).unwrap();
    poll.add(&own, Token(0)).unwrap();
    poll.add(&received, Token(1)).unwrap();
    let stopper = poll.stopper();

    let before = ALLOCATIONS.get();
    assert!(before > 0, "the counter counts");
    let mut events = 0;
    for _ in 0..100 {
        own.notify().unwrap();
        received.notify().unwrap();
        stopper.wake();
        events += poll.wait(Some(Duration::from_secs(1))).unwrap().len();
        received.test_and_clear().unwrap();
        own.test_and_clear().unwrap();
        own.notify().unwrap();
        poll.run(|_| ControlFlow::Break(())).unwrap();
    }
    assert_eq!(events, 200);
    assert_eq!(ALLOCATIONS.get(), before);
}
