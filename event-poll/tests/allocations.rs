//! After start, nothing allocates.

// UNSAFETY: a counting global allocator.
#![expect(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ops::ControlFlow;
use std::time::Duration;

use event_poll::{EventNotifier, EventPoll, Token};

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
