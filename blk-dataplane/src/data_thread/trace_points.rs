//! The four trace points of the original data plane, through `tracing` at level TRACE. While nobody listens
//! each is a load and a branch.

use vring::{Chain, Head};

use super::peers::Peer;

/// Where they are found by a filter.
const TARGET: &str = "blk_dataplane::trace";

/// A data thread serves from here on.
pub(super) fn start(thread: Peer) {
    tracing::trace!(name: "start", target: TARGET, thread, "start");
}

/// And no longer.
pub(super) fn stop(thread: Peer) {
    tracing::trace!(name: "stop", target: TARGET, thread, "stop");
}

/// A request was taken off the ring.
#[inline]
pub(super) fn process_request(queue: u16, head: &Head, chain: &Chain) {
    tracing::trace!(
        name: "process_request",
        target: TARGET,
        queue,
        head = head.index(),
        out_num = chain.readable().len(),
        in_num = chain.writable().len(),
        "process_request"
    );
}

/// A request goes back to the ring.
#[inline]
pub(super) fn complete_request(queue: u16, head: &Head, status: u8, used_len: u32) {
    tracing::trace!(
        name: "complete_request",
        target: TARGET,
        queue,
        head = head.index(),
        status,
        used_len,
        "complete_request"
    );
}
