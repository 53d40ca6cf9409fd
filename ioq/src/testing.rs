//! A disk in memory that injects faults, for the tests of this crate and of those built on it.
//!
//! [`FaultDisk`] answers like the kernel: it takes part of a batch, refuses one operation, moves
//! fewer bytes than asked, fails, and completes late and in another order, as scripted. What is
//! not scripted succeeds.
//!
//! ```
//! use ioq::testing::{FaultDisk, Step};
//! use ioq::{Config, IoErrorKind, IoQueue};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let disk = FaultDisk::new(vec![7; 4096]);
//! disk.script(0..512, [Step::AtMost(100)]);
//! disk.script(512..1024, [Step::Fail(5)]); // EIO
//!
//! let mut queue: IoQueue<(Vec<u8>, u32)> = disk.queue(&Config::default())?;
//! queue.read(0, (vec![0; 512], 0))?;
//! queue.read(512, (vec![0; 512], 1))?;
//! queue.submit();
//! while !queue.is_idle() {
//!     queue.reap(|(_, id), result| match id {
//!         0 => assert_eq!(result, Ok(512)), // continued after 100 bytes
//!         _ => assert_eq!(result.unwrap_err().kind(), IoErrorKind::Storage),
//!     });
//! }
//! # Ok(())
//! # }
//! ```

// UNSAFETY: moves bytes between the image and the operations' segments, as the kernel would.
#![expect(unsafe_code)]

use std::collections::{VecDeque, vec_deque};
use std::ops::Range;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use libc::iovec;

use crate::engine::{BlockingFile, Completion, Engine, Submission};
use crate::error::SetupError;
use crate::notifier::Notifier;
use crate::op::{Durability, Opcode, Table};
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
    fn fdatasync(&self) -> i64 {
        self.state().sync(true)
    }
}

