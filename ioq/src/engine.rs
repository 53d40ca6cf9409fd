//! The seam between the queue and what runs its operations.
//!
//! Calls are per batch, never per operation, so that they may be dynamic. An engine keeps
//! no owner and frees nothing: it takes slots, and gives each accepted slot back exactly once.

use std::collections::vec_deque;
use std::fmt;
use std::sync::Arc;

use crate::notifier::Notifier;
use crate::op::Table;

/// A slot's result: bytes moved, or an error number negated, as the kernel gives them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Completion {
    pub(crate) slot: u16,
    pub(crate) result: i64,
}

/// What became of the operations passed to [`Engine::submit`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Submission {
    /// That many (at least one) of the first were taken; the queue calls again with the rest.
    Accepted(usize),
    /// None was taken, for want of a resource: try again later.
    Again,
    /// The first operation is refused with this error number; the others were not looked at.
    Refused(i32),
    /// The engine cannot run the first operation without blocking: it goes to the worker. The
    /// others were not looked at.
    Unsupported,
}

/// Runs the operations of a queue.
pub(crate) trait Engine: fmt::Debug + Send {
    /// Hands `slots` (at least one) over, in order. Operations and segments of accepted slots
    /// stay as they are in `table` until the slot came back from [`Engine::reap`].
    fn submit(&mut self, slots: vec_deque::Iter<'_, u16>, table: &Table) -> Submission;

    /// Moves finished operations into `out`, and says how many. Fewer than `out.len()` means none
    /// is left.
    fn reap(&mut self, out: &mut [Completion]) -> usize;

    /// Whether [`Engine::reap`] would find something. No system call.
    fn completions_pending(&self) -> bool;

    /// What becomes readable when an operation completes, if completions are not all there when
    /// [`Engine::submit`] returns.
    fn notifier(&self) -> Option<&Arc<Notifier>>;

    /// The blocking calls, for the worker; `None` if the engine never says
    /// [`Submission::Unsupported`].
    fn blocking(&self) -> Option<Arc<dyn BlockingFile>>;

    /// Waits until nothing accepted touches memory any more. `false` if that cannot be had, in
    /// which case no memory of an operation may ever be freed. Nothing is submitted afterwards.
    fn quiesce(&mut self) -> bool;
}

/// What a worker does for an engine, blocking; results as in [`Completion`].
pub(crate) trait BlockingFile: fmt::Debug + Send + Sync {
    fn fdatasync(&self) -> i64;
}
