//! Discards, write-zeroes and secure erases, range by range.

use ioq::{Durability, Unmap};
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vring::{Chain, Head};

use super::{Executor, Outcome, Started, Starting};
use crate::data_thread::SlotId;
use crate::data_thread::bounce::is_lost;
use crate::data_thread::buffers::{Owner, Transfer};
use crate::data_thread::hot_region::HotRegion;
use crate::ranges::{self, Range, RangeKind, SEGMENT_LEN, SEGMENTS_MAX};
use crate::request::{HEADER_LEN, Status};

impl<M: GuestMemoryBackend> Executor<M> {
    /// Starts a discard, write-zeroes or secure erase of `count` segments.
    pub(super) fn start_ranges(
        &mut self,
        head: Head,
        chain: &Chain,
        memory: &mut HotRegion<'_, M>,
        status: GuestAddress,
        (kind, count): (RangeKind, usize),
    ) -> Started {
        // The room before the status byte: none, as was checked.
        let writable_data = 0;
        let mut segments = [[0u8; SEGMENT_LEN]; SEGMENTS_MAX];
        let bytes = &mut segments.as_flattened_mut()[..count * SEGMENT_LEN];
        let copied = chain.copy_from_readable(memory.map(), HEADER_LEN as u64, bytes);
        if !copied.is_ok_and(|n| n == bytes.len()) {
            if is_lost(chain, memory.map()) {
                return self.answer(head, memory, status, Status::IoErr, 0, writable_data);
            }
            return self.bad_chain(head);
        }
        if self.was_lost(chain, memory.map()) {
            return self.answer(head, memory, status, Status::IoErr, 0, writable_data);
        }
        let mut ranges = [Range::default(); SEGMENTS_MAX];
        let count = match ranges::parse(&segments[..count], kind, &self.geometry, &mut ranges) {
            Ok(0) => return self.answer(head, memory, status, Status::Ok, 0, writable_data),
            Ok(count) => count,
            Err(refusal) => return self.answer(head, memory, status, refusal, 0, writable_data),
        };
        let Some(slot) = self.slots.claim() else {
            return Started::NoRoom(head);
        };
        // A flush covers it as it does a write.
        let work = self.work_of(Transfer::Write);
        self.buffers.hold(slot, memory.memory());
        self.fill_slot(
            slot,
            Starting {
                head,
                status,
                writable_data,
                work,
                offset: 0,
                len: 0,
            },
        );
        self.ranges.fill(slot, kind, ranges, count);
        self.next_range(slot);
        Started::InFlight
    }

    /// Queues the next range of a request. False if all have been done.
    pub(super) fn next_range(&mut self, slot: SlotId) -> bool {
        let Some((kind, range)) = self.ranges.next(slot) else {
            return false;
        };
        let owner = Owner::Range { slot };
        let queued = match kind {
            RangeKind::Discard => self.ioq.queue_discard(range.offset, range.len, owner),
            RangeKind::SecureErase => self.ioq.queue_secure_erase(range.offset, range.len, owner),
            RangeKind::WriteZeroes => {
                let unmap = if range.unmap {
                    Unmap::Allowed
                } else {
                    Unmap::Forbidden
                };
                // As every write; see `buffers.rs`.
                let durability = Durability::WriteBack;
                self.ioq
                    .queue_write_zeroes(range.offset, range.len, unmap, durability, owner)
            }
        };
        match queued {
            Ok(()) => self.counters.operations.add(1),
            Err(error) => self.done.push_back((error.into_owner(), Outcome::Failed)),
        }
        true
    }
}