/// A handle of the disk, usable from any thread; clones are the same disk.
#[derive(Clone, Debug)]
pub struct FaultDisk {
    shared: Arc<Shared>,
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
        }
    }

    /// A queue on the disk. For one queue at a time: they would share scripts and the eventfd.
    ///
    /// # Errors
    /// As [`IoQueue::null`].
    pub fn queue<O>(&self, config: &Config) -> Result<IoQueue<O>, SetupError> {
        let engine = FaultEngine {
            shared: Arc::clone(&self.shared),
            taken: Vec::new(),
            next_id: 0,
        };
        IoQueue::with_engine(Box::new(engine), config)
    }

    /// The next submit calls behave so, one step each; later ones take everything.
    pub fn script_submit(&self, steps: impl IntoIterator<Item = SubmitStep>) {
        self.shared.state().submit.extend(steps);
    }

    /// Reads and writes that start within `range` (continuations included) behave so, one step
    /// a try; later tries succeed. Of overlapping ranges the first scripted counts.
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
        drop(state);
        self.shared.notifier.signal();
    }

    /// Lets the `nth` operation waiting complete next, and says whether there was one.
    pub fn release(&self, nth: usize) -> bool {
        let mut state = self.shared.state();
        let found = nth < state.waiting.len();
        if found {
            let id = state.waiting.remove(nth);
            state.ready.push_back(id);
        }
        drop(state);
        if found {
            self.shared.notifier.signal();
        }
        found
    }

    /// Operations taken and not released.
    pub fn waiting(&self) -> usize {
        self.shared.state().waiting.len()
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

/// An operation the disk has taken.
#[derive(Debug)]
struct Taken {
    id: u64,
    slot: u16,
    opcode: Opcode,
    offset: u64,
    segments: Vec<iovec>,
}

#[derive(Debug)]
struct FaultEngine {
    shared: Arc<Shared>,
    taken: Vec<Taken>,
    next_id: u64,
}

// SAFETY: the segments' memory is kept by the queue that owns the engine and moves with it.
unsafe impl Send for FaultEngine {}

impl FaultEngine {
    fn run(state: &mut State, op: &Taken) -> i64 {
        if op.opcode == Opcode::Fdatasync {
            return state.sync(false);
        }
        let limit = match state.transfer_step(op.offset) {
            Some(Step::Fail(errno)) => return -i64::from(errno),
            Some(Step::AtMost(limit)) => limit,
            None => u64::MAX,
        };
        let mut at = usize::try_from(op.offset)
            .unwrap_or(usize::MAX)
            .min(state.image.len());
        let start = at;
        let mut left = usize::try_from(limit).unwrap_or(usize::MAX);
        for segment in &op.segments {
            let part = segment.iov_len.min(left).min(state.image.len() - at);
            let bytes = &mut state.image[at..at + part];
            let memory = segment.iov_base.cast::<u8>();
            if op.opcode == Opcode::Read {
                // SAFETY: the queue's caller vouched for the segment until the owner is back,
                // which it is not before `reap` has returned; `part` is within it.
                unsafe { ptr::copy(bytes.as_ptr(), memory, part) };
            } else {
                // SAFETY: as above.
                unsafe { ptr::copy(memory, bytes.as_mut_ptr(), part) };
            }
            at += part;
            left -= part;
        }
        let (offset, len) = (op.offset, (at - start) as u64);
        if let Opcode::Write(durability) = op.opcode {
            if len == 0 && limit > 0 && !op.segments.is_empty() {
                return -i64::from(libc::ENOSPC);
            }
            if durability == Durability::WriteThrough {
                let State { image, stable, .. } = state;
                stable[start..at].copy_from_slice(&image[start..at]);
            }
            state.log.push(Event::Write {
                offset,
                len,
                durability,
            });
        } else {
            state.log.push(Event::Read { offset, len });
        }
        i64::try_from(len).unwrap_or(i64::MAX)
    }
}

impl Engine for FaultEngine {
    fn submit(&mut self, slots: vec_deque::Iter<'_, u16>, table: &Table) -> Submission {
        let mut state = self.shared.state();
        state.submit_calls += 1;
        let limit = match state.submit.pop_front() {
            Some(SubmitStep::Again | SubmitStep::AtMost(0)) => return Submission::Again,
            Some(SubmitStep::AtMost(limit)) => limit,
            None => usize::MAX,
        };
        let mut accepted = 0;
        // Like the kernel: a refusal is reported only for the first, otherwise it ends the batch.
        for &slot in slots.take(limit) {
            let op = table.op(slot);
            let refusal = if op.opcode == Opcode::Fdatasync {
                state.refuse_fdatasync
            } else {
                state
                    .refuse
                    .iter()
                    .find(|(range, _)| range.contains(&op.offset))
                    .map(|r| r.1)
            };
            match refusal {
                Some(_) if accepted > 0 => break,
                Some(libc::EINVAL | libc::EOPNOTSUPP) if op.opcode == Opcode::Fdatasync => {
                    return Submission::Unsupported;
                }
                Some(errno) => return Submission::Refused(errno),
                None => {}
            }
            let id = self.next_id;
            self.next_id += 1;
            let segments = table.segments(slot).to_vec();
            self.taken.push(Taken {
                id,
                slot,
                opcode: op.opcode,
                offset: op.offset,
                segments,
            });
            if state.held {
                state.waiting.push(id);
            } else {
                state.ready.push_back(id);
            }
            accepted += 1;
        }
        let signal = !state.ready.is_empty();
        drop(state);
        if signal {
            self.shared.notifier.signal();
        }
        Submission::Accepted(accepted)
    }

    fn reap(&mut self, out: &mut [Completion]) -> usize {
        let mut state = self.shared.state();
        let mut count = 0;
        while count < out.len() {
            let Some(id) = state.ready.pop_front() else {
                break;
            };
            let Some(at) = self.taken.iter().position(|op| op.id == id) else {
                continue;
            };
            let op = self.taken.remove(at);
            out[count] = Completion {
                slot: op.slot,
                result: Self::run(&mut state, &op),
            };
            count += 1;
        }
        count
    }

    fn completions_pending(&self) -> bool {
        !self.shared.state().ready.is_empty()
    }

    fn notifier(&self) -> Option<&Arc<Notifier>> {
        Some(&self.shared.notifier)
    }

    fn blocking(&self) -> Option<Arc<dyn BlockingFile>> {
        Some(Arc::<Shared>::clone(&self.shared))
    }

    fn quiesce(&mut self) -> bool {
        // Nothing moves but in `reap`.
        self.taken.clear();
        let mut state = self.shared.state();
        state.waiting.clear();
        state.ready.clear();
        true
    }
}
