//! The queue against a guest written by hand: bytes in memory, and nothing of the driver side.

mod chains;
mod events;
mod ownership;
mod set_up;

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::*;
use crate::base::PackedPosition;
use crate::chain::Segment;
use crate::fault::ChainFault;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const RING: u64 = 0x1000;
const DRIVER_EVENT: u64 = 0x100;
const DEVICE_EVENT: u64 = 0x200;
const BUFFERS: u64 = 0x10_0000;
const MEMORY: usize = 0x20_0000;

type Memory = GuestMemoryMmap<()>;

const PACKED: RingFeatures = RingFeatures {
    indirect_desc: true,
    event_idx: false,
    in_order: false,
    packed: true,
};
const EVENT_IDX: RingFeatures = RingFeatures {
    event_idx: true,
    ..PACKED
};
const IN_ORDER: RingFeatures = RingFeatures {
    in_order: true,
    ..PACKED
};

/// Where the guest makes the next descriptor available, and where it looks for the next used one.
struct Guest {
    memory: Arc<Memory>,
    size: u16,
    avail: PackedPosition,
    used: PackedPosition,
}

fn forward(position: &mut PackedPosition, steps: u16, size: u16) {
    for _ in 0..steps {
        position.index += 1;
        if position.index == size {
            position.index = 0;
            position.wrap = !position.wrap;
        }
    }
}

impl Guest {
    fn write(&self, index: u16, address: u64, len: u32, id: u16, flags: u16) {
        let at = RING + 16 * u64::from(index);
        let mut bytes = Vec::new();
        bytes.extend(address.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(id.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Adds one descriptor as it is, marked available.
    fn add(&mut self, address: u64, len: u32, id: u16, flags: u16) {
        let bits = if self.avail.wrap { 0x80 } else { 0x8000 };
        self.write(self.avail.index, address, len, id, flags | bits);
        forward(&mut self.avail, 1, self.size);
    }

    /// Adds a chain of a readable buffer and writable ones after it, 16 bytes each.
    fn add_chain(&mut self, id: u16, descriptors: u16) {
        for i in 0..descriptors {
            let next = if i + 1 < descriptors { NEXT } else { 0 };
            let write = if i > 0 { WRITE } else { 0 };
            // Only the last one's id counts.
            let id = if next == 0 { id } else { 0xdead };
            self.add(BUFFERS + 16 * u64::from(i), 16, id, next | write);
        }
    }

    /// The used descriptor at the guest's position, of a chain with that many descriptors.
    fn take(&mut self, descriptors: u16) -> Option<(u16, u32, bool)> {
        let mut bytes = [0; 8];
        let at = RING + 16 * u64::from(self.used.index) + 8;
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        let flags = u16::from_le_bytes([bytes[6], bytes[7]]);
        let bits = if self.used.wrap { 0x8080 } else { 0 };
        if flags & 0x8080 != bits {
            return None;
        }
        forward(&mut self.used, descriptors, self.size);
        let id = u16::from_le_bytes([bytes[4], bytes[5]]);
        let len = u32::from_le_bytes(bytes[..4].try_into().unwrap());
        Some((id, len, flags & WRITE != 0))
    }

    fn set_event(&self, position: PackedPosition, flags: u16) {
        let word = u32::from(position.to_bits()) | u32::from(flags) << 16;
        self.memory
            .write_slice(&word.to_le_bytes(), GuestAddress(DRIVER_EVENT))
            .unwrap();
    }

    fn device_event(&self) -> (PackedPosition, u16) {
        let mut bytes = [0; 4];
        self.memory
            .read_slice(&mut bytes, GuestAddress(DEVICE_EVENT))
            .unwrap();
        let [d0, d1, f0, f1] = bytes;
        let position = PackedPosition::from_bits(u16::from_le_bytes([d0, d1]));
        (position, u16::from_le_bytes([f0, f1]))
    }
}

fn config(size: u16, features: RingFeatures, at: PackedPosition) -> QueueConfig {
    QueueConfig {
        size: QueueSize::try_from(size).unwrap(),
        addresses: RingAddresses {
            descriptor_area: GuestAddress(RING),
            driver_area: GuestAddress(DRIVER_EVENT),
            device_area: GuestAddress(DEVICE_EVENT),
        },
        features,
        base: RingBase::Packed {
            avail: at,
            used: at,
        },
    }
}

struct Rig {
    guest: Guest,
    queue: PackedQueue<Memory>,
    chain: Chain,
}

impl Rig {
    fn new(size: u16, features: RingFeatures) -> Self {
        Self::at(size, features, PackedPosition::FIRST)
    }

    fn at(size: u16, features: RingFeatures, at: PackedPosition) -> Self {
        let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap());
        let config = config(size, features, at);
        // What driver and device left behind: used descriptors of this pass and the one before.
        for index in 0..size {
            let wrap = (index < at.index) == at.wrap;
            let flags = if wrap { [0x80, 0x80] } else { [0, 0] };
            let at = GuestAddress(RING + 16 * u64::from(index) + 14);
            memory.write_slice(&flags, at).unwrap();
        }
        Self {
            guest: Guest {
                memory: Arc::clone(&memory),
                size,
                avail: at,
                used: at,
            },
            queue: PackedQueue::start(memory, &config).unwrap(),
            chain: Chain::for_queue(config.size),
        }
    }

    fn pop(&mut self) -> Head {
        self.queue
            .pop(&mut self.chain)
            .unwrap()
            .expect("a chain is available")
    }

    fn nothing(&mut self) -> bool {
        self.queue.pop(&mut self.chain) == Ok(None)
    }

    fn ring_fault(&mut self) -> RingFault {
        let base = self.queue.base();
        let Err(PopError::Ring(fault)) = self.queue.pop(&mut self.chain) else {
            panic!("no ring fault");
        };
        assert_eq!(self.queue.base(), base, "nothing consumed");
        assert!(self.nothing() && !self.queue.has_available());
        assert!(self.queue.enable_notification());
        assert_eq!(self.queue.fault(), Some(fault));
        fault
    }
}

fn at(index: u16, wrap: bool) -> PackedPosition {
    PackedPosition { index, wrap }
}
