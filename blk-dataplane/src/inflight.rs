//! In-flight tracking: a record of the requests taken from a ring and not given back, in memory that
//! outlives this process, so that its successor serves each of them once more (vhost-user, "Inflight I/O
//! tracking").
//!
//! ```text
//!             ring, in guest memory            queue region, shared with the front-end
//!   pop       position moves (here only)  ───> entry: counter, then inflight = 1
//!   push      used element, not visible        (nothing)
//!   publish                                    the batch: a list, or the free list, and its end
//!             index, or first flags: visible
//!                                              inflight = 0 for the batch, then the index is repeated
//!
//!   SIGKILL at any point; the successor compares the index here with the one there: a batch that the
//!   driver can see is over, whatever its entries say, and one that it cannot see has not begun.
//! ```
//!
//! A process that is killed has carried out every instruction before some point and none after, so the
//! *order* of the stores above is all that recovery depends on; each store whose place matters is a release
//! store, which the compiler does not move and costs nothing on x86.
//!
//! The region is shared with the front-end, so nothing in it is believed: while a queue runs it is written
//! and never read, and a successor reads each field once, bounds it, and at worst serves a request that the
//! front-end has made up (hostile-inputs K1-K3).
//!
//! # Cost
//!
//! Two stores per request popped from a split ring, two per request published, and two per batch; a packed
//! ring's record copies each descriptor besides, two stores for each. No lock, no allocation, no system call.

mod packed;
mod region;
mod split;
#[cfg(test)]
mod tests;
mod tracked;
mod words;

use vring::{Head, PackedQueue, Queue, RingBase, RingDescriptor};

pub(crate) use self::tracked::{TrackedError, TrackedQueue};

// The public interface is:
pub use self::region::{InflightError, InflightQueue, InflightRegion};

/// Version of the layout, in every queue region that is initialised.
const VERSION: u16 = 1;

/// A chain that a predecessor had popped and not given back.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Left {
    Packed {
        /// Its first entry in the queue region.
        entry: u16,
        descriptors: Box<[RingDescriptor]>,
    },
    Split(u16),
}

/// What a record says of a ring that is to be started.
#[derive(Debug)]
struct Recovered {
    tracker: Tracker,
    /// Where the ring goes on. `None`: the record says nothing of it, so where the front-end says.
    base: Option<RingBase>,
    /// In the order they were popped in.
    left: Vec<Left>,
}

/// The record of one queue while it runs.
#[derive(Debug)]
enum Tracker {
    Packed(packed::PackedTracker),
    Split(split::SplitTracker),
}

impl Tracker {
    /// The latest chain popped is in flight.
    #[inline]
    fn popped<M: vm_memory::GuestMemoryBackend>(&mut self, queue: &Queue<M>, head: &Head) {
        match (self, queue) {
            (Self::Packed(tracker), Queue::Packed(queue)) => {
                tracker.popped(head, |record| PackedQueue::describe_latest(queue, record));
            }
            (Self::Split(tracker), _) => tracker.popped(head),
            (Self::Packed(_), Queue::Split(_)) => {
                debug_assert!(false, "a record of another format")
            }
        }
    }

    /// The latest pop has been undone.
    #[cold]
    fn unpopped(&mut self, head: u16) {
        match self {
            Self::Packed(tracker) => tracker.unpopped(head),
            Self::Split(tracker) => tracker.forget(head),
        }
    }

    /// A chain that was left over is in flight as `head` now.
    fn reclaimed(&mut self, left: &Left, head: &Head) {
        if let (Self::Packed(tracker), Left::Packed { entry, .. }) = (self, left) {
            tracker.reclaimed(*entry, head);
        }
    }

    /// A chain that was left over cannot be.
    fn forget(&mut self, left: &Left) {
        match (self, left) {
            (Self::Packed(tracker), Left::Packed { entry, .. }) => tracker.forget(*entry),
            (Self::Split(tracker), Left::Split(head)) => tracker.forget(*head),
            _ => {}
        }
    }

    /// A chain is to be given back with the next batch.
    #[inline]
    fn pushed(&mut self, head: u16) {
        match self {
            Self::Packed(tracker) => tracker.pushed(head),
            Self::Split(tracker) => tracker.pushed(head),
        }
    }

    /// Whether nothing can be pushed until something is published.
    #[inline]
    fn is_full(&self) -> bool {
        match self {
            Self::Packed(tracker) => tracker.is_full(),
            Self::Split(tracker) => tracker.is_full(),
        }
    }

    /// The batch is about to become visible to the driver.
    #[inline]
    fn before_publish(&mut self) {
        match self {
            Self::Packed(tracker) => tracker.before_publish(),
            Self::Split(tracker) => tracker.before_publish(),
        }
    }

    /// `count` chains of the batch have become visible: all of them, or none if the ring is lost.
    #[inline]
    fn published(&mut self, count: usize) {
        match self {
            Self::Packed(tracker) => tracker.published(count),
            Self::Split(tracker) => tracker.published(count),
        }
    }
}
