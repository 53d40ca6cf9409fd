//! The queue: what it holds and tells, and its end. How it is made is in `open`, what can be queued in
//! `operations`, what happens from submit to reap in `run`.

// UNSAFETY: dropping the owners only when the engine is quiet needs `ManuallyDrop`.
#![expect(unsafe_code)]

mod fifo;
mod open;
mod operations;
mod run;

use std::collections::VecDeque;
use std::fmt;
use std::mem::ManuallyDrop;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use self::fifo::Fifo;
use crate::backend::{Arming, Backend, Completion};
use crate::engine::{Engine, Fallback};
use crate::op::Table;
use crate::worker::Workers;

/// Most segments an operation can have: `IOV_MAX`, above which the kernel refuses a vector.
pub const SEGMENTS_MAX: u16 = 1024;

/// Times an operation that comes back with `EINTR` or `EAGAIN` is tried again before the
/// error is delivered. Real causes pass at the first retry; a device that says nothing else must
/// not keep the data thread busy for ever.
pub const TRANSIENT_RETRIES_MAX: u8 = 8;

/// How long to wait before [`IoQueue::submit`] while [`IoQueue::needs_retry`]: the kernel is out of
/// memory for requests, and nothing of this queue will free any. Long enough not to burn
/// a CPU the host needs, short against the 30 s after which a Linux guest gives up on a request.
pub const RETRY_DELAY: Duration = Duration::from_millis(5);

/// Completions taken from the engine in one go; 512 bytes.
const REAP_BATCH: usize = 32;

/// Capacities, fixed when the queue is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Slots: operations queued or in flight at a time, at least 1.
    pub depth: u16,
    /// Segments (iovecs) per operation, 1 to [`SEGMENTS_MAX`], after joining those that touch.
    pub max_segments: u16,
}

impl Default for Config {
    /// 128 slots, a virtqueue's usual size, of 128 segments.
    fn default() -> Self {
        Self {
            depth: 128,
            max_segments: 128,
        }
    }
}

/// What one [`IoQueue::submit`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SubmitReport {
    /// Operations the kernel or a worker took.
    pub submitted: usize,
    /// Operations refused; [`IoQueue::reap`] delivers their errors.
    pub refused: usize,
    /// Operations kept for the next try.
    pub parked: usize,
}

/// A queue of asynchronous operations on one file.
///
/// `O` owns what keeps an operation's memory alive, and comes back with its result.
///
/// See the [crate's documentation](crate) for the life of an operation.
pub struct IoQueue<O> {
    backend: Box<dyn Backend>,
    workers: Option<Workers>,
    table: Table,
    /// Slots not handed over yet, oldest first.
    pending: Fifo,
    /// How many of `pending`, from the front, the caller has already submitted.
    committed: usize,
    /// Operations that were refused, awaiting `reap`. Capacity the depth.
    refused: VecDeque<Completion>,
    /// Free slots; the one used last is on top, its cache lines still warm.
    free: Vec<u16>,
    /// Operations the engine has taken, those it could not yet pass on included.
    in_engine: usize,
    /// Operations the engine has taken and not yet passed on, for want of a resource.
    backlog: usize,
    in_worker: usize,
    /// Where the engine puts completions, kept so as not to be initialised for each `reap`.
    completions: Box<[Completion; REAP_BATCH]>,
    /// Those of them that were not delivered yet: only within `reap` are there any, or after a panic in it.
    taken: Range<usize>,
    fallback: Option<Box<Fallback>>,
    /// One per slot. The kernel may write to an owner's memory until its completion or until the
    /// engine is quiet, so `drop` quiets the engine first.
    owners: ManuallyDrop<Box<[Option<O>]>>,
}

/// What [`IoQueue::arm_completion_fd`] found: whether to sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "only `Sleep` says that a completion will wake the caller"]
#[non_exhaustive]
pub enum Armed {
    /// Sleep: whatever completes makes [`IoQueue::completion_fd`] readable.
    Sleep,
    /// Reap first: something has completed.
    Reap,
    /// Keep polling, or sleep no longer than the latency that can be borne: that many operations
    /// were submitted while disarmed and complete without a signal. Linux AIO decides that when
    /// an operation is submitted, io_uring when it completes, so this never comes from there.
    Silent(usize),
}

impl<O> IoQueue<O> {
    /// Which engine runs the queue; never [`Engine::Auto`]. A disk of `ioq::testing` names the one
    /// it imitates.
    pub fn engine(&self) -> Engine {
        self.backend.engine()
    }

    /// Set if [`Engine::Auto`] could not have its first choice: one line for the log.
    pub fn fallback(&self) -> Option<&Fallback> {
        self.fallback.as_deref()
    }

