//! Stable storage: the fdatasync behind flushes, and behind writes that must not complete before one.

use vm_memory::GuestMemoryBackend;

use super::{Ending, Executor, Finished, Outcome};
use crate::data_thread::SlotId;
use crate::data_thread::buffers::Owner;
use crate::data_thread::slots::{Request, Work};

impl<M: GuestMemoryBackend> Executor<M> {
    /// Whether a write is to be on stable storage before it completes (virtio 1.3 §5.2.6.2). What counts is
    /// the moment at which the disk has done it: so it holds for writes in flight too.
    pub(in crate::data_thread) fn set_write_through(&mut self, write_through: bool) {
        self.write_through = write_through;
    }

    #[cfg(test)]
    pub(in crate::data_thread) fn is_write_through(&self) -> bool {
        self.write_through
    }

    /// Issues one fdatasync for all flushes that have nothing left to wait for, and for the writes that
    /// must be stable before they complete. While one is under way such writes gather for the next.
    pub(super) fn start_sync(&mut self) {
        let mut whole = None;
        while let Some(slot) = self.flushes.pop_ready() {
            self.append(&mut whole, slot, slot);
        }
        if (whole.is_some() || self.syncs == 0)
            && let Some((first, last)) = self.unsynced.take()
        {
            self.append(&mut whole, first, last);
        }
        let Some((first, _)) = whole else {
            return;
        };
        if self.write_back.has_failed() {
            self.syncs += 1;
            self.done
                .push_back((Owner::Sync { first }, Outcome::Failed));
            return;
        }
        match self.ioq.queue_fdatasync(Owner::Sync { first }) {
            Ok(()) => {
                self.syncs += 1;
                self.counters.syncs.add(1);
            }
            Err(error) => {
                self.syncs += 1;
                self.done.push_back((error.into_owner(), Outcome::Failed));
            }
        }
    }

    /// Links the requests from `first` to `last` behind those in `list`.
    fn append(&mut self, list: &mut Option<(SlotId, SlotId)>, first: SlotId, last: SlotId) {
        match list {
            Some((_, end)) => {
                if let Some(request) = self.slots.get_mut(*end) {
                    request.next = Some(first);
                }
                *end = last;
            }
            None => *list = Some((first, last)),
        }
    }

    /// Ends `first` and those linked to it, or has them wait for the fdatasync they need.
    pub(super) fn transfer_done(
        &mut self,
        first: SlotId,
        outcome: Outcome,
        ending: &mut Ending<'_, '_, M, impl FnMut(Finished)>,
    ) {
        let is_write = |request: &Request| matches!(request.work, Work::Write(_));
        let unstable = outcome == Outcome::Done
            && self.write_through
            && self.slots.get(first).is_some_and(is_write);
        if !unstable {
            self.finish_all(first, outcome, ending);
            return;
        }
        let mut last = first;
        while let Some(request) = self.slots.get_mut(last) {
            if let Work::Write(epoch) = request.work {
                // A flush behind it waits no longer: the fdatasync for that covers this one too.
                self.flushes.write_finished(epoch);
                request.work = Work::UnstableWrite;
            }
            match request.next {
                Some(next) => last = next,
                None => break,
            }
        }
        let mut unsynced = self.unsynced;
        self.append(&mut unsynced, first, last);
        self.unsynced = unsynced;
    }
}
