//! Any word of a packed ring, right or wrong.

use vm_memory::GuestMemory;

use super::PackedDriver;
use crate::packed::descriptor::Tail;
use crate::packed::event::EventSuppression;

/// Any value into any word, and any word read back. Positions are taken modulo the queue size, so
/// that even a wrong test writes only to its ring.
impl<M: GuestMemory> PackedDriver<M> {
    /// Writes the descriptor at `index`, with its flags as they are, and so at once available or
    /// used if they say so. See `F_AVAIL` and `F_USED` in the [module](crate::driver).
    pub fn write_desc(&self, index: u16, address: u64, len: u32, id: u16, flags: u16) {
        self.rings.store_address(index, address);
        self.rings.publish_tail(index, Tail { len, id, flags });
    }

    /// Writes what a device writes into the descriptor at `index` that it gives back: all but the
    /// address.
    pub fn write_used_desc(&self, index: u16, id: u16, len: u32, flags: u16) {
        self.rings.publish_tail(index, Tail { len, id, flags });
    }

    /// Reads the descriptor at `index`: address, length, buffer id, flags.
    pub fn desc(&self, index: u16) -> (u64, u32, u16, u16) {
        let Tail { len, id, flags } = self.rings.tail(index);
        (self.rings.address(index), len, id, flags)
    }

    /// Writes the driver event suppression structure: a position with its wrap counter in bit 15,
    /// and `RING_EVENT_FLAGS_*` (virtio 1.3 §2.8.10).
    pub fn set_driver_event(&self, desc: u16, flags: u16) {
        let event = EventSuppression { desc, flags };
        self.rings.store_driver_event(event);
    }

    /// Writes the device event suppression structure, which is the device's to write.
    pub fn set_device_event(&self, desc: u16, flags: u16) {
        let event = EventSuppression { desc, flags };
        self.rings.store_device_event(event);
    }

    /// Reads the device event suppression structure: position and flags.
    pub fn device_event(&self) -> (u16, u16) {
        let EventSuppression { desc, flags } = self.rings.device_event();
        (desc, flags)
    }
}
