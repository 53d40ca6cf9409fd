//! A disk in memory that answers like a kernel that has trouble.

// UNSAFETY: moves bytes between the image and the operations' segments, as the kernel would.
#![expect(unsafe_code)]

use std::collections::VecDeque;
use std::ops::Range;
use std::ptr;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use libc::iovec;

use crate::backend::{Arming, Backend, BlockingFile, Completion, Submission};
use crate::engine::Engine;
use crate::error::SetupError;
use crate::notifier::Notifier;
use crate::op::{Durability, Op, Opcode, Table, Unmap};
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
        let engine = FaultEngine {
            shared: Arc::clone(&self.shared),
            imitates: self.imitates,
            taken: Vec::new(),
            staged: Vec::new(),
            next_id: 0,
            armed: true,
        };
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

/// An operation the disk has taken.
#[derive(Debug)]
struct Taken {
    id: u64,
    slot: u16,
    opcode: Opcode,
    offset: u64,
    segments: Vec<iovec>,
    /// Refused, which for io_uring is a completion.
    refused: Option<i32>,
}

#[derive(Debug)]
struct FaultEngine {
    shared: Arc<Shared>,
    imitates: Imitates,
    taken: Vec<Taken>,
    /// Ids of `taken` in the ring, which the kernel has not consumed.
    staged: Vec<u64>,
    next_id: u64,
    armed: bool,
}

// SAFETY: the segments' memory is kept by the queue that owns the engine and moves with it.
unsafe impl Send for FaultEngine {}

impl FaultEngine {
    fn run(state: &mut State, op: &Taken) -> i64 {
        if let Some(errno) = op.refused {
            return -i64::from(errno);
        }
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

impl FaultEngine {
    /// Lets operations complete, as far as the disk is not held.
    fn launch(&self, state: &mut State, ids: impl Iterator<Item = u64>) {
        if state.held {
            state.waiting.extend(ids);
        } else {
            state.ready.extend(ids);
        }
        if self.signals() && !state.ready.is_empty() {
            self.shared.notifier.signal();
        }
    }

    fn signals(&self) -> bool {
        self.armed || self.imitates == Imitates::LinuxAio
    }

    fn take(&mut self, slot: u16, table: &Table, refused: Option<i32>) -> u64 {
        let op = table.op(slot);
        let id = self.next_id;
        self.next_id += 1;
        self.taken.push(Taken {
            id,
            slot,
            opcode: op.opcode,
            offset: op.offset,
            segments: table.segments(slot).to_vec(),
            refused,
        });
        id
    }

    fn submit_like_aio(
        &mut self,
        slots: &[u16],
        table: &Table,
        state: &mut State,
        limit: usize,
    ) -> Submission {
        let mut ids = Vec::new();
        // Like the kernel: a refusal is reported only for the first, otherwise it ends the batch.
        for &slot in slots.iter().take(limit) {
            match state.answer(table.op(slot)) {
                Answer::Take => ids.push(self.take(slot, table, None)),
                _ if !ids.is_empty() => break,
                Answer::Refuse(errno) => return Submission::Refused(errno),
                Answer::Worker => return Submission::Unsupported,
            }
        }
        let taken = ids.len();
        if taken == 0 && !slots.is_empty() {
            return Submission::Again;
        }
        self.launch(state, ids.into_iter());
        Submission::Accepted { taken, backlog: 0 }
    }

    fn submit_like_io_uring(
        &mut self,
        slots: &[u16],
        table: &Table,
        state: &mut State,
        limit: usize,
    ) -> Submission {
        let mut taken = 0;
        for &slot in slots {
            let refused = match state.answer(table.op(slot)) {
                Answer::Take => None,
                Answer::Refuse(errno) => Some(errno),
                Answer::Worker if taken == 0 => return Submission::Unsupported,
                Answer::Worker => break,
            };
            let id = self.take(slot, table, refused);
            self.staged.push(id);
            taken += 1;
        }
        let consumed: Vec<_> = self.staged.drain(..limit.min(self.staged.len())).collect();
        self.launch(state, consumed.into_iter());
        Submission::Accepted {
            taken,
            backlog: self.staged.len(),
        }
    }
}

/// What a submit call says to an operation, resources aside.
enum Answer {
    Take,
    Refuse(i32),
    Worker,
}

impl State {
    fn answer(&self, op: &Op) -> Answer {
        match op.opcode {
            Opcode::Discard | Opcode::SecureErase | Opcode::WriteZeroes(..) => Answer::Worker,
            Opcode::Fdatasync => match self.refuse_fdatasync {
                Some(libc::EINVAL | libc::EOPNOTSUPP) => Answer::Worker,
                Some(errno) => Answer::Refuse(errno),
                None => Answer::Take,
            },
            Opcode::Read | Opcode::Write(_) => {
                let mut refused = self.refuse.iter();
                match refused.find(|(range, _)| range.contains(&op.offset)) {
                    Some(&(_, errno)) => Answer::Refuse(errno),
                    None => Answer::Take,
                }
            }
        }
    }
}

impl Backend for FaultEngine {
    fn engine(&self) -> Engine {
        match self.imitates {
            Imitates::LinuxAio => Engine::LinuxAio,
            Imitates::IoUring => Engine::IoUring,
        }
    }

    fn submit(&mut self, slots: &[u16], table: &Table) -> Submission {
        let shared = Arc::clone(&self.shared);
        let mut state = shared.state();
        state.submit_calls += 1;
        let limit = match state.submit.pop_front() {
            Some(SubmitStep::Again) => 0,
            Some(SubmitStep::AtMost(limit)) => limit,
            None => usize::MAX,
        };
        match self.imitates {
            Imitates::LinuxAio if limit == 0 => Submission::Again,
            Imitates::LinuxAio => self.submit_like_aio(slots, table, &mut state, limit),
            Imitates::IoUring => self.submit_like_io_uring(slots, table, &mut state, limit),
        }
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

    fn disarm(&mut self) {
        self.armed = false;
        self.shared.state().silent = self.imitates == Imitates::IoUring;
    }

    fn arm(&mut self) -> Arming {
        self.armed = true;
        let mut state = self.shared.state();
        state.silent = false;
        if state.ready.is_empty() {
            Arming::Armed
        } else {
            Arming::Pending
        }
    }

    fn blocking(&self) -> Option<Arc<dyn BlockingFile>> {
        Some(Arc::<Shared>::clone(&self.shared))
    }

    fn quiesce(&mut self) -> bool {
        // Nothing moves but in `reap`.
        self.taken.clear();
        self.staged.clear();
        let mut state = self.shared.state();
        state.waiting.clear();
        state.ready.clear();
        true
    }
}
