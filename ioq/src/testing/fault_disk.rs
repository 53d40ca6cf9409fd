//! A disk in memory that answers like a kernel that has trouble. What answers is in `engine`.

mod engine;

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::engine::FaultEngine;
use crate::backend::BlockingFile;
use crate::error::SetupError;
use crate::notifier::Notifier;
use crate::op::{Durability, Op, Opcode, Unmap};
use crate::queue::{Config, IoQueue};

/// What one call of the disk's `io_submit` does, beside refusing what [`FaultDisk::refuse`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum SubmitStep {
    /// `EAGAIN`: takes nothing.
    Again,
    /// Takes at most that many operations; 0 takes nothing.
    AtMost(usize),
}

/// Which kernel interface a [`FaultDisk`] answers like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Imitates {
    /// What is refused is refused at submission; what there is no room for stays with the caller.
    #[default]
    LinuxAio,
    /// What is refused is taken, and completes with the error; what there is no room for stays in the
    /// ring, before all that is submitted later. While disarmed nothing signals.
    IoUring,
}

/// What one try of an operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Step {
    /// Moves at most that many bytes.
    AtMost(u64),
    /// Moves nothing and completes with this error number.
    Fail(i32),
}

/// An operation as the disk saw it run to completion, each continuation by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// A discard.
    Discard {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
    },
    /// An fdatasync that succeeded; `blocking` if the worker thread ran it.
    Fdatasync {
        /// Whether on the worker thread.
        blocking: bool,
    },
    /// A read.
    Read {
        /// Byte offset.
        offset: u64,
        /// Bytes moved.
        len: u64,
    },
    /// A write.
    Write {
        /// Byte offset.
        offset: u64,
        /// Bytes moved.
        len: u64,
        /// As asked for.
        durability: Durability,
    },
    /// A range made zero.
    WriteZeroes {
        /// Byte offset.
        offset: u64,
        /// Bytes.
        len: u64,
        /// As asked for.
        unmap: Unmap,
        /// As asked for.
        durability: Durability,
    },
}

#[derive(Debug)]
struct Scripted {
    range: Range<u64>,
    steps: VecDeque<Step>,
}

#[derive(Debug, Default)]
struct State {
    image: Vec<u8>,
    stable: Vec<u8>,
    submit: VecDeque<SubmitStep>,
    refuse: Vec<(Range<u64>, i32)>,
    refuse_fdatasync: Option<i32>,
    scripts: Vec<Scripted>,
    fdatasync: VecDeque<Step>,
    held: bool,
    /// Ids of operations taken, in the order they were.
    waiting: Vec<u64>,
    /// Ids that may complete, in the order they shall.
    ready: VecDeque<u64>,
    /// Nothing that completes signals.
    silent: bool,
    log: Vec<Event>,
    submit_calls: usize,
}

impl State {
    fn transfer_step(&mut self, offset: u64) -> Option<Step> {
        let script = self
            .scripts
            .iter_mut()
            .find(|s| s.range.contains(&offset))?;
        script.steps.pop_front()
    }

    fn sync(&mut self, blocking: bool) -> i64 {
        if let Some(Step::Fail(errno)) = self.fdatasync.pop_front() {
            return -i64::from(errno);
        }
        let Self { image, stable, .. } = self;
        stable.clone_from(image);
        self.log.push(Event::Fdatasync { blocking });
        0
    }

    /// A discard, or zeroes.
    fn zero(&mut self, op: &Op, stable: bool, event: Event) -> i64 {
        if let Some(Step::Fail(errno)) = self.transfer_step(op.offset) {
            return -i64::from(errno);
        }
        let end = usize::try_from(op.offset + op.remaining)
            .map_or(self.image.len(), |end| end.min(self.image.len()));
        let start = usize::try_from(op.offset).map_or(end, |start| start.min(end));
        self.image[start..end].fill(0);
        if stable {
            self.stable[start..end].fill(0);
        }
        self.log.push(event);
        i64::try_from(op.remaining).unwrap_or(i64::MAX)
    }
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    notifier: Arc<Notifier>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // A test that failed under the lock has reported its own failure.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BlockingFile for Shared {
    fn run(&self, op: &Op, _stop: &AtomicBool) -> i64 {
        let (offset, len) = (op.offset, op.remaining);
        let mut state = self.state();
        match op.opcode {
            Opcode::Fdatasync => state.sync(true),
            Opcode::Discard => state.zero(op, false, Event::Discard { offset, len }),
            Opcode::WriteZeroes(unmap, durability) => {
                let event = Event::WriteZeroes {
                    offset,
                    len,
                    unmap,
                    durability,
                };
                state.zero(op, durability == Durability::WriteThrough, event)
            }
            // As a file says.
            Opcode::Read | Opcode::Write(_) | Opcode::SecureErase => -i64::from(libc::EOPNOTSUPP),
        }
    }
}

