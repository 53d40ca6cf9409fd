//! Where a ring goes on, as one device tells the next.

use crate::config::{ConfigError, RingFeatures};

/// Bit of a packed position that holds the wrap counter (vhost-user: "ring state").
const WRAP_BIT: u16 = 1 << 15;

/// A position in a packed ring with the wrap counter of that pass (virtio 1.3 §2.8.1).
///
/// 15 bits of index are enough: a queue has at most 32768 entries, counted from zero.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct PackedPosition {
    /// Descriptor the position is at, below the queue size.
    pub index: u16,
    /// The Ring Wrap Counter: 1 on the first pass, and flipped whenever the ring's end is passed.
    pub wrap: bool,
}

impl PackedPosition {
    /// The first descriptor on the first pass (virtio 1.3 §2.8.1: both counters start at 1).
    pub const FIRST: Self = Self {
        index: 0,
        wrap: true,
    };

    /// Bits 0..=14 the index, bit 15 the wrap counter: the form of vhost-user's ring state and of
    /// the event suppression structures (virtio 1.3 §2.8.10).
    #[inline]
    pub const fn from_bits(bits: u16) -> Self {
        Self {
            index: bits & !WRAP_BIT,
            wrap: bits & WRAP_BIT != 0,
        }
    }

    /// The inverse of [`from_bits`](Self::from_bits).
    #[inline]
    pub const fn to_bits(self) -> u16 {
        self.index & !WRAP_BIT | if self.wrap { WRAP_BIT } else { 0 }
    }

    /// The position `count` descriptors on, at most one pass of a ring of `size`.
    #[cfg(feature = "driver")]
    #[inline]
    pub(crate) const fn advanced(self, count: u16, size: u16) -> Self {
        debug_assert!(self.index < size && count <= size && size <= WRAP_BIT);
        // At most 32767 + 32768.
        let index = self.index + count;
        if index < size {
            Self {
                index,
                wrap: self.wrap,
            }
        } else {
            Self {
                index: index - size,
                wrap: !self.wrap,
            }
        }
    }
}

/// Where a ring goes on: what `SET_VRING_BASE` carries and `GET_VRING_BASE` returns.
///
/// ```
/// use vring::{PackedPosition, RingBase, RingFeatures};
///
/// let packed = RingFeatures { packed: true, ..RingFeatures::default() };
/// assert_eq!(RingBase::from_vhost_user(0x8000_8000, packed)?, RingBase::fresh(packed));
///
/// let split = RingFeatures::default();
/// assert_eq!(RingBase::from_vhost_user(7, split)?, RingBase::Split { next_avail: 7 });
/// assert!(RingBase::from_vhost_user(0x10000, split).is_err());
/// # Ok::<(), vring::ConfigError>(())
/// ```
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum RingBase {
    /// Of a packed ring: unlike a split ring it does not remember where the device stopped.
    Packed {
        /// The next descriptor to look for a chain at.
        avail: PackedPosition,
        /// The next descriptor to give a chain back in.
        used: PackedPosition,
    },
    /// Of a split ring.
    Split {
        /// Index of the next available entry to fetch; free-running.
        next_avail: u16,
    },
}

impl RingBase {
    /// The base of a ring no device has served yet.
    pub const fn fresh(features: RingFeatures) -> Self {
        if features.packed {
            Self::Packed {
                avail: PackedPosition::FIRST,
                used: PackedPosition::FIRST,
            }
        } else {
            Self::Split { next_avail: 0 }
        }
    }

    /// Reads the `num` of a vhost-user vring state: 16 bits of index for a split ring, two packed
    /// positions, the available one in the lower half, for a packed one.
    ///
    /// # Errors
    ///
    /// [`ConfigError::BaseTooLarge`]: the front-end sent more bits than a split ring's index has;
    /// cutting them off would start somewhere else (row R10).
    pub const fn from_vhost_user(num: u32, features: RingFeatures) -> Result<Self, ConfigError> {
        let [b0, b1, b2, b3] = num.to_le_bytes();
        let (low, high) = (u16::from_le_bytes([b0, b1]), u16::from_le_bytes([b2, b3]));
        if features.packed {
            Ok(Self::Packed {
                avail: PackedPosition::from_bits(low),
                used: PackedPosition::from_bits(high),
            })
        } else if high != 0 {
            Err(ConfigError::BaseTooLarge { base: num })
        } else {
            Ok(Self::Split { next_avail: low })
        }
    }

    /// The `num` of a vhost-user vring state: the inverse of
    /// [`from_vhost_user`](Self::from_vhost_user).
    pub const fn to_vhost_user(self) -> u32 {
        let (low, high) = match self {
            Self::Packed { avail, used } => (avail.to_bits(), used.to_bits()),
            Self::Split { next_avail } => (next_avail, 0),
        };
        let ([b0, b1], [b2, b3]) = (low.to_le_bytes(), high.to_le_bytes());
        u32::from_le_bytes([b0, b1, b2, b3])
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PACKED: RingFeatures = RingFeatures {
        indirect_desc: false,
        event_idx: false,
        in_order: false,
        packed: true,
    };

    proptest! {
        #[test]
        fn every_packed_ring_state_survives_the_round_trip(num: u32) {
            let base = RingBase::from_vhost_user(num, PACKED).unwrap();
            prop_assert_eq!(base.to_vhost_user(), num);
        }

        #[test]
        fn r10_a_split_base_of_more_than_16_bits_is_refused_not_cut(num: u32) {
            let base = RingBase::from_vhost_user(num, RingFeatures::default());
            match u16::try_from(num) {
                Ok(next_avail) => {
                    prop_assert_eq!(base, Ok(RingBase::Split { next_avail }));
                    prop_assert_eq!(base.unwrap().to_vhost_user(), num);
                }
                Err(_) => prop_assert_eq!(base, Err(ConfigError::BaseTooLarge { base: num })),
            }
        }
    }
}
