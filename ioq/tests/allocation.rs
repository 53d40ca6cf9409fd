//! After the first operations, a queue allocates nothing.

// UNSAFETY: a global allocator that counts; raw reads into one buffer.
#![expect(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::Write;
use std::sync::Arc;

use ioq::{AlignedBuf, Config, Durability, Engine, IoBuf, IoQueue};

struct Counting;

thread_local! {
    // Of this thread only: the test harness has threads of its own.
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

fn count() {
    ALLOCATIONS.with(|allocations| allocations.set(allocations.get() + 1));
}

// SAFETY: the system's allocator, with a counter that does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller keeps the contract.
        unsafe { System.realloc(ptr, layout, size) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations() -> usize {
    ALLOCATIONS.with(Cell::get)
}

/// Every sort of operation in every slot, an error among them, then all reaped.
fn round(queue: &mut IoQueue<usize>, segments: &[libc::iovec], file_len: u64) {
    for i in 0..queue.capacity() {
        match i % 5 {
            // SAFETY: the segments' memory outlives the queue.
            0 => unsafe { queue.queue_readv(0, segments.iter().copied(), i) }.unwrap(),
            1 => {
                let segments = segments.iter().copied();
                // SAFETY: as above.
                unsafe { queue.queue_writev(0, segments, Durability::WriteBack, i) }.unwrap();
            }
            // SAFETY: as above.
            2 => unsafe { queue.queue_readv(file_len - 1, segments.iter().copied(), i) }.unwrap(),
            3 => queue.queue_discard(4096, 512, i).unwrap(),
            _ => queue.queue_fdatasync(i).unwrap(),
        }
    }
    assert!(queue.queue_fdatasync(0).is_err());
    queue.disarm_completion_fd();
    queue.submit();
    while !queue.is_idle() {
        queue.clear_completion_fd();
        let _ = queue.arm_completion_fd();
        queue.reap(|_, _| {});
    }
}

fn assert_no_allocation(mut queue: IoQueue<usize>) {
    const FILE_LEN: u64 = 8192;
    let mut buf = AlignedBuf::new(4096, 4096).unwrap();
    let whole = buf.segment();
    // Two that do not touch: a vector.
    let segments = [
        libc::iovec {
            iov_base: whole.iov_base,
            iov_len: 1024,
        },
        libc::iovec {
            iov_base: whole.iov_base.wrapping_byte_add(2048),
            iov_len: 1024,
        },
    ];
    // The first starts the worker threads.
    round(&mut queue, &segments, FILE_LEN);
    let before = allocations();
    for _ in 0..200 {
        round(&mut queue, &segments, FILE_LEN);
    }
    assert_eq!(allocations(), before);
    drop(queue);
}

#[test]
fn counter_counts() {
    let before = allocations();
    drop(std::hint::black_box(vec![1u8]));
    assert_eq!(allocations(), before + 1);
}

#[test]
fn neither_engine_allocates_after_its_start() {
    for engine in [Engine::LinuxAio, Engine::IoUring] {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 8192]).unwrap();
        let config = Config {
            depth: 33,
            max_segments: 2,
        };
        assert_no_allocation(IoQueue::open(Arc::new(file), engine, &config).unwrap());
    }
}

#[test]
fn null_allocates_nothing_after_its_start() {
    assert_no_allocation(
        IoQueue::null(&Config {
            depth: 33,
            max_segments: 2,
        })
        .unwrap(),
    );
}
