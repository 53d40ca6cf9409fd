//! Any word of a split ring, right or wrong.

use vm_memory::GuestMemory;

use super::SplitDriver;
use crate::split::descriptor::Descriptor;

/// Any value into any word, and any word read back. Positions and descriptor indices are taken
/// modulo the queue size, so that even a wrong test writes only to its ring.
impl<M: GuestMemory> SplitDriver<M> {
    /// Writes descriptor `index`.
    pub fn write_desc(&self, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        self.rings.store_descriptor(
            index,
            Descriptor {
                address,
                len,
                flags,
                next,
            },
        );
    }

    /// Writes the head at `position` of the available ring.
    pub fn write_avail_entry(&self, position: u16, head: u16) {
        self.rings.store_avail_entry(position, head);
    }

    /// Writes `avail.idx`.
    pub fn set_avail_idx(&self, index: u16) {
        self.rings.publish_avail_idx(index);
    }

    /// Writes `avail.flags`.
    pub fn set_avail_flags(&self, flags: u16) {
        self.rings.store_avail_flags(flags);
    }

    /// Writes `used_event`.
    pub fn set_used_event(&self, event: u16) {
        self.rings.store_used_event(event);
    }

    /// Writes `used.idx`, which is the device's to write.
    pub fn set_used_idx(&self, index: u16) {
        self.rings.publish_used_idx(index);
    }

    /// Writes `used.flags`, which is the device's to write.
    pub fn set_used_flags(&self, flags: u16) {
        self.rings.store_used_flags(flags);
    }

    /// Writes `avail_event`, which is the device's to write.
    pub fn set_avail_event(&self, event: u16) {
        self.rings.store_avail_event(event);
    }

    /// Writes the used element at `position`, which is the device's to write.
    pub fn write_used_entry(&self, position: u16, id: u32, len: u32) {
        self.rings.store_raw_used_element(position, id, len);
    }

    /// Reads `used.idx`.
    pub fn used_idx(&self) -> u16 {
        self.rings.used_idx()
    }

    /// Reads `used.flags`.
    pub fn used_flags(&self) -> u16 {
        self.rings.used_flags()
    }

    /// Reads `avail_event`.
    pub fn avail_event(&self) -> u16 {
        self.rings.avail_event()
    }

    /// Reads `id` and `len` of the used element at `position`.
    pub fn used_entry(&self, position: u16) -> (u32, u32) {
        self.rings.used_element(position)
    }
}
