//! A descriptor of a packed ring on the wire (virtio 1.3 §2.8.13).

use virtio_bindings::virtio_ring::{VRING_PACKED_DESC_F_AVAIL, VRING_PACKED_DESC_F_USED};

use crate::split::descriptor::{F_INDIRECT, F_NEXT, F_WRITE};
use crate::split::layout::flag;

/// Holds the driver's wrap counter of the pass a descriptor was made available in.
pub(crate) const F_AVAIL: u16 = flag(1 << VRING_PACKED_DESC_F_AVAIL);
/// Holds the device's wrap counter of the pass a descriptor was used in, and its inverse while
/// the descriptor is available.
pub(crate) const F_USED: u16 = flag(1 << VRING_PACKED_DESC_F_USED);

/// The second half of a descriptor, read once and owned: everything but the address, which a used
/// descriptor does not have. The flags in it say whose the descriptor is, so it is stored and
/// loaded as one word.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Tail {
    pub(crate) len: u32,
    /// The Buffer ID: of the whole chain, in its last descriptor.
    pub(crate) id: u16,
    pub(crate) flags: u16,
}

impl Tail {
    /// Decodes the half as it was loaded from memory.
    #[inline]
    pub(crate) const fn from_word(word: u64) -> Self {
        let [l0, l1, l2, l3, i0, i1, f0, f1] = word.to_ne_bytes();
        Self {
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            id: u16::from_le_bytes([i0, i1]),
            flags: u16::from_le_bytes([f0, f1]),
        }
    }

    /// The half as it is stored to memory.
    #[inline]
    pub(crate) const fn to_word(self) -> u64 {
        let [l0, l1, l2, l3] = self.len.to_le_bytes();
        let [i0, i1] = self.id.to_le_bytes();
        let [f0, f1] = self.flags.to_le_bytes();
        u64::from_ne_bytes([l0, l1, l2, l3, i0, i1, f0, f1])
    }

    /// Whether the driver has made the descriptor available in the pass with this wrap counter:
    /// AVAIL equals it and USED does not (virtio 1.3 §2.8.1).
    #[inline]
    pub(crate) const fn is_available(self, wrap: bool) -> bool {
        self.flags & (F_AVAIL | F_USED) == available_flags(wrap)
    }

    /// Whether the device has used the descriptor in the pass with this wrap counter: both equal
    /// it (virtio 1.3 §2.8.1).
    #[cfg(feature = "driver")]
    #[inline]
    pub(crate) const fn is_used(self, wrap: bool) -> bool {
        self.flags & (F_AVAIL | F_USED) == used_flags(wrap)
    }

    #[inline]
    pub(crate) const fn has_next(self) -> bool {
        self.flags & F_NEXT != 0
    }

    #[inline]
    pub(crate) const fn is_writable(self) -> bool {
        self.flags & F_WRITE != 0
    }

    #[inline]
    pub(crate) const fn is_indirect(self) -> bool {
        self.flags & F_INDIRECT != 0
    }
}

/// The two bits of an available descriptor in the pass with this wrap counter.
#[inline]
pub(crate) const fn available_flags(wrap: bool) -> u16 {
    if wrap { F_AVAIL } else { F_USED }
}

/// The two bits of a used descriptor in the pass with this wrap counter.
#[inline]
pub(crate) const fn used_flags(wrap: bool) -> u16 {
    if wrap { F_AVAIL | F_USED } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_specification_puts_them() {
        let tail = Tail::from_word(u64::from_ne_bytes([1, 2, 3, 4, 5, 6, 7, 8]));
        let expected = Tail {
            len: 0x0403_0201,
            id: 0x0605,
            flags: 0x0807,
        };
        assert_eq!(tail, expected);
        assert_eq!(tail.to_word().to_ne_bytes(), [1, 2, 3, 4, 5, 6, 7, 8]);
    }

    #[test]
    fn a_descriptor_is_available_or_used_in_one_pass_only() {
        let tail = |flags| Tail {
            len: 0,
            id: 0,
            flags,
        };
        for wrap in [false, true] {
            let available = tail(available_flags(wrap));
            assert!(available.is_available(wrap) && !available.is_available(!wrap));
            assert!(!available.is_used(wrap) && !available.is_used(!wrap));
            let used = tail(used_flags(wrap));
            assert!(used.is_used(wrap) && !used.is_used(!wrap));
            assert!(!used.is_available(wrap) && !used.is_available(!wrap));
        }
    }

    #[test]
    fn the_bits_are_7_and_15() {
        assert_eq!((F_AVAIL, F_USED), (0x80, 0x8000));
    }
}
