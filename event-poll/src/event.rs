//! What is waited for, and what is handed out.

use std::ops::BitOr;

use nix::sys::epoll::EpollFlags;

/// The caller's name for a registered descriptor, handed back with its events. Any value but
/// `u64::MAX`; two descriptors may share one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

/// What to wait for on a descriptor. Hang-up and error are always reported.
///
/// ```
/// use event_poll::Interest;
///
/// let both = Interest::READABLE | Interest::WRITABLE;
/// assert_ne!(both, Interest::READABLE);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest(EpollFlags);

impl Interest {
    /// There is something to read, or the other end has closed.
    pub const READABLE: Self = Self(EpollFlags::EPOLLIN);
    /// A write would take something. Nearly always so: wait for it only with something to write.
    pub const WRITABLE: Self = Self(EpollFlags::EPOLLOUT);
    /// Hang-up and error only.
    pub const NONE: Self = Self(EpollFlags::empty());

    pub(crate) fn flags(self) -> EpollFlags {
        self.0
    }
}

impl BitOr for Interest {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// A descriptor that is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// The token the descriptor was [added](crate::EventPoll::add) with.
    pub token: Token,
    readiness: EpollFlags,
}

impl Event {
    pub(crate) fn new(token: Token, readiness: EpollFlags) -> Self {
        Self { token, readiness }
    }

    /// There is something to read (`EPOLLIN`).
    pub fn is_readable(&self) -> bool {
        self.readiness.contains(EpollFlags::EPOLLIN)
    }

    /// A write would take something (`EPOLLOUT`).
    pub fn is_writable(&self) -> bool {
        self.readiness.contains(EpollFlags::EPOLLOUT)
    }

    /// The other end of a pipe or socket is gone (`EPOLLHUP`). An eventfd has no such state. It stays
    /// so: remove the descriptor, or the loop spins.
    pub fn is_hangup(&self) -> bool {
        self.readiness.contains(EpollFlags::EPOLLHUP)
    }

    /// The file is in error (`EPOLLERR`). Of an eventfd it only means that the kernel itself ran the
    /// counter to its end: it is readable too, and a read clears it.
    pub fn is_error(&self) -> bool {
        self.readiness.contains(EpollFlags::EPOLLERR)
    }
}
