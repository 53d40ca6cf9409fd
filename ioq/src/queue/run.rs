//! What happens to an operation from submit to reap: order, refusals, retries, continuations.

use super::{IoQueue, REAP_BATCH, SubmitReport, TRANSIENT_RETRIES_MAX};
use crate::backend::{Completion, Submission};
use crate::error::IoError;
use crate::op::Opcode;
use crate::worker::Workers;

impl<O> IoQueue<O> {
    /// Hands everything queued to the kernel, with one system call as long as nothing is refused; with Linux AIO in
    /// a few, the first ones small, while the file has little to do and operations do not end within the call.
    ///
    /// Loses nothing: what the kernel has no room for stays parked, in order, and is tried again
    /// by the next `submit` or by a [`IoQueue::reap`] that found completions. What the kernel
    /// refuses fails alone, delivered by `reap` like any other error. Never calls back.
    #[inline]
    pub fn submit(&mut self) -> SubmitReport {
        let count = self.pending.len();
        self.committed = count;
        if count == 0 {
            return self.flush(None);
        }
        // Nearly always everything is taken, and nothing else need be looked at.
        let answer = self.backend.submit(self.pending.as_slice(), &self.table);
        let all = matches!(answer, Submission::Accepted { taken, backlog: 0 } if taken == count);
        if !all || self.backlog > 0 {
            return self.flush(Some(answer));
        }
        self.pending.clear();
        self.committed = 0;
        self.in_engine += count;
        SubmitReport {
            submitted: count,
            ..SubmitReport::default()
        }
    }

    /// Acts on the engine's `answer` to all that is committed, then hands over what is left.
    #[inline(never)]
    fn flush(&mut self, answer: Option<Submission>) -> SubmitReport {
        let mut report = SubmitReport::default();
        let mut go_on = match answer {
            Some(answer) => self.act_on(answer, &mut report),
            None => self.committed > 0 || self.backlog > 0,
        };
        // Every round takes at least one operation from `pending` or is the last.
        while go_on {
            let batch = &self.pending.as_slice()[..self.committed];
            let answer = self.backend.submit(batch, &self.table);
            go_on = self.act_on(answer, &mut report);
        }
        report.parked = self.committed + self.backlog;
        if report.refused > 0
            && let Some(notifier) = self.backend.notifier()
        {
            // No kernel completion will wake the caller for these.
            notifier.signal();
        }
        report
    }

    /// Whether to go on with what is left.
    fn act_on(&mut self, answer: Submission, report: &mut SubmitReport) -> bool {
        match answer {
            Submission::Accepted { taken, backlog } => {
                let taken = taken.min(self.committed);
                // What was in the backlog and is not any more counts now.
                report.submitted += (taken + self.backlog).saturating_sub(backlog);
                self.backlog = backlog;
                self.pending.drop_front(taken);
                self.committed -= taken;
                self.in_engine += taken;
                taken > 0 && backlog == 0 && self.committed > 0
            }
            Submission::Again => false,
            Submission::Refused(errno) => {
                if let Some(slot) = self.take_pending() {
                    self.refuse(slot, errno, report);
                }
                self.committed > 0
            }
            Submission::Unsupported => {
                if let Some(slot) = self.take_pending() {
                    match self.give_to_worker(slot) {
                        Ok(()) => report.submitted += 1,
                        Err(errno) => self.refuse(slot, errno, report),
                    }
                }
                self.committed > 0
            }
        }
    }

    fn take_pending(&mut self) -> Option<u16> {
        let slot = self.pending.as_slice().first().copied();
        if slot.is_some() {
            self.committed = self.committed.saturating_sub(1);
            self.pending.drop_front(1);
        }
        slot
    }

    fn refuse(&mut self, slot: u16, errno: i32, report: &mut SubmitReport) {
        self.refused.push_back(Completion {
            slot,
            result: -i64::from(errno),
        });
        report.refused += 1;
    }

    fn give_to_worker(&mut self, slot: u16) -> Result<(), i32> {
        let op = *self.table.op(slot);
        let workers = match &mut self.workers {
            Some(workers) => workers,
            none => {
                let file = self.backend.blocking().ok_or(libc::EOPNOTSUPP)?;
                let depth = u16::try_from(self.owners.len()).unwrap_or(u16::MAX);
                none.insert(Workers::new(depth, file, self.backend.notifier().cloned()))
            }
        };
        workers.submit(slot, op, self.in_worker)?;
        self.in_worker += 1;
        Ok(())
    }

