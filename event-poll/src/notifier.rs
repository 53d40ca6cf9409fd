//! The eventfd notifier.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::poll::PollFlags;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::Error;
use crate::nowait;

/// What the kernel calls an eventfd in `/proc/thread-self/fd`. A path starts with a slash, so no file
/// can be named like this.
const EVENTFD_NAME: &str = "anon_inode:[eventfd]";

/// The line of `/proc/thread-self/fdinfo` that marks an `EFD_SEMAPHORE` eventfd (Linux 6.5).
const SEMAPHORE_LINE: &str = "eventfd-semaphore: 1";

/// An eventfd (`eventfd(2)`): a counter in the kernel that one side raises and the other waits for
/// and clears. Neither operation of this type sleeps.
///
/// Virtual machine monitors use it in both directions: the guest's kick (ioeventfd) and the device's
/// call (irqfd).
///
/// # A received descriptor
///
/// `O_NONBLOCK` is a flag of the open file description, which the process at the other end shares: it
/// may rely on blocking reads, and may change the flag at any time. So [`from_fd`](Self::from_fd)
/// leaves it alone and what does not sleep is each call:
///
/// * [`test_and_clear`](Self::test_and_clear) reads with `preadv2(RWF_NOWAIT)`, for which the flag
///   does not matter; where the kernel has no such read (eventfd before Linux 5.8), it polls first.
/// * [`notify`](Self::notify) has no such system call to use. If the description was non-blocking
///   when received it writes at once, else it polls first and a full counter counts as notified. A
///   front-end that is bent on it (it clears the flag, or fills the counter between poll and write)
///   can make one `notify` sleep until someone reads the descriptor. It stops its own device
///   only, and `test_and_clear` on a [clone](Self::try_clone) in another thread releases the
///   sleeper; use that in a stop that must not hang.
///
/// # Example
///
/// ```
/// use event_poll::EventNotifier;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let call = EventNotifier::new()?;
/// assert!(!call.test_and_clear()?);
/// call.notify()?;
/// call.notify()?;
/// assert!(call.test_and_clear()?);
/// assert!(!call.test_and_clear()?, "one read clears any number of notifications");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct EventNotifier {
    fd: OwnedFd,
    origin: Origin,
}

#[derive(Debug)]
enum Origin {
    /// Made here with `EFD_NONBLOCK`.
    Own,
    Received {
        /// State of `O_NONBLOCK` when received.
        nonblocking: bool,
        /// The kernel refused `RWF_NOWAIT` once: it always will.
        no_nowait: AtomicBool,
    },
}

impl EventNotifier {
    /// Makes a new eventfd: non-blocking, close-on-exec, counter 0.
    ///
    /// # Errors
    ///
    /// [`Error::System`] if the host is out of descriptors or memory.
    pub fn new() -> Result<Self, Error> {
        let fd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
            .map_err(|e| Error::system("eventfd2", e))?;
        Ok(Self {
            fd: fd.into(),
            origin: Origin::Own,
        })
    }

    /// Takes over a descriptor received from elsewhere, and makes it close-on-exec (a flag of the
    /// descriptor alone, not shared).
    ///
    /// What is plainly not an eventfd is refused and closed. The kernel tells the kind through
    /// `/proc`; where that is not mounted any descriptor is accepted and the checks of
    /// [`test_and_clear`](Self::test_and_clear) and [`EventPoll::add`](crate::EventPoll::add) have to
    /// do.
    ///
    /// # Errors
    ///
    /// * [`Error::NotEventFd`], [`Error::Semaphore`]: fault of the sender.
    /// * [`Error::System`]: the descriptor's flags can not be read or set.
    ///
    /// # Example
    ///
    /// ```
    /// use event_poll::{Error, EventNotifier};
    ///
    /// let not_an_eventfd = std::fs::File::open("/dev/null").unwrap();
    /// let refused = EventNotifier::from_fd(not_an_eventfd.into());
    /// assert!(matches!(refused, Err(Error::NotEventFd { found }) if found == "/dev/null"));
    /// ```
    pub fn from_fd(fd: OwnedFd) -> Result<Self, Error> {
        check_kind(fd.as_raw_fd())?;
        Self::received(fd)
    }

    /// Of any kind.
    fn received(fd: OwnedFd) -> Result<Self, Error> {
        fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
            .map_err(|e| Error::system("fcntl(F_SETFD)", e))?;
        let flags =
            fcntl(&fd, FcntlArg::F_GETFL).map_err(|e| Error::system("fcntl(F_GETFL)", e))?;
        let nonblocking = OFlag::from_bits_retain(flags).contains(OFlag::O_NONBLOCK);
        Ok(Self {
            fd,
            origin: Origin::Received {
                nonblocking,
                no_nowait: AtomicBool::new(false),
            },
        })
    }

    /// A second handle to the same counter (`dup`, close-on-exec).
    ///
    /// # Errors
    ///
    /// [`Error::System`] if the host is out of descriptors.
    pub fn try_clone(&self) -> Result<Self, Error> {
        let fd = self.fd.try_clone().map_err(|source| Error::System {
            call: "fcntl(F_DUPFD_CLOEXEC)",
            source,
        })?;
        let origin = match &self.origin {
            Origin::Own => Origin::Own,
            Origin::Received {
                nonblocking,
                no_nowait,
            } => Origin::Received {
                nonblocking: *nonblocking,
                no_nowait: AtomicBool::new(no_nowait.load(Ordering::Relaxed)),
            },
        };
        Ok(Self { fd, origin })
    }

