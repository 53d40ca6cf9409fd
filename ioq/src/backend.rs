//! The seam between the queue and what runs its operations.
//!
//! Calls are per batch, never per operation, so that they may be dynamic. A backend keeps
//! no owner and frees nothing: it takes slots, and gives each accepted slot back exactly once.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::engine::Engine;
use crate::notifier::Notifier;
use crate::op::{Op, Table};

/// Tries of one system call that keeps being interrupted. A signal storm must not hold the data
/// thread; what is left over is parked and tried again later.
pub(crate) const INTERRUPTED_TRIES_MAX: usize = 16;

/// A slot's result: bytes moved, or an error number negated, as the kernel gives them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Completion {
    pub(crate) slot: u16,
    pub(crate) result: i64,
}

/// What became of the operations passed to [`Backend::submit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Submission {
    /// That many (at least one, if there was one) of the first were taken; the queue calls again with
    /// the rest.
    Accepted {
        /// How many.
        taken: usize,
        /// Of all taken so far, those the kernel had no room for yet, a later
        /// [`Backend::submit`] tries them again.
        backlog: usize,
    },
    /// None was taken, for want of a resource: try again later.
    Again,
    /// The first operation is refused with this error number; the others were not looked at.
    Refused(i32),
    /// The backend cannot run the first operation without blocking: it goes to a worker. The
    /// others were not looked at.
    Unsupported,
}

/// What [`Backend::arm`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arming {
    /// Every completion from now on signals the notifier.
    Armed,
    /// A completion is there to be reaped.
    Pending,
    /// That many operations in flight will complete without a signal.
    Silent(usize),
}

/// Runs the operations of a queue.
pub(crate) trait Backend: fmt::Debug + Send {
    /// Which engine this is, for those who ask the queue.
    fn engine(&self) -> Engine;

    /// Hands `slots` over, in order. Operations and segments of accepted slots stay as they are
    /// in `table` until the slot came back from [`Backend::reap`]. Without `slots` it
    /// only tries its backlog again.
    fn submit(&mut self, slots: &[u16], table: &Table) -> Submission;

    /// Moves finished operations into `out`, and says how many. Fewer than `out.len()` means none
    /// is left.
    fn reap(&mut self, out: &mut [Completion]) -> usize;

    /// Whether [`Backend::reap`] would find something. No system call.
    fn completions_pending(&self) -> bool;

    /// Whether [`Backend::completions_pending`] sees whatever has completed. If not, only the notifier
    /// tells of it.
    fn sees_completions(&self) -> bool {
        true
    }

    /// What becomes readable when an operation completes, if completions are not all there when
    /// [`Backend::submit`] returns.
    fn notifier(&self) -> Option<&Arc<Notifier>>;

    /// Whether operations are expected to have completed when [`Backend::submit`] returns.
    fn completes_on_submit(&self) -> bool {
        false
    }

    /// Completions of operations submitted from now on need not signal, until
    /// [`Backend::arm`].
    fn disarm(&mut self) {}

    /// Completions signal again. Backends start armed.
    fn arm(&mut self) -> Arming {
        if self.completions_pending() {
            Arming::Pending
        } else {
            Arming::Armed
        }
    }

    /// The blocking calls, for the workers; `None` if the backend never says
    /// [`Submission::Unsupported`].
    fn blocking(&self) -> Option<Arc<dyn BlockingFile>>;

    /// Waits until nothing accepted touches memory any more. `false` if that cannot be had, in
    /// which case no memory of an operation may ever be freed. Nothing is submitted afterwards.
    fn quiesce(&mut self) -> bool;
}

/// What a worker does for a backend, blocking; results as in [`Completion`].
pub(crate) trait BlockingFile: fmt::Debug + Send + Sync {
    /// Runs `op`, which is no read or write. Gives up between two steps once `stop` is set.
    fn run(&self, op: &Op, stop: &AtomicBool) -> i64;
}

/// How many of `wanted` operations one system call is to take: all, unless a test has scripted a
/// fault of the kernel for this thread.
#[cfg(not(test))]
#[inline]
#[expect(
    clippy::unnecessary_wraps,
    reason = "under test it fails, as the kernel does"
)]
pub(crate) fn take_at_most(wanted: usize) -> Result<usize, i32> {
    Ok(wanted)
}

#[cfg(test)]
pub(crate) use kernel_faults::take_at_most;

/// Faults of the kernel's submit calls, scripted by unit tests: the real engines meet them.
#[cfg(test)]
pub(crate) mod kernel_faults {
    use std::cell::RefCell;
    use std::collections::VecDeque;

    thread_local! {
        static SCRIPT: RefCell<VecDeque<Result<usize, i32>>> = const { RefCell::new(VecDeque::new()) };
    }

    /// The next system calls of this thread that submit: take at most so many, or fail so.
    pub(crate) fn script(faults: impl IntoIterator<Item = Result<usize, i32>>) {
        SCRIPT.with_borrow_mut(|script| {
            script.clear();
            script.extend(faults);
        });
    }

    /// Faults not met yet.
    pub(crate) fn left() -> usize {
        SCRIPT.with_borrow(VecDeque::len)
    }

    pub(crate) fn take_at_most(wanted: usize) -> Result<usize, i32> {
        match SCRIPT.with_borrow_mut(VecDeque::pop_front) {
            Some(Ok(most)) => Ok(wanted.min(most)),
            Some(Err(errno)) => Err(errno),
            None => Ok(wanted),
        }
    }
}
