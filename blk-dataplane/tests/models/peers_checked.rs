//! As it is.

#[path = "../../src/data_thread/peers.rs"]
mod peers;
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
    pub(crate) use std::sync::Arc;
}

crate::models!(peers);

#[test]
fn i10_flush_comes_after_the_writes_of_other_threads_and_no_wake_is_lost() {
    one_writer(false);
}

#[test]
fn i10_flush_does_not_wait_for_a_thread_that_has_gone() {
    one_writer(true);
}

#[test]
fn i10_flushes_on_two_threads_do_not_wait_for_one_another() {
    both_flush();
}