    /// Raises the counter by one, which wakes whoever waits for it. One system call, two for a
    /// received descriptor that was blocking; neither sleeps (see the type for the one exception).
    ///
    /// A counter that is full is a success: the other side has not taken the earlier notifications
    /// and finds this one with them. So is a far end that closed its handle: nobody is left to tell.
    ///
    /// # Errors
    ///
    /// What `write` or `poll` returned. An eventfd gives none; a descriptor of another kind, accepted
    /// without `/proc`, may.
    pub fn notify(&self) -> io::Result<()> {
        if let Origin::Received {
            nonblocking: false, ..
        } = self.origin
        {
            let ready = retry_interrupted(|| nowait::is_ready(&self.fd, PollFlags::POLLOUT))?;
            if !ready.contains(PollFlags::POLLOUT) {
                return Ok(());
            }
        }
        match retry_interrupted(|| nix::unistd::write(&self.fd, &1u64.to_ne_bytes())) {
            Ok(8) | Err(Errno::EAGAIN) => Ok(()),
            Ok(_) => Err(io::ErrorKind::InvalidData.into()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Clears the counter with one read; `true` if it was not zero.
    ///
    /// # Errors
    ///
    /// An eventfd gives none. The descriptor is of another kind, accepted without `/proc`, and will
    /// stay readable for ever: remove it from the loop, or the loop spins.
    ///
    /// * [`UnexpectedEof`](io::ErrorKind::UnexpectedEof): the read returned nothing (a pipe or socket
    ///   whose other end is closed).
    /// * [`InvalidData`](io::ErrorKind::InvalidData): the read was not of 8 bytes, or of a zero
    ///   counter.
    /// * Any other: what `read` returned.
    pub fn test_and_clear(&self) -> io::Result<bool> {
        let mut buf = [0; 8];
        match retry_interrupted(|| self.read(&mut buf)) {
            // eventfd(2): a read of a zero counter does not return.
            Ok(8) if u64::from_ne_bytes(buf) != 0 => Ok(true),
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => Err(io::ErrorKind::InvalidData.into()),
            Err(Errno::EAGAIN) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    fn read(&self, buf: &mut [u8]) -> nix::Result<usize> {
        let no_nowait = match &self.origin {
            Origin::Own => return nix::unistd::read(&self.fd, buf),
            Origin::Received { no_nowait, .. } => no_nowait,
        };
        // Relaxed: a hint that guards no other memory.
        if !no_nowait.load(Ordering::Relaxed) {
            match nowait::read(&self.fd, buf) {
                Err(Errno::EOPNOTSUPP | Errno::ENOSYS) => no_nowait.store(true, Ordering::Relaxed),
                result => return result,
            }
        }
        nowait::read_after_poll(&self.fd, buf)
    }
}

impl AsFd for EventNotifier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl From<EventNotifier> for OwnedFd {
    fn from(notifier: EventNotifier) -> Self {
        notifier.fd
    }
}

fn retry_interrupted<T>(mut call: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            result => return result,
        }
    }
}

/// Refuses what `/proc` shows to be no counting eventfd. `thread-self`, not `self`: the latter is the
/// descriptor table of the main thread, which a sandboxed thread need not share.
fn check_kind(fd: RawFd) -> Result<(), Error> {
    let Ok(name) = fs::read_link(format!("/proc/thread-self/fd/{fd}")) else {
        return Ok(());
    };
    if name.as_os_str() != EVENTFD_NAME {
        return Err(Error::NotEventFd {
            found: name.to_string_lossy().into_owned(),
        });
    }
    match fs::read_to_string(format!("/proc/thread-self/fdinfo/{fd}")) {
        Ok(info) if info.lines().any(|line| line == SEMAPHORE_LINE) => Err(Error::Semaphore),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::{pipe, write};
    use std::os::unix::net::UnixStream;

    /// As accepted where `/proc` is not mounted.
    fn unchecked(fd: impl Into<OwnedFd>) -> EventNotifier {
        EventNotifier::received(fd.into()).unwrap()
    }

    #[test]
    fn n9_unchecked_pipe_is_empty_then_short_then_at_its_end() {
        let (reader, writer) = pipe().unwrap();
        let kick = unchecked(reader);
        assert!(!kick.test_and_clear().unwrap());
        write(&writer, &[1, 2, 3]).unwrap();
        assert_eq!(
            kick.test_and_clear().unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        drop(writer);
        assert_eq!(
            kick.test_and_clear().unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }

    #[test]
    fn n9_unchecked_socket_is_empty_then_at_its_end() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let kick = unchecked(ours);
        assert!(!kick.test_and_clear().unwrap());
        drop(theirs);
        assert_eq!(
            kick.test_and_clear().unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }

    #[test]
    fn n9_unchecked_files_that_always_read_are_errors_not_kicks() {
        for path in ["/dev/zero", "/dev/null", "/"] {
            let kick = unchecked(fs::File::open(path).unwrap());
            assert!(kick.test_and_clear().is_err(), "{path}");
        }
    }

    #[test]
    fn n9_unchecked_write_only_and_broken_pipes_are_errors() {
        let (reader, writer) = pipe().unwrap();
        let call = unchecked(writer);
        assert!(call.test_and_clear().is_err());
        call.notify().unwrap();
        drop(reader);
        assert_eq!(call.notify().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn without_nowait_reads_the_notifier_polls_first() {
        let fd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).unwrap();
        let kick = EventNotifier {
            fd: fd.into(),
            origin: Origin::Received {
                nonblocking: false,
                no_nowait: AtomicBool::new(true),
            },
        };
        assert!(!kick.test_and_clear().unwrap());
        kick.notify().unwrap();
        let clone = kick.try_clone().unwrap();
        assert!(clone.test_and_clear().unwrap());
        assert!(!kick.test_and_clear().unwrap());
    }
}
