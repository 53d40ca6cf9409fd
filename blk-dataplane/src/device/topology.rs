//! What a guest is told of the sizes the host likes.

use crate::config_space::Topology;
use crate::image::IoHints;

/// Largest physical block a guest is told. File systems in a guest make it their sector, which a page must
/// hold; a network file system's transfer size is no such thing.
const PHYSICAL_BLOCK_MAX: u32 = 4096;

/// What a guest is told of the host's preferences, made consistent: a power of two of logical blocks, and
/// multiples of that, none zero.
pub(super) fn topology(hints: &IoHints, block_size: u32) -> Topology {
    let physical = hints.physical_block.clamp(block_size, PHYSICAL_BLOCK_MAX);
    let physical = if physical.is_power_of_two() {
        physical
    } else {
        block_size
    };
    let exp = (physical / block_size).trailing_zeros();
    let blocks_per_physical = 1 << exp;
    let in_blocks = |bytes: u32| {
        let blocks = bytes / block_size;
        (blocks - blocks % blocks_per_physical).max(blocks_per_physical)
    };
    let min_io_size = u16::try_from(in_blocks(hints.min_io));
    Topology {
        physical_block_exp: u8::try_from(exp).unwrap_or(0),
        alignment_offset: u8::try_from(hints.alignment_offset % physical / block_size).unwrap_or(0),
        // At most 8 blocks per physical one, so that fits.
        min_io_size: min_io_size
            .unwrap_or_else(|_| u16::try_from(blocks_per_physical).unwrap_or(1)),
        opt_io_size: in_blocks(hints.opt_io),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn topology_is_told_in_logical_blocks() {
        let raid = IoHints {
            physical_block: 4096,
            alignment_offset: 3584,
            min_io: 64 << 10,
            opt_io: 192 << 10,
        };
        let expected = Topology {
            physical_block_exp: 3,
            alignment_offset: 7,
            min_io_size: 128,
            opt_io_size: 384,
        };
        assert_eq!(topology(&raid, 512), expected);
        let silent = IoHints {
            physical_block: 512,
            alignment_offset: 0,
            min_io: 512,
            opt_io: 0,
        };
        let expected = Topology {
            physical_block_exp: 0,
            alignment_offset: 0,
            min_io_size: 1,
            opt_io_size: 1,
        };
        assert_eq!(topology(&silent, 4096), expected);
    }

    proptest! {
        #[test]
        fn topology_is_consistent_whatever_the_host_says(
            physical_block: u32,
            alignment_offset: u32,
            min_io: u32,
            opt_io: u32,
            shift in 0u32..20,
            big_blocks: bool,
        ) {
            let hints = IoHints {
                physical_block: physical_block >> shift,
                alignment_offset,
                min_io: min_io >> shift,
                opt_io: opt_io >> shift,
            };
            let block_size = if big_blocks { 4096 } else { 512 };
            let told = topology(&hints, block_size);
            let blocks = 1u32 << told.physical_block_exp;
            prop_assert!(blocks * block_size <= 4096);
            prop_assert!(u32::from(told.alignment_offset) < blocks);
            prop_assert!(told.min_io_size > 0 && told.opt_io_size > 0);
            prop_assert!(u32::from(told.min_io_size).is_multiple_of(blocks));
            prop_assert!(told.opt_io_size.is_multiple_of(blocks));
        }
    }
}
