//! Reaching the waiting thread from another one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::Error;
use crate::notifier::EventNotifier;

/// Stops or wakes an [`EventPoll`](crate::EventPoll) from any thread, or from inside its handler.
///
/// * [`stop`](Self::stop) is a latch. [`run`](crate::EventPoll::run) returns, and every later `run`
///   returns at once, until [`EventPoll::reset`](crate::EventPoll::reset). So a stop sent before the
///   thread got to `run` is not lost.
/// * [`wake`](Self::wake) is an event. It ends one [`wait`](crate::EventPoll::wait), the current one
///   or else the next; any number of wakes before that count as one. `run` only goes round its loop.
///
/// # Example
///
/// ```
/// use event_poll::EventPoll;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let mut poll = EventPoll::new(1)?;
/// let stopper = poll.stopper();
/// std::thread::spawn(move || stopper.wake());
/// assert!(poll.wait(None)?.is_empty());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Stopper(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    stopped: AtomicBool,
    wake: EventNotifier,
}

impl Stopper {
    pub(crate) fn new() -> Result<Self, Error> {
        Ok(Self(Arc::new(Shared {
            stopped: AtomicBool::new(false),
            wake: EventNotifier::new()?,
        })))
    }

    /// Makes [`EventPoll::run`](crate::EventPoll::run) and
    /// [`run_polling`](crate::EventPoll::run_polling) return: no handler starts after the one that is
    /// running. Ends a [`wait`](crate::EventPoll::wait) as [`wake`](Self::wake) does.
    pub fn stop(&self) {
        // Release, pairs with the Acquire in `is_stopped`: what this thread wrote before is seen by
        // the thread that finds itself stopped. Before the wake: whoever is woken finds the flag set.
        self.0.stopped.store(true, Ordering::Release);
        self.wake();
    }

    /// Makes [`EventPoll::wait`](crate::EventPoll::wait) return, with no events if nothing is ready.
    pub fn wake(&self) {
        // The eventfd is our own, non-blocking and never handed out, and a full counter wakes as
        // well: the write has no way to fail.
        let result = self.0.wake.notify();
        debug_assert!(result.is_ok(), "{result:?}");
    }

    /// Whether [`stop`](Self::stop) was called and not yet
    /// [reset](crate::EventPoll::reset).
    pub fn is_stopped(&self) -> bool {
        // Pairs with the Release in `stop`.
        self.0.stopped.load(Ordering::Acquire)
    }

    pub(crate) fn reset(&self) {
        self.0.stopped.store(false, Ordering::Relaxed);
    }

    pub(crate) fn notifier(&self) -> &EventNotifier {
        &self.0.wake
    }
}