    /// Delivers every operation that has completed, and says how many: its owner, and the bytes
    /// moved or the error. Without a system call if nothing has to be submitted.
    ///
    /// Continues short transfers and tries parked operations again. To sleep on
    /// [`IoQueue::completion_fd`] without missing anything: clear it first, then reap.
    ///
    /// If `complete` panics, the operation it was called for is delivered, and the others are by the
    /// next call.
    pub fn reap(&mut self, mut complete: impl FnMut(O, Result<u64, IoError>)) -> usize {
        let mut delivered = 0;
        let mut resubmit = false;
        // What is refused by the flush below waits for the next call, so that each slot is
        // delivered at most once and the loop ends.
        while let Some(refused) = self.refused.pop_front() {
            let error = errno_of(refused.result);
            delivered += self.deliver_seldom(refused.slot, Err(error), &mut complete);
        }
        loop {
            // Nothing is left of the last batch, unless `complete` panicked.
            let mut more = true;
            if self.taken.is_empty() {
                let count = self.backend.reap(&mut self.completions[..]).min(REAP_BATCH);
                self.taken = 0..count;
                more = count == REAP_BATCH;
            }
            while let Some(&completion) = self.completions[..self.taken.end].get(self.taken.start) {
                self.taken.start += 1;
                self.in_engine = self.in_engine.saturating_sub(1);
                match self.settle(completion) {
                    Some(result) => {
                        delivered += self.deliver(completion.slot, result, &mut complete);
                    }
                    None => resubmit = true,
                }
            }
            if !more {
                break;
            }
        }
        // At most as many results as operations the workers had; none is added meanwhile.
        for _ in 0..self.in_worker {
            let Some(completion) = self.workers.as_ref().and_then(Workers::reap) else {
                break;
            };
            self.in_worker -= 1;
            match self.settle(completion) {
                Some(result) => {
                    delivered += self.deliver_seldom(completion.slot, result, &mut complete);
                }
                None => resubmit = true,
            }
        }
        // A completion freed resources; if nothing is in flight there is none to wait for.
        if self.committed + self.backlog > 0
            && (resubmit || delivered > 0 || self.in_engine == self.backlog)
        {
            self.flush(None);
        }
        delivered
    }

    /// The operation's result, or `None` if it goes on and was put in front of what is parked.
    #[inline]
    fn settle(&mut self, completion: Completion) -> Option<Result<u64, IoError>> {
        let Completion { slot, result } = completion;
        if let Some(op) = self.table.get(slot)
            && u64::try_from(result) == Ok(op.remaining)
        {
            return Some(Ok(op.done + op.remaining));
        }
        self.settle_unfinished(completion)
    }

    #[cold]
    fn settle_unfinished(&mut self, completion: Completion) -> Option<Result<u64, IoError>> {
        let Completion { slot, result } = completion;
        if self
            .owners
            .get(usize::from(slot))
            .is_none_or(Option::is_none)
        {
            // Not a slot in flight: an engine's mistake, which `deliver` ignores too.
            debug_assert!(false, "completion of slot {slot}, which is not in flight");
            return Some(Err(errno_of(-i64::from(libc::EIO))));
        }
        let op = self.table.op_mut(slot);
        let Ok(moved) = u64::try_from(result) else {
            let error = errno_of(result);
            let transient = match error.errno() {
                Some(libc::EINTR) => true,
                // Of an fdatasync, any answer but "interrupted before it began" may mean data lost.
                Some(libc::EAGAIN) => op.opcode != Opcode::Fdatasync,
                _ => false,
            };
            if !transient || op.retries >= TRANSIENT_RETRIES_MAX {
                return Some(Err(error));
            }
            op.retries += 1;
            self.resume(slot);
            return None;
        };
        if !op.opcode.is_transfer() {
            return Some(Ok(op.remaining));
        }
        let remaining = op.remaining;
        match moved.min(remaining) {
            all if all == remaining => Some(Ok(op.done + remaining)),
            0 if op.opcode == Opcode::Read => Some(Err(IoError::UNEXPECTED_EOF)),
            0 => Some(Err(IoError::WRITE_ZERO)),
            part => {
                self.table.advance(slot, part);
                self.resume(slot);
                None
            }
        }
    }

    fn resume(&mut self, slot: u16) {
        self.pending.push_front(slot);
        self.committed += 1;
    }

    /// As `deliver`, without its code: for the ways that few operations take.
    #[cold]
    fn deliver_seldom(
        &mut self,
        slot: u16,
        result: Result<u64, IoError>,
        complete: &mut impl FnMut(O, Result<u64, IoError>),
    ) -> usize {
        self.deliver(slot, result, complete)
    }

    #[inline(always)]
    fn deliver(
        &mut self,
        slot: u16,
        result: Result<u64, IoError>,
        complete: &mut impl FnMut(O, Result<u64, IoError>),
    ) -> usize {
        let Some(owner) = self
            .owners
            .get_mut(usize::from(slot))
            .and_then(Option::take)
        else {
            debug_assert!(false, "completion of slot {slot}, which is not in flight");
            return 0;
        };
        // Before the call, so that a panic in it leaks no slot.
        self.free.push(slot);
        complete(owner, result);
        1
    }
}

/// The error of a negative result.
fn errno_of(result: i64) -> IoError {
    // The kernel's numbers end at 4095.
    IoError::from_errno(i32::try_from(result.saturating_neg()).unwrap_or(libc::EIO))
}
