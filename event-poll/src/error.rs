//! Errors of setting up and of waiting.

use std::io;

use nix::errno::Errno;

use crate::poll::MAX_EVENTS_PER_WAIT;

/// Why a notifier or an event loop could not do what it was asked to.
///
/// None of these changes what was registered before.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The descriptor is already in the set. Fault of the caller.
    #[error("the descriptor is already registered")]
    AlreadyRegistered,

    /// `max_events` is 0 or above [`MAX_EVENTS_PER_WAIT`]. Fault of the caller.
    #[error("{requested} events per wait: not in 1..={MAX_EVENTS_PER_WAIT}")]
    EventsPerWait {
        /// What was asked for.
        requested: usize,
    },

    /// The received descriptor is some other kind of file. Fault of whoever sent it: the front-end.
    #[error("not an eventfd but {found}")]
    NotEventFd {
        /// What the kernel calls the file: a path, or a name such as `pipe:[4711]`.
        found: String,
    },

    /// The file can not be waited for: a regular file or a directory is always ready. Fault of
    /// whoever opened it: the caller, or the front-end that sent it.
    #[error("the descriptor's file can not be waited for")]
    NotPollable,

    /// The descriptor is not in the set. Fault of the caller.
    #[error("the descriptor is not registered")]
    NotRegistered,

    /// [`Token`](crate::Token) `u64::MAX` belongs to the loop itself. Fault of the caller.
    #[error("token u64::MAX is reserved")]
    ReservedToken,

    /// The received eventfd counts down by one per read (`EFD_SEMAPHORE`), so one read does not
    /// clear it and a full counter would wake the loop 2^64 times. Fault of whoever sent it: the
    /// front-end.
    #[error("the eventfd is a semaphore: a read does not clear it")]
    Semaphore,

    /// A system call failed: out of descriptors, memory or watches. Fault of the host.
    #[error("{call}: {source}")]
    System {
        /// Name of the system call.
        call: &'static str,
        /// What it returned.
        source: io::Error,
    },

    /// A periodic timer of period zero would never be quiet. Fault of the caller.
    #[error("a timer's period can not be zero")]
    ZeroPeriod,
}

impl Error {
    pub(crate) fn system(call: &'static str, errno: Errno) -> Self {
        Self::System {
            call,
            source: io::Error::from(errno),
        }
    }
}
