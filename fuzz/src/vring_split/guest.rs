//! The guest's half of a step: by the rules, and not.

use vm_memory::{Bytes, GuestAddress};
use vring::driver::F_INDIRECT;

use super::input::Op;
use super::{Offered, Rig};
use crate::ring_input::{Buffers, segments};
use crate::sleep::Sleep;

impl Rig<'_> {
    pub(super) fn guest(&mut self, op: Op) {
        match op {
            Op::AddDirect(buffers) => {
                let (readable, writable) =
                    (segments(&buffers.readable), segments(&buffers.writable));
                if let Ok(head) = self.guest.add_chain(&readable, &writable) {
                    let table = (0, 0);
                    self.offered.push_back(Offered {
                        head,
                        readable,
                        writable,
                        table,
                    });
                }
            }
            Op::AddIndirect { table, buffers } => self.add_indirect(table, &buffers),
            Op::GuestPublish => {
                let count = self.guest.publish();
                self.device.published(count);
                self.visible = self.offered.len();
            }
            Op::NeedsKick => {
                let kicked = self.guest.needs_kick();
                self.device.decided(kicked, self.clean);
            }
            Op::PollUsed => self.poll_used(),
            Op::EnableInterrupts => {
                self.driver = Sleep::new(self.guest.enable_interrupts());
            }
            Op::DisableInterrupts => {
                self.guest.disable_interrupts();
                self.driver = Sleep::default();
            }
            Op::SetUsedEvent { beyond } => {
                self.guest
                    .set_used_event(self.model.used_idx.wrapping_add(beyond));
                self.driver = Sleep::default();
            }
            Op::SetAvailFlags(flags) => {
                self.guest.set_avail_flags(flags);
                self.driver = Sleep::default();
            }
            _ => {
                self.clean = false;
                self.misbehave(op);
            }
        }
    }

    fn add_indirect(&mut self, table: u64, buffers: &Buffers) {
        let (readable, writable) = (segments(&buffers.readable), segments(&buffers.writable));
        let entries = (readable.len() + writable.len()).max(1);
        let harmless = !self.in_use(table, 16 * entries as u64);
        if let Ok(head) = self
            .guest
            .add_indirect(GuestAddress(table), &readable, &writable)
        {
            self.clean &= harmless;
            let table = (table, table + 16 * entries as u64);
            self.offered.push_back(Offered {
                head,
                readable,
                writable,
                table,
            });
        }
    }

    /// Whether the ring, or a table that may still be read, is in `[at, at + len)`.
    pub(super) fn in_use(&self, at: u64, len: u64) -> bool {
        let end = at.saturating_add(len);
        let ring_end = self.model.areas.used + 8 * u64::from(self.model.size) + 6;
        let ring = (self.model.areas.descriptors, ring_end);
        let tables = self
            .offered
            .iter()
            .chain(self.popped.values())
            .map(|chain| chain.table);
        tables
            .chain([ring])
            .any(|(start, stop)| at < stop && start < end)
    }

    pub(super) fn poll_used(&mut self) {
        let used = self.guest.poll_used();
        if !self.clean {
            return;
        }
        match (used, self.completed.pop_front()) {
            (None, None) => {}
            (Some(used), Some((id, len))) => {
                assert_eq!((used.id, used.len), (u32::from(id), len));
                assert!(used.expected, "head {id} was completed twice");
            }
            (used, completed) => panic!("the guest sees {used:?}; published was {completed:?}"),
        }
    }

    fn misbehave(&mut self, op: Op) {
        match op {
            Op::OfferRaw { descriptors, head } => {
                for (index, raw) in descriptors {
                    self.guest
                        .write_desc(index, raw.addr, raw.len, raw.flags, raw.next);
                }
                self.guest.offer(head);
            }
            Op::WriteTableEntry { address, entry } => {
                let mut bytes = [0; 16];
                bytes[..8].copy_from_slice(&entry.addr.to_le_bytes());
                bytes[8..12].copy_from_slice(&entry.len.to_le_bytes());
                // Nested tables are rare in the wild and end the walk here.
                let flags = entry.flags & !F_INDIRECT | entry.flags >> 8 & F_INDIRECT;
                bytes[12..14].copy_from_slice(&flags.to_le_bytes());
                bytes[14..].copy_from_slice(&entry.next.to_le_bytes());
                // Where there is no memory nothing is written.
                let _ = self.memory.write_slice(&bytes, GuestAddress(address));
            }
            Op::WriteAvailEntry { ahead, head } => {
                let position = self.model.next_avail.wrapping_add(ahead);
                self.guest.write_avail_entry(position, head);
            }
            Op::MoveAvailIdx { by } => {
                self.guest
                    .set_avail_idx(self.model.next_avail.wrapping_add(by));
            }
            Op::SetUsedIdx(index) => self.guest.set_used_idx(index),
            Op::SetUsedFlags(flags) => self.guest.set_used_flags(flags),
            Op::SetAvailEvent(event) => self.guest.set_avail_event(event),
            Op::WriteUsedEntry { position, id, len } => {
                self.guest.write_used_entry(position, id, len);
            }
            Op::WriteBytes { address, bytes } => {
                let _ = self.memory.write_slice(&bytes, GuestAddress(address));
            }
            _ => unreachable!("the device's, or a well-behaved guest's"),
        }
    }
}
