//! Where things are in a packed ring (virtio 1.3 §2.8).

use crate::ring_memory::DESCRIPTOR_LEN;

/// Alignment of the descriptor ring, in bytes.
pub(crate) const DESCRIPTOR_RING_ALIGNMENT: usize = 16;
/// Alignment of an event suppression structure, in bytes.
pub(crate) const EVENT_SUPPRESSION_ALIGNMENT: usize = 4;
/// Bytes of an event suppression structure (virtio 1.3 §2.8.10).
pub(crate) const EVENT_SUPPRESSION_LEN: usize = 4;

/// Offset in a descriptor of its second half: `len`, `id` and `flags`.
pub(crate) const TAIL_OFFSET: usize = 8;
/// Bytes of [`TAIL_OFFSET`]'s half: all of a descriptor that a used one has (§2.8.6).
pub(crate) const TAIL_LEN: usize = DESCRIPTOR_LEN - TAIL_OFFSET;

pub(crate) const fn descriptor_ring_len(size: u16) -> usize {
    DESCRIPTOR_LEN * size as usize
}
