//! A naive device of a packed ring: what virtio 1.3 §2.8 says, written down plainly over the bytes in
//! memory, independent of the crate's own.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};
use vring::driver::{PackedDriver, PackedLayout, Used};
use vring::{PackedPosition, RingAddresses, RingFeatures};

use crate::rig::{self, Memory, memory, size};

pub(crate) const PACKED: RingFeatures = RingFeatures {
    indirect_desc: true,
    event_idx: false,
    in_order: false,
    packed: true,
};

pub(crate) const SIZE: u16 = 8;

pub(crate) fn addresses() -> RingAddresses {
    let layout = PackedLayout::new(GuestAddress(rig::RING), size(u32::from(SIZE)));
    layout.unwrap().addresses()
}

pub(crate) fn driver(
    features: RingFeatures,
    index: u16,
    wrap: bool,
) -> (PackedDriver<Memory>, NaiveDevice) {
    let memory = memory();
    let at = addresses();
    let entries = size(u32::from(SIZE));
    let position = PackedPosition { index, wrap };
    let driver =
        PackedDriver::starting_at(Arc::clone(&memory), at, entries, features, position).unwrap();
    let device = NaiveDevice {
        memory,
        avail: (index, wrap),
        used: (index, wrap),
    };
    (driver, device)
}

/// One buffer: address, length, writable by the device.
pub(crate) type Buffer = (u64, u32, bool);

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Chain {
    pub(crate) id: u16,
    pub(crate) buffers: Vec<Buffer>,
    pub(crate) descriptors: u16,
}

pub(crate) struct NaiveDevice {
    pub(crate) memory: Arc<Memory>,
    avail: (u16, bool),
    used: (u16, bool),
}

fn step((index, wrap): (u16, bool)) -> (u16, bool) {
    if index + 1 == SIZE {
        (0, !wrap)
    } else {
        (index + 1, wrap)
    }
}

impl NaiveDevice {
    /// Address, length, id and flags of the 16 bytes at `at`.
    fn entry(&self, at: u64) -> (u64, u32, u16, u16) {
        let mut bytes = [0u8; 16];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        (
            u64::from_le_bytes(bytes[..8].try_into().unwrap()),
            u32::from_le_bytes(bytes[8..12].try_into().unwrap()),
            u16::from_le_bytes(bytes[12..14].try_into().unwrap()),
            u16::from_le_bytes(bytes[14..].try_into().unwrap()),
        )
    }

    fn at(index: u16) -> u64 {
        addresses().descriptor_area.0 + 16 * u64::from(index)
    }

    pub(crate) fn pop(&mut self) -> Option<Chain> {
        let (index, wrap) = self.avail;
        let (.., flags) = self.entry(Self::at(index));
        let (avail, used) = (flags & 1 << 7 != 0, flags & 1 << 15 != 0);
        if avail != wrap || used == wrap {
            return None;
        }
        let mut chain = Chain {
            id: 0,
            buffers: Vec::new(),
            descriptors: 0,
        };
        loop {
            let (address, len, id, flags) = self.entry(Self::at(self.avail.0));
            let (_, wrap) = self.avail;
            assert_eq!(flags & 1 << 7 != 0, wrap, "AVAIL of every descriptor");
            assert_eq!(flags & 1 << 15 != 0, !wrap, "USED of every descriptor");
            self.avail = step(self.avail);
            chain.descriptors += 1;
            if flags & 4 == 0 {
                chain.buffers.push((address, len, flags & 2 != 0));
            } else {
                assert_eq!(len % 16, 0);
                for entry in 0..u64::from(len / 16) {
                    let (address, len, _, flags) = self.entry(address + 16 * entry);
                    assert_eq!(flags & !2, 0, "only WRITE in a table");
                    chain.buffers.push((address, len, flags & 2 != 0));
                }
            }
            if flags & 1 == 0 {
                chain.id = id;
                return Some(chain);
            }
        }
    }

    /// Gives `descriptors` descriptors back with one used descriptor.
    pub(crate) fn push(&mut self, id: u16, len: u32, descriptors: u16) {
        let (index, wrap) = self.used;
        let write = if len == 0 { 0 } else { 2 };
        let flags: u16 = write | if wrap { 1 << 7 | 1 << 15 } else { 0 };
        let mut bytes = [0u8; 8];
        bytes[..4].copy_from_slice(&len.to_le_bytes());
        bytes[4..6].copy_from_slice(&id.to_le_bytes());
        bytes[6..].copy_from_slice(&flags.to_le_bytes());
        let at = GuestAddress(Self::at(index) + 8);
        self.memory.write_slice(&bytes, at).unwrap();
        for _ in 0..descriptors {
            self.used = step(self.used);
        }
    }

    pub(crate) fn ask(&self, position: u16, flags: u16) {
        let bytes = [position.to_le_bytes(), flags.to_le_bytes()];
        let at = addresses().device_area;
        self.memory.write_slice(bytes.as_flattened(), at).unwrap();
    }
}

pub(crate) fn used(id: u16, len: u32, expected: bool) -> Used {
    Used {
        id: u32::from(id),
        len,
        expected,
    }
}
