//! The guest's half of a step, done to both rings alike.

use std::fmt::Debug;

use vm_memory::{Bytes, GuestAddress};
use vring::driver::{F_INDIRECT, SplitDriver};

use super::Rig;
use crate::ring_input::{Memory, segments};
use crate::vring_split::input::Op;

impl Rig<'_> {
    pub(super) fn guest(&mut self, op: Op) {
        match op {
            Op::AddDirect(buffers) => {
                let (readable, writable) =
                    (segments(&buffers.readable), segments(&buffers.writable));
                self.both(|guest| guest.add_chain(&readable, &writable));
            }
            Op::AddIndirect { table, buffers } => {
                let (readable, writable) =
                    (segments(&buffers.readable), segments(&buffers.writable));
                self.both(|guest| guest.add_indirect(GuestAddress(table), &readable, &writable));
            }
            Op::GuestPublish => self.both(SplitDriver::publish),
            Op::NeedsKick => self.both(SplitDriver::needs_kick),
            Op::PollUsed => self.poll_used(),
            Op::EnableInterrupts => self.both(SplitDriver::enable_interrupts),
            Op::DisableInterrupts => self.both(SplitDriver::disable_interrupts),
            Op::SetUsedEvent { beyond } => {
                let used_idx = self.pair.guests[1].used_idx();
                self.both(|guest| guest.set_used_event(used_idx.wrapping_add(beyond)));
            }
            Op::SetAvailFlags(flags) => self.both(|guest| guest.set_avail_flags(flags)),
            _ => self.misbehave(op),
        }
    }

    pub(super) fn poll_used(&mut self) {
        self.both(SplitDriver::poll_used);
    }

    /// Both guests see the same.
    fn both<T: Debug + PartialEq>(&mut self, mut act: impl FnMut(&mut SplitDriver<Memory>) -> T) {
        let [ours, theirs] = &mut self.pair.guests;
        assert_eq!(act(ours), act(theirs));
    }

    fn write(&mut self, address: u64, bytes: &[u8]) {
        let (ours, theirs) = &self.memories;
        // Where there is no memory nothing is written.
        let _ = ours.write_slice(bytes, GuestAddress(address));
        let _ = theirs.write_slice(bytes, GuestAddress(address));
    }

    fn misbehave(&mut self, op: Op) {
        use virtio_queue::QueueT;
        let next_avail = self.pair.oracle.next_avail();
        match op {
            Op::OfferRaw { descriptors, head } => self.both(|guest| {
                for (index, raw) in &descriptors {
                    guest.write_desc(*index, raw.addr, raw.len, raw.flags, raw.next);
                }
                guest.offer(head);
            }),
            Op::WriteTableEntry { address, entry } => {
                let mut bytes = [0; 16];
                bytes[..8].copy_from_slice(&entry.addr.to_le_bytes());
                bytes[8..12].copy_from_slice(&entry.len.to_le_bytes());
                // Nested tables are rare in the wild and end the walk here.
                let flags = entry.flags & !F_INDIRECT | entry.flags >> 8 & F_INDIRECT;
                bytes[12..14].copy_from_slice(&flags.to_le_bytes());
                bytes[14..].copy_from_slice(&entry.next.to_le_bytes());
                self.write(address, &bytes);
            }
            Op::WriteAvailEntry { ahead, head } => {
                self.both(|guest| guest.write_avail_entry(next_avail.wrapping_add(ahead), head));
            }
            Op::MoveAvailIdx { by } => {
                self.both(|guest| guest.set_avail_idx(next_avail.wrapping_add(by)));
            }
            Op::SetUsedIdx(index) => self.both(|guest| guest.set_used_idx(index)),
            Op::SetUsedFlags(flags) => self.both(|guest| guest.set_used_flags(flags)),
            Op::SetAvailEvent(event) => self.both(|guest| guest.set_avail_event(event)),
            Op::WriteUsedEntry { position, id, len } => {
                self.both(|guest| guest.write_used_entry(position, id, len));
            }
            Op::WriteBytes { address, bytes } => self.write(address, &bytes),
            _ => unreachable!("the device's, or a well-behaved guest's"),
        }
    }
}
