//! Where things are in a packed ring (virtio 1.3 §2.8).

use crate::ring_memory::DESCRIPTOR_LEN;

/// Alignment of the descriptor ring, in bytes.
pub(crate) const DESCRIPTOR_RING_ALIGNMENT: usize = 16;
/// Alignment of an event suppression structure, in bytes.
pub(crate) const EVENT_SUPPRESSION_ALIGNMENT: usize = 4;
/// Bytes of an event suppression structure (virtio 1.3 §2.8.10).
pub(crate) const EVENT_SUPPRESSION_LEN: usize = 4;

pub(crate) const fn descriptor_ring_len(size: u16) -> usize {
    DESCRIPTOR_LEN * size as usize
}
