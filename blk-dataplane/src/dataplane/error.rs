//! What can go wrong with a running device.

use crate::data_thread::StartError;
use crate::inflight::InflightError;

/// Why a queue did not start, or a running one could not be changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// The index is not below the device's number of queues. The caller's or front-end's fault.
    #[error("queue {index} of a device with {num_queues}")]
    NoSuchQueue {
        /// The index asked for.
        index: u16,
        /// Queues the device has.
        num_queues: u16,
    },
    /// It runs already; a running ring cannot be set up anew. The caller's or front-end's fault.
    #[error("queue {0} is running")]
    Running(u16),
    /// It does not run. The caller's or front-end's fault.
    #[error("queue {0} is not running")]
    NotRunning(u16),
    /// No power of two, or above the device's maximum. The guest's or front-end's fault.
    #[error("a ring of {size} entries; a power of two up to {max} is possible")]
    Size {
        /// Entries asked for.
        size: u32,
        /// Most entries this device takes.
        max: u16,
    },
    /// The ring does not lie in guest memory as it must. The guest's or front-end's fault.
    #[error(transparent)]
    Ring(#[from] vring::StartError),
    /// The record of requests in flight cannot be used for the ring. The front-end's fault.
    #[error(transparent)]
    Inflight(#[from] InflightError),
    /// The kick descriptor cannot be waited on. The front-end's or host's fault.
    #[error(transparent)]
    Kick(#[from] event_poll::Error),
    /// The thread that is to serve the queue cannot start. The host's fault.
    #[error("cannot start the queue's data thread: {0}")]
    Thread(#[from] StartError),
    /// A data thread has ended. A bug in this crate: it ends only when told to.
    #[error(transparent)]
    Gone(#[from] Gone),
}

/// A data thread has ended though nobody told it to: a bug in this crate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a data thread has ended")]
pub struct Gone;

/// Why a write to the configuration space was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// It touches something else than the one byte that can be written, if that can be. The guest's or
    /// front-end's fault.
    #[error("configuration space {offset}+{len} is read-only")]
    ReadOnly {
        /// Where it begins.
        offset: u32,
        /// Its length in bytes.
        len: usize,
    },
    /// The write cache cannot be turned off, since what it holds cannot be written out. Host's fault.
    #[error("cannot turn the write cache off: {0}")]
    Sync(std::io::Error),
    /// A data thread has ended. A bug in this crate.
    #[error(transparent)]
    Gone(#[from] Gone),
}

/// Why a device did not stop cleanly.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StopError {
    /// A data thread had ended before. A bug in this crate.
    #[error(transparent)]
    Gone(#[from] Gone),
    /// The last fdatasync failed: writes not covered by an earlier flush may be lost. Host's fault.
    #[error("cannot write the image out: {0}")]
    Sync(std::io::Error),
}
