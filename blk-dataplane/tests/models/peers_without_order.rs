//! With an answer, and a note, that may be seen before what they are about.

#[path = "../../src/data_thread/peers.rs"]
mod peers;
mod sync {
    pub(crate) use loom::sync::atomic::fence;
    pub(crate) use std::sync::Arc;

    /// Every order is the weakest.
    pub(crate) struct Ordering;

    #[expect(
        non_upper_case_globals,
        reason = "the names of the variants it stands for"
    )]
    impl Ordering {
        pub(crate) const Relaxed: loom::sync::atomic::Ordering =
            loom::sync::atomic::Ordering::Relaxed;
        pub(crate) const Acquire: loom::sync::atomic::Ordering = Self::Relaxed;
        pub(crate) const Release: loom::sync::atomic::Ordering = Self::Relaxed;
        pub(crate) const SeqCst: loom::sync::atomic::Ordering =
            loom::sync::atomic::Ordering::SeqCst;
    }
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU64};
}

crate::models!(peers);

#[test]
#[should_panic = "flushed before the write had completed"]
fn flush_before_the_write_is_found() {
    one_writer(false);
}

#[test]
#[should_panic = "assertion failed: completed"]
fn flush_before_the_write_of_one_that_flushes_too_is_found() {
    both_flush();
}
