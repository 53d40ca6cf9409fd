//! What the device has done, countable from any thread while it runs.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Counters that a data thread alone writes.
        #[derive(Debug, Default)]
        pub(crate) struct Counters {
            $(pub(crate) $name: Counter,)*
        }

        /// A reading of a device's counters. Each is exact; together they are not one instant.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct CounterSnapshot {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl CounterSnapshot {
            pub(crate) fn plus(&self, other: &Self) -> Self {
                Self { $($name: self.$name.wrapping_add(other.$name),)* }
            }
        }

        impl Counters {
            pub(crate) fn snapshot(&self) -> CounterSnapshot {
                CounterSnapshot { $($name: self.$name.get(),)* }
            }
        }
    };
}

counters! {
    /// Requests taken off the rings, malformed chains included.
    requests,
    /// Requests that ended with `VIRTIO_BLK_S_IOERR`.
    io_errors,
    /// Requests that ended with `VIRTIO_BLK_S_UNSUPP`.
    unsupported,
    /// Chains without a status byte to answer in; returned with used length 0. The guest's fault.
    bad_chains,
    /// Rings that lost their integrity and were stopped. The guest's fault.
    ring_faults,
    /// Status bytes that could not be written because the memory has gone.
    lost_statuses,
    /// Requests copied through an aligned buffer for direct I/O.
    bounced,
    /// Operations handed to the kernel (merged requests count once).
    operations,
    /// Requests that travelled in an operation together with another one.
    merged,
    /// `fdatasync` operations; several flushes may share one.
    syncs,
    /// Interrupts sent to the guest.
    notifications,
    /// Times the data thread went to sleep.
    sleeps,
    /// Times it looked for work before sleeping, and work came: a sleep and a wake were saved.
    polls_paid,
    /// Times it looked in vain, and then slept.
    polls_in_vain,
}

/// A counter with one writer. Plain load and store: a locked add would cost more than the request's
/// whole bookkeeping, and with a single writer nothing is lost.
#[derive(Debug, Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, n: u64) {
        self.0.store(
            self.0.load(Ordering::Relaxed).wrapping_add(n),
            Ordering::Relaxed,
        );
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
