//! How a job waits: for interrupts, and for the next request to be due.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll, ppoll};
use nix::sys::time::TimeSpec;

use super::{Job, Phase};
use crate::load::ring::Ring;

/// When the next request of a paced load is due: at even distances that are no whole nanoseconds, without adding up
/// an error.
#[derive(Clone, Copy, Debug)]
pub(super) struct Due {
    /// Nanoseconds of the load's clock.
    pub(super) at: u64,
    rest: u64,
    rate: u64,
}

impl Due {
    /// At `rate` a second.
    pub(super) fn new(rate: u64) -> Self {
        Self {
            at: 0,
            rest: 0,
            rate,
        }
    }

    pub(super) fn advance(&mut self) {
        const SECOND: u64 = 1_000_000_000;
        let step = SECOND + self.rest;
        self.at += step / self.rate;
        self.rest = step % self.rate;
    }
}

impl<R: Ring> Job<'_, R> {
    /// Whether requests are made by the clock. Reading back is not.
    #[inline]
    pub(super) fn is_paced(&self) -> bool {
        self.schedule.rate.is_some() && self.phase != Phase::Checking
    }

    /// Asks for an interrupt and waits for it, unless something has completed meanwhile.
    pub(super) fn sleep(&mut self) {
        if self.ring.enable_interrupts() {
            self.sleeps += 1;
            if self.is_paced() && self.to_issue != 0 && !self.free.is_empty() {
                self.sleep_until_due();
            } else {
                self.read_call();
            }
        }
        self.ring.disable_interrupts();
    }

    fn sleep_until_due(&mut self) {
        let now = self.clock.now();
        let until = self.due.at.min(self.phase_end);
        let Some(left) = until.checked_sub(now).filter(|&left| left != 0) else {
            return;
        };
        let timeout = TimeSpec::from_duration(Duration::from_nanos(left));
        if self.wait_for_call(Some(timeout)) {
            self.read_call();
        }
    }

    fn read_call(&mut self) {
        match self.call.read() {
            Ok(signals) => self.interrupts += signals,
            // The back-end shares the descriptor's flags, and may have made it non-blocking.
            Err(Errno::EAGAIN) => {
                self.wait_for_call(None);
            }
            Err(_) => {}
        }
    }

    /// Whether there was a signal, in time.
    fn wait_for_call(&self, timeout: Option<TimeSpec>) -> bool {
        let mut fds = [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)];
        // Interrupted or not, the ring is looked at.
        ppoll(&mut fds, timeout, None).is_ok_and(|ready| ready > 0)
    }

    /// Counts the signals that nobody has read, as those of a client that polls.
    pub(super) fn take_interrupts(&mut self) {
        let mut fds = [PollFd::new(self.call.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0) {
            self.read_call();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_add_up_to_seconds() {
        for rate in [1, 3, 7, 5000, 999_999_937, 1_000_000_000] {
            let mut due = Due::new(rate);
            for _ in 0..rate.min(10_000) {
                due.advance();
            }
            let seconds = u128::from(rate.min(10_000)) * 1_000_000_000 / u128::from(rate);
            assert_eq!(u128::from(due.at), seconds, "{rate}");
        }
    }
}
