//! What the device has done, countable from any thread while it runs.

use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_blk as spec;

use crate::request::VIRTIO_BLK_T_GET_LIFETIME;

macro_rules! counters {
    (
        $(#[$counters_doc:meta])* $counters:ident,
        $(#[$snapshot_doc:meta])* $snapshot:ident,
        $($(#[$doc:meta])* $name:ident,)*
    ) => {
        $(#[$counters_doc])*
        #[derive(Debug, Default)]
        pub(crate) struct $counters {
            $(pub(crate) $name: Counter,)*
        }

        $(#[$snapshot_doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct $snapshot {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl $counters {
            pub(crate) fn snapshot(&self) -> $snapshot {
                $snapshot { $($name: self.$name.get(),)* }
            }
        }

        impl $snapshot {
            /// The sum with another reading.
            #[must_use]
            pub fn plus(&self, other: &Self) -> Self {
                Self { $($name: self.$name.wrapping_add(other.$name),)* }
            }

            /// Each counter by its name, in the order of their declaration: for whoever shows them all.
            pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> + use<> {
                [$((stringify!($name), self.$name),)*].into_iter()
            }
        }
    };
}

counters! {
    /// Counters that a data thread alone writes.
    Counters,
    /// A reading of a device's counters. Each is exact; together they are not one instant.
    CounterSnapshot,
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
    /// Operations that failed for want of room (ENOSPC, EDQUOT, EFBIG). These and the next are of what the
    /// kernel was asked to do: a merged one that fails is tried again part by part.
    failed_no_space,
    /// Operations that failed since the storage did (EIO and its like).
    failed_storage,
    /// Reads beyond the end of a file that has become shorter.
    failed_file_ended,
    /// Operations that failed for another reason, such as memory of the guest that has gone.
    failed_otherwise,
    /// Interrupts sent to the guest.
    notifications,
    /// Times the data thread went to sleep.
    sleeps,
    /// Times it looked for work before sleeping, and work came: a sleep and a wake were saved.
    polls_paid,
    /// Times it looked in vain, and then slept.
    polls_in_vain,
}

counters! {
    /// Counters of one queue, that its data thread alone writes.
    RequestCounters,
    /// A reading of what one queue has asked for and what became of it. A request is counted by its type when
    /// it is taken on or refused, and by its outcome when it is answered.
    RequestSnapshot,
    /// Reads (`VIRTIO_BLK_T_IN`).
    reads,
    /// Writes (`VIRTIO_BLK_T_OUT`).
    writes,
    /// Flushes.
    flushes,
    /// Discards.
    discards,
    /// Write-zeroes.
    write_zeroes,
    /// Secure erases.
    secure_erases,
    /// Questions for the serial.
    get_ids,
    /// Questions for how worn the storage is.
    get_lifetimes,
    /// Of any other type, or without a whole header.
    others,
    /// Bytes of reads that went well.
    bytes_read,
    /// Bytes of writes that went well.
    bytes_written,
    /// Answered with IOERR without trying: the request was wrong. The guest's fault.
    refused,
    /// Answered with IOERR because the host's I/O failed, or the request's memory had gone.
    failed,
    /// Answered with UNSUPP.
    unsupported,
    /// Chains without a status byte to answer in. The guest's fault.
    bad_chains,
    /// Times the ring lost its integrity and was stopped. The guest's fault.
    ring_faults,
}

/// The type of a request, as far as counting goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RequestKind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
    SecureErase,
    GetId,
    GetLifetime,
    Other,
}

impl RequestKind {
    /// Of a header's type (virtio 1.3 §5.2.6).
    pub(crate) fn of(kind: u32) -> Self {
        match kind {
            spec::VIRTIO_BLK_T_IN => Self::Read,
            spec::VIRTIO_BLK_T_OUT => Self::Write,
            spec::VIRTIO_BLK_T_FLUSH => Self::Flush,
            spec::VIRTIO_BLK_T_DISCARD => Self::Discard,
            spec::VIRTIO_BLK_T_WRITE_ZEROES => Self::WriteZeroes,
            spec::VIRTIO_BLK_T_SECURE_ERASE => Self::SecureErase,
            spec::VIRTIO_BLK_T_GET_ID => Self::GetId,
            VIRTIO_BLK_T_GET_LIFETIME => Self::GetLifetime,
            _ => Self::Other,
        }
    }
}

impl RequestCounters {
    pub(crate) fn of(&self, kind: RequestKind) -> &Counter {
        match kind {
            RequestKind::Read => &self.reads,
            RequestKind::Write => &self.writes,
            RequestKind::Flush => &self.flushes,
            RequestKind::Discard => &self.discards,
            RequestKind::WriteZeroes => &self.write_zeroes,
            RequestKind::SecureErase => &self.secure_erases,
            RequestKind::GetId => &self.get_ids,
            RequestKind::GetLifetime => &self.get_lifetimes,
            RequestKind::Other => &self.others,
        }
    }
}

/// What is counted for one queue, on cache lines of its own: its neighbour may be another thread's.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct QueueCounters {
    pub(crate) requests: RequestCounters,
    read_latency: Histogram,
    write_latency: Histogram,
    other_latency: Histogram,
}

impl QueueCounters {
    /// Counts how long a request of this kind took.
    pub(crate) fn took(&self, kind: RequestKind, nanoseconds: u64) {
        let histogram = match kind {
            RequestKind::Read => &self.read_latency,
            RequestKind::Write => &self.write_latency,
            _ => &self.other_latency,
        };
        histogram.add(nanoseconds);
    }

    pub(crate) fn snapshot(&self) -> QueueSnapshot {
        QueueSnapshot {
            requests: self.requests.snapshot(),
            read_latency: self.read_latency.snapshot(),
            write_latency: self.write_latency.snapshot(),
            other_latency: self.other_latency.snapshot(),
        }
    }
}

/// A reading of one queue's counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct QueueSnapshot {
    /// Requests by type and outcome.
    pub requests: RequestSnapshot,
    /// Time from the pop to the answer of reads. Empty unless [`DeviceOptions::latencies`] is set; so are the
    /// others.
    ///
    /// [`DeviceOptions::latencies`]: crate::DeviceOptions::latencies
    pub read_latency: LatencyHistogram,
    /// The same of writes.
    pub write_latency: LatencyHistogram,
    /// The same of flushes, discards, write-zeroes and secure erases.
    pub other_latency: LatencyHistogram,
}

impl QueueSnapshot {
    /// The sum with another reading.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            requests: self.requests.plus(&other.requests),
            read_latency: self.read_latency.plus(&other.read_latency),
            write_latency: self.write_latency.plus(&other.write_latency),
            other_latency: self.other_latency.plus(&other.other_latency),
        }
    }
}

