//! After start, nothing allocates.

// UNSAFETY: a counting global allocator.
#![expect(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use iosched::{Limits, Merger, Op, Request, split_completion};

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

const CAPACITY: u32 = 100;

/// Full batches that take each way through the merger: ascending, random, backwards, all in
/// conflict, equal reads, barriers, not mergeable.
fn request(kind: u64, tag: u32) -> Request {
    let position = u64::from(tag);
    let (op, offset, len) = match kind {
        0 => (Op::Read, position * 512, 512),
        1 => (
            Op::Write,
            position.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 1,
            512,
        ),
        2 => (Op::Write, 1_000_000 - position * 512, 512),
        3 => (Op::Write, position % 3 * 512, 1024),
        4 => (Op::Read, position % 7 * 512, 512),
        5 if tag.is_multiple_of(10) => (Op::Barrier, 0, 0),
        5 => (Op::Write, 1_000_000 - position * 512, 512),
        _ => (Op::Read, (100 - position) * 512, position % 2 * u64::MAX),
    };
    Request {
        op,
        offset,
        len,
        segments: 1,
        tag,
    }
}

#[test]
fn plugging_unplugging_and_splitting_do_not_allocate() {
    let limits = Limits {
        max_segments: 16,
        max_bytes: 1 << 20,
    };
    let mut merger = Merger::new(CAPACITY as usize, limits);

    let before = ALLOCATIONS.get();
    assert!(before > 0, "the counter counts");
    let mut parts = 0;
    for round in 0..50 {
        for kind in 0..7 {
            for tag in 0..CAPACITY {
                merger.plug(request(kind, tag)).unwrap();
            }
            assert!(merger.plug(request(kind, 0)).is_err());
            merger.unplug(|merged| parts += split_completion(merged.parts, round).count());
        }
    }
    let allocations = ALLOCATIONS.get() - before;
    assert_eq!(parts, 50 * 7 * CAPACITY as usize);
    assert_eq!(allocations, 0);
}