/// A handle of the disk, usable from any thread; clones are the same disk.
#[derive(Clone, Debug)]
pub struct FaultDisk {
    shared: Arc<Shared>,
    imitates: Imitates,
}

impl FaultDisk {
    /// A disk that holds `image`, all of it on stable storage, and never grows: a read ends
    /// at its end, a write beyond it fails with `ENOSPC`.
    ///
    /// # Panics
    /// If no eventfd can be made.
    pub fn new(image: Vec<u8>) -> Self {
        let state = State {
            stable: image.clone(),
            image,
            ..State::default()
        };
        let notifier = Arc::new(Notifier::new().expect("an eventfd"));
        Self {
            shared: Arc::new(Shared {
                state: Mutex::new(state),
                notifier,
            }),
            imitates: Imitates::default(),
        }
    }

    /// The same disk behind another kernel interface; queues made from the result have it.
    #[must_use]
    pub fn imitating(mut self, imitates: Imitates) -> Self {
        self.imitates = imitates;
        self
    }

    /// A queue on the disk. For one queue at a time: they would share scripts and the eventfd.
    ///
    /// # Errors
    /// As [`IoQueue::null`].
    pub fn queue<O>(&self, config: &Config) -> Result<IoQueue<O>, SetupError> {
        let engine = FaultEngine::new(Arc::clone(&self.shared), self.imitates);
        IoQueue::with_backend(Box::new(engine), config)
    }

    /// The next submit calls behave so, one step each; later ones take everything.
    pub fn script_submit(&self, steps: impl IntoIterator<Item = SubmitStep>) {
        self.shared.state().submit.extend(steps);
    }

    /// Operations on memory or a range that start within `range` (continuations included) behave
    /// so, one step a try, of which discards and zeroes know only failures; later tries succeed. Of overlapping ranges the first scripted counts.
    pub fn script(&self, range: Range<u64>, steps: impl IntoIterator<Item = Step>) {
        let steps = steps.into_iter().collect();
        self.shared.state().scripts.push(Scripted { range, steps });
    }

    /// The next fdatasync calls behave so, one step each; later ones succeed.
    pub fn script_fdatasync(&self, steps: impl IntoIterator<Item = Step>) {
        self.shared.state().fdatasync.extend(steps);
    }

    /// From now on, submitting a read or write that starts within `range` fails with `errno`.
    pub fn refuse(&self, range: Range<u64>, errno: i32) {
        self.shared.state().refuse.push((range, errno));
    }

    /// From now on, submitting an fdatasync fails with `errno`; with `EINVAL` or `EOPNOTSUPP` the
    /// worker runs it.
    pub fn refuse_fdatasync(&self, errno: i32) {
        self.shared.state().refuse_fdatasync = Some(errno);
    }

    /// While held, nothing completes but what [`FaultDisk::release`] lets go. Letting go of the
    /// hold releases all, oldest first.
    pub fn hold(&self, held: bool) {
        let mut state = self.shared.state();
        state.held = held;
        if !held {
            let State { waiting, ready, .. } = &mut *state;
            ready.extend(waiting.drain(..));
        }
        let silent = state.silent;
        drop(state);
        if !silent {
            self.shared.notifier.signal();
        }
    }

    /// Lets the `nth` operation waiting complete next, and says whether there was one.
    pub fn release(&self, nth: usize) -> bool {
        let mut state = self.shared.state();
        let found = nth < state.waiting.len();
        if found {
            let id = state.waiting.remove(nth);
            state.ready.push_back(id);
        }
        let silent = state.silent;
        drop(state);
        if found && !silent {
            self.shared.notifier.signal();
        }
        found
    }

    /// Operations taken and not released.
    pub fn waiting(&self) -> usize {
        self.shared.state().waiting.len()
    }

    /// Operations that have completed and were not reaped, those of worker threads aside.
    pub fn ready(&self) -> usize {
        self.shared.state().ready.len()
    }

    /// Submit calls so far.
    pub fn submit_calls(&self) -> usize {
        self.shared.state().submit_calls
    }

    /// What completed without an error so far, in order.
    pub fn log(&self) -> Vec<Event> {
        self.shared.state().log.clone()
    }

    /// What reads give now.
    pub fn image(&self) -> Vec<u8> {
        self.shared.state().image.clone()
    }

    /// What a power cut would leave: writes that an fdatasync or write-through made stable.
    pub fn stable_image(&self) -> Vec<u8> {
        self.shared.state().stable.clone()
    }
}
