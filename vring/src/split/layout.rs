//! Where things are in a split ring (virtio 1.3 §2.7).

use crate::ring_memory::DESCRIPTOR_LEN;

/// Alignment of the descriptor table, in bytes.
pub(crate) const DESCRIPTOR_TABLE_ALIGNMENT: usize = 16;
/// Alignment of the available ring, in bytes.
pub(crate) const AVAILABLE_RING_ALIGNMENT: usize = 2;
/// Alignment of the used ring, in bytes.
pub(crate) const USED_RING_ALIGNMENT: usize = 4;

/// Offset of `flags` in the available and in the used ring.
pub(crate) const FLAGS_OFFSET: usize = 0;
/// Offset of `idx` in the available and in the used ring.
pub(crate) const INDEX_OFFSET: usize = 2;
/// Offset of `ring[]` in the available and in the used ring.
pub(crate) const RING_OFFSET: usize = 4;
/// Bytes of an element of the available ring.
pub(crate) const AVAILABLE_ELEMENT_LEN: usize = 2;
/// Bytes of an element of the used ring.
pub(crate) const USED_ELEMENT_LEN: usize = 8;
/// Bytes of `used_event` and of `avail_event`. The specification counts them into the ring's
/// size whether or not `VIRTIO_F_EVENT_IDX` is negotiated.
const EVENT_LEN: usize = 2;

pub(crate) const fn descriptor_table_len(size: u16) -> usize {
    DESCRIPTOR_LEN * size as usize
}

/// Offset of `used_event`, right after the elements of the available ring.
pub(crate) const fn used_event_offset(size: u16) -> usize {
    RING_OFFSET + AVAILABLE_ELEMENT_LEN * size as usize
}

pub(crate) const fn available_ring_len(size: u16) -> usize {
    used_event_offset(size) + EVENT_LEN
}

/// Offset of `avail_event`, right after the elements of the used ring.
pub(crate) const fn avail_event_offset(size: u16) -> usize {
    RING_OFFSET + USED_ELEMENT_LEN * size as usize
}

pub(crate) const fn used_ring_len(size: u16) -> usize {
    avail_event_offset(size) + EVENT_LEN
}

/// A flag of the generated bindings, which are 32 bits wide, in the 16 bits it has in a ring.
pub(crate) const fn flag(bits: u32) -> u16 {
    assert!(bits <= 0xffff);
    let [low, high, ..] = bits.to_le_bytes();
    u16::from_le_bytes([low, high])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_table_in_the_specification() {
        assert_eq!(descriptor_table_len(256), 16 * 256);
        assert_eq!(available_ring_len(256), 6 + 2 * 256);
        assert_eq!(used_ring_len(256), 6 + 8 * 256);
    }
}
