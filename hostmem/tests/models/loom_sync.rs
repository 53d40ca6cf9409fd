//! What `src/sync.rs` has, of loom.

pub(crate) use loom::cell::UnsafeCell;
pub(crate) use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
pub(crate) use loom::sync::{Arc, Mutex};
pub(crate) use loom::thread::yield_now;
pub(crate) use std::sync::PoisonError;

/// The kernel's barrier is one that every thread passes through while `heavy` lasts. Loom has none of
/// that kind; a fence on both sides is what it amounts to.
pub(crate) fn light() {
    fence(Ordering::SeqCst);
}

pub(crate) fn heavy() -> std::io::Result<()> {
    fence(Ordering::SeqCst);
    Ok(())
}
