//! Killed after every single store, in both formats.

mod guest;
mod hostile;
mod killed;

use std::cell::RefCell;

use vm_memory::{GuestAddress, GuestMemoryMmap};
use vring::{QueueConfig, QueueSize, RingAddresses, RingBase, RingFeatures};

type Memory = GuestMemoryMmap<()>;

const DESCRIPTORS: u64 = 0;
const DRIVER: u64 = 0x800;
const DEVICE: u64 = 0xC00;
/// Ring and nothing else: buffers are never touched.
const MEMORY_LEN: usize = 0x1000;

thread_local! {
    /// Called after each store to a record of this thread.
    static ON_STORE: RefCell<Option<Box<dyn FnMut()>>> = const { RefCell::new(None) };
}

/// A store has been made.
pub(super) fn stored() {
    ON_STORE.with_borrow_mut(|hook| {
        if let Some(hook) = hook {
            hook();
        }
    });
}

fn config(packed: bool, size: u16, base: RingBase) -> QueueConfig {
    QueueConfig {
        size: QueueSize::try_from(size).unwrap(),
        addresses: RingAddresses {
            descriptor_area: GuestAddress(DESCRIPTORS),
            driver_area: GuestAddress(DRIVER),
            device_area: GuestAddress(DEVICE),
        },
        features: features(packed),
        base,
    }
}

fn features(packed: bool) -> RingFeatures {
    RingFeatures {
        packed,
        ..RingFeatures::default()
    }
}

fn memory() -> Memory {
    Memory::from_ranges(&[(GuestAddress(0), MEMORY_LEN)]).unwrap()
}