    /// An eventfd that is readable when completions wait, for epoll; the same for the queue's
    /// whole life. `None` for an engine whose completions are all there when
    /// [`IoQueue::submit`] returns: reap after each submit.
    pub fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        self.backend.notifier().map(|notifier| notifier.as_fd())
    }

    /// Makes [`IoQueue::completion_fd`] unreadable, and says whether it was readable. Call it
    /// before [`IoQueue::reap`], not after: what completes in between must wake again.
    pub fn clear_completion_fd(&self) -> bool {
        self.backend
            .notifier()
            .is_some_and(|notifier| notifier.clear())
    }

    /// The caller polls: completions need not make [`IoQueue::completion_fd`] readable, which
    /// saves the kernel signalling each and the caller a wake-up for what it has reaped
    /// already. Costs no system call; call it whenever there is work.
    ///
    /// A caller that has disarmed must not sleep before [`IoQueue::arm_completion_fd`] has said so.
    /// Linux AIO fixes at submission whether an operation signals, and a queue on it therefore
    /// goes on signalling unless operations have lately been completing inside
    /// [`IoQueue::submit`], as they do on tmpfs.
    pub fn disarm_completion_fd(&mut self) {
        self.backend.disarm();
    }

    /// The caller is about to sleep: arms [`IoQueue::completion_fd`], makes it unreadable if only
    /// what was reaped already had made it readable, and looks once more. Whatever
    /// completes after that look signals, so [`Armed::Sleep`] loses no wake-up.
    ///
    /// ```
    /// use ioq::{Armed, Config, IoQueue};
    /// # use std::os::fd::AsRawFd;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let file = std::sync::Arc::new(std::fs::File::open("/proc/self/exe")?);
    /// let mut queue = IoQueue::linux_aio(file, &Config::default())?;
    /// queue.read(0, vec![0u8; 4096])?;
    /// while !queue.is_idle() {
    ///     queue.disarm_completion_fd();
    ///     queue.submit();
    ///     if queue.reap(|_, result| assert_eq!(result, Ok(4096))) > 0 {
    ///         continue;
    ///     }
    ///     match queue.arm_completion_fd() {
    ///         Armed::Sleep => { /* epoll_wait on queue.completion_fd(), then clear it */ }
    ///         _ => continue,
    ///     }
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn arm_completion_fd(&mut self) -> Armed {
        // Before the look: a completion whose signal this takes is found by it, or by the reap that is asked for
        // where it cannot be seen. That finds nothing if the signal was of what was reaped already, and expects none
        // then, so it is asked for once.
        let cleared = self
            .backend
            .notifier()
            .is_some_and(|notifier| notifier.clear_expected());
        let unseen = cleared && !self.backend.sees_completions();
        let arming = self.backend.arm();
        if arming == Arming::Pending || unseen || self.refused_or_worked() {
            return Armed::Reap;
        }
        match arming {
            Arming::Silent(count) => Armed::Silent(count),
            _ => Armed::Sleep,
        }
    }

    fn refused_or_worked(&self) -> bool {
        !self.refused.is_empty()
            || !self.taken.is_empty()
            || (self.in_worker > 0
                && self
                    .workers
                    .as_ref()
                    .is_some_and(Workers::completions_pending))
    }

    /// Whether operations are expected to have completed when the [`IoQueue::submit`] that hands them over
    /// returns: the null engine's do, and those of Linux AIO where they lately have, as on tmpfs. A caller that
    /// serves somebody else submits less at a time then, so that he need not wait for all of a large batch.
    #[inline]
    pub fn completes_on_submit(&self) -> bool {
        self.backend.completes_on_submit()
    }

    /// Whether [`IoQueue::reap`] would deliver or continue something: a few loads, no
    /// system call, made for polling. (Where the kernel's completion ring cannot be read, only
    /// `completion_fd` knows what the kernel has completed.)
    pub fn completions_pending(&self) -> bool {
        self.backend.completions_pending() || self.refused_or_worked()
    }

    /// Whether operations are parked and no completion of the engine will come to try them again: the
    /// caller must call [`IoQueue::submit`] after [`RETRY_DELAY`]. A worker thread's completion is not
    /// waited for: the range it is at may take longer than a guest bears.
    pub fn needs_retry(&self) -> bool {
        self.committed + self.backlog > 0
            && self.in_engine == self.backlog
            && self.refused.is_empty()
    }

    /// Operations not handed over yet, parked ones included.
    pub fn queued(&self) -> usize {
        self.pending.len()
    }

    /// Operations handed over whose result was not delivered yet, refused ones included.
    pub fn in_flight(&self) -> usize {
        self.capacity() - self.free_slots() - self.queued()
    }

    /// Operations that can be queued before [`QueueError::Full`](crate::QueueError::Full).
    pub fn free_slots(&self) -> usize {
        self.free.len()
    }

    /// Slots: [`Config::depth`].
    pub fn capacity(&self) -> usize {
        self.owners.len()
    }

    /// Whether nothing is queued or in flight.
    pub fn is_idle(&self) -> bool {
        self.free_slots() == self.capacity()
    }

    /// Segments an operation may have: [`Config::max_segments`].
    pub fn max_segments(&self) -> usize {
        usize::from(self.table.max_segments())
    }
}

impl<O> Drop for IoQueue<O> {
    /// Waits for everything in flight, then drops the owners, which do not learn of a result.
    fn drop(&mut self) {
        let quiet = self.backend.quiesce();
        self.workers = None;
        if quiet || self.in_engine == 0 {
            // SAFETY: not used again; nothing the kernel was given is in flight any more.
            unsafe { ManuallyDrop::drop(&mut self.owners) };
        } else {
            // The kernel may still write to the owners' memory, and leaking it is all
            // that is safe.
            #[cfg(test)]
            tests::leaked_on_purpose(self.owners.as_ptr().addr());
        }
    }
}

impl<O> fmt::Debug for IoQueue<O> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoQueue")
            .field("capacity", &self.capacity())
            .field("queued", &self.queued())
            .field("in_flight", &self.in_flight())
            .field("engine", &self.engine())
            .field("parked", &(self.committed + self.backlog))
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
