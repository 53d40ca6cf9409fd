//! The device configuration space (virtio 1.3 §5.2.4) as the bytes a front-end reads.

use std::mem::offset_of;

use virtio_bindings::virtio_blk::virtio_blk_config;

use crate::ranges::{RangeLimit, RangeLimits};

/// Length of the configuration structure in bytes, zoned characteristics included.
pub const CONFIG_SPACE_LEN: usize = 96;
const _: () = assert!(CONFIG_SPACE_LEN == size_of::<virtio_blk_config>());

/// What the configuration space says; every other field is zero because its feature is not offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ConfigFields {
    /// In 512-byte sectors, whatever the block size.
    pub(crate) capacity_sectors: u64,
    /// Data segments in one request (`VIRTIO_BLK_F_SEG_MAX`).
    pub(crate) seg_max: u32,
    /// Logical block size in bytes (`VIRTIO_BLK_F_BLK_SIZE`).
    pub(crate) blk_size: u32,
    /// `VIRTIO_BLK_F_TOPOLOGY`.
    pub(crate) topology: Topology,
    /// Writes may stay in a volatile cache until a flush (`VIRTIO_BLK_F_CONFIG_WCE`).
    pub(crate) writeback: bool,
    /// Request queues (`VIRTIO_BLK_F_MQ`).
    pub(crate) num_queues: u16,
    /// `VIRTIO_BLK_F_DISCARD`, `VIRTIO_BLK_F_WRITE_ZEROES`, `VIRTIO_BLK_F_SECURE_ERASE`.
    pub(crate) ranges: RangeLimits,
}

/// What size of request the backing likes, as §5.2.4 has it: in logical blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Topology {
    /// Logical blocks per physical one, as a power of two.
    pub(crate) physical_block_exp: u8,
    /// Offset of the first aligned logical block.
    pub(crate) alignment_offset: u8,
    pub(crate) min_io_size: u16,
    pub(crate) opt_io_size: u32,
}

/// Where the one field lies that a driver may write (§5.2.5, `VIRTIO_BLK_F_CONFIG_WCE`): one byte.
const WRITEBACK: usize = offset_of!(virtio_blk_config, wce);

/// What a driver's write to the configuration space means: the new value of `writeback`. `None` if the
/// write touches anything else (hostile-inputs C13).
///
/// Values other than 0 and 1 mean 1 (B30): a cache that the driver believes to be on costs nothing, and one
/// that it wrongly believes to be off would cost data.
pub(crate) fn written_writeback(offset: u32, bytes: &[u8]) -> Option<bool> {
    match (usize::try_from(offset), bytes) {
        (Ok(WRITEBACK), &[value]) => Some(value != 0),
        _ => None,
    }
}

/// The configuration space, little endian as virtio 1.x demands (§2.5.3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_SPACE_LEN],
}

impl ConfigSpace {
    pub(crate) fn new(fields: &ConfigFields) -> Self {
        let mut bytes = [0u8; CONFIG_SPACE_LEN];
        let mut put = |offset: usize, value: &[u8]| {
            bytes[offset..offset + value.len()].copy_from_slice(value);
        };
        put(
            offset_of!(virtio_blk_config, capacity),
            &fields.capacity_sectors.to_le_bytes(),
        );
        put(
            offset_of!(virtio_blk_config, seg_max),
            &fields.seg_max.to_le_bytes(),
        );
        put(
            offset_of!(virtio_blk_config, blk_size),
            &fields.blk_size.to_le_bytes(),
        );
        let Topology {
            physical_block_exp,
            alignment_offset,
            min_io_size,
            opt_io_size,
        } = fields.topology;
        put(
            offset_of!(virtio_blk_config, physical_block_exp),
            &[physical_block_exp, alignment_offset],
        );
        put(
            offset_of!(virtio_blk_config, min_io_size),
            &min_io_size.to_le_bytes(),
        );
        put(
            offset_of!(virtio_blk_config, opt_io_size),
            &opt_io_size.to_le_bytes(),
        );
        put(WRITEBACK, &[u8::from(fields.writeback)]);
        put(
            offset_of!(virtio_blk_config, num_queues),
            &fields.num_queues.to_le_bytes(),
        );
        let ranges = &fields.ranges;
        if let Some(discard) = ranges.discard {
            put(
                offset_of!(virtio_blk_config, max_discard_sectors),
                &discard.max_sectors.to_le_bytes(),
            );
            put(
                offset_of!(virtio_blk_config, max_discard_seg),
                &RangeLimit::MAX_SEGMENTS.to_le_bytes(),
            );
            put(
                offset_of!(virtio_blk_config, discard_sector_alignment),
                &discard.alignment.to_le_bytes(),
            );
        }
        if let Some(write_zeroes) = ranges.write_zeroes {
            put(
                offset_of!(virtio_blk_config, max_write_zeroes_sectors),
                &write_zeroes.max_sectors.to_le_bytes(),
            );
            put(
                offset_of!(virtio_blk_config, max_write_zeroes_seg),
                &RangeLimit::MAX_SEGMENTS.to_le_bytes(),
            );
            put(
                offset_of!(virtio_blk_config, write_zeroes_may_unmap),
                &[u8::from(ranges.may_unmap)],
            );
        }
        if let Some(secure_erase) = ranges.secure_erase {
            put(
                offset_of!(virtio_blk_config, max_secure_erase_sectors),
                &secure_erase.max_sectors.to_le_bytes(),
            );
            put(
                offset_of!(virtio_blk_config, max_secure_erase_seg),
                &RangeLimit::MAX_SEGMENTS.to_le_bytes(),
            );
            put(
                offset_of!(virtio_blk_config, secure_erase_sector_alignment),
                &secure_erase.alignment.to_le_bytes(),
            );
        }
        Self { bytes }
    }

    /// `len` bytes from `offset`, or `None` where the range leaves the structure. Front-ends read
    /// any prefix: 60 bytes (before write zeroes had a secure-erase tail) and 96 are both in use.
    ///
    /// ```
    /// # use blk_dataplane::{Backing, Device, DeviceOptions};
    /// let device = Device::new(Backing::null(1 << 20), &DeviceOptions::default()).unwrap();
    /// let config = device.config_space();
    /// assert_eq!(config.read(0, 8).unwrap(), 2048u64.to_le_bytes());
    /// assert!(config.read(90, 8).is_none());
    /// ```
    #[must_use]
    pub fn read(&self, offset: u32, len: u32) -> Option<&[u8]> {
        let start = usize::try_from(offset).ok()?;
        let end = start.checked_add(usize::try_from(len).ok()?)?;
        self.bytes.get(start..end)
    }
}
