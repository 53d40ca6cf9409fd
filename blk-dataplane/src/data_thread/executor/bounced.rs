//! Requests on their way through a bounce buffer, round by round.

use hostmem::SigbusGuard;
use vm_memory::GuestMemoryBackend;

use super::{Executor, Outcome};
use crate::data_thread::SlotId;
use crate::data_thread::bounce::is_lost;
use crate::data_thread::buffers::{Owner, Transfer, queue_bounce};

impl<M: GuestMemoryBackend> Executor<M> {
    /// Queues the next round of a bounced request.
    pub(super) fn bounce_round(&mut self, slot: SlotId) {
        let (Some(request), Some(memory)) = (self.slots.get(slot), self.buffers.memory(slot))
        else {
            return;
        };
        let Some(lane) = self.bounce.lane_of(slot) else {
            return;
        };
        let Some(mut buffer) = lane.buffer.take() else {
            return;
        };
        let len = lane.round_len();
        let ready = match lane.transfer {
            Transfer::Read => true,
            Transfer::Write => {
                lane.copy_in(memory.map(), &mut buffer[..len])
                    && !(SigbusGuard::losses() != request.losses
                        && is_lost(&lane.chain, memory.map()))
            }
        };
        let queued = if ready {
            let at = lane.offset + lane.done;
            queue_bounce(&mut self.ioq, lane.transfer, at, slot, buffer, len)
        } else {
            Err(buffer)
        };
        match queued {
            Ok(()) => self.counters.operations.add(1),
            Err(buffer) => self
                .done
                .push_back((Owner::Bounce { slot, buffer }, Outcome::Failed)),
        }
    }

    /// Ends a round; at the request's end says whether all went well.
    pub(super) fn bounce_round_done(
        &mut self,
        slot: SlotId,
        buffer: Box<ioq::AlignedBuf>,
        mut ok: bool,
    ) -> Option<bool> {
        let (Some(request), Some(memory), Some(lane)) = (
            self.slots.get(slot),
            self.buffers.memory(slot),
            self.bounce.lane_of(slot),
        ) else {
            return Some(ok);
        };
        let len = lane.round_len();
        if ok && matches!(lane.transfer, Transfer::Read) {
            ok = lane.copy_out(memory.map(), &buffer[..len])
                && !(SigbusGuard::losses() != request.losses && is_lost(&lane.chain, memory.map()));
        }
        lane.done += len as u64;
        lane.buffer = Some(buffer);
        if ok && lane.done < lane.len {
            self.bounce_round(slot);
            return None;
        }
        lane.slot = None;
        Some(ok)
    }
}
