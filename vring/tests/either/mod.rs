//! A guest and a device on one ring of either format.

#![expect(dead_code, reason = "each test binary uses its own part")]

use std::sync::Arc;

use vm_memory::{GuestAddress, GuestMemoryMmap};
use vring::driver::{Driver, Layout};
use vring::{
    Chain, Head, PackedPosition, Queue, QueueConfig, QueueSize, RingBase, RingFeatures, Segment,
};

pub(crate) type Memory = GuestMemoryMmap<()>;

/// Where the ring is.
pub(crate) const RING: u64 = 0x1000;
/// Free for buffers.
pub(crate) const BUFFERS: u64 = 0x20000;
/// Where memory ends.
const END: usize = 0x40000;

/// Entries of the ring.
pub(crate) const SIZE: u16 = 8;

/// Both formats, each with and without `VIRTIO_F_EVENT_IDX`.
pub(crate) fn all() -> [RingFeatures; 4] {
    [(false, false), (false, true), (true, false), (true, true)].map(|(packed, event_idx)| {
        RingFeatures {
            packed,
            event_idx,
            ..RingFeatures::default()
        }
    })
}

pub(crate) struct Rig {
    pub(crate) memory: Arc<Memory>,
    pub(crate) guest: Driver<Memory>,
    pub(crate) queue: Queue<Memory>,
    pub(crate) chain: Chain,
    pub(crate) config: QueueConfig,
}

impl Rig {
    pub(crate) fn new(features: RingFeatures) -> Self {
        Self::starting_at(features, RingBase::fresh(features))
    }

    pub(crate) fn starting_at(features: RingFeatures, base: RingBase) -> Self {
        let memory = Arc::new(Memory::from_ranges(&[(GuestAddress(0), END)]).unwrap());
        let size = QueueSize::try_from(SIZE).unwrap();
        let addresses = Layout::new(GuestAddress(RING), size, features)
            .unwrap()
            .addresses();
        let config = QueueConfig {
            size,
            addresses,
            features,
            base,
        };
        let guest =
            Driver::starting_at(Arc::clone(&memory), addresses, size, features, base).unwrap();
        Self {
            guest,
            queue: Queue::start(Arc::clone(&memory), &config).unwrap(),
            chain: Chain::for_queue(size),
            memory,
            config,
        }
    }

    /// Makes a chain of one writable buffer available.
    pub(crate) fn offer(&mut self) {
        offer(&mut self.guest);
    }

    pub(crate) fn pop_head(&mut self) -> Head {
        self.queue
            .pop(&mut self.chain)
            .unwrap()
            .expect("a chain is available")
    }
}

/// Makes a chain of one writable buffer available.
pub(crate) fn offer(guest: &mut Driver<Memory>) {
    let buffer = Segment {
        addr: GuestAddress(BUFFERS),
        len: 16,
    };
    guest.add_chain(&[], &[buffer]).unwrap();
    guest.publish();
}

/// A base in the middle of nowhere: entry `index` of a split ring, or what is there in a packed one.
pub(crate) fn base(features: RingFeatures, index: u16) -> RingBase {
    if features.packed {
        let position = PackedPosition {
            index: index % SIZE,
            wrap: index & SIZE == 0,
        };
        RingBase::Packed {
            avail: position,
            used: position,
        }
    } else {
        RingBase::Split { next_avail: index }
    }
}
