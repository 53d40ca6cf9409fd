//! The guest's half of a step: by the rules, and not.

use vm_memory::{Bytes, GuestAddress};
use vring::driver::RawDescriptor;

use super::input::{Op, Raw};
use super::{Offered, Position, Rig};
use crate::ring_input::{Buffers, segments};
use crate::sleep::Sleep;

impl Rig<'_> {
    pub(super) fn guest(&mut self, op: Op) {
        match op {
            Op::AddDirect(buffers) => {
                let (readable, writable) =
                    (segments(&buffers.readable), segments(&buffers.writable));
                if let Ok(id) = self.guest.add_chain(&readable, &writable) {
                    let table = (0, 0);
                    self.offered.push_back(Offered {
                        id,
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
            Op::SetDriverEvent { back, flags } => {
                // From 13 descriptors back to two that are not used yet.
                let size = self.model.size;
                let start = self.model.used.next(size).next(size);
                let at = (0..back % 16).fold(start, |at: Position, _| at.previous(size));
                self.guest.set_driver_event(at.bits(), flags);
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
        if let Ok(id) = self
            .guest
            .add_indirect(GuestAddress(table), &readable, &writable)
        {
            self.clean &= harmless;
            let table = (table, table + 16 * entries as u64);
            self.offered.push_back(Offered {
                id,
                readable,
                writable,
                table,
            });
        }
    }

    /// Whether the ring, or a table that may still be read, is in `[at, at + len)`.
    pub(super) fn in_use(&self, at: u64, len: u64) -> bool {
        let end = at.saturating_add(len);
        let ring = (
            self.model.areas.descriptors,
            self.model.areas.device_event + 4,
        );
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
                assert!(used.expected, "id {id} was completed twice");
            }
            (used, completed) => panic!("the guest sees {used:?}; published was {completed:?}"),
        }
    }

    fn misbehave(&mut self, op: Op) {
        let ahead = |count: u8| {
            let size = self.model.size;
            let at = (0..count).fold(self.model.avail, |at, _| at.next(size));
            at.index
        };
        match op {
            Op::AddRaw { descriptors, id } => {
                let raw = |raw: &Raw| RawDescriptor {
                    address: raw.addr,
                    len: raw.len,
                    flags: raw.flags,
                };
                let descriptors: Vec<_> = descriptors.iter().map(raw).collect();
                // More than the ring has are none.
                let _ = match id {
                    Some(id) => self.guest.add_raw_with_id(id, &descriptors),
                    None => self.guest.add_raw(&descriptors).map(|_| ()),
                };
            }
            Op::WriteDescriptor { ahead: count, raw } => {
                let at = ahead(count);
                self.guest
                    .write_desc(at, raw.addr, raw.len, raw.id, raw.flags);
            }
            Op::WriteUsed { ahead: count, raw } => {
                let at = ahead(count);
                self.guest.write_used_desc(at, raw.id, raw.len, raw.flags);
            }
            Op::WriteTableEntry { address, entry } => {
                let mut bytes = [0; 16];
                bytes[..8].copy_from_slice(&entry.addr.to_le_bytes());
                bytes[8..12].copy_from_slice(&entry.len.to_le_bytes());
                bytes[12..14].copy_from_slice(&entry.id.to_le_bytes());
                bytes[14..].copy_from_slice(&entry.flags.to_le_bytes());
                // Where there is no memory nothing is written.
                let _ = self.memory.write_slice(&bytes, GuestAddress(address));
            }
            Op::WriteDriverEvent { desc, flags } => self.guest.set_driver_event(desc, flags),
            Op::WriteDeviceEvent { desc, flags } => self.guest.set_device_event(desc, flags),
            Op::WriteBytes { address, bytes } => {
                let _ = self.memory.write_slice(&bytes, GuestAddress(address));
            }
            _ => unreachable!("the device's, or a well-behaved guest's"),
        }
    }
}
