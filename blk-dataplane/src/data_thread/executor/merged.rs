//! What a batch has started, merged and handed to the I/O queue.

use std::collections::VecDeque;

use hostmem::SigbusGuard;
use ioq::IoQueue;
use iosched::{Merged, Op};
use vm_memory::GuestMemoryBackend;

use super::{Executor, Outcome};
use crate::counters::Counters;
use crate::data_thread::SlotId;
use crate::data_thread::buffers::{GuestBuffers, Owner, Transfer};
use crate::data_thread::slots::Slots;

impl<M: GuestMemoryBackend> Executor<M> {
    pub(super) fn submit_plugged(&mut self) {
        if self.merger.is_empty() {
            return;
        }
        let Self {
            merger,
            slots,
            buffers,
            ioq,
            counters,
            done,
            losses,
            ..
        } = self;
        // Memory has gone since the first of the batch was looked up, somewhere in this process.
        let any_lost = SigbusGuard::losses() != *losses;
        merger.unplug(|merged| {
            queue_merged(&merged, slots, buffers, ioq, counters, any_lost, done);
        });
    }
}

fn queue_merged<M: GuestMemoryBackend>(
    merged: &Merged<'_>,
    slots: &mut Slots,
    buffers: &mut GuestBuffers<M>,
    ioq: &mut IoQueue<Owner<M>>,
    counters: &Counters,
    any_lost: bool,
    done: &mut VecDeque<(Owner<M>, Outcome)>,
) {
    if let [part] = merged.parts
        && !any_lost
        && let Some(slot) = SlotId::from_tag(part.tag)
        && buffers.queue_one(ioq, transfer_of(merged.op), merged.offset, slot)
    {
        counters.operations.add(1);
        return;
    }
    // Tags are slots; see `start`.
    let ids = merged
        .parts
        .iter()
        .filter_map(|part| SlotId::from_tag(part.tag));
    let mut previous: Option<SlotId> = None;
    for slot in ids.clone() {
        if let Some(request) = previous.and_then(|previous| slots.get_mut(previous)) {
            request.next = Some(slot);
        }
        previous = Some(slot);
    }
    let transfer = transfer_of(merged.op);
    // What has taken the place of lost memory must not get onto the disk.
    let lost = any_lost && ids.clone().any(|slot| buffers.is_lost(slot));
    if !lost && buffers.queue(ioq, transfer, merged.offset, ids.clone()) {
        counters.operations.add(1);
        if merged.parts.len() > 1 {
            counters.merged.add(merged.parts.len() as u64);
        }
    } else if let Some(first) = ids.clone().next()
        && let Some(memory) = buffers.memory(first).cloned()
    {
        done.push_back((Owner::Guest { first, memory }, Outcome::Failed));
    }
}

fn transfer_of(op: Op) -> Transfer {
    match op {
        Op::Read => Transfer::Read,
        _ => Transfer::Write,
    }
}
