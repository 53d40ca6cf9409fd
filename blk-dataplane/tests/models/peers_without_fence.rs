//! Without the fences between a desk and its sleeper.

#[path = "../../src/data_thread/peers.rs"]
mod peers;
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    pub(crate) use std::sync::Arc;

    pub(crate) fn fence(_: Ordering) {}
}

crate::models!(peers);

#[test]
#[should_panic = "deadlock"]
fn lost_wake_is_found() {
    one_writer(false);
}

#[test]
#[should_panic = "deadlock"]
fn lost_wake_between_two_that_flush_is_found() {
    both_flush();
}

#[test]
#[should_panic = "deadlock"]
fn wait_for_one_that_has_gone_is_found() {
    one_writer(true);
}
