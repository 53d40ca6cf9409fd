//! What becomes of requests when their operation has come back.

use hostmem::SigbusGuard;
use vm_memory::GuestMemoryBackend;

use super::{Ending, Executor, Finished, Outcome, used_len};
use crate::counters::RequestKind;
use crate::data_thread::buffers::{Owner, Transfer};
use crate::data_thread::hot_region::HotRegion;
use crate::data_thread::slots::{Request, Work};
use crate::data_thread::{SlotId, trace_points};
use crate::request::Status;

impl<M: GuestMemoryBackend> Executor<M> {
    pub(super) fn operation_done(
        &mut self,
        owner: Owner<M>,
        outcome: Outcome,
        ending: &mut Ending<'_, '_, M, impl FnMut(Finished)>,
    ) {
        let ok = outcome == Outcome::Done;
        match owner {
            Owner::Guest { first, memory } => {
                self.buffers.give_back(first, memory);
                let single = self
                    .slots
                    .get(first)
                    .is_none_or(|request| request.next.is_none());
                if !ok && !single {
                    self.retry_singly(first);
                } else {
                    self.transfer_done(first, outcome, ending);
                }
            }
            Owner::Range { slot } => {
                if !(ok && self.next_range(slot)) {
                    self.transfer_done(slot, outcome, ending);
                }
            }
            Owner::Sync { first } => {
                self.syncs -= 1;
                // It may have failed to another one what this one should have written.
                let outcome = if self.write_back.has_failed() {
                    Outcome::Failed
                } else {
                    outcome
                };
                self.finish_all(first, outcome, ending);
            }
            Owner::Bounce { slot, buffer } => {
                if let Some(ok) = self.bounce_round_done(slot, buffer, ok) {
                    let outcome = if ok { Outcome::Done } else { Outcome::Failed };
                    self.transfer_done(slot, outcome, ending);
                }
            }
        }
    }

    /// A merged operation failed: its parts are tried alone, so that only the bad one fails.
    pub(super) fn retry_singly(&mut self, first: SlotId) {
        let mut next = Some(first);
        while let Some(slot) = next {
            let Some(request) = self.slots.get_mut(slot) else {
                return;
            };
            next = request.next.take();
            let (work, offset, losses) = (request.work, request.offset, request.losses);
            let transfer = match work {
                Work::Read | Work::Flush => Transfer::Read,
                Work::Write(_) | Work::UnstableWrite => Transfer::Write,
            };
            let one = std::iter::once(slot);
            // What has taken the place of lost memory must not get onto the disk.
            let lost = SigbusGuard::losses() != losses && self.buffers.is_lost(slot);
            if !lost && self.buffers.queue(&mut self.ioq, transfer, offset, one) {
                self.counters.operations.add(1);
            } else {
                if let Some(memory) = self.buffers.memory(slot).cloned() {
                    let owner = Owner::Guest {
                        first: slot,
                        memory,
                    };
                    self.done.push_back((owner, Outcome::Failed));
                }
            }
        }
    }

    /// Ends `first` and those linked to it.
    pub(super) fn finish_all(
        &mut self,
        first: SlotId,
        outcome: Outcome,
        ending: &mut Ending<'_, '_, M, impl FnMut(Finished)>,
    ) {
        let mut next = Some(first);
        while let Some(slot) = next {
            next = self.finish(slot, outcome, ending);
        }
    }

    /// Ends one request. Returns the next of the same operation.
    #[inline(always)]
    pub(super) fn finish(
        &mut self,
        slot: SlotId,
        outcome: Outcome,
        ending: &mut Ending<'_, '_, M, impl FnMut(Finished)>,
    ) -> Option<SlotId> {
        let request = self.slots.get(slot)?;
        let next = request.next;
        // The kernel may have gone on where the memory had not been noticed to be gone.
        let lost = SigbusGuard::losses() != request.losses && self.buffers.is_lost(slot);
        self.bytes_in_flight -= request.len;
        if let Work::Write(epoch) = request.work {
            self.flushes.write_finished(epoch);
        }
        let (status, written) = match (outcome, request.work) {
            // Part of a failed read may have been written; 0 promises nothing.
            (Outcome::Failed, _) => (Status::IoErr, 0),
            _ if lost => (Status::IoErr, 0),
            (Outcome::Unsupported, _) => (Status::Unsupported, 0),
            (Outcome::Done, Work::Read) if self.reads_write => (Status::Ok, request.writable_data),
            (Outcome::Done, _) => (Status::Ok, 0),
        };
        match self.buffers.memory(slot) {
            Some(memory) if memory.is(ending.memory.memory()) => {
                self.write_end(slot, request, status, ending.memory);
            }
            Some(older) => {
                self.write_end(slot, request, status, &mut HotRegion::new(older));
            }
            None => debug_assert!(false, "a request in flight has its map"),
        }
        self.count(request, status, self.reaped);
        let used_len = used_len(written, request.writable_data);
        let (queue, len) = (request.queue, request.len);
        self.buffers.clear(slot);
        let head = self.slots.release(slot)?;
        trace_points::complete_request(queue, &head, status as u8, used_len);
        (ending.finished)(Finished {
            queue,
            head,
            used_len,
            len,
        });
        next
    }

    /// What a request's end leaves in guest memory. `memory` is the request's own map.
    #[inline]
    fn write_end(
        &self,
        slot: SlotId,
        request: &Request,
        status: Status,
        memory: &mut HotRegion<'_, M>,
    ) {
        // Of a read that failed too: part of it may have been written. Bounced data is copied through
        // vm-memory, which marks it.
        if self.marks_dirty && matches!(request.work, Work::Read) {
            self.buffers.mark_dirty(slot, memory);
        }
        self.write_status(memory, request.status, status);
    }

    #[inline]
    pub(super) fn count(&self, request: &Request, status: Status, now: Option<u64>) {
        let counters = self.of_queue(request.queue);
        match (status, request.kind) {
            (Status::Ok, RequestKind::Read) => counters.requests.bytes_read.add(request.len),
            (Status::Ok, RequestKind::Write) => counters.requests.bytes_written.add(request.len),
            (Status::Ok, _) => {}
            (Status::IoErr, _) => counters.requests.failed.add(1),
            (Status::Unsupported, _) => counters.requests.unsupported.add(1),
        }
        if let (Some(now), Some(popped)) = (now, request.popped) {
            counters.took(request.kind, now.saturating_sub(popped));
        }
    }
}
