//! The order of polling, arming and sleeping, without the system calls: what the model check runs.

#[cfg(test)]
mod model;

use std::ops::ControlFlow;

use crate::busy::BusyPoll;

/// Turns with work after which the descriptors that no poller speaks for are looked at. A turn
/// takes some microseconds, so a timer or a control socket waits for less than a millisecond, and the look
/// (one system call) is a percent of the work at most.
pub(crate) const LOOK_EVERY_TURNS: u32 = 64;

/// Something that has work now and then and can be asked for it, such as a virtqueue: a queue in memory
/// whose other side sends a notification only if told to. Asked by
/// [`EventPoll::run_polling`](crate::EventPoll::run_polling).
///
/// ```text
///         ┌──────────── work ────────────┐
///         v                              │
///  disarm ──> poll ── nothing, window ───┤
///    ^         │                         │
///    │         └ nothing ──> arm ── false┘
///    │                        │ true: and nothing came meanwhile
///    └──────── wake ──────── sleep
/// ```
///
/// Between [`arm`](Self::arm) and the sleep nothing is looked at any more, so `arm` itself has to look
/// once again after it has asked for notifications, with a full barrier between. The other side, in turn,
/// publishes, passes a full barrier, and then reads whether to notify. So one of the two sees the
/// other, and no notification is lost.
pub trait Poller {
    /// Does what work there is, but no more than a batch of it, and tells whether there was any.
    fn poll(&mut self) -> bool;

    /// Asks to be notified through the loop's descriptors from now on, then looks again. False if
    /// there is work, whose notification may not have been sent: the loop polls instead of
    /// sleeping, and disarms first.
    fn arm(&mut self) -> bool;

    /// Notifications are not needed for now. Called before the first poll, after each
    /// [`arm`](Self::arm), and so before the loop returns.
    fn disarm(&mut self);
}

/// What the cycle sleeps with.
pub(crate) trait Host {
    type Error;

    fn is_stopped(&self) -> bool;

    /// Whether the pollers speak for all that could wake the sleeper.
    fn all_polled(&self) -> bool;

    /// Handles what notifications there are. Breaks if the handler did.
    fn look(&mut self) -> Result<ControlFlow<()>, Self::Error>;

    /// Sleeps until there are any, and handles them.
    fn sleep(&mut self) -> Result<ControlFlow<()>, Self::Error>;
}

/// How long to poll.
pub(crate) trait Pace {
    fn worked(&mut self);
    fn again(&mut self) -> bool;
}

impl Pace for BusyPoll {
    fn worked(&mut self) {
        self.found();
    }

    fn again(&mut self) -> bool {
        self.keep_polling()
    }
}

/// Runs until stopped or broken off.
pub(crate) fn cycle<H: Host>(
    host: &mut H,
    pace: &mut impl Pace,
    pollers: &mut [&mut dyn Poller],
) -> Result<(), H::Error> {
    pollers.iter_mut().for_each(|poller| poller.disarm());
    let mut turns = 0;
    while !host.is_stopped() {
        let mut work = false;
        for poller in &mut *pollers {
            work |= poller.poll();
        }
        if work {
            pace.worked();
        } else if pace.again() {
            std::hint::spin_loop();
            continue;
        } else {
            let mut quiet = true;
            for poller in &mut *pollers {
                quiet &= poller.arm();
            }
            let flow = if quiet {
                turns = 0;
                host.sleep()
            } else {
                Ok(ControlFlow::Continue(()))
            };
            pollers.iter_mut().for_each(|poller| poller.disarm());
            if flow?.is_break() {
                return Ok(());
            }
            if quiet {
                continue;
            }
        }
        // Worked, or about to: nobody looks at the descriptors (hostile-inputs N6, A11).
        turns += 1;
        if turns >= LOOK_EVERY_TURNS {
            turns = 0;
            if !host.all_polled() && host.look()?.is_break() {
                return Ok(());
            }
        }
    }
    Ok(())
}
