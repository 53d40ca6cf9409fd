//! The engine of a [`FaultDisk`](super::FaultDisk): takes operations as one kernel interface or the other does,
//! and runs them when they are reaped.

// UNSAFETY: moves bytes between the image and the operations' segments, as the kernel would.
#![expect(unsafe_code)]

use std::ptr;
use std::sync::Arc;

use libc::iovec;

use super::{Event, Imitates, Shared, State, Step, SubmitStep};
use crate::backend::{Arming, Backend, BlockingFile, Completion, Submission};
use crate::engine::Engine;
use crate::notifier::Notifier;
use crate::op::{Durability, Op, Opcode, Table};

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
pub(super) struct FaultEngine {
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
    pub(super) fn new(shared: Arc<Shared>, imitates: Imitates) -> Self {
        Self {
            shared,
            imitates,
            taken: Vec::new(),
            staged: Vec::new(),
            next_id: 0,
            armed: true,
        }
    }

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
