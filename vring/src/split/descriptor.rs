//! A descriptor on the wire (virtio 1.3 §2.7.5).

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::layout::flag;

/// The chain continues at `next`.
pub(crate) const F_NEXT: u16 = flag(VRING_DESC_F_NEXT);
/// The device may write the buffer, and not read it.
pub(crate) const F_WRITE: u16 = flag(VRING_DESC_F_WRITE);
/// The buffer is a table of descriptors.
pub(crate) const F_INDIRECT: u16 = flag(VRING_DESC_F_INDIRECT);

/// One descriptor, read once and owned.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Descriptor {
    pub(crate) address: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

impl Descriptor {
    /// Decodes the two halves as they were loaded from memory.
    #[inline]
    pub(crate) const fn from_words(words: [u64; 2]) -> Self {
        let [l0, l1, l2, l3, f0, f1, n0, n1] = words[1].to_ne_bytes();
        Self {
            address: u64::from_le(words[0]),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        }
    }

    /// The two halves as they are stored to memory.
    #[cfg(feature = "driver")]
    #[inline]
    pub(crate) const fn to_words(self) -> [u64; 2] {
        let [l0, l1, l2, l3] = self.len.to_le_bytes();
        let [f0, f1] = self.flags.to_le_bytes();
        let [n0, n1] = self.next.to_le_bytes();
        [
            self.address.to_le(),
            u64::from_ne_bytes([l0, l1, l2, l3, f0, f1, n0, n1]),
        ]
    }

    #[inline]
    pub(crate) const fn has_next(&self) -> bool {
        self.flags & F_NEXT != 0
    }

    #[inline]
    pub(crate) const fn is_writable(&self) -> bool {
        self.flags & F_WRITE != 0
    }

    #[inline]
    pub(crate) const fn is_indirect(&self) -> bool {
        self.flags & F_INDIRECT != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_specification_puts_them() {
        let bytes: [u8; 16] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
        let (low, high) = bytes.split_at(8);
        let descriptor = Descriptor::from_words([
            u64::from_ne_bytes(low.try_into().unwrap()),
            u64::from_ne_bytes(high.try_into().unwrap()),
        ]);
        assert_eq!(
            descriptor,
            Descriptor {
                address: 0x0807_0605_0403_0201,
                len: 0x0c0b_0a09,
                flags: 0x0e0d,
                next: 0x100f,
            }
        );
    }

    #[cfg(feature = "driver")]
    #[test]
    fn encoding_and_decoding_are_inverse() {
        let descriptor = Descriptor {
            address: 0x0807_0605_0403_0201,
            len: 0x0c0b_0a09,
            flags: 0x0e0d,
            next: 0x100f,
        };
        assert_eq!(Descriptor::from_words(descriptor.to_words()), descriptor);
    }
}
