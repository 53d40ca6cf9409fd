//! The timer.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use crate::error::Error;

/// Longest time a timer is set to: what 32-bit seconds hold, 68 years, so that no `time_t` overflows.
const LONGEST: Duration = Duration::from_secs(i32::MAX as u64);

/// A timer that the loop can wait for (`timerfd_create(2)`, monotonic clock): for housekeeping that has
/// to happen whether requests come or not. No operation of it sleeps.
///
/// It becomes readable when it expires and stays so until [`test_and_clear`](Self::test_and_clear).
///
/// # Example
///
/// ```
/// use event_poll::{EventPoll, Timer, Token};
/// use std::time::Duration;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let timer = Timer::new()?;
/// timer.set_periodic(Duration::from_millis(1))?;
/// let mut poll = EventPoll::new(1)?;
/// poll.add(&timer, Token(0))?;
///
/// assert_eq!(poll.wait(None)?[0].token, Token(0));
/// assert!(timer.test_and_clear()? >= 1);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Timer {
    fd: TimerFd,
}

impl Timer {
    /// Makes a timer that is not set.
    ///
    /// # Errors
    ///
    /// [`Error::System`] if the host is out of descriptors or memory.
    pub fn new() -> Result<Self, Error> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let fd = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)
            .map_err(|e| Error::system("timerfd_create", e))?;
        Ok(Self { fd })
    }

    /// Expires once, `after` from now; with zero at once. Replaces what was set before.
    ///
    /// # Errors
    ///
    /// [`Error::System`]: none is known.
    pub fn set_once(&self, after: Duration) -> Result<(), Error> {
        // To the kernel, zero means never.
        let after = after.clamp(Duration::from_nanos(1), LONGEST);
        self.set(Expiration::OneShot(TimeSpec::from_duration(after)))
    }

    /// Expires every `period` from now on. Replaces what was set before.
    ///
    /// # Errors
    ///
    /// * [`Error::ZeroPeriod`]: fault of the caller.
    /// * [`Error::System`]: none is known.
    pub fn set_periodic(&self, period: Duration) -> Result<(), Error> {
        if period.is_zero() {
            return Err(Error::ZeroPeriod);
        }
        let period = TimeSpec::from_duration(period.min(LONGEST));
        self.set(Expiration::Interval(period))
    }

    /// Stops the timer. An expiration not yet taken is taken back.
    ///
    /// # Errors
    ///
    /// [`Error::System`]: none is known.
    pub fn cancel(&self) -> Result<(), Error> {
        self.fd
            .unset()
            .map_err(|e| Error::system("timerfd_settime", e))
    }

    /// How often the timer has expired since it was last asked or set. One read clears any number.
    ///
    /// # Errors
    ///
    /// What `read` returned; none is known.
    pub fn test_and_clear(&self) -> io::Result<u64> {
        let mut count = [0; 8];
        loop {
            match nix::unistd::read(&self.fd, &mut count) {
                Ok(8) => return Ok(u64::from_ne_bytes(count)),
                Ok(_) => return Err(io::ErrorKind::InvalidData.into()),
                Err(Errno::EAGAIN) => return Ok(0),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn set(&self, expiration: Expiration) -> Result<(), Error> {
        self.fd
            .set(expiration, TimerSetTimeFlags::empty())
            .map_err(|e| Error::system("timerfd_settime", e))
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
