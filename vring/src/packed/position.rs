//! Positions in a packed ring as free-running 16-bit indices.
//!
//! A ring's size is a power of two, so an index that counts every descriptor ever passed holds
//! both halves of a position: its low bits are the slot, and the bit above them flips whenever
//! the end is passed, as the wrap counter does (virtio 1.3 §2.8.1), which starts at 1:
//!
//! ```text
//!   size 8, index  … 0 1 1 0 1 …
//!                      │ └─┴─┴── slot 5
//!                      └──────── inverse of the wrap counter: 0
//! ```
//!
//! So distances are plain wrapping subtractions, as in a split ring.

use crate::base::PackedPosition;

/// The Ring Wrap Counter of the pass that `index` lies in.
#[inline]
pub(crate) const fn wrap(index: u16, size: u16) -> bool {
    index & size == 0
}

/// The position as others know it.
#[inline]
pub(crate) const fn to_position(index: u16, size: u16) -> PackedPosition {
    PackedPosition {
        index: index & (size - 1),
        wrap: wrap(index, size),
    }
}

/// An index of the position, whose own index is below `size`: the smallest there is.
#[inline]
pub(crate) const fn from_position(position: PackedPosition, size: u16) -> u16 {
    position.index + if position.wrap { 0 } else { size }
}

/// The descriptors from `behind` to `ahead`: below two passes, which is as far as two positions
/// can tell.
#[inline]
pub(crate) const fn distance(behind: PackedPosition, ahead: PackedPosition, size: u16) -> u16 {
    let two_passes = size | (size - 1);
    from_position(ahead, size).wrapping_sub(from_position(behind, size)) & two_passes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_index_moves_as_a_position_does(shift in 0u32..16, start: u16, steps in 0u16..70) {
            let size = 1u16 << shift;
            let start = start & (size | (size - 1));
            let mut position = to_position(start, size);
            for _ in 0..steps {
                position.index += 1;
                if position.index == size {
                    position = PackedPosition { index: 0, wrap: !position.wrap };
                }
            }
            let index = start.wrapping_add(steps);
            prop_assert_eq!(to_position(index, size), position);
            let two_passes = 2 * u32::from(size);
            let again = from_position(position, size);
            prop_assert_eq!(u32::from(again), u32::from(index) % two_passes);
            let moved = distance(to_position(start, size), position, size);
            prop_assert_eq!(u32::from(moved), u32::from(steps) % two_passes);
        }
    }

    #[test]
    fn the_first_position_is_index_zero() {
        for shift in 0..16 {
            let size = 1 << shift;
            assert_eq!(to_position(0, size), PackedPosition::FIRST);
            assert_eq!(from_position(PackedPosition::FIRST, size), 0);
        }
    }
}