/// Buckets of a histogram. The last begins at 4.6 minutes: whatever takes longer hangs.
pub const LATENCY_BUCKETS: usize = 40;

#[derive(Debug)]
struct Histogram([Counter; LATENCY_BUCKETS]);

impl Default for Histogram {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Counter::default()))
    }
}

impl Histogram {
    fn add(&self, nanoseconds: u64) {
        // Bits of the number: at most 64.
        let bits = usize::try_from(u64::BITS - nanoseconds.leading_zeros()).unwrap_or(0);
        self.0[bits.min(LATENCY_BUCKETS - 1)].add(1);
    }

    fn snapshot(&self) -> LatencyHistogram {
        LatencyHistogram {
            buckets: std::array::from_fn(|bucket| self.0[bucket].get()),
        }
    }
}

/// How many requests took how long, by powers of two: bucket *i* counts those of less than 2^*i*
/// nanoseconds that are in no bucket before it; the last one counts all others too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatencyHistogram {
    /// The counts.
    pub buckets: [u64; LATENCY_BUCKETS],
}

impl Default for LatencyHistogram {
    fn default() -> Self {
        Self {
            buckets: [0; LATENCY_BUCKETS],
        }
    }
}

impl LatencyHistogram {
    /// Requests in all buckets.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    /// A time in nanoseconds that at least `percent` of the requests did not take; within a factor of two
    /// the least one. `None` if there were none.
    ///
    /// ```
    /// let mut histogram = blk_dataplane::LatencyHistogram::default();
    /// histogram.buckets[14] = 98; // 8.2 to 16.4 µs
    /// histogram.buckets[20] = 2; // 0.5 to 1 ms
    /// assert_eq!(histogram.percentile(50.0), Some(1 << 14));
    /// assert_eq!(histogram.percentile(99.0), Some(1 << 20));
    /// ```
    #[must_use]
    pub fn percentile(&self, percent: f64) -> Option<u64> {
        #[expect(
            clippy::cast_precision_loss,
            reason = "of no matter in a share of them"
        )]
        let wanted = self.count() as f64 * percent.clamp(0.0, 100.0) / 100.0;
        let mut below = 0;
        let bucket = self.buckets.iter().position(|&count| {
            below += count;
            #[expect(clippy::cast_precision_loss, reason = "as above")]
            let enough = below > 0 && below as f64 >= wanted;
            enough
        })?;
        Some(1 << bucket)
    }

    /// The sum with another one.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            buckets: std::array::from_fn(|bucket| {
                self.buckets[bucket].wrapping_add(other.buckets[bucket])
            }),
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_fall_into_the_bucket_of_their_power_of_two() {
        let histogram = Histogram::default();
        for (nanoseconds, bucket) in [
            (0, 0),
            (1, 1),
            (2, 2),
            (3, 2),
            (4, 3),
            (1023, 10),
            (1024, 11),
            ((1 << 38) - 1, 38),
            (1 << 38, 39),
            (u64::MAX, 39),
        ] {
            let before = histogram.snapshot().buckets[bucket];
            histogram.add(nanoseconds);
            assert_eq!(
                histogram.snapshot().buckets[bucket],
                before + 1,
                "{nanoseconds}"
            );
        }
        assert_eq!(histogram.snapshot().count(), 10);
    }

    #[test]
    fn percentile_is_the_first_bucket_that_holds_enough() {
        let mut histogram = LatencyHistogram::default();
        assert_eq!(histogram.percentile(50.0), None);
        histogram.buckets[3] = 1;
        histogram.buckets[39] = 1;
        for (percent, expected) in [(0.0, 3), (50.0, 3), (51.0, 39), (100.0, 39), (1e9, 39)] {
            assert_eq!(
                histogram.percentile(percent),
                Some(1 << expected),
                "{percent}"
            );
        }
    }
}
