//! The event suppression structures of a packed ring (virtio 1.3 §2.8.10).

use virtio_bindings::virtio_ring::{
    VRING_PACKED_EVENT_FLAG_DESC, VRING_PACKED_EVENT_FLAG_DISABLE, VRING_PACKED_EVENT_FLAG_ENABLE,
};

use crate::base::PackedPosition;
use crate::split::layout::flag;

/// `RING_EVENT_FLAGS_ENABLE`: notify of everything.
pub(crate) const EVENT_ENABLE: u16 = flag(VRING_PACKED_EVENT_FLAG_ENABLE);
/// `RING_EVENT_FLAGS_DISABLE`: notify of nothing.
pub(crate) const EVENT_DISABLE: u16 = flag(VRING_PACKED_EVENT_FLAG_DISABLE);
/// `RING_EVENT_FLAGS_DESC`: notify when the descriptor named is passed; with
/// `VIRTIO_F_EVENT_IDX` only.
pub(crate) const EVENT_DESC: u16 = flag(VRING_PACKED_EVENT_FLAG_DESC);
/// The bits of the flags that are not reserved.
const EVENT_FLAGS: u16 = 0x3;

/// What one side asks the other to notify it of, read or written as one word.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct EventSuppression {
    /// A position, as [`PackedPosition::to_bits`].
    pub(crate) desc: u16,
    pub(crate) flags: u16,
}

impl EventSuppression {
    pub(crate) const ENABLE: Self = Self {
        desc: 0,
        flags: EVENT_ENABLE,
    };
    pub(crate) const DISABLE: Self = Self {
        desc: 0,
        flags: EVENT_DISABLE,
    };

    /// Notify when the descriptor at `position` is passed.
    #[inline]
    pub(crate) const fn at(position: PackedPosition) -> Self {
        Self {
            desc: position.to_bits(),
            flags: EVENT_DESC,
        }
    }

    /// Decodes the structure as it was loaded from memory.
    #[inline]
    pub(crate) const fn from_word(word: u32) -> Self {
        let [d0, d1, f0, f1] = word.to_ne_bytes();
        Self {
            desc: u16::from_le_bytes([d0, d1]),
            flags: u16::from_le_bytes([f0, f1]),
        }
    }

    /// The structure as it is stored to memory.
    #[inline]
    pub(crate) const fn to_word(self) -> u32 {
        let [d0, d1] = self.desc.to_le_bytes();
        let [f0, f1] = self.flags.to_le_bytes();
        u32::from_ne_bytes([d0, d1, f0, f1])
    }

    /// Whether the other side is to be notified, now that the `stride` descriptors before `new`
    /// were passed in a ring of `size`.
    ///
    /// DESC without the feature and the reserved value are requests nobody can make; a
    /// notification too many does no harm, so they count as ENABLE. The reserved 14 bits are
    /// ignored.
    #[inline]
    pub(crate) const fn wants(
        self,
        event_idx: bool,
        new: PackedPosition,
        stride: u32,
        size: u16,
    ) -> bool {
        match self.flags & EVENT_FLAGS {
            EVENT_DISABLE => false,
            EVENT_DESC if event_idx => {
                passed(PackedPosition::from_bits(self.desc), new, stride, size)
            }
            _ => true,
        }
    }
}

/// Whether `event` is one of the `stride` descriptors before `new`.
///
/// A position with its wrap counter repeats every two passes, which is as far as this looks: after
/// more than that every position was passed. One that is not in the ring never is.
///
/// ```text
///    pass w                  pass !w
///   ├───────────┼───────────┤├──────┼──────────┤
///            event      <── stride ── new           notify: event is `back` before new,
///               └──────── back ──────┘              0 < back <= stride
/// ```
#[inline]
const fn passed(event: PackedPosition, new: PackedPosition, stride: u32, size: u16) -> bool {
    if event.index >= size {
        return false;
    }
    let two_passes = 2 * size as u32;
    let pass_back = if event.wrap == new.wrap { 0 } else { size };
    // At most 32767 + 32768 forwards and 32767 back, so nothing here leaves 32 bits.
    let back = new.index as u32 + pass_back as u32 + two_passes - event.index as u32;
    let back = back % two_passes;
    // The descriptor at `new` itself is not passed yet, but was two passes ago.
    let back = if back == 0 { two_passes } else { back };
    back <= stride
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn next(position: PackedPosition, size: u16) -> PackedPosition {
        if position.index + 1 == size {
            PackedPosition {
                index: 0,
                wrap: !position.wrap,
            }
        } else {
            PackedPosition {
                index: position.index + 1,
                wrap: position.wrap,
            }
        }
    }

    proptest! {
        #[test]
        fn passed_agrees_with_walking_the_ring(
            size in (0u32..5).prop_map(|shift| 1u16 << shift),
            old in 0u16..16,
            wrap: bool,
            stride in 0u32..80,
            event in 0u16..20,
            event_wrap: bool,
        ) {
            let event = PackedPosition { index: event, wrap: event_wrap };
            let mut position = PackedPosition { index: old % size, wrap };
            let mut seen = false;
            for _ in 0..stride {
                seen |= position == event;
                position = next(position, size);
            }
            prop_assert_eq!(passed(event, position, stride, size), seen);
        }
    }

    #[test]
    fn the_largest_ring_does_not_overflow() {
        let at = |index, wrap| PackedPosition { index, wrap };
        for (event, new, expected) in [
            (at(32767, true), at(0, false), true),
            (at(32767, false), at(0, false), false),
            (at(0, false), at(32767, true), false),
        ] {
            assert_eq!(passed(event, new, 1, 32768), expected);
            assert!(passed(event, new, u32::MAX, 32768));
        }
    }

    #[test]
    fn reserved_flags_ask_for_every_notification() {
        let new = PackedPosition::FIRST;
        let asked = |flags, event_idx| {
            EventSuppression {
                desc: 0x7fff,
                flags,
            }
            .wants(event_idx, new, 1, 8)
        };
        for event_idx in [false, true] {
            assert!(asked(0, event_idx) && asked(3, event_idx) && asked(0xfffc, event_idx));
            assert!(!asked(1, event_idx) && !asked(0xfffd, event_idx));
        }
        assert!(asked(2, false));
        assert!(!asked(2, true));
    }

    #[test]
    fn fields_are_where_the_specification_puts_them() {
        let event = EventSuppression::from_word(u32::from_ne_bytes([1, 2, 3, 4]));
        let expected = EventSuppression {
            desc: 0x0201,
            flags: 0x0403,
        };
        assert_eq!(event, expected);
        assert_eq!(event.to_word().to_ne_bytes(), [1, 2, 3, 4]);
    }
}
