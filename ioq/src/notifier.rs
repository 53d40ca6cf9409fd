//! The eventfd that says "completions wait".

// UNSAFETY: eventfd(2), read(2) and write(2) are foreign calls.
#![expect(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// A non-blocking eventfd.
#[derive(Debug)]
pub(crate) struct Notifier {
    fd: OwnedFd,
    /// Whether a signal may have come since the last `clear`, as far as the process knows: a hint
    /// that saves a system call.
    expected: AtomicBool,
}

impl Notifier {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: no pointer is passed.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call above made this descriptor and nothing else owns it.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self {
            fd,
            expected: AtomicBool::new(false),
        })
    }

    /// Notes that the kernel has signalled, or is about to.
    #[inline]
    pub(crate) fn expect_signal(&self) {
        self.expected.store(true, Ordering::Relaxed);
    }

    /// As `clear`, but only if a signal is expected.
    pub(crate) fn clear_expected(&self) -> bool {
        self.expected.load(Ordering::Relaxed) && self.clear()
    }

    /// Makes the eventfd readable. A full counter (`EAGAIN`) is readable already.
    pub(crate) fn signal(&self) {
        self.expect_signal();
        let one = 1u64;
        loop {
            // SAFETY: `one` is 8 readable bytes that outlive the call.
            let written = unsafe { libc::write(self.as_raw_fd(), (&raw const one).cast(), 8) };
            // An eventfd write that need not block fails with EINTR only before it did anything.
            if written >= 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return;
            }
        }
    }

    /// Makes the eventfd unreadable, and says whether it was readable.
    pub(crate) fn clear(&self) -> bool {
        // Before the read: a signal that comes in between is cleared, and expected for nothing.
        self.expected.store(false, Ordering::Relaxed);
        let mut count = 0u64;
        loop {
            // SAFETY: `count` is 8 writable bytes that outlive the call.
            let read = unsafe { libc::read(self.as_raw_fd(), (&raw mut count).cast(), 8) };
            if read >= 0 || io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return read == 8;
            }
        }
    }
}

impl AsRawFd for Notifier {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl AsFd for Notifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_clear_takes_all_signals() {
        let notifier = Notifier::new().unwrap();
        assert!(!notifier.clear());
        notifier.signal();
        notifier.signal();
        assert!(notifier.clear());
        assert!(!notifier.clear());
    }
}
